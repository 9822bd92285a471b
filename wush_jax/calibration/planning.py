"""The dry run: what will be done to a model, and what it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration.accounts import accounts
from wush_jax.calibration.calibration import Calibration, observe, parts_of
from wush_jax.calibration.observe import Call, Site, observe_calls, plain_call
from wush_jax.calibration.rehearsal import check_runs, warn_of_training
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.site_plan import SitePlan, planned_sites, site_cost
from wush_jax.formats.checks import check_kind
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    dense_layers,
)
from wush_jax.solvers.batched import packed_shapes
from wush_jax.solvers.costs import total_costs
from wush_jax.solvers.recipe import Recipe, RuleBook, Rules
from wush_jax.solvers.site import PackedWeight, quantize_site
from wush_jax.solvers.site_transform import site_weight_moment
from wush_jax.transforms import linalg, predicted_gain
from wush_jax.transforms.moments import Moments


@dataclass(frozen=True)
class ModelPlan:
    """What `quantize_model` will do: a dry run.

    Attributes:
      sites: what is quantized, in the order of calls.
      report: the same, with sizes, for people.
    """

    sites: Sequence[SitePlan]
    report: Report


def plan(
    model: nnx.Module,
    rules: Rules,
    batch: Any = None,
    *,
    measure: bool = False,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> ModelPlan:
    """Say what would be quantized and how, and what it takes.

    Args:
      model: an NNX module.
      rules: a `Recipe`, or (pattern, Recipe or None) pairs; the first full match of a layer's
        dotted path wins.
      batch: one batch (or its shapes) to trace which layers share an input, or a `Calibration`,
        which knows; without either every layer is a site of its own.
      measure: run the batch (twice, once timed) for every layer's predicted gain and the seconds a
        calibration batch takes; from a `Calibration`, the gains alone. Without it nothing is
        computed.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.

    Returns:
      `ModelPlan`; its report lists layers, shapes, bytes before and after, what is skipped and
      why, and rules that decide no layer; its details say what the plan costs offline and at run
      time (`wush_jax.solvers.costs`) and, where measured, ``seconds_per_batch``.

    Raises:
      ValueError: malformed rules, a recipe that does not fit a layer, nothing to quantize; a
        calibration of another model, or one that keeps too little to measure these rules.

    >>> layer = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    >>> plan(layer, Recipe()).report.layers[0].bytes_after
    5188
    """
    check_kind(nnx.Module, "an NNX module", model=model)
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    look = _Look.at(model, batch, options)
    planned = look.plan(rules, options)
    if not measure:
        return planned
    calibration, details, rows = look.calibration, dict(planned.report.details), []
    if calibration is None:
        calibration, details["seconds_per_batch"] = _timed(look.model, batch, rules, options)
    else:
        calibration.check(look.model, look.layers, planned.sites)
    gains = {
        path: site_gain(item, look.layers, calibration.of(item.site))
        for item in planned.sites
        for path in item.site.layers
    }
    rows = [replace(row, predicted_gain=gains[row.path]) for row in planned.report.layers]
    return replace(planned, report=replace(planned.report, layers=rows, details=details))


def plans(
    model: nnx.Module,
    settings: Mapping[str, Rules],
    batch: Any = None,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> dict[str, ModelPlan]:
    """Return the `plan` of several rules, by name, from one look at the model."""
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    look = _Look.at(model, batch, options)
    return {name: look.plan(rules, options) for name, rules in settings.items()}


@dataclass(frozen=True)
class _Look:
    """What is the same for all rules.

    Attributes:
      model: whose layers know their stacks.
      layers: dense layers by path.
      skipped: why others cannot be quantized, by path.
      sites: layers that share an input.
      calibration: which knows them, or None.
      shown: the batch, or None.
      running: the choices of layers with which the swapped model was seen to run.
    """

    model: nnx.Module
    layers: Mapping[str, Dense]
    skipped: Mapping[str, str]
    sites: Sequence[Site]
    calibration: Calibration | None
    shown: Any
    running: set[frozenset[str]]

    @classmethod
    def at(cls, model: nnx.Module, batch: Any, options: dict[str, Any]) -> _Look:
        layers, skipped = dense_layers(model, options["dense_types"])
        if batch is None:
            sites, lost = _sites_apart(layers)
            return cls(model, layers, {**skipped, **lost}, sites, None, None, set())
        calibration = batch if isinstance(batch, Calibration) else None
        shown = batch if calibration is None else calibration.first
        warn_of_training(model)
        observed = observe_calls(model, shown, **options)
        model = observed.marked(model, options["dense_types"])
        layers, _ = dense_layers(model, options["dense_types"])
        sites = observed.sites if calibration is None else calibration.sites
        if calibration is not None:
            calibration.check(model, layers)
        skipped = {**skipped, **observed.faults}
        return cls(model, layers, skipped, sites, calibration, shown, set())

    def plan(self, rules: Rules, options: dict[str, Any]) -> ModelPlan:
        """Return the plan of some rules, without measuring."""
        book, layers = RuleBook(rules), self.layers
        planned, skipped = planned_sites(self.sites, book, layers, self.skipped)
        chosen = frozenset(path for item in planned for path in item.site.layers)
        # Whether the swapped model runs depends on which layers are, not on their recipe.
        if self.shown is not None and chosen not in self.running:
            check_runs(self.model, packed_like(planned, layers), self.shown, **options)
            self.running.add(chosen)
        rows = [row for item in planned for row in dry_rows(item, layers)]
        details = dict(total_costs([site_cost(item, layers) for item in planned]))
        found = accounts(self.model, layers, chosen)
        details |= found.counts
        skipped = {**found.alone, **skipped}
        return ModelPlan(planned, Report(rows, skipped, book.unused(layers), details, found.notes))


def _sites_apart(layers: Mapping[str, Dense]) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Every layer as a site of its own, and those of which no call has shown the stack."""
    unknown = {
        path: f"its kernel {la.contraction.kernel_shape} has axes beyond its equation; pass a "
        "batch: a call shows which ones a scan takes away"
        for path, la in layers.items()
        if la.contraction.stack and la.contraction.stack_axes is None
    }
    apart = {path: la for path, la in layers.items() if path not in unknown}
    return tuple(Site((p,), la.contraction.shape[1]) for p, la in apart.items()), unknown


