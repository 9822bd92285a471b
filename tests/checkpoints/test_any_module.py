"""What models hold beside variables of layers: bare arrays, sown values, random state, stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wush_jax as wush
from wush_jax.calibration.observe import stacked
from wush_jax.layers.dense import dense_layers
from wush_jax.layers.swap import swap

pytestmark = pytest.mark.once

INT8 = wush.Recipe(wush.INT8, transform="identity", solver="rtn")
X = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)


def linear(seed=0):
    return nnx.Linear(32, 32, rngs=nnx.Rngs(seed))


class Bare(nnx.Module):
    def __init__(self):
        self.layer, self.scale = linear(), jnp.full((32,), 2.0)

    def __call__(self, x):
        return self.layer(x) * self.scale


class BareNumpy(nnx.Module):
    def __init__(self):
        self.layer, self.scale = linear(), np.full((32,), 2.0, np.float32)

    def __call__(self, x):
        return self.layer(x) * self.scale


class Sown(nnx.Module):
    def __init__(self):
        self.layer = linear()

    def __call__(self, x):
        y = self.layer(x)
        self.sow(nnx.Intermediate, "y", y)
        return y


class Drops(nnx.Module):
    def __init__(self):
        self.layer, self.drop = linear(), nnx.Dropout(0.5, rngs=nnx.Rngs(1), deterministic=True)

    def __call__(self, x):
        return self.drop(self.layer(x))


class Scanned(nnx.Module):
    """Three layers in one, the stack at axis 1 and, as large as it, all other axes too."""

    def __init__(self):
        self.layers = linear()
        kernels = [linear(i).kernel[...] for i in range(32)]
        self.layers.kernel = nnx.Param(jnp.stack(kernels, axis=1))
        self.layers.bias = nnx.Param(jnp.zeros((32, 32)))

    def __call__(self, x):
        step = nnx.scan(lambda x, m: jnp.tanh(m(x)), in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
        return step(x, self.layers)


def quantized(model):
    model = stacked(model, X)
    layers, _ = dense_layers(model)
    packed = {}
    for path, layer in layers.items():
        pack = lambda w: wush.quantize_weight(w, None, INT8)  # noqa: E731
        packed[path] = (jax.vmap(pack) if layer.contraction.batch else pack)(layer.weight)
    return swap(model, layers, packed)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("make", [Bare, BareNumpy, Sown, Drops, Scanned])
def test_saved_and_loaded_whatever_stands_beside_the_layers(make, tmp_path):
    model = make()
    exact = model(X)  # what it sows is not saved
    twin = quantized(model)
    y = twin(X)
    # eight bits; through 32 layers errors add up
    np.testing.assert_allclose(y, exact, atol=0.3 if make is Scanned else 0.05)
    wush.save(tmp_path / "model", twin)
    for source in (model, nnx.eval_shape(make)):
        np.testing.assert_array_equal(wush.load(tmp_path / "model", source)(X), y)


def test_axes_of_a_stack_that_no_kernel_has(tmp_path):
    wush.save(tmp_path / "model", quantized(Scanned()))
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    assert '"stacks": {' in text
    model = Scanned()
    found = wush.load(tmp_path / "model", model)
    assert found.layers.contraction.stack_axes == (1,)


class Dotted(nnx.Module):
    """Names that would be one if they were joined by dots."""

    def __init__(self):
        self.d = nnx.Dict({"a.b": linear(0), "a": nnx.Dict({"b": linear(1)})})

    def __call__(self, x):
        return self.d["a"]["b"](jnp.tanh(self.d["a.b"](x)))


def test_names_with_dots_are_names_of_their_own(tmp_path):
    model = Dotted()
    quantized, report = wush.quantize_model(model, [X], INT8)
    assert {row.path for row in report.layers} == {"d.'a.b'", "d.a.b"}
    assert not report.skipped
    np.testing.assert_allclose(quantized(X), model(X), atol=0.05)  # eight bits
    wush.save(tmp_path / "saved", quantized)
    loaded = wush.load(tmp_path / "saved", Dotted())
    np.testing.assert_array_equal(loaded(X), quantized(X))
    only, report = wush.quantize_model(model, [X], [("d.a.b", INT8)])
    assert [row.path for row in report.layers] == ["d.a.b"]
    assert type(only.d["a.b"]) is nnx.Linear


class Branch(nnx.Module):
    def __init__(self):
        self.taken, self.other = linear(0), linear(1)

    def __call__(self, x):
        return nnx.cond(x.sum() > 0, lambda m, x: m.taken(x), lambda m, x: m.other(x), self, x)


def test_a_branch_that_calibration_never_takes_is_named():
    model, x = Branch(), np.abs(X)
    remedy = r"layers other: no calibration token .* rule \('other', None\)"
    with pytest.raises(ValueError, match=remedy):
        wush.quantize_model(model, [x], INT8)
    _, report = wush.quantize_model(model, [x, -x], INT8)
    assert {row.path for row in report.layers} == {"taken", "other"}
    _, report = wush.quantize_model(model, [x], [("other", None), (".*", INT8)])
    assert [row.path for row in report.layers] == ["taken"]
