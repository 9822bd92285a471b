"""The pair of transforms: rounding, application, what products keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructions import B, D, build, moments

import wush_jax as wush

pytestmark = pytest.mark.usefixtures("strict")


def test_orthogonal_transforms():
    random = wush.random_transform(jax.random.key(0), D)
    for pair in (wush.identity_transform(D), wush.hadamard_transform(D), random):
        activation, weight = np.asarray(pair.activation), np.asarray(pair.weight)
        np.testing.assert_allclose(activation @ weight.T, np.eye(D), atol=1e-6)
        np.testing.assert_array_equal(activation, weight)
        assert pair.block_size == D
    again = wush.random_transform(jax.random.key(0), D)
    np.testing.assert_array_equal(again.activation, random.activation)
    other = wush.random_transform(jax.random.key(1), D)
    assert np.abs(other.activation - random.activation).max() > 0.1


def test_rounded_pair_stays_an_inverse_pair():
    """bfloat16 T_X, and the weight's transform is the inverse transpose of what T_X became."""
    w32, x32, *_ = moments()
    pair = build["wush"](w32, x32).astype(jnp.bfloat16)
    assert pair.activation.dtype == jnp.bfloat16
    for b in range(B):
        t_x, t_w = (np.asarray(t[b], np.float64) for t in (pair.activation, pair.weight))
        np.testing.assert_allclose(
            t_w, np.linalg.inv(t_x).T, rtol=1e-6, atol=1e-6 * np.abs(t_w).max()
        )
    assert pair.astype(jnp.bfloat16) is pair


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_transform(shared, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, B * D)), dtype)
    t = jnp.asarray(rng.standard_normal((D, D) if shared else (B, D, D)), jnp.float32)
    y = jax.jit(wush.apply_transform)(x, t)
    assert y.dtype == dtype
    full = np.broadcast_to(t, (B, D, D)).astype(np.float64)
    blocks = np.asarray(x, np.float64).reshape(2, 5, B, D)
    expected = np.einsum("...bi,bji->...bj", blocks, full).reshape(x.shape)
    # float32 sums of 8 products; bfloat16 rounds the result (2**-9 of at most 10).
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, atol=2e-6 if dtype == "float32" else 0.03
    )


def test_pairs_preserve_products():
    w32, x32, *_ = moments()
    pair = build["wush"](w32, x32)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((4, B * D)).astype(np.float32) for _ in range(2))
    moved = [
        np.asarray(wush.apply_transform(v, t), np.float64)
        for v, t in ((x, pair.activation), (w, pair.weight))
    ]
    scale = np.linalg.norm(moved[0]) * np.linalg.norm(moved[1])
    np.testing.assert_allclose(moved[0] @ moved[1].T, x @ w.T.astype(float), atol=1e-6 * scale)
