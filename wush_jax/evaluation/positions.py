"""Values of every position of a text from the logits of some models, a few positions at a time.

Of a model that splits into ``hidden`` and ``head``, as `wush_jax.models.Llama` does, logits are
made for a few positions, used and let go: with a large vocabulary they take more memory than
everything else. Other models give those of a whole batch.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration.observe import Progress
from wush_jax.models.by_layer import ByLayer, run_merged
from wush_jax.models.tokens import check_batches_given, check_tokens, model_inputs, vocabulary

Model = Callable[[jax.Array], jax.Array]
Call = Callable[[Any, jax.Array], jax.Array]
# (batch, positions) values from each model's float32 logits there and the tokens that follow.
Measure = Callable[[list[jax.Array], jax.Array], tuple[jax.Array, ...]]

# Bytes of float32 logits at a time, those of all models together; what a measure makes of them
# may take half as much again.
LOGITS_BYTES = 2**29


# What functions of two models, or of one, call them.
NAMES = ("reference", "model")


class Reader:
    """A model in two parts: what it makes of tokens, and its head, which makes logits of that.

    The first gives hidden states of a model that splits so; otherwise logits, without a head.

    Args:
        model: a module, or a function of tokens.
        call: how to run it; None: ``model(tokens)``.
        remember: keep the hidden states of every batch, and give them again to the same tokens:
            a reference is run once, however many models are compared with it. Logits, which a
            large vocabulary makes large, are not kept.
    """

    def __init__(self, model: Model, call: Call | None = None, *, remember: bool = False):
        self.model = model
        self.head: tuple[Any, Any] = None, None
        splits = call is None and isinstance(model, nnx.Module) and hasattr(model, "hidden")
        self.memory: dict[Any, jax.Array] | None = {} if remember and splits else None
        parts = ByLayer.of(model) if splits else None
        if parts is not None:
            self.run, self.head = parts.hidden, parts.frame
        elif isinstance(model, nnx.Module):
            # Modules are split: as constants of a closure, their weights would be compiled in.
            graph, state = nnx.split(model)
            how = _hidden if splits else call or _plain_call
            self.run = partial(run_merged, how, graph, state)
            self.head = (graph, state) if splits else self.head
        else:
            # What a plain function closes over may change: never reuse its compilation.
            self.run = jax.jit(partial(call or _plain_call, model))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return hidden states, or logits, of (batch, length) tokens."""
        if self.memory is None:
            return self.run(tokens)
        key = tokens.shape, np.asarray(tokens).tobytes()
        if key not in self.memory:
            self.memory[key] = self.run(tokens)
        return self.memory[key]


def position_values(
    measure: Measure,
    models: list[Model | Reader],
    batches: Iterable[Any],
    call: Call | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Yield what a measure finds at every position, batch by batch.

    Args:
        measure: (logits of each model, following tokens) to arrays (batch, positions). What
            follows the last position of a row is 0, and its value the caller's to drop.
        models: modules, or functions of tokens, or a `Reader` of one.
        batches: integers (batch, length), or pairs of those and a mask of the positions that count.
        call: how to run a model; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Yields:
        Arrays (batch, length), and the mask (batch, length), true without one.

    Raises:
        ValueError: what is no token of the models, a mask of another shape, two vocabularies.
    """
    check_batches_given(batches)
    given: dict[str, Any] = dict(zip(NAMES[-len(models) :], models, strict=True))
    given = given if call is None else {"call": call}
    for name, value in (given if progress is None else given | {"progress": progress}).items():
        if not callable(value):
            raise ValueError(f"{name} is a {type(value).__name__}; give a module or a function")
    readers = [m if isinstance(m, Reader) else Reader(m, call) for m in models]
    graphs, states = zip(*(reader.head for reader in readers), strict=True)
    first = readers[0].model
    known = vocabulary(first)
    for index, batch in enumerate(model_inputs(first, batches)):
        named = f"batches[{index}]"
        tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
        tokens = check_tokens(tokens, known, name=named)
        mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
        if mask.shape != tokens.shape or mask.dtype != bool:
            raise ValueError(
                f"{named}: the mask is {mask.dtype} {mask.shape}, expected bool {tokens.shape}"
            )
        read = tuple(reader(tokens) for reader in readers)
        values, size = _compiled(measure, graphs, states, read, tokens)
        check_tokens(tokens, int(size), name=named)
        yield tuple(map(np.asarray, values)), mask
        if progress is not None:
            progress(index + 1, None, "evaluate")


def _plain_call(model: Model, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _hidden(model: Any, tokens: jax.Array) -> jax.Array:
    return model.hidden(tokens)


def _evaluate(
    measure: Measure,
    graphs: tuple[Any, ...],
    states: tuple[Any, ...],
    read: tuple[jax.Array, ...],
    tokens: jax.Array,
) -> tuple[tuple[jax.Array, ...], int]:
    """Return a measure's values at all positions, and the size of the vocabulary."""
    heads = [
        (lambda logits: logits) if graph is None else nnx.merge(graph, state).head
        for graph, state in zip(graphs, states, strict=True)
    ]
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    size = jax.eval_shape(heads[0], read[0][:, :1]).shape[-1]
    batch, length = tokens.shape
    count = min(length, max(1, LOGITS_BYTES // (4 * size * len(heads) * batch)))

    def part(inputs: Any) -> tuple[jax.Array, ...]:
        *states, targets = inputs
        logits = [head(x) for head, x in zip(heads, states, strict=True)]
        return _measured(measure, logits, targets)

    if count == length:
        return part((*read, following)), size
    values = jax.lax.map(part, tuple(_parts(x, count) for x in (*read, following)))
    return tuple(jnp.swapaxes(v, 0, 1).reshape(batch, -1)[:, :length] for v in values), size


def _measured(
    measure: Measure, logits: list[jax.Array], following: jax.Array
) -> tuple[jax.Array, ...]:
    sizes = [values.shape[-1] for values in logits]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the models have vocabularies of {sizes} tokens; compare models of one tokenizer"
        )
    return measure([values.astype(jnp.float32) for values in logits], following)


def _parts(x: jax.Array, count: int) -> jax.Array:
    """Cut (batch, length, ...) along its length: (parts, batch, count, ...), the last filled up."""
    missing = -x.shape[1] % count
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    return jnp.swapaxes(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 0, 1)


_compiled = jax.jit(_evaluate, static_argnums=0)
