"""Training of quantized weights, and of what stands beside them."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import power_of_error
from flax import nnx
from tiny import Block, Net, codes, rows
from weights import normal

import wush_jax as wush
from wush_jax.layers.finetune import LatentDense, pack, unpack
from wush_jax.layers.nnx import Packed, QuantizedDense

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

RECIPE = wush.Recipe(solver="rtn")
BATCHES = rows(2)
run = nnx.jit(lambda model, x: model(x))


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture(scope="module")
def quantized(net):
    return wush.quantize_model(net, BATCHES, RECIPE)[0]


@nnx.jit
def step(student, optimizer, teacher, x):
    def loss(student):
        return jnp.mean((student(x) - teacher(x)) ** 2)

    value, gradient = nnx.value_and_grad(loss)(student)
    optimizer.update(student, gradient)
    return value


def train(student, teacher, x, steps=20):
    optimizer = nnx.Optimizer(student, optax.adam(3e-3), wrt=nnx.Param)
    return [float(step(student, optimizer, teacher, x)) for _ in range(steps)]


def test_unpacked_weights_compute_what_packed_ones_do(net, quantized):
    student = unpack(quantized, net)
    assert type(student.left) is LatentDense
    assert student.left.twin.transform is student.right.twin.transform
    # V = W T^-1 by a float32 inverse of the rounded transform: a code here and there is the next
    again = codes(pack(student))
    for path, expected in codes(quantized).items():
        assert np.mean(again[path] != expected) < 0.01
    y, expected = run(student, BATCHES[0]), run(quantized, BATCHES[0])
    assert power_of_error(y, expected) < 1e-3


def test_trained_weights_are_better_after_packing(net, quantized):
    before = codes(quantized)
    student = unpack(quantized, net)
    losses = train(student, net, BATCHES[0])
    assert losses[-1] < 0.7 * losses[0]
    packed = pack(student)
    assert type(packed.left) is type(packed.twice) is QuantizedDense
    assert not [p for p, _ in nnx.to_flat_state(nnx.state(packed)) if "latent" in p]
    # packing rounds as training did
    y, expected = run(packed, BATCHES[0]), run(student, BATCHES[0])
    np.testing.assert_allclose(y, expected, atol=1e-4 * float(jnp.abs(expected).max()))
    exact = run(net, BATCHES[0])
    errors = [power_of_error(run(m, BATCHES[0]), exact) for m in (quantized, packed)]
    assert errors[1] < 0.7 * errors[0]
    # the model that was given is as it was
    assert all(np.array_equal(codes(quantized)[path], code) for path, code in before.items())
    state = [nnx.state(m, Packed) for m in (quantized, packed)]
    assert jax.tree.structure(state[0]) == jax.tree.structure(state[1])


def test_experts_are_trained_like_layers():
    kernel = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    model = nnx.Dict(up=nnx.Einsum("ecd,edf->ecf", (3, 64, 32), (3, 32), **kernel))
    model.up.kernel[...] = 0.1 * normal(1, (3, 64, 32))
    x = normal(0, (3, 40, 64))
    quantized, _ = wush.quantize_model(model, [x], RECIPE, call=lambda m, x: m.up(x))
    student = unpack(quantized, model)
    assert student.up.latent.shape == (3, 32, 64)
    gradient = nnx.jit(nnx.grad(lambda m: jnp.sum(m.up(x) ** 2)))(student)
    assert bool(jnp.any(gradient["up"]["latent"][...], axis=(1, 2)).all())
    call = nnx.jit(lambda m: m.up(x))
    np.testing.assert_allclose(call(pack(student)), call(student), atol=1e-4)


def test_what_cannot_be_unpacked(net, quantized):
    with pytest.raises(ValueError, match="no quantized layers"):
        unpack(net, net)
    with pytest.raises(ValueError, match="original has no dense layer 'left'"):
        unpack(quantized, nnx.Dict())


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "03_fine_tune.py"
    spec = importlib.util.spec_from_file_location("fine_tune_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks up its annotations
    spec.loader.exec_module(module)
    return module


def test_adapters_beside_quantized_layers(example):
    block, (x,) = Block(0), rows(1, (40, 32))
    quantized, _ = wush.quantize_model(block, [x], RECIPE)
    student = example.with_adapters(quantized, rank=4)
    # B is zero at first; compiled in another program, summed in another order
    expected = run(quantized, x)
    np.testing.assert_allclose(run(student, x), expected, atol=1e-5 * np.abs(expected).max())
    losses = train(student, block, x)
    assert losses[-1] < 0.9 * losses[0]
