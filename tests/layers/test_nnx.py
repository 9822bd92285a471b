"""Dense layers seen as W (N, K), their quantized twins, and the swap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import normal

import wush_jax as wush
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Contraction,
    Dense,
    Packed,
    QuantizedDense,
    dense_layers,
    replace_modules,
)
from wush_jax.solvers.batched import over_batch

# Inputs as they are, no transform: the layer computes with nothing but its dequantized weight.
EXACT = wush.Recipe(wush.MXFP8, None, transform="identity")


# Constructor, its arguments and the shape of an input; six outputs of 64 inputs all.
LAYERS = {
    "linear": (nnx.Linear, (64, 6), {}, (2, 3, 64)),
    "no bias": (nnx.Linear, (64, 6), {"use_bias": False}, (64,)),
    "general": (nnx.LinearGeneral, (64, (2, 3)), {}, (5, 64)),
    "two axes": (nnx.LinearGeneral, ((8, 8), 6), {"axis": (-2, -1)}, (5, 8, 8)),
    # flax sorts the axes: the kernel's first still meets the input's first
    "axes turned": (nnx.LinearGeneral, ((8, 8), 6), {"axis": (-1, -2)}, (5, 8, 8)),
    "to heads": (nnx.Einsum, ("btd,dnh->btnh", (64, 2, 3), (2, 3)), {}, (2, 5, 64)),
    "from heads": (nnx.Einsum, ("btnh,nhd->btd", (2, 32, 6), (6,)), {}, (2, 5, 2, 32)),
    "heads first": (nnx.Einsum, ("btd,ndh->bnth", (2, 64, 3), (2, 3)), {}, (2, 5, 64)),
    "experts": (nnx.LinearGeneral, (64, 6), {"axis": (-1,), "batch_axis": {0: 2}}, (2, 5, 64)),
    "turned kernel": (nnx.Einsum, ("...hk,nkh->...n", (6, 8, 8), (6,)), {}, (5, 8, 8)),
}
run = nnx.jit(lambda model, x: model(x))
dequantize = jax.jit(wush.dequantize)
CHEAP = {"kernel_init": nnx.initializers.zeros, "bias_init": nnx.initializers.zeros}


def layer_of(kind):
    """A layer and an input, both of small integers: sums are exact in whatever order."""
    make, arguments, options, shape = LAYERS[kind]
    layer = make(*arguments, **options, **CHEAP, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    layer.kernel[...] = jnp.float32(random.integers(-4, 5, layer.kernel.shape))
    if layer.bias is not None:
        layer.bias[...] = jnp.float32(random.integers(-4, 5, layer.bias.shape))
    return layer, jnp.float32(random.integers(-4, 5, shape))


@pytest.mark.parametrize("kind", LAYERS)
def test_views_compute_what_the_layer_computes(kind):
    layer, x = layer_of(kind)
    dense = dense_layers(layer)[0][""]
    assert dense.weight.shape == dense.weight_shape
    assert dense.contraction.shape == (6, 64)
    np.testing.assert_array_equal(dense.contraction.kernel(dense.weight), layer.kernel[...])
    y = run(layer, x)
    # -4 to 4 are numbers of E4M3 and the scale of a group of them is a power of two: no rounding
    quantize = over_batch(lambda w: wush.quantize_weight(w, None, EXACT), dense.contraction.batch)
    twin = QuantizedDense(dense, jax.jit(quantize)(dense.weight))
    np.testing.assert_array_equal(dequantize(twin.packed.weight), dense.weight)
    np.testing.assert_array_equal(run(twin, x), y)


def test_quantized_layer_is_the_layer_with_the_dequantized_kernel():
    layer, x = layer_of("heads first")
    layer.kernel[...] += 0.01 * jnp.arange(384.0).reshape(2, 64, 3)
    dense = dense_layers(layer)[0][""]
    twin = QuantizedDense(dense, wush.quantize_weight(dense.weight, None, EXACT))
    y = run(twin, x)
    assert np.abs(y - run(layer, x)).max() > 0.1
    layer.kernel[...] = dense.contraction.kernel(dequantize(twin.packed.weight))
    # 64 products of at most 20 in float32, summed in another order: 1280 * 2^-24 * a few
    np.testing.assert_allclose(y, run(layer, x), atol=5e-4)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("btd,dn", (4, 4)),  # no output
        ("btd->btn", (4,)),  # no kernel
        ("btd,dnh->btnh", (4, 4)),  # another rank
        ("btd,btd->btd", (2, 3, 4)),  # a product, no contraction
        ("bed,ed->be", (3, 4)),  # no outputs
        ("btd,dne->btn", (4, 4, 4)),  # an axis of the kernel summed away
        ("btd,...n->btn", (4, 4)),  # any rank
        ("btd,dn->tn", (4, 4)),  # an axis of x summed away
        ("btdd,dn->btn", (4, 4)),  # a diagonal
    ],
)
def test_equations_of_no_dense_layer(equation, shape):
    with pytest.raises(ValueError, match="equation="):
        Contraction(equation, shape)


def test_layers_without_a_dense_view_have_a_reason():
    rngs = nnx.Rngs(0)
    model = nnx.List(
        [
            nnx.Einsum("bed,ed->be", (3, 4), rngs=rngs),
            nnx.LinearGeneral(4, 4, axis=0, rngs=rngs),
            nnx.LinearGeneral((4, 4), 4, axis=(-3, -1), rngs=rngs),
            nnx.Linear(4, 4, rngs=rngs),
            nnx.LayerNorm(4, rngs=rngs),
            nnx.Embed(4, 8, rngs=rngs),
        ]
    )
    layers, skipped = dense_layers(model)
    assert list(layers) == ["3"]
    assert sorted(skipped) == ["0", "1", "2", "5"]
    assert "not a dense layer" in skipped["0"]
    assert "axis=(0,)" in skipped["1"]
    assert "axis=(-3, -1)" in skipped["2"]
    assert skipped["5"] == "Embed is no registered dense layer; it holds embedding (4, 8)"


@pytest.fixture(scope="module")
def quantized():
    layer, _ = layer_of("linear")
    dense = dense_layers(layer)[0][""]
    return layer, QuantizedDense(
        dense, wush.quantize_weight(dense.weight, jnp.eye(64), wush.Recipe())
    )


def test_gradient_reaches_bias_and_input_only(quantized):
    _, layer = quantized
    x = normal(1, (5, 64))

    @nnx.jit
    def gradients(layer, x):
        return nnx.grad(lambda m, x: (m(x) * jnp.arange(6.0)).sum(), argnums=(0, 1))(layer, x)

    gradient, through = gradients(layer, x)
    assert set(gradient) == {"bias"}
    np.testing.assert_array_equal(gradient["bias"][...], 5 * jnp.arange(6.0))
    assert through.shape == x.shape
    assert float(jnp.abs(through).min()) > 0


def test_a_sharding_asked_of_the_output(quantized):
    x = jnp.ones((2, 64))
    unspecified = nnx.jit(lambda model, x: model(x, out_sharding=None))
    np.testing.assert_array_equal(unspecified(quantized[1], x), run(quantized[1], x))
    for layer in quantized:  # jax's own rule, for the layer and its twin
        with pytest.raises(ValueError, match="not under a mesh"):
            layer(x, out_sharding=jax.sharding.PartitionSpec())


def test_state_splits_merges_and_compiles(quantized):
    _, layer = quantized
    x = normal(1, (5, 64))
    graph, packed, rest = nnx.split(layer, Packed, ...)
    assert set(packed) == {"codes", "scales", "global_scale", "transform"}
    assert set(rest) == {"bias"}
    twin = nnx.merge(graph, packed, rest)
    # compiled alike, so the same bits
    np.testing.assert_array_equal(run(twin, x), run(layer, x))


def test_bias_of_the_quantized_layer_is_its_own(quantized):
    layer, twin = quantized
    before = np.asarray(layer.bias[...])
    np.testing.assert_array_equal(twin.bias[...], before)
    assert type(twin.bias) is type(layer.bias)
    twin.bias[...] = twin.bias[...] + 1
    np.testing.assert_array_equal(layer.bias[...], before)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_that_of_the_replaced_layer(dtype, x_dtype):
    layer = nnx.Linear(64, 6, dtype=dtype, **CHEAP, rngs=nnx.Rngs(0))
    dense = dense_layers(layer)[0][""]
    twin = QuantizedDense(dense, wush.quantize_weight(dense.weight, None, EXACT))
    x = jnp.ones((2, 64), x_dtype)
    found = [run(each, x).dtype for each in (twin, layer)]
    assert found[0] == found[1] == (jnp.float32 if dtype is None else dtype)


class LowRank(nnx.Module):
    """A dense layer of one's own: W = up @ down."""

    def __init__(self, rngs):
        self.up = nnx.Param(normal(0, (6, 2)))
        self.down = nnx.Param(normal(1, (2, 64)))

    def __call__(self, x):
        return x @ self.down[...].T @ self.up[...].T


