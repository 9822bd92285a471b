"""Flax NNX: dense layers seen as ``y = x W^T``, and what of a model is none."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from wush_jax.layers.contraction import Contraction


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
      result_dtype: of the product, where the layer asks for another one than its input's.
      source: the parameter that the kernel is computed from; None where it is the parameter itself.
      kernel_name: the attribute that holds the parameter, empty where none does.
      adapter: a module whose output is added to the layer's, or None.
      view: what made this of the layer.
    """

    contraction: Contraction
    kernel: jax.Array
    bias: nnx.Variable | None
    dtype: Any = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    result_dtype: Any = None
    source: jax.Array | None = None
    kernel_name: str = ""
    adapter: nnx.Module | None = None
    view: Callable[[Any], Dense] | None = None

    @property
    def weight(self) -> jax.Array:
        """W (N, K), or (*batch, N, K)."""
        return self.contraction.weight(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(N, K), or (*batch, N, K)."""
        return *self.contraction.batch, *self.contraction.shape


DenseTypes = tuple[tuple[type, Callable[[Any], Dense]], ...]


def check_product(module: Any, names: Sequence[tuple[str, Any]]) -> None:
    """Raise ValueError where a flax layer computes its product in a way of its own.

    Args:
      module: the layer.
      names: attributes, and their values where the product is the usual one.
    """
    strange = [n for n, usual in names if getattr(module, n, None) not in (None, usual)]
    if strange:
        raise ValueError(f"it computes in a way of its own: {', '.join(strange)}")


USUAL = (
    ("dot_general", jax.lax.dot_general),
    ("dot_general_cls", None),
    ("einsum_op", jnp.einsum),
    ("promote_dtype", promote_dtype),
)


def _flax(equation: str, module: Any) -> Dense:
    check_product(module, USUAL)
    kernel = module.kernel.get_value()
    contraction = Contraction(equation, kernel.shape)
    result = getattr(module, "preferred_element_type", None)
    return Dense(contraction, kernel, module.bias, module.dtype, result_dtype=result)


def _linear(module: nnx.Linear) -> Dense:
    return _flax("...k,kn->...n", module)


def _linear_general(module: nnx.LinearGeneral) -> Dense:
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    features = 1 if isinstance(module.out_features, int) else len(module.out_features)
    return _flax(general_equation(axis, sorted(module.batch_axis), features), module)


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
    if module.einsum_str is None:
        raise ValueError("its equation is given by the call alone")
    return _flax(module.einsum_str, module)


def _lora(module: nnx.LoRALinear) -> Dense:
    return replace(_linear(module), adapter=module.lora)


def _weight_norm(module: nnx.WeightNorm) -> Dense:
    """The normalised kernel: a call leaves it in the layer that it wraps."""
    view = dict(DENSE_TYPES).get(type(module.layer_instance))
    if view is not _linear:
        raise ValueError(f"WeightNorm of {type(module.layer_instance).__name__}, not nnx.Linear")
    source = module.layer_instance.kernel.get_value()  # type: ignore[attr-defined]

    def normalise(module: nnx.WeightNorm) -> jax.Array:
        module = nnx.clone(module)
        module(jnp.zeros((1, source.shape[-2]), source.dtype))
        return module.layer_instance.kernel.get_value()  # type: ignore[attr-defined]

    abstract = any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(nnx.state(module)))
    if abstract or len(source.shape) != 2:
        kernel = source  # only its shape matters; a stack has no call of its own
        if not abstract:
            raise ValueError("WeightNorm of layers stacked for a scan")
    else:
        kernel = normalise(module)
    return replace(_linear(module.layer_instance), kernel=kernel, source=source)


# Which layers are dense. To add one of yours, give it a method ``dense_view()`` or, if you cannot
# change it, pass ``(*DENSE_TYPES, (MyDense, view))``: each returns the layer's `Dense` view, or
# raises ValueError for what it cannot express. A tuple, since it has to be hashable: compiled
# functions are cached by it. Subclasses count where they leave ``__call__`` as it is.
DENSE_TYPES: DenseTypes = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Einsum, _einsum),
    (nnx.LoRALinear, _lora),
    (nnx.WeightNorm, _weight_norm),
)


# The attribute of a layer that says which axes of its kernel a scan takes away, where they are not
# the first ones. A call shows it (`wush_jax.calibration.observe.stacked`).
STACKED = "stack_axes"


def view_of(kind: type, dense_types: DenseTypes = DENSE_TYPES) -> Callable[[Any], Dense] | None:
    """Return how to see modules of a type as dense layers; None where they are none.

    Raises:
      ValueError: a subclass of a dense type with a call of its own.
    """
    views = dict(dense_types)
    if kind in views:
        return views[kind]
    own = getattr(kind, "dense_view", None)
    if own is not None:
        return own
    for base in kind.__mro__[1:]:
        if base in views:
            if kind.__call__ is not base.__call__:
                raise ValueError(
                    f"{kind.__name__} overrides __call__ of {base.__name__}; pass a view of it in "
                    "dense_types"
                )
            return views[base]
    return None


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
    # From the outside in, so that a layer that wraps another one comes first.
    for path, module in sorted(nnx.iter_modules(model), key=lambda item: len(item[0])):
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
    order = [dotted(path) for path, _ in nnx.iter_modules(model)]
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
