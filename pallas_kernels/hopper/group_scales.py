"""Scale rules in registers: from four groups of a row to lane q's scale of group q.

Each lane reduces its own values of four groups; three shuffles turn the four partial results in
four lanes into one finished result a lane, so that a rule is evaluated once a group and not four
times. A rule gives the stored bits and the *factor* that takes a value to the units in which
`code_words` rounds: ``g / s``, times 2**-6 for E2M1.
"""

from __future__ import annotations

import functools

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels.hopper.code_words import ROUND_INT, rounding
from pallas_kernels.hopper.quad import (
    absmax,
    asm,
    const,
    f32,
    fadd,
    fmax,
    highest,
    i32,
    ptx,
    scaled,
)

# What a power-of-two rule adds to the bits of amax before the exponent is read off, and to the
# exponent afterwards: a mantissa of 1.75 (1.5, exclusive) carries into the next binade.
POW2 = {
    "pow2_div3": (0, 0),
    "ocp_floor": (0, -2),
    "round_175": (0x200000, -2),
    "ceil": (0x3FFFFF, -2),
}


UNIT = 2.0**-6  # of rounded E2M1 values


def pow2_scale(amax, g, rule):
    """E8M0 byte and factor ``g * 2**-e * 2**-6``; byte 255 and factor 0 if amax is not finite.

    A group without normal numbers gets factor 0, too: the definition counts those as zero.
    """
    carry, offset = POW2[rule]
    byte = ptx(
        i32(),
        f"{{ .reg .s32 t; add.s32 t, $1, {carry}; shr.s32 t, t, 23; add.s32 t, t, {offset};"
        " max.s32 $0, t, 1; }",
        utils.bitcast(amax, i32()),
    )
    finite = ptx(
        i32(), "{ .reg .pred p; setp.lt.f32 p, $1, 0f7F800000; selp.s32 $0, -1, 0, p; }", amax
    )
    # 2**(1-e) has the exponent field 255 - byte; half of g makes up for the factor 2.
    factor = ptx(
        f32(),
        "{ .reg .b32 t; .reg .pred p; sub.s32 t, 255, $1; shl.b32 t, t, 23; and.b32 t, t, $3;"
        " setp.ge.f32 p, $4, 0f00800000; selp.b32 t, t, 0, p; mul.rn.f32 $0, t, $2; }",
        byte,
        scaled(g, 2.0**-7),
        finite,
        amax,
    )
    stored = ptx(i32(), "{ .reg .b32 t; not.b32 t, $2; or.b32 $0, $1, t; }", byte, finite)
    return stored, factor


def e4m3_scale(amax, g, top, unit=UNIT):
    """E4M3 byte of ``g * amax / top`` and factor ``g / s * unit``; 0x7F and NaN if not finite."""
    inverse = np.float32(1.0 / top).view(np.uint32)
    bound = np.float32(-top).view(np.uint32)
    byte = ptx(
        i32(),
        "{ .reg .f32 t,q,e; .reg .b16 h; mul.rn.f32 t, $1, $2;"
        " min.f32 t, t, 0f7F000000;"  # an overflow is finite and saturates, too
        # one correction step makes the product with 1/top the rounded quotient
        f" mul.rn.f32 q, t, 0f{inverse:08X}; fma.rn.f32 e, q, 0f{bound:08X}, t;"
        f" fma.rn.f32 q, e, 0f{inverse:08X}, q;"
        " max.f32 q, q, 0f3B000000; min.f32 q, q, 0f43E00000;"
        " fma.rn.f32 q, $1, 0f00000000, q;"  # inf * 0 and NaN * 0 are NaN
        " cvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, q; cvt.u32.u16 $0, h; }",
        amax,
        g,
    )
    return byte, e4m3_factor(byte, g, unit)


