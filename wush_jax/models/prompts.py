"""What is asked of a text: prompts as one array, and how tokens are drawn, checked."""

import warnings
from typing import Any

import jax
import numpy as np

from wush_jax.models.tokens import check_tokens


def checked(model, lengths, max_new_tokens, temperature, top_p, stop_tokens, key) -> tuple:
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


def check_logits(spoilt: jax.Array) -> None:
    """Refuse rows (batch,) whose logits are NaN: their tokens would be some, and mean nothing."""
    rows = np.flatnonzero(np.asarray(spoilt))
    if len(rows):
        raise ValueError(
            f"prompts: the model's logits are NaN in {len(rows)} of {len(spoilt)} rows, the first "
            f"{rows[0]}: look at its weights, or use float32"
        )


def chance_of(temperature: float, top_p: float, key: jax.Array | None) -> tuple:
    """Return how tokens are drawn, as the compiled programs take it."""
    key = jax.random.key(0) if key is None else key
    return key, temperature or None, None if top_p == 1 else top_p


def bucket(length: int) -> int:
    """Return the length that prompts are filled up to: few lengths, few compilations.

    Multiples of 16 up to 128, then four between a power of two and the next: less than a quarter
    more. What fills a row stands behind its text, where no position of the text looks.

    >>> [bucket(n) for n in (1, 16, 17, 128, 129, 500)]
    [16, 16, 32, 128, 160, 512]
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def padded(prompts: Any, lengths: Any, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
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
