"""A trained model and held-out text for everyone, without a download.

The text is what every Python installation carries: the sources of its standard library. The model
reads bytes (a vocabulary of 256) and was trained on those sources except two small held-out sets
of modules, one for calibration and one for evaluation.
"""

import json
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from wush_jax.models import Llama, LlamaConfig, from_tensors, to_tensors

#: Held out of training for calibration; single files in Python 3.11 and every later version.
CALIBRATION_MODULES = ("argparse", "shutil", "smtplib", "statistics", "tarfile")
#: Held out of training for evaluation, likewise.
EVALUATION_MODULES = ("configparser", "difflib", "ipaddress", "mailbox", "subprocess")

_HELD_OUT = {"calibration": CALIBRATION_MODULES, "evaluation": EVALUATION_MODULES}


def stdlib_text(
    split: Literal["train", "calibration", "evaluation"], *, root: str | Path | None = None
) -> bytes:
    """Return standard library sources, the modules of one split joined by an empty line.

    ``train`` holds every module and test that ``root`` has, in the order of their paths, except
    the held-out modules, the tests of those and what was written by the build of this very Python.
    The text changes a little from one Python version to the next.

    Args:
        split: which part.
        root: folder of a standard library; None: that of the running Python.

    Returns:
        UTF-8 text; about 350 kB for each of the held-out splits.

    Raises:
        ValueError: for an unknown split, or if ``root`` lacks a module that the split needs.

    >>> b"class ArgumentParser" in stdlib_text("calibration")
    True
    """
    if split not in ("train", *_HELD_OUT):
        raise ValueError(f"split = {split!r}; choose 'train', 'calibration' or 'evaluation'.")
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    if split == "train":
        files = _training_files(root)
    else:
        files = [root / f"{name}.py" for name in _HELD_OUT[split]]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"root = {str(root)!r} lacks {', '.join(missing) or 'any .py file'}: the {split} text "
            "needs a standard library with its sources; give such a folder as root."
        )
    return b"\n\n".join(text for text in map(Path.read_bytes, files) if _is_utf8(text))


def split_text(text: bytes) -> dict[str, bytes]:
    """Cut any text in three: the last twentieth for evaluation, the one before it to calibrate.

    >>> {name: len(part) for name, part in split_text(bytes(40)).items()}
    {'train': 36, 'calibration': 2, 'evaluation': 2}
    """
    part = len(text) // 20
    cuts = {"train": (0, -2 * part), "calibration": (-2 * part, -part), "evaluation": (-part, None)}
    return {name: text[slice(*cut)] for name, cut in cuts.items()}


def _training_files(root: Path) -> list[Path]:
    held_out = {f"{name}.py" for names in _HELD_OUT.values() for name in names}
    tests = {f"test_{name}" for name in held_out}
    chosen = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        generated = file.name.startswith("_sysconfigdata") or path.parts[0].startswith("config-")
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if not (str(path) in held_out or file.name in tests or generated or installed):
            chosen.append(file)
    return sorted(chosen)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:  # a few tests of source encodings
        return False
    return True


def token_batches(
    data: bytes | np.ndarray,
    *,
    batch: int,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
) -> Iterator[np.ndarray]:
    """Cut text into batches of windows of tokens.

    Args:
        data: integers (n,), or a text whose bytes are tokens.
        batch: windows in a batch.
        length: tokens in a window.
        limit: the largest number of batches; None: all of them, or without end if ``seed`` is
            given.
        seed: None: windows one after the other, without overlap, fewer in the last batch; what
            fills no window is left out. Otherwise windows at random places.

    Returns:
        Iterator over int32 (batch, length).

    Raises:
        ValueError: if a size is not positive or ``data`` is too short for one window.

    >>> [b.tolist() for b in token_batches(b"abcdefghijk", batch=2, length=3)]
    [[[97, 98, 99], [100, 101, 102]], [[103, 104, 105]]]
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch = {batch} and length = {length} must be positive.")
    if len(data) < length:
        raise ValueError(
            f"data has {len(data)} tokens where one window takes {length}; give more text, or a "
            "smaller length."
        )
    tokens = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return _windows(tokens, batch, length, limit, seed)


def _windows(
    tokens: np.ndarray, batch: int, length: int, limit: int | None, seed: int | None
) -> Iterator[np.ndarray]:
    random = None if seed is None else np.random.default_rng(seed)
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)
    end = -(-len(whole) // batch) if random is None else None
    count = 0
    while (limit is None or count < limit) and (end is None or count < end):
        if random is None:
            window = whole[count * batch : (count + 1) * batch]
        else:
            starts = random.integers(len(tokens) - length + 1, size=(batch, 1))
            window = tokens[starts + np.arange(length)]
        yield window.astype(np.int32)
        count += 1


def save_model(path: str | Path, model: Llama) -> None:
    """Write a model as bfloat16 safetensors, its config as JSON in the file's metadata."""
    tensors = {name: jnp.asarray(t, jnp.bfloat16) for name, t in to_tensors(model).items()}
    save_file(tensors, str(path), metadata={"config": json.dumps(model.config.to_dict())})


def load_model(path: str | Path, dtype: Any = jnp.float32) -> Llama:
    """Read a file of :func:`save_model`; weights and activations take ``dtype``.

    Raises:
        ValueError: if the file carries no config, or tensors that do not fit it.
    """
    with safe_open(str(path), framework="flax") as file:
        config = (file.metadata() or {}).get("config")
        if config is None:
            raise ValueError(f"path = {str(path)!r} has no config in its metadata; use save_model.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return from_tensors(
        LlamaConfig.from_dict(json.loads(config)), tensors, dtype=dtype, param_dtype=dtype
    )


def load_demo_model(dtype: Any = jnp.float32) -> Llama:
    """Return the byte-level model that comes with the package; see ``examples/``.

    Args:
        dtype: type of the weights and activations; the file keeps bfloat16.
    """
    file = resources.files("wush_jax.models.assets") / "demo_model.safetensors"
    with resources.as_file(file) as path:
        return load_model(path, dtype)
