"""How products divide their work: measured tables for the devices we have seen, else rules."""

from __future__ import annotations

import dataclasses
import itertools
import math

from pallas_kernels.hopper import tiles as tile_tables
from pallas_kernels.hopper.tiles import PROMOTED, Split, Tiling

# Tokens up to which a product is bound by reading the weights: in bfloat16, in FP8.
FEW, FEW_FLOAT8 = 16, 32


def as_they_are(tokens: int, steps: int) -> bool:
    """Whether quantized tokens go from kernel to kernel without XLA's padding between them.

    TMA splits them by 8; kernels for few tokens take up to 8, 16 or 32.
    """
    if tokens % 8 == 0:
        return not FEW < tokens < FEW_FLOAT8
    return tokens < 8 and steps > 1  # one step is a tile's


def choose(tokens: int, tiles: int, steps: int, kind: str, device: str) -> Split | Tiling:
    """Return how to divide a call: the device's tuned entry for its sizes, else a rule's.

    Entries (``python -m pallas_kernels.benchmarks --matmul --tune``) are ``{"kind", "tiles",
    "steps", "tokens": up to, "split" or "tiling": {...}}``; the first that fits counts.

    Args:
      tokens: rows of activations, M.
      tiles: of 64 weights, N/64.
      steps: of 128 columns, K/128.
      kind: of the records, see `fragments.Carrier`.
      device: ``device_kind`` of the GPU.
    """
    for entry in tile_tables.table(device, "quantized_matmul"):
        sizes = entry["kind"], entry["tiles"], entry["steps"]
        if sizes == (kind, tiles, steps) and tokens <= entry["tokens"]:
            if "split" not in entry:
                return Tiling(**entry["tiling"])
            # An entry speaks for fewer tokens, too: their products may be narrower.
            split = Split(**entry["split"])
            return dataclasses.replace(split, tokens=8 if tokens <= 8 else 16)
    if tokens <= FEW and steps > 1:  # one step has no parts
        return few(tokens, tiles, steps)
    return many(tokens, tiles, steps, kind)


# Whose measurements speak for Hopper GPUs without their own.
H100 = "NVIDIA H100 80GB HBM3"


def road(tokens: int, tiles: int, steps: int, pair: str, allowed, device: str) -> str:
    """Return the fastest of the allowed ways to multiply many tokens, "fused" if none was measured.

    Entries (``python -m pallas_kernels.benchmarks --roads``) are ``{"pair", "tiles", "steps",
    "tokens": from, "microseconds": {road: of a layer}}``. Those of the nearest sizes speak.

    Args:
      tokens: M.
      tiles: of 64 weights.
      steps: of 128 columns.
      pair: what is multiplied, see `roads.pair`.
      allowed: roads, see `roads.allowed`.
      device: ``device_kind`` of the GPU.
    """
    entries = tile_tables.table(device, "roads") or tile_tables.table(H100, "roads")
    fit = [e for e in entries if e["pair"] == pair and e["tokens"] <= tokens]

    def far(entry):
        ratios = entry["tiles"] / tiles, entry["steps"] / steps
        return sum(abs(math.log(ratio)) for ratio in ratios), -entry["tokens"]

    if not fit:
        return "fused"
    measured = min(fit, key=far)["microseconds"]
    return min((name for name in measured if name in allowed), key=measured.get, default="fused")


# Bytes of activations that stay in L2 while all weights pass by.
CACHE = 20 << 20


