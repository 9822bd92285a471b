"""Time RTN and GPTQ quantization, moments included.

    python examples/bench_solvers.py             # one layer on a CPU, against numpy
    python examples/bench_solvers.py --llama8b   # one decoder layer of Llama-3.1-8B's shapes

The first quantizes a 1536 x 384 layer from 32k tokens, here and in vectorised numpy float64 doing
the same mathematics, and prints the ratio. The second streams the moments of the four input sites
of a decoder layer (random weights, 128 x 2048 tokens), quantizes its seven linears, and multiplies
out to 32 layers and 1024 x 2048 tokens. Compilation is measured apart: a whole model compiles once.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import wush_jax as wush
from wush_jax.solvers.site import effective_weight, quantize_site

# Llama-3.1-8B: channels K of each input site, and the outputs N of the layers that read it.
SITES = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
LAYERS, SEQUENCES, LENGTH = 32, 1024, 2048


# ------------------------------------------------------------------ numpy, the same mathematics


def round_mxfp4(y):
    """Round (n, g) to MXFP4 with amax in [3, 6): values."""
    scale = np.ldexp(1.0, np.frexp(np.maximum(np.abs(y).max(-1, keepdims=True), 1e-30))[1] - 1)
    return round_with(y, scale), scale


def round_with(y, scale):
    a = np.minimum(np.abs(y) * 3.0 / scale, 6.0)
    quantum = np.ldexp(0.5, np.maximum(np.frexp(a)[1] - 1, 0))
    return np.sign(y) * np.rint(a / quantum) * quantum * scale / 3.0


def numpy_transform(m_w, m_x, damping=1e-2):
    """T_X and its inverse transpose of blocks (..., d, d)."""
    d = m_w.shape[-1]
    eye = np.eye(d) * damping
    m_w, m_x = (m + np.trace(m, axis1=-2, axis2=-1)[..., None, None] / d * eye for m in (m_w, m_x))
    w, x = np.linalg.cholesky(m_w), np.linalg.cholesky(m_x)
    u, s, _ = np.linalg.svd(w.swapaxes(-1, -2) @ x)
    t = (
        scipy.linalg.hadamard(d)
        / np.sqrt(d)
        @ ((w @ u) / np.sqrt(s)[..., None, :]).swapaxes(-1, -2)
    )
    return t, np.linalg.inv(t).swapaxes(-1, -2)


def numpy_rtn(w, x, d=32):
    (n, k), blocks = w.shape, x.reshape(len(x), -1, d).transpose(1, 0, 2)
    m_x = (blocks.swapaxes(1, 2) @ blocks).astype(np.float64) / len(x)
    wb = w.astype(np.float64).reshape(n, k // d, d).transpose(1, 0, 2)
    t_x, t_w = numpy_transform(wb.swapaxes(1, 2) @ wb / n, m_x)
    values = round_mxfp4(wb @ t_w.swapaxes(1, 2))[0] @ t_x
    return values.transpose(1, 0, 2).reshape(n, k)


def numpy_gptq(w, x, d=32, damping=1e-2):
    h = (x.T @ x).astype(np.float64) / len(x)
    k = w.shape[1]
    damped = h + damping * np.mean(np.diag(h)) * np.eye(k)
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    w = w.astype(np.float64)
    out = np.empty_like(w)
    for start in range(0, k, d):
        i, rest = slice(start, start + d), slice(start + d, k)
        current = w[:, i]
        t_x, t_w = numpy_transform(current.T @ current / len(w), h[i, i])
        moved = current @ t_w.T
        scale = round_mxfp4(moved)[1][:, 0]
        inner = np.linalg.cholesky((t_w @ lower[i, i]) @ (t_w @ lower[i, i]).T)
        values = np.empty_like(moved)
        for c in range(d):
            values[:, c] = round_with(moved[:, c], scale)
            error = (values[:, c] - moved[:, c]) / inner[c, c]
            moved[:, c + 1 :] += np.outer(error, inner[c + 1 :, c])
        out[:, i] = values @ t_x
        error = scipy.linalg.solve_triangular(lower[i, i], (out[:, i] - current).T, lower=True).T
        w[:, rest] += error @ lower[rest, i].T
    return out


# ------------------------------------------------------------------ one layer on a CPU


def ours(w, x, solver):
    recipe = wush.Recipe(solver=solver, transform="wush")
    block = None if solver == "gptq" else recipe.block
    moment = second_moment(x, block)
    return jax.block_until_ready(quantize(w, moment, recipe))


second_moment = jax.jit(wush.second_moment, static_argnums=1)
quantize = jax.jit(wush.quantize_weight, static_argnums=2)


def best_of(function, times):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def bench_layer(n=1536, k=384, tokens=32768, repeats=3):
    rng = np.random.default_rng(0)
    mix = (np.eye(k) + rng.standard_normal((k, k)) / np.sqrt(k)).astype(np.float32)
    x = (rng.standard_normal((tokens, k)) * np.exp(rng.standard_normal(k))).astype(np.float32) @ mix
    w = rng.standard_normal((n, k)).astype(np.float32)
    print(f"MXFP4 WUSH, weight {n} x {k}, {tokens} tokens, best of {repeats}, seconds")
    print(f"{'':6}{'compile':>9}{'jax':>9}{'numpy':>9}{'ratio':>9}   loss jax / numpy")
    h = x.T @ x / tokens
    for solver, reference in (("rtn", numpy_rtn), ("gptq", numpy_gptq)):
        first, packed = best_of(partial(ours, jnp.asarray(w), jnp.asarray(x), solver), 1)
        mine, packed = best_of(partial(ours, jnp.asarray(w), jnp.asarray(x), solver), repeats)
        theirs, values = best_of(partial(reference, w, x), repeats)
        a, b = (loss(v - w, h) for v in (np.float64(effective_weight(packed)), values))
        print(
            f"{solver:6}{first - mine:9.2f}{mine:9.3f}{theirs:9.3f}{theirs / mine:8.1f}x"
            f"   {a:.5f} / {b:.5f}"
        )


def loss(error, h):
    return float(np.einsum("ni,ij,nj->", error, h, error, optimize=True) / len(error))


# ------------------------------------------------------------------ a decoder layer of an 8B model


class CompileClock:
    """Seconds spent in compilation so far."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event, duration, **_):
        if "/compile/" in event:
            self.seconds += duration


