"""Tile sizes: measured tables for the devices we have seen, a rule for the others."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math

# Tokens up to which FP8 activations have a power of two for each 128 columns, not for each 512: so
# that more CTAs share the quantizer's work.
FEW_TOKENS = 64
PROMOTED = 4  # those 512 columns, in steps: FP8 products of as many are summed in 14 bits
# What a CTA may use on Hopper, minus what the compiler keeps for itself.
SHARED_MEMORY = 227 * 1024 - 2048


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How `transform_quantize` divides its work.

    Attributes:
      warpgroups: of 128 threads in a CTA; each has its own row tiles, all share the transforms.
      stages: buffers of activations a warpgroup.
      columns: of K in a tile; 128, or 64 for groups of 16.
      steps: tiles side by side in a slab. With 1, scales go to memory from registers, byte by
        byte; with more, 16 scales of each row are gathered first and stored at once.
      ctas: thread blocks that share the work, a multiple of the number of multiprocessors.
      beside: warpgroups that take neighbouring tiles of one row, and find the power of two of
        their columns together (layout "float8"); the others go down.
      results: buffers of results a warpgroup.
      cluster: CTAs that do what ``beside`` says of warpgroups, for few tokens, on multiprocessors
        of their own. Then each CTA has one tile.
    """

    warpgroups: int = 4
    stages: int = 2
    columns: int = 128
    steps: int = 1
    ctas: int = 132
    beside: int = 1
    results: int = 2
    cluster: int = 1

    @property
    def slab(self) -> int:
        """Columns that a CTA works on at a time."""
        return self.columns * self.steps * self.beside

    def shared_memory(
        self, block: int, group: int, shared: bool, layout: str = "interchange"
    ) -> int:
        """Bytes of shared memory of a CTA, for blocks of d and groups of g values."""
        transforms = block * block if shared else self.slab * block
        bytes_of = {"values": 2, "float8_values": 2, "float8": 1}  # a column
        written = self.results * bytes_of.get(layout, 0.5)
        row = self.columns * (2 * self.stages + written)
        if self.steps > 1:
            row += 2 * self.columns * self.steps // group * 2
        if self.beside > 1:
            row += 2 * 4  # the powers of two
        return 2 * transforms + int(64 * self.warpgroups * row)


