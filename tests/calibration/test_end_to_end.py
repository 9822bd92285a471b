"""From a Hugging Face folder through the command to files, and back by readers old and new."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import ONE_ORDER
from flax import nnx
from folders import write
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.models import LlamaConfig, load_pretrained, to_tensors

pytestmark = pytest.mark.usefixtures("float32_matmuls")

BATCH, LENGTH = 8, 64
FLAGS = ["--format", "MXFP4", "--transform", "wush", "--solver", "gptq", "--dtype", "float32"]
TOKENS = np.random.default_rng(0).integers(256, size=(2 * BATCH, LENGTH))


def config(width):
    return LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width if width < 1024 else 2 * width,  # one K: compiled once
        num_hidden_layers=2 if width < 1024 else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
    )


def write_ours(folder, width):
    tensors = to_tensors(random_model(config(width)))
    scale = 1 / np.sqrt(width)
    tensors = {n: t if "norm" in n else t * scale for n, t in tensors.items()}
    write(folder, config(width), {n: t.astype(jnp.bfloat16) for n, t in tensors.items()})


def write_transformers(folder, width):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    torch.manual_seed(0)
    values = config(width).to_dict() | {"bos_token_id": None, "eos_token_id": None}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**values))
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((write_ours, 64), id="small"),
        pytest.param((write_transformers, 64), id="transformers", marks=pytest.mark.slow),
        pytest.param((write_transformers, 1024), id="wide", marks=pytest.mark.slow),
    ],
)
def source(request, tmp_path_factory):
    save, width = request.param
    folder = tmp_path_factory.mktemp("source")
    save(folder, width)
    np.save(folder / "tokens.npy", TOKENS)
    return folder


def quantize(source, out, *flags):
    windows = ["--length", str(LENGTH), "--batch", str(BATCH)]
    tokens = ["--tokens", str(source / "tokens.npy")]
    assert cli.main(["quantize", str(source), "--out", str(out), *tokens, *windows, *flags]) == 0
    return out / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("quantized"), *FLAGS)


def read_with_numpy(folder):
    """Safetensors by its published format: a length, a JSON header, the values."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, item in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = item["data_offsets"]
                raw = np.frombuffer(data[8 + length + start : 8 + length + end], np.uint8)
                found[name] = item["dtype"], tuple(item["shape"]), raw
    return found


def bfloat16(raw, shape):
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def layers_of(model):
    return {path: m for path, m in nnx.iter_modules(model) if hasattr(m, "packed")}


dequantize = jax.jit(wush.dequantize)


@pytest.mark.once
def test_an_independent_reader_finds_the_same(checkpoint):
    """Codes, scales and transforms byte for byte; values by the tables of the format."""
    files = read_with_numpy(checkpoint)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.concatenate([magnitudes, -magnitudes])
    found = layers_of(wush.load(checkpoint))
    assert len(found) in (14, 28)
    for path, module in found.items():
        name, packed = "model." + ".".join(map(str, path)), module.packed
        kind, shape, codes = files[f"{name}.e2m1"]
        assert (kind, shape) == ("U8", packed.weight.codes.shape)
        assert codes.tobytes() == np.asarray(packed.weight.codes).tobytes()
        kind, groups, scales = files[f"{name}.scale_quant"]
        assert kind == "F8_E8M0"
        assert scales.tobytes() == np.asarray(packed.weight.scales).tobytes()
        kind, blocks, transform = files[f"{name}.transform"]
        assert kind == "BF16"
        np.testing.assert_array_equal(
            bfloat16(transform, blocks), np.asarray(packed.transform, np.float32)
        )
        pairs = codes.reshape(shape)
        values = table[np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(shape[0], -1)]
        values *= np.repeat(2.0 ** (scales.reshape(groups).astype(int) - 127), 32, axis=1)
        (factor,) = files[f"{name}.weight_global_scale"][2].view(np.float32)
        expected = np.asarray(dequantize(packed.weight))
        np.testing.assert_allclose(values * factor, expected, rtol=1e-6)  # a rounded reciprocal


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.once
def test_logits_survive_saving_bit_for_bit(source, checkpoint, tmp_path):
    model = load_pretrained(source, param_dtype=jnp.bfloat16)
    recipe = wush.Recipe(format=wush.MXFP4, transform="wush", solver="gptq")
    rules = [("lm_head", None), (".*", recipe)]
    batches = list(TOKENS.reshape(2, BATCH, LENGTH))
    quantized, _ = wush.quantize_model(model, batches, rules, sequential=wush.Sequential())
    before = logits_of(quantized, batches[0])
    wush.save(tmp_path / "saved", quantized)
    for folder in (tmp_path / "saved", checkpoint):
        np.testing.assert_array_equal(logits_of(wush.load(folder), batches[0]), before)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.skipif(not ONE_ORDER, reason="a GPU's library may sum another number of products anew")
@pytest.mark.parametrize(
    "calibration",
    [
        pytest.param("one-shot", marks=pytest.mark.once),
        pytest.param("sequential", marks=pytest.mark.files),
    ],
)
def test_eight_devices_write_the_same_bytes(source, tmp_path, calibration):
    """Eight parts of each batch, on one device or on eight: what a part gives is the same.

    Texts of 32 tokens would be too short at width 64: XLA's CPU compiler then takes other loops for
    the norms of one text than for those of eight.
    """
    flags = [*FLAGS, "--calibration", calibration]
    one = quantize(source, tmp_path / "one", *flags)
    spread = quantize(source, tmp_path / "eight", *flags, "--data-parallel")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in spread.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (spread / name).read_bytes(), name
    losses = [
        {r["path"]: r["loss"] for r in json.loads((f.parent / "report.json").read_text())["layers"]}
        for f in (one, spread)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # means over tokens, in another order
