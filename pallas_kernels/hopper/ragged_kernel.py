"""Packed weights of many groups times rows sorted by group: a persistent Mosaic GPU kernel.

``out_m = factor_e * x_m @ expand(records_e)^T``, e the group of row m. As `tiled_kernel`: one
warpgroup fetches, each of the others holds 64 rows of weights and all tokens of a tile. A task is a
tile of tokens of a group and some rows of that group's weight (`group_tiles`), so weights of groups
without tokens are not read, and neighbouring tasks share the weights that they read. Rows of a tile
that belong to the next group are multiplied and not stored. Rows behind the last group get zeros.
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

from pallas_kernels import fragments
from pallas_kernels.hopper import float8, rows_store
from pallas_kernels.hopper.group_tiles import Starts, Tiles, most_tiles
from pallas_kernels.hopper.inlined import swizzled, wait_for_kernel_before
from pallas_kernels.hopper.tiled_kernel import (
    FETCH_REGISTERS,
    _bfloat16_sums,
    _float8_sums,
    _registers,
)
from pallas_kernels.hopper.tiles import PROMOTED, SHARED_MEMORY, Tiling

# Where rows are tiled by 8 TMA reads from multiples of 8; whole lines of 128 bytes from any row.
LINES = (plgpu.SwizzleTransform(128),)  # type: ignore[abstract]
ALIGNED = 4  # TMA reads from multiples of 16 bytes: so many powers


@functools.partial(jax.jit, static_argnames=("rows", "tiling", "out_dtype", "ahead"))
def matmul(
    x,
    weight,
    divisor,
    starts: Starts,
    rows: int,
    tiling: Tiling,
    *,
    powers=None,
    out_dtype=jnp.bfloat16,
    ahead=False,
):
    """Return ``unit_e / global_scale_e / divisor * x @ expand(records_e)^T``.

    Args:
      x: float8_e5m2 or float8_e4m3fn (rows that ``starts.source`` counts, K), K a multiple of 128,
        columns as `repack.to_lanes`; or bfloat16, K a multiple of 64, and the groups' rows start at
        multiples of 8.
      weight: `stacks.Stack` (G, N, K), laid out for x.
      divisor: float32 scalar.
      starts: of groups with tiles of ``tiling.tokens`` rows each.
      rows: M.
      tiling: how to divide the work, without cuts or clusters.
      powers: float32 (K/128 or K / (128 PROMOTED), at least x's rows), for FP8.
      out_dtype: of the result.
      ahead: records and starts were there before the kernel before this one started: they
        are read while it runs.

    Returns:
      (M, N).
    """
    c = fragments.carrier(weight.format, weight.operand)
    groups, n, _ = weight.shape
    dtype = jnp.dtype(out_dtype)
    tiling = _fitted(tiling, c.lines, x.dtype.itemsize, dtype.itemsize)
    held, stages = tiling.warpgroups, tiling.stages
    row_tiles, steps = weight.grid
    short = powers is not None
    if not short and x.shape[0] % 8:
        x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    tasks = most_tiles(rows, groups, tiling.tokens) * -(-row_tiles // held)
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM(
            (stages, tiling.tokens, fragments.COLUMNS),
            x.dtype,
            transforms=LINES if short else swizzled(128, x.dtype.itemsize),
        ),
        w_s=plgpu.SMEM((stages, held, c.lines, 64), jnp.uint32),
        out_s=plgpu.SMEM(
            (held, tiling.tokens, fragments.ROWS),
            dtype,
            transforms=swizzled(128, dtype.itemsize),
        ),
        full=plgpu.Barrier(num_barriers=stages, num_arrivals=2 + short),
        empty=plgpu.Barrier(num_barriers=stages, num_arrivals=held),
    )
    if short:  # TMA writes to multiples of 128 bytes
        line = tiling.tokens + ALIGNED + (-tiling.tokens - ALIGNED) % 32
        scratch["powers_s"] = plgpu.SMEM((stages, line), jnp.float32)
    run = plgpu.kernel(
        functools.partial(_body, c, tiling, ahead, groups, row_tiles, steps),
        out_type=jax.ShapeDtypeStruct((rows, n), dtype),
        grid=(min(tiling.ctas, tasks),),
        grid_names=("cta",),
        num_threads=held + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    left = (x, powers) if short else (x,)
    scale = jnp.broadcast_to(jnp.asarray(weight.global_scale, jnp.float32), (groups,))
    scalars = weight.unit, scale, jnp.asarray(divisor, jnp.float32).reshape(1)
    return run(*left, weight.records, *scalars, *starts.arrays)


def _fitted(tiling: Tiling, *sizes: int) -> Tiling:
    """Return the tiling with as many stages as fit, at least two."""
    if tiling.shared_memory(*sizes) <= SHARED_MEMORY:
        return tiling
    if tiling.stages == 2:
        raise NotImplementedError(f"{tiling} does not fit into shared memory")
    return _fitted(dataclasses.replace(tiling, stages=tiling.stages - 1), *sizes)


@dataclasses.dataclass(frozen=True)
class Task:
    """One tile of tokens by some rows of weights: numbers of the running program.

    Attributes:
      group: G for the rows behind the last.
      part: which rows of the weight.
      source: first row of x.
      row: first row of the result.
      valid: rows that belong to the group, from there on; more than a tile's if more follow.
    """

    group: Any
    part: Any
    source: Any
    row: Any
    valid: Any


def _body(c, tiling, ahead, groups, row_tiles, steps, x_g, *operands, **memory):
    powers_g: Any = None
    powers_s = memory.get("powers_s")
    if powers_s is not None:
        powers_g, operands = operands[0], operands[1:]
    w_g, unit_g, scale_g, divisor_g, *found, out_g = operands
    tiles = Tiles(Starts(*found), groups, out_g.shape[0], tiling.tokens)
    names = "x_s", "w_s", "out_s", "full", "empty"
    x_s, w_s, out_s, full, empty = (memory[name] for name in names)
    held, tokens, stages = tiling.warpgroups, tiling.tokens, tiling.stages
    parts = -(-row_tiles // held)
    wg, cta, ctas = lax.axis_index("wg"), lax.axis_index("cta"), lax.axis_size("cta")
    span = 1
    if powers_s is not None and powers_g.shape[0] != steps:
        span = PROMOTED

    def place(number):
        """The tasks of a group are neighbours: all its tiles of tokens by the first rows, ..."""
        group = tiles.group_of(lax.div(number, jnp.int32(parts)))
        first, count = tiles.of(group)
        start, end = tiles.rows_of(group)
        at = number - first * parts
        offset = lax.rem(at, count) * tokens
        source = tiles.starts.source[group] + offset
        return Task(group, lax.div(at, count), source, start + offset, end - start - offset)

    def each_task(run, carry):
        """``carry = run(number, task, carry)`` for this CTA's tasks."""
        mine = lax.div(tiles.total() * parts - cta + ctas - 1, ctas)

        def one(i, carry):
            number = cta + i * ctas
            return run(place(number), carry)

        return lax.fori_loop(0, mine, one, carry)

    def fetch_records(task, step, slot):
        rows = pl.ds(pl.multiple_of(task.part * held, held), held)
        plgpu.copy_gmem_to_smem(w_g.at[task.group, rows, step], w_s.at[slot], full.at[slot])

    def fetch_left(task, step, slot):
        source = task.source if powers_s is not None else pl.multiple_of(task.source, 8)
        columns = pl.ds(pl.multiple_of(step * fragments.COLUMNS, fragments.COLUMNS), 128)
        rows = pl.ds(source, tokens)
        plgpu.copy_gmem_to_smem(x_g.at[rows, columns], x_s.at[slot], full.at[slot])
        if powers_s is not None:
            start = pl.multiple_of(lax.div(source, ALIGNED) * ALIGNED, ALIGNED)
            at = powers_g.at[step // span, pl.ds(start, tokens + ALIGNED)]
            target = powers_s.at[slot, pl.ds(0, tokens + ALIGNED)]
            plgpu.copy_gmem_to_smem(at, target, full.at[slot])

    @pl.when(wg == held)
    def fetching():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        early = min(stages, steps) if ahead else 0
        if ahead:
            first = place(cta)

            @pl.when((cta < tiles.total() * parts) & (first.group < groups))
            def _():
                lax.fori_loop(0, early, lambda i, _: fetch_records(first, i, i), None)

        wait_for_kernel_before()

        def one_task(task, before):
            def one_step(step, _):
                i = before + step
                slot = lax.rem(i, stages)

                @pl.when(i >= early)
                def later():
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    fetch_records(task, step, slot)

                fetch_left(task, step, slot)

            count = jnp.where(task.group < groups, steps, 0)
            lax.fori_loop(0, count, one_step, None)
            return before + count

        each_task(one_task, jnp.int32(0))

    @pl.when(wg < held)
    def computing():
        plgpu.set_max_registers(_registers(held), action="increase")
        wait_for_kernel_before()

        def ready(step):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            return slot, w_s.at[slot, wg], x_s.at[slot]

        def free(step):
            plgpu.barrier_arrive(empty.at[lax.rem(step, stages)])

        if powers_s is None:
            sums_of = functools.partial(_bfloat16_sums, c, tokens, ready, free)
        else:
            multiply = float8.partial(c, tokens, float8.kind_of(x_s.dtype), LINES)
            sums_of = functools.partial(_float8_sums, multiply, tokens, ready, free, powers_s, span)
        put = rows_store.store(tokens, out_g.shape[1], out_g.dtype)

        def store(task, y):
            out_s.at[wg].T[...] = plgpu.layout_cast(
                y.astype(out_s.dtype), plgpu.Layout.WGMMA_TRANSPOSED
            )
            column = (task.part * held + wg) * fragments.ROWS
            put(out_s.at[wg], out_g, task.row, column, task.valid)

        def one_task(task, before):
            real = task.group < groups

            @pl.when(real)
            def _():
                group = task.group
                factor = unit_g[group] / scale_g[group] / divisor_g[0]
                more = {} if powers_s is None else {"shift": lax.rem(task.source, ALIGNED)}
                store(task, sums_of(before, steps, **more) * factor)

            @pl.when(jnp.logical_not(real))
            def _():
                zero = jnp.zeros((fragments.ROWS, tokens), jnp.float32)
                store(task, plgpu.layout_cast(zero, plgpu.Layout.WGMMA))

            return before + jnp.where(real, steps, 0)

        each_task(one_task, jnp.int32(0))
