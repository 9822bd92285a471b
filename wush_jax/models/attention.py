"""Grouped-query attention with rotary positions: over a whole text, or over a cache.

A cache holds the keys and values of what was read; every row has a length of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.layers.siblings import call_together
from wush_jax.models.config import LlamaConfig
from wush_jax.models.norms import norm
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

    def kept(self, lengths: jax.Array, size: int) -> "LayerCache":
        """Return a cache of ``size`` positions that holds the last ones of rows (batch,) so long.

        Position p stands at p, or at p % size where there were more: see :func:`held`.
        """
        length = self.keys.shape[2]
        if length <= size:
            room = [(0, 0), (0, 0), (0, size - length), (0, 0)]
            return LayerCache(jnp.pad(self.keys, room), jnp.pad(self.values, room))
        last = jnp.maximum(held(lengths - 1, size), 0)[:, None, :, None]
        keys, values = (jnp.take_along_axis(x, last, axis=2) for x in (self.keys, self.values))
        return LayerCache(keys, values)

    def rolled(self, new: "LayerCache", start: jax.Array, last: jax.Array) -> "LayerCache":
        """Return a rolling cache that has read the positions from ``start`` on that ``new`` holds.

        ``last`` (batch,) is the last position that counts, of each row: see :func:`held`.
        """
        wanted = held(last, self.keys.shape[2])
        fresh = (wanted >= start)[:, None, :, None]
        own = jnp.clip(wanted - start, 0, new.keys.shape[2] - 1)[:, None, :, None]
        keys, values = (
            jnp.where(fresh, jnp.take_along_axis(ours, own, axis=2), old)
            for ours, old in ((new.keys, self.keys), (new.values, self.values))
        )
        return LayerCache(keys, values)

    def followed(self, new: "LayerCache") -> "LayerCache":
        """Return a cache of these positions and, behind them, those of another."""
        pairs = ((self.keys, new.keys), (self.values, new.values))
        return LayerCache(*(jnp.concatenate(pair, axis=2) for pair in pairs))

    def placed(self, new: "LayerCache", start: jax.Array) -> "LayerCache":
        """Return a cache with room for all positions that holds those of ``new`` from ``start``."""
        place = jax.lax.dynamic_update_slice_in_dim
        pairs = ((self.keys, new.keys), (self.values, new.values))
        return LayerCache(*(place(old, ours, start, axis=2) for old, ours in pairs))

    def write(self, key: jax.Array, value: jax.Array, places: jax.Array) -> "LayerCache":
        """Return the cache with (batch, kv heads, head_dim) at one place (batch,) a row."""
        rows = jnp.arange(len(places))
        keys = self.keys.at[rows, :, places].set(key)
        return LayerCache(keys, self.values.at[rows, :, places].set(value))


def held(last: jax.Array, size: int) -> jax.Array:
    """Return which positions a rolling cache holds: (batch,) the last one to (batch, size).

    Place s holds the latest position p with p % size = s; below 0 where there is none yet.

    >>> held(jnp.array([5, 1]), 4).tolist()
    [[4, 5, 2, 3], [0, 1, -2, -1]]
    """
    return last[:, None] - (last[:, None] - jnp.arange(size)) % size


def attend(
    query: jax.Array,
    cache: LayerCache,
    seen: jax.Array,
    *,
    scale: float,
    cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(cap tanh(scale query . keys / cap)) . values, the softmax in float32.

    Args:
        query: (batch, length, heads, head_dim); heads that share keys lie side by side.
        cache: of the keys and values.
        seen: (batch or 1, length, positions), which positions count.
        scale: of the products.
        cap: bound of the logits; None bends nothing.
        sinks: (heads,), a logit of each head that takes weight and gives no value.

    Returns:
        An array like ``query``.

    Source: Gemma 2 (2024) for the cap; Xiao et al., Efficient Streaming Language Models with
        Attention Sinks (2023), and gpt-oss for the sinks.
    """
    batch, shared, _, head_dim = cache.keys.shape
    groups = query.reshape(batch, query.shape[1], shared, -1, head_dim)
    logits = scale * jnp.einsum(
        "blkgd,bksd->bkgls", groups, cache.keys, preferred_element_type=jnp.float32
    )
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    if sinks is not None:
        extra = sinks.astype(jnp.float32).reshape(1, shared, -1, 1, 1)
        extra = jnp.broadcast_to(extra, (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, extra], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : seen.shape[-1]].astype(cache.values.dtype)
    return jnp.einsum("bkgls,bksd->blkgd", weights, cache.values).reshape(query.shape)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions: (batch, length, hidden) to the same."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype, implementation, window):
        self.config, self.implementation, self.window = config, implementation, window
        bent = config.attn_logit_softcapping is not None or config.attention_sinks
        if bent and implementation is not None:
            raise ValueError(
                f"attention_implementation = {implementation!r} knows no capped logits and no "
                "sinks, which this config has; leave it out."
            )
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nnx.Linear(hidden, heads, use_bias=bias, **kinds)
        self.k_proj = nnx.Linear(hidden, shared, use_bias=bias, **kinds)
        self.v_proj = nnx.Linear(hidden, shared, use_bias=bias, **kinds)
        self.o_proj = nnx.Linear(heads, hidden, use_bias=config.output_bias, **kinds)
        if config.qk_norm:
            self.q_norm = norm(config, config.head_dim, **kinds)
            self.k_norm = norm(config, config.head_dim, **kinds)
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Let every position of ``x`` read itself and the positions before it."""
        return self.prefill(call_together(self.readers, x))[0]

    @property
    def readers(self) -> list[nnx.Module]:
        """The layers that read the input: of queries, keys and values."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def prefill(self, projections: Sequence[jax.Array]) -> tuple[jax.Array, LayerCache]:
        """Return what calling gives, and the keys and values.

        Args:
            projections: what the `readers` give for the input, each (batch, length, width).
        """
        length = projections[0].shape[1]
        query, key, value = self._heads(projections, jnp.arange(length))
        cache = LayerCache(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        if self._options:
            distance = jnp.arange(length)[:, None] - jnp.arange(length)
            seen = (distance >= 0) & (distance < (self.window or length))
            mixed = attend(query, cache, seen[None], scale=self._scale, **self._options)
        else:
            window = None if self.window is None else (self.window - 1, 0)
            rule = {"is_causal": True, "local_window_size": window}
            mixed = self._attention(query, key, value, **rule)
        return self._mixed(mixed), cache

    def extend(
        self,
        projections: Sequence[jax.Array],
        cache: LayerCache,
        start: jax.Array,
        lengths: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Let the next positions of every row read themselves and what the cache holds before them.

        Args:
            projections: what the `readers` give for the input, each (batch, length, width).
            cache: of the positions before ``start``; without a window, with room for these.
            start: () int32, the first of these positions.
            lengths: (batch,) int32, positions of each row that count, from the first on.
        """
        length, size = projections[0].shape[1], cache.keys.shape[2]
        positions = start + jnp.arange(length)
        query, key, value = self._heads(projections, positions)
        own = LayerCache(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        if self.window is None:
            cache = read = cache.placed(own, start)
            places = jnp.arange(size)[None]
        else:
            read = cache.followed(own)
            old = held(jnp.minimum(lengths, start) - 1, size)
            new = jnp.broadcast_to(positions, (len(old), length))
            places = jnp.concatenate([old, new], axis=1)
            cache = cache.rolled(own, start, jnp.minimum(lengths, start + length) - 1)
        distance = positions[:, None] - places[:, None]
        seen = (places[:, None] >= 0) & (distance >= 0)
        if self.window is not None:
            seen &= distance < self.window
        if self._options:
            mixed = attend(query, read, seen, scale=self._scale, **self._options)
        else:
            heads = (jnp.swapaxes(x, 1, 2) for x in (read.keys, read.values))
            mixed = self._attention(query, *heads, mask=seen[:, None])
        return self._mixed(mixed), cache

    def _attention(self, *heads: jax.Array, **rule: Any) -> jax.Array:
        """jax's attention of queries, keys and values: (batch, length, heads, head_dim)."""
        # Of float16 it has a product that no CPU and no TPU compiles.
        kind = jnp.float32 if heads[0].dtype == jnp.float16 else heads[0].dtype
        mixed = jax.nn.dot_product_attention(
            *(x.astype(kind) for x in heads),
            scale=self._scale,
            implementation=self.implementation,
            **rule,
        )
        return mixed.astype(heads[0].dtype)

    def cache_size(self, positions: int) -> int:
        """Return how many of so many positions have to be kept: no more than the window."""
        return positions if self.window is None else min(self.window, positions)

    def decode(
        self, projections: Sequence[jax.Array], cache: LayerCache, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Let one more position of every row read itself and what the cache holds before it.

        Args:
            projections: what the `readers` give for the input, each (batch, 1, width).
            cache: of the positions before, with room for one more.
            positions: (batch,) int32, where each row goes on.
        """
        query, key, value = self._heads(projections, positions[:, None])
        size = cache.keys.shape[2]
        # Without a window what has no room is lost, and overwrites nothing.
        places = positions if self.window is None else positions % size
        cache = cache.write(key[:, 0], value[:, 0], places)
        seen = held(positions, size) >= 0
        mixed = attend(query, cache, seen[:, None], scale=self._scale, **self._options)
        return self._mixed(mixed), cache

    def _mixed(self, heads: jax.Array) -> jax.Array:
        """Project (batch, length, heads, head_dim) back to the width of the input."""
        return self.o_proj(heads.reshape(*heads.shape[:2], -1))

    @property
    def _scale(self) -> float:
        scalar = self.config.query_pre_attn_scalar
        return (self.config.head_dim if scalar is None else scalar) ** -0.5

    @property
    def _options(self) -> dict[str, Any]:
        """What bends logits, beyond their scale; nothing for most families."""
        cap, sinks = self.config.attn_logit_softcapping, self.config.attention_sinks
        return ({} if cap is None else {"cap": cap}) | ({"sinks": self.sinks[...]} if sinks else {})

    def _heads(
        self, projections: Sequence[jax.Array], positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return rotated queries, rotated keys and values: (batch, length, heads, head_dim)."""
        split = (*projections[0].shape[:-1], -1, self.config.head_dim)
        query, key, value = (heads.reshape(split) for heads in projections)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        theta, scaling = self.config.rope(windowed=self.window is not None)
        frequencies = rope_frequencies(self.config.head_dim, theta, scaling)
        factor = 1.0 if scaling is None else scaling.attention_factor
        query, key = (apply_rope(heads, positions, frequencies, factor) for heads in (query, key))
        return query, key, value
