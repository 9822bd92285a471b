"""What a model's layers and variables are called in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from wush_jax.layers.nnx import Packed, dotted
from wush_jax.models import Llama
from wush_jax.models.hugging_face import tensor_name

# Of packed weights without a model.
WEIGHTS = "weights"


def naming(model: Any) -> str:
    """Return whose names files have: "hugging_face" for a `Llama`, else "nnx"; or `WEIGHTS`."""
    if isinstance(model, Mapping):
        return WEIGHTS
    return "hugging_face" if isinstance(model, Llama) else "nnx"


def layer_name(model: nnx.Module, path: str) -> str:
    """Return the name in files of the layer at a dotted path."""
    if not isinstance(model, Llama):
        return path
    return tensor_name((path, "kernel")).removesuffix(".weight")


def plain_variables(model: nnx.Module) -> dict[str, tuple[tuple, nnx.Variable, bool]]:
    """Return what is not quantized, by name: path, variable, whether files hold its transpose.

    Random state (of dropout) and what calls have sown are left out. An array that is a module's
    attribute without a variable is given as it is.

    >>> sorted(plain_variables(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    llama = isinstance(model, Llama)
    found: dict[str, tuple[tuple, nnx.Variable, bool]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, (Packed, nnx.RngState, nnx.Intermediate)):
            name = tensor_name(path) if llama else dotted(path)
            add(found, {name: (path, variable, llama and path[-1] == "kernel")})
    return found


def plain_tensors(model: nnx.Module) -> dict[str, Any]:
    """Return the values of `plain_variables` as files hold them.

    Raises:
      ValueError: a variable that is no array.
    """
    tensors = {}
    for name, (_, variable, turned) in plain_variables(model).items():
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if not isinstance(value, (jax.Array, np.ndarray)):
            raise ValueError(f"{name} holds a {type(value).__name__}; only arrays can be saved")
        # On the host, where a transpose costs nothing.
        tensors[name] = np.asarray(value).mT if turned else value
    return tensors


def add(tensors: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Add named things to others; ValueError where a name is taken."""
    for name in new:
        if name in tensors:
            raise ValueError(f"two tensors of the model are called {name!r}; rename a module")
    tensors.update(new)
