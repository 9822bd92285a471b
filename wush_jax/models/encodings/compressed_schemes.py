"""The schemes that a config of compressed-tensors names: what its layers are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wush_jax.models.encodings.encoded import (
    BLOCK,
    Headers,
    checked,
    is_block,
    tensor_faults,
)
from wush_jax.models.typed_values import TypedValues
from wush_jax.storage.tensor_folder import TensorFolder

METHOD = "compressed-tensors"
# What does not change the values of weights. Caches stay as they are here.
FREE = (
    *("quant_method", "format", "version", "quantization_status", "ignore", "kv_cache_scheme"),
    *("global_compression_ratio", "config_groups"),
)
STRATEGIES = ("tensor", "channel", "group", "block")
# Of activations and caches.
SKIPPED = (
    *(".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point"),
    *(".k_scale", ".v_scale", ".q_scale"),
)


@dataclass(frozen=True)
class Scheme:
    """What one of the config's groups says of its layers.

    Attributes:
      element: "int4", "int8" or "e4m3".
      bits: of a code.
      strategy: what has a scale of its own: one of `STRATEGIES`.
      size: rows and columns of a block, 1 and g of a group.
      symmetric: whether there are no zero points.
      reordered: whether inputs are in groups of their own order.
      inputs: what activations are rounded to; empty for nothing.
    """

    element: str
    bits: int
    strategy: str
    size: tuple[int, int]
    symmetric: bool
    reordered: bool
    inputs: str

    def block(self, n: int, k: int) -> tuple[int, int]:
        """Return the rows and columns that share a scale, of a weight (n, k).

        >>> Scheme("int4", 4, "group", (1, 32), True, False, "").block(8, 64)
        (1, 32)
        """
        rows, columns = {"tensor": (n, k), "channel": (1, k)}.get(self.strategy, self.size)
        return max(min(rows, n), 1), max(min(columns, k), 1)

    def grids(self, n: int, k: int) -> list[tuple[int, ...]]:
        """Return the shapes that the scales of a weight (n, k) may have."""
        rows, columns = self.block(n, k)
        single: list[tuple[int, ...]] = [(1,), ()] if self.strategy == "tensor" else []
        return [(-(-n // rows), -(-k // columns)), *single]

    @property
    def fields(self) -> dict[str, Any]:
        """What an `EncodedWeight` takes over."""
        return {
            "element": self.element,
            "zero_points": not self.symmetric,
            "reordered": self.reordered,
            "inputs": self.inputs,
        }


def read_schemes(folder: TensorFolder, elements: Mapping[str, tuple[int, ...]]) -> list[Scheme]:
    """Return the schemes of a folder.

    Args:
      folder: the folder.
      elements: the bits that are read, by the type of numbers.

    Raises:
      ValueError: what makes no sense, all of it.
      NotImplementedError: what is not read, all of it.
    """
    empty: dict[str, Any] = {"sparsity_config": None, "transform_config": None}
    values = TypedValues(folder.config["quantization_config"], empty)
    for name in empty:
        found = values.table(name)
        if found and found.get("format") != "dense":
            values.lack(f"{name} = {str(found)[:60]}", "is not read in this format")
    groups = values.table("config_groups")
    if not groups:
        values.faults.append("config_groups is missing or empty")
    schemes = []
    for name, group in groups.items():
        own = TypedValues({}, {})
        schemes.append(_scheme(own, group if isinstance(group, Mapping) else {}, elements))
        values.faults += [f"config_groups {name!r}: {fault}" for fault in own.faults]
        values.lacking += [f"config_groups {name!r}: {fault}" for fault in own.lacking]
    checked(folder, values, FREE)
    return schemes


def _scheme(
    values: TypedValues, group: Mapping[str, Any], elements: Mapping[str, tuple[int, ...]]
) -> Scheme:
    """Return one scheme; what is wrong is noted in ``values``."""
    weights = group.get("weights")
    values.given = dict(weights) if isinstance(weights, Mapping) else {}
    values.defaults = {"type": "int", "symmetric": True, "actorder": None}
    if not values.given:
        values.faults.append("weights are missing")
    if group.get("output_activations") is not None:
        values.lack("output_activations", "are rounded there and not here")
    kind, bits = values.text("type"), values.size("num_bits")
    values.need("type", *elements)
    values.need("num_bits", *elements.get(kind, (8,)))
    size = values.given.get("group_size")
    strategy = values.given.get("strategy")
    if strategy is None:  # as the library infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in STRATEGIES:
        values.lack(f"strategy = {strategy!r}", f"is none of {', '.join(STRATEGIES)}")
    block: tuple[int, ...] = (1, values.size("group_size")) if strategy == "group" else (1, 1)
    if strategy == "block":
        block = values.numbers("block_structure")
    if strategy == "block" and not is_block(block):
        values.faults.append(f"block_structure = {list(block)}, expected {BLOCK}")
        block = (1, 1)
    inputs = group.get("input_activations")
    return Scheme(
        element="e4m3" if kind == "float" else f"int{bits}",
        bits=bits,
        strategy=str(strategy),
        size=(block[0], block[1]),
        symmetric=values.flag("symmetric"),
        reordered=values.given.get("actorder") in ("group", "dynamic", True),
        inputs=_words(inputs, ("type", "num_bits", "strategy")),
    )


def _words(values: Any, keys: tuple[str, ...]) -> str:
    """Return some entries of an object as words; empty where it is none."""
    found = values if isinstance(values, Mapping) else {}
    return " ".join(str(found[key])[:20] for key in keys if key in found)


def fitting(
    folder: TensorFolder, name: str, schemes: list[Scheme], headers: Callable[[Scheme], Headers]
) -> tuple[Scheme, Headers]:
    """Return the scheme whose tensors a layer has; the first where none fits, to be refused.

    Several can fit only where they mean the same.

    Raises:
      ValueError: zero points of which no scheme says anything.
    """
    zeros = f"{name}.weight_zero_point"
    fit = [s for s in schemes if not (s.symmetric and zeros in folder.entries)]
    if not fit:
        raise ValueError(
            f"{folder.path}: {zeros!r} is there, but all schemes are symmetric; write "
            "symmetric=false into config_groups of quantization_config"
        )
    found = [(scheme, headers(scheme)) for scheme in fit]
    return next((f for f in found if not tensor_faults(folder, f[1])), found[0])
