"""Folders whose config was changed in one field, or whose bytes were: refused, or the same."""

import copy
import json

import numpy as np
import pytest
from encoded_folders import UP, awq, float_quantized, fp8, gptq, pack_quantized

from wush_jax.models.encodings import open_folder

pytestmark = pytest.mark.files

WRITERS = {
    "gptq": lambda folder: gptq(folder, desc_act=True),
    "awq": awq,
    "pack": lambda folder: pack_quantized(folder, sym=False),
    "fp8": fp8,
    "float": lambda folder: float_quantized(folder, "block"),
}
NASTY = (None, True, False, 0, 1, -1, 2, 3, 8, 33, 2**31, 2**63, 0.5, float("inf"))
NASTY += ("", "x", [], [1], [2, 2], [0, 32], {}, {"format": "x"}, "channel", "group", "int")


def changed(config):
    """One entry at a time, at every depth: gone, or another value."""
    for key in config:
        yield {k: v for k, v in config.items() if k != key}
        for value in NASTY:
            yield config | {key: value}
        if isinstance(config[key], dict):
            for inner in changed(config[key]):
                yield config | {key: inner}


def opened(folder):
    """The bytes of one layer, or what stops it from being read."""
    try:
        found = open_folder(folder)
        if not hasattr(found, "encoded"):
            return "config.json: none of the encodings"
        weight = found.encoded.get(f"{UP}.weight")
        if weight is None:  # renamed: what a model finds out when it looks for its layers
            return f"{folder}: no such layer"
        return found.read(f"{UP}.weight", [np.float32], [weight.shape]).tobytes()
    except (ValueError, NotImplementedError) as error:
        return str(error)


@pytest.mark.parametrize("case", WRITERS)
def test_configs(case, tmp_path):
    folder, wanted = WRITERS[case](tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    right, refused = wanted[f"{UP}.weight"].tobytes(), 0
    assert opened(folder) == right
    for quantization in changed(copy.deepcopy(config["quantization_config"])):
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
        found = opened(folder)
        if isinstance(found, str):
            refused += 1
            assert str(folder) in found or "config.json" in found, (quantization, found)
        else:
            assert found == right, quantization
    assert refused > 50


@pytest.mark.parametrize("case", WRITERS)
def test_bytes(case, tmp_path):
    """A header of turned bits is refused or reads; nothing ends in another error."""
    folder, _ = WRITERS[case](tmp_path / "model")
    file, random, refused = folder / "model.safetensors", np.random.default_rng(0), 0
    data = file.read_bytes()
    for _ in range(100):
        damaged = bytearray(data)
        for place in random.integers(len(data[:3000]), size=2):
            damaged[place] ^= 1 << random.integers(8)
        file.write_bytes(bytes(damaged))
        refused += isinstance(opened(folder), str)
    assert refused > 30
