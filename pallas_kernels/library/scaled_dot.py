"""NVFP4 times NVFP4 through ``jax.nn.scaled_matmul``: the library's block-scaled product.

Blackwell's matrix units take codes and scales as they are stored. Tested on CPU and compiled for
CUDA; never run on a Blackwell GPU. (On Hopper the library expands the operands first and is slower
than BF16, so that the dispatch does not offer it there.)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

BLACKWELL = 10.0


def quantized_matmul(x, weight, *, out_dtype=None):
    """Return ``x @ dequantize(weight)^T`` for NVFP4 activations and weights.

    Args:
      x: quantized activations (..., M, K).
      weight: quantized weight (N, K), interchange layout.
      out_dtype: of the result; default float32.

    Raises:
      NotImplementedError: no Blackwell GPU, or other operands.
    """
    capability = getattr(jax.devices()[0], "compute_capability", "none")
    if jax.default_backend() != "gpu" or float(capability) < BLACKWELL:
        raise NotImplementedError(
            f"needs compute capability {BLACKWELL:.1f}; the backend is {jax.default_backend()}, "
            f"compute capability {capability}"
        )
    return matmul(x, weight, out_dtype or jnp.float32)


def matmul(x, weight, out_dtype):
    """As `quantized_matmul`, on any backend that has the library's operation.

    Raises:
      NotImplementedError: operands that are not both NVFP4 in the interchange layout.
    """
    for name, operand in (("x", x), ("weight", weight)):
        if not hasattr(operand, "codes"):
            raise NotImplementedError(f"{name} is no array of codes in the interchange layout")
        fmt = operand.format
        if (fmt.element.name, fmt.scale_dtype, fmt.group_size) != ("e2m1", "e4m3", 16):
            raise NotImplementedError(f"{name} is in {fmt.name}: the library multiplies NVFP4")
    lead = x.codes.shape[:-1]
    y = jax.nn.scaled_matmul(
        _values(x.codes.reshape(1, math.prod(lead), -1)),
        _values(weight.codes[None]),
        x.scales.reshape(1, math.prod(lead), -1),
        weight.scales[None],
        preferred_element_type=jnp.float32,
    )
    y = y / (x.global_scale * weight.global_scale)
    return y.reshape(*lead, -1).astype(out_dtype)


def _values(codes):
    """Packed codes (..., K/2) as E2M1 numbers (..., K): two of a byte, the low nibble first."""
    pairs = lax.bitcast_convert_type(codes, jnp.float4_e2m1fn)
    return pairs.reshape(*codes.shape[:-1], -1)
