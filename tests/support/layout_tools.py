"""Checkpoints of every layout: models that fit them, and readers that are ours alone."""

import functools
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from checkpoint_tools import E2M1, Pair, decode, open_file, random_packed
from flax import nnx

import wush_jax as wush
from wush_jax.formats import MXFP4, NVFP4
from wush_jax.layers.nnx import QuantizedDense, dense_layers
from wush_jax.layers.swap import swap

ROUND_175 = MXFP4.replace(rule="round_175", global_scale=1.0)
DERIVED = NVFP4.replace(global_scale=None)


def hadamard(d):
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.kron(np.ones((2, 2)) - 2 * np.diag([0, 1]), matrix)
    return matrix / np.sqrt(d)


def transform(kind, k, d, seed=0):
    """(K/d, d, d) for "blocks", (d, d) for "shared" and "hadamard", None for "identity"."""
    random = np.random.default_rng(seed)
    if kind == "identity":
        return None
    if kind == "hadamard":
        return hadamard(d)
    shape = (k // d, d, d) if kind == "blocks" else (d, d)
    return np.linalg.qr(random.standard_normal(shape))[0]


def shapes():
    """What files are loaded into: a `Pair` without values."""
    return nnx.eval_shape(lambda: Pair(nnx.Rngs(0)))


@functools.cache
def model(fmt, kind="blocks", d=32, dtype="bfloat16", inputs="same"):
    """Two layers that share one transform and one global scale, and a normalisation."""
    layers, _ = dense_layers(Pair(nnx.Rngs(0)))
    matrix = transform(kind, 64, d)
    matrix = None if matrix is None else jnp.asarray(matrix, dtype)
    recipe = wush.Recipe(fmt, inputs, transform="hadamard", block_size=d)
    packed = {
        path: random_packed(layers[path].contraction.shape, recipe, matrix, seed=3)
        for path in layers
    }
    if fmt == DERIVED:
        for path, layer in packed.items():
            weight = replace(layer.weight, global_scale=jnp.float32(13.7))
            scale = None if inputs is None else jnp.float32(1.7)
            packed[path] = replace(layer, weight=weight, input_global_scale=scale)
    return swap(Pair(nnx.Rngs(0)), layers, packed)


@functools.cache
def wide_layer(inputs, fmt=ROUND_175):
    """A layer of 256 inputs without a transform: two groups of 128."""
    dense = dense_layers(nnx.Linear(256, 8, use_bias=False, rngs=nnx.Rngs(0)))[0][""]
    recipe = wush.Recipe(fmt, inputs, transform="identity", block_size=128)
    return QuantizedDense(dense, random_packed((8, 256), recipe, None, seed=4))


# The readers: from the description of a layout to the weight in original coordinates.


def values(tensors, codes, scales, group, scale_dtype):
    packed = decode(*tensors[codes])
    kind, shape, data = tensors[scales]
    scale = decode(scale_dtype or kind, shape, data)
    code = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    value = np.where(code >> 3, -1, 1) * E2M1[code & 7]
    assert value.shape[1] == group * scale.shape[1]
    return value * np.repeat(scale, group, axis=1)


def rotated_back(weight, blocks):
    """W T_b for each block, of the (B, d, d) or (d, d) that inputs are multiplied with."""
    rows = weight.reshape(len(weight), -1, blocks.shape[-1])
    blocks = np.broadcast_to(blocks, (rows.shape[1], *blocks.shape[-2:]))
    return np.einsum("nbi,bij->nbj", rows, blocks).reshape(weight.shape)


def scalar(tensors, name):
    return float(decode(*tensors[name]).reshape(()))


def effective_fp_quant(tensors, config, name):
    nv = config["forward_dtype"] == "nvfp4"
    group, kind = (16, "F8_E4M3") if nv else (32, "F8_E8M0")
    weight = values(tensors, f"{name}.qweight", f"{name}.scales", group, kind)
    weight = weight / scalar(tensors, f"{name}.weight_global_scale")
    matrix = decode(*tensors[f"{name}.forward_hadamard_matrix"])
    d = config["hadamard_group_size"]
    each = np.stack([matrix[:, i : i + d].T for i in range(0, matrix.shape[1], d)])
    return rotated_back(weight, each[0] if len(each) == 1 else each)


def effective_wush(tensors, config, name):
    kind = tensors[f"{name}.scale_quant"][0]
    group = 16 if kind == "F8_E4M3" else 32
    weight = values(tensors, f"{name}.e2m1", f"{name}.scale_quant", group, None)
    weight = weight * scalar(tensors, f"{name}.weight_global_scale")
    if f"{name}.transform" not in tensors:
        return weight
    return rotated_back(weight, decode(*tensors[f"{name}.transform"]))


def effective_compressed(tensors, config, name):
    nv = config["format"] == "nvfp4-pack-quantized"
    group, kind = (16, "F8_E4M3") if nv else (32, "F8_E8M0")
    weight = values(tensors, f"{name}.weight_packed", f"{name}.weight_scale", group, kind)
    if nv:
        weight = weight / scalar(tensors, f"{name}.weight_global_scale")
    groups = config["transform_config"].get("config_groups", {})
    for key, scheme in groups.items():
        d = scheme["head_dim"]
        matrix = decode(*tensors[f"{name}.{key}_input.weight"]).reshape(d, d) / np.sqrt(d)
        weight = rotated_back(weight, matrix.T)
    return weight


EFFECTIVE = {
    "wush": effective_wush,
    "fp_quant": effective_fp_quant,
    "nvfp4-pack-quantized": effective_compressed,
    "mxfp4-pack-quantized": effective_compressed,
}


def effective(folder, name):
    """The weight (N, K) that a folder in some layout means, float64, from the files alone."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layout = {"compressed-tensors": config.get("format")}.get(config["quant_method"])
    tensors = open_file(folder / "model.safetensors")
    return EFFECTIVE[layout or config["quant_method"]](tensors, config, name)
