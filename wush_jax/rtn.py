"""Round to nearest: transform the weight's blocks, quantize, done."""

from __future__ import annotations

import jax

from wush_jax.formats import Format, QuantizedArray, quantize
from wush_jax.transforms import BlockTransform, apply_transform


def rtn(weight: jax.Array, transform: BlockTransform, fmt: Format) -> QuantizedArray:
    """Return ``q(W T_W^T)``: each row's blocks transformed, each group rounded to nearest.

    Args:
      weight: (N, K).
      transform: blocks that tile K.
      fmt: the weight's format.

    Returns:
      `QuantizedArray` (N, K), in transformed coordinates.

    Source: WUSH paper, eq. 1 (RTN with AbsMax scales).

    >>> import jax.numpy as jnp
    >>> from wush_jax import MXFP4, identity_transform
    >>> rtn(jnp.ones((2, 32)), identity_transform(32), MXFP4).shape
    (2, 32)
    """
    return quantize(apply_transform(weight, transform.weight), fmt)
