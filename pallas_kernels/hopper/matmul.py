"""The door to the matmul kernels: operands in the kernels' terms, and which kernel."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels import exactly, fragments, normed, repack
from pallas_kernels.hopper import mosaic_gpu, plans, roads
from pallas_kernels.hopper.tiles import Split, Tiling, sharing


def quantized_matmul(x, weight, *, out_dtype=None):
    """Return ``x @ dequantize(weight)^T`` by the Mosaic GPU kernels.

    Operands are exact in bfloat16 (INT4 as a sum of two), with float32 sums, or in FP8, see
    `multiply_float8`.

    Args:
      x: (..., M, K) bfloat16, or quantized activations.
      weight: `Fragments` (N, K).
      out_dtype: of the result; default x's, float32 for quantized activations.

    Raises:
      NotImplementedError: what the kernels, the device or this jax do not cover.
    """
    device = mosaic_gpu.require_hopper()
    return launch(x, weight, device=device, out_dtype=out_dtype)


def transform_quantize_matmul(x, transform, weights, fmt, **options):
    """As `layer`, of which it returns the products."""
    return layer(x, transform, weights, fmt, **options)[0]


def layer(
    x,
    transform,
    weights,
    fmt,
    *,
    global_scale=None,
    out_dtype=None,
    gated=False,
    precision=None,
    road=None,
    norm=None,
    residual=None,
):
    """Transform, quantize and multiply: two kernels, between them quantized values.

    They are FP8 numbers for weights laid out for them, otherwise bfloat16. For many tokens weights
    may be expanded to FP8 first, once a call: where a table says that this is faster, or by
    ``road``, see `roads.allowed`.

    Args, raises: as `pallas_kernels.transform_quantize_matmul`, for a tuple of weights. Two that
    are gated give one result where a kernel combines their products, else both. Behind the products
    stands the sum of x and residual.
    """
    device = mosaic_gpu.require_hopper()
    fragments.check(weights)
    out_dtype = out_dtype or x.dtype
    if fmt is None:
        if transform is not None:
            raise NotImplementedError("a transform without quantization has no kernel")
        x, total = normed.read(x, norm, residual)
        return launch_all(x, weights, device=device, out_dtype=out_dtype, gated=gated), total
    if global_scale is None:
        global_scale = fmt.global_scale
    tokens = math.prod(x.shape[:-1])
    ours = roads.allowed(weights, fmt, precision) - roads.LIBRARY
    road = road or roads.fastest(tokens, weights, fmt, device, ours)
    quantize = functools.partial(mosaic_gpu.launch, global_scale=global_scale, device=device)
    total, sums = x, list[Any]()
    if mosaic_gpu.reads(x, norm, fmt):
        quantize = _reading(quantize, norm, residual, sums)
    else:
        x, total = normed.read(x, norm, residual)
    run = _fused if road == "fused" else _folded
    products = run(quantize, x, transform, fmt, global_scale, weights, out_dtype, gated)
    return products, sums[0].reshape(total.shape) if sums else total


def _reading(quantize, norm, residual, sums: list):
    """A quantizer of the normed sum of x and residual, which puts the sum into a list."""

    def call(x, transform, fmt, **options):
        more = None if residual is None else residual.reshape(x.shape)
        codes, scales, total = quantize(x, transform, fmt, norm=norm, residual=more, **options)
        sums.append(total)
        return codes, scales

    return call


def _fused(quantize, x, transform, fmt, global_scale, weights, out_dtype, gated):
    """The products by kernels that expand weights in registers."""
    wide = fmt.element.name == "e4m3"
    exact = wide or not exactly.is_sum_of_parts(fmt)
    # Where nothing stands between them, the product may fetch records while the quantizer runs:
    # these are there before it starts.
    ahead = exact and plans.as_they_are(math.prod(x.shape[:-1]), weights[0].grid[1])
    after = [weight.records for weight in weights] if ahead else ()
    quantize = functools.partial(quantize, after=after)
    options = {"ahead": ahead, "gated": gated}
    if _in_float8(fmt, weights):
        left = quantize(x.reshape(-1, x.shape[-1]), transform, fmt, layout="float8")
        products = multiply_float8(left, global_scale, weights, out_dtype, **options)
        return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in products)
    if wide:
        parts = (_values(quantize, x, transform, fmt),)
    elif exact:
        parts = (quantize(x, transform, fmt, layout="values")[0],)
    else:
        codes, scales = quantize(x, transform, fmt, layout="interchange")
        parts = exactly.bfloat16_parts(codes, scales, fmt)
    options |= {"out_dtype": out_dtype, "global_scale": global_scale}
    device = mosaic_gpu.require_hopper()
    return launch_all(parts, weights, device=device, **options)


def _folded(quantize, x, transform, fmt, global_scale, weights, out_dtype, gated):
    """The product with weights that are in FP8 for this call."""
    from pallas_kernels.hopper import fp8_kernel

    if not all(fp8_kernel.folds(weight) for weight in weights):
        raise NotImplementedError(f"no FP8 form of {weights[0].format.name}")
    left = quantize(x.reshape(-1, x.shape[-1]), transform, fmt, layout="float8")
    whole = [fp8_kernel.expanded(weight) for weight in weights]
    products = multiply_float8(left, global_scale, whole, out_dtype, gated=gated)
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in products)


def _values(quantize, x, transform, fmt):
    """Bfloat16 values of activations in FP8 times their global scale."""
    flat = x.reshape(-1, x.shape[-1])
    if transform is None or transform.ndim == 2 or transform.shape[-1] < 128:
        return quantize(flat, transform, fmt, layout="float8_values")[0].reshape(x.shape)
    # 512 columns of such transforms leave no room for results of two bytes.
    values, powers = quantize(flat, transform, fmt, layout="float8")
    return repack.from_float8(values, powers, x.shape[-1]).reshape(x.shape)


def launch(x, weight, *, device, out_dtype=None, plan: Split | Tiling | None = None):
    """As `quantized_matmul`, for a named device; the plan may be given."""
    return launch_all(x, (weight,), device=device, out_dtype=out_dtype, plan=plan)[0]


def launch_all(
    x,
    weights,
    *,
    device,
    out_dtype=None,
    global_scale=1.0,
    plan: Split | Tiling | None = None,
    ahead: bool = False,
    gated: bool = False,
) -> tuple:
    """Multiply with several weights (N, K) of one K: one kernel where it is bound by reading them.

    x may be a tuple of bfloat16 summands, which ``global_scale`` divides. ``ahead`` and ``gated``:
    as for `multiply_float8`.
    """
    fragments.check(weights)
    if hasattr(x, "codes"):
        out_dtype = out_dtype or jnp.float32
        global_scale = x.global_scale
        if _in_float8(x.format, weights):
            _check_result(x.shape, out_dtype)
            codes, scales = (a.reshape(-1, a.shape[-1]) for a in (x.codes, x.scales))
            columns = repack.COLUMNS * sharing(len(codes))
            if x.format.element.name == "e4m3":
                left = repack.e4m3_to_float8(codes, scales, columns)
            else:
                left = repack.to_float8(repack.to_lanes(codes), scales, columns)
            products = multiply_float8(left, global_scale, weights, out_dtype, plan)
            return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in products)
        x = exactly.bfloat16_parts(x.codes, x.scales, x.format)
    elif not isinstance(x, tuple):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"x has dtype {x.dtype}: the kernels multiply bfloat16")
        x = (x,)
    if any(weight.operand == "float8" for weight in weights):
        raise NotImplementedError("the weight is laid out for MXFP4 or FP8 activations")
    lead, k = x[0].shape[:-1], x[0].shape[-1]
    m = math.prod(lead)
    dtype = _check_result(x[0].shape, out_dtype or x[0].dtype)
    rows = jnp.concatenate([part.reshape(m, k) for part in x])
    if k % 64:  # TMA's view of a swizzled tile splits K by 64 columns
        rows = jnp.pad(rows, ((0, 0), (0, -k % 64)))
    wide = dtype if len(x) == 1 else jnp.dtype(jnp.float32)
    one = gated and len(x) == 1
    products = _products(rows, weights, global_scale, wide, device, plan, ahead, one)
    if len(x) > 1:
        products = [y.reshape(len(x), m, -1).sum(0).astype(dtype) for y in products]
    return tuple(y.reshape(*lead, y.shape[-1]) for y in products)


def _check_result(shape, out_dtype):
    """Return the dtype of a result, if the kernels make it from x of this shape."""
    dtype = jnp.dtype(out_dtype)
    if dtype.name not in ("float32", "bfloat16", "float16") or 0 in shape:
        raise NotImplementedError(f"no kernel for x {shape} and out_dtype={dtype.name}")
    return dtype


def _in_float8(fmt, weights) -> bool:
    """Whether a product is one of FP8 numbers: weights laid out for it, and such activations."""
    if not any(weight.operand == "float8" for weight in weights):
        return False
    exactly.check_float8(weights)
    if not exactly.multiplies_in_float8(fmt):
        raise NotImplementedError(
            f"the weight is laid out for MXFP4 or FP8 activations, not {fmt.name}"
        )
    return True


def multiply_float8(
    left,
    global_scale,
    weights,
    out_dtype,
    plan: Split | Tiling | None = None,
    *,
    ahead: bool = False,
    gated: bool = False,
) -> list:
    """Multiply E5M2 or E4M3 activations (M, K) by weights (N, K) laid out for them.

    Products are exact, but for groups far below the largest (`repack.to_float8`,
    `fragments.LOWEST`). Sums have some 14 bits over the columns that share a power, and are float32
    beyond.

    Args:
      left: values, columns as `repack.to_lanes`, and powers of two: of each 128 columns for
        `tiles.FEW_TOKENS`, of each 512 for more.
      global_scale: of the activations, divides.
      weights: `Fragments`.
      out_dtype: of the results.
      plan: how to divide the work; a `Split` for few tokens, else a `Tiling`.
      ahead: fetch weights while the kernel before this one runs: it started after they were there.
      gated: return one result, `reference.swiglu` of two weights' products, where one kernel makes
        it; else both products.
    """
    from pallas_kernels.hopper import matmul_kernel, tiled_kernel

    values, powers = left
    _check_result(values.shape, out_dtype)
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % 128)))  # TMA's view splits K by 128
    if weights[0].operand == "expanded":
        how = plan or plans.expanded_plan(len(values), weights[0].grid[0])
    else:
        how = plan or plans.float8_plan(len(values), *_sizes(weights))
    options = {"powers": powers, "out_dtype": out_dtype, "ahead": ahead}
    if isinstance(how, Split) and _joint(weights):
        y = matmul_kernel.matmul(values, weights, global_scale, how, **options)
        return _split(y, weights)
    if len(weights) == 1 or (gated and _gated_kernel(how, weights)):
        return [tiled_kernel.matmul(values, weights, global_scale, how, **options)]
    one = functools.partial(multiply_float8, left, global_scale, ahead=ahead)
    return [one((w,), out_dtype, plan)[0] for w in weights]


def _sizes(weights) -> tuple[int, int]:
    """Tiles of 64 weights in all, and steps of 128 columns."""
    return sum(w.grid[0] for w in weights), weights[0].grid[1]


def _joint(weights) -> bool:
    """Whether weights are one product: of one format, each but the last ending with a tile."""
    whole = not any(w.shape[0] % 64 for w in weights[:-1])
    return whole and len({(w.format, w.operand) for w in weights}) == 1


def _split(y, weights) -> list:
    return jnp.split(y, list(itertools.accumulate(w.shape[0] for w in weights))[:-1], axis=1)


def _gated_kernel(how: Split | Tiling, weights) -> bool:
    """Whether one kernel multiplies two weights and combines them."""
    alike = len({(w.shape, w.format, w.operand) for w in weights}) == 1
    return alike and isinstance(how, Tiling) and how.cuts == 1 and how.warpgroups % 2 == 0


def _products(rows, weights, divisor, dtype, device, plan, ahead, gated):
    """Multiply rows (M, K): in one kernel, or one for each weight."""
    from pallas_kernels.hopper import matmul_kernel, tiled_kernel

    kind = fragments.carrier(weights[0].format).kind
    how = plan or plans.choose(rows.shape[0], *_sizes(weights), kind, device)
    options = {"out_dtype": dtype, "ahead": ahead}
    if isinstance(how, Split) and _joint(weights):
        return _split(matmul_kernel.matmul(rows, weights, divisor, how, **options), weights)
    if len(weights) == 1 or (gated and _gated_kernel(how, weights)):
        return [tiled_kernel.matmul(rows, weights, divisor, how, **options)]
    each = (_products(rows, (w,), divisor, dtype, device, plan, ahead, False) for w in weights)
    return [y for products in each for y in products]
