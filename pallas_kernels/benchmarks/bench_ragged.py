"""Layers of experts against BF16: ``python -m pallas_kernels.benchmarks --ragged``.

For each shape and number of tokens that every expert gets, in one run: the time of
`jax.lax.ragged_dot` in bfloat16, of a batched product (``batched``: what is possible where all get
as many), and of whole layers (transform, quantize, multiply) of MXFP4 weights: with activations of
4 bits and a transform that all experts share (``a4``) or each its own (``a4_own``), and of 8 bits
(``a8``); of NVFP4 weights and activations (``nvfp4``). ``dense`` is the layer of one weight with as
many bytes, and as many tokens as one expert has. L2 is cold, times are of the device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, fragments, stacks
from pallas_kernels.benchmarks.bench_matmul import Weight
from pallas_kernels.benchmarks.measure import device_time, prepare_all, read_rate
from pallas_kernels.hopper import mosaic_gpu, ragged

# Experts, K, N: gate or up of Qwen3-30B-A3B, half of its experts; of Mixtral 8x7B.
SHAPES = ((64, 2048, 768), (8, 4096, 14336))
TOKENS = (1, 4, 16, 64, 512)
BLOCK = 32


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _codes(fmt, groups, k, n):
    def one(key):
        codes, scales = fmt.encode(jax.random.normal(key, (n, k)) / k**0.5, fmt.global_scale)
        return fmt.pack(codes), scales

    return lax.map(one, jax.random.split(jax.random.key(0), groups))


def random_weights(fmt, groups: int, k: int, n: int) -> Weight:
    """Return quantized Gaussian weights (G, N, K)."""
    codes, scales = _codes(fmt, groups, k, n)
    return Weight(codes, scales, jnp.full((groups,), fmt.global_scale), fmt, (groups, n, k))


def _one(weight: Weight) -> Weight:
    """All experts' rows as one weight."""
    groups, n, k = weight.shape
    codes, scales = (a.reshape(groups * n, -1) for a in (weight.codes, weight.scales))
    return Weight(codes, scales, weight.global_scale[0], weight.format, (groups * n, k))


def _ragged(inputs, device):
    def run(x, t, weight, sizes):
        return ragged.launch(x, t, (weight,), sizes, inputs, device=device)[0]

    return run


def _dense(inputs):
    def run(x, t, weight):
        return dispatch.transform_quantize_matmul(x, t, weight, inputs, implementation="mosaic_gpu")

    return run


def calls_of(formats, inputs, shape, tokens: int, weights: dict, device):
    """Name, function and arguments of what is measured."""
    fmt, other = formats
    groups, k, _ = shape
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (groups * tokens, k)).astype(jnp.bfloat16)
    t = jax.random.normal(keys[1], (groups, k // BLOCK, BLOCK, BLOCK)) / BLOCK**0.5
    t, sizes = t.astype(jnp.bfloat16), jnp.full((groups,), tokens, jnp.int32)
    yield "bf16", lax.ragged_dot, x, weights["bf16"], sizes
    yield (
        *("batched", lambda x, w: jnp.einsum("gmk,gkn->gmn", x, w)),
        *(x.reshape(groups, tokens, k), weights["bf16"]),
    )
    yield "a4", _ragged(fmt, device), x, t[:1], weights[fmt.name], sizes
    yield "a4_own", _ragged(fmt, device), x, t, weights[fmt.name], sizes
    yield "a8", _ragged(inputs, device), x, t[:1], weights[fmt.name], sizes
    yield "nvfp4", _ragged(other, device), x, t[:1], weights[other.name], sizes
    yield "dense", _dense(fmt), x[:tokens], t[0], weights["dense"]


def weights_of(formats, shape) -> dict:
    """The weights of a shape, by name."""
    fmt, other = formats
    groups, k, n = shape
    weight = random_weights(fmt, groups, k, n)
    made = {
        fmt.name: stacks.lay_out(weight, "float8"),
        "dense": fragments.lay_out(_one(weight), "float8"),
        other.name: stacks.lay_out(random_weights(other, groups, k, n)),
    }
    keys = jax.random.split(jax.random.key(2), groups)
    made["bf16"] = lax.map(lambda key: jax.random.normal(key, (k, n), jnp.bfloat16), keys)
    return made


def compare(formats, inputs, shapes=SHAPES, tokens=TOKENS) -> list[dict]:
    """Measure layers of experts against BF16; print and return a row for each.

    Args:
      formats: two: of MXFP4 and of NVFP4.
      inputs: of activations with eight bits.
      shapes: (G, K, N) of layers.
      tokens: of each expert.
    """
    device = mosaic_gpu.require_hopper()
    print(f"{jax.devices()[0].device_kind}, reads {read_rate() / 1e12:.2f} TB/s")
    rows = []
    for shape in shapes:
        weights = weights_of(formats, shape)
        plan = [
            (m, name, (call, *arguments))
            for m in tokens
            for name, call, *arguments in calls_of(formats, inputs, shape, m, weights, device)
        ]
        timed = prepare_all([call for *_, call in plan])
        for m in tokens:
            row = dict(zip(("groups", "k", "n"), shape, strict=True)) | {"tokens": m}
            for (tokens_of, name, _), call in zip(plan, timed, strict=True):
                if tokens_of == m:
                    row[f"{name}_us"] = round(device_time(call, repeats=5) * 1e6, 2)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row) -> str:
    base = row["bf16_us"]
    times = " ".join(
        f"{name.removesuffix('_us')} {us:.1f} us {base / us:.2f}x"
        for name, us in row.items()
        if name.endswith("_us") and name != "bf16_us"
    )
    sizes = f"{row['groups']:3d} of ({row['k']}, {row['n']}), {row['tokens']:4d} tokens each"
    return f"{sizes}  bf16 {base:.1f} us  {times}"
