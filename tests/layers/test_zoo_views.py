"""Dense classes of zoos are known by the names of their modules, without importing them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import power_of_error
from flax import nnx
from flax.typing import Initializer

import wush_jax as wush
from wush_jax.layers.linen import LinenModel
from wush_jax.layers.nnx import DENSE_TYPES, QuantizedDense, dense_layers

INT8 = wush.Recipe(wush.INT8, transform="identity", solver="rtn")
X = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)


class Einsum(nnx.Module):
    """As tunix's: its parameter is w, which may be scaled."""

    def __init__(self, einsum_str, shape, w_scale=None):
        self.einsum_str, self.shape, self.w_scale = einsum_str, shape, w_scale
        self.w = nnx.Param(nnx.initializers.normal()(jax.random.key(0), shape))

    def __call__(self, x):
        w = self.w[...] if self.w_scale is None else self.w[...] * self.w_scale
        return jnp.einsum(self.einsum_str, x, w)


class Other(Einsum):
    """The same class in a module that is no zoo's."""


class LinenEinsum(nn.Module):
    """As gemma's: the equation comes first in its call."""

    shape: tuple[int, ...]
    weight_name: str = "w"
    initializer: Initializer = nn.initializers.normal()
    w_scale: float | None = None

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param(self.weight_name, self.initializer, self.shape)
        return jnp.einsum(eqn, x, w if self.w_scale is None else w * self.w_scale)


class Elsewhere(Einsum):
    def __call__(self, x):
        return super().__call__(x)


# Where they would be.
Einsum.__module__ = "tunix.models.gemma7.model"
LinenEinsum.__module__, LinenEinsum.__qualname__ = "gemma.gm.nn.gemma3n._layers", "Einsum"


@pytest.mark.parametrize("scale", [None, 0.5])
def test_tunix_classes_are_dense(scale):
    model = nnx.List([Einsum("btd,ndh->btnh", (2, 32, 8), scale)])
    call = lambda m, x: m[0](x)  # noqa: E731
    quantized, report = wush.quantize_model(model, [X], INT8, call=call)
    assert [(row.path, row.shape) for row in report.layers] == [("0", (16, 32))]
    assert type(quantized[0]) is QuantizedDense
    assert quantized[0].shape == (2, 32, 8)
    assert 0 < power_of_error(call(quantized, X), call(model, X)) < 1e-3  # eight bits


@pytest.mark.parametrize("scale", [None, 0.5])
def test_gemma_classes_are_dense(scale):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LinenEinsum((2, 32, 8), "kernel", w_scale=scale, name="q")("BTD,NDH->BTNH", x)

    model = LinenModel(Model(), Model().init(jax.random.key(0), X), X)
    quantized, report = wush.quantize_model(model, [X], INT8)
    assert [(row.path, row.shape) for row in report.layers] == [("q", (16, 32))]
    assert 0 < power_of_error(quantized(X), model(X)) < 1e-3  # eight bits


def test_a_view_of_the_class_itself_comes_first():
    def mine(module):
        raise ValueError("mine")

    model = nnx.List([Einsum("btd,df->btf", (32, 8)), Other("btd,df->btf", (32, 8))])
    _, skipped = dense_layers(model, (*DENSE_TYPES, (Einsum, mine)))
    assert skipped["0"] == "mine"
    layers, skipped = dense_layers(model)
    assert set(layers) == {"0", "1"}  # a subclass with the same call is a dense layer, too
    assert not skipped


class Plain(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((32, 8)))


Plain.__module__, Plain.__qualname__ = "models.gemma.model", "Einsum"


def test_other_classes_are_named():
    own_call = Elsewhere("btd,df->btf", (32, 8))
    layers, skipped = dense_layers(nnx.List([Plain(), own_call]))
    assert not layers
    assert skipped["0"] == "Plain is no registered dense layer; it holds w (32, 8)"
    assert "Elsewhere overrides __call__ of Einsum" in skipped["1"]
