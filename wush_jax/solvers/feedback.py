"""GPTQ inside one block: groups in order, columns in order, scales chosen on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats import Format
from wush_jax.solvers import scale_search
from wush_jax.transforms import linalg

# In-block factors get this much (relative): far below what moves a code, far above rounding.
JITTER = 1e-10


@linalg.float64_construction
def inner_factor(matrix: jax.Array, root: jax.Array, g: int):
    """Factor the conditional Hessian in transformed coordinates, ``(T R_ii)(T R_ii)^T = R' R'^T``.

    Args:
      matrix: T_X (..., d, d).
      root: R_ii (..., d, d).
      g: group size.

    Returns:
      ``R'_gh R'_hh^-1`` between groups (..., d, d); inside groups ``R'_bc / R'_cc``
      (..., d/g, g, g); and ``R'_cc`` (..., d/g, g).
    """
    moved = linalg.matmul(matrix, root)
    r = linalg.upper_factor(linalg.damp(linalg.matmul(moved, moved.mT), JITTER))
    between, roots = linalg.unit_blocks(r, g)
    power = jnp.diagonal(roots, axis1=-2, axis2=-1)
    return between, roots / power[..., None, :], power


def quantize_block(w, factors, fmt: Format, steps: tuple[int, ...], global_scale):
    """Quantize one block with error feedback inside it, in transformed coordinates.

    A group's scale comes from its weights as the earlier groups of the block left them; of several
    candidates the one with the least error of the whole group wins, feedback included.

    Args:
      w: (d, N), one column of outputs a row.
      factors: of `inner_factor`.
      fmt: the format.
      steps: neighbouring scales to try (`wush_jax.solvers.scale_search.offsets`).
      global_scale: float32 scalar.

    Returns:
      Codes uint8 (d/g, g, N), scales float32 (d/g, N), and the error ``what - w`` (d, N).

    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    g = fmt.group_size
    between, inside, power = factors
    moves = jnp.asarray(steps, jnp.int32)[:, None]

    def step(delta, xs):
        i, unit, weight_of_error = xs
        original = lax.dynamic_slice_in_dim(w, i * g, g, axis=0)
        column = lax.dynamic_slice_in_dim(between, i * g, g, axis=1)
        current = original - linalg.matmul(column.T, delta)
        _, base = fmt.encode_groups(current.T.astype(jnp.float32), global_scale)
        scale = scale_search.neighbour(fmt, base[None], moves) if len(steps) > 1 else base[None]
        codes, values, loss = _columns(current, scale, unit, weight_of_error, global_scale, fmt)
        # The first least loss, by hand: argmin does not lower inside a local x64 context.
        rank = jnp.arange(len(steps), dtype=jnp.int32)[:, None]
        least = loss == jnp.min(loss, 0, keepdims=True)
        chosen = rank == jnp.min(jnp.where(least, rank, len(steps) - 1), 0, keepdims=True)
        codes, values, scale = (
            jnp.sum(jnp.where(mask, a, jnp.zeros_like(a)), axis=-2, dtype=a.dtype)
            for a, mask in ((codes, chosen[None]), (values, chosen[None]), (scale, chosen))
        )
        delta = lax.dynamic_update_slice_in_dim(delta, values - original, i * g, axis=0)
        return delta, (codes, scale)

    index = jnp.arange(w.shape[0] // g, dtype=jnp.int32)
    delta, (codes, scale) = lax.scan(step, jnp.zeros_like(w), (index, inside, power))
    return codes, scale, delta


def _columns(w, scale, unit, power, global_scale, fmt: Format):
    """One group, (g, N), with C candidate scales (C, N), column by column.

    Returns:
      Codes (g, C, N), values (g, C, N) and the group's loss ``sum_c (R'_cc (what_c - w_c))^2``.
    """

    def step(state, xs):
        delta, loss = state
        c, original, coefficients, root = xs
        column = original[None] - jnp.tensordot(coefficients, delta, 1, precision=linalg.HIGHEST)
        code = fmt.encode_with(column.astype(jnp.float32)[..., None], scale, global_scale)
        value = fmt.decode_with(code, scale, global_scale)[..., 0].astype(w.dtype)
        delta = lax.dynamic_update_index_in_dim(delta, value - original[None], c, 0)
        return (delta, loss + (root * (value - column)) ** 2), code[..., 0]

    start = jnp.zeros((w.shape[0], *scale.shape), w.dtype), jnp.zeros(scale.shape, w.dtype)
    index = jnp.arange(w.shape[0], dtype=jnp.int32)
    (delta, loss), codes = lax.scan(step, start, (index, w, unit.T, power))
    return codes, delta + w[:, None], loss
