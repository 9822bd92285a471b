import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_tools import (
    CONFIG,
    RECIPES,
    Layer,
    Pair,
    decode,
    llama,
    open_file,
    pair,
    quantized,
    random_packed,
    refuse,
)
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.checkpoints.packed_layout import activation_scale_scale
from wush_jax.layers.nnx import Packed, QuantizedDense, dense_layers
from wush_jax.models import Llama, LlamaConfig

pytestmark = pytest.mark.files

TOKENS = np.random.default_rng(0).integers(16, size=(2, 5))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path):
    wush.save(tmp_path / "model", pair())
    return tmp_path / "model"


@nnx.jit
def run(model, x):
    return model(x)


@jax.jit
def values_and_dot(x, packed):
    values = wush.dequantize(packed.weight)
    return values, wush.quantized_dot(x, packed, implementation="reference")


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4"])
def test_independent_reader_agrees(recipe, tmp_path):
    model = llama(recipe)
    wush.save(tmp_path / "model", model)
    tensors = open_file(tmp_path / "model" / "model.safetensors")
    modules = {
        "q_proj": model.layers[0].self_attn.q_proj,
        "down_proj": model.layers[0].mlp.down_proj,
    }
    names = {"q_proj": Q, "down_proj": "model.layers.0.mlp.down_proj"}
    for key, module in modules.items():
        layer, packed = Layer(tensors, names[key]), module.packed
        x = np.random.default_rng(2).standard_normal((9, packed.shape[1])).astype("f4")
        values, y = values_and_dot(x, packed)
        np.testing.assert_allclose(layer.weight, values, rtol=2e-7)
        np.testing.assert_array_equal(layer.get("transform"), np.asarray(packed.transform, "f4"))
        np.testing.assert_allclose(layer(x), y, rtol=1e-4, atol=1e-5)
    assert tensors[f"{Q}.transform"][1] == [
        64 // RECIPES[recipe].block,
        *[RECIPES[recipe].block] * 2,
    ]
    assert tensors["model.layers.0.mlp.down_proj.transform"][1] == [RECIPES[recipe].block] * 2
    head = np.asarray(model.lm_head.kernel[...], "f4")
    np.testing.assert_array_equal(decode(*tensors["lm_head.weight"]), head.T)
    assert tensors[f"{Q}.bias"][:2] == ("BF16", [64])
    constants = {
        key: Layer(tensors, Q).get(key).item()
        for key in ("weight_global_scale", "activation_global_scale", "activation_scale_scale")
    }
    third = np.float32(1) / np.float32({"mxfp4": 3, "nvfp4": 10}[recipe])
    assert list(constants.values()) == [third, third, {"mxfp4": 4.0, "nvfp4": 6.0}[recipe]]


def test_scale_scale_reproduces_every_rule():
    rules = {"pow2_div3": 3.0, "ocp_floor": 1.0, "round_175": 1.0, "ceil": 1.0}
    formats = [wush.MXFP4.replace(rule=r, global_scale=g) for r, g in rules.items()]
    amax = np.random.default_rng(3).uniform(0.01, 100, 2000).astype("f4")
    x = np.zeros((2000, 32), "f4")
    x[:, 5] = amax
    scales = jax.jit(lambda x: [fmt.encode(x)[1] for fmt in formats])(x)
    for fmt, found in zip(formats, scales, strict=True):
        wanted = amax * fmt.global_scale / activation_scale_scale(fmt)
        wanted = 2.0 ** np.floor(np.log2(wanted / 1.5) + 1)
        np.testing.assert_array_equal(np.asarray(found[:, 0], "f4"), wanted)
    assert activation_scale_scale(wush.INT4) is None


