"""Root-mean-square norms: times w, or times 1 + w."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wush_jax.models.config import LlamaConfig


class OffsetRMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * (1 + w)`` over the last axis, in float32.

    Args:
        size: of the last axis.
        epsilon: added to the mean square.
        dtype: of the result.
        param_dtype: of w.
        rngs: not used; norms begin with w = 0.

    Source: Gemma (2024).

    >>> OffsetRMSNorm(2, epsilon=0.0)(jnp.array([3.0, 3.0])).tolist()
    [1.0, 1.0]
    """

    def __init__(self, size, *, epsilon, dtype=jnp.float32, param_dtype=jnp.float32, rngs=None):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.zeros(size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (..., size)."""
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


def norm(config: LlamaConfig, size: int, **kinds) -> nnx.Module:
    """Return the norm that a decoder's config asks for, of a last axis of a size."""
    kind = OffsetRMSNorm if config.offset_norms else nnx.RMSNorm
    return kind(size, epsilon=config.rms_norm_eps, **kinds)
