"""Folders of encoded weights: values against a writer of our own, and what is refused."""

import json
import re

import encoded_folders
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
from wush_jax.checkpoints import interchange
from wush_jax.models.encodings import ENCODINGS, open_folder
from wush_jax.models.encodings.awq import outputs_of
from wush_jax.models.encodings.integers import unpack
from wush_jax.models.hugging_face import FolderTensors, load_pretrained

pytestmark = pytest.mark.files

ALL = ("awq symmetric", "gptq", "gptq of old", "gptq g64", "pack", "pack rows", "pack no order")
PACKED = {case: set(LINEARS) for case in ALL} | {"gptq dynamic": set(LINEARS) - set(OVERRIDES)}


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
    layers = interchange.read_layers(folder)
    assert set(layers) == PACKED.get(case, set())
    for name, packed in layers.items():
        np.testing.assert_array_equal(wush.dequantize(packed.weight), wanted[f"{name}.weight"])


@pytest.mark.parametrize("case", EIGHT_BITS)
def test_eight_bits_are_decoded(case, tmp_path):
    writer, options = EIGHT_BITS[case]
    folder, wanted = writer(tmp_path / "model", **options)
    opened = open_folder(folder)
    for name, weight in wanted.items():
        found = opened.read(name, [np.float32], [weight.shape])
        np.testing.assert_array_equal(found, weight, err_msg=name)
    assert interchange.read_layers(folder) == {}


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


@pytest.mark.parametrize("case", ["gptq", "awq"])
def test_models_compute_what_their_weights_mean(case, tmp_path):
    """Packed (GPTQ) or decoded (AWQ), the logits are those of the decoded weights."""
    folder, wanted = CASES[case][0](tmp_path / "model")
    loaded = wush.load(folder)
    kinds = [type(m).__name__ for _, m in nnx.iter_modules(loaded)]
    assert kinds.count("QuantizedDense") == (7 if case == "gptq" else 0)
    tensors = {n: t.astype(np.float32) for n, t in plain().items()} | wanted
    write(tmp_path / "plain", tensors, None, torch_dtype="float32")
    reference = load_pretrained(tmp_path / "plain")
    tokens = np.arange(10)[None]
    run = nnx.jit(
        lambda model, tokens: model(tokens)
    )  # jax compiles its attention of float32 alone
    ours, theirs = np.asarray(run(loaded, tokens), "f4"), np.asarray(run(reference, tokens))
    # Activations in float16: 2^-11 a rounding, some ten of them in a row.
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()


def test_experts_are_decoded_into_their_stacks(tmp_path, monkeypatch):
    """Mixtral's experts are one layer each in the files, and one stack here; the rest is packed."""
    moe = "model.layers.0.block_sparse_moe"
    shapes = {name: shape for name, shape in LINEARS.items() if "self_attn" in name}
    for i in range(2):
        parts = {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}
        shapes |= {f"{moe}.experts.{i}.{part}": shape for part, shape in parts.items()}
    config = {**encoded_folders.CONFIG, "model_type": "mixtral", "num_local_experts": 2}
    tensors = {n: t for n, t in plain().items()} | {f"{moe}.gate.weight": np.ones((2, 64), "f2")}
    monkeypatch.setattr(encoded_folders, "LINEARS", shapes)
    monkeypatch.setattr(encoded_folders, "CONFIG", config)
    monkeypatch.setattr(encoded_folders, "plain", lambda: tensors)
    folder, wanted = gptq(tmp_path / "model")
    model = wush.load(folder)
    layer = model.layers[0]
    assert type(layer.self_attn.q_proj).__name__ == "QuantizedDense"
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        stack = np.stack([wanted[f"{moe}.experts.{i}.{theirs}.weight"] for i in range(2)])
        found = getattr(layer.mlp.experts, ours).kernel.get_value()
        np.testing.assert_array_equal(found.mT, stack.astype(np.float16))


def test_inspection_says_what_stays_packed(tmp_path):
    found = interchange.inspect_folder(gptq(tmp_path / "a")[0])
    assert (found.layout, dict(found.formats)) == ("gptq", {"INT4_G32/none": 7})
    found = interchange.inspect_folder(awq(tmp_path / "b")[0])
    assert (found.layout, len(found.layers)) == ("awq", 7)
    assert found.layers[0].format == "int4, groups of 32, zero points (decoded)"
    up = next(layer for layer in found.layers if layer.name == UP)
    assert up.bytes == 96 * 64 // 2 + 96 * 2 * 2 + 96 * 2 // 2
    # What stays packed can be exported to our own files, and nothing else.
    assert interchange.export(tmp_path / "native", tmp_path / "a", "wush") == ()
    native = interchange.read_layers(tmp_path / "native")[UP]
    assert native.weight.format.name == "INT4_G32"
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
