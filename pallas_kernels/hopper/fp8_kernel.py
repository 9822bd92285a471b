"""Weights and MXFP4 activations to FP8, for one call: streams of tiles, a Mosaic GPU kernel each.

An E2M1 code times a power of two is an E4M3 number over 14 octaves and an E5M2 number over 28, the
last two of them by subnormals. Weights, records, become E4M3, for the library, which multiplies no
E5M2 by E5M2: smaller groups are rounded to its subnormal steps, less than 2**-18 of the largest
scale. Activations, packed codes, become E5M2: groups more than 26 octaves below the largest become
zeros. Columns of both come out in the order of `repack.to_lanes`. `expanded` weights are for our
own kernel, which takes E5M2, too: MXFP4 as the fused kernel expands it, other formats *folded*,
rounded to E4M3.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import fragments, repack
from pallas_kernels.hopper import expand, float8
from pallas_kernels.hopper.inlined import SCALAR, generic_address, lane_value, spread, swizzled
from pallas_kernels.hopper.quad import Quad, asm, const, i32

# Bring the largest scale from 2**13 in E5M2 to 2**6: 6 * 2**6 = 384 < 448.
LOWER = 7
WARPGROUPS, STAGES = 4, 4
# Brings the largest bfloat16 value of records to E4M3's upper octaves, below 448.
FOLD = {"nvfp4": 6, "nvint4": 4}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expanded:
    """A weight in FP8 in the tiles of `fragments`: ``value = unit * record / global_scale``.

    Attributes:
      records: float8_e5m2 or float8_e4m3fn (ceil(K/128), ceil(N/64) * 64, 128), columns as
        `repack.to_lanes`.
      unit: float32 scalar.
      global_scale: float32 scalar, divides.
      format: the number format that it had; static.
      shape: (N, K); static.
      operand: "expanded"; static.
    """

    records: jax.Array
    unit: jax.Array
    global_scale: jax.Array
    format: Any = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    operand: str = dataclasses.field(metadata={"static": True}, default="expanded")

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of 64 rows, steps of 128 columns."""
        return self.records.shape[1] // fragments.ROWS, self.records.shape[0]


def folds(weight: fragments.Fragments) -> bool:
    """Whether `expanded` has an FP8 form of a weight."""
    return weight.operand == "float8" or fragments.carrier(weight.format).kind in FOLD


def expanded(weight: fragments.Fragments) -> Expanded:
    """Return a weight in FP8: exact if it was laid out for it, else rounded to E4M3.

    Then values keep four significant bits down to 2**-14 of the largest power of two, and the error
    of each is at most 2**-4 of it.

    Args:
      weight: MXFP4 laid out for FP8; NVFP4 or NVINT4.
    """
    c = fragments.carrier(weight.format, weight.operand)
    tiles, steps = weight.records.shape[:2]
    exact = weight.operand == "float8"
    convert = _to_bytes(float8.bytes_of if exact else functools.partial(_folded, c), c)
    run = _stream(
        tiles,
        steps,
        lambda records, tile, step: records.at[tile, step],
        lambda source, records, tile, step: convert(source),
        plgpu.SMEM((WARPGROUPS * STAGES, c.lines, 64), jnp.uint32),
        tiled=True,
    )
    kind = jnp.float8_e5m2 if exact else jnp.float8_e4m3fn
    values = lax.bitcast_convert_type(run(weight.records), kind)
    unit = weight.unit if exact else weight.unit * 2.0 ** -FOLD[c.kind]
    return Expanded(values, unit, weight.global_scale, weight.format, weight.shape)


def weights(records, fmt):
    """Return E4M3 values, columns as `repack.to_lanes`, ``value = unit * 2**LOWER * out / g``.

    Args:
      records: uint32 (N/64, K/128, lines, 64) of MXFP4, laid out for FP8.
      fmt: the format.

    Returns:
      float8_e4m3fn (ceil(N/64) * 64, ceil(K/128) * 128).
    """
    c = fragments.carrier(fmt, "float8")
    tiles, steps = records.shape[:2]
    convert = _to_bytes(_to_e4m3, c)
    run = _stream(
        tiles,
        steps,
        lambda records, tile, step: records.at[tile, step],
        lambda source, records, tile, step: convert(source),
        plgpu.SMEM((WARPGROUPS * STAGES, c.lines, 64), jnp.uint32),
    )
    return lax.bitcast_convert_type(run(records), jnp.float8_e4m3fn)


