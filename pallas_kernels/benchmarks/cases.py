"""The shapes that tests and benchmarks share: inputs of Llama-3.1-8B's linear layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `transform_quantize`.

    Attributes:
      rows: M, tokens.
      width: K: 4096 into q, k, v, o, gate and up; 14336 into down.
      block: d.
      shared: one transform for all blocks.
      dtype: of values and transforms.
    """

    rows: int
    width: int = 4096
    block: int = 32
    shared: bool = False
    dtype: str = "bfloat16"

    def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        """Return random x (M, K), its rows six octaves apart up and down, and transforms."""
        keys = jax.random.split(jax.random.key(seed), 3)
        octaves = jax.random.randint(keys[0], (self.rows, 1), -6, 7)
        x = jax.random.normal(keys[1], (self.rows, self.width)) * jnp.exp2(octaves)
        blocks = () if self.shared else (self.width // self.block,)
        t = jax.random.normal(keys[2], (*blocks, self.block, self.block)) / self.block**0.5
        return x.astype(self.dtype), t.astype(self.dtype)

    def bytes_moved(self, fmt) -> int:
        """Return the least traffic: x, transforms, codes and scales once each."""
        item = jnp.dtype(self.dtype).itemsize
        transforms = self.block**2 if self.shared else self.width * self.block
        values = self.rows * self.width
        return int(values * (item + fmt.bits_per_value / 8) + transforms * item)


DECODE = (Case(1), Case(16), Case(16, 14336))
PREFILL = (Case(1024), Case(4096, 14336), Case(16384))
OTHERS = (Case(16384, shared=True), Case(16384, block=64), Case(16384, block=128))
BENCH = (*DECODE, *PREFILL, *OTHERS)
