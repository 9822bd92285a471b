"""Models in EleutherAI's lm-evaluation-harness (the ``lm_eval`` package, extra ``eval``).

Requests are read, cut and scored as the harness's own ``HFLM`` does; tests compare both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.models import Llama, generate
from wush_jax.models.text import Tokenizer
from wush_jax.models.tokens import check_tokens

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    TemplateLM = object

# Lengths are rounded up to multiples of this: few shapes, few compilations.
BUCKET = 64
# Names of one setting, the first that is given counts.
MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings that change nothing at these values, and that we do not have at others.
NEUTRAL = {"num_beams": (1,), "repetition_penalty": (1, 1.0), "top_k": (None, 0)}


class HarnessModel(TemplateLM):
    """A `Llama`, quantized or not, for ``lm_eval.simple_evaluate(model=HarnessModel(...))``.

    Args:
      model: the decoder.
      tokenizer: of its folder.
      max_length: tokens that the model reads at once; None is the config's.
      batch_size: requests in a batch.
      add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer's own rule.
      prefix_token_id: what an empty context stands for; None is BOS, or else the text's end.

    Attributes:
      max_length: as given.

    Raises:
      ImportError: without the ``lm_eval`` package.
      ValueError: sizes that are not positive, a prefix outside of the vocabulary.

    Source: Gao et al., A framework for few-shot language model evaluation (2021).
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        if TemplateLM is object:
            raise ImportError("lm_eval is missing: pip install 'wush-jax[eval]'")
        super().__init__()
        self._model, self._batch = model, batch_size
        rule = {None: "auto", True: "always", False: "never"}[add_bos_token]
        self._text = tokenizer.with_bos(rule)
        self.max_length = model.config.max_position_embeddings if max_length is None else max_length
        if self.max_length < 1 or batch_size < 1:
            raise ValueError(f"max_length={max_length}, batch_size={batch_size} must be positive")
        self._prefix = prefix_token_id
        check_tokens([[self.prefix_token_id]], model.config.vocab_size, name="prefix_token_id")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; 0 where the folder names none."""
        if self._text.eos is not None:
            return self._text.eos
        return next(iter(self._text.stop_tokens), 0)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or else the one that ends a text."""
        if self._prefix is not None:
            return self._prefix
        return self.eot_token_id if self._text.bos is None else self._text.bos

    @property
    def tokenizer_name(self) -> str:
        """What the harness files its caches under."""
        return type(self._text.inner).__name__

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text; None puts around it what belongs there, never twice."""
        return self._text.encode(string, special=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `apply_chat_template` renders; None for False."""
        if chat_template is False or chat_template is None:
            return None
        return None if self._text.chat is None else self._text.chat.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text; without its system message where the template has none."""
        if self._text.chat is None:
            raise ValueError("the tokenizer has no chat template; leave apply_chat_template out")
        render = partial(
            self._text.chat.render,
            add_generation_prompt=add_generation_prompt,
            continue_final=not add_generation_prompt,
        )
        try:
            return render(chat_history)
        except ValueError:
            return render([message for message in chat_history if message["role"] != "system"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (log p, whether each of its tokens is the most likely)."""
        _check_lengths(requests, self.max_length, self._model.config.vocab_size)
        graph, state = nnx.split(self._model)
        scores: dict[int, tuple[float, bool]] = {}
        for chosen in self._batches([len(a) + len(b) for _, a, b in requests]):
            rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in chosen]
            tokens, ends = _padded([row[:-1] for row in rows], self._batch, self.max_length)
            targets, _ = _padded([row[1:] for row in rows], self._batch, self.max_length)
            counts = [len(requests[i][2]) for i in chosen]
            starts = ends - np.array(counts + [0] * (self._batch - len(counts)))
            values = _score(graph, state, tokens, targets, starts, ends)
            found = zip(*map(np.asarray, values), strict=True)
            scores |= {i: (float(a), bool(b)) for i, (a, b) in zip(chosen, found, strict=False)}
        bad = [requests[i][0] for i, (value, _) in scores.items() if not np.isfinite(value)]
        if bad:
            raise ValueError(
                f"log p of {len(bad)} requests is not finite, first {bad[0]!r:.80}: the model's "
                "logits overflow; look at its weights, or run it in float32"
            )
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
                max_seq_len=self.max_length,
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
        settings = [Settings.read(request.args[1]) for request in requests]
        contexts = [self._context(*pair) for pair in zip(requests, settings, strict=True)]
        texts: dict[int, str] = {}
        for one in dict.fromkeys(settings):
            mine = [i for i, other in enumerate(settings) if other == one]
            for chosen in self._batches([len(contexts[i]) for i in mine]):
                batch = [mine[i] for i in chosen]
                found = self._continue([contexts[i] for i in batch], one)
                texts |= dict(zip(batch, found, strict=True))
        return [texts[i] for i in range(len(requests))]

    def _context(self, request: Any, settings: Settings) -> list[int]:
        """Return the last tokens of a context, as many as leave room for the new ones."""
        room = self.max_length - settings.most
        if room < 1:
            raise ValueError(
                f"{settings.most} new tokens leave no context within the model's {self.max_length} "
                "positions; give gen_kwargs max_gen_toks, or another max_length"
            )
        return self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id]

    def _continue(self, contexts: list[list[int]], settings: Settings) -> list[str]:
        """Continue contexts of one batch by the same settings."""
        stops = {*self._text.stop_tokens, self.eot_token_id}
        filled = contexts + contexts[:1] * (self._batch - len(contexts))
        out = generate(
            self._model,
            filled,
            max_new_tokens=settings.most,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop_tokens=sorted(stops),
            key=jax.random.key(0),
        )
        until = list(settings.until)
        if self._text.inner is not None:
            until.append(self._text.decode([self.eot_token_id], special=True))
        texts = []
        for row, length in zip(out.tokens[: len(contexts)], out.lengths, strict=False):
            new = row[:length].tolist()
            if self._text.inner is None:  # bytes that end a text are no part of it
                new = [token for token in new if token not in stops]
            text = self._text.decode(new)
            for stop in until:
                text = text.partition(stop)[0] if stop else text
            texts.append(text)
        return texts

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return indices in batches of similar length."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[i : i + self._batch] for i in range(0, len(order), self._batch)]


