"""Transforms fitted again to the codes: what rounding the weights left, at no run-time cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats import QuantizedArray, dequantize
from wush_jax.solvers import hessian as hessians
from wush_jax.solvers.descent import descend
from wush_jax.solvers.gptq import shapes_of
from wush_jax.transforms import BlockTransform, apply_transform, inverse_transpose, linalg

# Blocks see each other's changes; the second sweep brings what little that leaves.
SWEEPS = 2


class Aim(NamedTuple):
    """What GPTQ aims at under one transform: its moments, as `wush_jax.solvers.gptq.gptq` takes
    them.

    Attributes:
      hessian: second moment of the inputs (K, K), undamped; quantized where the next one is given.
      cross: ``E[x_q x^T]`` (K, K), or None where the error of the inputs is ignored.
      pairs: rows x and x_q (S, K), or None.
    """

    hessian: jax.Array
    cross: jax.Array | None
    pairs: tuple[jax.Array, jax.Array] | None


def refit_rounds(
    quantized: QuantizedArray,
    transform: BlockTransform,
    weight: jax.Array,
    aim: Callable[[BlockTransform], Aim],
    *,
    rounds: int,
    damping: float = 1e-2,
    descent: int = 0,
) -> tuple[QuantizedArray, BlockTransform]:
    """Fit transforms and codes to each other in turn, after GPTQ.

    A round: `refit` moves the transforms; the error of the inputs is measured anew behind them, and
    with it what the weights aim at; `wush_jax.solvers.descent` moves the codes there. Where the aim
    has pairs, a round counts only if it lowers the layer's loss on them.

    Args:
      quantized: the weight (N, K), in transformed coordinates.
      transform: blocks (K/d, d, d), rounded to their run-time dtype.
      weight: W (N, K).
      aim: the moments under a transform.
      rounds: how many.
      damping: lambda of the Hessian.
      descent: sweeps over the codes in a round.

    Returns:
      The weight and its transform.

    Raises:
      ValueError: one transform (d, d) for all blocks.
    """
    if transform.activation.ndim != 3:
        raise ValueError(
            f"transform has shape {transform.activation.shape}: one for all blocks; rounds of "
            "refit need one for each, (K/d, d, d)"
        )
    tried = jnp.asarray(hessians.dampings(damping), jnp.float32)
    best = _arrive(quantized, transform, weight, aim(transform), tried, 0)
    for _ in range(rounds):
        moved = _move(best, damping)
        found = _arrive(best.quantized, moved, weight, aim(moved), tried, descent)
        better = (found.loss < best.loss) | jnp.isnan(best.loss)
        best = jax.tree.map(partial(jnp.where, better), found, best)
    return best.quantized, best.transform


def compile_rounds(
    quantized: QuantizedArray,
    transform: BlockTransform,
    weight: Any,
    hessian: Any,
    *,
    damping: float,
    descent: int,
) -> None:
    """Compile what `refit_rounds` runs, without the error of the inputs, for these shapes."""
    tried = jnp.asarray(hessians.dampings(damping), jnp.float32)
    arrived = _arrive.lower(quantized, transform, weight, Aim(hessian, None, None), tried, descent)
    arrived.compile()
    _move.lower(shapes_of(arrived.out_info), damping).compile()


class _State(NamedTuple):
    """Codes and transform; what they aim at (N, K), under which damped Hessian; their loss.

    The loss is on the pairs, NaN where there are none.
    """

    quantized: QuantizedArray
    transform: BlockTransform
    target: jax.Array
    hessian: jax.Array
    loss: jax.Array


@jax.jit
def _move(state: _State, damping) -> BlockTransform:
    values = dequantize(state.quantized)
    return refit(state.transform, values, state.target, state.hessian, damping)


# The number of sweeps is a value: none at first, some later, in one program.
@jax.jit
def _arrive(quantized, transform, weight, aim: Aim, tried, sweeps) -> _State:
    """Aim anew under a transform, move the codes there, and measure."""
    d = transform.block_size
    _, _, target, shift, _ = hessians.factor(aim.hessian, weight, aim.cross, d, tried)
    damped = aim.hessian + jnp.diag(shift)
    if aim.pairs is not None:
        target = hessians.with_unit_slope(target, weight, *aim.pairs)
    quantized = _descend(quantized, transform, target, damped, sweeps)
    loss = jnp.float32(jnp.nan)
    if aim.pairs is not None:
        # sum_s ||W_eff x_q,s - W x_s||^2
        exact, inputs = aim.pairs
        t_x = transform.activation.astype(jnp.float32)
        effective = apply_transform(dequantize(quantized), t_x.mT)
        error = linalg.matmul(inputs, effective.T) - linalg.matmul(exact, weight.T)
        loss = jnp.sum(error * error)
    return _State(quantized, transform, target, damped, loss)


def _descend(quantized, transform, target, damped, sweeps) -> QuantizedArray:
    fmt, (n, k) = quantized.format, target.shape
    t_x, t_w = (t.astype(jnp.float32) for t in (transform.activation, transform.weight))
    moved = apply_transform(apply_transform(damped, t_x).T, t_x)
    codes = fmt.unpack(quantized.codes).reshape(n, k).T
    scale = fmt.load_scales(quantized.scales).reshape(n, -1).T
    wanted = apply_transform(target, t_w).T
    lower = descend(codes, scale, wanted, moved, fmt, quantized.global_scale, sweeps)
    return replace(quantized, codes=fmt.pack(lower.T).reshape(quantized.codes.shape))


def refit(
    transform: BlockTransform,
    values: jax.Array,
    target: jax.Array,
    hessian: jax.Array,
    damping: jax.Array | float,
) -> BlockTransform:
    """Move each block's T_X to where the rounded weights come closest to their target.

    The effective weight is ``V_b T_b`` in every block b. With V fixed and ``E = V T - target``,
    ``tr(E H E^T)`` is quadratic in T; block after block, each with all others known::

        T_b <- T_b - (V_b^T V_b + mu I)^-1 V_b^T (E H)_b H_bb^-1 ,  mu = damping * tr(V_b^T V_b) / d

    mu weighs the change ``dT H_bb dT^T``: what it adds to the power of the block's transformed
    inputs, and so to the error of quantizing them. d^2 parameters a block against its N d codes:
    worth the more, the larger d / N. The loss never rises but for the rounding of T to its run-time
    dtype, which later blocks make up for.

    Args:
      transform: (K/d, d, d), rounded to its run-time dtype.
      values: V (N, K), decoded.
      target: (N, K), in original coordinates.
      hessian: H (K, K), positive definite, in original coordinates.
      damping: relative to V's mean power.

    Returns:
      The pair of the new T_X, of the same dtype. A block whose result is not finite stays.

    Source: none in the WUSH paper; block coordinate descent on its equation 1 without the error of
    the activations.

    >>> pair = BlockTransform(jnp.eye(2)[None], jnp.eye(2)[None])
    >>> v, w = jnp.eye(2), jnp.float32([[1.1, 0.0], [0.0, 0.9]])
    >>> bool(jnp.allclose(refit(pair, v, w, jnp.eye(2), 0.0).activation[0], w, atol=1e-6))
    True
    """
    count, d, _ = transform.activation.shape
    dtype = transform.activation.dtype
    info = jnp.finfo(dtype)
    blocks = values.reshape(-1, count, d).transpose(1, 0, 2)
    start = transform.activation.astype(values.dtype)
    error = jnp.einsum("bnd,bde->bne", blocks, start, precision=linalg.HIGHEST)
    error = error.transpose(1, 0, 2).reshape(values.shape) - target

    def step(error, xs):
        i, v, old = xs
        columns = lax.dynamic_slice_in_dim(hessian, i * d, d, axis=1)
        own = lax.dynamic_slice_in_dim(columns, i * d, d, axis=0)
        slope = linalg.matmul(v.T, linalg.matmul(error, columns))
        change = _solve(linalg.matmul(v.T, v), slope, own, damping)
        new = lax.reduce_precision(old - change, info.nexp, info.nmant)
        new = jnp.where(jnp.all(jnp.isfinite(new)), new, old)
        part = lax.dynamic_slice_in_dim(error, i * d, d, axis=1) + linalg.matmul(v, new - old)
        return lax.dynamic_update_slice_in_dim(error, part, i * d, axis=1), new

    def sweep(state, _):
        error, moved = state
        return lax.scan(step, error, (jnp.arange(count, dtype=jnp.int32), blocks, moved)), None

    (_, moved), _ = lax.scan(sweep, (error, start), length=SWEEPS)
    moved = moved.astype(jnp.float32)
    return BlockTransform(moved.astype(dtype), inverse_transpose(moved))


@linalg.float64_construction
def _solve(gram, slope, own, damping):
    """``(gram + mu I)^-1 slope own^-1``."""
    d = len(gram)
    mean = jnp.trace(gram) / d
    # A block of zero codes has no slope either.
    eye = jnp.eye(d) * jnp.where(mean > 0, mean * damping, 1.0)
    left = jax.scipy.linalg.solve(gram + eye, slope, assume_a="pos")
    return jax.scipy.linalg.solve(own, left.T, assume_a="pos").T
