"""GPTQ folders, as AutoGPTQ and GPTQModel write them.

Of a layer with N outputs and K inputs, groups of g inputs, b bits:

- ``qweight`` I32 (K b / 32, N): codes from 0 up, packed along K;
- ``scales`` F16 or BF16 (K / g, N), ``qzeros`` I32 (K / g, N b / 32), packed along N;
- ``g_idx`` I32 (K,): each input's group, in an order of its own with ``desc_act``.

``w = (code - zero) * scale``. Format "gptq" (v1) stores zero - 1, "gptq_v2" the zero itself.
``dynamic`` gives modules bits, groups and the like of their own, by regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wush_jax.models.encodings.codes import Codes, centred, group_order, raw
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

# How a model was quantized, or is run, and not what its numbers mean.
FREE = (
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse", "meta"),
    *("act_group_aware", "model_name_or_path", "model_file_base_name", "model_seqlen", "dataset"),
    *("tokenizer", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "backend", "use_exllama"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "exllama_config", "use_cuda_fp16"),
    *("disable_exllama", "lm_head", "quant_method", "method", "gptaq", "hessian", "version"),
)


@dataclass(frozen=True)
class _Settings:
    bits: int
    group: int | None  # None: all inputs
    symmetric: bool
    reordered: bool
    first: bool  # version 1


# What an entry of `dynamic` may change that its numbers mean; all else there is how they came.
DYNAMIC = ("bits", "group_size", "sym", "desc_act")
# Regular expressions that cannot run away: no repeated group, few repetitions.
TAME = re.compile(r"(?!.*\)[*+{])(?:[^*+{]*[*+{]){0,6}[^*+{]{0,200}")


def _rules(folder: TensorFolder) -> list[tuple[str, Any]]:
    """Return the regular expressions of ``dynamic`` and the overrides of each; None for plain ones.

    As GPTQModel has it: the first that matches a module's name from its start counts; "-:" leaves
    the module as it is, "+:" and none say what its numbers are.
    """
    found = folder.config["quantization_config"].get("dynamic") or {}
    values, rules = TypedValues({"dynamic": found}, {}), []
    for pattern, change in values.table("dynamic").items():
        plain, regex = pattern.startswith("-:"), re.sub(r"^[-+]:", "", pattern)
        try:
            re.compile(regex)
        except re.error as error:
            values.faults.append(f"dynamic {pattern!r} is no regular expression ({error})")
        if not TAME.fullmatch(regex):
            values.lack(f"dynamic {pattern[:80]!r}", "repeats too much; name the modules")
        if not isinstance(change, Mapping):
            values.faults.append(f"dynamic {pattern!r} = {str(change)[:60]!r}, expected an object")
        rules.append((regex, None if plain else change))
    checked(folder, values, ("dynamic",))
    return rules


def _own_settings(folder: TensorFolder) -> Callable[[str], _Settings]:
    """Return what gives a layer's settings, by name; all are checked here, overrides too."""
    general, found = _settings(folder, {}), []
    for regex, change in _rules(folder):
        own = {key: change[key] for key in DYNAMIC if key in change} if change else {}
        found.append((regex, _settings(folder, own)))

    def own_settings(name: str) -> _Settings:
        return next((own for regex, own in found if re.match(regex, name)), general)

    return own_settings


def _settings(folder: TensorFolder, changes: Mapping[str, Any]) -> _Settings:
    defaults = {"sym": True, "desc_act": False, "pack_dtype": "int32", "group_size": 128}
    values = TypedValues({**folder.config["quantization_config"], **changes}, defaults)
    names = ("checkpoint_format", "format")
    version = next((values.given[n] for n in names if n in values.given), "gptq")
    for name in names:
        values.need(name, "gptq_v2" if version == "gptq_v2" else "gptq")
    values.need("bits", 4, 2, 3, 8)
    values.need("pack_dtype", "int32")
    group = None if values.given.get("group_size") == -1 else values.size("group_size")
    settings = _Settings(
        values.size("bits"), group, values.flag("sym"), values.flag("desc_act"), version == "gptq"
    )
    checked(folder, values, ("bits", "dynamic", *names, *FREE))
    return settings


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    own_settings = _own_settings(folder)

    def describe(name: str) -> tuple[Headers, dict[str, Any]]:
        settings = own_settings(name)
        bits = settings.bits
        shape = folder.entries[f"{name}.qweight"].shape
        k, n = (shape[0] * 32 // bits, shape[1]) if len(shape) == 2 else (0, 0)
        group = min(settings.group or k, k) or 1
        groups = -(-k // group)
        wanted: dict[str, Any] = {
            f"{name}.qweight": ([np.int32], [(k * bits // 32, n)]),
            f"{name}.scales": (SCALES, [(groups, n)]),
            f"{name}.qzeros": ([np.int32], [(groups, n * bits // 32)]),
        }
        if settings.reordered or f"{name}.g_idx" in folder.entries:
            wanted[f"{name}.g_idx"] = ([np.int32], [(k,)])
        return wanted, {
            "shape": (n, k),
            "element": f"int{bits}",
            "block": (1, group),
            "read": partial(_read, folder, name, settings, group),
            "zero_points": not settings.symmetric,
            "reordered": settings.reordered,
        }

    return encoded_layers(folder, ".qweight", describe)


def _read(folder: TensorFolder, name: str, settings: _Settings, group: int) -> Codes:
    bits = settings.bits
    half, top = 2 ** (bits - 1), 2**bits - 1
    codes = unpack(raw(folder, f"{name}.qweight"), bits, axis=0).T.astype(np.int16)
    zeros = unpack(raw(folder, f"{name}.qzeros"), bits).T.astype(np.int16)
    if settings.first:
        if (zeros == top).any():
            raise ValueError(
                f"{folder.path}: '{name}.qzeros' holds {top}, which readers of checkpoint_format="
                f"'gptq' take for 0, for {top + 1} or spill into the next one; save the model as "
                "'gptq_v2'"
            )
        zeros += 1
    columns, order = None, f"{name}.g_idx"
    if order in folder.entries:
        columns = group_order(
            folder, order, group, reordered=settings.reordered, remedy="desc_act=true"
        )
    scales = raw(folder, f"{name}.scales").T
    if not settings.symmetric:
        return Codes(codes, scales, (1, group), zeros, columns)
    said = "sym=true", "say sym=false, or another checkpoint_format, in quantization_config"
    codes = centred(folder, f"{name}.qzeros", codes, zeros, half, said)
    return Codes(codes, scales, (1, group), None, columns)


def _claims(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "gptq"


ENCODING = Encoding(
    "gptq", _claims, _weights, written_by="GPTQModel 7.7 and AutoGPTQ, formats gptq and gptq_v2"
)
