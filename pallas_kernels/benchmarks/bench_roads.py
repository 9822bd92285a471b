"""Which way many tokens go fastest: ``python -m pallas_kernels.benchmarks --roads``.

Whole layers (transform, quantize, multiply) by each of `roads.allowed`, and BF16, in one run. The
entries go into ``tuned/<device>.json``, under "roads"; `plans.road` reads them.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels import dispatch, exactly, fragments, reference
from pallas_kernels import precision as losses
from pallas_kernels.benchmarks.bench_matmul import SHAPES, operands, random_weight
from pallas_kernels.benchmarks.measure import device_time, prepare_all
from pallas_kernels.hopper import matmul, roads

TOKENS = (512, 1024, 4096, 16384)
FORCED = {"library": {}, "fast": {"precision": "default"}}


def _dot(x, w):
    return jnp.dot(x, w.T)


def by_road(fmt, road: str):
    """Return a layer with activations in a format, by one road."""
    if road in FORCED:
        options: dict = {"implementation": "xla_fp8", **FORCED[road]}
        return lambda x, t, w: dispatch.transform_quantize_matmul(x, t, w, fmt, **options)
    run = functools.partial(matmul.transform_quantize_matmul, road=road)
    return lambda x, t, w: run(x, t, (w,), fmt)[0]


def measured(fmt, inputs):
    """How a weight is laid out, the activations that have several roads with it, what to allow."""
    if exactly.in_float8(fmt):
        return "float8", fmt, "default"
    return "bfloat16", inputs, losses.FOLDED


def measure(formats, inputs, shapes=SHAPES, tokens=TOKENS) -> list[dict]:
    """Measure all roads; print and return the entries.

    Args:
      formats: of weights.
      inputs: of activations in FP8.
      shapes: (K, N) of layers.
      tokens: M.
    """
    plan: list[tuple] = []
    calls: list[tuple] = []
    for k, n in shapes:
        dense = reference.dequantize(random_weight(formats[0], k, n)).astype(jnp.bfloat16)
        for m in tokens:
            x, _ = operands(formats[0], k, n, m)
            plan.append((k, n, m, "BF16", "BF16"))
            calls.append((_dot, x, dense))
        for fmt in formats:
            operand, left, precision = measured(fmt, inputs)
            weight = fragments.lay_out(random_weight(fmt, k, n), operand)
            name = roads.pair((weight,), left)
            for m in tokens:
                x, t = operands(formats[0], k, n, m)
                for road in sorted(roads.allowed((weight,), left, precision)):
                    plan.append((k, n, m, name, road))
                    calls.append((by_road(left, road), x, t, weight))
    found: dict = {}
    for (k, n, m, name, road), call in zip(plan, prepare_all(calls), strict=True):
        found.setdefault((k, n, m, name), {})[road] = round(device_time(call, repeats=5) * 1e6, 1)
    entries = []
    for (k, n, m, name), times in found.items():
        base = found[k, n, m, "BF16"]["BF16"]
        print(k, n, m, name, {road: f"{t} us {base / t:.2f}x" for road, t in times.items()})
        if name != "BF16":
            sizes = {"tiles": -(-n // 64), "steps": -(-k // 128), "tokens": m}
            entries.append({"pair": name, **sizes, "microseconds": times})
    return entries
