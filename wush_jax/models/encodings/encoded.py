"""Weights that other libraries store as codes, and a folder that shows them as plain tensors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.models.typed_values import TypedValues
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import Entry, MisfitError, TensorFolder, some

# The dtypes and shapes that are right, by tensor.
Headers = Mapping[str, tuple[Sequence[Any], Sequence[tuple[int, ...]]]]
SCALES = (np.float16, jnp.bfloat16, np.float32)
PLAIN = ("F32", "F16", "BF16")  # elements of GGUF files that are no codes


@dataclass(frozen=True)
class EncodedWeight:
    """What a folder's config and headers say of one encoded weight.

    Attributes:
      shape: (N, K), or (E, N, K); or of a vector in files that encode all tensors.
      dtype: of the weight where a reader asks for none: that in which its own library decodes it.
      parts: names of the tensors that it is made of, codes first and scales second.
      element: "int4", "int8", "e4m3", ...
      block: rows and columns that share a scale; None where the element says it.
      read: returns the codes, or what else has ``values``.
      zero_points: whether codes have zero points of their own.
      reordered: whether columns are in groups of their own order.
      inputs: what the file wants activations rounded to, which is not done; empty for nothing.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[str, ...]
    element: str
    block: tuple[int, int] | None
    read: Callable[[], Any]
    zero_points: bool = False
    reordered: bool = False
    inputs: str = ""

    @property
    def said(self) -> str:
        """How it is stored, for people."""
        if self.block is None:
            return self.element
        (rows, columns), (*lead, n, k) = self.block, self.shape
        groups = f"groups of {columns}" if columns < k else "a scale a row"
        if rows > 1:
            groups = "one scale" if rows >= n and columns >= k else f"blocks of {rows} x {columns}"
        parts = [self.element, groups]
        parts += [f"{lead[0]} matrices"] if lead else []
        parts += ["zero points"] if self.zero_points else []
        parts += ["columns reordered"] if self.reordered else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Encoding:
    """A way in which other libraries store weights.

    Attributes:
      name: how users call it.
      claims: whether a ``quantization_config`` is of this kind.
      weights: the encoded weights of a folder, by the names that they have where they are plain.
      skipped: endings of tensors that are of no use here: of quantized activations and caches.
      written_by: libraries and versions whose files are read.
    """

    name: str
    claims: Callable[[Mapping[str, Any]], bool]
    weights: Callable[[TensorFolder], dict[str, EncodedWeight]]
    skipped: tuple[str, ...] = ()
    written_by: str = ""


