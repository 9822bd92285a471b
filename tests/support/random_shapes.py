"""Random layers with FP8 activations through the kernels: many a minute, for tests on a GPU.

    python tests/support/random_shapes.py --seconds 120 --processes 16 --roads float8 folded

All that is not a kernel runs at one size, so that a shape compiles its kernels alone.
"""

import argparse
import collections
import concurrent.futures
import functools
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import wush_jax as wush
from pallas_kernels import folded, fragments, reference

TOKENS, OUTPUTS, WIDTH = 640, 704, 2048  # no call is larger
WEIGHTS = (wush.MXFP4, wush.NVFP4, wush.NVINT4, wush.INT4)
FORMATS = {"MXFP4": (wush.MXFP4, "float8"), "NVFP4": (wush.NVFP4, "values")}
FORMATS["FP8"] = (wush.FP8, "float8")
FORMATS["NVINT4"] = (wush.NVINT4, "values")
RULES = ("signed_absmax", "signed_candidates")
# What weights are laid out for and how they are multiplied, and which formats are.
ROADS = {"bfloat16": WEIGHTS, "float8": WEIGHTS[:1], "folded": WEIGHTS[1:3]}
# Tensor cores cut off where they align: 2^-23 for each sum of 16 products. In FP8 up to 512 columns
# are summed in some 14 bits: as tests/kernels/hopper/test_fp8_matmul.py.
BOUNDS = {"float8": 2.0**-8, "folded": 2.0**-8}


