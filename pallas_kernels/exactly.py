"""Quantized values as tensor cores take them without error: bfloat16 summands, FP8 numbers."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import fragments


def bfloat16_parts(codes, scales, fmt) -> tuple:
    """Quantized values times their global scale as a sum of bfloat16 arrays, without error.

    Args:
      codes: packed codes uint8 (..., K/2).
      scales: (..., K/g).
      fmt: a format of 4 bits: E2M1 with scales of at most 4 significant bits is one bfloat16
        number, INT4 with bfloat16 scales two.

    Returns:
      One or two bfloat16 arrays (..., K).

    Raises:
      NotImplementedError: a format of more bits.
    """
    if fmt.element.bits != 4:
        raise NotImplementedError(f"{fmt.name} is no sum of two bfloat16 numbers")
    values = fmt.decode(fmt.unpack(codes), scales, jnp.float32(1))
    if fmt.element.name == "e2m1":
        return (values.astype(jnp.bfloat16),)
    # Rounding by arithmetic: compilers may delete a cast to bfloat16 and back.
    first = lax.reduce_precision(values, 8, 7)
    return first.astype(jnp.bfloat16), (values - first).astype(jnp.bfloat16)


def in_float8(fmt) -> bool:
    """Whether a format's values are FP8 numbers times one power of two, within its octaves."""
    return fmt.element.name == "e2m1" and fmt.scale_dtype == "e8m0"


def check_float8(weights) -> None:
    """Raise NotImplementedError for weights that are not laid out for FP8."""
    fragments.check(weights)
    if not all(weight.operand == "float8" for weight in weights):
        raise NotImplementedError(
            "the weight is laid out for bfloat16: `lay_out(weight, 'float8')` it once"
        )
