"""Packed matmuls: lowered for CUDA on any host, and against float64 products on a GPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_tools import exact, values, weight_of

import pallas_kernels
import wush_jax as wush
from pallas_kernels import fragments, reference, repack
from pallas_kernels.hopper import matmul, mosaic_gpu
from pallas_kernels.hopper.tiles import Tiling

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
FORMATS = {fmt.name: fmt for fmt in (wush.MXFP4, wush.NVFP4, wush.NVINT4, wush.INT4)}
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
TOKENS = (1, 5, 8, 13, 16, 40, 200)


launch = functools.partial(matmul.launch, device="NVIDIA H200")


def shapes(m, k, n, fmt, quantized=False):
    """An x (M, K) and a weight (N, K) in the kernels' layout, without values."""

    def make():
        x = jnp.zeros((m, k), jnp.bfloat16)
        weight = wush.quantize(jnp.zeros((n, k)), fmt)
        return wush.quantize(x, fmt) if quantized else x, fragments.lay_out(weight)

    return jax.eval_shape(make)


# Lowered for CUDA on any host --------------------------------------------------------------------


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("m", "k", "n", "fmt", "quantized"),
    [
        (1, 4096, 6144, wush.MXFP4, False),
        (8, 160, 70, wush.NVFP4, False),
        (16, 1024, 200, wush.INT4, False),
        (16, 1024, 200, wush.NVINT4, False),
        (1, 96, 1, wush.MXFP4, True),
        (8, 14336, 4096, wush.INT4, True),
        (200, 160, 70, wush.MXFP4, False),
    ],
)
def test_lowers_for_cuda_as_one_kernel(m, k, n, fmt, quantized):
    x, weight = shapes(m, k, n, fmt, quantized)
    traced = jax.jit(launch).trace(x, weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert traced.out_info.shape == (m, n)
    assert traced.out_info.dtype == (jnp.float32 if quantized else jnp.bfloat16)


@NEEDS_MOSAIC
@pytest.mark.parametrize(("m", "widths", "kernels"), [(4, (128, 64, 70), 1), (4, (70, 64), 2)])
def test_several_weights_lower_as_one_kernel(m, widths, kernels):
    """Unless one of them ends within a tile, and another follows."""
    x, _ = shapes(m, 256, 64, wush.MXFP4)
    weights = tuple(shapes(m, 256, n, wush.MXFP4)[1] for n in widths)
    run = functools.partial(matmul.launch_all, device="NVIDIA H200")
    traced = jax.jit(run).trace(x, weights)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == kernels
    assert [y.shape for y in traced.out_info] == [(m, n) for n in widths]


@NEEDS_MOSAIC
def test_mapped_activations_lower_too():
    x, weight = shapes(2, 128, 64, wush.MXFP4)
    x = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    traced = jax.jit(jax.vmap(launch, in_axes=(0, None))).trace(x, weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert traced.out_info.shape == (3, 2, 64)


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x, w, q: launch(x.astype(jnp.float32), w), "dtype float32"),
        (lambda x, w, q: launch(x, q), "interchange layout.*lay_out"),
        (lambda x, w, q: launch(x, w, out_dtype=jnp.int32), "out_dtype=int32"),
        (lambda x, w, q: launch(x[:0], w), r"x \(0, 128\)"),
        (lambda x, w, q: fragments.lay_out(wush.quantize(x, wush.MXFP8)), "no register layout"),
    ],
)
def test_what_the_kernels_lack_is_not_implemented(make, reason):
    x = jnp.ones((2, 128), jnp.bfloat16)
    q = jax.jit(wush.quantize, static_argnums=1)(x, wush.MXFP4)
    with pytest.raises(NotImplementedError, match=reason):
        make(x, fragments.lay_out(q), q)


def test_elsewhere_the_definition_serves_records():
    x = jnp.linspace(-1, 1, 6 * 64).reshape(6, 64)
    w = np.sin(np.arange(40.0 * 64, dtype=np.float32)).reshape(40, 64)
    q = jax.jit(wush.quantize, static_argnums=1)(w, wush.NVFP4)
    laid = fragments.lay_out(q)
    for name in (None, "reference"):
        run = functools.partial(pallas_kernels.quantized_matmul, implementation=name)
        np.testing.assert_array_equal(jax.jit(run)(x, laid), jax.jit(run)(x, q))
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*(NVIDIA GPU|jax 0.11)"):
            pallas_kernels.quantized_matmul(x, laid, implementation="mosaic_gpu")


# On a GPU ----------------------------------------------------------------------------------------

ON_GPU = ((4096, 6144), (14336, 4096), (160, 70), (1024, 200))  # K, N


