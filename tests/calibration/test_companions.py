"""What a folder has beside its weights survives every way from one folder to another."""

import json

import encoded_folders
import pytest
from checkpoint_tools import llama_of
from layout_tools import ROUND_175
from mutated_folders import unencoded

import wush_jax as wush
from wush_jax.calibration import round_folder
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4
from wush_jax.storage.tensor_folder import COMPANIONS

pytestmark = pytest.mark.files

RECIPES = {
    "wush": wush.Recipe(transform="hadamard"),
    "fp_quant": wush.Recipe(transform="hadamard"),
    "nvfp4-pack-quantized": wush.Recipe(NVFP4, transform="identity"),
    "mxfp4-pack-quantized": wush.Recipe(ROUND_175, transform="identity"),
}
IDS = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6, "nobody_knows": {"a": 1}}


def put(folder):
    """Every companion that there is, each of its own content; ids in the config."""
    for name in COMPANIONS:
        (folder / name).write_text(json.dumps({"file": name}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | IDS))


def check(folder):
    for name in COMPANIONS:
        assert json.loads((folder / name).read_text()) == {"file": name}, name
    config = json.loads((folder / "config.json").read_text())
    assert {key: config.get(key) for key in IDS} == IDS


@pytest.mark.parametrize("layout", RECIPES)
def test_export(layout, tmp_path):
    wush.save(tmp_path / "ours", llama_of(RECIPES[layout]))
    put(tmp_path / "ours")
    interchange.export(tmp_path / "out", tmp_path / "ours", layout)
    check(tmp_path / "out")
    interchange.export(tmp_path / "back", tmp_path / "out", "wush")
    check(tmp_path / "back")


@pytest.mark.parametrize("layout", RECIPES)
def test_model_free(layout, tmp_path):
    encoded_folders.write(tmp_path / "source", unencoded(), None)
    put(tmp_path / "source")
    rules = [("lm_head", None), (".*", RECIPES[layout])]
    round_folder(tmp_path / "source", tmp_path / "out", rules, layout=layout)
    check(tmp_path / "out")


@pytest.mark.parametrize("writer", [encoded_folders.gptq, encoded_folders.fp8])
def test_encoded_folders(writer, tmp_path):
    folder, _ = writer(tmp_path / "source")
    put(folder)
    rules = [("lm_head", None), (".*", RECIPES["wush"])]
    round_folder(folder, tmp_path / "out", rules)
    check(tmp_path / "out")
    if writer is encoded_folders.gptq:  # symmetric codes stay packed in our layout
        interchange.export(tmp_path / "packed", folder, "wush")
        check(tmp_path / "packed")
