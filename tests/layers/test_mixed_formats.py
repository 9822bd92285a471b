"""4-bit weights with FP8 activations, and NVINT4: layers, solvers and transformations of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
import wush_jax as wush
from wush_jax.transforms.sample import Sample

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

N, K, M = 24, 1056, 6  # two groups of 512 columns and one of 32
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((N, K)).astype(np.float32)
INPUTS = (RNG.standard_normal((M, K)) * np.exp2(RNG.uniform(-6, 6, K))).astype(np.float32)
WEIGHTS = {f.name: f for f in (wush.MXFP4, wush.NVFP4, wush.NVINT4, wush.INT4)}
each_weight = pytest.mark.parametrize("fmt", WEIGHTS.values(), ids=WEIGHTS)
dot = jax.jit(lambda x, p: wush.quantized_dot(x, p, implementation="reference"))
dequantize = jax.jit(wush.dequantize)


@functools.cache
def packed(fmt, inputs=wush.FP8, transform="identity"):
    recipe = wush.Recipe(fmt, inputs, transform=transform, block_size=32)
    return wush.quantize_weight(WEIGHT, None, recipe)


def rounded(x):
    """The oracle's FP8: rows of inputs, 512 columns at a time."""
    parts = (x[:, at : at + 512].astype(np.float64) for at in range(0, x.shape[1], 512))
    return np.concatenate([oracle.quantize(part, wush.FP8, 1.0)[2] for part in parts], axis=1)


def near(y, x, w):
    """Float32 sums of K products that are exact: K units of the last place of their magnitudes."""
    w = np.asarray(w, np.float64)
    bound = w.shape[1] * 2.0**-23 * (np.abs(x) @ np.abs(w).T)
    assert (np.abs(np.asarray(y, np.float64) - x @ w.T) <= bound).all()


@each_weight
def test_a_layer_multiplies_what_the_definition_says(fmt):
    layer = packed(fmt)
    assert layer.input_format is wush.FP8
    near(dot(INPUTS, layer), rounded(INPUTS), dequantize(layer.weight))


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.NVINT4], ids=lambda f: f.name)
def test_matrix_units_take_the_values_as_they_are(fmt):
    """XLA's product of bfloat16 numbers: the same codes, exact operands, float32 sums."""
    layer, x = packed(fmt), jnp.asarray(INPUTS, jnp.bfloat16)
    found = jax.jit(
        lambda x, p: pallas_kernels.transform_quantize_matmul(
            x, None, p, out_dtype=jnp.float32, implementation="xla"
        )
    )(x, layer)
    near(found, rounded(np.asarray(x, np.float32)), dequantize(layer.weight))


def test_experts_take_fp8():
    layer = packed(wush.NVINT4, transform="hadamard")
    experts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), layer)
    sizes = jnp.array([2, 4])
    y = jax.jit(lambda x, p, s: wush.quantized_ragged_dot(x, p, s, implementation="reference"))
    np.testing.assert_allclose(y(INPUTS, experts, sizes), dot(INPUTS, layer), rtol=1e-5, atol=1e-3)


def test_sums_of_one_sign():
    """28672 products of one sign, where short accumulators fail."""
    x = np.abs(RNG.standard_normal((2, 28672))).astype(np.float32)
    w = np.abs(RNG.standard_normal((3, 28672))).astype(np.float32)
    layer = wush.quantize_weight(w, None, wush.Recipe(wush.MXFP4, wush.FP8, transform="identity"))
    near(dot(x, layer), rounded(x), dequantize(layer.weight))


def test_damage_is_visible_and_stays_in_its_token():
    layer = packed(wush.NVINT4)
    hurt = INPUTS.copy()
    hurt[1, 3], hurt[4, -1] = np.inf, np.nan
    hurt[2] = 0
    y, clean = np.asarray(dot(hurt, layer)), np.asarray(dot(INPUTS, layer))
    assert np.isnan(y[[1, 4]]).all()
    assert (y[2] == 0).all()
    np.testing.assert_array_equal(y[[0, 3, 5]], clean[[0, 3, 5]])


@pytest.mark.parametrize("fmt", [wush.FP8, wush.NVINT4], ids=lambda f: f.name)
def test_rounding_under_transformations(fmt):
    """jit, vmap and both gradients of the rounding; a token never knows how many there are."""
    x = jnp.asarray(INPUTS)
    run = jax.jit(lambda v: wush.fake_quantize(v, fmt))
    whole = np.asarray(run(x))
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(x), whole)
    np.testing.assert_array_equal(run(x[2:3]), whole[2:3])
    _, pull = jax.vjp(run, x)
    np.testing.assert_array_equal(pull(x)[0], x)
    np.testing.assert_array_equal(jax.jvp(run, (x,), (2 * x,))[1], 2 * x)


def test_a_layer_under_transformations():
    layer = packed(wush.NVINT4, transform="hadamard")
    x = jnp.asarray(INPUTS)
    y = dot(x, layer)
    mapped = jax.jit(jax.vmap(lambda v: dot(v, layer)))(x[:, None])[:, 0]
    np.testing.assert_allclose(mapped, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    slope = jax.jit(jax.grad(lambda v: dot(v, layer).sum()))(x)
    t = np.kron(np.eye(K // 32), np.asarray(layer.transform, np.float64))
    expected = np.asarray(dequantize(layer.weight), np.float64).sum(0) @ t
    np.testing.assert_allclose(slope, np.tile(expected, (M, 1)), atol=1e-4)


@pytest.mark.usefixtures("eight_devices")
def test_rows_stay_on_their_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    layer = packed(wush.NVINT4, transform="hadamard")
    y = dot(jax.device_put(INPUTS, rows), layer)
    assert y.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(y, dot(INPUTS, layer), rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------- solvers


@functools.cache
def site():
    """A layer with correlated inputs; and held-out rows."""
    w = oracle.correlated(RNG, 32, 64, 32, spread=0.5)
    x = oracle.correlated(RNG, 3072, 64, 32) @ (np.eye(64) + 0.3 * RNG.standard_normal((64, 64)))
    w, x = jnp.float32(w / np.sqrt(np.mean(w**2))), jnp.float32(x / np.sqrt(np.mean(x**2)))
    return w, x[:2048], x[2048:]


@functools.cache
def loss(recipe):
    w, x, held_out = site()
    moment, sample = wush.second_moment(x), Sample.of(x)
    return wush.layer_loss(
        w, held_out, wush.quantize_weight(w, moment, recipe, sample=sample)
    ).item()


GPTQ = wush.Recipe(solver="gptq", interleave=False, share_transform=False)


@pytest.mark.parametrize("input_error", ["ignore", "model", "sample"])
def test_eight_bits_lie_between_four_and_none(input_error):
    """The closer to no rounding, the less there is that the weights can make up for."""
    four = loss(GPTQ)
    eight = loss(GPTQ.replace(activation_format=wush.FP8, input_error=input_error))
    none = loss(GPTQ.replace(activation_format=None))
    assert none < eight < none + 0.15 * (four - none)


@pytest.mark.parametrize("preset", ["FAST", pytest.param("BEST", marks=pytest.mark.slow)])
def test_nvint4_with_fp8_is_half_as_far(preset):
    """Of Gaussian values NVINT4 leaves 0.43 of MXFP4's squared error."""
    recipe = getattr(wush, preset).replace(activation_format=wush.FP8, block_size=32)
    assert loss(recipe.replace(format=wush.NVINT4)) < 0.65 * loss(recipe)
