"""Weights laid out as the registers of a warpgroup: one record for 64 rows and 128 columns.

wgmma takes its left operand from registers: of every 16 columns a thread holds eight values, two
neighbours in each of two rows and two column halves. A record keeps the eight codes of one row and
two such steps in one word, the eight words of a thread next to each other, and the scales of the 64
rows behind them, so that one contiguous copy brings it to shared memory and three wide loads bring
it to registers. What a record becomes there, its *operand*, decides where the bits of a code sit in
a word: where few instructions turn two codes into two bfloat16 values (`expand`), or four into four
FP8 values (`float8`).

    record = 16 rows of 64 words: codes [half of the columns][thread][32 columns][row, row + 8]
             1 or 2 rows:         scales [warp][row of 8][row, row + 8][group]
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROWS, COLUMNS = 64, 128  # of a record
CODE_LINES = 16


def _in_halves(*pairs):
    """Bits of the four pairs of a word with a value of each pair in either 16-bit half."""
    return tuple((bits, tuple(b + 16 for b in bits)) for bits in pairs)


# Bits of the codes of a word, for each pair of columns; sign or highest bit first.
E2M1_BITS = _in_halves((14, 2, 1, 0), (12, 5, 4, 3), (15, 8, 7, 6), (13, 11, 10, 9))
INT4_BITS = _in_halves(*(tuple(4 * i + b for b in (3, 2, 1, 0)) for i in range(4)))
# Magnitudes in nibbles, the four of even columns in the low half: selectors of a byte look-up.
# Their signs are the highest bits of bytes, those of odd columns four bits below.
FLOAT8_BITS = tuple(
    tuple((8 * i + 7 - 4 * odd, *(4 * i + 16 * odd + b for b in (2, 1, 0))) for odd in (0, 1))
    for i in range(4)
)
INTEGERS = ("int4", "nvint4")  # kinds whose codes records hold with an offset of 8
# MXFP4: the largest exponent of a tensor is stored as this byte.
TOP = 120
# The stored byte of a scale that becomes one.
ONE = {"bfloat16": 127, "float8": TOP - 13}
# Largest exponents whose unit is a float32 number: tensors that reach beyond store larger bytes.
TOPS = {"bfloat16": (1, 247), "float8": (15, 254)}
# The lowest byte: codes of groups further below count as zero. bfloat16 has room for all, E5M2 for
# 27 octaves.
LOWEST = {"bfloat16": 0, "float8": TOP - 26}
# The largest exponent of a tensor's E4M3 scales is stored as this field: of five bits, and of four
# in NVINT4, whose scales have a sign.
TOP_OF_FIVE, TOP_FIELD = 24, 14
# What stands for a scale that is NaN. In bfloat16 it becomes an infinity, which makes NaN of code 0
# only; in E5M2 the byte of code 7 becomes NaN.
NAN = {"bfloat16": 129, "float8": 121}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fragments:
    """A packed weight in the layout of the matmul kernels: a pytree.

    ``value = unit * expanded / global_scale``.

    Attributes:
      records: uint32 (ceil(N/64), ceil(K/128), lines, 64).
      unit: float32 scalar.
      global_scale: float32 scalar, divides.
      format: the number format; static.
      shape: (N, K); static.
      operand: "bfloat16", or "float8" for products with MXFP4 activations; static.
    """

    records: jax.Array
    unit: jax.Array
    global_scale: jax.Array
    format: Any = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    operand: str = dataclasses.field(metadata={"static": True})

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of 64 rows, steps of 128 columns."""
        return self.records.shape[0], self.records.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.records.nbytes + self.unit.nbytes + self.global_scale.nbytes

    @property
    def interchange(self) -> tuple[jax.Array, jax.Array]:
        """Packed codes (N, K/2) and scales (N, K/g) of equal value."""
        return to_interchange(self.records, self.unit, self.format, self.shape, self.operand)


def check(weights) -> None:
    """Raise NotImplementedError, with the remedy, for weights the kernels cannot read."""
    if not all(isinstance(weight, Fragments) for weight in weights):
        raise NotImplementedError(
            "the weight is in the interchange layout: `pallas_kernels.fragments.lay_out` it once"
        )


