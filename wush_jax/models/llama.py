"""One Flax NNX decoder for the Llama family: Llama 2 and 3, Mistral, Qwen 2 and Qwen 3.

Modules carry the names that Hugging Face gives them. Layers that share an input are called with
one and the same array (``q_proj``, ``k_proj`` and ``v_proj``; ``gate_proj`` and ``up_proj``), so
that calibration can find the sites they share.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The ``llama3`` stretching of rotary wavelengths to a longer context.

    Source: Hugging Face transformers, ``rope_type="llama3"``.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder, under the names of Hugging Face's ``config.json``.

    ``attention_bias`` is the bias of the query, key and value projections (Qwen 2),
    ``output_bias`` that of the attention output; ``qk_norm`` normalises each query and key
    head (Qwen 3).

    >>> LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128,
    ...             num_hidden_layers=2, num_attention_heads=4).head_dim
    16
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # None is only ever given, never found: __post_init__ fills it in.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {heads}; choose a divisor."
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = "
                    f"{heads}; give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embedding needs pairs.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read the content of a Hugging Face ``config.json`` (or of :meth:`to_dict`).

        Raises:
            NotImplementedError: if the file asks for mathematics that this decoder lacks.
        """
        kind = values.get("model_type", "llama")
        refused = {
            "model_type": kind not in ("llama", "mistral", "qwen2", "qwen3"),
            "hidden_act": values.get("hidden_act", "silu") != "silu",
            "mlp_bias": bool(values.get("mlp_bias")),
            "sliding_window": bool(values.get("sliding_window"))
            and values.get("use_sliding_window", kind == "mistral"),
        }
        for name in (name for name, bad in refused.items() if bad):
            raise NotImplementedError(f"{name} = {values.get(name)!r} is not supported by Llama.")
        given = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        given.setdefault("tie_word_embeddings", False)  # Hugging Face's default
        bias = bool(values.get("attention_bias", kind == "qwen2"))
        given["attention_bias"] = bias
        given["output_bias"] = bool(values.get("output_bias", bias and kind != "qwen2"))
        given["qk_norm"] = bool(values.get("qk_norm", kind == "qwen3"))
        # transformers 5 keeps theta and the scaling together in ``rope_parameters``.
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        given["rope_scaling"] = _rope_scaling(rope)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` reads back."""
        values = dataclasses.asdict(self) | {"model_type": "llama"}
        if self.rope_scaling is not None:
            values["rope_scaling"]["rope_type"] = "llama3"
        return values


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise NotImplementedError(f"rope_type = {kind!r} is not supported by Llama.")
    return RopeScaling(**{f.name: rope[f.name] for f in dataclasses.fields(RopeScaling)})


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Return the rotary frequencies theta^(-2i / head_dim), stretched if the config says so.

    Returns:
        float64 (head_dim / 2,), radians per position.

    Source: Su et al., RoFormer (2021); ``llama3`` scaling as in Hugging Face transformers.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast rotation, left alone
    return frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rope(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotate the pairs (i, i + head_dim / 2) of every head by position * frequency.

    Args:
        x: (..., length, heads, head_dim).
        positions: (length,) integers.
        frequencies: (head_dim / 2,).

    Returns:
        The rotated array, computed in float32, of the shape and dtype of ``x``.
    """
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions: (batch, length, hidden) to the same."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype, implementation):
        self.config, self.implementation = config, implementation
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nnx.Linear(hidden, heads, use_bias=bias, **kinds)
        self.k_proj = nnx.Linear(hidden, shared, use_bias=bias, **kinds)
        self.v_proj = nnx.Linear(hidden, shared, use_bias=bias, **kinds)
        self.o_proj = nnx.Linear(heads, hidden, use_bias=config.output_bias, **kinds)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, **kinds)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Let every position of ``x`` read itself and the positions before it."""
        split = (*x.shape[:-1], -1, self.config.head_dim)
        query, key = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split)
        value = self.v_proj(x).reshape(split)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        positions, frequencies = jnp.arange(x.shape[1]), rope_frequencies(self.config)
        mixed = jax.nn.dot_product_attention(
            apply_rope(query, positions, frequencies),
            apply_rope(key, positions, frequencies),
            value,
            is_causal=True,
            implementation=self.implementation,
        )
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype):
        kinds = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map each position of ``x`` by itself."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One residual block of the decoder: (batch, length, hidden) to the same."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype, implementation):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"epsilon": config.rms_norm_eps, **kinds}
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(config, implementation=implementation, **kinds)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, **kinds)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Add attention, then the feed-forward layer, to the residual stream."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nnx.Module):
    """A decoder of the Llama family; ``head(layers(embed(tokens)))``, whole or step by step.

    Args:
        config: the sizes.
        rngs: random streams of the initial weights.
        dtype: type of activations and products. Logits are always float32.
        param_dtype: type in which weights are kept.
        attention_implementation: passed on to ``jax.nn.dot_product_attention``.

    >>> config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32,
    ...                      num_hidden_layers=2, num_attention_heads=2)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model(jnp.arange(6).reshape(2, 3)).shape
    (2, 3, 11)
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        attention_implementation: str | None = None,
    ):
        self.config, self.dtype = config, dtype
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        # Looked up in the type of the weights: summed in bfloat16, the gradient of a frequent
        # token would lose most of its terms.
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=param_dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List(
            DecoderLayer(config, implementation=attention_implementation, **kinds)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **kinds)
        if not config.tie_word_embeddings:
            kinds["use_bias"] = False
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, **kinds)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Look up token vectors: (batch, length) integers to (batch, length, hidden)."""
        return self.embed_tokens(tokens).astype(self.dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Normalise and project: (batch, length, hidden) to float32 (batch, length, vocab)."""
        hidden = self.norm(hidden)
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        embedding = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("blh,vh->blv", hidden, embedding, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return next-token logits: (batch, length) integers to float32 (batch, length, vocab)."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)
