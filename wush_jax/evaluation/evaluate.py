"""How well a model predicts text, and how far a quantized model has moved from its reference.

A model is an NNX module or any function that maps integer tokens (batch, length) to logits
(batch, length, vocab). Batches are such token arrays; those of one shape are compiled once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from wush_jax.calibration.observe import Progress

Model = Callable[[jax.Array], jax.Array]
Call = Callable[[Any, jax.Array], jax.Array]
# Per-token values from the logits of some models, the tokens, and what else belongs to a batch.
Measure = Callable[[list[jax.Array], jax.Array, Any], tuple[jax.Array, ...]]


def _plain_call(model: Model, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _token_losses(logits: list[jax.Array], tokens: jax.Array, extra: None) -> tuple[jax.Array]:
    predicted = logits[0][:, :-1]
    chosen = jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(predicted, axis=-1) - chosen,)


def divergences(logits: list[jax.Array], tokens: jax.Array, extra: None) -> tuple[jax.Array]:
    """KL of the second model from the first at every position, (batch, length)."""
    reference, model = (jax.nn.log_softmax(values) for values in logits)
    return (jnp.sum(jnp.exp(reference) * (reference - model), axis=-1),)


def _score(
    logits: list[jax.Array], tokens: jax.Array, reference: jax.Array
) -> tuple[jax.Array, ...]:
    return *_token_losses(logits, tokens, None), *divergences([reference, *logits], tokens, None)


def _evaluate(
    measure: Measure,
    call: Call,
    graphs: tuple[Any, ...],
    states: tuple[Any, ...],
    tokens: jax.Array,
    extra: Any,
) -> tuple[jax.Array, ...]:
    models = [
        nnx.merge(g, s) if isinstance(g, nnx.GraphDef) else g
        for g, s in zip(graphs, states, strict=True)
    ]
    return measure([call(m, tokens).astype(jnp.float32) for m in models], tokens, extra)


# Graphs are no static arguments: those are hashed, and configs in a model need not be hashable.
_compiled = jax.jit(_evaluate, static_argnums=(0, 1))


def token_values(
    measure: Measure,
    models: list[Model],
    batches: Iterable[Any],
    call: Call | None = None,
    progress: Progress | None = None,
    extras: Iterable[Any] | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield what a measure finds in the logits of some models, batch by batch.

    Args:
        measure: (logits of each model in float32, tokens, extra) to arrays.
        models: modules, or functions of tokens.
        batches: integer arrays (batch, length).
        call: how to run a model; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".
        extras: what else belongs to each batch.
    """
    # Modules are split: as constants of a closure, their weights would be compiled in.
    parts = [nnx.split(m) if isinstance(m, nnx.Module) else (Partial(m), None) for m in models]
    graphs, states = zip(*parts, strict=True)
    # What a plain function closes over may change between calls: never reuse its compilation.
    plain = not all(isinstance(graph, nnx.GraphDef) for graph in graphs)
    compiled = (
        jax.jit(partial(_evaluate, measure, call or _plain_call, graphs))
        if plain
        else partial(_compiled, measure, call or _plain_call, graphs)
    )
    pairs = ((b, None) for b in batches) if extras is None else zip(batches, extras, strict=True)
    for done, (tokens, extra) in enumerate(pairs, start=1):
        yield tuple(map(np.asarray, compiled(states, jnp.asarray(tokens), extra)))
        if progress is not None:
            progress(done, None, "evaluate")


def _means(
    measure: Measure,
    models: list[Model],
    batches: Iterable[Any],
    call: Call | None,
    progress: Progress | None,
    extras: Iterable[Any] | None = None,
) -> list[float]:
    """Average per-token values over all batches; float64 on the host, so that long sums hold."""
    sums = [
        [(v.sum(dtype=np.float64), v.size) for v in values]
        for values in token_values(measure, models, batches, call, progress, extras)
    ]
    totals = np.sum(sums, axis=0) if sums else np.zeros((1, 2))
    if not totals[:, 1].all():
        raise ValueError("batches holds no token to predict; give at least one (batch, length).")
    return [float(total / count) for total, count in totals]


def cross_entropy(
    model: Model,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    progress: Progress | None = None,
) -> float:
    """Mean over positions of -log p(token_t+1 | tokens up to t), in nats.

    Args:
        model: tokens (batch, length) to logits (batch, length, vocab).
        batches: integer arrays (batch, length), length at least 2; read once.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        The mean, summed in float64.

    Raises:
        ValueError: if ``batches`` holds no position with a next token.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 8))
    >>> round(cross_entropy(uniform, [np.zeros((2, 5), np.int32)]) / math.log(2), 5)
    3.0
    """
    return _means(_token_losses, [model], batches, call, progress)[0]