class DecodedFolder(TensorFolder):
    """A folder of encoded weights, seen as one of plain tensors: each is decoded when it is read.

    Args:
      stored: the folder as it is.
      encoding: of its weights.

    Attributes:
      stored: the folder as it is.
      encoding: of its weights.
      encoded: what is known of each encoded weight, by name.

    Raises:
      ValueError: a config or tensors that contradict each other; all faults at once.
      NotImplementedError: a config that asks for what is not read.
    """

    def __init__(self, stored: TensorFolder, encoding: Encoding):
        self.path, self.config = stored.path, stored.config
        self.stored, self.encoding = stored, encoding
        self.encoded = encoding.weights(stored)
        hidden = {part for weight in self.encoded.values() for part in weight.parts}
        hidden |= {name for name in stored.entries if name.endswith(encoding.skipped)}
        plain = {n: e for n, e in stored.entries.items() if n not in hidden}
        twice = set(plain) & set(self.encoded)
        if twice:
            raise ValueError(
                f"{self.path} holds {some(twice)} both plain and encoded; remove one of them"
            )
        bare = [n for n, e in plain.items() if e.dtype.name.startswith("float8")]
        if bare:
            raise ValueError(
                f"{self.path}: {some(bare)} hold 8-bit floats, and no scale that layout "
                f"{encoding.name!r} has for them is there, so that their values are not known; "
                "fetch the folder again, or save the model with its own library as bfloat16"
            )
        self.entries = plain | {name: self._entry(w) for name, w in self.encoded.items()}
        self._unread = set(self.entries)

    def _entry(self, weight: EncodedWeight) -> Entry:
        codes = self.stored.entries[weight.parts[0]]
        return dataclasses.replace(codes, dtype=weight.dtype, shape=weight.shape, crc32=None)

    def read(
        self, name: str, dtypes: Sequence[Any], shapes: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        """Return one tensor, decoded where it is encoded: in its own type, or the first asked for.

        Raises:
          ValueError: as of a `TensorFolder`; codes that contradict the config.
        """
        weight = self.encoded.get(name)
        if weight is not None and weight.shape not in shapes:
            raise MisfitError(
                f"{self.path}: tensor {name!r} is {weight.said} {weight.shape}, expected "
                f"{' or '.join(map(str, shapes))}; give the model that was saved"
            )
        if weight is None:
            value = self.stored.read(name, dtypes, shapes)
        else:
            wanted = [np.dtype(d) for d in dtypes]
            kind = weight.dtype if weight.dtype in wanted else wanted[0]
            value = weight.read().values().astype(kind)
        self._unread.discard(name)
        return value

    @property
    def notes(self) -> tuple[str, ...]:
        """What the file asks for and is not done."""
        kinds = sorted({w.inputs for w in self.encoded.values() if w.inputs})
        return tuple(
            f"the file rounds activations ({kind}); here they stay as they are" for kind in kinds
        )

    def decoded(self, packed: Collection[str]) -> tuple[str, ...]:
        """Say which weights a model holds as plain ones.

        Args:
          packed: names of those that stay as they are.
        """
        kinds = Counter(
            w.said
            for name, w in self.encoded.items()
            if name not in packed and len(w.shape) > 1 and w.element not in PLAIN
        )
        said = ", ".join(f"{count} of ({kind})" for kind, count in sorted(kinds.items()))
        more = "they take the memory of plain ones (wush inspect names them)"
        return (f"weights decoded, as no packed format holds them: {said}; {more}",) * bool(kinds)


def checked(folder: TensorFolder, values: TypedValues, known: Sequence[str]) -> None:
    """Raise for what is wrong with a ``quantization_config``, all of it, with the file's name.

    Args:
      folder: for the name.
      values: of the config.
      known: fields that are read, or that change nothing of what is computed; others are refused
        unless they say nothing.
    """
    for name in sorted(set(values.given) - {*known, *values.defaults}):
        if values.given[name] not in (None, False, {}, [], ""):
            values.lack(
                f"{name} = {str(values.given[name])[:60]!r}",
                "is unknown and may change what is computed (take it out if it does not)",
            )
    try:
        values.check()
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{folder.path / CONFIG}: quantization_config: {error}") from error


BLOCK = "two numbers, each 1 or a multiple of 8"


def is_block(size: Sequence[int]) -> bool:
    """Tell whether two numbers are rows and columns of a block that any library has.

    Nothing else in the files tells blocks of 33 columns from those of 32, where both are two.
    """
    return len(size) == 2 and all(n == 1 or (n > 0 and n % 8 == 0) for n in size)


def weight_dtype(folder: TensorFolder) -> np.dtype:
    """Return the type of weights that a model's config names; bfloat16 where it names none."""
    named = folder.config.get("dtype", folder.config.get("torch_dtype"))
    known = {np.dtype(kind).name: np.dtype(kind) for kind in SCALES}
    return known.get(named if isinstance(named, str) else "", np.dtype(jnp.bfloat16))


def tensor_faults(folder: TensorFolder, wanted: Headers) -> list[str]:
    """Return what is wrong with the headers of some tensors."""
    faults = []
    for name, (dtypes, shapes) in wanted.items():
        entry = folder.entries.get(name)
        kinds = [np.dtype(d) for d in dtypes]
        if entry is None:
            faults.append(f"{name!r} is missing")
        elif entry.dtype not in kinds or entry.shape not in shapes:
            right = " or ".join(dict.fromkeys(map(str, shapes)))
            faults.append(
                f"{name!r} is {entry.dtype.name} {entry.shape}, expected "
                f"{' or '.join(kind.name for kind in kinds)} {right}"
            )
    return faults


def _ragged(name: str, parts: Headers, *, shape: Any, block: Any, **_: Any) -> list[str]:
    """Return that groups of a row do not tile it: only an order in the file says what is meant."""
    (rows, group), k = block, shape[-1]
    if rows > 1 or k % group == 0 or any(part.endswith("g_idx") for part in parts):
        return []
    return [f"group_size = {group} does not divide the {k} inputs of {name!r}"]


def encoded_layers(
    folder: TensorFolder,
    ending: str,
    describe: Callable[[str], tuple[Headers, Mapping[str, Any]]],
    plain: str = ".weight",
) -> dict[str, EncodedWeight]:
    """Return the encoded weights of a folder, by the names of the plain ones.

    Args:
      folder: where they are.
      ending: of a tensor that only encoded layers have.
      describe: from a layer's name to the headers that its tensors must have, codes first and
        scales second, and to what `EncodedWeight` is made of beside them.
      plain: what a plain weight's name has in place of ``ending``.

    Raises:
      ValueError: no layer, or tensors that are missing or of another dtype or shape: all at once.
    """
    names = [n.removesuffix(ending) for n in folder.entries if n.endswith(ending)]
    found = {}
    faults = [] if names else [f"{CONFIG} names an encoding, but no tensor ends in {ending!r}"]
    for name in names:
        wanted, fields = describe(name)
        wrong = tensor_faults(folder, wanted) + _ragged(name, wanted, **fields)
        faults += wrong
        if not wrong:
            scales = folder.entries[[*wanted][1]]
            own = {"dtype": scales.dtype, "parts": tuple(wanted)}
            found[f"{name}{plain}"] = EncodedWeight(**{**own, **fields})
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(
            f"{folder.path}: {'; '.join(faults[:8])}{more}: fetch the folder again, or correct "
            f"quantization_config in {CONFIG} where it is wrong"
        )
    return found
