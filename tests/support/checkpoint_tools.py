"""Quantized models that cost nothing to make, and a reader of their files that is ours alone."""

import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wush_jax as wush
from wush_jax.layers import unpack_from_kernels
from wush_jax.layers.nnx import dense_layers
from wush_jax.layers.swap import swap
from wush_jax.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    attention_bias=True,
    tie_word_embeddings=False,
)
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


def llama(recipe):
    return llama_of(RECIPES[recipe])


@functools.cache
def llama_of(recipe):
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
    return quantized(model, recipe, sites)


@functools.cache
def pair(fmt=wush.MXFP4, activation_format="same", **options):
    recipe = wush.Recipe(fmt, activation_format, transform="hadamard", **options)
    return quantized(Pair(nnx.Rngs(0)), recipe, [["up", "gate"]])


def model_arrays(model):
    """The state of a model as bytes, by path: codes, also where kernels hold records."""
    model = nnx.clone(model)
    unpack_from_kernels(model)
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {path: np.asarray(v.get_value()).tobytes() for path, v in state}


# The independent reader: nothing below comes from the library.


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


# Refusals.


def refuse(folder, match, model=None):
    with pytest.raises(ValueError, match=match) as caught:
        wush.load(folder, Pair(nnx.Rngs(0)) if model is None else model)
    assert str(folder) in str(caught.value)


def change_config(change, file="config.json"):
    def damage(folder):
        config = json.loads((folder / file).read_text())
        change(config.get("quantization_config", config))
        config.get("quantization_config", {}).pop("digest", None)  # to reach the checks behind it
        (folder / file).write_text(json.dumps(config))

    return damage
