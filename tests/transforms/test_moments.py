"""Second moments: streamed, merged, blocked, sharded, all equal to the plain sum in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import ONE_ORDER
from jax.sharding import NamedSharding, PartitionSpec

import wush_jax as wush

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

K, D = 16, 4
BLOCKS = pytest.mark.parametrize("block", [None, D])


def exact(x, block=None):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    m = x.T @ x / len(x)
    if block is None:
        return m
    return np.stack([m[i : i + block, i : i + block] for i in range(0, len(m), block)])


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) + 0.3


def check(got, x, block=None, atol=2e-6):
    """Entries are of order 1; float32 sums of n terms are off by about sqrt(n) 6e-8, n < 1000."""
    np.testing.assert_allclose(got, exact(x, block), atol=atol)


@BLOCKS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_second_moment(block, dtype):
    x = jnp.asarray(tokens(3, 100, K), dtype)
    got = jax.jit(wush.second_moment, static_argnums=1)(x, block)
    assert got.dtype == jnp.float32
    check(got, x.astype(jnp.float32), block)  # products of narrow values are exact in float32


@BLOCKS
def test_streaming_equals_batch(block):
    x = tokens(200, K)
    update = jax.jit(wush.Moments.update)
    state = wush.Moments.init(K, block)
    for part in np.split(x, [50, 100, 150]):
        state = update(state, part)
    assert int(state.count) == 200
    assert state.block == block
    check(state.finalize(), x, block)


def test_merge_is_associative_to_rounding():
    x = tokens(300, K)
    a, b, c = (wush.Moments.init(K).update(p) for p in np.split(x, [10, 150]))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert int(merged.count) == 300
        check(merged.finalize(), x)
    empty = wush.Moments.init(K)
    for merged in (a.merge(empty), empty.merge(a)):
        np.testing.assert_array_equal(merged.mean, a.mean)
        assert int(merged.count) == 10


def test_many_batches_under_scan_stay_accurate():
    """1000 batches: a running mean errs by about sqrt(1000) roundings, not 1000."""
    x = tokens(1000, 8, K)
    x[:, :, 0] += 10  # entries of order 100 make a drift of the mean visible

    @jax.jit
    def stream(batches):
        return jax.lax.scan(lambda m, b: (m.update(b), None), wush.Moments.init(K), batches)[0]

    state = stream(x)
    assert int(state.count) == 8000
    np.testing.assert_allclose(state.finalize(), exact(x), rtol=0, atol=100 * 2**-23 * 1000**0.5)


def test_moments_are_a_pytree():
    state = wush.Moments.init(K, D).update(tokens(5, K))
    leaves, tree = jax.tree.flatten(state)
    assert [leaf.shape for leaf in leaves] == [(K // D, D, D), (), ()]
    assert jax.tree.unflatten(tree, leaves).block == D
    stacked = jax.vmap(lambda x: wush.Moments.init(K, D).update(x))(tokens(3, 5, K))
    assert stacked.mean.shape == (3, K // D, D, D)
    check(stacked.mean[1], tokens(3, 5, K)[1], D)


@pytest.mark.usefixtures("eight_devices")
@BLOCKS
def test_sharded_tokens(block):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tokens(64, 3, K)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    update = jax.jit(functools.partial(wush.Moments.update, wush.Moments.init(K, block)))
    state = update(spread)
    assert state.mean.sharding.is_fully_replicated
    check(state.finalize(), x, block)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "block"), [(K, None), (K, D), (1024, None), (1024, 32)])
def test_moments_do_not_depend_on_the_number_of_devices(size, block, dtype):
    """To the last bit on CPUs. A GPU's library may sum products of another number in another order.

    1024 channels are enough for the moment to be computed some rows at a time.
    """
    x = jnp.asarray(tokens(8, 15, size), dtype)
    moment = jax.jit(wush.second_moment, static_argnums=1)
    alone = moment(x, block)
    # products of 15 terms in float32: each within 15 roundings of magnitudes below 30
    np.testing.assert_allclose(alone, exact(x.astype(jnp.float32), block), atol=30 * 2**-24)
    for count in (2, 4, 8):
        devices = np.array(jax.devices()[:count])
        mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = moment(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), block)
        if ONE_ORDER:
            np.testing.assert_array_equal(spread, alone)
        np.testing.assert_allclose(spread, alone, atol=30 * 2**-24)


@BLOCKS
def test_moments_batch(block):
    """Also where a jitted function is batched, outside the context in which it was traced."""
    x = tokens(3, 2, 8, K)
    moment = jax.jit(functools.partial(wush.second_moment, block=block))
    found = jax.vmap(moment)(x)
    assert found.dtype == jnp.float32
    for one, rows in zip(found, x, strict=True):
        check(one, rows, block)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wush.Moments.init(K).finalize(), "moments are empty.*pass some batches"),
        (lambda: wush.Moments.init(K, 5), "block=5 does not divide size=16; choose a divisor"),
        (lambda: wush.Moments.init(K, 0), "block=0 does not divide size=16"),
        (
            lambda: wush.Moments.init(K).merge(wush.Moments.init(8)),
            r"\(8, 8\), expected \(16, 16\)",
        ),
        (lambda: wush.second_moment(jnp.ones(K)), r"shape \(16,\); it must be \(..., K\)"),
        (lambda: wush.second_moment(jnp.ones((0, K))), r"\(0, 16\).*at least one row"),
        (lambda: wush.second_moment(jnp.ones((2, K)), 5), r"block=5 does not divide K=16"),
        (
            lambda: wush.Moments.init(2).update(jnp.float32([[1, np.nan]])).finalize(),
            r"moments \(2, 2\) has 3 non-finite values; find the .*batch",
        ),
        (lambda: wush.Moments.init(K).update(jnp.ones((2, 8))), r"\(8, 8\), expected \(16, 16\)"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
