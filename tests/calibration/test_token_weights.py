"""Tokens weighed by the gradients by the outputs of layers: against perturbations added to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import wush_jax as wush
from wush_jax.calibration.observe import Masked, collect_moments, find_sites
from wush_jax.calibration.token_weights import gradient_weights
from wush_jax.layers.dense import dense_layers
from wush_jax.layers.output_gradients import output_gradients
from wush_jax.layers.ragged_linear import RaggedLinear

pytestmark = pytest.mark.once

V, D = 16, 32
TOKENS = np.random.default_rng(0).integers(V, size=(2, 6), dtype=np.int32)
MASK = np.arange(6) < np.array([[4], [2]])


class Model(nnx.Module):
    """Two layers that share an input, one behind them, a head: causal by a running mean."""

    def __init__(self, scale=0.5):
        random = np.random.default_rng(1)
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.left = nnx.Linear(D, 8, rngs=rngs)
        self.right = nnx.LinearGeneral(D, (2, 4), use_bias=False, rngs=rngs)
        self.up = nnx.Linear(8, D, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)
        for layer in (self.left, self.right, self.up, self.head):
            layer.kernel[...] = jnp.float32(scale * random.standard_normal(layer.kernel.shape))

    def __call__(self, tokens, added=None):
        added = added or dict.fromkeys(("left", "right", "up", "head"), 0.0)
        x = jnp.cumsum(self.embed(tokens), axis=1)
        left = self.left(x) + added["left"]
        right = (self.right(x) + added["right"]).reshape(left.shape)
        y = jnp.tanh(left) * jnp.cumsum(right, axis=1) / 6
        return self.head(self.up(y) + added["up"]) + added["head"]


@pytest.fixture(scope="module")
def model():
    return Model()


def site_by_name(model, batch=TOKENS, **options):
    return {site.name: site for site in find_sites(model, batch, **options)}


def expected_squares(model, key, mask=None):
    """|g|^2 by layer, from perturbations of its output."""

    def likelihood(added):
        logp = jax.nn.log_softmax(model(TOKENS, added))
        labels = jax.random.categorical(key, jax.nn.log_softmax(model(TOKENS)))
        taken = jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
        return jnp.sum(taken if mask is None else jnp.where(mask, taken, 0))

    shapes = {"left": (8,), "right": (2, 4), "up": (D,), "head": (V,)}
    zeros = {name: jnp.zeros((2, 6, *shape)) for name, shape in shapes.items()}
    found = jax.grad(likelihood)(zeros)
    return {n: np.sum(np.float64(g).reshape(2, 6, -1) ** 2, -1) for n, g in found.items()}


def weights_of(model, batch, sites, key, **options):
    layers, _ = dense_layers(model)
    call = options.get("call", lambda m, x: m(x))
    run = jax.jit(lambda: gradient_weights(model, batch, sites, layers, key, call=call))
    return {site.name: np.asarray(found) for site, found in run().items()}


@pytest.mark.parametrize("mask", [None, MASK])
def test_weights_are_the_norms_of_the_gradients_by_outputs(model, mask):
    key = jax.random.key(3)
    batch = TOKENS if mask is None else Masked(TOKENS, mask)
    sites = site_by_name(model)
    assert sites["left"].layers == ("left", "right")
    found = weights_of(model, batch, tuple(sites.values()), key)
    squares = expected_squares(model, key, mask)
    squares["left"] += squares.pop("right")  # those that share an input are one output
    for name, square in squares.items():
        # float32 gradients of sums of twelve tokens
        np.testing.assert_allclose(found[name], np.sqrt(square), rtol=1e-4, atol=1e-6)
    if mask is not None:  # nothing that counts is behind what the mask leaves out
        assert not found["head"][~mask].any()
        assert found["head"][mask].all()


def test_moments_are_weighted_and_batches_count_by_their_tokens(model):
    sites = site_by_name(model)
    blocks = dict.fromkeys(sites.values())
    batches = [TOKENS, TOKENS[:1]]
    found = collect_moments(model, batches, blocks, rows=64, token_weights="gradient")
    plain = collect_moments(model, batches, blocks, rows=64)
    inputs = np.float64(np.cumsum(model.embed(TOKENS), axis=1))
    want, weights = 0.0, []
    for step, batch in enumerate(batches, start=1):
        w = weights_of(model, batch, (sites["left"],), jax.random.key(step))["left"].ravel()
        x = inputs[: len(batch)].reshape(-1, D)
        weights.append(w / w.mean())
        want += np.einsum("t,ti,tj->ij", weights[-1], x, x) / 18
    moments = found[sites["left"]]
    # float32 sums, and matmuls of another program
    np.testing.assert_allclose(moments.mean, want, rtol=1e-3, atol=1e-3)
    assert int(moments.count) == 18
    assert float(moments.largest) == float(plain[sites["left"]].largest)
    # A sample that holds every row has the same moment.
    rows, own = np.float64(moments.sample.rows), np.float64(moments.sample.weights)
    np.testing.assert_allclose(
        np.einsum("s,si,sj->ij", own, rows, rows), want, rtol=1e-3, atol=1e-3
    )
    assert np.abs(np.asarray(plain[sites["left"]].mean) - want).max() > 0.05 * np.abs(want).max()


def test_padding_has_no_weight(model):
    (site, *_) = find_sites(model, TOKENS)
    run = {"rows": 8, "token_weights": "gradient"}
    found = collect_moments(model, [Masked(TOKENS, MASK)], {site: None}, **run)[site]
    changed = np.where(MASK, TOKENS, (TOKENS + 1) % V)
    other = collect_moments(model, [Masked(changed, MASK)], {site: None}, **run)[site]
    assert int(found.count) == MASK.sum()
    # the labels' logits are the same bits, but for sums over other rows
    np.testing.assert_allclose(found.mean, other.mean, rtol=1e-4, atol=1e-5)


class Stack(nnx.Module):
    """Three layers in one, that a scan takes apart; a head."""

    def __init__(self):
        make = nnx.vmap(lambda key: nnx.Linear(D, D, rngs=nnx.Rngs(key)))
        self.layers = make(jax.random.split(jax.random.key(0), 3))
        self.head = nnx.Linear(D, V, rngs=nnx.Rngs(1))

    def scanned(self, x):
        graph, state = nnx.split(self.layers)
        step = jax.checkpoint(lambda x, s: x + jnp.tanh(nnx.merge(graph, s)(x)))
        return self.head(jax.lax.scan(lambda x, s: (step(x, s), None), x, state)[0])

    def unrolled(self, x, added):
        for i in range(3):
            y = x @ self.layers.kernel[i] + self.layers.bias[i]
            x = x + jnp.tanh(y + added[i])
        return self.head(x)


def test_a_scan_has_its_layers_gradients_each():
    model = Stack()
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, D)), jnp.float32)
    layers, _ = dense_layers(model)

    def loss(out):
        return jnp.sum(out[0] ** 2)

    found = output_gradients(model, x, lambda m, x: m.scanned(x), layers, loss)
    exact = jax.grad(lambda added: loss([model.unrolled(x, added)]))(jnp.zeros((3, 2, 5, D)))
    assert found["layers"].shape == (3, 2, 5)
    np.testing.assert_allclose(found["layers"], np.sum(np.square(exact), -1), rtol=1e-4)
    call = {"call": lambda m, x: m.scanned(x)}
    sites = site_by_name(model, x, **call)
    moments = collect_moments(
        model, [x], dict.fromkeys(sites.values()), rows=4, token_weights="gradient", **call
    )
    assert moments[sites["layers"]].sample.importance.shape == (3, 4)


def test_vmapped_layers():
    class Mapped(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(D, V, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jax.vmap(self.a)(x)

    model = Mapped()
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, D)), jnp.float32)
    layers, _ = dense_layers(model)
    found = output_gradients(model, x, lambda m, x: m(x), layers, lambda out: jnp.sum(out[0] ** 2))
    np.testing.assert_allclose(found["a"], np.sum(4 * model(x) ** 2, -1), rtol=1e-5)


def test_it_survives_the_disk_and_serves_recipes(model, tmp_path):
    calibration = wush.calibrate(model, [TOKENS], rows=8, token_weights="gradient")
    calibration.save(tmp_path / "kept")
    again = wush.Calibration.load(tmp_path / "kept")
    assert again.token_weights == "gradient"
    site = again.sites[0]
    kept, read = (c.of(site) for c in (calibration, again))
    np.testing.assert_array_equal(kept.sample.importance, read.sample.importance)
    np.testing.assert_array_equal(kept.sample.weights, read.sample.weights)
    plain = wush.calibrate(model, [TOKENS], rows=8)
    assert plain.token_weights is None
    assert plain.of(site).sample.importance is None


def test_refusals_name_what_is_wrong(model):
    with pytest.raises(ValueError, match="token_weights='fisher' is unknown"):
        wush.calibrate(model, [TOKENS], token_weights="fisher")
    pair = {"call": lambda m, x: (m(x), x)}
    with pytest.raises(ValueError, match=r"returns logits .*float32.*int32"):
        wush.calibrate(model, [TOKENS], token_weights="gradient", **pair)

    def looped(m, x):
        more = lambda c: c[1] < m.up.bias[...].sum() + 1  # noqa: E731
        logits = m(x)
        return jax.lax.while_loop(more, lambda c: (c[0] * 2, c[1] + 1), (logits, 0.0))[0]

    with pytest.raises(ValueError, match="the model has no gradient"):
        wush.calibrate(model, [TOKENS], token_weights="gradient", call=looped)
    mesh = jax.make_mesh((1,), ("data",))
    parts = {"mesh": mesh, "in_specs": PartitionSpec(), "out_specs": PartitionSpec()}

    def mapped(m, x):
        return jax.shard_map(lambda x: m(x), **parts)(x)

    with pytest.raises(NotImplementedError, match="layer left is called inside of shard_map"):
        wush.calibrate(model, [TOKENS], token_weights="gradient", call=mapped)
    layer = RaggedLinear(D, V, experts=2, rngs=nnx.Rngs(0))
    rows, sizes = jnp.ones((5, D)), jnp.int32([2, 3])
    with pytest.raises(NotImplementedError, match="has rows sorted by expert"):
        wush.calibrate(
            layer, [rows], token_weights="gradient", call=lambda m, x: m(x, sizes), rows=0
        )
    with pytest.raises(ValueError, match="weights: this sample keeps none"):
        wush.Moments.init(4, rows=2).update(jnp.ones((3, 4)), weights=jnp.ones(3))


def test_only_ratios_of_weights_matter_and_zeros_are_all_alike():
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    w = np.float32([1, 2, 0, 4, 3])
    start = wush.Moments.init(4)
    found = start.update(x, weights=1000 * w).mean
    np.testing.assert_allclose(found, np.einsum("t,ti,tj->ij", w / 10, x, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(start.update(x, weights=0 * w).mean, start.update(x).mean, rtol=1e-6)
