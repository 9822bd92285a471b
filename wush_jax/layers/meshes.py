"""Our own work on meshes with explicit axes, where every operation has to name shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def is_explicit(*trees: Any) -> bool:
    """Whether an array of some is on a mesh with explicit axes."""
    for leaf in jax.tree.leaves(trees):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return True
    return False


def automatic(function: Callable, *arguments: Any, spec: PartitionSpec | None = None) -> Any:
    """Return ``function(*arguments)``; on explicit axes the compiler chooses shardings inside.

    Args:
      function: of arrays.
      arguments: its own.
      spec: of all results, on explicit axes; None leaves them on every device.
    """
    if not is_explicit(*arguments):
        return function(*arguments)
    chosen = jax.sharding.auto_axes(function, out_sharding=spec or PartitionSpec())
    return chosen(*arguments)


def whole(x: Any) -> Any:
    """Return arrays on every device of their explicit mesh; as they are on others."""
    return jax.tree.map(
        lambda leaf: jax.sharding.reshard(leaf, PartitionSpec()) if is_explicit(leaf) else leaf, x
    )


def shapes_of(tree: Any) -> Any:
    """Return shapes and dtypes alone."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
