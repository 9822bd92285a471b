"""Products of MXFP4 records in FP8: codes to E5M2 in registers, wgmma on them, sums in float32.

E2M1 times a power of two is exact in E5M2 over 27 octaves. The group's power goes into the look-up
that turns codes into bytes: seven instructions for eight codes, and three for a table of a row's 32
columns. While wgmma multiplies 32 columns, with an operand in registers, the next are expanded: by
data flow alone, since compilers move what may move behind a wait.

Tensor cores add FP8 products in an accumulator of some 14 bits. `partial` sums stay in it for a few
hundred columns; the callers add them in float32.
"""

from __future__ import annotations

import itertools
from typing import cast

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import fragments
from pallas_kernels.hopper import expand
from pallas_kernels.hopper.inlined import address, swizzled
from pallas_kernels.hopper.quad import Quad, asm, const, f32, ptx, run

# Eight codes of a word as E5M2: $0 those of even columns, $1 of odd ones. $3 and $4 are a table of
# the bytes of 0 to 1.5 and of 2 to 6, times the scale.
CODES = """{
 .reg .b32 t,u,s;
 and.b32 u,$2,0x77777777;
 prmt.b32 t,$3,$4,u; lop3.b32 $0,$2,0x80808080,t,0xEA;
 shr.u32 u,u,16; shl.b32 s,$2,4;
 prmt.b32 t,$3,$4,u; lop3.b32 $1,s,0x80808080,t,0xEA;
 }"""
# Bytes of E5M2 where the scale is one, and of an octave.
TABLE, OCTAVE = (0x3E3C3800, 0x46444240), (0x04040400, 0x04040404)
ONE = fragments.ONE["float8"]
GROUPS = 4  # of 32 columns in a record
SWIZZLED = 0x40000040 << 32  # of a descriptor: 8 rows of 128 bytes, swizzled, are 1024 bytes


def bytes_of(words, scales):
    """The registers of each group of 32 columns: even and odd columns, of a row and of row + 8."""
    for group in range(GROUPS):
        rows = []
        for half in (0, 1):
            stored = asm(f"prmt.b32 $0,$1,0,{0x4440 | group};", 1, scales[half][0])[0]
            table = [
                asm(f"mad.lo.u32 $0,$1,{octave},{(one - ONE * octave) % 2**32};", 1, stored)[0]
                for one, octave in zip(TABLE, OCTAVE, strict=True)
            ]
            rows.append(asm(CODES, 2, words[2 * group + half], *table))
        yield [row[odd] for odd in (0, 1) for row in rows]


def plain(c: fragments.Carrier, record):
    """What `bytes_of` makes of a record, float8_e5m2 (64, 128), columns in order, in jax.numpy."""
    words, tail = record[: fragments.CODE_LINES], record[fragments.CODE_LINES :]
    codes = fragments._codes_of_words(c, words[None, None]).astype(jnp.int32)
    stored = fragments._stored_of_words(c, tail[None, None]).astype(jnp.int32)
    scale = jnp.repeat(stored, fragments.COLUMNS // c.groups, axis=-1)
    magnitude = codes & 7
    of_one = jnp.array([byte for t in TABLE for byte in t.to_bytes(4, "little")], jnp.int32)
    byte = of_one[magnitude] + jnp.where(magnitude > 0, 4 * (scale - ONE), 0)
    byte = (byte & 0x7F) | (codes & 8) << 4
    return lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e5m2)


def kind_of(dtype) -> str:
    """The name of an FP8 type in instructions."""
    return {"float8_e5m2": "e5m2", "float8_e4m3fn": "e4m3"}[jnp.dtype(dtype).name]


def array_of(tokens: int):
    """The type of float32 sums (64, tokens)."""
    shape = (fragments.ROWS, tokens)
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)


X = plgpu.RefType(swizzled(128, 1))


