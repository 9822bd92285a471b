"""From a record in shared memory to wgmma's left operand in registers.

`to_bfloat16` emits the instructions for one record of `fragments`: three or four wide loads a
thread, then for each word of eight codes a few masks and shifts and one multiplication by the
group's scale for two values. An E2M1 code whose three magnitude bits sit at the exponent's end is a
bfloat16 number times 2**-126; the scale brings the power back, so that the product is exact.
`plain` is its twin in `jax.numpy`.
"""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import fragments
from pallas_kernels.hopper.inlined import address, swizzled
from pallas_kernels.hopper.quad import asm, const

# Eight codes of a word times the scales of its two steps, as four registers of two bfloat16 values.
E2M1 = """{
 .reg .b32 t,u;
 shl.b32 t,$4,6; and.b32 t,t,0x01C001C0; shl.b32 u,$4,1; lop3.b32 t,u,0x80008000,t,0xEA;
 mul.rn.bf16x2 $0,t,$5;
 shl.b32 t,$4,3; and.b32 t,t,0x81C081C0; mul.rn.bf16x2 $1,t,$5;
 and.b32 t,$4,0x81C081C0; mul.rn.bf16x2 $2,t,$6;
 shr.u32 t,$4,3; and.b32 t,t,0x01C001C0; shl.b32 u,$4,2; lop3.b32 t,u,0x80008000,t,0xEA;
 mul.rn.bf16x2 $3,t,$6;
 }"""
# 2 k + 1 = (128 + 2 u + 1) - 144 with u = k + 8; the product with a scale of eight bits has twelve:
# the rounded product and what it lacks.
INT4 = (
    "{ .reg .b32 t,n; mov.b32 n,0xC310C310;"
    + "".join(
        f" {shift.format(t='t', x='$8')} lop3.b32 t,t,0x001E001E,0x43014301,0xEA;"
        f" add.rn.bf16x2 t,t,n; mul.rn.bf16x2 ${i},t,${9 + i // 2};"
        f" {{ .reg .b32 m; neg.bf16x2 m,${i}; fma.rn.bf16x2 ${i + 4},t,${9 + i // 2},m; }}"
        for i, shift in enumerate(
            (
                "shl.b32 {t},{x},1;",
                "shr.u32 {t},{x},3;",
                "shr.u32 {t},{x},7;",
                "shr.u32 {t},{x},11;",
            )
        )
    )
    + " }"
)
# k times 2**-127: (128 + u - 136) of the smallest binades, with u = k + 8.
NVINT4 = (
    "{ .reg .b32 t,n; mov.b32 n,0x83888388;"
    + "".join(
        f" shr.u32 t,$4,{4 * i}; lop3.b32 t,t,0x000F000F,0x03800380,0xEA; add.rn.bf16x2 t,t,n;"
        f" mul.rn.bf16x2 ${i},t,${5 + i // 2};"
        for i in range(4)
    )
    + " }"
)
WORDS = {"mxfp4": E2M1, "nvfp4": E2M1, "nvint4": NVINT4, "int4": INT4}
# Two copies of byte j (or half-word j) of a word.
BYTE, HALF = (0x4040, 0x4141, 0x4242, 0x4343), (0x1010, 0x3232)
# Where a stored byte's exponent goes, and what 2**126 (and 2**-9) of it is.
SPREAD = {"mxfp4": (7, 126 << 7), "nvfp4": (4, 228 << 7)}
# Byte j twice, its sign above it; a scale of NVINT4 is 2**127 at the largest exponent.
SIGNED_BYTE = (0x8080, 0x9191, 0xA2A2, 0xB3B3)
SIGNED = (
    "{ .reg .b32 t; prmt.b32 t,$1,0,SELECT; shl.b32 t,t,4;"
    " lop3.b32 $0,t,0x87F087F0,0x78007800,0xEA; }"
)
STEPS = 8  # of 16 columns in a record


def operands(c: fragments.Carrier) -> int:
    """How many bfloat16 arrays a record becomes: their sum is the weight."""
    return 2 if c.kind == "int4" else 1


