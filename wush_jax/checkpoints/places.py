"""Where the tensors of a checkpoint go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from wush_jax.formats.checks import check_kind
from wush_jax.models import Llama
from wush_jax.models.placement import compiled_mesh

#: What `wush_jax.load` takes.
Placement = Mesh | Sharding | Callable[[str], Sharding | None] | None


def checked(sharding: Any, model: nnx.Module | None) -> Placement:
    """Return a placement that fits a model; our decoder's mesh has axes of type Auto.

    Raises:
      ValueError: what is no placement, or a mesh without an axis "model".
    """
    known = (Mesh, Sharding, Callable, type(None))
    check_kind(known, "a mesh, a sharding, a function or None", sharding=sharding)
    if not isinstance(sharding, Mesh):
        return sharding
    if "model" not in sharding.axis_names:
        raise ValueError(f"sharding={sharding} has no axis called 'model'; name one so")
    return compiled_mesh(sharding) if model is None or isinstance(model, Llama) else sharding


def place_on(sharding: Placement, name: str, value: np.ndarray) -> jax.Array:
    """Put a tensor where its name in the native layout says."""
    if isinstance(sharding, Mesh):
        return jax.device_put(value, _by_rows(sharding, name, value))
    chosen = sharding(name) if callable(sharding) else sharding
    return jax.device_put(value, chosen)


def _by_rows(mesh: Mesh, name: str, value: np.ndarray) -> Sharding:
    packed = name.endswith((".e2m1", ".codes", ".scale_quant"))
    split = packed and value.shape[0] % mesh.shape["model"] == 0
    return NamedSharding(mesh, PartitionSpec("model") if split else PartitionSpec())
