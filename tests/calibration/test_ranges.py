"""Global scales that would saturate or vanish: seen, replaced, written, counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BLOCKS, Blocks, rows

import wush_jax as wush
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import Site
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.site_plan import SitePlan
from wush_jax.calibration.steps import quantize_planned
from wush_jax.formats import NVFP4
from wush_jax.layers.nnx import dense_layers
from wush_jax.solvers.ranges import refitted

pytestmark = pytest.mark.once

X = np.random.default_rng(0).standard_normal((256, 64)).astype("f4")
SPIKE = X.copy()
SPIKE[0, 5] = 3000.0
CHANNEL = X * np.where(np.arange(64) == 5, 500.0, 1.0).astype("f4")
INPUTS = {"spike": SPIKE, "channel": CHANNEL, "tiny": X * np.float32(3e-4), "large": X * 1000}


def net(factor=1.0):
    model = nnx.List([nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))])
    model[0].kernel[...] = model[0].kernel[...] * factor
    return model


def call(model, x):
    return model[0](x)


def relative_loss(x, recipe, factor=1.0):
    model = net(factor)
    quantized, report = wush.quantize_model(model, [jnp.asarray(x)], recipe, call=call)
    return quantized[0].packed, report.layers[0]


@pytest.mark.parametrize(
    ("inputs", "transform"),
    [*((name, "identity") for name in INPUTS), ("spike", "hadamard"), ("channel", "wush")],
)
def test_a_site_gets_a_scale_that_fits(inputs, transform):
    recipe = wush.Recipe(NVFP4, transform=transform)
    packed, row = relative_loss(INPUTS[inputs], recipe)
    # Rounding to 4 bits loses a hundredth of the power; saturated, nine tenths of it are lost.
    assert row.relative_loss < 0.03
    assert (row.saturated, row.vanished) == (0, 0)
    steps = np.log2([packed.input_format.global_scale / 10, float(packed.weight.global_scale) / 10])
    np.testing.assert_array_equal(steps, np.round(steps))
    assert packed.weight.format.global_scale == float(packed.weight.global_scale)


@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1e4])
def test_weights_get_a_scale_that_fits(factor):
    packed, row = relative_loss(X, wush.Recipe(NVFP4, transform="identity"), factor)
    assert row.relative_loss < 0.03
    assert packed.weight.format.global_scale != 10


def test_a_usual_site_keeps_the_constant():
    for transform in ("identity", "wush"):
        packed, _ = relative_loss(X, wush.Recipe(NVFP4, transform=transform))
        assert packed.weight.format == packed.input_format == NVFP4
    moments = wush.Moments.init(64).update(jnp.asarray(SPIKE))
    for recipe in (wush.Recipe(wush.MXFP4), wush.Recipe(NVFP4.replace(global_scale=None))):
        weight = net()[0].kernel[...].T
        packed = wush.quantize_weight(weight, moments.finalize(), recipe)
        assert refitted(recipe, [weight], [packed], moments) is None
    recipe = wush.Recipe(NVFP4, transform="identity")
    packed = wush.quantize_weight(0 * weight, None, recipe)
    still = wush.Moments.init(64).update(jnp.asarray(X))
    assert refitted(recipe, [0 * weight], [packed], still) is None


@pytest.mark.parametrize("factor", [1e-2, 1.0, 3.0])
def test_a_scale_is_derived_where_that_is_asked_for(factor):
    """The largest scales, of weights and inputs, use half of E4M3's range, and a quarter at least.

    Inputs are those of an identity, whose largest magnitude is known exactly.
    """
    recipe = wush.Recipe(NVFP4, transform="identity", global_scale="derived")
    packed, row = relative_loss(X * np.float32(factor), recipe, factor)
    largest = float(jnp.max(packed.weight.scales.astype(jnp.float32)))
    inputs = float(np.abs(X * factor).max() * packed.input_format.global_scale / 6)
    assert largest * 1.07 > 448 / 4
    assert largest <= 448 / 2
    assert 448 / 4 < inputs <= 448 / 2
    assert (row.saturated, row.vanished) == (0, 0)
    constant, _ = relative_loss(X, wush.Recipe(NVFP4, transform="identity"))
    assert constant.input_format == NVFP4


def test_a_scale_is_derived_only_where_there_are_ranges():
    with pytest.raises(ValueError, match="E4M3 scales and a constant, not of MXFP4: use NVFP4"):
        wush.Recipe(wush.MXFP4, global_scale="derived")
    recipe = wush.Recipe(NVFP4, transform="identity", global_scale="derived")
    with pytest.raises(ValueError, match="needs the ranges of the layer's input: give the Moments"):
        wush.quantize_weight(net()[0].kernel[...].T, None, recipe)


@pytest.mark.parametrize("inputs", ["spike", "tiny"])
def test_a_bare_layer_gets_the_scale_that_a_models_gets(inputs):
    """Where its moments tell the range."""
    x, weight = INPUTS[inputs], net()[0].kernel[...].T
    moments = wush.calibrate_layer(x, rows=0)
    for mode in ("constant", "derived"):
        recipe = wush.Recipe(NVFP4, transform="identity", global_scale=mode)
        expected, _ = relative_loss(x, recipe)
        (shared,) = wush.solvers.quantize_site([weight], moments, recipe)
        for found in (wush.quantize_weight(weight, moments, recipe), shared):
            assert jax.tree.structure(found) == jax.tree.structure(expected)  # with both formats
            np.testing.assert_array_equal(found.weight.codes, expected.weight.codes)
    assert wush.layer_loss(weight, x, found, relative=True) < 0.03


def test_a_compiled_call_keeps_the_constant():
    """It sees no values; what it does not see harms."""
    moments, recipe = wush.calibrate_layer(SPIKE, rows=0), wush.Recipe(NVFP4, transform="identity")
    weight = net()[0].kernel[...].T
    packed = jax.jit(lambda w, m: wush.quantize_weight(w, m, recipe))(weight, moments)
    assert packed.input_format == packed.weight.format == NVFP4
    assert wush.layer_loss(weight, SPIKE, packed, relative=True) > 0.5


def test_what_is_out_of_range_is_counted():
    """Of 64 groups in 16 tokens one saturates and four vanish."""
    x = X[:16].copy()
    x[0, 5], x[1] = 3000.0, 1e-6
    model = net()
    layers, _ = dense_layers(model)
    (name,) = layers
    packed = wush.quantize_weight(
        layers[name].weight, None, wush.Recipe(NVFP4, transform="hadamard")
    )
    packed = dataclasses.replace(packed, transform=None)
    site = Site((name,), 64)
    loss = layer_losses(model, jnp.asarray(x), [site], {name: packed}, call=call)[name]
    assert (loss.saturated, loss.vanished) == (1 / 64, 4 / 64)


@pytest.mark.parametrize(("of_weights", "of_inputs"), [(-60, -40), (50, 50)])
def test_losses_are_right_where_their_squares_overflow(of_weights, of_inputs):
    """Powers of two change no digit of MXFP4, and no figure but the loss."""
    recipe = wush.Recipe(wush.MXFP4, transform="identity")
    _, usual = relative_loss(SPIKE, recipe)
    _, row = relative_loss(SPIKE * np.float32(2.0**of_inputs), recipe, 2.0**of_weights)
    assert 0 < usual.typical_loss != usual.relative_loss
    # The least values, of no weight, fall below float32's normal numbers.
    for name, factor in (("relative_loss", 1), ("typical_loss", 1), ("loss", 4.0)):
        expected = getattr(usual, name) * factor ** (of_weights + of_inputs)
        assert getattr(row, name) == pytest.approx(expected, rel=1e-6)


def test_the_report_says_what_is_wrong():
    row = LayerReport("a", "a", (8, 64), "NVFP4/NVFP4", "wush", "gptq", 16, 1, 1)
    rows = [
        dataclasses.replace(row, saturated=0.25, vanished=0.0, tokens=32),
        dataclasses.replace(row, path="b", saturated=0.5, tokens=64),
    ]
    caption = Report(rows).table().caption
    assert "saturated, on the first batch: 2 layers, most in b (50 %)" in caption
    assert "vanished" not in caption
    assert "fewer tokens than channels: 1 layers, the first a (32 tokens, K=64)" in caption
    assert "fewer" not in str(Report([dataclasses.replace(row, solver="rtn")]).table().caption)


def test_all_layers_of_a_site_get_the_same():
    weights = [net(f)[0] for f in (1.0, 1e4)]
    model = nnx.List(weights)
    layers, _ = dense_layers(model)
    moments = wush.Moments.init(64).update(jnp.asarray(X))
    item = SitePlan(Site(tuple(layers), 64), wush.Recipe(NVFP4, transform="identity"))
    packed = quantize_planned(item, layers, moments)
    assert len({p.weight.format for p in packed.values()}) == 1


def test_a_resumed_run_and_its_files_have_the_same_scales(tmp_path):
    model = Blocks(count=2)
    batches = [200 * x[:, :32].reshape(2, 20, 32) for x in rows(2)]
    options = {"call": lambda m, x: m(x)}
    recipe = wush.Recipe(NVFP4, transform="hadamard")
    state = tmp_path / "state"
    settings = wush.Sequential(stack=BLOCKS, state_dir=state)
    first, _ = wush.quantize_model(model, batches, recipe, sequential=settings, **options)
    again, _ = wush.quantize_model(
        model, batches, recipe, sequential=dataclasses.replace(settings, resume=True), **options
    )
    wush.save(tmp_path / "saved", first)
    loaded = wush.load(tmp_path / "saved", Blocks(count=2))
    formats = [
        [layer.packed.input_format.global_scale for layer in (m.layers[0].up, m.layers[1].down)]
        for m in (first, again, loaded)
    ]
    assert formats[0] == formats[1] == formats[2]
    assert formats[0][0] < 10
