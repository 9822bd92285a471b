"""Block transforms: identity, rotations, Hadamard, and the closed forms WUS and WUSH.

A `BlockTransform` is a pair (T_X for activations, T_W for weights) with ``T_X T_W^T = I``, so that
``(T_W w)^T (T_X x) = w^T x`` while both sides become easier to quantize. Blocks lie along the last
axis K: ``y_b = x_b @ T_b^T``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference
from wush_jax import linalg, numerics
from wush_jax.linalg import hadamard_matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockTransform:
    """A pair of transforms with ``activation @ weight^T = I`` in every block.

    Attributes:
      activation: T_X, (K/d, d, d) one per block, or (d, d) shared by all blocks.
      weight: T_W = T_X^-T, same shape.
    """

    activation: jax.Array
    weight: jax.Array

    @property
    def block_size(self) -> int:
        """Channels per block, d."""
        return self.activation.shape[-1]

    def astype(self, dtype) -> BlockTransform:
        """Round T_X to ``dtype`` and return it with the exact inverse transpose of what it became.

        A transform rounded for run time must be rounded before the weights meet its inverse.
        """
        if dtype == self.activation.dtype:
            return self
        info = jnp.finfo(dtype)
        # Not a cast there and back: XLA may delete that, and T_W would belong to another T_X.
        rounded = lax.reduce_precision(self.activation, info.nexp, info.nmant)
        weight = inverse_transpose(rounded)
        for t in (rounded, weight):
            check_finite(f"transform rounded to {jnp.dtype(dtype).name}, or its inverse,", t)
        return BlockTransform(rounded.astype(dtype), weight)


@linalg.float64_construction
@jax.jit
def inverse_transpose(matrix: jax.Array) -> jax.Array:
    """Return ``T^-T`` of each block (..., d, d), computed in float64, as float32.

    >>> inverse_transpose(jnp.float32([[2.0, 0.0], [0.0, 4.0]])).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    return linalg.inverse(matrix).mT


