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
from pallas_kernels.inlined import generic_address, lane_value
from pallas_kernels.quad import Quad, const

CHUNK = 32  # columns that a quad packs into four words, one a lane


def plain(fmt, layout, y, g):
    """Codes (M, K/2) and scale words of float32 tiles y (M, K), in jax.numpy."""
    codes, scales = fmt.encode(y, g)
    word = jnp.uint16 if scales.dtype == jnp.bfloat16 else jnp.uint8
    stored = lax.bitcast_convert_type(scales, word)
    if layout == "values":
        return fmt.decode(codes, scales, jnp.float32(1)).astype(jnp.bfloat16), stored
    return repack.pack(codes, layout), stored.T if layout == "kernel" else stored


def encode_tile(fmt, rows, blocks, layout):
    """Return ``encode(scales, *per_row, *accumulators) -> codes`` for a tile in registers.

    ``codes = pack(round(y * g / s))``, ``s = rule(y)`` per group of y.

    Args:
      fmt: the number format.
      rows: rows of the tile, a multiple of 64.
      blocks: widths of the accumulators; they sum to a multiple of four groups.
      layout: as for `quantize_kernel.transform_quantize`.

    Returns:
      A function of the slice of memory, shared or global, that takes the tile's scales, (rows,
      groups) or transposed in the kernel layout; of three values spread over the rows: the global
      scale, and how many rows and groups of the slice exist; and of the float32 accumulators
      (rows, width). Its result is uint8 (rows, sum(blocks) / 2), or bfloat16 (rows, sum(blocks)).

    Raises:
      NotImplementedError: no instruction sequence for this format.
    """
    group_scales.check_format(fmt)
    width = sum(blocks)
    wgmma = plgpu.Layout.WGMMA
    per_chunk = CHUNK // fmt.group_size
    if layout == "values":
        lanes, shape = fa.WGMMA_LAYOUT, (rows, width)
        result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=wgmma)
    else:
        lanes, shape = fa.WGMMA_LAYOUT_8BIT, (rows, width // 2)
        result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.uint8), layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[wgmma.reduce(1)] * 3, *[wgmma] * len(blocks)),
        return_type=result,
    )
    def encode(_, scales, *operands):
        quad = Quad()
        g, *exist = (lane_value(v) for v in operands[:3])
        store = _scale_store(scales, quad, exist, layout)
        out = np.empty(lanes.registers_shape(shape), dtype=object)
        for tile, half in np.ndindex(rows // 64, 2):
            row = 64 * tile + 8 * half
            chunks = _chunks(operands[3:], tile, half)
            found = _factors(
                *(fmt, quad, chunks, g),
                lambda b, group, r=row: store(b, r, group),
                with_bits=layout == "values",
            )
            for c, chunk in enumerate(chunks):
                ends = found[c * per_chunk], found[(c + 1) * per_chunk - 1]
                for i, register in enumerate(_output(fmt, layout, quad, ends, chunk)):
                    column = 4 * c + i if layout == "values" else c
                    out[tile, column, 0, 0, half, 0, 0, 0, 0] = register
        signed = None if layout == "values" else False
        return fa.FragmentedArray(_registers=out, _layout=lanes, _is_signed=signed)

    return encode


def _output(fmt, layout, quad, ends, chunk):
    """A lane's registers of one chunk: a word of codes, or four of two values.

    ``ends`` are (stored bits, factor) of the chunk's first and last group.
    """
    factors = tuple(factor for _, factor in ends)
    # Rules under which amax can land beyond 6: an E4M3 scale may be rounded down.
    saturate = fmt.rule == "ocp_floor" or fmt.scale_dtype == "e4m3"
    if layout == "values":
        scales = [group_scales.value_scale(fmt, bits) for bits, _ in ends]
        words = code_words.e2m1_values(factors, scales, chunk, saturate)
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        return [utils.bitcast(word, two) for word in words]
    if fmt.element.name == "int4_midrise":
        word = code_words.int4_word(factors, chunk, layout)
    else:
        word = code_words.e2m1_word(factors, chunk, saturate, layout)
    word = code_words.drop_bad_groups(word, factors, layout)
    word = code_words.exchange_bytes(quad, word, layout)
    return [utils.bitcast(word, ir.VectorType.get((4,), ir.IntegerType.get_signless(8)))]


def _factors(fmt, quad, chunks, g, store, with_bits):
    """Find and store the scales of one row's groups; return every group's bits and factor."""
    size = 8 * fmt.group_size // CHUNK
    groups = [chunk[i : i + size] for chunk in chunks for i in range(0, 8, size)]
    factors: list = []
    for first in range(0, len(groups), 4):
        stored, factor = group_scales.scales_of_row(fmt, quad, groups[first : first + 4], g)
        store(stored, first)
        bits = quad.gather4(stored) if with_bits else [None] * 4
        factors += zip(bits, quad.gather4(factor), strict=True)
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
    base = generic_address(ref)
    strides = [stride * size // 8 for stride in ref_type.get_strides_and_offset()[0]]
    by_row, by_group = strides[::-1] if layout == "kernel" else strides
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