def e4m3_factor(byte, g, unit=UNIT):
    """``g / s * unit`` with 1/s correctly rounded: one Newton step on the approximation."""
    return ptx(
        f32(),
        "{ .reg .b16 h,l,u; .reg .b32 w; .reg .f32 s,r,e; cvt.u16.u32 h, $1;"
        " cvt.rn.f16x2.e4m3x2 w, h; mov.b32 {l,u}, w; cvt.f32.f16 s, l;"
        " rcp.approx.f32 r, s; neg.f32 e, s; fma.rn.f32 e, e, r, 0f3F800000;"
        " fma.rn.f32 r, e, r, r; mul.rn.f32 $0, r, $2; }",
        byte,
        scaled(g, unit),
    )


def with_sign(byte, factor, high, low):
    """A scale and factor, negative where the largest value lies above the largest negated one.

    Values below 2**-126 count as zero; groups that are not finite keep their byte.
    """
    sign = ptx(
        i32(),
        "{ .reg .pred p; setp.gt.f32 p, $1, $2; setp.ge.and.f32 p, $1, 0f00800000, p;"
        " setp.lt.and.f32 p, $1, 0f7F800000, p; selp.b32 $0, 0x80000000, 0, p; }",
        high,
        low,
    )
    factor = ptx(f32(), "xor.b32 $0, $1, $2;", factor, sign)
    return ptx(i32(), "{ .reg .b32 t; shr.u32 t, $2, 24; or.b32 $0, $1, t; }", byte, sign), factor


def value_scale(fmt, bits):
    """What takes a rounded value to a value times g: of E2M1, rounded times 2**-6, ``s * 2**6``."""
    if fmt.scale_dtype == "e8m0":
        # All bits are set where the group is not finite: that stays NaN.
        return ptx(
            f32(),
            "{ .reg .b32 t,u; .reg .f32 s; shl.b32 t, $1, 23; shr.u32 u, $1, 31; or.b32 t, t, u;"
            " mov.b32 s, t;"
            " mul.rn.f32 $0, s, 0f42800000; }",
            bits,
        )
    return ptx(
        f32(),
        "{ .reg .b16 h,l,u; .reg .b32 w; .reg .f32 s; cvt.u16.u32 h, $1;"
        " cvt.rn.f16x2.e4m3x2 w, h; mov.b32 {l,u}, w; cvt.f32.f16 s, l;"
        f" mul.rn.f32 $0, s, 0f{'42800000' if fmt.element.name == 'e2m1' else '3F800000'}; }}",
        bits,
    )


def largest(stored):
    """The largest E8M0 byte; of groups that are not finite all bits are set, as of -1."""
    return functools.reduce(arith.maxsi, stored, const(14))  # so that the power is a normal number


def float8_power(top):
    """Bits of the power of two with which the byte ``top`` becomes 2**13."""
    return arith.shli(arith.subi(top, const(13)), const(23))


def float8_scale(byte, top):
    """What takes a value rounded to E2M1, times 2**-6, to E5M2; NaN if the group is not finite."""
    return ptx(
        f32(),
        "{ .reg .s32 t; .reg .pred p; sub.s32 t, $1, $2; add.s32 t, t, 146; max.s32 t, t, 0;"
        " shl.b32 t, t, 23; setp.lt.s32 p, $1, 0; selp.b32 t, 0x7FC00000, t, p; mov.b32 $0, t; }",
        byte,
        top,
    )


# As `POW2`, of E4M3: a mantissa above 1.75 carries.
E4M3_POW2 = {"ocp_floor": (0, -8), "ceil": (0x1FFFFF, -8)}


