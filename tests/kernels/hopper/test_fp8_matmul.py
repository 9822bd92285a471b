"""Products on FP8 matrix units: lowered for CUDA on any host, and their errors on a GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_tools import exact, transformed, values, weight_of

import pallas_kernels
import wush_jax as wush
from pallas_kernels import fragments
from pallas_kernels.hopper import matmul, mosaic_gpu, plans
from pallas_kernels.hopper.tiles import FEW_TOKENS, Split, Tiling

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)


def shapes(m, k, n, block=32):
    """x (M, K), transforms (K/d, d, d) and a weight (N, K) laid out for FP8, without values."""

    def make():
        weight = wush.quantize(jnp.zeros((n, k)), wush.MXFP4)
        t = jnp.zeros((k // block, block, block), jnp.bfloat16)
        return jnp.zeros((m, k), jnp.bfloat16), t, fragments.lay_out(weight, "float8")

    return jax.eval_shape(make)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "require_hopper", lambda: "NVIDIA H200")


def layer(x, t, *weights, fmt=wush.MXFP4):
    return matmul.transform_quantize_matmul(x, t, weights, fmt)


# Activations that multiply MXFP4 weights in FP8.
LEFT = {"MXFP4": wush.MXFP4, "FP8": wush.FP8}
each_left = pytest.mark.parametrize("fmt", LEFT.values(), ids=LEFT)


def kernels(run, *operands):
    """How many kernels a call lowers to, and the shapes of its results."""
    traced = jax.jit(run).trace(*operands)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" not in text
    return text.count("custom_call @mosaic_gpu"), jax.tree.map(lambda o: o.shape, traced.out_info)


@NEEDS_MOSAIC
@pytest.mark.usefixtures("hopper")
@each_left
@pytest.mark.parametrize(
    ("m", "k", "n", "block"),
    [(1, 64, 70, 32), (20, 4096, 6144, 32), (40, 1088, 200, 64), (1024, 4096, 28672, 128)],
)
def test_a_layer_is_two_kernels(m, k, n, block, fmt):
    run = functools.partial(layer, fmt=fmt)
    assert kernels(run, *shapes(m, k, n, block)) == (2, ((m, n),))


@NEEDS_MOSAIC
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("fmt", "left", "k"),
    [
        (wush.MXFP4, wush.MXFP4, 128),
        (wush.MXFP4, wush.MXFP4, 256),
        (wush.NVFP4, wush.NVFP4, 256),
        (wush.MXFP4, wush.FP8, 640),
        (wush.NVFP4, wush.FP8, 256),
    ],
)
def test_nothing_stands_between_kernels_that_overlap(fmt, left, k):
    """XLA's own kernels may read a result before they wait for the kernel that makes it."""
    operand = "float8" if fmt is wush.MXFP4 else "bfloat16"
    weight = jax.eval_shape(
        lambda: fragments.lay_out(wush.quantize(jnp.zeros((128, k)), fmt), operand)
    )

    def run(x, w):
        return matmul.transform_quantize_matmul(x, None, (w,), left)

    tokens = [m for m in (7, 8, 9, 16, 24, 32, 40, 65) if plans.as_they_are(m, k // 128)]
    assert set(tokens) >= {8, 16, 32, 40}
    for m in tokens:
        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        text = jax.jit(run).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
        moves = re.findall(r"stablehlo\.(?:pad|slice|concatenate) .* : (.*)", text)
        # What is left gives what it takes.
        assert all(len(set(re.findall(r"tensor<(\d+x\d+x\w+)>", types))) == 1 for types in moves), m


@NEEDS_MOSAIC
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("m", "count"), [(20, 2), (100, 3)])
def test_several_weights_share_the_activations(m, count):
    """Of few tokens they are one product."""
    x, t, one = shapes(m, 256, 128)
    other = shapes(m, 256, 70)[2]
    assert kernels(layer, x, t, one, other) == (count, ((m, 128), (m, 70)))


@NEEDS_MOSAIC
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("m", [20, 100])
def test_a_gated_layer_is_two_kernels(m):
    """Of few tokens the two products are side by side, and XLA combines them."""
    x, t, weight = shapes(m, 256, 200)
    run = functools.partial(pallas_kernels.transform_quantize_matmul, fmt=wush.MXFP4, gated=True)
    pair = jax.eval_shape(lambda w: (w, w), weight)
    found = kernels(lambda x, t, p: run(x, t, p, implementation="mosaic_gpu"), x, t, pair)
    assert found == (2, (m, 200))


@NEEDS_MOSAIC
@pytest.mark.usefixtures("hopper")
def test_quantized_activations_are_one_kernel():
    weight = shapes(1, 160, 70)[2]
    x = jax.eval_shape(lambda: wush.quantize(jnp.zeros((5, 160)), wush.MXFP4))
    run = functools.partial(pallas_kernels.quantized_matmul, implementation="mosaic_gpu")
    assert kernels(run, x, weight) == (1, (5, 70))


@NEEDS_MOSAIC
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x, t, w: matmul.quantized_matmul(x, w), "for MXFP4 or FP8 activations"),
        (lambda x, t, w: layer(x[:0], t, w), "M at least 1"),
        (lambda x, t, w: matmul.quantized_matmul(wush.quantize(x[:0], wush.MXFP4), w), r"x \(0"),
        (
            lambda x, t, w: matmul.transform_quantize_matmul(x, t, (w,), wush.NVFP4),
            "not NVFP4",
        ),
        (
            lambda x, t, w: layer(x, t, w, fragments.lay_out(wush.quantize(x, wush.MXFP4))),
            "laid out for bfloat16",
        ),
    ],
)
def test_what_these_records_do_not_serve(make, reason):
    operands = (jnp.ones(s.shape, s.dtype) for s in shapes(3, 128, 64)[:2])
    weight = fragments.lay_out(wush.quantize(jnp.ones((64, 128)), wush.MXFP4), "float8")
    with pytest.raises(NotImplementedError, match=reason):
        make(*operands, weight)


