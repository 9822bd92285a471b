"""Quantized layers: the linear map, its Flax modules, and what dense layers look like."""

from wush_jax.layers.bare import expose_matrices
from wush_jax.layers.distill import distill, recover
from wush_jax.layers.finetune import pack, unpack
from wush_jax.layers.kernel_layout import pack_for_kernels, unpack_from_kernels
from wush_jax.layers.linear import gated_dot, normed_dot, quantized_dot
from wush_jax.layers.linen import LinenModel
from wush_jax.layers.loss import layer_loss
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Contraction,
    Dense,
    DenseTypes,
    QuantizedDense,
    dense_layers,
)
from wush_jax.layers.ragged import quantized_ragged_dot
from wush_jax.layers.ragged_linear import RaggedLinear
from wush_jax.layers.siblings import call_gated, call_together, normed_gated, normed_together

__all__ = [
    "DENSE_TYPES",
    "Contraction",
    "Dense",
    "DenseTypes",
    "LinenModel",
    "QuantizedDense",
    "RaggedLinear",
    "call_gated",
    "call_together",
    "dense_layers",
    "distill",
    "expose_matrices",
    "gated_dot",
    "layer_loss",
    "normed_dot",
    "normed_gated",
    "normed_together",
    "pack",
    "pack_for_kernels",
    "quantized_dot",
    "quantized_ragged_dot",
    "recover",
    "unpack",
    "unpack_from_kernels",
]