def e4m3_power(bits, g, rule):
    """Power of two and factor ``g / power`` of the bits of a row's largest magnitude.

    NaN and 0 if it is not finite. Without normal numbers the factor is 0, too.
    """
    carry, offset = E4M3_POW2[rule]
    code = (
        f"{{ .reg .s32 t,b; .reg .pred p,q; add.s32 t,$2,{carry}; shr.s32 t,t,23;"
        f" add.s32 t,t,{offset}; max.s32 t,t,1; shl.b32 b,t,23; setp.ge.s32 p,$2,0x7F800000;"
        " selp.b32 $0,0x7FC00000,b,p; setp.ge.s32 q,$2,0x00800000;"
        # 2**(1-e) has the exponent field 255 - byte; half of g makes up for the factor 2
        " sub.s32 t,255,t; shl.b32 t,t,23; selp.b32 t,t,0,q; selp.b32 $1,0,t,p; }"
    )
    power, factor = (utils.bitcast(v, f32()) for v in asm(code, 2, bits))
    return power, ptx(f32(), "mul.rn.f32 $0, $1, $2;", factor, scaled(g, 0.5))


def bfloat16_scale(amax, mean_square, g, step):
    """Bits of bfloat16 ``g * step * rms`` and factor ``g / s``; 0x7FC0 and NaN if not finite.

    ``mean_square`` is relative to the power of two below amax, so that it cannot overflow.
    """
    value = ptx(
        f32(),
        "{ .reg .b32 e; .reg .f32 r; and.b32 e, $1, 0x7F800000; max.u32 e, e, 0x00800000;"
        " min.u32 e, e, 0x7E800000;"
        " sqrt.rn.f32 r, $2; mul.rn.f32 r, r, $3; mul.rn.f32 r, r, e; max.f32 r, r, 0f00800000;"
        " min.f32 r, r, 0f7F61B1E6; fma.rn.f32 $0, $1, 0f00000000, r; }",
        amax,
        mean_square,
        scaled(g, step),
    )
    bits = ptx(i32(), "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }", value)
    factor = ptx(
        f32(),
        "{ .reg .f32 s,r,e; shl.b32 s, $1, 16; mul.rn.f32 s, s, 0f3F000000;"
        " rcp.approx.f32 r, s; neg.f32 e, s;"
        " fma.rn.f32 e, e, r, 0f3F800000; fma.rn.f32 r, e, r, r; mul.rn.f32 r, r, $2;"
        " .reg .pred p; setp.lt.f32 p, $3, 0f00800000; selp.f32 $0, 0f00000000, r, p; }",
        bits,
        scaled(g, 0.5),
        amax,
    )
    return bits, factor


def squared_error(fmt, factor, values):
    """Sum of ``(y - round(y * factor) / factor)**2`` over a lane's values of one group."""
    rounds = rounding(True) if fmt.element.name == "e2m1" else ROUND_INT
    terms = "".join(
        rounds.format(i=0, x=i + 2, f=1)
        + f" fma.rn.f32 z0, z0, n, ${i + 2}; fma.rn.f32 s, z0, z0, s; "
        for i in range(len(values))
    )
    return ptx(
        f32(),
        "{ .reg .f32 v,z0,n,s; rcp.approx.f32 n, $1; neg.f32 n, n; mov.f32 s, 0f00000000; "
        + terms
        + "mov.f32 $0, s; }",
        factor,
        *values,
    )


def sum_of_squares(amax, values):
    """Sum of the squares of values over the power of two below amax."""
    terms = "".join(
        f"mul.rn.f32 z, ${i + 2}, u; fma.rn.f32 s, z, z, s; " for i in range(len(values))
    )
    # 2**-e has the exponent field 254 - field(2**e), at least 1: a normal number.
    return ptx(
        f32(),
        "{ .reg .f32 z,s; .reg .b32 u; and.b32 u, $1, 0x7F800000;"
        " max.u32 u, u, 0x00800000; min.u32 u, u, 0x7E800000; sub.s32 u, 0x7F000000, u;"
        " mov.f32 s, 0f00000000; " + terms + "mov.f32 $0, s; }",
        amax,
        *values,
    )


