"""Ways for many tokens: which one a table chooses, and that all give the same product on a GPU."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from matmul_tools import exact, transformed, weight_of

import pallas_kernels
import wush_jax as wush
from pallas_kernels import dispatch, fragments
from pallas_kernels.hopper import matmul, mosaic_gpu, plans, roads, tiles

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
ENTRIES = [
    {"pair": "mxfp4", "tiles": n, "steps": 32, "tokens": m, "microseconds": times}
    for n, m, times in (
        (64, 512, {"fused": 1.0, "library": 2.0, "fast": 0.5}),
        (64, 4096, {"fused": 3.0, "library": 2.0, "fast": 1.0}),
        (448, 512, {"fused": 3.0, "library": 1.0, "fast": 0.5}),
    )
]
ENTRIES.append({**ENTRIES[0], "pair": "nvfp4", "microseconds": {"fused": 2.0, "folded": 1.0}})


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(tiles, "table", lambda device, op: ENTRIES if op == "roads" else [])
    monkeypatch.setattr(mosaic_gpu, "require_hopper", lambda: "NVIDIA H200")


def weight(fmt, operand, n, k=4096):
    return jax.eval_shape(lambda: fragments.lay_out(wush.quantize(jnp.zeros((n, k)), fmt), operand))


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("tokens", "n", "precision", "gated", "road"),
    [
        (4096, 4096, None, False, "library"),
        (5000, 4096, "default", False, "fast"),
        (4096, 4096, "default", True, "fused"),
        (600, 4096, None, False, "fused"),
        (600, 20000, None, False, "library"),  # nearer to the wide layer
        (300, 4096, "default", False, "fused"),  # fewer than were measured
        (64, 4096, "default", False, "fused"),
    ],
)
def test_a_table_chooses_the_fastest_that_is_allowed(tokens, n, precision, gated, road):
    one = (weight(wush.MXFP4, "float8", n),)
    choice = roads.allowed(one, wush.MXFP4, precision, gated=gated)
    assert roads.fastest(tokens, one, wush.MXFP4, "any", choice) == road


@pytest.mark.usefixtures("measured")
def test_only_who_allows_it_gets_rounded_weights():
    for fmt in (wush.NVFP4, wush.NVINT4):
        one = (weight(fmt, "bfloat16", 4096),)
        for precision, road in ((None, "fused"), ("default", "fused"), ("folded", "folded")):
            choice = roads.allowed(one, wush.FP8, precision)
            assert roads.fastest(4096, one, wush.FP8, "any", choice) == road
        # Weights only, and activations that FP8 does not hold: one road.
        assert roads.fastest(4096, one, wush.NVFP4, "any", {"folded"}) == "fused"


@pytest.mark.usefixtures("measured")
def test_the_dispatch_asks_the_table(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, one = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), weight(wush.MXFP4, "float8", 4096)
    names = dispatch._candidates()
    order = functools.partial(dispatch._ordered, x, fmt=wush.MXFP4, precision=None)
    assert order((one,), gated=False) == ("xla_fp8", *names)
    assert order((one, one), gated=True) == names
    assert order((wush.quantize(jnp.ones((4, 4096)), wush.MXFP4),), gated=False) == names


ROADS = {
    "MXFP4": (wush.MXFP4, wush.MXFP4),
    "NVFP4 by FP8": (wush.NVFP4, wush.FP8),
    "NVINT4 by MXFP4": (wush.NVINT4, wush.MXFP4),
}
each_road = pytest.mark.parametrize(("fmt", "left"), ROADS.values(), ids=ROADS)


def operand_of(fmt):
    return "float8" if fmt is wush.MXFP4 else "bfloat16"


@NEEDS_MOSAIC
@pytest.mark.usefixtures("measured")
@each_road
@pytest.mark.parametrize("gated", [False, True])
def test_weights_are_expanded_once_and_multiplied(fmt, left, gated):
    one = weight(fmt, operand_of(fmt), 200, 640)
    both = (one, one) if gated else (one,)
    x = jax.ShapeDtypeStruct((100, 640), jnp.bfloat16)
    run = functools.partial(matmul.transform_quantize_matmul, fmt=left, road="folded", gated=gated)
    traced = jax.jit(lambda x, both: run(x, None, both)).trace(x, both)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The same weight twice is expanded twice here: XLA sees later that it is one.
    assert text.count("custom_call @mosaic_gpu") == (4 if gated else 3)
    assert [y.shape for y in traced.out_info] == [(100, 200)]


@NEEDS_MOSAIC
def test_wide_products_have_a_plan_without_spilled_sums():
    for tokens, rows in ((65, 1), (200, 3), (4096, 64)):
        plan = plans.expanded_plan(tokens, rows)
        assert plan.tokens <= 184
        assert plan.tokens % (8 * plan.cluster) == 0


# On a GPU ----------------------------------------------------------------------------------------


def in_fp8(fmt, laid):
    """Values of an expanded weight (N, K) in float64, columns in order."""
    from pallas_kernels.hopper import fp8_kernel

    found = jax.jit(fp8_kernel.expanded)(laid)
    steps, rows, _ = found.records.shape
    values = np.asarray(found.records, np.float64).reshape(steps, rows, 4, 2, 4, 4)
    values = values.transpose(1, 0, 2, 5, 4, 3).reshape(rows, steps * 128)
    n, k = laid.shape
    return values[:n, :k], float(found.unit) / float(found.global_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.NVINT4], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
@pytest.mark.parametrize(("k", "n"), [(4096, 512), (640, 70), (96, 200)])
def test_expanded_weights_are_the_weights_or_these_rounded(fmt, kind, k, n):
    laid, wanted = weight_of(kind, k, n, fmt, operand_of(fmt))
    values, unit = in_fp8(fmt, laid)
    relative = np.float32(wanted / unit)
    if fmt is not wush.MXFP4:
        rounded = relative.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        if kind == "gaussian":
            assert 0.01 < np.linalg.norm(rounded - relative) / np.linalg.norm(relative) < 0.03
        relative = rounded
    np.testing.assert_array_equal(values, relative)


@pytest.mark.gpu
@each_road
@pytest.mark.parametrize(("k", "n", "block"), [(4096, 512, 32), (640, 70, 64), (192, 200, 32)])
@pytest.mark.parametrize("m", [65, 200, 1500])
def test_folded_products_on_a_gpu(fmt, left, k, n, block, m):
    """As of the definition's codes, of which 1e-5 (and two) may be a step apart, and sums' errors.

    Steps are half a value at most, 2^-3 in FP8.
    """
    laid, _ = weight_of("gaussian", k, n, fmt, operand_of(fmt))
    values, unit = in_fp8(fmt, laid)
    x, t = transformed(m, k, block)
    run = functools.partial(matmul.transform_quantize_matmul, fmt=left, road="folded")
    y = jax.jit(lambda x, t, w: run(x, t, (w,), out_dtype=jnp.float32)[0])(x, t, laid)
    quantize = functools.partial(pallas_kernels.transform_quantize, fmt=left)
    codes = jax.jit(functools.partial(quantize, implementation="reference"))(x, t)
    q = wush.QuantizedArray(*codes, jnp.float32(left.global_scale), left)
    wanted = exact(q) @ (values * unit).T
    error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
    step = 8 if left is wush.FP8 else 2
    assert error <= (1e-5 + 2 / (m * k)) ** 0.5 / step + 2.0**-13
