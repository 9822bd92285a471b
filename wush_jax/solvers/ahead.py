"""Compile GPTQ for a shape of weight before it is needed: in a thread, while something else runs.

Each shape, format and preset is a program of its own, of seconds; compiling it does not hold up
Python, so that a CPU of two cores does both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from wush_jax.solvers import hessian as hessians
from wush_jax.solvers import scale_search
from wush_jax.solvers.gptq import Options, compile_steps
from wush_jax.solvers.recipe import DATA_FREE, Recipe
from wush_jax.solvers.refit import compile_rounds
from wush_jax.solvers.site_transform import TransformRule
from wush_jax.transforms import BlockTransform


def compile_ahead(weight: jax.ShapeDtypeStruct, recipe: Recipe) -> None:
    """Compile what `wush_jax.quantize_weight` will run GPTQ with.

    Nothing is compiled for recipes that round to nearest, or that look at the error of the inputs.

    Args:
      weight: (N, K) and its dtype; a layer that has its transform to itself.
      recipe: what will be done.

    >>> from wush_jax import PAPER
    >>> compile_ahead(jax.ShapeDtypeStruct((8, 32), jnp.float32), PAPER)
    """
    k = weight.shape[-1]
    recipe = recipe.fitted(k)
    if recipe.solver != "gptq" or (recipe.input_error != "ignore" and recipe.input_format):
        return
    d, one = recipe.block, recipe.transform in DATA_FREE
    given = None
    if not recipe.interleaved:
        blocks = (d, d) if one or recipe.shared_blocks else (k // d, d, d)
        dtype = jnp.dtype(recipe.transform_dtype)
        given = BlockTransform(_shape(*blocks, dtype=dtype), _shape(*blocks))
    options = Options(
        recipe.format,
        d,
        scale_search.offsets(recipe.format, recipe.scale_search),
        recipe.activation_order,
        recipe.solver_dtype,
        TransformRule.of(recipe) if given is None else None,
        recipe.descent,
    )
    tried = hessians.dampings(recipe.damping)
    found = compile_steps(weight, _shape(k, k), given, tried, options)
    if recipe.refit:
        again: dict[str, Any] = {"damping": recipe.damping, "descent": recipe.descent}
        compile_rounds(*found, _shape(*weight.shape), _shape(k, k), **again)


def _shape(*shape: int, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
