"""Calibrate once, quantize often: equal to batches, saved and loaded, refused where it is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import Net, codes, rows

import wush_jax as wush

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

RTN = wush.Recipe()
GPTQ = wush.Recipe(solver="gptq", transform="hadamard", block_gain=False)
MIXED = [("left", RTN), ("twice", GPTQ)]
BATCHES = rows(3)


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture(scope="module")
def full(net):
    return wush.calibrate(net, iter(BATCHES), rows=32)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_was_seen(net, full):
    assert [site.layers for site in full.sites] == [("left", "right"), ("twice",)]
    assert full.shapes == {"left": (32, 64), "right": (32, 64), "twice": (32, 32)}
    assert (full.batches, full.tokens) == (3, 120)
    assert full.first is BATCHES[0]
    x = np.tanh(np.concatenate(BATCHES).astype(np.float64))
    known = full.of(full.sites[0])
    # float32 products of 120 terms
    np.testing.assert_allclose(known.mean, x.T @ x / len(x), atol=1e-6 * np.abs(x).max() ** 2)
    # tanh in float32
    assert full.largest["left"] == pytest.approx(np.abs(x).max(), rel=1e-6)
    assert known.sample.rows.shape == (32, 64)


@pytest.mark.parametrize("rules", [RTN, MIXED], ids=["rtn", "mixed"])
def test_it_gives_what_batches_give(net, rules):
    """For its own rules the very same: nothing is computed otherwise."""
    alone, report = wush.quantize_model(net, BATCHES, rules)
    kept = wush.calibrate(net, BATCHES, rules)
    made, again = wush.quantize_model(net, kept, rules)
    equal(codes(made), codes(alone))
    assert again.layers == report.layers
    assert [m.mean.ndim for m in kept.moments.values()] == [3, 2 if rules is MIXED else 3]


def test_one_calibration_serves_every_recipe(net, full):
    for rules in (MIXED, [("left", RTN.replace(block_gain=True))]):
        _, report = wush.quantize_model(net, full, rules)
        assert all(layer.loss > 0 for layer in report.layers)


def test_only_what_the_rules_need_is_kept(net):
    found = wush.calibrate(net, BATCHES[:1], RTN, [("left", GPTQ), (".*", None)])
    (known,) = (m for site, m in found.moments.items() if site.name == "left")
    assert known.mean.shape == (64, 64)  # both recipes on one site
    (other,) = (m for site, m in found.moments.items() if site.name == "twice")
    assert other.mean.shape == (1, 32, 32)
    assert known.sample is None
    part = wush.calibrate(net, BATCHES[:1], [("twice", RTN)])
    assert [site.name for site in part.moments] == ["twice"]
    with pytest.raises(ValueError, match=r"site left is not in it \('twice' are\)"):
        wush.quantize_model(net, part, RTN)
    with pytest.raises(ValueError, match=r"of site twice .* of 32, needed: the full moment"):
        wush.quantize_model(net, part, [("twice", GPTQ.replace(block_size=32))])
    with pytest.raises(ValueError, match="of site left it has no sampled rows"):
        wush.quantize_model(net, found, RTN.replace(block_gain=True))


def test_plan_and_choice_take_it(net, full):
    planned = wush.plan(net, RTN, full, measure=True)
    expected = wush.plan(net, RTN, BATCHES[0], measure=True)
    assert planned.sites == expected.sites
    assert "seconds_per_batch" not in planned.report.details
    assert all(layer.predicted_gain > 0 for layer in planned.report.layers)
    options = {"transforms": ["wush"], "blocks": [32]}
    held_out = rows(1, seed=9)[0]
    _, choices = wush.choose_recipes(net, full, RTN, held_out=held_out, **options)
    _, direct = wush.choose_recipes(net, [*BATCHES, held_out], RTN, **options)
    # blocks of the full moment and moments of blocks agree to float32 rounding: a code or two
    for ours, theirs in zip(choices, direct, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.01)


def test_saved_and_loaded_it_is_the_same(net, full, tmp_path):
    full.save(tmp_path / "kept")
    full.save(tmp_path / "kept")  # an earlier one is replaced
    found = wush.Calibration.load(tmp_path / "kept")
    for name in ("sites", "shapes", "batches", "tokens", "largest", "fingerprint"):
        assert getattr(found, name) == getattr(full, name)
    equal(dict(found.moments), dict(full.moments))
    equal(found.first, np.asarray(full.first))
    equal(
        codes(wush.quantize_model(net, found, RTN)[0]),
        codes(wush.quantize_model(net, full, RTN)[0]),
    )


@pytest.mark.parametrize("batch", [{"x": 1, "y": (2, [3, None])}, (np.arange(3),), None, 7])
def test_batches_of_any_plain_structure_are_kept(full, batch, tmp_path):
    wush.Calibration(full.sites, full.shapes, {}, batch, 1).save(tmp_path / "kept")
    found = wush.Calibration.load(tmp_path / "kept").first
    equal(found, jax.tree.map(np.asarray, batch))


def test_batches_that_files_cannot_hold(full, tmp_path):
    with pytest.raises(ValueError, match="first holds a set"):
        wush.Calibration(full.sites, full.shapes, {}, {1, 2}, 1).save(tmp_path / "kept")


def test_another_model_is_refused(net, full):
    with pytest.raises(ValueError, match="of another model: the weights differ: their hash is"):
        wush.quantize_model(Net(seed=1), full, RTN)
    other = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    with pytest.raises(ValueError, match=r"layer left has shape None, it had \(32, 64\); layer r"):
        wush.quantize_model(other, full, RTN, call=lambda m, x: m[0](x))
    shapes = nnx.eval_shape(Net)
    assert wush.plan(shapes, RTN, full).sites == wush.plan(net, RTN, full).sites
    with pytest.raises(ValueError, match="batches is a Calibration, of the original model"):
        wush.quantize_model(net, full, RTN, sequential=wush.Sequential())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_named(full, tmp_path):
    folder = tmp_path / "kept"
    full.save(folder)
    flip(folder / "model.safetensors", -5)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor '.*' is not what was saved"):
        wush.Calibration.load(folder)
    full.save(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"batches": 3', '"batches": 4'))
    with pytest.raises(ValueError, match=r"config.json is not what was saved, its checksum"):
        wush.Calibration.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is of no calibration"):
        wush.Calibration.load(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        wush.Calibration.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds another kind of model"):
        full.save(folder)


def test_hostile_configs_are_named(full, tmp_path):
    from wush_jax.calibration.calibration_files import _checksum

    folder = tmp_path / "kept"
    full.save(folder)
    config = json.loads((folder / "config.json").read_text())
    about = config["calibration"]
    sites = about["sites"]
    for wrong in (
        {"sites": [{**sites[0], "layers": ["lost"]}, sites[1]]},
        {"sites": [{**sites[0], "kept": {"block": 2}}, sites[1]]},
        {"sites": 3},
        {"first": {"pickle": []}},
        {"first": 7},
        {"batches": "x"},
    ):
        changed = {**about, **wrong}
        broken = {**config, "calibration": changed, "crc32": _checksum(changed)}
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"config.json describes no calibration|block=|tensor"):
            wush.Calibration.load(folder)


def test_bad_calls(net):
    with pytest.raises(ValueError, match="batches is empty"):
        wush.calibrate(net, [])
    with pytest.raises(ValueError, match="rows=-1"):
        wush.calibrate(net, BATCHES, rows=-1)
    with pytest.raises(ValueError, match="rows=0; the rules need rows"):
        wush.calibrate(net, BATCHES, RTN.replace(block_gain=True), rows=0)
    with pytest.raises(ValueError, match="K=32 is not a multiple of block_size=64"):
        wush.calibrate(net, BATCHES, RTN.replace(block_size=64))
    with pytest.raises(ValueError, match="its call reaches none of its 4 dense layers"):
        wush.calibrate(net, BATCHES, call=lambda model, x: jnp.sum(x))
