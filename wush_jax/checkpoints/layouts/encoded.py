"""Weights that other libraries encode (`wush_jax.models.encodings`), packed where that is exact.

Symmetric 4-bit codes in groups of inputs that are in order are `INT4_FULL`'s: codes -8 to 7 and a
scale of bfloat16 or float32 a group. All else (zero points, reordered inputs, 8 bits) is decoded
to plain weights, a source to quantize.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts.layout import Layout
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import Format, QuantizedArray, elements
from wush_jax.models.encodings import ENCODINGS, DecodedFolder
from wush_jax.models.encodings.encoded import EncodedWeight, Encoding
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder

INT4_FULL = elements.IntElement("int4_full", 4, full=True)


def packed_format(weight: EncodedWeight) -> Format | None:
    """Return the format that holds an encoded weight exactly, or None where none does."""
    exact = weight.element == "int4" and not weight.zero_points and not weight.reordered
    if not exact or weight.block is None:
        return None
    (rows, group), k = weight.block, weight.shape[1]
    if rows != 1 or k % group or k % 2:
        return None
    scales = "bfloat16" if weight.dtype == jnp.bfloat16 else "float32"
    return Format(f"INT4_G{group}", INT4_FULL, group, scales, "absmax", 1.0)


def _records(folder: TensorFolder) -> dict[str, LayerRecord]:
    assert isinstance(folder, DecodedFolder)
    records = {}
    for name, weight in folder.encoded.items():
        fmt = packed_format(weight)
        if fmt is not None:
            records[name.removesuffix(".weight")] = LayerRecord(
                shape=weight.shape,
                format=fmt,
                input_format=None,
                block=None,
                site=None,
                global_scale=1.0,
                input_global_scale=None,
            )
    return records


def _read(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
) -> PackedWeight:
    assert isinstance(folder, DecodedFolder)
    found = folder.encoded[f"{name}.weight"].read()
    folder.skip(f"{name}.weight")
    nibbles = found.codes.astype(np.uint8) & 15
    kind = jnp.bfloat16 if record.format.scale_dtype == "bfloat16" else np.float32
    weight = QuantizedArray(
        place(f"{name}.codes", nibbles[:, 0::2] | nibbles[:, 1::2] << 4),
        place(f"{name}.scale_quant", np.ascontiguousarray(found.scales).astype(kind)),
        place(f"{name}.weight_global_scale", np.ones((), np.float32)),
        record.format,
    )
    return PackedWeight(weight, None, None, None)


def _layout(encoding: Encoding) -> Layout:
    def claims(folder: TensorFolder) -> bool:
        return isinstance(folder, DecodedFolder) and folder.encoding is encoding

    return Layout(encoding.name, claims, _records, _read, written_by=encoding.written_by)


ENCODED_LAYOUTS = tuple(map(_layout, ENCODINGS.values()))
