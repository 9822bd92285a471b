"""Quantizing with weights that are divided over devices."""

import dataclasses

import jax.numpy as jnp
import pytest
from folders import contents, write
from tiny import BYTES
from weights import random_model

from wush_jax import cli
from wush_jax.models import to_tensors

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls", "eight_devices")]

CONFIG = dataclasses.replace(BYTES, max_position_embeddings=32)
FLAGS = ["--samples", "4", "--batch", "2", "--dtype", "float32"]
FLAGS += ["--transform", "hadamard", "--block-size", "32"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = to_tensors(random_model(CONFIG))
    folder = tmp_path_factory.mktemp("model")
    write(folder, CONFIG, {n: t.astype(jnp.bfloat16) for n, t in tensors.items()})
    (folder / "text.txt").write_text(" ".join(f"number {i} of the foxes," for i in range(40)))
    return folder


@pytest.mark.parametrize("calibration", ["sequential", "one-shot"])
def test_divided_weights_have_the_same_codes(source, tmp_path, calibration):
    """Rounding with a Hadamard transform sees the weights alone, block by block."""
    text = ["--text", str(source / "text.txt"), "--calibration", calibration]
    for name, mesh in (("one", []), ("two", ["--mesh", "model=2"])):
        out = ["--out", str(tmp_path / name)]
        assert cli.main(["quantize", str(source), *out, *text, *FLAGS, *mesh]) == 0
    one, two = (contents(tmp_path / name / "checkpoint") for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mesh", "model=4"], "num_attention_heads=2"),
        (["--mesh", "data=2"], "write model=N"),
        (["--mesh", "model=2", "--data-parallel"], "choose one"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_first(source, tmp_path, capsys, flags, said):
    text = ["--text", str(source / "text.txt"), "--out", str(tmp_path / "out")]
    assert cli.main(["quantize", str(source), *text, *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
