"""What holds of any numbers at all: the result is finite, or a ValueError; damage stays visible.

More of them with ``pytest --hypothesis-profile=long``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from material import (
    HUGE,
    NORMAL,
    ROWS,
    TINY,
    D,
    K,
    kinds,
    material,
    seeds,
)

import wush_jax as wush
from wush_jax import transforms

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("strict")]


CONSTRUCTIONS = {
    "wush": wush.wush_transform,
    "wus": functools.partial(wush.wush_transform, hadamard=False),
    "calibrated_hadamard": transforms.calibrated_hadamard_transform,
    "whitening": transforms.whitening_transform,
}
scale = st.sampled_from([TINY, 1e-30, 1e-12, 1.0, 1e12, 1e30, HUGE])
condition = st.sampled_from([1, 1e3, 1e6, 1e9, 1e12])
damping = st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0])


def moment(rng, condition, scale, rank):
    m = oracle.random_moment(rng, D, condition)
    if rank < D:
        low = rng.standard_normal((D, rank))
        m = low @ low.T
    m = m / max(np.abs(m).max(), 1e-30)
    return (m * scale).astype(np.float32)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
@given(
    seed=seeds,
    conditions=st.tuples(condition, condition),
    scales=st.tuples(scale, scale),
    ranks=st.tuples(st.integers(0, D), st.integers(0, D)),
    damping=damping,
)
def test_any_moments_give_an_inverse_pair_or_an_error(
    name, seed, conditions, scales, ranks, damping
):
    rng = np.random.default_rng(seed)
    m_w, m_x = (moment(rng, *c) for c in zip(conditions, scales, ranks, strict=True))
    try:
        pair = CONSTRUCTIONS[name](m_w, m_x, damping=damping)
    except ValueError as error:
        # Rounded to float32 a moment may have an eigenvalue of -d 2^-24 mean(diag).
        assert damping < D * 2.0**-24 * 4
        assert f"damping={damping}" in str(error)  # noqa: PT017
        return
    t_x, t_w = (np.asarray(t, np.float64) for t in (pair.activation, pair.weight))
    # Each factor is rounded to float32; cond(T) = |T_X| |T_W| says what that does to the product.
    size = np.linalg.norm(t_x, 2) * np.linalg.norm(t_w, 2)
    assert np.isfinite(size)
    np.testing.assert_allclose(t_x @ t_w.T, np.eye(D), atol=4e-7 * size)


@given(
    seed=seeds,
    condition=condition,
    scales=st.tuples(scale, scale),
    rank=st.integers(0, D),
    damping=damping,
)
def test_predictions_are_finite_or_refused(seed, condition, scales, rank, damping):
    rng = np.random.default_rng(seed)
    m_w, m_x = (moment(rng, condition, s, rank) for s in scales)
    try:
        gain = float(wush.predicted_gain(m_w, m_x, damping=damping))
    except ValueError as error:
        assert f"damping={damping}" in str(error)  # noqa: PT017
    else:
        assert 1 / D * (1 - 1e-6) <= gain <= 1 + 1e-6
    for model in ("fp", "int"):
        exact = np.trace(m_w.astype(float)) * np.trace(m_x.astype(float))
        try:
            loss = float(wush.predicted_loss(m_w, m_x, wush.identity_transform(D), model=model))
        except ValueError as error:
            assert "predicted loss" in str(error)  # noqa: PT017
            assert exact > 1e37
        else:
            assert 0 <= loss <= exact * (1 + 1e-6) + NORMAL


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@given(seed=seeds, exponent=st.integers(-40, 40), condition=condition)
def test_rounded_pairs_are_inverse_or_refused(dtype, seed, exponent, condition):
    rng = np.random.default_rng(seed)
    t = (oracle.random_moment(rng, D, condition) * 2.0**exponent).astype(np.float32)
    try:
        pair = wush.BlockTransform(t, np.linalg.inv(t).T).astype(dtype)
    except ValueError as error:
        assert "transform" in str(error)  # noqa: PT017
        return
    except np.linalg.LinAlgError:
        return
    t_x, t_w = (np.asarray(m, np.float64) for m in (pair.activation, pair.weight))
    size = np.linalg.norm(t_x, 2) * np.linalg.norm(t_w, 2)
    assert np.isfinite(size)
    np.testing.assert_allclose(t_x @ t_w.T, np.eye(D), atol=2e-7 * size)  # T_W rounded to float32


@given(seed=seeds, condition=st.sampled_from([1, 10, 1e3]))
def test_applying_a_transform_and_its_inverse_gives_back(seed, condition):
    rng = np.random.default_rng(seed)
    t = np.stack([oracle.random_moment(rng, D, condition) for _ in range(K // D)])
    x = rng.standard_normal((ROWS, K)).astype(np.float32)
    there = apply(x, t.astype(np.float32))
    back = apply(there, transforms.inverse_transpose(t.astype(np.float32)).swapaxes(-1, -2))
    # Two float32 products of D terms, the first error enlarged by the inverse.
    np.testing.assert_allclose(back, x, atol=2 * D * 6e-8 * condition * np.abs(x).max())


apply = jax.jit(wush.apply_transform)


# ------------------------------------------------------------------ moments and layers


@given(seed=seeds, kind=kinds, block=st.sampled_from([None, D]))
def test_moments_are_symmetric_positive_or_refused(seed, kind, block):
    x = material(seed, kind)
    squares = (x.astype(float) ** 2).sum(0).max()
    try:
        m = np.asarray(wush.second_moment(x, block), np.float64)
    except ValueError as error:
        assert "second moment of x" in str(error)  # noqa: PT017
        assert squares > 1e37
        return
    m = m if block else m[None]
    np.testing.assert_array_equal(m, m.swapaxes(-1, -2))
    size = np.abs(m).max(axis=(-1, -2), initial=0)
    # ROWS float32 roundings; products below the normal numbers vanish, in each of K columns.
    assert (np.linalg.eigvalsh(m).min(-1) >= -1e-5 * size - 2 * K * NORMAL).all()


RECIPES = {
    "hadamard": wush.Recipe(transform="hadamard", format=wush.NVFP4, block_size=32),
    "wush": wush.Recipe(scale_search="sweep"),
    "gptq": wush.Recipe(solver="gptq"),
}


@pytest.mark.filterwarnings("ignore:hessian of weight is not positive definite")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@given(seed=seeds, kind=kinds, scale=scale, rank=st.sampled_from([0, 1, 2, K]))
def test_layers_are_finite_or_refused(recipe, seed, kind, scale, rank):
    """With any weight, and inputs of any rank and power."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rank, K))
    hessian = (inputs.T @ inputs / K * scale).astype(np.float32)
    weight = material(seed, kind)
    try:
        packed = wush.quantize_weight(weight, hessian, recipe)
    except ValueError as error:
        assert np.abs(weight).max() > 1e15, error  # noqa: PT017
        return
    values = dequantize(packed.weight)
    if kind != "top":
        assert np.isfinite(values).all()
    if packed.transform is not None:
        assert np.isfinite(packed.transform.astype(jnp.float32)).all()


