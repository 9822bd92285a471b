"""Gated layers, ``silu(first) * second``: the value, gradients, mistakes, models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import two_programs
from flax import nnx

import wush_jax as wush
from wush_jax.layers.linear import gated_dot
from wush_jax.layers.nnx import dense_layers
from wush_jax.layers.siblings import call_gated
from wush_jax.layers.swap import swap
from wush_jax.solvers.site import quantize_site

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

X = jnp.sin(jnp.arange(5.0 * 64)).reshape(5, 64)
MOMENT = jnp.diag(jnp.repeat(jnp.array([2.0, 1.0]), 32))


@functools.cache
def pair(outputs=(24, 24)):
    """The packed weights of one site."""
    weights = [jax.random.normal(jax.random.key(i), (n, 64)) / 8 for i, n in enumerate(outputs)]
    return tuple(quantize_site(weights, MOMENT, wush.Recipe(solver="rtn")))


def expression(x, gate, up):
    first, second = (np.asarray(wush.quantized_dot(x, w), np.float64) for w in (gate, up))
    return first / (1 + np.exp(-first)) * second


def test_value_is_the_expression():
    y = jax.jit(gated_dot)(X, *pair())
    expected = expression(X, *pair())
    # Float32 sums of K products, twice: some sqrt(K) roundings.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_under_vmap():
    stack = jnp.stack([X, 2 * X])
    y = jax.jit(jax.vmap(lambda x: gated_dot(x, *pair())))(stack)
    for found, x in zip(y, stack, strict=True):
        expected = expression(x, *pair())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_gradient_is_that_of_the_expression():
    def apart(x, pair):
        gate, up = wush.quantized_dot(x, pair)
        return jnp.sum(jax.nn.silu(gate) * up * jnp.arange(24.0))

    def together(x, pair):
        return jnp.sum(gated_dot(x, *pair) * jnp.arange(24.0))

    found, expected = (jax.jit(jax.grad(f))(X, pair()) for f in (together, apart))
    # Another order of float32 sums.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * jnp.abs(expected).max())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"gated takes two weights of one shape, not \[\(24, 64"):
        gated_dot(X, *pair((24, 16)))
    with pytest.raises(ValueError, match="must be K=64"):
        gated_dot(X[:, :32], *pair())


def layers(dtype=jnp.float32, **kinds):
    sizes = {"in_features": 64, "out_features": 24, "dtype": dtype, "param_dtype": dtype}
    return nnx.List([nnx.Linear(**sizes, **kinds, rngs=nnx.Rngs(i)) for i in range(2)])


def quantized(model, *, share=True):
    dense, _ = dense_layers(model)
    weights = [d.weight for d in dense.values()]
    sites = [weights] if share else [[w] for w in weights]
    packed = [p for s in sites for p in quantize_site(s, MOMENT, wush.Recipe(solver="rtn"))]
    return swap(model, dense, dict(zip(dense, packed, strict=True)))


@pytest.mark.parametrize(
    ("make", "one"),
    [
        (lambda: layers(use_bias=False), False),
        (lambda: quantized(layers(use_bias=False)), True),
        (lambda: quantized(layers(use_bias=False, dtype=jnp.bfloat16)), True),
        (lambda: quantized(layers(use_bias=False), share=False), False),
        (lambda: quantized(layers(use_bias=True)), False),
    ],
    ids=["floats", "one site", "bfloat16", "two sites", "biases"],
)
def test_layers_called_together(make, one):
    """In one call where the layers are of one site and add nothing to their products."""
    model = make()

    def apart(model, x):
        gate, up = (layer(x) for layer in model)
        return (jax.nn.silu(jnp.float32(gate)) * jnp.float32(up)).astype(gate.dtype)

    for x in (X, X.reshape(1, 5, 64)):
        y = nnx.jit(lambda m, x: call_gated(*m, x))(model, x)
        two_programs(y, nnx.jit(apart)(model, x))
    assert ("name=_gated" in str(jax.make_jaxpr(lambda x: call_gated(*model, x))(X))) == one
