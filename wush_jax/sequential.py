"""Calibration layer after layer: every site sees what the layers quantized before it put out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from wush_jax.calibrate import (
    Call,
    Progress,
    Site,
    check_sharding,
    collect_moments,
    plain_call,
)
from wush_jax.host_memory import check_host_memory
from wush_jax.losses import layer_losses
from wush_jax.nnx import DENSE_TYPES, Dense, DenseTypes, dense_layers
from wush_jax.planning import (
    ModelPlan,
    SitePlan,
    finish,
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
        reduced by the compiler. With several processes each passes its own batches, of the same
        number and shapes.
      state_dir: folder that keeps every finished layer, for each process its own; None keeps
        nothing.
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
        check_sharding(self.sharding)


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
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    planned = plan(model, rules, batches[0], **options)
    stages = [_local_sites(planned, f"{stack.layers}.{i}.") for i in range(len(layers))]
    inside = {f"{stack.layers}.{i}.{s.site.name}" for i, local in enumerate(stages) for s in local}
    rest = [item for item in planned.sites if item.site.name not in inside]
    run = _Run(settings, dense_types, implementation, _Counter(progress))
    run.count.total = len(batches) * (
        sum(len(run.passes(local)) for local in stages) + len(layers) - 1 + bool(rest)
    )
    check_host_memory(model, batches, stack.embed, settings.hidden_dtype)
    with _open_state(model, batches, rules, settings) as state:
        done = _finished_stages(state, len(layers))
        hidden = [run.embed(model, batch) for batch in batches]
        rows: list[LayerReport] = []
        finished: dict[str, PackedWeight] = {}
        for index, (layer, local) in enumerate(zip(layers, stages, strict=True)):
            prefix = f"{stack.layers}.{index}."
            dense, _ = dense_layers(layer, dense_types)
            if state is not None and index < done:
                packed, new_rows = _load_stage(state, index, local, dense)
                run.count.done += len(run.passes(local)) * len(batches)
            else:
                packed, new_rows = run.quantize_layer(layer, local, hidden, prefix)
                if state is not None:
                    state.save(index, packed, {"rows": [r.__dict__ for r in new_rows]})
            rows += new_rows
            finished |= {prefix + path: p for path, p in packed.items()}
            if index + 1 < len(layers):
                hidden = run.advance(swap(layer, dense, packed, implementation), hidden)
    everything, _ = dense_layers(model, dense_types)
    if rest:
        half = swap(model, everything, finished, implementation)
        chunks = run.chunks(batches, "outside the layers")
        packed, new_rows = run.quantize_stage(half, everything, rest, chunks, batches[0], **options)
        finished |= packed
        rows += new_rows
    return finish(model, everything, finished, implementation, rows, planned.report)


class _Counter:
    """Counts passes over chunks for the progress callback."""

    def __init__(self, progress: Progress | None):
        self.done = self.total = 0
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

    def place(self, chunk: Any) -> Any:
        """Put a host chunk on the devices; with several processes, this process's part of it."""
        sharding = self.settings.sharding
        if sharding is None:
            return jax.tree.map(jnp.asarray, chunk)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), chunk
        )

    def keep(self, hidden: jax.Array) -> np.ndarray:
        """Bring hidden states to the host: this process's rows."""
        if not hidden.is_fully_addressable:
            sharding: Any = hidden.sharding  # a NamedSharding: the settings'
            hidden = multihost_utils.global_array_to_host_local_array(
                hidden, sharding.mesh, sharding.spec
            )
        return np.asarray(hidden)

    def chunks(self, hidden: Sequence[Any], what: str) -> Iterator[Any]:
        """Yield the chunks on the devices, one at a time."""
        for chunk in hidden:
            yield self.place(chunk)
            self.count(what)

    def embed(self, model: nnx.Module, batch: Any) -> np.ndarray:
        """Return the first layer's input."""
        return self._forward(model, self.settings.stack.embed, self.place(batch))

    def advance(self, layer: nnx.Module, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """Send all chunks through a quantized layer, replacing them one by one."""
        for index, chunk in enumerate(self.chunks(hidden, "forward")):
            hidden[index] = self._forward(layer, self.settings.stack.layer, chunk)
        return hidden

    def _forward(self, module: nnx.Module, call: Call, chunk: Any) -> np.ndarray:
        options = (self.settings.hidden_dtype, self.settings.sharding)
        return self.keep(_forward(*nnx.split(module), call, *options, chunk))

    def passes(self, sites: Sequence[SitePlan]) -> list[list[SitePlan]]:
        """Return which sites of a layer are calibrated in one pass over the chunks."""
        if self.settings.granularity == "site":
            return [[item] for item in sites]
        return [list(sites)] if sites else []

    def quantize_layer(
        self, layer: nnx.Module, sites: Sequence[SitePlan], hidden: list[np.ndarray], prefix: str
    ) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
        """Quantize one layer's sites, each on what the sites before it put out."""
        layers, _ = dense_layers(layer, self.dense_types)
        options: dict[str, Any] = {
            "call": self.settings.stack.layer,
            "dense_types": self.dense_types,
            "prefix": prefix,
        }
        packed: dict[str, PackedWeight] = {}
        rows: list[LayerReport] = []
        for stage in self.passes(sites):
            current = swap(layer, layers, packed, self.implementation)
            chunks = self.chunks(hidden, prefix + stage[0].site.name)
            new = self.quantize_stage(current, layers, stage, chunks, hidden[0], **options)
            packed |= new[0]
            rows += new[1]
        return packed, rows

    def quantize_stage(
        self, model, layers, sites, chunks, first, *, call, dense_types, prefix=""
    ) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
        """Calibrate some sites in one pass over the chunks, then quantize them."""
        options: dict[str, Any] = {"call": call, "dense_types": dense_types}
        blocks = {item.site: item.moment_block for item in sites}
        rows_kept = max((item.sample_rows for item in sites), default=0)
        moments = collect_moments(model, chunks, blocks, rows=rows_kept, **options)
        packed: dict[str, PackedWeight] = {}
        rows: list[LayerReport] = []
        for item in sites:
            new = quantize_planned(item, layers, moments[item.site], prefix)
            losses = layer_losses(model, self.place(first), [item.site], new, **options)
            measured = measured_rows(item, layers, moments.pop(item.site), losses)
            rows += [replace(r, path=prefix + r.path, site=prefix + r.site) for r in measured]
            packed |= new
        return packed, rows


@partial(jax.jit, static_argnums=(2, 3, 4))
def _forward(graph, state, call, dtype, sharding, chunk):
    hidden = call(nnx.merge(graph, state), chunk).astype(dtype)
    return hidden if sharding is None else jax.lax.with_sharding_constraint(hidden, sharding)


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


def _load_stage(
    state: RunState, index: int, sites: Sequence[SitePlan], layers: Mapping[str, Dense]
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    packed, note = state.load(index, packed_like(sites, layers))
    rows = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in note["rows"]]
    return _with_shared_transforms(sites, packed), rows


def _finished_stages(state: RunState | None, count: int) -> int:
    """How many stages, from the first on, every process has on disk."""
    own = 0
    while state is not None and own < count and state.has(own):
        own += 1
    if jax.process_count() == 1:
        return own
    return int(multihost_utils.process_allgather(np.int32(own)).min())


@contextlib.contextmanager
def _open_state(model, batches, rules, settings: Sequential) -> Iterator[RunState | None]:
    """Give the run its folder, where it wants one, and let go of it in the end."""
    if settings.state_dir is None:
        yield None
        return
    # The state of random streams, such as of dropout, moves on with every call.
    fingerprint = {
        "model": digest(jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))),
        "batches": digest(jax.tree.leaves(batches)),
        "rules": repr(rules),
        "settings": f"{settings.granularity} {settings.hidden_dtype}",
    }
    folder = Path(settings.state_dir)
    if jax.process_count() > 1:
        folder /= f"process-{jax.process_index()}"
    with contextlib.closing(RunState(folder, fingerprint, resume=settings.resume)) as state:
        yield state
