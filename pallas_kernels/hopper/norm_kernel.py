"""RMSNorm, and the addition before it, in the quantizer's kernel: for few tokens.

``h = x + residual, n = h * rsqrt(mean(h^2) + eps) * weight``, then n as `quantize_kernel` takes x.
A CTA makes one tile of 64 rows and 128 columns. Four, a cluster, read a quarter of each row's
columns and tell each other the sums of squares, so that every cluster knows those of whole rows:

    TMA loads -> h, its squares' sums -> the cluster adds them -> n to shared memory
    -> wgmma with T_b -> registers: scale, round, pack (`epilogue`) -> TMA store, of h, too

Rows are few and tiles 64 high: the statistics are read from a view of x in which a row is several.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.hopper import quantize_kernel
from pallas_kernels.hopper.inlined import (
    CLUSTER_WAIT,
    ROWS,
    SCALAR,
    address,
    cluster_arrive,
    swizzled,
    wait_for_kernel_before,
)
from pallas_kernels.hopper.quad import Quad, asm, const, f32, run
from pallas_kernels.hopper.quantize_geometry import Geometry
from pallas_kernels.hopper.tiles import FEW_TOKENS, Tiles

COLUMNS, STAGES, CLUSTER = 128, 2, 4
ROW = SCALAR  # the layout of a value a row


@dataclasses.dataclass(frozen=True)
class Normed:
    """How rows are read for their statistics.

    Attributes:
      geometry: of the quantizer.
      eps: added to the mean square.
      added: whether there is a residual.
      split: rows of the view that one row of x is.
      cluster: CTAs that share the reading.
    """

    geometry: Geometry
    eps: float
    added: bool
    split: int
    cluster: int

    @property
    def tiles(self) -> int:
        """Of 128 columns of the view."""
        return -(-self.geometry.width // self.split // COLUMNS)

    @property
    def per(self) -> int:
        """Tiles that a CTA reads."""
        return -(-self.tiles // self.cluster)


def check_supported(x, norm, residual) -> None:
    """Raise NotImplementedError, with the reason, for what the kernel does not cover."""
    if x.shape[0] > FEW_TOKENS:
        raise NotImplementedError(f"{x.shape[0]} rows: norms are fused up to {FEW_TOKENS}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise NotImplementedError(
            f"residual is {residual.dtype} {residual.shape}, x {x.dtype} {x.shape}"
        )
    if norm[0].dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the norm's weight has dtype {norm[0].dtype}")


@functools.partial(jax.jit, static_argnames=("fmt", "eps", "layout", "interpret", "early"))
def transform_quantize(
    x,
    residual,
    weight,
    transform,
    fmt,
    *,
    eps,
    global_scale,
    layout,
    interpret=False,
    after=(),
    early=False,
):
    """As `quantize_kernel.transform_quantize` of the normed sum, and the sum.

    Args:
      x: (M, K) bfloat16 or float16, M at most 64, K a multiple of 64.
      residual: like x, or None.
      weight: (K,), of the norm.
      transform: (K/d, d, d) or (d, d), of x's dtype; None for none.
      fmt: the number format.
      eps: added to the mean square; static.
      global_scale: as there.
      layout: as there.
      interpret: as there.
      after: as there.
      early: as there.

    Returns:
      Codes, scales, and ``x + residual`` (M, K), None without a residual.
    """
    quantize_kernel.check_supported(x, transform, fmt)
    transform = quantize_kernel.or_identity(transform, x, fmt)
    m, k = x.shape
    split = ROWS // max(8, 1 << (m - 1).bit_length())
    while k % (64 * split) or (interpret and split > 1):
        split //= 2
    if any(rows > 8 and rows % 8 for rows in (m, m * split)):
        # TMA's view of a swizzled tile splits M by 8 rows.
        x, residual = (a if a is None else jnp.pad(a, ((0, -m % 8), (0, 0))) for a in (x, residual))
    d = transform.shape[-1]
    one = k <= COLUMNS or interpret  # nothing reaches beyond a single tile: see `tiles.choose`
    cluster = 1 if one else CLUSTER
    # FP8 activations have a power of two for the 512 columns of a cluster.
    tiles = Tiles(1, 1, cluster=cluster if fmt.group_size == COLUMNS * CLUSTER else 1)
    sizes = x.shape[0], k, d, fmt.group_size, transform.ndim == 2
    geometry = Geometry(*sizes, layout, tiles, "wgmma")
    normed = Normed(geometry, eps, residual is not None, split, cluster)
    left = [a for a in (x, residual) if a is not None]
    views = [a.reshape(a.shape[0] * split, k // split) for a in left]
    g = jnp.asarray(global_scale, jnp.float32).reshape(1)
    early = early and len(x) == m  # XLA cuts padded rows off
    codes, scales, *sums = _kernel(normed, fmt, x.dtype, weight.dtype, interpret, early)(
        *left, *views, weight, transform.reshape(-1, d, d), g, *after
    )
    codes, scales = quantize_kernel.as_typed(codes, scales, m, fmt, layout)
    return codes, scales, sums[0][:m] if sums else None


def _kernel(normed: Normed, fmt, dtype, weight_dtype, interpret: bool, early: bool):
    """The kernel as a function of x, residual, their views, weight, transforms, g, others."""
    geo, count = normed.geometry, 1 + normed.added
    tile = (ROWS, COLUMNS)
    operand = swizzled(min(128, 2 * geo.block), 2)
    wide = swizzled(128, 2)
    word = quantize_kernel.scale_word(geo, fmt)
    codes_shape, scales_shape = geo.outputs
    scratch: dict[str, Any] = dict(
        n_s=plgpu.SMEM(tile, dtype, transforms=operand),
        left_s=plgpu.SMEM((count, *tile), dtype, transforms=wide),
        views_s=plgpu.SMEM((STAGES * count, *tile), dtype, transforms=wide),
        w_s=plgpu.SMEM((COLUMNS,), weight_dtype),
        t_s=plgpu.SMEM(
            (1 if geo.shared else COLUMNS // geo.block, geo.block, geo.block),
            dtype,
            transforms=operand,
        ),
        codes_s=quantize_kernel.codes_memory(geo, 1),
        sums_s=plgpu.SMEM((normed.cluster, ROWS), jnp.float32),
        ready=plgpu.Barrier(num_arrivals=count + 2),
        view_ready=plgpu.Barrier(num_barriers=STAGES, num_arrivals=count),
    )
    if geo.tiles.cluster > 1:
        scratch["tops_s"] = plgpu.SMEM((2, geo.tiles.cluster, ROWS), jnp.int32)
    if interpret:
        scratch["scales_s"] = plgpu.SMEM(geo.oriented(ROWS, COLUMNS // geo.per_scale), word)
    out = [
        jax.ShapeDtypeStruct(codes_shape, geo.code_dtype),
        jax.ShapeDtypeStruct(scales_shape, word),
    ]
    if normed.added:
        out.append(jax.ShapeDtypeStruct((geo.rows, geo.width), dtype))
    slabs = -(-geo.width // COLUMNS)
    clustered = normed.cluster > 1
    return plgpu.kernel(
        functools.partial(_body, normed, fmt, interpret, early),
        out_type=tuple(out),
        grid=(-(-slabs // normed.cluster),),
        grid_names=("cta",),
        cluster=(normed.cluster,) if clustered else (),
        cluster_names=("rank",) if clustered else (),
        num_threads=1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=quantize_kernel.interpreter() if interpret else None,
    )


def _body(
    normed,
    fmt,
    interpret,
    early,
    *operands,
    n_s,
    left_s,
    w_s,
    t_s,
    codes_s,
    ready,
    tops_s=None,
    scales_s=None,
    **statistics,
):
    """One CTA: its tile of all rows and 128 columns."""
    geo, count = normed.geometry, 1 + normed.added
    left, views = operands[:count], operands[count : 2 * count]
    w_g, t_g, g_g = operands[2 * count :][:3]
    codes_g, scales_g, *sum_g = operands[-2 - normed.added :]
    if normed.cluster > 1:  # before others write to it, a CTA has to be there
        cluster_arrive()
    if not interpret:
        wait_for_kernel_before()
    if early:
        plgpu.griddepcontrol_launch_dependents()
    rank = lax.axis_index("rank") if normed.cluster > 1 else 0 * lax.axis_index("wg")
    slab = lax.axis_index("cta") * normed.cluster + rank
    columns = pl.ds(pl.multiple_of(slab * COLUMNS, COLUMNS), COLUMNS)
    rows = pl.ds(pl.multiple_of(0 * slab, 8), ROWS)
    held = t_s.shape[0]
    first = 0 if geo.shared else pl.multiple_of(slab * held, held)
    scale = functools.partial(_scale_of_rows, normed, views, rank, interpret, **statistics)
    for i, x_g in enumerate(left):
        plgpu.copy_gmem_to_smem(x_g.at[rows, columns], left_s.at[i], ready)
    plgpu.copy_gmem_to_smem(w_g.at[columns], w_s, ready)
    plgpu.copy_gmem_to_smem(t_g.at[pl.ds(first, held)], t_s, ready)
    factor = scale()
    plgpu.barrier_wait(ready)
    h = _added(left_s.at[i] for i in range(count))
    weight = plgpu.layout_cast(w_s[...], plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
    factors = _broadcast(factor, 0) * _broadcast(weight, 1)
    n_s[...] = (h.astype(jnp.float32) * factors).astype(n_s.dtype)
    if normed.added:
        left_s.at[0][...] = h
    plgpu.commit_smem()
    for h_g in sum_g:
        plgpu.copy_smem_to_gmem(left_s.at[0], h_g.at[rows, columns])
    y = quantize_kernel.transformed(geo, n_s, t_s, 0)
    if tops_s is not None:
        cluster_arrive()
    scales, exist = quantize_kernel.scales_of_tile(geo, scales_g, slab, 0, 0, 0 * slab)
    encode = quantize_kernel.encoder(geo, fmt, g_g[0], interpret)
    tops = () if tops_s is None else (tops_s.at[0],)
    codes_s.at[0][...] = encode(scales if scales_s is None else scales_s, exist, y, *tops)
    plgpu.commit_smem()
    if scales_s is not None:
        plgpu.copy_smem_to_gmem(scales_s, scales, commit_group=False)
    to = codes_g.at[rows, pl.ds(slab * (COLUMNS // geo.per_code), COLUMNS // geo.per_code)]
    plgpu.copy_smem_to_gmem(codes_s.at[0], to)
    plgpu.wait_smem_to_gmem(0)


def _added(tiles):
    """The sum of tiles in shared memory, rounded to their type."""
    loaded = [plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA) for tile in tiles]
    return functools.reduce(jnp.add, loaded)


def _broadcast(values, axis):
    return lax.broadcast_in_dim(values, (ROWS, COLUMNS), (axis,))


def _scale_of_rows(normed, views, rank, interpret, *, views_s, view_ready, sums_s):
    """``rsqrt(mean(h^2) + eps)`` of each row, float32 (64,)."""
    count = len(views)
    rows = pl.ds(pl.multiple_of(0 * rank, 8), ROWS)

    def fetch(i):
        slot = lax.rem(i, STAGES)
        tile = pl.multiple_of((rank * normed.per + i) * COLUMNS, COLUMNS)
        for part, view in enumerate(views):
            at = views_s.at[slot * count + part]
            plgpu.copy_gmem_to_smem(view.at[rows, pl.ds(tile, COLUMNS)], at, view_ready.at[slot])

    def advance(i, sums):
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(view_ready.at[slot])
        h = _added(views_s.at[slot * count + part] for part in range(count)).astype(jnp.float32)
        # A view of one tile gives it to every CTA: only the first counts it.
        counts = jnp.where(rank * normed.per + i < normed.tiles, 1.0, 0.0)
        sums = sums + jnp.sum(h * h, axis=1) * counts

        @pl.when(i + STAGES < normed.per)
        def _():
            plgpu.commit_smem()  # all threads have read
            fetch(i + STAGES)

        return sums

    for i in range(min(STAGES, normed.per)):
        fetch(i)
    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    sums = lax.fori_loop(0, normed.per, advance, zero)
    if interpret:
        return lax.rsqrt(sums / normed.geometry.width + normed.eps)
    return _over_cluster(normed)(sums_s, sums)


def _over_cluster(normed: Normed):
    """Return ``scale(sums_s, sums) -> rsqrt(mean + eps)`` of sums of the view's rows."""
    cluster, split = normed.cluster, normed.split

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), layout=ROW),
    )
    def scale(_, sums_s, sums):
        quad = Quad()
        start = address(sums_s)
        mine = arith.addi(start, arith.muli(quad.row, const(4)))
        values = [_scalar(register) for register in sums.registers.flat]
        if cluster > 1:
            rank = asm("mov.u32 $0, %cluster_ctarank;", 1)[0]
            mine = arith.addi(mine, arith.muli(rank, const(4 * ROWS)))
            run(CLUSTER_WAIT)
            for half, value in enumerate(values):  # a quad's lanes write to one CTA each
                run(
                    "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1;"
                    " st.shared::cluster.f32 [a], $2; }",
                    *(arith.addi(mine, const(32 * half)), quad.lane, value),
                )
            run("barrier.cluster.arrive.release.aligned;")
            run(CLUSTER_WAIT)
        else:
            for half, value in enumerate(values):
                run("st.shared.f32 [$0], $1;", arith.addi(mine, const(32 * half)), value)
            utils.warpgroup_barrier()
        out = np.empty(sums.registers.shape, dtype=object)
        for half in range(len(values)):
            row = arith.addi(quad.row, const(8 * half))
            at = arith.andi(arith.muli(row, const(split)), const(ROWS - 1))
            at = arith.addi(start, arith.muli(at, const(4)))
            out.flat[half] = _like(sums.registers.flat[half], _rsqrt(normed, at))
        return fa.FragmentedArray(_registers=out, _layout=sums.layout, _is_signed=None)

    return scale


def _rsqrt(normed, at):
    """Of a row whose sums start at an address in shared memory."""
    offsets = [4 * (ROWS * r + i) for r in range(normed.cluster) for i in range(normed.split)]
    loads = "".join(f"ld.shared.f32 z, [$1+{o}]; add.rn.f32 s, s, z; " for o in offsets)
    share, eps = (np.float32(v).view(np.uint32) for v in (1 / normed.geometry.width, normed.eps))
    code = (
        "{ .reg .f32 s,z; mov.f32 s, 0f00000000; "
        + loads
        + f"mul.rn.f32 s, s, 0f{share:08X}; add.rn.f32 s, s, 0f{eps:08X}; rsqrt.approx.f32 s, s;"
        " mov.b32 $0, s; }"
    )
    return utils.bitcast(asm(code, 1, at, volatile=True)[0], f32())


def _scalar(register):
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, [], [0])
    return register


def _like(register, value):
    if isinstance(register.type, ir.VectorType):
        return vector.broadcast(register.type, value)
    return value
