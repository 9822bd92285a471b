"""How Flax NNX's dense layers are seen as ``y = x W^T``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.view import Dense, DenseTypes, check_product, general_equation

USUAL = (
    ("dot_general", jax.lax.dot_general),
    ("dot_general_cls", None),
    ("einsum_op", jnp.einsum),
    ("promote_dtype", promote_dtype),
)


def _flax(equation: str, module: Any) -> Dense:
    check_product(module, USUAL)
    kernel = module.kernel.get_value()
    contraction = Contraction(equation, kernel.shape)
    result = getattr(module, "preferred_element_type", None)
    return Dense(contraction, kernel, module.bias, module.dtype, result_dtype=result)


def _linear(module: nnx.Linear) -> Dense:
    return _flax("...k,kn->...n", module)


def _linear_general(module: nnx.LinearGeneral) -> Dense:
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    features = 1 if isinstance(module.out_features, int) else len(module.out_features)
    return _flax(general_equation(axis, sorted(module.batch_axis), features), module)


def _einsum(module: nnx.Einsum) -> Dense:
    if module.einsum_str is None:
        raise ValueError("its equation is given by the call alone")
    return _flax(module.einsum_str, module)


def _lora(module: nnx.LoRALinear) -> Dense:
    return replace(_linear(module), adapter=module.lora)


def _weight_norm(module: nnx.WeightNorm) -> Dense:
    """The normalised kernel: a call leaves it in the layer that it wraps."""
    if type(module.layer_instance) is not nnx.Linear:
        raise ValueError(f"WeightNorm of {type(module.layer_instance).__name__}, not nnx.Linear")
    source = module.layer_instance.kernel.get_value()  # type: ignore[attr-defined]

    def normalise(module: nnx.WeightNorm) -> jax.Array:
        module = nnx.clone(module)
        # Its own call, also where the module is one that tags its input.
        nnx.WeightNorm.__call__(module, jnp.zeros((1, source.shape[-2]), source.dtype))
        return module.layer_instance.kernel.get_value()  # type: ignore[attr-defined]

    abstract = any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(nnx.state(module)))
    if abstract or len(source.shape) != 2:
        kernel = source  # only its shape matters; a stack has no call of its own
        if not abstract:
            raise ValueError("WeightNorm of layers stacked for a scan")
    else:
        kernel = normalise(module)
    return replace(_linear(module.layer_instance), kernel=kernel, source=source)


NNX_TYPES: DenseTypes = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Einsum, _einsum),
    (nnx.LoRALinear, _lora),
    (nnx.WeightNorm, _weight_norm),
)
