"""Products on FP8 matrix units: widths of tiles, and their errors on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_tools import exact, values, weight_of

import wush_jax as wush
from pallas_kernels import matmul, xla_fp8
from pallas_kernels.tiles import Tiling

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("m", "n", "k", "width"),
    # Measured fastest of 96, 128 and 160 on an H200.
    [
        (1024, 28672, 4096, 160),
        (1024, 4096, 14336, 128),
        (1024, 4096, 4096, 128),
        (1024, 6144, 4096, 128),
        (4096, 28672, 4096, 160),
        (4096, 4096, 14336, 160),
        (4096, 4096, 4096, 160),
    ],
)
def test_widths_of_fp8_tiles_are_the_measured_ones(m, n, k, width):
    assert matmul.float8_tiles(m, n // 64, k // 128).tokens == width
    if (m, n) != (1024, 6144):  # 128 and 256 are within 6 % of each other
        assert matmul.float8_tiles(m, n // 64, k // 128, fast=True).tokens == 256


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [None, Tiling(64, cuts=2), Tiling(160)])
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "one sign", "octaves"])
@pytest.mark.parametrize(("m", "k", "n"), [(200, 14336, 256), (200, 4096, 256), (13, 160, 70)])
def test_fp8_products_with_packed_weights(m, k, n, kind, plan):
    """Products are exact, sums of 512 of them have some 14 bits.

    That is enough for 8e-8 where groups are alike. Where scales of one sign lie 16 octaves apart,
    products far below the largest of an instruction are cut off: 2**-8.8 of the sum was seen.
    """
    x = values("one sign" if kind == "octaves" else kind, (m, k), 2)
    if kind == "octaves":
        powers = np.random.default_rng(5).integers(-8, 8, size=(m, k // 32))
        x = x * jnp.exp2(jnp.repeat(jnp.asarray(powers, jnp.float32), 32, axis=1))
    q = wush.quantize(x, wush.MXFP4)
    like = {"outliers": "gaussian", "octaves": "one sign"}.get(kind, kind)
    laid, weight = weight_of(like, k, n, wush.MXFP4)

    @functools.partial(jax.jit, static_argnames="precision")
    def run(q, laid, precision=None):
        left = xla_fp8.of_codes(q.codes, q.scales)
        return matmul.multiply_float8(left, q.global_scale, laid, jnp.float32, precision, plan)

    y = run(q, laid)
    left = exact(q)
    error = np.abs(np.asarray(y, np.float64) - left @ weight.T)
    assert (error <= 2.0**-8 * (np.abs(left) @ np.abs(weight).T)).all()
    if kind == "gaussian":
        assert np.linalg.norm(error) <= 2.0**-20 * np.linalg.norm(left @ weight.T)
    short = run(q, laid, "default")
    if k > xla_fp8.SHORT:
        np.testing.assert_array_equal(short, y)
    # In the short accumulator each sum of 32 products may cut off one step of 2**-13.
    error = np.abs(np.asarray(short, np.float64) - left @ weight.T)
    assert (error <= -(-k // 32) * 2.0**-13 * (np.abs(left) @ np.abs(weight).T)).all()
    if kind == "gaussian":  # less than rounding to bfloat16: 4e-4 was seen for K = 4096
        assert np.linalg.norm(error) <= 2.0**-9 * np.linalg.norm(left @ weight.T)
