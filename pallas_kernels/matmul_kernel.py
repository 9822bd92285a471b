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
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import expand, fragments
from pallas_kernels.quad import const, i32
from pallas_kernels.quantize_kernel import _swizzled
from pallas_kernels.tiles import SHARED_MEMORY

PAD = 2  # words behind a row of sums: neighbouring rows are in different banks, pairs aligned
VOID = "!llvm.void"
SCALAR = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Split:
    """How a call divides its work.

    Attributes:
      tokens: columns of wgmma, 8 to 256: M rounded up.
      slices: CTAs of a cluster, each with its part of K.
      warpgroups: of a CTA.
      ways: warpgroups that share a tile of rows, each with its part of the slice of K.
      clusters: that share the rows of weights.
      stages: records that a warpgroup has in flight.
      resident: activations of the slice stay in shared memory; else they come with each record.
      records: side by side, that one copy brings.
    """

    tokens: int
    slices: int = 4
    warpgroups: int = 4
    ways: int = 1
    clusters: int = 32
    stages: int = 6
    resident: bool = True
    records: int = 1

    @property
    def groups(self) -> int:
        """Tiles that a CTA has in work."""
        return self.warpgroups // self.ways


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one call: the split, tiles of 64 rows, steps of a warpgroup in one, N and M."""

    split: Split
    tiles: int
    per: int
    rows: int
    tokens: int

    @property
    def buffers(self) -> int:
        """One, where no warpgroup has a second tile."""
        return min(2, -(-self.tiles // (self.split.clusters * self.split.groups)))

    @property
    def held(self) -> int:
        """Steps of activations in shared memory."""
        split = self.split
        copies = self.per * split.ways if split.resident else split.warpgroups * split.stages
        return copies * split.records

    def shared_memory(self, c: fragments.Carrier) -> int:
        """Bytes of shared memory of a CTA."""
        ring = self.split.warpgroups * self.split.stages * self.split.records * c.lines * 256
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


def matmul(x, records, factor, fmt, rows, split: Split, *, out_dtype=jnp.float32):
    """Return ``factor * x @ expand(records)^T``.

    Args:
      x: bfloat16 (M, K), M at most ``split.tokens``.
      records: uint32 (ceil(N/64), ceil(K/128), lines, 64), see `fragments`.
      factor: float32 scalar.
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
    geo = Geometry(split, tiles, per, rows, tokens)
    while geo.shared_memory(c) > SHARED_MEMORY and split.stages > 2:
        split = dataclasses.replace(split, stages=split.stages - 1)
        geo = dataclasses.replace(geo, split=split)
    sources = split.slices * split.ways
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM(
            (geo.held, split.tokens, fragments.COLUMNS), jnp.bfloat16, transforms=_swizzled(128, 2)
        ),
        ring_s=plgpu.SMEM(
            (split.warpgroups * split.stages, split.records, c.lines, 64), jnp.uint32
        ),
        own_s=plgpu.SMEM((geo.buffers * split.warpgroups, fragments.ROWS, geo.stride), jnp.float32),
        sums_s=plgpu.SMEM(
            (geo.buffers * split.groups, sources, fragments.ROWS // split.slices, geo.stride),
            jnp.float32,
        ),
        received=plgpu.SMEM((4 * split.groups,), jnp.uint32),  # two barriers of 64 bits each
        x_ready=plgpu.Barrier(num_arrivals=geo.held if split.resident else 1),
        ready=plgpu.Barrier(
            num_barriers=split.warpgroups * split.stages,
            num_arrivals=1 if split.resident else 1 + split.records,
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
    if tokens < split.tokens:
        x = jnp.pad(x, ((0, split.tokens - tokens), (0, 0)))
    return run(x, records, jnp.asarray(factor, jnp.float32).reshape(1))


def _body(c, geo, x_g, w_g, f_g, out_g, *, x_s, ring_s, x_ready, ready, **exchanged):
    split, per = geo.split, geo.per
    cluster, piece, wg = (lax.axis_index(n) for n in ("cluster", "slice", "wg"))
    group, way = wg // split.ways, lax.rem(wg, split.ways)
    # Groups take tiles in turn, the first of all clusters before the second of any.
    stride = split.clusters * split.groups
    first = group * split.clusters + cluster
    count = (geo.tiles - first + stride - 1) // stride
    last = count * per
    unpack = expand.to_bfloat16(c)

    def copy_x(step, slot, barrier):
        at = pl.multiple_of(step * fragments.COLUMNS, fragments.COLUMNS)
        columns = x_g.at[pl.ds(0, split.tokens), pl.ds(at, fragments.COLUMNS)]
        plgpu.copy_gmem_to_smem(columns, x_s.at[slot], barrier)

    def fetch(i):
        tile = first + (i // per) * stride
        step = ((piece * split.ways + way) * per + lax.rem(i, per)) * split.records
        slot = wg * split.stages + lax.rem(i, split.stages)
        plgpu.copy_gmem_to_smem(
            w_g.at[tile, pl.ds(step, split.records)], ring_s.at[slot], ready.at[slot]
        )
        for r in () if split.resident else range(split.records):
            copy_x(step + r, slot * split.records + r, ready.at[slot])

    def warm_up(i, _):
        pl.when(i < last)(lambda: fetch(i))

    def fetch_x(s, _):
        @pl.when(lax.rem(s, split.warpgroups) == wg)
        def _():
            copy_x(piece * geo.held + s, s, x_ready)

    lax.fori_loop(0, split.stages, warm_up, None)
    if split.resident:
        lax.fori_loop(0, geo.held, fetch_x, None)
    exchange = _Exchange(geo, out_g, f_g[0], wg, piece, **exchanged)
    if split.resident:
        plgpu.barrier_wait(x_ready)

    def one_tile(t, _):
        sums = products(t) if split.tokens > 16 else warp_products(t)
        pl.when(t > 0)(lambda: exchange.finish(t - 1, first + (t - 1) * stride))
        exchange.send(t, sums)

    def warp_products(t):
        multiply = expand.multiply(c, split.tokens)

        def advance(s, sums):
            i = t * per + s
            slot = wg * split.stages + lax.rem(i, split.stages)
            plgpu.barrier_wait(ready.at[slot])
            at = (way * per + s if split.resident else slot) * split.records
            for r in range(split.records):
                sums = multiply(ring_s.at[slot, r], x_s.at[at + r], sums)
            pl.when(i + split.stages < last)(lambda: fetch(i + split.stages))
            return sums

        zero = jnp.zeros((fragments.ROWS, split.tokens), jnp.float32)
        return lax.fori_loop(0, per, advance, plgpu.layout_cast(zero, plgpu.Layout.WGMMA))

    def products(t):
        def multiply(acc):
            def advance(s, _):
                i = t * per + s
                slot = wg * split.stages + lax.rem(i, split.stages)
                plgpu.barrier_wait(ready.at[slot])
                weights = unpack(ring_s.at[slot, 0])
                more = pl.when(i + split.stages < last)
                if split.resident:
                    more(lambda: fetch(i + split.stages))
                for w in weights:
                    plgpu.wgmma(acc, w, x_s.at[way * per + s if split.resident else slot].T)
                plgpu.wgmma_wait(0)
                if not split.resident:  # wgmma has read the activations of this slot
                    more(lambda: fetch(i + split.stages))

            lax.fori_loop(0, per, advance, None)
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((fragments.ROWS, split.tokens), jnp.float32))

    lax.fori_loop(0, count, one_tile, None)
    pl.when(count > 0)(lambda: exchange.finish(count - 1, first + (count - 1) * stride))
    exchange.leave()


class _Exchange:
    """Adds the partial sums of a cluster: each CTA owns some rows of every tile.

    A warpgroup lays its sums down in its own memory; one bulk copy an owner takes them there and
    counts their bytes on the owner's barrier. There are two buffers and two barriers: who sends
    tile t + 2 has seen all of tile t + 1 arrive, and nobody sends tile t + 1 before having read
    tile t.
    """

    def __init__(self, geo, out_g, factor, wg, piece, *, own_s, sums_s, received):
        self.geo, self.own, self.sums, self.received = geo, own_s, sums_s, received
        self.out, self.factor, self.wg, self.piece = out_g, factor, wg, piece

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def start(_, received):
            init = "".join(
                f" @p mbarrier.init.shared::cta.b64 [$0+{8 * b}], 1;"
                for b in range(2 * geo.split.groups)
            )
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), const(0))
            _run(
                f"{{ .reg .pred p; setp.ne.s32 p, $1, 0; {init} }}",
                _address(received),
                arith.extui(i32(), first),
            )
            _run("fence.mbarrier_init.release.cluster;")
            _run("barrier.cluster.arrive.relaxed.aligned;")
            _run("barrier.cluster.wait.acquire.aligned;")

        start(received)

    def _places(self, t):
        """Buffers of tile t: this warpgroup's own, and its group's."""
        group = self.wg // self.geo.split.ways
        turn = lax.rem(t, self.geo.buffers)
        return [_spread(turn + self.geo.buffers * w) for w in (self.wg, group)]

    def send(self, t, sums):
        """Send a warpgroup's sums of its tile t to their owners."""
        geo, split = self.geo, self.geo.split
        whole = fragments.ROWS * geo.stride * 4

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[SCALAR] * 4, plgpu.Layout.WGMMA))
        def store(_, own_s, sums_s, received, own, group, piece, way, values):
            own, group, piece, way = (_first(v) for v in (own, group, piece, way))
            thread = arith.andi(utils.thread_idx(), const(127))
            own = arith.addi(_address(own_s), arith.muli(own, const(whole)))
            row = arith.addi(
                arith.muli(arith.shrui(thread, const(5)), const(16)),
                arith.andi(arith.shrui(thread, const(2)), const(7)),
            )
            at = arith.addi(own, arith.muli(row, const(geo.stride * 4)))
            at = arith.addi(at, arith.muli(arith.andi(thread, const(3)), const(8)))
            for half, j in ((h, j) for h in (0, 1) for j in range(split.tokens // 8)):
                pair = values.registers[0, j, 0, 0, half, 0, 0, 0, 0]
                two = [llvm.extractelement(pair, const(e)) for e in (0, 1)]
                offset = 8 * half * geo.stride * 4 + 32 * j
                _run(f"st.shared.v2.f32 [$0+{offset}], {{$1,$2}};", at, *two)
            utils.commit_shared()
            target = arith.addi(_address(sums_s), arith.muli(group, const(whole * split.ways)))
            source = arith.addi(arith.muli(piece, const(split.ways)), way)
            target = arith.addi(target, arith.muli(source, const(geo.block)))
            barrier = arith.addi(_address(received), arith.muli(group, const(8)))
            copies = "".join(
                f" mapa.shared::cluster.u32 a,$0,{owner}; mapa.shared::cluster.u32 b,$2,{owner};"
                " @p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
                f" [a], [s], {geo.block}, [b]; add.u32 s, s, {geo.block};"
                for owner in range(split.slices)
            )
            _run(
                "{ .reg .pred p; .reg .b32 a,b,s; mov.b32 s, $1; setp.eq.s32 p, $3, 0;"
                " setp.eq.and.s32 p, $4, 0, p;"
                " @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2],"
                f" {geo.block * split.slices * split.ways}; setp.eq.s32 p, $3, 0; {copies} }}",
                target,
                own,
                barrier,
                thread,
                way,
            )

        way = lax.rem(self.wg, split.ways)
        store(
            self.own,
            self.sums,
            self.received,
            *self._places(t),
            _spread(self.piece),
            _spread(way),
            sums,
        )

    def finish(self, t, tile):
        """Add this CTA's rows of tile t, scale, and store them in global memory."""
        geo, split, out_g = self.geo, self.geo.split, self.out
        n = out_g.shape[1]
        size = jnp.dtype(out_g.dtype).itemsize
        share = geo.owned * split.tokens
        convert = {
            "float32": "@p st.global.f32 [d], s0;",
            "bfloat16": "cvt.rn.bf16.f32 h, s0; @p st.global.b16 [d], h;",
            "float16": "cvt.rn.f16.f32 h, s0; @p st.global.b16 [d], h;",
        }[jnp.dtype(out_g.dtype).name]

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[SCALAR] * 5))
        def reduce(_, sums_s, received, out, factor, buffer, phase, tile, way):
            factor, buffer, phase, tile, way = (
                _first(v) for v in (factor, buffer, phase, tile, way)
            )
            _run(
                "{ .reg .pred p; wait${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;"
                " @!p bra wait${:uid}; }",
                arith.addi(_address(received), arith.muli(buffer, const(8))),
                phase,
            )
            rank = llvm.inline_asm(i32(), [], "mov.u32 $0, %cluster_ctarank;", "=r")
            thread = arith.andi(utils.thread_idx(), const(127))
            thread = arith.addi(thread, arith.muli(way, const(128)))
            whole = fragments.ROWS * geo.stride * 4 * split.ways
            base = arith.addi(_address(sums_s), arith.muli(buffer, const(whole)))
            generic = llvm.addrspacecast(llvm.PointerType.get(), utils.memref_ptr(out))
            target = llvm.ptrtoint(ir.IntegerType.get_signless(64), generic)
            sources = range(split.slices * split.ways)
            loads = "".join(f"@p ld.shared.f32 s{i}, [$0+{i * geo.block}]; " for i in sources)
            adds = "".join(f"add.rn.f32 s0, s0, s{i}; " for i in sources if i)
            code = (
                f"{{ .reg .pred p; .reg .b16 h; .reg .b64 d; .reg .f32 s<{len(sources)}>;"
                f" setp.lt.s32 p, $4, {geo.tokens}; setp.lt.and.s32 p, $5, {n}, p;"
                f" setp.lt.and.s32 p, $6, {share}, p; {loads} {adds} mul.rn.f32 s0, s0, $2;"
                f" cvt.s64.s32 d, $3; mul.lo.s64 d, d, {size}; add.s64 d, d, $1; {convert} }}"
            )
            for begin in range(0, share, 128 * split.ways):
                element = arith.addi(thread, const(begin))
                row = arith.remui(element, const(geo.owned))
                token = arith.divui(element, const(geo.owned))
                at = arith.addi(arith.muli(row, const(geo.stride)), token)
                column = arith.addi(arith.muli(tile, const(64)), arith.muli(rank, const(geo.owned)))
                column = arith.addi(column, row)
                _run(
                    code,
                    arith.addi(base, arith.muli(at, const(4))),
                    target,
                    factor,
                    arith.addi(arith.muli(token, const(n)), column),
                    token,
                    column,
                    element,
                )

        phase = lax.rem(t // geo.buffers, 2)
        reduce(
            self.sums,
            self.received,
            out_g,
            _spread(self.factor),
            self._places(t)[1],
            _spread(phase),
            _spread(tile),
            _spread(lax.rem(self.wg, split.ways)),
        )

    def leave(self):
        """Nobody may end while others still send to it."""

        @plgpu.inline_mgpu()
        def wait(_):
            _run("barrier.cluster.arrive.relaxed.aligned;")
            _run("barrier.cluster.wait.acquire.aligned;")

        wait()


def _spread(value):
    """A scalar as an array, since only arrays and references go into inlined code."""
    wide = lax.broadcast(jnp.asarray(value), (fragments.ROWS,))
    return plgpu.layout_cast(wide, SCALAR)


def _address(ref):
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def _run(code, *operands):
    letters = {"i32": "r", "i64": "l", "f32": "f"}
    constraints = ",".join([*(letters[str(o.type)] for o in operands), "~{memory}"])
    llvm.inline_asm(ir.Type.parse(VOID), list(operands), code, constraints, has_side_effects=True)


def _first(spread):
    """The lane's value of an array that is equal everywhere."""
    register = spread.registers.flat[0]
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, const(0))
    return register
