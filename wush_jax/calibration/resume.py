"""The state of a long calibration on disk: finished layers, and what run they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from wush_jax.storage.folder_lock import sole_writer
from wush_jax.storage.tensor_file import write_tensors
from wush_jax.storage.tensor_folder import read_tensors

RUN_FILE = "run.json"


class RunState:
    """A folder with one file per finished stage; every file appears whole or not at all.

    One run at a time: from here to `close` (or the end of the process, however it ends) nobody
    else can open the folder.

    Args:
      folder: created where missing.
      fingerprint: what the run depends on, by name; see `digest`.
      resume: continue the run that is in the folder. Without it the folder must hold none.

    Raises:
      ValueError: the folder holds a run and ``resume`` is not set, or one of another fingerprint:
        the message names what differs.
      OSError: the folder cannot be written, or another run is at work in it.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str], *, resume: bool):
        self.folder = Path(folder)
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(sole_writer(self.folder, f"state_dir={str(folder)!r}"))
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._start_or_check(fingerprint, resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def remove(self) -> None:
        """Take the folder away: what it was for is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(
            f"state_dir={str(self.folder)!r} cannot be written ({error}); choose another folder"
        )

    def _start_or_check(self, fingerprint: Mapping[str, str], resume: bool) -> None:
        run = self.folder / RUN_FILE
        if not run.exists():
            text = json.dumps(dict(fingerprint), indent=1)
            try:
                self._write(run, lambda path: path.write_text(text))
            except OSError as error:
                raise self._unwritable(error) from error
            return
        if not resume:
            raise ValueError(
                f"state_dir={str(self.folder)!r} holds the state of a run; pass resume=True to "
                "continue it, or another folder"
            )
        try:
            found = json.loads(run.read_text("utf8"))
            names = sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{run} is damaged ({error}); start in another folder") from error
        differs = [f"{k} ({_difference(found.get(k), fingerprint.get(k))})" for k in names]
        if differs:
            raise ValueError(
                f"state_dir={str(self.folder)!r} belongs to another run: {', '.join(differs)} "
                "differ; start in another folder"
            )

    def has(self, stage: int) -> bool:
        """Whether a stage is finished."""
        return self._file(stage).exists()

    def save(self, stage: int, tree: Any, note: Mapping[str, Any]) -> None:
        """Write a finished stage: the leaves of a pytree, and a JSON note.

        Raises:
          OSError: with the stage and what to do; stages before it are kept.
        """
        leaves = {f"{i:06d}": _bits(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        # One entry: the file would have several in any order, and runs would differ in bytes.
        text = {"stage": json.dumps({"crc32": _checksum(leaves), "note": note})}
        self._save(stage, lambda path: write_tensors(path, leaves, text))

    def _save(self, stage: int, write: Callable[[Path], None]) -> None:
        try:
            self._write(self._file(stage), write)
        except OSError as error:
            raise OSError(
                f"stage {stage} could not be written to {self.folder} ({error}); stages before it "
                "are kept: make room and run again with resume=True"
            ) from error

    def load(self, stage: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Read a stage back as a pytree with the structure, shapes and types of ``like``.

        Raises:
          ValueError: the file is damaged or of another shape; delete it to redo the stage.
        """
        file = self._file(stage)
        remedy = f"{file} is damaged or of another run; delete it to redo that stage"
        try:
            with safe_open(file, framework="numpy") as opened:
                about = json.loads((opened.metadata() or {})["stage"])
            note, checksum = about["note"], about["crc32"]
            stored = load_file(file)
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{remedy} ({error!r})") from error
        if _checksum(stored) != checksum:
            raise ValueError(f"{remedy}: its checksum is not {checksum}")
        specs, structure = jax.tree.flatten(like)
        if sorted(stored) != [f"{i:06d}" for i in range(len(specs))]:
            raise ValueError(f"{remedy}: it holds {len(stored)} arrays, expected {len(specs)}")
        leaves = [_from_bits(stored[f"{i:06d}"], s, remedy) for i, s in enumerate(specs)]
        return jax.tree.unflatten(structure, leaves), note

    def save_tensors(self, stage: int, tensors: Mapping[str, Any]) -> None:
        """Write a finished stage of named arrays, of any type that files have.

        Raises:
          OSError: as `save`.
        """
        self._save(stage, lambda path: write_tensors(path, tensors))

    def tensors(self, stage: int) -> dict[str, np.ndarray]:
        """Return what `save_tensors` wrote; the arrays stay in the file.

        Raises:
          ValueError: the file is damaged; delete it to redo the stage.
        """
        try:
            return read_tensors(self._file(stage))
        except ValueError as error:
            raise ValueError(f"{error}; or delete it to redo that stage") from error

    def _file(self, stage: int) -> Path:
        return self.folder / f"stage-{stage:05d}.safetensors"

    def _write(self, target: Path, write) -> None:
        fresh = target.with_suffix(f".tmp{os.getpid()}")
        try:
            write(fresh)
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)


def digest(arrays: Iterable[Any], sample: int = 4096) -> str:
    """Return a short hash of shapes, types and some bytes of arrays, in order.

    Whole small arrays and evenly spaced values of large ones: enough to notice another model or
    other data, cheap enough for both.
    """
    state = hashlib.sha256()
    for array in arrays:
        # A view of a file stays one: only the values that count are read.
        array = array if isinstance(array, np.ndarray) else jnp.asarray(array)
        state.update(f"{array.shape}{array.dtype}".encode())
        flat = array.reshape(-1)
        step = max(1, flat.size // sample)
        some = flat[::step]
        if isinstance(some, jax.Array) and not some.is_fully_addressable:
            some = multihost_utils.process_allgather(some, tiled=True)
        state.update(np.ascontiguousarray(np.asarray(some)).tobytes())
    return state.hexdigest()[:16]


def model_digest(model: nnx.Module) -> str | None:
    """Return the `digest` of a model's weights; None for a model of shapes alone.

    Random state, such as of dropout, is left out: it moves on with every call.
    """
    leaves = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return None
    return digest(leaves)


def _difference(old: Any, new: Any) -> str:
    """Return what of a text has changed, in parts between commas."""
    before, after = (str(text).split(", ") for text in (old, new))
    gone = ", ".join(part for part in before if part not in after)
    come = ", ".join(part for part in after if part not in before)
    return f"{gone[:200] or 'nothing'} is now {come[:200] or 'nothing'}"


def _checksum(leaves: Mapping[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(leaves):
        total = zlib.crc32(
            np.asarray(leaves[name], order="C").reshape(-1).view(np.uint8).data, total
        )
    return f"{total:08x}"


def _bits(leaf: jax.Array) -> np.ndarray:
    """An array as numpy can store it: narrow floats as their bits."""
    values = np.asarray(leaf)
    return values if values.dtype.isbuiltin == 1 else values.view(f"u{values.dtype.itemsize}")


def _from_bits(values: np.ndarray, spec: Any, remedy: str) -> jax.Array:
    dtype = np.dtype(spec.dtype)
    if dtype.isbuiltin != 1 and values.dtype.itemsize == dtype.itemsize:
        values = values.view(dtype)
    if values.shape != spec.shape or values.dtype != dtype:
        raise ValueError(
            f"{remedy}: {values.dtype}{values.shape} found, {dtype}{spec.shape} expected"
        )
    return jnp.asarray(values)
