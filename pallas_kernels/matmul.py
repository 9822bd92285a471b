"""The door to the matmul kernels: operands in the kernels' terms, and which kernel."""

from __future__ import annotations

import math

import jax.numpy as jnp

from pallas_kernels import mosaic_gpu, xla
from pallas_kernels.fragments import Fragments

FEW = 16  # tokens up to which a call is bound by reading the weights


def quantized_matmul(x, weight, *, out_dtype=None):
    """Return ``x @ dequantize(weight)^T`` by the Mosaic GPU kernels.

    Operands are exact in bfloat16 (INT4 as a sum of two), sums are float32.

    Args:
      x: (..., M, K) bfloat16, or quantized activations.
      weight: `Fragments` (N, K).
      out_dtype: of the result; default x's, float32 for quantized activations.

    Raises:
      NotImplementedError: what the kernels, the device or this jax do not cover.
    """
    mosaic_gpu.require_hopper()
    return launch(x, weight, out_dtype=out_dtype)


def transform_quantize_matmul(x, transform, weight, fmt, *, global_scale=None, out_dtype=None):
    """Transform, quantize and multiply: two kernels, between them the codes as bfloat16 values.

    Args, raises: as `pallas_kernels.transform_quantize_matmul`.
    """
    device = mosaic_gpu.require_hopper()
    check_weight(weight)
    if fmt is None:
        if transform is not None:
            raise NotImplementedError("a transform without quantization has no kernel")
        return launch(x, weight, out_dtype=out_dtype)
    if global_scale is None:
        global_scale = fmt.global_scale
    codes, scales = mosaic_gpu.launch(
        x, transform, fmt, global_scale=global_scale, layout="interchange", device=device
    )
    parts = xla.exact_parts(codes, scales, fmt)
    return launch(
        parts, weight, out_dtype=out_dtype or x.dtype, factor=1 / jnp.float32(global_scale)
    )


def launch(x, weight, *, out_dtype=None, factor=1.0):
    """As `quantized_matmul`, without asking for a device; x may be a tuple of summands."""
    from pallas_kernels import matmul_kernel, tiled_kernel

    check_weight(weight)
    if hasattr(x, "codes"):
        out_dtype = out_dtype or jnp.float32
        factor = factor / x.global_scale
        x = xla.exact_parts(x.codes, x.scales, x.format)
    elif not isinstance(x, tuple):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"x has dtype {x.dtype}: the kernels multiply bfloat16")
        x = (x,)
    lead, k = x[0].shape[:-1], x[0].shape[-1]
    m, n = math.prod(lead), weight.shape[0]
    dtype = jnp.dtype(out_dtype or x[0].dtype)
    if dtype.name not in ("float32", "bfloat16", "float16") or m == 0:
        raise NotImplementedError(f"no kernel for x {x[0].shape} and out_dtype={dtype.name}")
    rows = jnp.concatenate([part.reshape(m, k) for part in x])
    if k % 64:  # TMA's view of a swizzled tile splits K by 64 columns
        rows = jnp.pad(rows, ((0, 0), (0, -k % 64)))
    operands = (rows, weight.records, factor * weight.unit / weight.global_scale, weight.format, n)
    wide = dtype if len(x) == 1 else jnp.dtype(jnp.float32)
    shape = (rows.shape[0], *weight.records.shape[:2])
    if rows.shape[0] <= FEW:
        y = matmul_kernel.matmul(*operands, choose(*shape), out_dtype=wide)
    else:
        y = tiled_kernel.matmul(*operands, choose_tiling(*shape), out_dtype=wide)
    return y.reshape(len(x), *lead, n).sum(0).astype(dtype) if len(x) > 1 else y.reshape(*lead, n)


def check_weight(weight) -> None:
    """Raise NotImplementedError, with the remedy, for weights the kernels cannot read."""
    if not isinstance(weight, Fragments):
        raise NotImplementedError(
            "the weight is in the interchange layout: `pallas_kernels.fragments.lay_out` it once"
        )


def choose(tokens: int, tiles: int, steps: int):
    """How to divide a call with few tokens: measured on an H200, see docs/kernels.md.

    All multiprocessors work in pairs, each with half of K. Warpgroups share tiles where there are
    too few for all.
    """
    from pallas_kernels.matmul_kernel import Split

    clusters = 66
    ways = next((w for w in (4, 2) if tiles * w <= 4 * clusters * 1.1), 1)
    while ways > 1 and steps < 2 * ways:
        ways //= 2
    narrow = 8 if tokens <= 8 else 16
    return Split(narrow, 2, 4, ways, clusters, 6 if ways > 1 else 3, 1 if ways > 1 else 2)


def choose_tiling(tokens: int, tiles: int, steps: int):
    """How to divide a call with many tokens: K is cut where tiles are too few for all."""
    from pallas_kernels.tiled_kernel import Tiling

    width = 64 if tokens <= 64 else 128 if tokens <= 512 else 256
    tasks = -(-tiles // 2) * -(-tokens // width)
    cuts = 1
    while tasks * cuts * 2 <= 132 and steps >= 4 * cuts:
        cuts *= 2
    return Tiling(width, warpgroups=2, cuts=cuts)
