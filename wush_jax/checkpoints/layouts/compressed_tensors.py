"""The FP4 layouts of compressed-tensors (llm-compressor, vLLM): NVFP4 and MXFP4.

Of a layer with N outputs and K inputs:

- ``weight_packed`` U8 (N, K/2);
- NVFP4: ``weight_scale`` E4M3 (N, K/16), ``weight_global_scale`` and ``input_global_scale`` F32
  (1,), which divide;
- MXFP4: ``weight_scale`` U8 (N, K/32), the exponent + 127, or + 125 in files of versions before
  0.14 (9 January 2026). No global scale. Activations as the weights, or E4M3 (`FP8_128`).

Transforms are named in ``transform_config``, their matrices beside the layers
(`wush_jax.checkpoints.layouts.transform_config`): one (d, d) for all blocks of a layer.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts import layout as shared
from wush_jax.checkpoints.layouts import transform_config as transforms
from wush_jax.checkpoints.layouts.faults import (
    Faults,
    check_format,
    check_fused,
    input_scale,
    only,
    scalar_scale,
)
from wush_jax.checkpoints.layouts.layout import Content, Layout
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import FP8, MXFP4, NVFP4, Format
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder

METHOD = "compressed-tensors"
NV, MX = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = {
    NV: NVFP4.replace(global_scale=None),
    MX: MXFP4.replace(name="MXFP4_ROUND_175", rule="round_175", global_scale=1.0),
}
# Activations of its scheme MXFP4xFP8: a float32 scale, amax / 448, for a token and 128 columns.
FP8_128 = FP8.replace(
    name="FP8_128", group_size=128, scale_dtype="float32", rule="absmax", short_last=False
)
INPUTS: dict[str, tuple[Format | None, ...]] = {
    NV: (FORMATS[NV], None),
    MX: (FP8_128, FORMATS[MX], None),
}
STORED = {NV: jnp.float8_e4m3fn, MX: np.uint8}
# Files of this version and later hold exponent + 127.
VERSION = "0.14.0"


def _claims(folder: TensorFolder, name: str) -> bool:
    config = shared.quantization_config(folder)
    return config.get("quant_method") == METHOD and config.get("format") == name


def _records(folder: TensorFolder, layout: str) -> dict[str, LayerRecord]:
    fmt, inputs = FORMATS[layout], _input_format(folder, layout)
    schemes = _schemes(folder)
    records, sites = {}, {}
    for name in shared.layer_names(folder, ".weight_packed"):
        shape = shared.weight_shape(folder, f"{name}.weight_packed")
        scheme, d = transforms.scheme_of(schemes, name), None
        if scheme is not None:
            d = scheme.size(shape[1])
            sites[name] = shared.digest(scheme.read(folder, name, shape[1]))
        scales = {"weight_global_scale": 1.0, "input_global_scale": None}
        for key in scales if layout == NV else ():
            if key == "weight_global_scale" or inputs is not None:
                scales[key] = float(shared.read_scalar(folder, f"{name}.{key}"))
            else:
                folder.skip(f"{name}.{key}")
        records[name] = LayerRecord(
            shape=shape,
            format=fmt,
            input_format=inputs,
            block=d,
            site=None,
            global_scale=scales["weight_global_scale"],
            input_global_scale=scales["input_global_scale"],
        )
    return shared.with_sites(records, sites)


def _schemes(folder: TensorFolder) -> list[transforms.Scheme]:
    try:
        return transforms.schemes_from(shared.quantization_config(folder).get("transform_config"))
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{folder.path}: {error}") from error


def _input_format(folder: TensorFolder, layout: str) -> Format | None:
    """Return the format of activations, from the one group of layers in the config."""
    groups = shared.quantization_config(folder).get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"{folder.path}: quantization_config has no config_groups; fetch it again")
    if not all(isinstance(group.get("weights"), dict) for group in groups):
        raise ValueError(
            f"{folder.path}: a group of config_groups in quantization_config has no weights; fetch "
            "the folder again"
        )
    inputs = [group.get("input_activations") for group in groups]
    if any(i != inputs[0] for i in inputs):
        raise NotImplementedError(f"{folder.path}: groups of layers with different inputs")
    if inputs[0] is None:
        return None
    found = inputs[0] if isinstance(inputs[0], dict) else {}
    for fmt in INPUTS[layout]:
        if fmt is not None and _means(found, _arguments(fmt, True)):
            return fmt
    raise NotImplementedError(
        f"{folder.path}: input_activations={inputs[0]!r} of {layout!r} are none of "
        f"{', '.join(fmt.name for fmt in INPUTS[layout] if fmt is not None)}"
    )


def _means(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether arguments say what wanted ones say; of FP4 they may leave out all but the bits."""
    if wanted["num_bits"] == 4:
        keys = ("type", "strategy", "group_size", "symmetric")
        found = {**{key: wanted[key] for key in keys}, **found}
        return all(found.get(key) == wanted[key] for key in ("num_bits", *keys))
    return all(found.get(key) == value for key, value in wanted.items())


def exponent_bias(version: Any) -> int:
    """Return what MXFP4 files of a version add to the exponent.

    A version that is missing, or of another library, has the standard 127.

    >>> exponent_bias("0.13.0"), exponent_bias("0.13.1.a20260112"), exponent_bias("0.14.0")
    (125, 127, 127)
    """
    match = re.match(r"(\d{1,6})\.(\d{1,6})\.?\d*(?:\.?a(\d{8}))?", str(version))
    if match is None:
        return 127
    major, minor, day = (int(part or 0) for part in match.groups())
    return 127 if (major, minor) >= (0, 14) or day >= 20260109 else 125


