"""What may come before a transform: a residual's addition and RMSNorm, the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return ``x * (rsqrt(mean(x^2) + eps) * weight)`` over the last axis, rounded to x's dtype.

    Args:
      x: (..., K).
      weight: (K,).
      eps: added to the mean square.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return _rounded(wide * (scale * weight.astype(jnp.float32)), x.dtype)


def read(x: jax.Array, norm=None, residual: jax.Array | None = None):
    """Return what is transformed, ``rms_norm(x + residual)``, and the sum, rounded to x's dtype.

    Args:
      x: (..., K).
      norm: (weight (K,), eps), or None for no norm.
      residual: like x, or None for nothing added.
    """
    if residual is not None:
        x = _rounded(x.astype(jnp.float32) + residual.astype(jnp.float32), x.dtype)
    return x if norm is None else rms_norm(x, *norm), x


def _rounded(y, dtype):
    """Cast from float32. Compilers may delete a cast and its reversal, not this."""
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(y, kind.nexp, kind.nmant).astype(dtype)
