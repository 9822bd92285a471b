"""The door to the matmul kernels: operands in the kernels' terms, and which kernel."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp

from pallas_kernels import fragments, mosaic_gpu, xla, xla_fp8
from pallas_kernels import tiles as tile_tables
from pallas_kernels.tiles import Split, Tiling

FEW = 16  # tokens up to which a call is bound by reading the weights
# M * N * K from which the rate of FP8 pays for a pass over the activations; measured on an H200.
MUCH = 2**35


def quantized_matmul(x, weight, *, out_dtype=None, precision=None):
    """Return ``x @ dequantize(weight)^T`` by the Mosaic GPU kernels.

    Operands are exact in bfloat16 (INT4 as a sum of two) or FP8, sums are float32 unless
    `xla_fp8.fast`.

    Args:
      x: (..., M, K) bfloat16, or quantized activations.
      weight: `Fragments` (N, K).
      out_dtype: of the result; default x's, float32 for quantized activations.
      precision: of the sums, see `xla_fp8.fast`.

    Raises:
      NotImplementedError: what the kernels, the device or this jax do not cover.
    """
    device = mosaic_gpu.require_hopper()
    return launch(x, weight, device=device, out_dtype=out_dtype, precision=precision)


def transform_quantize_matmul(
    x, transform, weights, fmt, *, global_scale=None, out_dtype=None, precision=None
):
    """Transform, quantize and multiply: two kernels, between them quantized bfloat16 values.

    MXFP4 by MXFP4 of many tokens goes on in FP8, from packed codes.

    Args, raises: as `pallas_kernels.transform_quantize_matmul`, for a tuple of weights.
    """
    device = mosaic_gpu.require_hopper()
    fragments.check(weights)
    out_dtype = out_dtype or x.dtype
    if fmt is None:
        if transform is not None:
            raise NotImplementedError("a transform without quantization has no kernel")
        return launch_all(x, weights, device=device, out_dtype=out_dtype)
    if global_scale is None:
        global_scale = fmt.global_scale
    exact = fmt.element.name == "e2m1"
    float8 = short(math.prod(x.shape[:-1]), fmt, weights)
    layout = "lanes" if float8 else "values" if exact else "interchange"
    codes, scales = mosaic_gpu.launch(
        x, transform, fmt, global_scale=global_scale, layout=layout, device=device
    )
    if float8:
        left = xla_fp8.activations(codes, scales)
        return _float8(left, x, global_scale, weights, out_dtype, precision)
    parts = (codes,) if exact else xla.exact_parts(codes, scales, fmt)
    return launch_all(parts, weights, device=device, out_dtype=out_dtype, global_scale=global_scale)


def launch(
    x, weight, *, device, out_dtype=None, precision=None, plan: Split | Tiling | None = None
):
    """As `quantized_matmul`, for a named device; the plan may be given."""
    options = {"out_dtype": out_dtype, "precision": precision, "plan": plan}
    return launch_all(x, (weight,), device=device, **options)[0]


def launch_all(
    x,
    weights,
    *,
    device,
    out_dtype=None,
    global_scale=1.0,
    precision=None,
    plan: Split | Tiling | None = None,
) -> tuple:
    """Multiply with several weights (N, K) of one K: one kernel where it is bound by reading them.

    x may be a tuple of bfloat16 summands, which ``global_scale`` divides.
    """
    fragments.check(weights)
    if hasattr(x, "codes"):
        out_dtype = out_dtype or jnp.float32
        global_scale = x.global_scale
        if plan is None and short(math.prod(x.shape[:-1]), x.format, weights):
            left = xla_fp8.of_codes(x.codes, x.scales)
            return _float8(left, x, global_scale, weights, out_dtype, precision)
        x = xla.exact_parts(x.codes, x.scales, x.format)
    elif not isinstance(x, tuple):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"x has dtype {x.dtype}: the kernels multiply bfloat16")
        x = (x,)
    lead, k = x[0].shape[:-1], x[0].shape[-1]
    m = math.prod(lead)
    dtype = jnp.dtype(out_dtype or x[0].dtype)
    if dtype.name not in ("float32", "bfloat16", "float16") or m == 0:
        raise NotImplementedError(f"no kernel for x {x[0].shape} and out_dtype={dtype.name}")
    rows = jnp.concatenate([part.reshape(m, k) for part in x])
    if k % 64:  # TMA's view of a swizzled tile splits K by 64 columns
        rows = jnp.pad(rows, ((0, 0), (0, -k % 64)))
    wide = dtype if len(x) == 1 else jnp.dtype(jnp.float32)
    products = _products(rows, weights, global_scale, wide, device, plan)
    if len(x) > 1:
        products = [y.reshape(len(x), m, -1).sum(0).astype(dtype) for y in products]
    return tuple(y.reshape(*lead, y.shape[-1]) for y in products)


def short(tokens: int, fmt, weights) -> bool:
    """Whether a call is exact in FP8, and bound by arithmetic."""
    work = tokens * sum(math.prod(w.shape) for w in weights)
    return work >= MUCH and all(xla_fp8.holds(f) for f in (fmt, *(w.format for w in weights)))


def _float8(left, x, global_scale, weights, out_dtype, precision) -> tuple:
    """Multiply `xla_fp8.activations` by MXFP4 weights in FP8: each where it was measured faster."""
    values, _ = left
    products = []
    for weight in weights:
        rows, columns = weight.shape
        library = not xla_fp8.fast(precision, columns) and (len(values) >= 2048 or columns > rows)
        run = xla_fp8.multiply if library else multiply_float8
        y = run(left, global_scale, weight, out_dtype, precision)
        products.append(y.reshape(*x.shape[:-1], rows))
    return tuple(products)


def multiply_float8(
    left, global_scale, weight, out_dtype, precision=None, plan: Tiling | None = None
):
    """As `xla_fp8.multiply`, with weights expanded in registers only.

    Exact products, but for groups far below the largest (`xla_fp8.activations`,
    `expand.to_float8`). Sums of `tiled_kernel.PROMOTED` steps of 128 have some 14 bits; of all
    steps, where `xla_fp8.fast`.
    """
    from pallas_kernels import expand, tiled_kernel

    fast = xla_fp8.fast(precision, weight.shape[1])
    values, power = left
    rows = jnp.pad(values, ((0, 0), (0, -values.shape[1] % 128)))  # TMA's view splits K by 128
    unit = weight.unit * (power * 2.0 ** (expand.FLOAT8 - 127))
    tiles, steps = weight.records.shape[:2]
    how = plan or float8_tiles(len(rows), tiles, steps, fast)
    weight = dataclasses.replace(weight, unit=unit)
    return tiled_kernel.matmul(rows, weight, global_scale, how, out_dtype=out_dtype, fast=fast)


def float8_tiles(tokens: int, tiles: int, steps: int, fast: bool = False) -> Tiling:
    """As `many`, for FP8: sums, and sums of sums, of at most 160 tokens fit into registers."""
    return wide(tokens, tiles, steps, (64, 96, 128, 256 if fast else 160), 4, 460)


def _products(rows, weights, divisor, dtype, device, plan):
    """Multiply rows (M, K): in one kernel, or one for each weight."""
    from pallas_kernels import matmul_kernel, tiled_kernel

    joint = len({w.format for w in weights}) == 1 and not any(w.shape[0] % 64 for w in weights[:-1])
    tiles, steps = sum(w.records.shape[0] for w in weights), weights[0].records.shape[1]
    kind = fragments.carrier(weights[0].format).kind
    how = plan or choose(rows.shape[0], tiles, steps, kind, device)
    if len(weights) > 1 and not (joint and isinstance(how, Split)):
        return [y for w in weights for y in _products(rows, (w,), divisor, dtype, device, plan)]
    if isinstance(how, Split):
        y = matmul_kernel.matmul(rows, weights, divisor, how, out_dtype=dtype)
        return jnp.split(y, list(itertools.accumulate(w.shape[0] for w in weights))[:-1], axis=1)
    return [tiled_kernel.matmul(rows, weights[0], divisor, how, out_dtype=dtype)]


def choose(tokens: int, tiles: int, steps: int, kind: str, device: str) -> Split | Tiling:
    """Return how to divide a call: the device's tuned entry for its sizes, else a rule's.

    Entries (``python -m pallas_kernels.bench --matmul --tune``) are ``{"kind", "tiles", "steps",
    "tokens": up to, "split" or "tiling": {...}}``; the first that fits counts.

    Args:
      tokens: rows of activations, M.
      tiles: of 64 weights, N/64.
      steps: of 128 columns, K/128.
      kind: of the records, see `fragments.Carrier`.
      device: ``device_kind`` of the GPU.
    """
    for entry in tile_tables.table(device, "quantized_matmul"):
        sizes = entry["kind"], entry["tiles"], entry["steps"]
        if sizes == (kind, tiles, steps) and tokens <= entry["tokens"]:
            if "split" not in entry:
                return Tiling(**entry["tiling"])
            # An entry speaks for fewer tokens, too: their products may be narrower.
            split = Split(**entry["split"])
            return dataclasses.replace(split, tokens=8 if tokens <= 8 else 16)
    return few(tokens, tiles, steps) if tokens <= FEW else many(tokens, tiles, steps, kind)


def few(tokens: int, tiles: int, steps: int) -> Split:
    """Measured on an H200: all multiprocessors in pairs, each with half of K.

    Warpgroups share tiles where there are too few for half of them, and keep activations where each
    has several. Long copies, since every one is waited for.
    """
    clusters = 66
    ways = next((w for w in (4, 2) if tiles * w <= 2 * clusters and steps >= 2 * w), 1)
    longest = 4 if tokens <= 8 else 2
    records = next((r for r in (4, 2) if r <= longest and 2 * ways * r <= steps), 1)
    return Split(
        8 if tokens <= 8 else 16,
        ways=ways,
        clusters=clusters,
        stages=8 // records,
        records=records,
        resident=tiles > 4 * clusters,
    )


def many(tokens: int, tiles: int, steps: int, kind: str) -> Tiling:
    """A rule for bfloat16 products of many tokens; up to 64 measured on an H200."""
    if tokens > 64:
        return wide(tokens, tiles, steps, (128, 256), 16 if kind == "int4" else 8, 200)

    def cost(tiling):
        """In steps of a warpgroup, which expands weights most of the time."""
        tasks = -(-tiles // tiling.warpgroups) * tiling.cuts
        waves = -(-tasks // 132)
        adding = 10 + tiling.cuts if tiling.cuts > 1 else 0
        return waves * (tiling.warpgroups * -(-steps // tiling.cuts) + 4) + adding

    ways = itertools.product((2, 3, 4), (1, 2, 4, 8))
    tilings = [Tiling(64, warpgroups=n, cuts=cuts) for n, cuts in ways if steps >= 4 * cuts]
    return min(tilings or [Tiling(64)], key=cost)


def wide(tokens: int, tiles: int, steps: int, widths, cycles: int, expansion: int) -> Tiling:
    """Return tiles of 128 weights by the width that ends first; K cut where they are few.

    A step takes ``cycles * width + expansion`` cycles of a multiprocessor: tensor cores work while
    nothing is expanded, so that the two add up. Fitted to times of an H200.
    """

    def tasks(width):
        return -(-tiles // 2) * -(-tokens // width)

    width = min(widths, key=lambda w: -(-tasks(w) // 132) * (cycles * w + expansion))
    return Tiling(width, cuts=2 if 2 * tasks(width) <= 132 and steps >= 8 else 1)
