"""Eight values of a lane to one word of codes, and words to rows of bytes.

Rounding onto E2M1 takes one maximum and two multiply-adds a value: with ``v = max(|z|, 1.5)`` the
sum ``z + 2**22 v`` has a unit of last place equal to E2M1's step at z, its rounding is to nearest
with ties to even, and subtracting ``2**22 v`` is exact and never gives -0. The rounded value times
2**-6 is a small E4M3 number whose bits 4..2 are E2M1's magnitude code; the hardware converts two
values at once, and six integer instructions pack eight codes.
"""

from __future__ import annotations

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.hopper.quad import EVERY_LANE, SEGMENTS, asm, const, i32, ptx

# Second operand where the mask (third operand) is 0, first where it is 1.
SELECT = 0xF0 & 0xAA | 0xCC & ~0xAA & 0xFF

CLAMP = "min.f32 z{i}, z{i}, 0f3DC00000; max.f32 z{i}, z{i}, 0fBDC00000;"
ROUND = (
    "mul.rn.f32 z{i}, ${x}, ${f}; {clamp} abs.f32 v, z{i}; max.f32 v, v, 0f3CC00000;"
    " fma.rn.f32 z{i}, v, 0f4A800000, z{i}; fma.rn.f32 z{i}, v, 0fCA800000, z{i};"
)
# Integers -8 to 7, to even: 1.5 * 2**23 has a unit of last place of 1.
ROUND_INT = (
    "mul.rn.f32 z{i}, ${x}, ${f}; min.f32 z{i}, z{i}, 0f40E00000;"
    " max.f32 z{i}, z{i}, 0fC1000000; add.rn.f32 z{i}, z{i}, 0f4B400000;"
    " add.rn.f32 z{i}, z{i}, 0fCB400000; "
)
# z0..z7 are the columns 2q, 2q+1, 8+2q, 8+2q+1, ...: which four go to the low nibbles of bytes
# 0..3, which to the high ones.
EVEN_LOW = (0, 2, 4, 6), (1, 3, 5, 7)
NIBBLES = {
    "interchange": EVEN_LOW,
    "lanes": EVEN_LOW,
    "kernel": ((0, 1, 2, 3), (4, 5, 6, 7)),
}


def rounding(saturate):
    """The instructions of rounding to E2M1, with those of values beyond its largest."""
    return ROUND.replace("{clamp}", CLAMP if saturate else "")


