"""What quantization did, layer by layer: a table, JSON, a plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from wush_jax.layers.names import grouped_paths, joint_name, pattern_of
from wush_jax.storage import write_json

COLUMNS = ("layer", "N x K", "format", "transform", "solver", "d", "MB", "gain", "loss")
RECIPE = COLUMNS[2:6]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a plan or a quantized model.

    Attributes:
      path: dotted module path.
      site: path of the first layer that shares its input.
      shape: (N, K); with leading axes for a layer of many kernels, such as experts.
      format: weight and activation formats, such as "MXFP4/MXFP4".
      transform: name of the transform.
      solver: "rtn" or "gptq".
      block: channels per transform block.
      bytes_before: of the original weight.
      bytes_after: of codes, scales and the layer's share of the transform.
      predicted_gain: loss of WUSH relative to no transform, from the moments; None in a dry run.
      loss: output loss (paper eq. 1); None in a dry run.
      relative_loss: loss over the output's mean square; None in a dry run.
      typical_loss: the same over tokens without massive values (`wush_jax.calibration.losses`).
      saturated: share of the inputs' groups, on the first batch, that their scale cannot reach.
      vanished: share that lies below the smallest scale.
      tokens: that calibration has seen.
      shared_transform: whether the layers of its site share one transform.
      few_tokens: the tokens that experts saw which saw too few: those are quantized from the mean
        moment of the others. By number of the expert; None where there are none.
      weight_error: squared error over power of the weight, where it was rounded without inputs.
    """

    path: str
    site: str
    shape: tuple[int, ...]
    format: str
    transform: str
    solver: str
    block: int
    bytes_before: int
    bytes_after: int
    predicted_gain: float | None = None
    loss: float | None = None
    relative_loss: float | None = None
    typical_loss: float | None = None
    saturated: float | None = None
    vanished: float | None = None
    tokens: int | None = None
    few_tokens: Mapping[str, int] | None = None
    weight_error: float | None = None
    shared_transform: bool = True

    @property
    def name(self) -> str:
        """The path, marked where the transform is that of the site's first layer."""
        return self.path + (" *" if self.shared_transform and self.site != self.path else "")


@dataclass(frozen=True)
class Report:
    """The layers of a plan or of a quantized model, and what was left alone.

    Attributes:
      layers: one entry a quantized layer.
      skipped: reason by path for dense layers that stay as they are.
      unused_rules: patterns that decided no layer.
      details: anything else worth keeping, such as times and memory.
      notes: sentences on what was written, such as what its readers cannot do.
    """

    layers: Sequence[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    unused_rules: Sequence[str] = ()
    details: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of the weights before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the weights and transforms after."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales, transforms and padding for each quantized weight."""
        return 8 * self.bytes_after / max(sum(math.prod(m.shape) for m in self.layers), 1)

    def table(self, all_layers: bool = False) -> Table:
        """Return a `rich` table, what is left alone and why, warnings, and last the sum of it all.

        Args:
          all_layers: a row for every layer; else one for those that differ in nothing but the
            numbers in their paths, such as the depths of a decoder, with the range of their losses.
        """
        groups: dict[Any, list[LayerReport]] = {}
        for layer in self.layers:
            what = layer.format, layer.transform, layer.solver, str(layer.block)
            kind = pattern_of(layer.name), layer.shape, what, layer.bytes_before, layer.bytes_after
            groups.setdefault((*kind, layer.path if all_layers else ""), []).append(layer)
        rows = [
            (
                joint_name(layer.name for layer in some),
                "x".join(map(str, shape)),
                *what,
                f"{_megabytes(len(some) * before)} -> {_megabytes(len(some) * after)}",
                _range([layer.predicted_gain for layer in some]),
                _range([layer.relative_loss for layer in some]),
            )
            for (_, shape, what, before, after, _), some in groups.items()
        ]
        # It fits 80 characters: what is empty, or the same everywhere, takes no column.
        columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
        common = [n for n in RECIPE if len(rows) > 1 and len(set(columns[n])) == 1]
        title = ", ".join(f"{name} {columns[name][0]}" for name in common)
        shown = {n: cells for n, cells in columns.items() if any(cells) and n not in common}
        table = Table(title=f"all: {title}" if common else None, box=SIMPLE_HEAD, min_width=76)
        table.pad_edge, table.collapse_padding = False, True
        for name in shown:
            table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
        for row in zip(*shown.values(), strict=True):
            table.add_row(*row)
        table.caption = self._caption()
        return table

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(path, dataclasses.asdict(self))

    def plot(self, path: str | Path) -> None:
        """Write a bar chart of the layers' relative losses, or of their bytes in a dry run."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.18 * len(self.layers)), 4.0), layout="constrained")
        axes = figure.subplots()
        losses = {m.path: m.relative_loss for m in self.layers if m.relative_loss is not None}
        if losses:
            axes.bar(list(losses), list(losses.values()))
            if max(losses.values()) > 0:
                axes.set_yscale("log")
            axes.set_ylabel("output loss / output power")
        else:
            axes.bar([m.path for m in self.layers], [m.bytes_after for m in self.layers])
            axes.set_ylabel("bytes")
        axes.tick_params(axis="x", labelrotation=90, labelsize=6)
        axes.set_title(self._title())
        figure.savefig(path, dpi=150)

    def _title(self) -> str:
        ratio = self.bytes_before / max(self.bytes_after, 1)
        bits = self.bits_per_weight
        return f"{len(self.layers)} layers, weights {ratio:.1f}x smaller: {bits:.2f} bits each"

    def _caption(self) -> str:
        shares = any(layer.name != layer.path for layer in self.layers)
        lines = ["* shares the transform of the site's first layer"] if shares else []
        alone: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            alone.setdefault(reason, []).append(path)
        for reason, paths in alone.items():
            lines += [f"left alone: {name}: {reason}" for name in grouped_paths(paths)]
        lines += [
            f"{layer.path}: too few tokens, the others' mean moment: "
            + ", ".join(f"expert {name} ({count})" for name, count in layer.few_tokens.items())
            for layer in self.layers
            if layer.few_tokens
        ]
        lines += [f"rule without a layer: {rule}" for rule in self.unused_rules]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *self._warnings(), self._title()])

    def _warnings(self) -> list[str]:
        """Return what is likely to be worse than it has to be."""
        lines = []
        for what in ("saturated", "vanished"):
            found = {m.path: getattr(m, what) for m in self.layers if getattr(m, what)}
            if found:
                worst = max(found, key=lambda path: found[path])
                lines.append(
                    f"groups of inputs {what}, on the first batch: {len(found)} layers, most in "
                    f"{worst} ({100 * found[worst]:.2g} %)"
                )
        few = [
            m
            for m in self.layers
            if m.solver == "gptq" and m.tokens is not None and m.tokens < m.shape[-1]
        ]
        if few:
            lines.append(
                f"GPTQ on fewer tokens than channels: {len(few)} layers, the first {few[0].path} "
                f"({few[0].tokens} tokens, K={few[0].shape[-1]}); give more text"
            )
        return lines


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f}" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g}"


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    ends = dict.fromkeys(f"{end:.3g}" for end in (min(known), max(known))) if known else ()
    return " to ".join(ends)
