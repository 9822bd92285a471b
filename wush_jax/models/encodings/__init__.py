"""Model folders whose weights other libraries have encoded, opened as plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wush_jax.models.encodings import (
    awq,
    fp8,
    gguf_file,
    gptq,
    modelopt_fp8,
    pack_quantized,
    plain_quantized,
)
from wush_jax.models.encodings.encoded import DecodedFolder, Encoding
from wush_jax.models.encodings.gguf_file import GGUFFile, gguf_path
from wush_jax.models.encodings.said_elsewhere import quantization_said
from wush_jax.storage.json_file import read_config
from wush_jax.storage.tensor_folder import TensorFolder

ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        pack_quantized.ENCODING,
        *plain_quantized.ENCODINGS,
        gptq.ENCODING,
        awq.ENCODING,
        fp8.ENCODING,
        modelopt_fp8.ENCODING,
        gguf_file.ENCODING,
    )
}


def open_folder(path: str | Path, *, mapped: bool = False) -> TensorFolder:
    """Open a folder; weights that are encoded in a way that we read are seen as plain tensors.

    Args:
      path: the folder; or a GGUF file, or a folder with one.
      mapped: as for a `TensorFolder`.

    Raises:
      ValueError: files or a config that are damaged, all faults at once.
      NotImplementedError: an encoding that asks for what is not read.
    """
    file = gguf_path(path)
    if file is not None:
        return DecodedFolder(GGUFFile(file), gguf_file.ENCODING)
    folder = TensorFolder(path, mapped=mapped)
    config = quantization_said(folder)
    for encoding in ENCODINGS.values():
        if encoding.claims(config):
            folder.config = {**folder.config, "quantization_config": config}
            return DecodedFolder(folder, encoding)
    return folder


def open_config(path: str | Path) -> dict[str, Any]:
    """Return the config of a model's folder, or that which a GGUF file's metadata means."""
    file = gguf_path(path)
    return read_config(Path(path)) if file is None else GGUFFile(file).config
