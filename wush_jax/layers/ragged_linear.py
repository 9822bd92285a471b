"""Dense layers of many experts that read rows sorted by expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wush_jax.layers.contraction import Contraction
from wush_jax.layers.dense import Dense
from wush_jax.layers.ragged import bias_of_rows


class RaggedLinear(nnx.Module):
    """``y_m = x_m W_e + b_e``, e the expert of row m: a linear layer for each of E experts.

    Args:
      in_features: K.
      out_features: N.
      experts: E.
      use_bias: whether there is b.
      dtype: of the product; None promotes input and kernel.
      param_dtype: of kernel (E, K, N) and bias (E, N).
      rngs: random streams of the initial weights.

    >>> layer = RaggedLinear(2, 3, experts=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 2)), jnp.array([1, 0, 2, 2])).shape
    (5, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        experts: int,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.dtype = dtype
        initial = nnx.initializers.lecun_normal(batch_axis=0)
        shape = experts, in_features, out_features
        self.kernel = nnx.Param(initial(rngs.params(), shape, param_dtype))
        self.bias = nnx.data(
            nnx.Param(jnp.zeros((experts, out_features), param_dtype)) if use_bias else None
        )

    def dense_view(self) -> Dense:
        """Return what quantization sees: an expert's kernel for each of its rows."""
        kernel = self.kernel.get_value()
        contraction = Contraction("mk,ekn->mn", kernel.shape, ragged=True)
        return Dense(contraction, kernel, self.bias, self.dtype)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Map rows (M, K), sorted by expert, to (M, N).

        Args:
          x: the first ``group_sizes[0]`` rows belong to expert 0, and so on.
          group_sizes: (E,) integers that sum to M.
        """
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        y = lax.ragged_dot(x.astype(dtype), kernel.astype(dtype), group_sizes)
        return y if self.bias is None else y + bias_of_rows(self.bias[...], group_sizes, y)
