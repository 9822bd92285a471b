"""Stand-ins take what the layer took and show what it showed; a plan says where they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import power_of_error
from flax import nnx

import wush_jax as wush
from wush_jax.calibration.planning import packed_like
from wush_jax.layers.dense import dense_layers
from wush_jax.layers.finetune import LatentDense, pack, unpack
from wush_jax.layers.nnx import QuantizedDense
from wush_jax.layers.swap import swap

INT8 = wush.Recipe(wush.INT8, transform="identity", solver="rtn")
X = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)
OPTIONS = {"rngs": nnx.Rngs(0)}


def quantized(model):
    """The model with every dense layer in eight bits, by the weights alone."""
    layers, _ = dense_layers(model)
    packed = {p: wush.quantize_weight(la.weight, None, INT8) for p, la in layers.items()}
    return swap(model, layers, packed)


def student(model):
    return unpack(quantized(model), model)


class Around(nnx.Module):
    """A layer called and read the way a function does it."""

    def __init__(self, layer, use):
        self.layer, self.use = layer, use

    def __call__(self, x):
        return self.use(self.layer, x)


def linear(**options):
    return nnx.Linear(32, 32, rngs=nnx.Rngs(0), **options)


class Same(nnx.Linear):
    """A subclass that leaves the call as it is."""


USES = {
    "by keyword": (linear(), lambda m, x: m(inputs=x)),
    "no sharding": (linear(), lambda m, x: m(x, out_sharding=None)),
    "its own equation": (
        nnx.Einsum("btd,df->btf", (32, 32), (32,), **OPTIONS),
        lambda m, x: m(x, "btd, df -> btf"),
    ),
    "shape and dtype of the kernel": (
        linear(),
        lambda m, x: m(x.astype(m.kernel.dtype)).reshape(
            -1, m.kernel.shape[1] * m.out_features // 32
        ),
    ),
    "the kernel's values": (linear(), lambda m, x: m(x) / jnp.linalg.norm(m.kernel[...])),
    "a wider result": (
        linear(dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
        lambda m, x: m(x),
    ),
    "a subclass": (Same(32, 32, **OPTIONS), lambda m, x: m(x)),
    "adapters": (nnx.LoRALinear(32, 32, lora_rank=2, **OPTIONS), lambda m, x: m(x)),
    "attention": (
        nnx.MultiHeadAttention(2, 32, decode=False, **OPTIONS),
        lambda m, x: m(x, deterministic=True),
    ),
    "normed weights": (nnx.WeightNorm(linear(), **OPTIONS), lambda m, x: m(x)),
}


@pytest.mark.parametrize("name", USES)
def test_twins_are_used_as_the_layer_is(name):
    layer, use = USES[name]
    if name == "adapters":
        layer.lora.lora_b[...] = jnp.ones_like(layer.lora.lora_b[...])
    model = Around(layer, use)
    exact = nnx.clone(model)(X)
    for twin in (quantized(model), student(model), pack(student(model))):
        y = twin(X)
        assert y.dtype == exact.dtype
        assert 0 < power_of_error(y, exact) < 1e-3  # eight bits


def test_the_kernel_that_is_read_is_the_one_that_is_multiplied_with():
    model = Around(linear(use_bias=False), lambda m, x: m(x))
    for twin in (quantized(model), student(model)):
        assert type(twin.layer) in (QuantizedDense, LatentDense)
        kernel = twin.layer.kernel[...]
        assert kernel.shape == (32, 32)
        assert 0 < float(jnp.abs(kernel - model.layer.kernel[...]).max()) < 0.01


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def other_product(*arguments, **keywords):
    return jax.lax.dot_general(*arguments, **keywords)


SKIPPED = {
    "overridden call": (
        lambda: Doubled(32, 32, **OPTIONS),
        lambda m, x: m(x),
        "overrides __call__ of Linear",
    ),
    "a product of its own": (
        lambda: linear(dot_general=other_product),
        lambda m, x: m(x),
        "way of its own: dot_general",
    ),
    "another equation": (
        lambda: nnx.Einsum("btd,df->btf", (32, 32), **OPTIONS),
        lambda m, x: m(x, "btd,fd->btf"),
        "more than its input: 'btd,fd->btf'",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_a_twin_cannot_be_is_named(name):
    make, use, reason = SKIPPED[name]
    model = nnx.List([Around(make(), use), linear()])
    plan = wush.plan(model, INT8, X, call=lambda m, x: m[1](m[0](x)))
    assert reason in plan.report.skipped["0.layer"]
    assert [row.path for row in plan.report.layers] == ["1"]


class Strict(nnx.Module):
    """A model that cannot run with a stand-in."""

    def __init__(self):
        self.good, self.bad = linear(), linear()

    def __call__(self, x):
        assert isinstance(self.bad, nnx.Linear), "only nnx.Linear will do"
        return self.bad(self.good(x))


def test_a_plan_runs_the_swapped_model_and_names_the_layer():
    with pytest.raises(ValueError, match=r"layer bad: AssertionError: only nnx.Linear will do"):
        wush.plan(Strict(), INT8, X)
    plan = wush.plan(Strict(), [("bad", None), (".*", INT8)], X)
    assert [row.path for row in plan.report.layers] == ["good"]


class Dropping(nnx.Module):
    def __init__(self):
        self.layer, self.drop = linear(), nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.drop(self.layer(x))


def test_a_model_in_training_is_warned_of():
    model = Dropping()
    with pytest.warns(UserWarning, match="drop: in training mode"):
        wush.plan(model, INT8, X)
    model.eval()
    wush.plan(model, INT8, X)


def test_misfits_are_named_all_at_once():
    model = nnx.List([nnx.Linear(20, 20, rngs=nnx.Rngs(0)) for _ in range(3)])
    model.append(nnx.Linear(48, 8, rngs=nnx.Rngs(0)))
    both = r"layer 0-2: K=20 is not a multiple .*; layer 3: K=48 is not a multiple"
    with pytest.raises(ValueError, match=both):
        wush.plan(model, INT8)


def test_shapes_alone_are_swapped():
    model = Around(linear(), lambda m, x: m(x))
    plan = wush.plan(model, INT8, X)
    packed = packed_like(plan.sites, dense_layers(model)[0])
    assert packed["layer"].shape == (32, 32)


class Loose(nnx.Module):
    def __init__(self):
        self.layer = linear()
        self.held = nnx.data({"w": nnx.Param(jnp.ones((32, 32))), "b": nnx.Param(jnp.ones(32))})

    def __call__(self, x):
        return self.layer(x) @ self.held["w"][...]


def test_every_matrix_is_a_layers_or_listed():
    report = wush.plan(Loose(), INT8, X).report
    assert [row.path for row in report.layers] == ["layer"]
    assert list(report.skipped) == ["held.w"]


class Tied(nnx.Module):
    def __init__(self):
        self.one, self.two = linear(), linear()
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x)))


def test_layers_on_one_param_stay_tied_through_unpack_and_pack():
    model = Tied()
    twin = quantized(model)
    report = wush.plan(model, INT8, X).report
    assert report.details["parameters_quantized"] == 32 * 32
    assert report.notes == (
        "one.kernel is one parameter with two.kernel; quantized, each layer has its own",
    )
    trained = unpack(twin, model)
    assert trained.one.latent is trained.two.latent
    np.testing.assert_allclose(trained(X), twin(X), atol=1e-5)  # one rounding, in float32
    slope = nnx.grad(lambda m: m(X).sum())(trained)
    trained.one.latent[...] -= 0.1 * slope.one.latent[...]
    packed = pack(trained)
    np.testing.assert_array_equal(packed.one.codes[...], packed.two.codes[...])
    assert np.any(packed.one.codes[...] != twin.one.codes[...])
