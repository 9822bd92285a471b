"""Where tokens enter: whatever is no token of the model is refused here, with its place.

Batches from Python, files of tokens, texts and prompts all pass `check_tokens`; rows become windows
by `cut`, and windows become batches by `in_batches`, in one way for every command.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHOWN = 5  # places that a message names; of the others it says how many
ARRAYS = (np.ndarray, jax.Array)
RUN = 4  # equal ids at the end of a row from which on they look like padding


def vocabulary(model: Any) -> int | None:
    """Return how many tokens a model knows, where its ``config.vocab_size`` says so."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return int(size) if isinstance(size, int) else None


def check_tokens(tokens: Any, vocabulary: int | None, *, name: str = "tokens") -> Any:
    """Return tokens as int32 (batch, length); arrays on devices stay there.

    Args:
        tokens: integers (batch, length).
        vocabulary: ids are below it; None where nobody knows.
        name: of the tokens in messages.

    Raises:
        ValueError: no integers, another number of axes, nothing in it, ids outside of the
            vocabulary; with all that is wrong, and where.

    >>> check_tokens([[1, 300], [-100, 2]], 256)
    Traceback (most recent call last):
    ...
    ValueError: tokens: 2 ids are outside of the model's vocabulary of 256 tokens: 300 at row 0,
    column 1; -100 at row 1, column 0: use this model's tokenizer; where they are padding, ...
    """
    array = _as_array(tokens, name)
    faults = _faults(array, vocabulary)
    if faults:
        raise ValueError(f"{name}: " + "; ".join(faults))
    return array if isinstance(array, jax.Array) else array.astype(np.int32)


def check_batches(
    batches: Iterable[Any], vocabulary: int | None, name: str = "batches", *, others: bool = False
) -> Any:
    """Return batches of tokens, checked: a sequence all at once, an iterator as it goes.

    Args:
        batches: integers (batch, length).
        vocabulary: as for `check_tokens`.
        name: of the batches in messages.
        others: whether inputs of another kind, such as floats or trees of arrays, pass as they are.

    Returns:
        A list, or an iterator.

    Raises:
        ValueError: as `check_tokens`, of all batches of a sequence.
    """

    def check(index: int, batch: Any) -> Any:
        if others and not (isinstance(batch, ARRAYS) and not _is_float(batch)):
            return batch
        return check_tokens(batch, vocabulary, name=f"{name}[{index}]")

    if not isinstance(batches, Sequence):
        return (check(index, batch) for index, batch in enumerate(batches))
    faults, found = [], []
    for index, batch in enumerate(batches):
        try:
            found.append(check(index, batch))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        more = f"\nand {len(faults) - SHOWN} more batches" if len(faults) > SHOWN else ""
        raise ValueError("\n".join(faults[:SHOWN]) + more)
    return found


def check_batches_given(batches: Any) -> None:
    """Raise ValueError unless batches are several inputs: no text, mapping or number."""
    several = isinstance(batches, Iterable) and getattr(batches, "ndim", 1) > 0
    if not several or isinstance(batches, str | bytes | Mapping):
        raise ValueError(
            f"batches is a {type(batches).__name__}; give a list of the model's inputs, or another "
            "iterable of them"
        )


def model_inputs(model: Any, batches: Iterable[Any]) -> Any:
    """Return a model's calibration inputs; integers among those of a language model are checked.

    A model is one if its config has a vocabulary. Other inputs are the caller's own.
    """
    size = vocabulary(model)
    return batches if size is None else check_batches(batches, size, others=True)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _as_array(tokens: Any, name: str) -> Any:
    if isinstance(tokens, jax.Array):
        return tokens
    try:
        return np.asarray(tokens)
    except ValueError as error:
        raise ValueError(f"{name}: rows of unequal length are no array ({error})") from error


