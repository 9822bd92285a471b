"""A calibration on disk: ``config.json`` and safetensors files, all with checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wush_jax.storage.folder_writer import write_folder
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import TensorFolder
from wush_jax.transforms.moments import Moments

KIND = "calibration"
FIRST = "first_batch."


def write(
    folder: str | Path, about: Mapping[str, Any], moments: Mapping[str, Moments], first: Any
) -> None:
    """Write a calibration; see `wush_jax.Calibration.save`.

    Args:
      folder: that appears whole, or not at all.
      about: JSON values.
      moments: by the name of their site.
      first: the first batch, a pytree of arrays, dicts, lists and tuples.
    """
    leaves: list[np.ndarray] = []
    about = {**about, "first": _described(first, leaves)}
    tensors: dict[str, Any] = {f"{FIRST}{i}": leaf for i, leaf in enumerate(leaves)}
    for name, tree in moments.items():
        tensors |= _named(name, tree)
    config = {"kind": KIND, "calibration": about, "crc32": _checksum(about)}
    write_folder(folder, tensors, config)


def open_calibration(folder: str | Path) -> TensorFolder:
    """Open a folder that `write` wrote.

    Raises:
      ValueError: it is something else, or its config is not what was written.
    """
    opened = TensorFolder(folder, mapped=True)
    file = opened.path / CONFIG
    about = opened.config.get("calibration")
    if opened.config.get("kind") != KIND or about is None:
        raise ValueError(f"{file} is of no calibration; give a folder that Calibration.save wrote")
    if opened.config.get("crc32") != _checksum(about):
        raise ValueError(f"{file} is not what was saved, its checksum differs; calibrate again")
    return opened


@contextmanager
def sound(opened: TensorFolder) -> Iterator[None]:
    """Say of which file it is that something in a config does not fit together."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{opened.path / CONFIG} describes no calibration ({error!r}); calibrate again"
        ) from error


def read(
    opened: TensorFolder, like: Mapping[str, Moments], structure: Any
) -> tuple[dict[str, Moments], Any]:
    """Return the moments by the name of their site, and the first batch.

    Args:
      opened: what `open_calibration` gave.
      like: shapes of the moments by site.
      structure: of the first batch, as `write` described it.

    Raises:
      ValueError: tensors that are missing, damaged, of other shapes, or surplus.
    """
    moments = {}
    for name, tree in like.items():
        read = [opened.read(n, [s.dtype], [s.shape]) for n, s in _named(name, tree).items()]
        moments[name] = jax.tree.unflatten(jax.tree.structure(tree), read)
    first = _rebuilt(structure, opened)
    opened.check_all_read()
    return moments, first


def _named(site: str, tree: Moments) -> dict[str, Any]:
    """The arrays of moments by name, such as ``layers.0.mlp.up_proj.sample.rows``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {site + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _checksum(about: Any) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _described(tree: Any, leaves: list[np.ndarray]) -> Any:
    """Return the structure of a batch as JSON, with the numbers of its leaves, which are added."""
    if tree is None:
        return None
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _described(value, leaves) for key, value in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_described(value, leaves) for value in tree]}
    if not isinstance(tree, jax.Array | np.ndarray | np.generic | int | float):
        raise ValueError(
            f"first holds a {type(tree).__name__}, which files cannot: calibrate with batches of "
            "arrays in dicts, lists and tuples, and let call= make of them what the model takes"
        )
    leaves.append(np.asarray(tree))
    return len(leaves) - 1


def _rebuilt(structure: Any, opened: TensorFolder) -> Any:
    """Undo `_described`."""
    if structure is None:
        return None
    if isinstance(structure, int):
        entry = opened.entries[f"{FIRST}{structure}"]
        return np.array(opened.read(f"{FIRST}{structure}", [entry.dtype], [entry.shape]))
    ((kind, inside),) = structure.items()
    if kind == "dict":
        return {key: _rebuilt(value, opened) for key, value in inside.items()}
    return {"list": list, "tuple": tuple}[kind](_rebuilt(value, opened) for value in inside)