def partial(c: fragments.Carrier, tokens: int, left: str, transforms=None):
    """Return ``multiply(record, x, sums) -> sums + weights @ x^T``, on its way: `wait`, `settled`.

    One group of asynchronous products for 32 columns. Each thread has read its part of the record
    when it returns.

    Args:
      c: how the record is written.
      tokens: rows of x, a multiple of 8.
      left: what x is, "e5m2" or "e4m3".
      transforms: of x's memory, if not those of `inlined.swizzled`; lines of 128 bytes lie alike.

    Returns:
      A function of a record, of x (tokens, 128) in shared memory, swizzled by 128 bytes, and of
      float32 sums (64, tokens).
    """
    place = X if transforms is None else plgpu.RefType(transforms)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), place, plgpu.Layout.WGMMA), return_type=array_of(tokens)
    )
    def multiply(_, record, x, sums):
        return registers_of(sums, _multiply(c, record, x, values_of(sums), tokens, left))

    return multiply


def whole(tokens: int, right: str, left: str):
    """As `partial`, of weights (64, 128) that are FP8 numbers in shared memory, like x."""

    @plgpu.inline_mgpu(arg_types=(X, X, plgpu.Layout.WGMMA), return_type=array_of(tokens))
    def multiply(_, w, x, sums):
        values, starts = values_of(sums), [_descriptor(ref) for ref in (w, x)]
        for group in range(GROUPS):
            run("wgmma.fence.sync.aligned;")
            w_at, x_at = (arith.addi(start, _long(2 * group)) for start in starts)
            values = _wgmma(values, [w_at], x_at, tokens, f"{right}.{left}")
            run("wgmma.commit_group.sync.aligned;")
        return registers_of(sums, values)

    return multiply


def wait(groups: int):
    """Wait until no more than so many of the last groups of 32 columns are on their way."""

    @plgpu.inline_mgpu()
    def emit(_):
        run(f"wgmma.wait_group.sync.aligned {groups};")

    emit()


def settled(tokens: int, groups: int = 0):
    """Return ``settle(sums) -> sums``, behind `wait`: what uses them stays behind it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=array_of(tokens))
    def settle(_, sums):
        return registers_of(sums, _behind_wait(values_of(sums), groups))

    return settle


def weighted(tokens: int, aligned: bool = True):
    """Return ``add(sums, part, powers) -> sums + part * powers``, powers float32 (tokens,).

    If they are not aligned, they may start at any word.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=array_of(tokens),
    )
    def add(_, sums, part, powers):
        return registers_of(sums, _add(values_of(sums), values_of(part), powers, aligned))

    return add


