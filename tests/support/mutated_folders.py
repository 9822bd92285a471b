"""Model folders of every layout that we read, and changes of one field of their files.

A change is drawn by hypothesis: an entry of a JSON file, or the name, type, shape or values of a
tensor. `read` says what a folder computes: the structure of the model, its types, all its values.
"""

import importlib.util
import json
import math
import struct
import warnings

import encoded_folders
import hypothesis.strategies as st
import numpy as np
from checkpoint_tools import llama_of
from flax import nnx
from gpt_oss_folders import gpt_oss, gpt_oss_tensors
from layout_tools import ROUND_175

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4
from wush_jax.models import load_pretrained

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUES = (None, True, False, -1, 0, 1, 2, 3, 33, 2**31, 2**63, 10**400, 0.5, -1.5, 1e30, 1e-30)
VALUES += ("", "x", "16", "a" * 300, "../x", "llama", "mistral", "gptq", "int", "float", "group")
VALUES += ([], [1], ["lm_head"], ["x", None], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0})
NUMBERS = {
    "+ 1": lambda x: x + 1,
    "- 1": lambda x: x - 1,
    "* 2": lambda x: x * 2,
    "* -1": lambda x: -x,
    "/ 2": lambda x: x / 2,
    "to float": float,
}
SAME_SIZE = ({"U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"}, {"F16", "BF16", "I16", "U16"})
SAME_SIZE += ({"F32", "I32", "U32"}, {"F64", "I64", "U64"})


def make_all(root):
    """A folder of every kind, small enough to be read ten thousand times."""
    nv = llama_of(wush.Recipe(NVFP4, transform="identity"))
    wush.save(root / "native", nv)
    wush.save(root / "native-shards", llama_of(wush.Recipe()), shard_bytes=30_000)
    interchange.export(root / "nvfp4", nv, "nvfp4-pack-quantized")
    shared = llama_of(wush.Recipe(NVFP4, transform="hadamard", block_size=16))
    wush.save(root / "hadamard", shared)
    mx = llama_of(wush.Recipe(ROUND_175, transform="identity"))
    interchange.export(root / "mxfp4", mx, "mxfp4-pack-quantized")
    interchange.export(root / "fp_quant", llama_of(wush.Recipe()), "fp_quant")
    modelopt(root / "nvfp4", root / "modelopt")
    encoded_folders.gptq(root / "gptq")
    encoded_folders.gptq(root / "gptq-order", desc_act=True, sym=False, version="gptq_v2")
    encoded_folders.gptq(root / "gptq-of-old", elsewhere=True)
    encoded_folders.gptq(root / "gptq-dynamic", dynamic=encoded_folders.DYNAMIC)
    encoded_folders.awq(root / "awq")
    encoded_folders.awq_rows(root / "awq-gemv")
    encoded_folders.awq(root / "awq-packed", zero_point=False)
    encoded_folders.pack_quantized(root / "pack", sym=False)
    encoded_folders.pack_quantized(root / "pack-packed")
    encoded_folders.fp8(root / "fp8")
    encoded_folders.fp8(root / "fp8-tensor", block=None, activation_scheme="static")
    encoded_folders.modelopt_fp8(root / "modelopt-fp8")
    encoded_folders.modelopt_fp8(root / "modelopt-fp8-config", elsewhere=False)
    encoded_folders.float_quantized(root / "float")
    encoded_folders.float_quantized(root / "float-blocks", "block")
    encoded_folders.int_quantized(root / "int")
    encoded_folders.write(root / "plain", unencoded(), None)
    gpt_oss(root / "gpt_oss", gpt_oss_tensors()[0])
    if importlib.util.find_spec("gguf"):
        from gguf_files import write

        for architecture in ("llama", "qwen3"):
            (root / f"gguf-{architecture}").mkdir()
            write(root / f"gguf-{architecture}" / "m.gguf", architecture)
    return sorted(root.iterdir())


def unencoded():
    random, tensors = np.random.default_rng(1), encoded_folders.plain()
    shapes = encoded_folders.LINEARS.items()
    return tensors | {
        f"{name}.weight": random.standard_normal(s).astype("f2") for name, s in shapes
    }


def modelopt(source, folder):
    """Our NVFP4 export as NVIDIA's program would have written it."""
    about, tensors = read_tensors(source / FILE)
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        tensors[f"{layer}.weight"] = tensors.pop(name)
        for old, new in (("weight_global_scale", "weight_scale_2"), ("input_global_scale",) * 2):
            kind, _, data = tensors.pop(f"{layer}.{old}")
            new = "input_scale" if new == old else new
            inverse = (1 / np.frombuffer(data, "f4")).astype("f4").tobytes()
            tensors[f"{layer}.{new}"] = (kind, [], inverse)
    folder.mkdir()
    write_tensors(folder / FILE, about, tensors)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    content = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))