def lay_out(weight, operand: str = "bfloat16") -> Fragments:
    """Return a quantized weight (an object with codes, scales, ...) in the kernels' layout.

    Args:
      weight: codes (N, K/2) and scales.
      operand: what the kernels expand it to, see `Fragments`.

    Raises:
      NotImplementedError: no kernel for its format, or a stack of matrices.
    """
    records, unit = jax.jit(from_interchange, static_argnums=(2, 3))(
        weight.codes, weight.scales, weight.format, operand
    )
    shape = tuple(weight.shape)
    return Fragments(records, unit, weight.global_scale, weight.format, shape, operand)


@dataclasses.dataclass(frozen=True)
class Carrier:
    """How a format's codes and scales are written into records.

    Attributes:
      kind: "mxfp4", "nvfp4", "nvint4" or "int4".
      bits: positions of a code's bits, highest first, for each eight columns of a word and each
        of two neighbours.
      scale_bytes: of one group's scale.
      groups: of a row in a record.
      operand: see `Fragments`.
    """

    kind: str
    bits: tuple[tuple[tuple[int, ...], ...], ...]
    scale_bytes: int
    groups: int
    operand: str = "bfloat16"

    @property
    def lines(self) -> int:
        """Lines of 64 words in a record."""
        return CODE_LINES + self.groups * self.scale_bytes // 4


def carrier(fmt, operand: str = "bfloat16") -> Carrier:
    """Return how records hold a format.

    Raises:
      NotImplementedError: no record for this format.
    """
    element, group = fmt.element.name, fmt.group_size
    if (element, fmt.scale_dtype, group) == ("e2m1", "e8m0", 32):
        bits = FLOAT8_BITS if operand == "float8" else E2M1_BITS
        return Carrier("mxfp4", bits, 1, 4, operand)
    if operand == "float8":
        raise NotImplementedError(f"{fmt.name} is not exact in FP8")
    if (element, fmt.scale_dtype, group) == ("e2m1", "e4m3", 16):
        return Carrier("nvfp4", E2M1_BITS, 1, 8)
    if (element, fmt.scale_dtype, group) == ("int4_full", "e4m3", 16):
        return Carrier("nvint4", INT4_BITS, 1, 8)
    if (element, fmt.scale_dtype, group) == ("int4_midrise", "bfloat16", 32):
        return Carrier("int4", INT4_BITS, 2, 4)
    raise NotImplementedError(
        f"no register layout for {fmt.name} (element {element}, scales {fmt.scale_dtype}, group "
        f"{group})"
    )


