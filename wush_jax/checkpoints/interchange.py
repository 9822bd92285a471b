"""Quantized checkpoints of other libraries: what is in a folder, its layers, and exports."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from wush_jax.checkpoints.content import ACTIVATIONS, content_of, written
from wush_jax.checkpoints.layouts import LAYOUTS, layout_of, read_all
from wush_jax.checkpoints.layouts.layout import Content, quantization_config
from wush_jax.checkpoints.packed_layout import on_host
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.checkpoints.readers import notes
from wush_jax.formats import Format
from wush_jax.layers.names import depth, joint_name, pattern_of
from wush_jax.models.encodings import DecodedFolder, open_folder
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.folder_writer import (
    SHARD_BYTES,
    check_companions,
    copy_companions,
    write_folder,
)
from wush_jax.storage.tensor_folder import TensorFolder

WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.write is not None)


def export(
    out_folder: str | Path,
    source: str | Path | nnx.Module,
    layout: str,
    *,
    rotated: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """Write a quantized model in the layout of another library.

    Codes and scales are copied bit for bit, nothing is quantized again; what a layout cannot hold
    is refused. A folder is read and written one shard at a time, and its tokenizer, generation
    config and the like are copied.

    Args:
      out_folder: where to write; as for `wush_jax.save`.
      source: a folder in any layout that we read, or a model from `wush_jax.quantize_model`.
      layout: "wush" (native), "fp_quant", "nvfp4-pack-quantized" or "mxfp4-pack-quantized"
        (compressed-tensors).
      rotated: whether the reader applies the transforms in the files of compressed-tensors, as
        vLLM does and transformers does not.
      shard_bytes: the largest size of a file.

    Returns:
      What to know before serving it, such as "tensor parallel 1 only"; empty if nothing.

    Raises:
      ValueError: a layout that is unknown or only read, a model that it cannot hold, files that
        are damaged, transforms that are not ``rotated``.
      OSError: the place cannot be written; what was there is still there.

    >>> import tempfile
    >>> from wush_jax import MXFP4, Recipe, quantize_weight
    >>> from wush_jax.layers.nnx import QuantizedDense, dense_layers
    >>> dense = dense_layers(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))[0][""]
    >>> packed = quantize_weight(dense.weight, None, Recipe(transform="hadamard"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(folder, nnx.List([QuantizedDense(dense, packed)]), "fp_quant")
    ...     inspect_folder(folder).layout
    ()
    'fp_quant'
    """
    chosen = LAYOUTS.get(layout)
    if chosen is None or chosen.write is None:
        raise ValueError(f"layout={layout!r} cannot be written; choose from {', '.join(WRITABLE)}")
    if isinstance(source, nnx.Module):
        content = content_of(source)
        content = dataclasses.replace(content, layers=jax.device_get(dict(content.layers)))
    else:
        check_companions(source)
        content = _content_of_folder(open_folder(source, mapped=True))
    tensors, config = written(content, chosen, rotated=rotated)
    framework = None if layout == "wush" else "pt"
    write_folder(out_folder, tensors, config, shard_bytes=shard_bytes, framework=framework)
    if not isinstance(source, nnx.Module):
        copy_companions(source, out_folder)
    return notes(content, layout)


def read_layers(path: str | Path) -> dict[str, PackedWeight]:
    """Return the quantized layers of a folder in any layout that we read, by their names in files.

    Args:
      path: the folder.

    Returns:
      Packed weights of numpy arrays that stay in the files until they are looked at. Layers with
      one transform hold the same array.

    Raises:
      ValueError: a layout that is unknown, files that are damaged.
      NotImplementedError: a layer that needs what we lack.

    >>> import tempfile
    >>> from wush_jax import Recipe, quantize_weight, save
    >>> from wush_jax.layers.nnx import QuantizedDense, dense_layers
    >>> dense = dense_layers(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))[0][""]
    >>> packed = quantize_weight(dense.weight, None, Recipe(transform="hadamard"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, nnx.List([QuantizedDense(dense, packed)]))
    ...     {name: layer.shape for name, layer in read_layers(folder).items()}
    {'0': (8, 32)}
    """
    folder = open_folder(path, mapped=True)
    return read_all(folder, on_host)


def _content_of_folder(folder: TensorFolder) -> Content:
    layout = layout_of(folder)
    records = layout.records(folder)
    layers = read_all(folder, on_host)
    names = [name for name in folder.unread if not name.endswith(layout.skipped)]
    plain = {
        name: folder.read(name, [folder.entries[name].dtype], [folder.entries[name].shape])
        for name in names
    }
    own = ("quantization_config", ACTIVATIONS)
    config = {k: v for k, v in folder.config.items() if k not in own}
    if not layers:
        raise ValueError(
            f"source={str(folder.path)!r} ({layout.name}) has no layer that stays packed here: its "
            "weights are plain ones to quantize, with wush quantize or wush.quantize_model"
        )
    stored = quantization_config(folder)
    extra: dict[str, Any] = (
        {"metadata": {"converted_from": layout.name}} if layout.name != "wush" else {}
    )
    if ACTIVATIONS in folder.config:
        extra["activation_dtype"] = folder.config[ACTIVATIONS]
    for key in ("library", "naming", "metadata", "activation_dtype", "model_digest"):
        if key in stored:
            extra[key] = stored[key]
    return Content(layers, records, plain, config, extra)


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer in files.

    Attributes:
      name: in the files.
      shape: (N, K), or (*batch, N, K).
      format: of the weight, with its rule; or how it is stored, where it is "(decoded)".
      input_format: of the activations, or "none".
      transform: "identity", "shared d" or "per block d".
      global_scale: of the weight, dividing; None where there are several.
      bytes: of the layer's tensors, without those that are of no use here, such as the copy of its
        matrix that `fp_quant` has for training.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    input_format: str
    transform: str
    global_scale: float | None
    bytes: int


@dataclass(frozen=True)
class FolderSummary:
    """What is in a folder, from headers and small tensors.

    Attributes:
      path: the folder.
      layout: a name in `wush_jax.checkpoints.layouts.LAYOUTS`, or "unquantized".
      formats: weight/activation formats with the number of layers.
      tensors: number of tensors.
      bytes: of all tensors.
      layers: the quantized layers.
      notes: what the files ask for and is not done.
    """

    path: str
    layout: str
    formats: Mapping[str, int]
    tensors: int
    bytes: int
    layers: tuple[LayerSummary, ...]
    notes: tuple[str, ...] = ()

    def table(self, all_layers: bool = False) -> Table:
        """Return a `rich` table in the order of the model, with the sum of it all at its end.

        Args:
          all_layers: a row for every layer; else one for those alike.
        """
        last = f"{self.path}: {self.layout}, {self.tensors} tensors, {self.bytes:,} bytes"
        table = Table(caption="\n".join([*self.notes, last]))
        for name in ("layer", "N x K", "weight/input", "transform", "g", "bits"):
            table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
        groups: dict[Any, list[str]] = {}
        for layer in sorted(self.layers, key=lambda layer: depth(layer.name)):
            name = layer.name.removeprefix("model.")  # as plans and reports have it
            row = (
                " x ".join(map(str, layer.shape)),
                f"{layer.format}/{layer.input_format}",
                layer.transform,
                "" if layer.global_scale is None else f"{layer.global_scale:.6g}",
                f"{8 * layer.bytes / np.prod(layer.shape):.2f}",
            )
            groups.setdefault((pattern_of(name), row, name if all_layers else ""), []).append(name)
        for (_, row, _), names in groups.items():
            table.add_row(joint_name(names), *row)
        return table

    def __rich__(self) -> Table:
        return self.table()


def inspect_folder(path: str | Path) -> FolderSummary:
    """Say what is in a folder of safetensors files, without reading its weights.

    Args:
      path: the folder.

    Raises:
      ValueError: a layout that is unknown, files that are damaged.
      NotImplementedError: a layer that needs what we lack.

    >>> import tempfile
    >>> from wush_jax.storage.folder_writer import write_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(folder, {"norm.weight": np.ones(8, np.float32)}, {})
    ...     (inspect_folder(folder).layout, inspect_folder(folder).bytes)
    ('unquantized', 32)
    """
    folder = open_folder(path, mapped=True)
    plain = "quantization_config" not in folder.config
    plain &= not any(layout.claims(folder) for layout in LAYOUTS.values())
    layout = None if plain else layout_of(folder)
    records = {} if layout is None else layout.records(folder)
    decoded = folder if isinstance(folder, DecodedFolder) else None
    entries = (folder if decoded is None else decoded.stored).entries
    sizes: Counter[str] = Counter()
    for name, entry in entries.items():
        if layout is None or not name.endswith(layout.skipped):
            sizes[name.rpartition(".")[0]] += entry.nbytes
    layers = [_summary(folder, name, record, sizes[name]) for name, record in records.items()]
    for name, weight in decoded.encoded.items() if decoded is not None else ():
        layer = name.removesuffix(".weight")
        if layer not in records:
            stored = f"{weight.said} (decoded)"
            size = sizes[layer]
            layers.append(LayerSummary(layer, weight.shape, stored, "none", "identity", None, size))
    return FolderSummary(
        path=str(folder.path),
        layout="unquantized" if layout is None else layout.name,
        formats=Counter(f"{layer.format}/{layer.input_format}" for layer in layers),
        tensors=len(entries),
        bytes=sum(entry.nbytes for entry in entries.values()),
        layers=tuple(layers),
        notes=() if decoded is None else decoded.notes,
    )


def _summary(folder: TensorFolder, name: str, record: LayerRecord, size: int) -> LayerSummary:
    transform = "identity"
    if record.block is not None:
        stored = folder.entries.get(f"{name}.transform")
        stored = stored or folder.entries.get(f"{name}.forward_hadamard_matrix")
        d = record.block
        several = stored is not None and stored.nbytes // stored.dtype.itemsize > d * d
        transform = f"{'per block' if several else 'shared'} {d}"
    scale = record.global_scale
    return LayerSummary(
        name=name,
        shape=record.shape,
        format=_format_name(record.format),
        input_format=_format_name(record.input_format),
        transform=transform,
        global_scale=float(scale) if np.ndim(scale) == 0 else None,
        bytes=size,
    )


def _format_name(fmt: Format | None) -> str:
    return "none" if fmt is None else fmt.name
