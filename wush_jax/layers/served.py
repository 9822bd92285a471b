"""Which implementation each kind of a model's quantized layers runs on this device, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from pallas_kernels import dispatch
from wush_jax.layers.kernel_layout import as_held
from wush_jax.layers.names import joint_name, pattern_of
from wush_jax.layers.nnx import QuantizedDense, dotted
from wush_jax.solvers.site import PackedWeight

TOKENS = (1, 16, 64, 1024)


@dataclass(frozen=True)
class Served:
    """Layers that run alike.

    Attributes:
      paths: of the layers.
      shape: (N, K).
      runs: the implementation by number of tokens.
      reasons: why not a faster one, by its name.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    runs: dict[int, str]
    reasons: dict[str, str]

    @property
    def name(self) -> str:
        """The paths as one name."""
        return joint_name(self.paths)


def served(model: nnx.Module, tokens: tuple[int, ...] = TOKENS) -> list[Served]:
    """Return what runs each quantized layer; nothing is computed.

    Layers of many kernels are asked for one of them, but for experts whose rows come sorted.

    Args:
      model: an NNX module with `QuantizedDense` layers, as this device has it.
      tokens: numbers of rows.
    """
    layers = {
        dotted(path): _Layer(
            jax.tree.map(_shape, layer.packed),
            jnp.dtype(layer.dtype or layer.kernel_dtype),
            layer.implementation,
            layer.contraction.ragged,
        )
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, QuantizedDense)
    }
    return _grouped(layers, tokens)


def served_plan(
    packed: Mapping[str, PackedWeight], dtype: Any, tokens: tuple[int, ...] = TOKENS
) -> list[Served]:
    """Return what would run layers of which there are shapes, laid out for this device.

    Args:
      packed: by path, of one matrix each.
      dtype: of the activations.
      tokens: numbers of rows.
    """
    layers = {path: _Layer(as_held(p, dtype), dtype, None, False) for path, p in packed.items()}
    return _grouped(layers, tokens)


class _Layer(NamedTuple):
    """Shapes of a layer's weight, the dtype of its inputs, what it is forced to run, its kind."""

    packed: PackedWeight
    dtype: Any
    forced: str | None
    ragged: bool


def _grouped(layers: Mapping[str, _Layer], tokens: tuple[int, ...]) -> list[Served]:
    groups: dict[Any, list[str]] = {}
    for path, layer in layers.items():
        leaves, structure = jax.tree.flatten(layer.packed)
        kind = pattern_of(path), structure, tuple(leaves), *layer[1:]
        groups.setdefault(kind, []).append(path)
    found = []
    for paths in groups.values():
        packed, dtype, forced, ragged = layers[paths[0]]
        shape, sizes = packed.shape, None
        if ragged:
            sizes = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        for _ in () if ragged else shape[:-2]:
            packed = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), packed
            )
        runs: dict[int, str] = {}
        reasons: dict[str, str] = {}
        for count in tokens:
            rows = jax.ShapeDtypeStruct((count, shape[-1]), dtype)
            runs[count], why = (forced, {}) if forced else dispatch.explain(rows, packed, sizes)
            reasons |= why
        found.append(Served(tuple(paths), shape, runs, reasons))
    return found


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def served_table(found: list[Served]) -> Table:
    """Return a `rich` table, a row for each kind of layer, and the reasons below."""
    counts = list(dict.fromkeys(count for each in found for count in each.runs))
    reasons = {f"{name}: {why}": None for each in found for name, why in each.reasons.items()}
    table = Table(caption="\n".join(f"not {reason}" for reason in reasons) or None)
    for name in ("layer", "N x K", *(f"{count} tokens" for count in counts)):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for each in found:
        table.add_row(each.name, " x ".join(map(str, each.shape)), *map(each.runs.get, counts))
    return table


def served_line(found: list[Served]) -> str:
    """Return the same in a line: how many layers run what."""
    device = jax.devices()[0].device_kind
    kinds: Counter[str] = Counter()
    for each in found:
        kinds[" and ".join(dict.fromkeys(each.runs.values()))] += len(each.paths)
    said = ", ".join(f"{count} layers by {name}" for name, count in kinds.items())
    return f"on this device ({device}): {said}; wush inspect --kernels says why"
