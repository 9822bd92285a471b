"""Folders of named tensors, written: whole or not at all, by one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wush_jax.storage.folder_lock import sole_writer
from wush_jax.storage.json_file import CONFIG, check_inside, home, read_config, read_json
from wush_jax.storage.tensor_file import write_tensors
from wush_jax.storage.tensor_folder import (
    COMPANIONS,
    DTYPES,
    INDEX,
    OWN_FILE,
    SINGLE,
    some,
)

SHARD_BYTES = 5_000_000_000


def write_folder(
    path: str | Path,
    tensors: Mapping[str, jax.Array | np.ndarray],
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    framework: str | None = None,
) -> None:
    """Write tensors and a config as a folder that appears whole, or not at all.

    Args:
      path: the folder; may exist if it is empty or holds nothing but an earlier checkpoint of the
        same ``quant_method`` and ``kind``, which is replaced.
      tensors: by name; brought to the host one at a time.
      config: JSON content of ``config.json``.
      shard_bytes: the largest size of a file, unless one tensor alone is larger.
      framework: the "format" in the metadata of the files, on which some readers insist; None
        writes checksums there, which `TensorFolder` verifies.

    Raises:
      ValueError: a folder with other things in it, a dtype that the files cannot hold, a config
        that is not JSON, a shard size that is not positive.
      OSError: the disk is full, the place not writable, another writer at work there; what was
        there is still there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(folder, {"x": np.zeros(2)}, {"model_type": "llama"})
    ...     sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
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
    try:
        fresh = _beside(path, "new")
        with contextlib.ExitStack() as locks:
            locks.enter_context(sole_writer(fresh, str(path)))
            try:
                if path.is_dir():  # who wrote it may not be done with clearing up
                    locks.enter_context(sole_writer(path, str(path)))
                _mend(path, fresh)
                check_replaceable(path, config)
                (fresh / CONFIG).write_text(text, encoding="utf-8")
                _write_shards(fresh, tensors, shard_bytes, framework)
                _move_into_place(fresh, path)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
    except OSError as error:
        message = (
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was there is "
            "unchanged: make room or choose a folder that you may write"
        )
        number = getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from error


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy a model's tokenizer and the like, where it has them, to another folder.

    With them the Python files of models that bring their own code (``auto_map`` in the config);
    nothing of them is run.

    Args:
      source: a model's folder, or its only file, whose companions are beside it.
      target: the other folder.

    Raises:
      ValueError: as `check_companions`.
    """
    check_companions(source)
    folder = home(source)
    for name in companions(folder):
        shutil.copyfile(folder / name, Path(target) / name)


def check_companions(source: str | Path) -> None:
    """Refuse files that `copy_companions` could not copy; before the work that precedes it.

    Args:
      source: as for `copy_companions`.

    Raises:
      ValueError: links to somewhere outside of their folder, or to nothing; all of them.
    """
    folder, faults = home(source), []
    for name in companions(folder):
        try:
            check_inside(folder / name)
        except ValueError as error:
            faults.append(str(error))
            continue
        if not (folder / name).is_file():
            faults.append(
                f"{folder / name} is a link to {os.readlink(folder / name)!r}, which is no file: "
                "copy the file there, or remove the link"
            )
    if faults:
        raise ValueError("; ".join(faults))


def companions(source: str | Path) -> list[str]:
    """Return the names of the files that `copy_companions` copies."""
    named = (Path(source) / CONFIG).is_file()
    code = [file.name for file in Path(source).glob("*.py")] if named else []
    own = code if code and "auto_map" in read_config(Path(source)) else []
    files = (Path(source) / name for name in (*COMPANIONS, *sorted(own)))
    return [file.name for file in files if file.is_file() or file.is_symlink()]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _mend(path: Path, fresh: Path) -> None:
    """Clear what a writer that was killed has left; nobody else is at work here."""
    for leftover in fresh.iterdir():
        leftover.unlink()
    old = _beside(path, "old")
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, path)


def _write_shards(
    folder: Path, tensors: Mapping[str, Any], shard_bytes: int, framework: str | None
) -> None:
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
        metadata = None if framework is None else {"format": framework}
        write_tensors(folder / file, {name: tensors[name] for name in names}, metadata)
        shutil.copymode(folder / CONFIG, folder / file)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def check_replaceable(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a path that holds anything but an earlier checkpoint of the same method."""
    if not path.exists():
        return
    remedy = "nothing was written; choose another folder or remove it yourself"
    if not path.is_dir():
        raise ValueError(f"the path {str(path)!r} is not a folder; {remedy}")
    names = os.listdir(path)
    strangers = [name for name in names if not OWN_FILE.fullmatch(name)]
    if strangers:
        raise ValueError(f"the path {str(path)!r} holds other files ({some(strangers)}); {remedy}")
    if names and _kind(read_json(path / CONFIG)) != _kind(config):
        raise ValueError(f"the path {str(path)!r} holds another kind of model; {remedy}")


def _kind(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a folder holds: a model of some method, or something else that says so."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return config.get("kind"), method


def _move_into_place(fresh: Path, path: Path) -> None:
    if not path.exists():
        os.replace(fresh, path)
        return
    old = _beside(path, "old")
    os.replace(path, old)
    try:
        os.replace(fresh, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
