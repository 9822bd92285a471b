"""Instructions and lane exchange: the small vocabulary of the register epilogue.

In `Layout.WGMMA` the four lanes of a *quad* hold one row of a tile, lane q the columns 2q and
2q + 1 of every 8. Functions here emit PTX for one lane; `Quad` moves values between its lanes.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

EVERY_LANE = 0xFFFFFFFF
# Segments of four lanes: the clamp's upper byte is the segment mask.
SEGMENTS = 0x1C1F
# Registers of inline assembly by type.
LETTERS = {"i32": "r", "i64": "l", "f32": "f"}


def i32() -> ir.Type:
    """The type of 32-bit integers, and of words of bits."""
    return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
    """The type of float32."""
    return ir.F32Type.get()


def const(value: int | float) -> ir.Value:
    """An int32 or float32 constant."""
    if isinstance(value, float):
        return utils.c(value, f32())
    return utils.c(int(np.uint32(value).view(np.int32)), i32())


def ptx(result: ir.Type, code: str, *operands: ir.Value) -> ir.Value:
    """One PTX block; ``$0`` is the result, ``$1``... the operands; ``#`` starts a local name."""
    constraints = ",".join(["=" + LETTERS[str(result)], *(LETTERS[str(o.type)] for o in operands)])
    return cast(ir.Value, llvm.inline_asm(result, list(operands), code, constraints))


def asm(code, results, *arguments, volatile=False):
    """A PTX block with several 32-bit results."""
    # "&": the block writes results while it still reads its operands
    letters = [LETTERS[str(a.type)] for a in arguments]
    constraints = ",".join(["=&r"] * results + letters)
    kind = i32() if results == 1 else llvm.StructType.get_literal([i32()] * results)
    out = cast(
        ir.Value,
        llvm.inline_asm(kind, list(arguments), code, constraints, has_side_effects=volatile),
    )
    return [out] if results == 1 else [llvm.extractvalue(i32(), out, [i]) for i in range(results)]


def run(code: str, *operands: ir.Value) -> None:
    """A PTX block without a result, which may touch memory."""
    constraints = ",".join([*(LETTERS[str(o.type)] for o in operands), "~{memory}"])
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(operands), code, constraints, has_side_effects=True)


def scaled(value, power):
    """``value * power``, a constant power of two."""
    bits = np.float32(power).view(np.uint32)
    return ptx(f32(), f"mul.rn.f32 $0, $1, 0f{bits:08X};", value)


class Quad:
    """The four lanes that share a row: who am I, and how we exchange."""

    def __init__(self):
        thread = utils.thread_idx()
        self.lane = arith.andi(thread, const(3))
        in_group = arith.andi(thread, const(127))
        warp = arith.shrui(in_group, const(5))
        eighth = arith.andi(arith.shrui(in_group, const(2)), const(7))
        self.row = arith.addi(arith.muli(warp, const(16)), eighth)
        self.odd, self.high = (
            arith.cmpi(arith.CmpIPredicate.ne, arith.andi(self.lane, const(bit)), const(0))
            for bit in (1, 2)
        )

    def reduce4(self, partials, combine):
        """Four partial results in each lane -> lane q holds the quad's result number q."""
        p = partials
        halves = []
        for a, b in ((p[0], p[1]), (p[2], p[3])):
            keep, send = arith.select(self.odd, b, a), arith.select(self.odd, a, b)
            halves.append(combine(keep, utils.shfl_bfly(send, 1)))
        keep = arith.select(self.high, halves[1], halves[0])
        send = arith.select(self.high, halves[0], halves[1])
        return combine(keep, utils.shfl_bfly(send, 2))

    def reduce(self, value, combine):
        """One partial result in each lane -> the quad's result in every lane."""
        for distance in (1, 2):
            value = combine(value, utils.shfl_bfly(value, distance))
        return value

    def gather4(self, value):
        """Lane q's value number q -> all four values in every lane."""
        word = utils.bitcast(value, i32())
        clamp = const(SEGMENTS)
        got = [
            nvvm.shfl_sync(const(EVERY_LANE), word, const(q), clamp, nvvm.ShflKind.idx)
            for q in range(4)
        ]
        return [utils.bitcast(g, value.type) for g in got]


def absmax(values):
    """max |v|, NaN if any is NaN."""
    out = ptx(f32(), "{ .reg .f32 a; abs.f32 a, $1; mov.f32 $0, a; }", values[0])
    for v in values[1:]:
        out = ptx(f32(), "{ .reg .f32 a; abs.f32 a, $2; max.NaN.f32 $0, $1, a; }", out, v)
    return out


def highest(values, sign=""):
    """max v, or with the sign "neg" max -v; NaN if any is NaN."""
    move = f"{{ .reg .f32 a; {sign or 'mov'}.f32 a, $1; mov.f32 $0, a; }}"
    out = ptx(f32(), move, values[0])
    for v in values[1:]:
        code = f"{{ .reg .f32 a; {sign or 'mov'}.f32 a, $2; max.NaN.f32 $0, $1, a; }}"
        out = ptx(f32(), code, out, v)
    return out


def fmax(a, b):
    """max(a, b), NaN if either is."""
    return ptx(f32(), "max.NaN.f32 $0, $1, $2;", a, b)


def fadd(a, b):
    """a + b."""
    return ptx(f32(), "add.rn.f32 $0, $1, $2;", a, b)
