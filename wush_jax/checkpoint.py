"""Quantized models on disk: the native folder, written and read.

Safetensors files with the tensors of `wush_jax.packed_layout` for every quantized layer and all
else by name: Hugging Face's names, dense weights as (N, K), for a `Llama`; dotted module paths
otherwise. ``config.json`` is the model's own plus ``quantization_config``, whose formats and layer
records (`wush_jax.quantization_config`) let `load` rebuild exactly what was saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from wush_jax.models.config import LlamaConfig, RopeScaling
from wush_jax.models.hugging_face import tensor_name
from wush_jax.models.llama import Llama
from wush_jax.nnx import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    Packed,
    QuantizedDense,
    dotted,
    replace_modules,
)
from wush_jax.packed_layout import Place, layer_tensors, read_packed, record_of
from wush_jax.quantization_config import LayerRecord, records_from_json, records_to_json
from wush_jax.tensor_folder import CONFIG, SHARD_BYTES, TensorFolder, write_folder

Placement = Sharding | Callable[[str], Sharding | None] | None


def save(
    path: str | Path,
    qmodel: nnx.Module,
    *,
    metadata: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a quantized model as a folder that appears whole, or not at all.

    Random state (of dropout) is not part of a checkpoint.

    Args:
      path: the folder; an earlier checkpoint there is replaced, anything else is refused.
      qmodel: a model from `quantize_model`.
      metadata: plain values to keep in ``quantization_config``, such as the recipe.
      shard_bytes: the largest size of a file.

    Raises:
      ValueError: nothing is quantized, something cannot be stored, other files are in the folder.
      OSError: the disk is full, the place not writable; what was there is still there.

    Source: WUSH checkpoints of mid-2026, ``quant_method`` "wush".

    >>> import tempfile
    >>> from wush_jax import Recipe, quantize_weight
    >>> from wush_jax.nnx import dense_layers
    >>> dense = dense_layers(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))[0][""]
    >>> packed = quantize_weight(dense.weight, None, Recipe(transform="hadamard"))
    >>> model = nnx.List([QuantizedDense(dense, packed)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, model)
    ...     sorted(TensorFolder(folder).entries)[:4]
    ['0.activation_global_scale', '0.activation_scale_scale', '0.bias', '0.e2m1']
    """
    tensors: dict[str, Any] = {}
    records: dict[str, LayerRecord] = {}
    first: dict[int, str] = {}
    for module_path, module in nnx.iter_modules(qmodel):
        if not isinstance(module, QuantizedDense):
            continue
        name, site = _layer_name(qmodel, dotted(module_path)), None
        if module.transform is not None:
            site = first.setdefault(id(module.transform), name)
        records[name] = record_of(name, module.packed, site)
        _add(tensors, layer_tensors(name, module.packed))
    if not records:
        raise ValueError("qmodel has no quantized layers; pass what quantize_model returned")
    _add(tensors, _plain_tensors(qmodel))
    write_folder(path, tensors, _config(qmodel, records, metadata), shard_bytes=shard_bytes)


