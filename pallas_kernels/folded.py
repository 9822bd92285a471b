"""Weights rounded to FP8, which callers may allow (``precision="folded"``): the definition.

FP8 holds E2M1 times a power of two. E2M1 or integers times E4M3 scales have up to seven
significant bits, E4M3 four, so that their products run in bfloat16, at half the speed. Folded, the
whole value becomes one E4M3 number, with one power of two for the weight::

    value * g = power * E4M3(value * g / power)

The error of a value is at most 2**-4 of it, half a step of three fraction bits; of values more than
14 octaves below the largest, 2**-10 of ``power``. Of Gaussian weights 78 and 77 % of the values are
exact, and the squared error of quantizing rises by 4 % in NVFP4 (0.00905 to 0.00941 of the power)
and by 5 % in NVINT4 (0.00600 to 0.00633).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import exactly

FOLDED = "folded"  # as a precision
LARGEST = 448.0  # of E4M3
LOWEST = -6  # exponent of its smallest normal number
FRACTION = 3  # bits


def folds(fmt, inputs) -> bool:
    """Whether a product of a weight in ``fmt`` with inputs in a format gains from folding.

    Args:
      fmt: of the weight.
      inputs: of the activations, or None.
    """
    eight_bits = inputs is not None and exactly.multiplies_in_float8(inputs)
    return eight_bits and fmt.scale_dtype == "e4m3" and fmt.element.bits == 4


def fold(codes, scales, fmt):
    """Return a weight in E4M3: ``value * g = out * power``, values of NaN scales NaN.

    The largest exponent of the scales in use becomes that with which the element's largest value
    stays below 448 whatever the scale's fraction: 5 for E2M1, 4 for NVINT4.

    Args:
      codes: packed uint8 (N, K/2).
      scales: float8_e4m3fn (N, K/g).
      fmt: E2M1 or integers of 4 bits with E4M3 scales.

    Returns:
      float8_e4m3fn (N, K), and the power of two, float32 scalar.
    """
    values = fmt.decode(fmt.unpack(codes), scales, jnp.float32(1))
    sizes = jnp.abs(fmt.load_scales(scales))
    groups = values.reshape(*sizes.shape, fmt.group_size)
    used = jnp.any(jnp.abs(groups) > 0, axis=-1)  # not those of NaN
    top = jnp.max(jnp.where(used, _exponent(sizes), -9))
    largest = fmt.element.max + getattr(fmt.element, "full", False)
    room = int(LARGEST // (largest * 1.875)).bit_length() - 1
    scaled = values * _exp2(room - top)
    step = _exp2(jnp.maximum(_exponent(scaled), LOWEST) - FRACTION)
    # Arithmetic, then a cast that is exact: compilers may delete one that rounds.
    rounded = jnp.round(scaled / step) * step
    return rounded.astype(jnp.float8_e4m3fn), _exp2(top - room)


def dequantize(codes, scales, fmt, global_scale):
    """Return the float32 values of a folded weight, args as for `fold`."""
    rounded, power = fold(codes, scales, fmt)
    return rounded.astype(jnp.float32) * (power / global_scale)


def _exponent(x):
    """``floor(log2 |x|)`` of normal float32 numbers."""
    return ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127


def _exp2(exponent):
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.int32) << 23, jnp.float32)
