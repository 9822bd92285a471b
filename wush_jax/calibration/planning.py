"""What will be done to a model (the dry run), and its single steps: quantize, swap, measure."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax import linalg, numerics
from wush_jax.batched import packed_shapes, quantize_batched
from wush_jax.calibrate import (
    Call,
    Site,
    collect_moments,
    find_sites,
    plain_call,
)
from wush_jax.costs import SiteCost, total_costs
from wush_jax.kernel_layout import pack_for_kernels
from wush_jax.losses import LayerLoss
from wush_jax.moments import Moments
from wush_jax.nnx import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    Packed,
    QuantizedDense,
    dense_layers,
    replace_modules,
)
from wush_jax.recipe import Recipe, RuleBook, Rules
from wush_jax.replicas import on_one_device
from wush_jax.report import LayerReport, Report
from wush_jax.sample import Sample
from wush_jax.site import PackedWeight, quantize_site
from wush_jax.site_transform import site_weight_moment
from wush_jax.transforms import predicted_gain

# Rows of a site's input that are kept for recipes that look at single tokens: enough for the error
# moments of blocks of 128, and for eight gains to be told apart.
SAMPLE_ROWS = 2048


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


@dataclass(frozen=True)
class ModelPlan:
    """What `quantize_model` will do: a dry run.

    Attributes:
      sites: what is quantized, in the order of calls.
      report: the same, with sizes, for people.
    """

    sites: Sequence[SitePlan]
    report: Report

    @property
    def sample_rows(self) -> int:
        """The most rows that any site has to keep."""
        return max(item.sample_rows for item in self.sites)


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
      batch: one batch (or its shapes) to trace which layers share an input; without it every
        layer is a site of its own.
      measure: run the batch (twice, once timed) for every layer's predicted gain and the seconds a
        calibration batch takes. Without it nothing is computed.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.

    Returns:
      `ModelPlan`; its report lists layers, shapes, bytes before and after, what is skipped and
      why, and rules that decide no layer; its details say what the plan costs offline and at run
      time (`wush_jax.costs`) and, where measured, ``seconds_per_batch``.

    Raises:
      ValueError: malformed rules, a recipe that does not fit a layer, nothing to quantize.

    >>> layer = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    >>> plan(layer, Recipe()).report.layers[0].bytes_after
    5188
    """
    book = RuleBook(rules)
    layers, skipped = dense_layers(model, dense_types)
    recipes = {path: book.match(path) for path in layers}
    skipped |= {path: "no rule, or a rule with None" for path, r in recipes.items() if r is None}
    if batch is None:
        sites = tuple(Site((path,), la.contraction.shape[1]) for path, la in layers.items())
    else:
        sites = find_sites(model, batch, call=call, dense_types=dense_types)
        reached = set(itertools.chain.from_iterable(site.layers for site in sites))
        skipped |= {path: "not reached by the call" for path in layers if path not in reached}
    planned = []
    for site in sites:
        # Layers of one site may have different recipes: each recipe has its own transform.
        for recipe in dict.fromkeys(recipes[path] for path in site.layers):
            if recipe is not None:
                chosen = tuple(path for path in site.layers if recipes[path] == recipe)
                planned.append(SitePlan(Site(chosen, site.size), recipe))
    if not planned:
        raise ValueError(f"rules quantize none of the {len(layers)} dense layers: {skipped}")
    for item in planned:
        _check_fits(item)
    rows = [row for item in planned for row in _dry_rows(item, layers)]
    details: dict[str, Any] = dict(total_costs([site_cost(i, layers) for i in planned]))
    if measure:
        if batch is None:
            raise ValueError("measure=True needs a batch to run; pass one")
        gains, details["seconds_per_batch"] = _measure(model, planned, batch, call, dense_types)
        rows = [replace(row, predicted_gain=gains[row.path]) for row in rows]
    return ModelPlan(planned, Report(rows, skipped, book.unused(layers), details))


def site_cost(item: SitePlan, layers: Mapping[str, Dense]) -> SiteCost:
    """Return what a planned site costs."""
    return SiteCost(
        item.recipe,
        item.site.size,
        tuple(math.prod(layers[path].contraction.shape) for path in item.site.layers),
        math.prod(layers[item.site.name].contraction.batch),
        item.sample_rows,
    )


def _measure(model, planned, batch, call, dense_types) -> tuple[dict[str, float | None], float]:
    """Predicted gain by layer, and the seconds of a calibration batch once it is compiled."""
    layers, _ = dense_layers(model, dense_types)
    blocks = {item.site: item.moment_block for item in planned}
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    jax.block_until_ready(collect_moments(model, [batch], blocks, **options))
    start = time.perf_counter()
    moments = jax.block_until_ready(collect_moments(model, [batch], blocks, **options))
    seconds = time.perf_counter() - start
    gains = {
        path: _site_gain(item, layers, moments[item.site])
        for item in planned
        for path in item.site.layers
    }
    return gains, seconds


