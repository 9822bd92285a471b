"""Quantized models on disk: saved in the native layout, loaded from any that we know.

Safetensors files with the tensors of `wush_jax.checkpoints.packed_layout` for every quantized layer
and all else by name: Hugging Face's names, dense weights as (N, K), for a `Llama`; dotted module
paths otherwise. ``config.json`` is the model's own plus ``quantization_config``, whose formats and
layer records (`wush_jax.checkpoints.quantization_config`) let `load` rebuild exactly what was
saved.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.checkpoints import model_names
from wush_jax.checkpoints.content import content_of, written
from wush_jax.checkpoints.described import described_llama
from wush_jax.checkpoints.layouts import layout_of, read_all
from wush_jax.checkpoints.layouts.layout import Layout, quantization_config
from wush_jax.checkpoints.layouts.wush import LAYOUT as NATIVE
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.places import Placement, checked, place_on
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.checkpoints.stacks import read_stack, stack_record, stacked_experts
from wush_jax.formats.checks import check_kind, check_path, check_size
from wush_jax.layers.dense import is_node
from wush_jax.layers.kernel_layout import pack_for_kernels
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    Packed,
    QuantizedDense,
    dense_view,
    replace_modules,
)
from wush_jax.models import Llama
from wush_jax.models.encodings import DecodedFolder, open_folder
from wush_jax.models.hugging_face import EMBEDDING, FLOATS
from wush_jax.models.misfits import check_repeated, sizes_named
from wush_jax.models.stored_names import stored_experts
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.folder_writer import SHARD_BYTES, write_folder
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import MisfitError, TensorFolder


def save(
    path: str | Path,
    qmodel: nnx.Module | Mapping[str, PackedWeight],
    *,
    metadata: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a quantized model, or packed weights, as a folder that appears whole, or not at all.

    Random state (of dropout) is not part of a checkpoint.

    Args:
      path: the folder; an earlier checkpoint there is replaced, anything else is refused.
      qmodel: a model from `quantize_model`, or packed weights by name: ``{"name": packed}``.
      metadata: plain values to keep in ``quantization_config``, such as the recipe.
      shard_bytes: the largest size of a file.

    Raises:
      ValueError: nothing is quantized, something cannot be stored, other files are in the folder.
      OSError: the disk is full, the place not writable; what was there is still there.

    Source: WUSH checkpoints of mid-2026, ``quant_method`` "wush".

    >>> import tempfile
    >>> from wush_jax import Recipe, quantize_weight
    >>> from wush_jax.layers.nnx import dense_layers
    >>> dense = dense_layers(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))[0][""]
    >>> packed = quantize_weight(dense.weight, None, Recipe(transform="hadamard"))
    >>> model = nnx.List([QuantizedDense(dense, packed)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, model)
    ...     sorted(TensorFolder(folder).entries)[:4]
    ['0.activation_global_scale', '0.activation_scale_scale', '0.bias', '0.e2m1']
    """
    check_path(path=path)
    check_size(shard_bytes=shard_bytes)
    content = content_of(qmodel, metadata)
    tensors, config = written(content, NATIVE)
    write_folder(path, tensors, config, shard_bytes=shard_bytes)


