"""Dense classes of model zoos, known by the names of their modules: nothing is imported.

A name is ``module.Class``, with wildcards. An entry of your own for the class itself comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.view import Dense, DenseTypes


def _scaled(parameter: nnx.Variable, scale: float | None) -> dict[str, Any]:
    """Return the kernel that is a multiple of a parameter, which is its source."""
    value = parameter.get_value()
    return {"kernel": value} if scale is None else {"kernel": value * scale, "source": value}


def _tunix_einsum(module: Any) -> Dense:
    """The Einsum of google-tunix's models: ``einsum(einsum_str, x, w * w_scale)``."""
    kernel = _scaled(module.w, getattr(module, "w_scale", None))
    contraction = Contraction(module.einsum_str, kernel["kernel"].shape)
    return Dense(contraction, **kernel, bias=None, dtype=getattr(module, "dtype", None))


def _gemma_einsum(module: Any, params: Mapping[str, nnx.Variable], equation: str, x: Any) -> Dense:
    """The Einsum of DeepMind's gemma: ``einsum(eqn, x, w * w_scale)``, eqn given by the call."""
    name = getattr(module, "weight_name", "w")
    kernel = _scaled(params[name], getattr(module, "w_scale", None) or None)
    return Dense(Contraction(equation, kernel["kernel"].shape), **kernel, bias=None)


TUNIX_TYPES: DenseTypes = (("tunix.models.*.model.Einsum", _tunix_einsum),)

GEMMA_TYPES: tuple[tuple[str, Callable[..., Dense]], ...] = (
    ("gemma.gm.nn._layers.Einsum", _gemma_einsum),
    ("gemma.gm.nn.*._layers.Einsum", _gemma_einsum),
)
