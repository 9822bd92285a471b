"""From wgmma accumulators to packed codes and scales: the register part of the kernel.

`encode_tile` emits the instructions of `group_scales` and `code_words` for one tile; `plain` is its
twin in `jax.numpy`, which the kernel uses under interpretation and which equals the definition by
construction. The tests on a GPU compare the two.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import repack
from pallas_kernels.hopper import code_words, group_scales
from pallas_kernels.hopper.inlined import CLUSTER_WAIT, address, generic_address, lane_value
from pallas_kernels.hopper.quad import Quad, asm, const, i32, run

CHUNK = 32  # columns that a quad packs into four words, one a lane
TOGETHER = 15  # a hardware barrier: the lower ones belong to single warpgroups


def plain(fmt, layout, y, g):
    """Codes (M, K/2) and scale words of float32 tiles y (M, K), in jax.numpy."""
    codes, scales = fmt.encode(y, g)
    if layout in repack.POWERED and fmt.element.name == "e4m3":
        values, powers = repack.e4m3_to_float8(codes, scales, 512)
        if layout == "float8_values":
            values = fmt.decode(codes, scales, jnp.float32(1)).astype(jnp.bfloat16)
        else:
            values = lax.bitcast_convert_type(values, jnp.uint8)
        return values, powers[:, : len(y)]
    if layout == "float8":
        values, powers = repack.to_float8(repack.pack(codes, "lanes"), scales, y.shape[1])
        return lax.bitcast_convert_type(values, jnp.uint8), powers[:, : len(y)]
    word = jnp.uint16 if scales.dtype == jnp.bfloat16 else jnp.uint8
    stored = lax.bitcast_convert_type(scales, word)
    if layout == "values":
        return fmt.decode(codes, scales, jnp.float32(1)).astype(jnp.bfloat16), stored
    return repack.pack(codes, layout), stored.T if layout == "kernel" else stored


def encode_tile(fmt, rows, blocks, layout, beside=1, cluster=1):
    """Return ``encode(scales, *per_row, *accumulators) -> codes`` for a tile in registers.

    ``codes = pack(round(y * g / s))``, ``s = rule(y)`` per group of y.

    Args:
      fmt: the number format.
      rows: rows of the tile, a multiple of 64.
      blocks: widths of the accumulators; they sum to a multiple of four groups.
      layout: as for `quantize_kernel.transform_quantize`; for "float8" the width is 128.
      beside: warpgroups, all of a CTA, that find the power of a row together.
      cluster: CTAs of one warpgroup that do, once, after `inlined.cluster_arrive`.

    Returns:
      A function of the slice of memory, shared or global, that takes the tile's scales, (rows,
      groups) or transposed in the kernel layout; if several find powers together, of shared memory
      int32 (as many, 64), not that of the call before; of three values spread over the rows: the
      global scale, and how many rows and groups of the slice exist; and of the accumulators float32
      (rows, width). Its result is uint8 (rows, sum(blocks) / 2); bfloat16 (rows, sum(blocks)) for
      values, bytes (rows, sum(blocks)) for "float8".

    Raises:
      NotImplementedError: no instruction sequence for this format.
    """
    group_scales.check_format(fmt)
    width = sum(blocks)
    wgmma = plgpu.Layout.WGMMA
    per_chunk = CHUNK // fmt.group_size
    valued, powered = "values" in layout, layout in repack.POWERED
    wide = fmt.element.name == "e4m3"
    if valued:
        lanes, shape = fa.WGMMA_LAYOUT, (rows, width)
        result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=wgmma)
    else:
        lanes, shape = fa.WGMMA_LAYOUT_8BIT, (rows, width if layout == "float8" else width // 2)
        result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.uint8), layout=plgpu.Layout.WGMMA_8BIT)

    shared = 1 if beside > 1 or cluster > 1 else 0
    together = _over_cluster if cluster > 1 else _over_warpgroups

    @plgpu.inline_mgpu(
        arg_types=(
            *[plgpu.RefType()] * (1 + shared),
            *[wgmma.reduce(1)] * 3,
            *[wgmma] * len(blocks),
        ),
        return_type=result,
    )
    def encode(_, scales, *operands):
        tops, operands = operands[:shared], operands[shared:]
        quad = Quad()
        g, *exist = (lane_value(v) for v in operands[:3])
        store = _scale_store(scales, quad, exist, layout)
        out = np.empty(lanes.registers_shape(shape), dtype=object)
        rows_of = {
            (tile, half): (64 * tile + 8 * half, _chunks(operands[3:], tile, half))
            for tile, half in np.ndindex(rows // 64, 2)
        }
        if wide:
            found = _of_rows(fmt, quad, g, rows_of, store, together, *tops)
        else:
            found = {
                at: _factors(
                    *(fmt, quad, chunks, g),
                    lambda b, group, r=row: None if powered else store(b, r, group),
                    with_bits=valued or powered,
                )
                for at, (row, chunks) in rows_of.items()
            }
        if powered and not wide:
            found = _to_float8(quad, found, rows_of, store, *tops)
        for (tile, half), (_, chunks) in rows_of.items():
            of_row = found[tile, half]
            for c, chunk in enumerate(chunks):
                ends = of_row[c * per_chunk], of_row[(c + 1) * per_chunk - 1]
                registers = _output(fmt, layout, quad, ends, chunk)
                for i, register in enumerate(registers):
                    out[tile, len(registers) * c + i, 0, 0, half, 0, 0, 0, 0] = register
        signed = None if valued else False
        return fa.FragmentedArray(_registers=out, _layout=lanes, _is_signed=signed)

    return encode


def _output(fmt, layout, quad, ends, chunk):
    """A lane's registers of one chunk: a word of codes, or four of two values.

    ``ends`` are (stored bits, factor) of the chunk's first and last group; for "float8" what
    takes rounded values to FP8 in place of the bits.
    """
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    if fmt.element.name == "e4m3":
        power, factor = ends[0]
        if layout == "float8_values":
            return [utils.bitcast(w, two) for w in code_words.e4m3_values(factor, power, chunk)]
        return [utils.bitcast(w, four) for w in code_words.e4m3_float8(factor, chunk)]
    factors = tuple(factor for _, factor in ends)
    # Rules under which amax can land beyond 6: an E4M3 scale may be rounded down.
    saturate = fmt.rule == "ocp_floor" or fmt.scale_dtype == "e4m3"
    whole = fmt.element.name == "int4_full"
    if layout == "values":
        scales = [group_scales.value_scale(fmt, bits) for bits, _ in ends]
        rounding = code_words.ROUND_INT if whole else code_words.rounding(saturate)
        words = code_words.four_bit_values(factors, scales, chunk, rounding)
        return [utils.bitcast(word, two) for word in words]
    if layout == "float8":
        words = code_words.e2m1_float8(factors, [scale for scale, _ in ends], chunk, saturate)
        return [utils.bitcast(word, four) for word in words]
    if whole or fmt.element.name == "int4_midrise":
        word = code_words.int4_word(factors, chunk, layout, midrise=not whole)
    else:
        word = code_words.e2m1_word(factors, chunk, saturate, layout)
    word = code_words.drop_bad_groups(word, factors, layout)
    word = code_words.exchange_bytes(quad, word, layout)
    return [utils.bitcast(word, four)]


def _of_rows(fmt, quad, g, rows_of, store, together, tops=None):
    """(Power, factor) of each row, one for all warpgroups that share ``tops``; stores powers."""
    largest = {}
    for at, (_, chunks) in rows_of.items():
        amax = group_scales.absmax([value for chunk in chunks for value in chunk])
        largest[at] = utils.bitcast(quad.reduce(amax, group_scales.fmax), i32())
    if tops is not None:
        largest = together(quad, largest, rows_of, tops)
    found = {at: [group_scales.e4m3_power(top, g, fmt.rule)] for at, top in largest.items()}
    for at, [(power, _)] in found.items():
        store(utils.bitcast(power, i32()), rows_of[at][0], 0)
    return found


def _to_float8(quad, found, rows_of, store, tops=None):
    """(Scale to FP8, factor) of each group of each row, from (stored bits, factor).

    Stores the rows' powers, of the largest scale of all warpgroups that share ``tops``.
    """
    largest = {
        at: group_scales.largest([bits for bits, _ in of_row]) for at, of_row in found.items()
    }
    if tops is not None:
        largest = _over_warpgroups(quad, largest, rows_of, tops)
    out = {}
    for at, of_row in found.items():
        store(group_scales.float8_power(largest[at]), rows_of[at][0], 0)
        out[at] = [
            (group_scales.float8_scale(bits, largest[at]), factor) for bits, factor in of_row
        ]
    return out


def _over_warpgroups(quad, largest, rows_of, tops):
    """Each row's largest number over all warpgroups of a CTA, through shared memory."""
    beside, rows = ir.MemRefType(tops.type).shape
    start = arith.addi(address(tops), arith.muli(quad.row, const(4)))
    wg = utils.warpgroup_idx(sync=False)
    mine = arith.addi(start, arith.muli(wg, const(4 * rows)))
    for at, top in largest.items():
        # The four lanes of a row write the same.
        run("st.shared.b32 [$0], $1;", arith.addi(mine, const(4 * rows_of[at][0])), top)
    run(f"bar.sync {TOGETHER}, {128 * beside};")
    return {at: _largest_of(start, beside, rows, rows_of[at][0]) for at in largest}


