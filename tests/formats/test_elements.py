"""Elements, rounding and packing against ml_dtypes and numpy: equal to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wush_jax.formats import elements
from wush_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, IntElement

pytestmark = pytest.mark.usefixtures("strict")

FLOATS = (E2M1, E2M3, E3M2, E4M3, E5M2)
INTS = [IntElement(f"int{b}{'_midrise' * m}", b, m) for b in (2, 4, 6, 8) for m in (False, True)]


def by_name(element):
    return element.name


def dense_grid(element):
    """All values, all midpoints, their float32 neighbours, and a fine ramp beyond the range."""
    values, _ = oracle.element_grid(element)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    top = np.float32(element.max)
    x = np.unique(
        np.concatenate(
            [
                points,
                np.nextafter(points, np.float32(np.inf)),
                np.nextafter(points, np.float32(-np.inf)),
                np.linspace(-1.5 * top, 1.5 * top, 5001, dtype=np.float32),
                np.float32([3e38, -3e38, np.inf, -np.inf]),
            ]
        )
    )
    return x[(np.abs(x) >= 2.0**-126) | (x == 0)]  # subnormal numbers count as zero


@pytest.mark.parametrize("element", FLOATS, ids=by_name)
def test_float_codes_equal_ml_dtypes(element):
    x = dense_grid(element)
    clipped = np.clip(x, -element.max, element.max)  # some casts overflow, the library saturates
    cast = clipped.astype(oracle.FLOATS[element.name])
    expected = np.where(cast == 0, 0, cast.view(np.uint8))  # +0, never -0
    codes = jax.jit(element.encode)(x)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(jax.jit(element.decode)(codes), cast.astype(np.float32))


@pytest.mark.parametrize("element", FLOATS, ids=by_name)
def test_every_float_code_decodes_as_ml_dtypes(element):
    codes = np.arange(2**element.bits, dtype=np.uint8)
    expected = codes.view(oracle.FLOATS[element.name]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(element.decode)(codes), expected)


@pytest.mark.parametrize("element", FLOATS, ids=by_name)
def test_element_constants(element):
    info = ml_dtypes.finfo(oracle.FLOATS[element.name])
    assert element.bits == info.bits
    assert element.max == float(info.max)
    assert element.max_exponent == np.floor(np.log2(float(info.max)))
    assert element.min_exponent == info.minexp
    assert element.max_code == len(oracle.float_grid(element.name)) - 1


@pytest.mark.parametrize("element", INTS, ids=by_name)
def test_integer_codes_equal_numpy(element):
    x = dense_grid(element)
    limit = 2 ** (element.bits - 1)
    if element.midrise:
        # The boundaries are the integers; np.round of half the sum would round them to even k.
        k = np.where(x == np.floor(x), 2 * np.ceil(np.clip(x, -300, 300) / 2 - 0.5), np.floor(x))
        k = np.clip(k, -limit, limit - 1)
    else:
        k = np.clip(np.round(x), 1 - limit, limit - 1)
    codes = jax.jit(element.encode)(x)
    np.testing.assert_array_equal(codes, k.astype(np.int64) % (2 * limit))
    decoded = jax.jit(element.decode)(codes)
    np.testing.assert_array_equal(decoded, k + 0.5 * element.midrise)


def test_midrise_ties_go_to_even_codes():
    x = np.float32([-3, -2, -1, 0, 1, 2, 3])
    codes = INTS[3].encode(x)  # int4 mid-rise: between k - 1 and k, whichever is even
    np.testing.assert_array_equal(codes, np.int32([-4, -2, -2, 0, 0, 2, 2]) % 16)


@pytest.mark.parametrize("element", [*FLOATS, *INTS], ids=by_name)
def test_nan_and_tiny_values(element):
    x = np.float32([np.nan, 0.0, -0.0, 1e-30, -1e-30])
    codes = np.asarray(jax.jit(element.encode)(x))
    nan_code = 2 ** (element.bits - 1) - 1
    assert codes[0] == (nan_code if element.bits == 8 and element in FLOATS else 0)
    # Zero has one code: never -0. (A mid-rise grid has no zero; -1e-30 is nearest to -1/2.)
    expected = np.array([0, 0, 0, 255 >> (8 - element.bits) if element in INTS[1::2] else 0])
    np.testing.assert_array_equal(codes[1:], expected)


@given(hnp.arrays(np.uint32, 64))
def test_bfloat16_rounding_equals_ml_dtypes(bits):
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    got = np.asarray(
        jax.jit(elements.round_to_bfloat16)(np.resize(x, 64) if x.size else np.zeros(64, "f4"))
    )
    np.testing.assert_array_equal(got[: x.size], expected)


def test_bfloat16_rounding_keeps_ties_infinities_and_nan():
    x = np.float32([1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, np.nan, 3.4e38])
    expected = np.float32([1, 1 + 2**-6, np.inf, -np.inf, np.nan, np.inf])
    np.testing.assert_array_equal(jax.jit(elements.round_to_bfloat16)(x), expected)


@given(hnp.arrays(np.uint32, 64))
def test_exponents_equal_frexp(bits):
    x = np.abs(bits.view(np.float32))
    x = np.where(np.isfinite(x) & (x >= 2.0**-126), x, np.float32(1))
    e = np.asarray(jax.jit(elements.floor_log2)(x))
    np.testing.assert_array_equal(e, oracle.floor_log2(x))
    np.testing.assert_array_equal(jax.jit(elements.exp2_int)(e), np.ldexp(np.float32(1), e))


@pytest.mark.parametrize("off", [-2, 0, 2])
def test_quotients_are_numpys(off):
    """Whatever a device's own division is off by, in units of the last place."""
    rng = np.random.default_rng(0)
    a, b = np.float32(rng.uniform(1, 2, (2, 100_000)) * 2.0 ** rng.integers(-30, 31, (2, 100_000)))
    exact = a / b
    near = (exact.view(np.int32) + off).view(np.float32)
    np.testing.assert_array_equal(jax.jit(elements._corrected)(near, a, b), exact)
    np.testing.assert_array_equal(elements.divide(a, b), exact)


