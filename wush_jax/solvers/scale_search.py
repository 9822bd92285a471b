"""Scale choice by measured error: neighbouring scales of a group, and static global scales.

A format's rule reads the scale off a group's magnitudes. For weights there is time to try the
scales next to it and keep the one with the least weighted error: `sweep` for round-to-nearest;
`wush_jax.solvers.gptq` tries the same neighbours inside its error feedback.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats import Format, scales
from wush_jax.formats.elements import E4M3
from wush_jax.transforms import linalg

# Steps to try per scale type, the rule's own scale (0) first so that it wins ties. A step is one
# power of two, one E4M3 neighbour, or a factor 2**(1/8).
OFFSETS = {
    "e8m0": (0, -1, 1),
    "e4m3": (0, -2, -1, 1, 2, 3, 4, 5),
    "bfloat16": (0, -3, -2, -1, 1, 2, 3),
    "float32": (0, -3, -2, -1, 1, 2, 3),
}

# A moment knows the power of a channel, not its largest value. 64 standard deviations leave room
# for heavy tails, and E4M3 still resolves groups a thousand times smaller.
PEAK_TO_RMS = 64.0


def offsets(fmt: Format, scale_search: str) -> tuple[int, ...]:
    """Return the steps that a strategy tries: (0,) for "rule", `OFFSETS` for "sweep".

    >>> from wush_jax import MXFP4
    >>> offsets(MXFP4, "sweep")
    (0, -1, 1)
    """
    return OFFSETS[fmt.scale_dtype] if scale_search == "sweep" else (0,)


def neighbour(fmt: Format, scale: jax.Array, step: jax.Array) -> jax.Array:
    """Return the scale ``step`` places away, representable and of the same sign.

    E8M0: ``s 2^step``. E4M3: the step-th next magnitude. Others: ``s 2^(step/8)``, rounded.

    Args:
      fmt: gives the scale's type.
      scale: float32 scales, as a rule gives them.
      step: int32, broadcasts against scale.

    Returns:
      float32; NaN stays NaN.

    >>> from wush_jax import MXFP4, NVFP4
    >>> neighbour(MXFP4, jnp.float32(4.0), -1).item(), neighbour(NVFP4, jnp.float32(4.0), 1).item()
    (2.0, 4.5)
    """
    step = jnp.asarray(step, jnp.int32)
    if fmt.scale_dtype == "e4m3":
        magnitude = E4M3.encode(jnp.abs(scale)).astype(jnp.int32)
        moved = E4M3.decode(jnp.clip(magnitude + step, 1, E4M3.max_code).astype(jnp.uint8))
        moved = jnp.where(scale < 0, -moved, moved)
    else:
        per_octave = 1 if fmt.scale_dtype == "e8m0" else 8
        factor = jnp.exp2(step.astype(jnp.float32) / per_octave)
        low, high = (2.0**e for e in scales.E8M0_RANGE)
        moved = jnp.clip(scale * factor, low, high)
        if per_octave == 8:
            moved = scales._representable(moved, fmt)
    # The rule's own scale untouched, whatever rounding the arithmetic above does.
    return jnp.where((step == 0) | (scale != scale), scale, moved)


def sweep(
    y: jax.Array, fmt: Format, global_scale: jax.Array, metric: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Quantize groups, each with the neighbouring scale of least weighted error.

    Per group with error ``e = y - decode(encode(y))``: the least ``e^T A e`` over `OFFSETS`.

    Args:
      y: (..., G, g) float32 groups.
      fmt: the format; its rule gives the scale to start from.
      global_scale: float32, broadcasts against (..., G).
      metric: A (G, g, g), positive semidefinite, such as ``T_X M_X T_X^T``; None weights all
        values alike.

    Returns:
      Codes uint8 (..., G, g) and scales float32 (..., G). The error never exceeds the rule's.

    Source: none in the WUSH paper; microscaling practice (4-over-6 generalised to all neighbours).

    >>> from wush_jax import NVFP4
    >>> codes, scale = sweep(jnp.ones((2, 16)), NVFP4, jnp.float32(10.0))
    >>> codes.shape, scale.shape
    ((2, 16), (2,))
    """
    codes, base = fmt.encode_groups(y, global_scale)

    def weighted_error(codes, scale):
        e = y - fmt.decode_with(codes, scale, global_scale)
        if metric is None:
            return jnp.sum(e * e, axis=-1)
        spread = jnp.einsum("...bi,bij->...bj", e, metric, precision=linalg.HIGHEST)
        return jnp.sum(spread * e, axis=-1)

    def attempt(best, step):
        best_codes, best_scale, best_error = best
        scale = neighbour(fmt, base, step)
        codes = fmt.encode_with(y, scale, global_scale)
        error = weighted_error(codes, scale)
        better = error < best_error
        return (
            jnp.where(better[..., None], codes, best_codes),
            jnp.where(better, scale, best_scale),
            jnp.where(better, error, best_error),
        ), None

    steps = jnp.asarray(offsets(fmt, "sweep")[1:], jnp.int32)
    (codes, scale, _), _ = lax.scan(attempt, (codes, base, weighted_error(codes, base)), steps)
    return codes, scale


