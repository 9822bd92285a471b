"""Winning accuracy back after rounding: the original model teaches its quantized twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wush_jax.layers.finetune import pack, unpack
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes

Call = Callable[[nnx.Module, Any], jax.Array]


def _call(model: nnx.Module, batch: Any) -> jax.Array:
    return model(batch)  # type: ignore[operator]  # a module that is called


def divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Return the mean over tokens of ``KL(teacher || student)``, in nats.

    Args:
      student: logits (..., V).
      teacher: logits (..., V).

    >>> divergence(jnp.log(jnp.float32([0.5, 0.5])), jnp.log(jnp.float32([0.5, 0.5]))).item()
    0.0
    """
    q, p = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (student, teacher))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def distill(
    student: nnx.Module,
    teacher: nnx.Module,
    batches: Sequence[Any],
    *,
    rate: float = 3e-5,
    call: Call = _call,
    progress: Callable[[int, int, str], Any] | None = None,
) -> list[float]:
    """Train a student's parameters, in place, to predict what its teacher predicts.

    AdamW on `divergence`, one step a batch; the rate falls to zero along half a cosine.

    Args:
      student: a model whose ``nnx.Param`` are trained, as `wush_jax.layers.finetune.unpack` gives.
      teacher: the original model; it stays as it is.
      batches: inputs of both, one for each step.
      rate: the highest learning rate.
      call: how to run a model on a batch; it returns logits (..., V).
      progress: called as ``progress(done, total, "distill")``.

    Returns:
      The divergence before each step.

    Raises:
      ValueError: no batches, a rate that is not positive, or a divergence that is not finite.
    """
    if not len(batches) or not rate > 0:
        raise ValueError(
            f"{len(batches)} batches at rate={rate}: pass at least one batch and a positive rate"
        )
    schedule = optax.cosine_decay_schedule(rate, len(batches))
    optimizer = nnx.Optimizer(student, optax.adamw(schedule, weight_decay=0.0), wrt=nnx.Param)

    @nnx.jit
    def step(student, optimizer, teacher, batch):
        def loss(student):
            return divergence(call(student, batch), call(teacher, batch))

        value, gradient = nnx.value_and_grad(loss)(student)
        optimizer.update(student, gradient)
        return value

    losses = []
    for done, batch in enumerate(batches, start=1):
        losses.append(float(step(student, optimizer, teacher, batch)))
        if not losses[-1] < float("inf"):
            raise ValueError(f"step {done} has a divergence of {losses[-1]}: lower rate={rate}")
        if progress is not None:
            progress(done, len(batches), "distill")
    return losses


def recover(
    quantized: nnx.Module,
    original: nnx.Module,
    batches: Sequence[Any],
    *,
    rate: float = 3e-5,
    call: Call = _call,
    dense_types: DenseTypes = DENSE_TYPES,
    progress: Callable[[int, int, str], Any] | None = None,
) -> tuple[nnx.Module, list[float]]:
    """Train the quantized weights themselves against the original model, and round them again.

    `unpack`, `distill`, `pack`: weights are rounded in every forward pass, gradients pass straight
    through. Norms and embeddings are trained along.

    Args:
      quantized: from `wush_jax.quantize_model`; it stays as it is.
      original: the model that it was made of.
      batches: inputs, one for each step.
      rate: the highest learning rate.
      call: how to run a model on a batch.
      dense_types: module types that are dense layers.
      progress: as for `distill`.

    Returns:
      The model, packed, and the divergence before each step.

    Raises:
      ValueError: as `unpack` and `distill`.

    >>> from wush_jax import Recipe, quantize_model
    >>> model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    >>> stack, x, call = nnx.List([model]), jnp.ones((4, 32)), lambda m, x: m[0](x)
    >>> quantized, _ = quantize_model(stack, [x], Recipe(), call=call)
    >>> better, losses = recover(quantized, stack, [x] * 2, call=call)
    >>> type(better[0]).__name__, len(losses)
    ('QuantizedDense', 2)
    """
    student = unpack(quantized, original, dense_types=dense_types)
    losses = distill(student, original, batches, rate=rate, call=call, progress=progress)
    return pack(student), losses
