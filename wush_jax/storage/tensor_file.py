"""One safetensors file, written tensor by tensor: the host holds one of them at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.storage.tensor_folder import CHECKSUMS, DTYPES, checksum_of

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART = 2**24  # bytes that are written at once


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: the widest types first, by name, as the format's library does.

    The header stands before the values and the checksums in it are known after them: its room is
    kept, and what they leave of it is filled with spaces, which the format allows.

    Args:
      path: of the file.
      tensors: by name, of any type with ``shape``, ``dtype`` and ``nbytes`` that `numpy.asarray`
        takes and that gives its rows by slices; each is asked for when its turn comes.
      metadata: of the file; None for checksums, which `TensorFolder` verifies.

    Raises:
      OSError: the file cannot be written.

    >>> import tempfile
    >>> from safetensors.numpy import load_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder) / "x", {"a": np.arange(2), "b": jnp.float32(3)})
    ...     {name: value.tolist() for name, value in load_file(Path(folder) / "x").items()}
    {'a': [0, 1], 'b': 3.0}
    """
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    entries, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": NAMES[np.dtype(tensors[name].dtype)],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    about = _checksums(dict.fromkeys(order, 2**32 - 1)) if metadata is None else metadata
    with open(path, "wb") as file:
        room = file.write(_header(entries, about)) - 8
        sums = {name: _write(file, tensors[name]) for name in order}
        if metadata is None:
            file.seek(0)
            file.write(_header(entries, _checksums(sums), room))


def _checksums(sums: Mapping[str, int]) -> dict[str, str]:
    return {CHECKSUMS: json.dumps(sums)}


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """Return a header of at least ``room`` bytes behind its length, which is a multiple of 8."""
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text = text.ljust(max(room, len(text) + -len(text) % 8))
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, tensor: Any) -> int:
    """Write a tensor's bytes, in C order; return the CRC-32 of type, shape and values."""
    checksum = checksum_of(tensor.dtype, tensor.shape)
    for part in _parts(tensor):
        # Of rank 0 where it is: ascontiguousarray does not see to that.
        data = np.asarray(part, order="C").reshape(-1).view(np.uint8).data
        file.write(data)
        checksum = zlib.crc32(data, checksum)
    return checksum


def _parts(tensor: Any) -> Iterator[Any]:
    """Yield some rows after the others, so that of a mapped file few pages are in memory."""
    if isinstance(tensor, jax.Array):
        # An array keeps what it once gave the host as long as it lives.
        yield tensor if jax.default_backend() == "cpu" else jnp.copy(tensor)
    elif not tensor.shape:
        yield tensor
    else:
        rows = max(1, PART * tensor.shape[0] // max(1, tensor.nbytes))
        for start in range(0, tensor.shape[0], rows):
            yield tensor[start : start + rows]
