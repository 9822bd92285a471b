"""Linen models, seen as NNX: planned, calibrated, quantized and applied."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import power_of_error, two_programs
from flax import nnx
from weights import normal

import wush_jax as wush
from wush_jax.calibration.observe import find_sites
from wush_jax.layers.linen import LINEN_TYPES, LinenDense, LinenModel
from wush_jax.layers.nnx import Contraction, Dense, QuantizedDense, dense_layers

pytestmark = pytest.mark.usefixtures("float32_matmuls")

RTN = wush.Recipe(solver="rtn")
X = jnp.asarray(np.asarray(normal(0, (2, 24, 64))) * np.arange(1, 65) / 32, jnp.float32)
run = nnx.jit(lambda model, x: model(x))
dequantize = jax.jit(wush.dequantize)


class Layer(nn.Module):
    """A transformer layer of linen's own parts, and one projection of a hand-written class."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.SelfAttention(num_heads=2, name="attention")(y)
        y = nn.LayerNorm()(x)
        y = nn.gelu(nn.Einsum((64, 96), "btd,df->btf", name="up")(y))
        return x + nn.Dense(64, name="down")(y)


class Encoder(nn.Module):
    """Layers one after the other."""

    depth: int = 2
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        layer = nn.remat(Layer) if self.remat else Layer
        for i in range(self.depth):
            x = layer(name=f"layer_{i}")(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(x))


class ScannedEncoder(nn.Module):
    """The same layers in one, scanned over."""

    depth: int = 2
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = scan(layer(name="layers"), x, None)
        return nn.LayerNorm()(x)


def initial(module):
    """Variables of a module with weights as large as its own initialisation's."""
    random = np.random.default_rng(1)

    def fill(path, leaf):
        value = random.standard_normal(leaf.shape) / 8 if leaf.ndim > 1 else np.zeros(leaf.shape)
        return jnp.asarray(value + (path[-1].key == "scale"), leaf.dtype)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), X))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def variables():
    return initial(Encoder())


@pytest.fixture(scope="module")
def model(variables):
    return LinenModel(Encoder(), variables, X)


@pytest.fixture(scope="module")
def result(model):
    return wush.quantize_model(model, [X], RTN)


def test_the_view_computes_what_the_linen_module_computes(model, variables):
    expected = jax.jit(Encoder().apply)(variables, X)
    two_programs(run(model, X), expected)
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == len(jax.tree.leaves(variables))


def test_layers_that_share_an_input_share_a_site(model):
    found = find_sites(model, X)
    expected = [
        tuple(f"layer_{i}.{name}" for name in names)
        for i in range(2)
        for names in (
            [f"attention.{name}" for name in ("query", "key", "value")],
            ["attention.out"],
            ["up"],
            ["down"],
        )
    ]
    assert [site.layers for site in found] == expected
    assert [site.size for site in found] == [64, 64, 64, 96] * 2


def test_it_is_quantized_like_any_model(model, result, variables):
    quantized, report = result
    assert len(report.layers) == 12
    assert not report.skipped
    assert type(quantized.layer_0.attention.query) is QuantizedDense
    assert type(model.layer_0.attention.query) is LinenDense
    attention = quantized.layer_1.attention
    assert attention.query.transform is attention.value.transform
    y, exact = run(quantized, X), run(model, X)
    error = power_of_error(y, exact)
    assert 0 < error < 0.05
    assert all(0 < layer.relative_loss < 0.05 for layer in report.layers)
    # the codes are those of quantizing the weight with the moment of its own input
    kernel = variables["params"]["layer_0"]["attention"]["query"]["kernel"]
    y = nn.LayerNorm().apply({"params": variables["params"]["layer_0"]["LayerNorm_0"]}, X)
    names = ("query", "key", "value")
    params = variables["params"]["layer_0"]["attention"]
    weights = [params[name]["kernel"].reshape(64, 64).T for name in names]
    expected = wush.quantize_weight(weights[0], wush.second_moment(y, 32), RTN)
    assert kernel.shape == (64, 2, 32)
    assert quantized.layer_0.attention.query.packed.shape == expected.shape == (64, 64)


def test_the_quantized_weight_is_what_is_applied(result, variables):
    """The linen module itself, with kernels dequantized, gives the same where inputs stay exact."""
    recipe = RTN.replace(transform="identity", activation_format=None)
    model = LinenModel(Encoder(), variables, X)
    quantized, _ = wush.quantize_model(model, [X], recipe)
    layers, _ = dense_layers(model)
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    for path, layer in layers.items():
        *scopes, name = path.split(".")
        scope = params
        for part in scopes:
            scope = scope[part]
        twin = quantized
        for part in (*scopes, name):
            twin = getattr(twin, part)
        kernel = layer.contraction.kernel(dequantize(twin.packed.weight))
        scope[name] = {**scope[name], "kernel": kernel}
    expected = jax.jit(Encoder().apply)({"params": params}, X)
    # float32 matmuls in another order
    np.testing.assert_allclose(run(quantized, X), expected, atol=1e-4)


