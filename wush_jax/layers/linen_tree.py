"""The tree of a linen model's parameters as NNX modules, dense layers in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from wush_jax.layers.dense import Dense, is_array, view_of
from wush_jax.layers.linen_views import View

PARAMS, STANDIN = "params", "nnx_standin"


class LinenState(nnx.Variable):
    """An array of a linen model's collections beside its params."""


@dataclass(frozen=True, eq=False)
class Held:
    """Something static, equal to itself alone: linen modules need not be hashable."""

    value: Any


class LinenScope(nnx.Module):
    """The parameters of one linen module, and the scopes of its submodules, as attributes.

    Attributes:
      kind: name of the linen module's class.
    """

    def __init__(self, kind: str):
        self.kind = kind
        # Layers whose parameters are this scope's own (`nn.share_scope`), with their linen names.
        self.sharing: tuple[tuple[str, str], ...] = ()

    def assemble(self) -> dict[str, Any]:
        """Return the params collection; what stands in a layer's place is split into its place."""
        params: dict[str, Any] = {}
        sharing = dict(self.sharing)
        for name, value in vars(self).items():
            if isinstance(value, nnx.Param):
                params[name] = value.get_value()
            elif isinstance(value, LinenScope):
                params[name] = value.assemble()
            elif type(value) is LinenDense:
                own = values(value.params)
                params |= own if name in sharing else {name: own}
            elif isinstance(value, nnx.Module):
                split = nnx.split(value)
                params |= (
                    {STANDIN + sharing[name]: split}
                    if name in sharing
                    else {name: {STANDIN: split}}
                )
        return params


class LinenDense(nnx.Module):
    """A dense linen layer with its parameters: what `QuantizedDense` replaces.

    Args:
      module: the layer, unbound.
      view: how to see it as a dense layer.
      arguments: of its call, the input as a shape; several where calls differ.
      params: its parameters; stacked under a scan.
    """

    def __init__(self, module: nn.Module, view: View, arguments: tuple[tuple, ...], params: Any):
        self.linen = Held(module)
        self.view = view
        self.arguments = Held(arguments)  # shapes, which are no arrays of the model's
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def dense_view(self) -> Dense:
        """Return the layer as quantization sees it.

        Raises:
          ValueError: calls that differ in more than the input, or have not one input.
        """
        kinds = {tuple(None if is_array(a) else a for a in call) for call in self.arguments.value}
        if len(kinds) > 1:
            raise ValueError(f"it is called in different ways: {sorted(map(str, kinds))}")
        if sum(map(is_array, self.arguments.value[0])) != 1:
            raise ValueError(f"its call does not have one input: {self.arguments.value[0]}")
        return self.view(self.linen.value, self.params, *self.arguments.value[0])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the linen layer."""
        arguments = [x if is_array(a) else a for a in self.arguments.value[0]]
        return self.linen.value.apply({PARAMS: values(self.params)}, *arguments)


class _Fresh:
    """A node without leaves, equal to itself alone: no trace with it was made before.

    `nn.jit` would answer from its cache, and no layer inside of it would be seen.
    """


jax.tree_util.register_pytree_node(_Fresh, lambda node: ((), node), lambda node, _: node)


def _fresh(params: Mapping[str, Any], node: _Fresh) -> dict[str, Any]:
    """Return a params collection with a node in every scope."""
    inner = {k: _fresh(v, node) if isinstance(v, Mapping) else v for k, v in params.items()}
    return inner | {f"{STANDIN}_trace": node}


# They call a layer with parameters that they compute of its own.
NORMS = (nn.WeightNorm, nn.SpectralNorm)


@dataclass(frozen=True)
class _Normed:
    """What stands for a module whose parameters are computed where it is called."""

    name: str | None
    kind: str


def kind_of(module: Any) -> str:
    """Return the name by which a report tells what a module is."""
    return module.kind if isinstance(module, _Normed) else type(module).__name__


def calls(module: nn.Module, variables, arguments, keywords) -> dict[tuple, list]:
    """Return, by path, the modules that a call reaches, unbound, and the arguments of each call."""
    found: dict[tuple, list] = {}
    norms: list[str] = []

    def note(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*arguments, **keywords)
        module = context.module
        seen = _Normed(module.name, f"{kind_of(module)} in {norms[-1]}") if norms else module
        shapes = [
            jax.ShapeDtypeStruct(a.shape, a.dtype) if is_array(a) else a
            for a in (*arguments, *keywords.values())
        ]
        found.setdefault(module.path, []).append((seen, tuple(shapes)))
        norms.extend([kind_of(module)] if isinstance(module, NORMS) else norms[-1:])
        out = call(*arguments, **keywords)
        del norms[-1:]
        return out

    arrays, rebuild = shown((arguments, keywords))

    def trace(variables, arrays):
        arguments, keywords = rebuild(arrays)
        variables = {**variables, PARAMS: _fresh(variables[PARAMS], _Fresh())}
        with nn.intercept_methods(note):
            return module.apply(variables, *arguments, **keywords)

    jax.eval_shape(trace, variables, arrays)
    return found


def shown(arguments: Any) -> tuple[list, Callable]:
    """Return the arrays among a call's arguments, and how to put arrays in their places."""
    leaves, tree = jax.tree.flatten(arguments)

    def rebuild(arrays: list) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(tree, [next(given) if is_array(a) else a for a in leaves])

    return [leaf for leaf in leaves if is_array(leaf)], rebuild