def _read(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
    layout: str,
) -> PackedWeight:
    missing = 127 - exponent_bias(shared.quantization_config(folder).get("version"))

    def bits(found: np.ndarray) -> np.ndarray:
        if layout == NV or not missing:
            return found
        if (found > 254 - missing).any():
            raise ValueError(f"{folder.path}: '{name}.weight_scale' has exponents beyond float32")
        return found + np.uint8(missing)

    weight = shared.read_weight(
        folder,
        name,
        record,
        place,
        codes="weight_packed",
        scales="weight_scale",
        stored=STORED[layout],
        bits=bits,
    )
    scheme = transforms.scheme_of(_schemes(folder), name)
    if scheme is not None:
        own = scheme.read(folder, name, record.shape[1])
        if transform is None:
            transform = place(f"{record.site}.transform", own)
    inputs = shared.place_input_scale(name, record, place)
    return PackedWeight(weight, transform, inputs, record.input_format)


def _write(content: Content, faults: Faults, layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    fmt = FORMATS[layout]
    tensors: dict[str, Any] = {}
    scales: dict[str, tuple] = {}
    matrices: dict[str, np.ndarray | None] = {}
    formats = []
    for name, packed in content.layers.items():
        record = content.records[name]
        check_format(name, record.format, [fmt], "weight", faults)
        check_format(name, record.input_format, INPUTS[layout], "activation", faults)
        matrices[name] = transforms.one_matrix(name, packed.transform, faults)
        ratio = _ratio(matrices[name])
        formats.append(_kind(record.input_format))
        weight = packed.interchange
        tensors[f"{name}.weight_packed"] = weight.codes
        if layout == MX:
            _check_no_scale(name, record, ratio, faults)
            tensors[f"{name}.weight_scale"] = shared.bits_of(weight.scales)
            continue
        tensors[f"{name}.weight_scale"] = weight.scales
        scales[name] = _global_scales(name, record, ratio, faults)
        for key, value in zip(("weight", "input"), scales[name], strict=True):
            if value is not None:
                tensors[f"{name}.{key}_global_scale"] = np.reshape(np.float32(value), 1)
    check_fused(scales, "global scale", faults)
    check_fused(
        {name: None if m is None else shared.digest(m) for name, m in matrices.items()},
        "transform",
        faults,
    )
    inputs = only("kind of activations", formats, faults)
    more, transform = transforms.written(matrices, content.unquantized)
    return tensors | more, _config(layout, inputs, content.unquantized, transform)


def _kind(fmt: Format | None) -> Format | None:
    """Return what a config says of a format of activations; their scales are tensors."""
    return None if fmt is None else fmt.replace(name="", global_scale=1.0)


def _ratio(values: np.ndarray | None) -> float:
    """Return c of a matrix c H that files mean as H; 1 for all others."""
    return 1.0 if values is None else transforms.ratio_to_hadamard(values) or 1.0


def _global_scales(name: str, record: LayerRecord, ratio: float, faults: Faults) -> tuple[Any, Any]:
    """Return the two scales that undo the rounding of the transform by ``ratio``.

    Files mean the exact matrix H, we may have used c H (H in bfloat16): scales of the weight / c
    and of the inputs * c give the same products.
    """
    weight = scalar_scale(name, record.global_scale, faults) / np.float64(ratio)
    if record.input_format is None:
        return weight, None
    return weight, input_scale(name, record, faults) * np.float64(ratio)


def _check_no_scale(name: str, record: LayerRecord, ratio: float, faults: Faults) -> None:
    """Note what MXFP4 without a global scale cannot hold."""
    inputs = record.input_format
    scale = record.input_global_scale
    scale = inputs.global_scale if scale is None and inputs is not None else scale
    fixed = [record.global_scale] + ([scale] if inputs is not None else [])
    if any(np.ndim(g) or g != 1 for g in fixed):
        faults.add(
            f"has no global scale, {{layer}} divides by {fixed}: quantize with "
            "MXFP4.replace(rule='round_175', global_scale=1.0)",
            name,
        )
    if ratio != 1:
        faults.add(
            f"means the exact Hadamard matrix, that of {{layer}} is rounded by {ratio:.6f}: "
            "quantize with transform_dtype='float32', or blocks of 16 or 64",
            name,
        )


def _arguments(fmt: Format, dynamic: bool | str) -> dict[str, Any]:
    nv = fmt.scale_dtype == "e4m3"
    stored = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
    return {
        "num_bits": fmt.element.bits,
        "type": "float",
        "strategy": "tensor_group" if nv else "group",
        "group_size": fmt.group_size,
        "symmetric": True,
        "dynamic": dynamic,
        "scale_dtype": stored.get(fmt.scale_dtype),
    }


def _config(
    layout: str, inputs: Format | None, ignored: list[str], transform: dict
) -> dict[str, Any]:
    fmt = FORMATS[layout]
    dynamic = "local" if layout == NV else True
    group = {
        "targets": ["Linear"],
        "weights": _arguments(fmt, False),
        "input_activations": None if inputs is None else _arguments(inputs, dynamic),
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": transform,
    }


def _layout(name: str) -> Layout:
    return Layout(
        name,
        lambda folder: _claims(folder, name),
        lambda folder: _records(folder, name),
        lambda *args, **options: _read(*args, layout=name, **options),
        lambda content, faults: _write(content, faults, name),
        skipped=(".k_scale", ".v_scale"),
        written_by="compressed-tensors 0.20 (llm-compressor)",
    )


NVFP4_LAYOUT, MXFP4_LAYOUT = _layout(NV), _layout(MX)
