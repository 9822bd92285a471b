"""Weights that a module multiplies by itself, without a dense layer, made into dense layers.

Mixtures of experts hold their weights as parameters and call `jax.lax.ragged_dot`, an einsum over
experts, or a loop. `expose_matrices` finds these products in the traced program and puts a
`BareWeight` in the place of each parameter. The module's own code runs as it is written: its
program is traced at each call, and the products in question are evaluated by what stands there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.dense import DENSE_TYPES, Dense, DenseTypes, dense_layers, dotted, is_array
from wush_jax.layers.interpreter import Seen, Value
from wush_jax.layers.origins import Origin
from wush_jax.layers.products import Multiply, Product, Products, Use
from wush_jax.layers.tagged_run import tagged_program


class BareWeight(nnx.Module):
    """A parameter that a module multiplies by itself, as a dense layer.

    Args:
      parameter: the weight; it stays the module's own.
      product: what it is used for.
    """

    def __init__(self, parameter: nnx.Param, product: Product):
        self.kernel, self.product = parameter, product

    def dense_view(self) -> Dense:
        """Return what quantization sees."""
        kernel, product = self.kernel.get_value(), self.product
        contraction = Contraction(product.equation, kernel.shape, ragged=product.ragged)
        return Dense(contraction, kernel, None, product.dtype)

    def __call__(self, x: jax.Array, *group_sizes: jax.Array) -> jax.Array:
        """Return the input: the product is left to the program, bit for bit."""
        return x


def _unseen(call: Any, seen: Seen) -> Seen:
    return seen


def _run(
    module: nnx.Module,
    kind: type,
    weights: Mapping[str, jax.Array],
    multiply: Multiply,
    given: tuple[tuple, dict],
) -> Any:
    """Call a module as its own type does, with weights for some of its parameters.

    Args:
      module: the module.
      kind: its own type.
      weights: arrays by attribute.
      multiply: as of `Products`.
      given: the call's arguments and keywords.
    """
    bare = nnx.clone(module)
    for name in (*weights, "exposed"):
        delattr(bare, name)
    bare.__class__ = kind
    graph, state = nnx.split(bare)
    arrays, rebuild = _apart(given)
    results: list[Callable] = []

    def program(weights: dict, state: Any, arrays: list) -> Any:
        module = nnx.merge(graph, state)
        for name, weight in weights.items():
            setattr(module, name, nnx.data(nnx.Param(weight)))
        arguments, keywords = rebuild(arrays)
        out, back = _apart(kind.__call__(module, *arguments, **keywords))
        results.append(back)
        for name in weights:
            delattr(module, name)
        return out, nnx.state(module)

    everything = (dict(weights), state, arrays)
    traced, shape = jax.make_jaxpr(program, return_shape=True)(*everything)
    values = list(map(Value, jax.tree.leaves(everything)))
    for i, name in enumerate(sorted(weights)):  # the order of a dictionary's leaves
        values[i] = Value(weights[name], Origin(i, tuple(range(weights[name].ndim))))
    found, _ = Products(_unseen, multiply=multiply).run(traced, values, {})
    out, after = jax.tree.unflatten(jax.tree.structure(shape), [v.array for v in found])
    _update(module, state, after)
    return results[0](out)


def _apart(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """Return the arrays of a tree, and what puts others into their places."""
    leaves, form = jax.tree.flatten(tree)
    others = [(is_array(leaf), None if is_array(leaf) else leaf) for leaf in leaves]

    def rebuild(arrays: list) -> Any:
        arrived = iter(arrays)
        return jax.tree.unflatten(form, [next(arrived) if own else leaf for own, leaf in others])

    return [leaf for leaf in leaves if is_array(leaf)], rebuild


def _update(module: nnx.Module, before: Any, after: Any) -> None:
    """Give a module the state that its call left, where the call changed any."""
    old, new = dict(nnx.to_flat_state(before)), dict(nnx.to_flat_state(after))
    changed = {
        path: value
        for path, value in new.items()
        if path not in old or value.get_value() is not old[path].get_value()
    }
    if changed:
        nnx.update(module, nnx.from_flat_state(list(changed.items())))


@dataclass(frozen=True)
class Exposed:
    """How a module with exposed weights runs.

    Attributes:
      kind: its own type.
      names: the attributes that were parameters, sorted.
    """

    kind: type
    names: tuple[str, ...]

    def __call__(self, module: nnx.Module, arguments: tuple, keywords: dict) -> Any:
        """Call the module."""
        layers = [getattr(module, name) for name in self.names]

        def multiply(use: Use, values: list[Value]) -> Any:
            layer, x = layers[use.leaf], values[1 - use.place].array
            if use.taken:
                graph, state = nnx.split(layer)
                layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[use.taken[0]], state))
            sizes = [values[2].array] if use.product.ragged else []
            y = layer(use.input(x), *sizes)
            return None if isinstance(layer, BareWeight) else use.output(y)

        weights = {name: layer.kernel[...] for name, layer in zip(self.names, layers, strict=True)}
        return _run(module, self.kind, weights, multiply, (arguments, keywords))


@dataclass(frozen=True, eq=False)
class _Finder:
    """Notes what a module's parameters are used for.

    Attributes:
      kind: the module's own type.
      names: of its parameters, sorted.
      found: by name, the products; filled by calls.
    """

    kind: type
    names: tuple[str, ...]
    found: dict[str, set[Product]] = field(default_factory=dict)

    def __call__(self, module: nnx.Module, arguments: tuple, keywords: dict) -> Any:
        """Call the module."""

        def note(use: Use, values: list[Value]) -> None:
            self.found.setdefault(self.names[use.leaf], set()).add(use.product)

        weights = {name: getattr(module, name)[...] for name in self.names}
        return _run(module, self.kind, weights, note, (arguments, keywords))


@functools.cache
def _exposing(kind: type) -> type:
    """Return a subclass of a module type that runs as its attribute ``exposed`` says."""

    def call(self, *arguments, **keywords):
        return self.exposed(self, arguments, keywords)

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def expose_matrices(
    model: nnx.Module,
    batch: Any,
    *,
    call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
    dense_types: DenseTypes = DENSE_TYPES,
) -> nnx.Module:
    """Return an equal model in which weights without a dense layer are dense layers.

    Found are parameters that a module's ``__call__`` multiplies by: ``x @ w``, an einsum over
    experts, `jax.lax.ragged_dot`, and a loop over the first axis. Each becomes a `BareWeight` of
    the same name, which `wush_jax.quantize_model` and the other functions take as any layer; the
    module's code is not changed, and the model computes what it did, bit for bit. Parameters with
    more than one kind of use stay as they are. To load a quantized model, expose the plain one
    likewise.

    Args:
      model: any NNX module; it is left as it is, and shares its arrays.
      batch: an input of the model, of which shapes count.
      call: how to run the model on it.
      dense_types: what counts as a dense layer already.

    Returns:
      The model; arrays are not copied.

    >>> import jax.numpy as jnp
    >>> class Experts(nnx.Module):
    ...     def __init__(self):
    ...         self.w = nnx.Param(jnp.ones((3, 4, 5)))
    ...     def __call__(self, x):
    ...         return jax.lax.ragged_dot(x, self.w[...], jnp.array([1, 2, 0]))
    >>> model = expose_matrices(Experts(), jnp.ones((3, 4)))
    >>> list(dense_layers(model)[0]), model(jnp.ones((3, 4))).shape
    (['w'], (3, 5))
    """
    found = _find(model, batch, call, dense_types)
    model = nnx.clone(model)
    for path, module in list(nnx.iter_modules(model)):
        uses = {n: p for n, p in found.get(dotted(path), {}).items() if len(p) == 1}
        if not uses:
            continue
        for name, (product,) in uses.items():
            setattr(module, name, nnx.data(BareWeight(getattr(module, name), product)))
        setattr(module, "exposed", Exposed(type(module), tuple(sorted(uses))))  # noqa: B010
        module.__class__ = _exposing(type(module))
    return model


def _find(model: nnx.Module, batch: Any, call: Callable, dense_types: DenseTypes) -> dict:
    """Return by module path and attribute what the products are, from a trace of the model."""
    layers, _ = dense_layers(model, dense_types)
    model, found = nnx.clone(model), {}
    for path, module in nnx.iter_modules(model):
        names = tuple(sorted(n for n, v in vars(module).items() if _is_matrix(v)))
        dense = any(dotted(path[:i]) in layers for i in range(len(path) + 1))
        if names and not dense:
            finder = _Finder(type(module), names)
            found[dotted(path)] = finder.found
            setattr(module, "exposed", finder)  # noqa: B010
            module.__class__ = _exposing(type(module))
    if found:
        tagged_program(model, batch, call, {})  # traced, with nothing to tag
    return found


def _is_matrix(value: Any) -> bool:
    if not isinstance(value, nnx.Param) or not is_array(value.get_value()):
        return False
    return len(value.shape) > 1
