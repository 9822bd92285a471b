"""FP8 folders of ``quant_method`` "fp8": DeepSeek's blocks, and one scale a tensor.

Of a layer with N outputs and K inputs: ``weight`` F8_E4M3 (N, K) and ``weight_scale_inv``, which
multiplies in spite of its name: (N / 128, K / 128) of blocks, or a scalar where
``weight_block_size`` is null. Files of one scale a tensor may call it ``weight_scale``. Stacks of
experts: ``<name>`` (E, N, K) with ``<name>_scale_inv`` (E, N / 128, K / 128).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from wush_jax.models.encodings.codes import Codes, raw
from wush_jax.models.encodings.encoded import (
    BLOCK,
    SCALES,
    EncodedWeight,
    Encoding,
    Headers,
    checked,
    encoded_layers,
    is_block,
    weight_dtype,
)
from wush_jax.models.typed_values import TypedValues
from wush_jax.storage.tensor_folder import TensorFolder

FREE = (
    *("quant_method", "modules_to_not_convert", "ignored_layers", "modules_to_convert"),
    "dequantize",
)


def _claims(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "fp8"


def _block(folder: TensorFolder) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None for one scale a tensor."""
    defaults: dict[str, Any] = {
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None,
    }
    defaults |= {"scale_fmt": "float", "expert_dtype": "fp8", "kv_cache_scheme": None}
    values = TypedValues(folder.config["quantization_config"], defaults)
    values.need("fmt", "e4m3", "float8_e4m3fn")
    values.need("activation_scheme", "dynamic", "static")
    values.need("scale_fmt", "float", "ue8m0")
    values.need("expert_dtype", "fp8")
    block = values.numbers("weight_block_size")
    if block and not is_block(block):
        values.faults.append(f"weight_block_size = {list(block)}, expected {BLOCK}")
    checked(folder, values, FREE)
    return (block[0], block[1]) if block else None


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    size = _block(folder)
    inverse = any(name.endswith("_scale_inv") for name in folder.entries)
    ending, plain = ("_scale_inv", "") if inverse else (".weight_scale", ".weight")
    scheme = folder.config["quantization_config"].get("activation_scheme", "dynamic")

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        codes, scales = f"{name}{plain}", f"{name}{ending}"
        entry = folder.entries.get(codes)
        axes = 2 if codes.endswith(".weight") else 3
        shape = entry.shape if entry is not None and len(entry.shape) == axes else (0,) * axes
        *lead, n, k = shape
        rows, columns = size or (max(n, 1), max(k, 1))
        grid = [(*lead, -(-n // rows), -(-k // columns))]
        grid += [] if size or lead else [(), (1,)]
        wanted: dict[str, Any] = {
            codes: ([jnp.float8_e4m3fn], [shape]),
            scales: ([*SCALES, jnp.float8_e8m0fnu], grid),
        }
        return wanted, {
            "shape": shape,
            "dtype": weight_dtype(folder),
            "element": "e4m3",
            "block": (rows, columns),
            "read": partial(_read, folder, codes, scales, (rows, columns)),
            "inputs": f"e4m3 {scheme}",
        }

    return encoded_layers(folder, ending, describe, plain)


def _read(folder: TensorFolder, name: str, scales: str, block: tuple[int, int]) -> Codes:
    found = raw(folder, scales)
    return Codes(raw(folder, name), found if found.ndim > 1 else found.reshape(1, 1), block)


ENCODING = Encoding(
    "fp8",
    _claims,
    _weights,
    skipped=(".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale"),
    written_by="transformers 5.24 (FineGrainedFP8Config), DeepSeek's and Qwen's releases, AutoFP8",
)
