"""Ask for quality: the smallest plan whose predicted KL keeps a promise, or the best of a size.

What a layer's error costs in KL hangs on the layer. `kl_slopes` measures that once, site by site;
the KL of any plan is then predicted from the losses of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration.calibration import Calibration
from wush_jax.calibration.choices import Choice, meet, spend
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.site_plan import SitePlan, planned_sites
from wush_jax.calibration.sites import Call, Site, plain_call
from wush_jax.calibration.steps import quantize_planned
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    QuantizedDense,
    dense_layers,
    dotted,
    replace_modules,
)
from wush_jax.solvers.presets import FAST
from wush_jax.solvers.recipe import Recipe, RuleBook, Rules
from wush_jax.solvers.site import PackedWeight


@dataclass(frozen=True)
class Limit:
    """What a plan has to stay within, one of three: a KL, in the fewest bytes; or a size.

    Attributes:
      max_kl: nats, predicted.
      max_bits: of a weight: the mean over all weights that may be quantized, their scales and
        transforms counted.
      max_bytes: of these weights, scales and transforms together.
    """

    max_kl: float | None = None
    max_bits: float | None = None
    max_bytes: int | None = None

    @property
    def given(self) -> dict[str, float]:
        """Those that are not None, by name.

        >>> Limit(max_bits=4.5).given
        {'max_bits': 4.5}
        """
        return {name: value for name, value in asdict(self).items() if value is not None}

    def faults(self) -> list[str]:
        """Return what is wrong with it, in words."""
        found = [
            f"{name}={value} must be positive and finite"
            for name, value in self.given.items()
            if not 0 < value < float("inf")
        ]
        if len(self.given) != 1:
            named = ", ".join(f"{name}={value}" for name, value in asdict(self).items())
            found.append(f"{named}: give one of them")
        return found

    def room(self, weights: int) -> int:
        """Return the bytes that so many weights may take.

        >>> Limit(max_bits=4.5).room(16)
        9
        """
        if self.max_bytes is not None:
            return self.max_bytes
        assert self.max_bits is not None
        return int(self.max_bits * weights / 8)


@dataclass(frozen=True)
class Slopes:
    """What the output losses of a model's layers cost in KL.

    ``KL = together * sum over layers of slope * relative loss``

    Attributes:
      slopes: KL in nats for a relative loss of one, by layer; those of one site have one slope.
      together: KL of all sites at once over the sum of the KLs of one at a time, in the setting
        that the slopes were measured with.
    """

    slopes: Mapping[str, float]
    together: float

    def predict(self, losses: Mapping[str, float]) -> float:
        """Return the KL of a plan from its layers' relative losses; layers not named lose nothing.

        >>> Slopes({"a": 2.0, "b": 1.0}, 1.5).predict({"a": 0.01, "b": 0.02})
        0.06
        """
        return self.together * sum(self.slopes[path] * loss for path, loss in losses.items())


class Gated(nnx.Module):
    """A dense layer and its quantized form, of which a flag says which one runs."""

    def __init__(self, layer: nnx.Module, quantized: QuantizedDense):
        self.layer, self.quantized = layer, quantized
        self.flag = nnx.Variable(jnp.bool_(False))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Run one of both."""
        exact = partial(_call, self.layer)
        return jax.lax.cond(self.flag[...], partial(_call, self.quantized), exact, x)


