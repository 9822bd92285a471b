"""What a run writes of itself."""

import json

import jax
import pytest

import wush_jax as wush
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.commands.run_log import RunLog

pytestmark = pytest.mark.files


def test_a_run_is_told_line_by_line(tmp_path):
    rules = [("lm_head", None), (".*", wush.Recipe(format=wush.NVFP4, damping=0.02))]
    log = RunLog(tmp_path / "out", rules, model=tmp_path, seed=3)

    class Bar(list):
        def __call__(self, *now):
            self.append(now)

        def weigh(self, costs):
            self.costs = costs

    shown = Bar()
    update = log.following(shown)
    update.weigh([1.0, 2.0])
    assert shown.costs == [1.0, 2.0]
    file = tmp_path / "out" / "run.jsonl"
    for step in (1, None, "layers.0.q"), (2, None, "layers.0.q"), (3, 4, "forward"):
        update(*step)
    assert shown[-1] == (3, 4, "forward")
    start, first = map(json.loads, file.read_text().splitlines())  # as they come
    assert start["event"] == "start"
    assert start["versions"]["jax"] == jax.__version__
    assert (start["model"], start["seed"]) == (str(tmp_path), 3)
    skip, (pattern, fields) = start["rules"]
    assert skip == ["lm_head", None]
    assert (pattern, fields["damping"], fields["solver"]) == (".*", 0.02, "rtn")
    assert "NVFP4" in fields["format"]
    assert first["step"] == "layers.0.q"
    kinds = {"format": "NVFP4/NVFP4", "transform": "wush", "solver": "rtn", "block": 16}
    sizes = {"bytes_before": 64, "bytes_after": 16}
    names = ("layers.0.q", "layers.0.k")
    rows = [LayerReport(n, names[0], (8, 4), **kinds, **sizes, loss=0.5) for n in names]
    log.end(Report(rows, details={"solver_flops": 7}))
    *_, last, one, two, end = map(json.loads, file.read_text().splitlines())
    assert (last["event"], last["step"]) == ("step", "forward")
    assert (one["path"], one["loss"], two["path"]) == ("layers.0.q", 0.5, "layers.0.k")
    assert one["seconds"] == first["seconds"]
    assert (end["event"], end["solver_flops"], end["bytes_after"]) == ("end", 7, 32)
    assert end["seconds"] >= first["seconds"] + last["seconds"]
    RunLog(tmp_path / "out", rules)  # a run that goes on
    assert json.loads(file.read_text().splitlines()[-1])["event"] == "start"
