"""Many random layers from weights to outputs: every way to hold and to run one gives one result.

200 layers on each run, 10,000 with ``-m slow`` (about two minutes), and every kernel by random
shapes on a GPU.
"""

import functools
import itertools

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import random_shapes
from random_shapes import random_call, random_layers

import pallas_kernels
import wush_jax as wush
from pallas_kernels import folded, fragments, reference
from pallas_kernels.hopper import matmul, mosaic_gpu

pytestmark = pytest.mark.usefixtures("strict")

FORMATS = {
    "MXFP4": wush.MXFP4,
    "MXFP4 3.5": wush.MXFP4.replace(global_scale=3.5),
    "MXFP4 ceil": wush.MXFP4.replace(rule="ceil", global_scale=1.0),
    "NVFP4": wush.NVFP4,
    "NVFP4 4/6": wush.NVFP4.replace(rule="four_over_six"),
    "INT4": wush.INT4,
}
# Tokens, outputs, K, block, one transform for all blocks. Records are 64 by 128: ragged, exact.
SHAPES = ((3, 8, 64, 32, False), (1, 70, 128, 64, True), (5, 64, 96, 32, True))
CONFIGURATIONS = list(itertools.product(FORMATS, SHAPES))
BATCH = 50


@functools.partial(jax.jit, static_argnums=4)
def run(weights, xs, transforms, g, fmt):
    """Each layer by every road; g is an argument, lest XLA folds it into the rule."""
    return jax.vmap(lambda w, x, t: one(w, x, t, g, fmt))(weights, xs, transforms)


def one(weight, x, transform, g, fmt):
    t = transform.astype(jnp.float32)
    # Rows of the transform are orthogonal and of one length.
    inverse = t / jnp.sum(t * t, axis=-1, keepdims=True)
    q = wush.quantize(wush.apply_transform(weight, inverse), fmt, global_scale=g)
    laid = fragments.lay_out(q)
    back = wush.QuantizedArray(*laid.interchange, laid.global_scale, laid.format)
    values = [reference.dequantize(v) for v in (q, back, laid)]
    names = ("reference", "xla")
    codes = [
        pallas_kernels.transform_quantize(x, transform, fmt, global_scale=g, implementation=name)
        for name in names
    ]
    outputs = [
        pallas_kernels.transform_quantize_matmul(
            x, transform, w, fmt, global_scale=g, out_dtype=jnp.float32, implementation=name
        )
        for name, w in itertools.product(names, (q, laid))
    ]
    return q, values, codes, outputs


def mismatches(count, fmt, shape, seed):
    """Layers of a batch with any disagreement."""
    w, x, t = random_layers(count, shape, seed)
    g = np.float32(fmt.global_scale)
    q, values, codes, outputs = run(w, x, t, g, fmt)
    wrong = np.zeros(count, bool)

    def differ(a, b):
        a, b = (np.asarray(v).reshape(count, -1) for v in (a, b))
        kind = {1: np.uint8, 2: np.uint16, 4: np.float32}[a.dtype.itemsize]
        return (a.view(kind) != b.view(kind)).any(1)

    nibbles = np.stack([np.asarray(q.codes) & 15, np.asarray(q.codes) >> 4], -1)
    grid = table(fmt)[nibbles].reshape(count, -1, fmt.group_size)
    scale = np.asarray(q.scales).astype(np.float32).reshape(count, -1, 1)
    # One division and one product in float32; products below the normal numbers vanish.
    decoded = np.asarray(values[0]).reshape(grid.shape)
    wrong |= ~np.isclose(grid * (scale / g), decoded, rtol=2.4e-7, atol=2.0**-126).all((1, 2))
    for other in values[1:]:
        wrong |= differ(other, values[0])
    for a, b in zip(*codes, strict=True):
        wrong |= differ(a, b)
    weight = np.asarray(values[0], np.float64)
    given = wush.QuantizedArray(*codes[0], jnp.full(count, g), fmt)
    moved = np.asarray(dequantize(given), np.float64)
    exact = np.einsum("lmk,lnk->lmn", moved, weight)
    # K products and sums in float32 in any order, and a few roundings of values and factors.
    bound = (shape[2] + 8) * 2.0**-24 * np.einsum("lmk,lnk->lmn", abs(moved), abs(weight))
    for y in outputs:
        wrong |= ~(np.abs(np.asarray(y, np.float64) - exact) <= bound).all((1, 2))
    return int(wrong.sum())


dequantize = jax.jit(wush.dequantize)


@functools.cache
def table(fmt):
    """Values of the 16 codes, from the oracle."""
    values, codes = oracle.element_grid(fmt.element)
    out = np.zeros(16, np.float32)
    out[codes] = values
    return out


@pytest.mark.files  # the definition alone
@pytest.mark.parametrize("index", [0, 13, 17])  # every kind of record, every shape
def test_two_hundred_layers(index):
    name, shape = CONFIGURATIONS[index]
    assert mismatches(67, FORMATS[name], shape, index) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), CONFIGURATIONS)
