"""Recipes for each site by measured loss: under a budget of bytes, or a promise of KL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from wush_jax.calibration.calibration import Calibration, observe
from wush_jax.calibration.choices import Choice, spend
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import Call, Site, plain_call
from wush_jax.calibration.promise import Limit, Slopes, kl_slopes, with_recipe, within
from wush_jax.calibration.site_plan import SitePlan, site_cost, split_sites
from wush_jax.calibration.sites import observe_calls
from wush_jax.calibration.steps import quantize_planned
from wush_jax.formats import MXFP8, NVINT4
from wush_jax.formats.checks import check_kind
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.models.tokens import check_batches_given
from wush_jax.solvers import recipe as recipes
from wush_jax.solvers.presets import BEST, BEST_WIDE, FAST
from wush_jax.solvers.recipe import DATA_FREE, Recipe, RuleBook, Rules

TRANSFORMS = ("identity", "hadamard", "wus", "wush")
LARGEST_BLOCK = 128
# From 4.25 bits and the transform's to 16; None leaves a site as it is.
CANDIDATES = (
    BEST,
    BEST.replace(format=NVINT4),
    BEST_WIDE.replace(format=NVINT4),
    FAST.replace(format=MXFP8),
    None,
)


def choose_recipes(
    model: nnx.Module,
    batches: Iterable[Any] | Calibration,
    rules: Rules = BEST,
    *,
    held_out: Any = None,
    transforms: Sequence[str] = TRANSFORMS,
    blocks: Sequence[int] | None = None,
    budget: int | None = None,
    max_kl: float | None = None,
    max_bits: float | None = None,
    max_bytes: int | None = None,
    candidates: Sequence[Recipe | None] = CANDIDATES,
    slopes: Slopes | None = None,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> tuple[list[tuple[str, Recipe | None]], list[Choice]]:
    """Choose transform and block size of every site by its loss on held-out inputs.

    With ``max_kl`` choose the smallest model whose predicted KL from the original is within it,
    with ``max_bits`` or ``max_bytes`` the one of least predicted KL that is no larger
    (`wush_jax.calibration.promise`); check the result on text that neither has seen.

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
      max_kl: the KL to stay within, nats; then ``batches`` has to be a `Calibration`, the rules
        only say which layers may be quantized, and the choices' bytes are of whole layers.
      max_bits: in place of ``max_kl``, bits of a weight, the mean over all that may be quantized,
        with scales and transforms.
      max_bytes: in place of ``max_kl``, bytes of all that.
      candidates: with one of these, the recipes to try on every site, None for leaving it alone.
      slopes: with one of these, what losses cost; None measures it on ``held_out`` (`kl_slopes`).
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.

    Returns:
      Rules for `wush_jax.quantize_model`, and the choice behind each.

    Raises:
      ValueError: fewer than two batches and none held out, a calibration of another model or one
        that keeps too little for the candidates, an unknown transform, a site that no candidate
        fits, more than one limit, one that even the smallest or the best candidates exceed.

    >>> import jax
    >>> layer = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    >>> data = [jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2)]
    >>> rules, choices = choose_recipes(layer, data, budget=0, call=lambda m, x: m[0](x))
    >>> rules[0][0], rules[0][1].transform
    ('0', 'identity')
    """
    check_kind(nnx.Module, "an NNX module", model=model)
    _check_transforms(transforms)
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    limit = Limit(max_kl, max_bits, max_bytes)
    if limit.given:
        known = _promising(limit, budget, batches)
        if slopes is None:
            text = None if held_out is None else [held_out]
            slopes = kl_slopes(model, known, with_recipe(rules, FAST), text, **options)
        options |= {"candidates": candidates, "held_out": held_out}
        return _rules(within(model, known, rules, limit, slopes, **options))
    layers, _ = dense_layers(model, dense_types)
    book = RuleBook(rules)

    def tried(sites: Sequence[Site]) -> list[SitePlan]:
        parts = split_sites(sites, book)
        return [trial for part in parts for trial in _candidates(part, transforms, blocks)]

    calibration, held_out = _observed(model, batches, held_out, tried, options)
    trials = tried(calibration.sites)
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
    return _rules(spend(table, budget))


def _rules(chosen: list[Choice]) -> tuple[list[tuple[str, Recipe | None]], list[Choice]]:
    return [(re.escape(path), c.recipe) for c in chosen for path in c.site.layers], chosen


def _promising(limit: Limit, budget: int | None, batches: Any) -> Calibration:
    """The calibration that a promise is made from, all arguments checked."""
    faults = limit.faults()
    name, value = next(iter(limit.given.items()))
    if budget is not None:
        faults.append(f"budget={budget} is another limit than {name}={value}; give one")
    if not isinstance(batches, Calibration):
        faults.append(f"{name} needs a Calibration, which wush_jax.calibrate makes of batches")
    if faults:
        raise ValueError("; ".join(faults))
    return batches


def _observed(model, batches, held_out, candidates, options) -> tuple[Calibration, Any]:
    """What is known of the inputs, for all candidates, and the batch that is held out."""
    if isinstance(batches, Calibration):
        return batches, batches.first if held_out is None else held_out
    check_batches_given(batches)
    batches = list(batches)
    if held_out is None:
        if len(batches) < 2:
            raise ValueError(
                f"batches holds {len(batches)}; pass at least two, the last is held out"
            )
        held_out = batches.pop()
        observe_calls(model, held_out, **options)  # refused before the others are run
    found = observe(model, batches, lambda sites, layers, skipped: candidates(sites), **options)
    return found, held_out


def _check_transforms(transforms: Sequence[str]) -> None:
    given = isinstance(transforms, list | tuple) and len(transforms)
    if not given or any(not isinstance(t, str) or t not in recipes.TRANSFORMS for t in transforms):
        raise ValueError(
            f"transforms={transforms!r:.60}; give a list of some of {', '.join(recipes.TRANSFORMS)}"
        )


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
