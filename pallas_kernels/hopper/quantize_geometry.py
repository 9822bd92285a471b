"""The sizes of one call of the quantizer's kernel, and the types of what it writes."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels import repack
from pallas_kernels.hopper.inlined import ROWS
from pallas_kernels.hopper.tiles import Tiles, sharing

# How scales leave the kernel, and what they are.
SCALE_WORDS = {
    "e8m0": (jnp.uint8, jnp.float8_e8m0fnu),
    "e4m3": (jnp.uint8, jnp.float8_e4m3fn),
    "bfloat16": (jnp.uint16, jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one call.

    Attributes:
      rows: M.
      width: K.
      block: d, width of a transform.
      group: g, values of a scale.
      shared: one transform for all blocks.
      layout: as for `transform_quantize`.
      tiles: the tuned sizes.
      unit: "wgmma" (Hopper) or "mma" (warp-level, any GPU with TMA).
    """

    rows: int
    width: int
    block: int
    group: int
    shared: bool
    layout: str
    tiles: Tiles
    unit: str

    @property
    def below(self) -> int:
        """Warpgroups with row tiles of their own."""
        return self.tiles.warpgroups // self.tiles.beside

    @property
    def pairs(self) -> tuple[int, int]:
        """Slabs that cover K; CTA-high row tiles, of 64 rows each, that cover M."""
        slabs, cluster = -(-self.width // self.tiles.slab), self.tiles.cluster
        return slabs + -slabs % cluster, -(-self.rows // (ROWS * self.below))

    @property
    def ctas(self) -> int:
        """Thread blocks: no more than there are pairs."""
        return min(self.tiles.ctas, math.prod(self.pairs))

    @property
    def per_code(self) -> int:
        """Columns of an element of the first output: two codes a byte, or one value."""
        return 1 if self.layout in ("values", *repack.POWERED) else 2

    @property
    def per_scale(self) -> int:
        """Columns of an element of the second output."""
        if self.layout not in repack.POWERED:
            return self.group
        return min(self.tiles.slab, repack.COLUMNS * sharing(self.rows))

    def power(self, slab, beside):
        """Where a warpgroup of a slab stores its rows' powers, and whether it does.

        The first of those that share powers writes them, or each its own copy. Clusters bring slabs
        that lie beyond K, and nothing clips these stores: they would end up in other arrays.
        """
        each = self.per_scale < self.tiles.slab
        place = slab * self.tiles.beside + beside if each else slab
        exists = place < self.outputs[1][0]
        return place, exists if each else exists & (beside == 0)

    @property
    def groups(self) -> int:
        """Scales of a row in a tile, or one power."""
        return 1 if self.layout in repack.POWERED else self.tiles.columns // self.group

    @property
    def outputs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of codes and scales."""
        if self.layout in repack.POWERED:
            powers = -(-self.width // self.per_scale), repack.padded(self.rows)
            missing = 0 if self.layout == "float8_values" else -self.width % self.tiles.columns
            return (self.rows, self.width + missing), powers
        scales = self.oriented(self.rows, self.width // self.group)
        return (self.rows, self.width // self.per_code), scales

    @property
    def code_dtype(self):
        """Of the first output."""
        return jnp.dtype(jnp.bfloat16 if "values" in self.layout else jnp.uint8)

    def oriented(self, rows, groups) -> tuple:
        """Order the axes of scales: (M, K/g), or transposed."""
        return (groups, rows) if self.layout in repack.TRANSPOSED else (rows, groups)
