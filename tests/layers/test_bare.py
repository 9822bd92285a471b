"""Weights without a dense layer: found, quantized, saved and trained as if they had one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import wush_jax as wush
from wush_jax.layers.bare import expose_matrices
from wush_jax.layers.finetune import unpack
from wush_jax.layers.nnx import QuantizedDense, dense_layers

E, K, N, M = 4, 32, 48, 40
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)


def weights(*shape):
    return nnx.Param(jnp.asarray(RNG.standard_normal(shape) / K**0.5, jnp.float32))


class Experts(nnx.Module):
    """Rows are sent to experts by a router and sorted; gate, up and down are bare parameters."""

    def __init__(self):
        self.router = nnx.Linear(K, E, use_bias=False, rngs=nnx.Rngs(0))
        self.gate, self.up = weights(E, K, N), weights(E, K, N)
        self.down = weights(E, K, N)  # transposed by the call

    def __call__(self, x):
        expert = jnp.argmax(self.router(x), -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=E).astype(jnp.int32)
        rows = x[order]
        gate = lax.ragged_dot(rows, self.gate[...], sizes)
        mixed = jax.nn.silu(gate) * lax.ragged_dot(rows, self.up[...], sizes)
        y = lax.ragged_dot(mixed, self.down[...].swapaxes(1, 2), sizes)
        return jnp.zeros_like(x).at[order].set(y)


class Einsums(nnx.Module):
    """Every expert sees every row."""

    def __init__(self):
        self.up, self.down = weights(E, K, N), weights(E, N, K)

    @nnx.jit
    def __call__(self, x):
        h = jnp.einsum("mk,ekn->emn", x, self.up[...])
        return jnp.einsum("emn,enk->emk", jax.nn.gelu(h), self.down[...]).mean(0)


class Batched(nnx.Module):
    """Experts with a capacity: each reads rows of its own."""

    def __init__(self):
        self.up, self.down = weights(E, K, N), weights(K, E, N)

    def __call__(self, x):
        h = jnp.einsum("eck,ekn->ecn", x.reshape(E, M // E, K), self.up[...])
        return jnp.einsum("ecn,ken->cek", jax.nn.gelu(h), self.down[...]).reshape(M, K)


class Loop(nnx.Module):
    """One expert after another; a matrix of one's own; state that a call changes."""

    def __init__(self):
        self.up, self.down, self.out = weights(E, K, N), weights(E, N, K), weights(K, K)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.table = weights(7, K)  # only looked up

    def __call__(self, x, *, scale: float = 1.0):
        self.calls[...] += 1
        y = sum(jax.nn.gelu(x @ self.up[e]) @ self.down[e] for e in range(E))
        return scale * y @ self.out[...].T + self.table[jnp.arange(M) % 7]


KINDS = {
    Experts: ["router", "gate", "up", "down"],
    Einsums: ["up", "down"],
    Batched: ["up", "down"],
    Loop: ["up", "down", "out"],
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def model(request):
    return request.param()


def test_the_exposed_model_computes_the_same(model):
    exposed = expose_matrices(model, X)
    assert sorted(dense_layers(exposed)[0]) == sorted(KINDS[type(model)])
    assert isinstance(exposed, type(model))
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(run(exposed, X), run(model, X))
    # What a module compiles inside of its call is not compiled by itself: other fusions.
    np.testing.assert_allclose(exposed(X), model(X), rtol=1e-5, atol=1e-6)


def relative(found, wanted):
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def test_quantized_products_are_those_of_the_dequantized_weights(model):
    """With unquantized activations, to float32 sums; the transform moves both sides."""
    exposed = expose_matrices(model, X)
    recipe = wush.Recipe(wush.NVINT4, None, transform="wush", solver="rtn", block_size=16)
    quantized, report = wush.quantize_model(exposed, [X], recipe)
    assert sorted(row.name.removesuffix(" *") for row in report.layers) == sorted(
        KINDS[type(model)]
    )
    plain = type(model)()
    for name in KINDS[type(model)]:
        layer = getattr(quantized, name)
        assert isinstance(layer, QuantizedDense)
        value = layer.kernel.get_value()
        holder = getattr(plain, name)
        (holder.kernel if isinstance(holder, nnx.Module) else holder).set_value(value)
    if hasattr(model, "table"):
        plain.table.set_value(model.table[...])
    run = nnx.jit(lambda model, x: model(x))
    assert relative(run(quantized, X), run(plain, X)) < 1e-5
    assert relative(run(plain, X), run(model, X)) < 0.3


@pytest.mark.parametrize("kind", [Experts, Loop])
def test_saved_loaded_trained_and_differentiated(kind, tmp_path):
    exposed = expose_matrices(kind(), X)
    recipe = wush.Recipe(transform="hadamard", solver="rtn", block_size=16, format=wush.NVINT4)
    quantized, _ = wush.quantize_model(exposed, [X], recipe)
    run = nnx.jit(lambda model, x: model(x))
    y = run(quantized, X)
    wush.save(tmp_path / "m", quantized)
    loaded = wush.load(tmp_path / "m", expose_matrices(kind(), X))
    np.testing.assert_array_equal(run(loaded, X), y)
    student = unpack(quantized, exposed)

    def loss(model):
        y = model(X)
        return (y**2).mean(), y

    gradient, same = nnx.jit(nnx.grad(loss, has_aux=True))(student)
    assert relative(same, y) < 1e-5  # sums in another order
    largest = {p[0]: float(jnp.abs(g[...]).max()) for p, g in nnx.to_flat_state(gradient)}
    assert all(largest[name] > 0 for name in KINDS[kind] if name != "router")
    gradient = jax.jit(jax.grad(lambda x: (nnx.clone(quantized)(x) ** 2).sum()))(X)
    assert np.isfinite(gradient).all()
    assert float(jnp.abs(gradient).max()) > 0


def test_a_call_changes_the_state_that_it_changed():
    model = Loop()
    exposed = expose_matrices(model, X)
    assert int(model.calls[...]) == int(exposed.calls[...]) == 0
    run = nnx.jit(lambda model, x: model(x, scale=2.0))
    np.testing.assert_array_equal(run(exposed, X), run(model, X))
    exposed(X)
    assert int(exposed.calls[...]) == 2