def load(
    path: str | Path,
    model: nnx.Module | None = None,
    *,
    sharding: Placement = None,
    dense_types: DenseTypes = DENSE_TYPES,
    implementation: str | None = None,
) -> Any:
    """Rebuild what `save` wrote, tensor by tensor; what it packed stays packed.

    Args:
      path: a folder that `save` or `wush_jax.checkpoints.interchange.export` wrote, or one in a
        layout of other libraries (`wush_jax.checkpoints.layouts`).
      model: the model before quantization, or its shapes
        (``nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))``); its weights are not used, and
        it is left as it is. None builds the `Llama` of ``config.json``.
      sharding: where tensors go. A mesh with an axis "model": codes and scales by rows over it
        where their number allows, all else everywhere. Or a sharding that fits all tensors, or a
        function of a tensor's name in the native layout, for the array as the model holds it.
        None is where jax puts it.
      dense_types: module types that are dense layers.
      implementation: of the quantized layers; None lets the dispatch choose.

    Returns:
      The model with `QuantizedDense` layers. Layers saved as one site share one transform. Layers
      that this device's kernels serve are in their layout (`wush_jax.layers.kernel_layout`). Of
      packed weights, which take no model, a dict of `PackedWeight` by name.

    Raises:
      ValueError: files that are missing, damaged or hostile, or do not fit the model.
      NotImplementedError: a config that asks for mathematics which `Llama`, or a layer, lacks.

    Source: as `save`.

    >>> import tempfile
    >>> from wush_jax import Recipe, quantize_weight
    >>> from wush_jax.layers.nnx import dense_layers
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
    check_path(path=path)
    check_kind((nnx.Module, type(None)), "an NNX module, or None", model=model)
    sharding = checked(sharding, model)
    folder = open_folder(path)
    layout = layout_of(folder)
    decoded = isinstance(folder, DecodedFolder)
    for note in folder.notes if isinstance(folder, DecodedFolder) else ():
        warnings.warn(f"{folder.path}: {note}", stacklevel=2)
    place = partial(place_on, sharding)
    quantization = quantization_config(folder)
    naming, stacks = quantization.get("naming"), quantization.get("stacks", {})
    if naming == model_names.WEIGHTS and model is None:
        weights = read_all(folder, place)
        folder.check_all_read()
        return weights
    records = layout.records(folder)
    # A model of the config alone takes each tensor in the type that the file has.
    kinds = FLOATS if model is None else ()
    own = described_llama(folder) if model is None else None
    model = own or model
    assert model is not None
    if naming not in (None, model_names.naming(model)):
        raise ValueError(
            f"{folder.path / CONFIG}: names are of kind {naming!r}, those of model, a "
            f"{type(model).__name__}, are {model_names.naming(model)!r}; give the model that was "
            "saved"
        )
    parts = stacked_experts(model, records)
    joint = {name: stack_record([records[part] for part in parts[name]]) for name in parts}
    layers = _Layers(folder, layout, {**records, **joint}, place, parts)

    def replace(module_path: str, module: nnx.Module) -> nnx.Module | None:
        name = model_names.layer_name(model, module_path)
        dense = dense_view(module, dense_types) if name in layers.records else None
        if dense is not None and name in stacks:
            dense = _stacked(folder, name, dense, stacks[name])
        return None if dense is None else layers.build(name, dense, implementation)

    with sizes_named(None if own is None else own.config):
        loaded = replace_modules(_hollow(model), replace)
        if not decoded:  # what is no layer of the model's, such as one expert, is decoded below
            layers.check_all_built()
        _fill(loaded, folder, place, kinds)
        pack_for_kernels(loaded)
        for name in folder.entries:
            if layout is not NATIVE and name == _repeated_embedding(loaded):
                check_repeated(folder, name, EMBEDDING)
            if name.endswith(layout.skipped):
                folder.skip(name)
        folder.check_all_read()
    for note in folder.decoded(layers.weights) if isinstance(folder, DecodedFolder) else ():
        warnings.warn(f"{folder.path}: {note}", stacklevel=2)
    return loaded


def _repeated_embedding(model: nnx.Module) -> str | None:
    """Return the tensor in which some files repeat an embedding that the head shares."""
    tied = isinstance(model, Llama) and model.config.tie_word_embeddings
    return "lm_head.weight" if tied else None


class _Layers:
    """Builds quantized layers; those of one site share a transform, and stacks are of several."""

    def __init__(
        self,
        folder: TensorFolder,
        layout: Layout,
        records: Mapping[str, LayerRecord],
        place: Place,
        parts: Mapping[str, tuple[str, ...]],
    ):
        self.folder, self.layout, self.records, self.place = folder, layout, records, place
        self.parts = parts
        self.built: set[str] = set()
        self.transforms: dict[str, Packed] = {}

    def build(self, name: str, dense: Dense, implementation: str | None) -> QuantizedDense:
        record = self.records[name]
        if record.shape != dense.weight_shape:
            raise MisfitError(
                f"{self.folder.path / CONFIG}: layer {name!r} has shape {record.shape}, in the "
                f"model {dense.weight_shape}; give the model that was saved"
            )
        shared = self.transforms.get(record.site or "")
        array = None if shared is None else shared.get_value()
        if name in self.parts:
            own = {part: self.records[part] for part in self.parts[name]}
            packed = read_stack(self.folder, name, own, self.layout, self.place)
        else:
            packed = self.layout.read(self.folder, name, record, self.place, transform=array)
        layer = QuantizedDense(dense, packed, transform=shared, implementation=implementation)
        if record.site is not None and layer.transform is not None:
            self.transforms[record.site] = layer.transform
        self.built |= {name, *self.parts.get(name, ())}
        return layer

    @property
    def weights(self) -> set[str]:
        """The names of the weights that became layers."""
        return {f"{name}.weight" for name in self.built}

    def check_all_built(self) -> None:
        missing = sorted(set(self.records) - self.built)
        if missing:
            raise MisfitError(
                f"{self.folder.path / CONFIG}: the model has no dense layer called {missing[:5]} "
                f"({len(missing)} in all); give the model as it was before quantization"
            )


def _hollow(model: nnx.Module) -> nnx.Module:
    """Return a copy whose arrays have shape and dtype, but no memory: one zero, seen everywhere.

    Views of dense layers look at kernels, so that shapes alone will not do.
    """
    graph, random, rest = nnx.split(model, nnx.RngState, ...)  # type: ignore[misc]  # two states
    random = jax.tree.map(_seeded, random)
    # An array without a variable is a leaf of the model's only as jax's own.
    hollow = {
        path: jax.tree.map(_zeros, leaf)
        if isinstance(leaf, nnx.Variable)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(rest)
    }
    found = nnx.merge(graph, random, nnx.from_flat_state(hollow))
    for _, module in nnx.iter_modules(found):
        for name, value in list(vars(module).items()):
            if isinstance(value, (*SHAPES, dict, list, tuple)) and any(
                isinstance(leaf, SHAPES) for leaf in jax.tree.leaves(value, is_leaf=is_node)
            ):
                setattr(module, name, nnx.data(jax.tree.map(_array, value, is_leaf=is_node)))
    return found


# What `nnx.eval_shape` makes of an array without a variable, by itself and in a container.
SHAPES = (jax.core.Tracer, jax.ShapeDtypeStruct)


def _array(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, SHAPES) else leaf


def _zeros(leaf: Any) -> np.ndarray:
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _stacked(folder: TensorFolder, name: str, dense: Dense, axes: Any) -> Dense:
    """Return the view of a layer whose kernel is stacked at the axes that a config names."""
    rank = len(dense.kernel.shape)
    if not isinstance(axes, list) or not all(type(a) is int and 0 <= a < rank for a in axes):
        raise ValueError(
            f"{folder.path / CONFIG}: layer {name!r} has stacks {axes!r}, expected axes of its "
            f"kernel {dense.kernel.shape}; save the model again"
        )
    contraction = dataclasses.replace(dense.contraction, stack_axes=tuple(axes))
    return dataclasses.replace(dense, contraction=contraction)


def _seeded(leaf: Any) -> Any:
    """Random state, which files do not hold: the model's own, or of seed 0 where it is a shape."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _fill(model: nnx.Module, folder: TensorFolder, place: Place, kinds: Sequence[Any]) -> None:
    """Read everything that is not quantized into a model, of its own types or of some others."""
    filled = []
    elsewhere = stored_experts(model.config) if isinstance(model, Llama) else {}
    for name, (path, variable, turned) in model_names.plain_variables(model).items():
        shape = variable.shape
        shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        stored = elsewhere.get(name)
        right = [variable.dtype, *kinds]
        if stored is None or name in folder.entries:
            value = folder.read(name, right, [shape])
        else:  # as the family has it, and not as we do
            parts = stored.shapes(shape)
            value = stored.gather([folder.read(n, right, [parts]) for n in stored.names])
        new = place(name, value.mT if turned else value)
        bare = not isinstance(variable, nnx.Variable)
        filled.append((path, new if bare else variable.replace(new)))
    nnx.update(model, nnx.from_flat_state(filled))