def from_interchange(codes, scales, fmt, operand: str = "bfloat16"):
    """Return records and the power of two that their values still need.

    Args:
      codes: packed codes uint8 (N, K/2), interchange layout.
      scales: (N, K/g).
      fmt: MXFP4, NVFP4, NVINT4 or INT4, any rule.
      operand: see `Fragments`.

    Returns:
      Records uint32 (ceil(N/64), ceil(K/128), lines, 64), and ``unit``, float32 scalar:
      ``value = unit * expanded / g`` with the format's global scale g.

    Raises:
      NotImplementedError: no record for this format, or a stack of matrices.
    """
    c = carrier(fmt, operand)
    if codes.ndim != 2:
        raise NotImplementedError(f"records hold one matrix, codes have shape {codes.shape}")
    codes = fmt.unpack(codes)
    stored, alive, unit = _stored_scales(c, codes, scales, fmt)
    n, k = codes.shape
    damaged = (stored == NAN[operand]) & (c.kind == "mxfp4")
    filler = jnp.repeat(jnp.where(damaged, 7 if operand == "float8" else 0, 0), fmt.group_size, -1)
    alive = jnp.repeat(alive, fmt.group_size, axis=-1)
    codes = jnp.where(alive, codes, filler.astype(codes.dtype))
    pad_n, pad_k = -n % ROWS, -k % COLUMNS
    codes = jnp.pad(codes, ((0, pad_n), (0, pad_k)))
    if c.kind in INTEGERS:
        codes = codes ^ 8  # two's complement to an offset of 8
    stored = jnp.pad(stored, ((0, pad_n), (0, pad_k // fmt.group_size)))
    tiles = ((n + pad_n) // ROWS, (k + pad_k) // COLUMNS)
    words = _code_words(c, codes.astype(jnp.uint32), tiles)
    return jnp.concatenate([words, _scale_words(c, stored, tiles)], axis=2), unit


def to_interchange(records, unit, fmt, shape, operand: str = "bfloat16"):
    """Undo `from_interchange`: packed codes (N, K/2) and scales (N, K/g) of equal value.

    Zeros lose their sign, groups of zeros may come back with another scale, those of NaN with
    other codes.
    """
    c = carrier(fmt, operand)
    n, k = shape
    codes = _codes_of_words(c, records[:, :, :CODE_LINES])[:n, :k].astype(jnp.uint8)
    stored = _stored_of_words(c, records[:, :, CODE_LINES:])[:n, : k // fmt.group_size]
    if c.kind in INTEGERS:
        codes = codes ^ 8
    if c.kind == "int4":
        return fmt.pack(codes), lax.bitcast_convert_type(stored.astype(jnp.uint16), jnp.bfloat16)
    if c.kind == "mxfp4":
        top = lax.bitcast_convert_type(unit, jnp.int32) >> 23
        byte = jnp.clip(stored.astype(jnp.int32) + top - ONE[operand], 0, 254)
        byte = jnp.where(stored == NAN[operand], 255, byte)
        return fmt.pack(codes), lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e8m0fnu)
    stored = stored.astype(jnp.int32)
    top = (lax.bitcast_convert_type(unit, jnp.int32) >> 23) - 127
    if c.kind == "nvint4":
        lifted = (stored & 0x7F) + ((top + 16 - TOP_FIELD) << 3)
        byte = jnp.where(stored & 0x7F == 0x7F, 0x7F, _lowered(lifted) | stored & 0x80)
    else:
        lifted = stored + ((top + 15 - TOP_OF_FIVE) << 3)
        byte = jnp.where(stored == 0xDF, 0x7F, _lowered(lifted))
    return fmt.pack(codes), lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e4m3fn)


def _stored_scales(c: Carrier, codes, scales, fmt):
    """Scales as records keep them (uint32), which groups count, and the unit."""
    groups = codes.reshape(*scales.shape, fmt.group_size)
    if c.kind == "nvint4":
        byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
        relative, used, top = _relative(byte & 0x7F, jnp.any(groups, axis=-1), TOP_FIELD)
        stored = jnp.where(byte & 0x7F == 0x7F, 0x7F, byte & 0x80 | relative)
        return stored.astype(jnp.uint32), used | (stored == 0x7F), _exp2(top - 16)
    if c.kind == "int4":
        bits = lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.uint32)
        return bits, jnp.ones(scales.shape, bool), jnp.float32(0.5)
    used = jnp.any(groups & 7, axis=-1)
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    if c.kind == "mxfp4":
        finite = byte != 255
        byte = jnp.maximum(byte, 1)  # the lowest two bytes are both 2**-126, as in the format
        top = jnp.clip(jnp.max(jnp.where(used & finite, byte, 0)), *TOPS[c.operand])
        shifted = byte - top + TOP
        lowest, nan = LOWEST[c.operand], NAN[c.operand]
        stored = jnp.where(finite, jnp.clip(shifted, lowest, TOP + 254 - TOPS[c.operand][1]), nan)
        unit = _exp2(top - TOP + ONE[c.operand] - 127)
        return stored.astype(jnp.uint32), used & (shifted >= lowest) & finite, unit
    relative, used, top = _relative(byte & 0x7F, used & (byte > 0), TOP_OF_FIVE)
    stored = jnp.where(byte & 0x7F == 0x7F, 0xDF, relative)  # NaN, of either sign
    return stored.astype(jnp.uint32), used | (stored == 0xDF), _exp2(top - 15)


def _relative(byte, used, field):
    """Positive E4M3 scales with the largest exponent in use as ``field``, which groups count.

    And that exponent, `_lifted`. Groups more than ``field`` octaves below it count as zero.
    """
    lifted = _lifted(byte)
    used = used & (byte > 0) & (byte < 0x7F)
    top = jnp.max(jnp.where(used, lifted >> 3, 7))
    relative = lifted - ((top - field) << 3)
    used = used & (relative >= 0)
    return jnp.where(used, relative, 0), used, top


def _lifted(byte):
    """A positive E4M3 scale with five bits of exponent, nine higher: without subnormals."""
    exponent, mantissa = byte >> 3, byte & 7
    # A subnormal m * 2**-9 becomes normal: its leading bit moves out of the mantissa.
    lift = jnp.where(mantissa >= 4, 1, jnp.where(mantissa >= 2, 2, 3))
    lifted = ((10 - lift) << 3) | ((mantissa << lift) & 7)
    return jnp.where(exponent > 0, ((exponent + 9) << 3) | mantissa, lifted)


def _lowered(lifted):
    """Undo `_lifted`."""
    exponent, mantissa = lifted >> 3, lifted & 7
    denormal = (8 | mantissa) >> jnp.clip(10 - exponent, 0, 4)
    return jnp.where(exponent >= 10, ((exponent - 9) << 3) | mantissa, denormal)


def _exp2(exponent):
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.int32) << 23, jnp.float32)


