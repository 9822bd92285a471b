"""A dense layer as quantization sees it, and what views of layers are made of."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

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


# Module types, or names of types that are not imported (`wush_jax.layers.zoos`), and their views.
DenseTypes = tuple[tuple[type | str, Callable[[Any], Dense]], ...]


def check_product(module: Any, names: Sequence[tuple[str, Any]]) -> None:
    """Raise ValueError where a flax layer computes its product in a way of its own.

    Args:
      module: the layer.
      names: attributes, and their values where the product is the usual one.
    """
    strange = [n for n, usual in names if getattr(module, n, None) not in (None, usual)]
    if strange:
        raise ValueError(f"it computes in a way of its own: {', '.join(strange)}")


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
