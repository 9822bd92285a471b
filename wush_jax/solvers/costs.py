"""What a plan costs: memory and arithmetic offline, bytes and arithmetic at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wush_jax.solvers.recipe import DATA_FREE, Recipe


@dataclass(frozen=True)
class SiteCost:
    """One site and what it costs.

    Attributes:
      recipe: for all its layers.
      size: K.
      weights: N K of each layer.
      kernels: how many kernels a layer is a batch of, such as experts; 1 for a plain layer.
      rows: of the input that calibration keeps.
    """

    recipe: Recipe
    size: int
    weights: tuple[int, ...]
    kernels: int = 1
    rows: int = 0

    @property
    def passes(self) -> int:
        """Transform+quantize passes over the input at run time."""
        same = self.recipe.share_transform or self.recipe.transform in DATA_FREE
        return self.kernels * (1 if same else len(self.weights))

    @property
    def transform_bytes(self) -> int:
        """Of the transforms, at run time; one matrix a layer where all blocks share it."""
        d = self.recipe.block
        if self.recipe.transform == "identity":
            return 0
        width = {"bfloat16": 2, "float32": 4}[self.recipe.transform_dtype]
        shared = self.recipe.shared_blocks or self.recipe.transform in DATA_FREE
        one = d * d if shared else self.size * d
        count = 1 if self.recipe.share_transform else len(self.weights)
        return width * one * count * self.kernels

    @property
    def transform_flops(self) -> int:
        """Of all passes, for one token that every kernel sees."""
        if self.recipe.transform == "identity":
            return 0
        return 2 * self.size * self.recipe.block * self.passes

    @property
    def moment_bytes(self) -> int:
        """Of the moments and kept rows while calibrating, float32."""
        return 4 * self.size * (self._moment_width + self.rows) * self.kernels

    @property
    def solver_bytes(self) -> int:
        """Moments and float32 weights of one kernel while it is being quantized."""
        # GPTQ holds the Hessian, its factor and their float64 copies beside the weights twice.
        copies = 5 if self.recipe.solver == "gptq" else 1
        # Rounds of refit keep what they come from beside where they go.
        copies, kept = (8, 4) if self.recipe.refit else (copies, 2)
        # The rows that outputs get their slopes from, exact and quantized.
        rows = self.rows * (3 if self.recipe.input_error == "sample" else 1)
        moments = 4 * self.size * (self._moment_width * copies + rows)
        return moments + kept * 4 * sum(self.weights)

    @property
    def solver_flops(self) -> int:
        """To quantize: GPTQ's factor, target and feedback, sweeps of descent, refits."""
        if self.recipe.solver != "gptq":
            return 2 * self.recipe.block * sum(self.weights) * self.kernels
        rounds = self.recipe.refit
        # Rounds of refit aim anew, once more before the first, and measure the loss on kept rows.
        again = 1 + rounds if rounds else 0
        factor = self.size**3 // 3 * (1 if self.recipe.share_transform else len(self.weights))
        best = 0 if self.recipe.input_error == "ignore" else 4
        slopes = self.rows if self.recipe.input_error == "sample" else 0
        per_weight = self.size * (1 + best * (1 + again) + 2 * self.recipe.descent * (1 + rounds))
        per_weight += slopes * (4 + 6 * again)
        # Two sweeps a round: the error times the Hessian, and products of d x d.
        per_weight += rounds * 2 * (2 * self.size + 6 * self.recipe.block)
        return (factor * (1 + again) + per_weight * sum(self.weights)) * self.kernels

    @property
    def _moment_width(self) -> int:
        return self.size if self.recipe.solver == "gptq" else self.recipe.block


def total_costs(sites: Sequence[SiteCost]) -> dict[str, int]:
    """Return the costs of a model.

    Returns:
      Offline: ``moment_bytes`` of all sites at once, ``largest_site_bytes`` of moments and weights
      of one, ``solver_flops``. At run time: ``transform_bytes``, ``transform_flops_per_token``,
      and ``input_passes``, how many times an input is transformed and quantized.

    >>> total_costs([SiteCost(Recipe(), 64, (64 * 32,))])["transform_bytes"]
    4096
    """
    return {
        "moment_bytes": sum(s.moment_bytes for s in sites),
        "largest_site_bytes": max(s.solver_bytes for s in sites),
        "solver_flops": sum(s.solver_flops for s in sites),
        "transform_bytes": sum(s.transform_bytes for s in sites),
        "transform_flops_per_token": sum(s.transform_flops for s in sites),
        "input_passes": sum(s.passes for s in sites),
    }
