"""A model folder in, a quantized folder out, with one decoder layer in memory at a time.

The order of work is that of `wush_jax.calibration.sequential`; finished layers wait on disk in the
files of its state, from which the checkpoint is put together at the end.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration.host_memory import (
    check_device_memory,
    check_host_memory,
    stay_on_device,
)
from wush_jax.calibration.layer_run import (
    Counter,
    LayerRun,
    Sequential,
    finished_stages,
    load_stage,
    local_sites,
    stage_note,
)
from wush_jax.calibration.observe import Progress
from wush_jax.calibration.pass_costs import pass_costs
from wush_jax.calibration.planning import ModelPlan, plan
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.resume import RunState, digest
from wush_jax.calibration.site_plan import SitePlan
from wush_jax.checkpoints.content import native_extra
from wush_jax.checkpoints.packed_layout import layer_tensors, record_of
from wush_jax.checkpoints.quantization_config import LayerRecord, records_to_json, sealed
from wush_jax.layers.nnx import DENSE_TYPES, dense_layers
from wush_jax.layers.swap import swap
from wush_jax.models import Llama
from wush_jax.models.hugging_face import (
    EMBEDDING,
    FolderTensors,
    abstract,
    abstract_of,
    fill,
    tensor_name,
    typed,
)
from wush_jax.models.llama import scaled
from wush_jax.models.misfits import check_all_finite
from wush_jax.models.placement import Placement
from wush_jax.models.tokens import check_batches
from wush_jax.solvers.recipe import Rules
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.folder_writer import (
    check_companions,
    check_replaceable,
    copy_companions,
    write_folder,
)


@dataclass(frozen=True)
class Later:
    """A tensor that is read when `numpy` asks for it, or for some of its rows.

    Attributes:
      shape: of the tensor.
      dtype: of its values.
      read: returns them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), self.dtype)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self.read()[rows], self.dtype)


