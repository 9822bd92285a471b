"""One comparison over several draws of calibration text: means, spread, and ratios to a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.table import Table

from wush_jax.calibration.calibration import Calibration
from wush_jax.evaluation.study import Study, compare
from wush_jax.formats import Format
from wush_jax.solvers.presets import BEST, PAPER
from wush_jax.solvers.recipe import Recipe, Rules
from wush_jax.storage import write_json


def ablation(fmt: Format, best: Recipe = BEST) -> dict[str, Recipe]:
    """Return the paper's setting, the best one, each part added to the former, and removed.

    Parts are the fields in which both differ. The first, transforms from the original weights, is
    a setting of its own, and what the others are added to: most of them need it.

    >>> from wush_jax import MXFP4
    >>> list(ablation(MXFP4))[:3]
    ['paper', 'paper + interleave=False', '  + activation_format=tuned']
    """
    paper, best = PAPER.replace(format=fmt), best.replace(format=fmt)
    start = paper.replace(interleave=False)
    fields = [f.name for f in dataclasses.fields(Recipe)]
    parts = {n: getattr(best, n) for n in fields if getattr(best, n) != getattr(start, n)}
    return {
        "paper": paper,
        "paper + interleave=False": start,
        **{f"  + {n}={value}": start.replace(**{n: value}) for n, value in parts.items()},
        "best": best,
        **{f"  without {n}": best.replace(**{n: getattr(start, n)}) for n in parts},
    }


@dataclass(frozen=True)
class Row:
    """One setting over all draws.

    Attributes:
      name: of the setting.
      kl: mean KL, nats.
      kl_range: smallest and largest KL of the draws.
      kl_ratio: geometric mean over draws of KL over the base's.
      layer_loss: geometric mean over layers and draws of output loss / output power.
      layer_ratio: the same over the base's; None where the layers differ.
      typical_ratio: of the losses on tokens without massive values.
      worst_ratio: the largest ratio of any layer, geometric mean over draws, and its path.
      perplexity: mean.
    """

    name: str
    kl: float
    kl_range: tuple[float, float]
    kl_ratio: float
    layer_loss: float
    layer_ratio: float
    typical_ratio: float
    worst_ratio: tuple[float, str]
    perplexity: float


@dataclass(frozen=True)
class Draws:
    """Studies of the same settings, one a draw.

    Attributes:
      studies: in order; all with the same settings.
      base: the setting to which ratios are taken.
    """

    studies: Sequence[Study]
    base: str

    def rows(self) -> list[Row]:
        """Return one row a setting."""
        names = [o.name for o in self.studies[0].outcomes]
        measured = {name: _Measured.of(self.studies, name) for name in names}
        base = measured[self.base]
        rows = []
        for name, m in measured.items():
            ratio = np.exp(np.mean(np.log(m.losses / base.losses), axis=0))
            worst = int(np.argmax(ratio))
            rows.append(
                Row(
                    name=name,
                    kl=float(m.kl.mean()),
                    kl_range=(float(m.kl.min()), float(m.kl.max())),
                    kl_ratio=_geometric_mean(m.kl / base.kl),
                    layer_loss=_geometric_mean(m.losses),
                    layer_ratio=_geometric_mean(m.losses / base.losses),
                    typical_ratio=_geometric_mean(m.typical / base.typical),
                    worst_ratio=(float(ratio[worst]), m.paths[worst]),
                    perplexity=float(np.mean(m.perplexity)),
                )
            )
        return rows

    def table(self) -> Table:
        """Return a `rich` table, one row a setting."""
        original = self.studies[0].reference.perplexity
        table = Table(title=f"ratios to {self.base!r}; unquantized perplexity {original:.4f}")
        table.add_column("setting", no_wrap=True)
        for name in ("KL x 1e3", "of draws", "KL", "loss", "typical", "worst layer", "perplexity"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows():
            low, high = (f"{1e3 * kl:.2f}" for kl in row.kl_range)
            table.add_row(
                row.name,
                f"{1e3 * row.kl:.2f}",
                f"{low} to {high}",
                f"{row.kl_ratio:.3f}",
                f"{row.layer_ratio:.3f}",
                f"{row.typical_ratio:.3f}",
                f"{row.worst_ratio[0]:.3f} {row.worst_ratio[1]}",
                f"{row.perplexity:.4f}",
            )
        return table

    def to_json(self, path: str | Path) -> None:
        """Write the rows, and every study, layers included."""
        content = {
            "base": self.base,
            "rows": [dataclasses.asdict(row) for row in self.rows()],
            "studies": [dataclasses.asdict(study) for study in self.studies],
        }
        write_json(path, content)

    def plot(self, path: str | Path) -> None:
        """Write a plot: KL of every setting, a dot a draw, and the ratio of the layer losses."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        rows = self.rows()
        names = [row.name for row in rows]
        figure = Figure(figsize=(8.0, 0.3 * len(names) + 1.5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for study in self.studies:
            axes[0].plot([1e3 * o.kl for o in study.outcomes], names, "o", color="tab:blue", ms=4)
        axes[0].set_xlabel("KL to unquantized x 1000, a dot a draw")
        axes[1].plot([row.layer_ratio for row in rows], names, "o", color="tab:orange", ms=4)
        axes[1].axvline(1.0, color="black", lw=0.8)
        axes[1].set_xlabel(f"layer loss / {self.base}")
        axes[0].invert_yaxis()
        for ax in axes:
            ax.grid(axis="x", which="both", alpha=0.3)
            ax.set_xscale("log")
            # Settings lie within one decade or in several.
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class _Measured:
    """One setting's numbers: (draws,) or (draws, layers)."""

    paths: list[str]
    kl: np.ndarray
    perplexity: np.ndarray
    losses: np.ndarray
    typical: np.ndarray

    @classmethod
    def of(cls, studies: Sequence[Study], name: str) -> _Measured:
        outcomes = [o for study in studies for o in study.outcomes if o.name == name]
        layers = [o.report.layers for o in outcomes]
        tiny = np.finfo(np.float32).tiny  # a layer without loss has a logarithm

        def each(field: str) -> np.ndarray:
            return np.maximum([[getattr(row, field) for row in rows] for rows in layers], tiny)

        return cls(
            [row.path for row in layers[0]],
            np.maximum([o.kl for o in outcomes], tiny),
            np.array([o.perplexity for o in outcomes]),
            each("relative_loss"),
            each("typical_loss"),
        )


def compare_draws(
    model: nnx.Module,
    settings: Mapping[str, Rules],
    draws: Iterable[Iterable[Any] | Calibration],
    evaluation: Sequence[Any],
    *,
    base: str = "paper",
    step: Callable[[int, str], Any] | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> Iterator[Draws]:
    """Run `wush_jax.evaluation.study.compare` on several draws of calibration batches.

    Args:
      model: an NNX language model, tokens (batch, length) to logits.
      settings: rules by name; all must quantize the same layers.
      draws: for each draw its calibration batches, or a `wush_jax.Calibration` on them.
      evaluation: token batches, the same for all.
      base: the setting to which ratios are taken.
      step: called with the draw and what is about to be done.
      folder: where every draw's study is written after each setting, as ``draw-0.json`` and so on.
      **options: of `compare`.

    Yields:
      `Draws` of all draws so far, after each.

    Raises:
      ValueError: a base that is not among the settings; as `compare`.
    """
    if base not in settings:
        raise ValueError(f"base={base!r} is not among the settings {list(settings)}")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    studies: list[Study] = []
    for index, calibration in enumerate(draws):

        def report(name: str, index: int = index) -> None:
            if step is not None:
                step(index, name)

        path = None if folder is None else Path(folder) / f"draw-{index}.json"
        study = compare(model, settings, calibration, evaluation, step=report, path=path, **options)
        studies.append(study)
        yield Draws(list(studies), base)


def _geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(values))))
