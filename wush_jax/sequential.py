"""Calibration layer after layer: every site sees what the layers quantized before it put out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from wush_jax.calibrate import Call, Progress, Site, collect_moments, plain_call
from wush_jax.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.planning import (
    ModelPlan,
    SitePlan,
    layer_losses,
    measured_rows,
    packed_like,
    plan,
    quantize_planned,
    swap,
)
from wush_jax.recipe import Rules
from wush_jax.report import LayerReport, Report
from wush_jax.resume import RunState, digest
from wush_jax.site import PackedWeight


@dataclass(frozen=True)
class Stack:
    """How to run a decoder layer by layer.

    Attributes:
      layers: attribute of the model that holds the layers, a sequence of modules.
      embed: (model, batch) -> the first layer's input, a (batch, length, width) array.
      layer: (layer, hidden) -> hidden.
    """

    layers: str = "layers"
    embed: Callable[[Any, Any], jax.Array] = lambda model, batch: model.embed(batch)
    layer: Callable[[nnx.Module, jax.Array], jax.Array] = plain_call


DECODER = Stack()


@dataclass(frozen=True)
class Sequential:
    """Settings of a sequential calibration.

    Attributes:
      stack: how to run the model layer by layer.
      granularity: "site": each site of a layer sees the sites before it quantized (one pass over
        the data a site); "layer": all sites of a layer in one pass.
      hidden_dtype: of the layers' inputs, kept on the host.
      sharding: of a batch's hidden states, such as over a mesh's data axis; moments are then
        reduced by the compiler. With several processes each passes its own batches.
      state_dir: folder that keeps every finished layer; None keeps nothing.
      resume: continue the run in ``state_dir``.
    """

    stack: Stack = DECODER
    granularity: Literal["site", "layer"] = "site"
    hidden_dtype: str = "bfloat16"
    sharding: Sharding | None = None
    state_dir: str | Path | None = None
    resume: bool = False

    def __post_init__(self):
        if self.granularity not in ("site", "layer"):
            raise ValueError(f"granularity={self.granularity!r} is unknown; use 'site' or 'layer'")
        if self.resume and self.state_dir is None:
            raise ValueError("resume=True needs the state_dir of the run to continue")


def quantize_sequentially(
    model: nnx.Module,
    batches: Iterable[Any],
    rules: Rules,
    settings: Sequential,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    implementation: str | None = None,
    progress: Progress | None = None,
) -> tuple[nnx.Module, Report]:
    """Quantize a model layer after layer; dense layers outside the stack come last.

    The inputs of the current layer stay on the host, in chunks as the batches come. Layers of
    equal shape share their compiled functions. With a ``state_dir`` every finished layer is on
    disk; a resumed run recomputes the hidden states through them and ends with the same bytes.

    Args:
      model: an NNX module with a stack of layers.
      batches: calibration inputs; kept in memory.
      rules: as for `wush_jax.plan`.
      settings: see `Sequential`.
      call: how to run the whole model on a batch.
      dense_types: module types that are dense layers.
      implementation: of the quantized layers.
      progress: called as ``progress(done, total, what)``, in passes over a chunk.

    Returns:
      The quantized model and a `Report`; losses are on the first batch.

    Raises:
      ValueError: as `wush_jax.quantize_model`; a model without the stack; state of another run;
        hidden states that cannot fit the host's memory.
      OSError: the state cannot be written; what was done is kept.

    Source: WUSH paper, algorithm 2 and section 5 (calibration order).
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; pass at least one calibration batch")
    stack = settings.stack
    layers = getattr(model, stack.layers, None)
    if layers is None or not len(layers):
        raise ValueError(
            f"model {type(model).__name__} has no layers in .{stack.layers}; describe its Stack, "
            "or calibrate in one shot"
        )
    planned = plan(model, rules, batches[0], call=call, dense_types=dense_types)
    run = _Run(
        settings,
        dense_types,
        implementation,
        _Counter(planned, layers, batches, settings, progress),
    )
    _check_host_memory(model, batches, settings)
    state = _open_state(model, batches, rules, settings)
    hidden = [run.keep(_embed(*nnx.split(model), stack, run.place(b))) for b in batches]
    rows: list[LayerReport] = []
    finished: dict[str, PackedWeight] = {}
    for index, layer in enumerate(layers):
        prefix = f"{stack.layers}.{index}."
        local = _local_sites(planned, prefix)
        dense, _ = dense_layers(layer, dense_types)
        if state is not None and state.has(index):
            packed, note = state.load(index, packed_like(local, dense))
            packed = _with_shared_transforms(local, packed)
            new_rows = [LayerReport(**{**r, "shape": tuple(r["shape"])}) for r in note["rows"]]
        else:
            packed, new_rows = run.quantize_layer(layer, local, hidden, prefix)
            if state is not None and jax.process_index() == 0:
                state.save(index, packed, {"rows": [r.__dict__ for r in new_rows]})
        rows += new_rows
        finished |= {prefix + path: p for path, p in packed.items()}
        quantized = swap(layer, dense, packed, implementation)
        if index + 1 < len(layers):
            hidden = run.advance(quantized, hidden)
    everything, _ = dense_layers(model, dense_types)
    rest = [item for item in planned.sites if item.site.name not in finished]
    if rest:
        half = swap(model, everything, finished, implementation)
        moments = collect_moments(
            half,
            batches,
            {i.site: i.moment_block for i in rest},
            call=call,
            dense_types=dense_types,
        )
        for item in rest:
            packed = quantize_planned(item, everything, moments[item.site])
            losses = layer_losses(
                half, batches[0], [item.site], packed, call=call, dense_types=dense_types
            )
            rows += measured_rows(item, everything, moments[item.site], losses)
            finished |= packed
    report = Report(rows, planned.report.skipped, planned.report.unused_rules)
    return swap(model, everything, finished, implementation), report


