"""What quantizing activations adds: its model, its measurement, and gains that make it small."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.solvers import hessian, noise
from wush_jax.solvers.gptq import gptq
from wush_jax.solvers.site import effective_weight
from wush_jax.transforms import linalg
from wush_jax.transforms.sample import Sample

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.once]

N, K, D = 40, 64, 32
RNG = np.random.default_rng(0)
WEIGHT = oracle.correlated(RNG, N, K, D, spread=0.5).astype(np.float32)
INPUTS = oracle.correlated(RNG, 8192, K, D) @ (np.eye(K) + 0.3 * RNG.standard_normal((K, K)))
TRAIN, TEST = jnp.float32(INPUTS / np.sqrt(np.mean(INPUTS**2))).reshape(2, 4096, K)
sample_of = jax.jit(Sample.of)
MOMENT = wush.second_moment(TRAIN)
SAMPLE = sample_of(TRAIN)
GPTQ = wush.Recipe(solver="gptq", interleave=False)
fake_quantize = jax.jit(wush.fake_quantize, static_argnums=1)
dequantize = jax.jit(wush.dequantize)
quick_loss = jax.jit(wush.layer_loss)
quick_noise = jax.jit(noise.sampled_noise, static_argnames="fmt")
quick_model = jax.jit(noise.modelled_noise, static_argnames="fmt")
quick_pairs = jax.jit(noise.quantized_pairs, static_argnames="fmt")
quick_slope = jax.jit(hessian.with_unit_slope)
quick_gains = jax.jit(noise.best_gains, static_argnames="fmt")


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (wush.MXFP4, 0.0140),
        (wush.NVFP4, 0.0090),
        (wush.INT4, 0.0104),
        (wush.NVINT4, 0.0060),
        (wush.FP8, 0.00070),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_relative_error_is_that_of_gaussians(fmt, expected):
    z = jnp.float32(np.random.default_rng(1).standard_normal((4096, fmt.group_size)))
    e = np.float64(fake_quantize(z, fmt) - z)
    measured = (e**2).sum() / np.float64(z * z).sum()
    assert noise.relative_error(fmt) == pytest.approx(measured, rel=0.02)
    assert noise.relative_error(fmt) == pytest.approx(expected, rel=0.02)


def test_relative_error_is_a_number_under_jit():
    assert jax.jit(lambda x: x * noise.relative_error(wush.MXFP6))(jnp.ones(())) < 1e-2


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.FP8], ids=lambda f: f.name)
def test_the_model_agrees_with_measurement(fmt):
    """Where the transform whitens: all of the error's moment, in original coordinates."""
    rng = np.random.default_rng(3)
    t = rng.standard_normal((2, D, D)) / 4 + np.eye(D)
    pair = wush.BlockTransform(jnp.float32(t), jnp.float32(np.linalg.inv(t).transpose(0, 2, 1)))
    white = rng.standard_normal((8192, 2, D)) * [[[1.0], [7.0]]]
    rows = jnp.float32(np.einsum("sbj,bij->sbi", white, np.linalg.inv(t)).reshape(-1, K))
    measured = quick_noise(sample_of(rows), pair, fmt).covariance
    modelled = quick_model(linalg.diagonal_blocks(wush.second_moment(rows), D), pair, fmt)
    atol = 0.05 * np.abs(modelled).max((1, 2), keepdims=True)  # 8192 rows: about 1 / sqrt(8192)
    assert (np.abs(measured - modelled) <= atol).all()


def test_sampled_noise_is_the_moment_of_the_error():
    pair = wush.wush_transform(
        linalg.diagonal_blocks(wush.second_moment(WEIGHT), D), linalg.diagonal_blocks(MOMENT, D)
    )
    rows = TRAIN + 3.0  # a mean
    found = quick_noise(sample_of(rows), pair, wush.MXFP4)
    t = np.float64(pair.activation)
    y = np.einsum("sbi,bji->sbj", np.float64(rows).reshape(-1, 2, D), t)
    q = np.float64(fake_quantize(jnp.float32(y.reshape(-1, K)), wush.MXFP4)).reshape(y.shape)
    e = np.einsum("sbj,bij->sbi", q - y, np.linalg.inv(t))
    mean = e.mean(0)
    covariance = np.einsum("sbi,sbj->bij", e - mean, e - mean) / len(e)
    chance = np.trace(covariance, axis1=1, axis2=2) / len(e)
    mean *= np.maximum(0, 1 - chance / (mean**2).sum(1))[:, None]
    size = np.sqrt(np.abs(covariance).max())  # codes next to a tie may fall on either side
    np.testing.assert_allclose(found.mean, mean.ravel(), atol=2e-3 * size)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-3 * size**2)
    np.testing.assert_allclose(found.input_mean, np.float64(rows).mean(0), rtol=1e-4, atol=1e-4)


