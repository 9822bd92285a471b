"""FP-Quant's layout, as WUSH (early 2026) and MR-GPTQ write it.

Of a layer with N outputs, K inputs, groups of g, blocks of d:

- ``qweight`` U8 (N, K/2); ``scales`` U8, the bits of (N, K/g) E8M0 or E4M3 scales;
- ``forward_hadamard_matrix``: what inputs are multiplied with from the right. (d, d) shared by all
  blocks, or (d, K) with ``T_b^T`` of block b in columns b d to (b + 1) d;
- ``backward_hadamard_matrix``: a copy, for training; written beside (d, K) only, whose reader asks
  for it: vLLM, which reads (d, d), has no place for it;
- ``weight_global_scale``, ``act_global_scale`` F32 (1,): divide.

Exports without real quantization hold ``dqweight`` instead, which is refused.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts import layout as shared
from wush_jax.checkpoints.layouts.faults import (
    Faults,
    as_bfloat16,
    check_format,
    check_fused,
    input_scale,
    only,
    scalar_scale,
)
from wush_jax.checkpoints.layouts.layout import Content, Layout
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import MXFP4, NVFP4
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder
from wush_jax.transforms.linalg import hadamard_matrix

NAME = "fp_quant"
DTYPES = {"mxfp4": MXFP4, "nvfp4": NVFP4}


def _claims(folder: TensorFolder) -> bool:
    return shared.quantization_config(folder).get("quant_method") == NAME


def _records(folder: TensorFolder) -> dict[str, LayerRecord]:
    config = shared.quantization_config(folder)
    dtype, method = config.get("forward_dtype"), config.get("forward_method", "abs_max")
    if dtype not in list(DTYPES) or method != "abs_max":
        raise ValueError(
            f"{folder.path}: forward_dtype={dtype!r} with forward_method={method!r}, expected one "
            f"of {sorted(DTYPES)} with 'abs_max'"
        )
    if any(name.endswith(".dqweight") for name in folder.entries):
        raise ValueError(
            f"{folder.path} holds dqweight, values that only look quantized: export it with real "
            "quantization (qweight and scales)"
        )
    fmt = DTYPES[dtype]
    records, digests = {}, {}
    for name in shared.layer_names(folder, ".qweight"):
        shape = shared.weight_shape(folder, f"{name}.qweight")
        matrix = _matrix(folder, name, shape[1])
        identity = _is_identity(matrix)
        if not identity:
            digests[name] = shared.digest(matrix)
        inputs = shared.read_scalar(folder, f"{name}.act_global_scale")
        records[name] = LayerRecord(
            shape=shape,
            format=fmt,
            input_format=fmt,
            block=None if identity else len(matrix),
            site=None,
            global_scale=float(shared.read_scalar(folder, f"{name}.weight_global_scale")),
            input_global_scale=None if inputs == fmt.global_scale else float(inputs),
        )
    return shared.with_sites(records, digests)


def _matrix(folder: TensorFolder, name: str, k: int) -> np.ndarray:
    """Return ``forward_hadamard_matrix`` as it is stored, (d, d) or (d, K)."""
    key = f"{name}.forward_hadamard_matrix"
    entry = folder.entries.get(key)
    d = entry.shape[0] if entry is not None and entry.shape else 1
    if d < 1 or k % d:
        raise ValueError(f"{folder.path}: tensor {key!r} has blocks of {d}, K is {k}")
    return folder.read(key, [jnp.bfloat16, np.float32], [(d, d), (d, k)])


def _is_identity(matrix: np.ndarray) -> bool:
    d, k = matrix.shape
    return bool((matrix == np.tile(np.eye(d), k // d)).all())


def _read(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
) -> PackedWeight:
    weight = shared.read_weight(
        folder, name, record, place, codes="qweight", scales="scales", stored=np.uint8
    )
    if record.site is not None and transform is None:
        transform = place(
            f"{record.site}.transform", transform_of(_matrix(folder, name, record.shape[1]))
        )
    inputs = shared.place_input_scale(name, record, place)
    return PackedWeight(weight, transform, inputs, record.input_format)


def transform_of(matrix: np.ndarray) -> np.ndarray:
    """Return T_X, (d, d) or (K/d, d, d), of a stored matrix, (d, d) or (d, K).

    >>> bool((transform_of(matrix_of(np.ones((3, 2, 2)))) == 1).all())
    True
    """
    d, k = matrix.shape
    if d == k:
        return np.ascontiguousarray(matrix.T)
    return np.ascontiguousarray(matrix.reshape(d, k // d, d).transpose(1, 2, 0))


def matrix_of(transform: np.ndarray) -> np.ndarray:
    """Undo `transform_of`: ``T_b^T`` side by side."""
    if transform.ndim == 2:
        return np.ascontiguousarray(transform.T)
    d = transform.shape[-1]
    return np.ascontiguousarray(transform.transpose(2, 0, 1).reshape(d, -1))


def _write(content: Content, faults: Faults) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors: dict[str, Any] = {}
    dtypes, blocks, kinds = [], [], []
    fused: dict[str, Any] = {}
    for name, packed in content.layers.items():
        record = content.records[name]
        check_format(name, record.format, [MXFP4, NVFP4], "weight", faults)
        dtype = "mxfp4" if record.format.scale_dtype == "e8m0" else "nvfp4"
        check_format(name, record.input_format, [DTYPES[dtype]], "activation", faults)
        inputs = input_scale(name, record, faults)
        known = record.input_format is not None and record.input_format.rule == MXFP4.rule
        if dtype == "mxfp4" and known and inputs != MXFP4.global_scale:
            faults.add(
                f"rounds MXFP4 inputs at 3, {{layer}} at {inputs}: quantize with "
                "activation_format='same'",
                name,
            )
        if packed.transform is None:
            matrix = np.eye(record.format.group_size, dtype=jnp.bfloat16)
        else:
            matrix = matrix_of(as_bfloat16(name, np.asarray(packed.transform), faults))
        dtypes.append(dtype)
        blocks.append(len(matrix))
        kinds.append(_kind(matrix))
        weight = packed.interchange
        weight_scale = scalar_scale(name, record.global_scale, faults)
        tensors |= {
            f"{name}.qweight": weight.codes,
            f"{name}.scales": shared.bits_of(weight.scales),
            f"{name}.forward_hadamard_matrix": matrix,
            f"{name}.weight_global_scale": np.reshape(weight_scale, 1),
            f"{name}.act_global_scale": np.reshape(inputs, 1),
        }
        if matrix.shape[0] != matrix.shape[1]:
            tensors[f"{name}.backward_hadamard_matrix"] = matrix
        fused[name] = matrix.shape, shared.digest(matrix), float(weight_scale), float(inputs)
    if all(shape[0] == shape[1] for shape, *_ in fused.values()):
        check_fused(fused, "matrix and pair of global scales", faults)
    config = {
        "quant_method": NAME,
        "forward_dtype": only("format", dtypes, faults),
        "forward_method": "abs_max",
        "backward_dtype": "bf16",
        "hadamard_group_size": only("block size", blocks, faults),
        "modules_to_not_convert": content.unquantized,
        "pseudoquantization": False,
        "store_master_weights": False,
        "transform_init": kinds[0] if len(set(kinds)) == 1 else "wush",
    }
    return tensors, config


def _kind(matrix: np.ndarray) -> str:
    if _is_identity(matrix):
        return "identity"
    d, k = matrix.shape
    if d == k and d & (d - 1) == 0:
        hadamard = np.asarray(hadamard_matrix(d), jnp.bfloat16)
        if (matrix == hadamard).all():
            return "hadamard"
    return "wush"


LAYOUT = Layout(
    NAME,
    _claims,
    _records,
    _read,
    _write,
    written_by="FP-Quant, MR-GPTQ; the WUSH authors' code of early 2026",
    skipped=(".backward_hadamard_matrix",),
)
