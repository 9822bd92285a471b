"""Layers of many kernels, such as experts or a scan's stack: one packed weight for each kernel.

A leading axis everywhere: weights (E, N, K), moments (E, ...), and every leaf of `PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.solvers.recipe import Recipe
from wush_jax.solvers.site import PackedWeight, quantize_site
from wush_jax.transforms.moments import Moments


def over_batch(function: Callable, batch: Sequence[int]) -> Callable:
    """Return a function mapped over the leading axes ``batch`` of all its arguments."""
    for _ in batch:
        function = jax.vmap(function)
    return function


def empty_moments(size: int, block: int | None, batch: Sequence[int], rows: int = 0) -> Moments:
    """Return empty moments of K = ``size`` channels for each of a batch of kernels."""
    one = Moments.init(size, block, rows)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*batch, *leaf.shape)), one)


def quantize_batched(
    weights: Sequence[jax.Array],
    moments: Moments,
    recipe: Recipe,
    *,
    names: Sequence[str],
) -> list[PackedWeight]:
    """Quantize layers of one site, kernel by kernel, with `quantize_site`.

    A kernel whose inputs were all zero, an expert that no calibration token was sent to, takes the
    mean moment of the others.

    Args:
      weights: (N_i, K) each, or (*batch, N_i, K).
      moments: of their input; a leading ``batch`` where the weights have one.
      recipe: for all of them.
      names: of the layers, for messages.

    Returns:
      One `PackedWeight` per weight; every leaf has the leading ``batch``.

    Raises:
      ValueError: as `quantize_site`, naming the layer and the kernel.
    """
    batch = weights[0].shape[:-2]
    if not batch:
        moment = moments.finalize()
        return quantize_site(weights, moment, recipe, sample=moments.sample, names=names)
    moments = replace(moments, mean=_fill_dead(moments.mean, len(batch)))
    each = []
    for index in np.ndindex(batch):
        some, one = jax.tree.map(itemgetter(index), (list(weights), moments))
        labels = [f"{name}{list(index)}" for name in names]
        each.append(quantize_site(some, one.finalize(), recipe, sample=one.sample, names=labels))
    stacked: dict[tuple[int, ...], jax.Array] = {}

    def stack(*leaves: jax.Array) -> jax.Array:
        # The transform that layers share in every kernel stays one array that they share.
        key = tuple(map(id, leaves))
        if key not in stacked:
            stacked[key] = jnp.stack(leaves).reshape(*batch, *leaves[0].shape)
        return stacked[key]

    return [jax.tree.map(stack, *packed) for packed in zip(*each, strict=True)]


def _fill_dead(mean: jax.Array, axes: int) -> jax.Array:
    flat = mean.reshape(-1, *mean.shape[axes:])
    dead = ~jnp.any(flat, axis=tuple(range(1, flat.ndim)), keepdims=True)
    others = jnp.sum(flat, axis=0) / jnp.maximum(jnp.sum(~dead), 1)
    return jnp.where(dead, others, flat).reshape(mean.shape)


def packed_shapes(packed: Any, batch: Sequence[int]) -> Any:
    """Return a tree of shapes with the leading axes of a batch."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*batch, *s.shape), s.dtype), packed)
