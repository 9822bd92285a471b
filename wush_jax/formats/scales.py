"""Scale rules: from the values of a group to the one scale they share.

A rule maps a group's values to one or more candidate scales ``s``, each exactly representable in
the scale's type; a value is then ``code * s / g`` with the global scale ``g``. Where a rule offers
several candidates, the one with the least squared error wins (the first on a tie). Rules are plain
elementwise jnp and reductions over the last axis, so they trace inside Pallas kernels as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wush_jax.formats import elements
from wush_jax.formats.checks import check_arrays
from wush_jax.formats.elements import E4M3, Element

# Exponents of a power-of-two scale that are normal float32 numbers: E8M0 bytes 1 to 254.
E8M0_RANGE = (-126, 127)
# Smallest positive E4M3 value: a scale is never zero, so an all-zero group decodes to zeros.
E4M3_MIN = 2.0**-9

# Clipping points, in units of the standard deviation, that minimise the squared error of a uniform
# mid-rise quantizer of a Gaussian, by bits (METHOD: the paper's INT setting uses 4 bits).
GAUSSIAN_CLIP = {
    2: 1.4935,
    3: 2.0511,
    4: 2.513930578568423,
    5: 2.9161,
    6: 3.2766,
    8: 3.8849,
}


class RuleSpec(Protocol):
    """What a rule needs to know of a format."""

    @property
    def element(self) -> Element:
        """The element grid."""

    @property
    def scale_dtype(self) -> str:
        """The type of the scales: "e8m0", "e4m3", "bfloat16" or "float32"."""


Rule = Callable[[jax.Array, jax.Array, jax.Array, RuleSpec], list[jax.Array]]


def _pow2(exponent: jax.Array) -> jax.Array:
    return elements.exp2_int(jnp.clip(exponent, *E8M0_RANGE))


def pow2_div3(y, amax, g, spec):
    """``e = floor(log2 amax)``; with g = max/2 (3 for E2M1) amax lands in [g, 2g): never clips."""
    return [_pow2(elements.floor_log2(amax))]


def ocp_floor(y, amax, g, spec):
    """``e = floor(log2 amax) - floor(log2 max)`` (OCP MX v1.0): amax may clip."""
    return [_pow2(elements.floor_log2(amax) - spec.element.max_exponent)]


def round_175(y, amax, g, spec):
    """As `ocp_floor`, with e + 1 when amax's mantissa would round up to 2 on the element's grid.

    For E2M1 that is a mantissa of at least 1.75 (compressed-tensors, vLLM, qwix).
    """
    e = elements.floor_log2(amax)
    # Multiply by 2**-e in two factors: the exponent range is not symmetric.
    mantissa = amax * elements.exp2_int(-(e // 2)) * elements.exp2_int(-(e - e // 2))
    carry = mantissa >= 2.0 - 2.0 ** -(spec.element.mantissa_bits + 1)
    return [_pow2(e - spec.element.max_exponent + carry.astype(jnp.int32))]


def ceil(y, amax, g, spec):
    """``e = ceil(log2(amax / max))``: amax lands in (max/2, max], never clips."""
    # amax / max with max = t * 2**k, 1 <= t < 2: the ceiling is a comparison of mantissas.
    k = spec.element.max_exponent
    t = spec.element.max / 2.0**k
    e = elements.floor_log2(amax)
    mantissa = amax * elements.exp2_int(-(e // 2)) * elements.exp2_int(-(e - e // 2))
    return [_pow2(e - k + (mantissa > t).astype(jnp.int32))]


def absmax(y, amax, g, spec):
    """``s = g * amax / max``, rounded to the scale's type."""
    return [_representable(elements.divide(_product(g, amax), spec.element.max), spec)]


def four_over_six(y, amax, g, spec):
    """amax lands on 6 or on 4, whichever has the smaller squared error (E4M3 scales)."""
    return [_representable(elements.divide(_product(g, amax), top), spec) for top in (6.0, 4.0)]