@partial(jax.jit, donate_argnums=0)
def update(moments, x):
    return moments.update(x)


def stream(k, block, tokens, chunk, key):
    """Seconds for the moments of a site, and the moments."""
    power = jnp.exp(0.5 * jax.random.normal(key, (k,)))
    x = (jax.random.normal(key, (chunk, k), jnp.bfloat16) * power).astype(jnp.bfloat16)
    moments = jax.block_until_ready(update(wush.Moments.init(k, block), x))  # compiles
    start = time.perf_counter()
    for _ in range(tokens // chunk):
        moments = update(moments, x)
    jax.block_until_ready(moments)
    return time.perf_counter() - start, moments


def out_of_time(started, budget):
    return time.perf_counter() - started > budget


def bench_site(site, solver, fmt, options, clock, late):
    """Seconds for moments and for quantization of one site, compilation apart."""
    k, outputs = SITES[site]
    k, outputs = k // options.shrink, [n // options.shrink for n in outputs]
    recipe = wush.Recipe(format=fmt, solver=solver, scale_search=options.scale_search)
    block = None if solver == "gptq" else recipe.block
    key = jax.random.key(k)
    moment_time, moments = stream(k, block, options.sequences * LENGTH, options.chunk, key)
    weights = [
        (0.02 * jax.random.normal(jax.random.fold_in(key, i), (n, k))).astype(jnp.bfloat16)
        for i, n in enumerate(outputs)
    ]
    moment = moments.finalize()
    del moments
    seconds = []
    for _ in range(2):
        compiled, start = clock.seconds, time.perf_counter()
        jax.block_until_ready(quantize_site(weights, moment, recipe))
        seconds.append(time.perf_counter() - start - (clock.seconds - compiled))
        if late():
            break
    return moment_time, min(seconds)


def bench_decoder(options):
    clock, started = CompileClock(), time.perf_counter()
    fmt = {"MXFP4": wush.MXFP4, "NVFP4": wush.NVFP4, "INT4": wush.INT4}[options.format]
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {options.format}, one decoder layer")
    for solver in options.solvers:
        totals = np.zeros(2)
        for site in SITES:
            late = partial(out_of_time, started, options.budget)
            used = bench_site(site, solver, fmt, options, clock, late)
            totals += used
            print(f"  {solver:5} {site:9} moments {used[0]:7.3f} s   quantize {used[1]:7.3f} s")
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        tokens = SEQUENCES / options.sequences
        minutes = LAYERS * (totals[0] * tokens + totals[1]) / 60
        memory = "unknown" if peak is None else f"{peak / 2**30:.1f} GB"
        print(
            f"{solver}: {LAYERS} layers, {SEQUENCES} x {LENGTH} tokens: {minutes:.2f} minutes "
            f"(moments {LAYERS * totals[0] * tokens / 60:.2f}); peak {memory}; "
            f"compilation so far {clock.seconds:.0f} s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama8b", action="store_true", help="shapes of Llama-3.1-8B")
    parser.add_argument("--format", default="MXFP4", choices=("MXFP4", "NVFP4", "INT4"))
    parser.add_argument("--scale-search", default="rule", choices=("rule", "sweep"))
    parser.add_argument("--solvers", nargs="+", default=["rtn", "gptq"], choices=("rtn", "gptq"))
    parser.add_argument("--sequences", type=int, default=128, help="of 2048 tokens, timed")
    parser.add_argument("--chunk", type=int, default=32768, help="tokens in one update")
    parser.add_argument("--budget", type=float, default=60, help="no second runs after so long, s")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths, for a trial")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    bench_decoder(options) if options.llama8b else bench_layer(repeats=options.repeats)


if __name__ == "__main__":
    main()
