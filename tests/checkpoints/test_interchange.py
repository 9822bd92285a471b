"""Exports to other layouts and back, against readers of our own."""

import io
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import llama_of, open_file, write_file
from checkpoint_tools import pair as native_pair
from flax import nnx
from layout_tools import DERIVED, ROUND_175, effective, model, shapes, transform, wide_layer
from rich.console import Console

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.checkpoints.content import written
from wush_jax.checkpoints.layouts import LAYOUTS
from wush_jax.checkpoints.layouts.compressed_tensors import FP8_128
from wush_jax.checkpoints.layouts.layout import Content
from wush_jax.checkpoints.packed_layout import record_of
from wush_jax.formats import INT4, MXFP4, NVFP4
from wush_jax.solvers.site import effective_weight
from wush_jax.storage.folder_writer import write_folder

pytestmark = pytest.mark.files

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
    "C shared": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "shared"}),
    "D shared": ("mxfp4-pack-quantized", {"fmt": ROUND_175, "kind": "shared", "d": 64}),
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


@jax.jit
def outputs(x, up, gate):
    """Effective weights and products of both layers."""
    dot = lambda packed: wush.quantized_dot(x, packed, implementation="reference")  # noqa: E731
    return effective_weight(up), effective_weight(gate), dot(up), dot(gate)


@pytest.mark.parametrize("case", BOTH)
def test_exports_mean_the_same_weights(case, tmp_path):
    layout, options = BOTH[case]
    source = model(**options)
    interchange.export(tmp_path / "out", source, layout, rotated=True)
    wush.save(tmp_path / "native", source)
    interchange.export(tmp_path / "again", tmp_path / "native", layout, rotated=True)
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


def one_wide():
    return nnx.eval_shape(lambda: nnx.List([nnx.Linear(256, 8, use_bias=False, rngs=nnx.Rngs(0))]))


def test_fp8_activations_of_another_layout(tmp_path):
    source = wide_layer(FP8_128)
    interchange.export(tmp_path / "out", nnx.List([source]), "mxfp4-pack-quantized")
    loaded = wush.load(tmp_path / "out", one_wide(), implementation="reference")
    assert loaded[0].input_format == FP8_128
    for name in ("codes", "scales"):
        found, wanted = (getattr(m.packed.weight, name) for m in (loaded[0], source))
        assert found.tobytes() == wanted.tobytes()
    file = tmp_path / "out" / "config.json"
    text = file.read_text()
    for key, value in (
        ("group_size", 64),
        ("strategy", "token"),
        ("num_bits", 6),
        ("type", "int"),
        ("dynamic", False),
        ("scale_dtype", "torch.uint8"),
    ):
        config = json.loads(text)
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"][key] = value
        file.write_text(json.dumps(config))
        with pytest.raises(NotImplementedError, match=r"input_activations=.*none of .*FP8_128"):
            wush.load(tmp_path / "out", one_wide())


@pytest.mark.parametrize(
    ("fmt", "inputs", "layout", "match"),
    [
        (ROUND_175, wush.FP8, "mxfp4-pack-quantized", "activation formats .*groups of 128"),
        (NVFP4, wush.FP8, "nvfp4-pack-quantized", "activation formats .*groups of 16"),
        (MXFP4, wush.FP8, "fp_quant", "activation formats"),
        (wush.NVINT4, "same", "nvfp4-pack-quantized", "weight formats .*has NVINT4"),
        (wush.NVINT4, "same", "mxfp4-pack-quantized", "weight formats .*has NVINT4"),
        (wush.NVINT4, "same", "fp_quant", "NVINT4"),
    ],
)
def test_what_other_layouts_cannot_hold_is_refused(fmt, inputs, layout, match, tmp_path):
    source = nnx.List([wide_layer(inputs, fmt)])
    with pytest.raises(ValueError, match=match):
        interchange.export(tmp_path / "out", source, layout)
    assert not (tmp_path / "out").exists()
    wush.save(tmp_path / "native", source)
    loaded = wush.load(tmp_path / "native", one_wide(), implementation="reference")
    assert loaded[0].packed.weight.format == fmt
    assert loaded[0].input_format == source[0].input_format


def test_through_every_layout(tmp_path):
    """Native to C to A to B to native: the same weights."""
    source = model(NVFP4, "hadamard", 16)
    wush.save(tmp_path / "0", source)
    for step, layout in enumerate(("nvfp4-pack-quantized", "fp_quant", "wush")):
        interchange.export(tmp_path / str(step + 1), tmp_path / str(step), layout, rotated=True)
    found = effective(tmp_path / "3", "up")
    np.testing.assert_array_equal(found, effective(tmp_path / "0", "up"))
    loaded = wush.load(tmp_path / "3", shapes())
    assert loaded.up.input_format.rule == "absmax"
    config = json.loads((tmp_path / "3" / "config.json").read_text())["quantization_config"]
    assert config["metadata"] == {"converted_from": "fp_quant"}