def e2m1_word(factors, values, saturate, layout):
    """Eight values of one lane, two factors (columns below and from 16) -> four bytes of codes."""
    rounds = "".join(
        ROUND.format(i=i, x=i + 3, f=1 + i // 4, clamp=CLAMP.format(i=i) if saturate else "")
        for i in range(8)
    )
    convert = ""
    for name, four in zip("ab", NIBBLES[layout], strict=True):
        convert += (
            "cvt.rn.satfinite.e4m3x2.f32 h0,z{1},z{0}; cvt.rn.satfinite.e4m3x2.f32 h1,z{3},z{2};"
        ).format(*four)
        convert += f" mov.b32 {name},{{h0,h1}}; "
    return ptx(
        i32(),
        "{ .reg .f32 v,z<8>; .reg .b16 h0,h1; .reg .b32 a,b,s,t; "
        + rounds
        + convert
        + f" shr.u32 s,a,2; shr.u32 t,a,4; lop3.b32 s,s,t,0x07070707,{SELECT};"
        f" shl.b32 t,b,2; lop3.b32 t,t,b,0x70707070,{SELECT}; lop3.b32 $0,s,t,0x0F0F0F0F,{SELECT};"
        " }",
        *factors,
        *values,
    )


def four_bit_values(factors, scales, values, rounds):
    """Eight values of one lane rounded and multiplied back: four words of two bfloat16.

    Rounds are those of `rounding`, or `ROUND_INT`.
    """
    words = []
    for pair in range(4):
        half = pair // 2  # columns below and from 16
        products = "".join(
            rounds.format(i=i, x=i + 3, f=1) + f" mul.rn.f32 z{i}, z{i}, $2; " for i in (0, 1)
        )
        code = "{ .reg .f32 v,z<2>; " + products + " cvt.rn.bf16x2.f32 $0, z1, z0; }"
        words.append(ptx(i32(), code, factors[half], scales[half], *values[2 * pair :][:2]))
    return words


def e2m1_float8(factors, scales, values, saturate):
    """Eight values of one lane rounded to E2M1, as E5M2: words of the even and the odd columns."""
    rounds = "".join(
        ROUND.format(i=i, x=i + 6, f=2 + i // 4, clamp=CLAMP.format(i=i) if saturate else "")
        + f" mul.rn.f32 z{i}, z{i}, ${4 + i // 4}; "
        for i in range(8)
    )
    convert = "".join(
        "".join(
            f"cvt.rn.satfinite.e5m2x2.f32 h{i},z{first + 2 + odd},z{first + odd}; "
            for i, first in enumerate((0, 4))
        )
        + f"mov.b32 ${odd},{{h0,h1}}; "
        for odd in (0, 1)
    )
    code = "{ .reg .f32 v,z<8>; .reg .b16 h0,h1; " + rounds + convert + "}"
    return asm(code, 2, *factors, *scales, *values)


def e4m3_float8(factor, values):
    """Eight values of one lane times a factor in E4M3: words of the even and the odd columns."""
    scaled = "".join(f"mul.rn.f32 z{i}, ${i + 3}, $2; " for i in range(8))
    convert = "".join(
        f"cvt.rn.satfinite.e4m3x2.f32 h0,z{2 + odd},z{odd}; "
        f"cvt.rn.satfinite.e4m3x2.f32 h1,z{6 + odd},z{4 + odd}; mov.b32 ${odd},{{h0,h1}}; "
        for odd in (0, 1)
    )
    return asm("{ .reg .f32 z<8>; .reg .b16 h0,h1; " + scaled + convert + "}", 2, factor, *values)


def e4m3_values(factor, power, values):
    """As `e4m3_float8`, multiplied back: four words of two bfloat16."""
    code = (
        "{ .reg .f32 a,b; .reg .b16 h,l,u; .reg .b32 w; mul.rn.f32 a,$3,$1; mul.rn.f32 b,$4,$1;"
        " cvt.rn.satfinite.e4m3x2.f32 h,b,a; cvt.rn.f16x2.e4m3x2 w,h; mov.b32 {l,u},w;"
        " cvt.f32.f16 a,l; cvt.f32.f16 b,u; mul.rn.f32 a,a,$2; mul.rn.f32 b,b,$2;"
        " cvt.rn.bf16x2.f32 $0,b,a; }"
    )
    return [ptx(i32(), code, factor, power, *values[2 * i :][:2]) for i in range(4)]


def int4_word(factors, values, layout, midrise):
    """As `e2m1_word` for integers in [-8, 7], two's complement: ``k = round(z)``.

    Of the mid-rise grid ``k = round(z - 1/2)``.
    """
    top, bottom, shift = (
        ("0f40F80000", "0fC0F80000", "add.rn.f32 z{i}, z{i}, 0fBF000000;")
        if midrise
        else ("0f40E00000", "0fC1000000", "")
    )
    rounds = "".join(
        f"mul.rn.f32 z{i}, ${i + 3}, ${1 + i // 4}; min.f32 z{i}, z{i}, {top};"
        f" max.f32 z{i}, z{i}, {bottom}; {shift.format(i=i)}"
        # the sum's low bits are k: 1.5 * 2**23 has a unit of last place of 1
        f" add.rn.f32 z{i}, z{i}, 0f4B400000; mov.b32 k{i}, z{i}; "
        for i in range(8)
    )
    gather = "".join(
        f"prmt.b32 s, k{four[0]}, k{four[1]}, 0x0040; prmt.b32 t, k{four[2]}, k{four[3]}, 0x0040;"
        f" prmt.b32 {name}, s, t, 0x5410; "
        for name, four in zip("ab", NIBBLES[layout], strict=True)
    )
    return ptx(
        i32(),
        "{ .reg .f32 z<8>; .reg .b32 k<8>,a,b,s,t; "
        + rounds
        + gather
        + f" shl.b32 b, b, 4; lop3.b32 $0, a, b, 0x0F0F0F0F, {SELECT}; }}",
        *factors,
        *values,
    )


# Bits of a lane's word that belong to the chunk's two 16-column halves.
BYTES = 0x0000FFFF, 0xFFFF0000
HALVES = {"interchange": BYTES, "lanes": BYTES, "kernel": (0x0F0F0F0F, 0xF0F0F0F0)}


def drop_bad_groups(word, factors, layout):
    """Zero the codes of groups whose factor is 0 or NaN; of signed scales it may be negative."""
    if factors[0] is factors[1]:
        return ptx(
            i32(),
            "{ .reg .pred p; setp.ne.f32 p, $2, 0f00000000; selp.b32 $0, $1, 0, p; }",
            word,
            factors[0],
        )
    low, high = HALVES[layout]
    return ptx(
        i32(),
        "{ .reg .pred p; .reg .b32 a,b; setp.ne.f32 p, $2, 0f00000000;"
        f" selp.b32 a, {low}, 0, p; setp.ne.f32 p, $3, 0f00000000; selp.b32 b, {high}, 0, p;"
        " or.b32 a, a, b; and.b32 $0, $1, a; }",
        word,
        *factors,
    )


def exchange_bytes(quad, word, layout):
    """Transpose within the quad so that lane q holds bytes 4q..4q+3 of the chunk's 16.

    In the layout "lanes" these are the bytes that the lane has: 8n + 2q and 8n + 2q + 1, n = 0..3.
    """
    if layout == "lanes":
        return word
    if layout == "interchange":  # from byte j of lane q at 4j + q
        for distance, swapped, (yes, no) in (
            (2, quad.high, (0x3276, 0x5410)),
            (1, quad.odd, (0x3715, 0x6240)),
        ):
            select = arith.select(swapped, const(yes), const(no))
            other = utils.shfl_bfly(word, distance)
            word = ptx(i32(), "prmt.b32 $0, $1, $2, $3;", word, other, select)
        return word
    # from 16-bit half h of lane q at 4h + q
    clamp, mask = const(SEGMENTS), const(EVERY_LANE)
    first = arith.andi(arith.shli(quad.lane, const(1)), const(3))
    low = nvvm.shfl_sync(mask, word, first, clamp, nvvm.ShflKind.idx)
    second = arith.ori(first, const(1))
    high = nvvm.shfl_sync(mask, word, second, clamp, nvvm.ShflKind.idx)
    select = arith.select(quad.high, const(0x7632), const(0x5410))
    return ptx(i32(), "prmt.b32 $0, $1, $2, $3;", low, high, select)
