"""``wush demo``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax import formats
from wush_jax.checkpoints.checkpoint import save
from wush_jax.commands.terminal import console, progress_bar
from wush_jax.evaluation.study import Outcome, Study, compare
from wush_jax.layers.nnx import dense_layers
from wush_jax.models.demo import load_demo_model, split_text, stdlib_text, token_batches
from wush_jax.models.hugging_face import load_pretrained
from wush_jax.models.text import Tokenizer
from wush_jax.solvers.ahead import compile_ahead
from wush_jax.solvers.presets import BEST, BEST_WIDE, PAPER
from wush_jax.solvers.recipe import Recipe

ROUNDED = ("identity", "random", "hadamard", "wus", "wush")
SOLVED = {"PAPER": PAPER, "BEST": BEST, "BEST_WIDE": BEST_WIDE}
#: Formats of weights and activations, and what is shown of each: minutes, where all take an hour.
SHOWN = (
    (formats.MXFP4, "same", ("identity", "hadamard", "wush", "PAPER", "BEST")),
    (formats.NVFP4, "same", ("wush", "PAPER")),
    (formats.INT4, "same", ("wush",)),
    (formats.NVINT4, "same", ("wush", "PAPER")),
    (formats.MXFP4, formats.FP8, ("wush", "PAPER")),
)
QUICK = 4  # the first of the first format
SHARES = 8, 4  # of the tokens, to calibrate and to evaluate, the quick one reads one in so many
ROWS = 2048  # tokens at a time, and those that the losses of layers are measured on


def demo(
    *,
    out: Path = Path("wush-demo"),
    quick: bool = False,
    all: bool = False,  # the flag's name
    model: Path | None = None,
    text: Path | None = None,
    calibration_tokens: int = 65536,
    evaluation_tokens: int = 8192,
) -> None:
    """Quantize a language model in many settings and show what each transform and solver buys.

    The embedded model, of bytes, on held-out modules of the standard library, with no network; or a
    folder and a text of yours. Writes report.json, plot.png and the checkpoint of the best setting.

    Args:
      out: folder for the results.
      quick: four settings of one format on less text.
      all: every format with every transform and preset, BEST_WIDE among them.
      model: a Hugging Face folder in place of the embedded model.
      text: with --model, a text: its last twentieth to evaluate, the one before it to calibrate.
      calibration_tokens: tokens for the second moments.
      evaluation_tokens: tokens for KL and perplexity.
    """
    for name, count in (("calibration", calibration_tokens), ("evaluation", evaluation_tokens)):
        if count < 1:
            raise ValueError(f"{name}_tokens={count} must be positive")
    if (model is None) != (text is None):
        raise ValueError("--model and --text go together: a folder, and a text for it")
    start = time.perf_counter()
    terminal = console()
    shares = SHARES if quick else (1, 1)
    counts = calibration_tokens // shares[0], evaluation_tokens // shares[1]
    network, batches = _yours(model, text, counts) if model and text else _embedded(counts)
    settings = settings_of(quick=quick, all=all)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(terminal) as bar, _compiled_ahead(network, settings) as compiled:
        task = bar.add_task("start", total=len(settings) + 1)

        def step(name: str) -> None:
            done = 0 if name == "calibrate" else list(settings).index(name) + 1
            bar.update(task, description=name, completed=done)
            wait(compiled.get(name, ()))

        best: list[tuple[Outcome, nnx.Module]] = []

        def keep(outcome: Outcome, quantized: nnx.Module) -> None:
            best[:] = (min([*best, (outcome, quantized)], key=lambda pair: pair[0].kl),)

        path = out / "report.json"
        study = compare(network, settings, *batches, step=step, each=keep, path=path)
        bar.update(task, description="done", completed=len(settings) + 1)
    terminal.print(study.table())
    study.plot(out / "plot.png")
    ((outcome, quantized),) = best
    save(out / "checkpoint", quantized)
    terminal.print(*seen(study), sep="\n")
    terminal.print(f"best by KL: {outcome.name}; its checkpoint: {out / 'checkpoint'}")
    terminal.print(f"report.json and plot.png are in {out}; ", end="")
    terminal.print(f"{time.perf_counter() - start:.0f} s on {jax.devices()[0].device_kind}")


@contextmanager
def _compiled_ahead(
    network: nnx.Module, settings: Mapping[str, Recipe]
) -> Iterator[dict[str, list[Future]]]:
    """Compile the solvers of all settings beside what runs: tasks by the name of a setting.

    On a CPU only: accelerators solve many layers in one program.
    """
    if jax.default_backend() != "cpu":
        yield {}
        return
    layers, _ = dense_layers(network)
    shapes = {(layer.contraction.shape, layer.kernel.dtype) for layer in layers.values()}
    weights = [jax.ShapeDtypeStruct(*shape) for shape in sorted(shapes, key=str)]
    pool = ThreadPoolExecutor(1)
    try:
        yield {
            name: [pool.submit(compile_ahead, weight, recipe) for weight in weights]
            for name, recipe in settings.items()
        }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def settings_of(*, quick: bool = False, all: bool = False) -> dict[str, Recipe]:
    """Return recipes by name, such as "MXFP4 wush" (by rounding) and "MXFP4-FP8 BEST".

    Args:
      quick: MXFP4 alone, and no preset that refits.
      all: every transform and preset in every format.

    >>> list(settings_of(quick=True))
    ['MXFP4 identity', 'MXFP4 hadamard', 'MXFP4 wush', 'MXFP4 PAPER']
    """
    found: dict[str, Recipe] = {}
    for fmt, inputs, shown in SHOWN[:1] if quick else SHOWN:
        name = fmt.name if isinstance(inputs, str) else f"{fmt.name}-{inputs.name}"
        kinds: dict[str, Any] = {"format": fmt, "activation_format": inputs}
        for setting in (*ROUNDED, *SOLVED) if all else shown[:QUICK] if quick else shown:
            taken = SOLVED[setting] if setting in SOLVED else Recipe(transform=setting)
            changes = kinds if isinstance(inputs, formats.Format) else {"format": fmt}
            found[f"{name} {setting}"] = taken.replace(**changes)
    return found


def seen(study: Study) -> list[str]:
    """Return what a study shows, in plain sentences: as far as it has the settings for them."""
    groups = study.groups()
    kl = {fmt: {name: o.kl for name, o in group.items()} for fmt, group in groups.items()}
    said = []
    first = kl.get("MXFP4", {})
    if {"identity", "hadamard", "wush"} <= set(first):
        said.append(
            "In MXFP4, by rounding alone, WUSH leaves "
            f"{_percent(first, 'wush', 'identity')} of the KL without a transform and "
            f"{_percent(first, 'wush', 'hadamard')} of a Hadamard rotation's."
        )
    if "PAPER" in first:
        better = [f"{n} {_percent(first, n, 'PAPER')}" for n in ("BEST", "BEST_WIDE") if n in first]
        said.append(
            f"GPTQ (PAPER) leaves {_percent(first, 'PAPER', 'wush')} of rounding's KL"
            + (f"; of PAPER's, {' and '.join(better)}." if better else ".")
        )
    least = min(study.outcomes, key=lambda o: o.kl)
    said.append(
        f"The least KL, {least.kl:.3g} nats, is {least.name}'s; the unquantized model's perplexity "
        f"of {study.reference.perplexity:.4g} becomes {least.perplexity:.4g}."
    )
    return said


def _percent(kl: Mapping[str, float], name: str, other: str) -> str:
    return f"{100 * kl[name] / kl[other]:.0f} %" if kl[other] else "all"


def _embedded(counts: tuple[int, int]) -> tuple[nnx.Module, list[list[np.ndarray]]]:
    """Return the embedded model, and batches to calibrate and to evaluate."""
    texts = stdlib_text("calibration"), stdlib_text("evaluation")
    return load_demo_model(), [_windows(t, n, 256) for t, n in zip(texts, counts, strict=True)]


def _yours(
    model: Path, text: Path, counts: tuple[int, int]
) -> tuple[nnx.Module, list[list[np.ndarray]]]:
    """Return a folder's model, and batches of a text."""
    if not text.is_file():
        raise ValueError(f"--text {text} is no file")
    parts = split_text(text.read_bytes())
    tokenizer = Tokenizer.read(model)
    batches = []
    for name, count in zip(("calibration", "evaluation"), counts, strict=True):
        tokens = np.asarray(tokenizer.encode(parts[name].decode("utf8", "ignore")), np.int32)
        batches.append(_windows(tokens, count, min(512, len(tokens))))
    network = load_pretrained(model, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return network, batches


def _windows(text: bytes | np.ndarray, count: int, length: int) -> list[np.ndarray]:
    batch = max(1, min(ROWS, count, len(text)) // length)
    limit = max(1, count // (batch * length))
    return list(token_batches(text, batch=batch, length=length, limit=limit))
