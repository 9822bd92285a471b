"""Edits of a model's folder, each of which hypothesis draws and a sentence names."""

import json
import os

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

NOTHING = object()
NASTY = [
    *(NOTHING, None, True, False, 0, 1, -1, 2, 3, 16, 64, 2**31, 2**64, 0.5, 2.0, -1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "16", "é", [], [0], [1, 2], [-1], {}, {"a": 1}, [None]),
]
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": "2"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": -5},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    "linear",
]
# What has a meaning of its own for a key, beside what has none for any.
OWN = {
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "mixtral"],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], ["GPT2LMHeadModel"], [3]],
    "hidden_act": ["silu", "gelu", "swish", "relu"],
    "layer_types": [["full_attention"], ["sliding_attention"], ["full_attention"] * 2],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "head_dim": [8, 16, 32],
    "num_key_value_heads": [1, 2, 3],
    "max_position_embeddings": [4, 8, 4096],
    "sliding_window": [2, 4, 4096],
    "rope_theta": [100.0, 1e6],
    "rms_norm_eps": [1e-6, 1e-2],
    "bos_token_id": [1, 63, 64, [1]],
    "eos_token_id": [2, 64, [2, 5], ["2"]],
    "pad_token_id": [0, 64],
    "torch_dtype": ["float32", "bfloat16", "int3"],
    "dtype": ["float32", "float16"],
    "attention_bias": [],
    "mlp_bias": [],
    "tie_word_embeddings": [],
    "use_sliding_window": [],
    "max_window_layers": [],
    "partial_rotary_factor": [1.0],
    "attention_dropout": [0.1],
    "quantization_config": [{"quant_method": "gptq"}, {"quant_method": 3}],
    "vocab_size": [63, 65],
    "hidden_size": [64],
    "intermediate_size": [32],
    "num_hidden_layers": [],
    "num_attention_heads": [4],
    "is_causal": [],
    "transformers_version": ["5.0"],
    "original_max_position_embeddings": [8],
}
DTYPES = ["float16", "float64", "int8", "bool", "bfloat16"]
VALUES = [float("nan"), float("inf"), 1e30, 0.0]


def put(tree, path, value):
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if value is NOTHING:
        parent.pop(path[-1], None) if isinstance(parent, dict) else parent.pop(path[-1])
    else:
        parent[path[-1]] = value


def _shown(value):
    return "gone" if value is NOTHING else repr(value)


def places(tree, path=()):
    """Every place in a JSON tree but those of a vocabulary's entries."""
    yield path
    if isinstance(tree, dict | list) and path[-1:] != ("vocab",):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from places(value, (*path, key))


def edit_config(draw, folders):
    """Give one key another value: in the folder, and in the one that has the same model."""
    key = draw(st.sampled_from(sorted(OWN)))
    value = draw(st.sampled_from([*OWN[key], *NASTY] if OWN[key] else NASTY))
    for folder in folders:
        tree = json.loads((folder / "config.json").read_text())
        put(tree, (key,), value)
        (folder / "config.json").write_text(json.dumps(tree))
    return f"config.json: {key} {_shown(value)}"


def edit_json(draw, folders):
    """Change any place of any JSON file but the config; of what tokens are, everywhere."""
    names = [f.name for f in sorted(folders[0].glob("*.json")) if f.name != "config.json"]
    if not names:
        return edit_config(draw, folders)
    name = draw(st.sampled_from(names))
    tree = json.loads((folders[0] / name).read_text())
    path = draw(st.sampled_from([*places(tree)][1:] or [("x",)]))
    value = draw(st.sampled_from(NASTY))
    put(tree, path, value)
    for folder in folders:
        if name != "promise.json":
            (folder / name).write_text(json.dumps(tree))
    (folders[0] / name).write_text(json.dumps(tree))
    return f"{name}: {path} {_shown(value)}"


def edit_file(draw, folders):
    """Cut a file, flip a byte of it, empty it, or put something else in its place."""
    folder = folders[0]
    file = draw(st.sampled_from(sorted(f for f in folder.iterdir() if f.is_file())))
    data = file.read_bytes()
    act = draw(st.sampled_from(["cut", "flip", "empty", "gone", "page", "pointer", "link", "loop"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if act == "flip" and file.suffix == ".safetensors" and _length(data) + 8 <= at:
        act = "cut"  # other libraries' files have no checksums: another value is another model
    if act == "gone":
        file.unlink()
    elif act in ("link", "loop"):
        other = folder.parent / "elsewhere"
        other.write_bytes(data)
        file.unlink()
        os.symlink(other if act == "link" else file, file)
    else:
        flipped = bytearray(data)
        if data:
            flipped[at] ^= 1 << draw(st.integers(0, 7))
        new = {"cut": data[:at], "flip": bytes(flipped), "empty": b""}
        new |= {"page": b"<!doctype html>401", "pointer": b"version https://git-lfs.github.com\n"}
        file.write_bytes(new[act])
    return f"{file.name}: {act} at {at}"


def _length(data):
    return int.from_bytes(data[:8], "little")


def edit_tensors(draw, folders):
    """Change one tensor of the file: its name, type, shape, a value; in both folders."""
    act = draw(st.sampled_from(["name", "gone", "more", "type", "turned", "shape", "value"]))
    file = folders[0] / "model.safetensors"
    try:
        tensors = load_file(file)
    except Exception:  # an earlier edit
        return "no tensors"
    name = draw(st.sampled_from(sorted(tensors)))
    value = tensors[name]
    if act in ("name", "gone"):
        del tensors[name]
    if act == "name":
        new = draw(st.sampled_from(["x", name + "x", "model." + name, name.replace("model.", "")]))
        tensors[new] = value
    elif act == "more":
        tensors[draw(st.sampled_from(["x", "lm_head.bias", "model.layers.7.x.weight"]))] = value
    elif act == "type":
        kind = draw(st.sampled_from(DTYPES))
        if kind == "bfloat16":
            import ml_dtypes

            kind = ml_dtypes.bfloat16
        tensors[name] = value.astype(kind)
    elif act == "turned":
        tensors[name] = np.ascontiguousarray(value.T)
    elif act == "shape":
        tensors[name] = np.ascontiguousarray(value[..., :-1] if value.ndim else value[None])
    elif act == "value" and value.dtype.kind == "f" and value.size:
        tensors[name] = value.copy()
        tensors[name].reshape(-1)[0] = draw(st.sampled_from(VALUES))
    save_file(tensors, file, {"format": "pt"})
    for folder in folders[1:]:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return f"model.safetensors: {act} {name}"


EDITS = {"config": edit_config, "json": edit_json, "file": edit_file, "tensors": edit_tensors}
