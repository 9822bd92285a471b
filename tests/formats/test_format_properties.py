"""What holds of any numbers in any format: finite results or a ValueError; damage is seen.

More of them with ``pytest --hypothesis-profile=long``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from material import (
    ALL,
    FOUR_OVER_SIX,
    NORMAL,
    ROWS,
    K,
    each_format,
    kinds,
    material,
    seeds,
)

import wush_jax as wush
from wush_jax.formats import elements

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("strict")]


@functools.partial(jax.jit, static_argnums=1)
def everything(x, fmt):
    """One compilation a format: values, codes, packed codes, scales, and decoded codes."""
    q = wush.quantize(x, fmt)
    parts = fmt.unpack(q.codes), q.codes, fmt.load_scales(q.scales), wush.dequantize(q)
    return wush.fake_quantize(x, fmt), *parts


def signed(fmt):
    """Whether scales have a sign, that of the group's largest value."""
    return fmt.rule == "signed_absmax"


def group(fmt):
    """Values of a group of the material: all of a row, where groups are longer."""
    return min(fmt.group_size, K) if fmt.short_last else fmt.group_size


def faked(x, fmt):
    return everything(x, fmt)[0]


@each_format
@given(seed=seeds, kind=kinds)
def test_finite_numbers_give_valid_codes_and_finite_values(fmt, seed, kind):
    x = material(seed, kind)
    fake, codes, packed, scales, values = map(np.asarray, everything(x, fmt))
    assert (codes < 2**fmt.element.bits).all()
    np.testing.assert_array_equal(pack(codes, fmt.element.bits), packed)
    assert ((np.abs(scales) if signed(fmt) else scales) > 0).all()
    assert np.isfinite(scales).all()
    assert np.isfinite(fake).all()
    if kind != "top":  # there the values themselves may round beyond float32
        np.testing.assert_array_equal(fake, values)


pack = jax.jit(elements.pack, static_argnums=1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.INT8], ids=lambda f: f.name)
@given(seed=seeds, kind=kinds)
def test_narrow_dtypes_saturate(fmt, dtype, seed, kind):
    x = material(seed, kind, dtype)
    out = faked(x, fmt)
    assert out.dtype == dtype
    limit = float(jnp.finfo(dtype).max)
    wide = np.asarray(faked(x.astype(np.float32), fmt))
    np.testing.assert_array_equal(out, np.clip(wide, -limit, limit).astype(dtype))


@each_format
@given(seed=seeds, kind=kinds, bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_damage_makes_its_groups_nan_and_no_others(fmt, seed, kind, bad):
    x = material(seed, kind)
    rng = np.random.default_rng(seed)
    hit = rng.random(x.shape) < 0.02
    groups = np.broadcast_to(
        hit.reshape(-1, group(fmt)).any(-1, keepdims=True), (x.size // group(fmt), group(fmt))
    )
    values = np.asarray(faked(np.where(hit, np.float32(bad), x), fmt))
    np.testing.assert_array_equal(np.isnan(values.reshape(groups.shape)), groups)
    assert not np.isinf(values).any()


@each_format
@given(seed=seeds, kind=kinds)
def test_signs_and_order_survive(fmt, seed, kind):
    """q(-x) = -q(x) on symmetric grids; x <= y of one group gives q(x) <= q(y) on all.

    Where a scale's sign is that of the largest value, only a group with two of those is not odd.
    """
    x = material(seed, kind)
    values = np.asarray(faked(x, fmt))
    if not getattr(fmt.element, "midrise", False):
        rows = x.reshape(-1, group(fmt))
        odd = (rows.max(-1) != -rows.min(-1)) | (not signed(fmt)) | ~rows.any(-1)
        mirrored = np.asarray(faked(-x, fmt)).reshape(rows.shape)
        np.testing.assert_array_equal(mirrored[odd], -values.reshape(rows.shape)[odd])
    # Subnormal numbers count as zero: also in the order.
    flushed = np.where(np.abs(x) < NORMAL, 0, x).reshape(-1, group(fmt))
    ordered = np.take_along_axis(values.reshape(flushed.shape), flushed.argsort(-1, "stable"), -1)
    assert (ordered[:, 1:] >= ordered[:, :-1]).all()


# Scales are powers of two, or follow the tensor's own global scale.
COVARIANT = [f for f in ALL.values() if f.scale_dtype in ("e8m0", "bfloat16")]


@pytest.mark.parametrize("fmt", COVARIANT, ids=lambda f: f.name)
@given(seed=seeds, exponent=st.integers(-40, 40))
def test_powers_of_two_pass_through(fmt, seed, exponent):
    x = material(seed, "plain") + np.float32(0.01)
    scaled = faked(np.ldexp(x, exponent).astype(np.float32), fmt)
    np.testing.assert_array_equal(scaled, np.ldexp(faked(x, fmt), exponent))


def test_no_rows_are_no_rows():
    assert faked(np.zeros((0, K), np.float32), FOUR_OVER_SIX).shape == (0, K)


def test_ranks_and_layouts_of_memory_are_the_same_numbers():
    x = material(0, "rows of any exponent")
    for fmt in (wush.MXFP4, wush.NVFP4):
        flat = np.asarray(faked(x, fmt))
        for shape in ((2, 2, K), (1, ROWS, 1, K)):
            np.testing.assert_array_equal(faked(x.reshape(shape), fmt), flat.reshape(shape))
        np.testing.assert_array_equal([faked(row, fmt) for row in x], flat)
        strided = np.zeros((2 * ROWS, K, 2), np.float32)[::-2, :, 1]
        strided[...] = x
        backwards = np.ascontiguousarray(x[:, ::-1])[:, ::-1]
        for view in (np.asfortranarray(x), strided, backwards):
            assert not view.flags.c_contiguous
            np.testing.assert_array_equal(faked(view, fmt), flat)


@pytest.mark.parametrize("g", [0.0, -1.0, np.nan, np.inf, 1e-46])
def test_global_scales_are_positive_and_finite(g):
    for value in (g, np.float32(g), jnp.float32(g)):
        with pytest.raises(ValueError, match=r"global_scale=.* must be positive and finite"):
            wush.quantize(jnp.ones(32), wush.MXFP4, global_scale=value)