def quantize_folder(
    source: str | Path,
    out: str | Path,
    batches: Iterable[Any],
    rules: Rules,
    *,
    settings: Sequential = Sequential(),  # noqa: B008  # frozen
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: Placement = None,
    metadata: Mapping[str, Any] | None = None,
    planned: ModelPlan | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize a Hugging Face model folder of the Llama family into a native checkpoint.

    The same as `wush_jax.quantize_model` with `Sequential` and `wush_jax.save`, for models larger
    than the memory: of the weights, one decoder layer is in memory at a time. The tokenizer's
    files are copied.

    Args:
      source: folder with ``config.json`` and safetensors files.
      out: folder of the checkpoint; as for `wush_jax.save`.
      batches: integer arrays (batch, length), calibration tokens.
      rules: as for `wush_jax.plan`.
      settings: the stack is that of `Llama`. Without a ``state_dir`` finished layers are kept
        beside ``out`` until the end.
      dtype: type of activations and products.
      param_dtype: type of what stays unquantized; None keeps each tensor's own.
      sharding: where weights go, by their names in the files.
      metadata: as for `wush_jax.save`.
      planned: what `wush_jax.plan` has said of this folder and these rules; None traces anew.
      progress: called as ``progress(done, total, what)``, in passes over a chunk.

    Returns:
      The `Report`; losses are on the first batch.

    Raises:
      ValueError: as `wush_jax.quantize_model`; files that are no model of the family.
      OSError: the state or the checkpoint cannot be written; finished layers are kept.

    Source: as `wush_jax.calibration.sequential.quantize_sequentially`.
    """
    tensors = FolderTensors(source)
    check_all_finite(tensors, tensors.path)
    checked = [np.asarray(batch) for batch in batches]
    texts = list(check_batches(checked, tensors.config.vocab_size))
    if not texts:
        raise ValueError("batches is empty; pass at least one calibration batch")
    model = abstract_of(tensors, dtype=dtype, param_dtype=param_dtype)
    check_companions(source)
    check_replaceable(Path(out), {"quantization_config": records_to_json({})})
    planned = planned or plan(model, rules, texts[0])
    needed = check_host_memory(model, texts, settings.stack.embed, settings.hidden_dtype)
    check_device_memory(planned.report.details, sequential=True)
    fingerprint = {
        "model": digest(tensors.values()),
        "batches": digest(texts),
        "rules": repr(rules),
        "settings": f"{settings.granularity} {settings.hidden_dtype} {jnp.dtype(dtype)}",
    }
    with _state(settings, out, fingerprint) as state:
        resident = sharding is None and settings.sharding is None and stay_on_device(needed)
        run = LayerRun(settings, DENSE_TYPES, None, Counter(progress), resident)
        stream = _Stream(model, tensors, sharding, state, run, param_dtype)
        rows = stream.quantize(planned, texts)
        config = stream.config(metadata)
        write_folder(out, stream.written, config, shard_bytes=stream.largest)
    copy_companions(source, out)
    dry = planned.report
    return Report(rows, dry.skipped, dry.unused_rules, dry.details, dry.notes)


@contextmanager
def _state(settings: Sequential, out: str | Path, fingerprint: dict) -> Iterator[RunState]:
    """Open the state of finished layers: the caller's, or one beside the result for a while."""
    parent = Path(out).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        folder = settings.state_dir or opened.enter_context(
            tempfile.TemporaryDirectory(prefix=".wush-layers-", dir=parent)
        )
        state = RunState(folder, fingerprint, resume=settings.resume)
        yield opened.enter_context(closing(state))


@dataclass(frozen=True, eq=False)  # equal to itself alone, so that it is a key
class _Stage:
    """Sites that are quantized together: those of a decoder layer, or those after the last.

    Attributes:
      index: of the file in the state.
      prefix: "layers.3." or nothing.
      sites: with paths after the prefix.
      module: abstract.
    """

    index: int
    prefix: str
    sites: list[SitePlan]
    module: nnx.Module

    def name(self, path: str) -> str:
        """Return what a dense layer is called in files."""
        return tensor_name((self.prefix + path, "kernel")).removesuffix(".weight")


class _Stream:
    """The layers of a model on their way from one folder to the other."""

    def __init__(self, model, tensors: FolderTensors, sharding, state, run: LayerRun, param_dtype):
        self.model, self.tensors, self.sharding = model, tensors, sharding
        self.param_dtype = param_dtype
        self.state, self.run = state, run
        self.records: dict[str, LayerRecord] = {}
        self.written: dict[str, Any] = {}  # of `Later`
        # A file of the result may hold the end of one stage and the start of the next.
        self._finished = lru_cache(maxsize=2)(self._read)

    def quantize(self, planned: ModelPlan, batches: list[np.ndarray]) -> list[LayerReport]:
        """Quantize stage after stage; afterwards `written` has all tensors."""
        stages = self._stages(planned)
        last = stages[-1].index
        costs = [
            self.run.cost(s.module, s.sites, together=not s.prefix, advances=s.index < last)
            for s in stages
        ]
        self.run.count.expect(pass_costs(costs, [batch.size for batch in batches]))
        hidden = [self.run.keep(self._embed(batch)) for batch in batches]
        done, rows = finished_stages(self.state, len(stages)), []
        for stage in stages:
            rows += self._quantize_stage(stage, hidden, done, advance=stage.index < last)
        kept = [n for n in self.tensors if n.removesuffix(".weight") not in self.records]
        self.written |= {name: self._plain(name) for name in kept}
        return rows

    def _stages(self, planned: ModelPlan) -> list[_Stage]:
        prefixes = [f"layers.{i}." for i in range(len(self.model.layers))]
        stages = [
            _Stage(i, prefix, local_sites(planned, prefix), layer)
            for i, (prefix, layer) in enumerate(zip(prefixes, self.model.layers, strict=True))
        ]
        inside = tuple(prefixes)
        rest = [item for item in planned.sites if not item.site.name.startswith(inside)]
        if rest:
            ends = dataclasses.replace(self.tensors.config, num_hidden_layers=0, layer_types=None)
            kinds = {"dtype": self.model.dtype, "param_dtype": self.model.embed_tokens.param_dtype}
            module = abstract(ends, **kinds)
            module = typed(module, self.tensors) if self.param_dtype is None else module
            stages.append(_Stage(len(stages), "", rest, module))
        return stages

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        """Look up token vectors in the file, as the model would."""
        vectors = self.tensors[EMBEDDING][tokens]
        vectors = scaled(self.model.config, vectors.astype(self.model.embed_tokens.param_dtype))
        return vectors.astype(self.model.dtype).astype(self.run.settings.hidden_dtype)

    def _quantize_stage(
        self, stage: _Stage, hidden: list[Any], done: int, *, advance: bool
    ) -> list[LayerReport]:
        """Quantize one stage, or read it from the state; everything is let go at the end."""
        inside = tuple(stage.prefix.rstrip(".").split(".")) if stage.prefix else ()
        module = fill(nnx.clone(stage.module), self.tensors, inside=inside, sharding=self.sharding)
        dense, _ = dense_layers(module)
        if stage.index < done:
            packed, rows = load_stage(self.state, stage.index, stage.sites, dense)
            self.run.count.done += len(self.run.passes(stage.sites)) * len(hidden)
        else:
            packed, rows = self._calibrate(stage, module, dense, hidden)
            self.state.save(stage.index, packed, stage_note(packed, rows))
        self._record(stage, {path: packed[path] for path in dense if path in packed})
        if advance:
            quantized = swap(module, dense, packed)
            # The original weights go now; flax's flattening leaves cycles that hold them.
            del module, dense, packed
            gc.collect()
            self.run.advance(quantized, hidden)
        return rows

    def _calibrate(self, stage: _Stage, module: nnx.Module, dense, hidden: list[Any]):
        """Quantize a stage's sites on what the stages before put out."""
        if stage.prefix:
            return self.run.quantize_layer(module, stage.sites, hidden, stage.prefix)
        chunks = self.run.chunks(hidden, "outside the layers")
        options: dict[str, Any] = {"call": _head, "dense_types": DENSE_TYPES}
        return self.run.quantize_stage(module, dense, stage.sites, chunks, hidden[0], **options)

    def _record(self, stage: _Stage, packed: Mapping[str, PackedWeight]) -> None:
        """Note what the checkpoint says of a stage and holds of it; its values stay on disk.

        Layers come in the order of the module, so that the first of a site is that of `save`.
        """
        first: dict[int, str] = {}
        for path, weight in packed.items():
            name, site = stage.name(path), None
            if weight.transform is not None:
                site = first.setdefault(id(weight.transform), name)
            self.records[name] = record_of(name, weight, site)
            for key, value in layer_tensors(name, weight).items():
                read = partial(self._finished_tensor, stage, key)
                self.written[key] = Later(value.shape, np.dtype(value.dtype), read)

    def _finished_tensor(self, stage: _Stage, key: str) -> np.ndarray:
        return self._finished(stage)[key]

    def _read(self, stage: _Stage) -> dict[str, np.ndarray]:
        """Return the tensors of a finished stage."""
        dense, _ = dense_layers(stage.module)
        packed, _ = load_stage(self.state, stage.index, stage.sites, dense)
        found: dict[str, np.ndarray] = {}
        for path, weight in packed.items():
            found |= layer_tensors(stage.name(path), weight)
        return {key: np.asarray(value) for key, value in found.items()}

    def _plain(self, name: str) -> Later:
        """Return a tensor that stays as it is, but for its type where one was asked for."""
        own = self.tensors.dtype(name)
        dtype = own if self.param_dtype is None else np.dtype(self.param_dtype)
        return Later(self.tensors[name].shape, dtype, lambda: self.tensors[name])

    @property
    def largest(self) -> int:
        """Bytes of the largest decoder layer in the source: what one file may take."""
        sizes = [
            sum(v.size * np.dtype(v.dtype).itemsize for v in jax.tree.leaves(nnx.state(layer)))
            for layer in self.model.layers
        ]
        return max(sizes) // 2

    def config(self, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the content of the checkpoint's ``config.json``."""
        quantization = {
            **records_to_json(self.records),
            **native_extra(self.model, metadata),
        }
        return {**self.tensors.config.to_dict(), "quantization_config": sealed(quantization)}


def _head(model: Llama, hidden: jax.Array) -> jax.Array:
    return model.head(hidden)
