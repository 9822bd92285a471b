"""What callers allow products to lose: short sums, values rounded to FP8."""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels.folded import FOLDED

# Columns whose products may be summed in short accumulators. Of one sign, 14336 lost over 5 %.
SHORT = 4096
# What callers of JAX say where such sums will do.
FAST = ("default", "fastest", "bfloat16", "any_f8_any_f8_f32_fast_accum")


def fast(precision, columns: int) -> bool:
    """Whether sums in the tensor cores' short accumulators, of some 14 bits, will do.

    They are cut off toward zero, which adds up with K: beyond `SHORT` columns they never do.

    Args:
      precision: what JAX's products take: "default", "bfloat16" or
        `jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM` say so. None takes what
        `jax.default_matmul_precision` sets, and without that float32 sums.
      columns: K.

    >>> fast(None, 4096), fast("default", 4096), fast("default", 14336)
    (False, True, False)
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return columns <= SHORT and str(getattr(precision, "name", precision)).lower() in FAST


def folded(precision) -> bool:
    """Whether weights whose values FP8 does not hold may be rounded to it.

    >>> folded(None), folded("folded")
    (False, True)
    """
    return precision == FOLDED


def check(precision) -> None:
    """Raise ValueError for what neither JAX's products nor `folded` know."""
    known = precision is None or isinstance(precision, lax.Precision | lax.DotAlgorithmPreset)
    if known or (isinstance(precision, str) and precision == FOLDED):
        return
    try:
        with jax.default_matmul_precision(precision):
            return
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"precision={precision!r:.60} is unknown; use None, which is exact, 'default', which "
        f"allows short sums, {FOLDED!r}, weights rounded to FP8, or what "
        "jax.default_matmul_precision takes"
    )