def perplexity(
    model: Model,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    progress: Progress | None = None,
) -> float:
    """exp of :func:`cross_entropy`: the number of equally likely tokens to the same surprise.

    Args:
        model: tokens (batch, length) to logits (batch, length, vocab).
        batches: integer arrays (batch, length), length at least 2; read once.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        A number from 1 up.

    Raises:
        ValueError: if ``batches`` holds no position with a next token.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 8))
    >>> round(perplexity(uniform, [np.zeros((2, 5), np.int32)]), 4)
    8.0
    """
    return math.exp(cross_entropy(model, batches, call=call, progress=progress))


def bits_per_byte(
    model: Model,
    batches: Iterable[Any],
    *,
    bytes_per_token: float = 1.0,
    call: Call | None = None,
    progress: Progress | None = None,
) -> float:
    """:func:`cross_entropy` / (ln 2 * bytes per token), which does not depend on the tokenizer.

    Args:
        model: tokens (batch, length) to logits (batch, length, vocab).
        batches: integer arrays (batch, length), length at least 2; read once.
        bytes_per_token: mean length of a token of this text; 1 for byte-level models.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        Bits to a byte of text; 8 for a model that knows nothing.

    Raises:
        ValueError: if ``batches`` holds no position with a next token.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 256))
    >>> round(bits_per_byte(uniform, [np.zeros((2, 5), np.int32)]), 4)
    8.0
    """
    nats = cross_entropy(model, batches, call=call, progress=progress)
    return nats / (math.log(2) * bytes_per_token)


def kl_divergence(
    reference: Model,
    model: Model,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    progress: Progress | None = None,
) -> float:
    """Mean over positions of KL(p || q) = sum_v p_v (log p_v - log q_v), in nats.

    p are the probabilities of ``reference``, q those of ``model``; log-softmax in float32.

    Args:
        reference: tokens (batch, length) to logits (batch, length, vocab), such as the
            full-precision model.
        model: the same of the quantized model.
        batches: integer arrays (batch, length); read once.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        The mean; 0 only if both models agree everywhere.

    Raises:
        ValueError: if ``batches`` is empty.

    Source: Kullback and Leibler, On Information and Sufficiency (1951).

    >>> fair = lambda tokens: jnp.zeros((*tokens.shape, 2))
    >>> biased = lambda tokens: fair(tokens).at[..., 0].set(jnp.log(3.0))
    >>> round(kl_divergence(fair, biased, [np.zeros((1, 4), np.int32)]), 4)
    0.1438
    """
    return _means(divergences, [reference, model], batches, call, progress)[0]


@dataclass(frozen=True)
class Score:
    """How well a model predicts text and how far it is from its reference.

    Attributes:
        cross_entropy: mean of -log p of the next token, nats.
        kl: mean KL divergence from the reference, nats.
    """

    cross_entropy: float
    kl: float

    @property
    def perplexity(self) -> float:
        """exp of the cross entropy."""
        return math.exp(self.cross_entropy)

    @property
    def bits_per_token(self) -> float:
        """Cross entropy in bits."""
        return self.cross_entropy / math.log(2)


def reference_logits(
    model: nnx.Module, batches: Iterable[Any], *, call: Call | None = None
) -> list[jax.Array]:
    """Return a model's float32 logits on every batch, to be compared with again and again.

    Args:
        model: an NNX module, tokens (batch, length) to logits (batch, length, vocab).
        batches: integer arrays (batch, length).
        call: how to run a model; None: ``model(tokens)``.
    """
    graph, state = nnx.split(model)
    return [_logits(call or _plain_call, graph, state, jnp.asarray(b)) for b in batches]


def score(
    model: nnx.Module,
    batches: Iterable[Any],
    reference: Iterable[jax.Array],
    *,
    call: Call | None = None,
    progress: Progress | None = None,
) -> Score:
    """Measure :func:`cross_entropy` and :func:`kl_divergence` in one pass over the text.

    Args:
        model: an NNX module, tokens (batch, length) to logits (batch, length, vocab).
        batches: integer arrays (batch, length).
        reference: logits of the reference on the same batches: :func:`reference_logits`.
        call: how to run a model; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Raises:
        ValueError: if ``batches`` holds no position with a next token.
    """
    logits = map(jnp.asarray, reference)
    return Score(*_means(_score, [model], batches, call, progress, logits))


@partial(jax.jit, static_argnums=(0,))
def _logits(call, graph, state, tokens):
    return call(nnx.merge(graph, state), tokens).astype(jnp.float32)
