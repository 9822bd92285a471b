"""Flax Linen models, seen as NNX: the same plan, calibration, swap and report as everything else.

A linen module builds its layers while it is called, so there is nothing to swap beforehand. What
does exist beforehand is the tree of parameters. `LinenModel` makes that tree a tree of NNX modules
(dense layers become `LinenDense`), which is planned, calibrated and swapped like any other; its
call runs the linen module with ``nn.intercept_methods``, Flax's own public hook, and lets whatever
stands in a layer's place in the tree answer that layer's call. Nothing is patched, and outside
that call nothing is intercepted. The alternatives cover less: ``dot_general_cls`` is an attribute
of Dense and DenseGeneral alone, and every model has to pass it on; rewriting modules is the user's
work. The state of what stands in travels in the layer's place in the ``params`` collection, which
every model with dense layers carries through its `nn.scan`, `nn.remat`, `nn.vmap`: so layers
stacked for a scan are a batch of kernels here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.dense import Dense, general_equation, is_array

# From (linen module, its parameters as NNX variables, the arguments of its call, the input as a
# shape) to the layer's `Dense` view; ValueError for what it cannot express.
View = Callable[..., Dense]
LinenTypes = tuple[tuple[type[nn.Module], View], ...]

PARAMS, STANDIN = "params", "nnx_standin"


def _dense(module: nn.Dense, params: Mapping[str, nnx.Variable], x: Any) -> Dense:
    kernel = params["kernel"].get_value()
    contraction = Contraction("...k,kn->...n", kernel.shape)
    return Dense(contraction, kernel, params.get("bias"), module.dtype)


def _dense_general(module: nn.DenseGeneral, params: Mapping[str, nnx.Variable], x: Any) -> Dense:
    kernel = params["kernel"].get_value()
    axis, batch, features = map(_tuple, (module.axis, module.batch_dims, module.features))
    equation = general_equation(
        [a if a < 0 else a - x.ndim for a in axis], [a % x.ndim for a in batch], len(features)
    )
    return Dense(Contraction(equation, kernel.shape), kernel, params.get("bias"), module.dtype)


def _einsum(
    module: nn.Einsum, params: Mapping[str, nnx.Variable], x: Any, einsum_str: str | None = None
) -> Dense:
    kernel = params["kernel"].get_value()
    contraction = Contraction(module.einsum_str or einsum_str or "", kernel.shape)
    return Dense(contraction, kernel, params.get("bias"), module.dtype)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


# Which linen layers are dense. To add one of yours, pass ``(*LINEN_TYPES, (MyDense, view))``; see
# `View`. An equation or the like among the arguments of the call reaches the view as it is.
LINEN_TYPES: LinenTypes = (
    (nn.Dense, _dense),
    (nn.DenseGeneral, _dense_general),
    (nn.Einsum, _einsum),
)


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

    def assemble(self) -> dict[str, Any]:
        """Return the params collection; what stands in a layer's place is split into its place."""
        params: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, nnx.Param):
                params[name] = value.get_value()
            elif isinstance(value, LinenScope):
                params[name] = value.assemble()
            elif type(value) is LinenDense:
                params[name] = _values(value.params)
            elif isinstance(value, nnx.Module):
                params[name] = {STANDIN: nnx.split(value)}
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
        self.arguments = arguments
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def dense_view(self) -> Dense:
        """Return the layer as quantization sees it.

        Raises:
          ValueError: calls that differ in more than the input, or have not one input.
        """
        kinds = {tuple(None if is_array(a) else a for a in call) for call in self.arguments}
        if len(kinds) > 1:
            raise ValueError(f"it is called in different ways: {sorted(map(str, kinds))}")
        if sum(map(is_array, self.arguments[0])) != 1:
            raise ValueError(f"its call does not have one input: {self.arguments[0]}")
        return self.view(self.linen.value, self.params, *self.arguments[0])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the linen layer."""
        arguments = [x if is_array(a) else a for a in self.arguments[0]]
        return self.linen.value.apply({PARAMS: _values(self.params)}, *arguments)


class LinenModel(LinenScope):
    """A linen module with its variables as an NNX module.

    Calls are ``module.apply(variables, ...)``. Dense layers are submodules at their linen paths.

    Args:
      module: the linen module.
      variables: as `init` returned them, or shapes; at least ``{"params": ...}``. Boxes of
        partitioning metadata are taken off.
      arguments: of a call, arrays or shapes; only their shapes matter.
      types: what counts as a dense layer.
      keywords: of the call, such as ``train=False``.

    Raises:
      ValueError: no params.

    >>> import jax.numpy as jnp
    >>> from wush_jax import Recipe, quantize_model
    >>> module = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32)])
    >>> x = jax.random.normal(jax.random.key(0), (16, 32))
    >>> model = LinenModel(module, module.init(jax.random.key(1), x), x)
    >>> quantized, report = quantize_model(model, [x], Recipe(solver="rtn"))
    >>> [layer.path for layer in report.layers], quantized(x).shape
    (['layers_0', 'layers_2'], (16, 32))
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Mapping[str, Any],
        *arguments: Any,
        types: LinenTypes = LINEN_TYPES,
        **keywords: Any,
    ):
        super().__init__(type(module).__name__)
        variables = nn.unbox(variables)
        if not variables.get(PARAMS):
            raise ValueError(f"variables has {list(variables)}; it must hold {PARAMS!r}")
        self.linen = Held(module)
        others = {name: value for name, value in variables.items() if name != PARAMS}
        self.collections = nnx.data(jax.tree.map(LinenState, others))
        calls = _calls(module, variables, arguments, keywords)
        _fill(self, variables[PARAMS], (), calls, dict(types))

    def __call__(self, *arguments: Any, mutable: Any = False, **keywords: Any) -> Any:
        """Apply the linen module.

        Args:
          arguments: as the module's own.
          mutable: collections beside params that may change; they are returned as `apply` does.
          keywords: ``rngs`` and ``method`` as `apply` takes them, and the module's own.

        Returns:
          The output; with ``mutable`` the output and the changed collections.
        """
        variables = {PARAMS: self.assemble(), **_values(self.collections)}
        with nn.intercept_methods(_answer):
            return self.linen.value.apply(variables, *arguments, mutable=mutable, **keywords)


