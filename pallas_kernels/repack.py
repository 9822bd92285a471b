"""Layouts of codes and scales: interchange, and what the matmul kernels want.

``interchange``: codes (..., M, K/2), even column in the low nibble; scales (..., M, K/g).
``kernel``: byte j of each 32 columns holds columns j and j + 16, so that both nibbles of a register
become FP8 fragments without exchange; scales transposed, (..., K/g, M).
``fp8``: MXFP4 with the group exponents folded into E4M3 codes, one power of two a row.

Between the kernels only, ``lanes``: of each 32 columns those of the low halves of 16 bytes, then
those of the high ones, are in the order of FP8 operands made from records (`to_lanes`). ``float8``:
MXFP4 in E5M2 (`to_float8`), or values of a format in E4M3 (`e4m3_to_float8`), columns in that
order, with a power of two for 128 or 512 of them. ``float8_values``: bfloat16 values of such a
format in their own order, with the same powers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

LAYOUTS = ("interchange", "kernel", "fp8")
POWERED = ("float8", "float8_values")  # they have powers of two in place of scales
TRANSPOSED = ("kernel", *POWERED)  # their scales are (groups, rows)
CHUNK = 32
# E2M1 times 2**k is exact in E4M3 for k in [-8, 6].
HIGHEST = 6
COLUMNS = 128  # of the steps of kernels: FP8 values are padded to them
# E5M2's field of the binade of 1/2 at the largest scale: 6 times that is 49152 < 57344.
HIGHEST_FIELD = 27
# Largest scales that are told apart: the power is a normal number.
LEAST_TOP = 14


def pack(codes: jax.Array, layout: str) -> jax.Array:
    """Pack 4-bit codes (..., K), one a byte, two a byte: (..., K/2).

    >>> pack(jnp.arange(32, dtype=jnp.uint8) % 16, "kernel")[:3].tolist()
    [0, 17, 34]
    """
    if layout in ("interchange", "lanes"):
        low, high = codes[..., 0::2], codes[..., 1::2]
    else:
        halves = codes.reshape(*codes.shape[:-1], -1, 2, CHUNK // 2)
        flat = (*codes.shape[:-1], codes.shape[-1] // 2)
        low, high = halves[..., 0, :].reshape(flat), halves[..., 1, :].reshape(flat)
    packed = low | (high << 4)
    return to_lanes(packed) if layout == "lanes" else packed


def to_lanes(codes):
    """Order packed codes (..., K/2) of the interchange layout as the lanes of a quad hold them.

    A thread holds columns 8 n + 2 q + e of 32, q its lane; FP8 instructions read four neighbours of
    a lane: e, q, n from the slowest to the fastest. Byte 4 q + n of 16 has both e.
    """
    view = codes.reshape(*codes.shape[:-1], -1, 4, 4)
    return jnp.swapaxes(view, -1, -2).reshape(codes.shape)


def to_float8(codes, scales, columns: int):
    """Return MXFP4 in E5M2, columns as `to_lanes`: ``value * g = out * power`` of so many columns.

    Exact for groups at most 28 octaves below the largest that shares their power; those below are
    rounded to 2**-16. Groups that are not finite become NaN.

    Args:
      codes: uint8 (M, K/2), bytes as `to_lanes`.
      scales: float8_e8m0fnu (M, K/32).
      columns: that share a power, a multiple of 128.

    Returns:
      float8_e5m2 (M, ceil(K/128) * 128) and float32 (ceil(K/columns), padded(M)).
    """
    rows, width = codes.shape[0], 2 * codes.shape[1]
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    of_power = jnp.pad(byte, ((0, 0), (0, -width % columns // CHUNK)))
    of_power = of_power.reshape(rows, -1, columns // CHUNK)
    top = jnp.max(jnp.where(of_power < 255, of_power, 0), axis=-1)
    top = jnp.maximum(top, LEAST_TOP)
    powers = lax.bitcast_convert_type((top - 13) << 23, jnp.float32)
    tops = jnp.repeat(top, columns // CHUNK, axis=-1)[:, : byte.shape[1]]
    scale = lax.bitcast_convert_type(jnp.maximum(byte - tops + 127 + 13, 0) << 23, jnp.float32)
    scale = jnp.where(byte == 255, jnp.nan, scale)[..., None, None]
    nibbles = _nibbles(codes, byte)
    code = nibbles & 7
    normal = lax.bitcast_convert_type(((code >> 1) + 126) << 23 | (code & 1) << 22, jnp.float32)
    # No table: kernels close over no arrays.
    magnitude = jnp.where(code < 2, 0.5 * code.astype(jnp.float32), normal)
    values = jnp.where(nibbles & 8 > 0, -magnitude, magnitude) * scale
    values = values.reshape(rows, width).astype(jnp.float8_e5m2)
    values = jnp.pad(values, ((0, 0), (0, -width % COLUMNS)))
    return values, jnp.pad(powers.T, ((0, 0), (0, padded(rows) - rows)))


def e4m3_to_float8(codes, scales, columns: int):
    """As `to_float8` of a format with E4M3 codes and a power of two for 512 columns: exact.

    Args:
      codes: uint8 (M, K), in order.
      scales: float8_e8m0fnu (M, ceil(K/512)).
      columns: that share a power, 128 or 512.

    Returns:
      float8_e4m3fn (M, ceil(K/128) * 128) and float32 (ceil(K/columns), padded(M)).
    """
    rows, width = codes.shape
    codes = jnp.pad(codes, ((0, 0), (0, -width % COLUMNS)))
    eights = codes.reshape(rows, -1, 4, 4, 2)  # column 8 n + 2 q + e of 32
    values = lax.bitcast_convert_type(
        eights.transpose(0, 1, 4, 3, 2).reshape(codes.shape), jnp.float8_e4m3fn
    )
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    powers = lax.bitcast_convert_type(jnp.maximum(byte, 1) << 23, jnp.float32)
    powers = jnp.where(byte == 255, jnp.nan, powers)
    powers = jnp.repeat(powers, 512 // columns, axis=-1)[:, : -(-width // columns)]
    return values, jnp.pad(powers.T, ((0, 0), (0, padded(rows) - rows)))


def from_float8(values, powers, width: int):
    """Undo the order of `to_lanes` and the powers: bfloat16 (M, width), exact of E4M3 and E5M2."""
    rows, columns = values.shape
    in_order = values.reshape(rows, -1, 2, 4, 4).transpose(0, 1, 4, 3, 2).reshape(rows, columns)
    share = COLUMNS * (1 if len(powers) == columns // COLUMNS else 4)
    factors = jnp.repeat(powers.T[:rows], share, axis=-1)[:, :width]
    return (in_order[:, :width].astype(jnp.float32) * factors).astype(jnp.bfloat16)


def padded(rows: int) -> int:
    """Columns of an array of powers for M rows: kernels copy those of 32 tokens, or of tiles of 64.

    >>> padded(5), padded(33)
    (32, 64)
    """
    return 32 if rows <= 32 else rows + -rows % 64


def in_float8(codes, byte, top):
    """``code * 2**(byte - top) * 2**13`` in E5M2, columns as `to_lanes`; NaN for byte 255.

    Args:
      codes: uint8 (M, K/2), bytes as `to_lanes`.
      byte: int32 (M, K/32), exponents.
      top: int32, broadcasts with ``byte``.

    Returns:
      float8_e5m2 (M, K); zeros for groups more than 26 octaves below.
    """
    field = (byte - top + HIGHEST_FIELD)[..., None, None]
    nibbles = _nibbles(codes, byte)
    magnitude = nibbles & 7
    # The field is the binade of 1/2, magnitude 1; from 1, magnitude 2, on each is half a binade.
    bits = jnp.where(magnitude >= 2, 4 * field + 2 * magnitude, 4 * field)
    bits = jnp.where((magnitude > 0) & (field > 0), bits, 0) | (nibbles & 8) << 4
    bits = jnp.where((byte == 255)[..., None, None], 0x7F, bits).astype(jnp.uint8)
    return lax.bitcast_convert_type(bits.reshape(len(codes), -1), jnp.float8_e5m2)


def _nibbles(codes, byte):
    """Codes of each group, int32 (..., K/32, 2, 16): those of the low halves, of the high ones."""
    pairs = codes.reshape(*byte.shape, 1, CHUNK // 2).astype(jnp.int32)
    return jnp.concatenate([pairs & 15, pairs >> 4], axis=-2)


def from_interchange(codes, scales, fmt, layout: str):
    """Turn packed codes and scales of the interchange layout into another.

    Args:
      codes: uint8 (..., K/2).
      scales: (..., M, K/g).
      fmt: the number format.
      layout: one of `LAYOUTS`.

    Returns:
      Codes and scales; for "fp8", E4M3 codes (..., M, K) and float32 (..., M), the power of two of
      each row, ``value = code * row / g``.

    Raises:
      ValueError: an unknown layout.
      NotImplementedError: a format that the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose from {LAYOUTS}")
    if layout == "interchange":
        return codes, scales
    if fmt.element.bits != 4 or (codes.shape[-1] * 2) % CHUNK:
        raise NotImplementedError(
            f"layout={layout!r} holds 4-bit codes and K a multiple of {CHUNK}; got {fmt.name}, "
            f"K={codes.shape[-1] * 8 // fmt.element.bits}"
        )
    if layout == "kernel":
        return pack(fmt.unpack(codes), layout), jnp.swapaxes(scales, -1, -2)
    if fmt.element.name != "e2m1" or fmt.scale_dtype != "e8m0":
        raise NotImplementedError(f"layout='fp8' folds powers of two into E2M1; got {fmt.name}")
    return fold_exponents(fmt.unpack(codes), scales, fmt)


