"""Library paths against the definition, on CPU where they run there, lowered for CUDA elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import normal

import pallas_kernels
import wush_jax as wush
from pallas_kernels import exactly, fragments, precision, repack
from pallas_kernels.hopper import fp8_kernel
from pallas_kernels.library import scaled_dot, xla_fp8

FORMATS = [wush.MXFP4, wush.NVFP4, wush.INT4]


# One program each: operation by operation, these tests would be hundreds of them.
quantize = jax.jit(wush.quantize, static_argnums=1)
dequantize = jax.jit(wush.dequantize)


@functools.partial(jax.jit, static_argnums=2)
def product(x, w, implementation):
    return pallas_kernels.quantized_matmul(
        x, w, out_dtype=jnp.float32, implementation=implementation
    )


@functools.cache
def operands(fmt, m=5, n=24, k=128):
    x, w = normal(3, (m, k)), normal(4, (n, k))
    return x.astype(jnp.bfloat16), quantize(x, fmt), quantize(w, fmt)


def exact(*operands):
    """Values in float64."""
    return [np.asarray(dequantize(q) if hasattr(q, "codes") else q, np.float64) for q in operands]


@jax.jit
def scaled(q):
    """Values times their global scale: exact in float32, where the quotient need not be."""
    return q.format.decode(q.format.unpack(q.codes), q.scales, jnp.float32(1))


def near(y, x, w):
    """Float32 sums of K exact products, in any order: K units of last place of their magnitudes."""
    x, w = exact(x, w)
    bound = w.shape[1] * 2**-23 * (np.abs(x) @ np.abs(w).T)
    assert np.all(np.abs(np.asarray(y, np.float64) - x @ w.T) <= bound)


@pytest.mark.parametrize("layout", ["interchange", "fragments"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_bfloat16_operands_are_exact(fmt, layout):
    x, xq, w = operands(fmt)
    weight = w if layout == "interchange" else fragments.lay_out(w)
    for left in (x, xq):
        near(product(left, weight, "xla"), left, w)


# Of other libraries' files.
WIDE_SCALES = wush.formats.INT4_ABSMAX.replace(name="WIDE", scale_dtype="float32", group_size=16)
FP8_FILES = wush.MXFP8.replace(name="E4M3_G64", scale_dtype="float32", rule="absmax", group_size=64)
INT8_FILES = wush.formats.INT8.replace(name="INT8_G32", scale_dtype="float32")
SUMS = [*FORMATS, wush.NVINT4, wush.MXFP8, wush.FP8, WIDE_SCALES, FP8_FILES, INT8_FILES]
SUMS.append(wush.formats.INT8)


@pytest.mark.parametrize("fmt", SUMS, ids=lambda f: f.name)
def test_a_quantized_value_is_a_sum_of_bfloat16_numbers(fmt):
    q = quantize(normal(0, (8, 64)) * 1e-3, fmt)
    parts = jax.jit(lambda q: exactly.bfloat16_parts(q.codes, q.scales, fmt))(q)
    whole = sum(np.asarray(part, np.float64) for part in parts)
    np.testing.assert_array_equal(whole, scaled(q))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_whole_layer_on_matrix_units(fmt):
    x, _, w = operands(fmt)
    t = wush.hadamard_transform(fmt.group_size).activation.astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=3)
    def layer(x, t, w, implementation):
        return pallas_kernels.transform_quantize_matmul(
            x, t, w, fmt, out_dtype=jnp.float32, implementation=implementation
        )

    y, expected = layer(x, t, w, "xla"), layer(x, t, w, "reference")
    # The same codes but where another order of float32 sums crosses a boundary: one step of a code
    # of the largest magnitude at most.
    assert np.mean(np.abs(y - expected) > 1e-5 * np.abs(expected).max()) < 0.02


@jax.jit
def folded(q):
    return xla_fp8.of_codes(q.codes, q.scales)


def in_order(values):
    """Undo the order of `repack.to_lanes`, in float64."""
    values = np.asarray(values, np.float64)
    lanes = values.reshape(len(values), -1, 2, 4, 4).transpose(0, 1, 4, 3, 2)
    return lanes.reshape(values.shape)


def test_fp8_activations_are_exact_over_26_octaves():
    """But for the order of columns, and below the window."""
    fmt = wush.MXFP4
    x = normal(1, (4, 64))
    octaves = jnp.array([-13, -12, -5, 0, 3, 7, 12, 13]).reshape(4, 2)
    x = x.at[:, ::32].set(2.0) * jnp.exp2(jnp.repeat(octaves, 32, axis=1))
    x = jnp.clip(x, -4 * jnp.abs(x[:, :1]), 4 * jnp.abs(x[:, :1]))
    q = quantize(x, fmt)
    values, power = folded(q)
    np.testing.assert_array_equal(in_order(values) * float(power), scaled(q))


def test_fp8_activations_below_the_window_lose_little():
    """Groups 27 octaves below the top scale of 2**13 become zeros: at most 6 * 2**-14 is lost."""
    fmt = wush.MXFP4
    x = normal(2, (2, 64)).at[1].multiply(2.0**-34)
    q = quantize(x, fmt)
    values, power = folded(q)
    error = np.abs(in_order(values) * float(power) - scaled(q))
    assert 0 < error.max() <= 6 * 2.0**-14 * float(power)
    assert not in_order(values)[1].any()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11")
@pytest.mark.parametrize("m", [8, 1024])
def test_fp8_activations_lower_for_cuda(m):
    def to_float8(codes, scales):
        return fp8_kernel.activations(codes, scales, jnp.int32(130))

    shapes = ((m, 64 * 33), jnp.uint8), ((m, 4 * 33), jnp.float8_e8m0fnu)
    traced = jax.jit(to_float8).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert traced.out_info.shape == (m, 128 * 33)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("asked", "fast"),
    [(None, False), ("highest", False), ("default", True), (jax.lax.Precision.DEFAULT, True)],
)
def test_who_asks_for_short_sums_gets_them(asked, fast):
    assert precision.fast(asked, 4096) is fast
    assert not precision.fast(asked, 4128)


def test_what_no_product_knows_is_said():
    for asked in (None, "highest", "default", "folded", jax.lax.Precision.HIGH):
        precision.check(asked)
    with pytest.raises(ValueError, match=r"precision='foldd' is unknown.*'folded'"):
        pallas_kernels.quantized_matmul(*operands(wush.MXFP4)[1:], precision="foldd")


def test_jax_settings_count_for_short_sums():
    with jax.default_matmul_precision("bfloat16"):
        assert precision.fast(None, 64)
        assert not precision.fast("highest", 64)
    with jax.default_matmul_precision("highest"):
        assert not precision.fast(None, 64)


def test_fp8_keeps_what_is_not_finite():
    fmt = wush.MXFP4
    q = quantize(jnp.ones((2, 64)).at[1, 3].set(jnp.nan), fmt)
    values, power = folded(q)
    assert np.isfinite(float(power))
    assert np.isnan(np.asarray(values, np.float32)).sum(axis=1).tolist() == [0, 32]


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="no CPU lowering in this jax")
def test_block_scaled_product_equals_the_definition():
    _, x, w = operands(wush.NVFP4, m=128, n=128, k=128)
    near(jax.jit(lambda x, w: scaled_dot.matmul(x, w, jnp.float32))(x, w), x, w)


def test_block_scaled_product_lowers_for_cuda():
    _, x, w = operands(wush.NVFP4, m=128, n=128, k=128)
    traced = jax.jit(lambda x, w: scaled_dot.matmul(x, w, jnp.bfloat16)).trace(x, w)
    assert "block_scaled_dot" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "fmt", "reason"),
    [
        ("scaled_dot", wush.NVFP4, "compute capability"),
        ("xla_fp8", wush.MXFP4, "jax 0.11|NVIDIA GPU|lay_out"),
        ("xla", wush.MXFP6, "two bfloat16"),
    ],
)
def test_what_a_path_lacks_is_said(name, fmt, reason):
    _, x, w = operands(fmt)
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.quantized_matmul(x, w, implementation=name)


def test_the_block_scaled_product_takes_only_nvfp4():
    x, _, w = operands(wush.NVFP4)
    with pytest.raises(NotImplementedError, match="no array of codes"):
        scaled_dot.matmul(x, w, jnp.float32)
    _, x, w = operands(wush.MXFP4)
    with pytest.raises(NotImplementedError, match="NVFP4"):
        scaled_dot.matmul(x, w, jnp.float32)


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k"), [(8, 128), (264, 1152)])
def test_fp8_activations_on_gpu(m, k):
    """Every byte of codes, none of them -0, under every scale up to the largest, NaN too."""
    codes = jax.random.bits(jax.random.key(0), (m, k // 2), jnp.uint8)
    codes = jnp.where((codes & 7 == 0) | (codes & 0x70 == 0), codes & 0x77, codes)
    every = (jnp.arange(m * k // 32) % 256).reshape(m, -1)
    for top in (14, 140, 254):
        byte = jnp.where(every == 255, 255, jnp.minimum(every, top))
        scales = jax.lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.float8_e8m0fnu)
        got = jax.jit(fp8_kernel.activations)(codes, scales, jnp.int32(top))
        wanted = repack.in_float8(codes, byte, top)
        np.testing.assert_array_equal(*(np.asarray(v, np.float32) for v in (got, wanted)))


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["gaussian", "outliers", "same sign"])
@pytest.mark.parametrize(("m", "n", "k"), [(256, 512, 1024), (64, 256, 14336)])
def test_fp8_path_on_gpu(m, n, k, data):
    """Sums leave the tensor core's short accumulator every few hundred columns: 13 bits each time.

    Errors of one step of 2**-13 of the partial sums, of up to 128 columns each, bound the rest.
    """
    x, w = normal(5, (m, k)), normal(6, (n, k))
    if data == "outliers":
        x = x.at[:, ::97].multiply(50)
    if data == "same sign":
        x, w = jnp.abs(x), jnp.abs(w)
    x, w = quantize(x, wush.MXFP4), quantize(w, wush.MXFP4)
    y = product(x, fragments.lay_out(w, "float8"), "xla_fp8")
    a, b = exact(x, w)
    assert np.all(np.abs(np.asarray(y, np.float64) - a @ b.T) <= 2**-13 * (np.abs(a) @ np.abs(b).T))
