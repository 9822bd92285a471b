"""Tags on dense layers' inputs and outputs: identities that a trace keeps, a program loses.

A tag changes nothing that a model computes, whatever transformation it is called in: it is a
primitive of its own with rules for batching, differentiation and lowering, as jax's
``checkpoint_name`` is. `wush_jax.layers.interpreter` finds tags in a traced program. A tag holds
the layer's kernel beside its input, so that the program itself says which of the layers stacked for
a scan is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.dense import Dense, dotted, is_array, same_call


@dataclass(frozen=True)
class Tag:
    """What is known of a layer's call when it is traced.

    Attributes:
      layer: its dotted path.
      contraction: of the kernel as the call sees it, without a stack; None where `reason` says
        why the layer cannot be quantized.
      reason: empty, or that.
    """

    layer: str
    contraction: Contraction | None
    reason: str = ""


def _identity(name: str) -> Primitive:
    """Return a primitive of operands (x, kernel, ...) -> x.

    Parameters: the `Tag`, and axes that `jax.vmap` has added, innermost first, as (axis of x or
    None, axis of the kernel or None).
    """
    primitive = Primitive(name)
    primitive.def_impl(lambda x, *_, **__: x)
    primitive.def_abstract_eval(lambda x, *_, **__: x)
    mlir.register_lowering(primitive, lambda context, x, *_, **__: [x])

    def batch(operands, axes, *, tag, batched):
        x = primitive.bind(*operands, tag=tag, batched=(*batched, tuple(axes[:2])))
        return x, axes[0]

    def jvp(primals, tangents, **parameters):
        return primitive.bind(*primals, **parameters), tangents[0]

    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    return primitive


# Of an input; ragged layers have their group sizes behind the kernel.
tag_p = _identity("wush_tag")
# Of an output.
output_p = _identity("wush_output")


@dataclass(frozen=True)
class Tagging:
    """How a tagged module tags its input: its path, and its view as a dense layer.

    Attributes:
      path: dotted.
      view: of the module as a dense layer.
      outputs: whether it tags its output, too.
    """

    path: str
    view: Callable[[Any], Dense]
    outputs: bool = False

    def __call__(self, module: nnx.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        """Return a call's arguments with the input tagged."""
        dense = self.view(module)
        given = dict(enumerate(arguments)) | keywords
        arrays = [name for name, value in given.items() if is_array(value)]
        if not arrays:
            return arguments, keywords
        first, others = arrays[0], {n: a for n, a in given.items() if n != arrays[0]}
        sizes: list[Any] = []
        if dense.contraction.ragged and len(arrays) == 2:
            sizes = [jnp.asarray(others.pop(arrays[1]))]
        reason = "" if same_call(dense.contraction, others.values()) else _shown(others)
        tag = Tag(self.path, None if reason else dense.contraction, reason)
        kernel = jnp.asarray(_parameter(module, dense))
        x = jnp.asarray(given[first])
        given[first] = tag_p.bind(x, kernel, *sizes, tag=tag, batched=())
        return tuple(given.pop(i) for i in range(len(arguments))), given

    def output(self, module: nnx.Module, out: Any) -> Any:
        """Return a call's output tagged."""
        if not self.outputs or not is_array(out):
            return out
        dense = self.view(module)
        tag = Tag(self.path, dense.contraction)
        return output_p.bind(out, jnp.asarray(_parameter(module, dense)), tag=tag, batched=())


def _parameter(module: nnx.Module, dense: Dense) -> Any:
    """Return the parameter that shows where a layer's kernel comes from.

    Where the view makes a kernel of several, any of them does: a scan takes all of them alike.
    """
    if dense.source is not None:
        return dense.source
    parameters = jax.tree.leaves(nnx.state(module, nnx.Param))
    own = any(value is dense.kernel for value in parameters) or not parameters
    return dense.kernel if own else parameters[0]


def _shown(arguments: Mapping[Any, Any]) -> str:
    shown = (f"an array {a.shape}" if is_array(a) else repr(a) for a in arguments.values())
    return f"is called with more than its input: {', '.join(shown)}"


@functools.cache
def _tagged(kind: type) -> type:
    """Return a subclass of a module type that tags its input: all else is as it was."""

    def call(self, *arguments, **keywords):
        arguments, keywords = self.tagging(self, arguments, keywords)
        return self.tagging.output(self, kind.__call__(self, *arguments, **keywords))

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def tag_layers(model: nnx.Module, views: Mapping[str, Any], *, outputs: bool = False) -> nnx.Module:
    """Return a copy of a model in which some layers tag their inputs; arrays are not copied.

    Args:
      model: any NNX module.
      views: how to see a layer as a dense one, by its dotted path.
      outputs: whether they tag their outputs, too.

    >>> from wush_jax.layers.nnx import DENSE_TYPES
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> tagged = tag_layers(layer, {"": dict(DENSE_TYPES)[nnx.Linear]})
    >>> str(jax.make_jaxpr(tagged)(jnp.ones(2))).count("wush_tag")
    1
    """
    model = nnx.clone(model)
    for path, module in list(nnx.iter_modules(model)):
        view = views.get(dotted(path))
        if view is not None:
            # The type and not the module: state, attributes and paths stay where models look.
            module.__class__ = _tagged(type(module))
            tagging = Tagging(dotted(path), view, outputs)
            setattr(module, "tagging", tagging)  # noqa: B010  # of the new type
    return model
