"""What is known of a site's input: checked against its weights and its recipe before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wush_jax import transforms
from wush_jax.formats import elements
from wush_jax.formats.checks import check_arrays, refuse_tensors
from wush_jax.solvers.recipe import DATA_FREE, Recipe
from wush_jax.transforms import Moments, Sample, linalg


class Known(NamedTuple):
    """What calibration knows of a site's input.

    Attributes:
      moment: M_X, full (K, K) or diagonal blocks (K/d, d, d), or None.
      blocks: M_X as diagonal blocks, or None.
      sample: rows, or None.
    """

    moment: jax.Array | None
    blocks: jax.Array | None
    sample: Sample | None


def known_input(
    weights: Sequence[jax.Array],
    moments: Moments | jax.Array | None,
    sample: Sample | None,
    recipe: Recipe,
    *,
    built: bool = False,
) -> Known:
    """Return what is known of a site's input, checked.

    Args:
      weights: (N_i, K) each.
      moments: M_X with its sample, or M_X alone, or None.
      sample: in place of the one in the moments.
      recipe: what will be done with them.
      built: whether the transform is there already, so that no gains are chosen.

    Raises:
      ValueError: whatever does not fit, by the name of the argument.
    """
    if recipe.global_scale == "derived":
        raise ValueError(
            "recipe: global_scale='derived' needs the ranges of the layer's input: give the "
            "Moments that wush_jax.calibrate_layer returns, outside of jax.jit; or give the format "
            "a global_scale of its own, or None for that of its weights"
        )
    k = _check_weights(weights, recipe)
    refuse_tensors(sample=sample)
    if not isinstance(moments, Moments | None):
        check_arrays(activation_moment=moments)
    if isinstance(moments, Moments):
        sample = moments.sample if sample is None else sample
        moments = moments.finalize()
    blocks = _checked_blocks(weights, moments, recipe)
    if sample is not None:
        _check_sample(sample, k)
    else:
        needs = {"block_gain": recipe.block_gain and not built}
        needs["input_error"] = recipe.input_error == "sample"
        _refuse_missing([f"{n}={getattr(recipe, n)!r}" for n, needed in needs.items() if needed])
    return Known(moments, blocks, sample)


def _check_weights(weights: Sequence[jax.Array], recipe: Recipe) -> int:
    """Return K."""
    d = recipe.block
    for w in weights:
        check_arrays(weight=w)
        if w.ndim != 2 or 0 in w.shape:
            raise ValueError(f"weight has shape {w.shape}; it must be (N, K), both at least 1")
        if w.shape[-1] != weights[0].shape[-1]:
            raise ValueError(f"weights of one site differ in K: {[w.shape for w in weights]}")
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(f"weight has dtype {w.dtype}; give floating-point values: cast it")
        transforms.check_finite("weight", w)
    k = weights[0].shape[-1]
    if k % d:
        raise ValueError(
            f"weight has shape {weights[0].shape}: K={k} is not a multiple of block_size={d}; "
            "choose another block_size or format, or exclude the layer by a rule"
        )
    return k


def _checked_blocks(weights, activation_moment, recipe: Recipe) -> jax.Array | None:
    """Check M_X against the weights and the recipe; return it as diagonal blocks, or None."""
    d, k = recipe.block, weights[0].shape[-1]
    if activation_moment is None:
        if recipe.transform not in DATA_FREE or recipe.solver == "gptq":
            raise ValueError(
                f"activation_moment is None, but transform={recipe.transform!r} with solver="
                f"{recipe.solver!r} needs the second moment of the layer's input: calibrate first"
            )
        return None
    shape = activation_moment.shape
    if shape not in ((k, k), (k // d, d, d)):
        n = weights[0].shape[0]
        hint = " (is the weight (K, N)? it must be (N, K))" if n in shape[:1] + shape[-1:] else ""
        raise ValueError(
            f"activation_moment has shape {shape}; for weight {weights[0].shape} and block size "
            f"{d} it must be {(k, k)} or {(k // d, d, d)}{hint}"
        )
    if recipe.solver == "gptq" and shape != (k, k):
        raise ValueError(
            f"activation_moment has shape {shape}; solver='gptq' needs the full moment {(k, k)}: "
            "collect it with block=None, or use solver='rtn'"
        )
    transforms.check_finite("activation_moment", activation_moment)
    if len(shape) == 2:
        return linalg.diagonal_blocks(activation_moment, d)
    return activation_moment


def _refuse_missing(fields: Sequence[str]) -> None:
    if fields:
        raise ValueError(
            f"sample=None: {' and '.join(fields)} needs rows of the layer's input; calibrate "
            "first: pass what wush_jax.calibrate_layer(x) returns as activation_moment, or sample="
            "wush_jax.Sample.of(x)"
        )


def _check_sample(sample: Any, k: int) -> None:
    """Raise ValueError, with all that is wrong, unless it is a sample of rows of K channels."""
    if not isinstance(sample, Sample):
        raise ValueError(
            f"sample is a {type(sample).__name__}; it must be a Sample: of an array x of rows "
            "wush_jax.Sample.of(x), of many wush_jax.calibrate_layer(x).sample"
        )
    faults, shape = [], sample.rows.shape
    if len(shape) != 2 or shape[-1] != k:
        faults.append(f"its rows have shape {shape}, the weight has K={k}")
    with jax.ensure_compile_time_eval():  # a constant under jit is no tracer
        if shape[0] == 0 or not (_traced(sample.count) or jnp.max(sample.count)):
            faults.append("it is empty: update it with rows of the layer's input")
        bad = 0 if _traced(sample.rows) else elements.not_finite(sample.rows)
    if bad:
        faults.append(f"{bad} of its values are not finite: leave out the rows that hold them")
    if faults:
        raise ValueError(f"sample: {'; '.join(faults)}")


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)
