"""Folders of encoded weights: values against a writer of our own, and what is refused."""

import json
import re
from contextlib import nullcontext

import encoded_folders
import jax.numpy as jnp
import numpy as np
import pytest
from encoded_folders import (
    CASES,
    EIGHT_BITS,
    LINEARS,
    OVERRIDES,
    UP,
    awq,
    float_quantized,
    gptq,
    plain,
    write,
)
from flax import nnx

import wush_jax as wush
from wush_jax.calibration import round_folder
from wush_jax.checkpoints import interchange
from wush_jax.models.encodings import ENCODINGS, open_folder
from wush_jax.models.encodings.awq import outputs_of
from wush_jax.models.encodings.integers import unpack
from wush_jax.models.hugging_face import FolderTensors, load_pretrained

pytestmark = pytest.mark.files

# Inputs in an order of their own, and 8 bits less zero points of 8.
NEVER = ("gptq act order", "pack own order", "int")
PACKED = {case: set(LINEARS) for case in {**CASES, **EIGHT_BITS} if case not in NEVER}
PACKED["gptq dynamic"] = {name for name in LINEARS if OVERRIDES.get(name) is not False}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_writer_meant(case, tmp_path):
    writer, options = CASES[case]
    folder, wanted = writer(tmp_path / "model", **options)
    tensors = FolderTensors(folder)
    for name, weight in wanted.items():
        # In float16, the type of the scales, as the libraries have it.
        np.testing.assert_array_equal(tensors[name], weight.astype(np.float16), err_msg=name)
        exact = open_folder(folder).read(name, [np.float32], [weight.shape])
        np.testing.assert_array_equal(exact, weight)
    check_packed(folder, case, wanted)


@pytest.mark.parametrize("case", EIGHT_BITS)
def test_eight_bits(case, tmp_path):
    writer, options = EIGHT_BITS[case]
    folder, wanted = writer(tmp_path / "model", **options)
    opened = open_folder(folder)
    for name, weight in wanted.items():
        found = opened.read(name, [np.float32], [weight.shape])
        np.testing.assert_array_equal(found, weight, err_msg=name)
    check_packed(folder, case, wanted)


def check_packed(folder, case, wanted):
    """The layers that stay packed, and their values: those of the files, bit for bit."""
    layers = interchange.read_layers(folder)
    assert set(layers) == PACKED.get(case, set())
    for name, packed in layers.items():
        np.testing.assert_array_equal(wush.dequantize(packed.weight), wanted[f"{name}.weight"])


def test_activations_that_stay_as_they_are_are_said(tmp_path):
    inputs = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
    folder, _ = float_quantized(tmp_path / "model", inputs=inputs)
    message = r"rounds activations \(float 8 tensor\); here they stay as they are"
    with pytest.warns(UserWarning, match=message):
        wush.load(folder)
    assert re.search(message, interchange.inspect_folder(folder).notes[0])


def test_golden_words():
    """Words of three bits over a border, and of layers that GPTQModel 7.7 quantized."""
    found = unpack(np.int32([[-1, 0, 0x00000001]]), 3)[0, [9, 10, 11, 21, 22]]
    assert found.tolist() == [7, 3, 0, 2, 0]
    # GPTQ: inputs 0 to 15 of an output whose zero point is 7 + 1; by its own dequantization.
    theirs = [1, -4, 2, -1, -5, -2, 0, 2, 0, 1, 1, 5, -8, 2, 7, -4]
    words = np.uint32([[0xA8637A49], [0x4FA0D998]]).view(np.int32)
    assert (unpack(words, 4, axis=0)[:, 0].astype(int) - 8).tolist() == theirs
    assert unpack(np.int32([[0x57777676]]), 4)[0, 5] == 7
    # AWQ: one input of outputs 0 to 7, all zero points 8.
    assert (outputs_of(np.int32([[0x6A89A43B]]))[:, 0].astype(int) - 8).tolist() == [
        *(3, 1, -5, 0, -4, 2, 2, -2)
    ]


