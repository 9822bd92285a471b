"""Packed weights times few activations: one Mosaic GPU kernel that reads each weight once.

``out = factor * x @ expand(records)^T``, or the products with several weights side by side. It is
computed transposed, so that the 64 rows of an instruction are weights and its narrow side the
tokens. K is split over the CTAs of a cluster and over warpgroups; each warpgroup streams its own
records through a ring of shared memory, and the activations with them, or, where a CTA multiplies
several tiles, reads these from a copy that stays:

    TMA ring -> registers: codes to bfloat16 (`expand`) or FP8 (`float8`) -> mma or wgmma -> partial
    sums to the CTA that owns the rows -> it adds them in fixed order, scales and stores them

A tile's sums are added while the next tile is computed. The result does not depend on timing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fragments, repack
from pallas_kernels.hopper import expand, float8
from pallas_kernels.hopper.cluster_sum import PAD, ClusterSum
from pallas_kernels.hopper.inlined import named, scalars, swizzled, wait_for_kernel_before
from pallas_kernels.hopper.tiles import SHARED_MEMORY, Split

POWERS = repack.padded(1)  # tokens whose powers a copy brings: the most of a call


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one call.

    Attributes:
      split: how the work is divided.
      starts: where each weight's tiles of 64 rows start; at the end, how many there are.
      steps: of 128 columns, in K.
      tokens: M.
    """

    split: Split
    starts: tuple[int, ...]
    steps: int
    tokens: int

    @property
    def per(self) -> int:
        """Copies of a warpgroup in a tile."""
        return -(-self.steps // (self.split.slices * self.split.ways * self.split.records))

    @property
    def tiles(self) -> int:
        """Of all weights."""
        return self.starts[-1]

    @property
    def buffers(self) -> int:
        """One, where no warpgroup has a second tile."""
        return min(2, -(-self.tiles // (self.split.clusters * self.split.groups)))

    @property
    def held(self) -> int:
        """Records in shared memory."""
        return self.split.warpgroups * self.split.stages * self.split.records

    @property
    def range(self) -> int:
        """Steps of K of a warpgroup."""
        return self.per * self.split.records

    @property
    def x_steps(self) -> int:
        """Steps of activations in shared memory."""
        return self.split.ways * self.range if self.split.resident else self.held

    def shared_memory(self, c: fragments.Carrier) -> int:
        """Bytes of shared memory of a CTA."""
        ring = self.held * c.lines * 256
        sums = 2 * self.buffers * self.split.warpgroups * fragments.ROWS * self.stride * 4
        of_step = self.split.tokens * 2 * fragments.COLUMNS
        if c.operand == "float8":
            of_step = of_step // 2 + POWERS * 4
        return self.x_steps * of_step + ring + sums

    def fitted(self, c: fragments.Carrier) -> Geometry:
        """Return this, or what fits: fewer stages, shorter copies, no resident activations."""
        split = self.split
        if self.shared_memory(c) <= SHARED_MEMORY:
            return self
        if split.stages > 2:
            return self.with_split(stages=split.stages - 1).fitted(c)
        if split.records > 1:
            shorter = split.records // 2
            return self.with_split(records=shorter, stages=2 * split.stages).fitted(c)
        if split.resident:
            return self.with_split(resident=False).fitted(c)
        raise NotImplementedError(f"{split} needs {self.shared_memory(c)} bytes of shared memory")

    def with_split(self, **fields) -> Geometry:
        """Return this with another split."""
        return dataclasses.replace(self, split=dataclasses.replace(self.split, **fields))

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


# Compiled functions by themselves: models whose layers are alike lower each kernel once.
@functools.partial(jax.jit, static_argnames=("split", "out_dtype", "ahead"))
def matmul(x, weights, divisor, split: Split, *, powers=None, out_dtype=jnp.float32, ahead=False):
    """Return ``unit / global_scale / divisor * x @ expand(records)^T``.

    Args:
      x: bfloat16 (M, K), M at most ``split.tokens``, K a multiple of 64; or float8_e5m2 or
        float8_e4m3fn, K a multiple of 128, columns as `repack.to_lanes`, for weights laid out for
        them.
      weights: `fragments.Fragments` (N, K) of one format; of several, all N but the last are
        multiples of 64.
      divisor: float32 scalar.
      split: how to divide the work.
      powers: float32 (K/128, POWERS), a factor of each 128 columns of a token, for FP8.
      out_dtype: of the result.
      ahead: the records were there before the kernel before this one started: they are fetched
        while it runs.

    Returns:
      (M, N), the products with several weights side by side.
    """
    c = fragments.carrier(weights[0].format, weights[0].operand)
    short = c.operand == "float8"
    starts = tuple(itertools.accumulate([w.records.shape[0] for w in weights], initial=0))
    split = dataclasses.replace(split, clusters=min(split.clusters, starts[-1]))
    tokens = x.shape[0]
    geo = Geometry(split, starts, weights[0].records.shape[1], tokens).fitted(c)
    split = geo.split
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM(
            (geo.x_steps, split.tokens, fragments.COLUMNS),
            x.dtype,
            transforms=swizzled(128, x.dtype.itemsize),
        ),
        ring_s=plgpu.SMEM(
            (split.warpgroups * split.stages, split.records, c.lines, 64), jnp.uint32
        ),
        own_s=plgpu.SMEM((geo.buffers * split.warpgroups, fragments.ROWS, geo.stride), jnp.float32),
        sums_s=plgpu.SMEM(
            (geo.buffers * split.groups, split.slices * split.ways, geo.owned, geo.stride),
            jnp.float32,
        ),
        received=plgpu.SMEM((4 * split.groups,), jnp.uint32),  # two barriers of 64 bits each
        ready=plgpu.Barrier(
            num_barriers=split.warpgroups * split.stages,
            num_arrivals=1 if split.resident else 1 + split.records + short,
        ),
    )
    if short:
        slots = scratch["ring_s"].shape[:2]
        scratch["powers_s"] = plgpu.SMEM((*slots, POWERS), jnp.float32)
    if split.resident:
        scratch["x_ready"] = plgpu.Barrier(num_arrivals=geo.x_steps)
    run = plgpu.kernel(
        functools.partial(_body, c, geo, ahead),
        out_type=jax.ShapeDtypeStruct((tokens, sum(w.shape[0] for w in weights)), out_dtype),
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
    factors = [w.unit for w in weights], [w.global_scale for w in weights], [divisor]
    left = (x, powers) if short else (x,)
    return run(*left, *(w.records for w in weights), *scalars(itertools.chain(*factors)))


def _body(
    c, geo, ahead, x_g, *operands, x_s, ring_s, ready, x_ready=None, powers_s=None, **exchanged
):
    powers_g, weights, units, scales, divisor, out_g = named(operands, powers_s is not None)
    split, per = geo.split, geo.per
    cluster, piece, wg = (lax.axis_index(n) for n in ("cluster", "slice", "wg"))
    group, way = wg // split.ways, lax.rem(wg, split.ways)
    # Groups take tiles in turn, the first of all clusters before the second of any.
    stride = split.clusters * split.groups
    first = group * split.clusters + cluster
    mine = (geo.tiles - first + stride - 1) // stride
    last = mine * per

    def fetch_x(step, slot, barrier):
        at = pl.multiple_of(step * fragments.COLUMNS, fragments.COLUMNS)
        # Not static, since it may reach past the last token, where TMA gives zeros.
        rows = pl.ds(pl.multiple_of(0 * piece, 8), split.tokens)
        columns = x_g.at[rows, pl.ds(at, fragments.COLUMNS)]
        plgpu.copy_gmem_to_smem(columns, x_s.at[slot], barrier)

    def step_of(i):
        return ((piece * split.ways + way) * per + lax.rem(i, per)) * split.records

    def slot_of(i):
        return wg * split.stages + lax.rem(i, split.stages)

    def fetch_records(i):
        tile = first + (i // per) * stride
        step = step_of(i)
        slot = slot_of(i)
        for w_g, (start, end) in zip(weights, itertools.pairwise(geo.starts), strict=True):

            def copy(w_g=w_g, start=start):
                records = w_g.at[tile - start, pl.ds(step, split.records)]
                plgpu.copy_gmem_to_smem(records, ring_s.at[slot], ready.at[slot])

            copy() if len(weights) == 1 else pl.when((tile >= start) & (tile < end))(copy)

    def fetch_left(i):
        step = step_of(i)
        slot = slot_of(i)
        for r in range(0 if split.resident else split.records):
            fetch_x(step + r, slot * split.records + r, ready.at[slot])
        if powers_s is not None:
            plgpu.copy_gmem_to_smem(
                powers_g.at[pl.ds(step, split.records)], powers_s.at[slot], ready.at[slot]
            )

    def warm_up(fetch):
        def one(i, _):
            pl.when(i < last)(lambda: fetch(i))

        lax.fori_loop(0, split.stages, one, None)

    if not ahead:
        wait_for_kernel_before()
    warm_up(fetch_records)
    factors: list[Any] = []
    exchange = ClusterSum(
        geo, out_g, lambda tile: _of_tile(geo.starts, factors, tile), wg, piece, **exchanged
    )
    if ahead:
        wait_for_kernel_before()
    warm_up(fetch_left)
    if split.resident:  # each group fetches its share of what all read

        def fetch_share(i, _):
            slot = way * geo.range + group + i * split.groups
            fetch_x(piece * geo.x_steps + slot, slot, x_ready)

        share = (geo.range - group + split.groups - 1) // split.groups
        lax.fori_loop(0, share, fetch_share, None)
    factors += [u[0] / s[0] / divisor[0] for u, s in zip(units, scales, strict=True)]
    if split.resident:
        plgpu.barrier_wait(x_ready)

    def one_tile(t, _):
        sums = products(t)
        pl.when(t > 0)(lambda: exchange.finish(t - 1, first + (t - 1) * stride))
        exchange.send(t, sums)

    if powers_s is None:
        one_record = expand.multiply(c, split.tokens)
    else:
        kind = float8.kind_of(x_s.dtype)
        some_records = float8.few(c, split.tokens, split.records, kind)

    def multiply(slot, x_slot, sums):
        records = tuple(ring_s.at[slot, r] for r in range(split.records))
        xs = tuple(x_s.at[x_slot + r] for r in range(split.records))
        if powers_s is not None:
            powers = tuple(powers_s.at[slot, r] for r in range(split.records))
            return some_records(records, xs, powers, sums)
        for record, x in zip(records, xs, strict=True):
            sums = one_record(record, x, sums)
        expand.settle()
        return sums

    def products(t):
        def advance(s, sums):
            i = t * per + s
            slot = slot_of(i)
            plgpu.barrier_wait(ready.at[slot])
            x_slot = way * geo.range + s * split.records if split.resident else slot * split.records
            sums = multiply(slot, x_slot, sums)

            @pl.when(i + split.stages < last)
            def _():
                fetch_records(i + split.stages)
                fetch_left(i + split.stages)

            return sums

        zero = jnp.zeros((fragments.ROWS, split.tokens), jnp.float32)
        return lax.fori_loop(0, per, advance, plgpu.layout_cast(zero, plgpu.Layout.WGMMA))

    lax.fori_loop(0, mine, one_tile, None)
    pl.when(mine > 0)(lambda: exchange.finish(mine - 1, first + (mine - 1) * stride))
    exchange.leave()


def _of_tile(starts, values, tile):
    """The value of the weight that a tile belongs to."""
    found = values[-1]
    for end, other in zip(starts[-2:0:-1], values[-2::-1], strict=True):
        found = jnp.where(tile < end, other, found)
    return found
