"""GPTQ against the paper's algorithm 2 in naive numpy float64, and its own promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_oracle import assert_same_codes, paper_gptq

import wush_jax as wush
from wush_jax.solvers.feedback import inner_factor, quantize_block
from wush_jax.solvers.gptq import gptq
from wush_jax.solvers.rtn import rtn
from wush_jax.solvers.scale_search import OFFSETS
from wush_jax.solvers.site import TransformRule, build_transform, quantize_site
from wush_jax.transforms import linalg

pytestmark = pytest.mark.once

FORMATS = [wush.MXFP4, wush.NVFP4, wush.INT4]
WUSH = TransformRule("wush", "bfloat16")


def problem(seed, n=80, k=128, tokens=1024, condition=1.5):
    """Weights (N, K), and the moment of inputs that are correlated across all channels."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    x = (rng.standard_t(5, (tokens, k)) * np.exp(condition * rng.standard_normal(k))) @ mix
    w = rng.standard_normal((n, k)) * np.exp(0.3 * rng.standard_normal(k))
    return jnp.float32(w), jnp.float32(x.T @ x / tokens)


dequantize = jax.jit(wush.dequantize)


def original_space(q, transform):
    """The quantized weight in original coordinates, float64."""
    t = np.asarray(transform.activation.astype(jnp.float32), np.float64)
    values = np.asarray(dequantize(q), np.float64)
    n, k = values.shape
    d = t.shape[-1]
    t = np.broadcast_to(t, (k // d, d, d))
    return np.einsum("nbi,bij->nbj", values.reshape(n, -1, d), t).reshape(n, k)


def loss(w, h, q, transform):
    e = original_space(q, transform) - np.asarray(w, np.float64)
    return np.einsum("ni,ij,nj->", e, np.asarray(h, np.float64), e) / len(e)


quick_rtn = jax.jit(rtn, static_argnames=("fmt", "scales"))


# ---------------------------------------------------------------- one compilation serves many


@functools.cache
def case(seed):
    return problem(seed)


def solve(w, h, fmt=wush.MXFP4, groups=1, dtype="float64", transform=WUSH, **options):
    """GPTQ at the options that most tests share, so that they share its compilations."""
    d = groups * fmt.group_size
    return gptq(w, h, transform, fmt, block_size=d, dtype=dtype, **options)


def plain(w, h, fmt=wush.MXFP4, **options):
    """GPTQ without a transform, in float32."""
    eye = wush.identity_transform(fmt.group_size)
    return gptq(w, h, eye, fmt, **options)[0]


jitted = jax.jit(chex.assert_max_traces(solve, n=1))
jitted_plain = jax.jit(chex.assert_max_traces(plain, n=1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_equals_the_paper(fmt, groups):
    w, h = case(0)
    q, transform = solve(w, h, fmt, groups)
    t = np.asarray(transform.activation.astype(jnp.float32), np.float64)
    codes, expected, margins = paper_gptq(w, h, fmt, t)
    # A bfloat16 rounding may fall the other way: one unit in the last place, rarely.
    np.testing.assert_allclose(t, expected, rtol=2**-7)
    assert (t == expected).mean() > 0.9995
    assert_same_codes(np.asarray(fmt.unpack(q.codes)), codes, margins)


# ---------------------------------------------------------------- what the method promises


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_error_feedback_beats_rounding(fmt):
    w, h = case(1)
    q, used = solve(w, h, fmt)
    # Measured 0.3 to 0.4: the inputs are correlated across all channels.
    assert loss(w, h, q, used) < 0.6 * loss(w, h, quick_rtn(w, used, fmt), used)


@pytest.mark.parametrize("kind", ["identity", "hadamard"])
def test_baselines_beat_rounding(kind):
    w, h = case(1)
    t = wush.identity_transform(32) if kind == "identity" else wush.hadamard_transform(32)
    q, used = gptq(w, h, t, wush.MXFP4)
    assert loss(w, h, q, used) < 0.6 * loss(w, h, quick_rtn(w, t, wush.MXFP4), t)


@pytest.mark.parametrize(
    ("fmt", "groups", "search"),
    [(wush.MXFP4, 1, "rule"), (wush.NVFP4, 2, "sweep"), (wush.INT4, 1, "sweep")],
)
def test_uncorrelated_inputs_leave_nothing_to_feed_back(fmt, groups, search):
    """On the identity Hessian GPTQ is round-to-nearest, bit for bit, sweeps included."""
    w, _ = case(2)
    w = w.at[0, :16].set(0.0)
    eye = wush.identity_transform(groups * fmt.group_size)
    expected = quick_rtn(w, eye, fmt, scales=search)
    actual, _ = gptq(w, jnp.eye(w.shape[1]), eye, fmt, scales=search)
    if fmt is wush.INT4 and jax.default_backend() == "gpu":
        # Each compilation sums the squares of a group in its own order: a bfloat16 scale may move.
        assert np.mean(np.asarray(actual.scales != expected.scales)) < 0.01
    else:
        chex.assert_trees_all_equal(actual, expected)


def test_sweep_never_loses_a_group():
    """The loss of each group, feedback inside it included, is at most that of the rule's scale."""
    w, h = case(3)
    g = 16
    inner = inner_factor(jnp.eye(g), jnp.linalg.cholesky(h[:g, :g] + 0.1 * jnp.eye(g)), g)
    metric = np.float64(inner[2][0][:, None] * inner[1][0].T)  # R'^T, rows scaled back

    @functools.partial(jax.jit, static_argnums=0)
    def losses(steps):
        error = quantize_block(w[:, :g].T, inner, wush.NVFP4, steps, jnp.float32(10.0))[2]
        return jnp.sum((metric.astype(np.float32) @ error) ** 2, 0)

    rule, sweep = losses((0,)), losses(OFFSETS["e4m3"])
    assert (sweep <= rule * (1 + 1e-4)).all()
    assert sweep.mean() < 0.8 * rule.mean()


def test_order_of_blocks_is_only_an_order():
    """Processing blocks in another order equals permuting the problem, layout excepted."""
    w, h = case(3)
    order = np.argsort(-np.diag(h).reshape(-1, 32).sum(1))
    assert (order != np.arange(len(order))).any()
    columns = (order[:, None] * 32 + np.arange(32)).ravel()
    q, used = solve(w, h, activation_order=True)
    p, moved = solve(w[:, columns], h[columns][:, columns])
    back = np.argsort(columns)
    np.testing.assert_array_equal(q.format.unpack(q.codes), q.format.unpack(p.codes)[:, back])
    blocks = np.argsort(order)
    np.testing.assert_array_equal(np.float32(q.scales), np.float32(p.scales)[:, blocks])
    chex.assert_trees_all_equal(used, jax.tree.map(lambda t: t[blocks], moved))


# ---------------------------------------------------------------- Hessians that resist


def shrunk(h, below):
    """The moment with its smallest eigenvalue moved to ``below`` times the mean diagonal."""
    s, u = np.linalg.eigh(np.float64(h))
    s[0] = below * np.trace(h) / len(h)
    return jnp.float32((u * s) @ u.T)


def test_damping_escalates_and_says_so():
    w, h = case(4)
    bad = shrunk(h, -0.05)
    with pytest.warns(UserWarning, match=r"layers\.3\.o.*damping=0\.01; 0\.1 was used"):
        q = plain(w, bad, name="layers.3.o")
    chex.assert_trees_all_equal(q, plain(w, bad, damping=0.1))


def test_hopeless_hessian_names_the_layer_and_stays_finite_under_jit():
    w, h = case(4)
    bad = shrunk(h, -5.0)
    with pytest.raises(ValueError, match=r"hessian of layers\.7\.up is not positive definite"):
        plain(w, bad, name="layers.7.up")
    expected = quick_rtn(w, wush.identity_transform(32), wush.MXFP4)
    chex.assert_trees_all_equal(jitted_plain(w, bad), expected)


@pytest.mark.parametrize(
    ("fmt", "damping"), [(wush.MXFP4, 1e-2), (wush.INT4, 1e-2), (wush.NVFP4, 1e-2), (wush.MXFP4, 0)]
)
@pytest.mark.filterwarnings("ignore:hessian of weight is not positive definite:UserWarning")
def test_dead_channels_and_zero_weights_stay_finite(fmt, damping):
    """Channels never seen, a block never seen, zero rows, zero columns, a zero block of W."""
    w, h = case(5)
    dead = np.r_[3, 40:50, 64:96]
    h = h.at[dead].set(0.0).at[:, dead].set(0.0)
    w = w.at[0].set(0.0).at[:, 7].set(0.0).at[:, 96:].set(0.0)
    q, transform = solve(w, h, fmt, damping=damping)
    chex.assert_tree_all_finite((dequantize(q), transform))
    if fmt is not wush.INT4:  # whose mid-rise grid has no zero
        np.testing.assert_array_equal(dequantize(q)[0], 0.0)


def test_nothing_known_and_nothing_to_do():
    """An all-zero Hessian (a site no token reached) and an all-zero weight."""
    w, h = case(6)
    q = plain(w, jnp.zeros_like(h))
    chex.assert_trees_all_equal(q, quick_rtn(w, wush.identity_transform(32), wush.MXFP4))
    q, transform = solve(jnp.zeros_like(w), jnp.zeros_like(h))
    chex.assert_tree_all_finite((dequantize(q), transform))


def test_derived_global_scale_follows_any_magnitude():
    """With ``global_scale=None`` the relative loss does not depend on the units of W."""
    w, h = case(7)
    fmt = wush.NVFP4.replace(global_scale=None)
    t = wush.hadamard_transform(16)
    sizes = (2.0**-40, 1.0, 2.0**40)
    losses = [loss(s * w, h, *gptq(s * w, h, t, fmt)) / s**2 for s in sizes]
    np.testing.assert_allclose(losses, losses[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": jnp.ones(32)}, r"weight has shape \(32,\)"),
        ({"hessian": jnp.eye(32)}, r"hessian has shape \(32, 32\).*block=None"),
        ({"hessian": jnp.eye(64).at[0, 0].set(jnp.nan)}, "hessian of weight.*non-finite"),
        ({"weight": jnp.ones((4, 64)).at[0].set(jnp.inf)}, "weight of weight.*non-finite"),
        ({"block_size": 48}, "block_size=48 must divide K=64"),
        ({"damping": -1.0}, r"damping=-1\.0"),
        ({"scales": "magic"}, "scales='magic'"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_mistakes_are_named(changes, message):
    arguments = {"weight": jnp.ones((4, 64)), "hessian": jnp.eye(64), **changes}
    weight, hessian = arguments.pop("weight"), arguments.pop("hessian")
    with pytest.raises(ValueError, match=message):
        gptq(weight, hessian, WUSH, wush.MXFP4, **arguments)


def test_block_diagonal_moment_is_refused():
    with pytest.raises(ValueError, match=r"needs the full moment \(64, 64\)"):
        wush.quantize_weight(jnp.ones((4, 64)), jnp.ones((2, 32, 32)), wush.Recipe(solver="gptq"))


# ---------------------------------------------------------------- precision and compilation


def test_float32_is_close_to_float64():
    """Until a row's first tie both are the same; after it both are equally good.

    A code is a tie for float32 when its weight, which carries the rounding of up to K updates
    (K eps = 1.5e-5 of its size), is that close to a boundary: about 1e-4 of the rows. What follows
    in such a row is another, equally valid, sequence of roundings.
    """
    w, h = case(8)
    eye = wush.identity_transform(32)
    a, b = plain(w, h), gptq(w, h, eye, wush.MXFP4, dtype="float64")[0]
    same = (a.format.unpack(a.codes) == b.format.unpack(b.codes)).all(1)
    assert same.mean() > 0.95
    assert loss(w, h, a, eye) == pytest.approx(loss(w, h, b, eye), rel=0.02)


@pytest.mark.parametrize(("outer", "inner"), [(jitted, solve), (jitted_plain, plain)])
def test_jit_changes_nothing_and_compiles_once(outer, inner):
    for seed in (8, 9):
        chex.assert_trees_all_equal(outer(*case(seed)), inner(*case(seed)))


def test_vmap_over_experts():
    w, h = (jnp.stack(arrays) for arrays in zip(case(0), case(1), strict=True))
    together = jax.jit(jax.vmap(plain))(w, h)
    for i in range(2):
        np.testing.assert_array_equal(together.codes[i], plain(w[i], h[i]).codes)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_hidden_promotion(fmt, dtype):
    fmt = fmt.replace(global_scale=None) if fmt is wush.NVFP4 else fmt
    options = {"scales": "sweep", "activation_order": True, "dtype": dtype}
    for transform in (WUSH, wush.hadamard_transform(2 * fmt.group_size)):
        full = functools.partial(solve, fmt=fmt, groups=2, transform=transform, **options)
        q, _ = jax.eval_shape(full, *case(0))
        assert q.codes.dtype == jnp.uint8
        assert q.global_scale.dtype == jnp.float32


# ---------------------------------------------------------------- through recipes


def test_site_shares_one_transform_and_one_solve():
    w, h = case(1)
    recipe = wush.Recipe(solver="gptq", interleave=False)
    halves = [w[:40], w[40:]]
    first, second = quantize_site(halves, h, recipe)
    np.testing.assert_array_equal(first.transform, second.transform)
    shared = build_transform(halves, linalg.diagonal_blocks(h, 32), recipe)
    whole = wush.quantize_weight(w, h, recipe, transform=shared)
    for name in ("codes", "scales"):
        parts = [np.float32(getattr(p.weight, name)) for p in (first, second)]
        np.testing.assert_array_equal(
            np.concatenate(parts), np.float32(getattr(whole.weight, name))
        )


def test_interleaved_transforms_follow_the_updated_weights():
    w, h = case(1)
    recipe = wush.Recipe(solver="gptq", interleave=False, solver_dtype="float64")
    original = wush.quantize_weight(w, h, recipe).transform
    rounded = wush.quantize_weight(w, h, recipe.replace(solver="rtn")).transform
    np.testing.assert_array_equal(original, rounded)
    updated = wush.quantize_weight(w, h, recipe.replace(interleave=True)).transform
    # The first block has seen no update, the last one has.
    assert (updated[0] == original[0]).mean() > 0.99
    assert (updated[-1] != original[-1]).mean() > 0.5
