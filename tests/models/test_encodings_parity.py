"""Folders that compressed-tensors wrote, and what transformers makes of encoded folders."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from encoded_folders import CONFIG, LINEARS, float_quantized, fp8
from flax import nnx

import wush_jax as wush
from wush_jax.models.encodings import open_folder

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

pytestmark = [pytest.mark.files, pytest.mark.filterwarnings("ignore")]

WEIGHTS = {
    "int4 groups": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4 zero points": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
    "int4 rows": {"num_bits": 4, "strategy": "channel"},
    "int4 rows, zero points": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "int8 groups": {"num_bits": 8, "strategy": "group", "group_size": 16},
    "float8 rows": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float8 blocks": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [32, 32],
    },
    "int8 activations": {"num_bits": 8, "strategy": "channel", "symmetric": False},
}
TOKENS = np.arange(12)[None] % 16


def small_llama():
    torch.manual_seed(0)
    own = {k: v for k, v in CONFIG.items() if k not in ("torch_dtype", "architectures")}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**own)).to(torch.bfloat16)


def blocks(weight, arguments):
    """A weight as (R, rows, C, columns) of what shares a scale, and whether that is one tensor."""
    n, k = weight.shape
    size = {
        "group": (1, arguments.group_size),
        "channel": (1, k),
        "tensor": (n, k),
        "block": arguments.block_structure,
    }[arguments.strategy]
    return weight.float().reshape(n // size[0], size[0], k // size[1], size[1])


def calibrate(module):
    """Scales and zero points of the extremes, as its own observers would choose them."""
    arguments = module.quantization_scheme.weights
    parts = blocks(module.weight.data, arguments)
    low, high = parts.amin((1, 3)), parts.amax((1, 3))
    scale, zero = calculate_qparams(low, high, arguments)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def written(folder, case):
    """Let compressed-tensors quantize, compress and save a model."""
    model, group = small_llama(), {"targets": ["Linear"], "weights": WEIGHTS[case]}
    if "float8" in case or case == "int8 activations":
        inputs = {"num_bits": 8, "type": WEIGHTS[case].get("type", "int"), "strategy": "token"}
        group["input_activations"] = inputs | {"dynamic": True}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    modules = {n: m for n, m in model.named_modules() if n in LINEARS}
    for module in modules.values():
        calibrate(module)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return {f"{n}.weight": m.weight.data.float().numpy() for n, m in modules.items()}


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_compressed_tensors_wrote(case, tmp_path):
    wanted = written(tmp_path / "model", case)
    folder = open_folder(tmp_path / "model")
    assert set(folder.encoded) == set(wanted)
    for name, weight in wanted.items():
        found = folder.read(name, [jnp.bfloat16], [weight.shape])
        np.testing.assert_array_equal(found.astype("f4"), weight, err_msg=name)


FOLDERS = {
    "int4 groups": (written, {"case": "int4 groups"}),
    "fp8 blocks": (fp8, {}),
    "fp8 blocks of 16": (fp8, {"block": (16, 32)}),
    "float-quantized tensor": (float_quantized, {"strategy": "tensor"}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_transformers_computes_the_same(case, tmp_path):
    """Logits of the same files. It cannot load packed zero points, its own included (5.24)."""
    writer, options = FOLDERS[case]
    writer(tmp_path / "model", **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    wanted = theirs(torch.tensor(TOKENS)).logits.detach().numpy()
    ours = wush.load(tmp_path / "model")
    found = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(ours, TOKENS), np.float32)
    # The first is in bfloat16 here: ten roundings of activations, of 2^-8 each.
    bound = 2e-2 if case == "int4 groups" else 1e-4
    assert np.abs(found - wanted).max() < bound * np.abs(wanted).max()
