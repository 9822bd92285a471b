"""Calibration layer after layer: what each site sees, what is compiled, what is refused."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from comparison import ONE_ORDER
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import BLOCKS, BYTES, Blocks, Net, codes, rows, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.calibration import host_memory
from wush_jax.calibration.report import Report
from wush_jax.calibration.sequential import Stack

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

BATCHES = rows(2, (64, 32))
FLOAT32 = wush.Sequential(granularity="layer", hidden_dtype="float32")
# Where two runs see the same inputs, their moments still agree to float32 rounding only, since the
# compiler sums in another order: gains to this, and codes but for a few at a boundary. Where it
# may sum in any order the transform is one without data: if two singular values are as good as
# equal, or two entries that decide on a sign, the last bit decides on many codes.
GAIN, CODES = {"rel": 1e-4}, 0.01
RECIPE = wush.Recipe(transform="wush" if ONE_ORDER else "hadamard")


@pytest.fixture(scope="module")
def model():
    return Blocks()


@dataclasses.dataclass
class Run:
    model: nnx.Module
    report: Report
    traced: list
    progress: list

    def gains(self):
        return {layer.path: layer.predicted_gain for layer in self.report.layers}


def run(model, settings, batches=BATCHES, rules=RECIPE):
    traced, progress = [], []

    def layer_call(layer, hidden):
        traced.append(hidden.shape)
        return layer(hidden)

    settings = dataclasses.replace(settings, stack=dataclasses.replace(BLOCKS, layer=layer_call))
    quantized, report = wush.quantize_model(
        model, batches, rules, sequential=settings, progress=lambda *now: progress.append(now)
    )
    return Run(quantized, report, traced, progress)


@pytest.fixture(scope="module")
def layer_by_layer(model):
    return run(model, FLOAT32)


@pytest.fixture(scope="module")
def one_shot(model):
    quantized, report = wush.quantize_model(model, BATCHES, RECIPE)
    return Run(quantized, report, [], [])


def assert_near(found, expected, paths):
    assert paths
    for path in paths:
        assert np.mean(found[path] != expected[path]) < CODES, path


def test_the_first_layer_sees_what_one_shot_calibration_sees(layer_by_layer, one_shot):
    first = ["layers.0.up", "layers.0.down"]
    assert_near(codes(layer_by_layer.model), codes(one_shot.model), first)
    found, expected = layer_by_layer.gains(), one_shot.gains()
    assert found.keys() == expected.keys()
    same = {path for path in found if found[path] == pytest.approx(expected[path], **GAIN)}
    assert same >= set(first)
    # later layers differ by what 4 bits lose, though one of them may come out alike by chance
    assert same != set(found)


def test_later_layers_see_the_quantized_ones_before(model, layer_by_layer):
    """One-shot calibration of a model whose first layer is quantized is the second step."""
    half = nnx.clone(model)
    half.layers[0] = nnx.clone(layer_by_layer.model.layers[0])
    expected, report = wush.quantize_model(half, BATCHES, [("layers.1.*", RECIPE)])
    assert_near(codes(layer_by_layer.model), codes(expected), ["layers.1.up", "layers.1.down"])
    for layer in report.layers:
        assert layer_by_layer.gains()[layer.path] == pytest.approx(layer.predicted_gain, **GAIN)


def test_the_head_comes_last(model, layer_by_layer):
    assert [layer.path for layer in layer_by_layer.report.layers][-1] == "head"
    half = nnx.clone(layer_by_layer.model)
    half.head = nnx.clone(model.head)
    expected, _ = wush.quantize_model(half, BATCHES, RECIPE)
    assert_near(codes(layer_by_layer.model), codes(expected), ["head"])


def test_layers_of_equal_shape_compile_once(layer_by_layer):
    """Once for the moments, once for the inputs of each of two sites, once to go on."""
    assert len(layer_by_layer.traced) == 1 + 2 + 1


def test_progress_counts_every_pass(layer_by_layer):
    done, totals, what = zip(*layer_by_layer.progress, strict=True)
    total = (3 + 2 + 1) * len(BATCHES)  # moments of three layers, two steps, the head
    assert list(done) == list(range(1, total + 1))
    assert set(totals) == {total}
    assert what[:4] == ("layers.0.up",) * 2 + ("forward",) * 2
    assert what[-1] == "outside the layers"


def test_sites_see_the_sites_before_them(model, layer_by_layer):
    settings = dataclasses.replace(FLOAT32, granularity="site")
    site_by_site = run(model, settings, rules=[("layers.0.*", RECIPE)])
    found, coarse = site_by_site.gains(), layer_by_layer.gains()
    assert found["layers.0.up"] == pytest.approx(coarse["layers.0.up"], **GAIN)
    assert found["layers.0.down"] != pytest.approx(coarse["layers.0.down"], **GAIN)
    assert len(site_by_site.progress) == (2 + 2) * len(BATCHES)


@pytest.mark.parametrize("count", [8, pytest.param(2, marks=pytest.mark.gpu)])
def test_several_devices_give_the_same(model, layer_by_layer, count):
    """Eight virtual ones, to the last bit; or two GPUs."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices; there are {jax.device_count()}")
    devices = np.array(jax.devices()[:count])
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    settings = dataclasses.replace(FLOAT32, sharding=sharding)
    sharded = run(model, settings, rules=[("layers.0.*", RECIPE)])
    for path, gain in sharded.gains().items():
        assert gain == pytest.approx(layer_by_layer.gains()[path], **GAIN)
    found, expected = codes(sharded.model), codes(layer_by_layer.model)
    assert_near(found, expected, list(found))
    if ONE_ORDER:
        for path, values in found.items():
            np.testing.assert_array_equal(values, expected[path])


