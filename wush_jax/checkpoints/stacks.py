"""Experts that files hold one by one, as the one packed stack of a model's layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from wush_jax.checkpoints.layouts.layout import Layout
from wush_jax.checkpoints.packed_layout import Place, codes_name, on_host
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import QuantizedArray
from wush_jax.models import Llama
from wush_jax.models.stored_names import stored_experts
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder


def stacked_experts(
    model: nnx.Module, records: Mapping[str, LayerRecord]
) -> dict[str, tuple[str, ...]]:
    """Return the stacks of a model whose experts are packed layers of their own in the files.

    Args:
      model: of which a `Llama` alone says where files keep its experts.
      records: of a folder's layers; what makes a stack are layers of one shape and pair of formats,
        without transforms.

    Returns:
      By the stack's name, those of its layers.
    """
    found = {}
    for name, stored in stored_experts(model.config).items() if isinstance(model, Llama) else ():
        parts = tuple(part.removesuffix(".weight") for part in stored.names)
        kinds = {_kind(records.get(part)) for part in parts}
        if len(parts) > 1 and len(kinds) == 1 and None not in kinds:
            found[name.removesuffix(".weight")] = parts
    return found


def _kind(record: LayerRecord | None) -> Any:
    """What layers of a stack have in common; None for what makes no stack."""
    if record is None or record.site is not None:
        return None
    derived = record.input_global_scale is None
    return record.shape, record.format, record.input_format, derived


def stack_record(parts: list[LayerRecord]) -> LayerRecord:
    """Return the record of a stack from those of its layers, which are of one kind."""
    first = parts[0]
    derived = first.input_global_scale is None
    return dataclasses.replace(
        first,
        shape=(len(parts), *first.shape),
        global_scale=[part.global_scale for part in parts],
        input_global_scale=None if derived else [part.input_global_scale for part in parts],
    )


def read_stack(
    folder: TensorFolder,
    name: str,
    parts: Mapping[str, LayerRecord],
    layout: Layout,
    place: Place,
) -> PackedWeight:
    """Read the layers of a stack, one after the other, as one.

    Args:
      folder: where they are.
      name: of the stack, under which its arrays are placed.
      parts: the records of its layers.
      layout: of the folder.
      place: puts values on devices.
    """
    layers = [layout.read(folder, part, record, on_host) for part, record in parts.items()]
    weights: list[Any] = [layer.weight for layer in layers]

    def stacked(key: str, values: list[Any]) -> jax.Array:
        return place(key, np.stack(values))

    first = layers[0]
    weight = QuantizedArray(
        stacked(codes_name(name, first.weight.format), [w.codes for w in weights]),
        stacked(f"{name}.scale_quant", [w.scales for w in weights]),
        stacked(f"{name}.weight_global_scale", [w.global_scale for w in weights]),
        first.weight.format,
    )
    inputs = None
    if first.input_global_scale is not None:
        scales = [layer.input_global_scale for layer in layers]
        inputs = stacked(f"{name}.activation_global_scale", scales)
    return PackedWeight(weight, None, inputs, first.input_format)
