"""What a model's inputs are, kept: observed once, then used by any number of recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration import calibration_files
from wush_jax.calibration.host_memory import check_device_memory, within_memory
from wush_jax.calibration.observe import (
    Call,
    Progress,
    Site,
    collect_moments,
    observe_calls,
    plain_call,
)
from wush_jax.calibration.resume import model_digest
from wush_jax.calibration.site_plan import (
    SitePlan,
    kept_blocks,
    kept_rows,
    moment_costs,
    planned_sites,
)
from wush_jax.calibration.token_weights import TokenWeights, check_token_weights
from wush_jax.formats.checks import check_kind
from wush_jax.layers.nnx import DENSE_TYPES, Dense, DenseTypes, dense_layers
from wush_jax.models.tokens import check_batches_given, model_inputs
from wush_jax.solvers.batched import empty_moments
from wush_jax.solvers.recipe import RuleBook, Rules
from wush_jax.storage.tensor_folder import some
from wush_jax.transforms.moments import Moments

# From sites, layers by path and reasons by path for those that cannot be quantized, to what
# calibration has to serve.
Wanted = Callable[[Sequence[Site], Mapping[str, Dense], Mapping[str, str]], Sequence[SitePlan]]
EVERY_RECIPE = "give calibrate the rules that it has to serve: it then keeps what they need; or "


@dataclass(frozen=True, eq=False)  # its arrays are not compared
class Calibration:
    """The inputs of a model's dense layers, as far as quantizing needs them.

    Made by `wush_jax.calibrate`; taken by `wush_jax.quantize_model`, `wush_jax.plan`,
    `wush_jax.choose_recipes` and `wush_jax.evaluation.compare` in place of batches.

    Attributes:
      sites: all that the model's call reaches, in the order of their first call.
      shapes: (N, K) of each of their layers by path; with leading axes for batches of kernels.
      moments: second moment, sampled rows and largest magnitude of the input, by site.
      first: the first batch; reports measure losses on it.
      batches: how many were seen.
      fingerprint: a hash of the model's weights, or None where nobody has asked for it.
      token_weights: how tokens were weighed, or None where all count alike.
    """

    sites: tuple[Site, ...]
    shapes: Mapping[str, tuple[int, ...]]
    moments: Mapping[Site, Moments]
    first: Any
    batches: int
    fingerprint: str | None = None
    token_weights: TokenWeights | None = None

    @property
    def tokens(self) -> int:
        """Rows that the first site has seen."""
        return int(np.sum(np.asarray(next(iter(self.moments.values())).count)))

    @property
    def largest(self) -> dict[str, float]:
        """The largest magnitude of each site's input, by the path of its first layer."""
        return {s.name: float(np.max(np.asarray(m.largest))) for s, m in self.moments.items()}

    def of(self, site: Site) -> Moments:
        """Return what is known of a site's input, or of a site of only some of its layers.

        Raises:
          ValueError: nothing is.
        """
        return jax.tree.map(jnp.asarray, self.moments[self._whole(site)])

    def _whole(self, site: Site) -> Site:
        """The site that was observed, of which this one may be a part."""
        for known in self.moments:
            if set(site.layers) <= set(known.layers):
                return known
        raise ValueError(
            f"calibration: site {site.name} is not in it ({some(s.name for s in self.moments)} "
            "are); calibrate for rules that quantize it, or for none to keep every site"
        )

    def check(
        self,
        model: nnx.Module,
        layers: Mapping[str, Dense],
        planned: Sequence[SitePlan] = (),
    ) -> None:
        """Raise ValueError, with what differs, unless it is of this model and serves the plan.

        Args:
          model: an NNX module; of one of shapes alone the weights are not compared.
          layers: its dense layers by path.
          planned: sites and their recipes.
        """
        faults = [
            f"layer {path} has shape {_shape(layers.get(path))}, it had {shape}"
            for path, shape in self.shapes.items()
            if _shape(layers.get(path)) != shape
        ]
        if not faults and self.fingerprint is not None:
            found = model_digest(model)
            if found not in (None, self.fingerprint):
                faults.append(f"the weights differ: their hash is {found}, not {self.fingerprint}")
        if faults:
            more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise ValueError(
                f"calibration is of another model: {'; '.join(faults[:4])}{more}. Calibrate this "
                "model, or give the one that was calibrated"
            )
        faults = [fault for item in planned if (fault := self._missing(item))]
        if faults:
            raise ValueError(
                f"calibration keeps too little: {'; '.join(faults[:4])}. Calibrate for these "
                "rules, or for none to keep what every recipe needs"
            )

    def save(self, folder: str | Path) -> None:
        """Write it as a folder that appears whole, or not at all, with checksums.

        Args:
          folder: an earlier calibration there is replaced, anything else is refused.

        Raises:
          ValueError: other files are in the folder, or a first batch that is no array, dict, list
            or tuple.
          OSError: the disk is full, the place not writable.
        """
        about = {
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "sites": [
                {
                    "layers": list(site.layers),
                    "size": site.size,
                    "kept": self._kept(site) if site in self.moments else None,
                }
                for site in self.sites
            ],
            "batches": self.batches,
            "fingerprint": self.fingerprint,
            "token_weights": self.token_weights,
        }
        moments = {site.name: m for site, m in self.moments.items()}
        calibration_files.write(folder, about, moments, self.first)

    def _kept(self, site: Site) -> dict[str, int | None]:
        """What is kept of a site, as `empty_moments` calls it."""
        moments, batch = self.moments[site], self.shapes[site.name][:-2]
        full = moments.mean.ndim - len(batch) == 2
        rows = 0 if moments.sample is None else moments.sample.rows.shape[-2]
        return {"block": None if full else moments.mean.shape[-1], "rows": rows}

    def _missing(self, item: SitePlan) -> str | None:
        """What a recipe needs of its site and calibration has not kept."""
        kept, name = self._kept(self._whole(item.site)), item.site.name
        if kept["block"] not in (None, item.moment_block):
            full = item.moment_block is None
            need = "the full moment" if full else f"blocks of {item.moment_block}"
            return f"of site {name} it has moments of blocks of {kept['block']}, needed: {need}"
        if item.recipe.needs_sample and not kept["rows"]:
            return f"of site {name} it has no sampled rows, needed: some"
        return None

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read what `save` wrote; every value is checked, and stays on disk until it is used.

        Raises:
          ValueError: no calibration, or files that are missing, damaged or hostile, by name.
        """
        opened = calibration_files.open_calibration(folder)
        with calibration_files.sound(opened):
            about = opened.config["calibration"]
            shapes = {path: tuple(map(index, shape)) for path, shape in about["shapes"].items()}
            sites = tuple(Site(tuple(s["layers"]), index(s["size"])) for s in about["sites"])
            token_weights = about.get("token_weights")  # of none in files from before it was there
            check_token_weights(token_weights)
            more: dict[str, Any] = {"weighted": token_weights is not None}
            kept = {
                site: partial(
                    empty_moments, site.size, batch=shapes[site.name][:-2], **s["kept"], **more
                )
                for site, s in zip(sites, about["sites"], strict=True)
                if s["kept"] is not None
            }
            like = {site.name: jax.eval_shape(make) for site, make in kept.items()}
            found, first = calibration_files.read(opened, like, about["first"])
            moments = {site: found[site.name] for site in kept}
            seen, fingerprint = index(about["batches"]), about["fingerprint"]
            return cls(sites, shapes, moments, first, seen, fingerprint, token_weights)


def _shape(layer: Dense | None) -> tuple[int, ...] | None:
    return None if layer is None else layer.weight_shape


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *rules: Rules,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    rows: int | None = None,
    token_weights: TokenWeights | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run a model on calibration batches and keep what quantizing needs to know of its inputs.

    Of every site ``M_X = sum_t x_t x_t^T / T`` over the tokens t of all batches, a sample of the
    rows themselves, and the largest magnitude. Full moments and 2048 rows, the default, serve
    every recipe and take ``4 K (K + 2048)`` bytes a site.

    Args:
      model: an NNX module; it is left as it is.
      batches: inputs of the model, read once.
      rules: as for `wush_jax.plan`, as many as you like: only what they need is kept, such as
        blocks of moments for rounding to nearest. None keeps what every recipe needs.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.
      rows: of every site's input to keep; None is 2048, or what the rules need. 0 keeps none.
      token_weights: "gradient" counts a token of a site by the norm of the gradient of log p(label)
        by the outputs of its layers, labels drawn from the model's own predictions; the call has to
        return logits. Takes a backward pass a batch, and what that keeps of the forward pass. None
        counts all tokens alike.
      progress: called with the number of batches done, None and "calibrate".

    Returns:
      A `Calibration`.

    Raises:
      ValueError: no batches, what is no token of a language model, no dense layer that the call
        reaches, inputs that are not finite, with the site's name; rules that do not fit; moments
        that cannot fit the devices' memory; token weights of a model that returns no logits, or
        has no gradient.
      NotImplementedError: token weights of a layer that gradients cannot be followed to.
      MemoryError: it ran out on the way; with what was planned.

    Source: WUSH paper, eq. 4; token weights: GuidedQuant (Kim et al., 2025) has the squares of
    gradients, of the training loss, by groups of outputs.

    >>> from wush_jax import BEST, Recipe, quantize_model
    >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    >>> batch = jax.random.normal(jax.random.key(0), (128, 64))
    >>> calibration = calibrate(model, [batch])
    >>> calibration.tokens, calibration.sites[0].layers
    (128, ('layers.0',))
    >>> for recipe in Recipe(), Recipe(transform="hadamard"):
    ...     quantized, report = quantize_model(model, calibration, recipe)
    """
    check_token_weights(token_weights)
    options: dict[str, Any] = {"call": call, "dense_types": dense_types, "progress": progress}
    options["token_weights"] = token_weights
    wanted = parts_of(*rules) if rules else None
    found = observe(model, batches, wanted, rows=rows, **options)
    return replace(found, fingerprint=model_digest(model))