def _call(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


def kl_slopes(
    model: nnx.Module,
    calibration: Calibration,
    rules: Rules = FAST,
    batches: Sequence[Any] | None = None,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> Slopes:
    """Measure what each site's error costs in KL, by quantizing one site at a time.

    One compilation serves all sites. Measure a model in float32: in bfloat16 anything that changes
    at all costs some KL, as much as a site's 4-bit error may.

    Args:
      model: an NNX language model, tokens to logits.
      calibration: of it.
      rules: how sites are quantized to see what their errors cost; layers without a recipe have no
        slope.
      batches: to measure on; None is the calibration's first.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.

    Raises:
      ValueError: as `wush_jax.quantize_model`; no batch.
    """
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    layers, skipped = dense_layers(model, dense_types)
    planned, _ = planned_sites(calibration.sites, RuleBook(rules), layers, skipped)
    calibration.check(model, layers, planned)
    batches = [calibration.first] if batches is None else list(batches)
    if not batches:
        raise ValueError("batches is empty; pass at least one batch to measure KL on")
    packed: dict[str, PackedWeight] = {}
    for item in planned:
        packed |= quantize_planned(item, layers, calibration.of(item.site))
    sites = [item.site for item in planned]
    losses = layer_losses(model, batches[0], sites, packed, **options)
    measure = gated_kl(model, layers, packed, batches, call)
    each = [measure(site.layers) for site in sites]
    everything = measure(tuple(packed))
    total = [sum(losses[path].relative for path in site.layers) for site in sites]
    slopes = {
        path: kl / loss if loss > 0 else 0.0
        for site, kl, loss in zip(sites, each, total, strict=True)
        for path in site.layers
    }
    return Slopes(slopes, everything / sum(each) if sum(each) > 0 else 1.0)


def gated_kl(
    model: nnx.Module,
    layers: Mapping[str, Dense],
    packed: Mapping[str, PackedWeight],
    batches: Sequence[Any],
    call: Call = plain_call,
) -> Callable[[Sequence[str]], float]:
    """Return a function from layers to the KL of the model with only these quantized.

    Args:
      model: an NNX language model; it is left as it is.
      layers: its dense layers.
      packed: quantized layers by path.
      batches: to measure on.
      call: how to run the model on a batch.
    """
    places = {path: i for i, path in enumerate(packed)}

    def gated(path: str, module: nnx.Module) -> nnx.Module | None:
        if path not in packed:
            return None
        return Gated(module, QuantizedDense(layers[path], packed[path]))

    graph, state = nnx.split(replace_modules(model, gated))

    @jax.jit
    def logits(state, flags, batch):
        merged = nnx.merge(graph, state)
        for path, module in nnx.iter_modules(merged):
            if isinstance(module, Gated):
                module.flag.set_value(flags[places[dotted(path)]])
        return jax.nn.log_softmax(call(merged, batch).astype(jnp.float32))

    @jax.jit
    def divergence(state, flags, batch):
        p, q = logits(state, jnp.zeros_like(flags), batch), logits(state, flags, batch)
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    def measure(paths: Sequence[str]) -> float:
        flags = np.zeros(len(places), bool)
        flags[[places[path] for path in paths]] = True
        return float(np.mean([float(divergence(state, flags, batch)) for batch in batches]))

    return measure


def within(
    model: nnx.Module,
    calibration: Calibration,
    rules: Rules,
    limit: Limit,
    slopes: Slopes,
    *,
    candidates: Sequence[Recipe | None],
    held_out: Any = None,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> list[Choice]:
    """Return the best plan within a limit: one choice a site.

    Every candidate is quantized in full, as it would be in the end.

    Args:
      model: an NNX module.
      calibration: of it.
      rules: which layers may be quantized; their recipes do not matter.
      limit: what it has to stay within.
      slopes: of the model, from `kl_slopes`.
      candidates: recipes to try on every site that they fit; None leaves a site as it is.
      held_out: the batch for the losses; None is the calibration's first.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.

    Raises:
      ValueError: a limit that no candidates keep, a site without a slope.
    """
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    layers, skipped = dense_layers(model, dense_types)
    planned, _ = planned_sites(calibration.sites, RuleBook(rules), layers, skipped)
    calibration.check(model, layers, planned)
    missing = [p for i in planned for p in i.site.layers if p not in slopes.slopes]
    if missing:
        raise ValueError(f"slopes: layers {', '.join(missing)} have none; measure them, too")
    batch = calibration.first if held_out is None else held_out
    table: dict[Site, list[Choice]] = {}
    for site in (item.site for item in planned):
        table[site] = []
        for recipe in candidates:
            fitted = None if recipe is None else recipe.fitted(site.size)
            if fitted is None:
                table[site].append(Choice(site, None, 0.0, _bytes(layers, site)))
            elif site.size % fitted.block == 0:
                item = SitePlan(site, fitted)
                packed = quantize_planned(item, layers, calibration.of(site))
                found = layer_losses(model, batch, [site], packed, **options).values()
                loss = float(np.mean([x.relative for x in found]))
                table[site].append(Choice(site, fitted, loss, _packed_bytes(packed)))

    def cost(choice: Choice) -> float:
        return slopes.predict(dict.fromkeys(choice.site.layers, choice.loss))

    if limit.max_kl is not None:
        return meet(table, cost, limit.max_kl)
    weights = sum(math.prod(layers[path].weight_shape) for site in table for path in site.layers)
    room = limit.room(weights)
    least = sum(min(choice.nbytes for choice in choices) for choices in table.values())
    if least > room:
        ((name, value),) = limit.given.items()
        raise ValueError(
            f"{name}={value} cannot be kept: the smallest candidates of every site together take "
            f"{least} bytes, {8 * least / weights:.4g} bits a weight; add smaller, or allow more"
        )
    return spend(table, room, cost)


def with_recipe(rules: Rules, recipe: Recipe) -> Rules:
    """Return the same rules with one recipe in place of all.

    >>> with_recipe([("head", None), (".*", FAST)], Recipe()) == [("head", None), (".*", Recipe())]
    True
    """
    if isinstance(rules, Recipe):
        return recipe
    return [(pattern, None if given is None else recipe) for pattern, given in rules]


def _bytes(layers: Mapping[str, Dense], site: Site) -> int:
    return sum(layers[path].kernel.nbytes for path in site.layers)


def _packed_bytes(packed: Mapping[str, PackedWeight]) -> int:
    """Of weights and transforms, a shared one counted once."""
    shared = {id(p.transform): p.transform for p in packed.values()}
    transforms = sum(t.nbytes for t in shared.values() if t is not None)
    return transforms + sum(p.weight.nbytes for p in packed.values())
