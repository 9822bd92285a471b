"""Round to nearest: transform the weight's blocks, quantize, done."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wush_jax.formats import Format, QuantizedArray, quantize
from wush_jax.solvers import scale_search
from wush_jax.transforms import BlockTransform, apply_transform


def rtn(
    weight: jax.Array,
    transform: BlockTransform,
    fmt: Format,
    *,
    scales: str = "rule",
    activation_moment: jax.Array | None = None,
    global_scale: jax.Array | None = None,
) -> QuantizedArray:
    """Return ``q(W T_W^T)``: each row's blocks transformed, each group rounded to nearest.

    Args:
      weight: (N, K).
      transform: blocks that tile K.
      fmt: the weight's format.
      scales: "rule" takes the format's own scale; "sweep" tries its neighbours and keeps the least
        error weighted by ``T_X M_X T_X^T`` inside the group
        (`wush_jax.solvers.scale_search.sweep`).
      activation_moment: M_X (K/d, d, d) for "sweep"; None weights all values alike.
      global_scale: scalar of a larger whole that these rows are a part of; None for the format's
        own, or what these rows derive.

    Returns:
      `QuantizedArray` (N, K), in transformed coordinates.

    Raises:
      ValueError: an unknown ``scales``.

    Source: WUSH paper, eq. 1 (RTN with AbsMax scales).

    >>> from wush_jax import MXFP4, identity_transform
    >>> rtn(jnp.ones((2, 32)), identity_transform(32), MXFP4).shape
    (2, 32)
    """
    if scales not in ("rule", "sweep"):
        raise ValueError(f"scales={scales!r} is unknown; choose 'rule' or 'sweep'")
    moved = apply_transform(weight, transform.weight)
    if scales == "rule":
        return quantize(moved, fmt, global_scale=global_scale)
    moved = moved.astype(jnp.float32)
    metric = None
    if activation_moment is not None:
        metric = scale_search.group_metric(activation_moment, transform.activation, fmt.group_size)
    if global_scale is None:
        global_scale = fmt.derive_global_scale(jnp.max(jnp.abs(moved)))
    global_scale = jnp.asarray(global_scale, jnp.float32)
    codes, stored = scale_search.sweep_array(moved, fmt, global_scale, metric)
    return QuantizedArray(fmt.pack(codes), stored, global_scale, fmt)
