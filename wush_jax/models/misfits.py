"""Which entries of a config tensors do not fit."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from wush_jax.models.config import LlamaConfig
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import MisfitError, TensorFolder

PART = 1 << 22  # values that a thread looks through at once

# Fields of a config that decide which tensors there are, and their shapes.
SIZES = (
    *("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("attention_bias", "output_bias", "mlp_bias", "qk_norm", "num_experts"),
)


@contextlib.contextmanager
def sizes_named(config: LlamaConfig | None) -> Iterator[None]:
    """Name the entries of a config where tensors are not those that it implies.

    Args:
        config: what was read of ``config.json``; None where the model came from elsewhere.

    Raises:
        ValueError: in place of a `MisfitError`.
    """
    try:
        yield
    except MisfitError as error:
        if config is None:
            raise
        said = ", ".join(f"{name}={getattr(config, name)}" for name in SIZES)
        raise ValueError(f"{error}; {CONFIG} means {said}") from error


def check_fit(
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...] | None],
    place: str = "",
) -> None:
    """Refuse tensors that are not the weights of a model: by their names, then by their shapes.

    Args:
        shapes: of the model's weights, by the names of tensors.
        found: shapes of the tensors; None where nobody knows.
        place: where they are from, for messages.

    Raises:
        MisfitError: with what is missing, left over or of another shape.

    >>> check_fit({"norm": (4,)}, {"norm": (3,)})
    Traceback (most recent call last):
    ...
    wush_jax.storage.tensor_folder.MisfitError: tensors['norm'] has shape (3,) where the config ...
    """
    if shapes.keys() != found.keys():
        missing, extra = sorted(shapes.keys() - found), sorted(found.keys() - shapes)
        raise MisfitError(
            f"{place}tensors do not fit the config: missing {missing[:4]} ({len(missing)} in all), "
            f"left over {extra[:4]} ({len(extra)} in all); check layers, biases and tying, and "
            "whether it should have a quantization_config"
        )
    faults = [
        f"tensors[{name!r}] has shape {shape} where the config implies {shapes[name]}"
        for name, shape in found.items()
        if shape not in (None, shapes[name])
    ]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise MisfitError(f"{place}{'; '.join(faults[:4])}{more}; check the sizes in config.json")


def check_repeated(folder: TensorFolder, head: str, embedding: str) -> None:
    """Refuse a head that a config ties to the embedding, and that is another matrix in the files.

    Raises:
        ValueError: the two tensors differ, so that one of them would be left out.
    """
    one, other = (
        folder.read(name, [folder.entries[name].dtype], [folder.entries[name].shape])
        for name in (head, embedding)
    )
    if not np.array_equal(one, other):
        raise ValueError(
            f"{folder.path / CONFIG}: tie_word_embeddings=True makes the head the embedding, but "
            f"{head!r} differs from {embedding!r}: set it to false, or remove that tensor"
        )


def check_all_finite(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuse a model with NaN or infinities before any work: no loss could be told of it.

    Args:
        tensors: floating-point weights by name.
        path: where they are from.

    Raises:
        ValueError: with the names of the tensors, and how many values.

    >>> check_all_finite({"norm": np.float32([1, np.inf])}, Path("model"))
    Traceback (most recent call last):
    ...
    ValueError: model: 1 value of tensor 'norm' is NaN or infinite: fetch the folder again, or ...
    """
    with ThreadPoolExecutor() as pool:
        found = {name: _count_not_finite(value, pool) for name, value in tensors.items()}
    faults = [
        f"{count} value{'s' * (count > 1)} of tensor {name!r} {'are' if count > 1 else 'is'} NaN "
        "or infinite"
        for name, count in found.items()
        if count
    ]
    if faults:
        more = f"; and {len(faults) - 4} more tensors" if len(faults) > 4 else ""
        raise ValueError(
            f"{path}: {'; '.join(faults[:4])}{more}: fetch the folder again, or mend what wrote it"
        )


def _count_not_finite(value: np.ndarray, pool: Executor) -> int:
    flat = value.reshape(-1)
    parts = [flat[start : start + PART] for start in range(0, flat.size, PART)]
    return sum(pool.map(_count, parts))


def _count(part: np.ndarray) -> int:
    if part.dtype == ml_dtypes.bfloat16:  # whose own function takes a hundred times longer
        return int(np.count_nonzero((part.view(np.uint16) & 0x7F80) == 0x7F80))
    return part.size - int(np.count_nonzero(np.isfinite(part)))
