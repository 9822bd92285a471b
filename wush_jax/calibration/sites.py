"""How the dense layers of a model are called: which share an input, and which axes are a stack.

The inputs of layers are tagged, and what was tagged is collected from the traced program: the model
computes what it computes, in whatever loops and branches. Layers that receive the identical array
share a *site*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.layers.calls import Call as LayerCall
from wush_jax.layers.contraction import Contraction
from wush_jax.layers.dense import (
    DENSE_TYPES,
    STACKED,
    DenseTypes,
    dense_layers,
    dotted,
)
from wush_jax.layers.interpreter import Interpreter
from wush_jax.layers.tagged_run import run_tagged

Call = Callable[[nnx.Module, Any], Any]


def plain_call(model: nnx.Module, batch: Any) -> Any:
    """Run a model the usual way: ``model(batch)``."""
    return model(batch)


@dataclass(frozen=True, order=True)  # ordered, so that a dictionary by site is a pytree
class Site:
    """An input shared by some layers.

    Attributes:
      layers: dotted paths, in the order in which the model calls them.
      size: channels K.
    """

    layers: tuple[str, ...]
    size: int

    @property
    def name(self) -> str:
        """The path of the first layer."""
        return self.layers[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked:
    """A calibration batch of which some tokens are padding.

    Attributes:
      inputs: what the model is called with, as a batch without a mask.
      mask: bool, of the leading axes of the layers' inputs, such as (batch, length): tokens that
        count for moments, samples and losses. The model sees all of them.

    >>> Masked({"tokens": jnp.zeros((2, 8), int)}, jnp.ones((2, 8), bool)).mask.shape
    (2, 8)
    """

    inputs: Any
    mask: jax.Array


def inputs_of(batch: Any) -> Any:
    """Return what a model is called with."""
    return batch.inputs if isinstance(batch, Masked) else batch


def counted(layer: str, batch: Any, rows: jax.Array) -> jax.Array | None:
    """Return which of a layer's rows (..., K) count: None for all.

    Raises:
      ValueError: a mask of other tokens than the layer's rows.
    """
    if not isinstance(batch, Masked):
        return None
    mask = jnp.asarray(batch.mask, bool)
    lead = rows.shape[:-1]
    if lead != mask.shape and lead != (mask.size,):
        raise ValueError(
            f"layer {layer}: its input has tokens {lead}, the mask is of {mask.shape}; exclude the "
            "layer by a rule, or calibrate without a mask"
        )
    return mask.reshape(lead)


def find_sites(
    model: nnx.Module,
    batch: Any,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> tuple[Site, ...]:
    """Find which dense layers receive the identical input, by an abstract run (nothing computed).

    Args:
      model: an NNX module.
      batch: one batch, or its shapes.
      call: how to run the model on a batch.
      dense_types: what counts as a dense layer.

    Returns:
      Sites in the order of their first call. Layers that the call does not reach are in none.

    >>> layer = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    >>> pair = nnx.List([layer, nnx.Linear(32, 8, rngs=nnx.Rngs(1))])
    >>> both = lambda model, x: (model[0](x), model[1](x))
    >>> [site.layers for site in find_sites(pair, jnp.ones((1, 32)), call=both)]
    [('0', '1')]
    """
    return observe_calls(model, batch, call=call, dense_types=dense_types).sites


@dataclass(frozen=True)
class Observed:
    """What an abstract run shows of a model's dense layers.

    Attributes:
      sites: which layers share an input, in the order of their first call.
      stacks: the axes of their kernels that a scan or a vmap takes away before the call, by path.
      faults: why other layers that are called cannot be observed, by path.
    """

    sites: tuple[Site, ...]
    stacks: Mapping[str, tuple[int, ...]]
    faults: Mapping[str, str]

    def marked(self, model: nnx.Module, dense_types: DenseTypes = DENSE_TYPES) -> nnx.Module:
        """Return the model that was observed as `stacked` does."""
        return _mark(model, self.stacks, dense_types)


def observe_calls(
    model: nnx.Module,
    batch: Any,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> Observed:
    """Run a model abstractly, and say how its dense layers are called; as `find_sites`."""
    graph, state = nnx.split(model)
    layers, _ = dense_layers(model, dense_types)
    inputs: dict[str, list[Any]] = {}
    stacks: dict[str, tuple[int, ...]] = {}
    faults: dict[str, str] = {}
    sizes: dict[str, int] = {}

    def note(call: LayerCall, seen: Any) -> Any:
        path, seen_as = call.tag.layer, call.tag.contraction
        fault = call.fault
        if not fault and seen_as is not None:
            own = layers[path].contraction
            if stacks.setdefault(path, call.stack) != call.stack:
                fault = "is called with and without a stack"
            elif call.stack == own.positions and seen_as.shape != own.shape:
                fault = f"is called with a part of its kernel, {seen_as.shape}"
        if fault or seen_as is None:
            faults.setdefault(path, fault)
        else:
            sizes[path] = seen_as.shape[1]
        inputs.setdefault(path, []).extend((call.x, *call.sizes))
        return seen

    def lost(path: str, reason: str) -> None:
        faults.setdefault(path, reason)

    interpreter = Interpreter(note, lost=lost)

    def trace(state: Any, batch: Any) -> Any:
        return run_tagged(nnx.merge(graph, state), inputs_of(batch), call, layers, interpreter, {})

    try:
        jax.eval_shape(trace, state, batch)
    except TypeError as error:
        raise ValueError(
            f"the model's call fails on a batch, one of batches: {error}; give what "
            "call(model, batch) takes"
        ) from error
    found: dict[Any, list[str]] = {}
    for path, seen in inputs.items():
        if path not in faults:
            # The tracers are still alive in `inputs`, so their ids are distinct.
            same = tuple(map(id, seen)), stacks[path], _reading(layers[path].contraction)
            found.setdefault(same, []).append(path)
    sites = tuple(Site(tuple(p), sizes[p[0]]) for p in found.values())
    return Observed(sites, stacks, faults)


def stacked(
    model: nnx.Module,
    batch: Any,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> nnx.Module:
    """Return a model whose layers know which axes of their kernels a scan takes away.

    Args:
      model: an NNX module.
      batch: one batch, or its shapes.
      call: how to run the model on a batch.
      dense_types: what counts as a dense layer.

    Returns:
      The model itself, where those are the first axes; else a copy that shares its arrays.
    """
    return observe_calls(model, batch, call=call, dense_types=dense_types).marked(
        model, dense_types
    )


def _mark(model: nnx.Module, stacks: Mapping[str, tuple[int, ...]], dense_types) -> nnx.Module:
    layers, _ = dense_layers(model, dense_types)
    new = {p: axes for p, axes in stacks.items() if axes != layers[p].contraction.positions}
    if not new:
        return model
    model = nnx.clone(model)
    for path, module in nnx.iter_modules(model):
        if dotted(path) in new:
            setattr(module, STACKED, new[dotted(path)])
    return model


def _reading(contraction: Contraction) -> Any:
    """What layers of the same input must have in common to have the same rows of it."""
    return contraction.reading, contraction.batch, contraction.shape[1]