@dataclass(frozen=True)
class Settings:
    """How a request wants to be continued.

    Attributes:
      most: new tokens at most.
      temperature: 0 takes the most likely token.
      top_p: as for `generate`.
      until: strings at which the text ends.
    """

    most: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """Read ``gen_kwargs`` of the harness.

        Raises:
          ValueError: settings that `generate` does not have.

        >>> Settings.read({"until": "x", "max_new_tokens": 4, "temperature": 0.5}).most
        4
        """
        given = dict(given)
        counts = [given.pop(name, None) for name in MOST]
        most = next((int(count) for count in counts if count is not None), cls.most)
        until = given.pop("until", None) or ()
        temperature = float(given.pop("temperature", None) or 0.0)
        drawn = given.pop("do_sample", None)
        if drawn and not temperature:
            raise ValueError("gen_kwargs has do_sample=True; give a temperature above 0 with it")
        temperature = 0.0 if drawn is False else temperature
        top_p = float(given.pop("top_p", None) or 1.0)
        strange = {k: v for k, v in given.items() if v not in NEUTRAL.get(k, ())}
        if strange:
            raise ValueError(
                f"gen_kwargs has {json.dumps(strange, default=str)}, which this model does not "
                f"have; it has until, {', '.join(MOST)}, do_sample, temperature and top_p"
            )
        return cls(most, temperature, top_p, (until,) if isinstance(until, str) else tuple(until))


def _check_lengths(
    requests: Sequence[tuple[Any, list[int], list[int]]], limit: int, vocabulary: int
) -> None:
    """Refuse requests of which something would not be scored, and ids that the model lacks."""
    for about, context, continuation in requests:
        named = f"request {about!r:.80}"
        if not context or not continuation:
            raise ValueError(f"{named}: context and continuation must have at least one token each")
        if len(continuation) > limit:
            raise ValueError(
                f"{named}: the continuation has {len(continuation)} tokens and the model {limit} "
                "positions; score it by loglikelihood_rolling"
            )
        check_tokens([context + continuation], vocabulary, name=named)


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


def task_figures(
    model: Any, tokenizer: Tokenizer, tasks: Sequence[str], *, limit: int | None, batch_size: int
) -> dict[str, float]:
    """Return the harness's figures of some tasks, by the names of task and metric.

    Args:
      model: a `Llama`, quantized or not.
      tokenizer: of its folder.
      tasks: names that the harness knows, or YAML files.
      limit: the most questions of each; None for all.
      batch_size: requests in a batch.

    Raises:
      ValueError: without the ``lm_eval`` package; a task that it does not know.
    """
    try:
        import lm_eval
        import yaml
    except ImportError as error:
        raise ValueError("--tasks needs lm_eval: pip install 'wush-jax[eval]'") from error
    chosen = [
        yaml.safe_load(Path(task).read_text("utf8")) if Path(task).is_file() else task
        for task in tasks
    ]
    adapter: Any = HarnessModel(model, tokenizer, batch_size=batch_size)
    try:
        results = lm_eval.simple_evaluate(adapter, tasks=chosen, limit=limit, bootstrap_iters=0)
    except KeyError as error:
        raise ValueError(
            f"--tasks: the harness does not know {error}; see lm_eval ls tasks"
        ) from error
    assert results is not None
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, found in results["results"].items()
        for metric, value in found.items()
        if isinstance(value, (int, float)) and "_stderr" not in metric
    }
