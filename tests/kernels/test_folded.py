"""Weights rounded to FP8 on request: the definition against numpy, its error, its products."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import normal

import wush_jax as wush
from pallas_kernels import folded, reference

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

FORMATS = [wush.NVFP4, wush.NVINT4, wush.NVINT4.replace(rule="signed_candidates")]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=["NVFP4", "NVINT4", "NVINT4 tuned"])
quantize = jax.jit(wush.quantize, static_argnums=1)
fold = jax.jit(folded.fold, static_argnums=2)


@functools.cache
def weight(fmt):
    """Gaussian rows over ten octaves, one group of zeros."""
    w = np.asarray(normal(0, (48, 256))) * np.exp2(np.linspace(-8, 2, 48))[:, None]
    w[5, 16:32] = 0
    return quantize(jnp.float32(w), fmt)


def values(q):
    """Values times the global scale: exact in float64."""
    fmt = q.format
    groups = np.asarray(fmt.element.decode(fmt.unpack(q.codes)), np.float64)
    return groups * np.repeat(np.asarray(q.scales, np.float64), fmt.group_size, axis=-1)


@each_format
def test_folded_values_are_the_nearest_e4m3_numbers(fmt):
    q = weight(fmt)
    found, power = fold(q.codes, q.scales, fmt)
    exact = values(q)
    wanted = (exact / float(power)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(np.asarray(found, np.float64), wanted)
    assert np.log2(power) % 1 == 0
    # The largest scale has the exponent that keeps six (eight) times 1.875 of it below 448.
    room = 5 if fmt.element.name == "e2m1" else 4
    top = np.floor(np.log2(np.abs(np.asarray(q.scales, np.float64)).max()))
    assert float(power) == 2 ** (top - room)
    error = np.abs(np.asarray(found, np.float64) * float(power) - exact)
    assert (error <= np.maximum(np.abs(exact) * 2**-4, float(power) * 2**-10)).all()
    assert (error == 0).mean() > 0.7  # powers of two, and scales of few bits


@pytest.mark.parametrize(
    ("fmt", "more"), [(wush.NVFP4, 0.040), (wush.NVINT4, 0.055)], ids=lambda v: str(v)[:24]
)
def test_what_folding_costs_gaussian_weights(fmt, more):
    w = 0.05 * np.asarray(normal(1, (128, 1024)), np.float64)
    q = quantize(jnp.float32(w), fmt)
    found, power = fold(q.codes, q.scales, fmt)
    exact, rounded = (v / 10.0 - w for v in (values(q), np.asarray(found, np.float64) * power))
    assert (rounded**2).sum() / (exact**2).sum() == pytest.approx(1 + more, abs=0.01)


@each_format
@pytest.mark.parametrize("layer", [False, True], ids=["codes", "values"])
def test_products_take_folded_weights_where_they_are_allowed(fmt, layer):
    """Against float64: the folded values, float32 sums; and the exact ones without the word."""
    q, x = weight(fmt), normal(3, (5, 256))
    inputs = quantize(x, wush.FP8)
    run = jax.jit(
        (lambda x, q, p: reference.transform_quantize_matmul(x, None, q, wush.FP8, precision=p))
        if layer
        else (lambda x, q, p: reference.quantized_matmul(inputs, q, precision=p)),
        static_argnums=2,
    )
    found, power = fold(q.codes, q.scales, fmt)
    left = np.asarray(wush.dequantize(inputs), np.float64)
    for precision, right in (
        ("folded", np.asarray(found, np.float64) * float(power)),
        (None, values(q)),
        ("default", values(q)),
    ):
        w = right / 10.0
        bound = 256 * 2.0**-23 * (np.abs(left) @ np.abs(w).T)
        assert (np.abs(np.asarray(run(x, q, precision), np.float64) - left @ w.T) <= bound).all()


@each_format
def test_damage_stays_visible(fmt):
    w = np.asarray(normal(2, (4, 64))).copy()
    w[1, 20] = np.inf
    q = quantize(jnp.float32(w), fmt)
    found, power = fold(q.codes, q.scales, fmt)
    bad = np.isnan(np.asarray(found, np.float32))
    assert bad[1, 16:32].all()
    assert bad.sum() == 16
    assert np.isfinite(power)


def test_zeros_and_what_gains_nothing():
    q = quantize(jnp.zeros((2, 32)), wush.NVINT4)
    found, power = fold(q.codes, q.scales, wush.NVINT4)
    assert (np.asarray(found, np.float32) == 0).all()
    assert np.isfinite(power)
    assert folded.folds(wush.NVINT4, wush.FP8)
    for fmt, inputs in (
        (wush.MXFP4, wush.FP8),  # exact in FP8 as it is
        (wush.NVFP4, wush.NVFP4),  # activations are not FP8 numbers
        (wush.NVFP4, None),
        (wush.INT4, wush.FP8),
    ):
        assert not folded.folds(fmt, inputs)
