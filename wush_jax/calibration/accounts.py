"""What becomes of every parameter of a model: the counts of a plan add up to the model's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from wush_jax.layers.dense import Dense, dotted, is_array, is_node

BESIDE = "stays as it is beside the quantized weight"


@dataclass(frozen=True)
class Accounts:
    """The parameters of a model, by what a plan does with them.

    Attributes:
      counts: numbers of parameters, each counted once: of kernels that are quantized, of matrices
        that are left alone, and of all else, norms and biases.
      alone: matrices beside the quantized ones that nobody else names, by path, with the reason.
      notes: on parameters that a quantized layer had in common with others.
    """

    counts: Mapping[str, int]
    alone: Mapping[str, str]
    notes: tuple[str, ...]


def accounts(model: nnx.Module, layers: Mapping[str, Dense], chosen: Collection[str]) -> Accounts:
    """Count the parameters of a model.

    Args:
      model: an NNX module.
      layers: its dense layers by path.
      chosen: those that are quantized.

    >>> from wush_jax.layers.dense import dense_layers
    >>> model = nnx.List([nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))])
    >>> accounts(model, dense_layers(model)[0], ["0"]).counts
    {'parameters_quantized': 12, 'parameters_left_alone': 6, 'parameters_beside': 5}
    """
    holders: dict[int, list[str]] = {}
    parameters: dict[int, nnx.Variable] = {}
    for path, parameter in _parameters(model):
        holders.setdefault(id(parameter), []).append(path)
        parameters[id(parameter)] = parameter
    sizes = {"quantized": 0, "left_alone": 0, "beside": 0}
    alone: dict[str, str] = {}
    notes: list[str] = []
    for key, parameter in parameters.items():
        value, paths = parameter.get_value(), holders[key]
        mine = [path for path in paths if _owner(path, chosen) in chosen]
        kernels = [path for path in mine if _is_kernel(value, layers[_owner(path, chosen)])]
        if kernels and len(kernels) == len(paths):
            kind = "quantized"
        elif len(value.shape) > 1 and not _is_bias(parameter, mine, layers, chosen):
            kind = "left_alone"
            alone |= {path: BESIDE for path in mine if path not in kernels}
        else:
            kind = "beside"
        sizes[kind] += value.size
        if kernels and len(paths) > 1:
            others = ", ".join(path for path in paths if path != kernels[0])
            notes.append(
                f"{kernels[0]} is one parameter with {others}; quantized, each layer has its own"
            )
    return Accounts({f"parameters_{k}": n for k, n in sizes.items()}, alone, tuple(notes))


def _parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Every place of every parameter: one that is tied has several."""
    for path, module in nnx.iter_graph(model):
        if not isinstance(module, nnx.Pytree):
            continue
        for name, value in vars(module).items():
            leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=is_node)
            for inner, leaf in leaves if name[:1] != "_" or isinstance(value, nnx.Variable) else ():
                if isinstance(leaf, nnx.Param) and is_array(leaf.get_value()):
                    inside = (getattr(key, "key", getattr(key, "idx", "")) for key in inner)
                    yield dotted((*path, name, *inside)), leaf


def _owner(path: str, chosen: Collection[str]) -> str:
    """Return the quantized layer that a parameter is in, or what is none."""
    parts = path.split(".")
    heads = (".".join(parts[:i]) for i in range(len(parts)))
    return next((head for head in heads if head in chosen), "no layer")


def _is_kernel(value: Any, layer: Dense) -> bool:
    return value is layer.kernel or value is layer.source


def _is_bias(parameter: nnx.Variable, mine: list[str], layers: Mapping, chosen: Collection) -> bool:
    owners = (layers[_owner(path, chosen)] for path in mine)
    return any(layer.bias is not None and layer.bias is parameter for layer in owners)