def load(
    path: str | Path,
    model: nnx.Module | None = None,
    *,
    sharding: Placement = None,
    dense_types: DenseTypes = DENSE_TYPES,
    implementation: str | None = None,
) -> nnx.Module:
    """Rebuild a model that `save` wrote, tensor by tensor; nothing unquantized is made.

    Args:
      path: the folder.
      model: the model before quantization, or its shapes
        (``nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))``); its weights are not used, and
        it is left as it is. None builds the `Llama` of ``config.json``.
      sharding: where tensors go: one that fits all of them, or a function of a tensor's name in
        the files, for the array as the model holds it. None is where jax puts it.
      dense_types: module types that are dense layers.
      implementation: of the quantized layers; None lets the dispatch choose.

    Returns:
      The model with `QuantizedDense` layers. Layers saved as one site share one transform.

    Raises:
      ValueError: files that are missing, damaged or hostile, or do not fit the model.
      NotImplementedError: a config that asks for mathematics which `Llama` lacks.

    Source: as `save`.

    >>> import tempfile
    >>> from wush_jax import Recipe, quantize_weight
    >>> from wush_jax.nnx import dense_layers
    >>> model = nnx.List([nnx.Linear(32, 8, rngs=nnx.Rngs(0))])
    >>> dense = dense_layers(model)[0]["0"]
    >>> packed = quantize_weight(dense.weight, None, Recipe(transform="hadamard"))
    >>> quantized = nnx.List([QuantizedDense(dense, packed)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, quantized)
    ...     loaded = load(folder, model)
    >>> bool((loaded[0].codes[...] == packed.weight.codes).all())
    True
    """
    folder = TensorFolder(path)
    records = _read_records(folder)
    model = _llama(folder) if model is None else model
    naming = folder.config["quantization_config"].get("naming")
    if naming != _naming(model):
        raise ValueError(
            f"{folder.path / CONFIG}: names are of kind {naming!r}, those of model, a "
            f"{type(model).__name__}, are {_naming(model)!r}; give the model that was saved"
        )
    place = partial(_place, sharding)
    layers = _Layers(folder, records, place)
    views = dict(dense_types)

    def replace(module_path: str, module: nnx.Module) -> nnx.Module | None:
        name = _layer_name(model, module_path)
        if name not in records or type(module) not in views:
            return None
        return layers.build(name, views[type(module)](module), implementation)

    loaded = replace_modules(_hollow(model), replace)
    layers.check_all_built()
    _fill(loaded, folder, place)
    folder.check_all_read()
    return loaded


