"""Exports to other layouts and back, against readers of our own."""

import io
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import Pair, decode, llama_of, open_file, write_file
from checkpoint_tools import pair as native_pair
from flax import nnx
from layout_tools import DERIVED, ROUND_175, effective, hadamard, model, transform
from rich.console import Console

import wush_jax as wush
from wush_jax import interchange
from wush_jax.checkpoint import written
from wush_jax.folder_writer import write_folder
from wush_jax.formats import INT4, MXFP4, NVFP4
from wush_jax.layouts import LAYOUTS
from wush_jax.layouts.layout import Content
from wush_jax.packed_layout import record_of
from wush_jax.site import effective_weight

X = np.random.default_rng(5).standard_normal((6, 64)).astype("f4")
BOTH = {
    "A mxfp4 blocks": ("fp_quant", {"fmt": MXFP4}),
    "A nvfp4 blocks of 16": ("fp_quant", {"fmt": NVFP4, "d": 16}),
    "A shared": ("fp_quant", {"fmt": MXFP4, "kind": "shared", "d": 64}),
    "A hadamard": ("fp_quant", {"fmt": NVFP4, "kind": "hadamard"}),
    "A identity": ("fp_quant", {"fmt": MXFP4, "kind": "identity"}),
    "A derived": ("fp_quant", {"fmt": DERIVED}),
    "B": ("wush", {"fmt": NVFP4}),
    "C identity": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "identity"}),
    "C rounded hadamard": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "hadamard"}),
    "C derived": ("nvfp4-pack-quantized", {"fmt": DERIVED, "kind": "hadamard", "d": 16}),
    "C weights only": (
        "nvfp4-pack-quantized",
        {"fmt": NVFP4, "kind": "identity", "inputs": None},
    ),
    "D identity": ("mxfp4-pack-quantized", {"fmt": ROUND_175, "kind": "identity"}),
    "D hadamard": (
        "mxfp4-pack-quantized",
        {"fmt": ROUND_175, "kind": "hadamard", "dtype": "float32"},
    ),
    "D weights only": (
        "mxfp4-pack-quantized",
        {"fmt": ROUND_175, "kind": "hadamard", "d": 64, "inputs": None},
    ),
}


weight_of = jax.jit(effective_weight)


@jax.jit
def outputs(x, up, gate):
    """Effective weights and products of both layers."""
    dot = lambda packed: wush.quantized_dot(x, packed, implementation="reference")  # noqa: E731
    return effective_weight(up), effective_weight(gate), dot(up), dot(gate)


def shapes():
    return nnx.eval_shape(lambda: Pair(nnx.Rngs(0)))


@pytest.mark.parametrize("case", BOTH)
def test_exports_mean_the_same_weights(case, tmp_path):
    layout, options = BOTH[case]
    source = model(**options)
    interchange.export(tmp_path / "out", source, layout)
    wush.save(tmp_path / "native", source)
    interchange.export(tmp_path / "again", tmp_path / "native", layout)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    # Codes and scales on every device: records have no negative zeros.
    loaded = wush.load(tmp_path / "out", shapes(), implementation="reference")
    wanted = outputs(X, source.up.packed, source.gate.packed)
    found = outputs(X, loaded.up.packed, loaded.gate.packed)
    # Global scales may be stored as reciprocals, or take up the rounding of a transform: both
    # float32, as is the sum over K.
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
    for name, weight in (("up", wanted[0]), ("gate", wanted[1])):
        ours = effective(tmp_path / "out", name)
        np.testing.assert_allclose(ours, weight, rtol=2e-5, atol=2e-6 * np.abs(ours).max())
    for layer in ("up", "gate"):
        a, b = getattr(loaded, layer).packed, getattr(source, layer).packed
        assert a.weight.codes.tobytes() == b.weight.codes.tobytes()
        assert a.weight.scales.tobytes() == b.weight.scales.tobytes()
        assert (a.input_format is None) == (b.input_format is None)
    np.testing.assert_array_equal(loaded.up.bias[...], source.up.bias[...])
    if source.up.transform is not None:
        assert loaded.up.transform is loaded.gate.transform


def test_through_every_layout(tmp_path):
    """Native to C to A to B to native: the same weights."""
    source = model(NVFP4, "hadamard", 16)
    wush.save(tmp_path / "0", source)
    for step, layout in enumerate(("nvfp4-pack-quantized", "fp_quant", "wush")):
        interchange.export(tmp_path / str(step + 1), tmp_path / str(step), layout)
    found = effective(tmp_path / "3", "up")
    np.testing.assert_array_equal(found, effective(tmp_path / "0", "up"))
    loaded = wush.load(tmp_path / "3", shapes())
    assert loaded.up.input_format.rule == "absmax"
    config = json.loads((tmp_path / "3" / "config.json").read_text())["quantization_config"]
    assert config["metadata"] == {"converted_from": "fp_quant"}


