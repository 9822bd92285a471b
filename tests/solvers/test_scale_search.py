"""Scale search: neighbours, the sweep's promise, static global scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.formats import INT4_ABSMAX
from wush_jax.solvers import scale_search
from wush_jax.solvers.rtn import rtn

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

FORMATS = {
    "MXFP4": wush.MXFP4,
    "NVFP4": wush.NVFP4,
    "NVFP4 4/6": wush.NVFP4.replace(rule="four_over_six"),
    "INT4": wush.INT4,
    "INT4 absmax": INT4_ABSMAX,
    "NVINT4": wush.NVINT4,
}
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
quick_rtn = jax.jit(rtn, static_argnames=("fmt", "scales"))

quick_values = jax.jit(wush.dequantize)
quick_loss = jax.jit(wush.layer_loss)
quick_neighbour = jax.jit(scale_search.neighbour, static_argnums=0)


@functools.cache
def problem(g, n=64, k=96):
    rng = np.random.default_rng(0)
    w = jnp.float32(rng.standard_t(4, (n, k)))
    blocks = np.stack([oracle.random_moment(rng, g) for _ in range(k // g)])
    return w, jnp.float32(blocks)


def errors(q, w, metric):
    """Weighted error of each group, float64."""
    n, g = w.shape[0], metric.shape[-1]
    e = (np.float64(quick_values(q)) - np.float64(w)).reshape(n, -1, g)
    return np.einsum("nbi,bij,nbj->nb", e, np.float64(metric), e)


@each_format
def test_sweep_is_the_best_of_all_neighbours(fmt):
    """Never worse than the rule, and as good as trying every neighbour by hand."""
    g = fmt.group_size
    w, moment = problem(g)
    eye = wush.identity_transform(g)
    swept = quick_rtn(w, eye, fmt, scales="sweep", activation_moment=moment)
    rule = quick_rtn(w, eye, fmt)
    groups = w.reshape(w.shape[0], -1, g)

    @jax.jit
    @jax.vmap
    def attempt(step):
        scale = scale_search.neighbour(fmt, fmt.load_scales(rule.scales), step)
        codes = fmt.encode_with(groups, scale, rule.global_scale)
        return fmt.decode_with(codes, scale, rule.global_scale)

    values = np.float64(attempt(jnp.int32(scale_search.OFFSETS[fmt.scale_dtype])))
    e = values - np.float64(groups)
    candidates = np.einsum("snbi,bij,snbj->snb", e, np.float64(moment), e)
    chosen = errors(swept, w, moment)
    np.testing.assert_allclose(chosen, np.min(candidates, 0), rtol=1e-4)
    assert (chosen <= errors(rule, w, moment) * (1 + 1e-4)).all()
    assert (chosen < 0.99 * errors(rule, w, moment)).mean() > 0.2


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
def test_weighting_by_the_moment_pays_in_its_own_measure(fmt):
    w, moment = problem(fmt.group_size)
    eye = wush.identity_transform(fmt.group_size)
    weighted, plain = (
        quick_rtn(w, eye, fmt, scales="sweep", activation_moment=m) for m in (moment, None)
    )
    assert errors(weighted, w, moment).sum() < 0.95 * errors(plain, w, moment).sum()


@each_format
def test_neighbours_are_representable_and_ordered(fmt):
    base = fmt.load_scales(fmt.store_scales(jnp.exp2(jnp.arange(-8.0, 8.0))))
    steps = sorted(scale_search.OFFSETS[fmt.scale_dtype])
    moved = np.stack([quick_neighbour(fmt, base, step) for step in steps])
    assert (np.diff(moved, axis=0) >= 0).all()
    assert (np.diff(moved[:, 4:], axis=0) > 0).all()
    np.testing.assert_array_equal(fmt.load_scales(fmt.store_scales(jnp.asarray(moved))), moved)
    np.testing.assert_array_equal(moved[steps.index(0)], base)


@each_format
def test_neighbours_stop_at_the_ends_of_the_type(fmt):
    ends = {"e8m0": (2.0**-126, 2.0**127), "e4m3": (2.0**-9, 448.0)}
    low, high = ends.get(fmt.scale_dtype, (2.0**-126, 2.0**127))
    for step in scale_search.OFFSETS[fmt.scale_dtype]:
        moved = quick_neighbour(fmt, jnp.float32([low, high, np.nan]), step)
        assert float(moved[0]) >= low
        assert float(moved[1]) <= high
        assert np.isnan(moved[2])


@each_format
def test_damage_stays_visible(fmt):
    """A NaN or an infinity decodes to NaN in its group, as without a sweep, and only there."""
    g = fmt.group_size
    w = jnp.ones((2, 2 * g)).at[0, 0].set(jnp.nan).at[1, g].set(jnp.inf)

    @jax.jit
    def swept(y):
        codes, scale = scale_search.sweep(y, fmt, jnp.full((1, 1), 3.0))
        return fmt.decode_with(codes, scale, jnp.full((1, 1), 3.0))

    values = swept(w.reshape(2, 2, g))
    assert np.isnan(values).all(-1).tolist() == [[True, False], [False, True]]


def test_group_metric_is_the_transformed_moment():
    rng = np.random.default_rng(1)
    moment = np.stack([oracle.random_moment(rng, 8) for _ in range(3)])
    t = rng.standard_normal((3, 8, 8))
    expected = t @ moment @ t.transpose(0, 2, 1)
    actual = scale_search.group_metric(jnp.float32(moment), jnp.float32(t), 4)
    assert actual.shape == (6, 4, 4)
    for b in range(3):
        np.testing.assert_allclose(actual[2 * b], expected[b, :4, :4], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(actual[2 * b + 1], expected[b, 4:, 4:], rtol=1e-4, atol=1e-5)


def test_input_global_scale():
    derived = wush.NVFP4.replace(global_scale=None)
    assert scale_search.input_global_scale(None, amax=1.0) is None
    assert scale_search.input_global_scale(wush.NVFP4, amax=1.0) is None
    # a GPU divides to one unit in the last place
    assert scale_search.input_global_scale(derived, amax=448.0).item() == pytest.approx(6, rel=2e-7)
    # 64 standard deviations of the strongest transformed channel: 2 * sqrt(9) * 64 = 384.
    moment = jnp.diag(jnp.float32([1.0, 9.0]))[None]
    g = scale_search.input_global_scale(
        derived, activation_moment=moment, transform=2 * jnp.eye(2, dtype=jnp.float32)
    )
    assert g.item() == pytest.approx(448 * 6 / 384)
    with pytest.raises(ValueError, match="amax=None and activation_moment=None: NVFP4"):
        scale_search.input_global_scale(derived)


def test_static_input_scale_reaches_the_packed_weight_and_serves():
    """Inputs of any magnitude: the derived scale is a number found once, not per batch."""
    rng = np.random.default_rng(2)
    w = jnp.float32(rng.standard_normal((16, 64)))
    derived = wush.NVFP4.replace(global_scale=None)
    quantize = jax.jit(wush.quantize_weight, static_argnums=2)
    losses = {}
    for size in (1.0, 1e6):
        x = jnp.float32(rng.standard_normal((256, 64)) * size)
        moment = wush.second_moment(x, 16)
        for fmt in (derived, wush.NVFP4):
            recipe = wush.Recipe(format=fmt, transform="identity")
            packed = quantize(w, moment, recipe)
            assert (packed.input_global_scale is None) == (fmt is wush.NVFP4)
            losses[fmt.global_scale, size] = quick_loss(w, x, packed).item() / size**2
    # Fixed 10 clips at 448 * 6 / 10 = 269; the derived scale does not notice.
    assert losses[None, 1e6] < 1.2 * losses[None, 1.0]
    assert losses[10.0, 1e6] > 10 * losses[10.0, 1.0]
    assert losses[None, 1.0] < 1.2 * losses[10.0, 1.0]


def test_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="scale_search='magic'"):
        wush.Recipe(scale_search="magic")
    with pytest.raises(ValueError, match="scales='magic'"):
        rtn(jnp.ones((1, 32)), wush.identity_transform(32), wush.MXFP4, scales="magic")
