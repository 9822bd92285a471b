"""Sums of a tile over the CTAs of a cluster, through their shared memories, in fixed order."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import fragments
from pallas_kernels.expand import asm
from pallas_kernels.quad import const, i32

PAD = 2  # words behind a row of sums: neighbouring rows are in different banks, pairs aligned
SCALAR = plgpu.Layout.WGMMA.reduce(1)


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
            rank = asm("mov.u32 $0, %cluster_ctarank;", 1)[0]
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
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), list(operands), code, constraints, has_side_effects=True
    )


def _first(spread):
    """The lane's value of an array that is equal everywhere."""
    register = spread.registers.flat[0]
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, const(0))
    return register
