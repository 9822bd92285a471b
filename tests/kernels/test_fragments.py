"""Records of register fragments: round trips, what the kernels read in them, their size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wush_jax as wush
from pallas_kernels import fragments, reference

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
RECORDS = {
    "MXFP4": (wush.MXFP4, "bfloat16"),
    "MXFP4 in FP8": (wush.MXFP4, "float8"),
    "NVFP4": (wush.NVFP4, "bfloat16"),
    "NVINT4": (wush.NVINT4, "bfloat16"),
    "INT4": (wush.INT4, "bfloat16"),
}
each_record = pytest.mark.parametrize(("fmt", "operand"), RECORDS.values(), ids=RECORDS)
# N x K of Llama-3.1-8B: q and o, k and v, gate and up, down, the head.
LLAMA_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
# Ragged in 64 rows and in 128 columns, one record, several.
SHAPES = ((1, 32), (64, 128), (70, 160), (130, 288))


def scales_of(fmt, bits):
    """Stored scales of integers, as many of the type's bit patterns as weights may hold."""
    if fmt.scale_dtype == "e8m0":
        return bits.astype(np.uint8).view(jnp.float8_e8m0fnu)
    if fmt.scale_dtype == "e4m3":  # of integers with a sign, here that of odd bits
        sign = (bits & 1) << 7 if fmt.element.name == "int4_full" else 0
        return (bits & 0x7F | sign).astype(np.uint8).view(jnp.float8_e4m3fn)
    return bits.astype(np.uint16).view(jnp.bfloat16)


