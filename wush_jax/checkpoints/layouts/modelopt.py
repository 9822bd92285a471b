"""NVIDIA ModelOpt's NVFP4 layout, read only.

Of a layer with N outputs and K inputs: ``weight`` U8 (N, K/2), ``weight_scale`` E4M3 (N, K/16),
``weight_scale_2`` and ``input_scale`` F32, which multiply: reciprocals of our global scales.
``hf_quant_config.json`` beside ``config.json`` says so, or ``quantization_config`` itself.
Quantized keys and values (``k_scale``, ``v_scale``) are left out: our cache is not quantized.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts import layout as shared
from wush_jax.checkpoints.layouts.layout import Layout
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import NVFP4
from wush_jax.models.encodings import DecodedFolder
from wush_jax.models.encodings.said_elsewhere import MODELOPT_FILE as FILE
from wush_jax.models.encodings.said_elsewhere import quantization_said
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder, some

NAME = "modelopt"
ALGORITHM = "NVFP4"


def _claims(folder: TensorFolder) -> bool:
    return (
        not isinstance(folder, DecodedFolder)
        and quantization_said(folder).get("quant_method") == NAME
    )


def _records(folder: TensorFolder) -> dict[str, LayerRecord]:
    config = quantization_said(folder)
    algorithm, group = config.get("quant_algo"), config.get("group_size", 16)
    if algorithm != ALGORITHM or group != NVFP4.group_size:
        raise ValueError(
            f"{folder.path}: quantization of {FILE}, or quantization_config: quant_algo="
            f"{algorithm!r} with group_size={group!r}; only {ALGORITHM!r} with groups of "
            f"{NVFP4.group_size}, and 'FP8', are read: quantize the original model with one of them"
        )
    records = {}
    fmt = NVFP4.replace(global_scale=None)
    names = shared.layer_names(folder, ".weight_scale_2")
    bare = [name for name in names if f"{name}.input_scale" not in folder.entries]
    if 0 < len(bare) < len(names):
        raise ValueError(
            f"{folder.path}: {some(bare)} have no input_scale, and other layers have; fetch the "
            "folder again"
        )
    for name in names:
        if f"{name}.weight" not in folder.entries or f"{name}.pre_quant_scale" in folder.entries:
            raise ValueError(
                f"{folder.path}: layer {name!r} has no weight, or scales its input by channel "
                "(pre_quant_scale), which is not read"
            )
        inputs = f"{name}.input_scale" in folder.entries
        records[name] = LayerRecord(
            shape=shared.weight_shape(folder, f"{name}.weight"),
            format=fmt,
            input_format=fmt if inputs else None,
            block=None,
            site=None,
            global_scale=_dividing(folder, f"{name}.weight_scale_2"),
            input_global_scale=_dividing(folder, f"{name}.input_scale") if inputs else None,
        )
    return records


def _dividing(folder: TensorFolder, name: str) -> float:
    return float(np.float32(1) / shared.read_scalar(folder, name))


def _read(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
) -> PackedWeight:
    weight = shared.read_weight(
        folder,
        name,
        record,
        place,
        codes="weight",
        scales="weight_scale",
        stored=jnp.float8_e4m3fn,
    )
    inputs = shared.place_input_scale(name, record, place)
    return PackedWeight(weight, None, inputs, record.input_format)


LAYOUT = Layout(
    NAME,
    _claims,
    _records,
    _read,
    skipped=(".k_scale", ".v_scale"),
    written_by="NVIDIA ModelOpt 0.47, NVFP4",
)
