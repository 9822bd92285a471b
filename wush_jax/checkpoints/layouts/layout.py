"""What a layout of quantized layers is, and what all layouts share."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from wush_jax.checkpoints.layouts.faults import Faults
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord, is_scale
from wush_jax.formats import QuantizedArray
from wush_jax.formats.format import SCALE_DTYPES
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder


class Read(Protocol):
    """Reads one layer; ``transform`` is that of its site, where it was placed before."""

    def __call__(
        self,
        folder: TensorFolder,
        name: str,
        record: LayerRecord,
        place: Place,
        *,
        transform: jax.Array | None = None,
    ) -> PackedWeight:
        """Return the layer's packed weight (N, K)."""


@dataclass(frozen=True)
class Content:
    """Quantized layers on the host, and everything else, ready to be written.

    Attributes:
      layers: packed weights of numpy arrays, by name.
      records: what a config says of them, by name.
      plain: other tensors, by name.
      config: the model's own config, without ``quantization_config``.
      extra: entries of a native ``quantization_config`` beside the records.
    """

    layers: Mapping[str, PackedWeight]
    records: Mapping[str, LayerRecord]
    plain: Mapping[str, Any]
    config: Mapping[str, Any]
    extra: Mapping[str, Any]

    @property
    def unquantized(self) -> list[str]:
        """Modules that look like dense layers, or experts, and are none of the quantized ones."""
        found = {
            name.removesuffix(".weight")
            for name, value in self.plain.items()
            if name.endswith(".weight") and len(value.shape) == 2 and "embed" not in name
        }
        found |= {  # stacks of experts, which have no names of their own there
            name.rpartition(".")[0]
            for name, value in self.plain.items()
            if len(value.shape) == 3 and name.rpartition(".")[0].endswith("experts")
        }
        # A head that is tied to the embedding is a dense layer of readers without a tensor here.
        return sorted(found | {"lm_head"} - set(self.layers))


Write = Callable[[Content, Faults], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Layout:
    """A way to store quantized layers.

    Attributes:
      name: how users call it.
      claims: whether a folder is in this layout, from its config alone.
      records: what a folder holds, by layer, checked as far as headers and small tensors go.
      read: one layer.
      write: from a content to tensors of the quantized layers and ``quantization_config``; what the
        layout cannot hold is added to the faults. None where nothing is written.
      skipped: endings of tensors that are of no use here.
      written_by: libraries and versions whose files are read.
    """

    name: str
    claims: Callable[[TensorFolder], bool]
    records: Callable[[TensorFolder], dict[str, LayerRecord]]
    read: Read
    write: Write | None = None
    skipped: tuple[str, ...] = ()
    written_by: str = ""


def quantization_config(folder: TensorFolder) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a folder, empty where there is none."""
    config = folder.config.get("quantization_config")
    return config if isinstance(config, dict) else {}


def layer_names(folder: TensorFolder, ending: str) -> list[str]:
    """Return the layers that have a tensor of some ending, in the order of the files.

    Raises:
      ValueError: there are none.
    """
    names = [n.removesuffix(ending) for n in folder.entries if n.endswith(ending)]
    if not names:
        raise ValueError(f"{folder.path}: no tensor ends in {ending!r}; fetch the folder again")
    return names


def weight_shape(folder: TensorFolder, name: str) -> tuple[int, int]:
    """Return (N, K) of two 4-bit codes a byte, from the header."""
    shape = folder.entries[name].shape
    if len(shape) != 2:
        raise ValueError(f"{folder.path}: tensor {name!r} has shape {shape}, expected (N, K/2)")
    return shape[0], 2 * shape[1]


def read_scalar(folder: TensorFolder, name: str) -> np.float32:
    """Return a global scale.

    Raises:
      ValueError: it is missing, no float32 of one value, or not positive and finite.
    """
    value = np.float32(folder.read(name, [np.float32], [(), (1,)]).reshape(()))
    if not is_scale(value):
        raise ValueError(f"{folder.path}: tensor {name!r} is {value}, expected a positive number")
    return value


def read_weight(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    codes: str,
    scales: str,
    stored: Any,
    bits: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> QuantizedArray:
    """Read codes and scales, and place them under their native names.

    Args:
      folder: where the tensors are.
      name: of the layer.
      record: what is known of it.
      place: puts values on devices.
      codes: ending of the codes' name.
      scales: ending of the scales' name.
      stored: dtype of the scales in the files.
      bits: from stored bytes to those of the format's scale type.
    """
    n, k = record.shape
    fmt = record.format
    values = folder.read(f"{name}.{codes}", [np.uint8], [(n, k // 2)])
    found = folder.read(f"{name}.{scales}", [stored], [(n, k // fmt.group_size)])
    _check_scales(folder, f"{name}.{scales}", found.view(np.uint8), fmt.scale_dtype)
    found = bits(found.view(np.uint8)).view(SCALE_DTYPES[fmt.scale_dtype])
    return QuantizedArray(
        place(f"{name}.e2m1", values),
        place(f"{name}.scale_quant", found),
        place(f"{name}.weight_global_scale", np.asarray(record.global_scale, np.float32)),
        fmt,
    )


def _check_scales(folder: TensorFolder, name: str, stored: np.ndarray, dtype: str) -> None:
    """Refuse scales that are NaN or negative: no library writes them, and they poison a layer."""
    nan = stored == 255 if dtype == "e8m0" else (stored & 127) == 127
    bad = nan if dtype == "e8m0" else nan | (stored > 128)
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        kind = "NaN" if nan[row, column] else "negative"
        raise ValueError(
            f"{folder.path}: tensor {name!r} has {int(bad.sum())} scales that are NaN or negative, "
            f"the first in row {row}, column {column} ({kind}); fetch the file again, or quantize "
            "the model again"
        )


def place_input_scale(name: str, record: LayerRecord, place: Place) -> jax.Array | None:
    """Return the global scale of a layer's activations on its devices, or None."""
    if record.input_global_scale is None:
        return None
    value = np.asarray(record.input_global_scale, np.float32)
    return place(f"{name}.activation_global_scale", value)


def with_sites(
    records: Mapping[str, LayerRecord], transforms: Mapping[str, bytes]
) -> dict[str, LayerRecord]:
    """Let layers whose transforms are the same, byte for byte, share one.

    Args:
      records: by layer.
      transforms: a digest of each layer's transform, by layer; absent for the identity.
    """
    first: dict[bytes, str] = {}
    return {
        name: dataclasses.replace(record, site=first.setdefault(transforms[name], name))
        if name in transforms
        else record
        for name, record in records.items()
    }


def digest(values: np.ndarray) -> bytes:
    """Return a hash of an array's shape and bytes."""
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()


def bits_of(scales: Any) -> np.ndarray:
    """Return stored scales as bytes."""
    values = np.asarray(scales)
    if values.dtype.itemsize > 1:  # of a format that will be refused, and possibly broadcast
        values = np.ascontiguousarray(values)
    return values.view(np.uint8)
