"""What exports say to their readers: layers by name, matrices, dtypes, companions, warnings."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import decode, llama_of, open_file, random_packed
from flax import nnx
from layout_tools import ROUND_175, hadamard, model, transform
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.checkpoints import interchange
from wush_jax.checkpoints.content import content_of, written
from wush_jax.checkpoints.layouts import LAYOUTS
from wush_jax.checkpoints.packed_layout import record_of
from wush_jax.checkpoints.targets import recipe_for
from wush_jax.formats import INT4, MXFP4, NVFP4

pytestmark = pytest.mark.files

NV = "nvfp4-pack-quantized"
IDENTITY = wush.Recipe(NVFP4, transform="identity")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_only_what_is_not_quantized_is_ignored():
    body = content_of(llama_of(IDENTITY))
    up = "model.layers.0.mlp.up_proj"
    plain = {name: value for name, value in body.plain.items() if name != "lm_head.weight"}
    tied = dataclasses.replace(body, plain=plain)
    whole = dataclasses.replace(
        tied,
        layers=body.layers | {"lm_head": body.layers[up]},
        records=body.records | {"lm_head": body.records[up]},
    )
    for layout, key in ((NV, "ignore"), ("fp_quant", "modules_to_not_convert")):
        for content, ignored in ((body, ["lm_head"]), (tied, ["lm_head"]), (whole, [])):
            assert written(content, LAYOUTS[layout])[1]["quantization_config"][key] == ignored


def test_one_dtype_in_every_export(tmp_path):
    interchange.export(tmp_path / "out", llama_of(IDENTITY), NV)
    config = config_of(tmp_path / "out")
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    # Ours again: activations in the type in which they were.
    assert wush.load(tmp_path / "out").dtype == jnp.float32
    interchange.export(tmp_path / "back", tmp_path / "out", "wush")
    assert config_of(tmp_path / "back")["quantization_config"]["activation_dtype"] == "float32"


def test_companions_and_everything_of_the_source_travel(tmp_path):
    wush.save(tmp_path / "model", llama_of(IDENTITY))
    file = tmp_path / "model" / "config.json"
    extra = {"eos_token_id": [901, 909], "pad_token_id": None, "mine": {"a": 1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("[]")
    interchange.export(tmp_path / "out", tmp_path / "model", NV)
    assert {k: config_of(tmp_path / "out")[k] for k in extra} == extra
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "[]"
    again = wush.load(tmp_path / "out")
    wush.save(tmp_path / "again", again)
    assert {k: config_of(tmp_path / "again")[k] for k in extra} == extra


@pytest.mark.parametrize("d", [16, 32])
def test_a_hadamard_matrix_is_in_the_files(d, tmp_path):
    """Entries of 1 and -1: readers divide by sqrt(d) once they have them."""
    interchange.export(tmp_path / "out", model(NVFP4, "hadamard", d), NV, rotated=True)
    tensors = open_file(tmp_path / "out" / "model.safetensors")
    for name in ("up", "gate"):
        kind, shape, data = tensors[f"{name}.input_input.weight"]
        assert (kind, tuple(shape)) == ("BF16", (d, d))
        np.testing.assert_array_equal(decode(kind, shape, data).reshape(d, d), np.sign(hadamard(d)))
    groups = config_of(tmp_path / "out")["quantization_config"]["transform_config"]
    assert groups["config_groups"]["input"]["type"] == "hadamard"


def test_sites_with_matrices_of_their_own(tmp_path):
    source = model(NVFP4, "shared", 16)
    source = nnx.merge(*nnx.split(source))
    other = jnp.asarray(transform("shared", 64, 16, seed=9), jnp.bfloat16)
    source.gate.transform = type(source.gate.transform)(other)
    interchange.export(tmp_path / "out", source, NV, rotated=True)
    groups = config_of(tmp_path / "out")["quantization_config"]["transform_config"]
    targets = [g["apply"][0]["targets"] for g in groups["config_groups"].values()]
    assert sorted(targets) == [["gate"], ["up"]]
    layers = interchange.read_layers(tmp_path / "out")
    np.testing.assert_array_equal(layers["gate"].transform, np.asarray(other, np.float32))
    assert not np.array_equal(layers["up"].transform, layers["gate"].transform)


def test_a_matrix_that_is_not_what_its_type_says(tmp_path):
    interchange.export(tmp_path / "out", model(NVFP4, "shared", 16), NV, rotated=True)
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace("random-hadamard", "hadamard"))
    with pytest.raises(ValueError, match="is not Sylvester's matrix"):
        interchange.read_layers(tmp_path / "out")


def test_what_transformers_would_compute_wrongly_needs_a_word(tmp_path):
    source = model(NVFP4, "hadamard", 16)
    with pytest.raises(ValueError, match=r"transformers does not look at it, .* rotated=True"):
        interchange.export(tmp_path / "out", source, NV)
    assert not (tmp_path / "out").exists()
    (parallel, biased) = interchange.export(tmp_path / "out", source, NV, rotated=True)
    assert "tensor parallel 1" in parallel
    assert "biases" in biased
    assert "up" in biased
    assert interchange.export(tmp_path / "plain", model(NVFP4, "identity"), NV) == ()
    wush.save(tmp_path / "native", source)
    arguments = ["export", str(tmp_path / "native"), "--layout", NV, "--out"]
    assert cli.main([*arguments, str(tmp_path / "cli")]) == 2
    assert cli.main([*arguments, str(tmp_path / "cli"), "--rotated"]) == 0


def test_fp_quant_for_each_of_its_readers(tmp_path):
    assert interchange.export(tmp_path / "one", model(MXFP4, "hadamard"), "fp_quant") == ()
    tensors = open_file(tmp_path / "one" / "model.safetensors")
    assert not [name for name in tensors if "backward" in name]  # vLLM has no place for it
    (note,) = interchange.export(tmp_path / "many", model(MXFP4), "fp_quant")
    assert "room for one (d, d) matrix" in note
    tensors = open_file(tmp_path / "many" / "model.safetensors")
    assert len([name for name in tensors if "backward" in name]) == 2


def test_layers_that_readers_fuse_need_one_matrix():
    content = content_of(llama_of(wush.Recipe(MXFP4, transform="hadamard")))
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    layers = {name: content.layers[name] for name in names}
    eye = jnp.eye(32, dtype=jnp.bfloat16)
    layers[names[1]] = dataclasses.replace(layers[names[1]], transform=eye)
    content = dataclasses.replace(content, layers=layers)
    for layout, layers_of in (("fp_quant", MXFP4), (NV, NVFP4)):
        changed = {
            name: dataclasses.replace(
                packed,
                weight=random_packed(packed.shape, wush.Recipe(layers_of), None, seed=0).weight,
                input_format=layers_of,
            )
            for name, packed in layers.items()
        }
        records = {name: record_of(name, packed, name) for name, packed in changed.items()}
        with pytest.raises(ValueError, match=r"needs one .* for .*gate_proj, .*up_proj"):
            written(dataclasses.replace(content, layers=changed, records=records), LAYOUTS[layout])


def test_wush_for_a_stock_engine(tmp_path):
    """Calibrated, one matrix a site, exported, read back: the same logits."""
    source = random_model(dataclasses.replace(CONFIG, num_hidden_layers=1))
    recipe = recipe_for(NV, wush.Recipe(), {"shared_blocks": True})
    rules = [("lm_head", None), (".*", recipe)]
    quantized, _ = wush.quantize_model(source, tokens(1), rules)
    (parallel,) = interchange.export(tmp_path / "out", quantized, NV, rotated=True)
    assert "tensor parallel 1" in parallel
    groups = config_of(tmp_path / "out")["quantization_config"]["transform_config"]
    assert len(groups["config_groups"]) == 4  # q/k/v, o, gate/up, down
    loaded = wush.load(tmp_path / "out")
    batch = tokens(1, seed=1)[0]
    run = nnx.jit(lambda m, t: m(t))
    wanted, found = np.asarray(run(quantized, batch)), np.asarray(run(loaded, batch))
    # Matrices of bfloat16 times 4 come back as they were.
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_layers_with_ranges_of_their_own(tmp_path):
    """Static scales of inputs that a calibration found: tensors of each layer, one config."""
    source = nnx.merge(*nnx.split(model(NVFP4, "identity")))
    source.up.input_format = NVFP4.replace(global_scale=0.625)
    interchange.export(tmp_path / "out", source, NV)
    found = interchange.read_layers(tmp_path / "out")
    assert found["up"].input_global_scale == 0.625
    assert found["gate"].input_global_scale == 10


def test_all_reasons_are_told_at_once(tmp_path):
    """Of every layer and every kind, each once; nothing is written."""
    with pytest.raises(ValueError, match="no room") as caught:
        interchange.export(tmp_path / "out", model(INT4), "mxfp4-pack-quantized")
    text = str(caught.value)
    parts = ["holds weight formats", "holds activation formats", "no room for", "rotated=True"]
    assert [text.count(part) for part in parts] == [1, 1, 1, 1]
    assert text.count("(1 more alike: ") == 3
    assert text.count("layout='mxfp4-pack-quantized' ") == 1
    with pytest.raises(
        ValueError, match=r"activation .*; and it holds .* bfloat16, that of .*float32"
    ):
        interchange.export(
            tmp_path / "out", model(MXFP4, dtype="float32", inputs=ROUND_175), "fp_quant"
        )
    assert not (tmp_path / "out").exists()
