"""Tile sizes: measured tables for the devices we have seen, a rule for the others."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math

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
    """

    warpgroups: int = 4
    stages: int = 2
    columns: int = 128
    steps: int = 1
    ctas: int = 132

    def shared_memory(self, block: int, group: int, shared: bool) -> int:
        """Bytes of shared memory of a CTA, for blocks of d and groups of g values."""
        transforms = block * block if shared else self.columns * self.steps * block
        row = self.stages * self.columns * 2 + self.columns
        if self.steps > 1:
            row += 2 * self.columns * self.steps // group * 2
        return 2 * transforms + 64 * self.warpgroups * row


def choose(rows: int, width: int, fmt, block: int, shared: bool, layout: str, device: str) -> Tiles:
    """Return the tiles of a call: the table's entry if it fits, else the rule's.

    A table is ``tuned/<device>.json``, made by ``python -m pallas_kernels.bench --tune``: entries
    ``{"rows": up to, "scale": scale type, "tiles": {...}}``, the first that matches counts.

    Args:
      rows: M.
      width: K.
      fmt: the number format.
      block: d.
      shared: one transform for all blocks.
      layout: "interchange" or "kernel".
      device: ``device_kind`` of the GPU.

    >>> from wush_jax import MXFP4
    >>> choose(16, 4096, MXFP4, 32, False, "interchange", "none").warpgroups
    1
    """
    for entry in table(device):
        if rows <= (entry["rows"] or rows) and entry["scale"] in (None, fmt.scale_dtype):
            tiles = Tiles(**entry["tiles"])
            break
    else:
        tiles = Tiles(warpgroups=1, stages=1) if rows <= 128 else Tiles()
    gathered = 16 * fmt.group_size // tiles.columns
    line = width // fmt.group_size if layout == "interchange" else rows
    whole = fmt.scale_dtype != "bfloat16" and gathered > 1 and line % 16 == 0
    direct = dataclasses.replace(tiles, steps=1)
    if tiles.steps > 1 and whole:
        tiles = dataclasses.replace(tiles, steps=gathered)
        # Wide slabs are few: where they fill the last round badly, narrow ones are faster.
        if _balance(rows, width, tiles) < 0.93 * _balance(rows, width, direct):
            tiles = direct
    else:
        tiles = direct
    return shrink(tiles, block, fmt.group_size, shared)


def _balance(rows: int, width: int, tiles: Tiles) -> float:
    """Mean over largest number of (slab, row tile) pairs of a CTA."""
    slabs = -(-width // (tiles.columns * tiles.steps))
    share = slabs * -(-rows // (64 * tiles.warpgroups)) / tiles.ctas
    return share / math.ceil(share)


def shrink(tiles: Tiles, block: int, group: int, shared: bool) -> Tiles:
    """Give up gathered scales, then stages, then warpgroups until the memory suffices."""
    if tiles.shared_memory(block, group, shared) * _resident(tiles) <= SHARED_MEMORY:
        return tiles
    if tiles.steps > 1:
        # Wide transforms: one CTA a multiprocessor, all its warpgroups sharing them.
        return shrink(Tiles(columns=tiles.columns), block, group, shared)
    if tiles.stages > 1:
        return shrink(dataclasses.replace(tiles, stages=tiles.stages - 1), block, group, shared)
    return shrink(dataclasses.replace(tiles, warpgroups=tiles.warpgroups - 1), block, group, shared)


def _resident(tiles: Tiles) -> int:
    return max(1, tiles.ctas // 132)


@functools.cache
def table(device: str) -> list[dict]:
    """Return the tuned entries of a device, in order; none for a device without a table."""
    file = importlib.resources.files("pallas_kernels.tuned") / f"{device.replace(' ', '_')}.json"
    if not file.is_file():
        return []
    return json.loads(file.read_text())["transform_quantize"]
