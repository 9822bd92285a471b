"""What each pass of a sequential calibration costs, so that the time left can be told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from wush_jax.solvers.costs import SiteCost


@dataclass(frozen=True)
class StageCost:
    """Sites that are quantized one pass after the other, and the module that is run for them.

    Attributes:
      passes: of each pass over all chunks, the sites that it calibrates.
      weights: of the module's dense layers.
      advances: whether the chunks go through the module once more, quantized.
    """

    passes: Sequence[Sequence[SiteCost]]
    weights: int
    advances: bool


def pass_costs(stages: Sequence[StageCost], tokens: Sequence[int]) -> list[float]:
    """Return the operations of every step, one chunk after the other, in the order of the run.

    A chunk costs ``2 weights + 2 K d`` a token, d the width of the moments that are summed. What
    a solver takes after a pass falls into the step that follows: nothing is told in between.

    Args:
      stages: of the run.
      tokens: of each chunk.

    >>> from wush_jax import Recipe
    >>> site = SiteCost(Recipe(), 64, (64 * 32,))
    >>> pass_costs([StageCost([[site]], 2048, True)], [1, 10])
    [8192.0, 81920.0, 135168.0, 40960.0]
    """
    waiting, costs = 0.0, []
    for a_token, solving in _steps(stages):
        chunks = [float(count * a_token) for count in tokens]
        chunks[0] += waiting
        waiting = solving
        costs += chunks
    return costs


def rows_of(batch: Any) -> int:
    """Return the tokens, or rows, of the first array of a batch."""
    return sum(math.prod(np.shape(leaf)[:2]) for leaf in jax.tree.leaves(batch)[:1])


def _steps(stages: Sequence[StageCost]) -> Iterator[tuple[float, float]]:
    """Yield of each pass what a token takes, and what is solved after it."""
    for stage in stages:
        forward = 2 * stage.weights
        for sites in stage.passes:
            moments = sum(site.moment_bytes / 2 for site in sites)  # four bytes, two operations
            yield forward + moments, float(sum(site.solver_flops for site in sites))
        if stage.advances:
            yield forward, 0.0
