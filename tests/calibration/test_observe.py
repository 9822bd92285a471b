"""Which layers share an input, and the moments of what flows into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONFIG, Net, rows, tokens
from weights import random_model

from wush_jax.calibration.observe import ROUNDED, Site, collect_moments, find_sites

SITES = (Site(("left", "right"), 64), Site(("twice",), 32))


@pytest.fixture(scope="module")
def net():
    return Net()


def inputs_of(net, x):
    """What the dense layers of a `Net` see, in numpy float64, by site."""
    kernel = [np.asarray(m.kernel[...], np.float64) for m in (net.left, net.right, net.twice)]
    x = np.tanh(x.astype(np.float64))
    y = (x @ kernel[0]) * (x @ kernel[1].reshape(64, 32))
    return [[x], [y, np.tanh(y @ kernel[2])]]


def test_projections_of_a_decoder_share_their_input():
    found = find_sites(random_model(CONFIG), tokens(1)[0])
    one = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    expected = [
        tuple(f"layers.{index}.{part}.{name}" for name in names)
        for index in range(2)
        for part, names in zip(["self_attn"] * 2 + ["mlp"] * 2, one, strict=True)
    ]
    assert [site.layers for site in found] == expected
    assert {site.size for site in found} == {64}


def test_sites_are_found_without_computing(net):
    x = jax.ShapeDtypeStruct((3, 64), jnp.float32)
    shapes = nnx.eval_shape(Net)
    assert find_sites(net, x) == find_sites(shapes, x) == SITES


def test_a_site_has_all_the_calls_in_common():
    """Equal values are not enough, and neither is one shared call of two."""

    def call(model, x):
        return model[0](x), model[1](x), model[1](x + 1), model[2](x + 0)

    linear = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    model = nnx.List([nnx.Linear(4, 4, **linear) for _ in range(3)])
    found = find_sites(model, jnp.ones((1, 4)), call=call)
    assert [site.layers for site in found] == [("0",), ("1",), ("2",)]


@pytest.mark.parametrize("block", [None, 16])
def test_moments_are_those_of_all_inputs_of_all_batches(net, block):
    batches = [*rows(2), *rows(1, (3, 5, 64), seed=1)]
    seen = []
    with jax.default_matmul_precision("highest"):  # a GPU's default for the model is TF32
        found = collect_moments(
            net, iter(batches), dict.fromkeys(SITES, block), progress=lambda *now: seen.append(now)
        )
    for number, site in enumerate(SITES):
        inputs = [x.reshape(-1, site.size) for b in batches for x in inputs_of(net, b)[number]]
        every = np.concatenate(inputs)
        expected = every.T @ every / len(every)
        if block:
            expected = np.stack([expected[i : i + 16, i : i + 16] for i in range(0, site.size, 16)])
        assert int(found[site].count) == len(every)
        # float32 sums of up to 200 products, and tanh and a matmul in float32 before them
        np.testing.assert_allclose(found[site].finalize(), expected, atol=2e-6 * expected.max())
    assert seen == [(1, None, "calibrate"), (2, None, "calibrate"), (3, None, "calibrate")]


def test_batches_of_a_shape_compile_once(net):
    traced = []

    def call(model, x):
        traced.append(x.shape)
        return model(x)

    for seed in (1, 2):
        collect_moments(Net(seed), rows(3), dict.fromkeys(SITES), call=call)
    assert traced == [(40, 64)]


def test_no_batches(net):
    with pytest.raises(ValueError, match="batches is empty"):
        collect_moments(net, iter([]), dict.fromkeys(SITES))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_name_the_site(net, value):
    model = nnx.clone(net)
    model.right.kernel[...] = model.right.kernel[...].at[3, 0, 5].set(value)
    with pytest.raises(ValueError, match="site twice: its input is not finite"):
        collect_moments(model, rows(1), dict.fromkeys(SITES))


class Normed(nnx.Module):
    """A dense layer behind a norm, in bfloat16."""

    def __init__(self):
        kinds = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
        self.norm = nnx.RMSNorm(64, **kinds)
        self.norm.scale.set_value(jnp.linspace(0.5, 2, 64))
        self.dense = nnx.Linear(64, 32, **kinds)

    def __call__(self, x):
        return self.dense(self.norm(x))


def test_moments_are_of_what_the_dtype_says():
    """Left to itself XLA skips the norm's rounding on its way to the moment: 1e-3 of it here."""
    x = jax.random.normal(jax.random.key(0), (16, 256, 64), jnp.bfloat16)
    model = Normed()
    (site,) = find_sites(model, x)
    found = np.asarray(collect_moments(model, [x], {site: None})[site].mean)
    norm = jax.jit(lambda x: model.norm(x), compiler_options=ROUNDED)
    rows = np.asarray(norm(x), np.float64).reshape(-1, 64)
    exact = rows.T @ rows / len(rows)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    # Float32 sums of 512 exact products.
    assert (np.abs(found - exact) <= 1e-5 * scale).all()
