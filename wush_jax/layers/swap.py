"""Puts quantized layers in the places of dense ones."""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx

from wush_jax.layers.dense import Dense
from wush_jax.layers.nnx import Packed, QuantizedDense, replace_modules
from wush_jax.solvers.site import PackedWeight


def swap(
    model: nnx.Module,
    layers: Mapping[str, Dense],
    packed: Mapping[str, PackedWeight],
    implementation: str | None = None,
) -> nnx.Module:
    """Return the model with `QuantizedDense` layers in place of those that were packed.

    Layers whose packed weights hold the very same transform array share one variable.
    """
    shared: dict[int, Packed] = {}

    def quantized(path: str, module: nnx.Module) -> nnx.Module | None:
        if path not in packed:
            return None
        transform = packed[path].transform
        variable = None
        if transform is not None:
            variable = shared.setdefault(id(transform), Packed(transform))
        return QuantizedDense(
            layers[path], packed[path], transform=variable, implementation=implementation
        )

    return replace_modules(model, quantized)