def to_bfloat16(c: fragments.Carrier):
    """Return ``expand(record) -> (weights, ...)``: bfloat16 (64, 128) in wgmma's layout.

    Each thread has read its part of the record when it returns.
    """
    wgmma = plgpu.Layout.WGMMA
    shape = (fragments.ROWS, fragments.COLUMNS)
    one = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=wgmma)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(one,) * operands(c))
    def expand(_, record):
        layout = fa.WGMMA_LAYOUT
        outs = [np.empty(layout.registers_shape(shape), dtype=object) for _ in range(operands(c))]
        for step, registers in enumerate(fragments_of(c, *load(c, record))):
            for which, register in enumerate(registers):
                column, half = divmod(which % 4, 2)
                two = utils.bitcast(register, ir.VectorType.get((2,), ir.BF16Type.get()))
                outs[which // 4][0, 2 * step + column, 0, 0, half, 0, 0, 0, 0] = two
        return tuple(
            fa.FragmentedArray(_registers=out, _layout=layout, _is_signed=None) for out in outs
        )

    return expand


def multiply(c: fragments.Carrier, tokens: int):
    """Return ``multiply(record, x, sums) -> sums + weights @ x^T`` by warp-level instructions.

    For few tokens: wgmma takes as long for 8 tokens as for 64.

    Args:
      c: how the record is written.
      tokens: rows of x, a multiple of 8.

    Returns:
      A function of a record, of x bfloat16 (tokens, 128) in shared memory, swizzled by 128 bytes,
      and of float32 sums (64, tokens). Threads may still be reading both when it returns: `settle`.
    """
    wgmma = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((fragments.ROWS, tokens), jnp.dtype(jnp.float32), layout=wgmma)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(swizzled(128, 2)), wgmma), return_type=result
    )
    def run(_, record, x, sums):
        lane = arith.andi(utils.thread_idx(), const(31))
        row, matrix = arith.andi(lane, const(7)), arith.shrui(lane, const(3))
        start = arith.addi(address(x), arith.muli(row, const(128)))
        # With one tile of tokens two chains of products overlap their latencies; and products with
        # a second operand are so small that they would lose their last places to the sums.
        chains = [sums.registers.copy() for _ in range(2 if tokens == 8 or operands(c) == 2 else 1)]
        for i in np.ndindex(chains[-1].shape) if len(chains) == 2 else ():
            chains[1][i] = utils.c(0.0, ir.VectorType.get((2,), ir.F32Type.get()))
        # Two steps of 16 columns are four matrices of 8 x 8: chunks of 16 bytes, swizzled by row.
        x_parts = {}
        for pair, tile in ((p, t) for p in range(4) for t in range(tokens // 8)):
            chunk = arith.xori(arith.addi(matrix, const(4 * (pair % 2))), row)
            at = arith.addi(start, arith.muli(chunk, const(16)))
            at = arith.addi(at, const(2048 * tile + 1024 * (pair // 2)))
            x_parts[pair, tile] = asm(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
                4,
                at,
                volatile=True,
            )
        for step, registers in enumerate(fragments_of(c, *load(c, record))):
            for tile in range(tokens // 8):
                halves = x_parts[step // 2, tile][2 * (step % 2) :][:2]
                places = [(0, tile, 0, 0, half, 0, 0, 0, 0) for half in (0, 1)]
                for first in range(0, len(registers), 4):
                    out = chains[(first // 4 if operands(c) == 2 else step) % len(chains)]
                    before = [llvm.extractelement(out[i], const(e)) for i in places for e in (0, 1)]
                    after = _mma(before, registers[first : first + 4], halves)
                    for place, two in zip(places, (after[:2], after[2:]), strict=True):
                        out[place] = vector(*two)
        out = chains[0]
        for i in np.ndindex(out.shape) if len(chains) == 2 else ():
            out[i] = arith.addf(out[i], chains[1][i])
        return fa.FragmentedArray(_registers=out, _layout=sums.layout, _is_signed=None)

    return run


@plgpu.inline_mgpu()
def settle(_):
    """Wait until all threads of the warpgroup have read what they loaded."""
    utils.warpgroup_barrier()


def vector(low, high):
    """Two float32 values as a vector."""
    both = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for e, value in enumerate((low, high)):
        both = llvm.insertelement(both, value, const(e))
    return both


def _mma(sums, weights, x):
    """One m16n8k16 product: four sums, four registers of weights, two of x."""
    kind = llvm.StructType.get_literal([ir.F32Type.get()] * 4)
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7},"
        " {$8,$9}, {$10,$11,$12,$13};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    out = cast(ir.Value, llvm.inline_asm(kind, [*weights, *x, *sums], code, constraints))
    return [llvm.extractvalue(ir.F32Type.get(), out, [i]) for i in range(4)]


def fragments_of(c: fragments.Carrier, words, scales):
    """The registers of each step of 16 columns, from `load`: four, or eight for two operands."""
    code, count = WORDS[c.kind], operands(c)
    for first in range(0, STEPS, 2):
        groups = [step * c.groups // STEPS for step in (first, first + 1)]
        rows = []
        for half in (0, 1):
            of_group = {group: _scale(c, scales[half], group) for group in groups}
            pair = [of_group[group] for group in groups]
            rows.append(asm(code, 4 * count, words[first + half], *pair))
        for step in (0, 1):
            starts = [4 * part + 2 * step + column for part in range(count) for column in (0, 1)]
            yield [row[start] for start in starts for row in rows]


def plain(c: fragments.Carrier, record):
    """As `to_bfloat16`, in jax.numpy."""
    words, tail = record[:, :64][: fragments.CODE_LINES], record[fragments.CODE_LINES :]
    codes = fragments._codes_of_words(c, words[None, None])
    stored = fragments._stored_of_words(c, tail[None, None])
    if c.kind == "int4":
        scale = lax.bitcast_convert_type(stored.astype(jnp.uint16), jnp.bfloat16)
        value = 2 * codes.astype(jnp.float32) - 15
    elif c.kind == "nvint4":
        field = ((stored >> 3) & 15).astype(jnp.float32)
        scale = (1 + (stored & 7) / 8) * 2.0 ** (field - fragments.TOP_FIELD)
        scale = jnp.where(stored & 0x7F == 0x7F, jnp.nan, scale)
        scale = jnp.where(stored & 0x80 > 0, -scale, scale)
        value = codes.astype(jnp.float32) - 8
    else:
        shift, base = SPREAD[c.kind]
        bits = ((stored << shift) + base).astype(jnp.uint16)
        scale = lax.bitcast_convert_type(bits, jnp.bfloat16)
        exponent, mantissa = (codes >> 1) & 3, codes & 1
        # value * 2**-126 would be subnormal: split the power over both factors
        magnitude = jnp.where(
            exponent == 0,
            mantissa * 0.5,
            (1 + 0.5 * mantissa) * 2.0 ** (exponent.astype(jnp.float32) - 1),
        )
        value = jnp.where(codes >> 3 == 1, -magnitude, magnitude) * 2.0**-63
        scale = scale.astype(jnp.float32) * 2.0**-63
    product = value * jnp.repeat(scale.astype(jnp.float32), fragments.COLUMNS // c.groups, axis=-1)
    # A compiler may drop a cast there and back, and the second part with it.
    first = lax.reduce_precision(product, 8, 7)
    if operands(c) == 1:
        return (first.astype(jnp.bfloat16),)
    return first.astype(jnp.bfloat16), (product - first).astype(jnp.bfloat16)


def load(c: fragments.Carrier, record):
    """A thread's eight words, and the scale words of its two rows."""
    base = address(record)
    thread = arith.andi(utils.thread_idx(), const(127))
    at = arith.addi(base, arith.muli(thread, const(16)))
    words = [w for half in (0, 1) for w in _shared(arith.addi(at, const(2048 * half)), 4)]
    per_row = c.lines - fragments.CODE_LINES
    # warp * 8 + row of 8 is the thread number without its two lowest bits
    row = arith.muli(arith.shrui(thread, const(2)), const(8 * per_row))
    first = arith.addi(arith.addi(base, row), const(256 * fragments.CODE_LINES))
    scales = _shared(first, 2 * per_row)
    return words, (scales[:per_row], scales[per_row:])


def _scale(c: fragments.Carrier, words, group):
    """The bfloat16 scale of one group, twice in a register."""
    if c.kind == "int4":
        word, selector = words[group // 2], HALF[group % 2]
        return asm(f"prmt.b32 $0,$1,$1,{selector};", 1, word)[0]
    if c.kind == "nvint4":
        code = SIGNED.replace("SELECT", str(SIGNED_BYTE[group % 4]))
        return asm(code, 1, words[group // 4])[0]
    shift, base = SPREAD[c.kind]
    word, selector = words[group // 4], BYTE[group % 4]
    code = (
        f"{{ .reg .b32 t; prmt.b32 t,$1,0,{selector};"
        f" mad.lo.u32 $0,t,{1 << shift},{base * 0x10001}; }}"
    )
    return asm(code, 1, word)[0]


def _shared(at, count):
    """Load ``count`` consecutive words, at once."""
    names = ",".join(f"${i}" for i in range(count))
    return asm(f"ld.shared.v{count}.b32 {{{names}}}, [${count}];", count, at, volatile=True)