def parts_of(*rules: Rules) -> Wanted:
    """Return the `Wanted` of rules."""

    def wanted(sites, layers, skipped):
        each = (planned_sites(sites, RuleBook(one), layers, skipped)[0] for one in rules)
        return list(itertools.chain.from_iterable(each))

    return wanted


def observe(
    model: nnx.Module,
    batches: Iterable[Any],
    wanted: Wanted | None,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    rows: int | None = None,
    token_weights: TokenWeights | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Do the work of `calibrate`, without the hash of the model: for use at once.

    Args:
      model: an NNX module.
      batches: as for `calibrate`.
      wanted: what has to be served; None for everything.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.
      rows: as for `calibrate`.
      token_weights: as for `calibrate`.
      progress: as for `calibrate`.
    """
    check_kind(nnx.Module, "an NNX module", model=model)
    check_batches_given(batches)
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    batches = iter(model_inputs(model, batches) if call is plain_call else batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches is empty; pass at least one calibration batch")
    calls = observe_calls(model, first, **options)
    model, sites = calls.marked(model, dense_types), calls.sites
    layers, skipped = dense_layers(model, dense_types)
    skipped |= calls.faults
    if not sites:
        raise ValueError(
            f"model: its call reaches none of its {len(layers)} dense layers; pass call= or "
            f"dense_types= (it also has {skipped})"
        )
    parts = None if wanted is None else wanted(sites, layers, skipped)
    blocks = dict.fromkeys(sites) if parts is None else kept_blocks(sites, parts)
    rows = kept_rows(rows, parts)
    costs = moment_costs(blocks, parts or (), layers, rows)
    check_device_memory(costs, sequential=False, remedy=EVERY_RECIPE if parts is None else "")
    seen = itertools.count()
    counted = (batch for batch, _ in zip(itertools.chain([first], batches), seen, strict=False))
    with within_memory(costs):
        options |= {"rows": rows, "progress": progress, "token_weights": token_weights}
        try:
            moments = collect_moments(model, counted, blocks, **options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error}; as batches give what call(model, batch) takes") from error
    shapes = {path: layers[path].weight_shape for site in sites for path in site.layers}
    return Calibration(sites, shapes, moments, first, next(seen), token_weights=token_weights)
