"""Experts' products by the kernel: lowered for CUDA on any host, against float64 on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from matmul_tools import exact, values

import pallas_kernels
import wush_jax as wush
from pallas_kernels import repack, stacks
from pallas_kernels.hopper import mosaic_gpu, plans, ragged
from pallas_kernels.hopper.tiles import Tiling

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
# Of weights, of activations, what records become.
LAYERS = {
    "W4A4": (wush.MXFP4, wush.MXFP4, "float8"),
    "W4A8": (wush.MXFP4, wush.FP8, "float8"),
    "W4A16": (wush.MXFP4, None, "bfloat16"),
    "NVFP4": (wush.NVFP4, wush.NVFP4, "bfloat16"),
    "NVINT4 by FP8": (wush.NVINT4, wush.FP8, "bfloat16"),
    "NVFP4 by FP8": (wush.NVFP4, wush.FP8, "bfloat16"),
}


def shapes(m, groups, n, k, name, own, block=32):
    """x, transforms (one for all groups, or each its own), weights and sizes, without values."""
    fmt, inputs, operand = LAYERS[name]

    def make():
        weight = stacks.lay_out(wush.quantize(jnp.zeros((groups, n, k)), fmt), operand)
        t = None
        if own is not None and inputs is not None:
            t = jnp.zeros((groups if own else 1, k // block, block, block), jnp.bfloat16)
        return jnp.zeros((m, k), jnp.bfloat16), t, weight, jnp.zeros(groups, jnp.int32)

    return jax.eval_shape(make)


def run_layer(x, t, weight, sizes, inputs, **options):
    return ragged.launch(x, t, (weight,), sizes, inputs, device="NVIDIA H200", **options)[0]


# Lowered for CUDA on any host --------------------------------------------------------------------


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("name", "own", "m", "groups", "n", "k"),
    [
        ("W4A4", False, 64, 64, 768, 2048),
        ("W4A4", True, 13, 3, 70, 192),
        ("W4A8", False, 4096, 8, 14336, 4096),
        ("W4A8", True, 100, 8, 71, 128),
        ("W4A16", None, 8, 4, 128, 96),
        ("NVFP4", True, 100, 3, 200, 256),
        ("NVINT4 by FP8", False, 100, 3, 200, 256),
        ("NVFP4 by FP8", False, 40, 3, 72, 256),
    ],
)
def test_a_layer_is_a_quantizer_and_a_product(name, own, m, groups, n, k):
    inputs = LAYERS[name][1]
    run = functools.partial(run_layer, inputs=inputs)
    traced = jax.jit(run).trace(*shapes(m, groups, n, k, name, own))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" not in text
    assert text.count("custom_call @mosaic_gpu") == 1 + (inputs is not None)
    assert (traced.out_info.shape, traced.out_info.dtype) == ((m, n), jnp.bfloat16)


@NEEDS_MOSAIC
def test_a_map_lowers_too():
    x, t, weight, sizes = shapes(16, 2, 64, 128, "W4A4", False)
    run = functools.partial(run_layer, inputs=wush.MXFP4)
    many = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    mapped = jax.jit(jax.vmap(run, in_axes=(0, None, None, None))).trace(many, t, weight, sizes)
    assert mapped.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic") == 2
    assert mapped.out_info.shape == (3, 16, 64)


@NEEDS_MOSAIC
@pytest.mark.parametrize("own", [False, True])
def test_experts_spread_over_devices_lower_too(own):
    """Each device has an expert and its rows; kernels do not say how their results vary."""
    x, t, weight, sizes = shapes(16, 2, 64, 128, "W4A4", own)
    weight = dataclasses.replace(weight, global_scale=jax.ShapeDtypeStruct((2,), jnp.float32))
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    some, all_ = PartitionSpec("expert"), PartitionSpec()
    run = jax.shard_map(
        functools.partial(run_layer, inputs=wush.MXFP4),
        mesh=mesh,
        in_specs=(some, some if own else all_, some, some),
        out_specs=some,
        check_vma=False,
    )
    traced = jax.jit(run).trace(x, t, weight, sizes)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic") == 2
    assert traced.out_info.shape == (16, 64)


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": jnp.zeros((16, 128), jnp.float32)}, "dtype float32"),
        ({"x": jnp.zeros((0, 128), jnp.bfloat16)}, r"no kernel for x \(0, 128\)"),
        ({"inputs": wush.NVFP4}, "laid out for MXFP4 or FP8"),
        ({"inputs": wush.INT4}, "laid out for MXFP4 or FP8"),
        ({"global_scale": jnp.ones(2)}, "takes one for all"),
        ({"out_dtype": jnp.int32}, "out_dtype=int32"),
        ({"weight": None}, r"stacks\.lay_out"),
    ],
)
def test_what_the_kernel_lacks_is_not_implemented(change, reason):
    weight = wush.quantize(jnp.ones((2, 64, 128)), wush.MXFP4)
    call = {
        "x": jnp.ones((16, 128), jnp.bfloat16),
        "t": None,
        "weight": stacks.lay_out(weight, "float8"),
        "sizes": jnp.array([8, 8]),
        "inputs": wush.MXFP4,
    }
    change = {"weight": weight} if "weight" in change else change
    with pytest.raises(NotImplementedError, match=reason):
        run_layer(**(call | change))


def test_forced_it_never_falls_back():
    if jax.default_backend() == "gpu":
        pytest.skip("here it runs")
    weight = stacks.lay_out(wush.quantize(jnp.ones((2, 64, 128)), wush.MXFP4), "float8")
    packed = wush.PackedWeight(weight, None, None, wush.MXFP4)
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*(NVIDIA GPU|jax 0.11)"):
        wush.quantized_ragged_dot(
            jnp.ones((4, 128)), packed, jnp.array([2, 2]), implementation="mosaic_gpu"
        )


@pytest.mark.parametrize("span", [None, 1, 4])
def test_every_call_has_a_plan(span):
    for rows, groups in ((1, 64), (8, 64), (64, 64), (256, 64), (4096, 8), (32768, 64)):
        plan = plans.grouped(rows, groups, span)
        assert plan.tokens % 8 == 0
        assert min(rows / groups, 64) <= plan.tokens <= (64 if span == 1 else 176)


# On a GPU ----------------------------------------------------------------------------------------


@functools.cache
def weights_of(groups, n, k, fmt, operand):
    """Experts' weights, their records, and their values in float64."""
    each = [
        jax.jit(wush.quantize, static_argnums=1)(values("gaussian", (n, k), seed), fmt)
        for seed in range(groups)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return stacked, stacks.lay_out(stacked, operand), [exact(q) for q in each]


def transforms_of(groups, k, block, own):
    t = values("gaussian", (groups if own else 1, k * block), 3).reshape(
        -1, k // block, block, block
    )
    return (t / block**0.5).astype(jnp.bfloat16)


@functools.cache
def quantizer(fmt):
    layout = "float8" if fmt is wush.FP8 else "interchange"
    options = {"fmt": fmt, "layout": layout, "device": "NVIDIA H200", "global_scale": None}
    return jax.jit(functools.partial(mosaic_gpu.launch, **options))


def quantized(x, t, fmt):
    """What the dense quantizer's kernel makes of all rows, in float64."""
    if fmt is None:
        return np.asarray(x, np.float64)
    found = quantizer(fmt)(x, t)
    if fmt is wush.FP8:
        return np.asarray(repack.from_float8(*found, x.shape[1]), np.float64)
    return exact(wush.QuantizedArray(*found, jnp.float32(fmt.global_scale), fmt))


def sizes_of(kind, rows, groups, seed=0):
    random = np.random.default_rng(seed)
    sizes = np.zeros(groups, np.int32)
    if kind == "one":
        sizes[groups // 2] = rows
    elif kind == "some":  # rows are left over, and groups are empty
        busy = random.choice(groups, max(1, groups // 2), replace=False)
        sizes[busy] = random.multinomial(max(rows - 3, 1), np.ones(len(busy)) / len(busy))
    elif kind == "all":
        sizes = random.multinomial(rows, np.ones(groups) / groups)
    return np.int32(sizes)


KINDS = ("all", "some", "one", "none")


def check(y, left, weights, sizes, inputs):
    """Products are exact; sums are float32, in FP8 of some 14 bits over at most 512 columns.

    The bounds are those of dense products: `test_fp8_matmul.check`, `test_matmul.check_product`.
    """
    ends = np.cumsum(sizes)
    for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        rows = slice(end - size, end)
        wanted, most = left[e][rows] @ weights[e].T, np.abs(left[e][rows]) @ np.abs(weights[e].T)
        error = np.abs(np.asarray(y[rows], np.float64) - wanted)
        assert (error <= (2.0**-7 if inputs is wush.FP8 else 2.0**-8) * most).all()
        bound = {wush.FP8: 2.0**-12.5}.get(inputs, 2.0**-16)
        assert np.linalg.norm(error) <= bound * np.linalg.norm(wanted)
    np.testing.assert_array_equal(y[ends[-1] :], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("m", "groups", "n", "k", "block"),
    [(64, 64, 192, 512, 32), (13, 5, 70, 192, 64), (200, 3, 200, 1152, 128), (700, 4, 71, 640, 32)],
)
def test_each_row_by_its_group(m, groups, n, k, block, own, name):
    fmt, inputs, operand = LAYERS[name]
    if own and name in ("W4A16", "NVINT4 by FP8", "NVFP4 by FP8"):
        pytest.skip("no such layer")
    _, laid, weights = weights_of(groups, n, k, fmt, operand)
    x = values("gaussian", (m, k), 2).astype(jnp.bfloat16)
    t = None if inputs is None else transforms_of(groups, k, block, own)
    one = {} if t is None else {e: quantized(x, t[e if own else 0], inputs) for e in range(len(t))}
    left = [one.get(e, one.get(0, np.asarray(x, np.float64))) for e in range(groups)]
    run = jax.jit(functools.partial(run_layer, inputs=inputs, out_dtype=jnp.float32))
    for kind in KINDS:
        sizes = sizes_of(kind, m, groups)
        y = run(x, t, laid, sizes)
        assert (y.shape, y.dtype) == ((m, n), jnp.float32)
        check(y, left, weights, sizes, inputs)
        np.testing.assert_array_equal(run(x, t, laid, sizes), y)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiling", [Tiling(8, 4), Tiling(16, 3), Tiling(64), Tiling(104), Tiling(184)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_height_of_tiles(tiling, dtype):
    _, laid, weights = weights_of(3, 200, 1152, wush.MXFP4, "float8")
    x = values("gaussian", (500, 1152), 2).astype(jnp.bfloat16)
    left = [quantized(x, None, wush.MXFP4)] * 3
    options = {"inputs": wush.MXFP4, "tiling": tiling}
    wide, short = (
        jax.jit(functools.partial(run_layer, out_dtype=d, **options)) for d in ("float32", dtype)
    )
    for kind in KINDS:
        sizes = sizes_of(kind, 500, 3)
        y = wide(x, None, laid, sizes)
        check(y, left, weights, sizes, wush.MXFP4)
        np.testing.assert_array_equal(short(x, None, laid, sizes), y.astype(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True])
def test_what_is_not_finite_stays_in_its_row(own):
    _, laid, _ = weights_of(5, 70, 192, wush.MXFP4, "float8")
    x = values("gaussian", (13, 192), 2).at[4, 7].set(jnp.nan).astype(jnp.bfloat16)
    x = x.at[5].set(0)
    t = transforms_of(5, 192, 64, own)
    sizes = jnp.array([3, 0, 4, 4, 1])
    run = jax.jit(functools.partial(run_layer, inputs=wush.MXFP4))
    y = np.asarray(run(x, t, laid, sizes), np.float32)
    assert np.isnan(y[4]).all()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()
    np.testing.assert_array_equal(y[[5, 12]], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True])
def test_the_library_chooses_it_and_agrees_with_the_definition(own):
    """All but rarely equal codes: see `test_matmul.test_whole_map`."""
    _, laid, _ = weights_of(5, 70, 192, wush.MXFP4, "float8")
    x = values("gaussian", (40, 192), 2).astype(jnp.bfloat16)
    t = transforms_of(5, 192, 64, own)
    sizes = jnp.array([13, 0, 14, 4, 6])
    packed = wush.PackedWeight(laid, t, None, wush.MXFP4)
    text = jax.jit(wush.quantized_ragged_dot).lower(x, packed, sizes).compile().as_text()
    assert "mosaic_gpu" in text
    y = wush.quantized_ragged_dot(x, packed, sizes)
    defined = pallas_kernels.dispatch.ragged_transform_quantize_matmul(
        x, packed, sizes, out_dtype=jnp.float32, implementation="reference"
    )
    error = np.linalg.norm(np.asarray(y, np.float64) - defined) / np.linalg.norm(defined)
    assert error <= (1e-5 + 2 / (40 * 192)) ** 0.5 + 2.0**-8
    gradient = jax.grad(lambda x: wush.quantized_ragged_dot(x, packed, sizes).sum())(x)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
