"""Flax NNX: dense layers seen as ``y = x W^T``, their quantized twins, and the swap."""

from __future__ import annotations

import math
import operator
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.formats import QuantizedArray
from wush_jax.linear import quantized_dot
from wush_jax.site import PackedWeight


class Packed(nnx.Variable):
    """Codes, scales and transforms of a quantized layer: state that no optimizer touches."""


@dataclass(frozen=True)
class Contraction:
    """A dense layer's einsum, ``x, kernel -> y``, read as ``y = x W^T`` with W (N, K).

    Kernel axes that x has too are contracted (K); the others are outputs (N).

    Attributes:
      equation: such as "...k,kn->...n" or "btd,dnh->btnh".
      kernel_shape: shape of the kernel.

    Raises:
      ValueError: no equation of one input and one kernel; an axis of the kernel that neither side,
        or both sides, have (a batch of kernels).

    >>> Contraction("btd,dnh->btnh", (8, 2, 3)).shape
    (6, 8)
    """

    equation: str
    kernel_shape: tuple[int, ...]

    def __post_init__(self):
        if not re.fullmatch(r"[\w.]+,\w+->[\w.]+", self.equation.replace(" ", "")):
            raise ValueError(
                f"equation={self.equation!r} is not of the form 'input,kernel->output'"
            )
        x, kernel, y = self._axes
        if len(kernel) != len(self.kernel_shape):
            raise ValueError(f"equation={self.equation!r} does not fit kernel {self.kernel_shape}")
        bad = [a for a in kernel if (a in x) == (a in y)]
        repeated = any(len(set(axes)) < len(axes) for axes in (x, kernel, y))
        if bad or repeated or sorted(self._lead + self._outputs) != sorted(y):
            raise ValueError(
                f"equation={self.equation!r} is not a dense layer: every kernel axis must be in "
                "exactly one of input and output"
            )

    @property
    def _axes(self) -> tuple[list[str], list[str], list[str]]:
        operands, y = self.equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        return _letters(x), _letters(kernel), _letters(y)

    @property
    def _lead(self) -> list[str]:
        x, kernel, _ = self._axes
        return [a for a in x if a not in kernel]

    @property
    def _contracted(self) -> list[str]:
        x, kernel, _ = self._axes
        return [a for a in x if a in kernel]

    @property
    def _outputs(self) -> list[str]:
        _, kernel, y = self._axes
        return [a for a in y if a in kernel]

    def _sizes(self, axes: list[str]) -> list[int]:
        kernel = self._axes[1]
        return [self.kernel_shape[kernel.index(a)] for a in axes]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return math.prod(self._sizes(self._outputs)), math.prod(self._sizes(self._contracted))

    def weight(self, kernel: jax.Array) -> jax.Array:
        """Return the kernel as W (N, K)."""
        axes = self._axes[1]
        order = [axes.index(a) for a in self._outputs + self._contracted]
        return kernel.transpose(order).reshape(self.shape)

    def kernel(self, weight: jax.Array) -> jax.Array:
        """Undo `weight`: W (N, K) as a kernel."""
        axes = self._outputs + self._contracted
        order = [axes.index(a) for a in self._axes[1]]
        return weight.reshape(self._sizes(axes)).transpose(order)

    def rows(self, x: jax.Array) -> jax.Array:
        """Return the layer's input as (..., K): the same array where it is so already."""
        axes, wanted = self._axes[0], self._lead + self._contracted
        x = _transpose(x, axes, wanted)
        if len(self._contracted) == 1:
            return x
        return x.reshape(*x.shape[: x.ndim - len(self._contracted)], self.shape[1])

    def outputs(self, y: jax.Array) -> jax.Array:
        """Return (..., N) as the layer's output."""
        y = y.reshape(*y.shape[:-1], *self._sizes(self._outputs))
        return _transpose(y, self._lead + self._outputs, self._axes[2])


def _letters(axes: str) -> list[str]:
    head, dots, tail = axes.partition("...")
    return [*head, *([dots] if dots else []), *tail]


def _transpose(x: jax.Array, axes: list[str], wanted: list[str]) -> jax.Array:
    if axes == wanted:
        return x
    named = {}
    free = x.ndim - (len(axes) - 1 if "..." in axes else len(axes))
    position = 0
    for axis in axes:
        width = free if axis == "..." else 1
        named[axis] = list(range(position, position + width))
        position += width
    return x.transpose([i for axis in wanted for i in named[axis]])


