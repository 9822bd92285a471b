"""Several recipes compared on one model and text."""

import dataclasses
import io
import json
import weakref

import numpy as np
import pytest
from comparison import ONE_ORDER
from rich.console import Console
from tiny import BYTES, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.evaluation import study

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

CALIBRATION, EVALUATION = tokens(2), tokens(2, seed=1)
SETTINGS = study.grid([wush.MXFP4], ["wush"]) | {
    "one layer": [("layers.0.self_attn.[qk]_proj", wush.Recipe(transform="hadamard"))]
}


@pytest.fixture(scope="module")
def model():
    return random_model(BYTES)


@pytest.fixture(scope="module")
def result(model):
    steps = []
    models = {}
    found = study.compare(
        model,
        SETTINGS,
        iter(CALIBRATION),
        EVALUATION,
        step=steps.append,
        each=lambda outcome, made: models.update({outcome.name: made}),
    )
    assert steps == ["calibrate", *SETTINGS]
    return found, models


def test_grid_combines_everything():
    base = wush.Recipe(damping=0.5)
    found = study.grid([wush.MXFP4, wush.NVFP4], ["wush"], ["rtn", "gptq"], base)
    assert list(found) == [f"{f} {s}-wush" for f in ("MXFP4", "NVFP4") for s in ("rtn", "gptq")]
    assert found["NVFP4 gptq-wush"] == base.replace(format=wush.NVFP4, solver="gptq")


def test_outcomes_are_those_of_quantizing_once(model, result):
    """Full moments serve every setting: the same model comes out of a run of its own."""
    found, models = result
    recipe = SETTINGS["MXFP4 rtn-wush"]
    alone, _ = wush.quantize_model(model, CALIBRATION, recipe)
    ours = models["MXFP4 rtn-wush"]
    for layers in zip(ours.layers, alone.layers, strict=True):
        codes = [np.asarray(layer.mlp.down_proj.codes[...]) for layer in layers]
        # blocks of the full moment and moments of blocks agree to float32 rounding
        assert np.mean(codes[0] != codes[1]) < 0.01
    outcome = next(o for o in found.outcomes if o.name == "MXFP4 rtn-wush")
    # the same models in other compilations: float32 logits, and KL is a small difference of them
    kl = wush.kl_divergence(model, ours, EVALUATION)
    assert outcome.kl == pytest.approx(kl, rel=1e-3)
    assert outcome.perplexity == pytest.approx(wush.perplexity(ours, EVALUATION), rel=1e-5)
    losses = [layer.relative_loss for layer in outcome.report.layers]
    assert outcome.layer_loss == pytest.approx(np.mean(losses))
    # Of the model from itself: where two programs sum, float32 terms of a few units, 2^-24 each.
    assert abs(found.reference.kl) <= (0 if ONE_ORDER else 1e-6) < outcome.kl


def test_a_setting_may_cover_part_of_a_site(result):
    found, _ = result
    report = next(o for o in found.outcomes if o.name == "one layer").report
    assert [layer.path.rpartition(".")[2] for layer in report.layers] == ["q_proj", "k_proj"]


def test_table_json_and_plot(result, tmp_path):
    found, _ = result
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    for outcome in found.outcomes:
        assert f"{outcome.kl * 1e3:.2f}" in text
        assert outcome.name in text
    assert f"{found.reference.perplexity:.4f}" in text
    found.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [o["kl"] for o in content["outcomes"]] == [o.kl for o in found.outcomes]
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_settings_that_lose_nothing(result, tmp_path):
    found, _ = result
    exact = [
        dataclasses.replace(o, kl=0.0, layer_loss=0.0, typical_loss=0.0) for o in found.outcomes
    ]
    study.Study(found.reference, exact).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_study_that_is_killed_keeps_what_it_has(model, result, tmp_path):
    """Also: a calibration stands in for batches, and one model is there at a time."""
    kept = wush.calibrate(model, CALIBRATION)
    path = tmp_path / "study.json"
    seen = []

    def each(outcome, made):
        seen.append((outcome.name, weakref.ref(made)))
        assert [ref() is None for _, ref in seen] == [True] * (len(seen) - 1) + [False]
        written = json.loads(path.read_text())["outcomes"]
        assert [o["name"] for o in written] == [name for name, _ in seen]
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.compare(model, SETTINGS, kept, EVALUATION, each=each, path=path)
    outcomes = json.loads(path.read_text())["outcomes"]
    found, _ = result
    assert [o["kl"] for o in outcomes] == pytest.approx([o.kl for o in found.outcomes], rel=1e-3)


def test_no_text(model):
    with pytest.raises(ValueError, match="evaluation is empty"):
        study.compare(model, SETTINGS, CALIBRATION, [])
    with pytest.raises(ValueError, match="batches is empty"):
        study.compare(model, SETTINGS, [], EVALUATION)
    with pytest.raises(ValueError, match="settings is empty"):
        study.compare(model, {}, CALIBRATION, EVALUATION)
