"""Documents of text files, and windows of several files in the shares that are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wush_jax.models.chat import ChatTemplate
from wush_jax.models.text import Tokenizer
from wush_jax.models.tokens import SHOWN

LINES = ".jsonl"


def read_documents(
    file: Path, chat: ChatTemplate | None = None, *, answer: bool = False
) -> list[str]:
    """Return the texts of a file: one, or of a JSONL file one a line, from its ``text``.

    Lines with ``messages``, each with ``role`` and ``content``, are conversations in the words of
    the chat template.

    Args:
        file: UTF-8.
        chat: of the model's folder.
        answer: whether the beginning of an answer follows conversations.

    Raises:
        ValueError: no UTF-8, nothing in it, lines that are none of the two; with their numbers.
    """
    text = read_text(file)
    if file.suffix != LINES:
        return [text]
    found: list[str] = []
    faults = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(_document(line, chat, answer))
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: {error}")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError(f"--text {file}: {'; '.join(faults[:SHOWN])}{more}")
    if not any(found):
        raise ValueError(f"--text {file} holds no text; give lines with text or messages")
    return found


def read_text(file: Path) -> str:
    """Return a text file as it is, without a byte order mark.

    Raises:
        ValueError: it is empty, or no UTF-8.
    """
    named = f"--text {file}"
    try:
        # Not `read_text`: that would turn line ends of other systems into ours.
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{named} is no UTF-8 text (byte {error.start}: {error.reason}); convert it, as "
            "iconv -f LATIN1 -t UTF-8 does"
        ) from error
    if not text:
        raise ValueError(f"{named} is empty; give a text")
    return text


def _document(line: str, chat: ChatTemplate | None, answer: bool) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise ValueError('expected {"text": ...} or {"messages": [...]}')
    if "text" in record:
        if not isinstance(record["text"], str):
            raise ValueError(f"text is a {type(record['text']).__name__}, no string")
        return record["text"]
    messages = record["messages"]
    if chat is None:
        raise ValueError(
            "messages need a chat template, and the model's folder has none (chat_template.jinja "
            "or tokenizer_config.json): add it, or give texts"
        )
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise ValueError("messages is no list of objects with role and content")
    return chat.render(messages, add_generation_prompt=answer)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= set(message)


def joined(documents: Sequence[str], tokenizer: Tokenizer, split_special: bool) -> np.ndarray:
    """Return the tokens of documents one behind the other, so that no window needs padding.

    Between two stands the token that ends a text, or a line end where the tokenizer has none. What
    begins a text begins the windows: a document that brings it along gives it up.

    >>> from wush_jax.models.text import Tokenizer
    >>> joined(["ab", "c"], Tokenizer(), False).tolist()
    [97, 98, 10, 99]
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, special=False, split_special=split_special)

    front = list(tokenizer.prefix)
    between = encode("\n") if tokenizer.eos is None else [tokenizer.eos]
    tokens: list[int] = []
    for number, text in enumerate(documents):
        own = encode(text)
        if len(documents) > 1 and front and own[: len(front)] == front:
            own = own[len(front) :]
        tokens += own if number == 0 else [*between, *own]
    return np.asarray(tokens, np.int32)


def mixed(
    rows: Sequence[Sequence[np.ndarray]],
    count: int | None,
    shares: Sequence[float],
    seed: int | None,
    names: Sequence[str],
) -> list[list[np.ndarray]]:
    """Return windows of each file: the first ones, or with a seed some at random.

    Args:
        rows: all windows of each file.
        count: of windows together; None for all.
        shares: of each file; none: in proportion to their windows.
        seed: of the choice.
        names: of the files, for messages.

    Raises:
        ValueError: shares that do not go with the files; a file with fewer windows than its share.

    >>> parts = mixed([[0, 1, 2, 3], [4, 5, 6]], 4, [3, 1], None, ["a", "b"])
    >>> parts
    [[0, 1, 2], [4]]
    """
    sizes = [len(some) for some in rows]
    if shares and (len(shares) != len(rows) or min(shares) <= 0):
        raise ValueError(
            f"--shares {' '.join(map(str, shares))}: give one positive number for each of the "
            f"{len(rows)} files {', '.join(names)}"
        )
    if shares and count is None:
        raise ValueError("--shares needs --samples: of how many windows they are shares")
    wanted = sizes if count is None else _divided(min(count, sum(sizes)), shares or sizes)
    short = [
        f"{name} has {size} windows, its share is {most}"
        for name, size, most in zip(names, sizes, wanted, strict=True)
        if size < most
    ]
    if short:
        raise ValueError(f"{'; '.join(short)}: give more text, other --shares, or fewer --samples")
    random = None if seed is None else np.random.default_rng(seed)
    chosen = []
    for some, most in zip(rows, wanted, strict=True):
        order = range(len(some)) if random is None else random.permutation(len(some))
        chosen.append([some[i] for i in list(order)[:most]])
    return chosen


def _divided(count: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers that sum to a count, as near to shares as they can be.

    >>> _divided(5, [1, 1, 2])
    [1, 1, 3]
    """
    ends = np.round(np.cumsum(shares) / np.sum(shares) * count).astype(int)
    return np.diff(ends, prepend=0).tolist()
