"""Device times with a cold L2, and the rates that bound them."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

GIB = 1 << 30
FLUSH = (GIB // 16384, 4096)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A call that is compiled and ready to be measured: 1 GiB is read before it."""

    run: Any
    arguments: tuple


def prepare(function, *arguments) -> Timed:
    """Compile a call for `device_time`."""

    @jax.jit
    def cold(flush, arguments):
        # One kernel, and the barrier makes the call wait for it.
        peaks, arguments = jax.lax.optimization_barrier((jnp.max(flush, axis=1), arguments))
        return peaks, function(*arguments)

    flush = jax.ShapeDtypeStruct(FLUSH, jnp.float32)
    return Timed(cold.lower(flush, arguments).compile(), arguments)


def prepare_all(calls) -> list[Timed | Exception]:
    """Compile many calls (function, *arguments) side by side; errors of those that do not."""

    def one(call):
        try:
            return prepare(*call)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, calls))


def device_time(call, *arguments, repeats: int = 9) -> float:
    """Return the median device time in seconds of a call that finds a cold, clean L2.

    An array of 1 GiB is read just before: the cache then holds nothing that the call reads, and
    nothing that still has to be written back. The time is that from the end of this kernel to the
    end of the call's last, on the profiler's time line: what a call that follows another takes.
    Gaps between kernels count, and kernels that run while others do count once.

    Args:
      call: a function of the arguments, or of `prepare_all`, which raises its error here.
      *arguments: of the function.
      repeats: calls that are measured.
    """
    return statistics.median(device_times(call, *arguments, repeats=repeats))


def device_times(call, *arguments, repeats: int = 9) -> list[float]:
    """As `device_time`: all measured times."""
    if isinstance(call, Exception):
        raise call
    timed = call if isinstance(call, Timed) else prepare(call, *arguments)
    flush = jnp.zeros(FLUSH, jnp.float32)
    jax.block_until_ready(timed.run(flush, timed.arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=_quiet()):
            jax.block_until_ready([timed.run(flush, timed.arguments) for _ in range(repeats)])
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        kernels = _kernels(jax.profiler.ProfileData.from_file(str(file)))
    each, left = divmod(len(kernels), repeats)
    if left or each < 2:
        raise RuntimeError(f"{len(kernels)} kernels were seen in {repeats} calls: measure again")
    starts = range(0, len(kernels), each)
    return [max(e for _, e in kernels[i : i + each]) - kernels[i][1] for i in starts]


def kernels_of(run, steps: int = 1) -> list[tuple[str, float, float]]:
    """Return what the first GPU ran in a call: names, microseconds and launches, most time first.

    Args:
      run: is called once.
      steps: that the call has; times and launches are those of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=_quiet()):
            run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        lines = [line for p in planes if p.name.startswith("/device:GPU:0") for line in p.lines]
        spent: dict = collections.defaultdict(lambda: [0.0, 0.0])
        for event in (e for line in lines if "Stream" in line.name for e in line.events):
            spent[event.name][0] += event.duration_ns / 1e3 / steps
            spent[event.name][1] += 1 / steps
    return sorted(((name, *found) for name, found in spent.items()), key=lambda row: -row[1])


def _quiet():
    """Options of the profiler: the device only."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    return options


def _kernels(profile) -> list[tuple[float, float]]:
    """Start and end, in seconds, of what a GPU did, in order."""
    lines = [line for p in profile.planes if "GPU" in p.name for line in p.lines]
    events = [e for line in lines if "Stream" in line.name for e in line.events]
    return sorted((e.start_ns / 1e9, (e.start_ns + e.duration_ns) / 1e9) for e in events)


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
