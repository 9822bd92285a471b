"""What there is to write: quantized layers, their records, the rest, and the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np
from flax import nnx

from pallas_kernels.fragments import Fragments
from pallas_kernels.stacks import Stack
from wush_jax.checkpoints import model_names
from wush_jax.checkpoints.layouts.faults import Faults
from wush_jax.checkpoints.layouts.layout import Content, Layout
from wush_jax.checkpoints.layouts.wush import LAYOUT as NATIVE
from wush_jax.checkpoints.packed_layout import record_of
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.checkpoints.readers import check_rotated
from wush_jax.formats.checks import check_kind
from wush_jax.layers.nnx import QuantizedDense, dotted
from wush_jax.models import Llama, LlamaConfig
from wush_jax.solvers.site import PackedWeight

# Beside ``dtype`` in the config of an export: what we computed activations in.
ACTIVATIONS = "wush_activation_dtype"


def content_of(
    source: nnx.Module | Mapping[str, PackedWeight], metadata: Mapping[str, Any] | None = None
) -> Content:
    """Return what there is to write of a quantized model, or of packed weights by name.

    Args:
      source: a model from `quantize_model`, or packed weights.
      metadata: plain values to keep.

    Raises:
      ValueError: nothing is quantized, something cannot be stored.
    """
    if metadata is not None:
        check_kind(Mapping, "a mapping of plain values, or None", metadata=metadata)
    layers: dict[str, PackedWeight] = {}
    records: dict[str, LayerRecord] = {}
    first: dict[int, str] = {}
    for name, packed, shared in _packed(source):
        site = None if shared is None else first.setdefault(id(shared), name)
        if isinstance(packed.weight, Fragments | Stack):
            # To the host at once: all layers in both layouts may not fit the device.
            packed = dataclasses.replace(packed, weight=jax.device_get(packed.interchange))
        layers[name] = packed
        records[name] = record_of(name, packed, site)
    if not records:
        raise ValueError("qmodel has no quantized layers; pass what quantize_model returned")
    config: dict[str, Any] = getattr(getattr(source, "config", None), "to_dict", dict)()
    plain = model_names.plain_tensors(source) if isinstance(source, nnx.Module) else {}
    return Content(layers, records, plain, config, native_extra(source, metadata))


def _packed(source: Any) -> Iterator[tuple[str, PackedWeight, Any]]:
    """Yield name, packed weight and what layers with one transform have in common."""
    if isinstance(source, nnx.Module):
        for path, module in nnx.iter_modules(source):
            if isinstance(module, QuantizedDense):
                name = model_names.layer_name(source, dotted(path))
                yield name, module.packed, module.transform
        return
    if not isinstance(source, Mapping):
        raise ValueError(
            f"qmodel is a {type(source).__name__}; pass what quantize_model returned, or packed "
            "weights by name: {'name': packed}"
        )
    faults = [
        f"{name!r}: {type(packed).__name__}"
        for name, packed in source.items()
        if not (isinstance(name, str) and name and isinstance(packed, PackedWeight))
    ]
    if faults:
        raise ValueError(f"qmodel: each entry must be a name and a PackedWeight, not {faults}")
    yield from ((name, packed, packed.transform) for name, packed in source.items())


def native_extra(model: Any, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries of a native ``quantization_config`` beside the layers' records."""
    extra: dict[str, Any] = {
        "library": f"wush_jax {library_version()}",
        "naming": model_names.naming(model),
        "metadata": dict(metadata or {}),
    }
    if isinstance(model, Llama):
        extra["activation_dtype"] = np.dtype(model.dtype).name
        # Of what a reader will make of the file: families keep other entries than the model has.
        extra["model_digest"] = LlamaConfig.from_dict(model.config.to_dict()).digest()
    if isinstance(model, nnx.Module):
        stacks = {
            model_names.layer_name(model, dotted(path)): list(module.stack.axes)
            for path, module in nnx.iter_modules(model)
            if isinstance(module, QuantizedDense) and module.stack is not None
        }
        if stacks:
            extra["stacks"] = stacks  # of layers whose kernels are not stacked in front
    return extra


def written(
    content: Content, layout: Layout, *, rotated: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all tensors and the config of a content in a layout.

    Args:
      content: what there is.
      layout: how to write it.
      rotated: whether the reader applies the transforms in the files.

    Raises:
      ValueError: a layout that is only read, or cannot hold the content: all reasons at once.
    """
    if layout.write is None:
        raise ValueError(f"layout={layout.name!r} is only read; write 'wush' or another one")
    faults = Faults(layout.name)
    stacks = [name for name, record in content.records.items() if len(record.shape) != 2]
    for name in stacks if layout is not NATIVE else ():
        faults.add(
            "holds one matrix a layer, {layer} has several kernels "
            f"{content.records[name].shape}; keep layout='wush'",
            name,
        )
    single = {name: layer for name, layer in content.layers.items() if name not in stacks}
    if faults and not single:
        faults.check()
    tensors, quantization = layout.write(
        dataclasses.replace(content, layers=single) if faults else content, faults
    )
    with faults.noting():
        check_rotated(content, layout.name, rotated)
    faults.check()
    model_names.add(tensors, content.plain)
    config = {**content.config}
    if layout is not NATIVE and "activation_dtype" in content.extra:
        # Readers of the other layouts decode to bfloat16, and stop where the rest is float32.
        config |= dict.fromkeys(("dtype", "torch_dtype"), "bfloat16")
        config[ACTIVATIONS] = content.extra["activation_dtype"]
    return tensors, {**config, "quantization_config": quantization}


def library_version() -> str:
    """Return the version that is installed; "unknown" from a bare checkout."""
    try:
        return version("wush-jax")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
