"""Numbers of every kind that has ever broken a quantizer."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import wush_jax as wush
from wush_jax.formats import FORMATS

ROWS, K, D = 4, 64, 8
NORMAL, TINY, HUGE = 2.0**-126, 1e-38, 1e38
FOUR_OVER_SIX = wush.NVFP4.replace(name="4/6", rule="four_over_six", global_scale=None)
ALONE = wush.NVFP4.replace(name="alone", group_size=1)  # a scale for every value
ALL = {**FORMATS, "4/6": FOUR_OVER_SIX, "alone": ALONE}
each_format = pytest.mark.parametrize("fmt", ALL.values(), ids=ALL)
seeds = st.integers(0, 2**32 - 1)


def material(seed, kind, dtype=np.float32):
    """(ROWS, K) of every kind that has ever broken a quantizer."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (ROWS, K))
    if kind == "any exponent":
        x = x * 10.0 ** rng.uniform(-38, 37, x.shape)
    elif kind == "rows of any exponent":
        x = x * 10.0 ** rng.uniform(-38, 36, (ROWS, 1))
    elif kind == "ties":
        x = rng.integers(-24, 25, x.shape) / 4 * 2.0 ** rng.integers(-3, 4, (ROWS, 1))
    elif kind == "lonely":
        x = x * (np.arange(K) == rng.integers(K))
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "top":
        x = (
            rng.choice([-1, 1], x.shape)
            * rng.uniform(0.9, 1, x.shape)
            * float(jnp.finfo(dtype).max)
        )
    limit = float(jnp.finfo(dtype).max)
    x = np.clip(x, -limit, limit)
    x[rng.integers(ROWS)] *= rng.integers(2)  # often a row of zeros
    return x.astype(dtype)


KINDS = ("any exponent", "rows of any exponent", "ties", "lonely", "denormal", "top", "plain")
kinds = st.sampled_from(KINDS)
