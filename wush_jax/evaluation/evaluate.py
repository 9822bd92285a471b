"""How well a model predicts text, and how far a quantized model has moved from its reference.

A model is an NNX module or any function that maps integer tokens (batch, length) to logits
(batch, length, vocab). Batches are such token arrays, or pairs of one and a mask of the positions
that count; those of one shape are compiled once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.calibration.observe import Progress
from wush_jax.evaluation.positions import Call, Model, Reader, position_values
from wush_jax.formats.checks import check_number


def _losses(logits: list[jax.Array], following: jax.Array) -> tuple[jax.Array, ...]:
    """-log p of the following token, of each model."""
    chosen = (jnp.take_along_axis(z, following[..., None], axis=-1)[..., 0] for z in logits)
    return tuple(
        jax.nn.logsumexp(z, axis=-1) - value for z, value in zip(logits, chosen, strict=True)
    )


def divergence(logits: list[jax.Array]) -> jax.Array:
    """KL(p || q) at every position, p of the first of two models: (..., vocab) to (...)."""
    log_p, log_q = (jax.nn.log_softmax(values) for values in logits)
    p = jnp.exp(log_p)
    # Tokens of probability zero add nothing, even where their log p - log q is inf - inf.
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def _divergences(logits: list[jax.Array], following: jax.Array) -> tuple[jax.Array]:
    return (divergence(logits),)


def _scores(logits: list[jax.Array], following: jax.Array) -> tuple[jax.Array, ...]:
    return *_losses(logits, following), divergence(logits)


def _means(
    measure: Any,
    models: list[Model | Reader],
    batches: Iterable[Any],
    call: Call | None,
    progress: Progress | None,
) -> list[float]:
    """Average values over all positions that count; float64 on the host, so that long sums hold."""
    sums = []
    found = position_values(measure, models, batches, call, progress)
    for index, (values, mask) in enumerate(found):
        following = mask & np.pad(mask[:, 1:], ((0, 0), (0, 1)))
        # The last value is KL, which needs no next token, unless all are losses.
        masks = [following] * len(values)
        if measure is not _losses:
            masks[-1] = mask
        pairs = zip(values, masks, strict=True)
        sums.append([_sum(value, counted, f"batches[{index}]") for value, counted in pairs])
    totals = np.sum(sums, axis=0) if sums else np.zeros((1, 2))
    if not totals[:, 1].all():
        raise ValueError("batches holds no token to predict; give at least one (batch, length).")
    return [float(total / count) for total, count in totals]


def _sum(values: np.ndarray, counted: np.ndarray, name: str) -> tuple[float, int]:
    """Return the sum and the number of the values that count."""
    chosen = values[counted]
    finite = np.isfinite(chosen)
    if not finite.all():
        row, column = np.argwhere(counted)[~finite][0].tolist()
        raise ValueError(
            f"{name}: the figure at row {row}, position {column} is {chosen[~finite][0]}: the "
            "logits of a model are not finite there; look at its weights, or run it in float32"
        )
    return float(chosen.sum(dtype=np.float64)), chosen.size


def perplexity_of(loss: float) -> float:
    """Return exp(loss), if float64 has it.

    Raises:
        ValueError: a loss above 709 nats, with what to look at.

    >>> perplexity_of(0.0)
    1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        raise ValueError(
            f"the cross entropy is {loss:.6g} nats a token, whose perplexity is beyond float64: "
            "the model predicts nothing; look at its weights, and at the tokenizer"
        ) from None


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
        batches: integers (batch, length), length at least 2, or pairs of those and a mask of
            what counts, bool (batch, length); read once.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        The mean, summed in float64.

    Raises:
        ValueError: no position with a next token; what is no token of the model; logits that are
            not finite.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 8))
    >>> round(cross_entropy(uniform, [np.zeros((2, 5), np.int32)]) / math.log(2), 5)
    3.0
    """
    return _means(_losses, [model], batches, call, progress)[0]


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
        batches: integers (batch, length), length at least 2, or pairs of those and a mask of
            what counts, bool (batch, length); read once.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        A number from 1 up.

    Raises:
        ValueError: no position with a next token; what is no token of the model; logits that are
            not finite.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 8))
    >>> round(perplexity(uniform, [np.zeros((2, 5), np.int32)]), 4)
    8.0
    """
    return perplexity_of(cross_entropy(model, batches, call=call, progress=progress))


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
        batches: integers (batch, length), length at least 2, or pairs of those and a mask of
            what counts, bool (batch, length); read once.
        bytes_per_token: mean length of a token of this text; 1 for byte-level models.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        Bits to a byte of text; 8 for a model that knows nothing.

    Raises:
        ValueError: no position with a next token; what is no token of the model; logits that are
            not finite.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 256))
    >>> round(bits_per_byte(uniform, [np.zeros((2, 5), np.int32)]), 4)
    8.0
    """
    check_number(bytes_per_token=bytes_per_token)
    if not 0 < bytes_per_token < math.inf:
        raise ValueError(f"bytes_per_token={bytes_per_token}; give a number above 0")
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
        batches: integers (batch, length), or pairs of those and a mask; read once.
        call: how to run a model, ``call(model, tokens)``; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Returns:
        The mean; 0 only if both models agree everywhere.

    Raises:
        ValueError: no batches; what is no token of the models; logits that are not finite, or of
            two vocabularies.

    Source: Kullback and Leibler, On Information and Sufficiency (1951).

    >>> fair = lambda tokens: jnp.zeros((*tokens.shape, 2))
    >>> biased = lambda tokens: fair(tokens).at[..., 0].set(jnp.log(3.0))
    >>> round(kl_divergence(fair, biased, [np.zeros((1, 4), np.int32)]), 4)
    0.1438
    """
    return _means(_divergences, [reference, model], batches, call, progress)[0]


@dataclass(frozen=True)
class Score:
    """How well a model predicts text and how far it is from its reference.

    Attributes:
        cross_entropy: mean of -log p of the next token, nats.
        kl: mean KL divergence from the reference, nats.
        reference_cross_entropy: the reference's own cross entropy.
    """

    cross_entropy: float
    kl: float
    reference_cross_entropy: float

    @property
    def perplexity(self) -> float:
        """exp of the cross entropy."""
        return perplexity_of(self.cross_entropy)

    @property
    def bits_per_token(self) -> float:
        """Cross entropy in bits."""
        return self.cross_entropy / math.log(2)


def score(
    model: Model,
    batches: Iterable[Any],
    reference: Model | Reader,
    *,
    call: Call | None = None,
    progress: Progress | None = None,
) -> Score:
    """Measure :func:`cross_entropy` and :func:`kl_divergence` in one pass over the text.

    Args:
        model: tokens (batch, length) to logits (batch, length, vocab).
        batches: integers (batch, length), or pairs of those and a mask; read once.
        reference: the same, such as the full-precision model; or a
            `wush_jax.evaluation.positions.Reader` that remembers what it has read.
        call: how to run a model; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Raises:
        ValueError: as `cross_entropy` and `kl_divergence`.

    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 8))
    >>> score(uniform, [np.zeros((2, 5), np.int32)], uniform).kl
    0.0
    """
    original, loss, kl = _means(_scores, [reference, model], batches, call, progress)
    return Score(loss, kl, original)
