"""Where a value of a traced program comes from, as long as it was only moved about.

A layer stacked for a scan calls one of many kernels. Which one, and which axis of the parameter the
stack is, shows in what happened to the parameter on its way to the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, eq=False)
class Origin:
    """A value that is a parameter of the model, or a part of it.

    Attributes:
      leaf: which argument of the program it was.
      axes: for every axis of the value the parameter's own; None for one of size 1 that was added.
      taken: axes of the parameter that are gone, with the position that was taken.
    """

    leaf: int
    axes: tuple[int | None, ...]
    taken: tuple[tuple[int, Any], ...] = ()

    def same(self, other: Origin | None) -> bool:
        """Whether both are the same part of the same parameter."""
        return (
            other is not None
            and (self.leaf, self.axes) == (other.leaf, other.axes)
            and len(self.taken) == len(other.taken)
            and all(
                axis == there and (at is position or (at is not None and _equal(at, position)))
                for (axis, at), (there, position) in zip(self.taken, other.taken, strict=True)
            )
        )

    def take(self, axis: int, position: Any) -> Origin:
        """Return the origin of the slice of size 1 along one of the value's axes."""
        axes = list(self.axes)
        own, axes[axis] = axes[axis], None
        taken = self.taken if own is None else (*self.taken, (own, position))
        return replace(self, axes=tuple(axes), taken=taken)

    def drop(self, axes: Sequence[int]) -> Origin:
        """Return the origin without axes of size 1."""
        found = self
        for axis in axes:
            found = found.take(axis, 0)
        return replace(found, axes=tuple(a for i, a in enumerate(found.axes) if i not in axes))

    def put_back(self, position: Any) -> Origin | None:
        """Return the origin of the values at all positions, stacked in front; None if they are not
        from one axis."""
        if not self.taken or self.taken[-1][1] is not position:
            return None
        *rest, (axis, _) = self.taken
        return replace(self, axes=(axis, *self.axes), taken=tuple(rest))


def _equal(one: Any, two: Any) -> bool:
    return isinstance(one, int) and isinstance(two, int) and one == two


# Primitives whose results are their operands, one by one, as far as places go.
SAME = (
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "optimization_barrier"),
    *("device_put", "pvary", "pcast", "sharding_constraint", "mesh_cast", "reshard"),
)


def moved(equation: Any, arrays: Sequence[Any], origins: Sequence[Origin | None]) -> list:
    """Return the origins of an equation's results.

    Args:
      equation: of a jaxpr, without a jaxpr inside.
      arrays: its operands.
      origins: of the operands.
    """
    count, name, p = len(equation.outvars), equation.primitive.name, equation.params
    nothing: list[Origin | None] = [None] * count
    first = origins[0] if origins else None
    if first is None and name != "optimization_barrier" and name != "device_put":
        return nothing
    if name in SAME:
        return list(origins[:count])
    rule = _RULES.get(name)
    return nothing if rule is None else rule(first, p, equation, arrays)


def _transpose(origin, p, equation, arrays):
    return [replace(origin, axes=tuple(origin.axes[i] for i in p["permutation"]))]


def _squeeze(origin, p, equation, arrays):
    return [origin.drop(p["dimensions"])]


def _broadcast(origin, p, equation, arrays):
    places, shape = p["broadcast_dimensions"], equation.invars[0].aval.shape
    if any(p["shape"][i] != size for i, size in zip(places, shape, strict=True)):
        return [None]
    if any(size != 1 for i, size in enumerate(p["shape"]) if i not in places):
        return [None]
    axes = dict(zip(places, origin.axes, strict=True))
    return [replace(origin, axes=tuple(axes.get(i) for i in range(len(p["shape"]))))]


def _reshape(origin, p, equation, arrays):
    before, after = equation.invars[0].aval.shape, tuple(p["new_sizes"])
    if before == after:
        return [origin]
    if [n for n in before if n != 1] != [n for n in after if n != 1] or p["dimensions"]:
        return [None]
    origin = origin.drop([i for i, n in enumerate(before) if n == 1])
    kept = iter(origin.axes)
    return [replace(origin, axes=tuple(None if n == 1 else next(kept) for n in after))]


def _slice(origin, p, equation, arrays):
    return [_window(origin, equation, p["start_indices"])]


def _dynamic_slice(origin, p, equation, arrays):
    return [_window(origin, equation, arrays[1 : 1 + len(origin.axes)])]


def _window(origin, equation, starts):
    """A slice that takes one position, or all, of every axis."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            if new != 1:
                return None
            origin = origin.take(axis, starts[axis])
    return origin


def _unstack(origin, p, equation, arrays):
    axis = p["axis"]
    return [origin.take(axis, i).drop([axis]) for i in range(len(equation.outvars))]


def _split(origin, p, equation, arrays):
    if any(size != 1 for size in p["sizes"]):
        return [None] * len(equation.outvars)
    return [origin.take(p["axis"], i) for i in range(len(equation.outvars))]


_RULES = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "unstack": _unstack,
    "split": _split,
}
