"""AWQ folders of versions "gemm" and "gemv", as AutoAWQ and GPTQModel write them.

Of a layer with N outputs and K inputs, groups of g inputs, version "gemm":

- ``qweight`` I32 (K, N / 8): 4-bit codes from 0 up, eight outputs a word;
- ``scales`` F16 (K / g, N), ``qzeros`` I32 (K / g, N / 8).

The nibbles of a word, lowest first, are outputs 0 2 4 6 1 3 5 7. Version "gemv":

- ``qweight`` I32 (N, K / 8), ``qzeros`` I32 (N, G / 8), ``scales`` F16 (N, G), all in order, where
  G is K / g and what fills words up, to a multiple of 32 for g = 32, of 16 for g = 64, else of 8.

``w = (code - zero) * scale``. Without ``zero_point`` all zeros are 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from wush_jax.models.encodings.codes import Codes, centred, raw
from wush_jax.models.encodings.encoded import (
    SCALES,
    EncodedWeight,
    Encoding,
    Headers,
    checked,
    encoded_layers,
)
from wush_jax.models.encodings.integers import unpack
from wush_jax.models.typed_values import TypedValues
from wush_jax.storage.tensor_folder import TensorFolder

# Where outputs 0 to 7 of a word are: the inverse of 0 2 4 6 1 3 5 7.
NIBBLE = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
VERSIONS = ("version", "format", "checkpoint_format")
# How a model was quantized, or is run, and not what its numbers mean.
FREE = (
    *("quant_method", "method", "modules_to_not_convert", "lm_head", "meta", "exllama_config"),
    "sym",  # of the class that transformers derives AWQ's config from; zero_point says it
    *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
)


def _claims(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "awq"


def _settings(folder: TensorFolder) -> tuple[int | None, bool, bool]:
    """Return the size of groups, None for all inputs, whether there are zero points, and for gemv.

    Whatever is not read is refused.
    """
    config = dict(folder.config["quantization_config"])
    for name in VERSIONS:  # AutoAWQ writes both "gemm" and "GEMM"
        if isinstance(config.get(name), str):
            config[name] = config[name].lower()
    defaults = {"zero_point": True, **dict.fromkeys(VERSIONS), "pack_dtype": "int32"}
    defaults |= {"group_size": 128, "desc_act": False, "backend": "autoawq"}
    values = TypedValues(config, defaults)
    values.need("bits", 4)
    rows = config.get("version", config.get("format")) == "gemv"
    wanted = "gemv" if rows else "gemm"
    for name in VERSIONS:
        if config.get(name, wanted) != wanted:
            values.lack(
                f"{name} = {config[name]!r}",
                'is not read (the order of one GPU\'s kernel); have AutoAWQ save it as "gemm"',
            )
    zero_points = values.flag("zero_point")
    values.need("desc_act", False)
    values.need("pack_dtype", "int32")
    values.need("backend", "autoawq", "auto", None)
    group = None if config.get("group_size") == -1 else values.size("group_size")
    if rows and group is not None and group < 128 and group not in (32, 64):
        values.lack(f"group_size = {group}", 'is none of version "gemv"')
    checked(folder, values, ("bits", *FREE))
    return group, zero_points, rows


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    size, zero_points, rows = _settings(folder)

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        shape = folder.entries[f"{name}.qweight"].shape
        shape = shape if len(shape) == 2 else (0, 0)
        n, k = (shape[0], shape[1] * 8) if rows else (shape[1] * 8, shape[0])
        group = min(size or k, k) or 1
        grid = (n, padded(k, group)) if rows else (-(-k // group), n)
        wanted = {
            f"{name}.qweight": ([np.int32], [(n, k // 8) if rows else (k, n // 8)]),
            f"{name}.scales": (SCALES, [grid]),
            f"{name}.qzeros": ([np.int32], [(grid[0], grid[1] // 8)]),
        }
        read = partial(_read_rows if rows else _read, folder, name, group, zero_points)
        fields = {"shape": (n, k), "element": "int4", "block": (1, group), "read": read}
        return wanted, fields | {"zero_points": zero_points}

    return encoded_layers(folder, ".qweight", describe)


def _read(folder: TensorFolder, name: str, group: int, zero_points: bool) -> Codes:
    codes, zeros = (outputs_of(raw(folder, f"{name}.{key}")) for key in ("qweight", "qzeros"))
    return _codes(folder, name, group, zero_points, codes, zeros, raw(folder, f"{name}.scales").T)


def _read_rows(folder: TensorFolder, name: str, group: int, zero_points: bool) -> Codes:
    codes, zeros = (unpack(raw(folder, f"{name}.{key}"), 4) for key in ("qweight", "qzeros"))
    groups = codes.shape[1] // group  # what fills words up means nothing
    scales = raw(folder, f"{name}.scales")[:, :groups]
    return _codes(folder, name, group, zero_points, codes, zeros[:, :groups], scales)


def padded(k: int, group: int) -> int:
    """Return how many groups a row has in version "gemv", those that fill words up included.

    >>> padded(4096, 128), padded(96, 32), padded(192, 64)
    (32, 32, 16)
    """
    multiple = {32: 32, 64: 16}.get(group, 8)
    return -(-(k // group) // multiple) * multiple


def _codes(
    folder: TensorFolder,
    name: str,
    group: int,
    zero_points: bool,
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
) -> Codes:
    if zero_points:
        return Codes(codes, scales, (1, group), zeros)
    said = "zero_point=false", "write zero_point=true into quantization_config"
    codes = centred(folder, f"{name}.qzeros", codes, zeros, 8, said)
    return Codes(codes, scales, (1, group))


def outputs_of(words: np.ndarray) -> np.ndarray:
    """Return the numbers (N, rows) in words (rows, N / 8).

    >>> outputs_of(np.int32([[0x75316420]]))[:, 0].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    numbers = unpack(words, 4).reshape(len(words), -1, 8)[..., NIBBLE]
    return numbers.reshape(len(words), -1).T


ENCODING = Encoding(
    "awq",
    _claims,
    _weights,
    written_by='GPTQModel 7.7 and AutoAWQ 0.2.9, versions "gemm" and "gemv"',
)
