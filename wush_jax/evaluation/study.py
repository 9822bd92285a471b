"""Compare ways to quantize one model: layer loss, KL and perplexity of a grid of recipes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.table import Table

from wush_jax.calibration.calibration import Calibration, calibrate
from wush_jax.calibration.model import quantize_with
from wush_jax.calibration.observe import Call, plain_call
from wush_jax.calibration.planning import plans
from wush_jax.calibration.report import Report
from wush_jax.evaluation.bars import grouped_bars
from wush_jax.evaluation.evaluate import Score, cross_entropy, score
from wush_jax.evaluation.positions import Reader
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.solvers.recipe import Recipe, Rules
from wush_jax.storage import write_json

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

    def groups(self) -> dict[str, dict[str, Outcome]]:
        """Return outcomes by format and setting: the words of their names."""
        found: dict[str, dict[str, Outcome]] = {}
        for outcome in self.outcomes:
            fmt, _, setting = outcome.name.rpartition(" ")
            found.setdefault(fmt, {})[setting.removeprefix("rtn-")] = outcome
        return found

    def table(self) -> Table:
        """Return a `rich` table, a section a format; the least KL of each is marked."""
        table = Table(title="quantized against the original (loss and KL x 1000)")
        for name in ("setting", "layer loss", "typical", "KL", "perplexity", "bits", "s"):
            table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=True)
        bits = f"{self.reference.bits_per_token:.4f}"
        table.add_row("unquantized", "0", "0", "0", f"{self.reference.perplexity:.4f}", bits, "")
        for group in self.groups().values():
            table.add_section()
            least = min(o.kl for o in group.values())
            for o in group.values():
                best = len(group) > 1 and o.kl == least
                table.add_row(
                    o.name,
                    f"{o.layer_loss * 1e3:.2f}",
                    f"{o.typical_loss * 1e3:.2f}",
                    f"{o.kl * 1e3:.2f}{' *' if best else ''}",
                    f"{o.perplexity:.4f}",
                    f"{np.log2(o.perplexity):.4f}",
                    f"{o.seconds:.0f}",
                    style="bold" if best else None,
                )
        return table

    def to_json(self, path: str | Path) -> None:
        """Write everything, layers included, as JSON; a file that is there is replaced whole."""
        write_json(path, dataclasses.asdict(self))

    def plot(self, path: str | Path) -> None:
        """Write a bar chart: KL and layer loss by format and setting, logarithmic."""
        from matplotlib.figure import Figure

        groups = self.groups()
        bars = sum(map(len, groups.values()))
        figure = Figure(figsize=(max(6.0, 0.3 * bars + 2), 6.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, name, label in (
            (upper, "kl", "KL to the original (nats)"),
            (lower, "layer_loss", "layer loss / output power"),
        ):
            values = {
                fmt: {setting: getattr(o, name) for setting, o in group.items()}
                for fmt, group in groups.items()
            }
            grouped_bars(axes, values, label)
        handles = upper.get_legend_handles_labels()
        figure.legend(*handles, ncols=4, fontsize=8, loc="outside upper center")
        figure.savefig(path, dpi=150)


def compare(
    model: nnx.Module,
    settings: Mapping[str, Rules],
    calibration: Iterable[Any] | Calibration,
    evaluation: Sequence[Any],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    step: Step | None = None,
    each: Callable[[Outcome, nnx.Module], Any] | None = None,
    path: str | Path | None = None,
) -> Study:
    """Quantize a model in every setting and measure each on the same text.

    The model is calibrated once, for all settings; one quantized model is there at a time.

    Args:
      model: an NNX language model, tokens (batch, length) to logits.
      settings: rules by name.
      calibration: token batches, or a `wush_jax.Calibration`.
      evaluation: token batches for KL and perplexity; the first also for the layer losses.
      call: how to run the model.
      dense_types: module types that are dense layers.
      step: called with what is about to be done; once for the reference, once per setting.
      each: called with every outcome and its quantized model, which is then let go.
      path: a JSON file that holds the study so far after each setting, as `Study.to_json` writes.

    Returns:
      The `Study`.

    Raises:
      ValueError: as `quantize_model`; no evaluation batch, no settings.
    """
    step = step or (lambda name: None)
    if not len(evaluation):
        raise ValueError("evaluation is empty; pass at least one token batch")
    if not settings:
        raise ValueError("settings is empty; pass rules by name, such as those of grid")
    step("calibrate")
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    if not isinstance(calibration, Calibration):
        calibration = calibrate(model, calibration, *settings.values(), **options)
    planning = plans(model, settings, calibration, **options)
    for planned in planning.values():  # before hours of work, not after
        calibration.check(model, dense_layers(model, dense_types)[0], planned.sites)
    own: Any = None if call is plain_call else call
    reference = Reader(model, own, remember=True)  # run once, for all settings
    loss = cross_entropy(reference, evaluation, call=own)
    study = Study(Score(loss, 0.0, loss), [])
    for name, planned in planning.items():
        step(name)
        start = time.perf_counter()
        made, report = quantize_with(model, planned, calibration, evaluation[0], **options)
        measured = score(made, evaluation, reference, call=own)
        outcome = _outcome(name, report, measured, time.perf_counter() - start)
        study = dataclasses.replace(study, outcomes=[*study.outcomes, outcome])
        if path is not None:
            study.to_json(path)
        if each is not None:
            each(outcome, made)
        del made  # before the next one is made
    return study


def _outcome(name: str, report: Report, measured: Score, seconds: float) -> Outcome:
    losses = [(r.relative_loss, r.typical_loss) for r in report.layers]
    layer_loss, typical = np.mean(np.array(losses, float), axis=0).tolist()
    return Outcome(name, layer_loss, typical, measured.kl, measured.perplexity, seconds, report)


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