@NEEDS_MOSAIC
@pytest.mark.parametrize("steps", [1, 2, 3, 32, 112])
@pytest.mark.parametrize("tiles", [1, 64, 96, 448])
def test_every_call_has_a_plan(tiles, steps):
    """Of few tokens K is split; sums of two steps of more than 64 tokens would not fit."""
    for tokens in (1, 16, 32, 33, 64, 65, 128, 1024, 4096):
        plan = plans.float8_plan(tokens, tiles, steps)
        assert isinstance(plan, Split) == (tokens <= 32 and steps > 1)
        if isinstance(plan, Split):
            assert plan.tokens >= tokens
            assert plan.ways * plan.records <= max(steps, 2)
        else:
            assert plan.tokens == 64 or tokens > FEW_TOKENS
            assert plan.cuts == 1 or steps >= 8 * plan.cuts


# On a GPU ----------------------------------------------------------------------------------------

run_matmul = jax.jit(
    functools.partial(
        pallas_kernels.quantized_matmul, out_dtype=jnp.float32, implementation="mosaic_gpu"
    )
)


def check(y, left, weight, kind, fmt=wush.MXFP4):
    """Products are exact, sums of 512 of them have some 14 bits.

    That is enough for 8e-8 where groups of MXFP4 are alike. Where scales of one sign lie 16 octaves
    apart, products far below the largest of an instruction are cut off: in a simulation that cuts
    all at 2^-14 of the largest, 2^-7.3 of the sum. E4M3 activations have two more bits and all
    octaves at once, and twice as much of a sum is cut off. A simulation with 13 bits behind the
    point loses 2^-14.3 of Gaussian sums of 128 columns and 2^-12.7 of 512, as where there are many
    tokens.
    """
    error = np.abs(np.asarray(y, np.float64) - left @ weight.T)
    bound = 2.0**-7 if kind == "octaves" else 2.0**-8
    bound *= 2 if fmt is wush.FP8 else 1
    assert (error <= bound * (np.abs(left) @ np.abs(weight).T)).all()
    if kind == "gaussian":
        of_fp8 = 2.0**-12.5 if len(left) > FEW_TOKENS else 2.0**-13
        most = of_fp8 if fmt is wush.FP8 else 2.0**-20
        assert np.linalg.norm(error) <= most * np.linalg.norm(left @ weight.T)


