"""What a moment and a constructed transform must be, said at the call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wush_jax.formats import elements
from wush_jax.formats.checks import check_arrays, check_number


def check_moments(weight_moment, activation_moment, damping) -> None:
    """Raise ValueError unless the two moments are finite, square blocks that fit each other."""
    check_arrays(weight_moment=weight_moment, activation_moment=activation_moment)
    for name, m in (("weight_moment", weight_moment), ("activation_moment", activation_moment)):
        if jnp.ndim(m) < 2 or m.shape[-1] != m.shape[-2] or m.shape[-1] == 0:
            raise ValueError(f"{name} has shape {jnp.shape(m)}; it must be (..., d, d)")
        check_finite(name, m)
    if weight_moment.shape[-1] != activation_moment.shape[-1]:
        raise ValueError(
            f"weight_moment {weight_moment.shape} and activation_moment {activation_moment.shape} "
            "have different block sizes d"
        )
    if weight_moment.shape != activation_moment.shape:
        raise ValueError(
            f"weight_moment {weight_moment.shape} and activation_moment {activation_moment.shape} "
            "have different numbers of blocks; give one of each for every block"
        )
    if isinstance(damping, jax.Array) and damping.ndim == 0:
        return
    check_number(damping=damping)
    if not damping >= 0:
        raise ValueError(f"damping={damping} must be non-negative")


def check_balance(balance: float) -> None:
    """Raise ValueError unless a balance is from 0 to 2."""
    check_number(balance=balance)
    if not 0 <= balance <= 2:
        raise ValueError(
            f"balance={balance} must be from 0 (all of S on the activations) to 2 (all of it on "
            "the weights); 1 is WUSH"
        )


def check_finite(name: str, x: jax.Array) -> None:
    """Raise ValueError when a concrete array holds NaN or infinities (tracers pass)."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # a constant under jit is no tracer
        bad = elements.not_finite(x)
    if bad:
        raise ValueError(
            f"{name} {jnp.shape(x)} has {bad} non-finite values; find the layer or batch that "
            "produced them and remove it"
        )


def check_weight(name: str, weight: jax.Array) -> None:
    """Raise ValueError, with the layer's name, when its weight holds NaN or infinities."""
    if bad := elements.not_finite(weight):
        raise ValueError(
            f"layer {name}: its weight has non-finite values, {bad} of {jnp.shape(weight)}; mend "
            "the checkpoint"
        )


def check_finite_result(name: str, x: jax.Array, damping) -> None:
    """Raise ValueError when a construction failed for want of damping (tracers pass)."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        bad = elements.not_finite(x)
    if bad:
        raise ValueError(
            f"{name}={damping} leaves a moment that is not positive definite; use a larger "
            "damping, such as 1e-2"
        )