def band(m_tiles: int, groups: int, of_tokens: int, of_weights: int) -> int:
    """Return how many tiles of tokens meet all weights before the next do, for least traffic.

    Tasks that run at once share what they read. Without bands every wave of them reads all tokens
    anew: 16384 of 14336 columns are five times as many bytes as the rest.

    Args:
      m_tiles: tiles of tokens.
      groups: of rows of weights.
      of_tokens: bytes of a tile of tokens.
      of_weights: bytes of a group.

    >>> band(6, 224, 1 << 20, 1 << 18), band(94, 32, 2523136, 974848)
    (6, 8)
    """

    def traffic(size):
        waves = 1 if size * of_tokens <= CACHE else -(-size * groups // 132)
        return m_tiles * of_tokens * waves + groups * of_weights * -(-m_tiles // size)

    return min(range(1, m_tiles + 1), key=traffic)


def few(tokens: int, tiles: int, steps: int) -> Split:
    """Measured on an H200: all multiprocessors in pairs, each with half of K.

    Warpgroups share tiles where there are too few for half of them, and keep activations where each
    has several. Long copies, since every one is waited for.
    """
    clusters = 66
    ways = next((w for w in (4, 2) if tiles * w <= 2 * clusters and steps >= 2 * w), 1)
    longest = 4 if tokens <= 8 else 2
    records = next((r for r in (4, 2) if r <= longest and 2 * ways * r <= steps), 1)
    return Split(
        8 if tokens <= 8 else 16,
        ways=ways,
        clusters=clusters,
        stages=8 // records,
        records=records,
        resident=tiles > 4 * clusters,
    )


def many(tokens: int, tiles: int, steps: int, kind: str) -> Tiling:
    """A rule for bfloat16 products of many tokens; up to 64 measured on an H200."""
    if tokens > 64:
        return wide(tokens, tiles, steps, 16 if kind == "int4" else 8)

    def cost(tiling):
        """In steps of a warpgroup, which expands weights most of the time."""
        tasks = -(-tiles // tiling.warpgroups) * tiling.cuts
        waves = -(-tasks // 132)
        adding = 10 + tiling.cuts if tiling.cuts > 1 else 0
        return waves * (tiling.warpgroups * -(-steps // tiling.cuts) + 4) + adding

    ways = itertools.product((2, 3, 4), (1, 2, 4, 8))
    tilings = [Tiling(64, warpgroups=n, cuts=cuts) for n, cuts in ways if steps >= 4 * cuts]
    return min(tilings or [Tiling(64)], key=cost)


def wide(tokens: int, tiles: int, steps: int, cycles: int) -> Tiling:
    """Return tiles of 128 weights by the width that ends first; K cut where they are few.

    A step takes ``cycles * width + 200`` cycles of a multiprocessor: tensor cores work while
    nothing is expanded, so that the two add up. Fitted to times of an H200. Of very many tokens
    pairs of CTAs fetch activations together: 3 to 7 % faster at 4096, no faster at 1024.
    """

    def tasks(width):
        return -(-tiles // 2) * -(-tokens // width)

    width = min((128, 256), key=lambda w: -(-tasks(w) // 132) * (cycles * w + 200))
    cuts = 2 if 2 * tasks(width) <= 132 and steps >= 8 else 1
    return Tiling(width, cuts=cuts, cluster=2 if tokens > 2048 and tiles >= 4 else 1)


def expanded_plan(tokens: int, tiles: int) -> Tiling:
    """A rule for weights that are FP8 numbers in memory.

    Of many tokens pairs of CTAs fetch activations together, since L2 is what bounds it: (4096,
    28672) with 4096 tokens takes 711 us for 912. With 1024 that is slower.
    """

    def cycles(width):
        """Fitted to times of an H100."""
        tasks = -(-tiles // 2) * -(-tokens // width)
        return -(-tasks // 132) * (4.3 * width + 185)

    width = min(range(64, 177, 16), key=cycles)
    return Tiling(width, cluster=2 if tokens > 2048 and tiles >= 4 else 1)


def float8_plan(tokens: int, tiles: int, steps: int) -> Split | Tiling:
    """A rule for products in FP8.

    Args:
      tokens: M.
      tiles: of 64 weights.
      steps: of 128 columns.
    """
    if tokens <= FEW_FLOAT8 and steps > 1:
        plan = few(tokens, tiles, steps)
        rows = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        records = 2 if 4 * plan.ways <= steps else 1
        return Split(
            rows, ways=plan.ways, clusters=plan.clusters, stages=8 // records, records=records
        )

    def microseconds(tiling):
        """Fitted to times of an H100: products and expansion overlap in part."""
        per = -(-steps // tiling.cuts)
        tasks = -(-tiles // 2) * -(-tokens // tiling.tokens) * tiling.cuts
        step = max(3.5 * tiling.tokens + 355, 1.5 * tiling.tokens + 545)
        cycles = -(-tasks // 132) * per * step
        parts = 0 if tiling.cuts == 1 else 2.5 + tiling.cuts * tokens * tiles * 64 * 8 / 2.7e6
        return cycles / 1755 + parts

    # Sums, and sums of sums, of at most 184 tokens fit into registers.
    # With a power for each step those of two steps, of at most 64.
    widths = (64,) if tokens <= tile_tables.FEW_TOKENS else range(64, 185, 8)
    ways = itertools.product(widths, (1, 2, 4))
    fits = (Tiling(width, cuts=cuts) for width, cuts in ways if steps >= 2 * PROMOTED * cuts)
    return min([*fits, Tiling(64)], key=microseconds)


def grouped(rows: int, groups: int, span: int | None) -> Tiling:
    """A rule for rows sorted by group, measured on an H100.

    Most groups fit into one tile where they have the mean number of rows, give or take its root:
    their weights are then read and expanded once. Two warpgroups were faster than three or four.

    Args:
      rows: M.
      groups: G.
      span: steps that share a power of two; None for products in bfloat16.

    >>> [grouped(64 * mean, 64, 4).tokens for mean in (4, 8, 64, 512)]
    [8, 16, 72, 176]
    """
    mean = rows / groups
    # Of more rows sums, and sums of sums, do not fit into registers.
    widest = 64 if span == 1 else 176
    height = min(widest, 8 * math.ceil((mean + mean**0.5) / 8))
    return Tiling(height, stages=12 if height <= 32 else 4)
