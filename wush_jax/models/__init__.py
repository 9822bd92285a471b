"""Flax NNX decoders that the package can quantize without a download."""

from wush_jax.models.hugging_face import from_tensors, load_pretrained, to_tensors
from wush_jax.models.llama import Llama, LlamaConfig, RopeScaling

__all__ = [
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "from_tensors",
    "load_pretrained",
    "to_tensors",
]
