"""Formats with the error that each may make, and samples to quantize."""

import functools

import jax
import numpy as np
import pytest

import wush_jax as wush
from wush_jax.formats import INT4_ABSMAX
from wush_jax.formats.elements import E3M2, E5M2

MX = wush.MXFP4.replace(global_scale=1.0)
NV = wush.NVFP4.replace(global_scale=None)
# Name -> (format, largest error of a value in units of its group's largest magnitude).
# The amax of a group lands, before rounding, in an interval [lo, hi] of the element's grid (given
# by the rule, widened by the half ulp of E4M3, 1/16, or bfloat16, 2**-8). The error is at most
# that of 5 (E2M1's widest gap, 1) over the least amax at least 5, or the clipping of hi.
CASES = {
    "MXFP4": (wush.MXFP4, 1 / 5),  # [3, 6)
    "MXFP4 floor": (MX.replace(rule="ocp_floor"), 1 / 4),  # [4, 8): clips 8 to 6
    "MXFP4 round": (MX.replace(rule="round_175"), 1 / 5),  # [3.5, 7): 1/7 at the top
    "MXFP4 ceil": (MX.replace(rule="ceil"), 1 / 5),  # (3, 6]
    "NVFP4": (wush.NVFP4, 17 / 96),  # 6 / (1 + 1/16) = 96/17 at least
    "NVFP4 derived": (NV, 17 / 96),
    "NVFP4 4/6": (NV.replace(rule="four_over_six"), 17 / 96),
    "NVFP4 three": (NV.replace(rule="three_candidates"), 17 / 96),  # up to 7.125: 0.158
    "INT4": (wush.INT4, 0.5565),  # one value alone: clips to 7.5 * 2.5139 * 2/15 / sqrt(32) amax
    "INT4_ABSMAX": (INT4_ABSMAX, 0.5 / 7 * (1 + 2**-8)),
    # On -8 / (1 + 1/16) at least: what lies as far on the other side clips from 8.5 to 7.
    "NVINT4": (wush.NVINT4, 3 / 17),
    "NVINT4 tuned": (wush.NVINT4.replace(rule="signed_candidates"), 65 / 289),  # 2.03 of 9.03
    "INT8": (wush.INT8, 0.5 / 127 * (1 + 2**-8)),
    "FP8": (wush.FP8.replace(group_size=32), 1 / 14),  # (224, 448]: half of 32 over 224
    "MXFP8": (wush.MXFP8, 1 / 8),  # [256, 512): clips 512 to 448
    "MXFP8 e5m2": (wush.MXFP8.replace(element=E5M2), 1 / 8),
    "MXFP6": (wush.MXFP6, 1 / 16),  # [4, 8): clips 8 to 7.5
    "MXFP6 e3m2": (wush.MXFP6.replace(element=E3M2), 1 / 8),  # [16, 32): clips 32 to 28
}
each_format = pytest.mark.parametrize(("fmt", "bound"), CASES.values(), ids=CASES)

# Where the element and the rule do not matter: constant, derived and chosen scales.
FEW = {name: CASES[name] for name in ("MXFP4", "NVFP4 derived", "NVFP4 three", "INT4")}
few_formats = pytest.mark.parametrize(("fmt", "bound"), FEW.values(), ids=FEW)

quantize = jax.jit(wush.quantize, static_argnums=1)
dequantize = jax.jit(wush.dequantize)
fake_quantize = jax.jit(wush.fake_quantize, static_argnums=1)


@jax.jit
def contents(q):
    """Codes, scales and values."""
    return q.format.unpack(q.codes), q.format.load_scales(q.scales), wush.dequantize(q)


@functools.partial(jax.jit, static_argnums=1)
def _round_trip(x, fmt, g):
    return wush.dequantize(wush.quantize(x, fmt, global_scale=g))


def round_trip(x, fmt, g=None):
    """One compilation a format and shape, whatever the global scale."""
    if g is None:
        g = fmt.derive_global_scale(np.abs(x).max())
    return np.asarray(_round_trip(x, fmt, np.float32(g)))


def samples(shape=(3, 32), seed=0):
    """Rows of every magnitude, heavy tails, exact ties and zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, shape)
    x[::7] = np.round(x[::7] * 4) / 4
    x[..., ::9] = 0
    return np.ldexp(x, rng.integers(-6, 7, (*shape[:-1], 1))).astype(np.float32)
