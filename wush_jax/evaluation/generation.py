"""How far a quantized model follows its reference when the reference writes for itself.

FP4's known failure is in long greedy text, which perplexity on given text does not show. No labels
are needed: the reference continues prompts greedily, and the model is led along that text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.evaluation.evaluate import divergence
from wush_jax.evaluation.positions import Call, Model, position_values
from wush_jax.models.generation import generate
from wush_jax.models.llama import Llama


@dataclass(frozen=True)
class GreedyText:
    """Prompts and what a model continues them with.

    Attributes:
        prompts: (P, L) int32.
        tokens: (P, T) int32, the most likely continuation.
    """

    prompts: np.ndarray
    tokens: np.ndarray

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield prompts with their continuations, (size, L + T); the last may have fewer rows."""
        whole = np.concatenate([self.prompts, self.tokens], axis=1)
        return (whole[i : i + size] for i in range(0, len(whole), size))


def greedy_text(
    model: Llama, prompts: Any, *, max_new_tokens: int = 128, batch: int = 25
) -> GreedyText:
    """Continue prompts with the most likely tokens.

    Args:
        model: a decoder, such as the unquantized one.
        prompts: (P, L) integers.
        max_new_tokens: T.
        batch: prompts at a time.

    Raises:
        ValueError: no prompts, or not (P, L).
    """
    prompts = np.asarray(prompts, np.int32)
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(f"prompts has shape {prompts.shape}; it must be (P, L), both at least 1")
    parts = [
        generate(model, prompts[i : i + batch], max_new_tokens=max_new_tokens).tokens
        for i in range(0, len(prompts), batch)
    ]
    return GreedyText(prompts, np.concatenate(parts))


@dataclass(frozen=True)
class GenerationScore:
    """How far a model follows another one's greedy text; means over prompts.

    Attributes:
        match: tokens up to the first that differs.
        same_start: share of prompts whose first tokens are all the same.
        kl: from the reference along its own text, nats.
        match_error: standard error of ``match`` over prompts.
        same_error: of ``same_start``.
        kl_error: of ``kl``.
    """

    match: float
    same_start: float
    kl: float
    match_error: float
    same_error: float
    kl_error: float


def score_generation(
    reference: Model,
    model: Model,
    text: GreedyText,
    *,
    start: int = 32,
    batch: int = 25,
    call: Call | None = None,
) -> GenerationScore:
    """Lead a model along a reference's greedy text and see where it would have left it.

    A greedy continuation is the reference's up to the first position where the model's most likely
    token is another one; what comes before is the same text, so that one pass over the text finds
    that position without generating. The noise floor is the reference in another precision in the
    model's place.

    Args:
        reference: tokens (batch, length) to logits (batch, length, vocab).
        model: the same of the quantized model.
        text: the reference's, from `greedy_text`.
        start: tokens that ``same_start`` compares; all where there are fewer.
        batch: prompts at a time.
        call: how to run a model; None: ``model(tokens)``.

    Raises:
        ValueError: a start that is not positive.

    >>> favourite = lambda tokens: jax.nn.one_hot(jnp.full(tokens.shape, 3), 8)
    >>> text = GreedyText(np.zeros((1, 2), np.int32), np.int32([[3, 3, 5, 3]]))
    >>> score_generation(favourite, favourite, text).match
    2.0
    """
    if start < 1:
        raise ValueError(f"start={start} must be at least 1")
    length = text.prompts.shape[1]
    found = [v for v, _ in position_values(_follow, [reference, model], text.batches(batch), call)]
    same, kl = (np.concatenate(parts)[:, length - 1 : -1] for parts in zip(*found, strict=True))
    match = np.cumprod(same, axis=1).sum(axis=1)
    whole = np.all(same[:, :start], axis=1)
    means, errors = zip(*map(_mean, (match, whole, kl.mean(axis=1, dtype=np.float64))), strict=True)
    return GenerationScore(*means, *errors)


def _follow(logits: list[jax.Array], following: jax.Array) -> tuple[jax.Array, jax.Array]:
    """At every position: is the following token the model's choice, and the KL."""
    chosen = jnp.argmax(logits[1], axis=-1).astype(following.dtype)
    return chosen == following, divergence(logits)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; 0 for a single value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)