ROUNDS = "rounds activations"
DECODED = r"weights decoded, as no packed format .* 7 of \(int4, groups of 32, columns reordered\)"


@pytest.mark.parametrize(
    ("case", "packed", "said"),
    [("awq", 7, None), ("gptq act order", 0, DECODED), ("fp8 blocks", 7, ROUNDS)],
)
def test_models_compute_what_their_weights_mean(case, packed, said, tmp_path):
    """Packed or decoded, the logits are those of the decoded weights."""
    writer, options = {**CASES, **EIGHT_BITS}[case]
    folder, wanted = writer(tmp_path / "model", **options)
    with nullcontext() if said is None else pytest.warns(UserWarning, match=said):
        loaded = wush.load(folder)
    kinds = [type(m).__name__ for _, m in nnx.iter_modules(loaded)]
    assert kinds.count("QuantizedDense") == packed
    same_logits(loaded, wanted, tmp_path)


def same_logits(loaded, wanted, tmp_path):
    plain = encoded_folders.plain(loaded.dtype)
    tensors = {n: t.astype(np.float32) for n, t in plain.items()} | wanted
    write(tmp_path / "plain", tensors, None, torch_dtype="float32")
    reference = load_pretrained(tmp_path / "plain")
    tokens = np.arange(10)[None]
    run = nnx.jit(
        lambda model, tokens: model(tokens)
    )  # jax compiles its attention of float32 alone
    ours, theirs = np.asarray(run(loaded, tokens), "f4"), np.asarray(run(reference, tokens))
    # Activations in float16: 2^-11 a rounding, some ten of them in a row. In float32 2^-24.
    bound = 0.01 if loaded.dtype == np.float16 else 1e-5
    assert np.abs(ours - theirs).max() < bound * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["gptq", "gptq act order", "fp8"])
def test_experts_become_stacks(case, tmp_path, monkeypatch):
    """Mixtral's experts are one layer each in the files, and one stack here: packed or plain."""
    moe = "model.layers.0.block_sparse_moe"
    shapes = {name: shape for name, shape in LINEARS.items() if "self_attn" in name}
    for i in range(2):
        parts = {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}
        shapes |= {f"{moe}.experts.{i}.{part}": shape for part, shape in parts.items()}
    config = {**encoded_folders.CONFIG, "model_type": "mixtral", "num_local_experts": 2}
    router = np.random.default_rng(5).standard_normal((2, 64)).astype("f2")
    tensors = {n: t for n, t in plain().items()} | {f"{moe}.gate.weight": router}
    monkeypatch.setattr(encoded_folders, "LINEARS", shapes)
    monkeypatch.setattr(encoded_folders, "CONFIG", config)
    monkeypatch.setattr(encoded_folders, "plain", lambda *_: dict(tensors))
    if case == "fp8":
        folder, wanted = encoded_folders.fp8(tmp_path / "model")
    else:
        folder, wanted = gptq(tmp_path / "model", desc_act=case != "gptq")
    decoded = "order" in case
    expected = ROUNDS if case == "fp8" else "weights decoded, .* 10 of"
    with pytest.warns(UserWarning, match=expected) if case != "gptq" else nullcontext():
        loaded = wush.load(folder)
    experts = loaded.layers[0].mlp.experts
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        stack = np.stack([wanted[f"{moe}.experts.{i}.{theirs}.weight"] for i in range(2)])
        layer = getattr(experts, ours)
        if decoded:
            np.testing.assert_array_equal(layer.kernel.get_value().mT, stack.astype(np.float16))
        else:
            np.testing.assert_array_equal(wush.dequantize(layer.packed.weight), stack)
    if case == "fp8":
        same_logits(loaded, wanted, tmp_path)
    if not decoded:  # and stacks are what our own files hold
        wush.save(tmp_path / "native", loaded)
        again = wush.load(tmp_path / "native").layers[0].mlp.experts.up_proj
        np.testing.assert_array_equal(again.codes[...], experts.up_proj.codes[...])


