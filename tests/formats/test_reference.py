"""The emulation: the definition that every kernel has to reproduce."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import pallas_kernels
import wush_jax as wush
from pallas_kernels import reference

pytestmark = pytest.mark.usefixtures("strict")

M, N, K, D = 8, 12, 64, 32
RNG = np.random.default_rng(0)
X = RNG.standard_normal((M, K)).astype(np.float32)
quantize = jax.jit(wush.quantize, static_argnums=1)
dequantize = jax.jit(wush.dequantize)
apply_transform = jax.jit(reference.apply_transform)
W = quantize(RNG.standard_normal((N, K)).astype(np.float32), wush.MXFP4)
ONE = np.stack([oracle.random_moment(RNG, D, 10) for _ in range(K // D)]).astype(np.float32)
TRANSFORMS = {"none": None, "shared": ONE[0], "blocks": ONE}
each_transform = pytest.mark.parametrize("t", TRANSFORMS.values(), ids=TRANSFORMS)


def exact_transform(x, t):
    if t is None:
        return x.astype(np.float64)
    t = np.broadcast_to(t, (K // D, D, D)).astype(np.float64)
    return np.einsum("...bi,bji->...bj", x.reshape(*x.shape[:-1], -1, D), t).reshape(x.shape)


@each_transform
def test_apply_transform(t):
    y = apply_transform(X, t)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact_transform(X, t), atol=1e-6)  # 32 products below 1


@each_transform
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
def test_transform_quantize_is_transform_then_quantize(fmt, t):
    run = jax.jit(lambda x, t: reference.transform_quantize(x, t, fmt))
    codes, scales = run(X, t)
    q = quantize(apply_transform(X, t), fmt)
    # The same float32 products on both sides; only XLA's fusion may reorder a sum of 32.
    assert (np.asarray(codes) == np.asarray(q.codes)).mean() > 0.99
    np.testing.assert_array_equal(fmt.load_scales(scales), fmt.load_scales(q.scales))


def test_quantized_matmul_of_values_and_of_codes():
    weight = np.asarray(dequantize(W), np.float64)
    q = quantize(X, wush.MXFP8)
    for x, values in ((X, X), (q, dequantize(q))):
        y = jax.jit(reference.quantized_matmul)(x, W)
        assert y.dtype == jnp.float32
        expected = np.asarray(values, np.float64) @ weight.T
        np.testing.assert_allclose(y, expected, atol=1e-5)  # 64 products of order 1
    types = jax.eval_shape(
        lambda: (
            reference.quantized_matmul(jnp.asarray(X, jnp.bfloat16), W),
            reference.quantized_matmul(q, W, out_dtype=jnp.float16),
        )
    )
    assert [t.dtype for t in types] == [jnp.bfloat16, jnp.float16]


@each_transform
@pytest.mark.parametrize("fmt", [None, wush.MXFP4], ids=["weights only", "MXFP4"])
def test_the_whole_map_is_its_parts(fmt, t):
    y = jax.jit(lambda x, t: reference.transform_quantize_matmul(x, t, W, fmt))(X, t)
    moved = apply_transform(X, t)
    if fmt is not None:
        moved = dequantize(quantize(moved, fmt))
    parts = jax.jit(reference.quantized_matmul)(moved, W)
    np.testing.assert_allclose(y, parts, atol=1e-5)


def test_dequantize_is_the_library_s():
    np.testing.assert_array_equal(jax.jit(reference.dequantize)(W), dequantize(W))


OPS = {
    "transform_quantize": lambda **o: pallas_kernels.transform_quantize(X, ONE, wush.MXFP4, **o),
    "quantized_matmul": lambda **o: pallas_kernels.quantized_matmul(X, W, **o),
    "transform_quantize_matmul": lambda **o: pallas_kernels.transform_quantize_matmul(
        X, ONE, W, wush.MXFP4, **o
    ),
}


def test_a_packed_weight_serves_whole():
    packed = wush.PackedWeight(W, ONE, jnp.float32(3.0), wush.MXFP4)
    whole = pallas_kernels.transform_quantize_matmul(X, ONE, packed)
    parts = pallas_kernels.transform_quantize_matmul(X, ONE, W, wush.MXFP4, global_scale=3.0)
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(
        pallas_kernels.quantized_matmul(X, packed), pallas_kernels.quantized_matmul(X, W)
    )
    with pytest.raises(ValueError, match="packed is a bare weight: pass fmt"):
        pallas_kernels.transform_quantize_matmul(X, ONE, W)


@pytest.mark.parametrize("op", OPS)
def test_reference_can_be_forced_and_listed(op):
    forced = jax.jit(lambda: OPS[op](implementation="reference"))()
    listed = jax.jit(lambda: OPS[op](implementation=["reference"]))()
    jax.tree.map(np.testing.assert_array_equal, forced, listed)
    with pytest.raises(ValueError, match=f"implementation='magic' is unknown for {op}"):
        OPS[op](implementation="magic")
    with pytest.raises(ValueError, match="'magic'"):
        OPS[op](implementation=["reference", "magic"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reference.apply_transform(X, ONE[:1]),
            r"\(1, 32, 32\); for x \(8, 64\).*\(d, d\)",
        ),
        (lambda: reference.apply_transform(X, ONE[0, 0]), r"\(32,\)"),
        (
            lambda: pallas_kernels.transform_quantize(X[:, :40], None, wush.MXFP4),
            r"\(8, 40\); .*multiple of the group size 32: pad",
        ),
        (
            lambda: pallas_kernels.transform_quantize(X, ONE[:1], wush.MXFP4),
            r"\(1, 32, 32\); for x \(8, 64\)",
        ),
        (
            lambda: pallas_kernels.quantized_matmul(X[:, :32], W),
            r"\(8, 32\).*\(12, 64\).*agree in K",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
