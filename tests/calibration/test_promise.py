"""A promise of KL: slopes, predictions, and the smallest plan that keeps it."""

import itertools

import numpy as np
import pytest
from tiny import BYTES, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.calibration.choices import Choice, meet
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.promise import Slopes, kl_slopes
from wush_jax.calibration.sites import Site
from wush_jax.calibration.steps import quantize_planned
from wush_jax.layers.nnx import dense_layers

pytestmark = [pytest.mark.usefixtures("float32_matmuls"), pytest.mark.once]

FOUR = wush.Recipe(transform="hadamard", share_transform=False)
EIGHT = FOUR.replace(format=wush.MXFP8)
RULES = [("lm_head", None), (".*", FOUR)]
HELD_OUT = tokens(2, seed=9)


@pytest.fixture(scope="module")
def model():
    return random_model(BYTES)


@pytest.fixture(scope="module")
def calibration(model):
    return wush.calibrate(model, tokens(2, seed=8))


@pytest.fixture(scope="module")
def slopes(model, calibration):
    return kl_slopes(model, calibration, RULES, HELD_OUT)


def measured_kl(model, calibration, rules):
    quantized, _ = wush.quantize_model(model, calibration, rules)
    return wush.kl_divergence(model, quantized, HELD_OUT)


def test_a_slope_is_the_kl_of_its_site_alone(model, calibration, slopes):
    site = next(s for s in calibration.sites if s.name.endswith("q_proj"))
    assert len(site.layers) == 3
    rules = [(path.replace(".", r"\."), FOUR) for path in site.layers]
    item = wush.plan(model, rules, calibration).sites[0]
    packed = quantize_planned(item, dense_layers(model)[0], calibration.of(item.site))
    losses = layer_losses(model, HELD_OUT[0], [item.site], packed)
    expected = measured_kl(model, calibration, rules) / sum(x.relative for x in losses.values())
    # The same arithmetic in another program: float32 sums in another order.
    assert slopes.slopes[site.name] == pytest.approx(expected, rel=1e-3)
    assert len({slopes.slopes[path] for path in site.layers}) == 1
    assert not [path for path in slopes.slopes if "lm_head" in path]


def test_the_plan_of_the_slopes_is_predicted_exactly(model, calibration, slopes):
    planned = wush.plan(model, RULES, calibration)
    layers, packed = dense_layers(model)[0], {}
    for item in planned.sites:
        packed |= quantize_planned(item, layers, calibration.of(item.site))
    sites = [item.site for item in planned.sites]
    losses = layer_losses(model, HELD_OUT[0], sites, packed)
    predicted = slopes.predict({path: x.relative for path, x in losses.items()})
    assert predicted == pytest.approx(measured_kl(model, calibration, RULES), rel=1e-3)


def test_a_promise_takes_no_more_bytes_than_it_needs(model, calibration, slopes):
    four = measured_kl(model, calibration, RULES)
    found = {}
    for most in (0.3 * four, 1e-9):
        rules, choices = wush.choose_recipes(
            model,
            calibration,
            RULES,
            held_out=HELD_OUT[0],
            max_kl=most,
            candidates=[FOUR, EIGHT, None],
            slopes=slopes,
        )
        found[most] = choices
        assert {path for c in choices for path in c.site.layers} == set(slopes.slopes)
        losses = {path: c.loss for c in choices for path in c.site.layers}
        assert slopes.predict(losses) <= most
        if any(c.recipe for c in choices):
            assert measured_kl(model, calibration, rules) < 1.5 * most
    assert {c.recipe for c in found[0.3 * four]} > {FOUR}
    assert all(c.recipe is None for c in found[1e-9])
    nbytes = [sum(c.nbytes for c in choices) for choices in found.values()]
    assert nbytes == sorted(nbytes)
    assert nbytes[-1] == sum(dense_layers(model)[0][path].kernel.nbytes for path in slopes.slopes)


