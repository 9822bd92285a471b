"""The metadata of a GGUF file as a Hugging Face ``config.json``: Llama, Mistral, Qwen 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wush_jax.models.typed_values import TypedValues

# GGUF's architecture: Hugging Face's model_type.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What converters write for Llama 3's stretched rotary embedding, beside its factor.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Keys of an architecture that are read, or follow from what is.
KNOWN = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "expert_count", "expert_used_count"),
)


def config_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the config that a file's metadata means.

    Args:
      metadata: its fields, by their names.
      tensors: shapes, by the names in the file.

    Raises:
      ValueError: fields that are missing or make no sense, all of them.
      NotImplementedError: an architecture or mathematics that is not read.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise NotImplementedError(
            f"general.architecture = {str(architecture)[:40]!r} is none of "
            f"{', '.join(ARCHITECTURES)}: quantize the model's own folder"
        )
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    defaults = {"rope.freq_base": 10_000.0, "rope.scaling.type": "none"}
    values = TypedValues(own, defaults, said=prefix)
    values.need("rope.scaling.type", "none")
    for key, value in own.items():
        if key not in KNOWN and value not in (None, False, 0, 0.0, 1.0, ""):
            values.lack(f"{prefix}{key} = {str(value)[:40]}", "is not read")
    if own.get("expert_count"):
        values.lack(f"{prefix}expert_count = {own['expert_count']}", "is not read")
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    dimension = own.get("attention.key_length", own.get("rope.dimension_count", hidden // heads))
    values.need("attention.key_length", dimension)
    values.need("attention.value_length", dimension)
    values.need("rope.dimension_count", dimension)
    shared = "attention.head_count_kv"
    embedding = tensors.get("token_embd.weight", ())
    if len(embedding) != 2:
        values.faults.append(f"token_embd.weight has shape {embedding}, expected (tokens, hidden)")
    config = {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": embedding[0] if embedding else 1,
        "hidden_size": hidden,
        "intermediate_size": values.size("feed_forward_length"),
        "num_hidden_layers": values.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.size(shared) if shared in own else heads,
        "head_dim": dimension,
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.number("rope.freq_base"),
        "max_position_embeddings": values.size("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "bfloat16",
    }
    values.check()
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return config | _tokens(metadata)


def _tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids at the ends of a text."""
    found = {}
    for name in ("bos", "eos"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(value) is int:
            found[f"{name}_token_id"] = value
    return found


def rope_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``rope_freqs``, divisors of the rotary frequencies, means.

    Converters compute them by Llama 3's rule, whose constants the file does not hold: those of all
    released models are tried, and their factors must be these.

    Args:
      factors: (head_dim / 2,).
      config: of the model.

    Raises:
      NotImplementedError: other factors.
    """
    if (factors == 1).all():
        return None
    found = {**LLAMA3, "factor": float(factors.max())}
    dimension = config["head_dim"]
    exponents = np.arange(0, dimension, 2) / dimension
    waves = 2 * np.pi * config["rope_theta"] ** exponents
    turns = found["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - found["low_freq_factor"]) / 3.0, 0, 1)
    expected = 1 / ((1 - smooth) / found["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise NotImplementedError(
            "rope_freqs.weight are no factors of Llama 3's rule; quantize the model's own folder"
        )
    return found
