"""The sample of rows: unbiased, complete where it matters, indifferent to how the rows come."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wush_jax as wush
from wush_jax.transforms.sample import Sample

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

update = jax.jit(Sample.update)


def rows(seed, n=400, k=8):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, 1)))
    x[7] *= 300
    return jnp.float32(x)


def test_a_sample_that_holds_everything_is_everything():
    x = rows(0, 20)
    sample = update(update(Sample.init(8, 64), x[:5]), x[5:])
    kept = np.asarray(sample.rows)
    assert sorted(map(tuple, kept[kept.any(1)])) == sorted(map(tuple, np.asarray(x)))
    np.testing.assert_allclose(sample.weights[np.asarray(kept.any(1))], 1 / 20)
    assert sample.threshold == 0


def test_means_are_unbiased():
    """Second moments over many streams: within four standard errors of the truth."""
    x = rows(1)
    exact = np.float64(x)
    truth = exact.T @ exact / len(x)

    @jax.jit
    @jax.vmap
    def estimate(count):
        start = Sample.init(8, 64)
        sample = Sample(start.rows, start.priority, start.threshold, count).update(x)
        weights = sample.weights * sample.count.astype(jnp.float32) / len(x)
        return jnp.einsum("si,s,sj->ij", sample.rows, weights, sample.rows, precision="highest")

    found = np.float64(estimate(jnp.arange(500, dtype=jnp.int32)))
    error = found.mean(0) - truth
    assert (np.abs(error) <= 4 * found.std(0) / np.sqrt(500) + 1e-4 * truth.max()).all()
    # Far better than what a plain sample of 64 rows would miss: the giant is in all of them.
    assert found[:, 0, 0].std() < 0.1 * truth[0, 0]


def test_the_giant_is_never_lost():
    x = rows(2)
    sample = Sample.init(8, 16)
    for part in jnp.split(x, 10):
        sample = update(sample, part)
    found = np.abs(np.asarray(sample.rows)).max(1)
    assert found.max() == np.abs(np.asarray(x)).max()
    assert np.asarray(sample.weights)[found.argmax()] == pytest.approx(1 / len(x))
    assert sample.count == len(x)


def test_merging_streams():
    x, y = rows(3), rows(4)
    a, b = update(Sample.init(8, 32), x), update(Sample.init(8, 32), y)
    chex.assert_trees_all_equal(a.merge(b), b.merge(a))
    assert a.merge(b).threshold >= max(a.threshold, b.threshold)


def test_moments_carry_a_sample():
    x = rows(5)
    moments = wush.Moments.init(8, rows=16).update(x[:100]).update(x[100:])
    assert moments.sample.count == len(x)
    np.testing.assert_allclose(moments.finalize(), wush.second_moment(x), rtol=1e-4, atol=1e-3)
    assert wush.Moments.init(8).update(x).sample is None


def test_dead_inputs_weigh_nothing():
    sample = update(Sample.init(4, 8), jnp.zeros((3, 4)))
    assert not np.asarray(sample.weights).any()
