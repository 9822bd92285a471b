"""One quantized layer as named tensors, and back: the native layout.

Of a layer called ``<name>``, N outputs, K inputs, groups of g, blocks of d:

- ``<name>.e2m1`` U8 (N, K/2): two codes a byte, the even column in the low nibble;
  ``<name>.codes`` U8 (N, K * bits / 8) for elements other than E2M1;
- ``<name>.scale_quant`` (N, K/g): F8_E8M0, F8_E4M3, BF16 or F32, as the format has it;
- ``<name>.transform`` T_X, BF16 or F32 (K/d, d, d), or (d, d) shared by all blocks, applied as
  ``x_b @ T_b^T``; absent for the identity; repeated in every layer of a site;
- ``<name>.weight_global_scale`` F32 []: multiplies, ``value = code * scale * weight_global_scale``;
- ``<name>.activation_global_scale`` F32 []: likewise; absent where it follows from each input;
- ``<name>.activation_scale_scale`` F32 []: see `activation_scale_scale`.

Layers of several kernels, such as experts, have their axes in front of all of these shapes.

What tensors cannot say is in the layer's `wush_jax.checkpoints.quantization_config.LayerRecord`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.quantization_config import LayerRecord, is_scale
from wush_jax.formats import Format, QuantizedArray
from wush_jax.formats.elements import E2M1, FloatElement
from wush_jax.formats.format import SCALE_DTYPES
from wush_jax.formats.scales import POW2_RULES, SIGNED_RULES
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.tensor_folder import TensorFolder

Place = Callable[[str, np.ndarray], jax.Array]


def activation_scale_scale(fmt: Format) -> float | None:
    """Return what turns a group's largest magnitude into its scale.

    ``scale = nearest(amax / (activation_global_scale * activation_scale_scale))`` with "nearest" in
    the type of the scales. For `absmax` that is the magnitude on which amax lands (6 for NVFP4).
    For powers of two it makes up for rules that do not round to nearest: 4 for MXFP4, since
    ``2**floor(log2 a) = nearest(3/4 a)``. Signed rules: the scale's magnitude.

    Returns:
      None for rules whose scale is not a function of amax.

    >>> from wush_jax import MXFP4, NVFP4
    >>> activation_scale_scale(MXFP4), activation_scale_scale(NVFP4)
    (4.0, 6.0)
    """
    if fmt.rule in ("absmax", "four_over_six", "three_candidates"):
        return fmt.element.max
    if fmt.rule in SIGNED_RULES:
        return 2.0 ** (fmt.element.bits - 1)
    if fmt.rule not in POW2_RULES or fmt.global_scale is None:
        return None
    if not isinstance(fmt.element, FloatElement):
        return None
    # nearest() doubles at a mantissa of 1.5, the rules at one of `carry`.
    lowest = 1.0 if fmt.rule == "pow2_div3" else 2.0**fmt.element.max_exponent
    carry = 2.0
    if fmt.rule == "round_175":
        carry -= 2.0 ** -(fmt.element.mantissa_bits + 1)
    if fmt.rule == "ceil":
        carry = fmt.element.max / lowest
    return fmt.global_scale * lowest * carry / 1.5


def record_of(name: str, packed: PackedWeight, site: str | None) -> LayerRecord:
    """Return what the config has to say of a layer.

    Args:
      name: of the layer.
      packed: its weight.
      site: name of the first layer with the same transform variable, or None without a transform.

    Raises:
      ValueError: a global scale that is not positive and finite.
    """
    inputs = packed.input_global_scale
    scale = np.asarray(packed.weight.global_scale).tolist()
    input_scale = None if inputs is None else np.asarray(inputs).tolist()
    for value in (scale, input_scale):
        if value is not None and not is_scale(value):
            raise ValueError(f"layer {name}: its global scale is {value}; quantize it again")
    return LayerRecord(
        shape=packed.shape,
        format=packed.weight.format,
        input_format=packed.input_format,
        block=None if packed.transform is None else packed.transform.shape[-1],
        site=site,
        global_scale=scale,
        input_global_scale=input_scale,
    )


def on_host(name: str, value: np.ndarray) -> Any:
    """A `Place` that leaves values where they are."""
    return value


def codes_name(name: str, fmt: Format) -> str:
    """Return the name of a layer's codes."""
    return f"{name}.e2m1" if fmt.element == E2M1 else f"{name}.codes"


