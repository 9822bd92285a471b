"""Packed weights times many activations: a persistent, warp-specialized Mosaic GPU kernel.

``out = factor * x @ expand(records)^T``, tile by tile of ``64 * warpgroups`` weights and ``tokens``
activations. One warpgroup only fetches; each of the others holds 64 rows of weights and all shared
activations of a tile:

    TMA ring: a step of activations, a record a warpgroup
    -> registers: codes to bfloat16 (`expand`) or FP8 (`float8`) -> wgmma -> scale, transpose
    -> TMA store

Sums of FP8 products leave the tensor core's short accumulator every few steps, where the power of
two of their columns multiplies them. The fetching warpgroup runs ahead over the ends of tiles.
Where tiles are too few for all multiprocessors K is cut and the parts are added afterwards.

Of two weights, a gated layer's, each has half of the warpgroups: those of the second hand their
products to those of the first, which store ``silu(first) * second``.
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
from pallas_kernels.hopper import expand, float8, gated, plans
from pallas_kernels.hopper.inlined import (
    cluster_sync,
    named,
    scalars,
    swizzled,
    wait_for_kernel_before,
)
from pallas_kernels.hopper.tiles import PROMOTED, SHARED_MEMORY, Tiling

FETCH_REGISTERS = 40


@functools.partial(jax.jit, static_argnames=("tiling", "out_dtype", "ahead"))
def matmul(
    x, weights, divisor, tiling: Tiling, *, powers=None, out_dtype=jnp.bfloat16, ahead=False
):
    """Return ``unit / global_scale / divisor * x @ expand(records)^T``; of two weights see there.

    Args:
      x: bfloat16 (M, K), K a multiple of 64; or float8_e5m2 or float8_e4m3fn, K a multiple of
        128, columns as `repack.to_lanes`, for a weight laid out for them.
      weights: one `fragments.Fragments` (N, K), or for FP8 `fp8_kernel.Expanded`; or two, alike,
        for ``silu(first) * second`` of their products, with a tiling without cuts.
      divisor: float32 scalar.
      tiling: how to divide the work.
      powers: float32 (K/128 or K / (128 PROMOTED), at least M): a factor of so many columns of a
        token, for FP8.
      out_dtype: of the result.
      ahead: the records were there before the kernel before this one started: they are fetched
        while it runs.

    Returns:
      (M, N).
    """
    m, rows, (tiles, steps) = x.shape[0], weights[0].shape[0], weights[0].grid
    whole = weights[0].operand == "expanded"
    c = None if whole else fragments.carrier(weights[0].format, weights[0].operand)
    lines = c.lines if c else fragments.ROWS * fragments.COLUMNS // 256
    if m % 8:  # TMA's view of a swizzled tile splits M by 8 rows
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    # And N by 64 columns; two tiles at least: Mosaic leaves out the index of an axis of one, where
    # the second warpgroup's would not be clipped.
    wide = max(rows + -rows % fragments.ROWS, 2 * fragments.ROWS)
    dtype = jnp.dtype(jnp.float32 if tiling.cuts > 1 else out_dtype)
    tiling = _fitted(tiling, lines, x.dtype.itemsize, dtype.itemsize)
    n, count, cluster = tiling.warpgroups, len(weights), tiling.cluster
    tasks = -(-tiles // (n // count * cluster)) * -(-m // tiling.tokens) * tiling.cuts
    tiling = dataclasses.replace(tiling, ctas=min(tiling.ctas // cluster, tasks) * cluster)
    scratch = _scratch(tiling, lines, x.dtype, dtype, count, powers is not None)
    if whole:
        scratch["w_s"] = plgpu.SMEM(
            (tiling.stages, n * fragments.ROWS, fragments.COLUMNS),
            weights[0].records.dtype,
            transforms=swizzled(128, 1),
        )
    run = plgpu.kernel(
        functools.partial(_body, c, tiling, ahead, tiles, steps),
        out_type=jax.ShapeDtypeStruct((tiling.cuts, x.shape[0], wide), dtype),
        grid=(tiling.ctas // cluster,),
        grid_names=("cluster",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("rank",) if cluster > 1 else (),
        num_threads=n + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    left = (x,) if powers is None else (x, powers)
    factors = [w.unit for w in weights] + [w.global_scale for w in weights]
    y = run(*left, *(w.records for w in weights), *scalars([*factors, divisor]))
    y = y[0] if tiling.cuts == 1 else jnp.sum(y, axis=0).astype(out_dtype)
    return y[:m, :rows]


def _scratch(tiling: Tiling, lines: int, dtype, out_dtype, count: int, powered: bool) -> dict:
    """Shared memory and barriers for records of so many lines of so many weights."""
    n = tiling.warpgroups
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM(
            *((tiling.stages, tiling.tokens, fragments.COLUMNS), dtype),
            transforms=swizzled(128, dtype.itemsize),
        ),
        w_s=plgpu.SMEM((tiling.stages, n, lines, 64), jnp.uint32),
        out_s=plgpu.SMEM(
            *((n // count, tiling.tokens, fragments.ROWS), out_dtype),
            transforms=swizzled(128, out_dtype.itemsize),
        ),
        full=plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=1 + count + powered),
        empty=plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=n),
    )
    if tiling.cluster > 1:  # a stage is empty when nobody reads what one of them fetches for all
        scratch["empty"] = plgpu.ClusterBarrier(
            collective_axes=("rank",), num_barriers=tiling.stages, num_arrivals=n
        )
    if powered:  # TMA writes to multiples of 128 bytes
        line = tiling.tokens + -tiling.tokens % 32
        scratch["powers_s"] = plgpu.SMEM((tiling.stages, line), jnp.float32)
    if count > 1:
        scratch |= gated.scratch(n // count, tiling.tokens, out_dtype)
    return scratch


def _fitted(tiling: Tiling, *sizes: int) -> Tiling:
    """Return the tiling, or what fits: fewer stages, narrower tiles."""
    if tiling.shared_memory(*sizes) <= SHARED_MEMORY:
        return tiling
    narrow = {"tokens": tiling.tokens // 16 * 8}
    fewer = {"stages": tiling.stages - 1} if tiling.stages > 2 else narrow
    return _fitted(dataclasses.replace(tiling, **fewer), *sizes)


def _body(c, tiling, ahead, tiles, steps, x_g, *operands, full, empty, powers_s=None, **tile_s):
    powers_g, weights, units, scales, divisor_g, out_g = named(operands, powers_s is not None)
    x_s, w_s, out_s = (tile_s.pop(name) for name in ("x_s", "w_s", "out_s"))
    count = len(weights)
    held = tiling.warpgroups // count  # tiles of each weight
    n, tokens, cuts, size = tiling.warpgroups, tiling.tokens, tiling.cuts, tiling.cluster
    wg, cluster, clusters = lax.axis_index("wg"), lax.axis_index("cluster"), tiling.ctas // size
    rank = lax.axis_index("rank") if size > 1 else 0
    m_tiles, groups = -(-x_g.shape[0] // tokens), -(-tiles // (held * size))
    tasks = groups * m_tiles * cuts
    mine = (tasks - cluster + clusters - 1) // clusters
    per = -(-steps // cuts)
    of_tokens = tokens * steps * fragments.COLUMNS * x_g.dtype.itemsize
    of_weights = n * size * steps * (c.lines * 256 if c else fragments.ROWS * fragments.COLUMNS)
    band = plans.band(m_tiles, groups, of_tokens, of_weights)
    if powers_s is not None:
        # Steps that share a power.
        span = 1 if powers_g.shape[0] == steps else PROMOTED
        per += -per % span if cuts > 1 else 0
    total = mine * per

    def place(task):
        """Row group, token tile and cut; neighbours share weights, and a band its tokens."""
        at = cluster + task * clusters
        cut, at = lax.rem(at, cuts), at // cuts
        first = at // (band * groups) * band
        width = band if m_tiles % band == 0 else jnp.minimum(band, m_tiles - first)
        at = lax.rem(at, band * groups)
        return lax.div(at, width) * size + rank, first + lax.rem(at, width), cut

    def source(i):
        """Slot, row group, token tile and step of K."""
        group, m_tile, cut = place(i // per)
        return lax.rem(i, tiling.stages), group, m_tile, cut * per + lax.rem(i, per)

    def fetch_records(i, _):
        slot, group, _, step = source(i)
        pl.when(i >= tiling.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        for number, w_g in enumerate(weights):
            if c is None:
                records = w_g.at[step, _range(group, held * fragments.ROWS)]
                target = w_s.at[slot, pl.ds(number * held * fragments.ROWS, records.shape[0])]
            else:
                records = w_g.at[pl.ds(group * held, held), step]
                target = w_s.at[slot, pl.ds(number * held, held)]
            plgpu.copy_gmem_to_smem(records, target, full.at[slot])

    def fetch_left(i, _):
        slot, _, m_tile, step = source(i)
        rows, columns = _range(m_tile, tokens), _range(step, fragments.COLUMNS)
        plgpu.copy_gmem_to_smem(
            *(x_g.at[rows, columns], x_s.at[slot], full.at[slot]),
            collective_axes="rank" if size > 1 else None,
        )
        if powers_s is not None:
            at = powers_g.at[step // span, rows]
            plgpu.copy_gmem_to_smem(at, powers_s.at[slot, pl.ds(0, tokens)], full.at[slot])

    def fetch(i, _):
        fetch_records(i, None)
        fetch_left(i, None)

    @pl.when(wg == n)
    def fetching():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        first = jnp.minimum(total, tiling.stages) if ahead else 0
        lax.fori_loop(0, first, fetch_records, None)
        wait_for_kernel_before()
        lax.fori_loop(0, first, fetch_left, None)
        lax.fori_loop(first, total, fetch, None)

    exchange: Any = gated.Exchange(held, wg, out_s.dtype, **tile_s) if count > 1 else None

    @pl.when(wg < n)
    def computing():
        plgpu.set_max_registers(_registers(n), action="increase")
        wait_for_kernel_before()
        factor = units[0][0] / scales[0][0] / divisor_g[0]
        if count > 1:
            factor = jnp.where(wg < held, factor, units[1][0] / scales[1][0] / divisor_g[0])

        def ready(step):
            """Wait for a step; return its slot, record and activations."""
            slot = lax.rem(step, tiling.stages)
            plgpu.barrier_wait(full.at[slot])
            record = w_s.at[slot, _range(wg, fragments.ROWS) if c is None else wg]
            return slot, record, x_s.at[slot]

        def free(step):
            plgpu.barrier_arrive(empty.at[lax.rem(step, tiling.stages)])

        if powers_s is None:
            sums_of = functools.partial(_bfloat16_sums, c, tokens, ready, free)
        else:
            kind = float8.kind_of(x_s.dtype)
            if c is None:
                multiply = float8.whole(tokens, float8.kind_of(w_s.dtype), kind)
            else:
                multiply = float8.partial(c, tokens, kind)
            sums_of = functools.partial(_float8_sums, multiply, tokens, ready, free, powers_s, span)

        def one_task(task, _):
            y = sums_of(task * per, per) * factor
            if count == 1:
                store(task, y)
            else:
                exchange.hand(task, y)
                pl.when(wg < held)(lambda: store(task, exchange.combine(y)))

        def store(task, y):
            y = y.astype(out_s.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s.at[wg].T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            group, m_tile, cut = place(task)
            at = cut, _range(m_tile, tokens), _range(group * held + wg, fragments.ROWS)
            plgpu.copy_smem_to_gmem(out_s.at[wg], out_g.at[at])

        lax.fori_loop(0, mine, one_task, None)
        plgpu.wait_smem_to_gmem(0)

    if size > 1:  # nobody may end while others still signal to it
        cluster_sync()


def _bfloat16_sums(c, tokens, ready, free, first, count):
    """Sums of a tile, float32 (64, tokens), over ``count`` steps from the ``first``."""
    unpack = expand.to_bfloat16(c)

    def products(acc):
        def advance(s, _):
            _, record, x = ready(first + s)
            for w in unpack(record):
                plgpu.wgmma(acc, w, x.T)
            plgpu.wgmma_wait(0)
            free(first + s)

        lax.fori_loop(0, count, advance, None)
        return acc[...]

    return pl.run_scoped(products, plgpu.ACC((fragments.ROWS, tokens), jnp.float32))


def _float8_sums(multiply, tokens, ready, free, powers_s, span, first, count, shift=None):
    """As `_bfloat16_sums`, in FP8: ``span`` steps in the short accumulator, times their powers.

    Those of a tile may start ``shift`` words behind the start of what was copied.
    `PROMOTED` steps are unrolled: over the end of a loop the compiler would not let products run.
    """
    weighted = float8.weighted(tokens, shift is None)
    of_tile = pl.ds(0 if shift is None else shift, tokens)

    def zeros():
        zero = jnp.zeros((fragments.ROWS, tokens), jnp.float32)
        return plgpu.layout_cast(zero, plgpu.Layout.WGMMA)

    def finish(running, sums, part, powers):
        return weighted(sums, float8.settled(tokens, running)(part), powers)

    def add(start, steps, sums):
        part = zeros()
        before: list[Any] = []  # a part that is complete, and its powers
        for i in range(steps):
            slot, record, x = ready(start + i)
            part = multiply(record, x, part)
            if before:
                sums = finish(float8.GROUPS, sums, *before)
            elif i:
                float8.wait(float8.GROUPS)
            if i:  # the step before is done
                free(start + i - 1)
            before = []
            if (i + 1) % span == 0 or i == steps - 1:
                before, part = [part, powers_s.at[slot, of_tile]], zeros()
        sums = finish(0, sums, *before)
        free(start + steps - 1)
        return sums

    whole, left = divmod(count, PROMOTED)
    sums = lax.fori_loop(
        0, whole, lambda i, sums: add(first + i * PROMOTED, PROMOTED, sums), zeros()
    )
    return add(first + whole * PROMOTED, left, sums) if left else sums


def _range(i, size):
    return pl.ds(pl.multiple_of(i * size, size), size)


def _registers(warpgroups: int) -> int:
    """Registers that a computing thread may take: what the fetching warpgroup leaves."""
    launched = 65536 // 128 // (warpgroups + 1) // 8 * 8 * (warpgroups + 1)
    return min(232, (launched - FETCH_REGISTERS) // warpgroups // 8 * 8)
