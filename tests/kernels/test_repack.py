"""Layouts of codes and scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import wush_jax as wush
from pallas_kernels import repack
from pallas_kernels.benchmarks.cases import Case

pytestmark = pytest.mark.once


@functools.partial(jax.jit, static_argnames=("layout",))
def mxfp4(x, t, layout="interchange"):
    return pallas_kernels.transform_quantize(x, t, wush.MXFP4, layout=layout)


def test_kernel_layout_pairs_columns_sixteen_apart():
    codes = np.arange(64, dtype=np.uint8) % 16
    codes[32:] = 15 - codes[32:]
    packed = np.asarray(repack.pack(jnp.asarray(codes[None]), "kernel"))[0]
    for byte in range(32):
        low = 32 * (byte // 16) + byte % 16
        assert packed[byte] == codes[low] | codes[low + 16] << 4


def test_every_layout_holds_the_same_values():
    x, t = Case(16, 256).arrays()
    codes, scales = mxfp4(x, t)
    want = jax.jit(wush.dequantize)(wush.QuantizedArray(codes, scales, jnp.float32(3), wush.MXFP4))
    other, transposed = mxfp4(x, t, "kernel")
    np.testing.assert_array_equal(np.asarray(transposed).T, np.asarray(scales))
    assert other.shape == codes.shape
    folded, power = mxfp4(x, t, "fp8")
    got = folded.astype(jnp.float32) * (power[:, None] / 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_folded_exponents_round_what_lies_far_below_and_keep_nan():
    x = jnp.ones((3, 64)).at[0, 32:].mul(2.0**-17).at[1, :32].set(0).at[2, 3].set(jnp.nan)
    folded, power = mxfp4(x, None, "fp8")
    got = np.asarray(folded.astype(jnp.float32) * (power[:, None] / 3))
    np.testing.assert_allclose(got[0, 32:], 2.0**-17, atol=2.0**-18)
    np.testing.assert_array_equal(got[1], np.repeat([0.0, 1.0], 32))
    assert np.isnan(got[2]).all()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("columns", [128, 512])
def test_fp8_values_times_their_powers_are_the_values(columns):
    """In the order of lanes, to 28 octaves below the largest of the columns that share a power."""
    random = np.random.default_rng(0)
    octaves = np.repeat(random.integers(-30, 1, (5, 20)), 32, axis=1)
    x = jnp.float32(random.standard_normal((5, 640)) * 2.0**octaves)
    x = x.at[1].set(0).at[2, 3].set(jnp.inf)
    q = wush.quantize(x, wush.MXFP4)
    run = jax.jit(repack.to_float8, static_argnums=2)
    values, powers = run(repack.to_lanes(q.codes), q.scales, columns)
    assert (values.shape, powers.shape) == ((5, 640), (-(-640 // columns), 32))
    power = np.repeat(np.asarray(powers)[:, :5].T, columns, axis=1)[:, :640]
    got = np.asarray(values, np.float64) * power / 3
    # Columns 8 n + 2 q + e of 32 are in the order e, q, n.
    wanted = np.asarray(wush.dequantize(q), np.float64).reshape(5, -1, 4, 4, 2)
    wanted = wanted.transpose(0, 1, 4, 3, 2).reshape(5, 640)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isnan(got), ~finite)
    far = np.abs(wanted) * 3 < power * 2.0**-14  # subnormal: rounded to 2**-16, by at most half
    near = finite & ~far
    np.testing.assert_allclose(got[near], wanted[near], rtol=2.0**-23)  # a division by 3
    rounded = finite & far
    assert (np.abs(got - wanted)[rounded] <= power[rounded] * 2.0**-17).all()


def test_layouts_that_cannot_be_say_why():
    x, t = Case(2, 64).arrays()
    with pytest.raises(ValueError, match="choose from"):
        pallas_kernels.transform_quantize(x, t, wush.MXFP4, layout="row")
    with pytest.raises(NotImplementedError, match="powers of two"):
        jax.eval_shape(lambda: pallas_kernels.transform_quantize(x, t, wush.NVFP4, layout="fp8"))
