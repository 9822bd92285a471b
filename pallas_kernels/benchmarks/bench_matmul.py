"""Products of packed weights against BF16: ``python -m pallas_kernels.benchmarks --matmul``.

For each shape and M: the time of ``jnp.dot`` in bfloat16, of the product with packed weights
(``a16``), and of whole layers (transform, quantize, multiply) as the dispatch chooses, with FP8
activations (``a8``) and those of the weight's format (``a4``), in one run; for many tokens also
with short sums (``fast``) and weights rounded to FP8 (``folded``). Products take bfloat16
activations, and weights laid out for them; layers of MXFP4 multiply in FP8.
The floor is the packed weight and the activations at the rate of a reduction of 1 GiB. Errors are
against float64 products of the dequantized operands, over a sample of columns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import threading
from contextlib import contextmanager, nullcontext, suppress
from math import nan
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, exactly, fragments, reference
from pallas_kernels.benchmarks.measure import device_time, prepare_all, read_rate
from pallas_kernels.hopper import matmul, mosaic_gpu, plans
from pallas_kernels.hopper.tiles import Split, Tiling

# (K, N) of Llama-3.1-8B: q, k, v together; o; gate and up together; down.
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
MANY = 1024  # tokens from which libraries and rounded weights are worth a measurement
TUNED = (8, 16, 64, 256, 1024, 4096)
SAMPLE = 64


@dataclasses.dataclass(frozen=True)
class Weight:
    """A random weight (N, K) quantized in a format, as `pallas_kernels` takes it."""

    codes: Any
    scales: Any
    global_scale: Any
    format: Any
    shape: tuple[int, ...]


def random_weight(fmt, k: int, n: int, seed: int = 0) -> Weight:
    """Return a quantized Gaussian weight whose rows lie up to three octaves up or down."""
    keys = jax.random.split(jax.random.key(seed))
    octaves = jax.random.randint(keys[0], (n, 1), -3, 4)
    values = jax.random.normal(keys[1], (n, k)) * jnp.exp2(octaves) / k**0.5
    codes, scales = jax.jit(lambda v: fmt.encode(v, fmt.global_scale))(values)
    return Weight(fmt.pack(codes), scales, jnp.float32(fmt.global_scale), fmt, (n, k))


def operands(fmt, k: int, n: int, m: int, seed: int = 1):
    """Return bfloat16 activations (M, K) and transforms (K/g, g, g)."""
    keys = jax.random.split(jax.random.key(seed))
    g = fmt.group_size
    x = jax.random.normal(keys[0], (m, k)).astype(jnp.bfloat16)
    return x, (jax.random.normal(keys[1], (k // g, g, g)) / g**0.5).astype(jnp.bfloat16)


def error(run, x, weight: Weight, laid_out) -> float:
    """Return the relative error of a product over the first columns, against float64."""
    y = np.asarray(jax.jit(run)(x, laid_out)[:, :SAMPLE], np.float64)
    rows = Weight(
        *(weight.codes[:SAMPLE], weight.scales[:SAMPLE], weight.global_scale, weight.format),
        (SAMPLE, weight.shape[1]),
    )
    exact = np.asarray(x, np.float64) @ np.asarray(reference.dequantize(rows), np.float64).T
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def _dot(x, w):
    return jnp.dot(x, w.T)


def compare(formats, inputs, shapes=SHAPES, tokens=TOKENS, turn=nullcontext) -> list[dict]:
    """Measure products and whole layers against BF16; print and return a row for each.

    Args:
      formats: of weights, and of activations with four bits.
      inputs: of activations with eight.
      shapes: (K, N) of layers.
      tokens: M.
      turn: when everything is compiled, measuring waits to enter what this returns.
    """
    device = mosaic_gpu.require_hopper()
    dense = [(k, n, m, _dense(formats[0], k, n, m)) for k, n in shapes for m in tokens]
    plan: list[tuple] = [("BF16", k, n, m, "bf16", call) for k, n, m, call in dense]
    floors, checks = {}, {}
    for fmt, (k, n) in ((f, s) for f in formats for s in shapes):
        weight = random_weight(fmt, k, n)
        laid_out = fragments.lay_out(weight)
        of_layer = fragments.lay_out(weight, "float8") if exactly.in_float8(fmt) else laid_out
        for m in tokens:
            calls = _calls(fmt, inputs, k, n, m, laid_out, of_layer, device)
            plan += [(fmt.name, k, n, m, name, call) for name, *call in calls]
            floors[fmt.name, k, n, m] = laid_out.nbytes + 2 * m * (k + n)
        x, _ = operands(fmt, k, n, tokens[0])
        run = functools.partial(matmul.launch, device=device, out_dtype=jnp.float32)
        checks[fmt.name, k, n] = error(run, x, weight, laid_out)
    timed = prepare_all([call for *_, call in plan])
    with turn():
        rate = read_rate()
        print(f"{jax.devices()[0].device_kind}, reads {rate / 1e12:.2f} TB/s")
        found: dict = {}
        for (fmt, k, n, m, name, _), call in zip(plan, timed, strict=True):
            if isinstance(call, NotImplementedError | ValueError):
                print(f"{fmt} {k} {n} M={m} {name}: {call}")
                continue
            found.setdefault((fmt, k, n, m), {})[f"{name}_us"] = device_time(call) * 1e6
    rows = []
    for (fmt, k, n, m), times in found.items():
        if fmt == "BF16":
            continue
        row = {"format": fmt, "k": k, "n": n, "tokens": m, **found["BF16", k, n, m], **times}
        row["share_of_floor"] = floors[fmt, k, n, m] / rate / row["a16_us"] * 1e6
        rows.append(row | {"error": checks[fmt, k, n]})
        print(_line(rows[-1]), flush=True)
    return rows


def compare_side_by_side(formats, inputs, shapes=SHAPES, tokens=TOKENS) -> list[dict]:
    """`compare`, each format in a process of its own: all compile at once, then one measures."""
    context = multiprocessing.get_context("spawn")
    ready, alone, queue = context.Barrier(len(formats)), context.Lock(), context.Queue()
    workers = [
        context.Process(target=_worker, args=(ready, alone, queue, [f], inputs, shapes, tokens))
        for f in formats
    ]
    for worker in workers:
        worker.start()
    rows = [row for _ in workers for row in queue.get()]
    for worker in workers:
        worker.join()
    return rows


def _worker(ready, alone, queue, formats, inputs, shapes, tokens):
    @contextmanager
    def turn():
        with suppress(threading.BrokenBarrierError):
            ready.wait()
        with alone:
            yield

    rows: list[dict] = []
    try:
        rows = compare(formats, inputs, shapes, tokens, turn)
    finally:
        ready.abort()  # whoever still waits for one that failed goes on
        queue.put(rows)


def _dense(fmt, k, n, m) -> tuple:
    """The product in bfloat16."""
    weight = reference.dequantize(random_weight(fmt, k, n)).astype(jnp.bfloat16)
    return _dot, operands(fmt, k, n, m)[0], weight


def _calls(fmt, inputs, k, n, m, laid_out, of_layer, device):
    """Products with bfloat16 activations, layers with activations of 8 and 4 bits, for many
    tokens also those that may lose something: (name, call, *arguments).
    """
    x, t = operands(fmt, k, n, m)
    yield "a16", functools.partial(matmul.launch, device=device), x, laid_out
    yield "a8", _layer(inputs), x, t, of_layer
    yield "a4", _layer(fmt), x, t, of_layer
    if m >= MANY:
        if exactly.in_float8(fmt):
            yield "fast", _layer(fmt, "default"), x, t, of_layer
        elif fmt.scale_dtype == "e4m3":
            yield "folded", _layer(inputs, "folded"), x, t, of_layer


def _layer(fmt, precision=None):
    """A layer as the dispatch chooses."""
    run = dispatch.transform_quantize_matmul
    return lambda x, t, w: run(x, t, w, fmt, precision=precision)


def _line(row) -> str:
    base = row["bf16_us"]
    times = " ".join(
        f"{name.removesuffix('_us')} {us:8.2f} us {base / us:5.2f}x"
        for name, us in row.items()
        if name.endswith("_us") and name != "bf16_us"
    )
    return (
        f"{row['format']:6s} {row['k']:6d} {row['n']:6d} M={row['tokens']:5d}  bf16 {base:8.2f} us"
        f"  {times}  {row['share_of_floor']:4.0%} of floor  error {row.get('error', nan):.1e}"
    )


def candidates(tokens: int, tiles: int, steps: int):
    """Ways to divide a call that are worth measuring."""
    if tokens <= plans.FEW:
        width = 8 if tokens <= 8 else 16
        for ways, records, resident in itertools.product((1, 2, 4), (1, 2, 4), (False, True)):
            busy = ways == 1 or tiles * ways <= 2 * 4 * 66
            if busy and not (resident and ways == 4):
                yield Split(
                    width, ways=ways, stages=8 // records, records=records, resident=resident
                )
        return
    for width, warpgroups, cuts in np.ndindex(3, 3, 4):
        tiling = Tiling((64, 128, 256)[width], (2, 3, 4)[warpgroups], 2**cuts)
        tasks = -(-tiles // tiling.warpgroups) * -(-tokens // tiling.tokens)
        registers = tiling.tokens // 2 * tiling.warpgroups  # of sums, all warpgroups together
        useful = tiling.tokens < 2 * tokens and steps >= 4 * tiling.cuts and registers <= 256
        if useful and (tiling.cuts == 1 or tasks * tiling.cuts <= 2 * 132):
            yield tiling


def tune(formats, shapes=SHAPES, tokens=TUNED) -> dict:
    """Measure the candidates; return entries for the table of this device."""
    device = mosaic_gpu.require_hopper()
    entries = []
    for fmt, (k, n) in ((f, s) for f in formats for s in shapes):
        laid_out = fragments.lay_out(random_weight(fmt, k, n))
        for m in sorted(tokens):
            x, _ = operands(fmt, k, n, m)
            timed = {}
            plans = list(candidates(m, *laid_out.records.shape[:2]))
            products = [functools.partial(matmul.launch, device=device, plan=p) for p in plans]
            calls = prepare_all([(product, x, laid_out) for product in products])
            for plan, call in zip(plans, calls, strict=True):
                if isinstance(call, Exception):  # what does not compile is no candidate
                    continue
                timed[plan] = device_time(call, repeats=5)
                print(f"{fmt.name} {k} {n} {m} {timed[plan] * 1e6:8.2f} us {plan}", flush=True)
            best = min(timed, key=lambda plan: timed[plan])
            name = "split" if isinstance(best, Split) else "tiling"
            entries.append(
                {
                    "kind": fragments.carrier(fmt).kind,
                    **dict(zip(("tiles", "steps"), laid_out.records.shape[:2], strict=True)),
                    "tokens": m,
                    name: dataclasses.asdict(best),
                    "microseconds": round(timed[best] * 1e6, 2),
                }
            )
    return {"quantized_matmul": entries}
