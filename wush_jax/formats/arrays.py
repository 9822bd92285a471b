"""Arrays quantized to a format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import reference
from pallas_kernels.fragments import Fragments
from pallas_kernels.stacks import Stack
from wush_jax.formats import scales
from wush_jax.formats.checks import check_arrays, check_dtype, check_kind, refuse_tensors
from wush_jax.formats.format import Format


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """An array stored as packed codes and group scales: a pytree with a static format.

    Invariants, with K the last axis of the array and g the group size:

    - ``codes`` is uint8 (..., K * bits / 8), packed by `wush_jax.formats.elements.pack`;
    - ``scales`` is (..., ceil(K / g)) in the format's scale type;
    - ``global_scale`` is float32, a scalar or one per leading index, and divides;
    - the array is ``code_value * scale / global_scale``.

    Attributes:
      codes: packed codes.
      scales: stored scales.
      global_scale: see above.
      format: the static `Format`.
    """

    codes: jax.Array
    scales: jax.Array
    global_scale: jax.Array
    format: Format = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that is stored, (..., K)."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.format.element.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and global scale."""
        return self.codes.nbytes + self.scales.nbytes + self.global_scale.nbytes


def quantize(
    x: jax.Array, fmt: Format, *, global_scale: jax.Array | float | None = None
) -> QuantizedArray:
    """Round ``x`` to the nearest values of a format, groups along the last axis.

    Per group, with the rule's scale s: ``code = round(x * global_scale / s)``, ties to even.

    Args:
      x: (..., K) floating point, K a multiple of ``fmt.group_size`` (any K for `FP8`).
      fmt: the format.
      global_scale: scalar that replaces the format's own.

    Returns:
      A `QuantizedArray` of shape (..., K).

    Raises:
      ValueError: K is not a multiple of the group size; a global scale not positive and finite.

    Source: FORMATS of OCP MX v1.0 and NVFP4; WUSH paper, section 2.

    >>> from wush_jax.formats import MXFP4
    >>> q = quantize(jnp.arange(32.0), MXFP4)
    >>> q.codes.shape, q.scales.shape, q.shape
    ((16,), (1,), (32,))
    """
    x = _as_array(x)
    _check_groups(x, fmt)
    if global_scale is None:
        amax = jnp.max(jnp.abs(x), initial=0.0)  # of no rows: 0
        global_scale = fmt.derive_global_scale(amax.astype(jnp.float32))
    global_scale = scales.checked_global_scale(global_scale)
    codes, stored = fmt.encode(x, global_scale)
    return QuantizedArray(fmt.pack(codes), stored, global_scale, fmt)


def dequantize(q: QuantizedArray | Fragments | Stack, dtype=jnp.float32) -> jax.Array:
    """Return the values of a quantized array: ``code_value * scale / global_scale``, (..., K).

    Args:
      q: the array, in the interchange layout or in that of the matmul kernels.
      dtype: of the result.

    Raises:
      ValueError: something else, such as a `wush_jax.PackedWeight`; the message says what to call.

    >>> from wush_jax.formats import MXFP4
    >>> dequantize(quantize(jnp.full((32,), 2.0), MXFP4)).max().item()
    2.0
    """
    if not isinstance(q, QuantizedArray | Fragments | Stack):
        raise ValueError(
            f"q is a {type(q).__name__}, not a QuantizedArray; give what wush_jax.quantize gives. "
            "Of a PackedWeight, wush_jax.solvers.effective_weight(packed) is the weight in its own "
            "coordinates and dequantize(packed.weight) in transformed ones"
        )
    check_dtype(dtype=dtype)
    return reference.dequantize(q).astype(dtype)


@jax.custom_jvp
def _straight_through(x, quantized):
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def fake_quantize(
    x: jax.Array, fmt: Format, *, global_scale: jax.Array | float | None = None
) -> jax.Array:
    """Quantize and dequantize, keeping ``x``'s dtype; the gradient passes straight through.

    Args and errors as for `quantize`. ``d fake_quantize(x) / dx = 1`` (straight-through estimator).
    Values that would round up beyond x's dtype saturate.

    >>> from wush_jax.formats import MXFP8
    >>> fake_quantize(jnp.float32([2.0, 5.2] * 16), MXFP8)[:2].tolist()
    [2.0, 5.0]
    """
    x = _as_array(x)
    _check_groups(x, fmt)
    frozen = lax.stop_gradient(x)
    limit = float(jnp.finfo(x.dtype).max)
    rounded = dequantize(quantize(frozen, fmt, global_scale=global_scale))
    return _straight_through(x, jnp.clip(rounded, -limit, limit).astype(x.dtype))


def _as_array(x: Any) -> jax.Array:
    """Return numbers, such as a list of them, as an array."""
    refuse_tensors(x=x)
    x = x if hasattr(x, "dtype") else np.asarray(x)
    check_arrays(x=x)
    return jnp.asarray(x)


def _check_groups(x: jax.Array, fmt: Format) -> None:
    check_kind(Format, "a Format, such as wush_jax.MXFP4", fmt=fmt)
    if x.ndim == 0 or not fmt.holds(x.shape[-1]):
        raise ValueError(
            f"x has shape {x.shape}; {fmt.name} needs a last axis that is a positive multiple of "
            f"group_size={fmt.group_size}: pad it, or use fmt.replace(group_size=...)"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; quantize floating-point values: cast x first")
