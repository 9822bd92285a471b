"""Layers of many kernels, such as experts or a scan's stack: one packed weight for each kernel.

A leading axis everywhere: weights (E, N, K), moments (E, ...), and every leaf of `PackedWeight`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.solvers import hessian as hessians
from wush_jax.solvers.recipe import Recipe
from wush_jax.solvers.site import Notes, PackedWeight, quantize_site
from wush_jax.transforms.checks import check_finite, check_weight
from wush_jax.transforms.moments import Moments


def over_batch(function: Callable, batch: Sequence[int]) -> Callable:
    """Return a function mapped over the leading axes ``batch`` of all its arguments."""
    for _ in batch:
        function = jax.vmap(function)
    return function


def empty_moments(
    size: int, block: int | None, batch: Sequence[int], rows: int = 0, weighted: bool = False
) -> Moments:
    """Return empty moments of K = ``size`` channels for each of a batch of kernels."""
    one = Moments.init(size, block, rows, weighted=weighted)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*batch, *leaf.shape)), one)


def quantize_batched(
    weights: Sequence[jax.Array],
    moments: Moments,
    recipe: Recipe,
    *,
    names: Sequence[str],
) -> list[PackedWeight]:
    """Quantize layers of one site, kernel by kernel, with `quantize_site`.

    A kernel that saw too few tokens, such as an expert to which calibration sent none, takes what
    was seen of all of them together: see `few_tokens`.

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
    moments = filled(moments, batch, recipe.block)
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


def quantize_alike(
    sites: Sequence[Sequence[jax.Array]],
    moments: Sequence[Moments],
    recipe: Recipe,
    *,
    names: Sequence[Sequence[str]],
) -> list[list[PackedWeight]]:
    """Quantize sites of one shape in one program, as `quantize_site` does one after the other.

    An accelerator waits for the next small kernel most of the time that GPTQ takes: many sites
    take it hardly longer than one. A batch of products may be summed in another order than one:
    where that moves a value across the middle between two, a transform has another last place of
    its dtype, or a weight the neighbouring code. Everything else is bit for bit the same.

    Args:
      sites: the weights (N_i, K) of each.
      moments: of the input of each; all alike.
      recipe: for all of them.
      names: of the layers of each, for messages.

    Returns:
      One list of `PackedWeight` a site.

    Raises:
      ValueError: as `quantize_site`, naming the layer.
    """
    for weights, moment, labels in zip(sites, moments, names, strict=True):
        moment.finalize()
        for weight, name in zip(weights, labels, strict=True):
            check_weight(name, weight)
    pairs = [(list(weights), moment) for weights, moment in zip(sites, moments, strict=True)]
    solved, notes = solve_alike(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs), recipe)
    dampings = hessians.dampings(recipe.damping)
    found = []
    for i, labels in enumerate(names):
        packed, taken = jax.tree.map(itemgetter(i), (solved, notes))
        runs = [", ".join(labels)] if len(taken) < len(labels) else labels
        for (attempts, finite), name in zip(taken, runs, strict=bool(taken)):
            hessians.report(int(attempts), bool(finite), dampings, name)
        for p, name in zip(packed, labels, strict=True):
            check_finite(f"transformed {name}", p.weight.scales.astype(jnp.float32))
        if recipe.share_transform:  # one array, as a site has it
            packed = [replace(p, transform=packed[0].transform) for p in packed]
        found.append(packed)
    return found


@partial(jax.jit, static_argnames="recipe")
def solve_alike(weights: Any, moments: Moments, recipe: Recipe) -> Any:
    """Return packed weights and notes of stacked sites: the program of `quantize_alike`."""

    def one(weights, moments):
        notes: Notes = []
        sample = moments.sample if recipe.needs_sample else None
        packed = quantize_site(weights, moments.mean, recipe, sample=sample, notes=notes)
        return packed, notes

    return jax.vmap(one)(weights, moments)


def few_tokens(moments: Moments, batch: Sequence[int], block: int) -> dict[tuple[int, ...], int]:
    """Return which kernels saw too few tokens to be quantized by, and how many they saw.

    Fewer tokens than a block has channels leave its moment singular; a moment of zeros is of none.

    Args:
      moments: with the leading axes ``batch``.
      batch: of the kernels.
      block: channels d of a transform block.
    """
    counts = np.broadcast_to(np.asarray(moments.count), tuple(batch))
    seen = np.asarray(jnp.any(moments.mean, axis=tuple(range(len(batch), moments.mean.ndim))))
    counts = np.where(seen, counts, 0)
    return {index: int(counts[index]) for index in np.ndindex(*batch) if counts[index] < block}


def filled(moments: Moments, batch: Sequence[int], block: int) -> Moments:
    """Return moments in which kernels of `few_tokens` have those of all kernels together."""
    few = few_tokens(moments, batch, block)
    if len(few) == math.prod(batch):  # none is better than another, if it saw anything
        few = {index: count for index, count in few.items() if not count}
    alive = [
        jax.tree.map(itemgetter(index), moments) for index in np.ndindex(*batch) if index not in few
    ]
    if not few or not alive:
        return moments
    # The mean of the means: an expert that is often asked counts no more than another.
    mean = sum(m.mean for m in alive) / len(alive)
    together = replace(functools.reduce(Moments.merge, alive), mean=mean)
    for index in few:
        moments = jax.tree.map(partial(_put, index), moments, together)
    return moments


def _put(index: tuple[int, ...], leaf: jax.Array, value: jax.Array) -> jax.Array:
    return leaf.at[index].set(value)


def packed_shapes(packed: Any, batch: Sequence[int]) -> Any:
    """Return a tree of shapes with the leading axes of a batch."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*batch, *s.shape), s.dtype), packed)
