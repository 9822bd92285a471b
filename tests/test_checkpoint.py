import contextlib
import functools
import json
import os
import pickle
import resource
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import wush_jax as wush
from wush_jax.model import swap
from wush_jax.models import Llama, LlamaConfig
from wush_jax.nnx import Packed, dense_layers
from wush_jax.packed_layout import activation_scale_scale

CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    attention_bias=True,
    tie_word_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(16, size=(2, 5))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
RECIPES = {
    "mxfp4": wush.Recipe(wush.MXFP4, transform="hadamard"),
    "nvfp4": wush.Recipe(wush.NVFP4, transform="hadamard", block_size=32),
    "int4": wush.Recipe(wush.INT4, transform="hadamard", transform_dtype="float32"),
    "identity": wush.Recipe(wush.MXFP4, transform="identity"),
}


class Pair(nnx.Module):
    """Two layers that share an input, and a normalisation; no Llama."""

    def __init__(self, rngs, dropout=False):
        self.up = nnx.Linear(64, 32, rngs=rngs, param_dtype=jnp.bfloat16)
        self.gate = nnx.LinearGeneral(64, (2, 4), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if dropout else None

    def __call__(self, x):
        x = self.norm(x)
        return self.up(x).sum() + self.gate(x).sum()


def random_packed(shape, recipe, transform, seed):
    """A quantized layer of random codes and scales: nothing to compile."""
    random, fmt = np.random.default_rng(seed), recipe.format
    codes = random.integers(256, size=(shape[0], shape[1] * fmt.element.bits // 8), dtype="u1")
    groups = (shape[0], shape[1] // fmt.group_size)
    scales = {
        "e8m0": random.integers(117, 123, size=groups, dtype="u1").view(jnp.float8_e8m0fnu),
        "e4m3": random.integers(8, 64, size=groups, dtype="u1").view(jnp.float8_e4m3fn),
        "bfloat16": random.uniform(0.01, 0.1, groups).astype(jnp.bfloat16),
    }[fmt.scale_dtype]
    scale = np.float32(random.uniform(10, 20) if fmt.global_scale is None else fmt.global_scale)
    weight = wush.QuantizedArray(*map(jnp.asarray, (codes, scales, scale)), fmt)
    return wush.PackedWeight(weight, transform, None, recipe.input_format)


def quantized(model, recipe, sites):
    """Swap in random layers; the first site has a transform per block, the others share one."""
    layers, _ = dense_layers(model)
    random, packed = np.random.default_rng(1), {}
    for number, paths in enumerate(sites):
        k, d = layers[paths[0]].contraction.shape[1], recipe.block
        blocks = np.linalg.qr(random.standard_normal((k // d, d, d)))[0]
        transform = jnp.asarray(blocks if number == 0 else blocks[0], recipe.transform_dtype)
        transform = None if recipe.transform == "identity" else transform
        for path in paths:
            shape = layers[path].contraction.shape
            packed[path] = random_packed(shape, recipe, transform, seed=len(packed))
    return swap(model, layers, packed)


@functools.cache
def llama(recipe):
    shapes = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    graph, state = nnx.split(shapes)
    random = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(0.3 * random.standard_normal(x.shape), x.dtype), state
    )
    model = nnx.merge(graph, state)
    attention, mlp = (f"layers.0.{part}." for part in ("self_attn", "mlp"))
    sites = [[attention + f"{name}_proj" for name in "qkv"], [attention + "o_proj"]]
    sites += [[mlp + "gate_proj", mlp + "up_proj"], [mlp + "down_proj"]]
    return quantized(model, RECIPES[recipe], sites)


@functools.cache
def pair(fmt=wush.MXFP4, activation_format="same", **options):
    recipe = wush.Recipe(fmt, activation_format, transform="hadamard", **options)
    return quantized(Pair(nnx.Rngs(0)), recipe, [["up", "gate"]])


@nnx.jit
def run(model, x):
    return model(x)


@jax.jit
def dot(x, packed):
    return wush.quantized_dot(x, packed, implementation="reference")


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "model"
    wush.save(folder, pair())
    return folder


@pytest.fixture
def folder(pair_folder, tmp_path):
    return shutil.copytree(pair_folder, tmp_path / "model")


# An independent reader: nothing below comes from the library.


def open_file(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (item["dtype"], item["shape"], values[slice(*item["data_offsets"])])
        for name, item in header.items()
    }


def write_file(file, tensors):
    header, values = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(values), len(values) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        values += data
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + values)


def decode(dtype, shape, data):
    if dtype == "F32":
        return np.frombuffer(data, "<f4").reshape(shape)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("u4") << 16).view("f4").reshape(shape)
    code = np.frombuffer(data, "u1").astype(int).reshape(shape)
    if dtype == "U8":
        return code
    if dtype == "F8_E8M0":
        return 2.0 ** (code - 127)
    assert dtype == "F8_E4M3"
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0), mantissa * 2.0**-9)
    return np.where(code >> 7, -value, value)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(values, grid):
    """Round to the grid, ties to even places."""
    grid = np.sort(grid)
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    up = (values - low > high - values) | ((values - low == high - values) & (above % 2 == 0))
    return np.where(up, high, low)


class Layer:
    """Decode a layer and run it, from the description of the layout alone."""

    def __init__(self, tensors, name):
        self.get = lambda key: decode(*tensors[f"{name}.{key}"])
        self.scale_dtype = tensors[f"{name}.scale_quant"][0]
        packed, self.scales = self.get("e2m1"), self.get("scale_quant")
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        values = np.where(codes >> 3, -1, 1) * E2M1[codes & 7]
        self.group = codes.shape[1] // self.scales.shape[1]
        scales = np.repeat(self.scales, self.group, axis=1)
        self.weight = values * scales * self.get("weight_global_scale")

    def __call__(self, x):
        transform = self.get("transform")
        blocks = x.reshape(len(x), -1, transform.shape[-1])
        transform = np.broadcast_to(transform, (blocks.shape[1], *transform.shape[-2:]))
        y = np.einsum("tbi,bji->tbj", blocks, transform).reshape(len(x), -1, self.group)
        amax = np.abs(y).max(axis=-1, keepdims=True)
        shared = self.get("activation_global_scale")
        scale = amax / (shared * self.get("activation_scale_scale"))
        if self.scale_dtype == "F8_E8M0":
            scale = 2.0 ** np.floor(np.log2(scale / 1.5) + 1)
        else:
            scale = nearest(scale, decode("F8_E4M3", [127], bytes(range(127))))
        codes = nearest(np.abs(y) / (scale * shared), E2M1) * np.sign(y)
        return (codes * scale * shared).reshape(x.shape) @ self.weight.T


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
        np.testing.assert_allclose(layer.weight, wush.dequantize(packed.weight), rtol=2e-7)
        np.testing.assert_array_equal(layer.get("transform"), packed.transform.astype("f4"))
        x = np.random.default_rng(2).standard_normal((9, packed.shape[1])).astype("f4")
        found = np.asarray(wush.quantized_dot(x, packed, implementation="reference"))
        np.testing.assert_allclose(layer(x), found, rtol=1e-4, atol=1e-5)
    assert tensors[f"{Q}.transform"][1] == [
        64 // RECIPES[recipe].block,
        *[RECIPES[recipe].block] * 2,
    ]
    assert tensors["model.layers.0.mlp.down_proj.transform"][1] == [RECIPES[recipe].block] * 2
    head = model.lm_head.kernel[...].astype("f4")
    np.testing.assert_array_equal(decode(*tensors["lm_head.weight"]), head.T)
    assert tensors[f"{Q}.bias"][:2] == ("BF16", [64])
    constants = {
        key: Layer(tensors, Q).get(key).item()
        for key in ("weight_global_scale", "activation_global_scale", "activation_scale_scale")
    }
    third = np.float32(1) / np.float32({"mxfp4": 3, "nvfp4": 10}[recipe])
    assert list(constants.values()) == [third, third, {"mxfp4": 4.0, "nvfp4": 6.0}[recipe]]


@pytest.mark.parametrize("rule", ["pow2_div3", "ocp_floor", "round_175", "ceil"])
def test_scale_scale_reproduces_the_rule(rule):
    fmt = wush.MXFP4.replace(rule=rule, global_scale=3.0 if rule == "pow2_div3" else 1.0)
    amax = np.random.default_rng(3).uniform(0.01, 100, 2000).astype("f4")
    _, scales = fmt.encode(jnp.zeros((2000, 32)).at[:, 5].set(amax))
    wanted = amax * fmt.global_scale / activation_scale_scale(fmt)
    found = np.asarray(scales[:, 0]).astype("f4")
    np.testing.assert_array_equal(found, 2.0 ** np.floor(np.log2(wanted / 1.5) + 1))
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
    equal_states(wush.load(tmp_path / "model", Pair(nnx.Rngs(1))), model)


def test_a_model_that_is_one_layer(tmp_path):
    layer = quantized(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), RECIPES["mxfp4"], [[""]])
    wush.save(tmp_path / "model", layer)
    equal_states(wush.load(tmp_path / "model", nnx.Linear(32, 8, rngs=nnx.Rngs(1))), layer)


def test_random_state_is_the_models_own(folder):
    loaded = wush.load(folder, Pair(nnx.Rngs(3), dropout=True))
    assert loaded.dropout.rngs.key.get_value() is not None
    with pytest.raises(ValueError, match="model is abstract and has random state"):
        wush.load(folder, nnx.eval_shape(lambda: Pair(nnx.Rngs(3), dropout=True)))


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


def test_sharding(pair_folder):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    loaded = wush.load(pair_folder, Pair(nnx.Rngs(0)), sharding={"up.e2m1": rows}.get)
    assert loaded.up.codes.get_value().sharding == rows
    assert loaded.up.scales.get_value().sharding != rows
    equal_states(loaded, pair())
    place = SingleDeviceSharding(jax.devices()[3])
    loaded = wush.load(pair_folder, Pair(nnx.Rngs(0)), sharding=place)
    leaves = jax.tree.leaves(nnx.state(loaded, nnx.Not(nnx.RngState)))
    assert {leaf.sharding for leaf in leaves} == {place}


def test_unquantized_weights_are_never_made(folder, monkeypatch):
    sizes = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *a: sizes.append(x.nbytes) or put(x, *a))
    wush.load(folder, nnx.eval_shape(lambda: Pair(nnx.Rngs(0))))
    assert max(sizes) == 2 * 2 * 32 * 32  # the transform; W alone would be 32 * 64 * 2


