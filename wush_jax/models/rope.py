"""Rotary positions: the frequencies that a config means, and the rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.models.typed_values import TypedValues


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary wavelengths to a longer context.

    With a ``factor`` alone every wavelength is stretched by it (``linear``); otherwise only those
    longer than a part of the original context, as the low and high factors say (``llama3``), or
    those that turn less often in it than the betas say (``yarn``).

    Attributes:
        factor: of the stretching.
        low_freq_factor: ``llama3``; wavelengths above original / low are stretched in full.
        high_freq_factor: ``llama3``; wavelengths below original / high are left alone.
        original_max_position_embeddings: the context before the stretching.
        beta_fast: ``yarn``; dimensions that turn more often are left alone.
        beta_slow: ``yarn``; dimensions that turn less often are stretched in full.
        truncate: ``yarn``; whether the two bounds are rounded to whole dimensions.
        attention_factor: multiplies rotated queries and keys.

    Source: Hugging Face transformers, ``rope_type`` "linear", "llama3" and "yarn".
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    attention_factor: float = 1.0

    @property
    def rope_type(self) -> str:
        """The name that transformers has for it."""
        if self.beta_fast is not None:
            return "yarn"
        return "linear" if self.low_freq_factor is None else "llama3"

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of ``rope_parameters`` that mean this."""
        names = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": (
                "original_max_position_embeddings",
                "beta_fast",
                "beta_slow",
                "truncate",
                "attention_factor",
            ),
        }[self.rope_type]
        return {"rope_type": self.rope_type} | {n: getattr(self, n) for n in ("factor", *names)}


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Return the rotary frequencies theta^(-2i / head_dim), stretched if there is a scaling.

    Returns:
        float64 (head_dim / 2,), radians per position.

    Source: Su et al., RoFormer (2021); scaling as in Hugging Face transformers.
    """
    half = head_dim // 2
    frequencies = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None:
        return frequencies
    kept = np.zeros(half)  # the part of each frequency that is left alone
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        context = scaling.original_max_position_embeddings
        assert context is not None
        assert low is not None
        assert high is not None
        turns = context * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
    elif scaling.rope_type == "yarn":
        kept = 1 - _yarn_ramp(head_dim, theta, scaling)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Return how far each pair of dimensions is stretched: from 0 to 1 between two bounds."""
    context = scaling.original_max_position_embeddings
    assert context is not None
    assert scaling.beta_fast is not None
    assert scaling.beta_slow is not None

    def dimension(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def apply_rope(
    x: jax.Array, positions: jax.Array, frequencies: np.ndarray, factor: float = 1.0
) -> jax.Array:
    """Rotate the pairs (i, i + head_dim / 2) of every head by position * frequency.

    Args:
        x: (..., length, heads, head_dim).
        positions: (length,) or (..., length) integers.
        frequencies: (head_dim / 2,).
        factor: multiplies what is rotated.

    Returns:
        The rotated array, computed in float32, of the shape and dtype of ``x``.
    """
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (rotated if factor == 1 else rotated * factor).astype(x.dtype)


def read_rope(values: TypedValues, default_theta: float) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` of a config, as transformers finds them.

    ``rope_scaling`` goes before ``rope_parameters``, an entry in either before one beside them.

    Args:
        values: of ``config.json``; what is wrong is noted there.
        default_theta: of the family.
    """
    beside = values.given
    rope = values.table("rope_scaling") or values.table("rope_parameters") or {}
    found: dict[str, Any] = {"rope_theta": beside.get("rope_theta", default_theta)}
    found |= {k: beside[k] for k in ("partial_rotary_factor",) if k in beside}
    entries = TypedValues(found | dict(rope), {"rope_type": rope.get("type", "default")})
    kind = entries.text("rope_type")
    entries.need("partial_rotary_factor", None, 1, 1.0)
    scaling = None
    if any(isinstance(value, Mapping) for value in rope.values()):
        values.lack("rope_parameters", "is nested by kinds of layers")
    elif kind not in READERS:
        values.lack(f"rope_type = {kind!r}", f"is not one of {', '.join(READERS)}")
    else:
        context = beside.get("max_position_embeddings", values.defaults["max_position_embeddings"])
        entries.defaults |= {"original_max_position_embeddings": context}
        if "original_max_position_embeddings" in beside:
            name = "original_max_position_embeddings"
            entries.given |= {name: beside[name]}
        scaling = READERS[kind](entries)
    theta = entries.number("rope_theta")
    values.merge(entries)
    return {"rope_theta": theta, "rope_scaling": None if values.faulty else scaling}


def _linear(entries: TypedValues) -> RopeScaling:
    return RopeScaling(entries.number("factor"))


def _llama3(entries: TypedValues) -> RopeScaling:
    low, high = entries.number("low_freq_factor"), entries.number("high_freq_factor")
    if low >= high:
        entries.faults.append(f"low_freq_factor = {low} is not below high_freq_factor = {high}")
    context = entries.size("original_max_position_embeddings")
    return RopeScaling(entries.number("factor"), low, high, context)


def _yarn(entries: TypedValues) -> RopeScaling:
    entries.defaults |= dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
    entries.defaults |= {"truncate": True, "attention_factor": None}
    factor = entries.number("factor")
    scale = entries.number("attention_factor", optional=True)
    over, under = (
        entries.number(name, optional=True, zero=True) for name in ("mscale", "mscale_all_dim")
    )

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    if scale is None:
        scale = magnitude(over) / magnitude(under) if over and under else magnitude(1)
    return RopeScaling(
        factor,
        original_max_position_embeddings=entries.size("original_max_position_embeddings"),
        beta_fast=entries.number("beta_fast", optional=True) or 32.0,
        beta_slow=entries.number("beta_slow", optional=True) or 1.0,
        truncate=entries.flag("truncate"),
        attention_factor=scale,
    )


READERS = {"default": lambda entries: None, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
