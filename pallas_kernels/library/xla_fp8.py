"""MXFP4 times MXFP4 through the library's FP8 matmul: weights stay packed, E4M3 for one call.

E2M1 times a power of two is exact in E5M2 over 28 octaves and in E4M3 over 14, so that codes and
group exponents of both operands become FP8 numbers and one scalar is left. The expanded weight is a
temporary of one byte a value, written and read once a call: worth it for many tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import exactly, repack
from pallas_kernels.hopper import mosaic_gpu
from pallas_kernels.precision import fast

HIGHEST = 13  # `fp8_kernel.activations` brings the largest scale to 2**13


def quantized_matmul(x, weight, *, out_dtype=None, precision=None):
    """Return ``x @ dequantize(weight)^T`` for MXFP4 activations and weights.

    Args:
      x: quantized activations (..., M, K).
      weight: `Fragments` (N, K).
      out_dtype: of the result; default float32.
      precision: of the sums, see `pallas_kernels.precision.fast`.

    Raises:
      NotImplementedError: other formats, or no Hopper GPU.
    """
    mosaic_gpu.require_hopper()
    if not hasattr(x, "codes"):
        raise NotImplementedError("activations that are not quantized are not exact in FP8")
    _check(x.format)
    left = of_codes(x.codes, x.scales)
    return _matmul(left, x, x.global_scale, weight, out_dtype or jnp.float32, precision)


def transform_quantize_matmul(
    x, transform, weight, fmt, *, global_scale=None, out_dtype=None, precision=None
):
    """Transform and quantize to MXFP4 by the fused kernel, then as `quantized_matmul`.

    Args, raises: as `pallas_kernels.transform_quantize_matmul`.
    """
    device = mosaic_gpu.require_hopper()
    if fmt is None:
        raise NotImplementedError("activations that are not quantized are not exact in FP8")
    _check(fmt)
    if global_scale is None:
        global_scale = fmt.global_scale
    codes, scales = mosaic_gpu.launch(
        x, transform, fmt, global_scale=global_scale, layout="lanes", device=device
    )
    left = activations(codes, scales)
    return _matmul(left, x, global_scale, weight, out_dtype or x.dtype, precision)


def _check(fmt) -> None:
    if not exactly.in_float8(fmt):
        raise NotImplementedError(f"activations in {fmt.name} are not exact in FP8")


def _matmul(left, x, global_scale, weight, out_dtype, precision):
    """As `quantized_matmul`, from `activations` of x."""
    exactly.check_float8((weight,))
    y = multiply(left, global_scale, weight, out_dtype, precision)
    return y.reshape(*x.shape[:-1], y.shape[1])


def multiply(left, global_scale, weight, out_dtype, precision=None):
    """Return ``power / g * values @ weight^T`` (M, N), left = values (M, K), power: `activations`.

    Sums are float32 unless `fast`.
    """
    from pallas_kernels.hopper import fp8_kernel

    values, power = left
    right = fp8_kernel.weights(weight.records, weight.format)
    columns = jnp.pad(values, ((0, 0), (0, right.shape[1] - values.shape[1])))
    factor = power * weight.unit * 2.0**fp8_kernel.LOWER / weight.global_scale / global_scale
    return product(columns, right, factor, out_dtype, fast(precision, weight.shape[1]))[
        :, : weight.shape[0]
    ]


def product(left, right, factor, out_dtype, short: bool):
    """Return ``factor * left @ right^T`` of FP8 numbers (M, K), (N, K), by cuBLASLt.

    Named algorithms are never XLA's own kernels, whose many candidates take 13 s to compile. The
    factor becomes the library's scale of its float32 sums, so that results are rounded once.

    Args:
      left: (M, K).
      right: (N, K).
      factor: float32 scalar.
      out_dtype: of the result.
      short: keep sums in the tensor cores' short accumulators; else they leave it every few steps.
    """
    preset = lax.DotAlgorithmPreset
    y = lax.dot_general(
        *(left, right),
        (((1,), (1,)), ((), ())),
        precision=preset.ANY_F8_ANY_F8_F32_FAST_ACCUM if short else preset.ANY_F8_ANY_F8_F32,
        preferred_element_type=out_dtype,
    )
    return y * factor.astype(out_dtype)


def of_codes(codes, scales):
    """As `activations`, of codes in the interchange layout."""
    return activations(repack.to_lanes(codes), scales)


def activations(codes, scales):
    """Return MXFP4 activations in E5M2, columns as `repack.to_lanes`.

    Exact for groups whose scale is at most 26 octaves below the largest; those below become zeros.
    Groups that are not finite become NaN.

    Args:
      codes: uint8 (..., M, K/2), bytes as `repack.to_lanes`.
      scales: float8_e8m0fnu (..., M, K/32).

    Returns:
      float8_e5m2 (M, K) and the scalar power of two: ``value * g = out * power``.
    """
    codes, scales = (a.reshape(-1, a.shape[-1]) for a in (codes, scales))
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    # So that neither the power nor what it divides leaves float32.
    top = jnp.clip(jnp.max(jnp.where(byte < 255, byte, 0)), HIGHEST + 1, 254)
    left = _to_float8(codes, scales, top)
    power = lax.bitcast_convert_type((top - HIGHEST) << 23, jnp.float32)
    return left, power


def _to_float8(codes, scales, top):
    """`fp8_kernel.activations` where it can, else its definition."""
    from pallas_kernels.hopper import fp8_kernel

    if codes.shape[1] % 64:  # the kernel's steps are 128 columns
        byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
        return repack.in_float8(codes, byte, top)
    rows = len(codes)
    if rows % 8:  # TMA's view of a swizzled tile splits M by 8 rows
        codes, scales = (jnp.pad(a, ((0, -rows % 8), (0, 0))) for a in (codes, scales))
    return fp8_kernel.activations(codes, scales, top)[:rows]
