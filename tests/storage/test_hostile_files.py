"""Thousands of damaged folders: each is refused by an error of ours, or reads as it was."""

import json
import os
import random
import shutil
import struct
import time
import tracemalloc

import numpy as np
import pytest
from checkpoint_tools import Pair, llama, model_arrays, pair
from flax import nnx
from layout_tools import ROUND_175, model

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4
from wush_jax.storage.tensor_folder import TensorFolder

pytestmark = pytest.mark.files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NASTY = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308, 1e-320),
    *("", "x", "\x00", "../../etc/passwd", "/etc/passwd", "a" * 5000, "é", "1e9", "F4", "U8"),
    *([], [0], [[]], [1, 2, 3], [2**40, 2**40], [-1], {}, {"a": 1}, [None], "BF16", "F64", "nan"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each kind; whether its values have checksums."""
    folder = tmp_path_factory.mktemp("originals")
    wush.save(folder / "native", pair())
    wush.save(folder / "shards", pair(), shard_bytes=2000)
    wush.save(folder / "llama", llama("identity"))
    interchange.export(folder / "fp_quant", model(wush.MXFP4), "fp_quant")
    interchange.export(
        folder / "nv", model(NVFP4, "hadamard", 16), "nvfp4-pack-quantized", rotated=True
    )
    interchange.export(
        folder / "mx", model(ROUND_175, "identity"), "mxfp4-pack-quantized", rotated=True
    )
    return sorted(folder.iterdir())


def contents(folder):
    """Everything in a folder as plain bytes, read tensor by tensor."""
    layers = interchange.read_layers(folder)
    found = {}
    for name, layer in layers.items():
        weight = layer.weight
        for key, value in (
            ("codes", weight.codes),
            ("scales", weight.scales),
            ("global", weight.global_scale),
            ("transform", layer.transform),
            ("inputs", layer.input_global_scale),
        ):
            found[f"{name} {key}"] = None if value is None else np.asarray(value).tobytes()
        formats = (weight.format, layer.input_format)
        found[f"{name} formats"] = [fmt and fmt.replace(name="") for fmt in formats]
    opened = TensorFolder(folder)
    for name, entry in opened.entries.items():
        values = opened.read(name, [entry.dtype], [entry.shape])
        found[name] = values.tobytes(), values.shape, values.dtype
    return found


# Ways to damage a folder.


def some_file(chance, folder, ending=""):
    return chance.choice(sorted(f for f in folder.iterdir() if f.name.endswith(ending)))


def flip(chance, folder):
    file = some_file(chance, folder)
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 4, 64])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(chance, folder):
    file = some_file(chance, folder)
    data = file.read_bytes()
    at, to = sorted(chance.randrange(len(data)) for _ in range(2))
    parts = [data[:at], data[at:to], data[to:]]
    file.write_bytes(b"".join(parts[i] for i in chance.choice([[0], [2], [0, 2], [0, 1, 1, 2]])))


def split(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def header(chance, folder):
    file = some_file(chance, folder, ".safetensors")
    content, values = split(file.read_bytes())
    text = json.dumps(damage_json(chance, content)).encode()
    if chance.random() < 0.1:
        text = text[:-1] + b"," + text[1:]  # every name twice
    length = len(text)
    if chance.random() < 0.1:
        length = chance.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1])
    file.write_bytes(struct.pack("<Q", length) + text + values)


def config(chance, folder):
    file = some_file(chance, folder, ".json")
    file.write_text(json.dumps(damage_json(chance, json.loads(file.read_text()))))


def swap_files(chance, folder):
    one, two = some_file(chance, folder), some_file(chance, folder)
    data = two.read_bytes()
    chance.choice([lambda: one.write_bytes(data), one.unlink])()


def links(chance, folder):
    file = some_file(chance, folder)
    outside = folder.parent / "outside"
    shutil.copy(file, outside)
    file.unlink()
    targets = ["/etc/passwd", "/dev/zero", "/dev/stdin", str(outside), "../outside", file.name]
    os.symlink(chance.choice(targets), file)


def damage_json(chance, content):
    """Change one or two places of a JSON value."""
    for _ in range(chance.choice([1, 1, 2])):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.85:
                place = place[key]
                continue
            change(chance, content, place, key)
            break
    return content


def change(chance, content, place, key):
    kind = chance.randrange(5)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[chance.choice(["../x", "", "x" * 300, "up.e2m1", "layers"])] = place.pop(key)
    elif kind == 2:
        place[key] = place[chance.choice(list(place) if isinstance(place, dict) else [key])]
    elif kind == 3 and type(place[key]) in (int, float):
        place[key] = chance.choice([place[key] + 1, place[key] * 2, -place[key], float(place[key])])
    else:
        place[key] = chance.choice(NASTY)


DAMAGES = [flip, cut, header, header, config, config, swap_files, links]


def attack(originals, tmp_path, seeds):
    """Damage and read; return how many were refused, and the most seconds and bytes of one."""
    wanted = {folder: contents(folder) for folder in originals}
    refused = slowest = largest = 0
    for seed in seeds:
        chance = random.Random(seed)
        original = chance.choice(originals)
        target = tmp_path / "target"
        shutil.copytree(original, target)
        act = chance.choice(DAMAGES)
        act(chance, target)
        start, error, same = time.perf_counter(), None, False
        tracemalloc.start()  # Python's and numpy's: what a file may ask for
        try:
            found = contents(target)
            interchange.inspect_folder(target)
            if seed % 10 == 0:
                whole(original, target)
            same = {key: found.get(key) for key in wanted[original]} == wanted[original]
        except (ValueError, OSError, NotImplementedError) as caught:
            error = caught
        largest = max(largest, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        refused += error is not None
        what = (seed, original.name, act.__name__, repr(error))
        # Other libraries' files have no checksums, nor say twice what a layer is.
        assert same or error is not None or original.name in ("fp_quant", "nv", "mx"), what
        if error is not None:
            assert type(error) in (ValueError, OSError, NotImplementedError), what
            assert str(target) in str(error) or isinstance(error, NotImplementedError), what
        slowest = max(slowest, time.perf_counter() - start)
        shutil.rmtree(target)
        (tmp_path / "outside").unlink(missing_ok=True)
    return refused, slowest, largest


def whole(original, target):
    """Load the model itself: nothing else but an equal one may come back."""
    abstract = None if original.name == "llama" else nnx.eval_shape(lambda: Pair(nnx.Rngs(0)))
    # Codes and scales on every device: records have no negative zeros.
    loaded = wush.load(target, abstract, implementation="reference")
    if original.name in ("native", "shards"):
        assert model_arrays(loaded) == model_arrays(pair())


def check(refused, slowest, largest, of):
    print(f"{refused} of {of} refused, at most {slowest:.2f} s and {largest / 2**20:.1f} MiB")
    assert refused > of / 2  # the damages are damages
    assert slowest < 20  # seconds; a hang takes longer
    assert largest < 16 * 2**20  # of folders of 40 KB: no size in a file is believed


def test_damaged_folders_are_refused_or_read_as_they_were(originals, tmp_path):
    check(*attack(originals, tmp_path, range(300)), of=300)


@pytest.mark.slow
def test_ten_thousand_damaged_folders(originals, tmp_path):
    check(*attack(originals, tmp_path, range(300, 10_300)), of=10_000)
