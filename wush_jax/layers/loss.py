"""What a packed layer loses on its inputs: absolutely, relative to its output, on usual tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wush_jax.formats.checks import check_arrays, check_kind
from wush_jax.layers.linear import quantized_dot
from wush_jax.solvers.site import PackedWeight
from wush_jax.transforms import linalg

# A value this many times the root mean square of its site makes its token a massive one. Gaussian
# inputs reach 5, heavy-tailed ones 15; the few tokens that models use as a bias go far beyond.
MASSIVE = 32.0


class Powers(NamedTuple):
    """Mean squares over outputs and tokens, in a unit squared: no float32 of theirs overflows.

    Attributes:
      unit: a power of two, as large as the largest output.
      error: of ``q(W) q(x) - W x``.
      output: of ``W x``.
      typical_error: of the error, massive tokens counted as zero.
      typical_output: of the output, likewise.
      typical: share of the tokens that are not massive.
    """

    unit: jax.Array
    error: jax.Array
    output: jax.Array
    typical_error: jax.Array
    typical_output: jax.Array
    typical: jax.Array


def powers(
    weight: jax.Array,
    inputs: jax.Array,
    packed: PackedWeight,
    implementation: str | None = "reference",
) -> Powers:
    """Return the powers of a layer's error and output.

    Args:
      weight: W (N, K), float32.
      inputs: x (..., K), float32.
      packed: the quantized layer.
      implementation: of `quantized_dot`.
    """
    exact = jnp.einsum("...k,nk->...n", inputs, weight, precision=linalg.HIGHEST)
    error = quantized_dot(inputs, packed, implementation=implementation) - exact
    return powers_of(inputs, error, exact)


def powers_of(inputs: jax.Array, error: jax.Array, output: jax.Array) -> Powers:
    """Return the powers of an error (..., N) and an output (..., N), on inputs (..., K)."""
    unit = unit_of(output)
    error, output, inputs = error / unit, output / unit, inputs / unit_of(inputs)
    size = jnp.max(jnp.abs(inputs), axis=-1)
    typical = (size <= MASSIVE * jnp.sqrt(jnp.mean(inputs**2))).astype(jnp.float32)
    lost, power = (jnp.mean(y * y, axis=-1) for y in (error, output))
    return Powers(
        unit,
        jnp.mean(lost),
        jnp.mean(power),
        jnp.mean(lost * typical),
        jnp.mean(power * typical),
        jnp.mean(typical),
    )


def unit_of(x: jax.Array) -> jax.Array:
    """Return the largest power of two up to the largest magnitude; 1 where all is zero.

    >>> unit_of(jnp.float32([3.0, -9.0])).item()
    8.0
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    unit = jnp.ldexp(jnp.float32(1), jnp.frexp(largest)[1] - 1)
    return jnp.where(jnp.isfinite(largest) & (largest > 0), unit, 1)


def over(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Return a ratio of powers; 0 where both are: a dead layer has neither loss nor output."""
    return part / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def layer_loss(
    weight: jax.Array,
    inputs: jax.Array,
    packed: PackedWeight,
    *,
    relative: bool = False,
    massive: bool = True,
    implementation: str | None = "reference",
) -> jax.Array:
    """Return the layer's output loss ``||q(W)q(X) - W X||_F^2 / (N * tokens)``.

    Args:
      weight: the original W (N, K).
      inputs: X (..., K).
      packed: the quantized layer.
      relative: divide by the output's power ``||W X||_F^2 / (N * tokens)``.
      massive: count tokens with a value beyond 32 times the root mean square of all values, of
        which language models have a few and whose loss drowns that of the others.
      implementation: of `quantized_dot`.

    Returns:
      float32 scalar.

    Raises:
      ValueError: K of the inputs and the weights differ, or (N, K) of the two weights.

    Source: WUSH paper, eq. 1.

    >>> from wush_jax import Recipe, quantize_weight
    >>> w = jnp.eye(32)
    >>> packed = quantize_weight(w, None, Recipe(transform="identity"))
    >>> layer_loss(w, jnp.ones((4, 32)), packed).item()
    0.0
    >>> layer_loss(w, 0.9 * jnp.ones((4, 32)), packed, relative=True).item()  # (1 - 0.9)^2 / 0.9^2
    0.012345...
    """
    check_arrays(weight=weight, inputs=inputs)
    check_kind(PackedWeight, "what wush_jax.quantize_weight gives", packed=packed)
    if weight.shape != packed.shape:
        raise ValueError(
            f"weight has shape {weight.shape}, packed {packed.shape}: give the (N, K) matrix that "
            "was quantized"
        )
    if inputs.ndim == 0 or inputs.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"inputs has shape {inputs.shape}; give (..., K) with K={weight.shape[-1]} of weight"
        )
    inputs, weight = inputs.astype(jnp.float32), weight.astype(jnp.float32)
    found = powers(weight, inputs, packed, implementation)
    lost, power, share = found.error, found.output, jnp.float32(1)
    if not massive:
        lost, power, share = found.typical_error, found.typical_output, found.typical
    return over(lost, power) if relative else over(lost, share) * found.unit * found.unit