def random_layers(count, shape, seed):
    """Weights of many magnitudes, well-conditioned moments, and inputs with exact products.

    Inputs are small integers times a power of two, transforms signed Hadamard matrices times one:
    their products are exact in float32 in any order, so that all codes have to agree.
    """
    tokens, outputs, k, d, shared = shape
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (count, outputs, k)) * 2.0 ** rng.integers(-9, 10, (count, outputs, 1))
    w[rng.random((count, outputs)) < 0.05] = 0
    x = rng.integers(-64, 65, (count, tokens, k)) * 2.0 ** rng.integers(-12, 7, (count, tokens, 1))
    blocks = () if shared else (k // d,)
    signs = rng.choice([-1.0, 1.0], (count, *blocks, 1, d))
    t = signs * np.sign(oracle.hadamard(d)) / 2.0 ** (d.bit_length() // 2)
    return np.float32(w), jnp.asarray(x, jnp.bfloat16), jnp.asarray(t, jnp.bfloat16)


def random_call(seed, formats):
    """Sizes that a layer may have: rows, outputs, K, block, shared, format."""
    rng = np.random.default_rng(seed)
    fmt = formats[rng.integers(len(formats))]
    d, shared = int(rng.choice([32, 64, 128])), bool(rng.integers(2))
    rows, outputs = int(np.exp(rng.uniform(0, np.log(600)))), int(rng.integers(1, 700))
    wide = max(d, 64)  # what the transform's kernel asks of K
    return rows, outputs, wide * int(rng.integers(1, 1 + 2048 // wide)), d, shared, fmt


def fp8_activations_agree(seed, road=None):
    """Assert the bounds of a layer's outputs, by one road or all that its format has.

    The weight's format is that of the seed's remainder by four.
    """
    *shape, _ = random_call(seed, WEIGHTS[:3])
    fmt = WEIGHTS[seed % len(WEIGHTS)]
    w, x, t = (a[0] for a in random_layers(1, tuple(shape), seed))
    left = left_of(x, t)
    for name in (road,) if road else (name for name, formats in ROADS.items() if fmt in formats):
        laid, weight = weight_of(w, fmt, name)
        y = np.asarray(layer(x, t, laid, name), np.float64)
        sums = np.abs(left) @ np.abs(weight).T
        error = np.abs(y - left @ weight.T)
        bound = BOUNDS.get(name, (shape[2] / 16 + 16) * 2.0**-23)
        with np.errstate(invalid="ignore"):
            assert (error <= bound * sums).all(), (seed, name, shape, np.nanmax(error / sums))


def left_of(x, t, fmt=wush.FP8):
    """The definition's activations in float64: their products are exact."""
    x, t = np.asarray(x, np.float32), np.asarray(t, np.float32)
    d = t.shape[-1]
    blocks = x.reshape(len(x), -1, d)
    y = np.einsum("mbi,bji->mbj", blocks, np.broadcast_to(t, (blocks.shape[1], d, d)))
    y = jnp.asarray(padded(y.reshape(x.shape), TOKENS))
    return np.asarray(values_of(y, fmt), np.float64)[: len(x), : x.shape[1]]


@functools.partial(jax.jit, static_argnums=1)
def values_of(y, fmt):
    return wush.dequantize(wush.quantize(y, fmt))


def normed_agrees(seed):
    """Assert what a kernel makes of a norm: the sum bit by bit, quantized values but for a few.

    Another order of float32 sums moves one value of n in some 10^4 across a boundary of bfloat16,
    and with it a few of its block's across one of the format's.
    """
    rng = np.random.default_rng(seed)
    *sizes, _ = random_call(seed, WEIGHTS)
    rows, (k, d, shared) = 1 + sizes[0] % 64, sizes[2:]
    fmt, layout = FORMATS[format_of(seed, "normed")]
    added = bool(seed // 3 % 4)
    x, residual = (bfloat16(rng.standard_normal((rows, k))) for _ in range(2))
    weight = bfloat16(rng.uniform(0.5, 2, k))
    t = bfloat16(rng.standard_normal((d, d) if shared else (k // d, d, d)) / d**0.5)
    h = bfloat16(np.float32(x) + np.float32(residual)) if added else x
    mean = np.mean(np.float64(h) ** 2, axis=1, keepdims=True)
    n = bfloat16(np.float32(h) * (np.float32((mean + 1e-5) ** -0.5) * np.float32(weight)))
    codes, powers, total = quantized(x, residual if added else None, weight, t, fmt, layout)
    if added:
        np.testing.assert_array_equal(np.asarray(total).view(np.uint16), h.view(np.uint16))
    found = np.float64(codes)
    if layout == "float8":
        in_order = found.reshape(rows, -1, 2, 4, 4).transpose(0, 1, 4, 3, 2).reshape(found.shape)
        shares = found.shape[1] // len(powers)
        found = in_order * np.repeat(np.float64(powers)[:, :rows].T, shares, axis=1)
    found = found[:, :k] / fmt.global_scale
    wanted = left_of(n, t, fmt)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    # The definition divides in float32.
    differ = np.mean(~np.isclose(found, wanted, rtol=2.0**-22, atol=0))
    # Groups whose scale moved differ whole.
    share = 2e-3 + 2 * min(fmt.group_size, 32) / found.size
    assert differ <= share, (seed, fmt.name, rows, k, d, shared, differ, error)
    assert error <= share**0.5 / 2, (seed, fmt.name, rows, k, d, shared, differ, error)


def quantizer_agrees(seed):
    """Assert NVINT4's codes and scales: equal, but where the errors of two candidates are.

    Of integers they are in some groups of 10^4, and another order of sums takes the other one.
    """
    rows, _, k, d, shared, _ = random_call(seed, WEIGHTS)
    _, x, t = (a[0] for a in random_layers(1, (rows, 1, k, d, shared), seed))
    fmt = wush.NVINT4.replace(rule=RULES[seed // 4 % 2])
    found = quantized(x, None, None, t, fmt, "interchange")
    y = np.einsum("mbi,bji->mbj", np.float32(x).reshape(rows, -1, d), spread(t, k))
    y = padded(y.reshape(rows, k), TOKENS)
    wanted = [np.asarray(a) for a in encoded(y, fmt)]
    got = [a.copy() for a in wanted]
    for whole, part in zip(got, found, strict=True):
        whole[: part.shape[0], : part.shape[1]] = np.asarray(part)
    other, codes = (
        (a.view(np.uint8) != b.view(np.uint8)).reshape(*wanted[1].shape, -1)
        for a, b in ((got[1], wanted[1]), (got[0], wanted[0]))
    )
    other = other[..., 0]
    assert not codes[~other].any(), (seed, fmt.rule, rows, k, d, shared)
    errors = [
        np.sum((y - np.float64(decoded(*pair, fmt))).reshape(*other.shape, -1) ** 2, axis=-1)
        for pair in (got, wanted)
    ]
    # Exact ties: these values and their errors are rationals of few bits.
    np.testing.assert_allclose(errors[0][other], errors[1][other], rtol=1e-6, err_msg=str(seed))


@functools.partial(jax.jit, static_argnums=2)
def decoded(codes, scales, fmt):
    return wush.dequantize(wush.QuantizedArray(codes, scales, jnp.float32(fmt.global_scale), fmt))


def spread(t, k):
    t = np.asarray(t, np.float32)
    return np.broadcast_to(t, (k // t.shape[-1], *t.shape[-2:]))


@functools.partial(jax.jit, static_argnums=1)
def encoded(y, fmt):
    codes, scales = fmt.encode(y, jnp.float32(fmt.global_scale))
    return fmt.pack(codes), scales


def bfloat16(a):
    return np.asarray(a, np.float32).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(4, 5))
def quantized(x, residual, weight, t, fmt, layout):
    from pallas_kernels.hopper import mosaic_gpu

    device = mosaic_gpu.require_hopper()
    options = {"global_scale": None, "layout": layout, "device": device}
    norm = None if weight is None else (weight, 1e-5)
    return mosaic_gpu.launch(x, t, fmt, norm=norm, residual=residual, **options)


def weight_of(w, fmt, road):
    """Records of a weight, and what they stand for: float64 (N, K)."""
    (n, k), operand = w.shape, "float8" if road == "float8" else "bfloat16"
    whole, values = laid_out(padded(w, OUTPUTS), fmt, operand, road == "folded")
    records = np.asarray(whole.records)[: -(-n // 64), : -(-k // 128)]
    laid = fragments.Fragments(
        jnp.asarray(records), whole.unit, whole.global_scale, fmt, (n, k), operand
    )
    return laid, np.asarray(values, np.float64)[:n, :k]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def laid_out(w, fmt, operand, rounded):
    q = wush.quantize(w, fmt)
    # The records' own values: NVINT4's hold 14 octaves, and these rows lie further apart.
    laid = fragments.lay_out(q, operand)
    values = folded.dequantize(*laid.interchange, fmt, laid.global_scale) if rounded else None
    return laid, reference.dequantize(laid) if values is None else values


def padded(a, rows):
    return np.pad(a, ((0, rows - a.shape[0]), (0, WIDTH - a.shape[1])))


@functools.partial(jax.jit, static_argnums=3)
def layer(x, t, laid, road):
    from pallas_kernels.hopper import matmul

    way = "folded" if road == "folded" else "fused"
    options = {"out_dtype": jnp.float32, "road": way}
    return matmul.transform_quantize_matmul(x, t, (laid,), wush.FP8, **options)[0]


# Roads of activations alone.
OWN = {"normed": normed_agrees, "quantizer": quantizer_agrees}


def failure(seed, road):
    """What a layer's assertion says, or None."""
    try:
        if road in OWN:
            OWN[road](seed)
        else:
            fp8_activations_agree(seed, road)
    except AssertionError as error:
        return str(error)
    finally:
        jax.clear_caches() if seed % 40 == 0 else None
    return None


def format_of(seed, road):
    """The name of a layer's format: of its weights, or of what follows its norm."""
    if road == "quantizer":
        return "NVINT4"
    if road == "normed":
        return sorted(FORMATS)[seed % len(FORMATS)]
    return WEIGHTS[seed % len(WEIGHTS)].name


def has(seed, road):
    """Whether a layer's weights go by that road."""
    return WEIGHTS[seed % len(WEIGHTS)] in ROADS.get(road, WEIGHTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    roads = [*ROADS, *OWN]
    parser.add_argument("--roads", nargs="*", choices=roads, default=roads)
    names = sorted({fmt.name for fmt in WEIGHTS} | set(FORMATS))
    parser.add_argument("--formats", nargs="*", choices=names, default=names)
    options = parser.parse_args()
    seeds = range(options.first, options.first + len(WEIGHTS) * options.layers)
    tasks = [
        [(s, road) for s in seeds if has(s, road) and format_of(s, road) in options.formats]
        for road in options.roads
    ]
    tasks = [task for of_road in tasks for task in of_road[: options.layers]]
    sweep(tasks, options.processes, time.monotonic() + options.seconds)


def sweep(tasks, processes, end):
    """Run layers until they or the time are used up; prints what was seen by road and format."""
    seen = collections.defaultdict(list)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        waiting = {pool.submit(failure, *task): task for task in tasks}
        try:
            for one in concurrent.futures.as_completed(waiting, end - time.monotonic()):
                seed, road = waiting[one]
                seen[road, format_of(seed, road)].append(one.result())
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # in the middle of a layer
    for kind, results in seen.items():
        wrong = [result for result in results if result]
        print(*kind, f"{len(results)} layers, {len(wrong)} wrong", *wrong[:9], flush=True)


if __name__ == "__main__":
    main()
