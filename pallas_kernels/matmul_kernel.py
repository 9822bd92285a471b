"""Packed weights times few activations: one Mosaic GPU kernel that reads each weight once.

``out = factor * x @ expand(records)^T``. The product is computed transposed, so that the 64
rows of an instruction are weights and its narrow side the tokens. K is split over the CTAs of a
cluster and over warpgroups; each warpgroup streams its own records through a ring of shared memory:

    TMA ring -> registers: codes to bfloat16 (`expand`) -> mma -> partial sums to the CTA that owns
    the rows -> it adds them in fixed order, scales and stores them

A tile's sums are added while the next tile is computed. The result does not depend on timing.
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
from pallas_kernels.cluster_sum import PAD, ClusterSum
from pallas_kernels.inlined import scalars, swizzled
from pallas_kernels.tiles import SHARED_MEMORY, Split


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one call: the split, tiles of 64 rows, copies of a warpgroup in one, and M."""

    split: Split
    tiles: int
    per: int
    tokens: int

    @property
    def buffers(self) -> int:
        """One, where no warpgroup has a second tile."""
        return min(2, -(-self.tiles // (self.split.clusters * self.split.groups)))

    @property
    def held(self) -> int:
        """Records, and steps of activations, in shared memory."""
        return self.split.warpgroups * self.split.stages * self.split.records

    def shared_memory(self, c: fragments.Carrier) -> int:
        """Bytes of shared memory of a CTA."""
        ring = self.held * c.lines * 256
        sums = 2 * self.buffers * self.split.warpgroups * fragments.ROWS * self.stride * 4
        return self.held * self.split.tokens * 2 * fragments.COLUMNS + ring + sums

    @property
    def stride(self) -> int:
        """Words from a row of sums to the next."""
        return self.split.tokens + PAD

    @property
    def owned(self) -> int:
        """Rows of a tile that a CTA adds up."""
        return fragments.ROWS // self.split.slices

    @property
    def block(self) -> int:
        """Bytes that an owner gets from a warpgroup."""
        return self.owned * self.stride * 4


def matmul(x, records, factors, fmt, rows, split: Split, *, out_dtype=jnp.float32):
    """Return ``unit / a / b * x @ expand(records)^T``.

    Args:
      x: bfloat16 (M, K), M at most ``split.tokens``, K a multiple of 64.
      records: uint32 (ceil(N/64), ceil(K/128), lines, 64), see `fragments`.
      factors: float32 scalars unit, a, b.
      fmt: number format of the records.
      rows: N.
      split: how to divide the work.
      out_dtype: of the result.

    Returns:
      (M, N).
    """
    c = fragments.carrier(fmt)
    tiles, steps = records.shape[:2]
    per = -(-steps // (split.slices * split.ways * split.records))
    split = dataclasses.replace(split, clusters=min(split.clusters, tiles))
    tokens = x.shape[0]
    geo = Geometry(split, tiles, per, tokens)
    while geo.shared_memory(c) > SHARED_MEMORY and split.stages > 2:
        split = dataclasses.replace(split, stages=split.stages - 1)
        geo = dataclasses.replace(geo, split=split)
    sources = split.slices * split.ways
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM(
            (geo.held, split.tokens, fragments.COLUMNS), jnp.bfloat16, transforms=swizzled(128, 2)
        ),
        ring_s=plgpu.SMEM(
            (split.warpgroups * split.stages, split.records, c.lines, 64), jnp.uint32
        ),
        own_s=plgpu.SMEM((geo.buffers * split.warpgroups, fragments.ROWS, geo.stride), jnp.float32),
        sums_s=plgpu.SMEM(
            (geo.buffers * split.groups, sources, geo.owned, geo.stride),
            jnp.float32,
        ),
        received=plgpu.SMEM((4 * split.groups,), jnp.uint32),  # two barriers of 64 bits each
        ready=plgpu.Barrier(
            num_barriers=split.warpgroups * split.stages,
            num_arrivals=1 + split.records,
        ),
    )
    run = plgpu.kernel(
        functools.partial(_body, c, geo),
        out_type=jax.ShapeDtypeStruct((tokens, rows), out_dtype),
        grid=(split.clusters,),
        grid_names=("cluster",),
        cluster=(split.slices,),
        cluster_names=("slice",),
        num_threads=split.warpgroups,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    if 8 < tokens < split.tokens:  # TMA's view of a swizzled tile splits M by 8 rows
        x = jnp.pad(x, ((0, split.tokens - tokens), (0, 0)))
    return run(x, records, *scalars(factors))


def _body(c, geo, x_g, w_g, unit_g, a_g, b_g, out_g, *, x_s, ring_s, ready, **exchanged):
    split, per = geo.split, geo.per
    cluster, piece, wg = (lax.axis_index(n) for n in ("cluster", "slice", "wg"))
    group, way = wg // split.ways, lax.rem(wg, split.ways)
    # Groups take tiles in turn, the first of all clusters before the second of any.
    stride = split.clusters * split.groups
    first = group * split.clusters + cluster
    count = (geo.tiles - first + stride - 1) // stride
    last = count * per

    def fetch(i):
        tile = first + (i // per) * stride
        step = ((piece * split.ways + way) * per + lax.rem(i, per)) * split.records
        slot = wg * split.stages + lax.rem(i, split.stages)
        plgpu.copy_gmem_to_smem(
            w_g.at[tile, pl.ds(step, split.records)], ring_s.at[slot], ready.at[slot]
        )
        for r in range(split.records):
            at = pl.multiple_of((step + r) * fragments.COLUMNS, fragments.COLUMNS)
            columns = x_g.at[pl.ds(0, split.tokens), pl.ds(at, fragments.COLUMNS)]
            plgpu.copy_gmem_to_smem(columns, x_s.at[slot * split.records + r], ready.at[slot])

    def warm_up(i, _):
        pl.when(i < last)(lambda: fetch(i))

    lax.fori_loop(0, split.stages, warm_up, None)
    factor = unit_g[0] / a_g[0] / b_g[0]
    exchange = ClusterSum(geo, out_g, factor, wg, piece, **exchanged)

    def one_tile(t, _):
        sums = products(t)
        pl.when(t > 0)(lambda: exchange.finish(t - 1, first + (t - 1) * stride))
        exchange.send(t, sums)

    def products(t):
        multiply = expand.multiply(c, split.tokens)

        def advance(s, sums):
            i = t * per + s
            slot = wg * split.stages + lax.rem(i, split.stages)
            plgpu.barrier_wait(ready.at[slot])
            for r in range(split.records):
                sums = multiply(ring_s.at[slot, r], x_s.at[slot * split.records + r], sums)
            pl.when(i + split.stages < last)(lambda: fetch(i + split.stages))
            return sums

        zero = jnp.zeros((fragments.ROWS, split.tokens), jnp.float32)
        return lax.fori_loop(0, per, advance, plgpu.layout_cast(zero, plgpu.Layout.WGMMA))

    lax.fori_loop(0, count, one_tile, None)
    pl.when(count > 0)(lambda: exchange.finish(count - 1, first + (count - 1) * stride))
    exchange.leave()