def test_quotients_at_both_ends():
    a, b = np.float32([0, 1e-38, 3e38, 1, -3e38, 2]), np.float32([3, 2, 0.5, 3e38, 3e38, 2.0**-126])
    with np.errstate(over="ignore"):
        expected = a / b
    expected[np.abs(expected) < elements.TINY] = 0  # as on every backend
    got = np.array(elements.divide(a, b))
    got[np.abs(got) < elements.TINY] = 0
    np.testing.assert_array_equal(got, expected)


def test_round_half_even_equals_numpy():
    x = np.arange(0, 300, 0.25, dtype=np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.float32([2**23 + 1, 2**30])])
    np.testing.assert_array_equal(jax.jit(elements.round_half_even)(x), np.round(x))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [0x1, 0x2, 0xF, 0x0], [0x21, 0x0F]),  # even column in the low nibble
        (6, [1, 2, 3, 4, 63, 0, 63, 0], [0x81, 0x30, 0x10, 0x3F, 0xF0, 0x03]),
        (8, [0, 127, 255], [0, 127, 255]),
    ],
)
def test_packed_bytes(bits, codes, packed):
    np.testing.assert_array_equal(elements.pack(np.uint8(codes), bits), np.uint8(packed))
    np.testing.assert_array_equal(elements.unpack(np.uint8(packed), bits), np.uint8(codes))


@pytest.mark.parametrize("bits", [4, 6, 8])
@given(data=st.data())
def test_pack_round_trip(bits, data):
    shape = data.draw(st.sampled_from([(4,), (2, 12)]))
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = elements.pack(jnp.asarray(codes), bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    np.testing.assert_array_equal(elements.unpack(packed, bits), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: elements.pack(jnp.zeros(3, jnp.uint8), 4), "size 3.*4-bit.*multiple of 2: pad"),
        (lambda: elements.pack(jnp.zeros(6, jnp.uint8), 6), "size 6.*6-bit.*multiple of 4: pad"),
        (lambda: elements.unpack(jnp.zeros(4, jnp.uint8), 6), "size 4.*6-bit.*multiple of 3: pad"),
        (lambda: elements.pack(jnp.zeros(4, jnp.uint8), 5), "bits=5 .*use 4, 6 or 8"),
        (lambda: elements.unpack(jnp.zeros(4, jnp.uint8), 5), "bits=5 .*use 4, 6 or 8"),
    ],
)
def test_packing_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