def check_product(y, x, weight, kind, parts=1):
    """Compare with float64: each error against the sum of magnitudes, all errors together.

    A sum of K products in float32 by instructions of 16 is K/16 additions, each of which loses at
    most 2^-23 of what has been summed (tensor cores cut off, they do not round), and a few more
    roundings: of the parts' sums, of the factor. All together: each addition cuts off half a last
    place on average, always toward zero, so that the losses add up; a simulation of this loses
    0.42 times the bound.
    """
    x, weight = (np.asarray(a, np.float64) for a in (x, weight))
    error = np.abs(np.asarray(y, np.float64) - x @ weight.T)
    assert (error <= (x.shape[1] / 16 + 16) * 2.0**-23 * (np.abs(x) @ np.abs(weight).T)).all()
    if kind == "gaussian":
        losses = parts * x.shape[1] / 16
        assert np.linalg.norm(error) <= losses * 2.0**-24 * np.linalg.norm(x @ weight.T)


def parts_of(fmt):
    return 2 if fmt.element.name == "int4_midrise" else 1


run_matmul = jax.jit(
    functools.partial(
        pallas_kernels.quantized_matmul, out_dtype=jnp.float32, implementation="mosaic_gpu"
    )
)


PRODUCTS = [
    *((m, *shape, "gaussian") for m in TOKENS for shape in ON_GPU),
    *((m, 14336, 4096, kind) for m in (5, 16, 200) for kind in ("outliers", "one sign")),
]


def each_product(test):
    """Every format, shape and M; the kinds of data where most is summed."""
    return each_format(pytest.mark.parametrize(("m", "k", "n", "kind"), PRODUCTS)(test))


@pytest.mark.gpu
@each_product
def test_product_of_bfloat16_activations(m, kind, k, n, fmt):
    laid, weight = weight_of(kind, k, n, fmt)
    x = values(kind, (m, k), 2).astype(jnp.bfloat16)
    y = run_matmul(x, laid)
    assert (y.shape, y.dtype) == ((m, n), jnp.float32)
    check_product(y, x, weight, kind, parts_of(fmt))
    np.testing.assert_array_equal(run_matmul(x, laid), y)


@pytest.mark.gpu
@each_product
def test_product_of_quantized_activations(m, kind, k, n, fmt):
    laid, weight = weight_of(kind, k, n, fmt)
    x = jax.jit(wush.quantize, static_argnums=1)(values(kind, (m, k), 2), fmt)
    y = run_matmul(x, laid)
    assert (y.shape, y.dtype) == ((m, n), jnp.float32)
    check_product(y, exact(x), weight, kind, parts_of(fmt))
    np.testing.assert_array_equal(run_matmul(x, laid), y)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n"), [(300, 448), (4100, 200)])
def test_pairs_that_fetch_activations_together(m, n):
    """The same sums, bit for bit; rows of tiles that nobody has are left out."""
    laid, _ = weight_of("gaussian", 640, n, wush.NVFP4)
    x = values("gaussian", (m, 640), 2).astype(jnp.bfloat16)
    alone, together = (
        functools.partial(matmul.launch, device="NVIDIA H200", plan=Tiling(128, cluster=c))
        for c in (1, 2)
    )
    y = jax.jit(together)(x, laid)
    assert y.shape == (m, n)
    np.testing.assert_array_equal(y, jax.jit(alone)(x, laid))


@pytest.mark.gpu
@each_format
@pytest.mark.parametrize("m", [1, 13, 40])
def test_several_weights_are_each_by_itself(m, fmt):
    """To the order of sums, which another division of the work may change."""
    laid, values_of = zip(
        *(weight_of("gaussian", 1024, n, fmt) for n in (192, 64, 200)), strict=True
    )
    x = values("gaussian", (m, 1024), 2).astype(jnp.bfloat16)
    run = functools.partial(matmul.launch_all, device="NVIDIA H200", out_dtype=jnp.float32)
    for y, weight in zip(jax.jit(run)(x, laid), values_of, strict=True):
        check_product(y, x, weight, "gaussian", parts_of(fmt))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("m", [5, 100])
@pytest.mark.parametrize("n", [40, 70])  # one tile of weights: nothing is written beside it
def test_results_in_every_dtype(dtype, m, n):
    laid, _ = weight_of("gaussian", 160, n, wush.MXFP4)
    x = values("gaussian", (m, 160), 2).astype(jnp.bfloat16)
    wanted = run_matmul(x, laid).astype(dtype)  # the same sums, rounded once
    run = functools.partial(pallas_kernels.quantized_matmul, implementation="mosaic_gpu")
    compiled = jax.jit(functools.partial(run, out_dtype=dtype))
    for _ in range(20):
        y = compiled(x, laid)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, wanted)
    default = run(x[None], laid)
    assert (default.shape, default.dtype) == ((1, m, n), jnp.bfloat16)


