"""Folders that other programs wrote, and what of theirs is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import decode, open_file, write_file
from layout_tools import hadamard, model, shapes, transform

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4
from wush_jax.solvers.site import effective_weight

pytestmark = pytest.mark.files

weight_of = jax.jit(effective_weight)


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
    config["quantization_config"]["quant_algo"] = "W4A8_AWQ"
    write_foreign(tmp_path / "w4a8", tensors, config)
    with pytest.raises(ValueError, match=r"quant_algo='W4A8_AWQ' .* only 'NVFP4'.*and 'FP8'"):
        wush.load(tmp_path / "w4a8", shapes())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    write_foreign(tmp_path / "fp8", tensors, config)
    with pytest.raises(ValueError, match=r"'up.weight' is uint8 .* expected float8_e4m3fn"):
        wush.load(tmp_path / "fp8", shapes())
    config["quantization_config"] = {"quant_method": "modelopt", **algorithm}
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
        ({"type": "random-matrix"}, NotImplementedError, "only a Hadamard matrix"),
        ({"randomize": True}, NotImplementedError, "only a Hadamard matrix"),
        ({"apply": [{"location": "output", "targets": ["Linear"]}]}, NotImplementedError, "only a"),
        ({"apply": 3}, ValueError, "transform_config is damaged"),
    ],
)
def test_rotations_that_we_lack_are_refused(change, error, match, tmp_path):
    interchange.export(
        tmp_path / "model", model(NVFP4, "hadamard", 16), "nvfp4-pack-quantized", rotated=True
    )
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["input"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        wush.load(tmp_path / "model", shapes())


def test_a_rotation_over_all_of_k_and_one_in_the_weights(tmp_path):
    interchange.export(
        tmp_path / "model", model(NVFP4, "hadamard", 64), "nvfp4-pack-quantized", rotated=True
    )
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    scheme = config["quantization_config"]["transform_config"]["config_groups"]["input"]
    scheme["head_dim"] = None
    file.write_text(json.dumps(config))
    loaded = wush.load(tmp_path / "model", shapes())
    np.testing.assert_allclose(loaded.up.transform[...], hadamard(64), rtol=1e-7)
    scheme["apply"] = scheme["apply"][1:]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"surplus tensors 'gate.input_input.weight'"):
        wush.load(tmp_path / "model", shapes())
    weights = tmp_path / "model" / "model.safetensors"
    tensors = open_file(weights)
    write_file(weights, {n: t for n, t in tensors.items() if "input_input" not in n})
    assert wush.load(tmp_path / "model", shapes()).up.transform is None


@pytest.mark.parametrize(
    ("layout", "fmt", "ending", "byte", "kind"),
    [
        ("nvfp4-pack-quantized", NVFP4, "weight_scale", 0x7F, "NaN"),
        ("nvfp4-pack-quantized", NVFP4, "weight_scale", 0xB0, "negative"),
        ("fp_quant", NVFP4, "scales", 0xFF, "NaN"),
        ("fp_quant", wush.MXFP4, "scales", 0xFF, "NaN"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(layout, fmt, ending, byte, kind, tmp_path):
    interchange.export(tmp_path / "model", model(fmt, "identity"), layout)
    file = tmp_path / "model" / "model.safetensors"
    tensors = open_file(file)
    dtype, shape, data = tensors[f"gate.{ending}"]
    data = bytearray(data)
    data[shape[1] + 1] = byte
    tensors[f"gate.{ending}"] = dtype, shape, bytes(data)
    write_file(file, tensors)
    match = rf"'gate.{ending}' has 1 scales .* in row 1, column 1 \({kind}\)"
    with pytest.raises(ValueError, match=match):
        wush.load(tmp_path / "model", shapes())


def test_unknown_layouts(tmp_path):
    for config in ({"quant_method": "gguf"}, {"quant_method": "compressed-tensors"}, 3):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_foreign(folder, plain(), {"quantization_config": config})
        for read in (interchange.inspect_folder, interchange.read_layers):
            with pytest.raises(ValueError, match="expected one of the layouts wush, fp_quant"):
                read(folder)
