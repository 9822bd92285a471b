"""The experts of gpt-oss as released: ``quant_method`` "mxfp4", weights of 4 bits, no transform.

``gate_up_proj_blocks`` (E, 2 I, H / 32, 16) hold two E2M1 codes a byte, the even one low, and
``gate_up_proj_scales`` (E, 2 I, H / 32) E8M0 scales; rows of gate and up take turns. All other
tensors are plain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts import layout as shared
from wush_jax.checkpoints.layouts.layout import Layout
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import MXFP4, QuantizedArray
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder

# Their tensor, the first of its rows that are a layer's, and the step to the next.
PARTS = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}


def _claims(folder: TensorFolder) -> bool:
    return shared.quantization_config(folder).get("quant_method") == "mxfp4"


def _records(folder: TensorFolder) -> dict[str, LayerRecord]:
    records = {}
    for name in shared.layer_names(folder, "down_proj_blocks"):
        for part, (theirs, _, step) in PARTS.items():
            shape = _shape(folder, f"{name}{theirs}_blocks")
            experts, rows, groups, half = shape
            if half != 16 or rows % step:
                raise ValueError(
                    f"{folder.path}: '{name}{theirs}_blocks' has shape {shape}; expected "
                    f"(experts, rows, K / 32, 16), rows a multiple of {step}"
                )
            records[name + part] = LayerRecord(
                shape=(experts, rows // step, 32 * groups),
                format=MXFP4,
                input_format=None,
                block=None,
                site=None,
                global_scale=[1.0] * experts,
                input_global_scale=None,
            )
    return records


def _shape(folder: TensorFolder, name: str) -> tuple[int, ...]:
    entry = folder.entries.get(name)
    if entry is None or len(entry.shape) != 4:
        found = "missing" if entry is None else f"of shape {entry.shape}"
        raise ValueError(f"{folder.path}: tensor {name!r} is {found}; expected four axes")
    return entry.shape


def _read(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
) -> PackedWeight:
    experts, part = name.rsplit(".", 1)
    theirs, first, step = PARTS[part]
    count, rows, k = record.shape
    shape = count, rows * step, k // 32
    codes = folder.read(f"{experts}.{theirs}_blocks", [np.uint8], [(*shape, 16)])
    scales = folder.read(f"{experts}.{theirs}_scales", [np.uint8], [shape])
    codes = codes.reshape(*shape[:2], k // 2)[:, first::step]
    scales = np.ascontiguousarray(scales[:, first::step]).view(jnp.float8_e8m0fnu)
    weight = QuantizedArray(
        place(f"{name}.e2m1", np.ascontiguousarray(codes)),
        place(f"{name}.scale_quant", scales),
        place(f"{name}.weight_global_scale", np.ones(count, np.float32)),
        record.format,
    )
    return PackedWeight(weight, None, None, None)


LAYOUT = Layout("gpt_oss", _claims, _records, _read, written_by="gpt-oss as released")