@pytest.mark.gpu
def test_a_damaged_group_makes_its_row_nan():
    """And only its row: rows share a tile with it."""
    weight = values("gaussian", (70, 160), 1).at[3, 40].set(jnp.nan)
    for fmt in FORMATS.values():
        y = run_matmul(
            jnp.ones((5, 160), jnp.bfloat16), fragments.lay_out(wush.quantize(weight, fmt))
        )
        assert np.isnan(np.asarray(y)).all(0).nonzero()[0].tolist() == [3]
        assert np.isfinite(np.delete(np.asarray(y), 3, axis=1)).all()


MAPS = {
    "MXFP4": (wush.MXFP4, wush.MXFP4, 32),
    "NVFP4": (wush.NVFP4, wush.NVFP4, 16),
    "INT4": (wush.INT4, wush.INT4, 32),
    "MXFP4 by NVFP4": (wush.MXFP4, wush.NVFP4, 64),
    "weights only": (wush.MXFP4, None, None),
    "NVFP4 by FP8": (wush.NVFP4, wush.FP8, 32),
    "NVINT4 by FP8": (wush.NVINT4, wush.FP8, 128),
    "INT4 by FP8": (wush.INT4, wush.FP8, 32),
}


def quantized_by_the_kernel(x, t, fmt):
    """The values that the quantizer's kernel gives, in float64."""
    if fmt is wush.FP8:  # it has them in the layout of products alone
        layout = {"layout": "float8", "device": "NVIDIA H200", "global_scale": None}
        found = jax.jit(functools.partial(mosaic_gpu.launch, fmt=fmt, **layout))(x, t)
        return np.asarray(repack.from_float8(*found, x.shape[1]), np.float64)
    quantize = functools.partial(
        pallas_kernels.transform_quantize, fmt=fmt, implementation="mosaic_gpu"
    )
    return exact(wush.QuantizedArray(*jax.jit(quantize)(x, t), jnp.float32(fmt.global_scale), fmt))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("k", "n"), [(4096, 6144), (192, 70)])
@pytest.mark.parametrize("m", TOKENS)
def test_whole_map(m, k, n, name):
    """Codes of the quantizer's kernel times the weights, exactly; the definition, all but exactly.

    There, up to 1e-5 of the codes (and two) are a step of at most half a value apart: an error of
    sqrt(1e-5 + 2 / (m k)) / 2, and much of it in one row.
    """
    fmt, inputs, block = MAPS[name]
    laid, weight = weight_of("gaussian", k, n, fmt)
    x = values("gaussian", (m, k), 2).astype(jnp.bfloat16)
    t = None
    if block is not None:
        block = math.gcd(block, k)
        t = values("gaussian", (k, block), 3).reshape(k // block, block, block) / block**0.5
        t = t.astype(jnp.bfloat16)
    run = functools.partial(
        pallas_kernels.transform_quantize_matmul, fmt=inputs, out_dtype=jnp.float32
    )
    y = jax.jit(functools.partial(run, implementation="mosaic_gpu"))(x, t, laid)
    left = np.asarray(x, np.float64)
    if inputs is not None:
        left = quantized_by_the_kernel(x, t, inputs)
    check_product(y, left, weight, "gaussian", parts_of(fmt))
    defined = jax.jit(functools.partial(run, implementation="reference"))(x, t, laid)
    error = np.linalg.norm(y - defined) / np.linalg.norm(defined)
    assert error <= (1e-5 + 2 / (m * k)) ** 0.5 + 1e-6


@pytest.mark.gpu
def test_layers_become_fast_by_themselves(tmp_path):
    """Quantize, save, load: records without asking, equal files, the definition's outputs."""
    from flax import nnx

    model = nnx.List(
        [nnx.Linear(256, 192, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)]
    )
    x = values("gaussian", (16, 256), 4).astype(jnp.bfloat16)
    call = {"call": lambda model, x: model[0](x)}
    recipe = wush.Recipe(solver="rtn", transform="hadamard")
    quantized, _ = wush.quantize_model(model, [x], recipe, **call)
    kept, _ = wush.quantize_model(model, [x], recipe, implementation="reference", **call)
    assert quantized[0].codes is None
    assert kept[0].records is None
    run = nnx.jit(lambda model, x: model[0](x))
    text = jax.jit(lambda x: quantized[0](x)).lower(x).compile().as_text()
    assert "mosaic_gpu" in text
    y, defined = (np.asarray(run(m, x), np.float64) for m in (quantized, kept))
    # One rounding to bfloat16 each, and rarely another code.
    assert np.linalg.norm(y - defined) <= 2.0**-8 * np.linalg.norm(defined)
    for name, source in (("one", quantized), ("two", kept)):
        wush.save(tmp_path / name, source)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    loaded = wush.load(tmp_path / "one", model)
    np.testing.assert_array_equal(run(loaded, x), run(quantized, x))
    gradient = jax.jit(jax.grad(lambda x: (quantized[0](x).astype(jnp.float32) ** 2).sum()))(x)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert reference.dequantize(loaded[0].packed.weight).shape == (192, 256)
