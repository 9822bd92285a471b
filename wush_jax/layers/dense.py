"""Flax NNX: dense layers seen as ``y = x W^T``, and what of a model is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.nnx_views import NNX_TYPES
from wush_jax.layers.view import Dense as Dense
from wush_jax.layers.view import DenseTypes as DenseTypes
from wush_jax.layers.zoos import TUNIX_TYPES

# Which layers are dense. To add one of yours, give it a method ``dense_view()`` or, if you cannot
# change it, pass ``(*DENSE_TYPES, (MyDense, view))``: each returns the layer's `Dense` view, or
# raises ValueError for what it cannot express. A tuple, since it has to be hashable: compiled
# functions are cached by it. Subclasses count where they leave ``__call__`` as it is.
DENSE_TYPES: DenseTypes = (*NNX_TYPES, *TUNIX_TYPES)

# The attribute of a layer that says which axes of its kernel a scan takes away, where they are not
# the first ones. A call shows it (`wush_jax.calibration.observe.stacked`).
STACKED = "stack_axes"


def view_of(kind: type, dense_types: DenseTypes = DENSE_TYPES) -> Callable[[Any], Dense] | None:
    """Return how to see modules of a type as dense layers; None where they are none.

    Raises:
      ValueError: a subclass of a dense type with a call of its own.
    """
    own = getattr(kind, "dense_view", None)
    view = _listed(kind, dense_types) or own
    if view is not None:
        return view
    for base in kind.__mro__[1:]:
        view = _listed(base, dense_types)
        if view is not None:
            if kind.__call__ is not base.__call__:
                raise ValueError(
                    f"{kind.__name__} overrides __call__ of {base.__name__}; pass a view of it in "
                    "dense_types"
                )
            return view
    return None


def _listed(kind: type, dense_types: DenseTypes) -> Callable[[Any], Dense] | None:
    """Return the view of exactly this type: by itself, or else by its name."""
    views = dict(dense_types)
    if kind in views:
        return views[kind]
    name = f"{kind.__module__}.{kind.__qualname__}"
    names = (key for key in views if isinstance(key, str) and fnmatchcase(name, key))
    return next((views[key] for key in names), None)


def dense_view(module: nnx.Module, dense_types: DenseTypes = DENSE_TYPES) -> Dense | None:
    """Return a module's view as a dense layer, or None where its type is no dense layer's.

    Raises:
      ValueError: a dense type in a form that cannot be quantized.
    """
    view = view_of(type(module), dense_types)
    if view is None:
        return None
    dense = view(module)
    # The twin stands in for the layer also where a model reads, say, its number of features or the
    # shape of its kernel.
    static, kernel_name = {}, ""
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param) and is_array(value.get_value()):
            if value.shape == dense.kernel.shape:
                kernel_name = name
            else:
                static[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        elif (
            name != STACKED
            and not name.startswith("_")
            and not nnx.is_data(value)
            and not nnx.has_data(value)
        ):
            static[name] = value
    contraction = dense.contraction
    if STACKED in vars(module):
        contraction = replace(contraction, stack_axes=getattr(module, STACKED))
    return replace(
        dense, contraction=contraction, attributes=static, kernel_name=kernel_name, view=view
    )


def dense_layers(
    model: nnx.Module, dense_types: DenseTypes = DENSE_TYPES
) -> tuple[dict[str, Dense], dict[str, str]]:
    """Return the dense layers of a model by dotted path, and why others cannot be quantized.

    Args:
      model: any NNX module.
      dense_types: module types and how to see them as dense layers.

    Returns:
      Layers by path, and reasons by path for layers of a dense type that have another form, and
      for modules of no dense type that hold matrices.

    >>> layers, skipped = dense_layers(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]))
    >>> {path: layer.contraction.shape for path, layer in layers.items()}
    {'0': (3, 2)}
    """
    layers, skipped = {}, {}
    inner: set[int] = set()
    modules = list(nnx.iter_modules(model))
    # From the outside in, so that a layer that wraps another one comes first.
    for path, module in sorted(modules, key=lambda item: len(item[0])):
        if id(module) in inner:
            continue
        try:
            dense = dense_view(module, dense_types)
        except ValueError as error:
            skipped[dotted(path)] = str(error)
            continue
        if dense is not None:
            layers[dotted(path)] = dense
            inner |= {id(m) for _, m in nnx.iter_modules(module)}
        elif matrices := _matrices(module):
            kind = getattr(module, "kind", type(module).__name__)
            skipped[dotted(path)] = f"{kind} is no registered dense layer; it holds {matrices}"
    skipped |= _bare(model, {*layers, *skipped})
    order = [dotted(path) for path, _ in modules]
    return {path: layers[path] for path in order if path in layers}, skipped


def _bare(model: nnx.Module, known: set[str]) -> dict[str, str]:
    """Reasons by path for matrices in no module that is accounted for, such as in plain dicts."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        holders = {dotted(path[:i]) for i in range(1, len(path))}
        value = variable.get_value()
        if is_array(value) and len(value.shape) > 1 and "" not in known and not holders & known:
            found[dotted(path)] = f"a parameter {value.shape} that no registered dense layer holds"
    return found


def _matrices(module: nnx.Module) -> str:
    """Name the parameters of two axes or more that a module holds by itself."""
    own = [(n, v) for n, v in vars(module).items() if isinstance(v, nnx.Param)]
    return ", ".join(f"{n} {v.shape}" for n, v in own if is_array(v.get_value()) and v.ndim > 1)


def is_array(value: Any) -> bool:
    """Whether a value has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_node(value: Any) -> bool:
    """Whether a value is a leaf to trees of containers: a variable, or a module."""
    return isinstance(value, (nnx.Variable, nnx.Pytree))


def dotted(path: tuple) -> str:
    """Return a module path as text, unlike that of any other path: names with dots are quoted.

    >>> dotted(("layers", 0, "q_proj")), dotted(("d", "a.b")), dotted(("d", "a", "b"))
    ('layers.0.q_proj', "d.'a.b'", 'd.a.b')
    """
    return ".".join(repr(p) if isinstance(p, str) and {".", "'"} & set(p) else str(p) for p in path)


def is_sharding(value: Any) -> bool:
    """Whether a value says how an array lies on a mesh."""
    return isinstance(value, (jax.sharding.Sharding, jax.sharding.PartitionSpec))


def same_call(contraction: Contraction, arguments: Iterable[Any]) -> bool:
    """Whether arguments beside the input leave a layer's product as its view says.

    Nothing, a sharding of the output and the layer's own equation do.
    """
    own = contraction.equation.replace(" ", "")
    return all(
        a is None or is_sharding(a) or (isinstance(a, str) and a.replace(" ", "") == own)
        for a in arguments
    )
