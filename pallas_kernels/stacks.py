"""Weights of many groups, experts, in the layout of the matmul kernels: one array of records.

`Stack` is for the ragged product what `fragments.Fragments` is for one weight.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import fragments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """Packed weights (G, N, K) in the layout of the matmul kernels: a pytree.

    ``value = unit * expanded / global_scale``, group by group. Under ``shard_map`` G is what a
    device has.

    Attributes:
      records: uint32 (G, ceil(N/64), ceil(K/128), lines, 64).
      unit: float32 (G,).
      global_scale: float32 (G,), or a scalar for all; divides.
      format: the number format; static.
      matrix: (N, K); static.
      operand: as of `fragments.Fragments`; static.
    """

    records: jax.Array
    unit: jax.Array
    global_scale: jax.Array
    format: Any = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    operand: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, N, K)."""
        return self.records.shape[0], *self.matrix

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of 64 rows, steps of 128 columns, of each weight."""
        return self.records.shape[1], self.records.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.records.nbytes + self.unit.nbytes + self.global_scale.nbytes

    @property
    def interchange(self) -> tuple[jax.Array, jax.Array]:
        """Packed codes (G, N, K/2) and scales (G, N, K/g) of equal value."""

        def one(records, unit):
            return fragments.to_interchange(records, unit, self.format, self.matrix, self.operand)

        return jax.vmap(one)(self.records, self.unit)


def lay_out(weight, operand: str = "bfloat16") -> Stack:
    """Return quantized weights (an object with codes, scales, ...) in the kernels' layout.

    Args:
      weight: codes (G, N, K/2) and scales; one global scale, or one a group.
      operand: what the kernels expand it to, see `fragments.Fragments`.

    Raises:
      NotImplementedError: no kernel for its format, or no stack of matrices.
    """
    if len(weight.shape) != 3:
        raise NotImplementedError(f"a stack is (G, N, K), not {tuple(weight.shape)}")
    fragments.carrier(weight.format, operand)
    records, unit = _from_interchange(weight.codes, weight.scales, weight.format, operand)
    matrix = tuple(weight.shape[1:])
    return Stack(records, unit, weight.global_scale, weight.format, matrix, operand)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _from_interchange(codes, scales, fmt, operand):
    # One after another: on the way a code is a word.
    def one(parts):
        records, unit = fragments.from_interchange(parts[0], parts[1], fmt, operand)
        return records, jnp.asarray(unit, jnp.float32)

    return jax.lax.map(one, (codes, scales))


def check(weights) -> None:
    """Raise NotImplementedError, with the remedy, for weights the ragged kernel cannot read."""
    if not all(isinstance(weight, Stack) for weight in weights):
        raise NotImplementedError(
            "the weights are in the interchange layout: `pallas_kernels.stacks.lay_out` them once"
        )
