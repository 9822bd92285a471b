"""Text as tokens: by the tokenizer of a model's folder, as in transformers, or byte by byte."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wush_jax.models.chat import ChatTemplate
from wush_jax.models.encodings import open_config
from wush_jax.storage.json_file import check_inside, home, present, read_json

TOKENIZER, SETTINGS, GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Tokenizer:
    """What turns text into tokens and back.

    Attributes:
      inner: a tokenizer of the ``tokenizers`` package; None takes bytes as tokens.
      stop_tokens: those that end a text.
      bos: the token that begins a text, where the folder names one.
      eos: the token that ends a text by the tokenizer itself; `stop_tokens` may be others.
      front: what goes before every text in place of the tokenizer's own rule; None keeps that.
      chat: how a conversation is written, where the folder says so.

    >>> Tokenizer().decode(Tokenizer().encode("text"))
    'text'
    """

    inner: Any = None
    stop_tokens: tuple[int, ...] = ()
    bos: int | None = None
    eos: int | None = None
    front: tuple[int, ...] | None = None
    chat: ChatTemplate | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` of a model's folder; without one, bytes are tokens.

        That of a GGUF file is the one beside it: the tokenizer inside of it is not read.

        As in transformers, the truncation and padding that the file may hold are not applied, and
        what goes around a text is the file's rule alone, whatever ``tokenizer_config.json`` says.

        Raises:
          ValueError: no tokenizer and a vocabulary that is not of 256 bytes; a file that is none;
            the package that reads it is missing.
        """
        config = open_config(folder)
        folder = home(folder)
        cls.of_config(folder, config)  # its own faults, though generation's ids stand before them
        if present(folder / GENERATION):
            config = {**config, **read_json(folder / GENERATION)}
        settings = read_json(folder / SETTINGS) if present(folder / SETTINGS) else {}
        plain = cls.of_config(folder, config)
        if not present(folder / TOKENIZER):
            size = config.get("vocab_size")
            if size != 256:
                why = "config.json no vocab_size" if size is None else f"{size} tokens are no bytes"
                raise ValueError(
                    f"{folder} has no tokenizer.json, and {why}: add the tokenizer's file, or give "
                    "tokens in place of text"
                )
            return plain
        inner = _read_inner(folder / TOKENIZER)
        names = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token")}
        ids = {name: inner.token_to_id(text) for name, text in names.items() if text is not None}
        eos = ids.get("eos_token")
        return cls(
            inner,
            plain.stop_tokens or (() if eos is None else (eos,)),
            # A folder with settings that name none has none: its texts never begin with one.
            ids.get("bos_token") if settings else plain.bos,
            eos,
            chat=ChatTemplate.read(folder, settings),
        )

    @classmethod
    def of_config(cls, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
        """Return what reads bytes, with the tokens at the ends of a text that a config names."""
        stops = _ids(config.get("eos_token_id"), f"{folder}: eos_token_id")
        bos = _ids(config.get("bos_token_id"), f"{folder}: bos_token_id")
        return cls(None, stops, bos[0] if bos else None)

    @property
    def prefix(self) -> list[int]:
        """What goes before every text."""
        if self.front is not None or self.inner is None:
            return list(self.front or ())
        found = self._inner_encode("a", special=True)
        return found.ids[: [*found.special_tokens_mask, 0].index(0)]

    def with_bos(self, rule: str) -> Tokenizer:
        """Return the tokenizer with BOS before texts "always", "never", or "auto": by its own rule.

        Raises:
          ValueError: always, but the folder names no such token.
        """
        if rule == "auto":
            return self
        if rule == "always" and self.bos is None:
            raise ValueError(
                "bos='always': neither config.json nor the tokenizer names that token; add it "
                "there, or leave bos='auto'"
            )
        front = (self.bos,) if rule == "always" and self.bos is not None else ()
        return dataclasses.replace(self, front=front)

    def encode(self, text: str, *, special: bool = True, split_special: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
          text: valid Unicode.
          special: whether with what goes around a text; what it brings along does not come twice.
          split_special: whether names of special tokens within the text are text; else, as in
            transformers, they are those tokens.

        Raises:
          ValueError: half of a surrogate pair, as of arguments that are no UTF-8; what the
            tokenizer has no token for.
        """
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is no valid Unicode ({error.reason}); give UTF-8") from error
        own = special and self.front is None
        if self.inner is None:
            tokens = list(raw)
        else:
            self.inner.encode_special_tokens = split_special
            tokens = self._inner_encode(text, special=own).ids
        front = self.prefix if special else []
        if not own:
            tokens = [*front, *tokens]
        twice = bool(front) and tokens[: 2 * len(front)] == front * 2
        return tokens[len(front) :] if twice else tokens

    def _inner_encode(self, text: str, *, special: bool) -> Any:
        with _refused("the tokenizer has no tokens for the text", "use that of the model"):
            return self.inner.encode(text, add_special_tokens=special)

    def begins_itself(self, text: str) -> bool:
        """Whether a text brings along what the tokenizer would put before it.

        >>> Tokenizer().begins_itself("text")
        False
        """
        prefix = self.prefix
        return bool(prefix) and self.encode(text, special=False)[: len(prefix)] == prefix

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens, special ones only on request."""
        if self.inner is None:
            return bytes(tokens).decode(errors="replace")
        with _refused("the tokenizer has no text for the tokens", "use that of the model"):
            return self.inner.decode(list(tokens), skip_special_tokens=not special)

    def continuation(
        self, prompt: Sequence[int], new: Sequence[int], *, special: bool = False
    ) -> str:
        """Return the text that new tokens add to a prompt's: both are decoded together.

        Alone, many tokenizers would drop the space before the first word, or cut a character.
        """
        before, whole = (
            self.decode(tokens, special=special) for tokens in (prompt, [*prompt, *new])
        )
        pairs = zip(before, whole, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return whole[same:]


def _ids(value: Any, name: str) -> tuple[int, ...]:
    """Return ids that a config names: one, some, or none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(item) is not int or item < 0 for item in values):
        raise ValueError(f"{name}={value!r}, expected an id of a token, or several")
    return tuple(values)


def _read_inner(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Inner
    except ImportError as error:
        raise ValueError(
            f"{file} needs the tokenizers package: pip install 'wush-jax[hub]', or give tokens "
            "in place of text"
        ) from error
    check_inside(file)
    fault = f"{file} is no tokenizer that this version of tokenizers reads"
    with _refused(fault, "fetch it again, or give tokens in place of text"):
        inner = Inner.from_file(str(file))
    inner.no_truncation()
    inner.no_padding()
    return inner


@contextmanager
def _refused(fault: str, remedy: str) -> Iterator[None]:
    """Turn what the package ends with, plain exceptions and Rust's panics, into a ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise ValueError(f"{fault} ({error}); {remedy}") from error


def _content(token: Any) -> str | None:
    """Return the text of a token in tokenizer_config.json: a string, or an object with it."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
