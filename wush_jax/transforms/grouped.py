"""Rows sorted by group, such as tokens by expert, and the moments of every group."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reference import group_of_rows
from wush_jax.transforms import linalg
from wush_jax.transforms.moments import Moments

PANEL = 256  # rows that one product takes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedRows:
    """Rows (M, K), the first ``sizes[0]`` of group 0 and so on; those beyond the last are none.

    Attributes:
      rows: (M, K).
      sizes: (G,) integers.
    """

    rows: jax.Array
    sizes: jax.Array


def update_groups(moments: Moments, grouped: GroupedRows) -> Moments:
    """Return the moments of G groups, each with its own rows added.

    Per group ``mean = sum_t x_t x_t^T / count``, as `Moments.update`; the work is that of all rows
    once, and at most a panel more a group.

    Args:
      moments: every leaf with the leading axis G.
      grouped: the rows.

    >>> moments = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), Moments.init(2, block=2))
    >>> rows = GroupedRows(jnp.float32([[1, 0], [3, 0], [0, 2]]), jnp.int32([2, 1]))
    >>> update_groups(moments, rows).mean[:, 0].tolist()
    [[[5.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]]
    """
    rows = grouped.rows
    sizes = grouped.sizes.astype(jnp.int32)
    group = group_of_rows(sizes, len(rows))
    padded = jnp.pad(rows.astype(jnp.float32), [(0, PANEL), (0, 0)])
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes

    def one(given):
        number, start, size, moment = given

        def add(panel, total):
            first = start + panel * PANEL
            x = lax.dynamic_slice_in_dim(padded, first, PANEL)
            inside = jnp.arange(PANEL, dtype=jnp.int32) < size - panel * PANEL
            return total + _gram(jnp.where(inside[:, None], x, 0), moment.block)

        panels = -(-size // PANEL)
        total = lax.fori_loop(0, panels, add, jnp.zeros_like(moment.mean))
        member = group == number
        largest = jnp.max(jnp.where(member[:, None], jnp.abs(rows), 0)).astype(jnp.float32)
        batch = Moments(total / jnp.maximum(size, 1).astype(jnp.float32), size, largest)
        sample = moment.sample
        return replace(
            replace(moment, sample=None).merge(batch),
            sample=None if sample is None else sample.update(rows, member),
        )

    numbers = jnp.arange(len(sizes), dtype=jnp.int32)
    return lax.map(one, (numbers, starts, sizes, moments))


def _gram(x: jax.Array, block: int | None) -> jax.Array:
    """``sum_t x_t x_t^T`` of float32 rows, full or diagonal blocks."""
    if block is None:
        return jnp.einsum("ti,tj->ij", x, x, precision=linalg.HIGHEST)
    blocks = x.reshape(len(x), -1, block)
    return jnp.einsum("tbi,tbj->bij", blocks, blocks, precision=linalg.HIGHEST)
