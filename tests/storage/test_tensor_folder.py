import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import Pair, change_config, open_file, pair, refuse, write_file
from flax import nnx

import wush_jax as wush
from wush_jax.layers.nnx import Packed
from wush_jax.storage.tensor_file import write_tensors
from wush_jax.storage.tensor_folder import read_tensors

pytestmark = pytest.mark.files


@pytest.fixture
def folder(tmp_path):
    wush.save(tmp_path / "model", pair())
    return tmp_path / "model"


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


def change_tensors(change):
    def damage(folder):
        tensors = open_file(folder / "model.safetensors")
        change(tensors)
        write_file(folder / "model.safetensors", tensors)

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
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "config a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "config.json is not readable",
    ),
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


def test_a_header_beyond_any_size_is_refused_unread(folder):
    """A sparse file: 16 GiB of header that cost nobody anything."""
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", 2**34))
        stream.truncate(2**35)
    start = time.perf_counter()
    refuse(folder, "its header claims 17179869184 bytes")
    assert time.perf_counter() - start < 5


def test_sizes_without_bytes_are_refused(folder):
    """Zero times anything is no byte, but no shape that an array can have either."""
    for shape in ([2**62, 0], [0] * 40):
        change_tensors(lambda t, s=shape: t.update({"up.bias": ("BF16", s, b"")}))(folder)
        refuse(folder, "'up.bias' has a wrong size|cannot be read")


def test_a_checksum_tells_what_safetensors_cannot(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refuse(folder, "is not what was saved, its checksum differs")
    data = bytes(data).replace(b'"crc32":"{', b'"crc32":"[')
    file.write_bytes(data)
    refuse(folder, "metadata 'crc32' is damaged")


def test_a_checksum_is_of_type_and_shape_too(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": np.arange(4, dtype=np.uint16).reshape(1, 4)})
    whole = file.read_bytes()
    np.testing.assert_array_equal(read_tensors(file)["a"], [[0, 1, 2, 3]])
    for old, new in ((b'"U16"', b'"F16"'), (b"[1,4]", b"[4,1]")):
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="'a' is not what was saved, its checksum differs"):
            read_tensors(file)


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
