"""Coordinate descent over codes: after GPTQ, revisit every code with all the others known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats import Format
from wush_jax.transforms import linalg


def descend(
    codes: jax.Array,
    scale: jax.Array,
    target: jax.Array,
    hessian: jax.Array,
    fmt: Format,
    global_scale: jax.Array,
    sweeps: jax.Array | int,
) -> jax.Array:
    """Lower ``tr(E^T A E)``, ``E = decode(codes) - target``, one code after the other.

    With all other codes fixed the loss is a parabola in value c, with its minimum at
    ``v_c - (A E)_c / A_cc``; the nearest code there is the best one under the group's scale. So the
    loss never rises. GPTQ decides each code before it knows the later ones; this looks back.

    Args:
      codes: uint8 (K, N), one a value: rows are channels.
      scale: float32 (K/g, N), kept as they are.
      target: (K, N), in the coordinates of the codes.
      hessian: A (K, K), positive definite, in the same coordinates.
      fmt: the format.
      global_scale: float32 scalar.
      sweeps: passes over all codes.

    Returns:
      Codes uint8 (K, N).

    Source: none in the WUSH paper; coordinate descent for layerwise quantization (QuantEase,
    arXiv 2309.01885).

    >>> from wush_jax import MXFP4
    >>> w = jnp.full((32, 1), 1.1)
    >>> start, scale = jnp.zeros((32, 1), jnp.uint8), jnp.ones((1, 1))
    >>> descend(start, scale, w, jnp.eye(32), MXFP4, jnp.float32(3.0), 1)[:2, 0].tolist()
    [5, 5]
    """
    k, n = codes.shape
    g = fmt.group_size
    rows = hessian.reshape(k // g, g, k)
    diagonal = jnp.diagonal(hessian).reshape(k // g, g)

    def group(state, xs):
        codes, error = state
        i, a, power, s = xs
        gradient = linalg.matmul(a, error)
        inside = lax.dynamic_slice_in_dim(a, i * g, g, axis=1)
        old = lax.dynamic_slice_in_dim(error, i * g, g, axis=0)
        wanted = lax.dynamic_slice_in_dim(target, i * g, g, axis=0)

        def column(gradient, xs):
            coupling, root, e, t = xs
            c, slope = coupling  # the column's place in the group, and its column of A
            best = t + e - gradient[c] / root
            code = fmt.encode_with(best.astype(jnp.float32)[:, None], s, global_scale)
            value = fmt.decode_with(code, s, global_scale)[:, 0].astype(target.dtype)
            new = value - t
            return gradient + slope[:, None] * (new - e)[None], (code[:, 0], new)

        places = jnp.arange(g, dtype=jnp.int32)
        _, (new_codes, new) = lax.scan(column, gradient, ((places, inside.T), power, old, wanted))
        codes = lax.dynamic_update_slice_in_dim(codes, new_codes, i * g, axis=0)
        return (codes, lax.dynamic_update_slice_in_dim(error, new, i * g, axis=0)), None

    def sweep(_, state):
        index = jnp.arange(k // g, dtype=jnp.int32)
        return lax.scan(group, state, (index, rows, diagonal, scale))[0]

    groups = codes.reshape(k // g, g, n).mT
    values = fmt.decode_with(groups, scale, global_scale).mT.reshape(k, n)
    start = codes, values.astype(target.dtype) - target
    return lax.fori_loop(0, sweeps, sweep, start)[0]
