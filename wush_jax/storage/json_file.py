"""JSON files: read without trust, such as a folder's ``config.json``, and replaced whole."""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

CONFIG = "config.json"
# A header entry or an index line is some 150 bytes: room for 200,000 tensors.
JSON_BYTES = 2**25


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model folder; ValueError if it is none.

    A ``quantization_config`` of null, which some libraries write, says as much as none.
    """
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{str(folder)!r} is no model folder: it has no {CONFIG}; what `wush quantize` writes "
            "is OUT/checkpoint"
        )
    config = read_json(folder / CONFIG)
    if config.get("quantization_config", config) is None:
        del config["quantization_config"]
    return config


def home(path: str | Path) -> Path:
    """Return the folder of a model: the path itself, or where its only file lies."""
    path = Path(path)
    return path.parent if path.is_file() else path


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError with the file's name if there is none."""
    try:
        check_inside(file)
        if not file.is_file() or file.stat().st_size > JSON_BYTES:
            raise ValueError("it is missing, not a regular file, or huge")
        content = parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def check_inside(file: Path) -> None:
    """Refuse links that lead out of a model, since what is read may be copied and passed on.

    A folder that somebody else has made could name any file of this machine: a key as its LICENSE,
    a device as its weights. Links are followed within their folder; in Hugging Face's cache, where
    ``models--x/snapshots/<revision>/config.json`` leads to ``models--x/blobs/<hash>``; and to the
    file of the same name in another model's folder, which has a config.json and safetensors.
    """
    if not file.is_symlink():
        return
    folder, target = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    cached = [p.parent / "blobs" for p in folder.parents if p.name == "snapshots"]
    beside = target.name == file.name and (target.parent / CONFIG).is_file()
    model = beside and any(target.parent.glob("*.safetensors"))
    if not (target.is_relative_to(folder) or target.parent in cached or model):
        raise ValueError(
            f"{file} is a link to {str(target)!r}, outside of its folder and no file of that name "
            "in a model's folder: give the folder in which the files themselves are, or copy them"
        )


def parse_json(text: bytes) -> Any:
    """Return the content of a JSON text; ValueError where an object has a name twice.

    NaN and infinities are no JSON, and could not be written again.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return value


def present(file: Path) -> bool:
    """Tell whether there is a file, or a link that should lead to one: such a link is read.

    >>> present(Path("no such file"))
    False
    """
    return file.is_file() or file.is_symlink()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write plain values as JSON: a reader, or a crash, never finds half of a file.

    Raises:
      OSError: the place is not writable; what was there is still there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "x.json", {"a": 1})
    ...     read_json(Path(folder) / "x.json")
    {'a': 1}
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