def equal_states(one, two):
    one, two = (nnx.to_flat_state(nnx.state(m, nnx.Not(nnx.RngState))) for m in (one, two))
    assert [path for path, _ in one] == [path for path, _ in two]
    for (_, a), (_, b) in zip(one, two, strict=True):
        a, b = a.get_value(), b.get_value()
        assert (a.shape, a.dtype, type(a)) == (b.shape, b.dtype, type(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_come_back_bit_for_bit(recipe, tmp_path):
    model = llama(recipe)
    wush.save(tmp_path / "model", model, metadata={"recipe": recipe})
    loaded = wush.load(tmp_path / "model")
    equal_states(loaded, model)
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    np.testing.assert_array_equal(run(loaded, TOKENS), run(model, TOKENS))
    attention, mlp = loaded.layers[0].self_attn, loaded.layers[0].mlp
    assert attention.q_proj.transform is attention.v_proj.transform
    assert mlp.gate_proj.transform is mlp.up_proj.transform
    if recipe != "identity":
        assert attention.q_proj.transform is not attention.o_proj.transform
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert LlamaConfig.from_dict(config) == CONFIG
    assert config["quantization_config"]["metadata"] == {"recipe": recipe}


def test_load_into_shapes_of_a_model(tmp_path):
    model = llama("mxfp4")
    wush.save(tmp_path / "model", model)
    abstract = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    loaded = wush.load(tmp_path / "model", abstract, implementation="reference")
    equal_states(loaded, model)
    assert loaded.layers[0].mlp.up_proj.implementation == "reference"
    assert isinstance(abstract.layers[0].mlp.up_proj, nnx.Linear)
    with pytest.raises(ValueError, match=r"is bfloat16 .* expected float32"):
        wush.load(tmp_path / "model", nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    "options",
    [
        {"fmt": wush.MXFP6},
        {"fmt": wush.MXFP8, "activation_format": None},
        {"fmt": wush.NVFP4.replace(global_scale=None)},
        {"fmt": wush.INT8, "activation_format": wush.MXFP4},
    ],
)
def test_any_module_and_format(options, tmp_path):
    model = pair(**options)
    wush.save(tmp_path / "model", model)
    tensors = open_file(tmp_path / "model" / "model.safetensors")
    assert ("up.codes" in tensors) == (options["fmt"].element.name != "e2m1")
    assert ("up.activation_scale_scale" in tensors) == (model.up.input_format is not None)
    loaded = wush.load(tmp_path / "model", nnx.eval_shape(lambda: Pair(nnx.Rngs(0))))
    equal_states(loaded, model)
    assert (loaded.up.weight_format, loaded.up.input_format) == (
        model.up.weight_format,
        model.up.input_format,
    )
    assert loaded.gate.contraction == model.gate.contraction


def test_static_input_scale(tmp_path):
    model = nnx.merge(*nnx.split(pair()))
    model.up.input_global_scale = nnx.data(Packed(jnp.float32(0.7)))
    wush.save(tmp_path / "model", model)
    tensors = open_file(tmp_path / "model" / "model.safetensors")
    assert decode(*tensors["up.activation_global_scale"]) == np.float32(1) / np.float32(0.7)
    # Codes and scales on every device: records have no negative zeros.
    loaded = wush.load(tmp_path / "model", Pair(nnx.Rngs(1)), implementation="reference")
    equal_states(loaded, model)


def test_a_model_that_is_one_layer(tmp_path):
    layer = quantized(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), RECIPES["mxfp4"], [[""]])
    wush.save(tmp_path / "model", layer)
    equal_states(wush.load(tmp_path / "model", nnx.Linear(32, 8, rngs=nnx.Rngs(1))), layer)


def test_random_state_is_the_models_own(folder):
    loaded = wush.load(folder, Pair(nnx.Rngs(3), dropout=True))
    assert loaded.dropout.rngs.key.get_value() is not None
    # Of shapes alone there is none: it starts from seed 0.
    fresh = wush.load(folder, nnx.eval_shape(lambda: Pair(nnx.Rngs(3), dropout=True)))
    assert fresh.dropout.rngs.key.get_value() == jax.random.key(0)
    assert int(fresh.dropout.rngs.count.get_value()) == 0


def test_shards(tmp_path):
    model = llama("mxfp4")
    wush.save(tmp_path / "model", model, shard_bytes=4000)
    files = sorted(os.listdir(tmp_path / "model"))
    count = len(files) - 2
    assert files[0] == "config.json"
    assert files[-1] == "model.safetensors.index.json"
    assert files[1:-1] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "model" / files[-1]).read_text())
    for file in files[1:-1]:
        tensors = open_file(tmp_path / "model" / file)
        assert set(tensors) == {n for n, f in index["weight_map"].items() if f == file}
        assert sum(len(t[2]) for t in tensors.values()) <= 4000 or len(tensors) == 1
    equal_states(wush.load(tmp_path / "model"), model)


