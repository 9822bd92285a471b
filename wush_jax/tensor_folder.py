"""Folders of named tensors: ``config.json`` beside safetensors files, one or several shards.

Names are Hugging Face's: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with
``model.safetensors.index.json``. A folder appears whole or not at all. Reading trusts nothing that
it reads: whatever does not fit is a ValueError with the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN_FILE = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|" + re.escape(INDEX))
SHARD_FILE = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
SHARD_BYTES = 5_000_000_000
CONFIG_BYTES = 2**28

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


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
      file: the safetensors file.
      dtype: of the values.
      shape: of the tensor.
      start: byte of the file at which the values start.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class TensorFolder:
    """A folder opened for reading: headers at once, values tensor by tensor.

    Args:
      path: the folder.

    Attributes:
      path: the folder.
      config: what ``config.json`` holds.
      entries: where each tensor lies, by name.

    Raises:
      ValueError: a file that is missing, damaged or inconsistent with the others.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"path={str(path)!r} is not a folder; give the folder of a checkpoint")
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self.entries: dict[str, Entry] = {}
        for file, names in _tensor_files(self.path).items():
            found = _read_header(file)
            if names is not None and names != set(found):
                raise ValueError(
                    f"{file} and {INDEX} disagree about tensors {_some(names ^ set(found))}; "
                    "fetch the whole folder again"
                )
            self.entries |= found
        self._unread = set(self.entries)

    def read(
        self, name: str, dtypes: Sequence[Any] | None, shapes: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        """Return one tensor.

        Args:
          name: of the tensor.
          dtypes: those that are right, or None for any.
          shapes: those that are right.

        Raises:
          ValueError: there is no such tensor, or it is of another dtype or shape, or cut off.
        """
        wanted = " or ".join(map(str, shapes))
        if dtypes is not None:
            wanted = " or ".join(np.dtype(d).name for d in dtypes) + " " + wanted
        entry = self.entries.get(name)
        if entry is None:
            raise ValueError(
                f"{self.path}: tensor {name!r} is missing, expected {wanted}; fetch the whole "
                "folder again, or give the model that was saved"
            )
        fits = dtypes is None or entry.dtype in [np.dtype(d) for d in dtypes]
        if not fits or entry.shape not in shapes:
            raise ValueError(
                f"{entry.file}: tensor {name!r} is {entry.dtype.name} {entry.shape}, expected "
                f"{wanted}; give the model that was saved, in its dtypes, or save again"
            )
        self._unread.discard(name)
        return _read_values(name, entry)

    def check_all_read(self) -> None:
        """Raise ValueError if some tensor was never read: it belongs to something else."""
        if self._unread:
            files = sorted({str(self.entries[name].file) for name in self._unread})
            raise ValueError(
                f"{', '.join(files[:4])}: surplus tensors {_some(self._unread)} that the config "
                "and the model do not have; give the model that was saved"
            )


def write_folder(
    path: str | Path,
    tensors: Mapping[str, jax.Array | np.ndarray],
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors and a config as a folder that appears whole, or not at all.

    Args:
      path: the folder; may exist if it is empty or holds nothing but an earlier checkpoint of the
        same ``quant_method``, which is replaced.
      tensors: by name; brought to the host one shard at a time.
      config: JSON content of ``config.json``.
      shard_bytes: the largest size of a file, unless one tensor alone is larger.

    Raises:
      ValueError: a folder with other things in it, a dtype that the files cannot hold, a config
        that is not JSON, a shard size that is not positive.
      OSError: the disk is full, the place not writable; what was there is still there.
    """
    path = Path(path).resolve()
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be positive")
    for name, value in tensors.items():
        if value.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name!r} has dtype {value.dtype}; use float32 or bfloat16")
    try:
        text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config or metadata is not JSON ({error}); use plain values") from error
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        _check_replaceable(path, config)
        fresh.mkdir(parents=True)
        (fresh / CONFIG).write_text(text, encoding="utf-8")
        _write_shards(fresh, tensors, shard_bytes)
        _move_into_place(fresh, path)
    except (OSError, SafetensorError) as error:
        message = (
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was there is "
            "unchanged: make room or choose a folder that you may write"
        )
        number = getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError with the file's name if there is none."""
    try:
        if not file.is_file() or file.stat().st_size > CONFIG_BYTES:
            raise ValueError("it is missing, not a regular file, or huge")
        content = _parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _parse_json(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _some(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def _tensor_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the files of a folder, each with the names it must hold where an index says so."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() == index.exists():
        raise ValueError(
            f"{folder} holds {'both' if single.exists() else 'neither'} {SINGLE} and {INDEX}, "
            "expected one of them; other containers (.bin, .pt, pickles) are never opened"
        )
    if single.exists():
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
        with safe_open(file, framework="numpy") as content:
            names = set(content.keys())
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = _parse_json(stream.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {remedy}") from error
    header.pop("__metadata__", None)
    if set(header) != names:
        raise ValueError(f"{file} has an ambiguous header; {remedy}")
    entries = {}
    for name, item in header.items():
        dtype, shape = DTYPES.get(item["dtype"]), tuple(item["shape"])
        begin, end = item["data_offsets"]
        if dtype is None:
            raise ValueError(f"{file}: tensor {name!r} has dtype {item['dtype']}, not supported")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: tensor {name!r} has a wrong size; {remedy}")
        entries[name] = Entry(file, dtype, shape, 8 + length + begin)
    return entries


def _read_values(name: str, entry: Entry) -> np.ndarray:
    size = math.prod(entry.shape) * entry.dtype.itemsize
    with open(entry.file, "rb") as stream:
        stream.seek(entry.start)
        data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{entry.file}: tensor {name!r} is cut off; fetch the file again")
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


def _write_shards(folder: Path, tensors: Mapping[str, Any], shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
        total += value.nbytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        # In C order and of rank 0 where it is: neither save_file nor ascontiguousarray see to both.
        arrays = {name: np.asarray(tensors[name], order="C") for name in names}
        save_file(arrays, folder / file, metadata={"format": "wush"})
        shutil.copymode(folder / CONFIG, folder / file)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _check_replaceable(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a path that holds anything but an earlier checkpoint of the same method."""
    if not path.exists():
        return
    remedy = "nothing was written; choose another folder or remove it yourself"
    if not path.is_dir():
        raise ValueError(f"path={str(path)!r} is not a folder; {remedy}")
    names = os.listdir(path)
    strangers = [name for name in names if not OWN_FILE.fullmatch(name)]
    if strangers:
        raise ValueError(f"path={str(path)!r} holds other files ({_some(strangers)}); {remedy}")
    if names and _method(read_json(path / CONFIG)) != _method(config):
        raise ValueError(f"path={str(path)!r} holds another kind of model; {remedy}")


def _method(config: Mapping[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, Mapping) else None


def _move_into_place(fresh: Path, path: Path) -> None:
    if not path.exists():
        os.replace(fresh, path)
        return
    old = fresh.with_suffix(".old")
    os.replace(path, old)
    try:
        os.replace(fresh, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