def low_rank(module):
    return Dense(Contraction("...k,nk->...n", (6, 64)), module.up[...] @ module.down[...], None)


def test_a_layer_of_ones_own():
    model, x = nnx.List([LowRank(nnx.Rngs(0))]), normal(2, (7, 64))
    options = {"call": lambda m, x: m[0](x), "dense_types": (*DENSE_TYPES, (LowRank, low_rank))}
    twin, report = wush.quantize_model(model, [x], EXACT, **options)
    assert [layer.path for layer in report.layers] == ["0"]
    # E4M3 weights: relative error 2^-4 each at worst, far less in the mean of 64 products
    exact = run(model[0], x)
    np.testing.assert_allclose(run(twin[0], x), exact, atol=0.05 * np.abs(exact).max())


class Width(LowRank):
    """A layer that says itself how it is seen, with attributes that a model may read."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.width = 6

    def dense_view(self):
        return low_rank(self)


def test_a_layer_that_views_itself_keeps_its_attributes():
    model, x = nnx.List([Width(nnx.Rngs(0))]), normal(2, (7, 64))

    def call(m, x):
        return m[0](x).reshape(-1, m[0].width)

    twin, report = wush.quantize_model(model, [x], EXACT, call=call)
    assert [layer.path for layer in report.layers] == ["0"]
    assert type(twin[0]) is QuantizedDense
    assert twin[0].width == 6
    assert twin[0].up.shape == (6, 2)
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(twin)) if path[-1] == "up"]
    assert call(twin, x).shape == (7, 6)


class Nest(nnx.Module):
    """Every kind of container, and one module in two places."""

    def __init__(self, rngs):
        def linear():
            return nnx.Linear(4, 4, **CHEAP, rngs=rngs)

        self.child = linear()
        self.again = self.child
        self.listed = nnx.List([linear()])
        self.named = nnx.Dict(a=linear())
        self.plain = nnx.data([linear(), (linear(), {"b": linear()})])
        self.chain = nnx.Sequential(linear(), jax.nn.relu)
        self.sizes = (4, 4)


def test_modules_are_replaced_wherever_they_sit():
    model, asked = Nest(nnx.Rngs(0)), []

    def replace(path, module):
        if type(module) is not nnx.Linear:
            return None
        asked.append(path)
        return nnx.Dict(was=path)

    twin = replace_modules(model, replace)
    assert len(asked) == 7
    assert not [path for path, m in nnx.iter_modules(twin) if type(m) is nnx.Linear]
    assert twin.child is twin.again
    assert twin.plain[1][1]["b"].was == "plain.1.1.b"
    assert type(model.plain[1][0]) is type(model.child) is nnx.Linear


def test_the_copy_has_variables_of_its_own():
    """Arrays are shared, since they do not change; variables are not."""
    model = nnx.Dict(norm=nnx.RMSNorm(4, rngs=nnx.Rngs(0)))
    twin = replace_modules(model, lambda path, module: None)
    assert twin.norm.scale.get_value() is model.norm.scale.get_value()
    twin.norm.scale[...] = 2 * twin.norm.scale[...]
    assert model.norm.scale[...].tolist() == [1, 1, 1, 1]


def test_the_model_itself_can_be_replaced():
    model = nnx.Dict()
    assert replace_modules(model, lambda path, m: nnx.Dict() if path == "" else None) == nnx.Dict()


def test_a_shared_module_is_quantized_in_both_places():
    model, x = Nest(nnx.Rngs(0)), jnp.ones((2, 4))
    recipe = wush.Recipe(wush.INT8.replace(group_size=4), transform="identity")
    rules = [("child|again", recipe)]
    twin, report = wush.quantize_model(
        model, [x], rules, call=lambda m, x: m.again(jnp.tanh(m.child(x)))
    )
    assert len(report.layers) == 1
    assert type(twin.child) is QuantizedDense
    assert twin.child is twin.again


class Hidden:
    """A container that nothing knows how to rebuild."""

    def __init__(self, module):
        self.module = module


jax.tree_util.register_pytree_with_keys(
    Hidden,
    lambda h: ((("module", h.module),), None),
    lambda _, children: Hidden(*children),
)


def test_a_module_out_of_reach_is_named():
    model = nnx.Dict(box=nnx.data(Hidden(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))))
    with pytest.raises(ValueError, match=r"box\.module: held by no module; keep submodules in"):
        replace_modules(model, lambda path, m: nnx.Dict() if type(m) is nnx.Linear else None)