@dataclass(frozen=True)
class Dense:
    """A dense layer as quantization sees it.

    Attributes:
      contraction: what the layer computes, without its bias.
      kernel: the weight, in the layer's own shape.
      bias: N values added to the outputs, or None.
      dtype: what the layer casts its input to; None promotes input and kernel to one dtype.
    """

    contraction: Contraction
    kernel: jax.Array
    bias: nnx.Variable | None
    dtype: Any = None

    @property
    def weight(self) -> jax.Array:
        """W (N, K)."""
        return self.contraction.weight(self.kernel)


DenseTypes = tuple[tuple[type, Callable[[Any], Dense]], ...]


def _linear(module: nnx.Linear) -> Dense:
    kernel = module.kernel.get_value()
    return Dense(Contraction("...k,kn->...n", kernel.shape), kernel, module.bias, module.dtype)


def _linear_general(module: nnx.LinearGeneral) -> Dense:
    kernel = module.kernel.get_value()
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    if module.batch_axis or sorted(axis) != list(range(-len(axis), 0)):
        raise ValueError(f"LinearGeneral with axis={axis}, batch_axis={dict(module.batch_axis)}")
    names = string.ascii_lowercase[: kernel.ndim]
    # In whatever order `axis` names them, flax contracts them in the order of the input.
    inputs, outputs = names[: len(axis)], names[len(axis) :]
    equation = f"...{inputs},{names}->...{outputs}"
    return Dense(Contraction(equation, kernel.shape), kernel, module.bias, module.dtype)


def _einsum(module: nnx.Einsum) -> Dense:
    kernel = module.kernel.get_value()
    return Dense(Contraction(module.einsum_str, kernel.shape), kernel, module.bias, module.dtype)


# Which layers are dense. To add one of yours, pass ``(*DENSE_TYPES, (MyDense, view))`` with a
# function that returns its `Dense` view, or raises ValueError for what it cannot express. A tuple,
# since it has to be hashable: compiled functions are cached by it.
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
        self.weight_format = packed.weight.format
        self.input_format = packed.input_format
        self.implementation = implementation
        self.codes = Packed(packed.weight.codes)
        self.scales = Packed(packed.weight.scales)
        self.global_scale = Packed(packed.weight.global_scale)
        if transform is None and packed.transform is not None:
            transform = Packed(packed.transform)
        self.transform = nnx.data(transform)
        self.input_global_scale = nnx.data(
            None if packed.input_global_scale is None else Packed(packed.input_global_scale)
        )
        # A copy: training the quantized model's bias must not change the original's.
        self.bias = nnx.data(None if dense.bias is None else dense.bias.copy())

    @property
    def packed(self) -> PackedWeight:
        """The layer's weight as the functional routines take it."""
        weight = QuantizedArray(
            self.codes[...], self.scales[...], self.global_scale[...], self.weight_format
        )
        transform = None if self.transform is None else self.transform[...]
        scale = None if self.input_global_scale is None else self.input_global_scale[...]
        return PackedWeight(weight, transform, scale, self.input_format)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layer: x as the replaced layer took it."""
        # Flax promotes x and the kernel to one dtype where the layer has none of its own.
        dtype = self.dtype
        x = x.astype(jnp.promote_types(x.dtype, self.kernel_dtype) if dtype is None else dtype)
        y = self.contraction.rows(x)
        y = quantized_dot(y, self.packed, implementation=self.implementation)
        if self.bias is not None:
            y = y + jnp.asarray(self.bias[...], y.dtype).reshape(-1)
        return self.contraction.outputs(y)


def dense_layers(
    model: nnx.Module, dense_types: DenseTypes = DENSE_TYPES
) -> tuple[dict[str, Dense], dict[str, str]]:
    """Return the dense layers of a model by dotted path, and why others cannot be quantized.

    Args:
      model: any NNX module.
      dense_types: module types and how to see them as dense layers.

    Returns:
      Layers by path, and reasons by path for layers of a dense type that have another form.

    >>> layers, skipped = dense_layers(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]))
    >>> {path: layer.contraction.shape for path, layer in layers.items()}
    {'0': (3, 2)}
    """
    layers, skipped = {}, {}
    views = dict(dense_types)
    for path, module in nnx.iter_modules(model):
        view = views.get(type(module))
        if view is None:
            continue
        try:
            layers[dotted(path)] = view(module)
        except ValueError as error:
            skipped[dotted(path)] = str(error)
    return layers, skipped


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
