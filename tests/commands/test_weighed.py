"""``wush quantize --token-weights``: the same as Python's function, and what it is not for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BYTES
from weights import write_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.models import load_pretrained
from wush_jax.models.demo import token_batches

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]

TEXT = " ".join(f"the quick brown fox, number {i}," for i in range(40)).encode()
CONFIG = dataclasses.replace(BYTES, max_position_embeddings=32)
FLAGS = ["--samples", "4", "--batch", "2", "--dtype", "float32"]
ONE_SHOT = ["--calibration", "one-shot"]
FIELDS = ["--format", "NVFP4", "--transform", "wush", "--solver", "rtn"]
RECIPE = wush.Recipe(format=wush.NVFP4, transform="wush", solver="rtn")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, CONFIG)
    (folder / "text.txt").write_bytes(TEXT)
    return folder


def test_tokens_are_weighed_in_one_shot(source, tmp_path, capsys):
    base = ["quantize", str(source), *FLAGS, *FIELDS, "--text", str(source / "text.txt")]
    base += ["--token-weights", "gradient", "--out"]
    assert cli.main([*base, str(tmp_path / "a"), *ONE_SHOT]) == 0
    model = load_pretrained(source, param_dtype=jnp.bfloat16)
    batches = list(token_batches(TEXT, batch=2, length=32, limit=2))
    known = wush.calibrate(model, batches, RECIPE, token_weights="gradient")
    expected, _ = wush.quantize_model(model, known, RECIPE)
    found = wush.load(tmp_path / "a" / "checkpoint")
    codes = [m.layers[0].mlp.down_proj.codes[...] for m in (found, expected)]
    np.testing.assert_array_equal(*codes)
    wush.calibrate(model, batches, RECIPE).save(tmp_path / "kept")
    refused = {
        "--token-weights is for --calibration one-shot": [],
        "--max-kl: add --calibrated FOLDER": [*ONE_SHOT, "--max-kl", "1"],
        "kept counts all tokens alike": [*ONE_SHOT, "--calibrated", str(tmp_path / "kept")],
    }
    for said, more in refused.items():
        assert cli.main([*base, str(tmp_path / "b"), *more]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
