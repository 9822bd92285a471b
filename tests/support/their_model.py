"""An export of ours run by transformers, its transforms and roundings by compressed-tensors."""

import json
from functools import partial

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.utils import helpers
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.transform.factory.base import TransformBase
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def their_model(folder, dtype=torch.float32):
    """The model of a folder, computing in a type: weights are those that its files mean.

    transformers decompresses weights; compressed-tensors' modules transform the inputs of its
    layers, whose matrices are the files'; and its functions round what comes out of them.
    """
    unpacked = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=unpacked
    ).eval()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["transform_config"].get("config_groups", {})
    for scheme in groups.values():  # weights in the files have theirs
        scheme["apply"] = [a for a in scheme["apply"] if a["location"] == "input"]
    apply_transform_config(model, TransformConfig(config_groups=groups))
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    matrices = {name for name in stored if name.endswith("_input.weight")}
    (scheme,) = QuantizationConfig(**config).config_groups.values()
    for name, module in model.named_modules():
        if isinstance(module, TransformBase):
            module.weight.data = stored[f"{name}.weight"].to(dtype)
            matrices.remove(f"{name}.weight")
        if f"{name}.weight_packed" in stored and scheme.input_activations is not None:
            scale = stored.get(f"{name}.input_global_scale")
            rounded = partial(_rounded, arguments=scheme.input_activations, scale=scale)
            module.register_forward_pre_hook(rounded)  # behind the transform's
    assert not matrices, "matrices that no layer took"
    return model


def _rounded(module, inputs, *, arguments, scale):
    (x,) = inputs
    local, zero = helpers.compute_dynamic_scales_and_zp(x, arguments, module, scale)
    return forward.fake_quantize(x, local, zero, arguments, global_scale=scale)


def logits(model, tokens):
    """float32, on the host."""
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()
