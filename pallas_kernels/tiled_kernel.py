"""Packed weights times many activations: a persistent, warp-specialized Mosaic GPU kernel.

``out = factor * x @ expand(records)^T``, tile by tile of ``64 * warpgroups`` weights and ``tokens``
activations. One warpgroup only fetches; each of the others holds 64 rows of weights and all shared
activations of a tile:

    TMA ring: a step of activations, a record a warpgroup
    -> registers: codes to bfloat16 or FP8 (`expand`) -> wgmma -> scale, transpose -> TMA store

Sums of FP8 products leave the tensor core's short accumulator every few steps, or, where fewer bits
will do, at the end. The fetching warpgroup runs ahead over the ends of tiles. Where tiles are too
few for all multiprocessors K is cut and the parts are added afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import expand, fragments
from pallas_kernels.inlined import scalars, swizzled
from pallas_kernels.tiles import SHARED_MEMORY, Tiling

FETCH_REGISTERS = 40
PROMOTED = 4  # steps of 128 columns that are summed in 14 bits


@functools.partial(jax.jit, static_argnames=("tiling", "out_dtype", "fast"))
def matmul(x, weight, divisor, tiling: Tiling, *, out_dtype=jnp.bfloat16, fast=False):
    """Return ``unit / global_scale / divisor * x @ expand(records)^T``.

    Args:
      x: bfloat16 (M, K), K a multiple of 64; or float8_e5m2, K a multiple of 128, for MXFP4.
      weight: `fragments.Fragments` (N, K).
      divisor: float32 scalar.
      tiling: how to divide the work.
      out_dtype: of the result.
      fast: leave sums of FP8 products in the tensor core's short accumulator.

    Returns:
      (M, N).
    """
    c, records = fragments.carrier(weight.format), weight.records
    m, rows = x.shape[0], weight.shape[0]
    if m % 8:  # TMA's view of a swizzled tile splits M by 8 rows
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    wide = rows + -rows % fragments.ROWS  # and N by 64 columns
    dtype = jnp.dtype(jnp.float32 if tiling.cuts > 1 else out_dtype)
    while tiling.shared_memory(c.lines, x.dtype.itemsize, dtype.itemsize) > SHARED_MEMORY:
        fewer = (
            {"stages": tiling.stages - 1} if tiling.stages > 2 else {"tokens": tiling.tokens // 2}
        )
        tiling = dataclasses.replace(tiling, **fewer)
    tiles, steps = records.shape[:2]
    n = tiling.warpgroups
    tasks = -(-tiles // n) * -(-m // tiling.tokens) * tiling.cuts
    tiling = dataclasses.replace(tiling, ctas=min(tiling.ctas, tasks))
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM(
            (tiling.stages, tiling.tokens, fragments.COLUMNS),
            x.dtype,
            transforms=swizzled(128, x.dtype.itemsize),
        ),
        w_s=plgpu.SMEM((tiling.stages, n, c.lines, 64), jnp.uint32),
        out_s=plgpu.SMEM(
            (n, tiling.tokens, fragments.ROWS), dtype, transforms=swizzled(128, dtype.itemsize)
        ),
        full=plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=2),
        empty=plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=n),
    )
    run = plgpu.kernel(
        functools.partial(_body, c, tiling, tiles, steps, fast),
        out_type=jax.ShapeDtypeStruct((tiling.cuts, x.shape[0], wide), dtype),
        grid=(tiling.ctas,),
        grid_names=("cta",),
        num_threads=n + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    y = run(x, records, *scalars([weight.unit, weight.global_scale, divisor]))
    y = y[0] if tiling.cuts == 1 else jnp.sum(y, axis=0).astype(out_dtype)
    return y[:m, :rows]


def _body(
    c,
    tiling,
    tiles,
    steps,
    fast,
    x_g,
    w_g,
    unit_g,
    scale_g,
    divisor_g,
    out_g,
    *,
    x_s,
    w_s,
    out_s,
    full,
    empty,
):
    n, tokens, cuts, ctas = tiling.warpgroups, tiling.tokens, tiling.cuts, tiling.ctas
    short = x_s.dtype.itemsize == 1
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    m_tiles = -(-x_g.shape[0] // tokens)
    tasks = -(-tiles // n) * m_tiles * cuts
    mine = (tasks - cta + ctas - 1) // ctas
    per = -(-steps // cuts)
    total = mine * per

    def place(task):
        """Row group, token tile and cut; neighbours share weights."""
        at = cta + task * ctas
        return at // (m_tiles * cuts), lax.rem(at // cuts, m_tiles), lax.rem(at, cuts)

    def fetch(i, _):
        slot = lax.rem(i, tiling.stages)
        group, m_tile, cut = place(i // per)
        step = cut * per + lax.rem(i, per)

        pl.when(i >= tiling.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        rows = pl.ds(pl.multiple_of(m_tile * tokens, tokens), tokens)
        columns = pl.ds(
            pl.multiple_of(step * fragments.COLUMNS, fragments.COLUMNS), fragments.COLUMNS
        )
        plgpu.copy_gmem_to_smem(x_g.at[rows, columns], x_s.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(w_g.at[pl.ds(group * n, n), step], w_s.at[slot], full.at[slot])

    @pl.when(wg == n)
    def fetching():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        lax.fori_loop(0, total, fetch, None)

    @pl.when(wg < n)
    def computing():
        plgpu.set_max_registers(_registers(n), action="increase")
        unpack = (expand.to_float8 if short else expand.to_bfloat16)(c)
        factor = unit_g[0] / scale_g[0] / divisor_g[0]
        accumulator = plgpu.ACC((fragments.ROWS, tokens), jnp.float32)

        def one_task(task, _):
            def products(first, until, acc):
                def advance(s, _):
                    slot = lax.rem(task * per + s, tiling.stages)
                    plgpu.barrier_wait(full.at[slot])
                    for w in unpack(w_s.at[slot, wg]):
                        plgpu.wgmma(acc, w, x_s.at[slot].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                lax.fori_loop(first, until, advance, None)
                return acc[...]

            def part(i, sums):
                steps = i * PROMOTED, jnp.minimum((i + 1) * PROMOTED, per)
                return sums + pl.run_scoped(functools.partial(products, *steps), accumulator)

            if short and not fast:
                sums = plgpu.layout_cast(
                    jnp.zeros((fragments.ROWS, tokens), jnp.float32), plgpu.Layout.WGMMA
                )
                sums = lax.fori_loop(0, -(-per // PROMOTED), part, sums)
            else:
                sums = pl.run_scoped(functools.partial(products, 0, per), accumulator)
            y = (sums * factor).astype(out_s.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s.at[wg].T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            group, m_tile, cut = place(task)
            at = pl.ds(pl.multiple_of(m_tile * tokens, tokens), tokens)
            row = pl.multiple_of((group * n + wg) * fragments.ROWS, fragments.ROWS)
            plgpu.copy_smem_to_gmem(out_s.at[wg], out_g.at[cut, at, pl.ds(row, fragments.ROWS)])

        lax.fori_loop(0, mine, one_task, None)
        plgpu.wait_smem_to_gmem(0)


def _registers(warpgroups: int) -> int:
    """Registers that a computing thread may take: what the fetching warpgroup leaves."""
    launched = 65536 // 128 // (warpgroups + 1) // 8 * 8 * (warpgroups + 1)
    return min(232, (launched - FETCH_REGISTERS) // warpgroups // 8 * 8)
