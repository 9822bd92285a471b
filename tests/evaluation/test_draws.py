"""Several draws of calibration text: means, spread, ratios; what lies between paper and best."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console
from tiny import BYTES, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.evaluation.draws import Draws, ablation, compare_draws

pytestmark = pytest.mark.once

EVALUATION = tokens(1, seed=1)
SETTINGS = {"paper": wush.Recipe(), "same": wush.Recipe(), "h": wush.Recipe(transform="hadamard")}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    steps, folder = [], tmp_path_factory.mktemp("draws") / "studies"
    draws = [tokens(1, seed=2), tokens(1, seed=3)]
    results = list(
        compare_draws(
            random_model(BYTES),
            SETTINGS,
            draws,
            EVALUATION,
            step=lambda draw, name: steps.append((draw, name)),
            folder=folder,
        )
    )
    assert steps == [(d, name) for d in range(2) for name in ("calibrate", *SETTINGS)]
    assert [len(r.studies) for r in results] == [1, 2]
    for index, study in enumerate(results[-1].studies):
        written = json.loads((folder / f"draw-{index}.json").read_text())
        assert [o["kl"] for o in written["outcomes"]] == [o.kl for o in study.outcomes]
    return results[-1]


def test_ratios_are_to_the_base(found):
    rows = {row.name: row for row in found.rows()}
    for name in ("paper", "same"):
        row = rows[name]
        assert (row.kl_ratio, row.layer_ratio, row.typical_ratio) == (1, 1, 1)
        assert row.worst_ratio[0] == 1
    kl = [[o.kl for o in study.outcomes] for study in found.studies]
    assert rows["h"].kl == pytest.approx(np.mean([k[2] for k in kl]))
    assert rows["h"].kl_ratio == pytest.approx(np.exp(np.mean([np.log(k[2] / k[0]) for k in kl])))
    assert rows["paper"].kl_range == (min(k[0] for k in kl), max(k[0] for k in kl))
    losses = np.array(
        [[[r.relative_loss for r in o.report.layers] for o in s.outcomes] for s in found.studies]
    )
    worst = np.exp(np.log(losses[:, 2] / losses[:, 0]).mean(0))
    assert rows["h"].worst_ratio[0] == pytest.approx(worst.max())
    paths = [r.path for r in found.studies[0].outcomes[0].report.layers]
    assert rows["h"].worst_ratio[1] == paths[worst.argmax()]


def test_table_json_and_plot(found, tmp_path):
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert all(name in text for name in SETTINGS)
    found.to_json(tmp_path / "draws.json")
    content = json.loads((tmp_path / "draws.json").read_text())
    assert [row["name"] for row in content["rows"]] == list(SETTINGS)
    assert len(content["studies"]) == 2
    found.plot(tmp_path / "draws.png")
    assert (tmp_path / "draws.png").read_bytes().startswith(b"\x89PNG")


def test_settings_without_loss_have_ratios(found):
    def exact(outcome):
        layers = [
            dataclasses.replace(r, relative_loss=0.0, typical_loss=0.0)
            for r in outcome.report.layers
        ]
        report = dataclasses.replace(outcome.report, layers=layers)
        return dataclasses.replace(outcome, kl=0.0, report=report)

    study = found.studies[0]
    nothing = dataclasses.replace(study, outcomes=[exact(o) for o in study.outcomes])
    assert all(row.layer_ratio == 1 for row in Draws([nothing], "paper").rows())


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.INT4], ids=lambda f: f.name)
def test_ablation_walks_from_paper_to_best(fmt):
    settings = ablation(fmt)
    assert settings["paper"] == wush.PAPER.replace(format=fmt)
    assert settings["best"] == wush.BEST.replace(format=fmt)
    parts = [name for name in settings if name.startswith("  + ")]
    assert len(parts) == sum(name.startswith("  without ") for name in settings) == 5
    assert settings["  + descent=4"].descent == 4
    assert settings["  without descent"] == settings["best"].replace(descent=0)


def test_the_base_must_be_there():
    with pytest.raises(ValueError, match="base='paper' is not among the settings"):
        next(compare_draws(None, {"best": wush.BEST}, [], EVALUATION))