def identity_transform(d: int, dtype=jnp.float32) -> BlockTransform:
    """Return ``T = I``, (d, d), shared by all blocks.

    >>> identity_transform(2).weight.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    eye = jnp.eye(d, dtype=dtype)
    return BlockTransform(eye, eye)


def random_transform(key: jax.Array, d: int, dtype=jnp.float32) -> BlockTransform:
    """Return a random rotation, Haar-distributed, (d, d), shared by all blocks: ``T T^T = I``.

    Args:
      key: a `jax.random.key`.
      d: block size.
      dtype: of the result.

    >>> random_transform(jax.random.key(0), 4).activation.shape
    (4, 4)
    """
    # There is no QR of types narrower than float32.
    wide = jnp.promote_types(dtype, jnp.float32)
    rotation = jax.random.orthogonal(key, d, dtype=wide).astype(dtype)
    return BlockTransform(rotation, rotation)


def hadamard_transform(d: int, dtype=jnp.float32) -> BlockTransform:
    """Return the normalised Hadamard matrix, (d, d), shared by all blocks.

    Raises:
      ValueError: there is no Hadamard matrix of size d (see `hadamard_matrix`).

    >>> hadamard_transform(4).activation[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    h = hadamard_matrix(d, dtype)
    return BlockTransform(h, h)


def wush_transform(
    weight_moment: jax.Array,
    activation_moment: jax.Array,
    *,
    damping: float = 1e-2,
    hadamard: bool = True,
) -> BlockTransform:
    """Return the near-optimal transform pair of the WUSH paper in closed form.

    With ``W' W'^T = M_W`` and ``X' X'^T = M_X`` (damped) and ``W'^T X' = U S V^T``::

        T_X = H S^(-1/2) U^T W'^T        T_W = H S^(-1/2) V^T X'^T = T_X^-T

    Both second moments become ``H S H^T``: weights and activations balanced, every channel with
    power ``tr(S)/d``. Built in float64, returned as float32.

    Args:
      weight_moment: M_W (..., d, d), second moment of the weights of a block over the outputs.
      activation_moment: M_X (..., d, d), second moment of the inputs of a block over the tokens.
      damping: lambda; ``lambda * mean(diag M)`` is added to both diagonals.
      hadamard: False drops H (the paper's WUS).

    Returns:
      `BlockTransform` of two (..., d, d) arrays.

    Raises:
      ValueError: shapes differ or are not square, a moment is not finite, there is no Hadamard
        matrix of size d, or a damped moment is not positive definite.

    Source: WUSH (arXiv 2512.00956), eq. 5-8.

    >>> m = jnp.diag(jnp.float32([4.0, 1.0]))
    >>> t = wush_transform(m, m)
    >>> jnp.allclose(linalg.matmul(t.activation, t.weight.T), jnp.eye(2), atol=1e-5).item()
    True
    """
    return _spectral_transform(weight_moment, activation_moment, damping, -0.5, hadamard)


def calibrated_hadamard_transform(
    weight_moment: jax.Array, activation_moment: jax.Array, *, damping: float = 1e-2
) -> BlockTransform:
    """Return ``T_X = H U^T W'^T``: rotate to the principal axes, then spread with H; no scaling.

    Arguments and errors as for `wush_transform`. Source: WUSH paper, figure 1.

    >>> calibrated_hadamard_transform(jnp.eye(2), jnp.eye(2)).activation.shape
    (2, 2)
    """
    return _spectral_transform(weight_moment, activation_moment, damping, 0.0, True)


def whitening_transform(
    weight_moment: jax.Array, activation_moment: jax.Array, *, damping: float = 1e-2
) -> BlockTransform:
    """Return ``T_X = S^-1 U^T W'^T``: activations become white, weights take all of S.

    Arguments and errors as for `wush_transform`. Source: WUSH paper, figure 1.

    >>> whitening_transform(jnp.eye(2), jnp.eye(2)).activation.shape
    (2, 2)
    """
    return _spectral_transform(weight_moment, activation_moment, damping, -1.0, False)


def _spectral_transform(weight_moment, activation_moment, damping, power, hadamard):
    """``T_X = Q S^p U^T W'^T`` and ``T_W = Q S^-(1+p) V^T X'^T`` with Q = H or I."""
    check_moments(weight_moment, activation_moment, damping)
    activation, weight = _construct(
        weight_moment, activation_moment, damping, power=power, hadamard=hadamard
    )
    check_finite_result("damping", activation, damping)
    check_finite_result("damping", weight, damping)
    return BlockTransform(activation, weight)


@linalg.float64_construction
@functools.partial(jax.jit, static_argnames=("power", "hadamard"))
def _construct(weight_moment, activation_moment, damping, *, power, hadamard):
    left, s, right = linalg.spectral_factors(
        linalg.damp(weight_moment, damping), linalg.damp(activation_moment, damping)
    )
    activation = (s**power)[..., None] * left
    weight = (s ** -(1.0 + power))[..., None] * right
    if hadamard:
        h = jnp.asarray(linalg.hadamard_numpy(weight_moment.shape[-1]))
        activation, weight = linalg.matmul(h, activation), linalg.matmul(h, weight)
    return activation, weight


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

    >>> predicted_loss(jnp.eye(4), jnp.eye(4), identity_transform(4)).item()
    4.0
    """
    if model not in ("fp", "int"):
        raise ValueError(f"model={model!r} is unknown; choose 'fp' or 'int'")
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


def apply_transform(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Transform every block of the last axis: ``y_b = x_b @ T_b^T``.

    Args:
      x: (..., K).
      matrix: (K/d, d, d), one per block, or (d, d) shared by all blocks.

    Returns:
      (..., K) in x's dtype; products accumulate in float32 at the highest precision.

    Raises:
      ValueError: the blocks do not tile K, or x is not floating point.

    >>> apply_transform(jnp.float32([1.0, 2.0, 3.0, 4.0]), jnp.float32([[0, 1], [1, 0]])).tolist()
    [2.0, 1.0, 4.0, 3.0]
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; transform floating-point values: cast x first")
    return reference.apply_transform(x, matrix).astype(x.dtype)


def check_moments(weight_moment, activation_moment, damping) -> None:
    """Raise ValueError unless the two moments are finite, square blocks of one size."""
    for name, m in (("weight_moment", weight_moment), ("activation_moment", activation_moment)):
        if jnp.ndim(m) < 2 or m.shape[-1] != m.shape[-2] or m.shape[-1] == 0:
            raise ValueError(f"{name} has shape {jnp.shape(m)}; it must be (..., d, d)")
        check_finite(name, m)
    if weight_moment.shape[-1] != activation_moment.shape[-1]:
        raise ValueError(
            f"weight_moment {weight_moment.shape} and activation_moment {activation_moment.shape} "
            "have different block sizes d"
        )
    if not isinstance(damping, jax.Array) and not damping >= 0:
        raise ValueError(f"damping={damping} must be non-negative")


def check_finite(name: str, x: jax.Array) -> None:
    """Raise ValueError when a concrete array holds NaN or infinities (tracers pass)."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # a constant under jit is no tracer
        bad = int(numerics.not_finite(x))
    if bad:
        raise ValueError(
            f"{name} {jnp.shape(x)} has {bad} non-finite values; find the layer or batch that "
            "produced them and remove it"
        )


def check_finite_result(name: str, x: jax.Array, damping) -> None:
    """Raise ValueError when a construction failed for want of damping (tracers pass)."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        bad = bool(numerics.not_finite(x))
    if bad:
        raise ValueError(
            f"{name}={damping} leaves a moment that is not positive definite; use a larger "
            "damping, such as 1e-2"
        )
