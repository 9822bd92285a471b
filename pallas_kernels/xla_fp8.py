"""MXFP4 times MXFP4 through the library's FP8 matmul: weights stay packed, E4M3 for one call.

E2M1 times a power of two is exact in E5M2 over 28 octaves and in E4M3 over 14, so that codes and
group exponents of both operands become FP8 numbers and one scalar is left. The expanded weight is a
temporary of one byte a value, written and read once a call: worth it for many tokens.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_gpu
from pallas_kernels.matmul import check_weight

# E2M1 times 2**k is exact in E5M2 for k in [-15, 13].
HIGHEST = 13


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
    return matmul(x.codes, x.scales, x.format, x.global_scale, weight, out_dtype or jnp.float32)


def transform_quantize_matmul(x, transform, weight, fmt, *, global_scale=None, out_dtype=None):
    """Transform and quantize to MXFP4 by the fused kernel, then as `quantized_matmul`.

    Args, raises: as `pallas_kernels.transform_quantize_matmul`.
    """
    device = mosaic_gpu.require_hopper()
    if fmt is None:
        raise NotImplementedError("activations that are not quantized are not exact in FP8")
    if global_scale is None:
        global_scale = fmt.global_scale
    codes, scales = mosaic_gpu.launch(
        x, transform, fmt, global_scale=global_scale, layout="interchange", device=device
    )
    return matmul(codes, scales, fmt, global_scale, weight, out_dtype or x.dtype)


def matmul(codes, scales, fmt, global_scale, weight, out_dtype):
    """As `quantized_matmul`, from packed codes (..., M, K/2) and scales (..., M, K/32)."""
    from pallas_kernels import fp8_kernel

    if fmt.element.name != "e2m1" or fmt.scale_dtype != "e8m0":
        raise NotImplementedError(f"activations in {fmt.name} are not exact in FP8")
    check_weight(weight)
    n = weight.shape[0]
    right = fp8_kernel.weights(weight.records, weight.format)
    lead = codes.shape[:-1]
    values, power = activations(codes.reshape(math.prod(lead), -1), scales, fmt)
    values = jnp.pad(values, ((0, 0), (0, right.shape[1] - values.shape[1])))
    unit = weight.unit * 2.0**-fp8_kernel.LIFT / weight.global_scale
    y = scaled_dot(values, power / global_scale, right[:n], unit, out_dtype)
    return y.reshape(*lead, n)


def scaled_dot(x, x_scale, w, w_scale, out_dtype):
    """``(x_scale * x) @ (w_scale * w)^T``, in the form that XLA turns into one FP8 matmul."""
    kind = jnp.bfloat16 if out_dtype == jnp.float16 else out_dtype
    y = lax.dot_general(
        x.astype(kind) * x_scale.astype(kind),
        w.astype(kind) * w_scale.astype(kind),
        (((1,), (1,)), ((), ())),
        # more than the default: sums leave the tensor core's short accumulator every few steps
        precision=lax.Precision.HIGHEST,
        preferred_element_type=kind,
    )
    return y.astype(out_dtype)


def activations(codes, scales, fmt):
    """Fold E8M0 scales into E5M2 codes, columns in the order of `fp8_kernel`.

    Exact for groups at most 28 octaves below the largest; below, values are rounded to steps of
    2**-30 of its scale. Groups that are not finite become NaN.

    Args:
      codes: packed codes uint8 (M, K/2).
      scales: (..., M, K/32).
      fmt: MXFP4, any rule.

    Returns:
      float8_e5m2 (M, K) and the scalar power of two: ``value = code * power / g``.
    """
    codes = fmt.unpack(codes)
    groups = codes.reshape(codes.shape[0], -1, fmt.group_size)
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32).reshape(groups.shape[:2])
    finite = byte != 255
    used = finite & jnp.any(groups & 7, axis=-1)
    top = jnp.maximum(jnp.max(jnp.where(used, byte, 0)), HIGHEST + 1)
    shift = jnp.clip(byte - top + HIGHEST, -40, HIGHEST)
    factor = lax.bitcast_convert_type((shift + 127) << 23, jnp.float32)
    factor = jnp.where(finite, factor, jnp.nan)
    values = (fmt.element.decode(groups) * factor[..., None]).astype(jnp.float8_e5m2)
    # column 8 i + 2 q + e of 16 goes to 4 q + 2 i + e
    values = values.reshape(codes.shape[0], -1, 2, 4, 2).swapaxes(2, 3)
    return values.reshape(codes.shape), lax.bitcast_convert_type((top - HIGHEST) << 23, jnp.float32)
