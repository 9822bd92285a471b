"""Flax NNX: dense layers seen as ``y = x W^T``, their quantized twins, and the swap."""

from __future__ import annotations

import itertools
import operator
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.fragments import Fragments
from wush_jax.formats import QuantizedArray
from wush_jax.layers.contraction import Contraction as Contraction
from wush_jax.layers.linear import quantized_dot
from wush_jax.solvers.site import PackedWeight


class Packed(nnx.Variable):
    """Codes, scales and transforms of a quantized layer: state that no optimizer touches."""


@dataclass(frozen=True)
class Dense:
    """A dense layer as quantization sees it.

    Attributes:
      contraction: what the layer computes, without its bias.
      kernel: the weight, in the layer's own shape.
      bias: N values added to the outputs, or None.
      dtype: what the layer casts its input to; None promotes input and kernel to one dtype.
      attributes: the layer's static attributes and the shapes of its parameters, which models may
        read (``layer.out_features``, ``layer.kernel.shape``).
    """

    contraction: Contraction
    kernel: jax.Array
    bias: nnx.Variable | None
    dtype: Any = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> jax.Array:
        """W (N, K), or (*batch, N, K)."""
        return self.contraction.weight(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(N, K), or (*batch, N, K)."""
        return *self.contraction.batch, *self.contraction.shape


DenseTypes = tuple[tuple[type, Callable[[Any], Dense]], ...]


def _linear(module: nnx.Linear) -> Dense:
    kernel = module.kernel.get_value()
    return Dense(Contraction("...k,kn->...n", kernel.shape), kernel, module.bias, module.dtype)


def _linear_general(module: nnx.LinearGeneral) -> Dense:
    kernel = module.kernel.get_value()
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    features = 1 if isinstance(module.out_features, int) else len(module.out_features)
    equation = general_equation(axis, sorted(module.batch_axis), features)
    return Dense(Contraction(equation, kernel.shape), kernel, module.bias, module.dtype)


def general_equation(axis: Sequence[int], batch: Sequence[int], features: int) -> str:
    """Return the einsum of a `LinearGeneral` or `DenseGeneral`.

    Args:
      axis: input axes to contract; they must be the last ones.
      batch: input axes that the kernel has too; they must be the first ones.
      features: number of output axes.

    Raises:
      ValueError: other axes.

    >>> general_equation((-2, -1), (), 1)
    '...ab,abc->...c'
    """
    if sorted(axis) != list(range(-len(axis), 0)) or list(batch) != list(range(len(batch))):
        raise ValueError(f"axis={tuple(axis)}, batch_axis={tuple(batch)}: not the last, the first")
    names = iter(string.ascii_lowercase)
    # In whatever order `axis` names them, flax contracts them in the order of the input.
    experts, inputs, outputs = (
        "".join(itertools.islice(names, n)) for n in (len(batch), len(axis), features)
    )
    return f"{experts}...{inputs},{experts}{inputs}{outputs}->{experts}...{outputs}"


def _einsum(module: nnx.Einsum) -> Dense:
    kernel = module.kernel.get_value()
    return Dense(Contraction(module.einsum_str, kernel.shape), kernel, module.bias, module.dtype)


# Which layers are dense. To add one of yours, give it a method ``dense_view()`` or, if you cannot
# change it, pass ``(*DENSE_TYPES, (MyDense, view))``: each returns the layer's `Dense` view, or
# raises ValueError for what it cannot express. A tuple, since it has to be hashable: compiled
# functions are cached by it.
DENSE_TYPES: DenseTypes = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Einsum, _einsum),
)


class QuantizedDense(nnx.Module):
    """A dense layer with packed 4-bit weights and quantized inputs.

    ``y = outputs(q(rows(x) T_X^T) @ W_q^T) + bias``. Its own state is `Packed`; gradients pass
    straight through to x, and to the bias.

    Args:
      dense: view of the layer that is replaced; its bias is kept, in a variable of its own, its
        kernel is not.
      packed: the quantized weight (N, K).
      transform: variable that already holds ``packed.transform``, to share it within a site.
      implementation: of `quantized_dot`; None lets the dispatch choose.
    """

    def __init__(
        self,
        dense: Dense,
        packed: PackedWeight,
        *,
        transform: Packed | None = None,
        implementation: str | None = None,
    ):
        self.contraction = dense.contraction
        self.dtype = dense.dtype
        self.kernel_dtype = dense.kernel.dtype
        self.input_format = packed.input_format
        self.implementation = implementation
        self.hold(packed.weight)
        if transform is None and packed.transform is not None:
            transform = Packed(packed.transform)
        self.transform = nnx.data(transform)
        self.input_global_scale = nnx.data(
            None if packed.input_global_scale is None else Packed(packed.input_global_scale)
        )
        # A copy: training the quantized model's bias must not change the original's.
        self.bias = nnx.data(None if dense.bias is None else dense.bias.copy())
        for name, value in dense.attributes.items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def hold(self, weight: QuantizedArray | Fragments) -> None:
        """Keep a weight, in the layout that it has, in place of the one before."""
        self.weight_format = weight.format
        self.global_scale = Packed(weight.global_scale)
        self.codes, self.scales = _held(weight, "codes"), _held(weight, "scales")
        self.records, self.unit = _held(weight, "records"), _held(weight, "unit")
        self.operand = getattr(weight, "operand", "")  # what records expand to

    @property
    def packed(self) -> PackedWeight:
        """The layer's weight as the functional routines take it, in the layout that is held."""
        weight: QuantizedArray | Fragments
        if self.records is None:
            weight = QuantizedArray(
                self.codes[...], self.scales[...], self.global_scale[...], self.weight_format
            )
        else:
            weight = Fragments(
                *(self.records[...], self.unit[...], self.global_scale[...]),
                *(self.weight_format, self.contraction.shape, self.operand),
            )
        transform = None if self.transform is None else self.transform[...]
        scale = None if self.input_global_scale is None else self.input_global_scale[...]
        return PackedWeight(weight, transform, scale, self.input_format)

    def __call__(self, x: jax.Array, *, out_sharding: Any = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: as the replaced layer took it.
          out_sharding: of flax's layers; None only, since it asks for explicit mesh axes.
        """
        if out_sharding is not None:
            raise NotImplementedError(f"out_sharding={out_sharding}: meshes with Auto axes only")
        return self.around(partial(quantized_dot, implementation=self.implementation), x)

    def around(self, dot: Callable, x: jax.Array, *more: jax.Array) -> jax.Array:
        """Return the layer's output with ``dot(rows, packed, *more)`` as its matrix product.

        Arrays have the leading axis of the experts, where there are experts; dot has not.
        """
        if self.contraction.experts is not None:
            dot = jax.vmap(dot)
        return self.outputs(dot(self.rows(x), self.packed, *more))

    def rows(self, x: jax.Array) -> jax.Array:
        """Return the input as rows (..., K) of the layer's dtype."""
        # Flax promotes x and the kernel to one dtype where the layer has none of its own.
        dtype = self.dtype
        x = x.astype(jnp.promote_types(x.dtype, self.kernel_dtype) if dtype is None else dtype)
        return self.contraction.rows(x)

    def outputs(self, y: jax.Array) -> jax.Array:
        """Return the layer's output of rows (..., N): with its bias, in its shape."""
        if self.bias is not None:
            y = y + self.contraction.bias(jnp.asarray(self.bias[...], y.dtype), y.ndim)
        return self.contraction.outputs(y)


def _held(weight: QuantizedArray | Fragments, name: str) -> Any:
    """Return a weight's array in a variable, or None where its layout has no such array."""
    return nnx.data(Packed(getattr(weight, name)) if hasattr(weight, name) else None)


def dense_view(module: nnx.Module, dense_types: DenseTypes = DENSE_TYPES) -> Dense | None:
    """Return a module's view as a dense layer, or None where its type is no dense layer's.

    Raises:
      ValueError: a dense type in a form that cannot be quantized.
    """
    view = dict(dense_types).get(type(module)) or getattr(type(module), "dense_view", None)
    if view is None:
        return None
    dense = view(module)
    # The twin stands in for the layer also where a model reads, say, its number of features or the
    # shape of its kernel.
    static = {}
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param) and _is_array(value.get_value()):
            static[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        elif not name.startswith("_") and not nnx.is_data(value) and not nnx.has_data(value):
            static[name] = value
    return replace(dense, attributes=static)


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
    for path, module in nnx.iter_modules(model):
        try:
            dense = dense_view(module, dense_types)
        except ValueError as error:
            skipped[dotted(path)] = str(error)
            continue
        if dense is not None:
            layers[dotted(path)] = dense
        elif matrices := _matrices(module):
            kind = getattr(module, "kind", type(module).__name__)
            skipped[dotted(path)] = f"{kind} is no registered dense layer; it holds {matrices}"
    return layers, skipped


def _matrices(module: nnx.Module) -> str:
    """Name the parameters of two axes or more that a module holds by itself."""
    own = [(n, v) for n, v in vars(module).items() if isinstance(v, nnx.Param)]
    return ", ".join(f"{n} {v.shape}" for n, v in own if _is_array(v.get_value()) and v.ndim > 1)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def replace_modules(
    model: nnx.Module, replace: Callable[[str, nnx.Module], nnx.Module | None]
) -> nnx.Module:
    """Return a copy of a model in which some submodules are replaced; arrays are not copied.

    Args:
      model: any NNX module.
      replace: maps (dotted path, module) to the new module, or to None to keep the old one. A
        module that stands in several places is asked for once and replaced in all.

    Raises:
      ValueError: a module to be replaced sits in something else than modules, lists, tuples, dicts.

    >>> twice = replace_modules(nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))]),
    ...                         lambda path, module: nnx.List([]) if path == "0" else None)
    >>> type(twice[0]).__name__
    'List'
    """
    model = nnx.clone(model)  # variables of its own: training one model must not change the other
    new = {}
    for path, module in nnx.iter_modules(model):
        replacement = replace(dotted(path), module)
        if replacement is not None:
            # The old module is kept, so that its id stays its own.
            new[id(module)] = (dotted(path), module, replacement)
    if id(model) in new:
        return new[id(model)][-1]
    placed: set[int] = set()
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(vars(parent).items()):
            exchanged = _exchange(child, new, placed)
            if exchanged is not child:
                setattr(parent, name, nnx.data(exchanged))
    lost = [path for key, (path, *_) in new.items() if key not in placed]
    if lost:
        raise ValueError(f"{', '.join(lost)}: held by no module; keep submodules in an nnx.List")
    return model


def _exchange(child: Any, new: Mapping[int, tuple], placed: set[int]) -> Any:
    """Return an attribute with the modules in it exchanged, itself where there are none."""
    if id(child) in new:
        placed.add(id(child))
        return new[id(child)][-1]
    if type(child) is dict:
        values = {key: _exchange(value, new, placed) for key, value in child.items()}
        return values if any(values[key] is not child[key] for key in child) else child
    if type(child) in (list, tuple):
        items = [_exchange(value, new, placed) for value in child]
        return type(child)(items) if any(map(operator.is_not, items, child)) else child
    return child


def dotted(path: tuple) -> str:
    """Return a module path as text: ("layers", 0, "q_proj") -> "layers.0.q_proj"."""
    return ".".join(str(p) for p in path)
