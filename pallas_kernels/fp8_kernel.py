"""Records of MXFP4 to E4M3 weights: the first half of the FP8 library path, one Mosaic GPU kernel.

An E2M1 code times a power of two is an E4M3 number over 14 octaves, so that a tensor whose group
exponents span no more becomes FP8 without error; smaller groups are rounded to E4M3's subnormal
steps, less than 2**-18 of the largest scale. Columns come out in the order of `fragments.to_lanes`,
and a product is the same if the other operand's columns do, too.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import expand, fragments
from pallas_kernels.inlined import swizzled
from pallas_kernels.quad import asm

# Bring the top exponent's scale, 2**(TOP - 127) in a record, to 2**6: 6 * 2**6 = 384 < 448.
LIFT = 6 + 127 - fragments.TOP
WARPGROUPS, STAGES = 4, 4


def weights(records, fmt):
    """Return E4M3 values, columns as `fragments.to_lanes`, ``value = unit * 2**-LIFT * out / g``.

    Args:
      records: uint32 (N/64, K/128, lines, 64) of MXFP4.
      fmt: the format.

    Returns:
      float8_e4m3fn (ceil(N/64) * 64, ceil(K/128) * 128).
    """
    c = fragments.carrier(fmt)
    if c.kind != "mxfp4":
        raise NotImplementedError(f"{fmt.name} is not exact in FP8")
    tiles, steps = records.shape[:2]
    shape = (tiles * fragments.ROWS, steps * fragments.COLUMNS)
    run = plgpu.kernel(
        functools.partial(_body, c, tiles, steps),
        out_type=jax.ShapeDtypeStruct(shape, jnp.uint8),
        grid=(132,),
        grid_names=("cta",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=dict(
            ring_s=plgpu.SMEM((WARPGROUPS * STAGES, c.lines, 64), jnp.uint32),
            out_s=plgpu.SMEM(
                (WARPGROUPS * 2, fragments.ROWS, fragments.COLUMNS),
                jnp.uint8,
                transforms=swizzled(128, 1),
            ),
            ready=plgpu.Barrier(num_barriers=WARPGROUPS * STAGES),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return lax.bitcast_convert_type(run(records), jnp.float8_e4m3fn)


def _body(c, tiles, steps, w_g, out_g, *, ring_s, out_s, ready):
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    first = cta * WARPGROUPS + wg
    stride = lax.axis_size("cta") * WARPGROUPS
    count = (tiles * steps - first + stride - 1) // stride

    def place(i):
        at = first + i * stride
        return at // steps, lax.rem(at, steps)

    def fetch(i):
        slot = wg * STAGES + lax.rem(i, STAGES)
        tile, step = place(i)
        plgpu.copy_gmem_to_smem(w_g.at[tile, step], ring_s.at[slot], ready.at[slot])

    def warm_up(i, _):
        pl.when(i < count)(lambda: fetch(i))

    convert = _to_e4m3(c)

    def advance(i, _):
        slot = wg * STAGES + lax.rem(i, STAGES)
        plgpu.barrier_wait(ready.at[slot])
        values = convert(ring_s.at[slot])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
        out = out_s.at[wg * 2 + lax.rem(i, 2)]
        out[...] = values
        plgpu.commit_smem()
        tile, step = place(i)
        rows = pl.ds(pl.multiple_of(tile * fragments.ROWS, fragments.ROWS), fragments.ROWS)
        at = pl.multiple_of(step * fragments.COLUMNS, fragments.COLUMNS)
        plgpu.copy_smem_to_gmem(out, out_g.at[rows, pl.ds(at, fragments.COLUMNS)])

    lax.fori_loop(0, STAGES, warm_up, None)
    lax.fori_loop(0, count, advance, None)
    plgpu.wait_smem_to_gmem(0)


def _to_e4m3(c):
    """Return ``convert(record) -> uint8 (64, 128)``, bytes of E4M3."""
    shape = (fragments.ROWS, fragments.COLUMNS)
    layout = fa.WGMMA_LAYOUT_8BIT
    # bfloat16 to float32 is a shift; the lift goes along with a multiplication.
    lift = np.float32(2.0**LIFT).view(np.uint32)
    code = (
        "{ .reg .b32 a; .reg .f32 f<8>; .reg .b16 h<4>;"
        + "".join(
            f" shl.b32 a,${2 + i},16; mov.b32 f{i},a; and.b32 a,${2 + i},0xFFFF0000;"
            f" mov.b32 f{4 + i},a;"
            for i in range(4)
        )
        + "".join(f" mul.rn.f32 f{i},f{i},0f{lift:08X};" for i in range(8))
        + "".join(f" cvt.rn.satfinite.e4m3x2.f32 h{i},f{2 * i + 1},f{2 * i};" for i in range(4))
        + " mov.b32 $0,{h0,h1}; mov.b32 $1,{h2,h3}; }"
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def convert(_, record):
        out = np.empty(layout.registers_shape(shape), dtype=object)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        steps = list(expand.fragments_of(c, record))
        for first, half in itertools.product(range(0, expand.STEPS, 2), (0, 1)):
            eights = [steps[first + s][2 * column + half] for s in (0, 1) for column in (0, 1)]
            for pair, word in enumerate(asm(code, 2, *eights)):
                out[0, first + pair, 0, 0, half, 0, 0, 0, 0] = utils.bitcast(word, four)
        utils.warpgroup_barrier()
        return fa.FragmentedArray(_registers=out, _layout=layout, _is_signed=False)

    return convert
