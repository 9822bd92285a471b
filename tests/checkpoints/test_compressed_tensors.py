"""Our exports, opened by compressed-tensors and by transformers themselves."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import llama_of, quantized
from flax import nnx
from layout_tools import DERIVED, ROUND_175, model, wide_layer
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.checkpoints.layouts.compressed_tensors import FP8_128
from wush_jax.checkpoints.targets import recipe_for
from wush_jax.formats import NVFP4

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import helpers
    from compressed_tensors.transform import TransformConfig, TransformFactory
    from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "C identity": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "identity"}),
    "C rounded hadamard": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "hadamard"}),
    "C derived": ("nvfp4-pack-quantized", {"fmt": DERIVED, "kind": "hadamard", "d": 16}),
    "C shared": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "shared", "d": 16}),
    "C shared 32": ("nvfp4-pack-quantized", {"fmt": NVFP4, "kind": "shared"}),
    "D identity": ("mxfp4-pack-quantized", {"fmt": ROUND_175, "kind": "identity"}),
    "D hadamard": ("mxfp4-pack-quantized", {"fmt": ROUND_175, "kind": "hadamard", "d": 64}),
}


class Layer:
    """One exported layer in the library's own hands."""

    def __init__(self, folder, name):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        self.config = QuantizationConfig(**config)
        self.scheme = self.config.config_groups["group_0"]
        transforms = config["transform_config"]
        self.transforms = TransformConfig(**transforms) if transforms else None
        tensors = load_file(folder / "model.safetensors")
        prefix = f"{name}."
        self.tensors = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }

    def weight(self):
        """As its compressor gives it: bfloat16."""
        compressor = BaseCompressor.get_value_from_registry(self.config.format)
        names = compressor.compression_param_names(self.scheme)
        assert set(names) <= set(self.tensors)
        return compressor.decompress(dict(self.tensors), self.scheme)["weight"]

    def rotated(self, x):
        """Inputs after the transform at run time."""
        if self.transforms is None:
            return x
        (scheme,) = self.transforms.config_groups.values()
        factory = TransformFactory.from_scheme(scheme, name="input")
        linear = torch.nn.Linear(x.shape[-1], 8, bias=False)
        transform = factory.create_transform(linear, scheme.apply[0])
        stored = self.tensors["input_input.weight"].float()
        if scheme.type == "hadamard":  # what their code makes is what we store
            assert torch.equal(transform.weight.data, stored)
        transform.weight.data = stored
        return transform(x)

    def rounded(self, x):
        """Inputs after quantization, with the static global scale of the file."""
        arguments = self.scheme.input_activations
        scale = self.tensors.get("input_global_scale")
        module = torch.nn.Linear(x.shape[-1], 8)
        local, zero = helpers.compute_dynamic_scales_and_zp(x, arguments, module, scale)
        return forward.fake_quantize(x, local, zero, arguments, global_scale=scale)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_inputs_are_what_we_mean(case, tmp_path):
    layout, options = CASES[case]
    source = model(**options).up.packed
    interchange.export(tmp_path / "model", model(**options), layout, rotated=True)
    layer = Layer(tmp_path / "model", "up")
    weight = layer.weight().float().numpy()
    values = np.asarray(wush.dequantize(source.weight))
    # Scales over the global scale, then values, are rounded to bfloat16: 2^-9 each. The rounding
    # of our transform, at most 2^-9, moves to the global scale.
    np.testing.assert_allclose(weight, values, rtol=3 * 2**-9)
    if layout == "mxfp4-pack-quantized":
        np.testing.assert_array_equal(weight, values)
    x = np.random.default_rng(3).standard_normal((40, 64)).astype("f4")
    ours = x if source.transform is None else wush.apply_transform(x, source.transform)
    theirs = layer.rotated(torch.tensor(x))
    np.testing.assert_allclose(theirs, ours, rtol=2**-8, atol=1e-6)
    scale = source.input_global_scale
    ours = np.asarray(wush.fake_quantize(ours, source.input_format, global_scale=scale))
    theirs = layer.rounded(theirs).numpy()
    # Values next to a boundary of two codes fall either way: a few in a thousand.
    close = np.isclose(theirs, ours, rtol=2**-7, atol=1e-6)
    assert close.mean() > 0.995


def test_their_scheme_for_fp8_activations(tmp_path):
    """MXFP4xFP8: their own preset, and the activations that it rounds to."""
    source = wide_layer(FP8_128)
    interchange.export(tmp_path / "model", nnx.List([source]), "mxfp4-pack-quantized")
    layer = Layer(tmp_path / "model", "0")
    preset = preset_name_to_scheme("MXFP4xFP8", ["Linear"])
    for ours, theirs in (
        (layer.scheme.weights, preset.weights),
        (layer.scheme.input_activations, preset.input_activations),
    ):
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
            assert getattr(ours, key) == getattr(theirs, key)
        assert ours.scale_dtype == theirs.scale_dtype
    np.testing.assert_array_equal(
        layer.weight().float().numpy(), wush.dequantize(source.packed.weight)
    )
    x = np.random.default_rng(3).standard_normal((40, 256)).astype("f4")
    found = layer.rounded(torch.tensor(x)).numpy()
    wanted = np.asarray(wush.fake_quantize(x, FP8_128))
    # Values next to a boundary of two codes fall either way, since the scale is a quotient.
    assert np.isclose(found, wanted, rtol=1e-6, atol=0).mean() > 0.999


