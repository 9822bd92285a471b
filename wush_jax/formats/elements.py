"""Element grids: rounding a scaled value to a code, decoding a code, packing codes into bytes.

Everything here is plain elementwise ``jax.numpy`` on float32 and integers, without gathers,
floor or casts to narrow floats. Two reasons: the same functions trace inside Pallas kernels, and
XLA may delete a round trip through a narrow float type (it is allowed excess precision), while it
must keep integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The smallest normal float32. Backends differ in flushing what lies below, so we always do.
TINY = 2.0**-126


def floor_log2(x: jax.Array) -> jax.Array:
    """Return ``floor(log2 x)`` of positive normal float32 values, exactly, from the exponent bits.

    Args:
      x: float32 values, any shape; zero and subnormal values give -127, inf and NaN give 128.

    Returns:
      int32, same shape.

    >>> floor_log2(jnp.float32([1.0, 1.9999999, 0.75])).tolist()
    [0, 0, -1]
    """
    return ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127


def exp2_int(e: jax.Array) -> jax.Array:
    """Return ``2**e`` exactly as float32, for int32 ``e`` in [-126, 127].

    >>> exp2_int(jnp.int32([-1, 10])).tolist()
    [0.5, 1024.0]
    """
    return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def round_half_even(x: jax.Array) -> jax.Array:
    """Round non-negative float32 values below 2**31 to int32, ties to even.

    Truncate and compare: the remainder ``x - trunc(x)`` is exact, so no tie is ever misjudged, and
    no compiler may fold it away (as it may fold "add and subtract a large constant").

    >>> round_half_even(jnp.float32([0.5, 1.5, 2.4999998])).tolist()
    [0, 2, 2]
    """
    n = x.astype(jnp.int32)
    rest = x - n.astype(jnp.float32)
    odd = (n & 1) == 1
    return n + ((rest > 0.5) | ((rest == 0.5) & odd)).astype(jnp.int32)


def round_to_bfloat16(x: jax.Array) -> jax.Array:
    """Round float32 values to the bfloat16 grid (ties to even), staying in float32.

    >>> round_to_bfloat16(jnp.float32([1.00390625])).tolist()
    [1.0]
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return jnp.where(jnp.isfinite(x), lax.bitcast_convert_type(rounded, jnp.float32), x)


def not_finite(x: jax.Array) -> int:
    """Count NaN and infinities; not under a trace.

    >>> not_finite(jnp.float32([1.0, jnp.nan, -jnp.inf]))
    2
    """
    on_host = isinstance(x, jax.Array) and x.is_fully_addressable
    if on_host and all(device.platform == "cpu" for device in x.devices()):
        return int(np.count_nonzero(~np.isfinite(np.asarray(x))))  # nothing to compile a shape
    return int(_not_finite(x))


@jax.jit
def _not_finite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))


