"""The command and its demonstration: what it writes, and how it refuses."""

import gc
import json
import signal
import subprocess
import sys

import pytest
from tiny import BYTES
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.checkpoints.content import library_version
from wush_jax.commands import demo, options, terminal
from wush_jax.models.demo import save_model, token_batches
from wush_jax.solvers.recipe import Recipe

pytestmark = pytest.mark.files


@pytest.fixture
def tiny(monkeypatch):
    """The demonstration with a model and windows that cost nothing; vocabulary: bytes."""
    monkeypatch.setattr(demo, "load_demo_model", lambda: random_model(BYTES))
    monkeypatch.setattr(
        demo, "token_batches", lambda text, **_: token_batches(text, batch=2, length=16, limit=1)
    )


def test_demo_writes_report_plot_and_checkpoint(tiny, tmp_path, capsys):
    out = tmp_path / "some" / "where"
    tokens = ["--calibration-tokens", "1", "--evaluation-tokens", "1"]
    assert cli.main(["demo", "--quick", "--out", str(out), *tokens]) == 0
    report = json.loads((out / "report.json").read_text())
    names = [outcome["name"] for outcome in report["outcomes"]]
    assert names == [f"MXFP4 {name}" for name in ("identity", "hadamard", "wush", "PAPER")]
    assert (out / "plot.png").stat().st_size > 1000
    best = min(report["outcomes"], key=lambda outcome: outcome["kl"])
    text = capsys.readouterr().out
    assert f"best by KL: {best['name']}" in text
    model = wush.load(out / "checkpoint")
    kept = [layer["transform"] for layer in best["report"]["layers"]]
    chosen = demo.settings_of(quick=True)[best["name"]]
    assert kept == [chosen.transform] * 7
    assert f"The least KL, {best['kl']:.3g} nats, is {best['name']}'s" in text.replace("\n", " ")
    assert model.layers[0].mlp.up_proj.weight_format == wush.MXFP4


def test_what_the_demonstration_shows():
    names = list(demo.settings_of())
    assert len(names) == len(set(names)) == 12
    assert set(names) < set(demo.settings_of(all=True))
    assert "NVINT4 PAPER" in names
    assert "NVFP4 BEST_WIDE" in demo.settings_of(all=True)
    recipe = demo.settings_of()["MXFP4-FP8 PAPER"]
    assert (recipe.format, recipe.input_format) == (wush.MXFP4, wush.FP8)


def test_a_model_of_ones_own(tmp_path, capsys):
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    folder.mkdir()
    save_model(folder / "model.safetensors", random_model(BYTES))
    (folder / "config.json").write_text(json.dumps(BYTES.to_dict()))
    text.write_bytes(bytes(range(32, 127)) * 40)
    arguments = ["--out", str(tmp_path / "out"), "--calibration-tokens", "64"]
    yours = ["--model", str(folder), "--text", str(text)]
    assert cli.main(["demo", "--quick", *yours, *arguments]) == 0
    assert "The least KL" in capsys.readouterr().out
    assert cli.main(["demo", "--model", str(folder), *arguments]) == 2
    assert "--model and --text go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration-tokens", "0"], "calibration_tokens=0 must be positive"),
        (["--evaluation-tokens", "-5"], "evaluation_tokens=-5 must be positive"),
    ],
)
def test_bad_values_end_with_two_and_a_message(arguments, message, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error == f"wush: {message}\n"


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--calibration-tokens", "many"]])
def test_usage_errors_end_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said = "".join(capsys.readouterr())
    assert "demo" in said or "calibration-tokens" in said


def test_help_tells_what_the_command_does(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--calibration-tokens" in text
    assert "folder for the results" in text


def test_help_is_grouped_by_who_sets_what(capsys):
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--help"])
    text = capsys.readouterr().out
    for title in ("text options", "recipe options", "research options", "model-free options"):
        assert text.count(title) == 1
    flags = {name.replace("_", "-") for name in Recipe.__dataclass_fields__}
    assert all(f"--{flag} " in text or f"--{flag}," in text for flag in flags)
    assert options.RecipeFlags.__annotations__.keys() == set(options.COMMON)


def test_all_commands_are_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command.__name__ in text
    assert "--config FILE" in text


def test_an_interruption_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "stdlib_text", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_interruption_that_python_drops_is_noted(monkeypatch):
    """Ctrl-C inside a callback of the garbage collector: Python ignores what is raised there."""

    def interrupt(phase, info):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: dropped.append(found.exc_type))
    before = signal.getsignal(signal.SIGINT)
    with terminal.progress() as update:
        update(0, 2, "work")
        gc.callbacks.append(interrupt)
        gc.collect()
        assert dropped == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            update(1, 2, "work")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_bar_goes_by_what_steps_cost(monkeypatch):
    shown = []
    make = terminal.progress_bar
    monkeypatch.setattr(terminal, "progress_bar", lambda *a: shown.append(make(*a)) or shown[0])
    with terminal.progress() as update:
        update.weigh([1.0, 1.0, 8.0])
        update(2, 3, "two cheap ones")
        (task,) = shown[0].tasks
        assert (task.percentage, task.fields["count"]) == (20, "2/3")
        update(3, 3, "all")
        assert task.finished


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.toml", 'quick = true\nout = "there"\ncalibration_tokens = 0\n'),
        ("run.json", '{"quick": true, "out": "there", "calibration_tokens": 0}'),
    ],
)
def test_flags_of_a_file_come_first(name, text, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    argv = ["demo", "--out", "here", "--config", str(tmp_path / name)]
    expected = ["demo", "--quick", "--out", "there", "--calibration-tokens", "0", "--out", "here"]
    assert cli.with_config_file(argv) == expected
    joined = ["demo", "--out", "here", f"--config={tmp_path / name}"]
    assert cli.with_config_file(joined) == expected
    assert cli.main(argv) == 2
    assert "calibration_tokens=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("quick = ", "neither TOML nor JSON"), (None, "No such file")],
)
def test_bad_config_files(text, message, tmp_path, capsys):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    assert cli.main(["demo", "--config", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_it_says_its_version_and_runs_as_a_module(capsys):
    assert cli.main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wush {library_version()}, jax 0.")
    found = subprocess.run(
        [sys.executable, "-m", "wush_jax", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == said
