"""The native layout (`wush_jax.checkpoints.packed_layout`), and files of it that the WUSH authors'
code wrote.

Theirs have the same tensors without records in the config: what can be missing is then derived
from dtypes, shapes and constants.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts import layout as shared
from wush_jax.checkpoints.layouts.faults import Faults
from wush_jax.checkpoints.layouts.layout import Content, Layout
from wush_jax.checkpoints.packed_layout import Place, layer_tensors, read_packed
from wush_jax.checkpoints.quantization_config import (
    METHOD,
    LayerRecord,
    records_from_json,
    records_to_json,
    sealed,
)
from wush_jax.formats import MXFP4, NVFP4
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import TensorFolder, some

NAME = "wush"
FORMATS = {np.dtype(jnp.float8_e8m0fnu): MXFP4, np.dtype(jnp.float8_e4m3fn): NVFP4}


def _claims(folder: TensorFolder) -> bool:
    return shared.quantization_config(folder).get("quant_method") == METHOD


def _is_ours(folder: TensorFolder) -> bool:
    return bool({"layout", "layers"} & set(shared.quantization_config(folder)))


def _records(folder: TensorFolder) -> dict[str, LayerRecord]:
    if not _is_ours(folder):
        return _derived_records(folder)
    try:
        records = records_from_json(shared.quantization_config(folder))
        ending = ".scale_quant"
        stored = {n.removesuffix(ending) for n in folder.entries if n.endswith(ending)}
        if stored - set(records):
            raise ValueError(f"no entry for the layers {some(stored - set(records))} of the files")
    except ValueError as error:
        raise ValueError(
            f"{folder.path / CONFIG}: {error}; give a folder that save wrote"
        ) from error
    return records


def _derived_records(folder: TensorFolder) -> dict[str, LayerRecord]:
    records, digests = {}, {}
    for name in shared.layer_names(folder, ".e2m1"):
        shape = shared.weight_shape(folder, f"{name}.e2m1")
        scales = folder.entries.get(f"{name}.scale_quant")
        fmt = None if scales is None else FORMATS.get(scales.dtype)
        if fmt is None:
            raise ValueError(
                f"{folder.path}: tensor '{name}.scale_quant' is missing or neither E8M0 nor E4M3"
            )
        matrix = _transform(folder, name, shape[1])
        if matrix is not None:
            digests[name] = shared.digest(matrix)
        weight, inputs = (
            _dividing(folder, f"{name}.{key}", fmt.global_scale)
            for key in ("weight_global_scale", "activation_global_scale")
        )
        _check_rule(folder, name, {"pow2_div3": 4.0, "absmax": 6.0}[fmt.rule])
        records[name] = LayerRecord(
            shape=shape,
            format=fmt,
            input_format=fmt,
            block=None if matrix is None else matrix.shape[-1],
            site=None,
            global_scale=weight,
            input_global_scale=None if inputs == fmt.global_scale else inputs,
        )
    return shared.with_sites(records, digests)


def _dividing(folder: TensorFolder, name: str, usual: float | None) -> float:
    """Return the reciprocal of a stored scale: exactly the usual one where it is that."""
    stored = shared.read_scalar(folder, name)
    if usual is not None and stored == np.float32(1) / np.float32(usual):
        return usual
    return float(np.float32(1) / stored)


def _check_rule(folder: TensorFolder, name: str, wanted: float) -> None:
    key = f"{name}.activation_scale_scale"
    if key in folder.entries and shared.read_scalar(folder, key) != wanted:
        raise ValueError(f"{folder.path}: tensor {key!r} is not {wanted}: a rule without a name")


def _transform(folder: TensorFolder, name: str, k: int) -> np.ndarray | None:
    entry = folder.entries.get(f"{name}.transform")
    if entry is None:
        return None
    d = entry.shape[-1] if entry.shape else 0
    if d < 1 or k % d:
        raise ValueError(f"{entry.file}: '{name}.transform' has shape {entry.shape}, K is {k}")
    shapes = [(k // d, d, d), (d, d)]
    return folder.read(f"{name}.transform", [jnp.bfloat16, np.float32], shapes)


def _read(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
) -> PackedWeight:
    if _is_ours(folder):
        return read_packed(folder, name, record, place, transform=transform)
    stored = folder.entries[f"{name}.scale_quant"].dtype
    weight = shared.read_weight(
        folder, name, record, place, codes="e2m1", scales="scale_quant", stored=stored
    )
    own = _transform(folder, name, record.shape[1])
    if own is not None and transform is None:
        transform = place(f"{record.site}.transform", own)
    inputs = shared.place_input_scale(name, record, place)
    return PackedWeight(weight, transform, inputs, record.input_format)


def _write(content: Content, faults: Faults) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors: dict[str, Any] = {}
    for name, packed in content.layers.items():
        tensors |= layer_tensors(name, packed)
    return tensors, sealed({**records_to_json(content.records), **content.extra})


LAYOUT = Layout(
    NAME,
    _claims,
    _records,
    _read,
    _write,
    written_by="this library; the WUSH authors' code of mid-2026",
)
