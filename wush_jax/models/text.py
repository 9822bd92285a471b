"""Text as tokens: by the tokenizer of a model's folder, or byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wush_jax.storage.tensor_folder import read_config, read_json


@dataclass(frozen=True)
class Tokenizer:
    """What turns text into tokens and back.

    Attributes:
      inner: a tokenizer of the ``tokenizers`` package; None takes bytes as tokens.
      stop_tokens: those that end a text.

    >>> Tokenizer().decode(Tokenizer().encode("text"))
    'text'
    """

    inner: Any = None
    stop_tokens: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` of a model's folder; without one, bytes are tokens.

        Raises:
          ValueError: no tokenizer and a vocabulary that is not of 256 bytes; the package that
            reads it is missing.
        """
        folder = Path(folder)
        config = read_config(folder)
        file, generation = folder / "tokenizer.json", folder / "generation_config.json"
        if generation.is_file():
            config = {**config, **read_json(generation)}
        stop = config.get("eos_token_id")
        stops = tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)
        if not file.is_file():
            if config.get("vocab_size") != 256:
                raise ValueError(
                    f"{folder} has no tokenizer.json, and {config.get('vocab_size')} tokens are no "
                    "bytes: add the tokenizer's file, or give tokens in place of text"
                )
            return cls(None, stops)
        try:
            from tokenizers import Tokenizer as Inner
        except ImportError as error:
            raise ValueError(
                f"{file} needs the tokenizers package: pip install 'wush-jax[hf]', or give tokens "
                "in place of text"
            ) from error
        return cls(Inner.from_file(str(file)), stops)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, with what the tokenizer puts around one if ``special``."""
        if self.inner is None:
            return list(text.encode())
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        if self.inner is None:
            return bytes(tokens).decode(errors="replace")
        return self.inner.decode(list(tokens))
