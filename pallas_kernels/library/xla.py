"""Library paths: the operations stated so that XLA makes few and fast kernels of them."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.exactly import bfloat16_parts


def transform_quantize(x, transform, fmt, *, global_scale=None):
    """As `reference.transform_quantize`, with the product on the matrix units of x's dtype.

    Products of two bfloat16 or float16 numbers are exact in float32 and sums are float32, so the
    result differs from the definition in the order of summation only.

    Args:
      x: (..., K) bfloat16 or float16.
      transform: (K/d, d, d) or (d, d), of x's dtype; None for none.
      fmt: the number format.
      global_scale: scalar; None takes the format's own.

    Returns:
      Packed codes uint8 (..., K * bits / 8) and scales (..., K / g).

    Raises:
      NotImplementedError: other dtypes, where the definition is as good.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x has dtype {x.dtype}, not bfloat16 or float16")
    if transform is not None:
        if transform.dtype != x.dtype:
            raise NotImplementedError(f"transform has dtype {transform.dtype}, x {x.dtype}")
        d = transform.shape[-1]
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // d, d)
        spec = "...bi,bji->...bj" if transform.ndim == 3 else "...bi,ji->...bj"
        y = jnp.einsum(spec, blocks, transform, preferred_element_type=jnp.float32)
        x = y.reshape(x.shape)
    codes, scales = fmt.encode(x, global_scale)
    return fmt.pack(codes), scales


def quantized_matmul(x, weight, *, out_dtype=None):
    """As `reference.quantized_matmul`, on the matrix units for bfloat16: exact operands.

    Args:
      x: (..., M, K) bfloat16, or quantized activations.
      weight: quantized weight (N, K), in either layout.
      out_dtype: of the result; default x's, float32 for quantized activations.

    Raises:
      NotImplementedError: other dtypes of x.
    """
    if hasattr(x, "codes"):
        left = bfloat16_parts(x.codes, x.scales, x.format)
        return _matmul(left, 1 / x.global_scale, weight, out_dtype or jnp.float32)
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"x has dtype {x.dtype}, not bfloat16")
    return _matmul((x,), 1.0, weight, out_dtype or x.dtype)


def transform_quantize_matmul(x, transform, weight, fmt, *, global_scale=None, out_dtype=None):
    """As `reference.transform_quantize_matmul`, by the two operations of this module.

    Raises:
      NotImplementedError: x is not bfloat16, or a transform without quantization.
    """
    if fmt is None:
        if transform is not None:
            raise NotImplementedError("a transform without quantization has no library path")
        return quantized_matmul(x, weight, out_dtype=out_dtype)
    if global_scale is None:
        global_scale = fmt.global_scale
    if x.dtype != jnp.bfloat16 or global_scale is None:
        raise NotImplementedError(
            f"x has dtype {x.dtype}, global_scale={global_scale}: needs bfloat16 and a given scale"
        )
    codes, scales = transform_quantize(x, transform, fmt, global_scale=global_scale)
    left = bfloat16_parts(codes, scales, fmt)
    return _matmul(left, 1 / jnp.float32(global_scale), weight, out_dtype or x.dtype)


def _matmul(left, factor, weight, out_dtype):
    right = bfloat16_parts(*reference.interchange(weight), weight.format)
    products = [
        jnp.einsum("...k,nk->...n", a, b, preferred_element_type=jnp.float32)
        for a in left
        for b in right
    ]
    return (sum(products) * (factor / weight.global_scale)).astype(out_dtype)