def left_of(kind, m, k, fmt=wush.MXFP4):
    """Quantized activations, and their values in float64.

    With octaves, groups of one sign lie up to 16 of them apart. The first Gaussian tokens are zero,
    zero but for the first columns, small there, and small elsewhere.
    """
    x = values("one sign" if kind == "octaves" else kind, (m, k), 2)
    if kind == "octaves":
        powers = np.random.default_rng(5).integers(-8, 8, size=(m, k // 32))
        x = x * jnp.exp2(jnp.repeat(jnp.asarray(powers, jnp.float32), 32, axis=1))
    if kind == "gaussian" and m > 4:
        x = x.at[0].set(0).at[1, 512:].set(0).at[2, :512].multiply(1e-25)
        x = x.at[3, 512:].multiply(1e-25)
    q = jax.jit(wush.quantize, static_argnums=1)(x, fmt)
    return q, exact(q)


@pytest.mark.gpu
@each_left
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "one sign", "octaves"])
@pytest.mark.parametrize("m", [1, 13, 20, 40, 65, 200])
@pytest.mark.parametrize(("k", "n"), [(14336, 256), (4096, 512), (640, 70), (96, 200)])
def test_products_of_quantized_activations(m, k, n, kind, fmt):
    q, left = left_of(kind, m, k, fmt)
    like = {"outliers": "gaussian", "octaves": "one sign"}.get(kind, kind)
    laid, weight = weight_of(like, k, n, wush.MXFP4, "float8")
    y = run_matmul(q, laid)
    assert (y.shape, y.dtype) == ((m, n), jnp.float32)
    check(y, left, weight, kind, fmt)
    np.testing.assert_array_equal(run_matmul(q, laid), y)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plan", [Tiling(64, cuts=2), Tiling(104), Tiling(184), Tiling(96, cluster=2)]
)
def test_every_width_of_tiles(plan):
    q = wush.quantize(values("gaussian", (200, 1152), 2), wush.MXFP4)
    laid, weight = weight_of("gaussian", 1152, 200, wush.MXFP4, "float8")
    run = functools.partial(matmul.launch, device="NVIDIA H200", plan=plan)
    check(jax.jit(run)(q, laid), exact(q), weight, "gaussian")


@pytest.mark.gpu
@each_left
@pytest.mark.parametrize("m", [5, 40, 100])
def test_what_is_not_finite_stays_in_its_row(m, fmt):
    weight = values("gaussian", (70, 160), 1)
    x = values("gaussian", (m, 160), 2)
    for name, bad in (("weight", weight.at[3, 40].set(jnp.nan)), ("x", x.at[2, 7].set(jnp.inf))):
        q = wush.quantize(bad if name == "x" else x, fmt)
        w = wush.quantize(bad if name == "weight" else weight, wush.MXFP4)
        nan = np.isnan(np.asarray(run_matmul(q, fragments.lay_out(w, "float8"))))
        wanted = np.zeros_like(nan)
        wanted[(slice(None), 3) if name == "weight" else 2] = True
        np.testing.assert_array_equal(nan, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [4, 20, 40])
def test_several_weights_are_each_by_itself(m):
    """To the order of sums, which another division of the work may change."""
    laid, values_of = zip(
        *(weight_of("gaussian", 1024, n, wush.MXFP4, "float8") for n in (192, 64, 200)),
        strict=True,
    )
    q = wush.quantize(values("gaussian", (m, 1024), 2), wush.MXFP4)
    run = functools.partial(matmul.launch_all, device="NVIDIA H200")
    for y, weight in zip(jax.jit(run)(q, laid), values_of, strict=True):
        check(y, exact(q), weight, "gaussian")


