"""Hadamard matrices, damping, spectral factors, blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.transforms import linalg

pytestmark = pytest.mark.usefixtures("strict")


def is_prime(q):
    return q > 1 and all(q % f for f in range(2, q))


def reachable(n):
    """n = 2^k times a core 1, q + 1 (q = 3 mod 4), 2 (q + 1) (q = 1 mod 4)."""
    if n == 1 or (is_prime(n - 1) and n % 4 == 0):
        return True
    half = n // 2
    if n % 4 == 0 and half % 2 == 0 and is_prime(half - 1) and (half - 1) % 4 == 1:
        return True
    return n % 2 == 0 and reachable(half)


@pytest.mark.parametrize("n", [n for n in range(1, 81) if n % 4 == 0 or n < 3])
def test_hadamard_sizes(n):
    if not reachable(n):
        with pytest.raises(ValueError, match=f"n={n}: .*use a power of two"):
            wush.hadamard_matrix(n)
        return
    h = np.asarray(wush.hadamard_matrix(n), np.float64)
    np.testing.assert_allclose(np.abs(h), n**-0.5, rtol=1e-7)  # one rounding to float32
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-6)  # n products of rounded entries


@pytest.mark.parametrize("n", [3, 5, 6, 7, 10, 18, 33, 35, 50])
def test_sizes_without_a_hadamard_matrix(n):
    with pytest.raises(ValueError, match=f"n={n}: no Hadamard.*use a power of two"):
        wush.hadamard_matrix(n)
    with pytest.raises(ValueError, match=f"d={n}"):
        wush.hadamard_transform(n)


@pytest.mark.parametrize("n", [0, -4])
def test_sizes_below_one(n):
    with pytest.raises(ValueError, match=f"n={n}; give a whole number, at least 1"):
        wush.hadamard_matrix(n)


def test_sylvester_order():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(wush.hadamard_matrix(4) * 2, expected)
    np.testing.assert_allclose(wush.hadamard_matrix(64), oracle.hadamard(64), rtol=1e-7)
    assert wush.hadamard_matrix(8, jnp.bfloat16).dtype == jnp.bfloat16


def test_damping():
    m = oracle.random_moment(np.random.default_rng(0), 8).astype(np.float32)
    got = linalg.damp(jnp.stack([m, 0 * m]), 0.01)
    np.testing.assert_allclose(got[0], oracle.damp(m, 0.01), rtol=1e-6)  # float32
    np.testing.assert_array_equal(got[1], np.eye(8))  # zeros have no scale of their own


def test_damping_makes_up_for_products_that_vanish():
    """Weights that decayed to 1e-19: their moment has lost what lies below 2^-126."""
    x = np.random.default_rng(0).standard_normal((4, 32)) * 1e-19
    m = np.asarray(wush.second_moment(x.astype(np.float32)))
    m = np.where(np.abs(m) < 2.0**-126, 0, m)  # a GPU keeps them
    damped = linalg.float64_construction(linalg.damp)(m, 1e-2)
    plain = oracle.damp(np.asarray(m, np.float64), 1e-2)
    assert np.linalg.eigvalsh(plain).min() < 0
    assert np.linalg.eigvalsh(np.asarray(damped, np.float64)).min() > 0


def test_spectral_factors():
    rng = np.random.default_rng(1)
    m_w, m_x = (np.stack([oracle.random_moment(rng, 8) for _ in range(3)]) for _ in range(2))
    build = jax.jit(linalg.float64_construction(linalg.spectral_factors))
    left, s, right = build(*(jnp.asarray(m, jnp.float32) for m in (m_w, m_x)))
    assert {a.dtype for a in (left, s, right)} == {jnp.dtype("float32")}
    for b in range(3):
        w32, x32 = m_w[b].astype(np.float32).astype(float), m_x[b].astype(np.float32).astype(float)
        _, _, expected = oracle.wush(w32, x32)
        np.testing.assert_allclose(s[b], expected, rtol=1e-6)  # built in float64, one rounding
        # Signs are pinned: the largest entry of each row of the first factor is positive.
        rows = np.asarray(left[b])
        assert (rows.max(-1) >= -rows.min(-1)).all()
        # U^T W'^T (X' V) = S: both factors belong together. Float32 rounding of the factors.
        inverse = np.linalg.inv(w32)
        np.testing.assert_allclose(
            rows @ inverse @ rows.T, np.eye(8), atol=1e-6 * np.linalg.cond(w32)
        )
        np.testing.assert_allclose(
            rows @ np.asarray(right[b]).T, np.diag(s[b]), atol=1e-6 * float(s[b, 0])
        )


def test_diagonal_blocks():
    m = np.arange(2 * 36, dtype=np.float32).reshape(2, 6, 6)
    got = linalg.diagonal_blocks(jnp.asarray(m), 2)
    assert got.shape == (2, 3, 2, 2)
    for b in range(3):
        np.testing.assert_array_equal(got[:, b], m[:, 2 * b : 2 * b + 2, 2 * b : 2 * b + 2])
    with pytest.raises(ValueError, match=r"block=4 does not divide K=6 of the moment \(2, 6, 6\)"):
        linalg.diagonal_blocks(jnp.asarray(m), 4)


def test_float64_construction_leaves_nothing_behind():
    seen = []

    @linalg.float64_construction
    def build(x, n):
        seen.append(x.dtype)
        return {"half": x / 2, "n": jnp.int32(n)}

    out = jax.jit(build, static_argnums=1)(jnp.ones(3, jnp.bfloat16), 4)
    assert seen == [jnp.float64]
    assert out["half"].dtype == jnp.float32
    assert out["n"].dtype == jnp.int32
    assert not jax.config.jax_enable_x64
    assert jnp.ones(1).dtype == jnp.float32
    with jax.enable_x64(True):
        assert build(jnp.ones(3, jnp.float64), 4)["half"].dtype == jnp.float64
        assert build(jnp.ones(3, jnp.float32), 4)["half"].dtype == jnp.float32


@pytest.mark.filterwarnings("error")
def test_factors_keep_float64_where_a_compiled_function_is_batched():
    """A result type that was recorded inside the x64 context would be cut to float32 outside."""

    @jax.jit
    @linalg.float64_construction
    def factors(m):
        unit, roots = linalg.unit_blocks(linalg.upper_factor(m), 2)
        return linalg.matmul(unit, unit.mT), roots

    rng = np.random.default_rng(3)
    m = np.float32([oracle.random_moment(rng, 6, 1e3) for _ in range(2)])
    for batched, alone in zip(
        jax.vmap(factors)(m), zip(*map(factors, m), strict=True), strict=True
    ):
        np.testing.assert_array_equal(batched, np.stack(alone))
    r = np.linalg.cholesky(m[0, ::-1, ::-1].astype(np.float64))[::-1, ::-1]
    blocks = np.stack([r[i : i + 2, i : i + 2] for i in (0, 2, 4)])
    np.testing.assert_allclose(factors(m[0])[1], blocks, rtol=1e-6)
    unit = np.concatenate([r[:, 2 * i : 2 * i + 2] @ np.linalg.inv(blocks[i]) for i in range(3)], 1)
    np.testing.assert_allclose(factors(m[0])[0], unit @ unit.T, rtol=1e-5, atol=1e-5)