def fill(scope: LinenScope, params: Mapping[str, Any], path: tuple, calls, views) -> None:
    """Give a scope its parameters, its submodules and its dense layers."""
    for name, value in params.items():
        here = (*path, name)
        noted = calls.get(here, [])
        module, _ = next((n for n in noted if n[0].name == name), (noted or [(None, ())])[0])
        if not isinstance(value, Mapping):
            setattr(scope, name, nnx.Param(value))
        elif view_for(module, views) is not None:
            setattr(scope, name, _layer(noted, module, value, views))
        else:
            child = LinenScope("scope" if module is None else kind_of(module))
            setattr(scope, name, child)
            fill(child, value, here, calls, views)
            share(child, value, noted, name, views)


def view_for(module: nn.Module | None, views: Mapping[type, View]) -> Any:
    """Return how to see a linen module as a dense layer; None where it is none."""
    try:
        return view_of(type(module), tuple(views.items()))
    except ValueError:
        return None


def _layer(noted: list, module: nn.Module, params: Any, views: Mapping) -> LinenDense:
    """Return a dense layer with the arguments of all its calls."""
    calls = tuple(dict.fromkeys(shapes for m, shapes in noted if m.name == module.name))
    return LinenDense(module.clone(parent=None, name=None), view_for(module, views), calls, params)


class _Reads(dict):
    """Parameters that remember which of them were asked for."""

    def __init__(self, params: Mapping[str, Any]):
        super().__init__({k: nnx.Param(v) for k, v in params.items()})
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> nnx.Param:
        self.names[name] = None
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.keys() else default


def share(scope: LinenScope, params: Mapping[str, Any], noted, name, views) -> None:
    """Make layers of the parameters that dense modules have in a scope of another one."""
    guests = {module.name: module for module, _ in noted if view_for(module, views) is not None}
    guests.pop(name, None)
    for guest, module in guests.items():
        reads = _Reads({k: v for k, v in params.items() if not isinstance(v, Mapping)})
        arguments = next(shapes for m, shapes in noted if m.name == guest)
        try:
            view_for(module, views)(module, reads, *arguments)
        except ValueError:
            continue  # its parameters stay the scope's own, and are listed with it
        kernel, *others = reads.names
        for other in others:
            delattr(scope, other)
        own = {name: params[name] for name in reads.names}
        setattr(scope, kernel, _layer(noted, module, own, views))
        scope.sharing = (*scope.sharing, (kernel, guest))


def values(params: Any) -> Any:
    """Return a tree of variables as a tree of arrays."""
    return jax.tree.map(
        lambda v: v.get_value(), params, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
