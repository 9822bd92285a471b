"""A plan does not lie: the model runs with its layers swapped, abstractly, before any work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from wush_jax.calibration.sites import Call, inputs_of
from wush_jax.layers.dense import Dense, DenseTypes, dense_layers, dotted, is_array
from wush_jax.layers.swap import swap
from wush_jax.solvers.site import PackedWeight


def check_runs(
    model: nnx.Module,
    packed: Mapping[str, PackedWeight],
    batch: Any,
    call: Call,
    dense_types: DenseTypes,
) -> None:
    """Raise ValueError unless the quantized model's outputs have the original's shapes and dtypes.

    Args:
      model: an NNX module.
      packed: what quantizing would leave, as shapes, by layer path.
      batch: one batch, or its shapes.
      call: how to run the model on a batch.
      dense_types: what counts as a dense layer.
    """
    graph, state = nnx.split(model)
    batch = inputs_of(batch)

    def run(state: Any, packed: Any, batch: Any) -> list[Any]:
        model = nnx.merge(graph, state)
        layers: Mapping[str, Dense] = dense_layers(model, dense_types)[0]
        out = call(swap(model, layers, packed) if packed else model, batch)
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]

    expected = _shapes(jax.eval_shape(run, state, {}, batch))

    def fault(some: Mapping[str, PackedWeight]) -> str:
        try:
            found = _shapes(jax.eval_shape(run, state, dict(some), batch))
        except Exception as error:  # whatever a model's own code trips over
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return "" if found == expected else f"its outputs are {found}, not {expected}"

    whole = fault(packed)
    if whole:
        each = {path: found for path, p in packed.items() if (found := fault({path: p}))}
        named = "; ".join(f"layer {path}: {found}" for path, found in each.items()) or whole
        raise ValueError(
            f"the quantized model does not run as the original does: {named}; exclude such layers "
            "by rules with None, or let the model take what a quantized layer gives"
        )


def _shapes(outputs: list[Any]) -> list[str]:
    return [f"{x.dtype}{list(x.shape)}" for x in outputs]


def warn_of_training(model: nnx.Module) -> None:
    """Warn of dropout and batch statistics that are in training mode, by path."""
    found = []
    for path, module in nnx.iter_modules(model):
        own = vars(module)
        rate = own.get("rate", own.get("dropout_rate", 0))
        drops = own.get("deterministic") is False and isinstance(rate, (int, float)) and rate > 0
        if drops or own.get("use_running_average") is False:
            found.append(dotted(path))
    if found:
        warnings.warn(
            f"{', '.join(found)}: in training mode; calibrate a model as it is used: model.eval()",
            stacklevel=3,
        )
