"""The quantized linear maps of many experts, on rows sorted by expert."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, reference
from wush_jax.formats.checks import check_arrays, check_kind
from wush_jax.layers.linear import zero_cotangent
from wush_jax.solvers.site import PackedWeight, effective_weight
from wush_jax.transforms import linalg


def quantized_ragged_dot(
    x: jax.Array,
    packed: PackedWeight | tuple[PackedWeight, ...],
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> Any:
    """Return ``y_m = dequantize(q(x_m T_e^T)) @ dequantize(weight_e)^T``, e the expert of row m.

    What `quantized_dot` is for one weight, for a mixture of experts: rows come sorted by expert,
    as `jax.lax.ragged_dot` takes them. The gradient with respect to x passes straight through the
    activation quantizer; packed weights get none. Works under ``jax.jit``, ``jax.vmap`` and, for
    experts that are spread over devices, ``jax.shard_map`` (with ``check_vma=False`` where kernels
    run: they do not say how their results vary).

    Weights laid out by `pallas_kernels.stacks.lay_out` run in one kernel on a Hopper GPU, which
    reads those of experts with tokens alone.

    Args:
      x: (M, K); the first ``group_sizes[0]`` rows are of expert 0, and so on. Rows beyond the last
        expert give zeros.
      packed: quantized weights stacked over E experts, every leaf with the leading axis E: shape
        (E, N, K), T_X (E, K/d, d, d) or (E, d, d). A transform that all experts share has 1 in
        place of E, or is one (d, d): rows are then transformed and quantized by one plain product.
        A tuple of those of one site, such as gate and up, quantizes x once for all; the first
        one's transform and input format count.
      group_sizes: (E,) integers.
      implementation: None lets the dispatch choose; "mosaic_gpu", "xla" and "reference" force one.

    Returns:
      (M, N) in x's dtype, or a tuple of them.

    Raises:
      ValueError: shapes that do not fit, group sizes that are negative or more than M in all (where
        they are known), an empty tuple.
      NotImplementedError: a forced implementation cannot run here.

    Source: WUSH paper, eq. 1; Gale et al., MegaBlocks (2022), for dispatch by sorting.

    >>> from wush_jax import Recipe, quantize_weight
    >>> one = quantize_weight(jnp.eye(32), None, Recipe(transform="hadamard"))
    >>> experts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
    >>> quantized_ragged_dot(jnp.ones((5, 32)), experts, jnp.array([2, 0, 3])).shape
    (5, 32)
    """
    several = packed if isinstance(packed, tuple) else (packed,)
    sizes = group_sizes if hasattr(group_sizes, "dtype") else np.asarray(group_sizes)
    check_arrays(x=x, group_sizes=sizes)
    for weight in several:
        check_kind(PackedWeight, "packed weights of experts, stacked", packed=weight)
    products = _dot(implementation, x, several, jnp.asarray(sizes))
    return products if isinstance(packed, tuple) else products[0]


def bias_of_rows(bias: jax.Array, group_sizes: jax.Array, y: jax.Array) -> jax.Array:
    """Return the bias (E, N) of each row's expert, in the dtype of y (M, N); 0 beyond the last."""
    group = reference.group_of_rows(group_sizes, len(y))
    return bias.astype(y.dtype).at[group].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(implementation, x, packed, group_sizes):
    return dispatch.ragged_transform_quantize_matmul(
        x, packed, group_sizes, implementation=implementation
    )


def _dot_forward(implementation, x, packed, group_sizes):
    # An empty array carries x's dtype: only arrays may be residuals.
    y = _dot(implementation, x, packed, group_sizes)
    return y, (packed, group_sizes, jnp.zeros((0,), x.dtype))


def _dot_backward(implementation, residuals, cotangents):
    packed, group_sizes, like = residuals
    # All layers of a site have the first one's transform.
    terms = [
        lax.ragged_dot(
            cotangent.astype(jnp.float32),
            _effective(weight, packed[0].transform),
            group_sizes.astype(jnp.int32),
            precision=linalg.HIGHEST,
        )
        for cotangent, weight in zip(cotangents, packed, strict=True)
    ]
    dx = functools.reduce(jnp.add, terms).astype(like.dtype)
    none = np.zeros(group_sizes.shape, jax.dtypes.float0)
    return dx, jax.tree.map(zero_cotangent, packed), none


_dot.defvjp(_dot_forward, _dot_backward)


def _effective(packed: PackedWeight, transform: jax.Array | None) -> jax.Array:
    """Return the experts' weights in their original coordinates, (E, N, K)."""
    groups, _, k = packed.weight.shape
    transforms = dispatch.of_groups(transform, groups, k)
    if transforms is not None:
        d = transforms.shape[-1]
        transforms = jnp.broadcast_to(transforms, (groups, k // d, d, d))
    scales = jnp.broadcast_to(packed.weight.global_scale, (groups,))
    weight = replace(packed.interchange, global_scale=scales)
    return jax.vmap(lambda w, t: effective_weight(PackedWeight(w, t, None, None)))(
        weight, transforms
    )
