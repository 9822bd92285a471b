"""Sums of a tile over the CTAs of a cluster, through their shared memories, in fixed order."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import fragments
from pallas_kernels.hopper.inlined import SCALAR, address, cluster_sync, lane_value, spread
from pallas_kernels.hopper.quad import Quad, asm, const, i32, run

PAD = 2  # words behind a row of sums: neighbouring rows are in different banks, pairs aligned


class ClusterSum:
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
            run(
                f"{{ .reg .pred p; setp.ne.s32 p, $1, 0; {init} }}",
                address(received),
                arith.extui(i32(), first),
            )
            run("fence.mbarrier_init.release.cluster;")
            run("barrier.cluster.arrive.relaxed.aligned;")
            run("barrier.cluster.wait.acquire.aligned;")

        start(received)

    def _places(self, t):
        """Buffers of tile t: this warpgroup's own, and its group's."""
        group = self.wg // self.geo.split.ways
        turn = lax.rem(t, self.geo.buffers)
        return [spread(turn + self.geo.buffers * w) for w in (self.wg, group)]

    def send(self, t, sums):
        """Send a warpgroup's sums of its tile t to their owners."""
        geo, split = self.geo, self.geo.split
        whole = fragments.ROWS * geo.stride * 4

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[SCALAR] * 4, plgpu.Layout.WGMMA))
        def store(_, own_s, sums_s, received, own, group, piece, way, values):
            own, group, piece, way = (lane_value(v) for v in (own, group, piece, way))
            thread, quad = arith.andi(utils.thread_idx(), const(127)), Quad()
            own = arith.addi(address(own_s), arith.muli(own, const(whole)))
            at = arith.addi(own, arith.muli(quad.row, const(geo.stride * 4)))
            at = arith.addi(at, arith.muli(quad.lane, const(8)))
            for half, j in ((h, j) for h in (0, 1) for j in range(split.tokens // 8)):
                pair = values.registers[0, j, 0, 0, half, 0, 0, 0, 0]
                two = [llvm.extractelement(pair, const(e)) for e in (0, 1)]
                offset = 8 * half * geo.stride * 4 + 32 * j
                run(f"st.shared.v2.f32 [$0+{offset}], {{$1,$2}};", at, *two)
            utils.commit_shared()
            target = arith.addi(address(sums_s), arith.muli(group, const(whole * split.ways)))
            source = arith.addi(arith.muli(piece, const(split.ways)), way)
            target = arith.addi(target, arith.muli(source, const(geo.block)))
            barrier = arith.addi(address(received), arith.muli(group, const(8)))
            copies = "".join(
                f" mapa.shared::cluster.u32 a,$0,{owner}; mapa.shared::cluster.u32 b,$2,{owner};"
                " @p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
                f" [a], [s], {geo.block}, [b]; add.u32 s, s, {geo.block};"
                for owner in range(split.slices)
            )
            run(
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
            spread(self.piece),
            spread(way),
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
                lane_value(v) for v in (factor, buffer, phase, tile, way)
            )
            run(
                "{ .reg .pred p; wait${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;"
                " @!p bra wait${:uid}; }",
                arith.addi(address(received), arith.muli(buffer, const(8))),
                phase,
            )
            rank = asm("mov.u32 $0, %cluster_ctarank;", 1)[0]
            thread = arith.andi(utils.thread_idx(), const(127))
            thread = arith.addi(thread, arith.muli(way, const(128)))
            whole = fragments.ROWS * geo.stride * 4 * split.ways
            base = arith.addi(address(sums_s), arith.muli(buffer, const(whole)))
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
                run(
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
            spread(self.factor(tile)),
            self._places(t)[1],
            spread(phase),
            spread(tile),
            spread(lax.rem(self.wg, split.ways)),
        )

    def leave(self):
        """Nobody may end while its copies are on their way: they read its memory."""
        cluster_sync()
