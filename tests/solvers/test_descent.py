"""Coordinate descent: never worse, exact on small problems, and worth its time after GPTQ."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.solvers.descent import descend
from wush_jax.solvers.gptq import gptq

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.once]

G, N = 32, 6
RNG = np.random.default_rng(0)
HESSIAN = jnp.float32(oracle.random_moment(RNG, 2 * G, 100) + 0.01 * np.eye(2 * G))
TARGET = jnp.float32(RNG.standard_normal((2 * G, N)))
GLOBAL = jnp.float32(3.0)
quick = jax.jit(descend, static_argnames=("fmt", "sweeps"))
encode, decode = jax.jit(wush.MXFP4.encode_groups), jax.jit(wush.MXFP4.decode_with)


def start():
    codes, scale = encode(TARGET.T.reshape(N, 2, G), GLOBAL)
    return codes.reshape(N, -1).T, scale.T


def values(codes, scale):
    groups = np.asarray(codes).T.reshape(N, 2, G)
    return np.float64(decode(groups, scale.T, GLOBAL)).reshape(N, -1).T


def losses(codes, scale):
    e = values(codes, scale) - np.float64(TARGET)
    return np.einsum("kn,kl,ln->n", e, np.float64(HESSIAN), e)


def test_every_sweep_lowers_the_loss_until_nothing_moves():
    codes, scale = start()
    last = losses(codes, scale)
    for _ in range(20):
        again = quick(codes, scale, TARGET, HESSIAN, wush.MXFP4, GLOBAL, 1)
        now = losses(again, scale)
        assert (now <= last * (1 + 1e-5)).all()  # float32 gradients
        if (again == codes).all():
            break
        codes, last = again, now
    else:
        pytest.fail("still moving after 20 sweeps")
    assert last.sum() < 0.7 * losses(*start()).sum()
    # A fixed point: no single code of the first rows can do better.
    tried = np.asarray(codes)
    for row, code in itertools.product(range(4), range(16)):
        other = tried.copy()
        other[row] = code
        assert (losses(other, scale) >= last * (1 - 1e-5)).all()


def test_sweeps_add_up():
    codes, scale = start()
    twice = quick(codes, scale, TARGET, HESSIAN, wush.MXFP4, GLOBAL, 2)
    for _ in range(2):
        codes = quick(codes, scale, TARGET, HESSIAN, wush.MXFP4, GLOBAL, 1)
    # The error is carried along instead of decoded again: ties in float32 may fall elsewhere.
    assert (np.asarray(twice) != np.asarray(codes)).mean() < 0.01


def test_without_correlation_rounding_is_the_end():
    codes, scale = start()
    same = quick(codes, scale, TARGET, jnp.eye(2 * G), wush.MXFP4, GLOBAL, 2)
    np.testing.assert_array_equal(values(same, scale), values(codes, scale))


@jax.jit
def original(q, activation):
    """The values of a weight, back in its own coordinates."""
    return wush.apply_transform(wush.dequantize(q), activation.T)


@functools.cache
def layer():
    rng = np.random.default_rng(1)
    w = jnp.float32(rng.standard_normal((48, 64)))
    return w, jnp.float32(oracle.random_moment(rng, 64, 300))


@pytest.mark.parametrize("order", [False, True])
def test_after_gptq(order):
    """On the damped Hessian that both minimise; blocks in any order."""
    w, h = layer()
    damped = np.float64(oracle.damp(np.float64(h), 1e-2))
    transform = wush.hadamard_transform(32)

    def loss(descent):
        q, used = gptq(w, h, transform, wush.MXFP4, descent=descent, activation_order=order)
        e = np.float64(original(q, used.activation) - w)
        return np.einsum("ni,ij,nj->n", e, damped, e)

    before, after = loss(0), loss(3)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.98 * before.sum()