@st.composite
def weights(draw, fmt, least=0, most=None):
    """Random codes; scales over a drawn range of exponents; some groups zero, some NaN."""
    n, k = draw(st.sampled_from(SHAPES))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = random.integers(16, size=(n, k), dtype=np.uint8)
    groups = (n, k // fmt.group_size)
    limit = {"e8m0": 255, "e4m3": 127, "bfloat16": 0x7F80}[fmt.scale_dtype]  # the first is NaN
    low, high = sorted(draw(st.tuples(*[st.integers(least, most or limit - 1)] * 2)))
    scales = random.integers(low, high + 1, size=groups)
    zero = random.random(groups) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    codes[np.repeat(zero, fmt.group_size, axis=1)] &= 8  # zeros of both signs; INT4 has none
    nan = random.random(groups) < draw(st.sampled_from((0.0, 0.1)))
    scales[nan] = limit if fmt.scale_dtype != "bfloat16" else 0x7FC0
    g = draw(st.sampled_from((1.0, 3.0, 1e-3)))
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return wush.QuantizedArray(packed, scales_of(fmt, scales), np.float32(g), fmt)


@functools.partial(jax.jit, static_argnames="operand")
def there_and_back(weight, operand="bfloat16"):
    laid = fragments.lay_out(weight, operand)
    back = wush.QuantizedArray(*laid.interchange, laid.global_scale, laid.format)
    values = [reference.dequantize(q) for q in (weight, back, laid)]
    return laid, back, values


unpack = jax.jit(lambda weight: weight.format.unpack(weight.codes))


def integers(weight):
    """What a weight stands for: signed codes (N, K/g, g) and bits of scales, zeros alike."""
    fmt = weight.format
    size = np.uint16 if fmt.scale_dtype == "bfloat16" else np.uint8
    bits = np.asarray(weight.scales).view(size).astype(np.int32)
    codes = np.asarray(unpack(weight)).astype(np.int32).reshape(*bits.shape, -1)
    if fmt.element.name == "int4_midrise":
        return codes, bits
    if fmt.scale_dtype == "e8m0":
        bits = np.maximum(bits, 1)  # the format reads the lowest two bytes alike
    if fmt.element.name == "e2m1":
        codes = np.where(codes & 8, -(codes & 7), codes)
    nan = np.isnan(np.asarray(weight.scales, np.float32))
    if fmt.scale_dtype == "e4m3":  # zeros and NaN of either sign
        bits = np.where((bits & 0x7F == 0) | nan, bits & 0x7F, bits)
    zero = ((codes == 0).all(-1) | (bits == 0)) & ~nan
    return np.where((nan | zero)[..., None], 0, codes), np.where(zero, 0, bits)


def deep(fmt, bits, operand):
    """Groups too far below the largest scale: records of MXFP4 and NVINT4 hold zeros for them."""
    if fmt == wush.NVINT4:
        scale = (bits & 0x7F).astype(np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
        octave = np.floor(np.log2(np.where(scale > 0, scale, 2.0**-9)))
        return (scale > 0) & (octave < octave[scale > 0].max(initial=-9) - fragments.TOP_FIELD)
    if fmt.scale_dtype != "e8m0":
        return np.zeros(bits.shape, bool)
    top = np.clip(bits[bits < 255].max(initial=1), *fragments.TOPS[operand])
    return (bits > 0) & (bits < top - fragments.TOP + fragments.LOWEST[operand])


@pytest.mark.once
@each_record
def test_round_trip_keeps_every_value(fmt, operand):
    @given(weights(fmt))
    def check(weight):
        laid, back, values = there_and_back(weight, operand)
        assert laid.shape == back.shape == weight.shape
        (codes, bits), found = integers(weight), integers(back)
        lost = deep(fmt, bits, operand)
        np.testing.assert_array_equal(np.where(lost[..., None], 0, codes), found[0])
        np.testing.assert_array_equal(np.where(lost, 0, bits), found[1])
        original, returned, direct = map(np.asarray, values)
        lost = np.repeat(lost, fmt.group_size, axis=1)
        np.testing.assert_array_equal(np.where(lost, 0, original), returned)
        np.testing.assert_array_equal(direct, returned)

    check()


def test_mxfp4_groups_far_below_the_largest_become_zero():
    byte = np.uint8([[7, 127, 6, 0]]).view(jnp.float8_e8m0fnu)
    weight = wush.QuantizedArray(np.full((1, 64), 0x22, np.uint8), byte, np.float32(1), wush.MXFP4)
    _, _, (_, returned, _) = there_and_back(weight)
    np.testing.assert_array_equal(returned[0, ::32], np.float32([2.0**-120, 1, 0, 0]))


@jax.jit
def expanded(laid):
    """A weight's operands, (N, K) padded to whole records, which add up to it, and its unit."""
    from pallas_kernels.hopper import expand, float8

    c = fragments.carrier(laid.format, laid.operand)
    plain = (lambda c, r: (float8.plain(c, r),)) if laid.operand == "float8" else expand.plain
    parts = jax.vmap(jax.vmap(functools.partial(plain, c)))(laid.records)
    n, k = laid.records.shape[:2]
    return [p.swapaxes(1, 2).reshape(64 * n, 128 * k) for p in parts], laid.unit


@NEEDS_MOSAIC
@each_record
def test_what_the_kernels_expand_is_the_weight(fmt, operand):
    """``unit * sum(parts) = code * scale``, without error, and zeros around it."""
    grid = np.asarray(fmt.element.decode(jnp.arange(16, dtype=jnp.uint8)), np.float64)
    g = fmt.group_size

    # INT4: twelve bits of a product above the smallest float32, and below the largest.
    @given(weights(fmt, *((0x1000, 0x7000) if fmt == wush.INT4 else (0, None))))
    def check(weight):
        laid, _, _ = there_and_back(weight, operand)
        parts, unit = expanded(laid)
        n, k = weight.shape
        assert not any(np.asarray(p, np.float32)[n:].any() for p in parts)
        assert not any(np.asarray(p, np.float32)[:, k:].any() for p in parts)
        scale = np.repeat(np.asarray(fmt.load_scales(weight.scales), np.float64), g, axis=1)
        wanted = grid[np.asarray(unpack(weight))] * scale / np.float64(unit)
        lost = deep(fmt, integers(weight)[1], operand)
        wanted = np.where(np.repeat(lost, g, axis=1), 0, wanted)
        # Damaged groups of these hold NaN.
        damaged = np.isnan(wanted) & (fmt in (wush.MXFP4, wush.NVINT4))
        total = sum(np.asarray(p, np.float64)[:n, :k] for p in parts)
        # What this twin computes flushes subnormal numbers on a CPU and keeps them on a GPU.
        total, wanted = (np.where(np.abs(a) < 2.0**-126, 0, a) for a in (total, wanted))
        assert np.isnan(total[damaged]).all()
        np.testing.assert_array_equal(total[~damaged], wanted[~damaged])

    check()


@pytest.mark.parametrize("shape", LLAMA_8B)
@pytest.mark.parametrize(
    ("fmt", "bits"),
    [(wush.MXFP4, 4.25), (wush.NVFP4, 4.5), (wush.NVINT4, 4.5), (wush.INT4, 4.5)],
)
def test_bits_of_a_weight_with_all_that_belongs_to_it(fmt, bits, shape):
    """These shapes need no padding; two scalars come on top."""
    weight = jax.eval_shape(
        lambda: fragments.lay_out(wush.quantize(jnp.zeros(shape, jnp.bfloat16), fmt))
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    assert 8 * (size - 8) == bits * shape[0] * shape[1]


def test_formats_without_a_record():
    with pytest.raises(NotImplementedError, match=r"no register layout for INT8"):
        jax.eval_shape(lambda: fragments.lay_out(wush.quantize(jnp.ones((2, 32)), wush.INT8)))
    weight = jax.eval_shape(lambda: wush.quantize(jnp.ones((2, 32)), wush.NVFP4))
    with pytest.raises(NotImplementedError, match=r"NVFP4 is not exact in FP8"):
        jax.eval_shape(lambda w: fragments.lay_out(w, "float8"), weight)
