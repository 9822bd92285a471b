"""One Flax NNX decoder for all families of `wush_jax.models.families`.

Fields of the config switch its pieces. Modules carry the names that Hugging Face gives them. Layers
that share an input are called with one and the same array (``q_proj``, ``k_proj`` and ``v_proj``;
``gate_proj`` and ``up_proj``), so that calibration can find the sites they share.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.layers.siblings import normed_together
from wush_jax.models.attention import Attention, LayerCache
from wush_jax.models.config import LlamaConfig
from wush_jax.models.feed_forward import MLP, SparseMLP
from wush_jax.models.norms import norm


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "lengths"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """What a decoder remembers of a batch of texts: fixed in size, a pytree.

    Attributes:
        layers: one `LayerCache` a layer.
        lengths: (batch,) int32, positions that each row has read.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array


def scaled(config: LlamaConfig, vectors: Any) -> Any:
    """Return token vectors as the first layer gets them: of Gemma times sqrt(hidden_size).

    Args:
        config: of the model.
        vectors: (..., hidden) of the embedding, jax or numpy; in its type, to which the factor is
            rounded.
    """
    if not config.scaled_embeddings:
        return vectors
    return vectors * vectors.dtype.type(config.hidden_size**0.5)


# The residual stream, (batch, length, hidden), and what is still to be added to it: the norm that
# comes next does that, in a quantizer's kernel where there is one.
Stream = tuple[jax.Array, jax.Array | None]


def added(stream: Stream) -> jax.Array:
    """Return a stream's sum."""
    hidden, update = stream
    return hidden if update is None else hidden + update


class DecoderLayer(nnx.Module):
    """One residual block of the decoder: (batch, length, hidden) to the same."""

    def __init__(self, config: LlamaConfig, number: int, *, implementation, **kinds):
        hidden = config.hidden_size
        self.sandwich = config.sandwich_norms
        self.input_layernorm = norm(config, hidden, **kinds)
        self.self_attn = Attention(
            config, implementation=implementation, window=config.window(number), **kinds
        )
        self.post_attention_layernorm = norm(config, hidden, **kinds)
        if self.sandwich:
            self.pre_feedforward_layernorm = norm(config, hidden, **kinds)
            self.post_feedforward_layernorm = norm(config, hidden, **kinds)
        self.mlp = (SparseMLP if config.is_sparse(number) else MLP)(config, **kinds)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Add attention, then the feed-forward layer, to the residual stream."""
        return added(self.prefill((hidden, None))[0])

    def prefill(self, stream: Stream) -> tuple[Stream, LayerCache]:
        """Return what calling gives, and the layer's keys and values."""
        projections, hidden = self._projected(stream)
        mixed, cache = self.self_attn.prefill(projections)
        return self._rest(hidden, mixed), cache

    def extend(
        self, stream: Stream, cache: LayerCache, start: jax.Array, lengths: jax.Array
    ) -> tuple[Stream, LayerCache]:
        """Send the next positions of every row through the layer; see :meth:`Attention.extend`."""
        projections, hidden = self._projected(stream)
        mixed, cache = self.self_attn.extend(projections, cache, start, lengths)
        return self._rest(hidden, mixed), cache

    def decode(
        self, stream: Stream, cache: LayerCache, positions: jax.Array
    ) -> tuple[Stream, LayerCache]:
        """Send one more position of every row through the layer; see :meth:`Attention.decode`."""
        projections, hidden = self._projected(stream)
        mixed, cache = self.self_attn.decode(projections, cache, positions)
        return self._rest(hidden, mixed), cache

    def _projected(self, stream: Stream) -> tuple[list[jax.Array], jax.Array]:
        """What attention reads, and the stream's sum."""
        return normed_together(self.input_layernorm, self.self_attn.readers, *stream)

    def _rest(self, hidden: jax.Array, mixed: jax.Array) -> Stream:
        """Add what attention has mixed, then the feed-forward layer."""
        if self.sandwich:
            hidden = hidden + self.post_attention_layernorm(mixed)
            fed = self.mlp(self.pre_feedforward_layernorm(hidden))
            return hidden, self.post_feedforward_layernorm(fed)
        if isinstance(self.mlp, MLP):
            fed, hidden = self.mlp.normed(self.post_attention_layernorm, hidden, mixed)
            return hidden, fed
        hidden = hidden + mixed
        return hidden, self.mlp(self.post_attention_layernorm(hidden))


