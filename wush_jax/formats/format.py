"""Number formats: element, group, scale, rule, global scale.

A format stores a group of g consecutive values along the last axis as codes of one element grid
and one scale: ``value = code_value * scale / global_scale``. The global scale *divides*. One
emulation, `Format.encode`, is the definition that every kernel has to reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats import elements, scales
from wush_jax.formats.checks import check_kind, check_number, check_size
from wush_jax.formats.elements import E2M1, E2M3, E4M3, Element, IntElement

SCALE_DTYPES = {
    "e8m0": jnp.float8_e8m0fnu,
    "e4m3": jnp.float8_e4m3fn,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
}


@dataclass(frozen=True)
class Format:
    """A group-scaled number format: static, hashable, usable as a jit-static argument.

    Attributes:
      name: how reports and files call it.
      element: the element grid.
      group_size: g, values per scale.
      scale_dtype: "e8m0", "e4m3", "bfloat16" or "float32".
      rule: name of a scale rule in `wush_jax.formats.scales.RULES`.
      global_scale: a constant that multiplies values before scaling and divides after decoding;
        None derives it from the tensor: ``448 * max / amax``, the largest group's scale is E4M3's
        largest (256 instead of 448 for rules that may pick a scale 1.5 times larger).

    Raises:
      ValueError: a rule that is unknown or does not fit the scale type, a group below 1.

    >>> MXFP4.bits_per_value
    4.25
    """

    name: str
    element: Element
    group_size: int
    scale_dtype: str
    rule: str
    global_scale: float | None = 1.0
    short_last: bool = False

    def __post_init__(self):
        check_kind(str, "a name", name=self.name, rule=self.rule, scale_dtype=self.scale_dtype)
        check_kind(Element, "one of wush_jax.formats.elements", element=self.element)
        check_kind(bool, "True or False", short_last=self.short_last)
        check_size(group_size=self.group_size)
        object.__setattr__(self, "group_size", int(self.group_size))  # as files hold it
        if self.global_scale is not None:
            check_number(global_scale=self.global_scale)
            object.__setattr__(self, "global_scale", float(self.global_scale))
        if self.rule not in scales.RULES:
            raise ValueError(f"rule={self.rule!r} is unknown; choose from {sorted(scales.RULES)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r} is unknown; choose from {sorted(SCALE_DTYPES)}"
            )
        if (self.rule in scales.POW2_RULES) != (self.scale_dtype == "e8m0"):
            raise ValueError(
                f"rule={self.rule!r} does not fit scale_dtype={self.scale_dtype!r}; power-of-two "
                f"rules {scales.POW2_RULES} go with 'e8m0', the others with the rest"
            )
        if self.rule in ("four_over_six", "three_candidates") and (
            self.scale_dtype != "e4m3" or self.element.name != "e2m1"
        ):
            raise ValueError(f"rule={self.rule!r} is defined for E2M1 elements with E4M3 scales")
        if self.rule == "gaussian_mse" and not getattr(self.element, "midrise", False):
            raise ValueError("rule='gaussian_mse' needs a mid-rise integer element")
        if self.rule in scales.SIGNED_RULES and (
            self.scale_dtype != "e4m3" or not getattr(self.element, "full", False)
        ):
            raise ValueError(f"rule={self.rule!r} is for full integer grids with E4M3 scales")
        if self.short_last and self.rule not in scales.POW2_RULES:
            raise ValueError(
                f"short_last=True needs a rule that zeros do not change, one of "
                f"{scales.POW2_RULES}, not {self.rule!r}"
            )
        if self.global_scale is not None and not 0 < self.global_scale < float("inf"):
            raise ValueError(
                f"global_scale={self.global_scale} must be positive and finite, or None"
            )

    def replace(self, **changes) -> Format:
        """Return this format with some fields changed: ``MXFP4.replace(rule="ceil", ...)``."""
        return replace(self, **changes)

    def holds(self, k: int) -> bool:
        """Whether groups tile K columns."""
        return k > 0 and (self.short_last or k % self.group_size == 0)

    def groups(self, k: int) -> int:
        """Return the number of groups of K columns: ``ceil(K / g)``.

        >>> FP8.groups(576), MXFP4.groups(64)
        (2, 2)
        """
        return -(-k // self.group_size)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value, the group's scale included."""
        scale_bits = jnp.dtype(SCALE_DTYPES[self.scale_dtype]).itemsize * 8
        return self.element.bits + scale_bits / self.group_size

    def derive_global_scale(self, amax: jax.Array) -> jax.Array:
        """Return the global scale of a tensor whose largest magnitude is ``amax``, float32.

        The format's constant where it has one; else ``448 * max / amax`` (compressed-tensors) or
        ``256 * max / amax`` (4-over-6), and 1 for an all-zero or non-finite tensor.
        """
        if self.global_scale is not None:
            return jnp.full(jnp.shape(amax), self.global_scale, jnp.float32)
        top = 448.0 if self.rule not in ("four_over_six", "three_candidates") else 256.0
        amax = jnp.asarray(amax, jnp.float32)
        g = top * self.element.max / jnp.maximum(amax, 1e-30)
        return jnp.where((amax > 0) & jnp.isfinite(amax), g, 1.0)

    def scale_candidates(self, y: jax.Array, global_scale: jax.Array) -> list[jax.Array]:
        """Return the rule's candidate scales of groups ``y`` (..., g): float32 (...) each."""
        amax = jnp.max(jnp.abs(y), axis=-1)
        return scales.RULES[self.rule](y, amax, global_scale, self)

    def encode_with(self, y: jax.Array, scale: jax.Array, global_scale: jax.Array) -> jax.Array:
        """Round groups ``y`` (..., g) to codes under given scales (...): uint8 (..., g).

        ``code = round(y * (global_scale / scale))``: one division a group, one product a value.
        """
        if self.scale_dtype == "e8m0":  # 2/s and g/2: 1/s of the largest power is not normal
            twice = elements.exp2_int(1 - elements.floor_log2(scale))
        else:
            twice = elements.divide(jnp.float32(2.0), scale)
        return self.element.encode(y * (global_scale * 0.5 * twice)[..., None])

    def decode_with(self, codes: jax.Array, scale: jax.Array, global_scale: jax.Array) -> jax.Array:
        """Return ``code_value * (scale / global_scale)``, codes (..., g), scales (...): float32."""
        return self.element.decode(codes) * (scale / global_scale)[..., None]

    def encode_groups(self, y: jax.Array, global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Quantize float32 groups ``y`` (..., g): uint8 codes (..., g) and float32 scales (...).

        Subnormal values count as zero. A group that holds an infinity or a NaN gets a NaN scale
        and zero codes, so that it decodes to NaN: damage stays visible.
        """
        y = jnp.where(jnp.abs(y) < elements.TINY, 0.0, y)
        finite = jnp.max(jnp.abs(y), axis=-1) < jnp.inf
        y = jnp.where(finite[..., None], y, 0.0)
        candidates = self.scale_candidates(y, global_scale)
        scale = candidates[0]
        codes = self.encode_with(y, scale, global_scale)
        if len(candidates) > 1:
            error = self._squared_error(y, codes, scale, global_scale)
            for other in candidates[1:]:
                other_codes = self.encode_with(y, other, global_scale)
                other_error = self._squared_error(y, other_codes, other, global_scale)
                better = other_error < error
                error = jnp.where(better, other_error, error)
                scale = jnp.where(better, other, scale)
                codes = jnp.where(better[..., None], other_codes, codes)
        return codes, jnp.where(finite, scale, jnp.nan)

    def _squared_error(self, y, codes, scale, global_scale):
        difference = y - self.decode_with(codes, scale, global_scale)
        return jnp.sum(difference * difference, axis=-1)

    def encode(
        self, x: jax.Array, global_scale: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Quantize along the last axis: uint8 codes (..., K), one a value, and scales.

        Args:
          x: (..., K), K a multiple of the group size, or any with ``short_last``.
          global_scale: float32, scalar or one per leading index; None takes the format's constant
            or derives it from ``x``.

        Returns:
          Unpacked codes, and scales (..., ceil(K / g)) in the format's own scale type.
        """
        groups = self._grouped(x.astype(jnp.float32))
        if global_scale is None:
            global_scale = self.derive_global_scale(jnp.max(jnp.abs(groups), initial=0.0))
        codes, scale = self.encode_groups(groups, _align(global_scale, groups.ndim - 1))
        return self._rows(codes, x.shape), self.store_scales(scale)

    def decode(
        self, codes: jax.Array, stored_scales: jax.Array, global_scale: jax.Array
    ) -> jax.Array:
        """Undo `encode`: float32 values (..., K) of unpacked codes and stored scales."""
        scale = self.load_scales(stored_scales)
        values = self.decode_with(self._grouped(codes), scale, _align(global_scale, scale.ndim))
        return self._rows(values, codes.shape)

    def _grouped(self, x: jax.Array) -> jax.Array:
        """(..., K) as groups (..., ceil(K / g), g), a short one filled with zeros."""
        *lead, k = x.shape
        missing = self.groups(k) * self.group_size - k
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, missing)]) if missing else x
        return x.reshape(*lead, self.groups(k), self.group_size)

    def _rows(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undo `_grouped`."""
        *lead, count, size = groups.shape
        return groups.reshape(*lead, count * size)[..., : shape[-1]]

    def pack(self, codes: jax.Array) -> jax.Array:
        """Pack codes (..., K) into bytes (..., K * bits / 8): `wush_jax.formats.elements.pack`."""
        return elements.pack(codes, self.element.bits)

    def unpack(self, packed: jax.Array) -> jax.Array:
        """Undo `pack`."""
        return elements.unpack(packed, self.element.bits)

    def store_scales(self, scale: jax.Array) -> jax.Array:
        """Turn float32 scales, already representable, into the stored type, bit by bit."""
        if self.scale_dtype == "e8m0":
            byte = jnp.where(scale == scale, elements.floor_log2(scale) + 127, 255)
            return lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e8m0fnu)
        if self.scale_dtype == "e4m3":
            return lax.bitcast_convert_type(E4M3.encode(scale), jnp.float8_e4m3fn)
        if self.scale_dtype == "bfloat16":
            bits = lax.bitcast_convert_type(scale, jnp.uint32) >> 16
            return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
        return scale

    def load_scales(self, stored: jax.Array) -> jax.Array:
        """Return stored scales as float32 values."""
        if self.scale_dtype == "e8m0":
            byte = lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.int32)
            value = elements.exp2_int(jnp.maximum(byte, 1) - 127)
            return jnp.where(byte == 255, jnp.nan, value)
        if self.scale_dtype == "e4m3":
            return E4M3.decode(lax.bitcast_convert_type(stored, jnp.uint8))
        return stored.astype(jnp.float32)


def _align(global_scale: jax.Array, ndim: int) -> jax.Array:
    """Give a global scale, one per leading index, trailing axes up to ``ndim``."""
    global_scale = jnp.asarray(global_scale, jnp.float32)
    return global_scale.reshape(global_scale.shape + (1,) * (ndim - global_scale.ndim))


MXFP4 = Format("MXFP4", E2M1, 32, "e8m0", "pow2_div3", 3.0)
NVFP4 = Format("NVFP4", E2M1, 16, "e4m3", "absmax", 10.0)
INT4 = Format("INT4", IntElement("int4_midrise", 4, midrise=True), 32, "bfloat16", "gaussian_mse")
INT8 = Format("INT8", IntElement("int8", 8), 32, "bfloat16", "absmax")
MXFP8 = Format("MXFP8", E4M3, 32, "e8m0", "ocp_floor")
MXFP6 = Format("MXFP6", E2M3, 32, "e8m0", "ocp_floor")
# The symmetric 4-bit integer format of most other libraries.
INT4_ABSMAX = Format("INT4_ABSMAX", IntElement("int4", 4), 32, "bfloat16", "absmax")
# Integers with the groups and scales of NVFP4; a scale's sign puts the largest value on code -8.
NVINT4 = Format("NVINT4", IntElement("int4_full", 4, full=True), 16, "e4m3", "signed_absmax", 10.0)
# Of activations: one power of two for a token and 512 columns. The largest value lands in
# (224, 448], so that nothing clips and the fewest values are subnormal.
FP8 = Format("FP8", E4M3, 512, "e8m0", "ceil", short_last=True)

FORMATS = {f.name: f for f in (MXFP4, NVFP4, INT4, NVINT4, INT8, MXFP8, FP8, MXFP6, INT4_ABSMAX)}
