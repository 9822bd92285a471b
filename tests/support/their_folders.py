"""Folders of a small Llama that other libraries write, and the weights that they decode of them.

Each writer takes a folder and a case's options, and returns the decoded weights by name, as the
library's own code has them. What a library needs is imported when it is asked to write.
"""

import os

import numpy as np
import pytest
import torch
from encoded_folders import CONFIG, LINEARS, plain, write
from safetensors.torch import load_file, save_file

TOKENS = 16


def small_llama(dtype=torch.bfloat16):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    own = {k: v for k, v in CONFIG.items() if k not in ("torch_dtype", "architectures")}
    config = transformers.LlamaConfig(**own, architectures=CONFIG["architectures"])
    return transformers.LlamaForCausalLM(config).to(dtype)


def linears(model):
    return {name: module for name, module in model.named_modules() if name in LINEARS}


def values(modules):
    return {f"{name}.weight": m.weight.data.float().numpy() for name, m in modules.items()}


# compressed-tensors


def blocks(weight, arguments):
    """A weight as (R, rows, C, columns) of what shares a scale, and whether that is one tensor."""
    n, k = weight.shape
    size = {
        "group": (1, arguments.group_size),
        "tensor_group": (1, arguments.group_size),
        "channel": (1, k),
        "tensor": (n, k),
        "block": arguments.block_structure,
    }[arguments.strategy]
    return weight.float().reshape(n // size[0], size[0], k // size[1], size[1])


def calibrate(module):
    """Scales and zero points of the extremes, as its own observers would choose them."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = module.quantization_scheme.weights
    parts, least, most = blocks(module.weight.data, arguments), None, None
    low, high = parts.amin((1, 3)), parts.amax((1, 3))
    options = {}
    if arguments.strategy == "tensor_group":
        least, most = module.weight.data.min(), module.weight.data.max()
        options["global_scale"] = generate_gparam(least.float(), most.float())
        module.weight_global_scale.data.copy_(options["global_scale"])
    scale, zero = calculate_qparams(low, high, arguments, **options)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def compressed_tensors(folder, *, inputs=None, **weights):
    """Let compressed-tensors quantize, compress and save a model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    model, group = small_llama(), {"targets": ["Linear"], "weights": weights}
    if inputs is not None:
        group["input_activations"] = inputs
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    modules = linears(model)
    for module in modules.values():
        calibrate(module)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return values(modules)


# transformers


def finegrained_fp8(folder, *, block=(32, 32), stack=None, **fields):
    """Weights as transformers' conversions write and decode them; ``stack`` names one of them."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = transformers.FineGrainedFP8Config(weight_block_size=block, **fields)
    quantizer = type("Quantizer", (), {"quantization_config": config})()
    weights = {f"{name}.weight": m.weight.data for name, m in linears(small_llama()).items()}
    if stack is not None:
        weights[stack] = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(1))
    tensors, wanted = {}, {}
    for name, weight in weights.items():
        made = module.Fp8Quantize(quantizer).convert({name: weight})
        tensors |= made
        back = module.Fp8Dequantize(quantizer)
        wanted[name] = back._dequantize_one(*made.values(), torch.float32).numpy()
    kept = {n: torch.tensor(t.astype(np.float32)).bfloat16() for n, t in plain().items()}
    write(folder, {}, config.to_dict(), torch_dtype="bfloat16")
    save_file(kept | tensors, folder / "model.safetensors")
    return wanted


# AutoAWQ


def auto_awq(folder, *, version="gemm", group=32):
    """Layers as AutoAWQ packs them, from its own rounding with zero points."""
    pytest.importorskip("awq")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.quantize.quantizer import AwqQuantizer

    rounding = type("Rounding", (), {"group_size": group, "zero_point": True, "w_bit": 4})()
    kept = {n: torch.tensor(t.astype(np.float16)) for n, t in plain().items()}
    wanted = {}
    for name, module in linears(small_llama(torch.float16)).items():
        found = AwqQuantizer.pseudo_quantize_tensor(rounding, module.weight.data)
        module.weight.data, scales, zeros = found
        wanted[f"{name}.weight"] = module.weight.data.float().numpy()
        kind, turn = (WQLinear_GEMV, False) if version == "gemv" else (WQLinear_GEMM, True)
        scales, zeros = (x.t().contiguous() if turn else x for x in (scales, zeros))
        packed = kind.from_linear(module, 4, group, scales=scales, zeros=zeros)
        kept |= {f"{name}.{key}": value for key, value in packed.state_dict().items()}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    write(folder, {}, config | {"version": version, "modules_to_not_convert": None})
    save_file({n: t.contiguous() for n, t in kept.items()}, folder / "model.safetensors")
    return wanted


# NVIDIA ModelOpt


def modelopt(folder, *, config):
    """Quantized, calibrated and exported by ModelOpt; its own tensor classes decode."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    tokens = torch.arange(TOKENS)[None]
    model = mtq.quantize(small_llama(), getattr(mtq, config), lambda model: model(tokens))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
    stored, wanted = load_file(folder / "model.safetensors"), {}
    for name, shape in LINEARS.items():
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        if config.startswith("FP8"):
            decoded = FP8QTensor(torch.Size(shape), torch.float32, weight).dequantize(scale=scale)
        else:
            tensor = NVFP4QTensor(torch.Size(shape), torch.float32, weight)
            double = stored[f"{name}.weight_scale_2"]
            decoded = tensor.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
        wanted[f"{name}.weight"] = decoded.float().numpy()
    return wanted


# GPTQModel


def gptq_model(folder, **config):
    """Quantized with calibration and saved by GPTQModel; its torch layers decode."""
    # It stops where there are two cores, and compiles C++ for minutes.
    os.environ |= {"GPTQMODEL_CPU_WORKERS": "4", "GPTQMODEL_DISABLE_PACK_EXT": "1"}
    library = pytest.importorskip("gptqmodel")
    source = folder.with_name(f"{folder.name}-source")
    small_llama(torch.float16).save_pretrained(source)
    _save_tokenizer(source)
    options = library.QuantizeConfig(bits=4, group_size=32, device="cpu", **config)
    model = library.GPTQModel.load(str(source), options, dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(TOKENS, (8, 32), generator=generator).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * 32} for row in rows], batch_size=1)
    model.save(str(folder))
    options = {"device": "cpu", "backend": library.BACKEND.TORCH, "dtype": torch.float16}
    loaded = library.GPTQModel.load(str(folder), **options)
    wanted = {}
    for name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            weight = module.dequantize_weight().T
            wanted[f"{name}.weight"] = weight.float().numpy()
    return wanted


def _save_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(TOKENS)}, unk_token="0")
    options = {"unk_token": "0", "pad_token": "1", "eos_token": "2"}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **options)
    made.save_pretrained(folder)
