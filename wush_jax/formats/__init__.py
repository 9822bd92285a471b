"""Number formats and the arrays that are stored in them."""

from wush_jax.formats.arrays import QuantizedArray, dequantize, fake_quantize, quantize
from wush_jax.formats.elements import FloatElement, IntElement
from wush_jax.formats.format import (
    FORMATS,
    INT4,
    INT4_ABSMAX,
    INT8,
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    Format,
)

__all__ = [
    "FORMATS",
    "INT4",
    "INT4_ABSMAX",
    "INT8",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "NVFP4",
    "FloatElement",
    "Format",
    "IntElement",
    "QuantizedArray",
    "dequantize",
    "fake_quantize",
    "quantize",
]
