"""Distillation of the original model into its quantized twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import Net, codes, rows

import wush_jax as wush
from wush_jax.layers.distill import distill, divergence, recover
from wush_jax.layers.nnx import QuantizedDense

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

BATCHES = rows(2)


@pytest.fixture(scope="module")
def pair():
    net = Net()
    return net, wush.quantize_model(net, BATCHES, wush.Recipe())[0]


def test_divergence_is_that_of_two_coins():
    q, p = jnp.log(jnp.float32([0.75, 0.25])), jnp.log(jnp.float32([0.5, 0.5]))
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert float(divergence(q, p)) == pytest.approx(expected, rel=1e-6)  # float32
    assert float(divergence(q + 3, p - 2)) == pytest.approx(expected, rel=1e-5)  # logits shift


def test_recovered_models_are_nearer_and_packed(pair):
    net, quantized = pair
    before = codes(quantized)
    seen = []
    better, losses = recover(
        quantized, net, [BATCHES[0]] * 12, rate=3e-3, progress=lambda *a: seen.append(a)
    )
    assert losses[-1] < 0.8 * losses[0]
    assert seen[-1] == (12, 12, "distill")
    assert type(better.left) is QuantizedDense
    exact = net(BATCHES[0])
    found = [float(divergence(m(BATCHES[0]), exact)) for m in (quantized, better)]
    assert found[0] == pytest.approx(losses[0], rel=0.05)  # latent weights: a code here and there
    assert found[1] < 0.9 * found[0]
    for path, code in codes(quantized).items():
        np.testing.assert_array_equal(code, before[path])


def test_mistakes_are_named(pair):
    net, quantized = pair
    with pytest.raises(ValueError, match="0 batches at rate=3e-05"):
        recover(quantized, net, [])
    with pytest.raises(ValueError, match=r"rate=-1"):
        distill(net, net, BATCHES, rate=-1)
    with pytest.raises(ValueError, match=r"step 1 has a divergence of nan"):
        distill(quantized, net, [jnp.full_like(BATCHES[0], jnp.nan)])
    assert jax.tree.leaves(nnx.state(net, nnx.Param))
