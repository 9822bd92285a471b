"""Runs a model with tagged layers, and shows their calls to an interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from wush_jax.layers.dense import Dense, is_array
from wush_jax.layers.interpreter import Interpreter, Value
from wush_jax.layers.origins import Origin
from wush_jax.layers.tagging import tag_layers


@dataclass(frozen=True, eq=False)
class TaggedProgram:
    """A traced model and what it is called with.

    Called with an interpreter, and with what is seen before the first call, it returns what was
    seen of the calls, as `run_tagged`.

    Attributes:
      program: its jaxpr.
      values: parameters and inputs.
    """

    program: Any
    values: Sequence[Value]

    def __call__(self, interpreter: Interpreter, seen: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was seen of the calls."""
        return self.run(interpreter, seen)[1]

    def run(
        self, interpreter: Interpreter, seen: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arrays that the model returns, and what was seen of the calls."""
        out, found = interpreter.run(self.program, self.values, dict(seen))
        return [value.array for value in out], found


def run_tagged(
    model: nnx.Module,
    batch: Any,
    call: Callable[[nnx.Module, Any], Any],
    layers: Mapping[str, Dense],
    interpreter: Interpreter,
    seen: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a model and return, by layer path, what was seen of its calls.

    Args:
      model: an NNX module; it is left as it is.
      batch: passed to the call.
      call: how to run the model.
      layers: what to observe, by path.
      interpreter: what to do with each call.
      seen: what is seen before the first call.
    """
    return tagged_program(model, batch, call, layers)(interpreter, seen)


def tagged_program(
    model: nnx.Module,
    batch: Any,
    call: Callable[[nnx.Module, Any], Any],
    layers: Mapping[str, Dense],
    *,
    outputs: bool = False,
) -> TaggedProgram:
    """Trace a model once, to be shown to any number of interpreters.

    Args:
      model: an NNX module; it is left as it is.
      batch: passed to the call.
      call: how to run the model.
      layers: what to observe, by path.
      outputs: whether outputs are tagged, too.
    """
    views = {path: layer.view for path, layer in layers.items()}
    graph, state = nnx.split(tag_layers(model, views, outputs=outputs))

    def run(state: Any, batch: Any) -> list[Any]:
        out = call(nnx.merge(graph, state), batch)
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]

    program = jax.make_jaxpr(run)(state, batch)
    leaves, given = jax.tree.leaves(state), jax.tree.leaves(batch)
    values = [
        Value(leaf, Origin(i, tuple(range(leaf.ndim))) if hasattr(leaf, "ndim") else None)
        for i, leaf in enumerate(leaves)
    ]

    return TaggedProgram(program, [*values, *map(Value, given)])
