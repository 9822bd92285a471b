"""Constant global scales that do not fit a site: seen, and replaced before they do harm.

A group's E4M3 scale is ``g amax / max``: NVFP4 with g = 10 saturates where a magnitude is above
268.8, and loses its digits below 0.0094. A site whose weights or inputs lie there gets the
constant times a power of two, so that few formats exist in a model; all its layers the same.
Packed weights are those of `wush_jax.solvers.site`, which calls this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.formats import Format
from wush_jax.formats.elements import E4M3
from wush_jax.solvers.recipe import Recipe, has_constant
from wush_jax.solvers.scale_search import group_metric
from wush_jax.transforms import linalg
from wush_jax.transforms.moments import Moments

# The largest group's scale: below, groups a quarter of it lie among E4M3's subnormal numbers.
LOWEST = 4 * 2.0**-6
# What calibration has not seen may be twice as large.
HEADROOM = 2.0
# By how much a constant shrinks at a time where weights saturate: they hide by how much they do.
SATURATED = 2.0**-4
# That often, which spans all of float32's magnitudes that a layer may have.
REFITS = 8


def in_range(
    solve: Callable[[Recipe], list],
    recipe: Recipe,
    weights: Sequence[jax.Array],
    moments: Moments,
) -> list:
    """Solve a site, again with other constants where those of the recipe do not fit.

    Args:
      solve: quantizes the weights by a recipe.
      recipe: of the site; with ``global_scale="derived"`` constants always follow the ranges.
      weights: of its layers.
      moments: of its input.

    Returns:
      What the last solve gave, packed weights.
    """
    always, recipe = recipe.global_scale == "derived", recipe.solved_alone
    for _ in range(REFITS + 1):
        packed = solve(recipe)
        better = refitted(recipe, weights, packed, moments, always=always)
        if better is None:
            break
        recipe = better
    return packed


def refitted(
    recipe: Recipe,
    weights: Sequence[jax.Array],
    packed: Sequence[Any],
    moments: Moments,
    *,
    always: bool = False,
) -> Recipe | None:
    """Return the recipe with global scales that fit a site; None where they do already.

    Args:
      recipe: of the site.
      weights: of its layers.
      packed: the same, quantized with the recipe.
      moments: of its input.
      always: take what the ranges ask for even where the constant would do.
    """
    codes = inputs = 1.0
    if has_constant(recipe.format):
        codes = _weight_factor(weights, [p.interchange.scales for p in packed], always)
    fmt = recipe.input_format
    if fmt is not None and has_constant(fmt):
        inputs = max(min(_input_factor(fmt, p, moments, always) for p in packed), 2.0**-40)
    if codes == 1 and inputs == 1:
        return None
    changes: dict[str, Format] = {"format": _times(recipe.format, codes)}
    if fmt is not None:
        changes["activation_format"] = _times(fmt, inputs)
    return recipe.replace(**changes)


def _times(fmt: Format, factor: float) -> Format:
    if fmt.global_scale is None or factor == 1:
        return fmt
    return fmt.replace(global_scale=fmt.global_scale * factor)


def _weight_factor(
    weights: Sequence[jax.Array], scales: Sequence[jax.Array], always: bool
) -> float:
    """Return what the constant has to be multiplied with, from the scales that it gave."""
    largest = max(float(jnp.max(jnp.abs(s.astype(jnp.float32)))) for s in scales)
    if largest >= E4M3.max:
        return SATURATED
    fits = largest >= LOWEST and not always
    if fits or not any(bool((w != 0).any()) for w in weights):
        return 1.0
    return 2.0 ** math.floor(math.log2(E4M3.max / (HEADROOM * largest)))


def _input_factor(fmt: Format, packed: Any, moments: Moments, always: bool) -> float:
    """The same for inputs, from the largest magnitude and the power that calibration has seen."""
    assert fmt.global_scale is not None
    largest, power = input_range(packed, moments)
    scale = fmt.global_scale / fmt.element.max
    fits = largest * scale <= E4M3.max and 2 * power * scale >= LOWEST
    if largest == 0 or (fits and not always):
        return 1.0
    return 2.0 ** math.floor(math.log2(E4M3.max / (HEADROOM * largest * scale)))


def input_range(packed: Any, moments: Moments) -> tuple[float, float]:
    """Return the largest magnitude of a site's transformed input, and its largest channel's rms.

    The magnitude is that of one massive value, ``largest |x| max |T_X|``, or four times the rms,
    whichever is more; without a transform it is exact.
    """
    seen = float(np.max(np.asarray(moments.largest)))
    largest = power = 0.0
    for index in np.ndindex(packed.shape[:-2]):
        mean, transform = moments.mean[index], packed.transform
        d = packed.weight.format.group_size if mean.ndim == 2 else mean.shape[-1]
        matrix = jnp.eye(d) if transform is None else transform[index].astype(jnp.float32)
        d = matrix.shape[-1]
        blocks = linalg.diagonal_blocks(mean, d) if mean.ndim == 2 else mean
        squares = jnp.diagonal(group_metric(blocks, matrix, d), axis1=-2, axis2=-1)
        rms = math.sqrt(max(float(jnp.max(squares)), 0.0))
        power = max(power, rms)
        peak = float(jnp.max(jnp.abs(matrix)))
        largest = max(largest, seen * peak, 0.0 if packed.transform is None else 4 * rms)
    return largest, power
