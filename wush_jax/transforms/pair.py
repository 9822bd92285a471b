"""A pair of block transforms, (T_X for activations, T_W for weights), and its application.

``T_X T_W^T = I``, so that ``(T_W w)^T (T_X x) = w^T x`` while both sides become easier to quantize.
Blocks lie along the last axis K: ``y_b = x_b @ T_b^T``.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference
from wush_jax.formats.checks import check_arrays
from wush_jax.transforms import linalg
from wush_jax.transforms.checks import check_finite


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
    check_arrays(x=x, matrix=matrix)
    x, matrix = jnp.asarray(x), jnp.asarray(matrix)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; transform floating-point values: cast x first")
    if x.ndim == 0 or matrix.ndim < 2 or 0 in matrix.shape:
        raise ValueError(
            f"x has shape {x.shape}, matrix {matrix.shape}; give x as (..., K) and matrix as "
            "(d, d) or (K/d, d, d)"
        )
    return reference.apply_transform(x, matrix).astype(x.dtype)
