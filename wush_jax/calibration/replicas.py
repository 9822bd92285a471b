"""Work on arrays that every device holds: one device does it.

Replicated, each device would do the same; on a host's simulated devices that takes as many times as
long, and the XLA of jax 0.10 was seen to hang in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def on_one_device(function: Callable[..., Any], *trees: Any, **options: Any) -> Any:
    """Return ``function(*trees, **options)``, by one device where others hold nothing else.

    Args:
      function: of pytrees, returning one.
      *trees: its arguments. If an array is sharded, or of another process too, or none is on
        several devices of a mesh, the function is called as it is.
      **options: no arrays.

    Returns:
      What the function does; if some argument was replicated over a mesh, so are all arrays in it.
      An array that is there twice stays one.

    >>> import jax.numpy as jnp
    >>> everywhere = NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), PartitionSpec())
    >>> x = jax.device_put(jnp.ones(4), everywhere)
    >>> on_one_device(lambda x: 2 * x, x).sharding == everywhere or jax.device_count() == 1
    True
    """
    trees = jax.tree.map(_gathered, trees)
    arrays = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
    wide = [x for x in arrays if len(x.sharding.device_set) > 1]
    meshes = [x.sharding.mesh for x in wide if isinstance(x.sharding, NamedSharding)]
    whole = all(x.is_fully_replicated and x.is_fully_addressable for x in arrays)
    if not wide or not whole or len(meshes) < len(wide):
        return function(*trees, **options)
    (device,) = wide[0].addressable_data(0).devices()

    def first(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.device_put(leaf.addressable_data(0), device)

    # Not in the caller's mesh, which has more devices than this one.
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):
        found = function(*jax.tree.map(first, trees), **options)
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    placed: dict[int, jax.Array] = {}

    def spread(leaf: Any) -> Any:
        if id(leaf) not in placed:
            placed[id(leaf)] = jax.device_put(leaf, everywhere)
        return placed[id(leaf)]

    return jax.tree.map(spread, found)


def _gathered(leaf: Any) -> Any:
    """Bring an array on explicit axes together: our reductions name no sharding."""
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return leaf
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