def _answer(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
    """Let what stands in a layer's place answer its call."""
    module = context.module
    if context.method_name != "__call__" or not module.has_variable(PARAMS, STANDIN):
        return call(*arguments, **keywords)
    standin = nnx.merge(*module.get_variable(PARAMS, STANDIN))
    [x] = [a for a in (*arguments, *keywords.values()) if is_array(a)]
    return standin(x)


def _calls(module: nn.Module, variables, arguments, keywords) -> dict[tuple, list]:
    """Return, by path, the modules that a call reaches, unbound, and the arguments of each call."""
    calls: dict[tuple, list] = {}

    def note(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        if context.method_name == "__call__":
            shapes = [
                jax.ShapeDtypeStruct(a.shape, a.dtype) if is_array(a) else a
                for a in (*arguments, *keywords.values())
            ]
            module = context.module
            calls.setdefault(module.path, []).append((module, tuple(shapes)))
        return call(*arguments, **keywords)

    leaves, tree = jax.tree.flatten((arguments, keywords))
    shown = [leaf for leaf in leaves if is_array(leaf)]

    def trace(variables, shown):
        given = iter(shown)
        call = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        arguments, keywords = jax.tree.unflatten(tree, call)
        with nn.intercept_methods(note):
            return module.apply(variables, *arguments, **keywords)

    jax.eval_shape(trace, variables, shown)
    return calls


def _fill(scope: LinenScope, params: Mapping[str, Any], path: tuple, calls, views) -> None:
    """Give a scope its parameters, its submodules and its dense layers."""
    for name, value in params.items():
        here = (*path, name)
        module, _ = calls.get(here, [(None, ())])[0]
        if not isinstance(value, Mapping):
            setattr(scope, name, nnx.Param(value))
        elif type(module) in views:
            arguments = tuple(dict.fromkeys(shapes for _, shapes in calls[here]))
            unbound = module.clone(parent=None, name=None)
            setattr(scope, name, LinenDense(unbound, views[type(module)], arguments, value))
        else:
            child = LinenScope("scope" if module is None else type(module).__name__)
            setattr(scope, name, child)
            _fill(child, value, here, calls, views)


def _values(params: Any) -> Any:
    return jax.tree.map(
        lambda v: v.get_value(), params, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
