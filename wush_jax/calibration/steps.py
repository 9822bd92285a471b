"""The single steps of quantizing a planned model: quantize, swap, measure, finish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration.host_memory import device_memory
from wush_jax.calibration.losses import LayerLoss
from wush_jax.calibration.observe import Site
from wush_jax.calibration.planning import dry_rows, site_gain
from wush_jax.calibration.replicas import on_one_device
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.site_plan import SitePlan, site_cost
from wush_jax.layers.kernel_layout import pack_for_kernels
from wush_jax.layers.nnx import Dense
from wush_jax.layers.swap import swap
from wush_jax.solvers.batched import few_tokens, filled, quantize_alike, quantize_batched
from wush_jax.solvers.ranges import in_range, refitted
from wush_jax.solvers.recipe import Recipe
from wush_jax.solvers.site import PackedWeight
from wush_jax.transforms.checks import check_weight
from wush_jax.transforms.moments import Moments

# More sites at once bring no more speed.
TOGETHER = 32


def quantize_planned(
    item: SitePlan, layers: Mapping[str, Dense], moments: Moments, prefix: str = ""
) -> dict[str, PackedWeight]:
    """Quantize the layers of one planned site; returns when the arrays are there.

    Args:
      item: the site and its recipe.
      layers: dense layers by path.
      moments: of the site's input.
      prefix: put before the paths in messages.

    Returns:
      Packed weights by path. Where a constant global scale would saturate or lose its digits, it
      is another one (`wush_jax.solvers.ranges`).

    Raises:
      ValueError: naming the layer: non-finite weights, or a moment that is not positive definite.
    """
    weights = [layers[path].weight for path in item.site.layers]
    names = [prefix + path for path in item.site.layers]
    for name, weight in zip(names, weights, strict=True):
        check_weight(name, weight)
    _check_seen(item, layers, moments, names)

    def solve(recipe: Recipe) -> list[PackedWeight]:
        return on_one_device(quantize_batched, weights, moments, recipe=recipe, names=names)

    try:
        packed = in_range(solve, item.recipe, weights, moments)
    except ValueError as error:
        raise ValueError(f"layers {', '.join(names)}: {error}") from error
    # One site at a time: temporaries of several would not fit a device.
    return jax.block_until_ready(dict(zip(item.site.layers, packed, strict=True)))


def _check_seen(
    item: SitePlan, layers: Mapping[str, Dense], moments: Moments, names: Sequence[str]
) -> None:
    """Refuse a site that was traced, but that no token of the calibration has reached."""
    batch = layers[item.site.name].contraction.batch
    if not batch and not np.any(np.asarray(moments.count)):
        raise ValueError(
            f"layers {', '.join(names)}: no calibration token reached them, as in a branch that is "
            "never taken, or where a mask leaves nothing; pass batches that reach them, or exclude "
            f"them by a rule ({item.site.name!r}, None)"
        )


def quantize_all(
    items: Sequence[SitePlan],
    layers: Mapping[str, Dense],
    moments: Callable[[Site], Moments],
    at_once: Callable[[SitePlan], int] | None = None,
    told: Callable[[str], None] | None = None,
) -> dict[str, PackedWeight]:
    """Quantize all planned sites; those of one recipe and shape in one program where that pays.

    Args:
      items: sites and their recipes.
      layers: dense layers by path.
      moments: of a site's input.
      at_once: how many sites like this one are solved together; None: what fits an accelerator's
        memory.
      told: called with the name of each site that is quantized, in the order of `alike`.

    Returns:
      Packed weights by path.

    Raises:
      ValueError: as `quantize_planned`.
    """
    at_once = partial(most_at_once, layers) if at_once is None else at_once
    packed: dict[str, PackedWeight] = {}
    for some in alike(items, layers):
        count = at_once(some[0])
        for i in range(0, len(some), count):
            packed |= _quantize_together(some[i : i + count], layers, moments)
            if told is not None:
                for item in some[i : i + count]:
                    told(item.site.name)
    return packed


def alike(items: Sequence[SitePlan], layers: Mapping[str, Dense]) -> list[list[SitePlan]]:
    """Return sites by recipe and shape, in the order in which `quantize_all` takes them."""
    found: dict[Any, list[SitePlan]] = {}
    for item in items:
        weights = [jax.eval_shape(lambda p=p: layers[p].weight) for p in item.site.layers]
        key = item.recipe, tuple((w.shape, str(w.dtype)) for w in weights)
        found.setdefault(key, []).append(item)
    return list(found.values())


def most_at_once(layers: Mapping[str, Dense], item: SitePlan) -> int:
    """Return how many sites like this one an accelerator solves at once: in half of what is free.

    One on a CPU, whose cores are busy with one already (and whose LAPACK, before jaxlib 0.11, may
    hang in a batch), where layers are batches of kernels, and where weights lie on a mesh.
    """
    free = device_memory()
    batch = layers[item.site.name].contraction.batch
    kernels = (layers[path].kernel for path in item.site.layers)
    spread = any(len(k.devices()) > 1 for k in kernels if isinstance(k, jax.Array))
    if jax.default_backend() == "cpu" or batch or spread or free is None:
        return 1
    own = free // jax.local_device_count()  # they are solved on one
    return max(1, min(TOGETHER, own // (2 * site_cost(item, layers).solver_bytes)))


def _quantize_together(
    items: Sequence[SitePlan], layers: Mapping[str, Dense], moments: Callable[[Site], Moments]
) -> dict[str, PackedWeight]:
    """Quantize sites alike in one program; alone what needs other constants than its recipe's."""
    recipe, names = items[0].recipe, [item.site.layers for item in items]
    known = [moments(item.site) for item in items]
    kept = {tuple(map(jnp.shape, jax.tree.leaves(moment))) for moment in known}
    if len(items) == 1 or len(kept) > 1 or recipe.global_scale == "derived":
        alone = partial(quantize_planned, layers=layers)
        each = (alone(item, moments=moment) for item, moment in zip(items, known, strict=True))
        return {path: packed for found in each for path, packed in found.items()}
    for item, moment in zip(items, known, strict=True):
        _check_seen(item, layers, moment, item.site.layers)
    weights = [[layers[path].weight for path in some] for some in names]
    found = quantize_alike(weights, known, recipe, names=names)
    packed: dict[str, PackedWeight] = {}
    for item, own, solved, moment in zip(items, weights, found, known, strict=True):
        if refitted(recipe, own, solved, moment) is None:
            packed |= dict(zip(item.site.layers, solved, strict=True))
        else:
            packed |= quantize_planned(item, layers, moment)
    return jax.block_until_ready(packed)


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
    return quantized, Report(rows, dry.skipped, dry.unused_rules, dry.details, dry.notes)


def measured_rows(
    item: SitePlan,
    layers: Mapping[str, Dense],
    moments: Moments,
    losses: Mapping[str, LayerLoss],
) -> list[LayerReport]:
    """Return the report's rows of one quantized site."""
    batch = layers[item.site.name].contraction.batch
    few = few_tokens(moments, batch, item.recipe.block) if batch else {}
    gain = site_gain(item, layers, filled(moments, batch, item.recipe.block) if few else moments)
    tokens = int(np.min(np.asarray(moments.count)))
    return [
        replace(
            row,
            predicted_gain=gain,
            loss=losses[row.path].loss,
            relative_loss=losses[row.path].relative,
            typical_loss=losses[row.path].typical,
            saturated=losses[row.path].saturated,
            vanished=losses[row.path].vanished,
            tokens=tokens,
            few_tokens={",".join(map(str, i)): n for i, n in few.items()} or None,
        )
        for row in dry_rows(item, layers)
    ]