@pytest.mark.parametrize(("layout", "fmt"), [("fp_quant", MXFP4), ("nvfp4-pack-quantized", NVFP4)])
def test_a_llama_of_another_layout_needs_no_model(layout, fmt, tmp_path):
    source = llama_of(wush.Recipe(fmt, transform="identity"))
    interchange.export(tmp_path / "out", source, layout)
    loaded = wush.load(tmp_path / "out")
    tokens = np.arange(10).reshape(2, 5)
    run = nnx.jit(lambda m, t: m(t))  # one program: bit for bit
    wanted, found = run(source, tokens), run(loaded, tokens)
    np.testing.assert_array_equal(found, wanted)
    assert loaded.layers[0].mlp.up_proj.transform is None
    assert loaded.lm_head.kernel.dtype == jnp.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["model_type"] == "qwen2"


def test_models_without_names_of_their_own(tmp_path):
    wush.save(tmp_path / "model", native_pair())
    layers = interchange.read_layers(tmp_path / "model")
    assert {name: layer.shape for name, layer in layers.items()} == {
        "up": (32, 64),
        "gate": (8, 64),
    }
    assert layers["up"].transform is layers["gate"].transform
    assert isinstance(layers["up"].weight.codes, np.ndarray)


# What cannot be written, and why.

REFUSED = [
    ("modelopt", {"fmt": NVFP4}, "layout='modelopt' cannot be written; choose from wush"),
    ("zip", {"fmt": NVFP4}, "layout='zip' cannot be written"),
    ("fp_quant", {"fmt": INT4}, "weight formats e2m1, groups of 32"),
    ("fp_quant", {"fmt": MXFP4, "inputs": None}, "holds activation formats .* has none"),
    ("fp_quant", {"fmt": ROUND_175}, r"'pow2_div3'; \w+ has .* \(rule 'round_175'\)"),
    ("fp_quant", {"fmt": MXFP4, "dtype": "float32"}, "quantize with transform_dtype='bfloat16'"),
    (
        "fp_quant",
        {"fmt": NVFP4, "inputs": NVFP4.replace(rule="four_over_six")},
        r"'absmax'; \w+ has NVFP4 \(rule 'four_over_six'\)",
    ),
    ("fp_quant", {"fmt": NVFP4, "inputs": DERIVED}, "needs a static global scale"),
    ("nvfp4-pack-quantized", {"fmt": NVFP4}, "no room for the transform .* knows the identity"),
    ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "shared"}, "no room for the transform"),
    ("nvfp4-pack-quantized", {"fmt": MXFP4, "kind": "identity"}, "e4m3 scales; "),
    ("mxfp4-pack-quantized", {"fmt": MXFP4, "kind": "identity"}, "'round_175' or none; "),
    (
        "mxfp4-pack-quantized",
        {"fmt": MXFP4, "kind": "identity", "inputs": None},
        r"has no global scale, .*\(rule='round_175', global_scale=1.0\)",
    ),
    (
        "mxfp4-pack-quantized",
        {"fmt": ROUND_175, "kind": "hadamard"},
        "means the exact Hadamard .* transform_dtype='float32'",
    ),
]


