"""What callers may get wrong: a ValueError with the remedy, before any implementation is tried."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def groups(group_sizes, count: int, rows: int) -> None:
    """Sizes of so many groups of the rows."""
    if group_sizes.shape != (count,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape} and dtype {group_sizes.dtype}; the weights "
            f"are of {count} groups: it must be ({count},) integers"
        )
    if isinstance(group_sizes, jax.core.Tracer):
        return
    if int(group_sizes.min()) < 0 or int(group_sizes.sum()) > rows:
        raise ValueError(
            f"group_sizes={group_sizes.tolist()} must be at least 0 and sum to at most the "
            f"{rows} rows of x"
        )


def operands(x, transform, fmt) -> None:
    """A format that holds x's last axis, a transform that tiles it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; it must be floating point: cast it first")
    k = x.shape[-1] if x.ndim else 0
    if k == 0 or (fmt is not None and not fmt.holds(k)):
        group_size = 1 if fmt is None else fmt.group_size
        raise ValueError(
            f"x has shape {x.shape}; its last axis must be a positive multiple of the group size "
            f"{group_size}: pad it"
        )
    if transform is None:
        return
    d = transform.shape[-1]
    tiles = transform.shape in ((k // d, d, d), (d, d)) and k % d == 0
    if not tiles:
        raise ValueError(
            f"transform has shape {transform.shape}; for x {x.shape} it must be (K/d, d, d) or "
            f"(d, d) with d dividing K={k}"
        )


def inner(x_shape, weight_shape) -> None:
    """One K."""
    if len(weight_shape) != 2 or x_shape[-1] != weight_shape[-1]:
        raise ValueError(
            f"x {tuple(x_shape)} and weight {tuple(weight_shape)} must agree in K: "
            "x (..., M, K), weight (N, K)"
        )


def before(x, norm, residual) -> None:
    """A norm and a residual that fit x."""
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual has shape {residual.shape} and dtype {residual.dtype}; it must be as x, "
            f"{x.shape} and {x.dtype}"
        )
    if norm is None:
        return
    weight, eps = norm
    if weight.shape != x.shape[-1:] or not isinstance(eps, float) or eps < 0:
        raise ValueError(
            f"norm is a weight {weight.shape} and eps={eps!r}; for x {x.shape} it must be a weight "
            f"({x.shape[-1]},) and a float of at least 0"
        )
