"""The transforms in closed form: identity, rotations, Hadamard, WUS and WUSH."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from wush_jax.formats.checks import check_dtype, check_kind, check_size
from wush_jax.transforms import linalg
from wush_jax.transforms.checks import check_balance, check_finite_result, check_moments
from wush_jax.transforms.pair import BlockTransform


def identity_transform(d: int, dtype=jnp.float32) -> BlockTransform:
    """Return ``T = I``, (d, d), shared by all blocks.

    Raises:
      ValueError: d is no whole number above zero, or dtype no type of floating-point numbers.

    >>> identity_transform(2).weight.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_size(d=d)
    check_dtype(dtype=dtype)
    eye = jnp.eye(d, dtype=dtype)
    return BlockTransform(eye, eye)


def random_transform(key: jax.Array, d: int, dtype=jnp.float32) -> BlockTransform:
    """Return a random rotation, Haar-distributed, (d, d), shared by all blocks: ``T T^T = I``.

    Args:
      key: a `jax.random.key`.
      d: block size.
      dtype: of the result.

    Raises:
      ValueError: as `identity_transform`; or a key that is none.

    >>> random_transform(jax.random.key(0), 4).activation.shape
    (4, 4)
    """
    check_size(d=d)
    check_dtype(dtype=dtype)
    _check_key(key)
    # There is no QR of types narrower than float32.
    wide = jnp.promote_types(dtype, jnp.float32)
    rotation = jax.random.orthogonal(key, d, dtype=wide).astype(dtype)
    return BlockTransform(rotation, rotation)


def _check_key(key: jax.Array) -> None:
    """Raise ValueError unless a key is one, of the new kind or of the old, traced or not."""
    dtype: Any = getattr(key, "dtype", None)
    ndim = getattr(key, "ndim", None)
    new = isinstance(key, jax.Array) and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0
    if not new and (dtype != jnp.uint32 or ndim != 1):
        raise ValueError(f"key is {key!r:.60}; give one such as jax.random.key(0)")


def hadamard_transform(d: int, dtype=jnp.float32) -> BlockTransform:
    """Return the normalised Hadamard matrix, (d, d), shared by all blocks.

    Raises:
      ValueError: as `identity_transform`; or there is no Hadamard matrix of size d (see
        `wush_jax.hadamard_matrix`).

    >>> hadamard_transform(4).activation[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    check_dtype(dtype=dtype)
    h = jnp.asarray(linalg.hadamard_numpy(d, "d"), dtype)
    return BlockTransform(h, h)


def wush_transform(
    weight_moment: jax.Array,
    activation_moment: jax.Array,
    *,
    damping: float = 1e-2,
    hadamard: bool = True,
    balance: float = 1.0,
) -> BlockTransform:
    """Return the near-optimal transform pair of the WUSH paper in closed form.

    With ``W' W'^T = M_W`` and ``X' X'^T = M_X`` (damped) and ``W'^T X' = U S V^T``::

        T_X = H S^(-b/2) U^T W'^T        T_W = H S^(b/2-1) V^T X'^T = T_X^-T

    With b = 1 both second moments become ``H S H^T``: weights and activations balanced, every
    channel with power ``tr(S)/d``. Otherwise activations have ``H S^(2-b) H^T`` and weights
    ``H S^b H^T``. Built in float64, returned as float32.

    Args:
      weight_moment: M_W (..., d, d), second moment of the weights of a block over the outputs.
      activation_moment: M_X (..., d, d), second moment of the inputs of a block over the tokens.
      damping: lambda; ``lambda * mean(diag M)`` is added to both diagonals.
      hadamard: False drops H (the paper's WUS).
      balance: b, from 0 (weights become white, activations keep all of S) to 2 (the other way
        round).

    Returns:
      `BlockTransform` of two (..., d, d) arrays.

    Raises:
      ValueError: shapes differ or are not square, a moment is not finite, there is no Hadamard
        matrix of size d, a balance outside 0 to 2, or a damped moment is not positive definite.

    Source: WUSH (arXiv 2512.00956), eq. 5-8; balance: lambda of KBBQ.

    >>> m = jnp.diag(jnp.float32([4.0, 1.0]))
    >>> t = wush_transform(m, m)
    >>> jnp.allclose(linalg.matmul(t.activation, t.weight.T), jnp.eye(2), atol=1e-5).item()
    True
    """
    check_balance(balance)
    check_kind(bool, "True or False", hadamard=hadamard)
    power = -0.5 * float(balance)
    return _spectral_transform(weight_moment, activation_moment, damping, power, hadamard)


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
        h = jnp.asarray(linalg.hadamard_numpy(weight_moment.shape[-1], "d"))
        activation, weight = linalg.matmul(h, activation), linalg.matmul(h, weight)
    return activation, weight
