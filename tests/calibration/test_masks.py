"""Padding leaves no trace in moments, samples and losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wush_jax as wush
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import Masked, collect_moments, find_sites
from wush_jax.layers.dense import dense_layers

pytestmark = pytest.mark.once

X = np.random.default_rng(0).standard_normal((2, 6, 32)).astype(np.float32)
MASK = np.arange(6) < np.array([[4], [2]])
EIGHT = wush.Recipe(wush.INT8, transform="identity", solver="rtn")


class Model(nnx.Module):
    """One layer on (batch, length, K), one in a vmap, one on tokens in a row."""

    def __init__(self):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(3)])

    def __call__(self, x):
        y = jax.vmap(self.layers[1])(self.layers[0](x))
        return self.layers[2](y.reshape(-1, 32)).reshape(x.shape)


@pytest.fixture(scope="module")
def model():
    return Model()


def test_moments_and_samples_are_of_the_tokens_that_count(model):
    padded = np.where(MASK[..., None], X, 1e6)
    sites = find_sites(model, Masked(padded, MASK))
    blocks = dict.fromkeys(sites)
    found = collect_moments(model, [Masked(padded, MASK)], blocks, rows=8)
    kept = collect_moments(model, [X[MASK][None]], blocks, rows=8)
    for site in sites:
        assert int(found[site].count) == int(found[site].sample.count) == MASK.sum() == 6
        # float32 products of six rows, and matmuls of other shapes before them
        np.testing.assert_allclose(found[site].mean, kept[site].mean, rtol=1e-4, atol=1e-5)
        rows = [np.sort(np.asarray(m[site].sample.rows), 0) for m in (found, kept)]
        np.testing.assert_allclose(*rows, atol=1e-5)


def test_losses_are_of_the_tokens_that_count(model):
    (site, *_) = find_sites(model, X)
    dense = dense_layers(model)[0][site.name]
    packed = {site.name: wush.quantize_weight(dense.weight, None, EIGHT)}
    masked = layer_losses(model, Masked(X, MASK), [site], packed)[site.name]
    kept = layer_losses(model, X[MASK][None], [site], packed)[site.name]
    assert masked.loss == pytest.approx(kept.loss, rel=1e-4)
    assert masked.relative == pytest.approx(kept.relative, rel=1e-4)


def test_a_mask_of_other_tokens_names_the_layer(model):
    with pytest.raises(ValueError, match=r"layer layers.0: .*\(2, 6\), the mask is of \(2, 5\)"):
        collect_moments(model, [Masked(X, MASK[:, :5])], dict.fromkeys(find_sites(model, X), None))
    assert jnp.asarray(MASK).dtype == bool


class Stacked(nnx.Module):
    """Layers one after the other, and a head."""

    def __init__(self):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(2)])
        self.head = nnx.Linear(32, 32, rngs=nnx.Rngs(2))

    def embed(self, x):
        return x

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("granularity", ["site", "layer"])
def test_padding_leaves_no_trace_layer_after_layer(granularity):
    x = np.random.default_rng(1).standard_normal((4, 64, 32)).astype(np.float32)
    mask = np.arange(64) < np.array([[40], [64], [3], [17]])
    settings = wush.Sequential(granularity=granularity, hidden_dtype="float32")
    recipe = EIGHT.replace(transform="wush")
    padded = Masked(np.where(mask[..., None], x, 1e6), mask)
    found, kept = (
        wush.quantize_model(Stacked(), [batch], recipe, sequential=settings)[1].layers
        for batch in (padded, x[mask][None])
    )
    assert [row.path for row in found] == ["layers.0", "layers.1", "head"]
    for one, two in zip(found, kept, strict=True):
        # float32 sums in another order, and a code of eight bits here and there
        assert one.predicted_gain == pytest.approx(two.predicted_gain, rel=1e-4)
        assert one.relative_loss == pytest.approx(two.relative_loss, rel=1e-2)