def _config(
    qmodel: nnx.Module, records: Mapping[str, LayerRecord], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    quantization = {
        **records_to_json(records),
        "library": f"wush_jax {_library_version()}",
        "naming": _naming(qmodel),
        "metadata": dict(metadata or {}),
    }
    if isinstance(qmodel, Llama):
        quantization["activation_dtype"] = np.dtype(qmodel.dtype).name
    to_dict = getattr(getattr(qmodel, "config", None), "to_dict", dict)
    return {**to_dict(), "quantization_config": quantization}


def _library_version() -> str:
    try:
        return version("wush-jax")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"


def _naming(model: nnx.Module) -> str:
    return "hugging_face" if isinstance(model, Llama) else "nnx"


def _layer_name(model: nnx.Module, path: str) -> str:
    """Return the name in files of the layer at a dotted path."""
    if not isinstance(model, Llama):
        return path
    return tensor_name((path, "kernel")).removesuffix(".weight")


def _plain_variables(model: nnx.Module) -> dict[str, tuple[tuple, nnx.Variable, bool]]:
    """Return what is not quantized, by name: path, variable, whether files hold its transpose."""
    llama = isinstance(model, Llama)
    found: dict[str, tuple[tuple, nnx.Variable, bool]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, (Packed, nnx.RngState)):
            name = tensor_name(path) if llama else dotted(path)
            _add(found, {name: (path, variable, llama and path[-1] == "kernel")})
    return found


def _add(tensors: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name in new:
        if name in tensors:
            raise ValueError(f"two tensors of the model are called {name!r}; rename a module")
    tensors.update(new)


def _plain_tensors(model: nnx.Module) -> dict[str, Any]:
    tensors = {}
    for name, (_, variable, turned) in _plain_variables(model).items():
        value = variable.get_value()
        if not isinstance(value, (jax.Array, np.ndarray)):
            raise ValueError(f"{name} holds a {type(value).__name__}; only arrays can be saved")
        # On the host, where a transpose costs nothing.
        tensors[name] = np.asarray(value).T if turned else value
    return tensors


def _read_records(folder: TensorFolder) -> dict[str, LayerRecord]:
    config = folder.config.get("quantization_config")
    file = folder.path / CONFIG
    if not isinstance(config, dict):
        raise ValueError(f"{file} has no quantization_config; give a folder that save wrote")
    try:
        return records_from_json(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; give a folder that save wrote") from error


def _llama(folder: TensorFolder) -> Llama:
    """Return the shapes of the Llama that a folder's config describes."""
    file = folder.path / CONFIG
    quantization = folder.config["quantization_config"]
    if quantization.get("naming") != "hugging_face":
        raise ValueError(f"{file} describes no Llama; give the model that was saved, or its shapes")
    embedding = folder.entries.get("model.embed_tokens.weight")
    try:
        config = LlamaConfig.from_dict(folder.config)
        values = [getattr(config, field.name) for field in dataclasses.fields(config)]
        if not all(isinstance(v, (int, float, RopeScaling, type(None))) for v in values):
            raise ValueError("a value that is not a number")
        if not all(abs(v) < 2**31 for v in values if isinstance(v, int)):
            raise ValueError("a number beyond any size")
        if not 0 < config.num_hidden_layers <= len(folder.entries) or embedding is None:
            raise ValueError("more layers than the files hold, or no embedding")
        kinds = {"dtype": quantization["activation_dtype"], "param_dtype": embedding.dtype}
        kinds = {key: jnp.dtype(kind) for key, kind in kinds.items()}
        return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **kinds))
    except NotImplementedError:
        raise
    except Exception as error:  # whatever a nonsensical config trips over
        raise ValueError(f"{file} describes no Llama ({error!r}); fetch it again") from error


class _Layers:
    """Builds quantized layers; those of one site share a transform."""

    def __init__(self, folder: TensorFolder, records: Mapping[str, LayerRecord], place: Place):
        self.folder, self.records, self.place = folder, records, place
        self.built: set[str] = set()
        self.transforms: dict[str, Packed] = {}

    def build(self, name: str, dense: Dense, implementation: str | None) -> QuantizedDense:
        record = self.records[name]
        if record.shape != dense.contraction.shape:
            raise ValueError(
                f"{self.folder.path / CONFIG}: layer {name!r} has shape {record.shape}, in the "
                f"model {dense.contraction.shape}; give the model that was saved"
            )
        shared = self.transforms.get(record.site or "")
        array = None if shared is None else shared.get_value()
        packed = read_packed(self.folder, name, record, self.place, transform=array)
        layer = QuantizedDense(dense, packed, transform=shared, implementation=implementation)
        if record.site is not None and layer.transform is not None:
            self.transforms[record.site] = layer.transform
        self.built.add(name)
        return layer

    def check_all_built(self) -> None:
        missing = sorted(set(self.records) - self.built)
        if missing:
            raise ValueError(
                f"{self.folder.path / CONFIG}: the model has no dense layer called {missing[:5]} "
                f"({len(missing)} in all); give the model as it was before quantization"
            )


def _hollow(model: nnx.Module) -> nnx.Module:
    """Return a copy whose arrays have shape and dtype, but no memory: one zero, seen everywhere.

    Views of dense layers look at kernels, so that shapes alone will not do.
    """
    graph, random, rest = nnx.split(model, nnx.RngState, ...)  # type: ignore[misc]  # two states
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(random)):
        raise ValueError(
            "model is abstract and has random state, which files do not hold; give a real model, "
            "or one without dropout"
        )
    rest = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), rest)
    return nnx.merge(graph, random, rest)


def _fill(model: nnx.Module, folder: TensorFolder, place: Place) -> None:
    """Read everything that is not quantized into a model."""
    filled = []
    for name, (path, variable, turned) in _plain_variables(model).items():
        shape = variable.shape[::-1] if turned else variable.shape
        value = folder.read(name, [variable.dtype], [shape])
        filled.append((path, variable.replace(place(name, value.T if turned else value))))
    nnx.update(model, nnx.from_flat_state(filled))


def _place(sharding: Placement, name: str, value: np.ndarray) -> jax.Array:
    chosen = sharding(name) if callable(sharding) else sharding
    return jax.device_put(value, chosen)