@pytest.mark.files
@pytest.mark.parametrize("remat", [False, True])
def test_layers_stacked_for_a_scan(result, variables, remat):
    """The same weights, stacked, give the same codes."""
    params = variables["params"]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), params["layer_0"], params["layer_1"])
    module = ScannedEncoder(remat=remat)
    variables = {"params": {"layers": stacked, "LayerNorm_0": params["LayerNorm_0"]}}
    model = LinenModel(module, variables, X)
    np.testing.assert_allclose(run(model, X), jax.jit(module.apply)(variables, X), atol=1e-5)
    quantized, report = wush.quantize_model(model, [X], RTN)
    assert [(la.path, la.shape) for la in report.layers] == [
        ("layers.attention.query", (2, 64, 64)),
        ("layers.attention.key", (2, 64, 64)),
        ("layers.attention.value", (2, 64, 64)),
        ("layers.attention.out", (2, 64, 64)),
        ("layers.up", (2, 96, 64)),
        ("layers.down", (2, 64, 96)),
    ]
    loop, _ = result
    for i in range(2):
        one = getattr(loop, f"layer_{i}").attention.key.codes[...]
        assert np.mean(np.asarray(quantized.layers.attention.key.codes[...][i] != one)) < 0.01
    # transforms in bfloat16 from moments that differ by rounding: half a bit here and there
    y, expected = run(quantized, X), run(loop, X)
    assert power_of_error(y, expected) < 1e-2


def test_remat_is_no_trouble(result, variables):
    model = LinenModel(Encoder(remat=True), variables, X)
    quantized, report = wush.quantize_model(model, [X], RTN)
    assert [la.path for la in report.layers] == [la.path for la in result[1].layers]
    codes = quantized.layer_1.down.codes[...]
    assert np.mean(np.asarray(codes != result[0].layer_1.down.codes[...])) < 0.01


def test_gradients_reach_what_is_not_quantized(result):
    quantized, _ = result

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)

    found = nnx.to_flat_state(gradient(quantized, X))
    paths = {path for path, _ in found}
    assert ("layer_0", "LayerNorm_0", "scale") in paths
    assert ("layer_0", "attention", "query", "bias") in paths
    assert not [path for path in paths if path[-1] == "kernel"]
    assert all(bool(jnp.isfinite(leaf[...]).all()) for _, leaf in found)


class TiedEinsum(nn.Module):
    """A dense class of one's own, with the equation among the arguments of its call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape))


def tied_einsum(module, params, equation, x):
    w = params["w"].get_value()
    return Dense(Contraction(equation, w.shape), w, None)


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = TiedEinsum((2, 64, 32), name="kv")("btd,cdh->cbth", x).sum(0)
        both = TiedEinsum((32, 32), name="both")
        x = both("btd,df->btf", both("btd,fd->btf", x))
        return nn.Conv(8, (3,), name="conv")(x) + nn.Embed(16, 8, name="table")(jnp.array([3]))


def test_a_class_of_ones_own_and_what_is_left_alone():
    variables = initial(Custom())
    types = (*LINEN_TYPES, (TiedEinsum, tied_einsum))
    model = LinenModel(Custom(), variables, X, types=types)
    quantized, report = wush.quantize_model(model, [X], RTN)
    assert [(la.path, la.shape) for la in report.layers] == [("kv", (64, 64))]
    assert "called in different ways" in report.skipped["both"]
    assert report.skipped["conv"] == (
        "Conv is no registered dense layer; it holds kernel (3, 32, 8)"
    )
    assert "Embed is no registered dense layer" in report.skipped["table"]
    y, exact = run(quantized, X), run(model, X)
    assert 0 < power_of_error(y, exact) < 0.05


class Counts(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        calls = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        if train:
            calls.value = calls.value + 1
        return nn.DenseGeneral(8, axis=(-1,), name="dense")(x) + calls.value


@pytest.mark.files
def test_other_collections_and_arguments():
    variables = Counts().init(jax.random.key(0), X, train=False)
    model = LinenModel(Counts(), variables, X, train=False)
    quantized, _ = wush.quantize_model(model, [X], RTN, call=lambda m, x: m(x, train=False))
    y, updates = quantized(X, train=True, mutable=["calls"])
    assert y.shape == (2, 24, 8)
    assert int(updates["calls"]["count"]) == 1
    np.testing.assert_allclose(y - 1, quantized(X, train=False), atol=1e-6)


def test_variables_without_params():
    with pytest.raises(ValueError, match="must hold 'params'"):
        LinenModel(nn.Dense(4), {"batch_stats": {}}, X)


def test_layers_left_alone_are_saved_and_loaded(tmp_path):
    """Also into shapes alone: those of a layer's calls are no tensors of the model's."""

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, name="b")(nn.Dense(64, name="a")(x))

    def make():
        return LinenModel(Pair(), Pair().init(jax.random.key(0), X), X)

    quantized, _ = wush.quantize_model(make(), [X], [("a", None), ("b", RTN)])
    wush.save(tmp_path / "saved", quantized)
    for source in (make(), nnx.eval_shape(make)):
        loaded = wush.load(tmp_path / "saved", source)
        np.testing.assert_array_equal(run(loaded, X), run(quantized, X))