def activations(codes, scales, top):
    """Return E5M2 values, columns as `repack.to_lanes`: ``code * 2**(scale - top) * 2**13``.

    Exact for groups at most 26 octaves below ``2**top``; those below become zeros. Groups whose
    scale is NaN become NaN.

    Args:
      codes: uint8 (M, K/2), M a multiple of 8, bytes as `repack.to_lanes`.
      scales: float8_e8m0fnu (M, K/32), K a multiple of 128.
      top: int32, the largest stored scale.

    Returns:
      float8_e5m2 (M, K).
    """
    rows, steps = codes.shape[0], codes.shape[1] // 64
    convert = _to_e5m2()

    def source(codes, scales, shift, tile, step):
        return codes.at[_at(tile, fragments.ROWS), _at(step, 64)]

    def to_e5m2(source, codes, scales, shift, tile, step):
        words = plgpu.layout_cast(source[...], plgpu.Layout.WGMMA_8BIT)
        exist = spread(rows - tile * fragments.ROWS)
        groups = scales.at[_at(tile, fragments.ROWS), _at(step, 4)]
        return convert(groups, spread(shift[0]), exist, words)

    run = _stream(
        -(-rows // fragments.ROWS),
        steps,
        source,
        to_e5m2,
        plgpu.SMEM(
            (WARPGROUPS * STAGES, fragments.ROWS, 64), jnp.uint8, transforms=swizzled(64, 1)
        ),
        rows=rows,
    )
    stored = lax.bitcast_convert_type(scales, jnp.uint8)
    shift = jnp.asarray(repack.HIGHEST_FIELD - top, jnp.int32).reshape(1)
    return lax.bitcast_convert_type(run(codes, stored, shift), jnp.float8_e5m2)


def _at(i, size):
    return pl.ds(pl.multiple_of(i * size, size), size)


def _stream(tiles, steps, source, convert, ring, rows=None, tiled=False):
    """A kernel that brings tiles to shared memory, converts them, and stores (64, 128) bytes each.

    Args:
      tiles: of 64 rows.
      steps: of 128 columns.
      source: (*operands, tile, step) -> what a tile reads.
      convert: (copy, *operands, tile, step) -> uint8 (64, 128).
      ring: buffers of the copies.
      rows: of the result, if fewer.
      tiled: the result is (steps, tiles * 64, 128).
    """
    shape: tuple[int, ...] = (rows or tiles * fragments.ROWS, steps * fragments.COLUMNS)
    if tiled:
        shape = (steps, tiles * fragments.ROWS, fragments.COLUMNS)
    return plgpu.kernel(
        functools.partial(_body, tiles, steps, source, convert),
        out_type=jax.ShapeDtypeStruct(shape, jnp.uint8),
        grid=(132,),
        grid_names=("cta",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=dict(
            ring_s=ring,
            out_s=plgpu.SMEM(
                (WARPGROUPS * 2, fragments.ROWS, fragments.COLUMNS),
                jnp.uint8,
                transforms=swizzled(128, 1),
            ),
            ready=plgpu.Barrier(num_barriers=WARPGROUPS * STAGES),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _body(tiles, steps, source, convert, *arrays, ring_s, out_s, ready):
    *operands, out_g = arrays
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    first = cta * WARPGROUPS + wg
    stride = lax.axis_size("cta") * WARPGROUPS
    count = (tiles * steps - first + stride - 1) // stride

    def place(i):
        at = first + i * stride
        return at // steps, lax.rem(at, steps)

    def fetch(i):
        slot = wg * STAGES + lax.rem(i, STAGES)
        plgpu.copy_gmem_to_smem(source(*operands, *place(i)), ring_s.at[slot], ready.at[slot])

    def warm_up(i, _):
        pl.when(i < count)(lambda: fetch(i))

    def advance(i, _):
        slot = wg * STAGES + lax.rem(i, STAGES)
        plgpu.barrier_wait(ready.at[slot])
        values = convert(ring_s.at[slot], *operands, *place(i))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
        out = out_s.at[wg * 2 + lax.rem(i, 2)]
        out[...] = values
        plgpu.commit_smem()
        tile, step = place(i)
        rows = _at(tile, fragments.ROWS)
        at = (rows, _at(step, fragments.COLUMNS)) if len(out_g.shape) == 2 else (step, rows)
        plgpu.copy_smem_to_gmem(out, out_g.at[at])

    lax.fori_loop(0, STAGES, warm_up, None)
    lax.fori_loop(0, count, advance, None)
    plgpu.wait_smem_to_gmem(0)


# Four bytes of E5M2, the high bytes of float16 numbers, times 2**-7 to E4M3.
E4M3 = """{
 .reg .b32 t; .reg .b16 h,l;
 prmt.b32 t,$1,0,0x1404; mul.rn.f16x2 t,t,$2; cvt.rn.satfinite.e4m3x2.f16x2 l,t;
 prmt.b32 t,$1,0,0x3424; mul.rn.f16x2 t,t,$2; cvt.rn.satfinite.e4m3x2.f16x2 h,t;
 mov.b32 $0,{l,h};
 }"""


def _to_e4m3(words, scales):
    """As `float8.bytes_of`, bytes of E4M3."""
    factor = np.array([2.0**-LOWER] * 2, np.float16).view(np.uint32)[0]
    for registers in float8.bytes_of(words, scales):
        yield [asm(E4M3, 1, register, const(factor))[0] for register in registers]


def _folded(c, words, scales):
    """As `float8.bytes_of`, of the record's bfloat16 values, rounded to E4M3."""
    steps = expand.fragments_of(c, words, scales)
    code = _fold_code(FOLD[c.kind])
    for first, second in zip(steps, steps, strict=True):  # of 16 columns each
        rows = [
            asm(code, 2, first[half], first[2 + half], second[half], second[2 + half])
            for half in (0, 1)
        ]
        yield [row[odd] for odd in (0, 1) for row in rows]


def _fold_code(power):
    """Four words of two bfloat16 values to E4M3: words of the low values, of the high ones."""
    factor = np.float32(2.0**power).view(np.uint32)
    take = ("shl.b32 t,{x},16;", "and.b32 t,{x},0xFFFF0000;")
    code = "{ .reg .b32 t; .reg .f32 z<4>; .reg .b16 l,h; "
    for odd in (0, 1):
        for i in range(4):
            code += take[odd].format(x=f"${i + 2}")
            code += f" mov.b32 z{i},t; mul.rn.f32 z{i},z{i},0f{factor:08X}; "
        code += "cvt.rn.satfinite.e4m3x2.f32 l,z1,z0; cvt.rn.satfinite.e4m3x2.f32 h,z3,z2; "
        code += f"mov.b32 ${odd},{{l,h}}; "
    return code + "}"


def _to_bytes(bytes_of, c):
    """Return ``convert(record) -> uint8 (64, 128)``, bytes as ``bytes_of(words, scales)`` gives."""
    shape = (fragments.ROWS, fragments.COLUMNS)
    layout = fa.WGMMA_LAYOUT_8BIT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            shape, jnp.dtype(jnp.uint8), layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def convert(_, record):
        out = np.empty(layout.registers_shape(shape), dtype=object)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        for group, registers in enumerate(bytes_of(*expand.load(c, record))):
            for i, word in enumerate(registers):
                odd, half = divmod(i, 2)
                out[0, 2 * group + odd, 0, 0, half, 0, 0, 0, 0] = utils.bitcast(word, four)
        utils.warpgroup_barrier()
        return fa.FragmentedArray(_registers=out, _layout=layout, _is_signed=False)

    return convert


# Four bytes, a code in the low half of each: magnitude m becomes 4 E - 2 + 2 (m + [m >= 2]), zero
# zero; all become NaN where n. E is the field, k holds 4 E - 2.
BYTES = """ .reg .b32 m,z,t;
 and.b32 m,{w},0x07070707;
 add.u32 z,m,0x07070707; shr.u32 z,z,3; and.b32 z,z,0x01010101;
 add.u32 t,m,0x06060606; shr.u32 t,t,3; and.b32 t,t,0x01010101;
 add.u32 m,m,t; shl.b32 m,m,1; mad.lo.u32 m,z,k,m;
 and.b32 t,{w},0x08080808; shl.b32 t,t,4; or.b32 m,m,t; selp.b32 {out},0x7F7F7F7F,m,n;"""
CODES = (
    "{ .reg .b32 e,k,w; .reg .pred p,n; bfe.u32 e,$3,$4,8; setp.eq.u32 n,e,255;"
    " add.s32 e,e,$5; setp.gt.s32 p,e,0; selp.b32 w,$2,0,p; shl.b32 k,e,2; sub.s32 k,k,2; {"
    + BYTES.format(w="w", out="$0")
    + " } shr.u32 w,w,4; {"
    + BYTES.format(w="w", out="$1")
    + " } }"
)
# Four scales of a row, if it exists.
SCALES = (
    "{ .reg .pred p; .reg .b64 a; cvt.s64.s32 a,$2; add.s64 a,a,$1; setp.lt.s32 p,$3,$4;"
    " mov.b32 $0,0; @p ld.b32 $0,[a]; }"
)


def _to_e5m2():
    """Return ``convert(scales, shift, exist, codes) -> uint8 (64, 128)``, bytes of E5M2."""
    shape = (fragments.ROWS, fragments.COLUMNS)
    layout = fa.WGMMA_LAYOUT_8BIT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR, plgpu.Layout.WGMMA_8BIT),
        return_type=plgpu.ShapeDtypeStruct(
            shape, jnp.dtype(jnp.uint8), layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def convert(_, scales, shift, exist, codes):
        quad = Quad()
        shift, exist = lane_value(shift), lane_value(exist)
        base = generic_address(scales)
        by_row = ir.MemRefType(scales.type).get_strides_and_offset()[0][0]
        out = np.empty(layout.registers_shape(shape), dtype=object)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        for half in (0, 1):
            row = arith.addi(quad.row, const(8 * half))
            operands = base, arith.muli(row, const(by_row)), row, exist
            of_row = llvm.inline_asm(i32(), operands, SCALES, "=r,l,r,r,r", has_side_effects=True)
            for group in range(4):
                word = utils.bitcast(codes.registers[0, group, 0, 0, half, 0, 0, 0, 0], i32())
                pair = asm(CODES, 2, word, of_row, const(8 * group), shift)
                for e, four_bytes in enumerate(pair):
                    at = 0, 2 * group + e, 0, 0, half, 0, 0, 0, 0
                    out[at] = utils.bitcast(four_bytes, four)
        return fa.FragmentedArray(_registers=out, _layout=layout, _is_signed=False)

    return convert