# Writing: whole or not at all.


def listing(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_checkpoint_is_replaced_and_nothing_else(folder):
    wush.save(folder, pair(), shard_bytes=1)
    assert "model.safetensors" not in os.listdir(folder)
    wush.save(folder, pair())
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]
    (folder / "notes.txt").write_text("mine")
    before = listing(folder)
    with pytest.raises(ValueError, match=r"holds other files \('notes.txt'\)"):
        wush.save(folder, pair())
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="another kind of model"):
        wush.save(folder, pair())
    assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
    with pytest.raises(ValueError, match="is not a folder"):
        wush.save(folder / "config.json", pair())


@contextlib.contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 5000])
def test_failed_writes_leave_what_was_there(size, folder):
    before = listing(folder)
    with pytest.raises(OSError, match=r"cannot write .* unchanged"), largest_file(size):
        wush.save(folder, pair())
    assert listing(folder) == before
    assert os.listdir(folder.parent) == ["model"]


def test_unwritable_places(folder, monkeypatch):
    with pytest.raises(NotADirectoryError, match=r"cannot write .* choose a folder"):
        wush.save(folder / "config.json" / "model", pair())
    before, move = listing(folder), os.replace

    def replace(source, target):
        if str(source).endswith(".new"):
            raise PermissionError(13, "Permission denied")
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError, match="Permission denied; what was there is unchanged"):
        wush.save(folder, pair())
    assert listing(folder) == before