def divide(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """Return ``a / b`` of float32 values, rounded to nearest on every backend.

    XLA's quotients on GPUs are off by up to two units in the last place, which decides ties.

    >>> divide(jnp.float32([1.0, 2.0]), 3.0).tolist()
    [0.3333333432674408, 0.6666666865348816]
    """
    b = jnp.asarray(b, jnp.float32)
    return _corrected(a / b, a, b)


def _corrected(q: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``q + (a - q b) / b``: the remainder is exact in products of 12-bit halves."""
    (q_high, q_low), (b_high, b_low) = _halves(q), _halves(b)
    rest = ((a - q_high * b_high) - q_high * b_low - q_low * b_high) - q_low * b_low
    # Where no part of a product vanishes or overflows.
    safe = (jnp.minimum(jnp.abs(a), jnp.abs(q)) > 2.0**-64) & (jnp.abs(q) < jnp.inf)
    return jnp.where(safe, q + rest / b, q)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper 12 bits of the significand, and the rest."""
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)
    return high, x - high


@dataclass(frozen=True)
class FloatElement:
    """A small floating-point grid: sign, exponent, mantissa, with subnormals, saturating.

    Code ``sign << (bits-1) | magnitude``; magnitudes count the non-negative grid upwards from 0, so
    neighbouring values have neighbouring codes.

    Attributes:
      name: "e2m1", "e4m3", ...
      exponent_bits: width of the exponent field.
      mantissa_bits: width of the mantissa field (m).
      max: the largest finite value.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def max_exponent(self) -> int:
        """``floor(log2(max))``."""
        return int(self.max).bit_length() - 1

    @property
    def max_code(self) -> int:
        """Magnitude code of `max`; higher magnitudes, where they exist, are not finite."""
        quantum_exponent = self.max_exponent - self.mantissa_bits
        steps = int(self.max / 2.0**quantum_exponent)
        return ((self.max_exponent - self.min_exponent) << self.mantissa_bits) + steps

    def encode(self, x: jax.Array) -> jax.Array:
        """Round float32 ``x`` to the nearest grid value, ties to the even code; return uint8 codes.

        With quantum ``q = 2**(max(floor(log2 |x|), min_exponent) - m)`` the magnitude code is
        ``round(|x| / q)`` counted from the start of the binade. Values beyond `max`, infinities
        too, saturate; -0 becomes +0. NaN gives the NaN code where the grid has one, else 0.
        """
        m = self.mantissa_bits
        a = jnp.minimum(jnp.abs(x), self.max)
        e = jnp.maximum(floor_log2(a), self.min_exponent)
        magnitude = ((e - self.min_exponent) << m) + round_half_even(a * exp2_int(m - e))
        code = jnp.where((x < 0) & (magnitude > 0), magnitude | (1 << (self.bits - 1)), magnitude)
        nan_code = 2 ** (self.bits - 1) - 1 if self.bits == 8 else 0
        return jnp.where(x == x, code, nan_code).astype(jnp.uint8)

    def decode(self, code: jax.Array) -> jax.Array:
        """Return the float32 values of uint8 codes."""
        m = self.mantissa_bits
        code = code.astype(jnp.int32)
        magnitude = code & (2 ** (self.bits - 1) - 1)
        field = magnitude >> m
        steps = (magnitude & (2**m - 1)) + jnp.where(field > 0, 2**m, 0)
        value = steps.astype(jnp.float32) * exp2_int(
            jnp.maximum(field, 1) - 1 + self.min_exponent - m
        )
        if self.max_code < 2 ** (self.bits - 1) - 1:
            # IEEE-like grids (E5M2) have an infinity just above the largest finite value.
            # No intermediate is NaN unless a code is: `jax.debug_nans` looks at each.
            value = jnp.where(magnitude > self.max_code, jnp.nan, value)
            if self.name == "e5m2":
                value = jnp.where(magnitude == self.max_code + 1, jnp.inf, value)
        return jnp.where(code >> (self.bits - 1) == 1, -value, value)


@dataclass(frozen=True)
class IntElement:
    """A uniform grid of two's-complement codes k.

    Symmetric: value k, ``|k| <= 2**(bits-1) - 1``. Full: value k, ``-2**(bits-1) <= k <
    2**(bits-1)``, for scales that have a sign. Mid-rise: value ``k + 1/2`` of the same codes,
    which has no zero.

    Attributes:
      name: "int4", "int8", "int4_midrise", "int4_full", ...
      bits: bits of a code.
      midrise: whether values lie half a step above the codes.
      full: whether a grid that is not mid-rise has the lowest code.
    """

    name: str
    bits: int
    midrise: bool = False
    full: bool = False

    @property
    def max(self) -> float:
        """The largest value of the grid."""
        return 2.0 ** (self.bits - 1) - (0.5 if self.midrise else 1.0)

    def encode(self, x: jax.Array) -> jax.Array:
        """Round float32 ``x`` to the nearest value, ties to even k; saturate; NaN gives k = 0."""
        x = jnp.where(x == x, x, 0.0)
        if self.midrise:
            limit = 2 ** (self.bits - 1)
            x = jnp.clip(x, -limit, limit)
            truncated = x.astype(jnp.int32)
            k = truncated - (x < truncated.astype(jnp.float32)).astype(jnp.int32)
            tie = (x == k.astype(jnp.float32)) & ((k & 1) == 1)
            k = jnp.clip(k - tie.astype(jnp.int32), -limit, limit - 1)
        else:
            n = round_half_even(jnp.minimum(jnp.abs(x), self.max + self.full))
            k = jnp.where(x < 0, -n, n)
            k = jnp.minimum(k, int(self.max)) if self.full else k
        return (k & (2**self.bits - 1)).astype(jnp.uint8)

    def decode(self, code: jax.Array) -> jax.Array:
        """Return the float32 values of uint8 codes."""
        shift = 32 - self.bits
        k = ((code.astype(jnp.int32) << shift) >> shift).astype(jnp.float32)
        return k + 0.5 if self.midrise else k


Element = FloatElement | IntElement

E2M1 = FloatElement("e2m1", 2, 1, 6.0)
E2M3 = FloatElement("e2m3", 2, 3, 7.5)
E3M2 = FloatElement("e3m2", 3, 2, 28.0)
E4M3 = FloatElement("e4m3", 4, 3, 448.0)
E5M2 = FloatElement("e5m2", 5, 2, 57344.0)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Pack uint8 codes along the last axis into bytes, low bits first.

    4 bits: two codes a byte, the even column in the low nibble. 6 bits: four codes in three bytes.
    8 bits: as they are. Shape (..., K) -> (..., K * bits / 8).

    Args:
      codes: uint8 (..., K), each below ``2**bits``.
      bits: 4, 6 or 8.

    Raises:
      ValueError: K does not fill whole bytes, or the width is not one of the three.

    >>> pack(jnp.uint8([1, 2, 3, 4]), 4).tolist()
    [33, 67]
    """
    if bits == 8:
        return codes
    if bits == 4:
        _check_packable(codes.shape[-1], 2, bits)
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    if bits == 6:
        _check_packable(codes.shape[-1], 4, bits)
        a, b, c, d = (codes[..., i::4] for i in range(4))
        stacked = jnp.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], axis=-1)
        return stacked.reshape(*codes.shape[:-1], codes.shape[-1] * 6 // 8)
    raise ValueError(f"bits={bits} cannot be packed; use 4, 6 or 8")


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Undo `pack`: uint8 (..., K * bits / 8) -> uint8 (..., K).

    >>> unpack(jnp.uint8([33, 67]), 4).tolist()
    [1, 2, 3, 4]
    """
    if bits == 8:
        return packed
    if bits == 4:
        parts = [packed & 0xF, packed >> 4]
    elif bits == 6:
        _check_packable(packed.shape[-1], 3, bits)
        p, q, r = (packed[..., i::3] for i in range(3))
        parts = [p & 0x3F, (p >> 6) | ((q & 0xF) << 2), (q >> 4) | ((r & 0x3) << 4), r >> 2]
    else:
        raise ValueError(f"bits={bits} cannot be unpacked; use 4, 6 or 8")
    return jnp.stack(parts, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


def _check_packable(size: int, multiple: int, bits: int) -> None:
    if size % multiple:
        raise ValueError(
            f"last axis has size {size}; {bits}-bit packing needs a multiple of {multiple}: pad it"
        )
