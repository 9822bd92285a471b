"""Packed weights by name, without a model: saved, loaded, refused where they are no such."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import BYTES

import wush_jax as wush
from wush_jax.checkpoints import export, inspect_folder, read_layers
from wush_jax.commands.models import open_model
from wush_jax.models import Llama
from wush_jax.solvers import quantize_site

pytestmark = pytest.mark.files

W = np.random.default_rng(0).standard_normal((3, 8, 64)).astype(np.float32)
RECIPE = wush.Recipe(transform="calibrated_hadamard", format=wush.NVFP4)


@pytest.fixture(scope="module")
def packed():
    moments = wush.calibrate_layer(W.reshape(-1, 64), rows=0)
    q, k = quantize_site(list(W[:2]), moments, RECIPE)
    plain = wush.quantize_weight(W[2], None, wush.Recipe(transform="identity"))
    return {"h.0.attn.q": q, "h.0.attn.k": k, "h.0.mlp": plain}


def test_what_was_saved_is_loaded(packed, tmp_path):
    wush.save(tmp_path / "w", packed, metadata={"of": "a test"})
    found = wush.load(tmp_path / "w")
    assert list(found) == list(packed)
    for name, weight in packed.items():
        assert jax.tree.structure(found[name]) == jax.tree.structure(weight)
        jax.tree.map(np.testing.assert_array_equal, found[name], weight)
    assert found["h.0.attn.q"].transform is found["h.0.attn.k"].transform
    assert isinstance(found["h.0.mlp"].weight.codes, jax.Array)


def test_other_tools_see_them(packed, tmp_path):
    wush.save(tmp_path / "w", packed)
    assert {n: p.shape for n, p in read_layers(tmp_path / "w").items()} == {
        name: (8, 64) for name in packed
    }
    assert [layer.name for layer in inspect_folder(tmp_path / "w").layers] == list(packed)
    export(tmp_path / "again", tmp_path / "w", "wush")
    assert list(wush.load(tmp_path / "again")) == list(packed)


def test_what_is_no_packed_weight(packed, tmp_path):
    one = packed["h.0.mlp"]
    with pytest.raises(ValueError, match=r"qmodel is a PackedWeight.*\{'name': packed\}"):
        wush.save(tmp_path / "w", one)
    with pytest.raises(ValueError, match=r"not \[\"'a': ndarray\", \"'': PackedWeight\""):
        wush.save(tmp_path / "w", {"a": W, "": one, "b": one})
    with pytest.raises(ValueError, match="no quantized layers"):
        wush.save(tmp_path / "w", {})
    assert not (tmp_path / "w").exists()


def test_damage_and_models_are_told(packed, tmp_path):
    wush.save(tmp_path / "w", packed)
    with pytest.raises(ValueError, match="names are of kind 'weights', those of model, a Llama"):
        wush.load(tmp_path / "w", nnx.eval_shape(lambda: Llama(BYTES, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="holds packed weights, no model"):
        open_model(tmp_path / "w", "float32")
    file = tmp_path / "w" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor .* its checksum differs"):
        wush.load(tmp_path / "w")