def read_tensors(file):
    """The metadata and the tensors (type, shape, bytes) of a file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    about = header.pop("__metadata__", None)
    parts = {
        n: (i["dtype"], i["shape"], values[slice(*i["data_offsets"])]) for n, i in header.items()
    }
    return about, parts


def write_tensors(file, about, tensors):
    file.write_bytes(as_bytes(about, tensors))


def as_bytes(about, tensors):
    header, values = {} if about is None else {"__metadata__": about}, b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(values), len(values) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        values += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def read(folder):
    """What a folder computes: structure and types of its model, and its values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not encoded(folder):
            model = load_pretrained(folder)
        else:
            model = wush.load(folder, implementation="reference")
    graph, state = nnx.split(model)
    values = {
        ".".join(map(str, path)): (str(v.dtype), v.shape, np.asarray(v.get_value()).tobytes())
        for path, v in nnx.to_flat_state(state)
    }
    return graph, values


def encoded(folder):
    """Whether anything but plain weights, or a GGUF file, is named in a folder."""
    if not (folder / "config.json").exists():
        return False
    content = json.loads((folder / "config.json").read_text())
    named = content.get("quantization_config") if isinstance(content, dict) else None
    elsewhere = ("hf_quant_config.json", "quantize_config.json")
    return named is not None or any((folder / file).exists() for file in elsewhere)


def changes(folder):
    """What can be changed of a folder: a JSON file, a tensor, an entry of a GGUF file."""
    if folder.name.startswith("gguf"):
        from mutated_gguf import gguf_changes

        return [gguf_changes]
    return [json_changes, json_changes, tensor_changes]


# Changes: each returns what was changed, for messages.


def places(content, before=()):
    """All entries of a JSON value, as paths."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*before, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*before, key))


@st.composite
def json_changes(draw, folder):
    """One entry of a JSON file: gone, of another name, or of another value."""
    files = sorted(f.name for f in folder.iterdir() if f.suffix == ".json")
    file = folder / draw(st.sampled_from(files))
    content = json.loads(file.read_text())
    path = draw(st.sampled_from(list(places(content))))
    *before, key = path
    place = content
    for part in before:
        place = place[part]
    kinds = ["value", "value", "value", "number", "delete"]
    kind = draw(st.sampled_from([*kinds, "rename"] if isinstance(place, dict) else kinds))
    old = place[key]
    if kind == "delete":
        del place[key]
    elif kind == "rename":
        place[draw(st.sampled_from([f"{key}s", key.upper(), "x"]))] = place.pop(key)
    elif kind == "number" and type(old) in (int, float):
        change = draw(st.sampled_from(sorted(NUMBERS)))
        place[key] = NUMBERS[change](old)
    else:
        place[key] = draw(st.sampled_from([v for v in VALUES if not same_value(v, old)]))
    new = "gone" if kind in ("delete", "rename") else place[key]
    return file.name, json.dumps(content).encode(), (path, kind, old, new)


def same_value(one, other):
    return type(one) is type(other) and one == other


@st.composite
def tensor_changes(draw, folder):
    """One tensor: gone, twice, of another name, type or shape, or with one byte changed."""
    file = draw(
        st.sampled_from(sorted(f.name for f in folder.iterdir() if f.suffix == ".safetensors"))
    )
    about, tensors = read_tensors(folder / file)
    name = draw(st.sampled_from(sorted(tensors)))
    dtype, shape, data = tensors[name]
    kind = draw(st.sampled_from(["delete", "rename", "copy", "dtype", "shape", "rows", "byte"]))
    if kind == "delete":
        del tensors[name]
    elif kind in ("rename", "copy"):
        new = draw(st.sampled_from([f"{name}s", f"model.{name}", name.replace(".0.", ".1."), "x"]))
        tensors[new] = tensors[name] if kind == "copy" else tensors.pop(name)
    elif kind == "dtype":
        (group,) = (g for g in SAME_SIZE if dtype in g)
        tensors[name] = (draw(st.sampled_from(sorted(group - {dtype}))), shape, data)
    elif kind == "shape":
        new = draw(st.sampled_from([shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1]]))
        tensors[name] = (dtype, new, data)
    elif kind == "rows" and shape and shape[0] > 1:
        size = len(data) // shape[0]
        tensors[name] = (dtype, [shape[0] - 1, *shape[1:]], data[:-size])
    else:
        kind, at = "byte", draw(st.integers(0, len(data) - 1))
        flip = 1 << draw(st.integers(0, 7))
        tensors[name] = (dtype, shape, data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
    return file, as_bytes(about, tensors), (name, kind, dtype, shape)
