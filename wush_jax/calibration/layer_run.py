"""One decoder layer after another: settings, passes over the inputs, finished layers on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from wush_jax.calibration.host_memory import within_memory
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import (
    ROUNDED,
    Call,
    Masked,
    Progress,
    Site,
    collect_moments,
    inputs_of,
    plain_call,
)
from wush_jax.calibration.pass_costs import StageCost
from wush_jax.calibration.planning import ModelPlan, packed_like
from wush_jax.calibration.report import LayerReport
from wush_jax.calibration.resume import RunState
from wush_jax.calibration.site_plan import SitePlan, site_cost
from wush_jax.calibration.steps import measured_rows, quantize_planned
from wush_jax.layers.meshes import is_explicit
from wush_jax.layers.nnx import Dense, DenseTypes, dense_layers
from wush_jax.layers.swap import swap
from wush_jax.solvers.costs import total_costs
from wush_jax.solvers.site import PackedWeight


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


class Counter:
    """Counts passes over chunks for the progress callback.

    A callback with a method ``weigh`` is told before the first what each of them costs.
    """

    def __init__(self, progress: Progress | None):
        self.done = self.total = 0
        self.progress = progress

    def expect(self, costs: Sequence[float]) -> None:
        """Note how many passes there will be, and what each costs beside the others."""
        self.total = len(costs)
        weigh = getattr(self.progress, "weigh", None)
        if weigh is not None:
            weigh(costs)

    def passed(self, done: int, total: int | None, what: str) -> None:
        """Count one pass of what does not know of the others."""
        self(what)

    def __call__(self, what: str) -> None:
        """Count one pass over a chunk."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


@dataclass(frozen=True)
class LayerRun:
    """What stays the same from layer to layer.

    With ``resident`` hidden states stay on the device, which then has to be one for all layers.
    """

    settings: Sequential
    dense_types: DenseTypes
    implementation: str | None
    count: Counter
    resident: bool = False

    def place(self, chunk: Any) -> Any:
        """Put a host chunk on the devices; with several processes, this process's part of it."""
        sharding = self.settings.sharding
        if sharding is None:
            return jax.tree.map(jnp.asarray, chunk)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), chunk
        )

    def keep(self, hidden: Any) -> Any:
        """Bring hidden states to where they wait: the host, with this process's rows, or not."""
        if isinstance(hidden, Masked):
            return replace(hidden, inputs=self.keep(hidden.inputs), mask=self.keep(hidden.mask))
        if self.resident:
            return jnp.asarray(hidden)
        if isinstance(hidden, np.ndarray):
            return hidden
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

    def embed(self, model: nnx.Module, batch: Any) -> Any:
        """Return the first layer's input."""
        return self._forward(model, self.settings.stack.embed, self.place(batch))

    def advance(self, layer: nnx.Module, hidden: list[Any]) -> list[Any]:
        """Send all chunks through a quantized layer, replacing them one by one."""
        for index, chunk in enumerate(self.chunks(hidden, "forward")):
            hidden[index] = self._forward(layer, self.settings.stack.layer, chunk)
        return hidden

    def _forward(self, module: nnx.Module, call: Call, chunk: Any) -> Any:
        options = (self.settings.hidden_dtype, self.settings.sharding)
        hidden = _forward(*nnx.split(module), call, *options, inputs_of(chunk))
        return self.keep(replace(chunk, inputs=hidden) if isinstance(chunk, Masked) else hidden)

    def passes(self, sites: Sequence[SitePlan]) -> list[list[SitePlan]]:
        """Return which sites of a layer are calibrated in one pass over the chunks."""
        if self.settings.granularity == "site":
            return [[item] for item in sites]
        return [list(sites)] if sites else []

    def cost(
        self, module: nnx.Module, sites: Sequence[SitePlan], *, together: bool, advances: bool
    ) -> StageCost:
        """Return what the passes through a module cost; all sites in one where ``together``."""
        dense, _ = dense_layers(module, self.dense_types)
        groups = [list(sites)] if together else self.passes(sites)
        passes = [[site_cost(item, dense) for item in group] for group in groups]
        weights = sum(math.prod(layer.kernel.shape) for layer in dense.values())
        return StageCost(passes, weights, advances)

    def quantize_layer(
        self, layer: nnx.Module, sites: Sequence[SitePlan], hidden: list[Any], prefix: str
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
        packed: dict[str, PackedWeight] = {}
        rows: list[LayerReport] = []
        with within_memory(total_costs([site_cost(item, layers) for item in sites])):
            moments = collect_moments(model, chunks, blocks, rows=rows_kept, **options)
            for item in sites:
                new = quantize_planned(item, layers, moments[item.site], prefix)
                losses = layer_losses(model, self.place(first), [item.site], new, **options)
                measured = measured_rows(item, layers, moments.pop(item.site), losses)
                rows += [replace(r, path=prefix + r.path, site=prefix + r.site) for r in measured]
                packed |= new
        return packed, rows


@partial(jax.jit, static_argnums=(2, 3, 4), compiler_options=ROUNDED)
def _forward(graph, state, call, dtype, sharding, chunk):
    hidden = call(nnx.merge(graph, state), chunk).astype(dtype)
    if sharding is None:
        return hidden
    explicit = is_explicit(hidden)
    return (jax.sharding.reshard if explicit else lax.with_sharding_constraint)(hidden, sharding)


def local_sites(planned: ModelPlan, prefix: str) -> list[SitePlan]:
    """Return the sites of one layer of the stack, with paths inside that layer."""
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


def stage_note(packed: Mapping[str, PackedWeight], rows: Sequence[LayerReport]) -> dict[str, Any]:
    """Return what a finished layer's arrays do not say: rows, and constants of their formats."""
    constants = {
        path: [getattr(fmt, "global_scale", None) for fmt in (p.weight.format, p.input_format)]
        for path, p in packed.items()
    }
    return {"rows": [row.__dict__ for row in rows], "constants": constants}


def _with_constants(
    packed: Mapping[str, PackedWeight], constants: Mapping[str, Sequence[float | None]]
) -> dict[str, PackedWeight]:
    """Give formats the global scales that fit their site (`wush_jax.solvers.ranges`)."""
    found = {}
    for path, p in packed.items():
        weights, inputs = constants[path]
        fmt = p.input_format
        fmt = None if fmt is None else fmt.replace(global_scale=inputs)
        weight = replace(p.weight, format=p.weight.format.replace(global_scale=weights))
        found[path] = replace(p, weight=weight, input_format=fmt)
    return found


def load_stage(
    state: RunState, index: int, sites: Sequence[SitePlan], layers: Mapping[str, Dense]
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    """Read a finished layer back: its packed weights, by path, and its rows of the report."""
    packed, note = state.load(index, packed_like(sites, layers))
    packed = _with_constants(packed, note["constants"])
    rows = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in note["rows"]]
    return _with_shared_transforms(sites, packed), rows


def finished_stages(state: RunState | None, count: int) -> int:
    """Return how many stages, from the first on, every process has on disk."""
    own = 0
    while state is not None and own < count and state.has(own):
        own += 1
    if jax.process_count() == 1:
        return own
    return int(multihost_utils.process_allgather(np.int32(own)).min())