WHOLE = [(4096, 6144, 32), (192, 70, 64), (1024, 200, 128), (64, 40, 32), (128, 64, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n", "block"), WHOLE)
@pytest.mark.parametrize("m", [1, 16, 40, 200])
def test_whole_layer(m, k, n, block):
    """Codes of the quantizer's kernel times the weights, exactly but for sums."""
    laid, weight = weight_of("gaussian", k, n, wush.MXFP4, "float8")
    x, t = transformed(m, k, block)
    options = {"fmt": wush.MXFP4, "implementation": "mosaic_gpu"}
    run = functools.partial(pallas_kernels.transform_quantize_matmul, **options)
    y = jax.jit(functools.partial(run, out_dtype=jnp.float32))(x, t, laid)
    quantize = functools.partial(pallas_kernels.transform_quantize, **options)
    codes = jax.jit(quantize)(x, t)
    left = exact(wush.QuantizedArray(*codes, jnp.float32(wush.MXFP4.global_scale), wush.MXFP4))
    check(y, left, weight, "gaussian")
    assert jax.jit(run)(x[None], t, laid).shape == (1, m, n)


@pytest.mark.gpu
@pytest.mark.parametrize("left", [None, wush.FP8], ids=["like the weight", "FP8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=["MXFP4", "NVFP4"])
@pytest.mark.parametrize(("k", "n"), [(256, 192), (1024, 100), (64, 40)])
@pytest.mark.parametrize("m", [16, 65, 500, 2100])
def test_gated_layer(m, k, n, fmt, dtype, left):
    """The expression of the two products in float32, to the hardware's exponential.

    And to the roundings of a 16-bit result, half a unit each: the second product's and the
    result's; where XLA combines the products the first one's, too, which counts 1 + |gate| times.
    Apart, K may be cut: another order of float32 sums.
    """
    operand = "float8" if fmt is wush.MXFP4 else "bfloat16"
    pair = [weight_of(kind, k, n, fmt, operand)[0] for kind in ("gaussian", "outliers")]
    x = (values("gaussian", (m, k), 2) / k**0.5).astype(jnp.bfloat16)
    options = {"fmt": left or fmt, "implementation": "mosaic_gpu"}
    run = functools.partial(pallas_kernels.transform_quantize_matmul, x, None, **options)
    gated = jax.jit(lambda pair: run(pair, gated=True, out_dtype=dtype))
    y = gated(tuple(pair))
    gate, up = (
        np.asarray(p, np.float64)
        for p in jax.jit(lambda pair: run(pair, out_dtype=jnp.float32))(tuple(pair))
    )
    wanted = gate / (1 + np.exp(-gate)) * up
    unit = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    tiny = 2.0**-24 if dtype == "float16" else 0  # subnormals
    error = np.abs(np.asarray(y, np.float64) - wanted)
    most = np.abs(wanted).max()
    bound = (3 + np.abs(gate)) * unit * np.abs(wanted) + tiny * (1 + np.abs(up))
    assert (error <= bound + 2.0**-19 * most).all()
    np.testing.assert_array_equal(gated(tuple(pair)), y)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 200])
def test_weights_made_by_the_same_program(m):
    """The product fetches records while the quantizer runs: they must be there before it."""
    laid, _ = weight_of("gaussian", 4096, 1024, wush.MXFP4, "float8")
    x = values("gaussian", (m, 4096), 2).astype(jnp.bfloat16)
    run = functools.partial(layer, x, None)
    each = [dataclasses.replace(laid, records=jnp.roll(laid.records, i, 0)) for i in range(8)]
    wanted = [jax.jit(run)(weight) for weight in each]

    @jax.jit
    def chain(laid):
        each = (jnp.roll(laid.records, i, 0) for i in range(8))
        return [run(dataclasses.replace(laid, records=records)) for records in each]

    for _ in range(20):
        for found, one in zip(chain(laid), wanted, strict=True):
            np.testing.assert_array_equal(found[0], one[0])
