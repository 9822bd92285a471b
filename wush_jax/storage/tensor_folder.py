"""Folders of named tensors, read: ``config.json`` beside safetensors files, one or several shards.

Names are Hugging Face's: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with
``model.safetensors.index.json``. Nothing that is read is trusted or executed: whatever does not
fit is a ValueError with the file and the tensor, before memory is taken for it.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from wush_jax.storage.json_file import (
    JSON_BYTES,
    check_inside,
    parse_json,
    read_config,
    read_json,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a model's folder has beside weights and config, in nobody's layout.
COMPANIONS = (
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
OWN_FILE = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|"
    + "|".join(map(re.escape, (INDEX, *COMPANIONS)))
)
SHARD_FILE = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
# Metadata of a file, JSON in a string: CRC-32 by tensor.
CHECKSUMS = "crc32"

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F16": np.dtype(np.float16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
        "BF16": np.dtype(jnp.bfloat16),
        "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
        "F8_E5M2": np.dtype(jnp.float8_e5m2),
        "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    }
)


class MisfitError(ValueError):
    """Tensors are not those that a config, or a model, asks for."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
      file: the safetensors file.
      dtype: of the values.
      shape: of the tensor.
      start: byte of the file at which the values start.
      stamp: the file's identity, size and time when its header was read.
      crc32: of type, shape and values, or None where the file does not say (our writer does).
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stamp: tuple[int, ...]
    crc32: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFolder:
    """A folder opened for reading: headers at once, values tensor by tensor.

    Args:
      path: the folder.
      mapped: whether values that are read stay in the files until they are looked at.

    Attributes:
      path: the folder.
      config: what ``config.json`` holds.
      entries: where each tensor lies, by name.

    Raises:
      ValueError: a file that is missing, damaged or inconsistent with the others.
    """

    def __init__(self, path: str | Path, *, mapped: bool = False):
        self.path, self._mapped = Path(path), mapped
        if not self.path.is_dir():
            aside, hint = self.path.with_name(f".{self.path.name}.old"), ""
            if aside.is_dir():  # a writer was killed between two renames
                hint = f"; the one that was to be replaced is {aside}: rename it"
            raise ValueError(
                f"{str(path)!r} is not a folder; give the path of a checkpoint's folder{hint}"
            )
        self.config: dict[str, Any] = read_config(self.path)
        self.entries: dict[str, Entry] = {}
        for file, names in _tensor_files(self.path).items():
            found = _read_header(file)
            if names is not None and names != set(found):
                raise ValueError(
                    f"{file} and {INDEX} disagree about tensors {some(names ^ set(found))}; "
                    "fetch the whole folder again"
                )
            self.entries |= found
        self._unread = set(self.entries)

    def read(
        self,
        name: str,
        dtypes: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
    ) -> np.ndarray:
        """Return one tensor.

        Args:
          name: of the tensor.
          dtypes: those that are right.
          shapes: those that are right.

        Raises:
          ValueError: there is no such tensor, or it is of another dtype or shape, or cut off.
        """
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        wanted += " " + " or ".join(map(str, shapes))
        entry = self.entries.get(name)
        if entry is None:
            raise MisfitError(
                f"{self.path}: tensor {name!r} is missing, expected {wanted}; fetch the whole "
                "folder again, or give the model that was saved"
            )
        if entry.dtype not in [np.dtype(d) for d in dtypes] or entry.shape not in shapes:
            raise MisfitError(
                f"{entry.file}: tensor {name!r} is {entry.dtype.name} {entry.shape}, expected "
                f"{wanted}; give the model that was saved, in its dtypes, or save again"
            )
        self._unread.discard(name)
        return _read_values(name, entry, self._mapped)

    def skip(self, name: str) -> None:
        """Count a tensor as read, where there is one."""
        self._unread.discard(name)

    @property
    def unread(self) -> list[str]:
        """Tensors that were never read, in the order of the files."""
        return [name for name in self.entries if name in self._unread]

    def check_all_read(self) -> None:
        """Raise ValueError if some tensor was never read: it belongs to something else."""
        if self._unread:
            files = sorted({str(self.entries[name].file) for name in self._unread})
            raise MisfitError(
                f"{', '.join(files[:4])}: surplus tensors {some(self._unread)} that the config "
                "and the model do not have; give the model that was saved"
            )