@pytest.mark.parametrize(("layout", "options", "match"), REFUSED)
def test_what_a_layout_cannot_hold_is_refused(layout, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        interchange.export(tmp_path / "out", model(**options), layout)
    assert not (tmp_path / "out").exists()


def rename(folder, names, config):
    """Call the layers of a native folder otherwise, in its tensors and its config."""
    tensors = open_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {key.replace(f"{old}.", f"{new}."): value for key, value in tensors.items()}
        config = config.replace(f'"{old}"', f'"{new}"')
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(config)


def test_layers_that_readers_fuse_need_one_scale(tmp_path):
    source = nnx.merge(*nnx.split(model(DERIVED, "identity", inputs=None)))
    wush.save(tmp_path / "model", source)
    config = (tmp_path / "model" / "config.json").read_text()
    rename(tmp_path / "model", {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}, config)
    interchange.export(tmp_path / "equal", tmp_path / "model", "nvfp4-pack-quantized")
    other = source.up.global_scale[...] * 2
    source.up.global_scale.set_value(other)
    wush.save(tmp_path / "other", source)
    config = (tmp_path / "other" / "config.json").read_text()
    rename(tmp_path / "other", {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}, config)
    match = r"one global scale for mlp\.\w+_proj, mlp\.\w+_proj: use share_transform=True"
    with pytest.raises(ValueError, match=match):
        interchange.export(tmp_path / "out", tmp_path / "other", "nvfp4-pack-quantized")


def test_layers_that_differ_are_refused(tmp_path):
    source = nnx.merge(*nnx.split(model(MXFP4)))
    source.up = model(NVFP4).up
    with pytest.raises(ValueError, match="one format for all layers, the model has"):
        interchange.export(tmp_path / "out", source, "fp_quant")
    source.up = model(MXFP4, "identity").up
    source.gate = model(MXFP4, "shared", 64).gate
    with pytest.raises(ValueError, match="one block size for all layers"):
        interchange.export(tmp_path / "out", source, "fp_quant")


# Folders that other programs wrote.


def write_foreign(folder, layers, config, extra=()):
    """Write layers of numpy arrays as another program would, without our library."""
    folder.mkdir()
    types = {"u1": "U8", "f4": "F32", "V2": "BF16", "f2": "BF16"}
    tensors = {}
    for name, values in layers.items():
        kind, values = values if isinstance(values, tuple) else (None, values)
        kind = kind or types[values.dtype.str[1:]]
        tensors[name] = (kind, list(values.shape), values.tobytes())
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    for file, content in extra:
        (folder / file).write_text(json.dumps(content))


def plain():
    """What a `Pair` holds beside its quantized layers."""
    tensors = {"up.bias": np.ones(32, "f4").astype(jnp.bfloat16)}
    tensors |= {f"norm.{key}": np.ones(64, "f4") for key in ("scale", "bias", "mean", "var")}
    return tensors


def random_layer(n, seed, kind):
    """Codes, scale bytes, and the values that they mean, without a global scale."""
    random = np.random.default_rng(seed)
    codes = random.integers(256, size=(n, 32), dtype="u1")
    low, high, group = (117, 123, 32) if kind == "F8_E8M0" else (0, 64, 16)
    scales = random.integers(low, high, size=(n, 64 // group), dtype="u1")
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, 64)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7]
    values = np.where(nibbles >> 3, -magnitudes, magnitudes)
    decoded = decode(kind, scales.shape, scales.tobytes())
    return codes, scales, values * np.repeat(decoded, group, axis=1)


def check_loaded(folder, wanted):
    loaded = wush.load(folder, shapes())
    for name, weight in wanted.items():
        found = weight_of(getattr(loaded, name).packed)
        np.testing.assert_allclose(found, weight, rtol=1e-5, atol=2e-6 * np.abs(weight).max())
    return loaded


def test_fp_quant_of_others(tmp_path):
    """MR-GPTQ: one matrix, not symmetric, for all blocks; global scales from the data."""
    matrix = np.linalg.qr(np.random.default_rng(9).standard_normal((64, 64)))[0]
    matrix = matrix.astype(jnp.bfloat16)
    tensors, wanted = plain(), {}
    for seed, (name, n) in enumerate({"up": 32, "gate": 8}.items()):
        codes, scales, values = random_layer(n, seed, "F8_E4M3")
        tensors |= {
            f"{name}.qweight": codes,
            f"{name}.scales": scales,
            f"{name}.forward_hadamard_matrix": matrix,
            f"{name}.backward_hadamard_matrix": matrix,
            f"{name}.weight_global_scale": np.float32([768.5]),
            f"{name}.act_global_scale": np.float32([33.0]),
        }
        # x M has the product (x M) values^T = x (values M^T)^T.
        wanted[name] = values / 768.5 @ matrix.astype("f8").T
    config = {"quant_method": "fp_quant", "forward_dtype": "nvfp4", "transform_init": "gsr"}
    write_foreign(tmp_path / "model", tensors, {"quantization_config": config})
    loaded = check_loaded(tmp_path / "model", wanted)
    assert loaded.up.input_global_scale[...] == 33
    assert loaded.up.transform is loaded.gate.transform
    pseudo = {"up.dqweight": np.zeros((32, 64), "f4")} | plain()
    write_foreign(tmp_path / "pseudo", pseudo, {"quantization_config": config})
    with pytest.raises(ValueError, match="holds dqweight, values that only look quantized"):
        wush.load(tmp_path / "pseudo", shapes())


def test_modelopt(tmp_path):
    tensors, wanted = plain(), {}
    for seed, (name, n) in enumerate({"up": 32, "gate": 8}.items()):
        codes, scales, values = random_layer(n, seed, "F8_E4M3")
        tensors |= {
            f"{name}.weight": codes,
            f"{name}.weight_scale": ("F8_E4M3", scales),
            f"{name}.weight_scale_2": np.float32(0.0013),
            f"{name}.input_scale": np.float32(0.02),
            f"{name}.k_scale": np.float32(1),
        }
        wanted[name] = values * 0.0013
    algorithm = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    extra = [("hf_quant_config.json", {"quantization": algorithm})]
    write_foreign(tmp_path / "model", tensors, {}, extra)
    loaded = check_loaded(tmp_path / "model", wanted)
    np.testing.assert_allclose(loaded.up.input_global_scale[...], 50, rtol=1e-6)
    config = {"quantization_config": {"quant_method": "modelopt", **algorithm}}
    write_foreign(tmp_path / "config", tensors, config)
    check_loaded(tmp_path / "config", wanted)
    config["quantization_config"]["quant_algo"] = "FP8"
    write_foreign(tmp_path / "fp8", tensors, config)
    with pytest.raises(ValueError, match=r"quant_algo='FP8' .* only 'NVFP4'"):
        wush.load(tmp_path / "fp8", shapes())
    config["quantization_config"]["quant_algo"] = "NVFP4"
    tensors["up.pre_quant_scale"] = np.ones(64, "f4")
    write_foreign(tmp_path / "awq", tensors, config)
    with pytest.raises(ValueError, match="scales its input by channel"):
        wush.load(tmp_path / "awq", shapes())


def test_wush_of_its_authors(tmp_path):
    """No records in the config, constants that multiply, a transform a block."""
    blocks = transform("blocks", 64, 16).astype(jnp.bfloat16)
    tensors, wanted = plain(), {}
    for seed, (name, n) in enumerate({"up": 32, "gate": 8}.items()):
        codes, scales, values = random_layer(n, seed, "F8_E4M3")
        tensors |= {
            f"{name}.e2m1": codes,
            f"{name}.scale_quant": ("F8_E4M3", scales),
            f"{name}.transform": blocks,
            f"{name}.weight_global_scale": np.float32(0.1),
            f"{name}.activation_global_scale": np.float32(0.1),
            f"{name}.activation_scale_scale": np.float32(6),
        }
        rows = (values * 0.1).reshape(n, 4, 16)
        wanted[name] = np.einsum("nbi,bij->nbj", rows, blocks.astype("f8")).reshape(n, 64)
    write_foreign(tmp_path / "model", tensors, {"quantization_config": {"quant_method": "wush"}})
    loaded = check_loaded(tmp_path / "model", wanted)
    assert loaded.up.weight_format == NVFP4
    assert loaded.up.global_scale[...] == 10
    assert loaded.up.input_global_scale is None
    tensors["up.activation_scale_scale"] = np.float32(5)
    write_foreign(tmp_path / "rule", tensors, {"quantization_config": {"quant_method": "wush"}})
    with pytest.raises(ValueError, match=r"is not 6\.0: a rule without a name"):
        wush.load(tmp_path / "rule", shapes())


@pytest.mark.parametrize(
    ("version", "bias"),
    [("0.13.0", 125), ("0.12.3.a20251114", 125), ("0.13.1.a20260112", 127), (None, 127)],
)
def test_exponents_of_old_mxfp4_files(version, bias, tmp_path):
    tensors, wanted = plain(), {}
    for seed, (name, n) in enumerate({"up": 32, "gate": 8}.items()):
        codes, scales, values = random_layer(n, seed, "F8_E8M0")
        tensors |= {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales + bias - 127}
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].astype("u1")
        wanted[name] = values
    config = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    } | ({} if version is None else {"version": version})
    write_foreign(tmp_path / "model", tensors, {"quantization_config": config})
    loaded = check_loaded(tmp_path / "model", wanted)
    assert loaded.up.input_format is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"head_dim": 24}, NotImplementedError, "head_dim=24; only a Hadamard"),
        ({"type": "random-hadamard"}, NotImplementedError, "only a Hadamard matrix"),
        ({"randomize": True}, NotImplementedError, "only a Hadamard matrix"),
        ({"apply": [{"location": "output", "targets": ["Linear"]}]}, NotImplementedError, "only a"),
        ({"apply": 3}, ValueError, "transform_config is damaged"),
    ],
)
def test_rotations_that_we_lack_are_refused(change, error, match, tmp_path):
    interchange.export(tmp_path / "model", model(NVFP4, "hadamard", 16), "nvfp4-pack-quantized")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["input"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        wush.load(tmp_path / "model", shapes())


def test_a_rotation_over_all_of_k_and_one_in_the_weights(tmp_path):
    interchange.export(tmp_path / "model", model(NVFP4, "hadamard", 64), "nvfp4-pack-quantized")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    scheme = config["quantization_config"]["transform_config"]["config_groups"]["input"]
    scheme["head_dim"] = None
    file.write_text(json.dumps(config))
    loaded = wush.load(tmp_path / "model", shapes())
    np.testing.assert_allclose(loaded.up.transform[...], hadamard(64), rtol=1e-7)
    scheme["apply"] = scheme["apply"][1:]
    file.write_text(json.dumps(config))
    assert wush.load(tmp_path / "model", shapes()).up.transform is None


def test_unknown_layouts(tmp_path):
    for config in ({"quant_method": "gguf"}, {"quant_method": "compressed-tensors"}, 3):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_foreign(folder, plain(), {"quantization_config": config})
        for read in (interchange.inspect_folder, interchange.read_layers):
            with pytest.raises(ValueError, match="expected one of the layouts wush, fp_quant"):
                read(folder)


# Any shape, any format.


@hypothesis.given(data=st.data())
def test_what_is_exported_comes_back(data, tmp_path_factory):
    layout = data.draw(st.sampled_from(interchange.WRITABLE))
    mx = layout == "mxfp4-pack-quantized" or (
        layout != "nvfp4-pack-quantized" and data.draw(st.booleans())
    )
    fmt = (ROUND_175 if layout == "mxfp4-pack-quantized" else MXFP4) if mx else NVFP4
    n, k = data.draw(st.integers(1, 9)), 64 * data.draw(st.integers(1, 3))
    kinds = ["identity", "hadamard"]
    kinds += ["blocks", "shared"] if layout in ("wush", "fp_quant") else []
    kind, d = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from([16, 64]))
    matrix = transform(kind, k, d, seed=data.draw(st.integers(0, 99)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weight = wush.QuantizedArray(
        random.integers(256, size=(n, k // 2), dtype="u1"),
        random.integers(1, 126, size=(n, k // fmt.group_size), dtype="u1").view(
            jnp.float8_e8m0fnu if mx else jnp.float8_e4m3fn
        ),
        np.float32(fmt.global_scale),
        fmt,
    )
    matrix = None if matrix is None else matrix.astype(jnp.bfloat16)
    packed = wush.PackedWeight(weight, matrix, None, fmt)
    record = record_of("a.b", packed, None if matrix is None else "a.b")
    content = Content({"a.b": packed}, {"a.b": record}, {}, {}, {})
    tensors, config = written(content, LAYOUTS[layout])
    folder = tmp_path_factory.mktemp("any") / "model"
    write_folder(folder, tensors, config)
    (found,) = interchange.read_layers(folder).values()
    assert found.weight.codes.tobytes() == weight.codes.tobytes()
    assert found.weight.scales.tobytes() == weight.scales.tobytes()
    assert found.weight.global_scale == weight.global_scale
    assert found.input_format.rule == fmt.rule
    if matrix is None:
        assert found.transform is None
    else:
        blocks = np.broadcast_to(matrix.astype("f4"), (k // d, d, d))
        again = np.broadcast_to(np.asarray(found.transform, "f4"), (k // d, d, d))
        np.testing.assert_array_equal(again, blocks)


# Looking into folders.


def test_inspect(tmp_path):
    wush.save(tmp_path / "model", model(MXFP4))
    found = interchange.inspect_folder(tmp_path / "model")
    assert (found.layout, found.formats) == ("wush", {"MXFP4/MXFP4": 2})
    tensors = open_file(tmp_path / "model" / "model.safetensors")
    assert (found.tensors, found.bytes) == (len(tensors), sum(len(t[2]) for t in tensors.values()))
    up = next(layer for layer in found.layers if layer.name == "up")
    assert (up.shape, up.transform, up.global_scale) == ((32, 64), "per block 32", 3.0)
    assert up.bytes == sum(len(t[2]) for name, t in tensors.items() if name.startswith("up."))
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    assert "MXFP4/MXFP4" in console.file.getvalue()
    interchange.export(tmp_path / "a", tmp_path / "model", "fp_quant")
    a = interchange.inspect_folder(tmp_path / "a")
    assert [layer.transform for layer in a.layers] == ["per block 32"] * 2
    interchange.export(tmp_path / "c", model(NVFP4, "hadamard"), "nvfp4-pack-quantized")
    c = interchange.inspect_folder(tmp_path / "c")
    assert [layer.transform for layer in c.layers] == ["shared 32"] * 2