def group_metric(activation_moment: jax.Array, matrix: jax.Array, group_size: int) -> jax.Array:
    """Return the diagonal (g, g) blocks of ``T_X M_X T_X^T``: what an error in a group costs.

    Args:
      activation_moment: M_X (K/d, d, d).
      matrix: T_X (K/d, d, d) or (d, d).
      group_size: g, a divisor of d.

    Returns:
      float32 (K/g, g, g).

    >>> group_metric(jnp.eye(4)[None], 2 * jnp.eye(4), 2).shape
    (2, 2, 2)
    """
    t = matrix.astype(jnp.float32)
    moved = linalg.matmul(linalg.matmul(t, activation_moment.astype(jnp.float32)), t.mT)
    return linalg.diagonal_blocks(moved, group_size).reshape(-1, group_size, group_size)


def input_global_scale(
    fmt: Format | None,
    *,
    amax: jax.Array | float | None = None,
    activation_moment: jax.Array | None = None,
    transform: jax.Array | None = None,
) -> jax.Array | None:
    """Return a static global scale for activations of a format that derives it from data.

    ``448 * max / amax`` with the largest transformed magnitude seen in calibration, or, where only
    the moment is known, ``amax = 64 max_i sqrt((T_X M_X T_X^T)_ii)``.

    Args:
      fmt: the activations' format, or None.
      amax: largest ``|T_X x|`` of the calibration data.
      activation_moment: M_X (K/d, d, d), used where ``amax`` is None.
      transform: T_X (K/d, d, d) or (d, d), or None for the identity.

    Returns:
      float32 scalar; None where the format has a constant of its own (nothing to derive).

    Raises:
      ValueError: neither ``amax`` nor ``activation_moment`` was given.

    >>> from wush_jax import NVFP4
    >>> input_global_scale(NVFP4) is None
    True
    >>> input_global_scale(NVFP4.replace(global_scale=None), amax=6.0).item()
    448.0
    """
    if fmt is None or fmt.global_scale is not None:
        return None
    if amax is None:
        if activation_moment is None:
            raise ValueError(
                f"amax=None and activation_moment=None: {fmt.name} has global_scale=None, which is "
                "derived from data; pass one of the two, or fmt.replace(global_scale=10.0)"
            )
        d = activation_moment.shape[-1]
        t = jnp.eye(d) if transform is None else transform
        power = jnp.diagonal(group_metric(activation_moment, t, d), axis1=-2, axis2=-1)
        amax = PEAK_TO_RMS * jnp.sqrt(jnp.maximum(jnp.max(power), 0.0))
    return fmt.derive_global_scale(jnp.asarray(amax, jnp.float32))


def sweep_array(
    w: jax.Array, fmt: Format, global_scale: jax.Array, metric: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`sweep` of (..., K): unpacked codes (..., K) and stored scales (..., K/g).

    >>> from wush_jax import MXFP4
    >>> sweep_array(jnp.ones((2, 64)), MXFP4, jnp.float32(3.0), None)[1].shape
    (2, 2)
    """
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, fmt.group_size)
    codes, scale = sweep(groups, fmt, global_scale, metric)
    return codes.reshape(w.shape), fmt.store_scales(scale)