def _faults(array: Any, vocabulary: int | None) -> list[str]:
    """Say all that keeps an array from being tokens."""
    faults = []
    if array.ndim != 2:
        faults.append(f"shape {array.shape}, expected (batch, length); give rows of tokens")
    if array.size == 0:
        return [*faults, f"shape {array.shape} holds no token; give some"]
    if not jnp.issubdtype(array.dtype, jnp.integer):
        return [*faults, f"holds {array.dtype}, expected integers; give ids of tokens"]
    # Of an array on several hosts all have the extremes, and none has all values.
    extremes = (array.min(), array.max()) if isinstance(array, np.ndarray) else _extremes(array)
    top = np.iinfo(np.int32).max + 1 if vocabulary is None else vocabulary
    low, high = map(int, extremes)
    if high >= top or (low < 0 and vocabulary is not None):
        faults.append(_outside(array, top))
    return faults


@jax.jit
def _extremes(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(array), jnp.max(array)


def _outside(array: Any, vocabulary: int) -> str:
    remedy = "use this model's tokenizer; where they are padding, give a mask or --pad-id"
    kind = f"outside of the model's vocabulary of {vocabulary} tokens"
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return f"ids are {kind}: {remedy}"
    values = np.asarray(array)
    places = np.argwhere((values < 0) | (values >= vocabulary))
    names = ("row", "column") if values.ndim == 2 else tuple(f"axis {i}" for i in range(9))
    shown = [
        f"{values[tuple(place)]} at "
        + ", ".join(f"{name} {at}" for name, at in zip(names, place, strict=False))
        for place in places[:SHOWN]
    ]
    more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    ids = "1 id is" if len(places) == 1 else f"{len(places)} ids are"
    return f"{ids} {kind}: {'; '.join(shown)}{more}: {remedy}"


@dataclass(frozen=True)
class Windows:
    """Tokens cut for a model.

    Attributes:
        rows: int32 (length,) each; shorter ones are whole documents.
        left_out: tokens at the ends of documents that fill no window.
        taken: tokens by the name of the file that they are from.
    """

    rows: list[np.ndarray]
    left_out: int
    taken: Mapping[str, int] = field(default_factory=dict)

    def said(self) -> str:
        """Return how many tokens of what there are, in a line.

        >>> Windows([np.arange(4), np.arange(4)], 0, {"a.txt": 8}).said()
        '8 tokens in 2 windows, of a.txt'
        """
        tokens = sum(map(len, self.rows))
        several = len(self.taken) > 1
        parts = (f"{name} ({count:,})" if several else name for name, count in self.taken.items())
        return f"{tokens:,} tokens in {len(self.rows)} windows, of {', '.join(parts)}"


def cut(
    documents: Sequence[np.ndarray],
    length: int,
    *,
    prefix: Sequence[int] = (),
    limit: int | None = None,
    name: str = "tokens",
) -> Windows:
    """Cut documents into windows of ``length`` tokens, the prefix of each included.

    A document shorter than a window is one by itself, if there are several; what is left of longer
    ones is counted. A window whose text brings the prefix along gets it once.

    Args:
        documents: integers (n,) each.
        length: tokens in a window.
        prefix: what the tokenizer puts before every text.
        limit: the most windows; None for all.
        name: of the tokens in messages.

    Raises:
        ValueError: the one document is too short; a prefix that leaves no room.

    >>> cut([np.arange(7)], 4, prefix=[9]).rows
    [array([9, 0, 1, 2], dtype=int32), array([9, 3, 4, 5], dtype=int32)]
    """
    front = np.asarray(prefix, np.int32)
    if length <= len(front):
        raise ValueError(
            f"length={length} leaves no room behind the {len(front)} tokens that the tokenizer "
            "puts before each window; choose a larger one"
        )
    rows: list[np.ndarray] = []
    used = total = 0
    for document in documents:
        body = np.asarray(document)
        if len(front) and np.array_equal(body[: len(front)], front):
            body = body[len(front) :]
        room = length - len(front)
        whole = len(body) // room * room
        if whole == 0 and len(documents) == 1:
            raise ValueError(
                f"{name}: {len(body)} tokens where one window takes {room}; give more text, or a "
                "smaller length"
            )
        ends = range(room, whole + 1, room) if whole else [len(body)]
        found = [np.concatenate([front, body[max(0, end - room) : end]]) for end in ends]
        found = found if limit is None else found[: limit - len(rows)]
        rows += [row.astype(np.int32) for row in found]
        if limit is not None and len(rows) == limit:
            return Windows(rows, 0)  # what was not asked for is not left out
        used, total = used + ends[-1], total + len(body)
    return Windows(rows, total - used)


def in_batches(rows: Iterable[np.ndarray], batch: int) -> list[np.ndarray]:
    """Return rows as (batch, length) arrays: one length in each, the last of a length smaller.

    So none is padded, and none is dropped.

    >>> [b.shape for b in in_batches([np.zeros(4)] * 3 + [np.zeros(2)], 2)]
    [(2, 4), (1, 4), (1, 2)]
    """
    kinds: dict[int, list[np.ndarray]] = {}
    for row in rows:
        kinds.setdefault(len(row), []).append(row)
    return [
        np.stack(alike[start : start + batch])
        for alike in kinds.values()
        for start in range(0, len(alike), batch)
    ]


def read_tokens(
    file: Path, vocabulary: int, *, pad: int | None = None, stops: Sequence[int] = ()
) -> list[np.ndarray]:
    """Read documents of tokens from a .npy file: (n,) is one, (rows, n) is one a row.

    Args:
        file: integers, as `numpy.save` writes them.
        vocabulary: ids are below it.
        pad: id that fills rows up, at either end; -1 for none. None refuses rows that look filled.
        stops: ids that end a text: where one of them is also ``pad``, the first one stays.

    Raises:
        ValueError: no such file; as `check_tokens`; rows of nothing but padding.
    """
    named = f"--tokens {file}"
    values = _load(file, named)
    if values.ndim == 1:
        return [check_tokens(values[None], vocabulary, name=named)[0]]
    if pad is None or pad == -1 or values.ndim != 2:
        tokens = check_tokens(values, vocabulary, name=named)
        if pad is None:
            _refuse_runs(tokens, named)
        return list(tokens)
    real = values != pad
    text = np.maximum.accumulate(real, 1) & np.maximum.accumulate(real[:, ::-1], 1)[:, ::-1]
    tokens = check_tokens(np.where(text, values, 0), vocabulary, name=named)
    empty = np.flatnonzero(~text.any(axis=1))
    if len(empty):
        raise ValueError(
            f"{named}: {len(empty)} rows hold nothing but the padding {pad}: rows "
            f"{empty[:SHOWN].tolist()}; leave them out"
        )
    starts, ends = text.argmax(axis=1), values.shape[1] - text[:, ::-1].argmax(axis=1)
    tokens = np.where(text, tokens, pad)
    extra = 1 if pad in stops else 0
    return [row[a : b + extra] for row, a, b in zip(tokens, starts, ends, strict=True)]


def _load(file: Path, named: str) -> np.ndarray:
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(np.lib.format.MAGIC_PREFIX))
        if start[:2] == b"PK":
            raise ValueError("but an archive, as of several arrays")
        if start != np.lib.format.MAGIC_PREFIX:
            raise ValueError("it does not begin as one")
        # Mapped, so that a header cannot ask for memory that the file does not fill.
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is parsed as Python, which fails in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{named} is no .npy file of integers ({reason}); write one by numpy.save"
        ) from error


def _refuse_runs(tokens: np.ndarray, named: str) -> None:
    """Refuse rows most of which end, or begin, with one id again and again."""
    rows, width = tokens.shape
    if rows < 2 or width <= RUN:
        return
    for side, edge in (("end", tokens[:, -RUN:]), ("begin", tokens[:, :RUN])):
        alike = edge[:, 0][(edge == edge[:, :1]).all(axis=1)]
        ids, counts = np.unique(np.asarray(alike), return_counts=True)
        most = int(np.max(counts, initial=0))
        if most * 2 > rows:
            pad = int(ids[np.argmax(counts)])
            raise ValueError(
                f"{named}: {most} of {rows} rows {side} with {RUN} or more ids {pad}; is "
                f"that padding? give --pad-id {pad}, or --pad-id -1 if it is text"
            )
