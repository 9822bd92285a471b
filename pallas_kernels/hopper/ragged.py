"""The door to the kernel for rows sorted by group: quantize, find where groups start, multiply."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels import exactly, repack, stacks
from pallas_kernels.hopper import group_tiles, matmul, mosaic_gpu, plans
from pallas_kernels.hopper.tiles import PROMOTED, Tiles, Tiling, shrink

ROWS = 64  # of the quantizer's tiles: those of groups with transforms of their own start at them


def layer(x, transforms, weights, group_sizes, fmt, *, global_scale=None, out_dtype=None) -> tuple:
    """As `pallas_kernels.reference.ragged_transform_quantize_matmul`, for a tuple of weights.

    A transform that all groups share, or none, is applied by the quantizer of dense layers. Where
    groups have their own, rows are first moved to tiles of their groups.

    Args:
      x: (M, K) bfloat16, sorted by group; for quantizing float16, too.
      transforms: (G or 1, K/d or 1, d, d), or None.
      weights: `stacks.Stack` (G, N, K), of one K.
      group_sizes: (G,) integers.
      fmt: number format of the activations, or None.
      global_scale: of the activations, scalar; None takes the format's own.
      out_dtype: of the results; default x's.

    Raises:
      NotImplementedError: what the kernels, the device or this jax do not cover.
    """
    device = mosaic_gpu.require_hopper()
    return launch(
        *(x, transforms, weights, group_sizes, fmt),
        global_scale=global_scale,
        out_dtype=out_dtype,
        device=device,
    )


def launch(
    x,
    transforms,
    weights,
    group_sizes,
    fmt,
    *,
    device,
    global_scale=None,
    out_dtype=None,
    tiling: Tiling | None = None,
) -> tuple:
    """As `layer`, for a named device; the tiling may be given."""
    stacks.check(weights)
    dtype = jnp.dtype(out_dtype or x.dtype)
    if dtype.name not in ("float32", "bfloat16", "float16") or 0 in x.shape:
        raise NotImplementedError(f"no kernel for x {x.shape} and out_dtype={dtype.name}")
    if fmt is None:
        if transforms is not None:
            raise NotImplementedError("a transform without quantization has no kernel")
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"x has dtype {x.dtype}: the kernels multiply bfloat16")
    else:
        global_scale = fmt.global_scale if global_scale is None else global_scale
        if global_scale is None or math.prod(jnp.shape(global_scale)) != 1:
            raise NotImplementedError(
                f"{fmt.name} with a global scale of each group: the quantizer takes one for all"
            )
        global_scale = jnp.asarray(global_scale, jnp.float32).reshape(())
    statics = fmt, dtype, device, tiling
    return _batched(statics)(x, transforms, weights, group_sizes, global_scale)


def _batched(statics):
    """Under vmap, one after another."""
    run = custom_vmap(functools.partial(_layer, statics))

    @run.def_vmap
    def rule(size, mapped, *operands):
        def one(i):
            return _batched(statics)(
                *jax.tree.map(lambda a, m: a[i] if m else a, operands, tuple(mapped))
            )

        out = jax.lax.map(one, jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    return run


def _layer(statics, x, transforms, weights, group_sizes, global_scale):
    fmt, dtype, device, tiling = statics
    rows, own = len(x), transforms is not None and len(transforms) > 1
    short = fmt is not None and _in_float8(fmt, weights)
    # What moves rows: transforms of their groups; else TMA, which splits bfloat16 rows by 8.
    spacing = ROWS if own else 1 if short else 8
    count = rows if spacing == 1 else group_tiles.most_spaced(rows, len(group_sizes), spacing)
    span = None
    if short:
        span = PROMOTED if count > ROWS else 1
    tiling = tiling or plans.grouped(rows, len(group_sizes), span)
    starts = group_tiles.starts_of(group_sizes, tiling.tokens, spacing)
    if own:
        left = _of_groups(x, transforms, group_sizes, fmt, global_scale, short)
        ahead = False
    else:
        before = [*starts.arrays, *(weight.records for weight in weights)]
        # Nothing of XLA's may stand between two kernels of which one starts early.
        ahead = short and (rows % 8 == 0 or rows < 8)
        transform = None
        if transforms is not None:
            transform = transforms[0, 0] if transforms.shape[1] == 1 else transforms[0]
        left = _shared(
            *(x, transform, fmt, global_scale, short, device), after=before if ahead else ()
        )
        if spacing > 1:
            left = left[0][group_tiles.spaced(group_sizes, rows, spacing)], None
    divisor = 1.0 if fmt is None else global_scale
    return _products(left, weights, divisor, starts, rows, tiling, dtype, ahead)


def _in_float8(fmt, weights) -> bool:
    """Whether the products are of FP8 numbers; what is laid out for others is refused."""
    if any(weight.operand == "float8" for weight in weights):
        if not all(w.operand == "float8" for w in weights) or not exactly.multiplies_in_float8(fmt):
            raise NotImplementedError("weights are laid out for MXFP4 or FP8 activations")
        return True
    if fmt is not None and exactly.is_sum_of_parts(fmt):
        raise NotImplementedError(f"values of {fmt.name} are sums of two: no kernel of many groups")
    return False


def _shared(x, transform, fmt, global_scale, short, device, after):
    """Quantized rows, with a transform that all share, in order: values, their powers or None."""
    if fmt is None:
        return x, None
    options: dict[str, Any] = {"global_scale": global_scale, "device": device}
    if short:
        return mosaic_gpu.launch(x, transform, fmt, layout="float8", after=after, **options)
    quantize: Any = functools.partial(mosaic_gpu.launch, **options)
    if fmt.element.name == "e4m3":
        return matmul._values(quantize, x, transform, fmt), None
    if fmt.element.name == "e2m1":
        return quantize(x, transform, fmt, layout="values")[0], None
    codes, scales = quantize(x, transform, fmt, layout="interchange")
    return exactly.bfloat16_parts(codes, scales, fmt)[0], None


def _of_groups(x, transforms, group_sizes, fmt, global_scale, short):
    """As `_shared`, by each group's transforms; groups start at multiples of `ROWS`."""
    from pallas_kernels.hopper import quantize_kernel

    if not short and fmt.element.name != "e2m1":
        raise NotImplementedError(f"transforms of each group, quantized to {fmt.name}")
    layout = "float8" if short else "values"
    x = x[group_tiles.spaced(group_sizes, len(x), ROWS)]
    k, d = x.shape[1], transforms.shape[-1]
    # As `tiles.choose`: those that share powers of two find them together.
    together = short and (len(x) > ROWS or fmt.group_size > ROWS) and k > repack.COLUMNS
    beside = PROMOTED if together else 1
    tiles = Tiles(beside, 2, beside=beside)
    tiles = shrink(tiles, d, fmt.group_size, transforms.shape[1] == 1, layout)
    values, powers = quantize_kernel.transform_quantize(
        *(x, transforms, fmt),
        global_scale=global_scale,
        layout=layout,
        tiles=tiles,
        starts=group_tiles.starts_of(group_sizes, ROWS),
    )
    return values, powers if short else None


def _products(left, weights, divisor, starts, rows, tiling, dtype, ahead) -> tuple:
    from pallas_kernels.hopper import ragged_kernel

    values, powers = left
    unit = repack.COLUMNS if powers is not None else 64  # TMA's view splits K
    if values.shape[1] % unit:
        values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % unit)))
    return tuple(
        ragged_kernel.matmul(
            *(values, weight, divisor, starts, rows, tiling),
            powers=powers,
            out_dtype=dtype,
            ahead=ahead,
        )
        for weight in weights
    )
