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
from jax.tree_util import Partial

from wush_jax.calibration.observe import Progress
from wush_jax.models.tokens import check_tokens, model_inputs, vocabulary

Model = Callable[[jax.Array], jax.Array]
Call = Callable[[Any, jax.Array], jax.Array]
# (batch, positions) values from each model's float32 logits there and the tokens that follow.
Measure = Callable[[list[jax.Array], jax.Array], tuple[jax.Array, ...]]

# Bytes of float32 logits at a time, those of all models together; what a measure makes of them
# may take half as much again.
LOGITS_BYTES = 2**29


def position_values(
    measure: Measure,
    models: list[Model],
    batches: Iterable[Any],
    call: Call | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Yield what a measure finds at every position, batch by batch.

    Args:
        measure: (logits of each model, following tokens) to arrays (batch, positions). What
            follows the last position of a row is 0, and its value the caller's to drop.
        models: modules, or functions of tokens.
        batches: integers (batch, length), or pairs of those and a mask of the positions that count.
        call: how to run a model; None: ``model(tokens)``.
        progress: called with the number of batches done, None and "evaluate".

    Yields:
        Arrays (batch, length), and the mask (batch, length), true without one.

    Raises:
        ValueError: what is no token of the models, a mask of another shape, two vocabularies.
    """
    # Modules are split: as constants of a closure, their weights would be compiled in.
    parts = [nnx.split(m) if isinstance(m, nnx.Module) else (Partial(m), None) for m in models]
    graphs, states = zip(*parts, strict=True)
    # What a plain function closes over may change between calls: never reuse its compilation.
    plain = not all(isinstance(graph, nnx.GraphDef) for graph in graphs)
    evaluate = (
        jax.jit(partial(_evaluate, measure, call or _plain_call, graphs))
        if plain
        else partial(_compiled, measure, call or _plain_call, graphs)
    )
    known = vocabulary(models[0])
    for index, batch in enumerate(model_inputs(models[0], batches)):
        named = f"batches[{index}]"
        tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
        tokens = check_tokens(tokens, known, name=named)
        mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
        if mask.shape != tokens.shape or mask.dtype != bool:
            raise ValueError(
                f"{named}: the mask is {mask.dtype} {mask.shape}, expected bool {tokens.shape}"
            )
        values, size = evaluate(states, tokens)
        check_tokens(tokens, int(size), name=named)
        yield tuple(map(np.asarray, values)), mask
        if progress is not None:
            progress(index + 1, None, "evaluate")


def _plain_call(model: Model, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _evaluate(
    measure: Measure,
    call: Call,
    graphs: tuple[Any, ...],
    states: tuple[Any, ...],
    tokens: jax.Array,
) -> tuple[tuple[jax.Array, ...], int]:
    """Return a measure's values at all positions, and the size of the vocabulary."""
    models = [
        nnx.merge(g, s) if isinstance(g, nnx.GraphDef) else g
        for g, s in zip(graphs, states, strict=True)
    ]
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    if not (call is _plain_call and all(hasattr(m, "hidden") for m in models)):
        logits = [call(model, tokens) for model in models]
        return _measured(measure, logits, following), logits[0].shape[-1]
    hidden = [model.hidden(tokens) for model in models]
    size = jax.eval_shape(models[0].head, hidden[0][:, :1]).shape[-1]
    batch, length = tokens.shape
    count = min(length, max(1, LOGITS_BYTES // (4 * size * len(models) * batch)))

    def part(inputs: Any) -> tuple[jax.Array, ...]:
        *states, targets = inputs
        logits = [model.head(x) for model, x in zip(models, states, strict=True)]
        return _measured(measure, logits, targets)

    if count == length:
        return part((*hidden, following)), size
    values = jax.lax.map(part, tuple(_parts(x, count) for x in (*hidden, following)))
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


# Graphs are no static arguments: those are hashed, and configs in a model need not be hashable.
_compiled = jax.jit(_evaluate, static_argnums=(0, 1))
