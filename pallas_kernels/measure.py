"""Device times with a cold L2, and the rates that bound them."""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp

GIB = 1 << 30


def device_time(function, *arguments, repeats: int = 9) -> float:
    """Return the median device time in seconds of a call that finds a cold, clean L2.

    An array of 1 GiB is read just before: the cache then holds nothing that the call reads, and
    nothing that still has to be written back. Times are CUPTI's, of the call's kernels alone.
    """
    return statistics.median(device_times(function, *arguments, repeats=repeats))


def device_times(function, *arguments, repeats: int = 9) -> list[float]:
    """As `device_time`: all measured times."""
    from jax.experimental.mosaic.gpu import profiler

    @jax.jit
    def cold(flush, arguments):
        # One kernel, and the barrier makes the call wait for it.
        peaks, arguments = jax.lax.optimization_barrier((jnp.max(flush, axis=1), arguments))
        return peaks, function(*arguments)

    flush = jnp.zeros((GIB // 16384, 4096), jnp.float32)
    measured = profiler.measure(cold, aggregate=False)
    times = []
    for _ in range(repeats):
        _, kernels = measured(flush, arguments)
        milliseconds: list[float] = [time for _, time in kernels or ()]
        times.append(sum(milliseconds[1:]) / 1e3)
    return times


def copy_rate() -> float:
    """Return the rate in bytes per second, read and written, of the fastest copy of 1 GiB."""
    x = jnp.ones((GIB // 2,), jnp.bfloat16)
    return 2 * GIB / min(*device_times(lambda y: y + 1, x, repeats=3), *_copies(x))


def _copies(x):
    """Seconds of jnp.copy, which may be a memory copy that CUPTI does not count as a kernel."""
    import time

    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(x))
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([copy(x) for _ in range(8)])
        yield (time.perf_counter() - start) / 8


def read_rate() -> float:
    """Return the rate in bytes per second of reading 1 GiB."""
    x = jnp.ones((GIB // 8192, 4096), jnp.bfloat16)
    return GIB / min(device_times(lambda y: jnp.max(y, axis=1), x, repeats=3))
