"""The quantized linear map: forward through the kernels, backward straight through."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels
from pallas_kernels import normed
from pallas_kernels.reference import swiglu
from wush_jax.formats.checks import check_arrays, check_kind
from wush_jax.layers.parallel import partitioned_dot
from wush_jax.solvers.site import PackedWeight, effective_weight
from wush_jax.transforms import linalg


def quantized_dot(
    x: jax.Array,
    packed: PackedWeight | tuple[PackedWeight, ...],
    *,
    precision=None,
    implementation: str | None = None,
) -> Any:
    """Return ``y = dequantize(q(x T_X^T)) @ dequantize(weight)^T``.

    The gradient with respect to x passes straight through the activation quantizer:
    ``dL/dx = dL/dy @ (dequantize(weight) T_X)``. Packed weights get no gradient.

    Args:
      x: (..., K).
      packed: quantized weight (N, K); a tuple of those of one site, which share T_X and how
        inputs are quantized (the first one's counts), quantizes x once for all.
      precision: what kernels may lose for speed with many tokens: None nothing, "default" and
        "folded" as for `pallas_kernels.quantized_matmul`.
      implementation: None lets the dispatch choose; a name such as "reference" forces one.

    Returns:
      (..., N) in x's dtype, or a tuple of them.

    Raises:
      ValueError: K of x and of the weight differ; an empty tuple; an unknown precision or
        implementation; something else than an array or packed weights.
      NotImplementedError: a forced implementation cannot run here.

    Source: WUSH paper, eq. 1.

    >>> from wush_jax import Recipe, quantize_weight
    >>> packed = quantize_weight(jnp.eye(32), None, Recipe(transform="hadamard"))
    >>> quantized_dot(jnp.ones((2, 32)), packed).shape
    (2, 32)
    """
    several = packed if isinstance(packed, tuple) else (packed,)
    if not several:
        raise ValueError("packed is an empty tuple; pass one quantized weight or several")
    _check_inner(x, several)
    products = _dot((implementation, precision), x, several)
    return products if isinstance(packed, tuple) else products[0]


def gated_dot(
    x: jax.Array,
    gate: PackedWeight,
    up: PackedWeight,
    *,
    precision=None,
    implementation: str | None = None,
) -> jax.Array:
    """Return ``silu(quantized_dot(x, gate)) * quantized_dot(x, up)``: a gated layer's first half.

    One kernel computes it where there is one; else it is exactly that. Gradients are those of the
    expression, with `quantized_dot`'s.

    Args:
      x: (..., K).
      gate: quantized weight (N, K); its T_X and input quantization count.
      up: quantized weight (N, K) of the same site.
      precision: as for `quantized_dot`.
      implementation: as for `quantized_dot`.

    Returns:
      (..., N) in x's dtype.

    Raises:
      ValueError: K of x and of a weight differ, or the weights' shapes.
      NotImplementedError: a forced implementation cannot run here.

    Source: WUSH paper, eq. 1; Shazeer, GLU Variants Improve Transformer (2020).

    >>> from wush_jax import Recipe, quantize_weight
    >>> packed = quantize_weight(jnp.eye(32), None, Recipe(transform="identity"))
    >>> gated_dot(jnp.full((1, 32), 2.0), packed, packed)[0, 0].item()  # 2 silu(2)
    3.523...
    """
    _check_inner(x, (gate, up))
    return _gated((implementation, precision), x, (gate, up))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(how, x, pair):
    implementation, precision = how
    if pair[0].partition is not None:
        return partitioned_dot(x, pair, gated=True, implementation=implementation)
    return pallas_kernels.transform_quantize_matmul(
        *(x, pair[0].transform, pair),
        gated=True,
        precision=precision,
        implementation=implementation,
    )


def _gated_forward(how, x, pair):
    return _gated(how, x, pair), (x, pair)


def _gated_backward(how, residuals, cotangent):
    x, pair = residuals

    def expression(x, pair):
        return swiglu(*_dot(how, x, pair))

    return jax.vjp(expression, x, pair)[1](cotangent)


_gated.defvjp(_gated_forward, _gated_backward)


def normed_dot(
    x: jax.Array,
    packed: tuple[PackedWeight, ...],
    norm: tuple[jax.Array, float],
    *,
    residual: jax.Array | None = None,
    gated: bool = False,
    implementation: str | None = None,
) -> tuple[Any, jax.Array]:
    """Return `quantized_dot` of ``rms_norm(x + residual)``, or `gated_dot`, and the sum.

    For few tokens a kernel adds, normalises, transforms and quantizes. Gradients are those of the
    expression, with `quantized_dot`'s.

    Args:
      x: (..., K).
      packed: quantized weights (N, K) of one site.
      norm: weight (K,) and eps, as of `pallas_kernels.normed.rms_norm`.
      residual: like x, or None.
      gated: of two weights, give ``silu(first) * second``.
      implementation: as for `quantized_dot`.

    Returns:
      A tuple of (..., N), or one if gated; and (..., K), x + residual.

    Raises:
      ValueError: K of x and of a weight differ, or x, norm and residual do not fit.
      NotImplementedError: a forced implementation cannot run here.

    Source: WUSH paper, eq. 1; Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    >>> from wush_jax import Recipe, quantize_weight
    >>> packed = quantize_weight(jnp.eye(32), None, Recipe(transform="identity"))
    >>> (y,), total = normed_dot(jnp.ones((1, 32)), (packed,), (jnp.full(32, 2.0), 0.0),
    ...                          residual=jnp.ones((1, 32)))
    >>> y[0, 0].item(), total[0, 0].item()
    (2.0, 2.0)
    """
    _check_inner(x, packed)
    weight, eps = norm
    return _normed((implementation, eps, gated), x, residual, weight, packed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed(how, x, residual, weight, packed):
    implementation, eps, gated = how
    y = pallas_kernels.transform_quantize_matmul(
        *(x, packed[0].transform, packed),
        gated=gated,
        norm=(weight, eps),
        residual=residual,
        implementation=implementation,
    )
    return y if residual is not None else (y, x)


def _normed_forward(how, *arguments):
    return _normed(how, *arguments), arguments


def _normed_backward(how, residuals, cotangents):
    implementation, eps, gated = how

    def expression(x, residual, weight, packed):
        x, total = normed.read(x, (weight, eps), residual)
        return (_gated if gated else _dot)((implementation, None), x, packed), total

    return jax.vjp(expression, *residuals)[1](cotangents)


_normed.defvjp(_normed_forward, _normed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(how, x, packed):
    implementation, precision = how
    if packed[0].partition is not None:
        return partitioned_dot(x, packed, implementation=implementation)
    return pallas_kernels.transform_quantize_matmul(
        x, packed[0].transform, packed, precision=precision, implementation=implementation
    )


def _dot_forward(how, x, packed):
    # An empty array carries x's dtype: only arrays may be residuals.
    return _dot(how, x, packed), (packed, jnp.zeros((0,), x.dtype))


def _dot_backward(how, residuals, cotangents):
    packed, like = residuals
    terms = [
        jnp.einsum(
            "...n,nk->...k",
            cotangent.astype(jnp.float32),
            effective_weight(weight),
            precision=linalg.HIGHEST,
        )
        for cotangent, weight in zip(cotangents, packed, strict=True)
    ]
    dx = functools.reduce(jnp.add, terms)
    return dx.astype(like.dtype), jax.tree.map(zero_cotangent, packed)


def _check_inner(x, weights) -> None:
    check_arrays(x=x)
    for weight in weights:
        check_kind(PackedWeight, "what wush_jax.quantize_weight gives", packed=weight)
        if x.ndim == 0 or x.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"x has shape {x.shape}; its last axis must be K={weight.shape[-1]} of the weight "
                f"{weight.shape}"
            )


def zero_cotangent(leaf: jax.Array) -> Any:
    """Return the cotangent of a leaf of a packed weight, which gets no gradient."""
    if leaf.dtype == jnp.float8_e8m0fnu:  # has no zero, and a cast of zero gives NaN
        return lax.bitcast_convert_type(jnp.zeros(leaf.shape, jnp.uint8), leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_dot.defvjp(_dot_forward, _dot_backward)