def test_sharding(folder, eight_devices):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    loaded = wush.load(folder, Pair(nnx.Rngs(0)), sharding={"up.e2m1": rows}.get)
    assert loaded.up.codes.get_value().sharding == rows
    assert loaded.up.scales.get_value().sharding != rows
    equal_states(loaded, pair())
    place = SingleDeviceSharding(jax.devices()[3])
    loaded = wush.load(folder, Pair(nnx.Rngs(0)), sharding=place)
    leaves = jax.tree.leaves(nnx.state(loaded, nnx.Not(nnx.RngState)))
    assert {leaf.sharding for leaf in leaves} == {place}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_takes_rows(folder, eight_devices, kind):
    devices = np.array(jax.devices()).reshape(2, 4)
    mesh = Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)
    loaded = wush.load(folder, nnx.eval_shape(lambda: Pair(nnx.Rngs(0))), sharding=mesh)
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (["model"], []))
    for layer in (loaded.up, loaded.gate):
        assert layer.codes.get_value().sharding == rows
        assert layer.scales.get_value().sharding == rows
        assert layer.transform.get_value().sharding == everywhere
    assert loaded.up.bias.get_value().sharding == everywhere
    equal_states(loaded, pair())
    x = np.random.default_rng(1).standard_normal((6, 64)).astype("f4")
    wanted, found = (nnx.jit(lambda m, x: m.gate(x))(m, x) for m in (pair(), loaded))
    # The products of a row lie on one device: no sum is split.
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    # Eight rows do not divide by three.
    three = Mesh(np.array(jax.devices()[:3]), ("model",))
    odd = wush.load(folder, Pair(nnx.Rngs(0)), sharding=three)
    assert odd.gate.codes.get_value().sharding.is_fully_replicated
    with pytest.raises(ValueError, match="has no axis called 'model'"):
        wush.load(folder, Pair(nnx.Rngs(0)), sharding=Mesh(np.array(jax.devices()), ("x",)))


def test_layers_of_several_kernels(tmp_path):
    """Experts: a leading axis everywhere; the native layout alone holds them."""
    model = nnx.List([nnx.Einsum("etk,ekn->etn", (3, 64, 32), rngs=nnx.Rngs(0))])
    (layer,) = dense_layers(model)[0].values()
    blocks = np.linalg.qr(np.random.default_rng(2).standard_normal((2, 32, 32)))[0]
    each = [
        random_packed((32, 64), RECIPES["mxfp4"], jnp.asarray(blocks, jnp.bfloat16), seed=seed)
        for seed in range(3)
    ]
    packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    quantized_model = nnx.List([QuantizedDense(layer, packed)])
    wush.save(tmp_path / "model", quantized_model)
    equal_states(wush.load(tmp_path / "model", model), quantized_model)
    assert interchange.inspect_folder(tmp_path / "model").layers[0].shape == (3, 32, 64)
    with pytest.raises(
        ValueError, match=r"one matrix a layer, 0 has several kernels \(3, 32, 64\)"
    ):
        interchange.export(tmp_path / "out", quantized_model, "fp_quant")


def test_orbax_keeps_a_training_state(folder, tmp_path):
    """The structure comes from our files, values of a later step from orbax."""
    ocp = pytest.importorskip("orbax.checkpoint")
    model = wush.load(folder, nnx.eval_shape(lambda: Pair(nnx.Rngs(0))))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    state = nnx.to_pure_dict(nnx.state((model, optimizer)))
    state = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "step", like)
    abstract = nnx.state((model, optimizer))
    nnx.replace_by_pure_dict(abstract, restored)
    nnx.update((model, optimizer), abstract)
    found = nnx.to_pure_dict(nnx.state((model, optimizer)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


def test_unquantized_weights_are_never_made(folder, monkeypatch):
    sizes = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *a: sizes.append(x.nbytes) or put(x, *a))
    wush.load(folder, nnx.eval_shape(lambda: Pair(nnx.Rngs(0))))
    assert max(sizes) == 2 * 2 * 32 * 32  # the transform; W alone would be 32 * 64 * 2


def test_a_wrong_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="describes no Llama; give the model"):
        wush.load(folder)
    refuse(folder, "has no dense layer called", pair())
    refuse(folder, "names are of kind 'nnx'", llama("mxfp4"))
    with pytest.raises(ValueError, match="is not a folder"):
        wush.load(tmp_path / "nowhere", Pair(nnx.Rngs(0)))
