"""Packed whole numbers of compressed-tensors (llm-compressor): format "pack-quantized".

Of a layer with N outputs and K inputs, groups of g inputs (all K for "channel"), b bits:

- ``weight_packed`` I32 (N, K b / 32): codes + 2^(b-1), packed along K; ``weight_shape`` (2,);
- ``weight_scale`` (N, K / g);
- ``weight_zero_point`` I32 (N b / 32, K / g), packed along N, or I8 (N, K / g) as it is; absent
  where the scheme is symmetric;
- ``weight_g_idx`` I32 (K,): each input's group, of versions before 0.20; -1 for the usual order.

``w = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from wush_jax.models.encodings.codes import Codes, group_order, raw
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
from wush_jax.models.encodings.integers import unpack
from wush_jax.storage.tensor_folder import TensorFolder

NAME = "pack-quantized"
WHOLE = (np.int64, np.int32)


def _claims(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == METHOD and config.get("format") == NAME


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    schemes = read_schemes(folder, {"int": (4, 2, 8)})

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        n, k = _shape(folder, name)
        scheme, wanted = fitting(folder, name, schemes, lambda s: _headers(folder, name, s, n, k))
        block = scheme.block(n, k)
        read = partial(_read, folder, name, scheme, block)
        return wanted, {**scheme.fields, "shape": (n, k), "block": block, "read": read}

    return encoded_layers(folder, ".weight_packed", describe)


def _shape(folder: TensorFolder, name: str) -> tuple[int, int]:
    """Return what ``weight_shape`` says; zeros, which fit nothing, where it says nothing."""
    entry = folder.entries.get(f"{name}.weight_shape")
    if entry is None or entry.shape != (2,) or entry.dtype not in WHOLE:
        return 0, 0
    n, k = raw(folder, f"{name}.weight_shape").tolist()
    return (n, k) if 0 < n < 2**31 and 0 < k < 2**31 else (0, 0)


def _headers(folder: TensorFolder, name: str, scheme: Scheme, n: int, k: int) -> Headers:
    bits, grids = scheme.bits, scheme.grids(n, k)
    wanted: dict[str, Any] = {
        f"{name}.weight_packed": ([np.int32], [(n, -(-k * bits // 32))]),
        f"{name}.weight_scale": (SCALES, grids),
        f"{name}.weight_shape": (WHOLE, [(2,)]),
    }
    if not scheme.symmetric:
        packed = (-(-n * bits // 32), grids[0][1])
        entry = folder.entries.get(f"{name}.weight_zero_point")
        plain = entry is not None and entry.dtype == np.int8
        kind: Any = ([np.int8], grids) if plain else ([np.int32], [packed])
        wanted[f"{name}.weight_zero_point"] = kind
    if scheme.reordered or f"{name}.weight_g_idx" in folder.entries:
        wanted[f"{name}.weight_g_idx"] = ([np.int32], [(k,)])
    return wanted


def _read(folder: TensorFolder, name: str, scheme: Scheme, block: tuple[int, int]) -> Codes:
    n, k = _shape(folder, name)
    half = 2 ** (scheme.bits - 1)
    grid = scheme.grids(n, k)[0]
    codes = unpack(raw(folder, f"{name}.weight_packed"), scheme.bits)[:, :k].astype(np.int16)
    zeros = None
    if not scheme.symmetric:
        zeros = raw(folder, f"{name}.weight_zero_point")
        if zeros.dtype == np.int32:
            zeros = unpack(zeros, scheme.bits, axis=0)[:n].astype(np.int16) - half
        zeros = zeros.reshape(grid)
    scales = raw(folder, f"{name}.weight_scale").reshape(grid)
    columns, order = None, f"{name}.weight_g_idx"
    if order in folder.entries and (raw(folder, order) != -1).any():
        columns = group_order(
            folder, order, block[1], reordered=scheme.reordered, remedy="actorder='group'"
        )
    return Codes(codes - half, scales, block, zeros, columns)


ENCODING = Encoding(
    NAME, _claims, _weights, SKIPPED, written_by="compressed-tensors 0.9 to 0.20 (llm-compressor)"
)
