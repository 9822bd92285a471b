"""Recipes for other libraries' layouts: what they set, and what is refused before any work."""

import dataclasses

import numpy as np
import pytest
from folders import write
from layout_tools import ROUND_175
from tiny import BYTES
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.checkpoints import read_layers
from wush_jax.checkpoints.targets import TARGETS, recipe_for
from wush_jax.commands.options import recipe_of
from wush_jax.formats import INT4_ABSMAX, MXFP4, NVFP4
from wush_jax.models import to_tensors

pytestmark = pytest.mark.files

MX, NV = "mxfp4-pack-quantized", "nvfp4-pack-quantized"


def test_a_layout_sets_formats_rules_and_dtype():
    hadamard = {"transform": "hadamard"}
    mx = recipe_for(MX, wush.Recipe(), hadamard)
    assert (mx.format, mx.input_format, mx.transform_dtype) == (ROUND_175, ROUND_175, "float32")
    assert recipe_for(MX, wush.Recipe(), hadamard | {"format": MXFP4}) == mx
    nv = recipe_for(NV, wush.FAST, hadamard | {"solver": "gptq"})
    assert (nv.format, nv.input_format, nv.solver, nv.scale_search) == (
        NVFP4,
        NVFP4,
        "gptq",
        "sweep",
    )
    only = recipe_for(NV, wush.Recipe(), hadamard | {"activation_format": None})
    assert only.input_format is None
    fp = recipe_for("fp_quant", wush.BEST, {})
    assert (fp.format, fp.input_format, fp.transform) == (MXFP4, MXFP4, "wush")
    assert recipe_for("fp_quant", wush.Recipe(), {"format": NVFP4}).input_format == NVFP4


@pytest.mark.parametrize("layout", [MX, NV])
def test_what_cannot_be_written_is_told_at_once(layout):
    with pytest.raises(ValueError, match="cannot hold") as error:
        recipe_for(layout, wush.BEST, {"format": INT4_ABSMAX})
    for part in ("--transform hadamard", "--no-block-gain", "--refit 0", "weight formats"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"block_gain .*--no-block-gain; refit .*--refit 0"):
        recipe_for(layout, wush.BEST, {"transform": "hadamard"})
    fits = {"transform": "hadamard", "block_gain": False, "refit": 0}
    assert recipe_for(layout, wush.BEST, fits).descent == wush.BEST.descent


def test_scales_of_fused_layers():
    derived = {"format": NVFP4.replace(global_scale=None), "transform": "identity"}
    assert recipe_for(NV, wush.Recipe(), derived)
    with pytest.raises(ValueError, match=r"--share-transform"):
        recipe_for(NV, wush.Recipe(), derived | {"share_transform": False})
    with pytest.raises(ValueError, match="activation formats"):
        recipe_for("fp_quant", wush.Recipe(), {"activation_format": None})


def test_a_layout_asked_for_is_what_export_writes(tmp_path):
    """The command alone: quantized for a layout, exported to it, read back the same."""
    config = dataclasses.replace(BYTES, num_hidden_layers=1, max_position_embeddings=8)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write(source, config, to_tensors(random_model(config)))
    np.save(tmp_path / "x.npy", np.arange(16))
    flags = ["--tokens", str(tmp_path / "x.npy"), "--for", MX, "--preset", "rtn"]
    flags += ["--transform", "identity"]
    assert cli.main(["quantize", str(source), "--out", str(out), *flags]) == 0
    argv = ["export", str(out / "checkpoint"), "--out", str(tmp_path / "mx"), "--layout", MX]
    assert cli.main(argv) == 0
    own, found = (read_layers(folder) for folder in (out / "checkpoint", tmp_path / "mx"))
    assert found["model.layers.0.mlp.up_proj"].weight.format.rule == "round_175"
    assert list(found) == list(own)
    for name, layer in own.items():
        np.testing.assert_array_equal(layer.weight.codes, found[name].weight.codes)


def test_from_the_command(tmp_path, capsys):
    assert recipe_of("rtn", {"transform": "identity"}, MX).format == ROUND_175
    for layout in TARGETS:
        command = ["quantize", str(tmp_path), "--out", str(tmp_path / "out"), "--for", layout]
        assert cli.main([*command, "--preset", "best", "--activation-format", "INT4"]) == 2
        assert "cannot hold this recipe" in capsys.readouterr().err
