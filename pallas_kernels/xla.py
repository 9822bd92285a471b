"""Library paths: the operations stated so that XLA makes few and fast kernels of them."""

from __future__ import annotations

import jax.numpy as jnp


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
        blocks = x.reshape(*x.shape[:-1], -1, d)
        spec = "...bi,bji->...bj" if transform.ndim == 3 else "...bi,ji->...bj"
        y = jnp.einsum(spec, blocks, transform, preferred_element_type=jnp.float32)
        x = y.reshape(x.shape)
    codes, scales = fmt.encode(x, global_scale)
    return fmt.pack(codes), scales