@given(seed=seeds, bad=st.sampled_from([np.nan, np.inf]))
def test_a_damaged_token_damages_itself_only(seed, bad):
    rng = np.random.default_rng(seed)
    x = material(seed, "plain")
    row = rng.integers(ROWS)
    hurt = x.copy()
    hurt[row, rng.integers(K)] = bad
    clean, damaged = (np.asarray(dot(v, layer())) for v in (x, hurt))
    assert np.isnan(damaged[row]).all()
    np.testing.assert_array_equal(np.delete(damaged, row, 0), np.delete(clean, row, 0))


def test_no_rows_are_no_rows():
    assert dot(jnp.zeros((2, 0, K)), layer()).shape == (2, 0, D)


dequantize = jax.jit(wush.dequantize)
dot = jax.jit(lambda x, p: wush.quantized_dot(x, p, implementation="reference"))


@functools.cache
def layer():
    weight = np.random.default_rng(0).standard_normal((D, K)).astype(np.float32)
    return wush.quantize_weight(weight, None, RECIPES["hadamard"])


BASE = wush.Recipe(transform="wush", solver="rtn", block_size=32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: wush.apply_transform(i, jnp.eye(32)), "dtype int32.*cast x first"),
        (lambda i: wush.quantized_dot(i, layer()), "dtype int32.*cast it first"),
        (lambda i: wush.second_moment(i, 0), "block=0 does not divide"),
        (lambda i: wush.Moments.init(0), "size=0"),
        (lambda i: wush.second_moment(1e25 * i.astype(jnp.float32)), "second moment of x .*64 non"),
        (
            lambda _: wush.quantize_weight(jnp.full((8, K), 1e25), jnp.eye(K), BASE),
            "of weight .*non",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, K), jnp.int32).at[:, 8:].set(0))
