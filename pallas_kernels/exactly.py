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
      fmt: a format of 4 bits, or E4M3, or INT8. E2M1, and other elements of at most 4 significant
        bits with scales of at most 4, are one bfloat16 number; bfloat16 scales make two of it,
        float32 scales three.

    Returns:
      One to three bfloat16 arrays (..., K).

    Raises:
      NotImplementedError: other formats.
    """
    name, wide = fmt.element.name, fmt.scale_dtype in ("bfloat16", "float32")
    if fmt.element.bits != 4 and name != "e4m3" and not (name.startswith("int8") and wide):
        raise NotImplementedError(f"{fmt.name} is no sum of two bfloat16 numbers")
    values = fmt.decode(fmt.unpack(codes), scales, jnp.float32(1))
    if name == "e2m1" or not wide:
        return (values.astype(jnp.bfloat16),)
    parts = []
    for _ in range(3 if fmt.scale_dtype == "float32" else 2):
        # Rounding by arithmetic: compilers may delete a cast to bfloat16 and back.
        part = lax.reduce_precision(values, 8, 7)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return tuple(parts)


def is_sum_of_parts(fmt) -> bool:
    """Whether values of a format of 4 bits are several bfloat16 numbers each: products are slow."""
    return fmt.element.bits == 4 and fmt.element.name != "e2m1" and fmt.scale_dtype != "e4m3"


def in_float8(fmt) -> bool:
    """Whether a format's values are FP8 numbers times one power of two, within its octaves."""
    return fmt.element.name == "e2m1" and fmt.scale_dtype == "e8m0"


def multiplies_in_float8(fmt) -> bool:
    """Whether activations in a format are FP8 numbers, up to powers of two for some columns.

    Those of `repack.POWERED`.
    """
    powers_of_columns = fmt.scale_dtype == "e8m0" and fmt.group_size == 512
    return in_float8(fmt) or (fmt.element.name == "e4m3" and powers_of_columns)


def check_float8(weights) -> None:
    """Raise NotImplementedError for weights that are not laid out for FP8."""
    fragments.check(weights)
    if not all(weight.operand == "float8" for weight in weights):
        raise NotImplementedError(
            "the weight is laid out for bfloat16: `lay_out(weight, 'float8')` it once"
        )
