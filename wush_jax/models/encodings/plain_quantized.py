"""8-bit weights of compressed-tensors: "float-quantized", "int-quantized", "naive-quantized".

Of a layer with N outputs and K inputs: ``weight`` F8_E4M3 or I8 (N, K); ``weight_scale`` of the
whole tensor (1,), of rows (N, 1), of groups (N, K / g) or of blocks; ``weight_zero_point`` I8
likewise where the scheme is not symmetric. ``w = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.models.encodings.codes import Codes, raw
from wush_jax.models.encodings.compressed_schemes import (
    METHOD,
    SKIPPED,
    Scheme,
    fitting,
    read_schemes,
)
from wush_jax.models.encodings.encoded import (
    SCALES,
    EncodedWeight,
    Encoding,
    Headers,
    encoded_layers,
)
from wush_jax.storage.tensor_folder import TensorFolder

FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
STORED = {"e4m3": jnp.float8_e4m3fn, "int8": np.int8}


def _claims(name: str, config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == METHOD and config.get("format") == name


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    schemes = read_schemes(folder, {"float": (8,), "int": (8,)})

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        entry = folder.entries.get(f"{name}.weight")
        n, k = entry.shape if entry is not None and len(entry.shape) == 2 else (0, 0)
        scheme, wanted = fitting(folder, name, schemes, lambda s: _headers(name, s, n, k))
        block = scheme.block(n, k)
        read = partial(_read, folder, name, scheme, block)
        return wanted, {**scheme.fields, "shape": (n, k), "block": block, "read": read}

    return encoded_layers(folder, ".weight_scale", describe)


def _headers(name: str, scheme: Scheme, n: int, k: int) -> Headers:
    grids = scheme.grids(n, k)
    wanted: dict[str, Any] = {
        f"{name}.weight": ([STORED[scheme.element]], [(n, k)]),
        f"{name}.weight_scale": (SCALES, grids),
    }
    if not scheme.symmetric:
        wanted[f"{name}.weight_zero_point"] = ([np.int8], grids)
    return wanted


def _read(folder: TensorFolder, name: str, scheme: Scheme, block: tuple[int, int]) -> Codes:
    codes = raw(folder, f"{name}.weight")
    grid = scheme.grids(*codes.shape)[0]
    scales = raw(folder, f"{name}.weight_scale").reshape(grid)
    zeros = None if scheme.symmetric else raw(folder, f"{name}.weight_zero_point").reshape(grid)
    return Codes(codes, scales, block, zeros)


ENCODINGS = tuple(
    Encoding(
        name,
        partial(_claims, name),
        _weights,
        SKIPPED,
        written_by="compressed-tensors 0.15 to 0.20 (llm-compressor)",
    )
    for name in FORMATS
)