def layer_tensors(name: str, packed: PackedWeight) -> dict[str, Any]:
    """Return the tensors of a layer, by the names that stand at the top of this module.

    >>> from wush_jax import Recipe, quantize_weight
    >>> packed = quantize_weight(jnp.eye(32), None, Recipe(transform="hadamard"))
    >>> sorted(layer_tensors("up", packed))[-3:]
    ['up.scale_quant', 'up.transform', 'up.weight_global_scale']
    """
    weight = packed.interchange
    tensors = {
        codes_name(name, weight.format): weight.codes,
        f"{name}.scale_quant": weight.scales,
    }
    if packed.transform is not None:
        tensors[f"{name}.transform"] = packed.transform
    inputs = packed.input_global_scale
    constants = _constants(weight.global_scale, inputs, packed.input_format)
    return tensors | {f"{name}.{key}": value for key, value in constants.items()}


def _constants(weight: Any, inputs: Any, input_format: Format | None) -> dict[str, np.ndarray]:
    """Return a layer's small tensors: reciprocals of the dividing scales, and what the rule is."""
    values: dict[str, Any] = {"weight_global_scale": 1 / np.asarray(weight, np.float32)}
    if input_format is not None:
        inputs = input_format.global_scale if inputs is None else inputs
        if inputs is not None:
            values["activation_global_scale"] = 1 / np.asarray(inputs, np.float32)
        if (scale := activation_scale_scale(input_format)) is not None:
            values["activation_scale_scale"] = np.float32(scale)
    return {key: np.asarray(value, np.float32) for key, value in values.items()}


def read_packed(
    folder: TensorFolder,
    name: str,
    record: LayerRecord,
    place: Place,
    *,
    transform: jax.Array | None = None,
) -> PackedWeight:
    """Read one layer back.

    Args:
      folder: where its tensors are.
      name: of the layer.
      record: what the config says of it.
      place: called with the name and the values of each tensor; puts them on devices.
      transform: that of the layer's site, where it was placed before.

    Returns:
      The packed weight (N, K). Its transform is compared with that of the site's first layer, and
      placed under that one's name.

    Raises:
      ValueError: a tensor that is missing, or does not fit the record, or contradicts it.
    """
    *lead, k = record.shape
    fmt = record.format

    def take(key: str, dtype: Any, shape: tuple[int, ...]) -> jax.Array:
        return place(key, folder.read(key, [dtype], [shape]))

    _check_constants(folder, name, record)
    weight = QuantizedArray(
        take(codes_name(name, fmt), jnp.uint8, (*lead, k * fmt.element.bits // 8)),
        take(f"{name}.scale_quant", SCALE_DTYPES[fmt.scale_dtype], (*lead, fmt.groups(k))),
        place(f"{name}.weight_global_scale", np.asarray(record.global_scale, np.float32)),
        fmt,
    )
    if record.site is not None:
        values = _read_transform(folder, name, record)
        if transform is None:
            transform = place(f"{record.site}.transform", values)
    inputs = record.input_global_scale
    if inputs is not None:
        inputs = place(f"{name}.activation_global_scale", np.asarray(inputs, np.float32))
    return PackedWeight(weight, transform, inputs, record.input_format)


def _read_transform(folder: TensorFolder, name: str, record: LayerRecord) -> np.ndarray:
    *batch, _, k = record.shape
    d = record.block
    assert d is not None
    dtypes, shapes = (jnp.bfloat16, jnp.float32), [(*batch, k // d, d, d), (*batch, d, d)]
    own = folder.read(f"{name}.transform", dtypes, shapes)
    if record.site == name:
        return own
    first = folder.read(f"{record.site}.transform", dtypes, shapes)
    if own.dtype != first.dtype or own.tobytes() != first.tobytes():
        raise ValueError(
            f"{folder.entries[f'{name}.transform'].file}: '{name}.transform' differs from that of "
            f"{record.site!r}, with which it is shared; fetch the folder again"
        )
    return own


def _check_constants(folder: TensorFolder, name: str, record: LayerRecord) -> None:
    inputs = record.input_global_scale
    for key, wanted in _constants(record.global_scale, inputs, record.input_format).items():
        found = folder.read(f"{name}.{key}", [np.float32], [wanted.shape])
        if found.tobytes() != wanted.tobytes():
            raise ValueError(
                f"{folder.entries[f'{name}.{key}'].file}: tensor '{name}.{key}' is {found.tolist()}"
                f", the config says {wanted.tolist()}; fetch the folder again"
            )