def test_stacks_of_fp8_experts(tmp_path):
    """(E, N, K) with a scale a block: a source to round; without scales they are refused."""
    random, name = np.random.default_rng(7), "model.layers.0.mlp.experts.gate_up_proj"
    codes = random.integers(120, size=(2, 96, 64), dtype=np.uint8).view(jnp.float8_e4m3fn)
    scales = random.uniform(0.001, 0.01, (2, 3, 2)).astype(np.float32)
    wide = np.repeat(np.repeat(scales.astype("f8"), 32, 1), 32, 2)
    source, _ = encoded_folders.fp8(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    stored = wush.storage.TensorFolder(source)
    tensors = {n: stored.read(n, [e.dtype], [e.shape]) for n, e in stored.entries.items()}
    write(source, tensors | {name: codes, f"{name}_scale_inv": scales}, config)
    found = open_folder(source).read(name, [np.float32], [codes.shape])
    np.testing.assert_array_equal(found, (codes.astype("f8") * wide).astype("f4"))
    said = {layer.name: layer.format for layer in interchange.inspect_folder(source).layers}
    assert said[name] == "e4m3, blocks of 32 x 32, 2 matrices (decoded)"
    rules = [(".*experts.*", wush.Recipe(wush.NVFP4, transform="identity")), (".*", None)]
    round_folder(source, tmp_path / "rounded", rules)
    packed = interchange.read_layers(tmp_path / "rounded")[name]
    wanted = wush.fake_quantize(found.astype(np.float16).astype("f4"), wush.NVFP4)
    np.testing.assert_array_equal(wush.dequantize(packed.weight), wanted)
    for other in (f"{name}_scale", "x"):
        write(source, tensors | {name: codes, other: scales}, config)
        with pytest.raises(ValueError, match=f"'{name}' hold 8-bit floats, and no scale"):
            open_folder(source)


def test_inspection_says_what_stays_packed(tmp_path):
    found = interchange.inspect_folder(awq(tmp_path / "a")[0])
    assert (found.layout, dict(found.formats)) == ("awq", {"INT8_G32/none": 7})
    up = next(layer for layer in found.layers if layer.name == UP)
    assert up.bytes == 96 * 64 // 2 + 96 * 2 * 2 + 96 * 2 // 2
    found = interchange.inspect_folder(gptq(tmp_path / "b", desc_act=True)[0])
    assert (found.layout, len(found.layers)) == ("gptq", 7)
    assert found.layers[0].format == "int4, groups of 32, columns reordered (decoded)"
    # What stays packed can be exported to our own files, and nothing else.
    assert interchange.export(tmp_path / "native", tmp_path / "a", "wush") == ()
    native = interchange.read_layers(tmp_path / "native")[UP]
    assert native.weight.format.name == "INT8_G32"
    with pytest.raises(ValueError, match="no layer that stays packed"):
        interchange.export(tmp_path / "never", tmp_path / "b", "wush")


# Changes of one field, and what the message must name.
REFUSED = {
    "gptq": {
        "bits": (5, "bits = 5"),
        "group_size": (48, "scales"),
        "sym": ("yes", "sym = 'yes'"),
        "desc_act": (None, "desc_act"),
        "checkpoint_format": ("marlin", "checkpoint_format = 'marlin'"),
        "pack_dtype": ("int16", "pack_dtype = 'int16'"),
        "rotation": ("hadamard", "rotation = 'hadamard' is unknown"),
        "dynamic": ({"[": {"bits": 8}}, "dynamic '['"),
    },
    "awq": {
        "bits": (8, "bits = 8"),
        "group_size": (-2, "group_size = -2"),
        "zero_point": (False, "write zero_point=true"),
        "version": ("marlin", "version = 'marlin' is not read"),
        "format": ("gemv", "format = 'gemv'"),
        "backend": ("llm-awq", "backend = 'llm-awq'"),
    },
    "fp8 blocks": {
        "fmt": ("e5m2", "fmt = 'e5m2'"),
        "weight_block_size": ([32], "weight_block_size = [32]"),
        "scale_fmt": ("int", "scale_fmt = 'int'"),
        "expert_dtype": ("fp4", "expert_dtype = 'fp4'"),
        "activation_scheme": ("odd", "activation_scheme = 'odd'"),
    },
    "pack": {
        "format": ("marlin-24", "marlin-24"),
        "sparsity_config": ({"format": "sparse-24-bitmask"}, "sparsity_config"),
        "transform_config": ({"config_groups": {"x": {}}}, "transform_config"),
        "config_groups": ({}, "config_groups is missing or empty"),
        "hadamard": (True, "hadamard = 'True' is unknown"),
    },
}


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_would_change_what_is_computed(case, tmp_path):
    folder, _ = {**CASES, **EIGHT_BITS}[case][0](tmp_path / "model")
    original = (folder / "config.json").read_text()
    for name, (value, message) in REFUSED[case].items():
        change(folder, **{name: value})
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            wush.load(folder)
        assert message in str(caught.value), name
        assert str(folder) in str(caught.value)
        (folder / "config.json").write_text(original)
    name, (value, message) = next(iter(REFUSED[case].items()))
    change(folder, **{name: value, "surprise": 1})
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        wush.load(folder)
    if case != "pack":  # a format that nobody reads is told alone
        assert message in str(caught.value)
        assert "surprise" in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({".*up_proj": {"bits": 8}}, "up_proj.scales' is float16"),
        ({".*up_proj": {"bits": 5}}, "bits = 5"),
        ({".*up_proj": 8}, "expected an object"),
        ({"(a+)+b": {"bits": 8}}, "repeats too much"),
        ([1], r"dynamic = [1], expected an object"),
    ],
)
def test_overrides_that_make_no_sense(rules, message, tmp_path):
    folder, _ = gptq(tmp_path / "model")
    change(folder, dynamic=rules)
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
        wush.load(folder)