def three_candidates(y, amax, g, spec):
    """`four_over_six` and the next E4M3 value below ``g * amax / 6``."""
    six, four = four_over_six(y, amax, g, spec)
    below = E4M3.decode(jnp.maximum(E4M3.encode(six).astype(jnp.int32) - 1, 1).astype(jnp.uint8))
    return [six, four, below]


def signed_absmax(y, amax, g, spec):
    """``|s| = g * amax / 8`` (4 bits), signed so that the value of largest magnitude is code -8.

    s < 0 where ``max(y) > -min(y)``. Values near amax of the other sign clip to 7: of Gaussian
    values the error has 0.80 of the power that a symmetric grid leaves.
    """
    return [_signed(y, amax, g, spec, 2.0 ** (spec.element.bits - 1))]


def signed_candidates(y, amax, g, spec):
    """`signed_absmax`, or amax on -8.5 (it clips a little), or on -7 (nothing clips).

    Of all pairs of quarters beside 8 the squared error of Gaussian values is within 0.2 % of the
    least, that of Laplace values the least: 0.90 and 0.93 of what `signed_absmax` leaves.
    """
    return [_signed(y, amax, g, spec, top) for top in (8.0, 8.5, 7.0)]


def gaussian_mse(y, amax, g, spec):
    """``s = 2 c_b / (2**b - 1) * rms(group)`` with c_b from `GAUSSIAN_CLIP`."""
    bits = spec.element.bits
    step = GAUSSIAN_CLIP[bits] * 2.0 / (2**bits - 1)
    # Relative to amax's power of two, so that squares neither overflow nor vanish.
    e = jnp.clip(elements.floor_log2(amax), -126, 126)
    unit = y * elements.exp2_int(-e)[..., None]
    rms = elements.exp2_int(e) * jnp.sqrt(jnp.mean(unit * unit, axis=-1))
    return [_representable(g * step * rms, spec)]


RULES: dict[str, Rule] = {
    "pow2_div3": pow2_div3,
    "ocp_floor": ocp_floor,
    "round_175": round_175,
    "ceil": ceil,
    "absmax": absmax,
    "four_over_six": four_over_six,
    "three_candidates": three_candidates,
    "signed_absmax": signed_absmax,
    "signed_candidates": signed_candidates,
    "gaussian_mse": gaussian_mse,
}

# Which rules make sense with which scale type.
POW2_RULES = ("pow2_div3", "ocp_floor", "round_175", "ceil")
# Rules that read the sign of a scale off the group.
SIGNED_RULES = ("signed_absmax", "signed_candidates")


def checked_global_scale(global_scale: jax.Array | float) -> jax.Array:
    """Return it as float32; ValueError unless positive and finite (tracers pass)."""
    value = global_scale if hasattr(global_scale, "dtype") else np.asarray(global_scale)
    check_arrays(global_scale=value)
    if not isinstance(global_scale, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # a constant under jit is no tracer
            g = jnp.asarray(global_scale, jnp.float32)
            if not bool(jnp.all((g > 0) & jnp.isfinite(g))):
                raise ValueError(f"global_scale={global_scale} must be positive and finite")
    return jnp.asarray(global_scale, jnp.float32)


def _product(g: jax.Array, amax: jax.Array) -> jax.Array:
    """``g * amax``, rounded: a compiler may not merge a constant g with a later division."""
    return lax.optimization_barrier(g * amax)


def _signed(y, amax, g, spec: RuleSpec, top: float) -> jax.Array:
    """The scale with the value of largest magnitude on ``-top``."""
    s = _representable(elements.divide(_product(g, amax), top), spec)
    return jnp.where(jnp.max(y, axis=-1) > -jnp.min(y, axis=-1), -s, s)


def _representable(s: jax.Array, spec: RuleSpec) -> jax.Array:
    """Round positive float32 scales to the scale's type, never to zero, saturating."""
    if spec.scale_dtype == "e4m3":
        return E4M3.decode(E4M3.encode(jnp.clip(s, E4M3_MIN, E4M3.max)))
    s = jnp.clip(s, elements.TINY, 3.0e38)
    return elements.round_to_bfloat16(s) if spec.scale_dtype == "bfloat16" else s
