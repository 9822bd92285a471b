"""The experts' quantized product: against float64, row by row, and under jax's transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import wush_jax as wush
from pallas_kernels.stacks import Stack
from wush_jax.layers import pack_for_kernels, unpack_from_kernels
from wush_jax.layers.nnx import QuantizedDense, dense_layers
from wush_jax.layers.ragged import bias_of_rows
from wush_jax.layers.ragged_linear import RaggedLinear

pytestmark = pytest.mark.once

ROWS, K, N, E, D = 11, 128, 24, 3, 32
SIZES = np.int32([4, 0, 5])  # an expert without rows, and two rows beyond the last
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, K)).astype(np.float32)
WEIGHTS = RNG.standard_normal((E, N, K)).astype(np.float32)
MOMENTS = np.stack(
    [[oracle.random_moment(RNG, D, 10) for _ in range(K // D)] for _ in range(E)]
).astype(np.float32)
RECIPES = {
    "W4A4": wush.Recipe(),
    "W4A16": wush.Recipe(activation_format=None),
    "W4A8": wush.Recipe(activation_format=wush.FP8),
    "NVFP4": wush.Recipe(format=wush.NVFP4, block_size=32),
    "Hadamard": wush.Recipe(transform="hadamard"),
    "identity": wush.Recipe(transform="identity"),
}


def experts(recipe):
    each = [wush.quantize_weight(w, m, recipe) for w, m in zip(WEIGHTS, MOMENTS, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def one(packed, e):
    return jax.tree.map(lambda leaf: leaf[e], packed)


def expected(x, packed):
    """Row by row in float64: the transformed row on its format's grid, times the weight."""
    expert = np.repeat(np.arange(E), SIZES)
    rows = np.float64(x[: len(expert)])
    if packed.transform is not None:
        matrices = np.float64(packed.transform)
        matrices = matrices if matrices.ndim == 4 else matrices[:, None]
        matrices = np.broadcast_to(matrices, (E, K // D, D, D))
        blocks = rows.reshape(-1, K // D, D)
        rows = np.einsum("mbij,mbj->mbi", matrices[expert], blocks).reshape(-1, K)
    if packed.input_format is not None:  # each token by itself
        rows = np.float64(wush.fake_quantize(np.float32(rows), packed.input_format))
    values = np.float64(jax.vmap(wush.dequantize)(packed.weight))
    y = np.einsum("mnk,mk->mn", values[expert], rows)
    return np.concatenate([y, np.zeros((len(x) - len(y), N))])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_multiplied_by_its_expert(name, implementation):
    packed = experts(RECIPES[name])
    got = wush.quantized_ragged_dot(X, packed, SIZES, implementation=implementation)
    want = expected(X, packed)
    assert got.dtype == X.dtype
    # Sums of 128 float32 products; a transformed value beside a tie may go to the other side.
    error = np.abs(got - want) / np.abs(want).max()
    assert np.median(error) < 1e-6
    assert np.sqrt(np.mean(error**2)) < 2e-3
    np.testing.assert_array_equal(got[9:], 0)


def test_rows_equal_those_of_the_dense_product():
    packed = experts(RECIPES["W4A4"])
    got = wush.quantized_ragged_dot(X, packed, SIZES, implementation="reference")
    for rows, e in ((slice(0, 4), 0), (slice(4, 9), 2)):
        alone = wush.quantized_dot(X[rows], one(packed, e), implementation="reference")
        np.testing.assert_allclose(got[rows], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_transform_that_all_share(implementation):
    packed = experts(RECIPES["Hadamard"])
    matrix = packed.transform[0]
    want = wush.quantized_ragged_dot(X, packed, SIZES, implementation=implementation)
    blocks = jnp.broadcast_to(matrix, (1, K // D, D, D))
    for transform in (matrix, matrix[None], blocks):
        shared = dataclasses.replace(packed, transform=transform)
        got = wush.quantized_ragged_dot(X, shared, SIZES, implementation=implementation)
        # One product for all rows, in another order of sums.
        assert np.median(np.abs(got - want)) < 1e-6 * np.abs(want).max()


def test_bfloat16_operands_are_exact_where_they_can_be():
    packed = experts(RECIPES["identity"])
    x = jnp.asarray(X, jnp.bfloat16)
    got = wush.quantized_ragged_dot(x, packed, SIZES, implementation="xla")
    want = expected(np.asarray(x, np.float32), packed)
    assert got.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end.
    assert np.abs(got.astype(jnp.float32) - want).max() <= 2.0**-8 * np.abs(want).max()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_pass_straight_through(implementation):
    packed = experts(RECIPES["W4A4"])

    def loss(x):
        gate, up = wush.quantized_ragged_dot(
            x, (packed, packed), SIZES, implementation=implementation
        )
        return jnp.sum(gate * COTANGENT + 2 * up * COTANGENT)

    COTANGENT = RNG.standard_normal((ROWS, N)).astype(np.float32)
    got = jax.grad(loss)(X)
    want = np.zeros((ROWS, K))
    for rows, e in ((slice(0, 4), 0), (slice(4, 9), 2)):
        weight = one(packed, e)
        values = np.float64(wush.dequantize(weight.weight)).reshape(N, -1, D)
        matrix = np.float64(weight.transform)
        effective = np.einsum("nbi,bij->nbj", values, matrix).reshape(N, K)
        want[rows] = 3 * np.float64(COTANGENT[rows]) @ effective
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_experts_spread_over_devices(implementation):
    """Each device has an expert and the rows that were sent to it."""
    packed = jax.tree.map(lambda leaf: leaf[jnp.array([0, 2])], experts(RECIPES["W4A4"]))
    x, sizes = X[:10], np.int32([5, 5])
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("expert")
    placed = jax.device_put((x, packed, sizes), NamedSharding(mesh, spec))

    def run(x, packed, sizes):
        return wush.quantized_ragged_dot(x, packed, sizes, implementation=implementation)

    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(*placed)
    want = run(x, packed, sizes)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mistakes_are_named():
    packed = experts(RECIPES["Hadamard"])
    for sizes, message in (
        (np.int32([4, 4, 4]), "sum to at most the 11 rows"),
        (np.int32([4, -1, 4]), "at least 0"),
        (np.int32([4, 4]), "3 groups"),
        (np.float32([4, 4, 3]), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            wush.quantized_ragged_dot(X, packed, sizes)
    with pytest.raises(ValueError, match="agree in K"):
        wush.quantized_ragged_dot(X[:, :64], packed, SIZES)
    with pytest.raises(ValueError, match=r"\(M, K\)"):
        wush.quantized_ragged_dot(X[None], packed, SIZES)
    with pytest.raises(ValueError, match="empty tuple"):
        wush.quantized_ragged_dot(X, (), SIZES)
    wrong = dataclasses.replace(packed, transform=jnp.zeros((K // D, D, D)))
    with pytest.raises(ValueError, match=r"transform\[None\]"):
        wush.quantized_ragged_dot(X, wrong, SIZES)


def test_plain_experts_and_their_bias():
    layer = RaggedLinear(K, N, experts=E, use_bias=True, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.asarray(RNG.standard_normal((E, N)), jnp.float32))
    kernel, bias = np.float64(layer.kernel[...]), np.float64(layer.bias[...])
    want = np.zeros((ROWS, N))
    for rows, e in ((slice(0, 4), 0), (slice(4, 9), 2)):
        want[rows] = np.float64(X[rows]) @ kernel[e] + bias[e]
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(layer(X, SIZES), want, rtol=1e-5, atol=1e-5)
    assert bias_of_rows(layer.bias[...], SIZES, jnp.zeros((ROWS, N))).shape == (ROWS, N)


def test_layers_hold_records_and_give_them_back():
    """Of experts whose rows come sorted; the same outputs, and the same codes again."""
    dense = dense_layers(RaggedLinear(K, N, experts=E, rngs=nnx.Rngs(0)))[0][""]
    packed = experts(RECIPES["W4A4"])
    model = nnx.List([QuantizedDense(dense, packed)])
    wanted, kernel = model[0](X, SIZES), model[0].kernel[...]
    gained = pack_for_kernels(model, force=True)
    assert gained == {"0": model[0].packed.weight.nbytes - packed.weight.nbytes}
    assert isinstance(model[0].packed.weight, Stack)
    assert model[0].packed.shape == (E, N, K)
    np.testing.assert_array_equal(model[0](X, SIZES), wanted)
    np.testing.assert_array_equal(model[0].kernel[...], kernel)
    unpack_from_kernels(model)
    np.testing.assert_array_equal(model[0].codes[...], packed.weight.codes)
