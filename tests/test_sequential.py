"""Calibration layer after layer: what each site sees, what is compiled, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import CONFIG, Net, rows, tokens
from weights import random_model

import wush_jax as wush
from wush_jax import host_memory
from wush_jax.nnx import QuantizedDense
from wush_jax.report import Report
from wush_jax.sequential import Stack

RECIPE = wush.Recipe()
BATCHES = tokens(2, (8, 16))
# Dense layers outside the stack, too.
CONFIG = dataclasses.replace(CONFIG, num_hidden_layers=3, tie_word_embeddings=False)
FLOAT32 = wush.Sequential(granularity="layer", hidden_dtype="float32")


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


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

    settings = dataclasses.replace(settings, stack=Stack(layer=layer_call))
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


def codes(model):
    return {
        ".".join(map(str, path)): np.asarray(module.codes[...])
        for path, module in nnx.iter_modules(model)
        if type(module) is QuantizedDense
    }


def assert_same_codes(found, expected, prefix=""):
    """But for a few at a boundary: moments of other compilations agree to float32 rounding."""
    found, expected = codes(found), codes(expected)
    assert found.keys() == expected.keys()
    paths = [path for path in found if path.startswith(prefix)]
    assert paths
    for path in paths:
        assert np.mean(found[path] != expected[path]) < 0.01, path


def test_the_first_layer_sees_what_one_shot_calibration_sees(layer_by_layer, one_shot):
    assert_same_codes(layer_by_layer.model, one_shot.model, "layers.0.")
    found, expected = layer_by_layer.gains(), one_shot.gains()
    assert found.keys() == expected.keys()
    for path in found:
        # float32 moments in another order of sums; later layers differ by what 4 bits lose
        same = found[path] == pytest.approx(expected[path], rel=1e-4)
        assert same == path.startswith("layers.0."), path


def test_later_layers_see_the_quantized_ones_before(model, layer_by_layer):
    """One-shot calibration of a model whose first layer is quantized is the second step."""
    half = nnx.clone(model)
    half.layers[0] = nnx.clone(layer_by_layer.model.layers[0])
    expected, report = wush.quantize_model(half, BATCHES, [("layers.1.*", RECIPE)])
    found = {p: c for p, c in codes(layer_by_layer.model).items() if p.startswith("layers.1.")}
    assert len(found) == 7
    for path in found:
        assert np.mean(found[path] != codes(expected)[path]) < 0.01, path
    for layer in report.layers:
        assert layer_by_layer.gains()[layer.path] == pytest.approx(layer.predicted_gain, rel=1e-4)


def test_the_head_comes_last(model, layer_by_layer):
    paths = [layer.path for layer in layer_by_layer.report.layers]
    assert paths[-1] == "lm_head"
    half = nnx.clone(layer_by_layer.model)
    half.lm_head = nnx.clone(model.lm_head)
    expected, _ = wush.quantize_model(half, BATCHES, RECIPE)
    different = codes(expected)["lm_head"] != codes(layer_by_layer.model)["lm_head"]
    assert np.mean(different) < 0.01


def test_layers_of_equal_shape_compile_once(layer_by_layer):
    """Once for the moments, once for the inputs of each of four sites, once to go on."""
    assert len(layer_by_layer.traced) == 1 + 4 + 1


def test_progress_counts_every_pass(layer_by_layer):
    done, totals, what = zip(*layer_by_layer.progress, strict=True)
    total = (3 + 2 + 1) * len(BATCHES)  # moments of three layers, two steps, the head
    assert list(done) == list(range(1, total + 1))
    assert set(totals) == {total}
    assert what[:4] == ("layers.0.self_attn.q_proj",) * 2 + ("forward",) * 2
    assert what[-1] == "outside the layers"


def test_sites_see_the_sites_before_them(model, layer_by_layer):
    rules = [("layers.0.*", RECIPE)]
    site_by_site = run(model, dataclasses.replace(FLOAT32, granularity="site"), rules=rules)
    found, coarse = site_by_site.gains(), layer_by_layer.gains()
    for path in found:
        same = found[path] == pytest.approx(coarse[path], rel=1e-4)  # as above
        assert same == path.endswith(("q_proj", "k_proj", "v_proj")), path
    assert len(site_by_site.progress) == (4 + 2) * len(BATCHES)


def test_eight_devices_give_the_same(model, layer_by_layer, eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    settings = dataclasses.replace(FLOAT32, sharding=sharding)
    sharded = run(model, settings, rules=[("layers.0.mlp.*", RECIPE)])
    for path, gain in sharded.gains().items():
        # partial sums of eight devices instead of one: float32 rounding of the moments
        assert gain == pytest.approx(layer_by_layer.gains()[path], rel=1e-4)
    found, expected = codes(sharded.model), codes(layer_by_layer.model)
    assert len(found) == 3
    for path in found:
        assert np.mean(found[path] != expected[path]) < 0.01, path


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
    recipe = RECIPE.replace(transform="hadamard")
    quantized, report = wush.quantize_model(Tower(), batches, recipe, sequential=TOWER)
    assert len(codes(quantized)) == len(report.layers) == 6
    assert "floors.1.idle" in report.skipped


def test_a_model_without_the_stack():
    with pytest.raises(
        ValueError, match=r"model Net has no layers in \.layers; describe its Stack"
    ):
        wush.quantize_model(Net(), rows(1), RECIPE, sequential=FLOAT32)


def test_no_batches(model):
    with pytest.raises(ValueError, match="batches is empty"):
        wush.quantize_model(model, iter([]), RECIPE, sequential=FLOAT32)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="granularity='row' is unknown"):
        wush.Sequential(granularity="row")
    with pytest.raises(ValueError, match="resume=True needs the state_dir"):
        wush.Sequential(resume=True)


def test_explicit_mesh_axes_are_refused(eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="are explicit"):
        wush.Sequential(sharding=NamedSharding(mesh, PartitionSpec("data")))


def test_too_much_for_the_host_is_refused_before_it_starts(model, monkeypatch, tmp_path):
    """8 + 3 rows of 16 tokens, 64 channels, 2 bytes."""
    batches = [*tokens(1, (8, 16)), *tokens(1, (3, 16))]
    needed = 11 * 16 * 64 * 2
    settings = wush.Sequential(state_dir=tmp_path / "state")
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
