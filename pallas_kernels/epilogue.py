"""From wgmma accumulators to packed codes and scales: the register part of the kernel.

`encode_tile` emits the instructions of `group_scales` and `code_words` for one tile; `plain` is its
twin in `jax.numpy`, which the kernel uses under interpretation and which equals the definition by
construction. The tests on a GPU compare the two.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import code_words, group_scales, repack
from pallas_kernels.inlined import lane_value
from pallas_kernels.quad import Quad, const

CHUNK = 32  # columns that a quad packs into four words, one a lane


def plain(fmt, layout, y, g):
    """Codes (M, K/2) and scale words of float32 tiles y (M, K), in jax.numpy."""
    codes, scales = fmt.encode(y, g)
    word = jnp.uint16 if scales.dtype == jnp.bfloat16 else jnp.uint8
    scales = lax.bitcast_convert_type(scales, word)
    return repack.pack(codes, layout), scales if layout == "interchange" else scales.T


def encode_tile(fmt, rows, blocks, layout):
    """Return ``encode(scales, *per_row, *accumulators) -> codes`` for a tile in registers.

    ``codes = pack(round(y * g / s))``, ``s = rule(y)`` per group of y.

    Args:
      fmt: the number format.
      rows: rows of the tile, a multiple of 64.
      blocks: widths of the accumulators; they sum to a multiple of four groups.
      layout: "interchange" or "kernel".

    Returns:
      A function of the slice of memory, shared or global, that takes the tile's scales, (rows,
      groups) or transposed in the kernel layout; of three values spread over the rows: the global
      scale, and how many rows and groups of the slice exist; and of the float32 accumulators
      (rows, width). Its result is uint8 (rows, sum(blocks) / 2).

    Raises:
      NotImplementedError: no instruction sequence for this format.
    """
    group_scales.check_format(fmt)
    width = sum(blocks)
    wgmma = plgpu.Layout.WGMMA
    to_word = _word_maker(fmt, layout)
    per_chunk = CHUNK // fmt.group_size
    lanes = fa.WGMMA_LAYOUT_8BIT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[wgmma.reduce(1)] * 3, *[wgmma] * len(blocks)),
        return_type=plgpu.ShapeDtypeStruct(
            (rows, width // 2), jnp.uint8, layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def encode(_, scales, *operands):
        quad = Quad()
        g, *exist = (lane_value(v) for v in operands[:3])
        store = _scale_store(scales, quad, exist, layout)
        out = np.empty(lanes.registers_shape((rows, width // 2)), dtype=object)
        for tile, half in np.ndindex(rows // 64, 2):
            row = 64 * tile + 8 * half
            chunks = _chunks(operands[3:], tile, half)
            factors = _factors(fmt, quad, chunks, g, lambda b, group, r=row: store(b, r, group))
            for c, chunk in enumerate(chunks):
                pair = (factors[c * per_chunk], factors[(c + 1) * per_chunk - 1])
                word = code_words.drop_bad_groups(to_word(pair, chunk), pair, layout)
                word = code_words.exchange_bytes(quad, word, layout)
                four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
                out[tile, c, 0, 0, half, 0, 0, 0, 0] = utils.bitcast(word, four)
        return fa.FragmentedArray(_registers=out, _layout=lanes, _is_signed=False)

    return encode


def _word_maker(fmt, layout):
    if fmt.element.name == "int4_midrise":
        return lambda factors, values: code_words.int4_word(factors, values, layout)
    # Rules under which amax can land beyond 6: an E4M3 scale may be rounded down.
    saturate = fmt.rule == "ocp_floor" or fmt.scale_dtype == "e4m3"
    return lambda factors, values: code_words.e2m1_word(factors, values, saturate, layout)


def _factors(fmt, quad, chunks, g, store):
    """Find and store the scales of one row's groups; return every group's factor."""
    size = 8 * fmt.group_size // CHUNK
    groups = [chunk[i : i + size] for chunk in chunks for i in range(0, 8, size)]
    factors = []
    for first in range(0, len(groups), 4):
        stored, factor = group_scales.scales_of_row(fmt, quad, groups[first : first + 4], g)
        store(stored, first)
        factors += quad.gather4(factor)
    return factors


def _chunks(accumulators, tile, half):
    """The lane's values of one row, eight a 32-column chunk: columns 8j+2q, 8j+2q+1."""
    pairs = []
    for acc in accumulators:
        count = acc.registers.shape[1]
        pairs += [acc.registers[tile, j, 0, 0, half, 0, 0, 0, 0] for j in range(count)]
    flat = [vector.extract(p, [], [e]) for p in pairs for e in range(2)]
    return [flat[i : i + 8] for i in range(0, len(flat), 8)]


def _scale_store(ref, quad, exist, layout):
    """Return ``store(bits, row, group)``: lane q writes group ``group + q`` of its row."""
    ref_type = ir.MemRefType(ref.type)
    size = utils.bitwidth(ref_type.element_type)
    generic = llvm.addrspacecast(llvm.PointerType.get(), utils.memref_ptr(ref))
    base = llvm.ptrtoint(ir.IntegerType.get_signless(64), generic)
    strides = [stride * size // 8 for stride in ref_type.get_strides_and_offset()[0]]
    by_row, by_group = strides if layout == "interchange" else strides[::-1]
    origin = arith.addi(arith.muli(quad.row, const(by_row)), arith.muli(quad.lane, const(by_group)))
    # A 16-bit store wants a 16-bit register.
    narrow, name = ("", "$2") if size == 8 else (".reg .b16 h; cvt.u16.u32 h, $2;", "h")
    rows, groups = exist

    def store(bits, row, group):
        offset = arith.addi(origin, const(row * by_row + group * by_group))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [
                *(base, offset, bits),
                *(arith.addi(quad.row, const(row)), rows),
                *(arith.addi(quad.lane, const(group)), groups),
            ],
            f"{{ .reg .pred p; .reg .b64 a; {narrow} cvt.s64.s32 a, $1; add.s64 a, a, $0;"
            " setp.lt.s32 p, $3, $4; setp.lt.and.s32 p, $5, $6, p;"
            f" @p st.b{size} [a], {name}; }}",
            "l,r,r,r,r,r,r,~{memory}",
            has_side_effects=True,
        )

    return store
