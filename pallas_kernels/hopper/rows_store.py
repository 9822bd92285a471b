"""From a tile in shared memory to rows of an array that start anywhere and end within the tile."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import fragments
from pallas_kernels.hopper.inlined import (
    SCALAR,
    address,
    generic_address,
    lane_value,
    spread,
    swizzled,
)
from pallas_kernels.hopper.quad import const, run

LINE = 128  # bytes that are swizzled together
THREADS = 128


def store(tokens: int, width: int, dtype):
    """Return ``put(tile, out, row, column, valid)``: what exists of a tile, to global memory.

    A warpgroup stores whole lines, eight threads 128 bytes of a row; TMA would write the rows of
    the next group, too.

    Args:
      tokens: rows of the tile.
      width: N, columns of the result.
      dtype: of both.

    Returns:
      A function of the tile (tokens, 64) in shared memory, swizzled by 128 bytes, of the result in
      global memory, of the place of the tile's first value there, and of how many rows exist from
      there on.
    """
    dtype = jnp.dtype(dtype)
    size = math.gcd(16, width * dtype.itemsize)  # bytes of a piece
    per_line = LINE // size
    lines = fragments.ROWS * dtype.itemsize // LINE  # of a row, in tiles of 8 rows each
    wide = min(16, lines * per_line)  # threads side by side
    high = THREADS // wide  # 8 or 16: whole tiles
    kinds = {16: ("v4.b32", "{a,b,c,d}"), 8: ("v2.b32", "{a,b}"), 4: ("b32", "a"), 2: ("b16", "h")}
    kind, names = kinds[size]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(LINE, dtype.itemsize)), plgpu.RefType(), *[SCALAR] * 3)
    )
    def emit(_, tile, out, row, column, valid):
        row, column, valid = (lane_value(v) for v in (row, column, valid))
        utils.warpgroup_barrier()  # all have written the tile
        thread = arith.andi(utils.thread_idx(), const(THREADS - 1))
        token, side = arith.divui(thread, const(wide)), arith.remui(thread, const(wide))
        eighth = arith.remui(token, const(8))
        left = arith.subi(arith.minsi(valid, const(tokens)), token)
        of_token = arith.addi(row, token)
        for begin in range(0, lines * per_line, wide):
            piece = arith.addi(side, const(begin))
            # 16 bytes of a line lie where the row's number flips bits of theirs.
            byte = arith.muli(arith.remui(piece, const(per_line)), const(size))
            byte = arith.xori(byte, arith.muli(eighth, const(16)))
            line = arith.muli(arith.divui(token, const(8)), const(lines))
            line = arith.addi(line, arith.divui(piece, const(per_line)))
            line = arith.addi(arith.muli(line, const(8)), eighth)
            source = arith.addi(address(tile), arith.addi(arith.muli(line, const(LINE)), byte))
            first = arith.addi(column, arith.muli(piece, const(size // dtype.itemsize)))
            copies = "".join(
                f" setp.gt.and.s32 p,$3,{i},q;"
                f" @p ld.shared.{kind} {names},[$0+{i * lines * LINE}];"
                f" @p st.global.{kind} [t],{names}; add.s64 t,t,{high * width * dtype.itemsize};"
                for i in range(0, tokens, high)
            )
            run(
                "{ .reg .pred p,q; .reg .b64 t,u; .reg .b32 a,b,c,d; .reg .b16 h;"
                f" cvt.s64.s32 t,$2; mul.lo.s64 t,t,{width}; cvt.s64.s32 u,$4; add.s64 t,t,u;"
                f" mul.lo.s64 t,t,{dtype.itemsize}; add.s64 t,t,$1; setp.lt.s32 q,$4,{width};"
                f"{copies} }}",
                *(source, generic_address(out), of_token, left, first),
            )
        utils.warpgroup_barrier()  # all have read it

    def put(tile, out, row, column, valid):
        emit(tile, out, *(spread(jnp.asarray(v, jnp.int32)) for v in (row, column, valid)))

    return put
