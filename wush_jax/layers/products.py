"""Products of a traced program by parameters: which they are, and how to put another one there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from wush_jax.layers.interpreter import Interpreter, Seen, Value
from wush_jax.layers.tagging import tag_p


@dataclass(frozen=True)
class Product:
    """How a program multiplies by a parameter.

    Attributes:
      equation: as `Contraction` has it.
      ragged: rows come sorted by expert.
      dtype: of the operands.
    """

    equation: str
    ragged: bool
    dtype: Any


@dataclass(frozen=True, eq=False)
class Use:
    """An equation that multiplies by a parameter.

    ``place`` is the parameter's operand, ``taken`` its expert in a loop over them.
    """

    equation: Any
    place: int
    leaf: int
    product: Product
    taken: tuple[Any, ...] = ()

    def input(self, x: jax.Array) -> jax.Array:
        """Return the other operand with experts in front and contracted axes at the end."""
        if self.product.ragged:
            return x
        contracted, batch = self._axes(1 - self.place)
        free = [i for i in range(x.ndim) if i not in (*contracted, *batch)]
        return x.transpose(*batch, *free, *contracted)

    def output(self, y: jax.Array) -> jax.Array:
        """Return the layer's output (experts, ..., N) as the equation has it."""
        if self.place == 0 and not self.product.ragged:
            contracted, batch = self._axes(0)
            outputs = self.equation.invars[0].aval.ndim - len(contracted) - len(batch)
            y = jnp.moveaxis(y, range(-outputs, 0), range(len(batch), len(batch) + outputs))
        return y.astype(self.equation.outvars[0].aval.dtype)

    def _axes(self, side: int) -> tuple:
        contracted, batch = self.equation.params["dimension_numbers"]
        return tuple(contracted[side]), tuple(batch[side])


def use_of(equation: Any, values: list[Value]) -> Use | None:
    """Return how an equation multiplies by one parameter; None where it is no such product."""
    name, p = equation.primitive.name, equation.params
    places = [i for i, v in enumerate(values) if v.origin is not None]
    if len(places) != 1 or name not in ("dot_general", "ragged_dot_general"):
        return None
    place, origin = places[0], values[places[0]].origin
    assert origin is not None
    taken = tuple(position for _, position in origin.taken)
    if name == "dot_general":
        contracted, batch = (axes[place] for axes in p["dimension_numbers"])
        groups: tuple[int, ...] = tuple(batch)
        usual = len(groups) <= 1
    else:
        numbers = p["ragged_dot_dimension_numbers"]
        contracted, batch = (axes[place] for axes in numbers.dot_dimension_numbers)
        groups, sorted_axes = tuple(numbers.rhs_group_dimensions), numbers.lhs_ragged_dimensions
        usual = place == 1 and not batch and tuple(sorted_axes) == (0,) and len(groups) == 1
        usual = usual and values[0].array.ndim == 2 and p["group_offset"] is None and not taken
    axes, ragged = origin.axes, name != "dot_general"
    outputs = [i for i in range(len(axes)) if i not in (*contracted, *groups)]
    usual = usual and None not in axes and len(contracted) > 0 and len(outputs) > 0
    usual = usual and not (ragged and len(axes) > 3)
    looped = len(taken) == 1 and not groups and origin.taken[0][0] == 0
    if not usual or (taken and not looped):
        return None
    used = (*groups, *contracted, *outputs)
    names = "eklmnopqrst"[1 - len(groups) :]
    letters = {axes[i]: name for i, name in zip(used, names[: len(used)], strict=True)}
    named = ["".join(letters[axes[i]] for i in side) for side in (groups, contracted, outputs)]
    head, rows = (named[0], "...") if not ragged else ("", "z")
    kernel = "".join(letters[axis] for axis in sorted(letters))
    equation_of = f"{head}{rows}{named[1]},{kernel}->{head}{rows}{named[2]}"
    product = Product(equation_of, ragged, jnp.dtype(values[place].array.dtype))
    return Use(equation, place, origin.leaf, product, taken)


Multiply = Callable[[Use, list[Value]], Any]


@dataclass(frozen=True, eq=False)
class Products(Interpreter):
    """Evaluates a program, and products by its parameters in a way of its own where there is one.

    Attributes:
      multiply: returns the product of such an equation, or None to leave it as it is.
    """

    multiply: Multiply = lambda use, values: None

    def evaluate(self, equation: Any, values: list[Value], seen: Seen) -> tuple[list[Value], Seen]:
        """Evaluate one equation."""
        use = use_of(equation, values)
        product = None if use is None else self.multiply(use, values)
        if equation.primitive is tag_p:  # of a layer inside, for whoever observes the whole model
            product = tag_p.bind(*(v.array for v in values), **equation.params)
        if product is not None:
            return [Value(product)], seen
        return super().evaluate(equation, values, seen)
