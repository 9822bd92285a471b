"""Reports as table, JSON and picture."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from wush_jax.calibration.report import LayerReport, Report

pytestmark = pytest.mark.files

PLAIN = {"format": "MXFP4/MXFP4", "transform": "wush", "solver": "rtn", "block": 32}
PLANNED = [
    LayerReport("q", "q", (64, 128), bytes_before=32768, bytes_after=8000, **PLAIN),
    LayerReport("k", "q", (32, 128), bytes_before=16384, bytes_after=1500, **PLAIN),
]
RESULTS = {"predicted_gain": 0.123, "loss": 0.5, "relative_loss": 0.00625}
MEASURED = [dataclasses.replace(layer, **RESULTS) for layer in PLANNED]


@pytest.fixture(params=[PLANNED, MEASURED], ids=["planned", "measured"])
def report(request):
    return Report(request.param, {"head": "a rule"}, ["lost"], {"seconds": 1.5})


def test_totals(report):
    assert (report.bytes_before, report.bytes_after) == (49152, 9500)


def test_table_shows_every_layer(report):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "2 layers, weights 5.2x smaller: 6.18 bits each" in text  # 8 * 9500 / 12288
    assert "0.0328 -> 0.008" in text
    assert "64x128" in text
    assert "k *" in text  # shares the transform of q
    assert "q *" not in text
    assert "left alone: head: a rule" in text
    assert "rule without a layer: lost" in text
    assert ("0.00625" in text) == (report.layers[0].loss is not None)


def test_layers_alike_are_one_row():
    rows = [
        dataclasses.replace(row, path=f"layers.{i}.{row.path}", site=f"layers.{i}.q")
        for i in range(12)
        for row in PLANNED
    ]
    rows[-1] = dataclasses.replace(rows[-1], block=64)
    rows[0] = dataclasses.replace(rows[0], relative_loss=0.5)
    rows[2] = dataclasses.replace(rows[2], relative_loss=0.25)
    found = Report(rows, {f"layers.{i}.gate": "a rule" for i in (0, 2, 3)})
    columns = {column.header: list(column.cells) for column in found.table().columns}
    names, sizes = columns["layer"], columns["MB"]
    assert names == ["layers.0-11.q", "layers.0-10.k *", "layers.11.k *"]
    assert sizes[:2] == ["0.393 -> 0.096", "0.18 -> 0.0165"]
    assert columns["loss"][0] == "0.25 to 0.5"
    assert columns["d"] == ["32", "32", "64"]
    assert found.table().title == "all: format MXFP4/MXFP4, transform wush, solver rtn"
    assert "gain" not in columns  # a plan knows none
    assert len(found.table(all_layers=True).rows) == 24
    lines = found.table().caption.splitlines()
    assert lines[1] == "left alone: layers.0,2-3.gate: a rule"
    assert lines[-1].startswith("24 layers, weights")


def test_a_transform_of_its_own_is_not_shared():
    row = dataclasses.replace(PLANNED[1], shared_transform=False)
    assert list(Report([row]).table().columns[0].cells) == ["k"]


def test_json_holds_everything(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in content["layers"]]
    assert layers == report.layers
    assert content["skipped"] == {"head": "a rule"}
    assert content["unused_rules"] == ["lost"]
    assert content["details"] == {"seconds": 1.5}


def test_plot_is_a_picture(report, tmp_path):
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_any_loss(tmp_path):
    """Nothing was lost: a logarithmic axis has nothing to show, and no warning to give."""
    layers = [dataclasses.replace(layer, relative_loss=0.0) for layer in PLANNED]
    Report(layers).plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
