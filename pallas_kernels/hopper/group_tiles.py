"""Which tile of rows belongs to which group, for kernels that walk down rows sorted by group.

The rows of each group are cut into tiles of one height; the last may be shorter, and a group
without rows has none. How many there are is known when the program runs; before, there is an upper
bound. One small kernel of XLA's finds where groups start, and the kernels look a tile up in that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

INTEGER = jnp.int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Starts:
    """Where groups start; arrays int32 (G + 1,), the last entry of the rows behind all groups.

    In a kernel references to them, or None for what it does not look up.

    Attributes:
      row: first row.
      tile: number of the first tile.
      source: where the rows start in the array that a kernel reads, see `spaced`.
    """

    row: Any
    tile: Any
    source: Any

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All of them, in order, as operands of a kernel."""
        return self.row, self.tile, self.source


def starts_of(group_sizes, height: int, spacing: int = 1) -> Starts:
    """Return where groups start.

    Args:
      group_sizes: (G,) integers.
      height: rows of a tile.
      spacing: groups start at multiples of it in what a kernel reads.
    """
    sizes = group_sizes.astype(INTEGER)
    groups = len(sizes)
    # Sums of masked rows are one kernel; a cumulative sum would be several.
    earlier = jnp.arange(groups)[None, :] < jnp.arange(groups + 1)[:, None]

    def before(values):
        return jnp.sum(jnp.where(earlier, values[None, :], 0), axis=1, dtype=INTEGER)

    return Starts(
        before(sizes), before(-(-sizes // height)), before(-(-sizes // spacing) * spacing)
    )


def most_tiles(rows: int, groups: int, height: int) -> int:
    """Return the most tiles of so many rows in so many groups, and behind them.

    >>> most_tiles(64, 64, 8), most_tiles(4096, 8, 128), most_tiles(3, 8, 16)
    (64, 40, 3)
    """
    return min(rows, (rows + (groups + 1) * (height - 1)) // height)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles as a kernel sees them: numbers and arrays of the running program.

    Args:
      starts: a `Starts`, of references.
      groups: G.
      rows: M.
      height: of a tile.
    """

    starts: Any
    groups: int
    rows: int
    height: int

    def total(self):
        """How many tiles there are, those behind the last group too."""
        return self._end(self.groups)

    def _end(self, group):
        """Number behind the last tile of a group."""
        rest = self.rows - self.starts.row[self.groups]
        last = self.starts.tile[self.groups] + lax.div(rest + self.height - 1, self.height)
        if isinstance(group, int):
            return last
        after = self.starts.tile[jnp.minimum(group + 1, self.groups)]
        return jnp.where(group < self.groups, after, last)

    def group_of(self, tile):
        """The group that a tile is of: the last that does not start behind it; G for the rest."""

        def halve(_, bounds):
            low, high = bounds
            middle = lax.div(low + high + 1, 2)
            found = self.starts.tile[middle] <= tile
            return jnp.where(found, middle, low), jnp.where(found, high, middle - 1)

        steps = self.groups.bit_length()
        return lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(self.groups)))[0]

    def of(self, group):
        """First tile of a group, and how many it has: at least one, for division."""
        first = self.starts.tile[group]
        return first, jnp.maximum(self._end(group) - first, 1)

    def rows_of(self, group):
        """First row of a group, and behind its last: none beyond M, whatever the sizes are."""
        after = self.starts.row[jnp.minimum(group + 1, self.groups)]
        end = jnp.where(group < self.groups, jnp.minimum(after, self.rows), self.rows)
        return self.starts.row[group], end


def most_spaced(rows: int, groups: int, spacing: int) -> int:
    """Return how many rows `spaced` gives.

    >>> most_spaced(5, 3, 8), most_spaced(100, 2, 8)
    (32, 120)
    """
    return spacing * most_tiles(rows, groups, spacing)


def spaced(group_sizes, rows: int, spacing: int) -> jax.Array:
    """Return which row stands where if each group's rows start at a multiple of ``spacing``.

    Args:
      group_sizes: (G,) integers.
      rows: M.
      spacing: in rows.

    Returns:
      int32 (`most_spaced`,); what belongs to no row is that of any.
    """
    starts = starts_of(group_sizes, spacing)
    number = jnp.arange(most_tiles(rows, len(group_sizes), spacing), dtype=INTEGER)
    passed = starts.tile[None, 1:] <= number[:, None]
    group = jnp.sum(passed, axis=1, dtype=INTEGER)
    first = starts.row[group] + (number - starts.tile[group]) * spacing
    row = first[:, None] + jnp.arange(spacing, dtype=INTEGER)
    return jnp.minimum(row, rows - 1).reshape(-1)
