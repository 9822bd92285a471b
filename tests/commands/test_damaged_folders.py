"""Folders that something is wrong with: every command says what, of which folder, at once."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoint_tools import quantized
from folders import write
from machine import SITES, SIZES, WORDS, run
from token_tools import word_tokenizer
from weights import random_model

import wush_jax as wush
from wush_jax.models import load_pretrained, to_tensors

pytestmark = pytest.mark.files
RTN = ["--preset", "rtn", "--length", "8"]


@pytest.fixture
def folder(tmp_path):
    """A model of one layer, its tokenizer and some tokens."""
    pytest.importorskip("tokenizers")
    where = tmp_path / "model"
    where.mkdir()
    write(where, SIZES, to_tensors(random_model(SIZES)), model_type="llama")
    word_tokenizer(where, WORDS)
    np.save(tmp_path / "tokens.npy", np.arange(40) % 61 + 3)
    return where


def commands(folder):
    """Each that opens the model, with what it is given."""
    tokens, out = folder.parent / "tokens.npy", folder.parent / "out"
    quantize = ["quantize", folder, "--out", out, "--tokens", tokens, *RTN]
    return {
        "plan": ["plan", folder],
        "sequential": quantize,
        "one-shot": [*quantize, "--calibration", "one-shot"],
        "evaluate": ["evaluate", folder, "--tokens", tokens, "--length", "8"],
        "generate": ["generate", folder, "--prompt", "w1"],
    }


def refusals(folder, *names):
    """What is said by commands, each of which ends with exit code 2."""
    for name in names or commands(folder):
        code, said = run(commands(folder)[name])
        assert code == 2, (name, said)
        assert str(folder) in said.replace("\n", ""), (name, said)
        yield " ".join(said.split())
    assert not (folder.parent / "out" / "checkpoint").exists()


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999"])
def test_a_config_that_could_not_be_written_again(text, folder):
    file = folder / "config.json"
    tree = json.loads(file.read_text()) | {"attention_dropout": "X"}
    file.write_text(json.dumps(tree).replace('"X"', text))
    for said in refusals(folder):
        assert f"config.json is not readable JSON ({text} is no number of JSON)" in said


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(dtype, folder):
    tensors = {n: t.astype(dtype) for n, t in to_tensors(random_model(SIZES)).items()}
    tensors["model.norm.weight"][0] = np.inf  # no dense layer that is quantized sees it
    tensors["model.layers.0.mlp.up_proj.weight"][:2, 0] = np.nan
    write(folder, SIZES, tensors, model_type="llama")
    for said in refusals(folder, "sequential", "one-shot"):
        assert "1 value of tensor 'model.norm.weight' is NaN or infinite" in said
        assert "2 values of tensor 'model.layers.0.mlp.up_proj.weight' are" in said


def test_weights_of_integers(folder):
    tensors = to_tensors(random_model(SIZES))
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].astype(np.int8)
    write(folder, SIZES, tensors, model_type="llama")
    for said in refusals(folder, "sequential", "one-shot", "evaluate", "generate"):
        assert f"tensor '{name}' is int8" in said


def test_tensors_of_other_shapes(folder):
    tensors = to_tensors(random_model(SIZES))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    write(folder, SIZES, tensors, model_type="llama")
    for said in refusals(folder):
        assert (
            "'model.embed_tokens.weight'] has shape (32, 64) where the config implies (64, 3"
            in said
        )
        assert "'model.layers.0.mlp.up_proj.weight'] has shape (32, 64)" in said


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_link_that_leads_nowhere_is_not_taken_for_no_file(name, folder):
    for target in (folder / name, folder / "gone"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        for said in refusals(folder, "generate"):
            assert f"{name} is not readable JSON" in said


@pytest.mark.parametrize("calibration", ["sequential", "one-shot"])
def test_companions_that_are_broken_links_are_named_before_any_work(calibration, folder):
    for name, target in (("LICENSE", "gone"), ("tekken.json", "tekken.json")):
        (folder / name).symlink_to(target)
    for said in refusals(folder, calibration):
        assert f"{folder / 'LICENSE'} is a link to 'gone', which is no file: copy the file" in said
        assert f"{folder / 'tekken.json'} is a link to 'tekken.json', which is no file" in said


def test_companions_out_of_the_folder_are_named_before_any_work(folder):
    (folder.parent / "elsewhere").write_text("{}")
    for name in ("tokenizer_config.json", "LICENSE"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "elsewhere")
    for said in refusals(folder, "sequential", "one-shot"):
        for name in ("tokenizer_config.json", "LICENSE"):
            assert f"{folder / name} is a link to" in said


def test_an_export_names_companions_that_are_broken_links(folder):
    model = quantized(load_pretrained(folder), wush.Recipe(transform="hadamard"), SITES)
    wush.save(folder.parent / "packed", model)
    (folder.parent / "packed" / "merges.txt").symlink_to("gone")
    out = folder.parent / "out"
    code, said = run(["export", folder.parent / "packed", "--out", out, "--layout", "fp_quant"])
    assert code == 2
    assert "merges.txt is a link to 'gone', which is no file: copy the file there" in said
    assert not out.exists()


def test_a_fault_of_a_layer_is_told_of_its_model(folder):
    tree = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 48}
    tensors = to_tensors(random_model(type(SIZES).from_dict(tree)))
    write(folder, type(SIZES).from_dict(tree), tensors, model_type="llama")
    for said in refusals(folder, "plan", "sequential", "one-shot"):
        assert f"wush: {folder}: layer layers.0.mlp.down_proj: K=48" in said
