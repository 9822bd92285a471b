"""The head on request, and what is said of formats before anything is read."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file
from tiny import BYTES
from weights import random_model

import wush_jax as wush
from pallas_kernels.exactly import is_sum_of_parts
from wush_jax import cli
from wush_jax.commands.options import rules_of
from wush_jax.models import to_tensors

pytestmark = pytest.mark.files


def folder_of(place, **changes):
    config = dataclasses.replace(BYTES, **changes)
    tensors = to_tensors(random_model(config))
    save_file({n: t.astype(jnp.bfloat16) for n, t in tensors.items()}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config.to_dict()))
    return str(place)


def test_the_head_has_a_rule_of_its_own():
    (pattern, recipe), *rest = rules_of("paper", {"format": "NVFP4"}, ("lm_head",), head="w4a8")
    assert pattern == "lm_head"
    assert (recipe.format, recipe.activation_format, recipe.solver) == (wush.NVFP4, wush.FP8, "rtn")
    assert rest == rules_of("paper", {"format": "NVFP4"}, ("lm_head",))
    with pytest.raises(ValueError, match="--head w4a8 is for native files"):
        rules_of(None, {}, (), "nvfp4-pack-quantized", head="w4a8")


def test_a_head_is_planned_where_there_is_one(tmp_path, capsys):
    own = folder_of(tmp_path, tie_word_embeddings=False)
    assert cli.main(["plan", own, "--preset", "rtn", "--head", "w4a8"]) == 0
    assert "lm_head" in capsys.readouterr().out
    assert cli.main(["plan", own, "--preset", "rtn", "--format", "INT4"]) == 0
    assert "INT4 weights are multiplied as sums of bfloat16 numbers" in capsys.readouterr().out
    tied = tmp_path / "tied"
    tied.mkdir()
    assert cli.main(["plan", folder_of(tied, tie_word_embeddings=True), "--head", "w4a8"]) == 2
    assert "is its embedding" in capsys.readouterr().err


def test_which_formats_are_sums():
    slow = {name for name, fmt in wush.formats.FORMATS.items() if is_sum_of_parts(fmt)}
    assert slow == {"INT4", "INT4_ABSMAX"}
