"""NVIDIA ModelOpt's FP8: ``quant_algo`` "FP8", one scale a tensor.

Of a layer with N outputs and K inputs: ``weight`` F8_E4M3 (N, K), ``weight_scale`` F32 of one
value, which multiplies, and ``input_scale`` of the activations. The same library's NVFP4 stays
packed (`wush_jax.checkpoints.layouts.modelopt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.models.encodings.codes import Codes, raw
from wush_jax.models.encodings.encoded import (
    EncodedWeight,
    Encoding,
    Headers,
    checked,
    encoded_layers,
    weight_dtype,
)
from wush_jax.models.encodings.said_elsewhere import MODELOPT
from wush_jax.models.typed_values import TypedValues
from wush_jax.storage.tensor_folder import TensorFolder

ALGORITHM = "FP8"
# What is left out of it, who wrote it, and caches, which stay as they are here.
FREE = (
    *("quant_method", "quant_algo", "exclude_modules", "ignore", "producer", "quant_library"),
    *("kv_cache_quant_algo", "kv_cache_scheme", "config_groups"),
)


def _claims(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == MODELOPT and config.get("quant_algo") == ALGORITHM


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    values = TypedValues(folder.config["quantization_config"], {"group_size": None})
    values.need("group_size", None)
    for name, group in values.table("config_groups").items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        own = TypedValues(weights if isinstance(weights, Mapping) else {}, {"type": "float"})
        own.need("num_bits", 8)
        own.need("type", "float")
        values.faults += [f"config_groups {name!r}: {fault}" for fault in own.lacking]
    checked(folder, values, FREE)

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        entry = folder.entries.get(f"{name}.weight")
        n, k = entry.shape if entry is not None and len(entry.shape) == 2 else (0, 0)
        single: list[tuple[int, ...]] = [(), (1,)]
        wanted: dict[str, Any] = {
            f"{name}.weight": ([jnp.float8_e4m3fn], [(n, k)]),
            f"{name}.weight_scale": ([np.float32], single),
            f"{name}.input_scale": ([np.float32], single),
        }
        return wanted, {
            "shape": (n, k),
            "dtype": weight_dtype(folder),
            "element": "e4m3",
            "block": (max(n, 1), max(k, 1)),
            "read": partial(_read, folder, name),
            "inputs": "e4m3 static",
        }

    return encoded_layers(folder, ".weight_scale", describe)


def _read(folder: TensorFolder, name: str) -> Codes:
    codes = raw(folder, f"{name}.weight")
    return Codes(codes, raw(folder, f"{name}.weight_scale").reshape(1, 1), codes.shape)


ENCODING = Encoding(
    "modelopt-fp8",
    _claims,
    _weights,
    skipped=(".k_scale", ".v_scale"),
    written_by="NVIDIA ModelOpt 0.47, FP8 of one scale a tensor",
)