def test_ten_thousand_layers(name, shape):
    batches = -(-10_000 // (len(CONFIGURATIONS) * BATCH))
    assert batches * len(CONFIGURATIONS) * BATCH >= 10_000
    wrong = sum(mismatches(BATCH, FORMATS[name], shape, 1000 + i) for i in range(batches))
    assert wrong == 0


# ------------------------------------------------------------------ kernels

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
KERNEL_FORMATS = (wush.MXFP4, wush.NVFP4, wush.INT4)


@NEEDS_MOSAIC
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_lower_for_cuda(seed):
    """Both kernels, each as one call, for sizes nobody chose."""
    m, n, k, d, shared, fmt = random_call(seed, KERNEL_FORMATS)

    def both(x, t, weight):
        options = {"global_scale": None, "layout": "interchange", "device": "NVIDIA H200"}
        codes = mosaic_gpu.launch(x, t, fmt, **options)
        return codes, matmul.launch(x, weight, device="NVIDIA H200")

    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    t = jax.ShapeDtypeStruct((d, d) if shared else (k // d, d, d), jnp.bfloat16)
    weight = jax.eval_shape(lambda: fragments.lay_out(wush.quantize(jnp.zeros((n, k)), fmt)))
    traced = jax.jit(both).trace(x, t, weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_random_shapes_on_a_gpu(part):
    """A thousand shapes through every kernel: equal codes, outputs within bounds of their sums."""
    wrong = {}
    for seed in range(50 * part, 50 * part + 50):
        try:
            kernels_agree(seed)
        except AssertionError as error:
            wrong[seed] = str(error)
    assert not wrong


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_random_shapes_with_fp8_activations_on_a_gpu(part):
    """A thousand shapes: the product of the definition's codes, within bounds of the sums."""
    wrong = {}
    for seed in range(50 * part, 50 * part + 50):
        try:
            random_shapes.fp8_activations_agree(seed)
        except AssertionError as error:
            wrong[seed] = str(error)
    assert not wrong


@pytest.mark.files
@pytest.mark.parametrize("road", ["float8", "folded"])
def test_what_random_shapes_are_compared_with(road, monkeypatch):
    """The definition passes, a weight off by one column does not."""
    seed, shifted = {"float8": 120, "folded": 46}[road], 0
    sizes = random_call(seed, KERNEL_FORMATS)
    for name, size in zip(("TOKENS", "OUTPUTS", "WIDTH"), sizes, strict=False):
        monkeypatch.setattr(random_shapes, name, size + -size % 128)

    def definition(x, t, laid, _):
        values = random_shapes.left_of(x, t)
        codes = wush.QuantizedArray(*laid.interchange, laid.global_scale, laid.format)
        weight = np.asarray(dequantize(codes), np.float64)
        if road == "folded":
            found = folded.dequantize(*laid.interchange, laid.format, laid.global_scale)
            weight = np.asarray(found, np.float64)
        return values @ np.roll(weight, shifted, axis=1).T

    monkeypatch.setattr(random_shapes, "layer", definition)
    random_shapes.fp8_activations_agree(seed, road)
    shifted = 1
    with pytest.raises(AssertionError, match=road):
        random_shapes.fp8_activations_agree(seed, road)


def kernels_agree(seed):
    m, n, k, d, shared, fmt = random_call(seed, KERNEL_FORMATS)
    w, x, t = (a[0] for a in random_layers(1, (m, n, k, d, shared), seed))
    weight, moved, codes, outputs, in_float8 = on_gpu(w, x, t, jnp.float32(fmt.global_scale), fmt)
    # INT4's scale is a rounded sum of squares, which has an order: one group in 2^15 may move.
    share = 1e-4 + 2 / codes[0][1].size if fmt is wush.INT4 else 0
    comparison.same(codes[1], codes[0], fmt, share=share)
    weight = np.asarray(weight, np.float64)
    # Tensor cores cut off where they align: 2^-23 for each sum of 16 products.
    for left, y in zip((x, moved), outputs, strict=True):
        left = np.asarray(left, np.float64)
        bound = (k / 16 + 16) * 2.0**-23 * (np.abs(left) @ np.abs(weight).T)
        error = np.abs(np.asarray(y, np.float64) - left @ weight.T)
        assert (error <= bound).all(), (m, n, k, d, shared, fmt.name, error.max())
    # In FP8 up to 512 columns are summed in some 14 bits: as tests/kernels/test_fp8_matmul.py.
    left = np.asarray(moved, np.float64)
    for y in in_float8:
        error = np.abs(np.asarray(y, np.float64) - left @ weight.T)
        assert (error <= 2.0**-8 * (np.abs(left) @ np.abs(weight).T)).all(), (m, n, k, d, shared)


@functools.partial(jax.jit, static_argnums=4)
def on_gpu(w, x, t, g, fmt):
    """All of one shape as one program: compilation is what a thousand of them take."""
    q = wush.quantize(w, fmt)
    laid = fragments.lay_out(q)
    codes = [
        pallas_kernels.transform_quantize(x, t, fmt, global_scale=g, implementation=name)
        for name in ("reference", "mosaic_gpu")
    ]
    options = {"out_dtype": jnp.float32, "implementation": "mosaic_gpu"}
    outputs = (
        pallas_kernels.quantized_matmul(x, laid, **options),
        pallas_kernels.transform_quantize_matmul(x, t, laid, fmt, global_scale=g, **options),
    )
    left = wush.QuantizedArray(*codes[1], g, fmt)
    in_float8 = ()
    if fmt == wush.MXFP4:
        laid = fragments.lay_out(q, "float8")
        in_float8 = (
            pallas_kernels.quantized_matmul(left, laid, **options),
            pallas_kernels.transform_quantize_matmul(x, t, laid, fmt, global_scale=g, **options),
        )
    return wush.dequantize(q), wush.dequantize(left), codes, outputs, in_float8
