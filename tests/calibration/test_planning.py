"""The dry run: rules, sites, bytes; refusals that name the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONFIG, Net, rows, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.models import Llama

pytestmark = pytest.mark.once

SHAPES = jax.ShapeDtypeStruct((3, 64), jnp.float32)
RECIPE = wush.Recipe()
GPTQ = RECIPE.replace(solver="gptq")


@pytest.fixture(scope="module")
def net():
    return Net()


def sites(planned):
    return [(item.site.layers, item.recipe) for item in planned.sites]


@pytest.mark.parametrize("preset", [wush.PAPER, wush.BEST], ids=["PAPER", "BEST"])
@pytest.mark.parametrize("derived", [False, True])
def test_a_plan_has_the_shapes_of_what_is_quantized(preset, derived):
    """Planned by rounding, whatever the solver."""
    fmt = wush.NVFP4.replace(global_scale=None) if derived else wush.MXFP4
    recipe = preset.replace(format=fmt, activation_format=wush.FP8 if derived else "same")
    model = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    batch = jax.random.normal(jax.random.key(0), (64, 64))
    call = {"call": lambda model, x: model[0](x)}
    planned = wush.plan(model, recipe, batch, **call).report
    _, report = wush.quantize_model(model, [batch], recipe, implementation="reference", **call)
    assert report.bytes_after == planned.bytes_after


def test_first_rule_wins_and_the_rest_is_reported(net):
    rules = [
        ("left", GPTQ),
        ("left|right", RECIPE),
        ("twice", None),
        ("left", None),
        ("lost", None),
    ]
    planned = wush.plan(net, rules, SHAPES)
    assert sites(planned) == [(("left",), GPTQ), (("right",), RECIPE)]
    assert planned.report.skipped == {
        "twice": "no rule, or a rule with None",
        "idle": "not reached by the call",
    }
    assert planned.report.unused_rules == ["left", "lost"]
    text = planned.report.table().caption
    assert "left alone: twice: no rule" in text
    assert "rule without a layer: lost" in text


def test_a_recipe_decides_what_moments_are_kept(net):
    planned = wush.plan(net, [("twice", GPTQ), (".*", RECIPE)], SHAPES)
    assert [item.moment_block for item in planned.sites] == [32, None]
    # float32: (2, 32, 32) blocks, then (32, 32) whole
    assert planned.report.details["moment_bytes"] == 4 * (64 * 32 + 32 * 32)


def test_without_a_batch_every_layer_is_a_site(net):
    assert [paths for paths, _ in sites(wush.plan(net, RECIPE))] == [
        (path,) for path in ("idle", "left", "right", "twice")
    ]


def test_nothing_is_needed_but_shapes():
    shapes = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    tokens_like = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    planned = wush.plan(shapes, RECIPE, tokens_like)
    assert planned.report == wush.plan(random_model(CONFIG), RECIPE, tokens(1)[0]).report
    assert planned.report.bytes_before == 2 * 4 * (6 * 64 * 64)
    # 4 bits a weight, 8 bits a group of 32, a float32 a layer; one bfloat16 transform a site
    weights = 2 * (6 * 64 * 64 * (4 + 8 / 32) / 8 + 7 * 4)
    assert planned.report.bytes_after == weights + 2 * 4 * (2 * 64 * 32)


def test_gain_and_time_are_measured_on_request(net):
    batch = rows(1)[0]
    planned = wush.plan(net, RECIPE, batch, measure=True)
    gains = {layer.path: layer.predicted_gain for layer in planned.report.layers}
    assert gains["left"] == gains["right"]
    assert 0 < gains["left"] < 1
    assert planned.report.details["seconds_per_batch"] > 0
    with pytest.raises(ValueError, match="measure=True needs a batch"):
        wush.plan(net, RECIPE, measure=True)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "rules is empty"),
        ([("left", None)], "rules quantize none of the 4 dense layers"),
        ([("lost", RECIPE)], "rules quantize none"),
        (RECIPE.replace(block_size=64), "layer twice: K=32 is not a multiple of block_size=64"),
        ([("(", RECIPE)], r"rules has the entry \('\('"),
        ([("left", "wush")], "must be a Recipe or None"),
    ],
)
def test_rules_that_cannot_be_followed(net, rules, message):
    with pytest.raises(ValueError, match=message):
        wush.plan(net, rules, SHAPES)


def test_weights_that_are_not_finite_name_the_layer(net):
    model = nnx.clone(net)
    model.right.kernel[...] = model.right.kernel[...].at[3, 0, 5].set(np.nan)
    with pytest.raises(ValueError, match="layer right: its weight has non-finite values"):
        wush.quantize_model(model, rows(1), [("right", RECIPE)])
