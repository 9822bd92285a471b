"""A dense layer's einsum read as ``y = x W^T``: which axes are N, K, or a batch of experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Contraction:
    """A dense layer's einsum, ``x, kernel -> y``, read as ``y = x W^T`` with W (N, K).

    Kernel axes that only x has too are contracted (K); those that only the output has are outputs
    (N); those that both have are *experts*: a batch of E kernels, each with inputs of its own.
    Axes of the kernel beyond the equation are a *stack*, such as the layers of a scan, which takes
    them away before the layer is called.

    Attributes:
      equation: such as "...k,kn->...n", "btd,dnh->btnh" or "ecd,edf->ecf".
      kernel_shape: shape of the kernel, with its stack.
      stack_axes: where the stack is; None where it is in front, if there is one.
      ragged: experts are kernel axes that neither side has, as in "mk,ekn->mn": rows come sorted by
        expert, and how many are each one's comes beside them.

    Raises:
      ValueError: no equation of one input and one kernel, or an axis of the kernel that neither
        side has; another number of stack axes than the kernel has beyond the equation.

    >>> Contraction("btd,dnh->btnh", (8, 2, 3)).shape
    (6, 8)
    >>> experts = Contraction("ecd,edf->ecf", (4, 8, 6))
    >>> experts.shape, experts.batch
    ((6, 8), (4,))
    """

    equation: str
    kernel_shape: tuple[int, ...]
    stack_axes: tuple[int, ...] | None = None
    ragged: bool = False

    def __post_init__(self):
        if not re.fullmatch(r"[\w.]+,\w+->[\w.]+", self.equation.replace(" ", "")):
            raise ValueError(
                f"equation={self.equation!r} is not of the form 'input,kernel->output'"
            )
        x, kernel, y = self._axes
        if len(kernel) > len(self.kernel_shape):
            raise ValueError(f"equation={self.equation!r} does not fit kernel {self.kernel_shape}")
        beyond = len(self.kernel_shape) - len(kernel)
        if self.stack_axes is not None and len(self.stack_axes) != beyond:
            raise ValueError(
                f"equation={self.equation!r} leaves {beyond} axes of kernel {self.kernel_shape} "
                f"for a stack, not {self.stack_axes}"
            )
        lost = [a for a in kernel if a not in x and a not in y and not self.ragged]
        repeated = any(len(set(axes)) < len(axes) for axes in (x, kernel, y))
        dense = self._contracted and self._outputs and not lost and not repeated
        experts = [] if self.ragged else self._experts
        if not dense or sorted(experts + self._lead + self._outputs) != sorted(y):
            raise ValueError(
                f"equation={self.equation!r} is not a dense layer: it must contract some kernel "
                "axes with the input, keep others as outputs, and keep all other input axes"
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
    def _experts(self) -> list[str]:
        x, kernel, y = self._axes
        if self.ragged:
            return [a for a in kernel if a not in x and a not in y]
        return [a for a in kernel if a in x and a in y]

    @property
    def _contracted(self) -> list[str]:
        x, kernel, y = self._axes
        return [a for a in x if a in kernel and a not in y]

    @property
    def _outputs(self) -> list[str]:
        x, kernel, y = self._axes
        return [a for a in y if a in kernel and a not in x]

    def _sizes(self, axes: list[str]) -> list[int]:
        kernel, own = self._axes[1], self.own_shape
        return [own[kernel.index(a)] for a in axes]

    @property
    def positions(self) -> tuple[int, ...]:
        """The stack's axes, wherever they are."""
        beyond = len(self.kernel_shape) - len(self._axes[1])
        return tuple(range(beyond)) if self.stack_axes is None else self.stack_axes

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of one kernel of the stack."""
        return tuple(n for i, n in enumerate(self.kernel_shape) if i not in self.positions)

    @property
    def one(self) -> Contraction:
        """The contraction of one kernel of the stack."""
        return Contraction(self.equation, self.own_shape, ragged=self.ragged)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one kernel."""
        return math.prod(self._sizes(self._outputs)), math.prod(self._sizes(self._contracted))

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the kernel's axes that the equation does not name."""
        return tuple(self.kernel_shape[i] for i in self.positions)

    @property
    def experts(self) -> int | None:
        """Number of experts E that a call sees at once; None for a layer of one kernel."""
        return math.prod(self._sizes(self._experts)) if self._experts else None

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes of `weight`: stack and experts, () for a layer of one kernel."""
        return self.stack if self.experts is None else (*self.stack, self.experts)

    @property
    def reading(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the input's contracted and expert axes: layers alike share their rows."""
        x = self._axes[0]
        first = x.index("...") if "..." in x else 0
        positions = {a: i if i < first else i - len(x) for i, a in enumerate(x)}
        sides = (self._contracted, [] if self.ragged else self._experts)
        return tuple(tuple(positions[a] for a in axes) for axes in sides)

    def weight(self, kernel: jax.Array) -> jax.Array:
        """Return the kernel as W (N, K), or (*batch, N, K)."""
        axes, stack = self._axes[1], len(self.stack)
        kernel = jnp.moveaxis(kernel, self.positions, range(stack)) if stack else kernel
        named = self._experts + self._outputs + self._contracted
        order = [*range(stack), *(stack + axes.index(a) for a in named)]
        return kernel.transpose(order).reshape(*self.batch, *self.shape)

    def kernel(self, weight: jax.Array) -> jax.Array:
        """Undo `weight`: W (*batch, N, K) as a kernel."""
        axes, stack = self._experts + self._outputs + self._contracted, len(self.stack)
        order = [*range(stack), *(stack + axes.index(a) for a in self._axes[1])]
        kernel = weight.reshape(*self.stack, *self._sizes(axes)).transpose(order)
        return jnp.moveaxis(kernel, range(stack), self.positions) if stack else kernel

    def rows(self, x: jax.Array) -> jax.Array:
        """Return the layer's input as (..., K), or (E, ..., K): as it is where it is so already."""
        if self.ragged:
            return x
        lead, contracted = self._lead, self._contracted
        x = _transpose(x, self._axes[0], self._experts + lead + contracted)
        if len(self._experts) < 2 and len(contracted) == 1:
            return x
        middle = x.shape[len(self._experts) : x.ndim - len(contracted)]
        return x.reshape(*self._heads(), *middle, self.shape[1])

    def output_rows(self, y: jax.Array) -> jax.Array:
        """Return the layer's output as (..., N), or (E, ..., N); undoes `outputs`."""
        if self.ragged:
            return y
        outputs = self._outputs
        y = _transpose(y, self._axes[2], self._experts + self._lead + outputs)
        middle = y.shape[len(self._experts) : y.ndim - len(outputs)]
        return y.reshape(*self._heads(), *middle, self.shape[0])

    def outputs(self, y: jax.Array) -> jax.Array:
        """Return (..., N), or (E, ..., N), as the layer's output."""
        if self.ragged:
            return y
        middle = y.shape[len(self._heads()) : -1]
        y = y.reshape(*self._sizes(self._experts), *middle, *self._sizes(self._outputs))
        return _transpose(y, self._experts + self._lead + self._outputs, self._axes[2])

    def bias(self, bias: jax.Array, ndim: int) -> jax.Array:
        """Return a bias in the order of the output's axes: (1, ..., N), or (E, 1, ..., N)."""
        mine = [a for a in self._axes[2] if a in self._axes[1]]
        wanted = self._experts + self._outputs
        bias = _transpose(bias.reshape(self._sizes(mine)), mine, wanted)
        heads = self._heads()
        ones = (1,) * (ndim - 1 - len(heads))
        return bias.reshape(*heads, *ones, self.shape[0])

    def _heads(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)


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
