"""Flax NNX: the quantized twins of dense layers, and the swap."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from pallas_kernels.fragments import Fragments
from pallas_kernels.stacks import Stack
from wush_jax.formats import QuantizedArray
from wush_jax.formats.partition import Partition
from wush_jax.layers.contraction import Contraction as Contraction
from wush_jax.layers.dense import DENSE_TYPES as DENSE_TYPES
from wush_jax.layers.dense import Dense as Dense
from wush_jax.layers.dense import DenseTypes as DenseTypes
from wush_jax.layers.dense import dense_layers as dense_layers
from wush_jax.layers.dense import dense_view as dense_view
from wush_jax.layers.dense import dotted as dotted
from wush_jax.layers.dense import is_array, is_sharding, same_call
from wush_jax.layers.linear import quantized_dot
from wush_jax.layers.meshes import automatic, is_explicit, shapes_of
from wush_jax.layers.ragged import bias_of_rows, quantized_ragged_dot
from wush_jax.layers.stacks import stack_of
from wush_jax.solvers.batched import over_batch
from wush_jax.solvers.site import PackedWeight, effective_weight


class Packed(nnx.Variable):
    """Codes, scales and transforms of a quantized layer: state that no optimizer touches."""


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
        self.kernel_name = dense.kernel_name
        self.result_dtype = dense.result_dtype
        self.adapter = nnx.data(None if dense.adapter is None else nnx.clone(dense.adapter))
        self.input_format = packed.input_format
        self.implementation = implementation
        self.stack = stack_of(dense.contraction)
        self.hold(packed.weight)
        # A stack in front is as the packed arrays have it; elsewhere each layer lays out its own.
        if self.stack is not None or transform is None:
            transform = self._held(packed.transform)
        self.transform = nnx.data(transform)
        self.input_global_scale = nnx.data(self._held(packed.input_global_scale))
        # A copy: training the quantized model's bias must not change the original's.
        self.bias = nnx.data(None if dense.bias is None else dense.bias.copy())
        for name, value in dense.attributes.items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def hold(
        self, weight: QuantizedArray | Fragments | Stack, partition: Partition | None = None
    ) -> None:
        """Keep a weight, in the layout that it has, in place of the one before."""
        self.partition = partition
        self.weight_format = weight.format
        names = ("global_scale", "codes", "scales", "records", "unit")
        for name in names:
            setattr(self, name, nnx.data(self._held(getattr(weight, name, None))))
        self.operand = getattr(weight, "operand", "")  # what records expand to

    def _held(self, array: jax.Array | None) -> Packed | None:
        """Return an array in a variable, with its stack where the replaced kernel had it."""
        if array is None or self.stack is None:
            return None if array is None else Packed(array)
        return Packed(self.stack.lay(array), natural=array.shape[len(self.stack.axes) :])

    def _value(self, variable: Packed | None) -> Any:
        """Return a variable's array as the functional routines take it."""
        if variable is None or self.stack is None:
            return None if variable is None else variable[...]
        return self.stack.undo(variable[...], variable.natural)

    @property
    def packed(self) -> PackedWeight:
        """The layer's weight as the functional routines take it, in the layout that is held."""
        weight: QuantizedArray | Fragments | Stack
        value, scale = self._value, self._value(self.global_scale)
        if self.records is None:
            codes, scales = value(self.codes), value(self.scales)
            weight = QuantizedArray(codes, scales, scale, self.weight_format)
        else:
            weight = (Stack if self.contraction.ragged else Fragments)(
                *(value(self.records), value(self.unit), scale),
                *(self.weight_format, self.contraction.shape, self.operand),
            )
        inputs = value(self.transform), value(self.input_global_scale)
        return PackedWeight(weight, *inputs, self.input_format, self.partition)

    def __call__(self, *arguments: Any, **keywords: Any) -> jax.Array:
        """Apply the layer.

        Args:
          arguments: as the replaced layer took them: the input, a sharding of the output, and its
            own equation.
          keywords: likewise.

        Raises:
          ValueError: an argument that asks for another product.
        """
        dot = quantized_ragged_dot if self.contraction.ragged else quantized_dot
        return self.applied(partial(dot, implementation=self.implementation), arguments, keywords)

    def applied(self, dot: Callable, arguments: tuple, keywords: dict, *more: Any) -> jax.Array:
        """Apply the layer to a call's arguments, with another matrix product: see `around`.

        That of a ragged layer takes ``(rows, packed, group sizes, *more)``.
        """
        given = [*arguments, *keywords.values()]
        inputs = [value for value in given if is_array(value)]
        others = [value for value in given if not is_array(value)]
        if self.contraction.ragged and len(inputs) == 2:
            x, sizes = inputs
            return self.outputs_of_groups(dot(self.rows(x), self.packed, sizes, *more), sizes)
        if len(inputs) != 1 or not same_call(self.contraction, others):
            raise ValueError(
                f"a quantized layer {self.contraction.equation!r} takes one input, not {given}"
            )
        y = self.around(dot, inputs[0], *more)
        for sharding in filter(is_sharding, others):
            y = jax.sharding.reshard(y, sharding)
        return y

    def outputs_of_groups(self, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Return the output of a ragged layer of rows (M, N): with their experts' biases."""
        return y if self.bias is None else y + bias_of_rows(self.bias[...], group_sizes, y)

    def __getattr__(self, name: str) -> Any:
        # Models read their layers' kernels: shapes everywhere, values in a few.
        if name.startswith("_") or name != vars(self).get("kernel_name"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return Kernel(self, self.dense_weight)

    def dense_weight(self) -> jax.Array:
        """Return the dequantized weight in original coordinates, (N, K) or (*batch, N, K)."""
        packed = self.packed
        if isinstance(packed.weight, Stack):
            packed = replace(packed, weight=packed.interchange)
        return over_batch(effective_weight, packed.weight.shape[:-2])(packed)

    def around(self, dot: Callable, x: jax.Array, *more: jax.Array) -> jax.Array:
        """Return the layer's output with ``dot(rows, packed, *more)`` as its matrix product.

        Arrays have the leading axis of the experts, where there are experts; dot has not.
        """
        if self.contraction.experts is not None:
            dot = jax.vmap(dot)
        bias = None if self.bias is None else self.bias[...]

        def product(x: jax.Array, packed: PackedWeight, bias: Any, *more: Any) -> jax.Array:
            return self._finished(dot(self.rows(x), packed, *more), bias)

        arguments = (x, self.packed, bias, *more)
        spec = None  # of all axes on every device, where weights alone are on explicit axes
        if is_explicit(x):
            ndim = jax.eval_shape(product, *map(shapes_of, arguments)).ndim
            lead = tuple(jax.typeof(x).sharding.spec)[: min(x.ndim, ndim) - 1]
            spec = PartitionSpec(*lead, *(None,) * (ndim - len(lead)))
        y = automatic(product, *arguments, spec=spec)
        return y if self.adapter is None else y + self.adapter(x)

    def rows(self, x: jax.Array) -> jax.Array:
        """Return the input as rows (..., K) of the layer's dtype."""
        # Flax promotes x and the kernel to one dtype where the layer has none of its own.
        dtype = self.dtype
        dtype = jnp.promote_types(x.dtype, self.kernel_dtype) if dtype is None else dtype
        # Rounded to the layer's dtype, then as wide as the result, which is of the rows' dtype.
        x = x.astype(dtype)
        if self.result_dtype is not None:
            x = x.astype(jnp.promote_types(dtype, self.result_dtype))
        return self.contraction.rows(x)

    def outputs(self, y: jax.Array) -> jax.Array:
        """Return the layer's output of rows (..., N): with its bias, in its shape."""
        return self._finished(y, None if self.bias is None else self.bias[...])

    def _finished(self, y: jax.Array, bias: jax.Array | None) -> jax.Array:
        if bias is not None:
            y = y + self.contraction.bias(jnp.asarray(bias, y.dtype), y.ndim)
        return self.contraction.outputs(y)


class Kernel:
    """The kernel of a quantized layer, for models that read it: dequantized where it is read.

    Args:
      layer: the layer.
      weight: what it multiplies with, when it is read.
    """

    def __init__(self, layer: QuantizedDense, weight: Callable[[], jax.Array]):
        self.contraction, self.dtype, self.weight = layer.contraction, layer.kernel_dtype, weight

    def get_value(self) -> jax.Array:
        """Return the weight that the layer multiplies with, as the replaced layer's kernel."""
        contraction, weight = self.contraction, self.weight()
        gone = len(contraction.batch) > weight.ndim - 2
        return (contraction.one if gone else contraction).kernel(weight).astype(self.dtype)

    value = property(get_value)
    shape = property(lambda self: jax.eval_shape(self.get_value).shape)
    ndim = property(lambda self: len(self.shape))

    def __getitem__(self, index: Any) -> jax.Array:
        return self.get_value()[index]

    def __jax_array__(self) -> jax.Array:
        return self.get_value()


def replace_modules(
    model: nnx.Module, replace: Callable[[str, nnx.Module], nnx.Module | None]
) -> nnx.Module:
    """Return a copy of a model in which some submodules are replaced; arrays are not copied.

    Args:
      model: any NNX module.
      replace: maps (dotted path, module) to the new module, or to None to keep the old one. A
        module that stands in several places is asked for once and replaced in all.

    Raises:
      ValueError: a module to be replaced sits in something else than modules, instances of
        `nnx.Pytree`, lists, tuples, dicts.

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
    for _, parent in list(nnx.iter_graph(model)):
        if not isinstance(parent, nnx.Pytree):  # as modules are
            continue
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
