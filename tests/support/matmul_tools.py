"""Operands of the matmul kernels, and what they stand for in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import wush_jax as wush
from pallas_kernels import fragments


def values(kind, shape, seed):
    """Gaussian; with columns a hundred times larger; or all positive."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape)
    if kind == "outliers":
        x[:, random.integers(shape[1], size=max(1, shape[1] // 100))] *= 100
    return jnp.asarray(np.abs(x) if kind == "one sign" else x, jnp.float32)


@functools.cache
def weight_of(kind, k, n, fmt, operand="bfloat16"):
    """A quantized weight, its records, and its values in float64."""
    q = jax.jit(wush.quantize, static_argnums=1)(values(kind, (n, k), 1), fmt)
    return fragments.lay_out(q, operand), exact(q)


def exact(q):
    """The values of codes in float64; one division by the global scale."""
    every = np.arange(2**q.format.element.bits, dtype=np.uint8)
    grid = np.asarray(q.format.element.decode(every), np.float64)
    scale = np.asarray(q.format.load_scales(q.scales), np.float64)
    scale = np.repeat(scale, q.format.group_size, 1)[:, : q.shape[1]]
    return grid[np.asarray(q.format.unpack(q.codes))] * scale / np.float64(q.global_scale)


def transformed(m, k, block):
    """Gaussian x (M, K) and random transforms, bfloat16."""
    t = values("gaussian", (k, block), 3).reshape(k // block, block, block) / block**0.5
    return values("gaussian", (m, k), 2).astype(jnp.bfloat16), t.astype(jnp.bfloat16)
