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

import wush_jax as wush
from wush_jax import transforms
from wush_jax.formats import FORMATS, elements

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("strict")]

ROWS, K, D = 4, 64, 8
NORMAL, TINY, HUGE = 2.0**-126, 1e-38, 1e38
FOUR_OVER_SIX = wush.NVFP4.replace(name="4/6", rule="four_over_six", global_scale=None)
ALONE = wush.NVFP4.replace(name="alone", group_size=1)  # a scale for every value
ALL = {**FORMATS, "4/6": FOUR_OVER_SIX, "alone": ALONE}
each_format = pytest.mark.parametrize("fmt", ALL.values(), ids=ALL)
seeds = st.integers(0, 2**32 - 1)


def material(seed, kind, dtype=np.float32):
    """(ROWS, K) of every kind that has ever broken a quantizer."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (ROWS, K))
    if kind == "any exponent":
        x = x * 10.0 ** rng.uniform(-38, 37, x.shape)
    elif kind == "rows of any exponent":
        x = x * 10.0 ** rng.uniform(-38, 36, (ROWS, 1))
    elif kind == "ties":
        x = rng.integers(-24, 25, x.shape) / 4 * 2.0 ** rng.integers(-3, 4, (ROWS, 1))
    elif kind == "lonely":
        x = x * (np.arange(K) == rng.integers(K))
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "top":
        x = (
            rng.choice([-1, 1], x.shape)
            * rng.uniform(0.9, 1, x.shape)
            * float(jnp.finfo(dtype).max)
        )
    limit = float(jnp.finfo(dtype).max)
    x = np.clip(x, -limit, limit)
    x[rng.integers(ROWS)] *= rng.integers(2)  # often a row of zeros
    return x.astype(dtype)


KINDS = ("any exponent", "rows of any exponent", "ties", "lonely", "denormal", "top", "plain")
kinds = st.sampled_from(KINDS)


@functools.partial(jax.jit, static_argnums=1)
def everything(x, fmt):
    """One compilation a format: values, codes, packed codes, scales, and decoded codes."""
    q = wush.quantize(x, fmt)
    parts = fmt.unpack(q.codes), q.codes, fmt.load_scales(q.scales), wush.dequantize(q)
    return wush.fake_quantize(x, fmt), *parts


def faked(x, fmt):
    return everything(x, fmt)[0]


# ------------------------------------------------------------------ formats


@each_format
@given(seed=seeds, kind=kinds)
def test_finite_numbers_give_valid_codes_and_finite_values(fmt, seed, kind):
    x = material(seed, kind)
    fake, codes, packed, scales, values = map(np.asarray, everything(x, fmt))
    assert (codes < 2**fmt.element.bits).all()
    np.testing.assert_array_equal(pack(codes, fmt.element.bits), packed)
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    assert np.isfinite(fake).all()
    if kind != "top":  # there the values themselves may round beyond float32
        np.testing.assert_array_equal(fake, values)


pack = jax.jit(elements.pack, static_argnums=1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.INT8], ids=lambda f: f.name)
@given(seed=seeds, kind=kinds)
def test_narrow_dtypes_saturate(fmt, dtype, seed, kind):
    x = material(seed, kind, dtype)
    out = faked(x, fmt)
    assert out.dtype == dtype
    limit = float(jnp.finfo(dtype).max)
    wide = np.asarray(faked(x.astype(np.float32), fmt))
    np.testing.assert_array_equal(out, np.clip(wide, -limit, limit).astype(dtype))


@each_format
@given(seed=seeds, kind=kinds, bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_damage_makes_its_groups_nan_and_no_others(fmt, seed, kind, bad):
    x = material(seed, kind)
    rng = np.random.default_rng(seed)
    hit = rng.random(x.shape) < 0.02
    groups = np.broadcast_to(
        hit.reshape(-1, fmt.group_size).any(-1, keepdims=True),
        (x.size // fmt.group_size, fmt.group_size),
    )
    values = np.asarray(faked(np.where(hit, np.float32(bad), x), fmt))
    np.testing.assert_array_equal(np.isnan(values.reshape(groups.shape)), groups)
    assert not np.isinf(values).any()


@each_format
@given(seed=seeds, kind=kinds)
def test_signs_and_order_survive(fmt, seed, kind):
    """q(-x) = -q(x) on symmetric grids; x <= y of one group gives q(x) <= q(y) on all."""
    x = material(seed, kind)
    values = np.asarray(faked(x, fmt))
    if not getattr(fmt.element, "midrise", False):
        np.testing.assert_array_equal(faked(-x, fmt), -values)
    # Subnormal numbers count as zero: also in the order.
    flushed = np.where(np.abs(x) < NORMAL, 0, x).reshape(-1, fmt.group_size)
    ordered = np.take_along_axis(values.reshape(flushed.shape), flushed.argsort(-1, "stable"), -1)
    assert (ordered[:, 1:] >= ordered[:, :-1]).all()


# Scales are powers of two, or follow the tensor's own global scale.
COVARIANT = [f for f in ALL.values() if f.scale_dtype in ("e8m0", "bfloat16")]


@pytest.mark.parametrize("fmt", COVARIANT, ids=lambda f: f.name)
@given(seed=seeds, exponent=st.integers(-40, 40))
def test_powers_of_two_pass_through(fmt, seed, exponent):
    x = material(seed, "plain") + np.float32(0.01)
    scaled = faked(np.ldexp(x, exponent).astype(np.float32), fmt)
    np.testing.assert_array_equal(scaled, np.ldexp(faked(x, fmt), exponent))


def test_no_rows_are_no_rows():
    assert faked(np.zeros((0, K), np.float32), FOUR_OVER_SIX).shape == (0, K)
    assert dot(jnp.zeros((2, 0, K)), layer()).shape == (2, 0, D)


def test_ranks_and_layouts_of_memory_are_the_same_numbers():
    x = material(0, "rows of any exponent")
    for fmt in (wush.MXFP4, wush.NVFP4):
        flat = np.asarray(faked(x, fmt))
        for shape in ((2, 2, K), (1, ROWS, 1, K)):
            np.testing.assert_array_equal(faked(x.reshape(shape), fmt), flat.reshape(shape))
        np.testing.assert_array_equal([faked(row, fmt) for row in x], flat)
        strided = np.zeros((2 * ROWS, K, 2), np.float32)[::-2, :, 1]
        strided[...] = x
        backwards = np.ascontiguousarray(x[:, ::-1])[:, ::-1]
        for view in (np.asfortranarray(x), strided, backwards):
            assert not view.flags.c_contiguous
            np.testing.assert_array_equal(faked(view, fmt), flat)


@pytest.mark.parametrize("g", [0.0, -1.0, np.nan, np.inf, 1e-46])
def test_global_scales_are_positive_and_finite(g):
    for value in (g, np.float32(g), jnp.float32(g)):
        with pytest.raises(ValueError, match=r"global_scale=.* must be positive and finite"):
            wush.quantize(jnp.ones(32), wush.MXFP4, global_scale=value)


# ------------------------------------------------------------------ transforms

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


dequantize = jax.jit(wush.dequantize)
dot = jax.jit(lambda x, p: wush.quantized_dot(x, p, implementation="reference"))


@functools.cache
def layer():
    weight = np.random.default_rng(0).standard_normal((D, K)).astype(np.float32)
    return wush.quantize_weight(weight, None, RECIPES["hadamard"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: wush.apply_transform(i, jnp.eye(32)), "dtype int32.*cast x first"),
        (lambda i: wush.quantized_dot(i, layer()), "dtype int32.*cast it first"),
        (lambda i: wush.second_moment(i, 0), "block=0 does not divide"),
        (lambda i: wush.Moments.init(0), "size=0"),
        (lambda i: wush.second_moment(1e25 * i.astype(jnp.float32)), "second moment of x .*64 non"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, K), jnp.int32).at[:, 8:].set(0))
