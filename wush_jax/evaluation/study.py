"""Compare ways to quantize one model: layer loss, KL and perplexity of a grid of recipes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.table import Table

from wush_jax.calibration.model import quantize_with
from wush_jax.calibration.observe import Call, collect_moments, find_sites, plain_call
from wush_jax.calibration.planning import plan
from wush_jax.calibration.report import Report
from wush_jax.evaluation.evaluate import Score, cross_entropy, score
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes
from wush_jax.solvers.recipe import Recipe, Rules

Step = Callable[[str], Any]


@dataclass(frozen=True)
class Outcome:
    """One setting's result.

    Attributes:
      name: of the setting.
      layer_loss: mean over layers of output loss / output power, on held-out text.
      typical_loss: the same over tokens without massive values (`wush_jax.calibration.losses`).
      kl: mean KL divergence from the unquantized model, nats.
      perplexity: on the evaluation text.
      seconds: to quantize and evaluate.
      report: layer by layer.
    """

    name: str
    layer_loss: float
    typical_loss: float
    kl: float
    perplexity: float
    seconds: float
    report: Report


@dataclass(frozen=True)
class Study:
    """A grid of outcomes beside the unquantized model.

    Attributes:
      reference: score of the unquantized model.
      outcomes: one a setting.
      details: what was run on what.
    """

    reference: Score
    outcomes: Sequence[Outcome]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def table(self) -> Table:
        """Return a `rich` table, one row a setting."""
        table = Table(title="quantized against the original (loss and KL x 1000)")
        for name in ("setting", "layer loss", "typical", "KL", "perplexity", "bits", "s"):
            table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=True)
        bits = f"{self.reference.bits_per_token:.4f}"
        table.add_row("unquantized", "0", "0", "0", f"{self.reference.perplexity:.4f}", bits, "")
        for o in self.outcomes:
            table.add_row(
                o.name,
                f"{o.layer_loss * 1e3:.2f}",
                f"{o.typical_loss * 1e3:.2f}",
                f"{o.kl * 1e3:.2f}",
                f"{o.perplexity:.4f}",
                f"{np.log2(o.perplexity):.4f}",
                f"{o.seconds:.0f}",
            )
        return table

    def to_json(self, path: str | Path) -> None:
        """Write everything, layers included, as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def plot(self, path: str | Path) -> None:
        """Write a bar chart: KL and layer loss of every setting, logarithmic."""
        from matplotlib.figure import Figure

        names = [o.name for o in self.outcomes]
        figure = Figure(figsize=(max(6.0, 0.45 * len(names) + 2), 6.0), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.bar(names, [o.kl for o in self.outcomes], color="tab:blue")
        upper.set_ylabel("KL to unquantized (nats)")
        lower.bar(names, [o.layer_loss for o in self.outcomes], color="tab:orange")
        lower.set_ylabel("layer loss / output power")
        for axes in (upper, lower):
            if axes.dataLim.y1 > 0:
                axes.set_yscale("log")
            axes.grid(axis="y", alpha=0.3)
        lower.tick_params(axis="x", labelrotation=90)
        figure.savefig(path, dpi=150)


def compare(
    model: nnx.Module,
    settings: Mapping[str, Rules],
    calibration: Iterable[Any],
    evaluation: Sequence[Any],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    step: Step | None = None,
) -> tuple[Study, dict[str, nnx.Module]]:
    """Quantize a model in every setting and measure each on the same text.

    The moments are collected once, in full, and serve every setting.

    Args:
      model: an NNX language model, tokens (batch, length) to logits.
      settings: rules by name.
      calibration: token batches for the moments.
      evaluation: token batches for KL and perplexity; the first also for the layer losses.
      call: how to run the model.
      dense_types: module types that are dense layers.
      step: called with what is about to be done; once for the reference, once per setting.

    Returns:
      The `Study`, and the quantized models by name.

    Raises:
      ValueError: as `quantize_model`; no evaluation batch.
    """
    step = step or (lambda name: None)
    if not len(evaluation):
        raise ValueError("evaluation is empty; pass at least one token batch")
    step("calibrate")
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    sites = find_sites(model, evaluation[0], **options)
    planned = {
        name: plan(model, rules, evaluation[0], **options) for name, rules in settings.items()
    }
    rows = max((p.sample_rows for p in planned.values()), default=0)
    moments = collect_moments(model, calibration, dict.fromkeys(sites), rows=rows, **options)
    loss = cross_entropy(model, evaluation, call=call)
    original = Score(loss, 0.0, loss)
    outcomes, models = [], {}
    for name in settings:
        step(name)
        start = time.perf_counter()
        todo = planned[name]
        chosen = {item.site: moments[_site_of(item.site, sites)] for item in todo.sites}
        models[name], report = quantize_with(model, todo, chosen, evaluation[0], **options)
        measured = score(models[name], evaluation, model, call=call)
        seconds = time.perf_counter() - start
        losses = [(r.relative_loss, r.typical_loss) for r in report.layers]
        layer_loss, typical = np.mean(np.array(losses, float), axis=0).tolist()
        kl, perplexity = measured.kl, measured.perplexity
        outcomes.append(Outcome(name, layer_loss, typical, kl, perplexity, seconds, report))
    return Study(original, outcomes), models


def _site_of(part, sites):
    """The traced site that a planned one, perhaps only some of its layers, came from."""
    return next(site for site in sites if part.name in site.layers)


def grid(
    formats: Sequence[Any],
    transforms: Sequence[str],
    solvers: Sequence[str] = ("rtn",),
    base: Recipe | None = None,
) -> dict[str, Recipe]:
    """Return recipes by name, "MXFP4 rtn-wush", for every combination.

    >>> from wush_jax import MXFP4
    >>> list(grid([MXFP4], ["hadamard", "wush"]))
    ['MXFP4 rtn-hadamard', 'MXFP4 rtn-wush']
    """
    base = base or Recipe()
    return {
        f"{fmt.name} {solver}-{transform}": base.replace(
            format=fmt, transform=transform, solver=solver
        )
        for fmt in formats
        for solver in solvers
        for transform in transforms
    }