@pytest.mark.parametrize("case", ["gptq", "awq", "pack asymmetric"])
def test_tensors_that_are_missing_or_misshapen_are_told_at_once(case, tmp_path):
    writer, options = CASES[case]
    folder, _ = writer(tmp_path / "model", **options)
    stored = wush.storage.TensorFolder(folder)
    tensors = {n: stored.read(n, [e.dtype], [e.shape]) for n, e in stored.entries.items()}
    scale = "weight_scale" if case.startswith("pack") else "scales"
    zero = "weight_zero_point" if case.startswith("pack") else "qzeros"
    del tensors[f"{UP}.{zero}"]
    tensors[f"{UP}.{scale}"] = tensors[f"{UP}.{scale}"][:-1]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    write(folder, tensors, config)
    with pytest.raises(ValueError, match=f"{scale}' is float16") as caught:
        wush.load(folder)
    assert f"'{UP}.{zero}' is missing" in str(caught.value)


def test_contents_that_contradict_the_config(tmp_path):
    """Zero points of what is said to be symmetric, orders of their own, the ambiguous zero."""
    for options, field, value, message in (
        ({"sym": False, "version": "gptq_v2"}, "sym", True, "zero points other than 8"),
        ({}, "checkpoint_format", "gptq_v2", "zero points other than 8"),
        ({"desc_act": True}, "desc_act", False, "write desc_act=true"),
    ):
        folder, _ = gptq(tmp_path / "model", **options)
        change(folder, **{field: value})
        with pytest.raises(ValueError, match=message):
            wush.load(folder)
    # Zero point 0 in version 1 is stored as 15, which every reader takes for something else.
    folder, _ = gptq(tmp_path / "model", sym=False, version="gptq_v2")
    change(folder, checkpoint_format="gptq")
    with pytest.raises(ValueError, match="readers of checkpoint_format='gptq'"):
        wush.load(folder)


def test_an_unknown_encoding_names_those_that_are_known(tmp_path):
    folder, _ = gptq(tmp_path / "model")
    change(folder, quant_method="bitsandbytes")
    with pytest.raises(ValueError, match="bitsandbytes") as caught:
        wush.load(folder)
    assert all(name in str(caught.value) for name in ENCODINGS)