def fold_exponents(codes, scales, fmt):
    """Fold E8M0 scales into E4M3 codes: ``code * 2**(e - top + 6)`` with the row's largest e.

    Exact for groups at most 14 octaves below the row's largest; lower ones are rounded to E4M3's
    subnormal steps, an error below 2**-18 of the row's largest scale. All-zero groups do not count.
    A row with a group that is not finite gets a NaN for its power of two.

    Args:
      codes: uint8 (..., K), one E2M1 code each.
      scales: float8_e8m0fnu (..., K/g).
      fmt: the number format.

    Returns:
      float8_e4m3fn (..., K) and float32 (...,), the row's power of two ``2**(top - 6)``.
    """
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    groups = codes.reshape(*scales.shape, fmt.group_size)
    used = jnp.any(groups != 0, axis=-1)
    top = jnp.max(jnp.where(used, byte, 1), axis=-1)
    shift = jnp.clip(byte - top[..., None] + HIGHEST, -40, HIGHEST)
    factor = lax.bitcast_convert_type((shift + 127) << 23, jnp.float32)
    values = fmt.element.decode(groups) * factor[..., None]
    row = lax.bitcast_convert_type(jnp.maximum(top - HIGHEST, 1) << 23, jnp.float32)
    row = jnp.where(jnp.max(byte, axis=-1) == 255, jnp.nan, row)
    return values.astype(jnp.float8_e4m3fn).reshape(codes.shape), row