@pytest.mark.parametrize(("layout", "fmt"), [("fp_quant", MXFP4), ("nvfp4-pack-quantized", NVFP4)])
def test_a_llama_of_another_layout_needs_no_model(layout, fmt, tmp_path):
    source = llama_of(wush.Recipe(fmt, transform="identity"))
    interchange.export(tmp_path / "out", source, layout, rotated=True)
    loaded = wush.load(tmp_path / "out")
    tokens = np.arange(10).reshape(2, 5)
    run = nnx.jit(lambda m, t: m(t))  # one program: bit for bit
    wanted, found = run(source, tokens), run(loaded, tokens)
    np.testing.assert_array_equal(found, wanted)
    assert loaded.layers[0].mlp.up_proj.transform is None
    assert loaded.lm_head.kernel.dtype == jnp.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert config["wush_activation_dtype"] == "float32"
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
        interchange.export(tmp_path / "out", model(**options), layout, rotated=True)
    assert not (tmp_path / "out").exists()


def rename(folder, names, config):
    """Call the layers of a native folder otherwise, in its tensors and its config."""
    tensors = open_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {key.replace(f"{old}.", f"{new}."): value for key, value in tensors.items()}
        config = config.replace(f'"{old}"', f'"{new}"')
    write_file(folder / "model.safetensors", tensors)
    changed = json.loads(config)
    del changed["quantization_config"]["digest"]  # of the names before
    (folder / "config.json").write_text(json.dumps(changed))


def test_layers_that_readers_fuse_need_one_scale(tmp_path):
    source = nnx.merge(*nnx.split(model(DERIVED, "identity", inputs=None)))
    wush.save(tmp_path / "model", source)
    config = (tmp_path / "model" / "config.json").read_text()
    rename(tmp_path / "model", {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}, config)
    interchange.export(tmp_path / "equal", tmp_path / "model", "nvfp4-pack-quantized", rotated=True)
    other = source.up.global_scale[...] * 2
    source.up.global_scale.set_value(other)
    wush.save(tmp_path / "other", source)
    config = (tmp_path / "other" / "config.json").read_text()
    rename(tmp_path / "other", {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}, config)
    match = r"one global scale for mlp\.\w+_proj, mlp\.\w+_proj: use share_transform=True"
    with pytest.raises(ValueError, match=match):
        interchange.export(
            tmp_path / "out", tmp_path / "other", "nvfp4-pack-quantized", rotated=True
        )


def test_layers_that_differ_are_refused(tmp_path):
    source = nnx.merge(*nnx.split(model(MXFP4)))
    source.up = model(NVFP4).up
    with pytest.raises(ValueError, match="one format for all layers, the model has"):
        interchange.export(tmp_path / "out", source, "fp_quant")
    source.up = model(MXFP4, "identity").up
    source.gate = model(MXFP4, "shared", 64).gate
    with pytest.raises(ValueError, match="one block size for all layers"):
        interchange.export(tmp_path / "out", source, "fp_quant")


# Any shape, any format.


@hypothesis.given(data=st.data())
def test_what_is_exported_comes_back(data, tmp_path_factory):
    layout = data.draw(st.sampled_from(interchange.WRITABLE))
    mx = layout == "mxfp4-pack-quantized" or (
        layout != "nvfp4-pack-quantized" and data.draw(st.booleans())
    )
    fmt = (ROUND_175 if layout == "mxfp4-pack-quantized" else MXFP4) if mx else NVFP4
    n, k = data.draw(st.integers(1, 9)), 64 * data.draw(st.integers(1, 3))
    kinds = ["identity", "hadamard", "shared"]
    kinds += ["blocks"] if layout in ("wush", "fp_quant") else []
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
    # The copy of the matrix that is there for training is none of the layer's; the file has it.
    sizes = {layer.name: layer.bytes for layer in a.layers}
    matrix = 2 * 32 * 32 * 2
    stored = open_file(tmp_path / "a" / "model.safetensors")
    whole = {n: sum(len(t[2]) for k, t in stored.items() if k.startswith(f"{n}.")) for n in sizes}
    assert sizes == {name: size - matrix for name, size in whole.items()}
    assert a.bytes == sum(len(t[2]) for t in stored.values())
    interchange.export(
        tmp_path / "c", model(NVFP4, "hadamard"), "nvfp4-pack-quantized", rotated=True
    )
    c = interchange.inspect_folder(tmp_path / "c")
    assert [layer.transform for layer in c.layers] == ["shared 32"] * 2
