"""GPTQ-WUSH as in the paper against the best known at the same run-time cost, part by part.

Prints for each format a table with ratios to the paper's setting and the spread over calibration
draws, and writes every number as JSON and a plot. On the embedded model:

    python examples/04_paper_vs_best.py --out quality

on a model of example 01 (bytes are tokens), or on a Hugging Face folder with its tokenizer:

    python examples/04_paper_vs_best.py --model wide.safetensors --text wikitext2-valid.txt
    python examples/04_paper_vs_best.py --model Llama-3.2-1B --text valid.txt --length 2048

Any other Flax model: `wush_jax.evaluation.draws.compare_draws`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

import wush_jax as wush
from wush_jax.evaluation.draws import ablation, compare_draws
from wush_jax.models import load_pretrained
from wush_jax.models.demo import load_demo_model, load_model, split_text, stdlib_text, token_batches
from wush_jax.models.text import Tokenizer
from wush_jax.solvers.recipe import Recipe

FORMATS = {fmt.name: fmt for fmt in (wush.MXFP4, wush.NVFP4, wush.INT4)}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      out: folder for JSON and plots.
      model: a file of example 01 or a Hugging Face folder; the embedded model if not given.
      text: files whose last twentieth is for evaluation, the one before it for calibration; the
        standard library's sources if not given.
      formats: names of formats.
      draws: random draws of calibration windows.
      batch: windows in a batch.
      length: tokens in a window.
      calibration_tokens: per draw.
      evaluation_tokens: of held-out text, the same for every setting.
      parts: also each part added to the paper's setting, and removed from the best.
      wide: also d = 64 and 128, where every layer takes them.
    """

    out: Path = Path("quality")
    model: Path | None = None
    text: tuple[Path, ...] = ()
    formats: tuple[str, ...] = ("MXFP4", "NVFP4", "INT4")
    draws: int = 3
    batch: int = 16
    length: int = 256
    calibration_tokens: int = 65536
    evaluation_tokens: int = 65536
    parts: bool = True
    wide: bool = True


def settings(fmt: wush.Format, options: Options) -> dict[str, Recipe]:
    """Return baselines, the paper's setting, the best, and what lies between."""
    parts = ablation(fmt)
    baselines = {
        f"rtn {name}": Recipe(format=fmt, transform=name, share_transform=False)
        for name in ("identity", "hadamard", "wush")
    }
    chosen = parts if options.parts else {name: parts[name] for name in ("paper", "best")}
    best = wush.BEST.replace(format=fmt)
    chosen = baselines | chosen | {"best, one transform a site": best.replace(share_transform=True)}
    if options.wide:
        chosen |= {f"best, d = {d}": best.replace(block_size=d) for d in (64, 128)}
        chosen |= {"paper, d = 128": wush.PAPER.replace(format=fmt, block_size=128)}
    return chosen


def load(path: Path | None) -> tuple[Any, Any]:
    """Return a model, and its tokenizer where bytes are not the tokens."""
    if path is None:
        return load_demo_model(), None
    if path.is_file():
        return load_model(path), None
    return load_pretrained(path), Tokenizer.read(path)


def read(options: Options, tokenizer: Any) -> tuple[Any, Any]:
    """Return the tokens to calibrate and to evaluate on."""
    if options.text:
        parts = split_text(b"\n\n".join(path.read_bytes() for path in options.text))
    else:
        parts = {name: stdlib_text(name) for name in ("calibration", "evaluation")}
    chosen = parts["calibration"], parts["evaluation"]
    if tokenizer is None:
        return chosen
    return tuple(np.asarray(tokenizer.encode(p.decode(errors="ignore")), np.int32) for p in chosen)


def main(options: Options) -> None:
    """Run all formats and print their tables."""
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.model)
    calibration, held_out = read(options, tokenizer)
    window = {"batch": options.batch, "length": options.length}
    per_batch = options.batch * options.length
    limit = options.evaluation_tokens // per_batch
    evaluation = list(token_batches(held_out, limit=limit, **window))
    start = time.perf_counter()

    def draws() -> Iterator[Iterator[np.ndarray]]:
        for seed in range(options.draws):
            limit = options.calibration_tokens // per_batch
            yield token_batches(calibration, limit=limit, seed=seed, **window)

    for name in options.formats:

        def step(draw: int, setting: str, name: str = name) -> None:
            seconds = time.perf_counter() - start
            print(f"{seconds:6.0f} s  {name}  draw {draw}  {setting}", flush=True)

        for found in compare_draws(
            model,
            settings(FORMATS[name], options),
            draws(),
            evaluation,
            step=step,
            folder=options.out / name,
        ):
            found.to_json(options.out / f"{name}.json")
        found.plot(options.out / f"{name}.png")
        console = Console(width=150)
        console.print(f"{name}, {options.draws} draws")
        console.print(found.table())


if __name__ == "__main__":
    main(tyro.cli(Options))
