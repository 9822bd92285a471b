"""Transform and block size for each site, by measured loss, under a budget of transform bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from wush_jax.calibration.calibration import Calibration, observe
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import Call, Site, plain_call
from wush_jax.calibration.site_plan import SitePlan, site_cost, split_sites
from wush_jax.calibration.steps import quantize_planned
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.solvers.presets import BEST
from wush_jax.solvers.recipe import DATA_FREE, Recipe, RuleBook, Rules

TRANSFORMS = ("identity", "hadamard", "wus", "wush")
LARGEST_BLOCK = 128


@dataclass(frozen=True)
class Choice:
    """One recipe for one site, and what it costs and loses.

    Attributes:
      site: the layers.
      recipe: for all of them.
      loss: mean over its layers of output loss / output power on held-out inputs.
      nbytes: of its transforms.
    """

    site: Site
    recipe: Recipe
    loss: float
    nbytes: int


def choose_recipes(
    model: nnx.Module,
    batches: Iterable[Any] | Calibration,
    rules: Rules = BEST,
    *,
    held_out: Any = None,
    transforms: Sequence[str] = TRANSFORMS,
    blocks: Sequence[int] | None = None,
    budget: int | None = None,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> tuple[list[tuple[str, Recipe]], list[Choice]]:
    """Choose transform and block size of every site by its loss on held-out inputs.

    Every candidate is tried by rounding to nearest, on the moments of the batches; the losses are
    those of a batch that is held out. The choice minimises the sum over layers of the relative
    losses among all choices whose transforms fit the budget, up to the steps of the sites' lower
    convex hulls.

    Args:
      model: an NNX module.
      batches: of calibration, or a `Calibration`.
      rules: what the sites get apart from transform and block size; layers without a recipe stay
        as they are.
      held_out: the batch for the losses. None is the last of the batches, which the moments then do
        not see, and for a `Calibration` its first, which they have seen.
      transforms: candidates.
      blocks: candidates for d; None: the group size, doubled up to 128. Those that do not divide a
        site's K are left out there.
      budget: bytes of all transforms together; None sets no limit.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.

    Returns:
      Rules for `wush_jax.quantize_model`, and the choice behind each.

    Raises:
      ValueError: fewer than two batches and none held out, a calibration of another model or one
        that keeps too little for the candidates, an unknown transform, a site that no candidate
        fits, a budget that even the smallest transforms exceed.

    >>> import jax
    >>> layer = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    >>> data = [jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2)]
    >>> rules, choices = choose_recipes(layer, data, budget=0, call=lambda m, x: m[0](x))
    >>> rules[0][0], rules[0][1].transform
    ('0', 'identity')
    """
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    layers, _ = dense_layers(model, dense_types)
    book = RuleBook(rules)

    def candidates(sites: Sequence[Site]) -> list[SitePlan]:
        parts = split_sites(sites, book)
        return [trial for part in parts for trial in _candidates(part, transforms, blocks)]

    calibration, held_out = _observed(model, batches, held_out, candidates, options)
    trials = candidates(calibration.sites)
    calibration.check(model, layers, trials)
    recipes = {part.site: part.recipe for part in split_sites(calibration.sites, book)}
    table: dict[Site, list[Choice]] = {site: [] for site in recipes}
    for item in trials:
        site = item.site
        packed = quantize_planned(item, layers, calibration.of(site))
        losses = layer_losses(model, held_out, [site], packed, **options)
        loss = float(np.mean([x.relative for x in losses.values()]))
        final = _final(recipes[site], item.recipe)
        nbytes = site_cost(SitePlan(site, final), layers).transform_bytes
        table[site].append(Choice(site, final, loss, nbytes))
    chosen = spend(table, budget)
    found = [(re.escape(path), c.recipe) for c in chosen for path in c.site.layers]
    return found, chosen


def _observed(model, batches, held_out, candidates, options) -> tuple[Calibration, Any]:
    """What is known of the inputs, for all candidates, and the batch that is held out."""
    if isinstance(batches, Calibration):
        return batches, batches.first if held_out is None else held_out
    batches = list(batches)
    if held_out is None:
        if len(batches) < 2:
            raise ValueError(
                f"batches holds {len(batches)}; pass at least two, the last is held out"
            )
        held_out = batches.pop()
    found = observe(model, batches, lambda sites, layers, skipped: candidates(sites), **options)
    return found, held_out


def _candidates(part: SitePlan, transforms, blocks) -> list[SitePlan]:
    """The recipes to try on a site, by rounding to nearest."""
    site, recipe = part.site, part.recipe
    g = recipe.format.group_size
    if blocks is None:
        blocks = [g * 2**i for i in range(8) if g * 2**i <= max(g, LARGEST_BLOCK)]
    trial = recipe.replace(solver="rtn", input_error="ignore", descent=0, refit=0)
    found = []
    for name in transforms:
        # The identity has no blocks: any d is the same.
        for d in [g] if name == "identity" else blocks:
            if site.size % d == 0:
                gain = recipe.block_gain and name not in DATA_FREE
                changes = {"transform": name, "block_size": d, "block_gain": gain}
                found.append(SitePlan(site, trial.replace(**changes)))
    if not found:
        raise ValueError(
            f"site {site.name}: K={site.size} is divided by none of blocks={list(blocks)}; add one "
            "or exclude the layer by a rule"
        )
    return found


def _final(recipe: Recipe, trial: Recipe) -> Recipe:
    return recipe.replace(
        transform=trial.transform,
        block_size=trial.block_size,
        block_gain=trial.block_gain,
        refit=0 if trial.transform in DATA_FREE else recipe.refit,
    )


def spend(table: Mapping[Site, Sequence[Choice]], budget: int | None) -> list[Choice]:
    """Return one choice a site: least loss of all layers together, within the budget.

    Starts from each site's fewest bytes and takes the step that saves most loss a byte, along each
    site's lower convex hull, while it fits.

    Raises:
      ValueError: the smallest choices together exceed the budget.
    """
    hulls = [_hull(choices) for choices in table.values()]
    at = [0] * len(hulls)
    spent = sum(hull[0].nbytes for hull in hulls)
    if budget is not None and spent > budget:
        raise ValueError(
            f"budget={budget} bytes: the smallest transforms together take {spent}; add 'identity' "
            "to transforms, or raise the budget"
        )
    steps = sorted(
        (
            (-_slope(hull[i], hull[i + 1]), site, i)
            for site, hull in enumerate(hulls)
            for i in range(len(hull) - 1)
        ),
    )
    for _, site, i in steps:
        cost = hulls[site][i + 1].nbytes - hulls[site][i].nbytes
        # A step that was skipped ends its site: the later ones would cost its bytes as well.
        if at[site] == i and (budget is None or spent + cost <= budget):
            at[site], spent = i + 1, spent + cost
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (bytes, loss): ever more bytes for ever less loss."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        if hull and choice.nbytes == hull[-1].nbytes:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """Loss of all the site's layers that is saved by a byte, from a to b."""
    return len(a.site.layers) * (a.loss - b.loss) / (b.nbytes - a.nbytes)
