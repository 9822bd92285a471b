"""Every operation stated in plain JAX: the definition, the fallback, the oracle of all kernels.

The number format is an argument: a frozen object with ``group_size``, ``holds``, ``encode``,
``decode``, ``pack`` and ``unpack`` in pure jax.numpy (see `wush_jax.formats.Format`).
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import folded

HIGHEST = lax.Precision.HIGHEST


def apply_transform(x: jax.Array, matrix: jax.Array | None) -> jax.Array:
    """Return ``y_b = x_b @ T_b^T`` for each block of the last axis, in float32.

    Args:
      x: (..., K).
      matrix: (K/d, d, d), or (d, d) shared, or None for no transform.

    Raises:
      ValueError: the blocks do not tile K.
    """
    x = x.astype(jnp.float32)
    if matrix is None:
        return x
    d = matrix.shape[-1]
    k = x.shape[-1]
    blocks = matrix.shape[0] if matrix.ndim == 3 else k // d
    if matrix.ndim not in (2, 3) or matrix.shape[-2] != d or blocks * d != k:
        raise ValueError(
            f"matrix has shape {matrix.shape}; for x {x.shape} it must be (d, d) with d dividing "
            f"K={k}, or (K/d, d, d)"
        )
    # Operands are exact in float32; HIGHEST keeps the products so on every backend.
    xb = x.reshape(*x.shape[:-1], blocks, d)
    spec = "...bi,bji->...bj" if matrix.ndim == 3 else "...bi,ji->...bj"
    y = jnp.einsum(spec, xb, matrix.astype(jnp.float32), precision=HIGHEST)
    return y.reshape(x.shape)


def transform_quantize(x, transform, fmt, *, global_scale=None):
    """Transform each block, find each group's scale, round, pack.

    Args:
      x: (..., K).
      transform: (K/d, d, d), (d, d) or None.
      fmt: the number format.
      global_scale: scalar; None takes the format's own.

    Returns:
      Packed codes uint8 (..., K * bits / 8) and scales (..., ceil(K / g)) in the format's type.
    """
    codes, scales = fmt.encode(apply_transform(x, transform), global_scale)
    return fmt.pack(codes), scales


def quantized_matmul(x, weight, *, out_dtype=None, precision=None):
    """Return ``x @ dequantize(weight)^T``.

    Args:
      x: (..., M, K) values, or an object with ``codes``, ``scales``, ``global_scale``, ``format``.
      weight: the same kind of object, of shape (N, K).
      out_dtype: dtype of the result; default: x's, or float32 for codes.
      precision: "folded" rounds weights to FP8 where `pallas_kernels.folded.folds`: what kernels do
        where that is faster. Anything else leaves values and sums as they are.

    Returns:
      (..., M, N); products accumulate in float32.
    """
    inputs, default = None, x.dtype if not hasattr(x, "codes") else jnp.float32
    if hasattr(x, "codes"):
        x, inputs = dequantize(x), x.format
    return _product(x, _values(weight, inputs, precision), out_dtype or default)


def _values(weight, inputs, precision):
    """A weight's values, with inputs in a format."""
    if precision == folded.FOLDED and folded.folds(weight.format, inputs):
        return folded.dequantize(*interchange(weight), weight.format, weight.global_scale)
    return dequantize(weight)


def _product(x, values, out_dtype):
    y = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), values, precision=HIGHEST)
    return y.astype(out_dtype)


def transform_quantize_matmul(
    x, transform, weight, fmt, *, global_scale=None, out_dtype=None, precision=None
):
    """Return ``dequantize(quantize(T x)) @ dequantize(weight)^T``; ``fmt=None`` keeps T x as it is.

    Args:
      x: (..., M, K).
      transform: (K/d, d, d), (d, d) or None.
      weight: quantized weight of shape (N, K).
      fmt: number format of the activations, or None.
      global_scale: scalar; None takes the format's own.
      out_dtype: dtype of the result; default x's.
      precision: as for `quantized_matmul`.
    """
    y = apply_transform(x, transform)
    if fmt is not None:
        if global_scale is None:
            global_scale = fmt.derive_global_scale(jnp.max(jnp.abs(y), initial=0.0))
        codes, scales = fmt.encode(y, global_scale)
        y = fmt.decode(codes, scales, global_scale)
    return _product(y, _values(weight, fmt, precision), out_dtype or x.dtype)


def group_of_rows(group_sizes: jax.Array, rows: int) -> jax.Array:
    """Return the number of the group that each of M sorted rows is in, int32; G beyond the last.

    Args:
      group_sizes: (G,) integers.
      rows: M.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32), dtype=jnp.int32)
    numbers = jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(ends, numbers, side="right").astype(jnp.int32)


def ragged_transform_quantize_matmul(
    x, transforms, weight, group_sizes, fmt, *, global_scale=None, out_dtype=None
):
    """Return `transform_quantize_matmul` of every row with the transform and weight of its group.

    Args:
      x: (M, K), sorted by group.
      transforms: (G or 1, K/d or 1, d, d), or None.
      weight: quantized weights (G, N, K), in either layout.
      group_sizes: (G,) integers; rows beyond their sum give zeros.
      fmt: number format of the activations, or None.
      global_scale: scalar, or one a group; None takes the format's own, derived group by group.
      out_dtype: dtype of the result; default x's.

    Returns:
      (M, N).
    """
    groups, group = len(group_sizes), group_of_rows(group_sizes, len(x))
    if transforms is not None:
        blocks = x.shape[-1] // transforms.shape[-1]
        shape = groups, blocks, *transforms.shape[-2:]
        transforms = jnp.broadcast_to(transforms, shape)
    if global_scale is not None:
        global_scale = jnp.broadcast_to(global_scale, (groups,))
    scales = jnp.broadcast_to(weight.global_scale, (groups,))
    codes, factors = interchange(weight)

    def product(number, parts):
        member = (group == number)[:, None]
        transform, one, scale = parts
        one = types.SimpleNamespace(
            **dict(zip(("codes", "scales", "global_scale"), one, strict=True)), format=weight.format
        )
        y = transform_quantize_matmul(
            jnp.where(member, x, 0), transform, one, fmt, global_scale=scale, out_dtype=out_dtype
        )
        return jnp.where(member, y, 0)

    def add(y, numbered):
        return y + product(*numbered), None

    # One group at a time: no more than one weight is expanded.
    parts = transforms, (codes, factors, scales), global_scale
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    rest = jax.tree.map(lambda leaf: leaf[1:], parts)
    return lax.scan(add, product(0, first), (jnp.arange(1, groups, dtype=jnp.int32), rest))[0]


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return ``silu(gate) * up``, ``silu(g) = g / (1 + exp(-g))``: what gated layers pass on.

    Results of 16 bits are rounded once, at the end, as in the kernel that does it.

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    dtype = jnp.result_type(gate, up)
    gate, up = (y.astype(jnp.promote_types(dtype, jnp.float32)) for y in (gate, up))
    return (jax.nn.silu(gate) * up).astype(dtype)


def dequantize(q) -> jax.Array:
    """Return the float32 values of an object with codes, scales, global scale and format.

    Or of one in the layout of the matmul kernels (`pallas_kernels.fragments`).
    """
    codes, scales = interchange(q)
    return q.format.decode(q.format.unpack(codes), scales, q.global_scale)


def interchange(q) -> tuple[jax.Array, jax.Array]:
    """Return packed codes and scales of an object that has them, in whichever layout."""
    return (q.codes, q.scales) if hasattr(q, "codes") else q.interchange