def test_errors_in_common_are_made_up_for():
    """A large constant in every token rounds the same way each time: the weights know it."""
    constant = np.where(np.arange(K) % D == 5, 20.0, 0.0).astype(np.float32)
    train, test = TRAIN + constant[None], TEST + constant[None]
    m, sample = wush.second_moment(train), sample_of(train)
    losses = {
        kind: quick_loss(
            WEIGHT,
            test,
            wush.quantize_weight(
                WEIGHT, m, GPTQ.replace(transform="hadamard", input_error=kind), sample=sample
            ),
        ).item()
        for kind in ("ignore", "model", "sample")
    }
    # Measured 16.9, 4.9 and 4.3.
    assert losses["model"] < 0.5 * losses["ignore"]
    assert losses["sample"] < 0.95 * losses["model"]


def test_gptq_aims_at_the_best_weights():
    """With fine codes the result is ``W C^T H^-1``, both damped alike."""
    hessian, cross = noise.with_noise(MOMENT, 0.3 * linalg.diagonal_blocks(MOMENT, D))
    eye = wush.identity_transform(D)
    q, _ = gptq(WEIGHT, hessian, eye, wush.INT8, cross_moment=cross, damping=1e-3)
    shift = 1e-3 * np.mean(np.diag(hessian)) * np.eye(K)
    best = np.linalg.solve(
        np.float64(hessian) + shift, (np.float64(cross) + shift) @ np.float64(WEIGHT.T)
    ).T
    step = np.abs(WEIGHT).max() / 127
    assert np.sqrt(np.mean((np.float64(dequantize(q)) - best) ** 2)) < step
    assert np.sqrt(np.mean((WEIGHT - best) ** 2)) > 4 * step
    with pytest.raises(ValueError, match=r"cross_moment has shape \(2, 2\)"):
        gptq(WEIGHT, hessian, eye, wush.INT8, cross_moment=jnp.eye(2))


def test_outputs_of_the_target_have_slope_one():
    """Slope of each output against the original, in float64, with fine codes."""
    sample = sample_of(TRAIN)
    pair, eye = wush.hadamard_transform(D), wush.identity_transform(D)
    x, x_q = map(np.float64, quick_pairs(sample, pair, wush.MXFP4))
    hessian, cross = noise.with_noise(MOMENT, quick_noise(sample, pair, wush.MXFP4))

    def slopes(pairs):
        q, _ = gptq(WEIGHT, hessian, eye, wush.INT8, cross_moment=cross, pairs=pairs)
        y, y_q = x @ np.float64(WEIGHT.T), x_q @ np.float64(dequantize(q).T)
        return (y * y_q).sum(0) / (y * y).sum(0)

    found = slopes((jnp.float32(x), jnp.float32(x_q)))
    # Codes of 8 bits are not exact: measured 0.0136 in the worst output.
    np.testing.assert_allclose(found, 1, atol=0.02)
    assert found.mean() == pytest.approx(1, abs=2e-3)
    assert slopes(None).mean() < 0.99
    with pytest.raises(ValueError, match="pairs are of quantized inputs; pass their cross_moment"):
        gptq(WEIGHT, hessian, eye, wush.INT8, pairs=(jnp.float32(x), jnp.float32(x_q)))


def test_slopes_are_met_row_by_row_within_bounds():
    rng = np.random.default_rng(5)
    w, x = rng.standard_normal((6, K)), rng.standard_normal((512, K))
    x_q = x + 0.1 * rng.standard_normal(x.shape)
    size = np.array([0.7, 1.1, 0.9, 0.0, 0.1, -1.0])  # then: no output, mostly noise, opposite sign
    target = size[:, None] * w
    found = np.float64(quick_slope(*map(jnp.float32, (target, w, x, x_q))))
    y = x @ w.T
    met = (y * (x_q @ found.T)).sum(0) / (y * y).sum(0)
    np.testing.assert_allclose(met[:3], 1, rtol=1e-5)  # float32 sums of 512 products
    np.testing.assert_allclose(found[3:], [[1.0], [2.0], [1.0]] * target[3:], rtol=1e-6)