def quantize_planned(
    item: SitePlan, layers: Mapping[str, Dense], moments: Moments, prefix: str = ""
) -> dict[str, PackedWeight]:
    """Quantize the layers of one planned site; returns when the arrays are there.

    Args:
      item: the site and its recipe.
      layers: dense layers by path.
      moments: of the site's input.
      prefix: put before the paths in messages.

    Raises:
      ValueError: naming the layer: non-finite weights, or a moment that is not positive definite.
    """
    weights = [layers[path].weight for path in item.site.layers]
    names = [prefix + path for path in item.site.layers]
    for name, weight in zip(names, weights, strict=True):
        if numerics.not_finite(weight):
            raise ValueError(f"layer {name}: its weight has non-finite values; mend the checkpoint")
    try:
        packed = on_one_device(quantize_batched, weights, moments, recipe=item.recipe, names=names)
    except ValueError as error:
        raise ValueError(f"layers {', '.join(names)}: {error}") from error
    # One site at a time: temporaries of several would not fit a device.
    return jax.block_until_ready(dict(zip(item.site.layers, packed, strict=True)))


def swap(
    model: nnx.Module,
    layers: dict[str, Dense],
    packed: dict[str, PackedWeight],
    implementation: str | None = None,
) -> nnx.Module:
    """Return the model with `QuantizedDense` layers in place of those that were packed.

    Layers whose packed weights hold the very same transform array share one variable.
    """
    shared: dict[int, Packed] = {}

    def quantized(path: str, module: nnx.Module) -> nnx.Module | None:
        if path not in packed:
            return None
        transform = packed[path].transform
        variable = None
        if transform is not None:
            variable = shared.setdefault(id(transform), Packed(transform))
        return QuantizedDense(
            layers[path], packed[path], transform=variable, implementation=implementation
        )

    return replace_modules(model, quantized)


def finish(
    model: nnx.Module,
    layers: dict[str, Dense],
    packed: dict[str, PackedWeight],
    implementation: str | None,
    rows: Sequence[LayerReport],
    dry: Report,
) -> tuple[nnx.Module, Report]:
    """Return the quantized model, laid out for this device's kernels, and its report.

    ``packed`` is emptied, so that every weight is freed once it is laid out.
    """
    quantized = swap(model, layers, packed, implementation)
    packed.clear()
    gained = pack_for_kernels(quantized)
    rows = [replace(row, bytes_after=row.bytes_after + gained.get(row.path, 0)) for row in rows]
    return quantized, Report(rows, dry.skipped, dry.unused_rules, dry.details)


def _check_fits(item: SitePlan) -> None:
    if item.site.size % item.recipe.block:
        raise ValueError(
            f"layer {item.site.name}: K={item.site.size} is not a multiple of block_size="
            f"{item.recipe.block}; choose another block_size or exclude the layer by a rule"
        )


def packed_like(sites: Sequence[SitePlan], layers: Mapping[str, Dense]) -> dict[str, PackedWeight]:
    """Return what quantizing would leave, as shapes: a dry run of `quantize_planned`."""
    out: dict[str, PackedWeight] = {}
    for item in sites:
        shapes = tuple(layers[path].contraction.shape for path in item.site.layers)
        batch = layers[item.site.name].contraction.batch
        packed = packed_shapes(_packed_shapes(shapes, item.recipe), batch)
        out |= dict(zip(item.site.layers, packed, strict=True))
    return out


@cache
def _packed_shapes(shapes: tuple[tuple[int, int], ...], recipe: Recipe) -> list[PackedWeight]:
    """Trace `quantize_site` for weights of these shapes: once for all sites alike."""
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    k = shapes[0][1]
    moment = jax.ShapeDtypeStruct((k, k), jnp.float32)
    sample = jax.eval_shape(partial(Sample.init, k, 1)) if recipe.needs_sample else None

    def quantize(weights, moment, sample):
        return quantize_site(weights, moment, recipe, sample=sample)

    return jax.eval_shape(quantize, weights, moment, sample)


def _dry_rows(item: SitePlan, layers: Mapping[str, Dense]) -> list[LayerReport]:
    recipe = item.recipe
    rows = []
    for path, packed in packed_like([item], layers).items():
        first = path == item.site.name or not recipe.share_transform
        rows.append(
            LayerReport(
                path=path,
                site=item.site.name,
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


def measured_rows(
    item: SitePlan,
    layers: Mapping[str, Dense],
    moments: Moments,
    losses: Mapping[str, LayerLoss],
) -> list[LayerReport]:
    """Return the report's rows of one quantized site."""
    gain = _site_gain(item, layers, moments)
    return [
        replace(
            row,
            predicted_gain=gain,
            loss=losses[row.path].loss,
            relative_loss=losses[row.path].relative,
            typical_loss=losses[row.path].typical,
        )
        for row in _dry_rows(item, layers)
    ]


def _site_gain(item: SitePlan, layers: Mapping[str, Dense], moments: Moments) -> float | None:
    """Mean over blocks of `predicted_gain`; None where a moment without damping has none."""
    weights = [layers[path].weight for path in item.site.layers]
    gains = []
    for index in np.ndindex(weights[0].shape[:-2]):
        blocks = moments.mean[index]
        if blocks.ndim == 2:
            blocks = linalg.diagonal_blocks(blocks, item.recipe.block)
        weight_moment = site_weight_moment([w[index] for w in weights], blocks)
        try:
            gains.append(predicted_gain(weight_moment, blocks, damping=item.recipe.damping))
        except ValueError:
            return None
    return float(np.mean(gains))
