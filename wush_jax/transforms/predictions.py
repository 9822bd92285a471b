"""What the theory promises of a transform before anything is quantized: gain and loss."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from wush_jax.formats.checks import check_choice, check_kind
from wush_jax.transforms import linalg
from wush_jax.transforms.checks import check_finite, check_finite_result, check_moments
from wush_jax.transforms.pair import BlockTransform


def predicted_gain(
    weight_moment: jax.Array, activation_moment: jax.Array, *, damping: float = 1e-2
) -> jax.Array:
    """Return ``tr(S)^2 / (d tr(S^2))``: the loss WUSH leaves relative to an orthogonal transform.

    Between 1/d (all power on one axis) and 1 (nothing to gain); floating-point error model,
    squared error of one side, in the coordinates ``y = W'^T x``.

    Args:
      weight_moment: (..., d, d).
      activation_moment: (..., d, d).
      damping: as for `wush_transform`.

    Returns:
      float32 (...).

    Raises:
      ValueError: as `wush_transform`.

    Source: WUSH paper, theorem of the floating-point model.

    >>> predicted_gain(jnp.eye(4), jnp.eye(4)).item()
    1.0
    """
    check_moments(weight_moment, activation_moment, damping)
    gain = _gain(weight_moment, activation_moment, damping)
    check_finite_result("damping", gain, damping)
    return gain


@linalg.float64_construction
@jax.jit
def _gain(weight_moment, activation_moment, damping):
    s = linalg.singular_values(
        linalg.damp(weight_moment, damping), linalg.damp(activation_moment, damping)
    )
    return jnp.sum(s, -1) ** 2 / (s.shape[-1] * jnp.sum(s**2, -1))


def predicted_loss(
    weight_moment: jax.Array,
    activation_moment: jax.Array,
    transform: BlockTransform,
    *,
    model: str = "fp",
) -> jax.Array:
    """Return the output loss, per unit of relative noise variance on one side, of any transform.

    With ``A = T_X M_X T_X^T`` and ``B = T_W M_W T_W^T``:

    - "fp" (error proportional to each value): ``sum_i A_ii B_ii``. WUSH gives ``tr(S)^2 / d``; the
      coordinates ``y = W'^T x`` under any rotation give ``tr(S^2)``.
    - "int" (error proportional to the block's largest magnitude): the bound ``tr(A) tr(B)``, from
      ``E max_i y_i^2 <= E ||y||^2``. WUSH gives ``tr(S)^2``.

    Args:
      weight_moment: (..., d, d), undamped.
      activation_moment: (..., d, d), undamped.
      transform: blocks that broadcast against the moments.
      model: "fp" or "int".

    Returns:
      float32 (...).

    Raises:
      ValueError: shapes that disagree, an unknown model, or a loss that is not finite in float32
        (outside jit).

    Source: WUSH paper, section 3 (both error models).

    >>> from wush_jax.transforms import identity_transform
    >>> predicted_loss(jnp.eye(4), jnp.eye(4), identity_transform(4)).item()
    4.0
    """
    check_choice(("fp", "int"), model=model)
    check_kind(BlockTransform, "a pair, such as wush_transform gives", transform=transform)
    check_moments(weight_moment, activation_moment, 0.0)
    loss = _loss(
        weight_moment, activation_moment, transform.activation, transform.weight, model=model
    )
    check_finite("predicted loss", loss)
    return loss


@linalg.float64_construction
@functools.partial(jax.jit, static_argnames="model")
def _loss(weight_moment, activation_moment, activation, weight, *, model):
    def power(t, m):
        product = linalg.matmul(t, m)
        return jnp.sum(product * jnp.broadcast_to(t, product.shape), axis=-1)

    a, b = power(activation, activation_moment), power(weight, weight_moment)
    return jnp.sum(a * b, -1) if model == "fp" else jnp.sum(a, -1) * jnp.sum(b, -1)
