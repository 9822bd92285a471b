"""Flax NNX decoders that the package can quantize without a download."""

from wush_jax.models.config import LlamaConfig, RopeScaling
from wush_jax.models.generation import Generated, Seconds, generate, sample, stream
from wush_jax.models.hugging_face import from_tensors, load_pretrained, to_tensors
from wush_jax.models.llama import Cache, Llama
from wush_jax.models.placement import tensor_parallel

__all__ = [
    "Cache",
    "Generated",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "Seconds",
    "from_tensors",
    "generate",
    "load_pretrained",
    "sample",
    "stream",
    "tensor_parallel",
    "to_tensors",
]