@pytest.mark.parametrize("kind", ["model", "sample"])
def test_knowing_the_error_of_the_inputs_pays(kind):
    """On held-out rows; measured 0.95 to 0.97."""
    before, after = (
        quick_loss(WEIGHT, TEST, wush.quantize_weight(WEIGHT, MOMENT, r, sample=SAMPLE)).item()
        for r in (GPTQ, GPTQ.replace(input_error=kind))
    )
    assert after < 0.99 * before


def test_chance_is_no_error_in_common():
    """Rows without a mean: what a small sample shows of one is nearly all taken back."""
    found = quick_noise(sample_of(TRAIN[:256]), wush.hadamard_transform(D), wush.MXFP4)
    power = np.trace(found.covariance, axis1=1, axis2=2).sum() / 256
    assert np.square(found.mean).sum() < 0.5 * power


# ---------------------------------------------------------------- gains


def massive(seed, size):
    """Inputs in which one token in 64 is ``size`` times one fixed direction."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2048, K))
    direction = np.random.default_rng(9).standard_normal(K)
    direction[D:] = 0
    x[::64] = (
        size * direction / np.linalg.norm(direction) * (1 + 0.01 * rng.standard_normal((32, 1)))
    )
    return jnp.float32(x)


@pytest.fixture(scope="module")
def trap():
    """Losses of a block ruled by one token over the magnitudes of an octave: plain, with gains."""
    plain, gained = [], []
    for j in range(8):
        x, held_out = (massive(seed, 200 * 2 ** (j / 8)) for seed in (0, 1))
        m, sample = wush.second_moment(x), sample_of(x)
        for recipe, losses in ((GPTQ, plain), (GPTQ.replace(block_gain=True), gained)):
            packed = wush.quantize_weight(WEIGHT, m, recipe, sample=sample)
            losses.append(quick_loss(WEIGHT, held_out, packed).item())
    return np.array(plain), np.array(gained)


def test_gains_leave_the_massive_token_trap(trap):
    """Without them the loss is a matter of luck, with where on the grid one magnitude falls."""
    plain, gained = trap
    assert plain.max() > 2 * plain.min()
    assert gained.max() < 0.6 * plain.max()
    assert (gained < 1.1 * plain).all()


def test_gains_are_chosen_by_error():
    pair = wush.wush_transform(
        linalg.diagonal_blocks(wush.second_moment(WEIGHT), D), linalg.diagonal_blocks(MOMENT, D)
    )
    m_w = linalg.diagonal_blocks(wush.second_moment(WEIGHT), D)
    gains = np.asarray(quick_gains(SAMPLE, pair, m_w, wush.MXFP4))
    metric = np.einsum("bij,bjk,blk->bil", *map(np.float64, (pair.weight, m_w, pair.weight)))
    y = wush.apply_transform(TRAIN, pair.activation)
    table = []
    for gain in noise.GAINS:
        e = np.float64(fake_quantize(gain * y, wush.MXFP4) / gain - y).reshape(-1, 2, D)
        table.append(np.einsum("sbi,bij,sbj->b", e, metric, e))
    np.testing.assert_allclose(gains, np.array(noise.GAINS)[np.argmin(table, 0)], rtol=1e-6)


def test_gains_cost_nothing_at_run_time():
    plain, gained = (
        wush.quantize_weight(WEIGHT, MOMENT, r, sample=SAMPLE)
        for r in (GPTQ.replace(solver="rtn"), GPTQ.replace(solver="rtn", block_gain=True))
    )
    assert gained.transform.shape == plain.transform.shape
    assert gained.nbytes == plain.nbytes
    ratio = np.float64(gained.transform) / np.float64(plain.transform)
    found = np.median(ratio, axis=(1, 2))
    distance = np.abs(np.log2(found)[:, None] - np.arange(8) / 8).min(1)
    assert (distance < 0.01).all()  # bfloat16
    # The pair still undoes itself: only the quantization error is left.
    error = np.float64(effective_weight(gained) - WEIGHT)
    assert np.mean(error**2) < 0.03 * np.mean(WEIGHT**2)


def test_a_sample_is_asked_for():
    for recipe in (GPTQ.replace(block_gain=True), GPTQ.replace(input_error="sample")):
        with pytest.raises(ValueError, match=r"sample=None.*calibrate first"):
            wush.quantize_weight(WEIGHT, MOMENT, recipe)
