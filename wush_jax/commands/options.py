"""Flags that several commands share: recipes by field, text as tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import jax
import numpy as np
import tyro
from jax.sharding import AxisType

from wush_jax import formats
from wush_jax.checkpoints.targets import recipe_for
from wush_jax.models.documents import joined, mixed, read_documents
from wush_jax.models.encodings import open_config, open_folder
from wush_jax.models.hugging_face import folder_config, read_model_config
from wush_jax.models.placement import Placement, check_divides, tensor_parallel
from wush_jax.models.text import GENERATION, Tokenizer
from wush_jax.models.tokens import (
    Windows,
    check_tokens,
    cut,
    in_batches,
    read_tokens,
)
from wush_jax.solvers import presets, recipe
from wush_jax.solvers.recipe import Recipe, Rules
from wush_jax.storage.json_file import home, present, read_json

PATHS = str | PathLike
FORMATS = {
    name: value for name, value in vars(formats).items() if isinstance(value, formats.Format)
}
NAMED: dict[str, Any] = {
    "format": Literal[tuple(FORMATS)],
    "activation_format": Literal[("same", "tuned", "none", *FORMATS)],
    "transform": Literal[recipe.TRANSFORMS],
    "solver": Literal[recipe.SOLVERS],
    "scale_search": Literal[recipe.SCALE_SEARCHES],
    "global_scale": Literal[recipe.GLOBAL_SCALES],
    "input_error": Literal[recipe.INPUT_ERRORS],
}


#: Fields that most people set; the others are parts of presets.
COMMON = ("format", "activation_format", "transform", "solver", "block_size")


def _recipe_flags(common: bool) -> dict[str, Any]:
    """Return types with help for fields of `Recipe`: the flags are what Python has."""
    text = inspect.cleandoc(Recipe.__doc__ or "")
    about = dict(re.findall(r"^  (\w+): (.+(?:\n    .+)*)", text, re.MULTILINE))
    return {
        name: Annotated[NAMED.get(name, kind), tyro.conf.arg(help=" ".join(about[name].split()))]
        for name, kind in get_type_hints(Recipe).items()
        if (name in COMMON) == common
    }


#: Fields of a `Recipe` that were given; the others are the preset's.
RecipeFlags = TypedDict("RecipeFlags", _recipe_flags(True), total=False)  # type: ignore[misc]
ResearchFlags = TypedDict("ResearchFlags", _recipe_flags(False), total=False)  # type: ignore[misc]
PRESETS: Mapping[str, Recipe] = {
    "rtn": Recipe(),
    "fast": presets.FAST,
    "paper": presets.PAPER,
    "best": presets.BEST,
    "best-wide": presets.BEST_WIDE,
}
HEAD = "lm_head"
Head = Literal["w4a8"]
Preset = Literal["rtn", "fast", "paper", "best", "best-wide"]


def placement_of(mesh: str | None, folder: Path) -> Placement:
    """Return where the tensors of a model folder go on ``model=N`` devices; None without a mesh.

    Raises:
      ValueError: another form, more devices than there are, a model that does not divide so.
    """
    if mesh is None:
        return None
    name, _, count = mesh.partition("=")
    if name != "model" or not count.isdecimal() or not 1 <= int(count) <= jax.device_count():
        raise ValueError(
            f"--mesh {mesh}: write model=N, with N from 1 to this machine's {jax.device_count()} "
            "devices"
        )
    check_divides(folder_config(open_folder(folder)), int(count))
    axes: Any = {"axis_types": (AxisType.Auto,), "devices": jax.devices()[: int(count)]}
    return tensor_parallel(jax.make_mesh((int(count),), ("model",), **axes))


def preset_of(preset: str | None, flags: Mapping[str, Any], target: str | None = None) -> str:
    """Return the preset that was asked for, or the best that goes with what was.

    >>> preset_of(None, {"format": "NVFP4"}), preset_of(None, {"transform": "hadamard"})
    ('best', 'rtn')
    """
    told = target is not None or "transform" in flags or "solver" in flags
    return preset or ("rtn" if told else "best")


def recipe_of(preset: str | None, flags: Mapping[str, Any], target: str | None = None) -> Recipe:
    """Return a preset with the given fields in place of its own, fit for a layout if one is given.

    >>> recipe_of("rtn", {"format": "NVFP4", "activation_format": "none"}).input_format
    """
    chosen, changes = PRESETS[preset_of(preset, flags, target)], dict(flags)
    for name in ("format", "activation_format"):
        if name in changes:
            changes[name] = {**FORMATS, "same": "same", "tuned": "tuned", "none": None}[
                changes[name]
            ]
    if target is not None:
        return recipe_for(target, chosen, changes)
    return chosen.replace(**changes)


def rules_of(
    preset: str | None,
    flags: Mapping[str, Any],
    skip: tuple[str, ...],
    target: str | None = None,
    head: str | None = None,
) -> Rules:
    """Return rules: what matches ``skip`` stays as it is, the rest gets one recipe.

    With ``head``, "w4a8", so does the head, by round to nearest, its inputs in FP8.

    Raises:
      ValueError: what is no regular expression; fields that contradict each other.
    """
    for pattern in skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"--skip {pattern!r} is no regular expression ({error}); give one of paths, such "
                "as 'lm_head'"
            ) from error
    if head is not None and target is not None:
        raise ValueError(
            f"--head {head} is for native files, --for {target} is not: leave one of them out"
        )
    chosen = recipe_of(preset, flags, target)
    rules: list[tuple[str, Recipe | None]] = []
    if head is not None:
        rules.append((HEAD, Recipe(format=chosen.format, activation_format=formats.FP8)))
    return [*rules, *((pattern, None) for pattern in skip), (".*", chosen)]


@dataclass(frozen=True)
class Text:
    """Text for a model, as windows of tokens.

    Attributes:
      text: a text file, read with the tokenizer.json of the model's folder, or as bytes by models
        with a vocabulary of 256; a .jsonl file has a document a line, its "text", or "messages" in
        the words of the chat template. Several: --text once for each.
      shares: what part of the windows each text gives, such as 3 1; else in proportion to them.
      seed: takes windows at random; without it the first ones.
      tokens: a .npy file of integers, in place of a text: (n,) one text, (rows, n) one a row.
      length: tokens in a window; no more than the model's positions.
      samples: the most windows; all for None.
      batch: windows in a batch; the last one may have fewer.
      bos: the token that begins a text before every window: auto, by the tokenizer's own rule (in
        files of tokens, where they have it); always; never.
      pad_id: id that fills up rows of tokens at their ends; -1 for none. Without it that of the
        model's config, and rows that look filled are refused.
      split_special_tokens: take names of special tokens in the text for text.
    """

    text: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    shares: tuple[float, ...] = ()
    seed: int | None = None
    tokens: Path | None = None
    length: int = 2048
    samples: int | None = 128
    batch: int = 4
    bos: Literal["auto", "always", "never"] = "auto"
    pad_id: int | None = None
    split_special_tokens: bool = False

    def __post_init__(self) -> None:
        """Take one file, or a list, for a tuple of files; refuse values of other kinds."""
        if isinstance(self.text, PATHS):
            object.__setattr__(self, "text", (self.text,))
        self.check()
        object.__setattr__(self, "text", tuple(map(Path, self.text)))
        object.__setattr__(self, "tokens", None if self.tokens is None else Path(self.tokens))

    def check(self) -> None:
        """Raise ValueError for values of other kinds, all at once."""
        paths = isinstance(self.text, tuple | list) and all(
            isinstance(file, PATHS) for file in self.text
        )
        numbers = isinstance(self.shares, tuple | list) and all(
            isinstance(share, Real) and 0 < share < inf for share in self.shares
        )
        faults = [
            *([] if paths else [f"--text {self.text!r}: give a path, or a tuple of paths"]),
            *([] if numbers else [f"--shares {self.shares!r}: give a tuple of positive numbers"]),
            *self._faults_of_one(),
        ]
        if faults:
            raise ValueError("; ".join(faults))

    def _faults_of_one(self) -> Iterator[str]:
        if not isinstance(self.tokens, PATHS | None):
            yield f"--tokens {self.tokens!r}: give the path of one .npy file"
        for name in ("length", "samples", "batch"):
            value = getattr(self, name)
            if (value is not None or name != "samples") and not _is_whole(value, 1):
                yield f"--{name} {value!r} must be at least 1, a whole number"
        if self.seed is not None and not _is_whole(self.seed, 0):
            yield f"--seed {self.seed!r}: give a whole number, 0 or more"
        if self.pad_id is not None and not _is_whole(self.pad_id, -1):
            yield f"--pad-id {self.pad_id!r}: give an id, or -1 for none"
        if self.bos not in ("auto", "always", "never"):
            yield f"--bos {self.bos!r}: give auto, always or never"
        if type(self.split_special_tokens) is not bool:
            yield f"--split-special-tokens {self.split_special_tokens!r}: give True or False"

    def batches(self, folder: Path) -> list[np.ndarray]:
        """Return int32 (batch, length) arrays for the model in a folder; as `windows`."""
        return in_batches(self.windows(folder).rows, self.batch)

    def windows(self, folder: Path) -> Windows:
        """Return windows of tokens for the model in a folder.

        Raises:
          ValueError: not one of text and tokens, no such file, a text too short, no tokenizer, ids
            that the model does not know.
        """
        self.check()
        if bool(self.text) == (self.tokens is not None):
            raise ValueError("give one of --text FILE and --tokens FILE.npy")
        for name, file in (*(("text", file) for file in self.text), ("tokens", self.tokens)):
            if file is not None and not file.is_file():
                raise ValueError(f"--{name} {file} is no file")
        config = read_model_config(folder)
        length, size = min(self.length, config.max_position_embeddings), config.vocab_size
        # All windows, where some of them are chosen.
        limit = None if len(self.text) > 1 or self.seed is not None else self.samples
        read: Callable[..., tuple[list[np.ndarray], list[int]]] = self._read_tokens
        if self.text:
            read = partial(self._read_text, Tokenizer.read(folder).with_bos(self.bos))
        found = []
        for file in self.text or (self.tokens,):
            assert file is not None
            name = f"--{'text' if self.text else 'tokens'} {file}"
            documents, prefix = read(file, folder, size)
            found.append(cut(documents, length, prefix=prefix, limit=limit, name=name))
        files = [str(file) for file in self.text or (self.tokens,)]
        rows = mixed([w.rows for w in found], self.samples, self.shares, self.seed, files)
        left_out = 0 if sum(map(len, rows)) == self.samples else sum(w.left_out for w in found)
        taken = {file: sum(map(len, some)) for file, some in zip(files, rows, strict=True)}
        return Windows([row for some in rows for row in some], left_out, taken)

    def _read_text(
        self, tokenizer: Tokenizer, file: Path, folder: Path, size: int
    ) -> tuple[list[np.ndarray], list[int]]:
        documents = read_documents(file, tokenizer.chat)
        tokens = joined(documents, tokenizer, self.split_special_tokens)
        named = f"--text {file}, as the tokenizer of {folder} reads it"
        if not len(tokens):
            raise ValueError(f"{named}, holds no token; give more text")
        check_tokens([[*tokenizer.prefix, *tokens.tolist()]], size, name=named)
        return [tokens], list(tokenizer.prefix)

    def _read_tokens(
        self, file: Path, folder: Path, size: int
    ) -> tuple[list[np.ndarray], list[int]]:
        config = open_config(folder)
        if present(home(folder) / GENERATION):
            config = {**config, **read_json(home(folder) / GENERATION)}
        pad, found = self.pad_id, config.get("pad_token_id")
        pad = found if pad is None and type(found) is int else pad
        tokenizer = Tokenizer.of_config(folder, config).with_bos(self.bos)
        rows = read_tokens(file, size, pad=pad, stops=tokenizer.stop_tokens)
        return rows, tokenizer.prefix


@dataclass(frozen=True)
class TextFlags(Text):
    """A `Text` that flags give: checked when it is read, by the command and not by its parser."""

    def __post_init__(self) -> None:
        """Leave the values as they are."""


#: Of commands that read a text.
Source = Annotated[TextFlags, tyro.conf.arg(name="text")]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
