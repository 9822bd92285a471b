"""Grouped-query attention with rotary positions: over a whole text, or over a cache.

A cache holds the keys and values of what was read; every row has a length of its own.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.layers.siblings import call_together
from wush_jax.models.config import LlamaConfig
from wush_jax.models.rope import apply_rope, rope_frequencies


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class LayerCache:
    """Keys (rotated) and values that one layer has computed.

    Heads come before positions: products over a cache then read it as it lies, where any other
    order would be transposed, whole, for every token.

    Attributes:
        keys: (batch, kv heads, length, head_dim).
        values: of the same shape.
    """

    keys: jax.Array
    values: jax.Array

    def padded(self, length: int) -> "LayerCache":
        """Return the cache with room for ``length`` positions."""
        room = [(0, 0), (0, 0), (0, length - self.keys.shape[2]), (0, 0)]
        return LayerCache(jnp.pad(self.keys, room), jnp.pad(self.values, room))

    def write(self, key: jax.Array, value: jax.Array, positions: jax.Array) -> "LayerCache":
        """Return the cache with (batch, kv heads, head_dim) at one position (batch,) a row."""
        rows = jnp.arange(len(positions))
        keys = self.keys.at[rows, :, positions].set(key)
        return LayerCache(keys, self.values.at[rows, :, positions].set(value))

    def attend(self, query: jax.Array, seen: jax.Array) -> jax.Array:
        """Return softmax(query . keys / sqrt(head_dim)) . values, the softmax in float32.

        Args:
            query: (batch, heads, head_dim); heads that share keys lie side by side.
            seen: (batch, length), which positions count.

        Returns:
            An array like ``query``.
        """
        batch, shared, _, head_dim = self.keys.shape
        groups = query.reshape(batch, shared, -1, head_dim)
        logits = jnp.einsum(
            "bkgd,bkld->bkgl", groups, self.keys, preferred_element_type=jnp.float32
        )
        logits = jnp.where(seen[:, None, None], logits / math.sqrt(head_dim), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.values.dtype)
        return jnp.einsum("bkgl,bkld->bkgd", weights, self.values).reshape(query.shape)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions: (batch, length, hidden) to the same."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype, implementation, window):
        self.config, self.implementation, self.window = config, implementation, window
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
        return self.prefill(x)[0]

    def prefill(self, x: jax.Array) -> tuple[jax.Array, LayerCache]:
        """Return what calling gives, and the keys and values of ``x``."""
        query, key, value = self._heads(x, jnp.arange(x.shape[1]))
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            implementation=self.implementation,
        )
        cache = LayerCache(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), cache

    def decode(
        self, x: jax.Array, cache: LayerCache, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Let one more position of every row read itself and what the cache holds before it.

        Args:
            x: (batch, 1, hidden).
            cache: of the positions before, with room for one more.
            positions: (batch,) int32, where each row goes on.
        """
        query, key, value = (heads[:, 0] for heads in self._heads(x, positions[:, None]))
        cache = cache.write(key, value, positions)
        at = jnp.arange(cache.keys.shape[2])
        seen = at <= positions[:, None]
        if self.window is not None:
            seen &= at > positions[:, None] - self.window
        mixed = cache.attend(query, seen)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), cache

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return rotated queries, rotated keys and values: (batch, length, heads, head_dim)."""
        split = (*x.shape[:-1], -1, self.config.head_dim)
        projections = call_together([self.q_proj, self.k_proj, self.v_proj], x)
        query, key, value = (heads.reshape(split) for heads in projections)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        scaling = self.config.rope_scaling
        frequencies = rope_frequencies(self.config.head_dim, self.config.rope_theta, scaling)
        factor = 1.0 if scaling is None else scaling.attention_factor
        query, key = (apply_rope(heads, positions, frequencies, factor) for heads in (query, key))
        return query, key, value
