"""Which tensors of a folder are matrices of dense layers, told by names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts.faults import fused_site
from wush_jax.solvers.recipe import Recipe, RuleBook, Rules
from wush_jax.storage.tensor_folder import Entry, some

FLOATS = (np.float64, np.float32, np.float16, jnp.bfloat16)
#: Names of tensors that no dense layer multiplies with, or that lose most: why they are left.
LEFT: Mapping[str, str] = MappingProxyType(
    {
        r"(.*\.)?(\w*embed\w*|wte|wpe|shared|relative_attention_bias)(\..*)?": "an embedding",
        r"(.*\.)?(gate|shared_expert_gate|\w*router\w*)(\..*)?": "a router of experts",
    }
)
# Last parts of the names of layers that read, and that write, the residual stream.
READERS = re.compile(r"(q|k|v|qkv|gate|up|gate_up)_proj|query_key_value|c_attn|c_fc|w1|w3")
WRITERS = re.compile(r"(o|down)_proj|c_proj|w2|dense_4h_to_h")


@dataclass(frozen=True)
class Matrix:
    """A tensor that is to be quantized.

    Attributes:
      name: of its layer.
      tensor: in the files.
      shape: (N, K), or (E, N, K) of E experts.
      turned: the files hold (..., K, N).
      recipe: for it, of its K.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    turned: bool
    recipe: Recipe

    @property
    def site(self) -> Any:
        """The same for matrices whose inputs are transformed once, with one global scale."""
        return fused_site(self.name), self.shape[-1], self.recipe


def find_matrices(
    entries: Mapping[str, Entry],
    rules: Rules,
    *,
    turned: Sequence[str] = (),
    left: Mapping[str, str] = LEFT,
    stacks: bool = True,
) -> tuple[list[Matrix], dict[str, str]]:
    """Return the matrices to quantize, and of every other tensor why it stays as it is.

    Matrices are tensors called ``<layer>.weight`` with two axes (N, K), as linear layers of torch
    have them, and with three (E, N, K) where a part of the name has "experts" in it.

    Args:
      entries: of a folder.
      rules: regular expressions of the whole names of layers, as for `wush_jax.plan`.
      turned: regular expressions of tensors that hold (..., K, N).
      left: regular expressions of layers that stay, with the reason.
      stacks: whether the layout holds several matrices a layer.

    >>> from pathlib import Path
    >>> entry = Entry(Path("x"), np.dtype(np.float32), (8, 64), 0, (), None)
    >>> found, kept = find_matrices({"up.weight": entry, "wte.weight": entry}, Recipe())
    >>> [m.name for m in found], kept
    (['up'], {'wte.weight': 'an embedding'})
    """
    book, found, kept = RuleBook(rules), [], {}
    for tensor, entry in entries.items():
        name = tensor.removesuffix(".weight")
        back = any(re.fullmatch(pattern, tensor) for pattern in turned)
        shape = (*entry.shape[:-2], *entry.shape[:-3:-1]) if back else entry.shape
        recipe = book.match(name)
        reason = _not_a_matrix(tensor, entry, stacks) or next(
            (why for pattern, why in left.items() if re.fullmatch(pattern, name)), None
        )
        if reason is None and recipe is None:
            reason = "a rule leaves it as it is, or none is for it"
        if reason is None and recipe is not None:
            recipe = recipe.fitted(shape[-1])
            reason = _misfit(recipe, shape[-1])
            if reason is None:
                found.append(Matrix(name, tensor, shape, back, recipe))
        if reason is not None:
            kept[tensor] = reason
    return found, kept


def _not_a_matrix(tensor: str, entry: Entry, stacks: bool) -> str | None:
    axes = len(entry.shape)
    experts = "experts" in tensor
    if axes < 2:
        return "no matrix: one axis, or none"
    if 0 in entry.shape:
        return "empty"
    if entry.dtype not in [np.dtype(kind) for kind in FLOATS]:
        return f"its values are {entry.dtype.name}"
    if axes == 3 and experts:
        return None if stacks else "a stack of matrices, for which the layout has no room"
    if axes > 2:
        return f"no matrix: {axes} axes, a convolution, say"
    return None if tensor.endswith(".weight") else "no weight of a layer by its name"


def _misfit(recipe: Recipe, k: int) -> str | None:
    formats = [fmt for fmt in (recipe.format, recipe.input_format) if fmt is not None]
    for fmt in formats:
        if not fmt.holds(k):
            return f"groups of {fmt.group_size} ({fmt.name}) do not tile K = {k}"
    if recipe.transform != "identity" and k % recipe.block:
        return f"blocks of {recipe.block} do not tile K = {k}"
    return None


def check_orientation(matrices: Sequence[Matrix], config: Mapping[str, Any]) -> None:
    """Refuse matrices that, by the model's width, lie the other way round than they are taken.

    Some files hold (K, N), such as GPT-2's and stacks of gpt-oss. Rounded along N they would lose
    more than along K, and readers would not find them.

    Raises:
      ValueError: names of such tensors, and what to say.
    """
    texts = config.get("text_config")
    width = (texts if isinstance(texts, dict) else config).get("hidden_size", config.get("n_embd"))
    wrong = []
    for matrix in matrices:
        *_, n, k = matrix.shape
        last = matrix.name.rpartition(".")[2]
        reads = READERS.fullmatch(last) and k != width and n == width
        writes = WRITERS.fullmatch(last) and n != width and k == width
        if reads or writes:
            wrong.append(f"{matrix.tensor} as N, K = {n}, {k}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} matrices lie the other way round, by the model's width {width}: "
            f"{some(wrong)}. Name tensors that hold (K, N) with turned=[...] (--turned), regular "
            "expressions of their whole names; [''] takes all as they are. Or leave them out by a "
            "rule (--skip)"
        )


def elements(matrix: Matrix) -> int:
    """Return the number of a matrix's values."""
    return math.prod(matrix.shape)
