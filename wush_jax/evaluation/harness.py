"""Models in EleutherAI's lm-evaluation-harness (the ``lm_eval`` package, extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.models import Llama, generate
from wush_jax.models.text import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    TemplateLM = object

# Lengths are rounded up to multiples of this: few shapes, few compilations.
BUCKET = 64


class HarnessModel(TemplateLM):
    """A `Llama`, quantized or not, for ``lm_eval.simple_evaluate(model=HarnessModel(...))``.

    Args:
      model: the decoder.
      tokenizer: of its folder.
      max_length: tokens that the model reads at once; None is the config's.
      batch_size: requests in a batch.

    Raises:
      ImportError: without the ``lm_eval`` package.

    Source: Gao et al., A framework for few-shot language model evaluation (2021).
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
    ):
        if TemplateLM is object:
            raise ImportError("lm_eval is missing: pip install 'wush-jax[eval]'")
        super().__init__()
        self._model, self._text = model, tokenizer
        self._limit = max_length or model.config.max_position_embeddings
        self._batch = batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; 0 where the folder names none."""
        return next(iter(self._text.stop_tokens), 0)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, special ones only on request."""
        return self._text.encode(string, special=bool(add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (log p, whether each of its tokens is the most likely)."""
        graph, state = nnx.split(self._model)
        scores: dict[int, tuple[float, bool]] = {}
        for chosen in self._batches([len(a) + len(b) for _, a, b in requests]):
            rows = [(requests[i][1] + requests[i][2])[-(self._limit + 1) :] for i in chosen]
            tokens, ends = _padded([row[:-1] for row in rows], self._batch, self._limit)
            targets, _ = _padded([row[1:] for row in rows], self._batch, self._limit)
            counts = [
                min(len(requests[i][2]), len(row) - 1) for i, row in zip(chosen, rows, strict=True)
            ]
            starts = ends - np.array(counts + [0] * (self._batch - len(counts)))
            values = _score(graph, state, tokens, targets, starts, ends)
            found = zip(*map(np.asarray, values), strict=True)
            scores |= {i: (float(a), bool(b)) for i, (a, b) in zip(chosen, found, strict=False)}
        return [scores[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of whole texts, in windows of the model's length."""
        parts, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._limit,
                context_len=1,
            )
            windows = [(None, *make_disjoint_window(window)) for window in windows]
            parts += windows
            owners += [owner] * len(windows)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts greedily, or at the temperature of a request, up to a given string."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        count = min(int(settings.get("max_gen_toks", 256)), self._limit - 1)
        kept = self.tok_encode(context)[-(self._limit - count) :] or [self.prefix_token_id]
        prompt, length = _padded([kept], 1, self._limit)
        drawn = settings.get("do_sample", False)
        out = generate(
            self._model,
            prompt,
            lengths=length,
            max_new_tokens=count,
            temperature=float(settings.get("temperature", 1.0)) if drawn else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            stop_tokens=self._text.stop_tokens,
            key=jax.random.key(0),
        )
        new = out.tokens[0, : out.lengths[0]].tolist()
        text = self._text.decode([t for t in new if t not in self._text.stop_tokens])
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.partition(stop)[0] if stop else text
        return text

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return indices in batches of similar length."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[i : i + self._batch] for i in range(0, len(order), self._batch)]


def _padded(rows: Sequence[Sequence[int]], batch: int, limit: int) -> tuple[Any, Any]:
    """Return rows as int32 (batch, length), filled up on the right, and their lengths."""
    longest = max(map(len, rows))
    length = max(longest, min(limit, -(-longest // BUCKET) * BUCKET))
    tokens, lengths = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


@partial(jax.jit, static_argnums=0)
def _score(graph, state, tokens, targets, starts, ends):
    """Log p of targets from start to end, and whether they are the most likely."""
    logits = nnx.merge(graph, state)(tokens)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    at = jnp.arange(tokens.shape[1])
    counted = (at >= starts[:, None]) & (at < ends[:, None])
    greedy = (jnp.argmax(logits, axis=-1) == targets) | ~counted
    return jnp.sum(jnp.where(counted, chosen, 0), axis=1), jnp.all(greedy, axis=1)
