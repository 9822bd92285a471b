"""Our own work on meshes with explicit axes, where every operation has to name shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_mesh(*trees: Any) -> Any:
    """Return the mesh with explicit axes that an array of some is on; None where none is."""
    for leaf in jax.tree.leaves(trees):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh if isinstance(leaf, jax.core.Tracer) else leaf.sharding.mesh
    return None


def is_explicit(*trees: Any) -> bool:
    """Whether an array of some is on a mesh with explicit axes."""
    return explicit_mesh(*trees) is not None


def _placed(spec: PartitionSpec, mesh: Any) -> Any:
    """Return a spec as jax takes it: with its mesh, where no ``jax.set_mesh`` says which."""
    return NamedSharding(mesh, spec) if jax.sharding.get_abstract_mesh().empty else spec


def automatic(function: Callable, *arguments: Any, spec: PartitionSpec | None = None) -> Any:
    """Return ``function(*arguments)``; on explicit axes the compiler chooses shardings inside.

    Args:
      function: of arrays.
      arguments: its own.
      spec: of all results, on explicit axes; None leaves them on every device.
    """
    mesh = explicit_mesh(*arguments)
    if mesh is None:
        return function(*arguments)
    out = _placed(spec or PartitionSpec(), mesh)
    return jax.sharding.auto_axes(function, out_sharding=out)(*arguments)


def whole(x: Any) -> Any:
    """Return arrays on every device of their explicit mesh; as they are on others."""

    def gathered(leaf: Any) -> Any:
        mesh = explicit_mesh(leaf)
        return leaf if mesh is None else jax.sharding.reshard(leaf, _placed(PartitionSpec(), mesh))

    return jax.tree.map(gathered, x)


def shapes_of(tree: Any) -> Any:
    """Return shapes and dtypes alone."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
