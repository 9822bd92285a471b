"""A config that was changed in one field: refused with a message, or the same is computed."""

import json
import shutil

import pytest
from checkpoint_tools import llama_of
from flax import nnx

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4

pytestmark = pytest.mark.files

NASTY = (None, True, 0, 2, 2**63, 0.5, "x", [1])
OTHER = {"model_type": ["llama", "mistral", "qwen3", "gemma"], "hidden_act": ["gelu"]}
# Not of the mathematics: they may say what they like.
FREE = ("architectures", "bos_token_id", "eos_token_id", "transformers_version")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    source = llama_of(wush.Recipe(NVFP4, transform="identity"))
    wush.save(folder / "native", source)
    interchange.export(folder / "nv", source, "nvfp4-pack-quantized")
    return folder


def changes(config):
    """One field at a time: gone, or another value."""
    for key in [k for k in config if k not in (*FREE, "quantization_config")]:
        yield key, {k: v for k, v in config.items() if k != key}
        for value in (*NASTY, *OTHER.get(key, [])):
            if value != config[key] or type(value) is not type(config[key]):
                yield key, config | {key: value}
    for key in ("rope_parameters", "is_causal", "layer_types", "partial_rotary_factor"):
        for value in (False, 0.5, "x", ["sliding_attention"], {"rope_type": "linear"}):
            yield key, config | {key: value}


def outcomes(folder, work):
    """What loading makes of every change: a message, or the structure and the types of a model."""
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, work)
    for key, changed in changes(config):
        (work / "config.json").write_text(json.dumps(changed))
        try:
            model = wush.load(work)
        except (ValueError, NotImplementedError) as error:
            yield key, changed.get(key), str(error)
        else:
            yield key, changed.get(key), nnx.graphdef(model)


def test_a_native_folder_computes_the_same_or_is_refused(original, tmp_path):
    wanted = nnx.graphdef(wush.load(original / "native"))
    found = list(outcomes(original / "native", tmp_path / "work"))
    refused = [result for _, _, result in found if isinstance(result, str)]
    assert len(refused) > 100
    assert all("config.json" in message for message in refused)
    for key, value, result in found:
        assert isinstance(result, str) or result == wanted, (key, value)


def test_an_export_is_refused_where_it_makes_no_sense(original, tmp_path):
    """Other libraries' files have no digest: what makes sense is taken at its word."""
    found = list(outcomes(original / "nv", tmp_path / "work"))
    taken = {key for key, _, result in found if not isinstance(result, str)}
    assert not taken & {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    assert {"rope_theta", "max_position_embeddings"} <= taken
