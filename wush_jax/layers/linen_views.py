"""How Flax Linen's dense layers are seen as ``y = x W^T``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.linen.dtypes import promote_dtype

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.view import Dense, check_product, general_equation
from wush_jax.layers.zoos import GEMMA_TYPES

# From (linen module, its parameters as NNX variables, the arguments of its call, the input as a
# shape) to the layer's `Dense` view; ValueError for what it cannot express.
View = Callable[..., Dense]
LinenTypes = tuple[tuple[type[nn.Module] | str, View], ...]


USUAL = (
    ("dot_general", jax.lax.dot_general),
    ("dot_general_cls", None),
    ("promote_dtype", promote_dtype),
)


def _flax(equation: str, module: Any, params: Mapping[str, nnx.Variable]) -> Dense:
    check_product(module, USUAL)
    kernel = params["kernel"].get_value()
    contraction = Contraction(equation, kernel.shape)
    result = getattr(module, "preferred_element_type", None)
    return Dense(contraction, kernel, params.get("bias"), module.dtype, result_dtype=result)


def _dense(module: nn.Dense, params: Mapping[str, nnx.Variable], x: Any) -> Dense:
    return _flax("...k,kn->...n", module, params)


def _dense_general(module: nn.DenseGeneral, params: Mapping[str, nnx.Variable], x: Any) -> Dense:
    axis, batch, features = map(_tuple, (module.axis, module.batch_dims, module.features))
    equation = general_equation(
        [a if a < 0 else a - x.ndim for a in axis], [a % x.ndim for a in batch], len(features)
    )
    return _flax(equation, module, params)


def _einsum(
    module: nn.Einsum, params: Mapping[str, nnx.Variable], x: Any, einsum_str: str | None = None
) -> Dense:
    return _flax(module.einsum_str or einsum_str or "", module, params)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


# Which linen layers are dense. To add one of yours, pass ``(*LINEN_TYPES, (MyDense, view))``; see
# `View`. An equation or the like among the arguments of the call reaches the view as it is.
# Subclasses count where they leave ``__call__`` as it is.
LINEN_TYPES: LinenTypes = (
    (nn.Dense, _dense),
    (nn.DenseGeneral, _dense_general),
    (nn.Einsum, _einsum),
    *GEMMA_TYPES,
)
