"""The end of a gated layer, ``silu(first) * second``, between the warpgroups of two weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.hopper import float8
from pallas_kernels.hopper.inlined import address
from pallas_kernels.hopper.quad import asm, const, f32, ptx, run

THREADS = 128  # of a warpgroup: where one has a value of a tile, its partner has the other's
# g / (1 + 2**(-g / ln 2)) * u; approximations of the hardware, a few units in the last place.
SWIGLU = """{
 .reg .f32 t;
 mul.rn.f32 t, $1, 0fBFB8AA3B; ex2.approx.f32 t, t; add.rn.f32 t, t, 0f3F800000;
 rcp.approx.f32 t, t; mul.rn.f32 t, t, $1; mul.rn.f32 $0, t, $2;
 }"""


def scratch(pairs: int, tokens: int, dtype) -> dict[str, Any]:
    """What an `Exchange` needs: a tile of the second product for each pair of warpgroups."""
    words = tokens // 4 * jnp.dtype(dtype).itemsize // 2
    return {
        "handed_s": plgpu.SMEM((pairs, words, THREADS), jnp.uint32),
        "handed": plgpu.Barrier(num_barriers=pairs),
        "taken": plgpu.Barrier(num_barriers=pairs),
    }


class Exchange:
    """Takes the second product, in the result's dtype, to the warpgroups that hold the first.

    Args:
      pairs: of warpgroups: i and ``pairs + i``.
      wg: this one.
      dtype: of the result.
      handed_s, handed, taken: from `scratch`.
    """

    def __init__(self, pairs: int, wg, dtype, *, handed_s, handed, taken):
        self.pairs, self.wg, self.pair = pairs, wg, lax.rem(wg, pairs)
        self.product, self.handed, self.taken = handed_s, handed, taken
        self.kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]

    def hand(self, task, product):
        """Let a second warpgroup lay its (64, tokens) down, once those before were taken."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(_, target, values):
            step, at = self._step(), self._place(target)
            for i, (a, b) in enumerate(_pairs(float8.values_of(values))):
                if self.kind == "f32":
                    run(f"st.shared.v2.f32 [$0+{step * i}], {{$1,$2}};", at, a, b)
                else:
                    word = asm(f"cvt.rn.{self.kind}x2.f32 $0,$2,$1;", 1, a, b)[0]
                    run(f"st.shared.b32 [$0+{step * i}], $1;", at, word)
            utils.warpgroup_barrier()

        @pl.when(self.wg >= self.pairs)
        def _():
            pl.when(task > 0)(lambda: plgpu.barrier_wait(self.taken.at[self.pair]))
            store(self.product.at[self.pair], product)
            plgpu.barrier_arrive(self.handed.at[self.pair])

    def combine(self, product):
        """Return ``silu(product) * second product``, float32, in a first warpgroup."""
        load = "ld.shared.v2.b32 {$0,$1}, [$2];"
        if self.kind != "f32":
            each = "".join(f" cvt.f32.{self.kind} ${i}, h{i};" for i in (0, 1))
            word = "ld.shared.b32 w, [$2]; mov.b32 {h0,h1}, w;"
            load = f"{{ .reg .b32 w; .reg .b16 h<2>; {word}{each} }}"

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA),
            return_type=float8.array_of(product.shape[1]),
        )
        def multiply(_, source, values):
            step, at, out = self._step(), self._place(source), []
            for i, pair in enumerate(_pairs(float8.values_of(values))):
                code = load.replace("[$2]", f"[$2+{step * i}]")
                second = [utils.bitcast(b, f32()) for b in asm(code, 2, at, volatile=True)]
                out += [ptx(f32(), SWIGLU, g, u) for g, u in zip(pair, second, strict=True)]
            utils.warpgroup_barrier()
            return float8.registers_of(values, out)

        plgpu.barrier_wait(self.handed.at[self.pair])
        y = multiply(self.product.at[self.pair], product)
        plgpu.barrier_arrive(self.taken.at[self.pair])
        return y

    def _step(self):
        """Bytes from all threads' pairs to the next."""
        return THREADS * (8 if self.kind == "f32" else 4)

    def _place(self, ref):
        """Where this thread's pairs start."""
        thread = arith.andi(utils.thread_idx(), const(THREADS - 1))
        return arith.addi(address(ref), arith.muli(thread, const(self._step() // THREADS)))


def _pairs(values):
    return list(zip(values[::2], values[1::2], strict=True))
