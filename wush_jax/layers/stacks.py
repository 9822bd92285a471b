"""The arrays of quantized layers that are stacked elsewhere than along the first axis."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from wush_jax.layers.contraction import Contraction


@dataclass(frozen=True)
class StackLayout:
    """Arrays of layers stacked elsewhere than in front: of the kernel's rank, to be scanned as it.

    Attributes:
      axes: of the stack, in the kernel.
      rank: of one kernel. With it axes counted from either end are the same.
    """

    axes: tuple[int, ...]
    rank: int

    def lay(self, array: jax.Array) -> jax.Array:
        """Return an array (*stack, ...) with its stack at the axes, and a kernel's rank beside."""
        front = len(self.axes)
        stack, own = array.shape[:front], array.shape[front:]
        own = (1,) * (self.rank - len(own)) + own
        own = (-1, *own[len(own) - self.rank + 1 :]) if len(own) > self.rank else own
        return jnp.moveaxis(array.reshape(*stack, *own), range(front), self.axes)

    def undo(self, array: jax.Array, natural: tuple[int, ...]) -> jax.Array:
        """Return the array as it was; of one layer where a scan has taken the stack."""
        if array.ndim == self.rank:
            return array.reshape(natural)
        front = len(self.axes)
        array = jnp.moveaxis(array, self.axes, range(front))
        return array.reshape(*array.shape[:front], *natural)


def stack_of(contraction: Contraction) -> StackLayout | None:
    """Return how a layer's arrays are laid out where its stack is not in front."""
    axes = contraction.positions
    in_front = axes == tuple(range(len(axes)))
    return None if in_front else StackLayout(axes, len(contraction.own_shape))
