"""MXFP4 times MXFP4 through the library's FP8 matmul: weights stay packed, E4M3 for one call.

E2M1 times a power of two is exact in E5M2 over 28 octaves and in E4M3 over 14, so that codes and
group exponents of both operands become FP8 numbers and one scalar is left. The expanded weight is a
temporary of one byte a value, written and read once a call: worth it for many tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import fragments, mosaic_gpu, xla

HIGHEST = 13  # E2M1 times 2**k is exact in E5M2 for k in [-15, 13]


def quantized_matmul(x, weight, *, out_dtype=None):
    """Return ``x @ dequantize(weight)^T`` for MXFP4 activations and weights.

    Args:
      x: quantized activations (..., M, K).
      weight: `Fragments` (N, K).
      out_dtype: of the result; default float32.

    Raises:
      NotImplementedError: other formats, or no Hopper GPU.
    """
    mosaic_gpu.require_hopper()
    if not hasattr(x, "codes"):
        raise NotImplementedError("activations that are not quantized are not exact in FP8")
    _check(x.format)
    (values,) = xla.exact_parts(x.codes, x.scales, x.format)
    return _matmul(values, x.scales, x.global_scale, weight, out_dtype or jnp.float32)


def transform_quantize_matmul(x, transform, weight, fmt, *, global_scale=None, out_dtype=None):
    """Transform and quantize to MXFP4 by the fused kernel, then as `quantized_matmul`.

    Args, raises: as `pallas_kernels.transform_quantize_matmul`.
    """
    device = mosaic_gpu.require_hopper()
    if fmt is None:
        raise NotImplementedError("activations that are not quantized are not exact in FP8")
    _check(fmt)
    if global_scale is None:
        global_scale = fmt.global_scale
    values, scales = mosaic_gpu.launch(
        x, transform, fmt, global_scale=global_scale, layout="values", device=device
    )
    return _matmul(values, scales, global_scale, weight, out_dtype or x.dtype)


def holds(fmt) -> bool:
    """Whether a format's values are FP8 numbers times one power of two, within its octaves."""
    return fmt.element.name == "e2m1" and fmt.scale_dtype == "e8m0"


def _check(fmt) -> None:
    if not holds(fmt):
        raise NotImplementedError(f"activations in {fmt.name} are not exact in FP8")


def _matmul(values, scales, global_scale, weight, out_dtype):
    """As `quantized_matmul`, from bfloat16 values (..., M, K) times g."""
    fragments.check((weight,))
    left, power = activations(values, scales)
    y = multiply(left, power, global_scale, weight, out_dtype)
    return y.reshape(*values.shape[:-1], y.shape[1])


def multiply(left, power, global_scale, weight, out_dtype):
    """Return ``power / g * left @ weight^T`` (M, N), left (M, K) and power from `activations`."""
    from pallas_kernels import fp8_kernel

    right = fp8_kernel.weights(weight.records, weight.format)
    columns = jnp.pad(left, ((0, 0), (0, right.shape[1] - left.shape[1])))
    factor = power * weight.unit * 2.0**-fp8_kernel.LIFT / weight.global_scale / global_scale
    y = lax.dot_general(
        *(columns, right[: weight.shape[0]]),
        (((1,), (1,)), ((), ())),
        # more than the default: sums leave the tensor core's short accumulator every few steps
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (y * factor).astype(out_dtype)


def activations(values, scales):
    """Return MXFP4 values in E5M2, columns as `fragments.to_lanes`.

    Exact for groups whose scale is at most 28 octaves below the largest; below, values are rounded
    to steps of 2**-29 of that. Groups that are not finite become NaN.

    Args:
      values: bfloat16 (..., M, K), E2M1 numbers times powers of two.
      scales: float8_e8m0fnu (..., M, K/32), these powers of two.

    Returns:
      float8_e5m2 (M, K) and the scalar power of two: ``value = code * power``.
    """
    values = values.reshape(-1, values.shape[-1])
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    # So that neither the power nor what it divides leaves float32.
    top = jnp.clip(jnp.max(jnp.where(byte < 255, byte, 0)), HIGHEST + 1, 254)
    factor = lax.bitcast_convert_type((127 + HIGHEST - top + 127) << 23, jnp.float32)
    codes = jnp.where(jnp.isfinite(values), values.astype(jnp.float32) * factor, jnp.nan)
    codes = fragments.to_lanes(codes.astype(jnp.float8_e5m2))
    power = lax.bitcast_convert_type((top - HIGHEST) << 23, jnp.float32)
    # The barrier: compilers would permute the weights' columns instead, once for each weight.
    return lax.optimization_barrier((codes, power))