def some(names: Any) -> str:
    """Return the first few of some names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def _tensor_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the files of a folder, each with the names it must hold where an index says so."""
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and not index.exists():
        raise ValueError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, expected one of them; other containers "
            "(.bin, .pt, pickles) are never opened"
        )
    if not index.exists():
        return {single: None}
    files: dict[Path, set[str] | None] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map' from tensors to files; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_FILE.fullmatch(file):
            raise ValueError(
                f"{index} places tensor {name!r} in {file!r}, expected the bare name of a "
                ".safetensors file of the same folder; do not trust this checkpoint"
            )
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    if single.exists() and set(files) != {single}:
        raise ValueError(
            f"{folder} holds both {SINGLE} and an {INDEX} that leads to other files: two models; "
            "remove the one that is not meant"
        )
    return files


def _read_header(file: Path) -> dict[str, Entry]:
    """Return the entries of a safetensors file.

    The library checks the header against the file: sizes, overlaps, gaps. It has no way to read
    8-bit floats into numpy, so that values are read here, by the offsets that it has checked.
    """
    remedy = "it is damaged or no safetensors file: fetch it again"
    if not file.is_file():
        raise ValueError(f"{file} is missing; fetch the whole folder again")
    try:
        check_inside(file)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            status = os.fstat(stream.fileno())
            if length > min(JSON_BYTES, status.st_size - 8):
                raise ValueError(f"its header claims {length} bytes")
            header = parse_json(stream.read(length))
        with safe_open(file, framework="numpy") as content:
            names = set(content.keys())
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {remedy}") from error
    if not isinstance(header, dict) or set(header) - {"__metadata__"} != names:
        raise ValueError(f"{file} has an ambiguous header; {remedy}")
    sums = _checksums(file, header.pop("__metadata__", None), names)
    stamp = _stamp(status)
    entries = {}
    for name, item in header.items():
        dtype, shape = DTYPES.get(item["dtype"]), tuple(item["shape"])
        begin, end = item["data_offsets"]
        if dtype is None:
            raise ValueError(f"{file}: tensor {name!r} has dtype {item['dtype']}, not supported")
        start = 8 + length + begin
        entries[name] = entry = Entry(file, dtype, shape, start, stamp, sums.get(name))
        if end - begin != entry.nbytes or len(shape) > 16 or max(shape, default=0) > 2**48:
            raise ValueError(f"{file}: tensor {name!r} has a wrong size; {remedy}")
    return entries


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return the tensors of one safetensors file, checked; they stay in it, mapped as one.

    Raises:
      ValueError: the file is missing or damaged.
    """
    entries = _read_header(file)
    if not any(entry.nbytes for entry in entries.values()):
        return {name: np.zeros(entry.shape, entry.dtype) for name, entry in entries.items()}
    whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    found = {}
    for name, entry in entries.items():
        data = whole[entry.start : entry.start + entry.nbytes]
        _check_sum(name, entry, data)
        found[name] = data.view(entry.dtype).reshape(entry.shape)
    return found


def _checksums(file: Path, metadata: Any, names: set[str]) -> dict[str, int]:
    """Return CRC-32s by tensor from the file's metadata: of all tensors, or of none."""
    text = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    try:
        sums = parse_json(text.encode())
        if set(sums) != names or not all(type(sums[name]) is int for name in names):
            strangers = some(set(sums) ^ names) or "a number"
            raise ValueError(f"not one number a tensor: it differs in {strangers}")
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: metadata {CHECKSUMS!r} is damaged ({error}); fetch the file again"
        ) from error
    return sums


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_values(name: str, entry: Entry, mapped: bool) -> np.ndarray:
    with open(entry.file, "rb") as stream:
        if _stamp(os.fstat(stream.fileno())) != entry.stamp:
            raise ValueError(f"{entry.file} changed while it was read; load the folder again")
        if mapped and entry.nbytes:
            shape = (entry.nbytes,)
            data: np.ndarray = np.memmap(stream, np.uint8, "r", offset=entry.start, shape=shape)
        else:
            stream.seek(entry.start)
            data = np.frombuffer(stream.read(entry.nbytes), np.uint8)
    if len(data) != entry.nbytes:
        raise ValueError(f"{entry.file}: tensor {name!r} is cut off; fetch the file again")
    _check_sum(name, entry, data)
    return data.view(np.ndarray).view(entry.dtype).reshape(entry.shape)


def checksum_of(dtype: Any, shape: Sequence[int]) -> int:
    """Return the CRC-32 of a tensor before its first byte: other types of the same bytes differ."""
    return zlib.crc32(f"{np.dtype(dtype).name} {list(shape)}".encode())


def _check_sum(name: str, entry: Entry, data: np.ndarray) -> None:
    start = checksum_of(entry.dtype, entry.shape)
    if entry.crc32 is not None and zlib.crc32(data.data, start) != entry.crc32:
        raise ValueError(
            f"{entry.file}: tensor {name!r} is not what was saved, its checksum differs; fetch the "
            "file again"
        )