def candidates(fmt, amax, g):
    """Candidate (stored bits, factor) of a lane's group for rules that need only amax."""
    if fmt.scale_dtype == "e8m0":
        return [pow2_scale(amax, g, fmt.rule)]
    if fmt.rule in SIGNED_TOPS:
        return [e4m3_scale(amax, g, top, 1.0) for top in SIGNED_TOPS[fmt.rule]]
    six = e4m3_scale(amax, g, 6.0)
    if fmt.rule == "absmax":
        return [six]
    found = [six, e4m3_scale(amax, g, 4.0)]
    if fmt.rule == "three_candidates":
        below = ptx(i32(), "{ .reg .s32 t; sub.s32 t, $1, 1; max.s32 $0, t, 1; }", six[0])
        found.append((below, e4m3_factor(below, g)))
    return found


def scales_of_row(fmt, quad, groups, g):
    """Find the scales of four groups of one row: lane q's (stored bits, factor) of group q."""
    if fmt.rule in SIGNED_TOPS:
        high = quad.reduce4([highest(v) for v in groups], fmax)
        low = quad.reduce4([highest(v, "neg") for v in groups], fmax)
        found = candidates(fmt, fmax(high, low), g)
        found = [with_sign(byte, factor, high, low) for byte, factor in found]
        return _least_error(fmt, quad, groups, found)
    amax = quad.reduce4([absmax(v) for v in groups], fmax)
    if fmt.rule == "gaussian_mse":
        spread = quad.gather4(amax)
        squares = [sum_of_squares(a, v) for a, v in zip(spread, groups, strict=True)]
        mean = scaled(quad.reduce4(squares, fadd), 1.0 / fmt.group_size)
        return bfloat16_scale(amax, mean, g, GAUSSIAN_STEP)
    return _least_error(fmt, quad, groups, candidates(fmt, amax, g))


def _least_error(fmt, quad, groups, found):
    """The first of the candidates that none after it beats."""
    best, *others = found
    if not others:
        return best

    def error(candidate):
        spread = quad.gather4(candidate[1])
        parts = [squared_error(fmt, f, v) for f, v in zip(spread, groups, strict=True)]
        return quad.reduce4(parts, fadd)

    least = error(best)
    for other in others:
        err = error(other)
        better = arith.cmpf(arith.CmpFPredicate.OLT, err, least)
        least = arith.select(better, err, least)
        best = tuple(arith.select(better, o, b) for o, b in zip(other, best, strict=True))
    return best


# 2 c / (2**4 - 1) with c the clip of a Gaussian that minimises the squared error of 16 levels.
GAUSSIAN_STEP = 2.513930578568423 * 2.0 / 15.0
E2M1_RULES = {
    "e8m0": tuple(POW2),
    "e4m3": ("absmax", "four_over_six", "three_candidates"),
}


# Where the value of largest magnitude lands, of integers with signed scales.
SIGNED_TOPS = {"signed_absmax": (8.0,), "signed_candidates": (8.0, 8.5, 7.0)}


def check_format(fmt) -> None:
    """Raise NotImplementedError if no instruction sequence serves the format."""
    e2m1 = fmt.element.name == "e2m1" and fmt.rule in E2M1_RULES.get(fmt.scale_dtype, ())
    int4 = (fmt.element.name, fmt.scale_dtype, fmt.rule) == (
        "int4_midrise",
        "bfloat16",
        "gaussian_mse",
    )
    signed = (fmt.element.name, fmt.scale_dtype, fmt.group_size) == ("int4_full", "e4m3", 16)
    if signed and fmt.rule in SIGNED_TOPS:
        return
    fp8 = (fmt.element.name, fmt.scale_dtype, fmt.group_size) == ("e4m3", "e8m0", 512)
    if fp8 and fmt.rule in E4M3_POW2:
        return
    if not (e2m1 or int4) or fmt.group_size not in (16, 32):
        raise NotImplementedError(
            f"format {fmt.name} (element {fmt.element.name}, group {fmt.group_size}, rule "
            f"{fmt.rule}, scales {fmt.scale_dtype}) has no register epilogue"
        )
