"""Transforms fitted to the codes: the exact minimum, never worse, and worth it after GPTQ."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.solvers.gptq import gptq
from wush_jax.solvers.refit import Aim, refit, refit_rounds
from wush_jax.solvers.site import quantize_site
from wush_jax.transforms import BlockTransform, inverse_transpose
from wush_jax.transforms.sample import Sample

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.once]

D, BLOCKS, N = 4, 3, 10
K = D * BLOCKS
quick = jax.jit(refit)


def problem(seed=0):
    """A transform, values whose product with it is near a target, and a Hessian: float64."""
    rng = np.random.default_rng(seed)
    t = rng.standard_normal((BLOCKS, D, D))
    v = rng.standard_normal((N, K))
    target = product(t, v) + 0.3 * rng.standard_normal((N, K))
    return t, v, target, oracle.damp(oracle.random_moment(rng, K, 40), 1e-2)


def product(t, v):
    return np.einsum("nbi,bij->nbj", v.reshape(N, BLOCKS, D), np.float64(t)).reshape(N, K)


def loss(t, v, target, h):
    e = product(t, v) - target
    return np.einsum("ni,ij,nj->", e, h, e)


def as_pair(t, dtype=jnp.float32):
    return BlockTransform(jnp.float32(t), inverse_transpose(jnp.float32(t))).astype(dtype)


def test_alone_a_block_finds_the_least_squares_transform():
    """One block: the minimum over T in closed form, by plain least squares in float64."""
    rng = np.random.default_rng(1)
    v, target = rng.standard_normal((N, D)), rng.standard_normal((N, D))
    h = oracle.damp(oracle.random_moment(rng, D, 20), 1e-2)
    found = quick(as_pair(np.eye(D)[None]), *map(jnp.float32, (v, target, h)), 0.0)
    # With one block H weighs all changes alike: T = argmin ||V T - target||.
    expected = np.linalg.lstsq(v, target, rcond=None)[0]
    np.testing.assert_allclose(found.activation[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.weight[0], np.linalg.inv(expected).T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
def test_two_sweeps_of_the_formula(damping):
    t, v, target, h = problem()
    found = quick(as_pair(t), *map(jnp.float32, (v, target, h)), damping)
    expected = t.copy()
    for _ in range(2):
        for b in range(BLOCKS):
            columns = slice(b * D, (b + 1) * D)
            own, e = v[:, columns], product(expected, v) - target
            gram = own.T @ own
            mu = damping * np.trace(gram) / D
            slope = own.T @ (e @ h)[:, columns]
            change = np.linalg.solve(gram + mu * np.eye(D), slope)
            expected[b] -= change @ np.linalg.inv(h[columns, columns])
    np.testing.assert_allclose(found.activation, expected, rtol=2e-4, atol=2e-5)


def test_every_round_lowers_the_loss_to_that_of_all_blocks_at_once():
    t, v, target, h = problem(2)
    pair, last = as_pair(t), loss(t, v, target, h)
    for _ in range(200):
        pair = quick(pair, *map(jnp.float32, (v, target, h)), 0.0)
        now = loss(pair.activation, v, target, h)
        assert now <= last * (1 + 1e-5)
        last = now
    # All blocks together: least squares in the coordinates where H is the identity.
    root = np.linalg.cholesky(h)
    basis = []
    for b, i, j in np.ndindex(BLOCKS, D, D):
        one = np.zeros((BLOCKS, D, D))
        one[b, i, j] = 1.0
        basis.append((product(one, v) @ root).ravel())
    wanted = (target @ root).ravel()
    best = np.linalg.lstsq(np.transpose(basis), wanted, rcond=None)[0]
    least = np.sum((np.transpose(basis) @ best - wanted) ** 2)
    np.testing.assert_allclose(last, least, rtol=1e-3)


def test_damping_keeps_the_transform_near():
    t, v, target, h = problem()
    changes = []
    for damping in (0.0, 1.0, 100.0):
        pair = quick(as_pair(t), *map(jnp.float32, (v, target, h)), damping)
        changes.append(np.linalg.norm(np.float64(pair.activation) - t))
    assert changes[0] > changes[1] > 10 * changes[2] > 0


def test_the_pair_is_of_the_rounded_transform():
    t, v, target, h = problem()
    pair = quick(as_pair(t, jnp.bfloat16), *map(jnp.float32, (v, target, h)), 1e-2)
    assert pair.activation.dtype == jnp.bfloat16
    identity = np.float64(pair.activation) @ np.float64(pair.weight).mT
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(D), identity.shape), atol=1e-4)


def test_a_block_of_zero_codes_stays():
    t, v, target, h = problem()
    v[:, :D] = 0
    pair = quick(as_pair(t), *map(jnp.float32, (v, target, h)), 0.0)
    np.testing.assert_array_equal(pair.activation[0], jnp.float32(t[0]))
    assert np.isfinite(pair.activation).all()


@functools.cache
def layer():
    rng = np.random.default_rng(1)
    w = jnp.float32(oracle.correlated(rng, 48, 128, 32, spread=0.5))
    x = jnp.float32(oracle.correlated(rng, 2048, 128, 32))
    return w, x


@pytest.mark.parametrize("order", [False, True])
def test_after_gptq(order):
    """On the damped Hessian that all parts minimise; blocks in any order."""
    w, x = layer()
    h = wush.second_moment(x)
    damped = np.float64(oracle.damp(np.float64(h), 1e-2))
    own = [wush.second_moment(m, 32) for m in (w, x)]
    transform = wush.wush_transform(*own).astype(jnp.bfloat16)

    def measure(found):
        values, used = wush.dequantize(found[0]), found[1].activation
        e = np.float64(wush.apply_transform(values, used.mT) - w)
        return np.einsum("ni,ij,nj->", e, damped, e)

    def rounds(found, count, descent):
        def aim(moved):
            return Aim(h, None, None)

        return measure(refit_rounds(*found, w, aim, rounds=count, descent=descent))

    plain = gptq(w, h, transform, wush.MXFP4, activation_order=order)
    descended = gptq(w, h, transform, wush.MXFP4, activation_order=order, descent=3)
    assert rounds(plain, 1, 0) < 0.95 * measure(plain)
    assert rounds(descended, 3, 3) < 0.8 * measure(descended)


def test_a_round_that_does_harm_is_undone():
    """Pairs whose quantized inputs are far off behind every other transform."""
    w, x = layer()
    h = wush.second_moment(x)
    own = [wush.second_moment(m, 32) for m in (w, x)]
    transform = wush.wush_transform(*own).astype(jnp.bfloat16)
    start = gptq(w, h, transform, wush.MXFP4, cross_moment=h, pairs=(x, x))

    def aim(moved):
        same = jnp.all(moved.activation == start[1].activation)
        return Aim(h, h, (x, jnp.where(same, x, -x)))

    for old, new in zip(
        jax.tree.leaves(start),
        jax.tree.leaves(refit_rounds(*start, w, aim, rounds=2, descent=1)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.float32(old), np.float32(new))


@pytest.mark.parametrize("share", [False, True])
def test_a_recipe_with_it(share):
    w, x = layer()
    moment, sample = wush.second_moment(x), Sample.of(x)
    losses, weights = [], [w[:24], w[24:]]
    for rounds in (0, 3):
        recipe = wush.BEST.replace(refit=rounds, share_transform=share)
        packed = quantize_site(weights, moment, recipe, sample=sample)
        assert (packed[0].transform is packed[1].transform) == share
        assert packed[0].transform.dtype == jnp.bfloat16
        pairs = zip(weights, packed, strict=True)
        losses.append(sum(wush.layer_loss(a, x, p).item() for a, p in pairs))
    assert losses[1] < 0.97 * losses[0], losses


def test_one_transform_for_all_blocks_is_refused():
    w, x = layer()
    found = gptq(w, wush.second_moment(x), wush.hadamard_transform(32), wush.MXFP4)
    with pytest.raises(ValueError, match=re.escape("transform has shape (32, 32): one for all")):
        refit_rounds(*found, w, lambda moved: None, rounds=1)