@dataclasses.dataclass(frozen=True)
class Split:
    """How `matmul_kernel` divides its work.

    Attributes:
      tokens: 8 or 16, M rounded up: columns of the products.
      slices: CTAs of a cluster, each with its part of K.
      warpgroups: of a CTA.
      ways: warpgroups that share a tile of rows, each with its part of the slice of K.
      clusters: that share the rows of weights.
      stages: records that a warpgroup has in flight.
      records: side by side, that one copy brings.
      resident: a CTA keeps the activations of its slice, if its shared memory holds them.
    """

    tokens: int
    slices: int = 2
    warpgroups: int = 4
    ways: int = 1
    clusters: int = 66
    stages: int = 6
    records: int = 1
    resident: bool = False

    @property
    def groups(self) -> int:
        """Tiles that a CTA has in work."""
        return self.warpgroups // self.ways


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How `tiled_kernel` divides its work.

    Attributes:
      tokens: activations of a tile, a multiple of 8, at most 256.
      warpgroups: that compute, each with 64 rows of weights.
      cuts: parts of K.
      ctas: thread blocks, at most one a multiprocessor.
      stages: steps of 128 columns in flight.
      cluster: CTAs that take neighbouring rows of weights for the same activations, of which each
        fetches its part for all; then tokens are a multiple of 8 times as many.
    """

    tokens: int
    warpgroups: int = 2
    cuts: int = 1
    ctas: int = 132
    stages: int = 4
    cluster: int = 1

    def shared_memory(self, lines: int, itemsize: int, out_itemsize: int) -> int:
        """Bytes of shared memory of a CTA, for sizes of activations and results."""
        step = self.tokens * 128 * itemsize + self.warpgroups * lines * 256
        return self.stages * step + self.warpgroups * self.tokens * 64 * out_itemsize


def sharing(tokens: int) -> int:
    """Steps of 128 columns that share a power of two of FP8 activations.

    >>> sharing(64), sharing(65)
    (1, 4)
    """
    return 1 if tokens <= FEW_TOKENS else PROMOTED


def choose(rows: int, width: int, fmt, block: int, shared: bool, layout: str, device: str) -> Tiles:
    """Return the tiles of a call: the table's entry if it fits, else the rule's.

    A table is ``tuned/<device>.json``, made by ``python -m pallas_kernels.benchmarks --tune``:
    entries ``{"rows": up to, "scale": scale type, "tiles": {...}}``, the first that matches counts.

    Args:
      rows: M.
      width: K.
      fmt: the number format.
      block: d.
      shared: one transform for all blocks.
      layout: as for `quantize_kernel.transform_quantize`.
      device: ``device_kind`` of the GPU.

    >>> from wush_jax import MXFP4
    >>> choose(16, 4096, MXFP4, 32, False, "interchange", "none").warpgroups
    1
    >>> [choose(100, k, MXFP4, 32, False, "float8", "none").beside for k in (128, 256)]
    [1, 4]
    >>> from wush_jax import FP8
    >>> [choose(m, 4096, FP8, 32, False, "float8", "none").cluster for m in (64, 65)]
    [4, 1]
    """
    for entry in table(device, "transform_quantize"):
        if rows <= (entry["rows"] or rows) and entry["scale"] in (None, fmt.scale_dtype):
            tiles = Tiles(**entry["tiles"])
            break
    else:
        tiles = Tiles(warpgroups=1, stages=1) if rows <= 128 else Tiles()
    # Mosaic leaves out the index of an axis that one tile covers: what should have been clipped
    # there would be written over that tile. So nothing reaches beyond it.
    one = width <= tiles.columns
    if layout.startswith("float8"):
        # Formats with a power for 512 columns find it together for few tokens, too.
        shared_by = sharing(rows) if fmt.group_size < 512 else PROMOTED
        if rows <= FEW_TOKENS and shared_by > 1 and not one and width <= 132 * tiles.columns:
            return Tiles(1, 1, cluster=shared_by)
        beside = 1 if one else shared_by
        tiles = Tiles(beside, 1 if beside == 1 else tiles.stages, beside=beside)
        return shrink(tiles, block, fmt.group_size, shared, layout)
    gathered = 16 * fmt.group_size // tiles.columns
    line = rows if layout == "kernel" else width // fmt.group_size
    whole = fmt.scale_dtype != "bfloat16" and gathered > 1 and line % 16 == 0
    direct = dataclasses.replace(tiles, steps=1)
    if tiles.steps > 1 and whole and not one:
        tiles = dataclasses.replace(tiles, steps=gathered)
        # Wide slabs are few: where they fill the last round badly, narrow ones are faster.
        if _balance(rows, width, tiles) < 0.93 * _balance(rows, width, direct):
            tiles = direct
    else:
        tiles = direct
    return shrink(tiles, block, fmt.group_size, shared, layout)


def _balance(rows: int, width: int, tiles: Tiles) -> float:
    """Mean over largest number of (slab, row tile) pairs of a CTA."""
    slabs = -(-width // tiles.slab)
    share = slabs * -(-rows // (64 * tiles.warpgroups)) / tiles.ctas
    return share / math.ceil(share)


def shrink(
    tiles: Tiles, block: int, group: int, shared: bool, layout: str = "interchange"
) -> Tiles:
    """Give up scales gathered, stages, warpgroups, neighbours, in turn, until memory suffices."""
    if tiles.shared_memory(block, group, shared, layout) * _resident(tiles) <= SHARED_MEMORY:
        return tiles
    sizes = block, group, shared, layout
    if tiles.steps > 1:
        # Wide transforms: one CTA a multiprocessor, all its warpgroups sharing them.
        return shrink(Tiles(columns=tiles.columns), *sizes)
    if tiles.stages > 1:
        return shrink(dataclasses.replace(tiles, stages=tiles.stages - 1), *sizes)
    if tiles.beside > 1 and tiles.results == 2:
        # Wide transforms of 512 columns: it just fits.
        return dataclasses.replace(tiles, results=1)
    if tiles.warpgroups == tiles.beside:
        return shrink(dataclasses.replace(tiles, ctas=tiles.ctas - 132), *sizes)
    return shrink(dataclasses.replace(tiles, warpgroups=tiles.warpgroups - 1), *sizes)


def _resident(tiles: Tiles) -> int:
    return max(1, tiles.ctas // 132)


@functools.cache
def table(device: str, op: str) -> list[dict]:
    """Return a device's tuned entries for an operation, in order; none where there is no table."""
    file = importlib.resources.files("pallas_kernels.tuned") / f"{device.replace(' ', '_')}.json"
    if not file.is_file():
        return []
    return json.loads(file.read_text()).get(op, [])
