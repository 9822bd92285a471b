"""``wush demo``."""

from __future__ import annotations

import time
from pathlib import Path

import jax
from flax import nnx

from wush_jax import formats
from wush_jax.checkpoints.checkpoint import save
from wush_jax.commands.terminal import console, progress_bar
from wush_jax.evaluation.study import Outcome, compare, grid
from wush_jax.models.demo import load_demo_model, stdlib_text, token_batches

DEMO_TRANSFORMS = ("identity", "random", "hadamard", "wus", "wush")


def demo(
    *,
    out: Path = Path("wush-demo"),
    quick: bool = False,
    calibration_tokens: int = 65536,
    evaluation_tokens: int = 16384,
) -> None:
    """Quantize the embedded language model in every setting and show what each transform buys.

    Calibrates and evaluates on held-out modules of the standard library; needs no network. Writes
    report.json, plot.png and the quantized checkpoint of the best setting.

    Args:
      out: folder for the results.
      quick: three settings of one format and a quarter of the text: under a minute.
      calibration_tokens: tokens for the second moments.
      evaluation_tokens: tokens for KL and perplexity.
    """
    for name, count in (("calibration", calibration_tokens), ("evaluation", evaluation_tokens)):
        if count < 1:
            raise ValueError(f"{name}_tokens={count} must be positive")
    start = time.perf_counter()
    terminal = console()
    out.mkdir(parents=True, exist_ok=True)
    window = {"batch": 16, "length": 256}
    share = 4 if quick else 1
    per_batch = window["batch"] * window["length"]
    calibration = token_batches(
        stdlib_text("calibration"),
        limit=max(1, calibration_tokens // share // per_batch),
        **window,
    )
    evaluation = list(
        token_batches(
            stdlib_text("evaluation"),
            limit=max(1, evaluation_tokens // share // per_batch),
            **window,
        )
    )
    chosen = [formats.MXFP4] if quick else [formats.MXFP4, formats.NVFP4, formats.INT4]
    names = ("identity", "hadamard", "wush") if quick else DEMO_TRANSFORMS
    settings = grid(chosen, names)
    model = load_demo_model()
    with progress_bar(terminal) as bar:
        task = bar.add_task("start", total=len(settings) + 1)

        def step(name: str) -> None:
            done = 0 if name == "calibrate" else list(settings).index(name) + 1
            bar.update(task, description=name, completed=done)

        best: list[tuple[Outcome, nnx.Module]] = []

        def keep(outcome: Outcome, quantized: nnx.Module) -> None:
            best[:] = (min([*best, (outcome, quantized)], key=lambda pair: pair[0].kl),)

        path = out / "report.json"
        study = compare(model, settings, calibration, evaluation, step=step, each=keep, path=path)
        bar.update(task, description="done", completed=len(settings) + 1)
    terminal.print(study.table())
    study.plot(out / "plot.png")
    ((outcome, quantized),) = best
    save(out / "checkpoint", quantized)
    terminal.print(f"best by KL: {outcome.name}; its checkpoint: {out / 'checkpoint'}")
    terminal.print(f"report.json and plot.png are in {out}; ", end="")
    terminal.print(f"{time.perf_counter() - start:.0f} s on {jax.devices()[0].device_kind}")
