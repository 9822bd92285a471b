"""Gradients by the outputs of dense layers: measured where the backward pass meets them.

No such gradient is kept: every tagged output passes an identity with a second argument of zeros,
whose cotangent is what is measured of the output's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.layers.calls import Call
from wush_jax.layers.dense import Dense
from wush_jax.layers.interpreter import Interpreter, Seen
from wush_jax.layers.meshes import shapes_of
from wush_jax.layers.tagged_run import tagged_program


def squared_norms(gradient: jax.Array) -> jax.Array:
    """Return ``sum_n g_tn^2`` of rows (..., N), one number a token, in float32."""
    gradient = gradient.astype(jnp.float32)
    return jnp.sum(gradient * gradient, axis=-1)


def output_gradients(
    model: nnx.Module,
    batch: Any,
    call: Callable[[nnx.Module, Any], Any],
    layers: Mapping[str, Dense],
    loss: Callable[[Any], jax.Array],
    *,
    measure: Callable[[jax.Array], Any] = squared_norms,
) -> dict[str, Any]:
    """Run a model forward and back, and return what the gradients by its layers' outputs are like.

    A layer that is called more than once has the sum over its calls.

    Args:
      model: an NNX module; it is left as it is.
      batch: passed to the call.
      call: how to run the model.
      layers: those to look at, by path.
      loss: from the list of arrays that the call returns to a scalar.
      measure: from gradients as rows (..., N), or (E, ..., N) of experts, to a pytree of arrays.

    Returns:
      What was measured by path, with the leading axes of a layer's stack.

    Raises:
      NotImplementedError: a layer whose output cannot be followed, by its name.
      ValueError: a model that has no reverse mode, such as one with a while loop.
    """
    program = tagged_program(model, batch, call, layers, outputs=True)
    like: dict[str, Any] = {}

    def note(call: Call, seen: Seen) -> Any:
        path = call.tag.layer
        _check(call)
        own = shapes_of(jax.eval_shape(lambda: _of_one(measure, call)))
        if like.setdefault(path, own) != own:
            raise NotImplementedError(
                f"layer {path} is called with {own} and with {like[path]}: gradients are measured "
                "where all calls of a layer are alike"
            )
        return call.x

    jax.eval_shape(lambda: program.run(_quiet(note), {})[0])
    if lost := sorted(set(layers) - set(like)):
        raise NotImplementedError(f"layer {lost[0]} returns no array whose gradient is known")
    zeros = {
        path: jax.tree.map(
            lambda leaf, path=path: jnp.zeros(layers[path].contraction.stack + leaf.shape), own
        )
        for path, own in like.items()
    }

    def probe(call: Call, seen: Seen) -> Any:
        own = jax.tree.map(lambda leaf: leaf[call.index], seen[call.tag.layer])
        return _passed(call, measure)(call.x, own)

    def scalar(zeros: Any) -> jax.Array:
        return loss(program.run(_quiet(probe), zeros)[0])

    try:
        return jax.grad(scalar)(zeros)
    except ValueError as error:
        if "Reverse-mode" not in str(error):
            raise
        raise ValueError(f"the model has no gradient: {error}") from error


def _quiet(output: Callable[[Call, Seen], Any]) -> Interpreter:
    return Interpreter(lambda call, seen: seen, output=output)


def _check(call: Call) -> None:
    """Refuse calls whose gradients would be lost or mixed up."""
    contraction, path = call.tag.contraction, call.tag.layer
    fault = call.fault
    if contraction is not None and contraction.ragged:
        fault = "has rows sorted by expert"
    if jax.sharding.get_abstract_mesh().manual_axes:
        fault = "is called inside of shard_map"
    if fault:
        raise NotImplementedError(f"layer {path} {fault}: gradients of its output are not measured")


def _measured(measure: Callable, call: Call) -> Any:
    """What is measured of an output, with the axes of the stack that `jax.vmap` took in front."""
    for part in call.index:
        if isinstance(part, slice):
            measure = jax.vmap(measure)
    return measure(call.output_rows())


def _of_one(measure: Callable, call: Call) -> Any:
    """The same for one of these kernels."""
    gone = sum(isinstance(part, slice) for part in call.index)
    return jax.tree.map(lambda leaf: leaf[(0,) * gone], _measured(measure, call))


def _passed(call: Call, measure: Callable) -> Callable[[jax.Array, Any], jax.Array]:
    """Return the identity of an output whose second argument's cotangent is what is measured."""

    @jax.custom_vjp
    def passed(y: jax.Array, zeros: Any) -> jax.Array:
        return y

    def forward(y: jax.Array, zeros: Any) -> tuple[jax.Array, None]:
        return y, None

    def back(_: None, gradient: jax.Array) -> tuple[jax.Array, Any]:
        return gradient, _measured(measure, replace(call, x=gradient))

    passed.defvjp(forward, back)
    return passed