def test_a_decoder_needs_no_description():
    """Its embedding and its layers are found under their usual names."""
    decoder, rule = random_model(BYTES), [("layers.0.mlp.down_proj", RECIPE)]
    found, _ = wush.quantize_model(decoder, tokens(1), rule, sequential=FLOAT32)
    expected, _ = wush.quantize_model(decoder, tokens(1), rule)
    assert_near(codes(found), codes(expected), ["layers.0.mlp.down_proj"])


class Tower(nnx.Module):
    """A stack under other names."""

    def __init__(self):
        self.floors = nnx.List([Net(0), Net(1)])

    def __call__(self, batch):
        x = batch["x"] * batch["scale"]
        for floor in self.floors:
            x = x + floor(x).repeat(2, axis=-1)
        return x


TOWER = wush.Sequential(
    stack=Stack(
        "floors",
        embed=lambda model, batch: batch["x"] * batch["scale"],
        layer=lambda floor, x: x + floor(x).repeat(2, axis=-1),
    ),
    granularity="layer",
)


def test_any_stack_and_any_batch():
    batches = [{"x": x, "scale": np.float32(0.5)} for x in rows(2)]
    rules = [(".*(left|idle)", RECIPE.replace(transform="hadamard"))]
    quantized, report = wush.quantize_model(Tower(), batches, rules, sequential=TOWER)
    assert list(codes(quantized)) == ["floors.0.left", "floors.1.left"]
    assert "floors.1.idle" in report.skipped


class Called(nnx.Module):
    """Layers in a list, called with more than what flows through them, as in others' decoders."""

    def __init__(self):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_stack_that_does_not_run_is_told_what_it_needs():
    needs = r"no attribute 'embed'.*Stack\(layers='layers', embed=lambda model, batch"
    with pytest.raises(ValueError, match=f"does not run Called: AttributeError: .*{needs}"):
        wush.quantize_model(Called(), BATCHES, RECIPE, sequential=FLOAT32)
    narrow = dataclasses.replace(FLOAT32, stack=Stack(embed=lambda model, x: x[:, :16]))
    with pytest.raises(ValueError, match="does not run Called: TypeError: "):
        wush.quantize_model(Called(), BATCHES, RECIPE, sequential=narrow)
    right = Stack(embed=lambda model, x: x)
    settings = dataclasses.replace(FLOAT32, stack=right)
    quantized, _ = wush.quantize_model(Called(), BATCHES, RECIPE, sequential=settings)
    assert list(codes(quantized)) == ["layers.0", "layers.1"]


def test_a_model_without_the_stack():
    """What it needs is said, and which lists of alike modules there are."""
    needs = r"describe its Stack by wush_jax.calibration.Stack\(layers='layers', embed="
    with pytest.raises(ValueError, match=rf"model Net has no layers in \.layers; {needs}"):
        wush.quantize_model(Net(), rows(1), RECIPE, sequential=FLOAT32)
    with pytest.raises(ValueError, match=rf"in \.layers \(\.floors has 2 of Net\); {needs}"):
        wush.quantize_model(Tower(), rows(1), RECIPE, sequential=FLOAT32)


def test_no_batches(model):
    with pytest.raises(ValueError, match="batches is empty"):
        wush.quantize_model(model, iter([]), RECIPE, sequential=FLOAT32)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="granularity='row' is unknown"):
        wush.Sequential(granularity="row")
    with pytest.raises(ValueError, match="resume=True needs the state_dir"):
        wush.Sequential(resume=True)


@pytest.mark.parametrize("entered", [True, False], ids=["set_mesh", "no context"])
def test_explicit_mesh_axes(model, layer_by_layer, eight_devices, entered):
    """Hidden states over the devices, on a mesh as the newest `jax.make_mesh` makes it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    settings = dataclasses.replace(FLOAT32, sharding=sharding)
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        sharded = run(model, settings, rules=[("layers.0.*", RECIPE)])
    for path, gain in sharded.gains().items():
        assert gain == pytest.approx(layer_by_layer.gains()[path], **GAIN)
    found, expected = codes(sharded.model), codes(layer_by_layer.model)
    assert_near(found, expected, list(found))


def test_too_much_for_the_host_is_refused_before_it_starts(model, monkeypatch, tmp_path):
    """8 + 3 rows of 32 channels, 2 bytes."""
    batches = [*rows(1, (8, 32)), *rows(1, (3, 32))]
    needed = 11 * 32 * 2
    settings = wush.Sequential(BLOCKS, state_dir=tmp_path / "state")
    monkeypatch.setattr(host_memory, "host_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"need 0\.0 GB of host memory .* pass fewer or shorter"):
        wush.quantize_model(model, batches, RECIPE, sequential=settings)
    assert not (tmp_path / "state").exists()
    monkeypatch.setattr(host_memory, "host_memory", lambda: needed)
    host_memory.check_host_memory(model, batches, settings.stack.embed, "bfloat16")


def test_host_memory_where_the_kernel_does_not_tell(monkeypatch):
    values = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(host_memory.os, "sysconf", values.__getitem__)
    monkeypatch.setattr(host_memory.Path, "read_text", lambda *_: "nothing of the kind")
    assert host_memory.host_memory() == 4096000
