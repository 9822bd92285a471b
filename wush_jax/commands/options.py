"""Flags that several commands share: recipes by field, text as tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import numpy as np
import tyro

from wush_jax import formats
from wush_jax.models.demo import token_batches
from wush_jax.models.text import Tokenizer
from wush_jax.solvers import presets, recipe
from wush_jax.solvers.recipe import Recipe, Rules
from wush_jax.storage.tensor_folder import TensorFolder

FORMATS = {
    name: value for name, value in vars(formats).items() if isinstance(value, formats.Format)
}
NAMED: dict[str, Any] = {
    "format": Literal[tuple(FORMATS)],
    "activation_format": Literal[("same", "tuned", "none", *FORMATS)],
    "transform": Literal[recipe.TRANSFORMS],
    "solver": Literal[recipe.SOLVERS],
    "scale_search": Literal[recipe.SCALE_SEARCHES],
    "input_error": Literal[recipe.INPUT_ERRORS],
}


def _recipe_flags() -> dict[str, Any]:
    """Return a type with help for every field of `Recipe`: the flags are what Python has."""
    text = inspect.cleandoc(Recipe.__doc__ or "")
    about = dict(re.findall(r"^  (\w+): (.+(?:\n    .+)*)", text, re.MULTILINE))
    return {
        name: Annotated[NAMED.get(name, kind), tyro.conf.arg(help=" ".join(about[name].split()))]
        for name, kind in get_type_hints(Recipe).items()
    }


#: Fields of a `Recipe` that were given; the others are the preset's.
RecipeFlags = TypedDict("RecipeFlags", _recipe_flags(), total=False)  # type: ignore[misc]  # made
PRESETS: Mapping[str, Recipe] = {
    "default": Recipe(),
    "fast": presets.FAST,
    "paper": presets.PAPER,
    "best": presets.BEST,
    "best-wide": presets.BEST_WIDE,
}
Preset = Literal["default", "fast", "paper", "best", "best-wide"]


def recipe_of(preset: str, flags: Mapping[str, Any]) -> Recipe:
    """Return a preset with the given fields in place of its own.

    >>> recipe_of("default", {"format": "NVFP4", "activation_format": "none"}).input_format
    """
    changes = dict(flags)
    for name in ("format", "activation_format"):
        if name in changes:
            changes[name] = {**FORMATS, "same": "same", "tuned": "tuned", "none": None}[
                changes[name]
            ]
    return PRESETS[preset].replace(**changes)


def rules_of(preset: str, flags: Mapping[str, Any], skip: tuple[str, ...]) -> Rules:
    """Return rules: what matches ``skip`` stays as it is, the rest gets one recipe."""
    return [*((pattern, None) for pattern in skip), (".*", recipe_of(preset, flags))]


@dataclass(frozen=True)
class Text:
    """Text for a model, as windows of tokens.

    Attributes:
      text: a text file, read with the tokenizer.json of the model's folder, or as bytes by models
        with a vocabulary of 256.
      tokens: a .npy file of integers, in place of a text.
      length: tokens in a window; no more than the model's positions.
      samples: the most windows; all for None.
      batch: windows in a batch.
    """

    text: Path | None = None
    tokens: Path | None = None
    length: int = 2048
    samples: int | None = 128
    batch: int = 4

    def batches(self, folder: Path) -> list[np.ndarray]:
        """Return int32 (batch, length) arrays for the model in a folder.

        Raises:
          ValueError: not one of text and tokens, no such file, a text too short, no tokenizer.
        """
        for name in ("length", "samples", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        config = TensorFolder(folder).config
        length = min(self.length, config.get("max_position_embeddings") or self.length)
        tokens = self._tokens(folder)
        batch = max(1, min(self.batch, len(tokens) // length, self.samples or self.batch))
        limit = None if self.samples is None else self.samples // batch
        return list(token_batches(tokens, batch=batch, length=length, limit=limit))

    def _tokens(self, folder: Path) -> np.ndarray:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give one of --text FILE and --tokens FILE.npy")
        for name, file in (("text", self.text), ("tokens", self.tokens)):
            if file is not None and not file.is_file():
                raise ValueError(f"--{name} {file} is no file")
        if self.text is not None:
            text = self.text.read_text("utf8")
            return np.asarray(Tokenizer.read(folder).encode(text), np.int32)
        assert self.tokens is not None
        try:
            tokens = np.load(self.tokens, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"--tokens {self.tokens} is no .npy file of integers") from error
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens={str(self.tokens)!r} holds {tokens.dtype}, expected integers")
        return tokens.reshape(-1)
