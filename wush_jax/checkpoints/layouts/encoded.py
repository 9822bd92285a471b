"""Weights that other libraries encode (`wush_jax.models.encodings`), packed where that is exact.

Whole numbers less their zero points become codes of 4 or 8 bits, what has room for them; E4M3 stays
E4M3. A scale of a tensor, a row or a block is repeated for each row and group, as bfloat16 or
float32. Experts that the files hold one by one become one stack. All else (inputs in an order of
their own, 8 bits with zero points) is decoded to plain weights, a source to quantize.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts.layout import Layout
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import Format, QuantizedArray, elements
from wush_jax.formats.elements import Element, FloatElement
from wush_jax.formats.format import SCALE_DTYPES
from wush_jax.models.encodings import ENCODINGS, DecodedFolder
from wush_jax.models.encodings.encoded import EncodedWeight, Encoding
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder

SMALLEST = 8  # a group: below it, scales would take more memory than plain weights
WHOLE = tuple(elements.IntElement(f"int{bits}_full", bits, full=True) for bits in (4, 8))


def _element(weight: EncodedWeight) -> Element | None:
    """Return the grid of a weight's codes less their zero points; None where none of ours has all.

    Without zero points codes have b bits; less zero points of b bits one more.
    """
    if weight.element == "e4m3":
        return elements.E4M3
    bits = weight.element.removeprefix("int")
    need = int(bits) + weight.zero_points if bits.isdecimal() else math.inf
    return next((element for element in WHOLE if element.bits >= need), None)


def packed_format(folder: DecodedFolder, weight: EncodedWeight) -> Format | None:
    """Return the format that holds an encoded weight exactly, or None where none does.

    A group is what the columns of a block and all K have in common.

    Args:
      folder: for the type of its scales.
      weight: the weight.
    """
    element = _element(weight)
    if element is None or weight.reordered or weight.block is None:
        return None
    k = weight.shape[-1]
    group = math.gcd(weight.block[1], k)
    if len(weight.shape) != 2 or group < SMALLEST or k * element.bits % 8:
        return None
    stored = folder.stored.entries[weight.parts[1]].dtype
    kind = "bfloat16" if stored == jnp.bfloat16 else "float32"
    name = element.name.removesuffix("_full").upper()
    return Format(f"{name}_G{group}", element, group, kind, "absmax", 1.0)


def _records(folder: TensorFolder) -> dict[str, LayerRecord]:
    assert isinstance(folder, DecodedFolder)
    records = {}
    for name, weight in folder.encoded.items():
        fmt = packed_format(folder, weight)
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
    fmt = record.format
    floats = isinstance(fmt.element, FloatElement)
    codes = found.codes if floats else found.differences().astype(np.int8)
    codes = codes.view(np.uint8)
    if fmt.element.bits == 4:
        codes = codes[:, 0::2] & 15 | codes[:, 1::2] << 4
    (n, k), (rows, columns) = record.shape, found.block
    first = np.arange(0, k, fmt.group_size) // columns
    scales = found.scales.astype(SCALE_DTYPES[fmt.scale_dtype])[:, first]
    weight = QuantizedArray(
        place(f"{name}.codes", np.ascontiguousarray(codes)),
        place(f"{name}.scale_quant", np.ascontiguousarray(scales.repeat(rows, axis=0)[:n])),
        place(f"{name}.weight_global_scale", np.ones((), np.float32)),
        fmt,
    )
    return PackedWeight(weight, None, None, None)


def _layout(encoding: Encoding) -> Layout:
    def claims(folder: TensorFolder) -> bool:
        return isinstance(folder, DecodedFolder) and folder.encoding is encoding

    return Layout(encoding.name, claims, _records, _read, written_by=encoding.written_by)


ENCODED_LAYOUTS = tuple(map(_layout, ENCODINGS.values()))
