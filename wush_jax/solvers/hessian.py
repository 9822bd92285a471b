"""GPTQ's Hessian: damped until it factors, and the weights that are best under it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.transforms import linalg

# Escalation multiplies the damping by 10 up to this; any Hessian that is a second moment up to
# rounding is positive definite long before.
MAX_DAMPING = 1.0

# Where half of an output is noise its regression has slope 1/2: beyond that a gain amplifies noise.
MAX_GAIN = 2.0


def dampings(damping: float) -> list[float]:
    """The dampings to try in turn: the given one, then tenfold each up to `MAX_DAMPING`.

    >>> dampings(0.1)
    [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    tried = [float(damping)]
    while (following := max(10.0 * tried[-1], 1e-6)) <= MAX_DAMPING * (1 + 1e-9):
        tried.append(following)
    # One length for all, so that another damping is no other compilation.
    return tried + tried[-1:] * (8 - len(tried))


def report(attempts: int, finite: bool, tried: Sequence[float], name: str) -> None:
    """Say when the damping had to grow; raise when it could not grow enough."""
    if attempts > len(tried):
        raise ValueError(
            f"hessian of {name} is not positive definite at any damping up to {tried[-1]:g}: it "
            "is not a second moment; recompute it from the layer's inputs"
        )
    if not finite:
        raise ValueError(
            f"weight of {name} overflows float32 on the way; scale it so that squares stay finite"
        )
    if attempts > 1:
        warnings.warn(
            f"hessian of {name} is not positive definite at damping={tried[0]:g}; "
            f"{tried[attempts - 1]:g} was used",
            stacklevel=4,
        )


@linalg.float64_construction
def factor(hessian, weight, cross, d: int, tried):
    """Factor the damped Hessian ``H + D = R R^T``; find the weights that are best under it.

    ``D = damping * mean(diag H)``; channels that were never seen (zero diagonal) get the mean. With
    quantized inputs x_q, ``H = E[x_q x_q^T]`` and ``C = E[x_q x^T]``, the loss
    ``E||W' x_q - W x||^2`` has its minimum at ``W' = W (C + D)^T (H + D)^-1``.

    Args:
      hessian: H (K, K), undamped.
      weight: W (N, K).
      cross: C (K, K), or None where x_q = x: the best weights are then W itself.
      d: block size.
      tried: the dampings to try, (attempts,).

    Returns:
      ``R_ij R_jj^-1`` (K, K); the blocks ``R_jj`` (K/d, d, d); the best weights (N, K); D's
      diagonal (K,); and how many dampings were tried, one more than there are when none
      succeeded: R is then the identity and the weights are W.
    """
    k = hessian.shape[0]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    alive = jnp.sum(~dead, dtype=diagonal.dtype)
    mean = jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(alive, 1.0)
    mean = jnp.where((mean > 0) & jnp.isfinite(mean), mean, 1.0)

    def shift(attempt):
        return jnp.where(dead, mean - diagonal, 0.0) + tried[attempt] * mean

    def attempt(state):
        count, _ = state
        return count + 1, linalg.upper_factor(hessian + jnp.eye(k) * shift(count)[None])

    def failed(state):
        count, r = state
        return (count < len(tried)) & ~jnp.all(jnp.isfinite(jnp.diagonal(r)))

    start = jnp.int32(0), jnp.full((k, k), jnp.nan, jnp.float64)
    count, r = lax.while_loop(failed, attempt, start)
    good = jnp.all(jnp.isfinite(r))
    r = jnp.where(good, r, jnp.eye(k, dtype=jnp.float64))
    used = shift(count - 1)
    best = weight if cross is None else _best(r, weight, cross + jnp.eye(k) * used[None])
    unit, roots = linalg.unit_blocks(r, d)
    attempts = count + (~good).astype(jnp.int32)
    return unit, roots, jnp.where(good, best, weight), used, attempts


def with_unit_slope(
    target: jax.Array, weight: jax.Array, exact: jax.Array, quantized: jax.Array
) -> jax.Array:
    """Rescale each row of the target so that its output has slope one against the original output.

    A regression onto noisy inputs shrinks the outputs: the least squared error of one layer, but
    the shortfalls of all layers have one sign. Row o times::

        c_o = sum_s (w_o x_s)^2 / sum_s (w_o x_s) (t_o x_q,s)

    so that ``sum_s (w_o x_s) (c_o t_o x_q,s) = sum_s (w_o x_s)^2``; within [1 / `MAX_GAIN`,
    `MAX_GAIN`], and 1 where the sample shows no positive slope.

    Args:
      target: T (N, K), the best weights for quantized inputs.
      weight: W (N, K).
      exact: rows x (S, K), each times the square root of its weight.
      quantized: the same rows quantized, x_q (S, K).

    Returns:
      (N, K).

    >>> w, x = jnp.ones((1, 2)), jnp.eye(2)
    >>> with_unit_slope(0.8 * w, w, x, x).round(3).tolist()
    [[1.0, 1.0]]
    """
    output = linalg.matmul(exact, weight.T)
    power = jnp.sum(output * output, axis=0)
    met = jnp.sum(output * linalg.matmul(quantized, target.T), axis=0)
    gain = jnp.clip(power / jnp.where(met > 0, met, 1.0), 1 / MAX_GAIN, MAX_GAIN)
    return jnp.where(met > 0, gain, 1.0)[:, None] * target


def _best(r: jax.Array, weight: jax.Array, cross: jax.Array) -> jax.Array:
    """``W C^T (R R^T)^-1`` with R upper triangular."""
    options = {"left_side": True, "lower": False}
    solved = lax.linalg.triangular_solve(r, linalg.matmul(cross, weight.T), **options)
    return lax.linalg.triangular_solve(r, solved, transpose_a=True, **options).T
