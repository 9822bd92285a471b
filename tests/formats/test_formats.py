"""Scale rules, formats and quantized arrays: oracles in float64, golden bytes, properties."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from format_cases import (
    CASES,
    MX,
    NV,
    contents,
    dequantize,
    each_format,
    fake_quantize,
    few_formats,
    quantize,
    round_trip,
    samples,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import wush_jax as wush
from wush_jax.formats import FORMATS
from wush_jax.formats.format import SCALE_DTYPES
from wush_jax.formats.scales import E8M0_RANGE, GAUSSIAN_CLIP, RULES

pytestmark = pytest.mark.usefixtures("strict")


@each_format
def test_codes_scales_and_values_equal_the_oracle(fmt, bound):
    x = samples((256, fmt.group_size))
    q = quantize(x, fmt)
    g = float(q.global_scale)
    codes, scales, values, decided = oracle.quantize(x.astype(np.float64), fmt, g)
    # 16 or 32 values a group, each within 1e-6 of a boundary with probability about 1e-5.
    assert decided.mean() > 0.9
    got = [np.asarray(found)[decided] for found in contents(q)]
    np.testing.assert_array_equal(got[0], codes[decided])
    np.testing.assert_array_equal(got[1][:, 0], scales[decided])
    # One division and one product in float32, each off by at most 1 ulp (2**-23).
    np.testing.assert_allclose(got[2], values[decided], rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("rule", sorted(set(RULES) & {"ocp_floor", "round_175", "ceil"}))
def test_power_of_two_rules_at_the_edges_of_a_binade(rule):
    """Exact arithmetic: no allowance at all, also for the neighbours of the rules' thresholds."""
    edges = np.float32([1, 1.25, 1.5, 1.75, 1.875, 3, 6, 7, 7.5, 8])
    edges = np.concatenate(
        [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, edges * 2)]
    )
    x = np.zeros((len(edges), 32), np.float32)
    x[:, 0], x[:, 5] = edges, -edges / 3
    fmt = MX.replace(rule=rule)
    q = quantize(x, fmt)
    codes, scales, values, _ = oracle.quantize(x.astype(np.float64), fmt, 1.0)
    found = contents(q)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1][:, 0], scales)
    np.testing.assert_array_equal(found[2], values)


def test_derived_global_scales():
    x = samples()
    amax = np.abs(x).max()
    for fmt, top in ((NV, 448), (NV.replace(rule="four_over_six"), 256)):
        g = quantize(x, fmt).global_scale
        np.testing.assert_allclose(g, top * 6 / amax, rtol=2.4e-7)  # one division
        assert quantize(np.zeros((3, 32), np.float32), fmt).global_scale == 1
    assert quantize(x, wush.NVFP4).global_scale == 10
    assert quantize(x, wush.MXFP4).global_scale == 3
    assert quantize(x, wush.MXFP4, global_scale=3.5).global_scale == 3.5


@pytest.mark.parametrize("rule", ["four_over_six", "three_candidates"])
def test_candidates_never_lose_to_absmax(rule):
    x = samples((256, 16))
    g = 256 * 6 / np.abs(x).max()
    plain = ((round_trip(x, NV, g) - x) ** 2).sum(-1)
    best = ((round_trip(x, NV.replace(rule=rule), g) - x) ** 2).sum(-1)
    assert (best <= plain * (1 + 1e-5)).all()  # both errors are sums of float32 squares
    assert best.sum() < 0.97 * plain.sum()  # it pays on heavy tails: FORMATS' reason for the rule