def test_a_size_is_kept_with_less_kl_the_larger_it_is(model, calibration, slopes):
    options = {"candidates": [FOUR, EIGHT, None], "slopes": slopes, "held_out": HELD_OUT[0]}
    shapes = [dense_layers(model)[0][path].weight_shape for path in slopes.slopes]
    weights = sum(n * k for n, k in shapes)
    found = []
    for limit in (
        {"max_bits": 9.0},
        {"max_bits": 11.0},
        {"max_bytes": 2 * weights},
        {"max_bits": 99.0},
    ):
        _, choices = wush.choose_recipes(model, calibration, RULES, **limit, **options)
        nbytes = sum(c.nbytes for c in choices)
        assert nbytes <= limit.get("max_bytes", limit.get("max_bits", 0) * weights / 8)
        losses = {path: c.loss for c in choices for path in c.site.layers}
        found.append((nbytes, -slopes.predict(losses), {c.recipe for c in choices}))
    assert found == sorted(found, key=lambda f: f[:2])
    assert len(set(f[0] for f in found)) == 4
    assert FOUR in found[0][2]
    assert found[-1][2] == {None}
    # Hadamard matrices of 32 x 32 weigh much here: 8.9 bits, 12.9, 32; so eleven lie between.
    assert len(found[1][2]) > 1


@pytest.mark.parametrize("seed", range(5))
def test_meeting_a_promise_is_nearly_optimal(seed):
    """Against all combinations: at most the bytes of the best one, and of one step more."""
    rng = np.random.default_rng(seed)
    table = {}
    for i in range(3):
        site = Site((f"{i}",), 32)
        nbytes, losses = np.sort(rng.integers(1, 20, 5)), np.sort(rng.random(5))[::-1]
        table[site] = [
            Choice(site, FOUR, float(loss), int(n)) for n, loss in zip(nbytes, losses, strict=True)
        ]
    everything = list(itertools.product(*table.values()))
    least = sum(min(c.loss for c in choices) for choices in table.values())
    for most in (least, least + 0.2, 1.0, 3.0):
        if most < least:
            continue
        chosen = meet(table, lambda c: c.loss, most)
        assert sum(c.loss for c in chosen) <= most
        fits = [c for c in everything if sum(x.loss for x in c) <= most]
        best = min(sum(x.nbytes for x in c) for c in fits)
        assert best <= sum(c.nbytes for c in chosen) <= best + 20
    with pytest.raises(ValueError, match=r"the promise of 0.001 cannot be kept: .* lose"):
        meet(table, lambda c: c.loss + 0.1, 0.001)


def test_mistakes_are_named(model, calibration, slopes):
    options = {"candidates": [FOUR], "slopes": slopes}
    with pytest.raises(ValueError, match=r"max_kl=-1 must be positive.*; budget=3 is another"):
        wush.choose_recipes(model, calibration, RULES, max_kl=-1, budget=3)
    with pytest.raises(ValueError, match=r"max_bits=4, max_bytes=9: give one of them"):
        wush.choose_recipes(model, calibration, RULES, max_bits=4, max_bytes=9)
    with pytest.raises(ValueError, match=r"max_bits=2 cannot be kept: .* 8\.9[0-9]* bits a weight"):
        wush.choose_recipes(model, calibration, RULES, max_bits=2, **options)
    with pytest.raises(ValueError, match="max_kl needs a Calibration"):
        wush.choose_recipes(model, tokens(2), RULES, max_kl=1.0)
    with pytest.raises(ValueError, match=r"slopes: layers .*q_proj.* have none"):
        wush.choose_recipes(
            model, calibration, RULES, max_kl=1.0, candidates=[FOUR], slopes=Slopes({}, 1.0)
        )
    with pytest.raises(ValueError, match="cannot be kept"):
        wush.choose_recipes(model, calibration, RULES, max_kl=1e-9, **options)
    with pytest.raises(ValueError, match="batches is empty"):
        kl_slopes(model, calibration, RULES, [])