def _code_words(c: Carrier, codes, tiles):
    """(N, K) codes -> (n, k, 16, 64) words."""
    n, k = tiles
    # n, warp, half of 16 rows, row of 8, k, column half, 32 columns, eight of them, lane, pair
    view = codes.reshape(n, 4, 2, 8, k, 2, 2, 4, 4, 2)
    view = view.transpose(0, 4, 5, 1, 3, 8, 6, 2, 7, 9)  # n k ch warp row lane 32 half eight pair
    word = jnp.zeros(view.shape[:8], jnp.uint32)
    for eight, pair in itertools.product(range(4), range(2)):
        code = view[..., eight, pair]
        for place, bit in enumerate(c.bits[eight][pair]):
            word = word | (((code >> (3 - place)) & 1) << bit)
    return word.reshape(n, k, CODE_LINES, 64)


def _codes_of_words(c: Carrier, words):
    n, k = words.shape[:2]
    word = words.reshape(n, k, 2, 4, 8, 4, 2, 2)
    fields = []
    for eight, pair in itertools.product(range(4), range(2)):
        code = jnp.zeros(word.shape, jnp.uint32)
        for place, bit in enumerate(c.bits[eight][pair]):
            code = code | (((word >> bit) & 1) << (3 - place))
        fields.append(code)
    view = jnp.stack(fields, axis=-1).reshape(*word.shape, 4, 2)
    view = view.transpose(0, 3, 7, 4, 1, 2, 6, 8, 5, 9)
    return view.reshape(n * ROWS, k * COLUMNS)


def _scale_words(c: Carrier, stored, tiles):
    """(N, K/g) stored scales -> (n, k, 1 or 2, 64) words."""
    n, k = tiles
    per = 4 // c.scale_bytes
    view = stored.reshape(n, 4, 2, 8, k, c.groups // per, per)
    view = view.transpose(0, 4, 1, 3, 2, 5, 6)  # n k warp row half word byte
    shifts = (jnp.arange(per, dtype=jnp.uint32) * (8 * c.scale_bytes)).reshape(*[1] * 6, per)
    words = jnp.sum(view << shifts, axis=-1, dtype=jnp.uint32)
    return words.reshape(n, k, -1, 64)


def _stored_of_words(c: Carrier, words):
    n, k = words.shape[:2]
    per = 4 // c.scale_bytes
    word = words.reshape(n, k, 4, 8, 2, c.groups // per, 1)
    shifts = (jnp.arange(per, dtype=jnp.uint32) * (8 * c.scale_bytes)).reshape(*[1] * 6, per)
    view = (word >> shifts) & (256**c.scale_bytes - 1)
    return view.transpose(0, 2, 4, 3, 1, 5, 6).reshape(n * ROWS, k * c.groups)