@pytest.mark.parametrize("bits", sorted(GAUSSIAN_CLIP))
def test_gaussian_clip_is_the_best_clip(bits):
    """The constants minimise the squared error of N(0, 1), by quadrature over a fine grid."""
    x = np.linspace(-8, 8, 40001)
    density = np.exp(-(x**2) / 2)

    def error(clip):
        step = 2 * clip / (2**bits - 1)
        k = np.clip(np.floor(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (density * (x - (k + 0.5) * step) ** 2).sum()

    best = GAUSSIAN_CLIP[bits]
    assert error(best) < error(best * 1.02)
    assert error(best) < error(best * 0.98)


# Literal bytes: values, then packed codes and scale bytes, worked out by hand.
@pytest.mark.parametrize(
    ("fmt", "values", "codes", "scales"),
    [
        # amax 1.75: e = 0, codes of 3x = 5.25, -3, 1.5, .75 (tie -> 1, even code), -.24, 0
        (wush.MXFP4, [1.75, -1, 0.5, 0.25, -0.08, 0], "d723 00" + "00" * 13, "7f"),
        # amax 0.6: s = e4m3(10 * .6 / 6) = 1; codes of 10x = 6, -3, .25 (tie -> 0), 5 (tie -> 4)
        (wush.NVFP4, [0.6, -0.3, 0.025, 0.5], "d760" + "00" * 6, "38"),
        # all +-1: rms 1, s = bf16(.3351908) = .335938; 1/s = 2.98 -> k = 2, -1/s -> k = -3
        (wush.INT4, [1, -1] * 16, "d2" * 16, "ac3e"),
        # amax .8 is positive: s = -1; codes of -10x = -8, 4, 7.6 -> 7 (clips), -.6, 1.4
        (wush.NVINT4, [0.8, -0.4, -0.76, 0.06, -0.14], "48 f7 01" + "00" * 5, "b8"),
        # amax .8 is negative, s = 1: codes of 10x
        (wush.NVINT4, [-0.8, 0.4, 0.7], "48 07" + "00" * 6, "38"),
        # amax 449 > 448: e = 1, codes of x/2: 224.5 -> 224, -448 -> -224, 2**-9 -> 1 of 2**-9
        (wush.FP8.replace(group_size=4), [449, -448, 2**-8, 2**-10], "76f60100", "80"),
    ],
    ids=["MXFP4", "NVFP4", "INT4", "NVINT4 negative", "NVINT4", "FP8"],
)
def test_golden_bytes(fmt, values, codes, scales):
    x = np.zeros(fmt.group_size, np.float32)
    x[: len(values)] = values
    q = quantize(x, fmt)
    assert np.asarray(q.codes).tobytes() == bytes.fromhex(codes)
    assert np.asarray(q.scales).tobytes() == bytes.fromhex(scales)


@pytest.mark.parametrize("k", [1, 64, 512, 576, 1100])
def test_a_short_last_group_is_a_group(k):
    """FP8: what a row of K columns gives is what its groups give, each alone."""
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((4, k)) * np.exp2(rng.uniform(-12, 12, (1, k)))).astype(np.float32)
    x[3] = 0
    q = quantize(x, wush.FP8)
    assert (q.shape, q.codes.shape, q.scales.shape) == ((4, k), (4, k), (4, -(-k // 512)))
    values = dequantize(q)
    for group, start in enumerate(range(0, k, 512)):
        part = x[:, start : start + 512]
        codes, scales, expected, decided = oracle.quantize(
            np.where(part == 0, 1e-30, part).astype(np.float64)[:3], wush.FP8, 1.0
        )
        assert decided.all()
        np.testing.assert_array_equal(q.codes[:3, start : start + 512], codes)
        np.testing.assert_array_equal(np.float32(q.scales[:3, group]), scales)
        np.testing.assert_array_equal(values[:3, start : start + 512], expected)
    assert (values[3] == 0).all()
    x[1, -1] = np.inf
    hurt = dequantize(quantize(x, wush.FP8))
    last = (k - 1) // 512 * 512
    assert np.isnan(hurt[1, last:]).all()
    np.testing.assert_array_equal(hurt[1, :last], values[1, :last])
    np.testing.assert_array_equal(np.delete(hurt, 1, 0), np.delete(values, 1, 0))


# ------------------------------------------------------------------ properties

VALUES = st.floats(width=32, allow_subnormal=False, min_value=-(2.0**100), max_value=2.0**100)
TENSORS = hnp.arrays(np.float32, (3, 32), elements=VALUES)
NORMAL = hnp.arrays(np.float32, (3, 32), elements=st.floats(-1, 1, width=32, allow_subnormal=False))


@each_format
@given(x=NORMAL, exponent=st.integers(-30, 30))
def test_error_is_bounded(fmt, bound, x, exponent):
    """Where neither scale nor global scale saturates or vanishes."""
    if fmt.global_scale == 10.0:
        exponent = 0  # a fixed global scale serves amax up to 448 * 6 / 10
    x = np.ldexp(x, exponent)
    groups = x.reshape(-1, fmt.group_size)
    amax = np.abs(groups).max(-1, keepdims=True)
    # E4M3 scales below 2**-6 are subnormal and lose precision; global scales of tensors below
    # 1e-30 would overflow float32. Both by design.
    least = 0.01 if fmt.global_scale == 10.0 else max(2.0**-14 * amax.max(), 1e-30)
    error = np.abs(round_trip(x, fmt).reshape(groups.shape) - groups)
    # Rounding of scales and products in float32: a few ulps.
    assert (error <= amax * bound * (1 + 1e-6))[np.broadcast_to(amax > least, error.shape)].all()


IDEMPOTENT = {name: case for name, case in CASES.items() if name not in ("MXFP4", "INT4")}


@pytest.mark.parametrize(("fmt", "bound"), IDEMPOTENT.values(), ids=IDEMPOTENT)
@given(x=NORMAL)
def test_idempotent_where_the_rule_is(fmt, bound, x):
    """A second pass changes nothing: the rounded amax leads back to a scale that holds all codes.

    True of every rule whose amax lands on the top of the grid or stays in its binade. Not where
    E4M3 scales are subnormal (they move amax by up to a third), so small groups are left out.
    """
    groups = x.reshape(-1, fmt.group_size)
    large = np.abs(groups).max(-1, keepdims=True) > 0.01
    g = fmt.global_scale or 10.0
    values = round_trip(np.where(large, groups, np.float32(0)).reshape(x.shape), fmt, g)
    np.testing.assert_array_equal(round_trip(values, fmt, g), values)


def test_not_idempotent_where_the_rule_is_not():
    """pow2_div3: 1.9 rounds up to 2, the next binade, whose grid lacks 1/6. INT4: the rms moves."""
    x = np.zeros((3, 32), np.float32)
    x[0, :2] = 1.9, 0.2
    once = round_trip(x, wush.MXFP4)
    np.testing.assert_allclose(once[0, :2], [2, 1 / 6], rtol=1e-6)  # float32 thirds
    np.testing.assert_array_equal(round_trip(once, wush.MXFP4)[0, :2], [2, 0])
    once = round_trip(samples(), wush.INT4)
    assert (round_trip(once, wush.INT4) != once).any()


@each_format
@given(x=TENSORS, bad=st.sampled_from([np.nan, np.inf, -np.inf]), at=st.integers(0, 95))
def test_damage_stays_in_its_group(fmt, bound, x, bad, at):
    x = np.clip(x, -1e4, 1e4)
    damaged = x.copy()
    damaged.flat[at] = bad
    # A derived global scale is a property of the whole tensor, so one is given.
    good, hurt = (round_trip(v, fmt, 1.5).reshape(-1, fmt.group_size) for v in (x, damaged))
    group = at // fmt.group_size
    assert np.isnan(hurt[group]).all()
    np.testing.assert_array_equal(np.delete(hurt, group, 0), np.delete(good, group, 0))
    derived = round_trip(damaged, fmt).reshape(-1, fmt.group_size)
    assert np.isfinite(np.delete(derived, group, 0)).all()


@each_format
@given(x=TENSORS)
def test_finite_in_finite_out(fmt, bound, x):
    assert np.isfinite(round_trip(x, fmt)).all()


@each_format
def test_extremes_and_zeros(fmt, bound):
    ramp = np.linspace(-1, 1, 32, dtype=np.float32)
    for size in np.float32([0, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e38]):
        x = size * np.stack([ramp, 0 * ramp, ramp**2])
        out = round_trip(x, fmt)
        assert np.isfinite(out).all()
        if not getattr(fmt.element, "midrise", False):
            assert (out[1] == 0).all()  # a group of zeros gives zeros
            assert (out * np.sign(x) >= 0).all()  # signs survive, or values vanish
        if size > 1e-31 and fmt.scale_dtype != "e4m3":  # power-of-two and bfloat16 scales reach far
            assert (np.abs(out - x) <= size * bound * (1 + 1e-6)).all()


@each_format
def test_subnormal_numbers_count_as_zero(fmt, bound):
    x = samples() * np.float32(2.0**-110)
    x[:, ::2] = 1e-39
    clean = np.where(np.abs(x) < 2.0**-126, np.float32(0), x)
    g = fmt.global_scale or 1e30
    np.testing.assert_array_equal(round_trip(x, fmt, g), round_trip(clean, fmt, g))
    np.testing.assert_array_equal(
        round_trip(0 * x - np.float32(1e-40), fmt), round_trip(0 * x, fmt)
    )


@few_formats
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_their_float32_values(fmt, bound, dtype):
    x = jnp.asarray(samples(), dtype)
    out = fake_quantize(x, fmt)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, round_trip(x.astype(jnp.float32), fmt).astype(out.dtype))


@each_format
def test_shapes_and_storage(fmt, bound):
    x = samples()
    q = quantize(x, fmt)
    assert q.shape == x.shape
    assert (q.codes.dtype, q.codes.shape) == (jnp.uint8, (3, 32 * fmt.element.bits // 8))
    assert (q.scales.dtype, q.scales.shape) == (
        SCALE_DTYPES[fmt.scale_dtype],
        (3, 32 // fmt.group_size),
    )
    assert q.nbytes - 4 == x.size * fmt.bits_per_value / 8
    deep = jax.eval_shape(lambda v: wush.quantize(v, fmt), jnp.zeros((2, 5, 64)))
    assert deep.shape == (2, 5, 64)
    assert jax.eval_shape(wush.dequantize, deep).shape == (2, 5, 64)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wush.quantize(jnp.zeros((2, 48)), wush.MXFP4), r"\(2, 48\).*group_size=32: pad"),
        (lambda: wush.quantize(jnp.zeros((2, 0)), wush.MXFP4), r"\(2, 0\).*positive multiple"),
        (lambda: wush.quantize(jnp.float32(1), wush.MXFP4), r"shape \(\).*group_size=32"),
        (lambda: wush.quantize(jnp.zeros(32, int), wush.MXFP4), "dtype int32.*cast x first"),
        (lambda: wush.fake_quantize(jnp.zeros((2, 48)), wush.NVFP4.replace(group_size=32)), "48"),
        (lambda: MX.replace(rule="foo"), "rule='foo' is unknown; choose from .*'absmax'"),
        (lambda: MX.replace(scale_dtype="e9"), "scale_dtype='e9' is unknown; .*'bfloat16'"),
        (lambda: MX.replace(rule="absmax"), "rule='absmax' does not fit scale_dtype='e8m0'; power"),
        (lambda: NV.replace(rule="ceil"), "rule='ceil' does not fit scale_dtype='e4m3'"),
        (lambda: wush.INT8.replace(rule="four_over_six"), "'four_over_six'.*E2M1.*E4M3"),
        (lambda: wush.INT8.replace(rule="gaussian_mse"), "gaussian_mse.*mid-rise"),
        (lambda: wush.NVFP4.replace(rule="signed_absmax"), "signed_absmax.*full integer.*E4M3"),
        (lambda: wush.NVFP4.replace(short_last=True), "short_last=True.*'ceil'.*not 'absmax'"),
        (lambda: MX.replace(group_size=0), "group_size=0; give a whole number, at least 1"),
        (lambda: MX.replace(global_scale=-1.0), "global_scale=-1.0 must be positive"),
        (lambda: MX.replace(global_scale=float("nan")), "global_scale=nan must be positive"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_named_formats():
    assert {name: f.bits_per_value for name, f in FORMATS.items()} == {
        "MXFP4": 4.25,
        "NVFP4": 4.5,
        "INT4": 4.5,
        "NVINT4": 4.5,
        "INT8": 8.5,
        "FP8": 8 + 8 / 512,
        "MXFP8": 8.25,
        "MXFP6": 6.25,
        "INT4_ABSMAX": 4.5,
    }
    assert E8M0_RANGE == (-126, 127)
