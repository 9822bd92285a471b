"""A call of a tagged layer in a traced program: which kernels of it, on which rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from wush_jax.layers.origins import Origin
from wush_jax.layers.tagging import Tag
from wush_jax.transforms.grouped import GroupedRows

Rows = jax.Array | GroupedRows


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a tagged layer.

    Attributes:
      tag: of the layer.
      x: the input, or the output where that is tagged; batched by `jax.vmap` where `batched` says.
      kernel_shape: of the kernel, batched likewise.
      origin: of the kernel.
      batched: axes that `jax.vmap` added, as (axis of x or None, axis of kernel or None).
      sizes: of the groups in which a ragged layer's rows come; one array, or none.
    """

    tag: Tag
    x: jax.Array
    kernel_shape: tuple[int, ...]
    origin: Origin | None
    batched: tuple[tuple[int | None, int | None], ...]
    sizes: tuple[jax.Array, ...] = ()

    @property
    def fault(self) -> str:
        """Why the call cannot be observed; empty where it can."""
        if self.tag.reason:
            return self.tag.reason
        if self.sizes and self.batched:
            return "its rows are sorted by expert inside of jax.vmap"
        if self.origin is None:
            return "its kernel is computed by the model from its parameters"
        own, mapped = self._axes()
        stack = [*mapped, *(axis for axis, _ in self.origin.taken)]
        every = [*own, *stack]
        if None in every or len(set(every)) != len(every) or own != sorted(own):
            return "its kernel is turned about before the call"
        return ""

    def _axes(self) -> tuple[list, list]:
        """The kernel's own axes, and those that vmap took, outermost first."""
        assert self.origin is not None
        own, mapped = list(self.origin.axes), []
        for _, axis in reversed(self.batched):
            if axis is not None:
                mapped.append(own.pop(axis))
        return own, mapped

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes of the parameter that a scan or a vmap takes away before the call."""
        assert self.origin is not None
        return tuple(sorted([*self._axes()[1], *(axis for axis, _ in self.origin.taken)]))

    @property
    def index(self) -> tuple[Any, ...]:
        """Which kernels of the stack are called: a position, or all of them, for every axis."""
        assert self.origin is not None
        taken = dict(self.origin.taken)
        return tuple(taken.get(axis, slice(None)) for axis in self.stack)

    def rows(self) -> Rows:
        """The input as rows (*mapped stack, [experts], ..., K), or sorted by expert."""
        contraction = self.tag.contraction
        assert contraction is not None
        if self.sizes:
            return GroupedRows(self.x, *self.sizes)
        return self._arranged(contraction.rows)

    def output_rows(self) -> jax.Array:
        """Where x is an output, or like one: rows (*mapped stack, [experts], ..., N)."""
        contraction = self.tag.contraction
        assert contraction is not None
        return self._arranged(contraction.output_rows)

    def _arranged(self, rows: Callable) -> jax.Array:
        """Rows of x, those of each kernel of the mapped stack, by a function for one call."""
        contraction = self.tag.contraction
        assert contraction is not None
        for axis, _ in self.batched:
            if axis is not None:
                rows = jax.vmap(rows, in_axes=axis)
        out, shape = rows(self.x), list(self.kernel_shape)
        mapped = self._axes()[1]
        sizes: list[int] = []
        labels: list[Any] = []
        for axis, kernel_axis in reversed(self.batched):
            if kernel_axis is not None:
                sizes.append(shape.pop(kernel_axis))
            if axis is None:  # the same input for all kernels
                out = jnp.broadcast_to(
                    jnp.expand_dims(out, len(labels)),
                    (*out.shape[: len(labels)], sizes[-1], *out.shape[len(labels) :]),
                )
            labels.append(None if kernel_axis is None else mapped[len(sizes) - 1])
        heads = [] if contraction.experts is None else [len(labels)]
        front = [labels.index(axis) for axis in sorted(mapped)] + heads
        rest = [i for i in range(out.ndim) if i not in front]
        return out.transpose(front + rest)

    def own_rows(self) -> Any:
        """Shapes and dtypes of the rows of one of the stack's kernels."""
        gone = len(self._axes()[1])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[gone:], leaf.dtype),
            jax.eval_shape(self.rows),
        )

    def fold(self, seen: Any, function: Callable[[Any, Rows], Any]) -> Any:
        """Return what was seen of all the stack's kernels with this call's rows added.

        Args:
          seen: arrays with the leading axes of the stack.
          function: from (seen of one kernel, rows of one kernel) to what is seen then.
        """
        index = self.index
        for part in index:
            if isinstance(part, slice):
                function = jax.vmap(function)
        if all(isinstance(part, slice) for part in index):
            return function(seen, self.rows())
        new = function(jax.tree.map(lambda leaf: leaf[index], seen), self.rows())
        return jax.tree.map(lambda leaf, now: leaf.at[index].set(now), seen, new)
