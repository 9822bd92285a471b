"""Device time of the kernels: ``python -m pallas_kernels.benchmarks`` on one GPU.

Each call finds a cold L2 (`measure`). For ``transform_quantize`` the floor is the least traffic of
the call at the rate of the fastest copy measured in the same run, and results are compared with the
jitted definition; ``--matmul`` measures the products (`bench_matmul`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.benchmarks import bench_matmul, bench_ragged, bench_roads
from pallas_kernels.benchmarks.cases import BENCH, Case
from pallas_kernels.benchmarks.measure import copy_rate, device_time
from pallas_kernels.hopper import mosaic_gpu
from pallas_kernels.hopper.tiles import SHARED_MEMORY, Tiles
from pallas_kernels.library import xla


def mismatch(function, case: Case, fmt) -> tuple[float, float]:
    """Return the shares of bytes of codes and of scales that differ from the jitted definition."""
    x, t = case.arrays()

    def definition(x, t, g):
        return reference.transform_quantize(x, t, fmt, global_scale=g)

    got = jax.jit(function)(x, t)
    want = jax.jit(definition)(x, t, jnp.float32(fmt.global_scale))
    codes, scales = (
        float(np.mean(np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)))
        for a, b in zip(got, want, strict=True)
    )
    return codes, scales


def kernel(fmt, tiles: Tiles | None = None):
    """Return the Mosaic GPU implementation for one format, with given tiles or chosen ones."""
    device = mosaic_gpu.require_hopper()

    def run(x, t):
        return mosaic_gpu.launch(
            x, t, fmt, global_scale=None, layout="interchange", device=device, tiles=tiles
        )

    return run


def compare(fmt, cases=BENCH, *, baselines: bool = True) -> list[dict]:
    """Measure the kernel and both XLA versions on the cases; print and return a row for each."""
    rate = copy_rate()
    print(f"{fmt.name} {fmt.rule}, {jax.devices()[0].device_kind}, copy {rate / 1e12:.2f} TB/s")
    rows = []
    for case in cases:
        x, t = case.arrays()
        run = kernel(fmt)
        seconds = device_time(run, x, t)
        row = {
            **dataclasses.asdict(case),
            "format": fmt.name,
            "rule": fmt.rule,
            "microseconds": seconds * 1e6,
            "share_of_copy": case.bytes_moved(fmt) / rate / seconds,
        }
        row["codes_differ"], row["scales_differ"] = mismatch(run, case, fmt)
        if baselines:
            for name, other in (("reference", reference), ("xla", xla)):
                theirs = device_time(
                    lambda x, t, o=other: o.transform_quantize(x, t, fmt), x, t, repeats=3
                )
                row[f"times_{name}"] = theirs / seconds
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row) -> str:
    ratios = " ".join(
        f"{row[key]:6.1f}x {key.removeprefix('times_')}" for key in row if key.startswith("times_")
    )
    kind = f"d={row['block']}{' shared' if row['shared'] else ''}"
    return (
        f"{row['rows']:6d} x {row['width']:5d} {kind:12s} {row['microseconds']:8.2f} us "
        f"{row['share_of_copy']:5.0%} of copy {ratios}  differ: codes {row['codes_differ']:.1e}, "
        f"scales {row['scales_differ']:.1e}"
    )


def candidates(case: Case, fmt):
    """Tiles worth measuring for a case."""
    multiprocessors = jax.devices()[0].core_count
    if case.rows <= 128:
        options = [(1, 1, 1, 4), (1, 2, 1, 2)]
    elif case.rows <= 1024:
        options = [(1, 1, 1, 4), (1, 2, 1, 2), (2, 1, 1, 2), (2, 1, 4, 2)]
    else:
        options = [(4, 2, 4, 1), (2, 1, 4, 2), (2, 2, 4, 2), (4, 1, 4, 1), (2, 1, 1, 2)]
        options.append((4, 2, 1, 1))
    gathered = 16 * fmt.group_size // 128 if fmt.scale_dtype != "bfloat16" else 1
    for warpgroups, stages, gather, resident in options:
        steps = gathered if gather > 1 else 1
        tiles = Tiles(warpgroups, stages, 128, steps, multiprocessors * resident)
        size = tiles.shared_memory(case.block, fmt.group_size, case.shared)
        if size * resident <= SHARED_MEMORY:
            yield tiles


# The case that speaks for all calls up to so many rows.
TUNED = ((128, Case(16)), (1024, Case(1024)), (None, Case(16384)))


def tune(formats) -> dict:
    """Measure the candidates and return the table of this device, to be stored in ``tuned/``."""
    entries = []
    for fmt in formats:
        for limit, case in TUNED:
            x, t = case.arrays()
            timed = {}
            for tiles in dict.fromkeys(candidates(case, fmt)):
                timed[tiles] = device_time(kernel(fmt, tiles), x, t)
                print(f"{fmt.name} {case.rows} {timed[tiles] * 1e6:8.2f} us {tiles}", flush=True)
            best = min(timed, key=lambda tiles: timed[tiles])
            entry = {"rows": limit, "scale": fmt.scale_dtype, "tiles": dataclasses.asdict(best)}
            entries.append({**entry, "microseconds": round(timed[best] * 1e6, 2)})
    command = "python -m pallas_kernels.benchmarks --tune"
    return {"command": command, "jax": jax.__version__, "transform_quantize": entries}


def main(arguments=None) -> None:
    """Run the benchmark, or with ``--tune`` measure tiles.

    Raises:
      NotImplementedError: no GPU that the kernel runs on.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", default="wush_jax.formats", help="module with the formats")
    parser.add_argument("--formats", default="MXFP4,NVFP4,INT4")
    parser.add_argument("--rule", help="replace the formats' scale rule")
    parser.add_argument("--rows", type=int, nargs="*", help="only cases with these M")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the XLA versions")
    parser.add_argument("--tune", action="store_true", help="measure tiles, write a table")
    parser.add_argument("--matmul", action="store_true", help="measure products, whole layers")
    parser.add_argument("--ragged", action="store_true", help="measure layers of experts")
    parser.add_argument("--roads", action="store_true", help="measure ways for many tokens")
    parser.add_argument("--output", help="JSON file for the rows, or for the table")
    options = parser.parse_args(arguments)
    mosaic_gpu.require_hopper()
    provider = importlib.import_module(options.provider)
    formats = [getattr(provider, name) for name in options.formats.split(",")]
    if options.rule:
        formats = [fmt.replace(rule=options.rule) for fmt in formats]
    result: dict | list[dict]
    if options.roads:
        tokens = options.rows or bench_roads.TOKENS
        result = {"roads": bench_roads.measure(formats, provider.FP8, tokens=tokens)}
    elif options.ragged:
        tokens = options.rows or bench_ragged.TOKENS
        pair = provider.MXFP4, provider.NVFP4
        result = bench_ragged.compare(pair, provider.FP8, tokens=tokens)
    elif options.matmul:
        shapes = bench_matmul.SHAPES
        if options.tune:
            result = bench_matmul.tune(formats, shapes, options.rows or bench_matmul.TUNED)
        else:
            rows = options.rows or bench_matmul.TOKENS
            result = bench_matmul.compare_side_by_side(formats, provider.FP8, shapes, rows)
    elif options.tune:
        result = tune(formats)
    else:
        cases = [c for c in BENCH if not options.rows or c.rows in options.rows]
        baselines = not options.no_baselines
        result = [r for fmt in formats for r in compare(fmt, cases, baselines=baselines)]
    if options.output:
        with open(options.output, "w", encoding="utf8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
