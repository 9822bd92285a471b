"""Text from a decoder: prompts read once, then token by token over a cache, in one compilation."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.models.llama import Llama
from wush_jax.models.tokens import check_tokens

SHOWN = 8  # tokens from one sight of them to the next
CHUNK = 16  # tokens from one look at whether all rows have ended to the next


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` returns.

    Attributes:
        tokens: (batch, max_new_tokens) int32; zeros after a row's end.
        lengths: (batch,) int32, tokens that each row has, a stop token included.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def sample(
    logits: jax.Array,
    key: jax.Array,
    temperature: jax.Array | float | None = None,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """Draw tokens from softmax(logits / temperature), cut to its nucleus.

    The nucleus is the smallest set of most likely tokens whose probabilities sum to ``top_p``.

    Args:
        logits: (..., vocab).
        key: random key; not used by greedy choice.
        temperature: positive; None takes the most likely token.
        top_p: from 0 to 1; None keeps all tokens.

    Returns:
        (...,) int32.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020).

    >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    >>> sample(logits, jax.random.key(0)).item()
    1
    >>> sample(logits, jax.random.key(0), temperature=1.0, top_p=0.5).item()
    1
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not reach top_p; so the first always does.
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.sum((before < top_p).at[..., 0].set(True), axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(
    model: Llama,
    prompts: Any,
    *,
    max_new_tokens: int,
    lengths: Any = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: int | Sequence[int] = (),
    key: jax.Array | None = None,
) -> Generated:
    """Continue prompts: one pass over them, then one token after another over a cache.

    Everything runs in one compiled program, again used for prompts of about the same length (see
    `bucket`) and the same ``max_new_tokens``. Quantized models and weights sharded over a mesh work
    alike. With stop tokens, whether all rows have ended is looked up every `CHUNK` tokens.

    Args:
        model: a :class:`Llama`, quantized or not.
        prompts: (batch, length) integers; or sequences of tokens of any lengths.
        max_new_tokens: the most that a row gets.
        lengths: (batch,) tokens of each row of an array; what is right of them is ignored. None
            is all.
        temperature: 0 takes the most likely token.
        top_p: draw among the most likely tokens whose probabilities sum to this.
        stop_tokens: a row ends with the first of these.
        key: random key; needed with a temperature.

    Returns:
        The new tokens, without the prompts.

    Raises:
        ValueError: an empty prompt, ids outside of the model's vocabulary, lengths that do not fit,
            a temperature without a key.

    Warns:
        UserWarning: more positions than the model was made for; it goes on all the same.

    >>> from wush_jax.models import LlamaConfig
    >>> config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> out = generate(Llama(config, rngs=nnx.Rngs(0)), [[1, 2, 3], [4]], max_new_tokens=5)
    >>> out.tokens.shape, out.lengths.tolist()
    ((2, 5), [5, 5])
    """
    prompts, lengths = _padded(prompts, lengths, model.config.vocab_size)
    stops = _checked(model, lengths, max_new_tokens, temperature, top_p, stop_tokens, key)
    graph, state = nnx.split(model)
    chance = _chance(temperature, top_p, key)
    tokens, count = _generate(
        graph, max_new_tokens, stops, state, _filled(prompts), lengths, *chance
    )
    return Generated(np.asarray(tokens), np.asarray(count))


def stream(
    model: Llama,
    prompts: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: int | Sequence[int] = (),
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of `generate` as they come, some at a time: first one, then up to `SHOWN`.

    Args:
        model: as for `generate`.
        prompts: as for `generate`.
        max_new_tokens: the most that a row gets.
        temperature: as for `generate`.
        top_p: as for `generate`.
        stop_tokens: a row ends with the first of these.
        key: as for `generate`.

    Yields:
        (batch, some) int32; zeros after a row's end. Nothing follows when all rows have ended.

    Raises:
        ValueError: as `generate`, with the first tokens.
    """
    prompts, lengths = _padded(prompts, None, model.config.vocab_size)
    stops = _checked(model, lengths, max_new_tokens, temperature, top_p, stop_tokens, key)
    graph, state = nnx.split(model)
    chance = _chance(temperature, top_p, key)
    rounds = -(-(max_new_tokens - 1) // SHOWN)
    filled = _filled(prompts)
    chosen, cache = _first(
        graph, filled.shape[1] + 1 + rounds * SHOWN, state, filled, lengths, *chance
    )
    ended, new, done = np.zeros(len(lengths), bool), np.asarray(chosen)[:, None], 0
    while True:
        new = new[:, : max_new_tokens - done]
        past = np.cumsum(np.isin(new, stops), axis=1) - np.isin(new, stops) > 0
        yield np.where(past | ended[:, None], 0, new)
        ended |= np.isin(new, stops).any(axis=1)
        done += new.shape[1]
        if done == max_new_tokens or ended.all():
            return
        chosen, cache, new = _more(graph, state, done, chosen, cache, *chance)
        new = np.asarray(new)


@partial(jax.jit, static_argnums=(0, 1))
def _first(graph, room, state, prompts, lengths, key, temperature, top_p):
    logits, cache = nnx.merge(graph, state).prefill(prompts, lengths, room)
    return sample(logits, jax.random.fold_in(key, 0), temperature, top_p), cache


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _more(graph, state, done, chosen, cache, key, temperature, top_p):
    model = nnx.merge(graph, state)

    def advance(carry, step):
        chosen, cache = carry
        logits, cache = model.decode(chosen, cache)
        chosen = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
        return (chosen, cache), chosen

    steps = done + jnp.arange(SHOWN, dtype=jnp.int32)
    (chosen, cache), new = jax.lax.scan(advance, (chosen, cache), steps)
    return chosen, cache, new.T


def _checked(model, lengths, max_new_tokens, temperature, top_p, stop_tokens, key) -> tuple:
    """Return the stop tokens, all having been checked."""
    stops = (stop_tokens,) if isinstance(stop_tokens, int) else tuple(stop_tokens)
    if stops:
        check_tokens([stops], model.config.vocab_size, name="stop_tokens")
    _check_sampling(max_new_tokens, temperature, top_p, key)
    positions, made_for = lengths.max() + max_new_tokens, model.config.max_position_embeddings
    if positions > made_for:
        warnings.warn(
            f"prompts of up to {lengths.max()} tokens and max_new_tokens={max_new_tokens} need "
            f"{positions} positions; the model was made for {made_for}, later text may degrade",
            stacklevel=3,
        )
    return stops


def _chance(temperature: float, top_p: float, key: jax.Array | None) -> tuple:
    """Return how tokens are drawn, as the compiled programs take it."""
    key = jax.random.key(0) if key is None else key
    return key, temperature or None, None if top_p == 1 else top_p


def _filled(prompts: np.ndarray) -> np.ndarray:
    return np.pad(prompts, ((0, 0), (0, bucket(prompts.shape[1]) - prompts.shape[1])))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graph, limit, stops, state, prompts, lengths, key, temperature, top_p):
    model = nnx.merge(graph, state)
    logits, cache = model.prefill(prompts, lengths, prompts.shape[1] + limit)
    batch = len(lengths)
    tokens, count = jnp.zeros((batch, limit), jnp.int32), jnp.zeros(batch, jnp.int32)
    # A loop of known length is launched ahead of the device. One that ends by what it computes
    # makes the device wait for the host, each time round.
    chunk = min(CHUNK, limit - 1) if stops else limit - 1

    def choose(step, logits, tokens, count, ended):
        chosen = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
        chosen = jnp.where(ended, 0, chosen)
        stopped = jnp.isin(chosen, jnp.array(stops, jnp.int32)) if stops else False
        return chosen, tokens.at[:, step].set(chosen), count + ~ended, ended | stopped

    def unfinished(carry):
        step, *_, ended = carry
        return (step < limit) & ~jnp.all(ended)

    def advance(_, carry):
        step, chosen, cache, tokens, count, ended = carry
        logits, cache = model.decode(chosen, cache)
        chosen, tokens, count, ended = choose(step, logits, tokens, count, ended)
        return step + 1, chosen, cache, tokens, count, ended

    def advance_chunk(carry):
        return jax.lax.fori_loop(0, chunk, advance, carry)

    chosen, tokens, count, ended = choose(0, logits, tokens, count, jnp.zeros(batch, bool))
    carry = (1, chosen, cache, tokens, count, ended)
    # Without stop tokens every row ends with the one chunk.
    carry = jax.lax.while_loop(unfinished, advance_chunk, carry) if stops else advance_chunk(carry)
    _, _, _, tokens, count, _ = carry
    return tokens, jnp.minimum(count, limit)  # the last chunk may go on: tokens beyond are lost


def bucket(length: int) -> int:
    """Return the length that prompts are filled up to: few lengths, few compilations.

    Multiples of 16 up to 128, then four between a power of two and the next: less than a quarter
    more. What fills a row stands behind its text, where no position of the text looks.

    >>> [bucket(n) for n in (1, 16, 17, 128, 129, 500)]
    [16, 16, 32, 128, 160, 512]
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _padded(prompts: Any, lengths: Any, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as one array, filled up on the right, and their lengths."""
    if not (hasattr(prompts, "ndim") and prompts.ndim == 2):
        if lengths is not None:
            raise ValueError("lengths belong to an array of prompts; sequences have their own")
        rows = [np.asarray(row) for row in prompts]
        lengths = [row.size for row in rows]
        # In the type that they have: one that is no integer, or too large, must not pass.
        kind = np.result_type(*({row.dtype for row in rows if row.size} or {np.dtype(np.int32)}))
        filled = np.zeros((len(rows), max(lengths, default=0)), kind)
        for new, row in zip(filled, rows, strict=True):
            new[: row.size] = row.reshape(-1)
        prompts = filled
    prompts = np.asarray(prompts)
    lengths = np.asarray(
        np.full(len(prompts), prompts.shape[1]) if lengths is None else lengths, np.int32
    )
    fits = lengths.shape == prompts.shape[:1] and len(lengths) > 0
    if not fits or lengths.min() < 1 or lengths.max() > prompts.shape[1]:
        raise ValueError(
            f"prompts of shape {prompts.shape} with lengths {lengths.tolist()}: give at least one "
            "row, and every row at least one token"
        )
    behind = np.arange(prompts.shape[1]) >= lengths[:, None]
    return check_tokens(np.where(behind, 0, prompts), vocabulary, name="prompts"), lengths


def _check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, key: jax.Array | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be positive")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite, 0 for the most likely token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; 1 keeps all tokens")
    if temperature and key is None:
        raise ValueError(f"temperature={temperature} draws at random; give key=jax.random.key(0)")
