"""One layer and one site: what is built, how good it is, which mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.solvers.recipe import TRANSFORMS
from wush_jax.solvers.site import build_transform, effective_weight, quantize_site
from wush_jax.solvers.site_transform import site_weight_moment

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

N, K, D = 24, 64, 32
RNG = np.random.default_rng(0)
WEIGHT = oracle.correlated(RNG, N, K, D, spread=0.5).astype(np.float32)
INPUTS = oracle.correlated(RNG, 512, K, D).astype(np.float32)
MOMENT = np.asarray(INPUTS.T @ INPUTS / len(INPUTS))
BLOCKS = np.stack([MOMENT[i : i + D, i : i + D] for i in range(0, K, D)])


dequantize = jax.jit(wush.dequantize)
effective = jax.jit(effective_weight)


def recipe(**options):
    return wush.Recipe(**{"solver": "rtn", **options})


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_effective_weight_is_the_weight(transform):
    """INT8 with float32 transforms: every pair undoes itself, so only INT8's error remains."""
    options = recipe(format=wush.INT8, transform=transform, transform_dtype="float32")
    packed = wush.quantize_weight(WEIGHT, MOMENT, options)
    assert packed.shape == WEIGHT.shape
    pair = build_transform([WEIGHT], BLOCKS, options)
    moved = np.asarray(wush.apply_transform(WEIGHT, pair.weight), np.float64).reshape(N, -1, D)
    # Half an INT8 step (1/253 of each group's largest), carried back through |T_X|.
    step = np.abs(moved).max(-1, keepdims=True) / 253
    t_x = np.broadcast_to(np.abs(pair.activation), (K // D, D, D))
    bound = np.einsum("nbi,bij->nbj", np.broadcast_to(step, moved.shape), t_x).reshape(N, K)
    assert (np.abs(np.asarray(effective(packed)) - WEIGHT) <= bound * 1.01).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layer_equals_numpy(dtype):
    """Unquantized inputs meet exactly the weights that the bytes say."""
    packed = wush.quantize_weight(
        WEIGHT, MOMENT, recipe(activation_format=None, transform_dtype=dtype)
    )
    assert packed.transform.dtype == dtype
    values = np.asarray(dequantize(packed.weight), np.float64).reshape(N, -1, D)
    t_x = np.asarray(packed.transform, np.float64)
    expected = np.einsum("nbi,bij->nbj", values, t_x).reshape(N, K)
    np.testing.assert_allclose(effective(packed), expected, atol=1e-5)  # float32 sums


def test_full_and_block_moments_give_the_same():
    full = wush.quantize_weight(WEIGHT, MOMENT, recipe())
    blocks = wush.quantize_weight(WEIGHT, BLOCKS, recipe())
    jax.tree.map(np.testing.assert_array_equal, full, blocks)


def test_transforms_without_data_need_no_moment():
    for transform in ("identity", "random", "hadamard"):
        packed = wush.quantize_weight(WEIGHT, None, recipe(transform=transform))
        assert (packed.transform is None) == (transform == "identity")


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_may_span_groups(block_size):
    packed = wush.quantize_weight(WEIGHT, MOMENT, recipe(block_size=block_size))
    assert packed.transform.shape == (K // block_size, block_size, block_size)
    assert packed.weight.scales.shape == (N, K // 32)


# ------------------------------------------------------------------ sites


def test_a_site_shares_one_transform():
    weights = [WEIGHT, 100 * WEIGHT[:8], WEIGHT[::-1][:16]]
    shared = quantize_site(weights, MOMENT, recipe())
    assert [p.shape for p in shared] == [w.shape for w in weights]
    for packed in shared[1:]:
        np.testing.assert_array_equal(packed.transform, shared[0].transform)
    own = quantize_site(weights, MOMENT, recipe(share_transform=False))
    alone = [wush.quantize_weight(w, MOMENT, recipe()) for w in weights]
    jax.tree.map(np.testing.assert_array_equal, own, alone)


def test_loud_layers_do_not_decide_for_their_neighbours():
    """Scaling one layer's weights leaves the direction of the site's moment as it was."""
    other = oracle.correlated(np.random.default_rng(5), N, K, D).astype(np.float32)
    quiet = np.asarray(site_weight_moment([WEIGHT, other], BLOCKS))
    loud = np.asarray(site_weight_moment([WEIGHT, 1000 * other], BLOCKS))
    np.testing.assert_allclose(
        loud / np.linalg.norm(loud), quiet / np.linalg.norm(quiet), atol=1e-6
    )
    m_w = [(w.T @ w / N).astype(np.float64) for w in (WEIGHT, other)]
    blocks = [np.stack([m[i : i + D, i : i + D] for i in range(0, K, D)]) for m in m_w]
    expected = sum(b / (b * BLOCKS).sum() for b in blocks)
    np.testing.assert_allclose(
        quiet / np.linalg.norm(quiet), expected / np.linalg.norm(expected), atol=1e-6
    )


# ------------------------------------------------------------------ what it buys


@pytest.fixture(scope="module")
def losses():
    """W4A4 losses of a layer whose channels differ a hundredfold in power and are correlated."""
    rng = np.random.default_rng(2)
    w = oracle.correlated(rng, 64, 128, D, spread=0.5).astype(np.float32)
    x = oracle.correlated(rng, 2048, 128, D, spread=1.5).astype(np.float32)
    moment = wush.second_moment(x[:1024])
    loss = jax.jit(wush.layer_loss)
    table = {}
    for fmt in (wush.MXFP4, wush.INT4):
        for transform in ("identity", "hadamard", "wus", "wush"):
            packed = wush.quantize_weight(w, moment, recipe(format=fmt, transform=transform))
            table[fmt.name, transform] = float(loss(w, x[1024:], packed))
    return table


@pytest.mark.parametrize("fmt", ["MXFP4", "INT4"])
def test_wush_beats_hadamard_beats_identity(losses, fmt):
    """On held-out tokens, by margins far from chance (1024 tokens, 64 outputs: about 2 %)."""
    assert losses[fmt, "wush"] < 0.8 * losses[fmt, "hadamard"]
    assert losses[fmt, "hadamard"] < 0.8 * losses[fmt, "identity"]


def test_int4_without_the_hadamard_factor_collapses(losses):
    assert losses["INT4", "wus"] > 3 * losses["INT4", "wush"]


# ------------------------------------------------------------------ degenerate and wrong input


def test_degenerate_layers_stay_finite():
    dead = WEIGHT.copy()
    dead[:, :D] = 0  # a zero block of weights
    dead[:, D + 3] = 0  # a zero channel
    low = np.zeros((K, K), np.float32)
    low[D:, D:] = np.outer(INPUTS[0, D:], INPUTS[0, D:])  # rank one, and a block without input
    for w in (WEIGHT, dead, 0 * WEIGHT):
        for moment in (MOMENT, low, 0 * MOMENT):
            packed = wush.quantize_weight(w, moment, recipe())
            assert np.isfinite(effective(packed)).all()
            if not w.any():
                assert not np.asarray(dequantize(packed.weight)).any()


NAN = np.where(np.arange(K) == 3, np.float32(np.nan), WEIGHT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: wush.quantize_weight(WEIGHT[:, :48], None, recipe(transform="hadamard")),
            r"\(24, 48\): K=48 is not a multiple of block_size=32; choose another block_size",
        ),
        (
            lambda: wush.quantize_weight(WEIGHT[0], MOMENT, recipe()),
            r"\(64,\); it must be \(N, K\)",
        ),
        (lambda: wush.quantize_weight(WEIGHT[:0], MOMENT, recipe()), r"\(0, 64\).*at least 1"),
        (
            lambda: wush.quantize_weight(np.ones((64, 32), "f4"), MOMENT, recipe()),
            r"activation_moment has shape \(64, 64\); .*\(64, 32\).*is the weight \(K, N\)\?",
        ),
        (
            lambda: wush.quantize_weight(NAN, MOMENT, recipe()),
            r"weight \(24, 64\) has 24 non-finite",
        ),
        (
            lambda: wush.quantize_weight(WEIGHT, np.full_like(MOMENT, np.inf), recipe()),
            r"activation_moment \(64, 64\) has 4096 non-finite values",
        ),
        (lambda: wush.quantize_weight(WEIGHT, None, recipe()), "'wush'.*second moment.*calibrate"),
        (
            lambda: wush.quantize_weight(
                WEIGHT, np.diag(np.float32([1] * 63 + [0])), recipe(damping=0.0)
            ),
            "damping=0.0 leaves a moment that is not positive definite.*1e-2",
        ),
        (
            lambda: wush.quantize_weight(
                np.ones((8, 96), "f4"), np.eye(96, dtype="f4"), recipe(block_size=96 * 2)
            ),
            "K=96 is not a multiple of block_size=192",
        ),
        (
            lambda: quantize_site([WEIGHT, WEIGHT[:, :32]], MOMENT, recipe()),
            r"weights of one site differ in K: \[\(24, 64\), \(24, 32\)\]",
        ),
        (
            lambda: wush.quantize_weight(
                np.ones((8, 36), "f4"),
                np.eye(36, dtype="f4"),
                recipe(format=wush.MXFP4.replace(group_size=18), block_size=18),
            ),
            "d=18.*use a power of two",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_packed_weights_are_pytrees():
    packed = wush.quantize_weight(WEIGHT, MOMENT, recipe())
    leaves, tree = jax.tree.flatten(packed)
    assert jax.tree.unflatten(tree, leaves).input_format is wush.MXFP4
    assert packed.nbytes == packed.weight.nbytes + 2 * K * D
    traced = jax.eval_shape(lambda w, m: wush.quantize_weight(w, m, recipe()), WEIGHT, MOMENT)
    assert jax.tree.structure(traced) == tree
    assert traced.shape == (N, K)
    assert {leaf.dtype for leaf in leaves} == {
        jnp.dtype(d) for d in ("uint8", "float8_e8m0fnu", "float32", "bfloat16")
    }