def _largest_of(start, count, rows, row):
    """The largest of a row's numbers in shared memory, (count, rows) from ``start``."""
    found = [
        asm("ld.shared.b32 $0, [$1];", 1, arith.addi(start, const(offset)), volatile=True)[0]
        for offset in (4 * (rows * i + row) for i in range(count))
    ]
    return functools.reduce(arith.maxsi, found)


def _over_cluster(quad, largest, rows_of, tops):
    """As `_over_warpgroups`, over the CTAs of a cluster: a quad's lanes write to one each."""
    count, rows = ir.MemRefType(tops.type).shape
    assert count == 4
    start = arith.addi(address(tops), arith.muli(quad.row, const(4)))
    rank = asm("mov.u32 $0, %cluster_ctarank;", 1)[0]
    mine = arith.addi(start, arith.muli(rank, const(4 * rows)))
    run(CLUSTER_WAIT)
    for at, top in largest.items():
        run(
            "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.b32 [a], $2; }",
            *(arith.addi(mine, const(4 * rows_of[at][0])), quad.lane, top),
        )
    run("barrier.cluster.arrive.release.aligned;")
    run(CLUSTER_WAIT)
    return {at: _largest_of(start, count, rows, rows_of[at][0]) for at in largest}


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
    by_row, by_group = strides[::-1] if layout in repack.TRANSPOSED else strides
    origin = arith.addi(arith.muli(quad.row, const(by_row)), arith.muli(quad.lane, const(by_group)))
    # A 16-bit store wants a 16-bit register.
    narrow, name = (".reg .b16 h; cvt.u16.u32 h, $2;", "h") if size == 16 else ("", "$2")
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
