"""Layers of many kernels: experts of a mixture, layers stacked for a scan."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import power_of_error
from flax import nnx
from weights import normal, random_weights

import wush_jax as wush
from wush_jax.calibration.observe import collect_moments, find_sites
from wush_jax.layers.contraction import Contraction
from wush_jax.layers.nnx import QuantizedDense, dense_layers
from wush_jax.solvers.batched import quantize_alike
from wush_jax.solvers.site import quantize_site
from wush_jax.transforms import linalg

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

RTN = wush.Recipe(solver="rtn")
GPTQ = wush.Recipe(solver="gptq")
run = nnx.jit(lambda model, x: model(x))


class Experts(nnx.Module):
    """Tokens dispatched to four experts, (E, C, D): a gate, an up and a down projection."""

    def __init__(self, rngs):
        self.gate = nnx.Einsum("ecd,edf->ecf", (4, 64, 32), rngs=rngs)
        self.up = nnx.Einsum("ecd,edf->ecf", (4, 64, 32), (4, 32), rngs=rngs)
        self.down = nnx.Einsum("ecf,efd->ecd", (4, 32, 64), rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def dispatched(seed=0):
    """Inputs of each expert with its own directions; nothing comes to the last one."""
    mix = np.asarray(normal(7, (4, 64, 64))) * np.arange(1, 65) / 64
    x = np.einsum("ecd,edf->ecf", normal(seed, (4, 128, 64)), mix)
    x[3] = 0
    return jnp.float32(x)


@pytest.fixture(scope="module")
def experts():
    return random_weights(lambda: Experts(nnx.Rngs(0)), size=0.15)


def test_moments_are_those_of_each_expert(experts):
    x = dispatched()
    sites = find_sites(experts, x)
    assert [site.layers for site in sites] == [("gate", "up"), ("down",)]
    found = collect_moments(experts, [x, x], dict.fromkeys(sites))[sites[0]]
    assert found.mean.shape == (4, 64, 64)
    assert found.count.tolist() == [256] * 4
    # float32 sums of 128 products
    expected = jnp.einsum("eci,ecj->eij", x, x, precision="highest") / 128
    np.testing.assert_allclose(found.mean, expected, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_each_expert_is_quantized_by_itself(experts, recipe):
    x = dispatched()
    quantized, report = wush.quantize_model(experts, [x], recipe)
    assert [layer.shape for layer in report.layers] == [(4, 32, 64), (4, 32, 64), (4, 64, 32)]
    assert report.bytes_before == 3 * 4 * 64 * 32 * 4
    assert type(quantized.down) is QuantizedDense
    assert quantized.gate.transform is quantized.up.transform
    # each expert is what its own weights and moments give; the one without tokens takes the mean
    layers, _ = dense_layers(experts)
    moments = jnp.einsum("eci,ecj->eij", x, x, precision="highest") / 128
    moments = moments.at[3].set(jnp.mean(moments[:3], axis=0))
    if recipe is RTN:
        moments = jax.vmap(lambda m: linalg.diagonal_blocks(m, 32))(moments)
    for e in range(4):
        weights = [layers[name].weight[e] for name in ("gate", "up")]
        for name, packed in zip(
            ("gate", "up"), quantize_site(weights, moments[e], recipe), strict=True
        ):
            codes = getattr(quantized, name).codes[...][e]
            # moments to float32 rounding: a code here and there
            assert np.mean(np.asarray(codes != packed.weight.codes)) < 0.01
    # and the call is the calls of the experts
    twin, y = quantized.up, run(quantized.up, x)
    one = jax.tree.map(lambda leaf: leaf[1], twin.packed)
    expected = jax.jit(wush.quantized_dot)(x[1], one) + twin.bias[...][1]
    np.testing.assert_allclose(y[1], expected, atol=1e-5 * np.abs(y).max())
    exact = run(experts, x)
    assert 0 < power_of_error(run(quantized, x), exact) < 0.1
    assert all(0 < layer.relative_loss < 0.05 for layer in report.layers)


class Scanned(nnx.Module):
    """Three layers in one, scanned over; with `remat` their inputs are traced twice."""

    def __init__(self, rngs, remat):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return nnx.Dict(
                up=nnx.Linear(32, 64, rngs=rngs), down=nnx.LinearGeneral(64, (32,), rngs=rngs)
            )

        self.layers = stack(rngs)
        self.remat = remat

    def __call__(self, x):
        def layer(block, x):
            return x + block.down(jnp.tanh(block.up(x)))

        step = nnx.remat(layer) if self.remat else layer
        return nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


@pytest.mark.parametrize("remat", [False, True])
def test_a_stack_under_a_scan_is_a_batch_of_layers(remat):
    model = random_weights(lambda: Scanned(nnx.Rngs(0), remat), size=0.15)
    x = normal(0, (40, 32))
    quantized, report = wush.quantize_model(model, [x], RTN)
    assert [(la.path, la.shape) for la in report.layers] == [
        ("layers.up", (3, 64, 32)),
        ("layers.down", (3, 32, 64)),
    ]
    # the same layers, one after the other
    inputs, moments = x, []
    for i in range(3):
        moments.append(wush.second_moment(inputs, 32))
        at = [jax.tree.map(lambda a, i=i: a[i], nnx.state(model.layers)[n]) for n in ("up", "down")]
        up, down = ({k: v[...] for k, v in part.items()} for part in at)
        hidden = jnp.tanh(inputs @ up["kernel"] + up["bias"])
        inputs = inputs + hidden @ down["kernel"] + down["bias"]
    for i in range(3):
        weight = model.layers.up.kernel[...][i].T
        expected = wush.quantize_weight(weight, moments[i], RTN).weight.codes
        assert np.mean(np.asarray(quantized.layers.up.codes[...][i] != expected)) < 0.01
    y, exact = run(quantized, x), run(model, x)
    assert 0 < power_of_error(y, exact) < 0.05
    assert all(0 < layer.relative_loss < 0.05 for layer in report.layers)


EQUATIONS = {
    "experts": ("ecd,edf->ecf", (3, 8, 4), (3, 5, 8), (4, 8), (3,)),
    "dispatched": ("becd,edf->becf", (3, 8, 4), (2, 3, 5, 8), (4, 8), (3,)),
    "experts last": ("cde,def->cfe", (8, 3, 4), (5, 8, 3), (4, 8), (3,)),
    "two axes of experts": ("btgie,gief->btgif", (2, 3, 8, 4), (2, 5, 2, 3, 8), (4, 8), (6,)),
    # every expert sees every token: outputs of one dense layer
    "all experts": ("btd,edf->btef", (3, 8, 4), (2, 5, 8), (12, 8), ()),
    # and their sum contracts the experts
    "summed": ("btef,efd->btd", (3, 4, 8), (2, 5, 3, 4), (8, 12), ()),
    "queries, keys, values": ("BTD,SNDH->SBTNH", (3, 2, 8, 4), (2, 5, 8), (24, 8), ()),
    "keys and values": ("BSD,CKDH->CBSKH", (2, 2, 8, 4), (2, 5, 8), (16, 8), ()),
}


@pytest.mark.parametrize("kind", EQUATIONS)
def test_equations_are_read_as_batches_of_matrices(kind):
    equation, kernel_shape, x_shape, shape, batch = EQUATIONS[kind]
    kernel, x = normal(0, kernel_shape), normal(1, x_shape)
    reading = Contraction(equation, kernel_shape)
    assert (reading.shape, reading.batch) == (shape, batch)
    weight, rows = reading.weight(kernel), reading.rows(x)
    assert weight.shape == (*batch, *shape)
    np.testing.assert_array_equal(reading.kernel(weight), kernel)
    dot = "e...k,enk->e...n" if batch else "...k,nk->...n"
    y = reading.outputs(jnp.einsum(dot, rows, weight, precision="highest"))
    expected = jnp.einsum(equation, x, kernel, precision="highest")
    np.testing.assert_allclose(y, expected, atol=2e-6 * 12)  # 12 products of a few units at most


def test_the_bias_of_experts_goes_with_them():
    reading = Contraction("cde,def->cfe", (8, 3, 4))
    bias = jnp.arange(12.0).reshape(4, 3)  # in the order of the output: f, e
    assert reading.bias(bias, 3).shape == (3, 1, 4)
    np.testing.assert_array_equal(reading.outputs(reading.bias(bias, 3))[0], bias)


@pytest.mark.parametrize(
    "recipe",
    [
        RTN.replace(format=wush.NVFP4),
        # Feedback spreads what another last place of a transform changes: one without moments.
        GPTQ.replace(transform="hadamard", share_transform=False),
        pytest.param(
            wush.BEST.replace(transform="hadamard", refit=0, block_gain=False),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rtn", "gptq", "best"],
)
def test_sites_in_one_program_are_those_alone(recipe):
    """But where float32 sums in another order move a value across a middle: one place, rarely."""
    sites = [[normal(3 * i, (24, 64)), normal(3 * i + 1, (16, 64))] for i in range(2)]
    moments = [wush.calibrate_layer(normal(3 * i + 2, (200, 64))) for i in range(2)]
    names = [(f"{i}.q", f"{i}.k") for i in range(2)]
    together = quantize_alike(sites, moments, recipe, names=names)
    for weights, known, found in zip(sites, moments, together, strict=True):
        alone = quantize_site(weights, known, recipe)
        for one, other in zip(alone, found, strict=True):
            assert jax.tree.structure(one) == jax.tree.structure(other)
            for a, b in ((one.weight.codes, other.weight.codes), (one.transform, other.transform)):
                assert np.mean(np.asarray(a != b)) < 0.01
            transforms = (np.asarray(p.transform, np.float32) for p in (one, other))
            np.testing.assert_allclose(*transforms, rtol=2.0**-7)  # a place of bfloat16
        assert (found[0].transform is found[1].transform) == recipe.share_transform


def test_a_site_of_several_is_refused_by_its_name():
    weights = [[normal(i, (8, 32))] for i in range(2)]
    good, names = wush.calibrate_layer(normal(2, (64, 32))), [("a",), ("b",)]
    rotated = GPTQ.replace(transform="hadamard")
    bad = replace(good, mean=10 - 9 * jnp.eye(32))  # eigenvalues down to -9
    with pytest.raises(ValueError, match="hessian of b is not positive definite"):
        quantize_alike(weights, [good, bad], rotated, names=names)
    weights[1][0] = weights[1][0].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"layer b: its weight has non-finite values, 1 of"):
        quantize_alike(weights, [good, good], rotated, names=names)


def test_inputs_read_in_two_ways_are_two_sites():
    rngs = nnx.Rngs(0)
    model = nnx.List(
        [
            nnx.Einsum("btnh,nhd->btd", (2, 32, 8), rngs=rngs),
            nnx.Einsum("btnh,hd->btnd", (32, 8), rngs=rngs),
            nnx.Einsum("btnh,nhd->btnd", (2, 32, 8), rngs=rngs),
            nnx.Linear(32, 8, rngs=rngs),
        ]
    )
    found = find_sites(model, jnp.ones((1, 3, 2, 32)), call=lambda m, x: [f(x) for f in m])
    assert [(site.layers, site.size) for site in found] == [
        (("0",), 64),
        (("1", "3"), 32),
        (("2",), 32),
    ]
