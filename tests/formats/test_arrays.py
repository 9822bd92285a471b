"""Quantized arrays as pytrees, under vmap and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_cases import (
    dequantize,
    few_formats,
    quantize,
    round_trip,
    samples,
)

import wush_jax as wush

pytestmark = pytest.mark.usefixtures("strict")


@few_formats
def test_vmap_is_a_tensor_at_a_time(fmt, bound):
    x = samples((2, 3, 32))
    mapped = jax.jit(jax.vmap(lambda v: wush.quantize(v, fmt)))(x)
    # One global scale per leading index reaches its own slice.
    assert mapped.global_scale.shape == (2,)
    np.testing.assert_array_equal(dequantize(mapped), [round_trip(v, fmt) for v in x])


def test_quantized_array_is_a_pytree():
    x = samples((2, 3, 32))
    q = quantize(x, wush.MXFP4)
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 3
    back = jax.tree.unflatten(tree, leaves)
    assert back.format is wush.MXFP4
    assert jax.tree.structure(jax.eval_shape(lambda: q)) == tree
    assert jax.eval_shape(lambda v: wush.quantize(v, wush.MXFP4), x).shape == x.shape
    assert hash(wush.MXFP4) == hash(wush.MXFP4.replace())

    def step(total, one):
        return total + wush.dequantize(one), None

    stacked = dataclasses.replace(q, global_scale=jnp.full(2, 3.0))
    total, _ = jax.lax.scan(step, jnp.zeros((3, 32)), stacked)
    np.testing.assert_allclose(total, dequantize(q).sum(0), rtol=1e-6, atol=1e-6)  # two addends


@few_formats
def test_fake_quantize_passes_gradients_straight_through(fmt, bound):
    x = jnp.asarray(samples())
    tangent = jnp.asarray(samples(seed=1))

    @jax.jit
    def both_ways(v, t):
        out, pull = jax.vjp(lambda u: wush.fake_quantize(u, fmt), v)
        return out, pull(t)[0], jax.jvp(lambda u: wush.fake_quantize(u, fmt), (v,), (t,))[1]

    out, back, forth = both_ways(x, tangent)
    np.testing.assert_array_equal(out, round_trip(samples(), fmt))
    np.testing.assert_array_equal(back, tangent)
    np.testing.assert_array_equal(forth, tangent)
