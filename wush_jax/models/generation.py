"""Text from a decoder: prompts read in chunks, then token by token, over one cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.models.llama import Cache, Llama
from wush_jax.models.prompts import bucket, chance_of, check_logits, checked, padded

SHOWN = 8  # tokens from one sight of them to the next
CHUNK = 16  # tokens from one look at whether all rows have ended to the next
PROMPT_CHUNK = 4096  # positions of prompts that are read at once


@dataclass(frozen=True)
class Seconds:
    """What a call of `generate` took, and of how many tokens.

    Attributes:
        compiling: seconds; none in a call of sizes that were called before.
        reading: seconds, from the prompts to the first token of each row.
        writing: seconds of the tokens after the first.
        read: tokens of the prompts, all rows together.
        written: new tokens after the first ones, all rows together.
    """

    compiling: float = 0.0
    reading: float = 0.0
    writing: float = 0.0
    read: int = 0
    written: int = 0

    def __str__(self) -> str:
        """Both rates, in words."""
        parts = [
            f"{count} {what} tokens, {count / seconds:.1f} tokens/s"
            for what, count, seconds in (
                ("prompt", self.read, self.reading),
                ("new", self.written, self.writing),
            )
            if seconds
        ]
        return "; ".join([*parts, f"compiled in {self.compiling:.1f} s"])


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` returns.

    Attributes:
        tokens: (batch, max_new_tokens) int32; zeros after a row's end.
        lengths: (batch,) int32, tokens that each row has, a stop token included.
        seconds: how long it took, by part.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    seconds: Seconds


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
    """Continue prompts: `PROMPT_CHUNK` positions at a time, then token after token, over one cache.

    Reading and writing are compiled once each, again used for prompts of about the same length (see
    `bucket`) and the same ``max_new_tokens``; logits stay on the device. Quantized models and
    weights sharded over a mesh work alike. With stop tokens, whether all rows have ended is looked
    up every `CHUNK` tokens.

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
        The new tokens, without the prompts, and how long reading and writing took.

    Raises:
        ValueError: an empty prompt, ids outside of the model's vocabulary, lengths that do not fit,
            a temperature without a key; logits of the first tokens that are NaN.

    Warns:
        UserWarning: more positions than the model was made for; it goes on all the same.

    >>> from wush_jax.models import LlamaConfig
    >>> config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> out = generate(Llama(config, rngs=nnx.Rngs(0)), [[1, 2, 3], [4]], max_new_tokens=5)
    >>> out.tokens.shape, out.lengths.tolist(), out.seconds.read, out.seconds.written
    ((2, 5), [5, 5], 4, 8)
    """
    prompts, lengths = padded(prompts, lengths, model.config.vocab_size)
    stops = checked(model, lengths, max_new_tokens, temperature, top_p, stop_tokens, key)
    graph, state = _apart(model)
    chance = chance_of(temperature, top_p, key)
    chosen, cache, seconds = _read(graph, state, prompts, lengths, max_new_tokens, chance)
    rest = _Program(_rest, graph, max_new_tokens, stops)
    (tokens, count, _), compiling, writing = rest(state, chosen, cache, *chance)
    tokens, count = np.asarray(tokens), np.asarray(count)
    seconds = replace(
        seconds,
        compiling=seconds.compiling + compiling,
        writing=writing,
        written=int(count.sum()) - len(count),
    )
    return Generated(tokens, count, seconds)


def stream(
    model: Llama,
    prompts: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: int | Sequence[int] = (),
    key: jax.Array | None = None,
    watch: Callable[[Seconds], None] | None = None,
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
        watch: told before each of them what all took so far; ends that were not shown count.

    Yields:
        (batch, some) int32; zeros after a row's end. Nothing follows when all rows have ended.

    Raises:
        ValueError: as `generate`, with the first tokens.
    """
    prompts, lengths = padded(prompts, None, model.config.vocab_size)
    stops = checked(model, lengths, max_new_tokens, temperature, top_p, stop_tokens, key)
    graph, state = _apart(model)
    chance = chance_of(temperature, top_p, key)
    more = _Program(_more, graph)
    room = 1 + -(-(max_new_tokens - 1) // SHOWN) * SHOWN
    chosen, cache, seconds = _read(graph, state, prompts, lengths, room, chance)
    ended, new, done = np.zeros(len(lengths), bool), np.asarray(chosen)[:, None], 0
    while True:
        new = new[:, : max_new_tokens - done]
        past = np.cumsum(np.isin(new, stops), axis=1) - np.isin(new, stops) > 0
        if watch is not None:
            watch(seconds)
        yield np.where(past | ended[:, None], 0, new)
        ended |= np.isin(new, stops).any(axis=1)
        done += new.shape[1]
        if done == max_new_tokens or ended.all():
            return
        out, compiling, writing = more(state, np.int32(done), chosen, cache, *chance)
        chosen, cache, new = out
        new = np.asarray(new)
        seconds = replace(
            seconds,
            compiling=seconds.compiling + compiling,
            writing=seconds.writing + writing,
            written=seconds.written + new.size,
        )


def _apart(model: Llama) -> tuple[tuple[Any, Any], list[jax.Array]]:
    """Return a model as what jitted functions take for static, and its arrays.

    The arrays are a list: a state of nested modules takes longer to go through than a step of
    decoding.
    """
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    return (graph, tree), leaves


def _whole(graph: tuple[Any, Any], leaves: list[jax.Array]) -> Llama:
    return nnx.merge(graph[0], jax.tree.unflatten(graph[1], leaves))


class _Program:
    """A jitted function behind its static arguments, for arrays of one size: compiled once."""

    def __init__(self, function: Any, *static: Any):
        self._function, self._static = function, static
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> tuple[Any, float, float]:
        """Return what the function returns, and the seconds of compiling and of running it."""
        start = time.perf_counter()
        if self._compiled is None:  # of an earlier program it is found, which takes a while, too
            self._compiled = self._function.lower(*self._static, *arguments).compile()
        ready = time.perf_counter()
        found = jax.block_until_ready(self._compiled(*arguments))
        return found, ready - start, time.perf_counter() - ready


def _read(
    graph: Any, state: list, prompts: np.ndarray, lengths: np.ndarray, room: int, chance: tuple
) -> tuple[jax.Array, Cache, Seconds]:
    """Return the first token of each row, a cache with room for so many, and what it took."""
    width = prompts.shape[1]
    whole = width // PROMPT_CHUNK * PROMPT_CHUNK
    filled = np.pad(prompts, ((0, 0), (0, whole + bucket(width - whole) - width)))
    first, ends = filled[:, :PROMPT_CHUNK], np.minimum(lengths, PROMPT_CHUNK)
    begin = _Program(_begin, graph, filled.shape[1] + room)
    (logits, cache), compiling, reading = begin(state, first, ends)
    chunk, last = _Program(_go_on, graph), _Program(_go_on, graph)
    for start in range(PROMPT_CHUNK, filled.shape[1], PROMPT_CHUNK):
        some = filled[:, start : start + PROMPT_CHUNK]
        go_on = chunk if some.shape[1] == PROMPT_CHUNK else last
        (logits, cache), *more = go_on(state, some, lengths, logits, cache, np.int32(start))
        compiling, reading = compiling + more[0], reading + more[1]
    (chosen, spoilt), *more = _Program(_draw)(logits, *chance)
    check_logits(spoilt)
    compiling, reading = compiling + more[0], reading + more[1]
    return chosen, cache, Seconds(compiling, reading, read=int(lengths.sum()))


@partial(jax.jit, static_argnums=(0, 1))
def _begin(graph, room, state, prompts, lengths):
    return _whole(graph, state).prefill(prompts, lengths, room)


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _go_on(graph, state, prompts, lengths, logits, cache, start):
    new, cache = _whole(graph, state).extend(prompts, lengths, cache, start)
    return jnp.where((lengths > start)[:, None], new, logits), cache


@jax.jit
def _draw(logits, key, temperature, top_p):
    return sample(logits, jax.random.fold_in(key, 0), temperature, top_p), jnp.isnan(logits).any(-1)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _more(graph, state, done, chosen, cache, key, temperature, top_p):
    model = _whole(graph, state)

    def advance(carry, step):
        chosen, cache = carry
        logits, cache = model.decode(chosen, cache)
        chosen = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
        return (chosen, cache), chosen

    steps = done + jnp.arange(SHOWN, dtype=jnp.int32)
    (chosen, cache), new = jax.lax.scan(advance, (chosen, cache), steps)
    return chosen, cache, new.T


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _rest(graph, limit, stops, state, chosen, cache, key, temperature, top_p):
    """Return tokens (batch, limit) and how many each row has, from the first ones on."""
    model = _whole(graph, state)
    batch = len(chosen)
    tokens, count = jnp.zeros((batch, limit), jnp.int32), jnp.zeros(batch, jnp.int32)
    # A loop of known length is launched ahead of the device. One that ends by what it computes
    # makes the device wait for the host, each time round.
    chunk = min(CHUNK, limit - 1) if stops else limit - 1

    def keep(step, chosen, tokens, count, ended):
        chosen = jnp.where(ended, 0, chosen)
        stopped = jnp.isin(chosen, jnp.array(stops, jnp.int32)) if stops else False
        return chosen, tokens.at[:, step].set(chosen), count + ~ended, ended | stopped

    def unfinished(carry):
        step, *_, ended = carry
        return (step < limit) & ~jnp.all(ended)

    def advance(_, carry):
        step, chosen, cache, tokens, count, ended = carry
        logits, cache = model.decode(chosen, cache)
        chosen = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
        chosen, tokens, count, ended = keep(step, chosen, tokens, count, ended)
        return step + 1, chosen, cache, tokens, count, ended

    def advance_chunk(carry):
        return jax.lax.fori_loop(0, chunk, advance, carry)

    chosen, tokens, count, ended = keep(0, chosen, tokens, count, jnp.zeros(batch, bool))
    carry = (1, chosen, cache, tokens, count, ended)
    # Without stop tokens every row ends with the one chunk.
    carry = jax.lax.while_loop(unfinished, advance_chunk, carry) if stops else advance_chunk(carry)
    _, _, cache, tokens, count, _ = carry
    # The last chunk may go on: tokens beyond are lost. A cache that is returned is not copied.
    return tokens, jnp.minimum(count, limit), cache
