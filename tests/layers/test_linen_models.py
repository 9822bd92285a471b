"""Linen models whose layers are called through jit, scans, shared scopes and cells."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import power_of_error

import wush_jax as wush
from wush_jax.calibration.observe import observe_calls
from wush_jax.layers.dense import dense_layers
from wush_jax.layers.linen import LINEN_TYPES, LinenModel
from wush_jax.layers.nnx import Contraction, Dense

# Eight bits without a transform: what is wired wrongly is far off, what is not within 1e-3.
INT8 = wush.Recipe(wush.INT8, transform="identity", solver="rtn")
X = np.random.default_rng(0).standard_normal((4, 6, 32)).astype(np.float32)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="b")(nn.relu(nn.Dense(32, name="a")(x)))


class Compiled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="head")(nn.jit(Inner)(name="inner")(x))


class Einsum(nn.Module):
    shape: tuple[int, ...]
    weight: str

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(
            equation, x, self.param(self.weight, nn.initializers.normal(), self.shape)
        )


def einsum(module, params, equation, x):
    kernel = params[module.weight].get_value()
    return Dense(Contraction(equation, kernel.shape), kernel, None)


class Shared(nn.Module):
    """Two layers whose parameters stand in this module's scope, as in gemma."""

    @nn.compact
    def __call__(self, x):
        gate, down = Einsum((2, 32, 32), "gating"), Einsum((32, 32), "linear")
        nn.share_scope(self, gate)
        nn.share_scope(self, down)
        both = gate("btd,ndf->btnf", x)
        return down("btf,fd->btd", nn.gelu(both[:, :, 0]) * both[:, :, 1])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(32, name="out")(nn.silu(nn.Dense(64, name="in")(x))), None


class Scanned(nn.Module):
    axis: int
    length: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.length,
        )
        return scan(name="layers")(x, None)[0]


class Broadcast(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=2)
        return scan(name="block")(x, None)[0]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(32))(x)


CASES = {
    "jit": (Compiled(), ["head", "inner.a", "inner.b"]),
    "share_scope": (Shared(), ["gating", "linear"]),
    "scan, axis 1": (Scanned(1, 3), ["layers.in", "layers.out"]),
    "scan, axis 1, ambiguous": (Scanned(1, 32), ["layers.in", "layers.out"]),
    "scan, axis -1": (Scanned(-1, 2), ["layers.in", "layers.out"]),
    "variable_broadcast": (Broadcast(), ["block.in", "block.out"]),
    "RNN": (Recurrent(), ["SimpleCell_0.h", "SimpleCell_0.i"]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_seen(name):
    module, expected = CASES[name]
    variables = module.init(jax.random.key(0), X)
    exact = module.apply(variables, X)  # jit's caches know the model before it is looked at
    model = LinenModel(module, variables, X, types=(*LINEN_TYPES, (Einsum, einsum)))
    np.testing.assert_array_equal(model(X), exact)
    found = observe_calls(model, X)
    assert sorted(path for site in found.sites for path in site.layers) == expected
    assert not found.faults


@pytest.mark.slow  # compiles the solvers for every shape
@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_quantized_and_wired(name, tmp_path):
    module, expected = CASES[name]
    variables = module.init(jax.random.key(0), X)
    exact = module.apply(variables, X)  # jit's caches know the model before it is looked at
    model = LinenModel(module, variables, X, types=(*LINEN_TYPES, (Einsum, einsum)))
    np.testing.assert_array_equal(model(X), exact)
    quantized, report = wush.quantize_model(model, [X], INT8)
    assert sorted(layer.path for layer in report.layers) == expected
    assert not report.skipped
    y = quantized(X)
    assert 0 < power_of_error(y, exact) < 1e-2
    wush.save(tmp_path / "model", quantized)
    np.testing.assert_array_equal(wush.load(tmp_path / "model", model)(X), y)


def test_a_stack_is_the_axis_that_the_scan_takes_whatever_the_sizes():
    module = Scanned(1, 32)
    variables = module.init(jax.random.key(0), X)
    assert variables["params"]["layers"]["in"]["kernel"].shape == (32, 32, 64)
    layers, _ = dense_layers(LinenModel(module, variables, X))
    kernel = np.asarray(variables["params"]["layers"]["in"]["kernel"])
    np.testing.assert_array_equal(layers["layers.in"].weight, kernel.transpose(1, 2, 0))
    assert layers["layers.in"].weight_shape == (32, 64, 32)
