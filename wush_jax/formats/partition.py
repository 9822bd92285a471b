"""How a packed matrix (N, K) is divided over the devices of a mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Partition:
    """A matrix (N, K) in equal parts over one axis of a mesh: static and hashable.

    By rows each device has some outputs, and nothing is exchanged; by columns each has some inputs,
    and products are summed over the axis. Block transforms are divided with the columns: no block
    is on two devices.

    Attributes:
      mesh: of the devices.
      axis: its axis that the matrix is divided over.
      split: "rows" (N) or "columns" (K).
      data: its axis that the tokens are divided over, where their number allows; None for none.

    Raises:
      ValueError: axes that the mesh lacks, or another split.

    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> Partition(mesh, "model", "rows").parts
    1
    """

    mesh: Mesh
    axis: str
    split: Literal["rows", "columns"]
    data: str | None = None

    def __post_init__(self):
        for name in (self.axis, self.data):
            if name is not None and name not in self.mesh.axis_names:
                raise ValueError(f"{name!r} is none of the mesh's axes {self.mesh.axis_names}")
        if self.split not in ("rows", "columns"):
            raise ValueError(f"split={self.split!r} is unknown; choose 'rows' or 'columns'")

    @property
    def parts(self) -> int:
        """Devices along the axis."""
        return self.mesh.shape[self.axis]

    @property
    def by_columns(self) -> bool:
        """Whether K is divided."""
        return self.split == "columns"

    def check(self, shape: tuple[int, int], rows: int, columns: int) -> None:
        """Raise ValueError unless the parts are whole multiples of what must not be cut.

        Args:
          shape: (N, K).
          rows: N of a part must be a multiple of it.
          columns: K of a part must be a multiple of it.
        """
        n, k = shape
        size, unit, name = (k, columns, "K") if self.by_columns else (n, rows, "N")
        if size % (self.parts * unit):
            raise ValueError(
                f"{name}={size} over {self.parts} devices gives {size / self.parts:g} each, no "
                f"multiple of {unit}: use a mesh whose axis {self.axis!r} has one of "
                f"{[p for p in range(1, 65) if size % (p * unit) == 0]} devices"
            )

    def part(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of one device's part."""
        n, k = shape
        return (n, k // self.parts) if self.by_columns else (n // self.parts, k)

    def spec(self) -> PartitionSpec:
        """Return the sharding of an array whose first axes go along N and K."""
        return PartitionSpec(*((None, self.axis) if self.by_columns else (self.axis,)))

    def sharding(self) -> NamedSharding:
        """Return `spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec())


def partition_of(codes: jax.Array) -> Partition | None:
    """Return how the codes (N, ...) of a matrix lie on a mesh; None where they are not divided.

    >>> partition_of(jax.numpy.zeros((4, 4))) is None
    True
    """
    sharding = getattr(codes, "sharding", None)  # arrays of the host have none
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    spec = (*sharding.spec, None, None)[:2]
    axes = [axis for axis in spec if axis is not None and math.prod(_sizes(sharding, axis)) > 1]
    if len(axes) != 1 or not isinstance(axes[0], str):
        return None
    axis, mesh = axes[0], cast(Mesh, sharding.mesh)
    data = "data" if "data" in mesh.axis_names and axis != "data" else None
    return Partition(mesh, axis, "rows" if spec[0] == axis else "columns", data)


def _sizes(sharding: NamedSharding, axis: str | tuple[str, ...]) -> list[int]:
    return [sharding.mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis)]
