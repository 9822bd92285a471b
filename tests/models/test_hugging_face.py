"""Model folders as Hugging Face writes them: shards, types, and weights straight onto a mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import write
from jax.sharding import NamedSharding, PartitionSpec
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.models import load_pretrained, tensor_parallel, to_tensors

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]

UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False, attention_bias=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_all_containers(dtype, files, tmp_path):
    tensors = {n: t.astype(jnp.dtype(dtype)) for n, t in to_tensors(random_model(UNTIED)).items()}
    model = load_pretrained(write(tmp_path, UNTIED, tensors, files))
    assert model.config == UNTIED
    for name, tensor in to_tensors(model).items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


def test_what_some_files_repeat_is_left_out(tmp_path):
    tensors = to_tensors(random_model(CONFIG))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    model = load_pretrained(write(tmp_path, CONFIG, tensors))
    assert not hasattr(model, "lm_head")


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("before", ["", "language_model.model.", "model.language_model."])
def test_names_may_have_other_prefixes(config, before, tmp_path):
    tensors = to_tensors(random_model(config))
    head = before.removesuffix("model.") if before.startswith("language") else ""
    renamed = {
        head + name if name == "lm_head.weight" else before + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    model = load_pretrained(write(tmp_path, config, renamed))
    for name, tensor in to_tensors(model).items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_names_that_are_not_of_one_decoder_are_told(tmp_path):
    tensors = to_tensors(random_model(CONFIG))
    folder = write(tmp_path, CONFIG, {"encoder.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"holds 0 tensors .* 'encoder.weight'"):
        load_pretrained(folder)
    folder = write(tmp_path, CONFIG, tensors | {"vision.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"left over \['vision.weight'\]"):
        load_pretrained(folder)


def test_an_index_beside_a_single_file_and_a_null_are_read(tmp_path):
    """As mlx-lm and some quantizers leave folders."""
    tensors = to_tensors(random_model(CONFIG))
    folder = write(tmp_path, CONFIG, tensors, quantization_config=None)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert load_pretrained(folder).config == CONFIG
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    with pytest.raises(ValueError, match="two models"):
        load_pretrained(folder)


@pytest.mark.usefixtures("eight_devices")
def test_weights_go_straight_onto_a_mesh(tmp_path):
    folder = write(tmp_path, UNTIED, to_tensors(random_model(UNTIED)), 2)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plain, spread = load_pretrained(folder), load_pretrained(folder, sharding=tensor_parallel(mesh))
    layer = spread.layers[1]
    shards = {
        (64, 32): layer.mlp.up_proj.kernel,
        (32, 64): layer.mlp.down_proj.kernel,
        (64, 16): layer.self_attn.v_proj.kernel,
        (16,): layer.self_attn.v_proj.bias,
        (64,): layer.input_layernorm.scale,
    }
    for shape, variable in shards.items():
        assert {s.data.shape for s in variable[...].addressable_shards} == {shape}
    run = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)
    batch = tokens(1)[0]
    expected = run(*nnx.split(plain), batch)
    # Partial sums of two devices, in float32.
    np.testing.assert_allclose(run(*nnx.split(spread), batch), expected, rtol=1e-4, atol=1e-4)
    everywhere = NamedSharding(mesh, PartitionSpec())
    copied = load_pretrained(folder, sharding=everywhere)
    assert copied.norm.scale[...].sharding == everywhere


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_quantized_layers_go_straight_onto_a_mesh(tmp_path, kind):
    """The same placement serves a quantized checkpoint: block (d = 32) by block."""
    recipe = wush.Recipe(transform="hadamard")
    model, _ = wush.quantize_model(random_model(CONFIG), tokens(1), recipe)
    wush.save(tmp_path / "saved", model)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType[kind],))
    spread = wush.load(tmp_path / "saved", sharding=tensor_parallel(mesh))
    up, down = spread.layers[0].mlp.up_proj, spread.layers[0].mlp.down_proj
    assert up.codes[...].addressable_shards[0].data.shape == (32, 32)
    assert down.codes[...].addressable_shards[0].data.shape == (64, 16)
    run = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)
    batch = tokens(1)[0]
    expected = run(*nnx.split(model), batch)
    np.testing.assert_allclose(run(*nnx.split(spread), batch), expected, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        load_pretrained(tmp_path / "nowhere")
    folder = write(tmp_path, CONFIG, to_tensors(random_model(CONFIG)), quantization_config={})
    with pytest.raises(ValueError, match="holds a quantized model"):
        load_pretrained(folder)
    write(
        tmp_path, dataclasses.replace(CONFIG, num_hidden_layers=1), to_tensors(random_model(CONFIG))
    )
    with pytest.raises(ValueError, match="left over"):
        load_pretrained(folder)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="axis='model'"):
        tensor_parallel(mesh)


def test_the_matrices_of_every_expert_are_split_alike():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    experts = "model.layers.0.mlp.experts"
    for name, spec in {
        "gate_proj.weight": (None, None, "model"),  # held as (E, K, N)
        "down_proj.weight": (None, "model", None),
        "gate_proj.e2m1": (None, "model", None),  # held as (E, N, K / 2)
        "down_proj.scale_quant": (None, None, "model"),
        "up_proj.bias": (None, "model"),
    }.items():
        assert tuple(tensor_parallel(mesh)(f"{experts}.{name}").spec) == spec
    assert tuple(tensor_parallel(mesh)("model.layers.0.mlp.router.weight").spec) == ()
