"""Which recipe each site gets, what that needs of calibration, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax

from wush_jax.calibration.observe import Site
from wush_jax.layers.names import grouped_paths
from wush_jax.layers.nnx import Dense
from wush_jax.solvers.batched import empty_moments
from wush_jax.solvers.costs import SiteCost
from wush_jax.solvers.recipe import WIDTHS, Recipe, RuleBook
from wush_jax.transforms.sample import SAMPLE_ROWS


@dataclass(frozen=True)
class SitePlan:
    """A site whose layers are quantized alike.

    Attributes:
      site: the layers and their K.
      recipe: for all of them.
    """

    site: Site
    recipe: Recipe

    @property
    def moment_block(self) -> int | None:
        """Block size of the moments that calibration has to keep; None for the full matrix."""
        return None if self.recipe.solver == "gptq" else self.recipe.block

    @property
    def sample_rows(self) -> int:
        """Rows of the input that calibration has to keep."""
        return SAMPLE_ROWS if self.recipe.needs_sample else 0


def split_sites(sites: Sequence[Site], book: RuleBook) -> list[SitePlan]:
    """Return what rules quantize: a site whose layers have different recipes is several.

    Each recipe has its own transform.
    """
    parts = []
    for site in sites:
        recipes = {path: book.match(path) for path in site.layers}
        for recipe in dict.fromkeys(recipes.values()):
            if recipe is not None:
                paths = tuple(path for path in site.layers if recipes[path] == recipe)
                parts.append(SitePlan(Site(paths, site.size), recipe))
    return parts


def planned_sites(
    sites: Sequence[Site],
    book: RuleBook,
    layers: Mapping[str, Dense],
    skipped: Mapping[str, str],
) -> tuple[list[SitePlan], dict[str, str]]:
    """Return what rules quantize, and the reason by path for every dense layer that they leave.

    Args:
      sites: those that the model's call reaches.
      book: the rules.
      layers: dense layers by path.
      skipped: reasons by path for layers that cannot be quantized.

    Raises:
      ValueError: nothing is quantized, or a recipe does not fit a layer.
    """
    reached = {path for site in sites for path in site.layers}
    lost = {p: "no rule, or a rule with None" for p in layers if book.match(p) is None}
    lost |= {path: "not reached by the call" for path in layers if path not in reached}
    skipped = lost | dict(skipped)  # a reason of the layer's own counts most
    parts = split_sites(sites, book)
    planned = [replace(part, recipe=part.recipe.fitted(part.site.size)) for part in parts]
    if not planned:
        raise ValueError(f"rules quantize none of the {len(layers)} dense layers: {skipped}")
    _check_blocks(planned)
    return planned, skipped


def _check_blocks(planned: Sequence[SitePlan]) -> None:
    """Refuse layers that their blocks do not divide: all at once, with what would."""
    unfit: dict[tuple[int, Recipe], list[str]] = {}
    for item in planned:
        if item.site.size % item.recipe.block:
            unfit.setdefault((item.site.size, item.recipe), []).extend(item.site.layers)
    faults = [
        f"layer {name}: K={k} is not a multiple of block_size={recipe.block}, {_divides(k, recipe)}"
        for (k, recipe), paths in unfit.items()
        for name in grouped_paths(paths)
    ]
    if faults:
        raise ValueError(
            f"{'; '.join(faults)}. Choose another block_size, such as --block-size widest, for "
            "each layer the largest of 128, 64, 32 and 16 that divides, or exclude layers by a rule"
        )


def _divides(k: int, recipe: Recipe) -> str:
    formats = [fmt for fmt in (recipe.format, recipe.input_format) if fmt is not None]
    found = [str(w) for w in WIDTHS if k % w == 0 and all(fmt.holds(w) for fmt in formats)]
    return f"but of {', '.join(found)}" if found else f"nor of any block of {recipe.format.name}"


def site_cost(item: SitePlan, layers: Mapping[str, Dense]) -> SiteCost:
    """Return what a planned site costs."""
    return SiteCost(
        item.recipe,
        item.site.size,
        tuple(math.prod(layers[path].contraction.shape) for path in item.site.layers),
        math.prod(layers[item.site.name].contraction.batch),
        item.sample_rows,
    )


def kept_blocks(sites: Sequence[Site], parts: Sequence[SitePlan]) -> dict[Site, int | None]:
    """Return the moments that serve all parts of a site: of their block, or full if they differ."""
    blocks: dict[Site, int | None] = {}
    for site in sites:
        asked = {part.moment_block for part in parts if part.site.name in site.layers}
        if asked:
            blocks[site] = asked.pop() if len(asked) == 1 else None
    return blocks


def kept_rows(rows: int | None, parts: Sequence[SitePlan] | None) -> int:
    """Return how many rows of every input are kept: what was asked for, or what all parts need.

    Raises:
      ValueError: fewer were asked for than are needed.
    """
    needed = SAMPLE_ROWS if parts is None else max(part.sample_rows for part in parts)
    if rows is None:
        return needed
    if rows < 0 or (rows == 0 and parts is not None and needed):
        raise ValueError(f"rows={rows}; the rules need rows of the inputs: keep {needed}, or None")
    return rows


def moment_costs(
    blocks: Mapping[Site, int | None],
    parts: Sequence[SitePlan],
    layers: Mapping[str, Dense],
    rows: int,
) -> dict[str, int]:
    """Return the bytes of all moments, and of the site that takes most to quantize."""
    sizes = []
    for site, block in blocks.items():
        batch = layers[site.name].contraction.batch
        kept = jax.eval_shape(partial(empty_moments, site.size, block, batch, rows))
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)))
    solvers = [site_cost(part, layers).solver_bytes for part in parts]
    return {"moment_bytes": sum(sizes), "largest_site_bytes": max(solvers or sizes)}
