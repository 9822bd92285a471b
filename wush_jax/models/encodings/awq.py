"""AWQ folders of version "gemm", as AutoAWQ and GPTQModel write them.

Of a layer with N outputs and K inputs, groups of g inputs:

- ``qweight`` I32 (K, N / 8): 4-bit codes from 0 up, eight outputs a word;
- ``scales`` F16 (K / g, N), ``qzeros`` I32 (K / g, N / 8).

``w = (code - zero) * scale``. The nibbles of a word, lowest first, are outputs 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from wush_jax.models.encodings.encoded import (
    SCALES,
    Codes,
    EncodedWeight,
    Encoding,
    Headers,
    checked,
    encoded_layers,
    raw,
)
from wush_jax.models.encodings.integers import unpack
from wush_jax.models.typed_values import TypedValues
from wush_jax.storage.tensor_folder import TensorFolder

# Where outputs 0 to 7 of a word are: the inverse of 0 2 4 6 1 3 5 7.
NIBBLE = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
# How a model was quantized, or is run, and not what its numbers mean.
FREE = (
    *("quant_method", "method", "modules_to_not_convert", "lm_head", "meta", "exllama_config"),
    *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
)


def _claims(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "awq"


def _group(folder: TensorFolder) -> int | None:
    """Return the size of groups, None for all inputs; whatever is not read is refused."""
    config = dict(folder.config["quantization_config"])
    for name in ("version", "format"):  # AutoAWQ writes both "gemm" and "GEMM"
        if isinstance(config.get(name), str):
            config[name] = config[name].lower()
    defaults = {"zero_point": True, "version": "gemm", "format": "gemm", "pack_dtype": "int32"}
    defaults |= {"group_size": 128, "desc_act": False, "sym": False, "backend": "autoawq"}
    values = TypedValues(config, defaults)
    values.need("bits", 4)
    for name in ("version", "format"):
        values.need(name, "gemm")
    values.need("zero_point", True)
    values.need("sym", False)
    values.need("desc_act", False)
    values.need("pack_dtype", "int32")
    values.need("backend", "autoawq", "auto", None)
    group = None if config.get("group_size") == -1 else values.size("group_size")
    checked(folder, values, ("bits", *FREE))
    return group


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    size = _group(folder)

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        shape = folder.entries[f"{name}.qweight"].shape
        k, n = (shape[0], shape[1] * 8) if len(shape) == 2 else (0, 0)
        group = min(size or k, k) or 1
        wanted = {
            f"{name}.qweight": ([np.int32], [(k, n // 8)]),
            f"{name}.scales": (SCALES, [(-(-k // group), n)]),
            f"{name}.qzeros": ([np.int32], [(-(-k // group), n // 8)]),
        }
        read = partial(_read, folder, name, group)
        fields = {"shape": (n, k), "element": "int4", "block": (1, group), "read": read}
        return wanted, fields | {"zero_points": True}

    return encoded_layers(folder, ".qweight", describe)


def _read(folder: TensorFolder, name: str, group: int) -> Codes:
    codes, zeros = (_outputs(raw(folder, f"{name}.{key}")) for key in ("qweight", "qzeros"))
    return Codes(codes, raw(folder, f"{name}.scales").T, (1, group), zeros)


def _outputs(words: np.ndarray) -> np.ndarray:
    """Words (rows, N / 8) as numbers (N, rows)."""
    numbers = unpack(words, 4).reshape(len(words), -1, 8)[..., NIBBLE]
    return numbers.reshape(len(words), -1).T


ENCODING = Encoding("awq", _claims, _weights, written_by='AutoAWQ and GPTQModel, version "gemm"')
