"""A small gpt-oss as released, with MXFP4 experts, and the same model of floating point numbers."""

import dataclasses

import ml_dtypes
import numpy as np
from folders import write
from tiny import CONFIG
from weights import random_model

from wush_jax.models import to_tensors

OSS = dataclasses.replace(
    CONFIG,
    **{"num_hidden_layers": 1, "num_experts": 3, "norm_topk_prob": True, "mlp_bias": True},
    **{"attention_sinks": True, "swiglu_limit": 1.5, "tie_word_embeddings": False},
)


def gpt_oss_tensors():
    """The same model twice: experts in 4 bits as released, and as floating point numbers."""
    rng = np.random.default_rng(0)
    released, plain = {}, {}
    for name, value in to_tensors(random_model(OSS)).items():
        if ".experts." not in name:
            released[name] = plain[name] = value
    experts = "model.layers.0.mlp.experts"
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        codes = rng.integers(16, size=(3, rows, 64), dtype=np.uint8)
        scales = rng.integers(122, 126, size=(3, rows, 2), dtype=np.uint8)
        released[f"{experts}.{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).reshape(
            3, rows, 2, 16
        )
        released[f"{experts}.{name}_scales"] = scales
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        values *= np.repeat(2.0 ** (scales - 127.0), 32, axis=-1)
        plain[f"{experts}.{name}"] = np.ascontiguousarray(values.mT, np.float32)
        bias = rng.standard_normal((3, rows)).astype(np.float32)
        released[f"{experts}.{name}_bias"] = plain[f"{experts}.{name}_bias"] = bias
    return released, plain


def gpt_oss(folder, tensors, files=1):
    """A folder as released."""
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    folder.mkdir(exist_ok=True)
    return write(folder, OSS, tensors, files, quantization_config=quantization)
