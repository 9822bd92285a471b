"""Fused block transform, scale, rounding and packing: one Mosaic GPU kernel for Hopper.

A block of threads (CTA) holds the transforms of a slab of K in shared memory and walks down M.
Each of its warpgroups runs its own pipeline over tiles of 64 rows:

    TMA load -> wgmma with T_b -> registers: scale, round, pack (`epilogue`) -> TMA store

A buffer is refilled as soon as wgmma has read it, so the next load overlaps the arithmetic of this
tile. Rows and columns beyond the array read as zeros and are not written: TMA clips, so no size
needs a padded copy (but for M above 8 that is no multiple of 8); `tiles.choose` keeps away from the
case that it does not clip. The same source runs under GPU interpretation on CPU, where
`epilogue.plain` stands in for the register part.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import repack
from pallas_kernels.hopper import epilogue, group_scales
from pallas_kernels.hopper.group_tiles import Starts, Tiles
from pallas_kernels.hopper.inlined import (
    ROWS,
    cluster_arrive,
    spread,
    swizzled,
    wait_for_kernel_before,
)
from pallas_kernels.hopper.quantize_geometry import SCALE_WORDS, Geometry


@functools.partial(
    jax.jit, static_argnames=("fmt", "layout", "tiles", "unit", "interpret", "early")
)
def transform_quantize(
    x,
    transform,
    fmt,
    *,
    global_scale,
    layout,
    tiles,
    unit="wgmma",
    interpret=False,
    after=(),
    early=False,
    starts=None,
):
    """Transform, scale, round and pack in one kernel.

    ``codes = pack(round(y * g / s)), s = rule(y), y_b = x_b @ T_b^T`` with float32 sums.

    Values below 2**-126 count as zero in the definition; here they keep their codes in groups
    whose largest value lies below 2**-121.

    Args:
      x: (M, K) bfloat16 or float16, K a multiple of 64.
      transform: (K/d, d, d) or (d, d), of x's dtype; None for none.
      fmt: the number format.
      global_scale: float32 scalar g.
      layout: "interchange": codes (M, K/2) with the even column in the low nibble, scales
        (M, K/g). "kernel": byte j of each 32 columns holds columns j and j + 16, scales (K/g, M).
        "lanes": byte 4q + n of each 32 columns holds columns 8n + 2q and 8n + 2q + 1.
        "values": bfloat16 values (M, K) times g, exact, in place of codes; scales as interchange.
        "float8", for MXFP4: as `repack.to_float8`, for FP8 as `repack.e4m3_to_float8`, a power for
        128 or 512 columns (`tiles.sharing`); only the first M columns of powers are written.
        "float8_values", for FP8: bfloat16 values (M, K) times g, and the same powers.
      tiles: sizes, see `pallas_kernels.hopper.tiles`.
      unit: "wgmma" for Hopper; "mma" for Blackwell, compiled for sm_100a but never run there.
      interpret: run under GPU interpretation, on CPU.
      after: arrays that must be there before the kernel starts; it does not read them.
      early: let the next kernel start while this one runs. For a kernel of this package that takes
        the results as they are, alone: XLA's own may read them before they wait.
      starts: `group_tiles.Starts` of rows that are spaced by 64: each group has its transforms,
        (G, K/d, d, d) or (G, 1, d, d). Rows of no group are left out.

    Returns:
      Codes uint8 (M, K/2) and scales in the format's scale type.

    Raises:
      NotImplementedError: what this kernel does not cover, with the reason.
    """
    check_supported(x, transform, fmt)
    transform = or_identity(transform, x, fmt)
    m, k = x.shape
    # TMA's view of a swizzled tile splits M by 8 rows.
    if m > 8 and m % 8:
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    d, grouped = transform.shape[-1], starts is not None
    shared = transform.ndim == 2 or (grouped and transform.shape[-3] == 1)
    geometry = Geometry(x.shape[0], k, d, fmt.group_size, shared, layout, tiles, unit)
    codes, scales = _kernel(geometry, fmt, x.dtype, interpret, early, grouped)(
        *(x, transform.reshape(-1, d, d), jnp.asarray(global_scale, jnp.float32).reshape(1)),
        *((starts.tile, *after) if grouped else after),
    )
    return as_typed(codes, scales, m, fmt, layout)


def or_identity(transform, x, fmt):
    """A transform, or in place of None the identity for x."""
    if transform is not None:
        return transform
    # Blocks as small as the groups: an infinity stays in its own group.
    return jnp.eye(min(fmt.group_size, repack.CHUNK), dtype=x.dtype)


def as_typed(codes, scales, m: int, fmt, layout: str):
    """What a kernel wrote for M rows, which it may have padded, in its types."""
    if layout == "float8_values":
        return codes[:m], scales
    if layout == "float8":
        kind = jnp.float8_e4m3fn if fmt.element.name == "e4m3" else jnp.float8_e5m2
        return lax.bitcast_convert_type(codes[:m], kind), scales
    scales = scales[:, :m] if layout == "kernel" else scales[:m]
    return codes[:m], lax.bitcast_convert_type(scales, SCALE_WORDS[fmt.scale_dtype][1])


def check_supported(x, transform, fmt) -> None:
    """Raise NotImplementedError, with the reason, for what the kernel does not cover."""
    group_scales.check_format(fmt)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"x has dtype {x.dtype}: wgmma multiplies bfloat16 or float16 with float32 sums"
        )
    if x.shape[-1] % 64 or x.shape[0] == 0:
        raise NotImplementedError(
            f"x has shape {x.shape}: TMA needs K to be a multiple of 64, and M at least 1"
        )
    if transform is None:
        return
    if transform.dtype != x.dtype:
        raise NotImplementedError(
            f"transform has dtype {transform.dtype}, x {x.dtype}: wgmma needs one dtype"
        )
    if transform.shape[-1] not in (16, 32, 64, 128):
        raise NotImplementedError(f"block d={transform.shape[-1]} is none of 16, 32, 64, 128")


def _kernel(geo: Geometry, fmt, dtype, interpret: bool, early: bool, grouped: bool = False):
    """The kernel as a function of x (M, K), transforms (B, d, d), g (1,) and what it waits for.

    That of groups takes their first row tiles behind g.
    """
    tiles, d, n = geo.tiles, geo.block, geo.tiles.warpgroups
    word = scale_word(geo, fmt)
    codes_shape, scales_shape = geo.outputs
    operand = swizzled(min(128, 2 * d), 2)
    scratch: dict[str, Any] = dict(
        x_s=plgpu.SMEM((n * tiles.stages, ROWS, tiles.columns), dtype, transforms=operand),
        t_s=plgpu.SMEM((1 if geo.shared else geo.tiles.slab // d, d, d), dtype, transforms=operand),
        codes_s=codes_memory(geo, n * tiles.results),
        x_ready=plgpu.Barrier(num_barriers=n * tiles.stages),
        t_ready=plgpu.Barrier(),
        together=plgpu.Barrier(num_arrivals=n),
    )
    if tiles.beside > 1 or tiles.cluster > 1:
        scratch["tops_s"] = plgpu.SMEM((2, max(n, tiles.cluster), ROWS), jnp.int32)
    if tiles.steps > 1 or interpret:
        gathered = geo.oriented(ROWS, geo.tiles.slab // geo.per_scale)
        scratch["scales_s"] = plgpu.SMEM((n * 2, *gathered), word)
    return plgpu.kernel(
        functools.partial(_body, geo, fmt, interpret, early, grouped),
        out_type=(
            jax.ShapeDtypeStruct(codes_shape, geo.code_dtype),
            jax.ShapeDtypeStruct(scales_shape, word),
        ),
        grid=(geo.ctas // tiles.cluster,),
        grid_names=("cta",),
        cluster=(tiles.cluster,) if tiles.cluster > 1 else (),
        cluster_names=("rank",) if tiles.cluster > 1 else (),
        num_threads=n,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter() if interpret else None,
    )


def scale_word(geo: Geometry, fmt):
    """The type in which the kernel writes scales, or powers."""
    return jnp.float32 if geo.layout in repack.POWERED else SCALE_WORDS[fmt.scale_dtype][0]


def codes_memory(geo: Geometry, count: int):
    """Shared memory for so many tiles of codes."""
    columns, itemsize = geo.tiles.columns // geo.per_code, geo.code_dtype.itemsize
    # TMA tiles of codes must divide a row of bytes and are no wider than one step.
    packed = math.gcd(math.gcd(geo.outputs[0][1], columns), 128)
    transforms = swizzled(packed if itemsize == 1 else 128, itemsize)
    return plgpu.SMEM((count, ROWS, columns), geo.code_dtype, transforms=transforms)


def interpreter():
    """Parameters of GPU interpretation, on CPU."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def _body(
    geo, fmt, interpret, early, grouped, x_g, t_g, g_g, *others, t_s, t_ready, together, **own
):
    """One CTA: its share of all (slab, row tile) pairs, slab by slab."""
    codes_g, scales_g = others[-2:]
    if geo.tiles.cluster > 1:  # before others write to it, a CTA has to be there
        cluster_arrive()
    if not interpret:
        wait_for_kernel_before()
    if early:  # now: when the next kernel starts, all that this one waited for is in memory
        plgpu.griddepcontrol_launch_dependents()
    slabs, row_tiles = geo.pairs
    tiles = None
    if grouped:
        tile_g, groups = others[0], others[0].shape[0] - 1
        tiles, row_tiles = Tiles(Starts(None, tile_g, None), groups, 0, ROWS), tile_g[groups]
    total = slabs * row_tiles
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    if geo.tiles.cluster > 1:
        cta = cta * geo.tiles.cluster + lax.axis_index("rank")
    end = (cta + 1) * total // geo.ctas
    held = t_s.shape[0]
    encode = encoder(geo, fmt, g_g[0], interpret)

    def one_slab(position):
        slab = position // row_tiles
        first = position - slab * row_tiles
        count = jnp.minimum(end - position, row_tiles - first)
        group = 0
        if tiles is not None:
            group = tiles.group_of(first)
            count = jnp.minimum(count, tile_g[group + 1] - first)
        # Nobody may still read the transforms of the slab before.
        plgpu.barrier_arrive(together)
        plgpu.barrier_wait(together)

        @pl.when(wg == 0)
        def _():
            at = 0 if geo.shared else pl.multiple_of(slab * held, held)
            at = at if tiles is None else at + group * (t_g.shape[0] // groups)
            plgpu.copy_gmem_to_smem(t_g.at[pl.ds(at, held)], t_s, t_ready)

        _walk(geo, encode, x_g, codes_g, scales_g, t_s, slab, first, count, t_ready, **own)
        return position + count

    lax.while_loop(lambda position: position < end, one_slab, cta * total // geo.ctas)
    plgpu.wait_smem_to_gmem(0)


def _walk(
    geo,
    encode,
    x_g,
    codes_g,
    scales_g,
    t_s,
    slab,
    first,
    count,
    t_ready,
    *,
    x_s,
    codes_s,
    x_ready,
    scales_s=None,
    tops_s=None,
):
    """One warpgroup: its row tiles ``first .. first + count`` of a slab, step by step."""
    tiles, steps = geo.tiles, geo.tiles.steps
    wg = lax.axis_index("wg")
    below, beside = wg // tiles.beside, lax.rem(wg, tiles.beside)
    last = count * steps

    def row(tile):
        return pl.multiple_of(((first + tile) * geo.below + below) * ROWS, ROWS)

    def rows_columns(tile, step, per):
        column = pl.multiple_of(((slab * tiles.beside + beside) * steps + step) * per, per)
        return pl.ds(row(tile), ROWS), pl.ds(column, per)

    def fetch(i):
        tile, step = i // steps, lax.rem(i, steps)
        slot = wg * tiles.stages + lax.rem(i, tiles.stages)
        at = rows_columns(tile, step, tiles.columns)
        plgpu.copy_gmem_to_smem(x_g.at[at], x_s.at[slot], x_ready.at[slot])

    def warm_up(i, _):
        pl.when(i < last)(lambda: fetch(i))

    def advance(i, _):
        tile, step = i // steps, lax.rem(i, steps)
        slot = wg * tiles.stages + lax.rem(i, tiles.stages)
        plgpu.barrier_wait(x_ready.at[slot])
        y = transformed(geo, x_s.at[slot], t_s, beside * steps + step)
        # At most the store before is still reading; and all four warps are past wgmma.
        plgpu.wait_smem_to_gmem(tiles.results - 1, wait_read_only=True)
        pl.when(i + tiles.stages < last)(lambda: fetch(i + tiles.stages))
        out = codes_s.at[wg * tiles.results + lax.rem(i, tiles.results)]
        scales, exist = scales_of_tile(geo, scales_g, slab, beside, step, row(tile))
        gathered = None if scales_s is None else scales_s.at[wg * 2 + lax.rem(tile, 2)]
        if gathered is not None:
            groups = geo.groups
            at = pl.ds(pl.multiple_of(step * groups, groups), groups)
            scales = gathered.at[geo.oriented(slice(None), at)]
        tops = () if tops_s is None else (tops_s.at[lax.rem(tile, 2)],)
        out[...] = encode(scales, exist, y, *tops)
        plgpu.commit_smem()
        if gathered is not None:

            @pl.when(step == steps - 1)
            def _():
                whole = steps * geo.groups
                start = pl.multiple_of(slab * whole, whole)
                at = geo.oriented(pl.ds(row(tile), ROWS), pl.ds(start, whole))
                plgpu.copy_smem_to_gmem(gathered, scales_g.at[at], commit_group=False)

        codes = codes_g.at[rows_columns(tile, step, tiles.columns // geo.per_code)]
        plgpu.copy_smem_to_gmem(out, codes)

    lax.fori_loop(0, tiles.stages, warm_up, None)
    plgpu.barrier_wait(t_ready)
    lax.fori_loop(0, last, advance, None)
    # The next slab starts with the first buffers again.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def scales_of_tile(geo: Geometry, scales_g, slab, beside, step, row):
    """Where a tile's scales or powers go; how many rows and groups of it exist."""
    rows = pl.ds(row, ROWS)
    if geo.layout in repack.POWERED:
        place, mine = geo.power(slab, beside)
        return scales_g.at[pl.ds(place, 1), rows], (geo.rows - row, jnp.where(mine, 1, 0))
    first = ((slab * geo.tiles.beside + beside) * geo.tiles.steps + step) * geo.groups
    groups = pl.ds(pl.multiple_of(first, geo.groups), geo.groups)
    exist = geo.rows - row, geo.width // geo.group - first
    return scales_g.at[geo.oriented(rows, groups)], exist


def transformed(geo: Geometry, x_s, t_s, step):
    """``x_b @ T_b^T`` of the blocks of one tile: float32 accumulators (64, d) each."""
    d = geo.block
    blocks = geo.tiles.columns // d
    if geo.unit == "mma":
        zero = plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), plgpu.Layout.WGMMA)
        held = [t_s.at[0 if geo.shared else step * blocks + b] for b in range(blocks)]
        columns = [x_s.at[:, b * d : (b + 1) * d] for b in range(blocks)]
        mma = plgpu.mma  # type: ignore[attr-defined]  # not in jax 0.10
        return [mma(zero, x[...], t.T[...]) for x, t in zip(columns, held, strict=True)]

    def multiply(*accumulators):
        for b, acc in enumerate(accumulators):
            t = t_s.at[0 if geo.shared else step * blocks + b]
            plgpu.wgmma(acc, x_s.at[:, b * d : (b + 1) * d], t.T)
        plgpu.wgmma_wait(0)
        return [acc[...] for acc in accumulators]

    return pl.run_scoped(multiply, *[plgpu.ACC((ROWS, d), jnp.float32)] * blocks)


def encoder(geo: Geometry, fmt, g, interpret):
    """``encode(scales_ref, exist, y) -> codes``: scales go to the ref, codes are returned."""
    if interpret and geo.tiles.beside > 1:
        raise NotImplementedError("warpgroups that find powers together are not interpreted")
    if interpret:

        def twin(scales, exist, y):
            del exist  # TMA clips
            codes, stored = epilogue.plain(fmt, geo.layout, jnp.concatenate(y, axis=1), g)
            scales[...] = stored
            return codes

        return twin

    widths = (geo.block,) * (geo.tiles.columns // geo.block)
    shared_by = geo.tiles.beside, geo.tiles.cluster
    in_registers = epilogue.encode_tile(fmt, ROWS, widths, geo.layout, *shared_by)

    def encode(scales, exist, y, *tops):
        return in_registers(scales, *tops, spread(g), *(spread(e) for e in exist), *y)

    return encode
