"""Products of rows sorted by group, through XLA's ragged product."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import exactly, reference


def ragged_transform_quantize_matmul(
    x, transforms, weight, group_sizes, fmt, *, global_scale=None, out_dtype=None
):
    """As `reference.ragged_transform_quantize_matmul`, by `jax.lax.ragged_dot`.

    A transform that all groups share is one plain product. Operands are bfloat16 where they are
    exact in it, else float32; sums are float32.

    Args:
      x: (M, K), sorted by group.
      transforms: (G or 1, K/d or 1, d, d), or None.
      weight: quantized weights (G, N, K), in either layout.
      group_sizes: (G,) integers.
      fmt: number format of the activations, or None.
      global_scale: scalar, or one a group; None takes the format's own.
      out_dtype: of the result; default x's.

    Raises:
      NotImplementedError: global scales that are derived from the rows of each group.
    """
    group = jnp.minimum(reference.group_of_rows(group_sizes, len(x)), len(group_sizes) - 1)

    def of_rows(scale):
        return jnp.broadcast_to(scale, group_sizes.shape)[group][:, None]

    y = x if transforms is None else transformed(x.astype(jnp.float32), transforms, group_sizes)
    factor, left = of_rows(weight.global_scale), (y,)
    right = _parts(*reference.interchange(weight), weight.format, x.dtype)
    if fmt is not None:
        scale = fmt.global_scale if global_scale is None else global_scale
        if scale is None:
            raise NotImplementedError(f"{fmt.name} derives its global scale from each group")
        codes, scales = fmt.encode(y, of_rows(jnp.float32(scale))[:, 0])
        left = _parts(fmt.pack(codes), scales, fmt, x.dtype)
        factor = factor * of_rows(jnp.float32(scale))
    products = [_ragged(a, b.mT, group_sizes) for a in left for b in right]
    return (sum(products) / factor).astype(out_dtype or x.dtype)


def _parts(codes, scales, fmt, dtype) -> tuple:
    """Return quantized values times their global scale, as arrays that sum to it."""
    if dtype == jnp.bfloat16:
        try:
            return exactly.bfloat16_parts(codes, scales, fmt)
        except NotImplementedError:
            pass  # as float32
    return (fmt.decode(fmt.unpack(codes), scales, jnp.float32(1)),)


def transformed(x, transforms, group_sizes):
    """Return ``T_b x_b`` of every row and block, in float32.

    Args:
      x: (M, K) float32, sorted by group.
      transforms: (G or 1, K/d or 1, d, d).
      group_sizes: (G,) integers.
    """
    if len(transforms) == 1:
        return reference.apply_transform(
            x, transforms[0, 0] if transforms.shape[1] == 1 else transforms[0]
        )
    d = transforms.shape[-1]
    blocks = x.reshape(len(x), -1, d).swapaxes(0, 1)  # (K/d, M, d)
    shape = len(transforms), len(blocks), d, d
    matrices = jnp.broadcast_to(transforms, shape).swapaxes(0, 1).mT
    # XLA compiles no batch of ragged products for a GPU (jaxlib 0.11).
    y = lax.map(lambda each: _ragged(each[0], each[1], group_sizes), (blocks, matrices))
    return y.swapaxes(0, 1).reshape(x.shape)


def _ragged(x, kernel, group_sizes):
    """Return (M, N) of x (M, K), sorted by group, and kernels (G, K, N), with float32 sums.

    Exact operands are bfloat16, others float32.
    """
    if not x.dtype == kernel.dtype == jnp.bfloat16:
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return lax.ragged_dot(
        x,
        kernel,
        group_sizes.astype(jnp.int32),
        precision=reference.HIGHEST,
        preferred_element_type=jnp.float32,
    )
