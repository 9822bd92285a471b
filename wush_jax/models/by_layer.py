"""A decoder run one layer at a time: layers that are alike are compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

from wush_jax.models.llama import Llama

Parts = tuple[Any, Any]  # an NNX graph and its state


@dataclass(frozen=True)
class ByLayer:
    """A decoder in parts, each of them a program of its own.

    A whole model is compiled anew for every recipe and takes many seconds to compile; its layers
    are mostly alike, and what is around them is the same in every recipe.

    Attributes:
      frame: the model without its layers.
      layers: of the model, in order.
    """

    frame: Parts
    layers: Sequence[Parts]

    @classmethod
    def of(cls, model: Any) -> ByLayer | None:
        """Return the parts of a model; None for one that is not run layer after layer."""
        if not isinstance(model, Llama) or type(model).hidden is not Llama.hidden:
            return None
        frame = nnx.clone(model)  # variables of its own, the same arrays
        frame.layers = nnx.List([])
        return cls(nnx.split(frame), [nnx.split(layer) for layer in model.layers])

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Return what the head reads: (batch, length) integers to (batch, length, hidden)."""
        hidden = run_merged(Llama.embed, *self.frame, tokens)
        for layer in self.layers:
            hidden = run_merged(_call, *layer, hidden)
        return hidden


def _call(module: Callable, hidden: jax.Array) -> jax.Array:
    return module(hidden)


# The graph is no static argument: those are hashed, and configs in a model need not be hashable.
@partial(jax.jit, static_argnums=0)
def run_merged(function: Callable, graph: Any, state: Any, inputs: jax.Array) -> jax.Array:
    """Return a function of a split module and its inputs."""
    return function(nnx.merge(graph, state), inputs)