def _timed(model, batch, rules, options) -> tuple[Calibration, float]:
    """Calibrate on one batch, and say how many seconds it takes once it is compiled."""
    if batch is None:
        raise ValueError("measure=True needs a batch to run; pass one")
    jax.block_until_ready(observe(model, [batch], parts_of(rules), **options).moments)
    start = time.perf_counter()
    calibration = observe(model, [batch], parts_of(rules), **options)
    jax.block_until_ready(calibration.moments)
    return calibration, time.perf_counter() - start


def packed_like(sites: Sequence[SitePlan], layers: Mapping[str, Dense]) -> dict[str, PackedWeight]:
    """Return what quantizing would leave, as shapes: a dry run of `quantize_planned`."""
    out: dict[str, PackedWeight] = {}
    for item in sites:
        shapes = tuple(layers[path].contraction.shape for path in item.site.layers)
        batch = layers[item.site.name].contraction.batch
        packed = packed_shapes(_packed_shapes(shapes, item.recipe), batch)
        out |= dict(zip(item.site.layers, packed, strict=True))
    return out


def packed_of(planned: ModelPlan) -> dict[str, PackedWeight]:
    """Return the shapes of what a plan leaves of each layer, of one kernel where there are many."""
    shapes = {row.path: row.shape[-2:] for row in planned.report.layers}
    return {
        path: packed
        for item in planned.sites
        for path, packed in zip(
            item.site.layers,
            _packed_shapes(tuple(shapes[path] for path in item.site.layers), item.recipe),
            strict=True,
        )
    }


@cache
def _packed_shapes(shapes: tuple[tuple[int, int], ...], recipe: Recipe) -> list[PackedWeight]:
    """Trace `quantize_site` for weights of these shapes: once for all sites alike.

    By rounding: the solver decides which codes, not their shapes, and takes long to trace.
    """
    recipe = recipe.replace(
        **{"solver": "rtn", "scale_search": "rule", "input_error": "ignore", "interleave": True},
        **{"descent": 0, "refit": 0, "block_gain": False, "activation_order": False},
        global_scale="constant",
    )
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    k = shapes[0][1]
    moment = jax.ShapeDtypeStruct((k, k), jnp.float32)
    return jax.eval_shape(partial(quantize_site, recipe=recipe), weights, moment)


def dry_rows(item: SitePlan, layers: Mapping[str, Dense]) -> list[LayerReport]:
    """Return the report's rows of one site before anything is quantized."""
    recipe = item.recipe
    rows = []
    for path, packed in packed_like([item], layers).items():
        first = path == item.site.name or not recipe.share_transform
        rows.append(
            LayerReport(
                path=path,
                site=item.site.name,
                shared_transform=recipe.share_transform,
                shape=layers[path].weight_shape,
                format=f"{recipe.format.name}/{getattr(recipe.input_format, 'name', '-')}",
                transform=recipe.transform,
                solver=recipe.solver,
                block=recipe.block,
                bytes_before=_nbytes(layers[path].kernel),
                bytes_after=_nbytes(packed.weight) + (_nbytes(packed.transform) if first else 0),
            )
        )
    return rows


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def site_gain(item: SitePlan, layers: Mapping[str, Dense], moments: Moments) -> float | None:
    """Mean over blocks of `predicted_gain`; None where the moments have none in float32."""
    weights = [layers[path].weight for path in item.site.layers]
    gains = []
    for index in np.ndindex(weights[0].shape[:-2]):
        blocks = moments.mean[index]
        if blocks.ndim == 2:
            blocks = linalg.diagonal_blocks(blocks, item.recipe.block)
        try:
            weight_moment = site_weight_moment([w[index] for w in weights], blocks)
            gains.append(predicted_gain(weight_moment, blocks, damping=item.recipe.damping))
        except ValueError:
            return None
    return float(np.mean(gains))