def test_save_refuses(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="no quantized layers"):
        wush.save(path, Pair(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="shard_bytes=0"):
        wush.save(path, pair(), shard_bytes=0)
    with pytest.raises(ValueError, match="metadata is not JSON"):
        wush.save(path, pair(), metadata={"x": jnp.ones(2)})
    model = nnx.merge(*nnx.split(pair()))
    model.up.global_scale = Packed(jnp.float32(jnp.nan))
    with pytest.raises(ValueError, match="layer up: its global scale"):
        wush.save(path, model)
    model = nnx.merge(*nnx.split(pair()))
    model.extra = nnx.Variable(jax.random.key(0))
    with pytest.raises(ValueError, match="'extra' has dtype key"):
        wush.save(path, model)
    assert not path.exists()


# Reading: every damage has its message.


def refuse(folder, match, model=None):
    with pytest.raises(ValueError, match=match) as caught:
        wush.load(folder, Pair(nnx.Rngs(0)) if model is None else model)
    assert str(folder) in str(caught.value)


def change_tensors(change):
    def damage(folder):
        tensors = open_file(folder / "model.safetensors")
        change(tensors)
        write_file(folder / "model.safetensors", tensors)

    return damage


def change_config(change, file="config.json"):
    def damage(folder):
        config = json.loads((folder / file).read_text())
        change(config.get("quantization_config", config))
        (folder / file).write_text(json.dumps(config))

    return damage


def retype(name, dtype, shape):
    return change_tensors(lambda t: t.update({name: (dtype, shape, t[name][2])}))


def flip(name):
    return change_tensors(
        lambda t: t.update({name: (*t[name][:2], bytes([t[name][2][0] ^ 1]) + t[name][2][1:])})
    )


def bytes_of(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def header(change):
    def damage(data):
        (length,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + length])
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return bytes_of("model.safetensors", damage)


DAMAGES = {
    "truncated": (bytes_of("model.safetensors", lambda b: b[:-1]), "not fully covered"),
    "longer": (bytes_of("model.safetensors", lambda b: b + b"x"), "not fully covered"),
    "empty": (bytes_of("model.safetensors", lambda b: b""), "cannot be read"),
    "pickle": (bytes_of("model.safetensors", lambda b: pickle.dumps({"a": 1})), "cannot be read"),
    "huge header": (bytes_of("model.safetensors", lambda b: b"\xff" * 8 + b[8:]), "cannot be read"),
    "offsets": (header(lambda h: h.replace(b'offsets":[0,', b'offsets":[8,')), "cannot be read"),
    "same name twice": (
        header(lambda h: h.replace(b'"up.bias"', b'"norm.bias"')),
        "cannot be read",
    ),
    "no numpy dtype": (
        change_tensors(lambda t: t.update({"up.e2m1": ("F4", [32, 64], t["up.e2m1"][2])})),
        "dtype F4, not supported",
    ),
    "codes mislabelled": (retype("up.e2m1", "I8", [32, 32]), r"'up.e2m1' is int8 .* uint8"),
    "codes turned": (retype("gate.e2m1", "U8", [32, 8]), r"\(32, 8\), expected uint8 \(8, 32\)"),
    "scales mislabelled": (retype("up.scale_quant", "F8_E4M3", [32, 2]), "expected float8_e8m0"),
    "transform shape": (retype("up.transform", "BF16", [4, 32, 16]), r"expected bfloat16 or float"),
    "transform dtype": (retype("up.transform", "F16", [2, 32, 32]), r"'up.transform' is float16"),
    "plain dtype": (retype("up.bias", "F16", [32]), "'up.bias' is float16 .* expected bfloat16"),
    "missing codes": (change_tensors(lambda t: t.pop("up.e2m1")), "'up.e2m1' is missing"),
    "missing plain": (change_tensors(lambda t: t.pop("norm.mean")), "'norm.mean' is missing"),
    "surplus": (
        change_tensors(lambda t: t.update({"up.kernel": t["up.bias"]})),
        "model.safetensors: surplus tensors 'up.kernel'",
    ),
    "another transform": (flip("gate.transform"), "'up.transform' differs from that of 'gate'"),
    "another scale": (flip("up.weight_global_scale"), "'up.weight_global_scale' is 0.33.* says"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is not readable"),
    "config cut": (bytes_of("config.json", lambda b: b[:-9]), "config.json is not readable"),
    "config deep": (bytes_of("config.json", lambda b: b'{"a":' * 10**5), "not readable"),
    "config no object": (bytes_of("config.json", lambda b: b"[1]"), "holds a list"),
    "config binary": (bytes_of("config.json", lambda b: b"\x80\x04\xff"), "not readable"),
    "config twice": (bytes_of("config.json", lambda b: b'{"a": 1, "a": 2}'), "occurs twice"),
    "no quantization": (bytes_of("config.json", lambda b: b"{}"), "no quantization_config"),
    "no model": (lambda f: (f / "model.safetensors").unlink(), "neither .* pickles"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, folder):
    act, match = DAMAGES[damage]
    act(folder)
    refuse(folder, match)


def record(**changes):
    return lambda c: c["layers"]["up"].update(changes)


def fmt(**changes):
    return lambda c: c["formats"]["MXFP4"].update(changes)


MISLABELS = {
    "method": (lambda c: c.update(quant_method="fp_quant"), "expected 'wush' and 1"),
    "layout": (lambda c: c.update(layout=2), "later version"),
    "naming": (lambda c: c.update(naming="hugging_face"), "names are of kind"),
    "no layers": (lambda c: c.pop("layers"), "entry 'layers' is missing"),
    "layers": (lambda c: c.update(layers=[1]), r"'layers' is \[1\], expected dict"),
    "layer": (lambda c: c["layers"].update(up=3), "layer 'up'.*expected dict"),
    "stranger": (lambda c: c["layers"].update(down=c["layers"]["up"]), "no dense layer called"),
    "shape": (record(shape=[64, 64]), r"\(64, 64\), in the model \(32, 64\)"),
    "no shape": (record(shape=[32, -64]), r"shape=\[32, -64\], expected"),
    "groups": (record(shape=[32, 63]), "groups of 32 .* do not tile"),
    "block": (record(block=48), "block=48 does not divide K=64"),
    "block zero": (record(block=0), "block=0"),
    "smaller block": (record(block=16), "not the first of a site"),
    "no block": (record(block=None), "expected both or neither"),
    "site": (record(site="down"), "not the first of a site"),
    "unknown site": (record(site="../up"), "not the first of a site"),
    "format": (record(format="FP3"), "format 'FP3' is not among"),
    "scale": (record(global_scale=5.0), "the config says 0.2"),
    "scale list": (record(global_scale=["x"]), "positive finite"),
    "scale negative": (record(global_scale=-3.0), "positive finite"),
    "input scale": (record(input_global_scale=1e39), "positive finite"),
    "element": (fmt(element="os.system"), "element='os.system' is unknown"),
    "bits": (fmt(element={"name": "i", "bits": 10**9, "midrise": True}), "bits=1000000000"),
    "rule": (fmt(rule="__import__"), "rule='__import__' is unknown"),
    "group": (fmt(group_size=True), "'group_size' is True, expected int"),
    "zero group": (fmt(group_size=0), "group_size=0"),
    "fmt scale": (fmt(scale_dtype=None), "'scale_dtype' is None, expected str"),
}


@pytest.mark.parametrize("mislabel", MISLABELS)
def test_mislabelled_configs_are_refused(mislabel, folder):
    change, match = MISLABELS[mislabel]
    change_config(change)(folder)
    refuse(folder, match)


def test_hostile_index_is_refused(folder):
    wush.save(folder, pair(), shard_bytes=2000)
    index = "model.safetensors.index.json"
    text = (folder / index).read_text()
    shard = sorted(folder.glob("*.safetensors"))[1]
    outside = shutil.copy(shard, folder.parent / "x.safetensors")
    for name in (
        "../x.safetensors",
        str(outside),
        "a/../b.safetensors",
        ".x.safetensors",
        "x.bin",
        3,
    ):
        change_config(lambda i, n=name: i["weight_map"].update({"up.e2m1": n}), index)(folder)
        refuse(folder, "places tensor 'up.e2m1' in .* expected the bare name")
    for content in ({}, {"weight_map": []}, {"weight_map": {}}):
        (folder / index).write_text(json.dumps(content))
        refuse(folder, "no 'weight_map'")
    (folder / index).write_text(text)
    change_config(lambda i: i["weight_map"].pop("up.e2m1"), index)(folder)
    refuse(folder, "disagree about tensors 'up.e2m1'")
    (folder / index).write_text(text)
    shutil.copy(shard, folder / "model.safetensors")
    refuse(folder, "holds both")
    (folder / "model.safetensors").unlink()
    shard.unlink()
    refuse(folder, f"{shard.name} is missing")


def test_a_wrong_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="describes no Llama; give the model"):
        wush.load(folder)
    refuse(folder, "has no dense layer called", pair())
    refuse(folder, "names are of kind 'nnx'", llama("mxfp4"))
    with pytest.raises(ValueError, match="is not a folder"):
        wush.load(tmp_path / "nowhere", Pair(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hidden_layers": 10**9}, "more layers than"),
        ({"hidden_size": "64"}, "describes no Llama"),
        ({"hidden_size": -64}, "describes no Llama"),
        ({"vocab_size": None}, "describes no Llama"),
        ({"vocab_size": 10**30}, "describes no Llama"),
        ({"intermediate_size": 32}, r"\(64, 96\), in the model \(64, 32\)"),
        ({"tie_word_embeddings": True}, "surplus tensors 'lm_head.weight'"),
        ({"num_attention_heads": 0}, "describes no Llama"),
        ({"rope_theta": []}, "describes no Llama"),
    ],
)
def test_nonsensical_model_configs_are_refused(change, match, tmp_path):
    folder = tmp_path / "model"
    wush.save(folder, llama("identity"))
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        wush.load(folder)


def test_config_beyond_the_decoder(tmp_path):
    wush.save(tmp_path / "model", llama("identity"))
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"model_type": "llama"', '"model_type": "mamba"'))
    with pytest.raises(NotImplementedError, match="mamba"):
        wush.load(tmp_path / "model")