class _Counter:
    """Counts passes over chunks for the progress callback."""

    def __init__(self, planned, layers, batches, settings, progress):
        sites = [item for item in planned.sites if item.site.name.startswith(settings.stack.layers)]
        passes = len(sites) if settings.granularity == "site" else len(layers)
        self.total = (passes + len(layers) - 1) * len(batches)
        self.done = 0
        self.progress = progress

    def __call__(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


@dataclass(frozen=True)
class _Run:
    """What stays the same from layer to layer."""

    settings: Sequential
    dense_types: DenseTypes
    implementation: str | None
    count: _Counter

    def place(self, chunk: Any) -> jax.Array:
        """Put a host chunk on the devices; with several processes, this process's part of it."""
        sharding = self.settings.sharding
        if sharding is None:
            return jnp.asarray(chunk)
        return jax.make_array_from_process_local_data(sharding, np.asarray(chunk))

    def keep(self, hidden: jax.Array) -> np.ndarray:
        """Bring hidden states to the host: this process's rows."""
        hidden = hidden.astype(self.settings.hidden_dtype)
        if hidden.is_fully_addressable:
            return np.asarray(hidden)
        parts = {s.index[0].start or 0: s.data for s in hidden.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def chunks(self, hidden: Sequence[np.ndarray], what: str) -> Iterator[jax.Array]:
        """Yield the chunks on the devices, one at a time."""
        for chunk in hidden:
            yield self.place(chunk)
            self.count(what)

    def advance(self, layer: nnx.Module, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """Send all chunks through a quantized layer, replacing them one by one."""
        graph, state = nnx.split(layer)
        for index, chunk in enumerate(self.chunks(hidden, "forward")):
            out = _forward(graph, self.settings.stack.layer, state, chunk)
            hidden[index] = self.keep(out)
        return hidden

    def quantize_layer(
        self, layer: nnx.Module, sites: Sequence[SitePlan], hidden: list[np.ndarray], prefix: str
    ) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
        """Quantize one layer's sites, each on what the sites before it put out."""
        layers, _ = dense_layers(layer, self.dense_types)
        options: dict[str, Any] = {
            "call": self.settings.stack.layer,
            "dense_types": self.dense_types,
        }
        packed: dict[str, PackedWeight] = {}
        rows: list[LayerReport] = []
        stages = [[s] for s in sites] if self.settings.granularity == "site" else [list(sites)]
        for stage in stages:
            if not stage:
                continue
            current = swap(layer, layers, packed, self.implementation)
            moments = collect_moments(
                current,
                self.chunks(hidden, prefix + stage[0].site.name),
                {item.site: item.moment_block for item in stage},
                **options,
            )
            for item in stage:
                new = quantize_planned(item, layers, moments[item.site], prefix)
                losses = layer_losses(current, self.place(hidden[0]), [item.site], new, **options)
                rows += [
                    _with_prefix(r, prefix)
                    for r in measured_rows(item, layers, moments[item.site], losses)
                ]
                packed |= new
                del moments[item.site]
        return packed, rows


@partial(jax.jit, static_argnums=(0, 2))
def _embed(graph, state, stack, batch):
    return stack.embed(nnx.merge(graph, state), batch)


@partial(jax.jit, static_argnums=(0, 1))
def _forward(graph, layer_call, state, hidden):
    return layer_call(nnx.merge(graph, state), hidden)


def _local_sites(planned: ModelPlan, prefix: str) -> list[SitePlan]:
    """The sites of one layer of the stack, with paths inside that layer."""
    return [
        SitePlan(Site(tuple(p.removeprefix(prefix) for p in i.site.layers), i.site.size), i.recipe)
        for i in planned.sites
        if i.site.name.startswith(prefix)
    ]


def _with_shared_transforms(
    sites: Sequence[SitePlan], packed: Mapping[str, PackedWeight]
) -> dict[str, PackedWeight]:
    """Make the transform of a site one array again, as quantizing left it."""
    transforms = {
        path: packed[item.site.name if item.recipe.share_transform else path].transform
        for item in sites
        for path in item.site.layers
    }
    return {path: replace(p, transform=transforms[path]) for path, p in packed.items()}


def _with_prefix(row: LayerReport, prefix: str) -> LayerReport:
    return replace(row, path=prefix + row.path, site=prefix + row.site)


def _open_state(model, batches, rules, settings: Sequential) -> RunState | None:
    if settings.state_dir is None:
        return None
    fingerprint = {
        "model": digest(jax.tree.leaves(nnx.state(model))),
        "batches": digest(jax.tree.leaves(batches)),
        "rules": repr(rules),
        "settings": f"{settings.granularity} {settings.hidden_dtype}",
    }
    return RunState(settings.state_dir, fingerprint, resume=settings.resume)


def _check_host_memory(model, batches, settings: Sequential) -> None:
    """Refuse a calibration whose hidden states cannot fit the host's memory."""
    graph, state = nnx.split(model)
    hidden = jax.eval_shape(
        lambda s, b: settings.stack.embed(nnx.merge(graph, s), b), state, batches[0]
    )
    needed = hidden.size * jnp.dtype(settings.hidden_dtype).itemsize * len(batches)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise ValueError(
            f"batches: their hidden states need {needed / 1e9:.1f} GB of host memory and "
            f"{free / 1e9:.1f} GB are free; pass fewer or shorter batches"
        )
