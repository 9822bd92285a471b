"""Two processes on this machine, joined by jax.distributed, calibrate one model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import two_processes
from tiny import Blocks
from tiny import codes as codes_of

import wush_jax as wush

pytestmark = pytest.mark.once

COUNT = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    root = Path(wush.__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(port), str(COUNT), str(own), str(folder)],
            env=os.environ
            | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in range(COUNT)
    ]
    try:
        texts = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * COUNT, "\n".join(texts)
    return [
        (
            dict(np.load(folder / f"codes-{own}.npz")),
            json.loads((folder / f"gains-{own}.json").read_text()),
        )
        for own in range(COUNT)
    ]


@pytest.fixture
def on_cpu():
    """The processes compute on CPUs; TF32 of a GPU here would change more codes than they do."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_all_processes_end_with_the_same_model(results):
    first, second = results
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for path, codes in first[0].items():
        np.testing.assert_array_equal(codes, second[0][path])


def test_two_processes_give_what_one_gives(results, on_cpu):
    codes, gains = results[0]
    model, report = two_processes.calibrate(two_processes.batches())
    expected = codes_of(model)
    assert {path for path in codes if not path.startswith("at once")} == set(expected)
    for path in ("layers.0.up", "layers.0.down"):
        # moments as sums of four parts instead of one: float32 rounding, a code here and there
        assert np.mean(codes[path] != expected[path]) < 0.01, path
    assert "head" in gains
    for layer in report.layers:
        # Later layers see that code: 1 of 512 is about 0.2 % of the input's error, and 4 bits
        # carry it on. The transforms' signs are then free to differ, what they buy is not.
        near = {"rel": 1e-5 if layer.path.startswith("layers.0.") else 0.02}
        assert gains[layer.path] == pytest.approx(layer.predicted_gain, **near), layer.path


def test_one_shot_calibration_of_batches_on_two_processes(results, on_cpu):
    codes, _ = results[0]
    model, _ = wush.quantize_model(Blocks(), two_processes.batches(), two_processes.RECIPE)
    for path, expected in codes_of(model).items():
        assert np.mean(codes[f"at once {path}"] != expected) < 0.01, path  # as above