def few(c: fragments.Carrier, tokens: int, records: int, left: str):
    """Return ``multiply(records, xs, powers, sums) -> sums + sum_r power_r * (W_r @ x_r^T)``.

    For few tokens: several records' products are on their way together. When it returns, all
    threads of the warpgroup have read everything.

    Args:
      c: how the records are written.
      tokens: rows of each x, a multiple of 8.
      records: how many.
      left: what each x is, see `partial`.

    Returns:
      A function of tuples of records, of x as for `partial` and of powers (tokens,), all in shared
      memory, and of float32 sums (64, tokens).
    """

    @plgpu.inline_mgpu(
        arg_types=(
            *((plgpu.RefType(),) * records, (X,) * records, (plgpu.RefType(),) * records),
            plgpu.Layout.WGMMA,
        ),
        return_type=array_of(tokens),
    )
    def multiply(_, of_weights, xs, powers, sums):
        zeros = [const(0.0)] * (tokens // 2)
        parts = []
        for record, x in zip(of_weights, xs, strict=True):
            parts += _multiply(c, record, x, zeros, tokens, left)
        parts = _behind_wait(parts, 0)
        values = values_of(sums)
        for i, power in enumerate(powers):
            values = _add(values, parts[i * tokens // 2 :][: tokens // 2], power)
        utils.warpgroup_barrier()
        return registers_of(sums, values)

    return multiply


def _multiply(c, record, x, sums, tokens, left):
    """Emit the products of a record, a group of 32 columns each."""
    words, scales = expand.load(c, record)
    base = _descriptor(x)
    for group, registers in enumerate(bytes_of(words, scales)):
        run("wgmma.fence.sync.aligned;")
        at = arith.addi(base, _long(2 * group))
        sums = _wgmma(sums, registers, at, tokens, f"e5m2.{left}")
        run("wgmma.commit_group.sync.aligned;")
    return sums


def _descriptor(ref):
    """Of an operand in shared memory."""
    start = arith.andi(arith.shrui(address(ref), const(4)), const(0x3FFF))
    return arith.ori(arith.extui(ir.IntegerType.get_signless(64), start), _long(SWIZZLED))


def _wgmma(sums, weights, descriptor, tokens, kind):
    """One product of 64 rows and 32 columns; ``sums`` are a thread's float32 values.

    ``weights`` are four registers, or one descriptor.
    """
    count = tokens // 2
    names = (f"${i}" for i in itertools.count())
    out = ",".join(itertools.islice(names, count))
    list(itertools.islice(names, count))  # the same registers, as operands
    left = ",".join(itertools.islice(names, len(weights)))
    left = f"{{{left}}}" if len(weights) == 4 else left
    code = (
        f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.f32.{kind}"
        f" {{{out}}}, {left}, {next(names)}, 1, 1, 1;"
    )
    letters = ["r"] * 4 if len(weights) == 4 else ["l"]
    return _in_place(sums, code, *weights, descriptor, constraints=[*letters, "l"])


def _behind_wait(sums, groups):
    """Emit a wait that hands sums on, so that no use of them moves before it."""
    return _in_place(sums, f"wgmma.wait_group.sync.aligned {groups};")


def _in_place(sums, code, *operands, constraints=()):
    """Emit code whose results are in the registers of float32 operands."""
    count = len(sums)
    kind = llvm.StructType.get_literal([f32()] * count)
    tied = [*["=f"] * count, *(str(i) for i in range(count)), *constraints]
    out = cast(
        ir.Value,
        llvm.inline_asm(kind, [*sums, *operands], code, ",".join(tied), has_side_effects=True),
    )
    return [llvm.extractvalue(f32(), out, [i]) for i in range(count)]


def _add(sums, part, powers, aligned=True):
    """``sums + part * powers``; a thread has tokens 8 j + 2 q and their neighbours, of two rows."""
    start = arith.addi(address(powers), arith.shli(Quad().lane, const(3)))
    out = list(sums)
    for j in range(len(sums) // 4):
        at = arith.addi(start, const(32 * j))
        code = "ld.shared.v2.b32 {$0,$1}, [$2];"
        if not aligned:
            code = "ld.shared.b32 $0, [$2]; ld.shared.b32 $1, [$2+4];"
        bits = asm(code, 2, at, volatile=True)
        two = [utils.bitcast(b, f32()) for b in bits]
        for i in range(4):
            place = 4 * j + i
            out[place] = ptx(
                f32(), "fma.rn.f32 $0, $1, $2, $3;", part[place], two[i % 2], sums[place]
            )
    return out


def _places(array):
    tokens = array.registers.shape[1] * 8
    return [(0, j, 0, 0, half, 0, 0, 0, 0) for j in range(tokens // 8) for half in (0, 1)]


def values_of(array):
    """A thread's values of an array in wgmma's layout, in the order of its registers."""
    places = _places(array)
    return [llvm.extractelement(array.registers[p], const(e)) for p in places for e in (0, 1)]


def registers_of(like, values):
    """An array in the layout of another, of a thread's values as `values_of` gives them."""
    out = np.empty(like.registers.shape, dtype=object)
    for i, place in enumerate(_places(like)):
        out[place] = expand.vector(*values[2 * i :][:2])
    return fa.FragmentedArray(_registers=out, _layout=like.layout, _is_signed=None)


def _long(value):
    return utils.c(value, ir.IntegerType.get_signless(64))
