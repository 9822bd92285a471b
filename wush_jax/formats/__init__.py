"""Number formats and the arrays that are stored in them."""

from wush_jax.formats.arrays import QuantizedArray, dequantize, fake_quantize, quantize
from wush_jax.formats.elements import FloatElement, IntElement
from wush_jax.formats.format import (
    FORMATS,
    FP8,
    INT4,
    INT4_ABSMAX,
    INT8,
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    NVINT4,
    Format,
)
from wush_jax.formats.partition import Partition

__all__ = [
    "FORMATS",
    "FP8",
    "INT4",
    "INT4_ABSMAX",
    "INT8",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "NVFP4",
    "NVINT4",
    "FloatElement",
    "Format",
    "IntElement",
    "Partition",
    "QuantizedArray",
    "dequantize",
    "fake_quantize",
    "quantize",
]