class Llama(nnx.Module):
    """A decoder of the Llama family; ``head(layers(embed(tokens)))``, whole or step by step.

    Args:
        config: the sizes.
        rngs: random streams of the initial weights.
        dtype: type of activations and products. Logits are always float32.
        param_dtype: type in which weights are kept.
        attention_implementation: of whole texts, passed on to ``jax.nn.dot_product_attention``.

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
            DecoderLayer(config, i, implementation=attention_implementation, **kinds)
            for i in range(config.num_hidden_layers)
        )
        self.norm = norm(config, config.hidden_size, **kinds)
        if not config.tie_word_embeddings:
            kinds["use_bias"] = False
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, **kinds)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Look up token vectors: (batch, length) integers to (batch, length, hidden)."""
        return scaled(self.config, self.embed_tokens(tokens)).astype(self.dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Normalise and project: (batch, length, hidden) to float32 (batch, length, vocab)."""
        hidden = self.norm(hidden)
        if not self.config.tie_word_embeddings:
            logits = self.lm_head(hidden).astype(jnp.float32)
        else:
            embedding = self.embed_tokens.embedding[...].astype(hidden.dtype)
            logits = jnp.einsum(
                "blh,vh->blv", hidden, embedding, preferred_element_type=jnp.float32
            )
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Return what `head` reads: (batch, length) integers to (batch, length, hidden)."""
        stream: Stream = self.embed(tokens), None
        for layer in self.layers:
            stream, _ = layer.prefill(stream)
        return added(stream)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return next-token logits: (batch, length) integers to float32 (batch, length, vocab)."""
        return self.head(self.hidden(tokens))

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, max_length: int
    ) -> tuple[jax.Array, Cache]:
        """Read prompts.

        Args:
            tokens: (batch, length) integers; what is right of a row's length is ignored.
            lengths: (batch,) int32, tokens of each row, at least one.
            max_length: positions that the cache has room for.

        Returns:
            float32 (batch, vocab) logits of the token after each row's last; the cache.
        """
        stream: Stream = self.embed(tokens), None
        layers = []
        for layer in self.layers:
            stream, cache = layer.prefill(stream)
            layers.append(cache.kept(lengths, layer.self_attn.cache_size(max_length)))
        return self._after(stream, lengths - 1), Cache(tuple(layers), lengths)

    def extend(
        self, tokens: jax.Array, lengths: jax.Array, cache: Cache, start: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Read more of the prompts that :meth:`prefill` has begun.

        Under ``jax.jit`` donate the cache, as for :meth:`decode`.

        Args:
            tokens: (batch, length) integers, of all rows from position ``start`` on; what is right
                of a row's length is ignored.
            lengths: (batch,) int32, tokens of each whole row.
            cache: of the positions before ``start``, with room for these.
            start: () int32, how many positions were read before.

        Returns:
            float32 (batch, vocab) logits of the token after each row's last, where that is one of
            these; the cache.
        """
        stream: Stream = self.embed(tokens), None
        layers = []
        for layer, old in zip(self.layers, cache.layers, strict=True):
            stream, new = layer.extend(stream, old, start, lengths)
            layers.append(new)
        end = jnp.minimum(lengths, start + tokens.shape[1])
        return self._after(stream, jnp.maximum(end - 1 - start, 0)), Cache(tuple(layers), end)

    def _after(self, stream: Stream, last: jax.Array) -> jax.Array:
        """Return the logits (batch, vocab) after one position (batch,) of each row.

        Rows end at places of their own; what pads them is to their right, where none looks.
        """
        hidden = jnp.take_along_axis(added(stream), last[:, None, None], axis=1)
        return self.head(hidden)[:, 0]

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token a row: (batch,) integers.

        Under ``jax.jit`` donate the cache, so that it is written in place. It must have room:
        positions beyond its size are lost.

        Returns:
            float32 (batch, vocab) logits of the next token; the cache, one position longer.
        """
        stream: Stream = self.embed(tokens[:, None]), None
        layers = []
        for layer, old in zip(self.layers, cache.layers, strict=True):
            stream, new = layer.decode(stream, old, cache.lengths)
            layers.append(new)
        return self.head(added(stream))[:, 0], Cache(tuple(layers), cache.lengths + 1)