@pytest.mark.parametrize(
    ("layout", "fmt"), [("nvfp4-pack-quantized", NVFP4), ("mxfp4-pack-quantized", ROUND_175)]
)
def test_transformers_runs_our_exports(layout, fmt, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    source = llama_of(wush.Recipe(fmt, transform="identity"))
    interchange.export(tmp_path / "model", source, layout, rotated=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16
    )
    tokens = np.random.default_rng(0).integers(16, size=(2, 5))
    with torch.no_grad():
        found = theirs(torch.tensor(tokens)).logits.float().numpy()
    up = theirs.model.layers[0].mlp.up_proj.weight.float().numpy()
    values = np.asarray(wush.dequantize(source.layers[0].mlp.up_proj.packed.weight))
    np.testing.assert_allclose(up, values, rtol=2 * 2**-9)
    wanted = np.asarray(jax.jit(lambda t: source(t))(tokens), np.float32)
    # bfloat16 there, float32 here, and inputs rounded to 4 bits: a difference of one rounding
    # moves a value by up to a quarter. Weights alone differ by far more than this (next line).
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 0.12
    other = np.asarray(jnp.roll(wanted, 1, axis=-1))
    assert np.linalg.norm(other - wanted) / np.linalg.norm(wanted) > 0.5


def test_transformers_runs_a_quantized_head(tmp_path):
    """Not in `ignore`: there transformers would make a head of random values."""
    transformers = pytest.importorskip("transformers", minversion="5")
    recipe = wush.Recipe(NVFP4, None, transform="identity")
    source = quantized(llama_of(recipe), recipe, [["lm_head"]])
    interchange.export(tmp_path / "model", source, "nvfp4-pack-quantized")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16
    )
    tokens = np.random.default_rng(0).integers(16, size=(2, 5))
    with torch.no_grad():
        found = theirs(torch.tensor(tokens)).logits.float().numpy()
    wanted = np.asarray(jax.jit(lambda t: source(t))(tokens), np.float32)
    # bfloat16 there, float32 here; a random head is off by the size of the logits themselves.
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


NV, MX = "nvfp4-pack-quantized", "mxfp4-pack-quantized"


def exact_model(dtype=jnp.bfloat16):
    """Of one layer, every value one of bfloat16."""
    source = random_model(dataclasses.replace(CONFIG, num_hidden_layers=1))
    graph, state = nnx.split(source)
    state = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), state)
    return nnx.merge(graph, state)


@pytest.mark.parametrize("layout", [MX, NV])
def test_wush_with_one_matrix_a_site_end_to_end(layout, tmp_path):
    """Calibrated by us; transformed, rounded and multiplied by their code: the same logits."""
    pytest.importorskip("transformers", minversion="5")
    from their_model import logits, their_model

    recipe = recipe_for(layout, wush.Recipe(), {"shared_blocks": True})
    rules = [("lm_head", None), (".*", recipe)]
    quantized, _ = wush.quantize_model(exact_model(), tokens(1), rules)
    interchange.export(tmp_path / "out", quantized, layout, rotated=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kinds = {s["type"] for s in config["transform_config"]["config_groups"].values()}
    assert kinds == {"random-hadamard"}
    batch = tokens(1, seed=1)[0]
    wanted = np.asarray(nnx.jit(lambda m, t: m(t))(quantized, batch))
    found = logits(their_model(tmp_path / "out"), batch)
    error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    if layout == MX:
        assert error.max() < 1e-5  # float32 sums in another order; no rounding fell otherwise
        return
    # Their weights are rounded to bfloat16 once more, by up to 2^-8, so that inputs of later
    # layers fall into other codes now and then: 0.0015 where none did, 0.2 at most.
    assert np.sort(error.ravel())[3] < 0.005
    assert np.median(error) < 0.15


def test_transformers_loads_a_float32_export(tmp_path):
    """Weights and activations of ours in float32: theirs are of the one type that config names."""
    transformers = pytest.importorskip("transformers", minversion="5")
    source = exact_model(jnp.float32)
    recipe = wush.Recipe(NVFP4, transform="identity")
    quantized, _ = wush.quantize_model(source, tokens(1), [("lm_head", None), (".*", recipe)])
    kinds = {jnp.dtype(quantized.dtype), quantized.embed_tokens.embedding.dtype}
    assert kinds == {jnp.dtype("float32")}
    interchange.export(tmp_path / "out", quantized, NV)
    batch = tokens(1, seed=1)[0]
    wanted = np.asarray(nnx.jit(lambda m, t: m(t))(quantized, batch))
    for dtype in ("auto", torch.bfloat16):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        with torch.no_grad():
            found = theirs(torch.tensor(batch)).logits
        assert found.dtype == torch.bfloat16
        found = found.float().numpy()
        # As above: roundings of inputs that fall otherwise in bfloat16.
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.3
