"""The quantized linear map and its gradient against numpy; the loss; sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from comparison import two_programs
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
import wush_jax as wush

pytestmark = pytest.mark.usefixtures("strict")

N, K, D, M = 24, 64, 32, 16
RNG = np.random.default_rng(0)
WEIGHT = oracle.correlated(RNG, N, K, D, spread=0.5).astype(np.float32)
INPUTS = oracle.correlated(RNG, M, K, D, spread=1.0).astype(np.float32)
MOMENT = np.eye(K, dtype=np.float32) + INPUTS.T @ INPUTS / M

RECIPES = {
    "identity": wush.Recipe(solver="rtn", transform="identity"),
    "shared": wush.Recipe(solver="rtn", transform="hadamard", format=wush.NVFP4),
    "wush": wush.Recipe(solver="rtn"),
    "weights only": wush.Recipe(solver="rtn", activation_format=None),
    "derived": wush.Recipe(
        solver="rtn", activation_format=wush.NVFP4.replace(global_scale=None), block_size=32
    ),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
dot = jax.jit(lambda x, p: wush.quantized_dot(x, p, implementation="reference"))


@functools.cache
def packed_by(recipe):
    return wush.quantize_weight(WEIGHT, MOMENT, recipe)


@jax.jit
def rounded_inputs(x, packed):
    y = x if packed.transform is None else wush.apply_transform(x, packed.transform)
    fmt = packed.input_format
    if fmt is None:
        return y
    return wush.dequantize(wush.quantize(y, fmt, global_scale=packed.input_global_scale))


dequantize = jax.jit(wush.dequantize)


def by_hand(x, packed):
    """Dequantized inputs times dequantized weights, float64 but for the codes."""
    weight = np.asarray(dequantize(packed.weight), np.float64)
    return np.asarray(rounded_inputs(x, packed), np.float64) @ weight.T


@each_recipe
def test_forward_equals_numpy(recipe):
    packed = packed_by(recipe)
    y, expected = dot(INPUTS, packed), by_hand(INPUTS, packed)
    # Float32 sums of K products: sqrt(K) roundings of the largest.
    np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(2, M // 2, K), (1, 1, M, K), (K,)])
def test_any_leading_axes(shape):
    packed = packed_by(RECIPES["wush"])
    x = INPUTS.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    y = dot(x, packed)
    assert y.shape == (*shape[:-1], N)
    whole = dot(INPUTS, packed)
    np.testing.assert_allclose(
        y.reshape(-1, N), whole[: y.size // N], atol=1e-6 * np.abs(whole).max()
    )


def test_narrow_inputs_give_narrow_outputs():
    packed = packed_by(RECIPES["wush"])
    x = jnp.asarray(INPUTS, jnp.bfloat16)
    y = dot(x, packed)
    assert y.dtype == jnp.bfloat16
    wide = dot(x.astype(jnp.float32), packed)
    two_programs(y, wide.astype(jnp.bfloat16))


def effective(packed):
    values = np.asarray(dequantize(packed.weight), np.float64)
    if packed.transform is None:
        return values
    d = packed.transform.shape[-1]
    t_x = np.broadcast_to(np.asarray(packed.transform, np.float64), (K // d, d, d))
    return np.einsum("nbi,bij->nbj", values.reshape(N, -1, d), t_x).reshape(N, K)


@each_recipe
def test_gradient_is_straight_through(recipe):
    packed = packed_by(recipe)
    cotangent = RNG.standard_normal((M, N)).astype(np.float32)
    _, pull = jax.vjp(lambda x: dot(x, packed), jnp.asarray(INPUTS))
    expected = cotangent.astype(np.float64) @ effective(packed)
    np.testing.assert_allclose(
        pull(cotangent)[0], expected, atol=1e-6 * np.abs(expected).max() * N**0.5
    )


def test_packed_weights_get_no_gradient():
    grads = jax.grad(lambda p: dot(INPUTS, p).sum(), allow_int=True)(packed_by(RECIPES["wush"]))
    for leaf in jax.tree.leaves(grads):
        # E8M0 has no zero: the nearest it has, not the NaN that a cast of zero gives.
        assert leaf.dtype == jax.dtypes.float0 or (np.asarray(leaf, np.float32) <= 2.0**-126).all()


def test_layer_loss_equals_its_definition():
    packed = packed_by(RECIPES["wush"])
    exact = INPUTS.astype(np.float64) @ WEIGHT.T.astype(np.float64)
    expected = np.mean((by_hand(INPUTS, packed) - exact) ** 2)
    loss = jax.jit(wush.layer_loss)(WEIGHT, INPUTS, packed)
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)  # a difference of float32 products


def test_predicted_order_is_the_measured_order():
    """The floating-point model ranks the transforms as the quantizer does (MXFP4)."""
    x = oracle.correlated(np.random.default_rng(4), 512, K, D, spread=1.5).astype(np.float32)
    m_x = wush.second_moment(x, D)
    m_w = wush.second_moment(WEIGHT, D)
    predicted, measured = [], []
    for name, pair in (
        ("identity", wush.identity_transform(D)),
        ("hadamard", wush.hadamard_transform(D)),
        ("wush", wush.wush_transform(m_w, m_x)),
    ):
        recipe = wush.Recipe(solver="rtn", transform=name)
        predicted.append(float(wush.predicted_loss(m_w, m_x, pair).sum()))
        packed = wush.quantize_weight(WEIGHT, m_x, recipe)
        measured.append(float(jax.jit(wush.layer_loss)(WEIGHT, x, packed)))
    assert predicted[2] < 0.5 * min(predicted[:2])
    assert measured[2] < 0.7 * min(measured[:2])


# ------------------------------------------------------------------ sharding


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("split", ["tokens", "outputs"])
def test_sharded_map_equals_the_whole(split):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    packed = packed_by(RECIPES["wush"])
    whole = dot(INPUTS, packed)
    everywhere = place(packed)
    if split == "tokens":
        x, spread, expected = place(INPUTS, "x"), everywhere, PartitionSpec("x")
    else:
        rows = dataclasses.replace(
            everywhere.weight,
            codes=place(packed.weight.codes, "x"),
            scales=place(packed.weight.scales, "x"),
        )
        x, spread = place(INPUTS), dataclasses.replace(everywhere, weight=rows)
        expected = PartitionSpec(None, "x")
    y = dot(x, spread)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, expected), y.ndim)
    np.testing.assert_allclose(y, whole, atol=1e-6 * np.abs(whole).max())  # order of the sums


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 32)), r"\(2, 32\); its last axis must be K=64 of the weight \(24, 64\)"),
        (jnp.float32(1), r"shape \(\); its last axis must be K=64"),
    ],
)
def test_mistakes_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        wush.quantized_dot(x, packed_by(RECIPES["identity"]))


def test_unknown_precision():
    packed = packed_by(RECIPES["identity"])
    with pytest.raises(ValueError, match=r"precision='exactly' is unknown.*'folded'"):
        wush.quantized_dot(jnp.ones((2, K)), packed, precision="exactly")


def test_unknown_implementation():
    packed = packed_by(RECIPES["identity"])
    with pytest.raises(ValueError, match=r"implementation='magic' is unknown for .*'reference'"):
        wush.quantized_dot(jnp.ones((2, K)), packed, implementation="magic")


def test_no_weight_is_a_mistake():
    message = "packed is an empty tuple; pass one .* or several"
    with pytest.raises(ValueError, match=message):
        wush.quantized_dot(jnp.ones((2, K)), ())
    for fmt in ("packed", wush.MXFP4):
        with pytest.raises(ValueError, match=message):
            pallas_kernels.transform_quantize_matmul(jnp.ones((2, K)), None, (), fmt)
