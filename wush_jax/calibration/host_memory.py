"""Whether what a calibration keeps fits the host and the devices: asked before it starts.

What no plan knows, the model's own activations, may run out later: then with the plan's numbers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.calibration.sites import inputs_of


def check_host_memory(
    model: nnx.Module,
    batches: Sequence[Any],
    embed: Callable[[Any, Any], jax.Array],
    dtype: str,
) -> int:
    """Refuse a calibration whose hidden states cannot fit the host's memory.

    Args:
      model: an NNX module.
      batches: all that will be kept, by their hidden states.
      embed: (model, batch) -> hidden states.
      dtype: in which they are kept.

    Returns:
      Their bytes.

    Raises:
      ValueError: with what is needed and what there is.
    """
    graph, state = nnx.split(model)
    counts = Counter(map(_shapes, batches))
    examples = {_shapes(batch): batch for batch in batches}
    needed = 0
    for shapes, count in counts.items():
        hidden = jax.eval_shape(
            lambda state, batch: embed(nnx.merge(graph, state), inputs_of(batch)),
            *(state, examples[shapes]),
        )
        needed += count * hidden.size * jnp.dtype(dtype).itemsize
    free = host_memory()
    if needed > free:
        raise ValueError(
            f"batches: their hidden states need {needed / 1e9:.1f} GB of host memory and "
            f"{free / 1e9:.1f} GB are free; pass fewer or shorter batches"
        )
    return needed


def stay_on_device(needed: int) -> bool:
    """Whether so many bytes of hidden states may stay on the one device that computes them.

    In a quarter of what is free: while a layer is passed, its inputs and outputs are there. A CPU's
    memory is the host's.
    """
    if jax.default_backend() == "cpu" or jax.process_count() > 1:
        return False
    free = device_memory()
    return free is not None and 4 * needed <= free // jax.local_device_count()


def check_device_memory(costs: Mapping[str, int], *, sequential: bool, remedy: str = "") -> None:
    """Refuse a calibration whose moments or largest site cannot fit all local devices together.

    Args:
      costs: of the plan, `wush_jax.solvers.costs.total_costs`.
      sequential: whether only the moments of one layer are held at a time.
      remedy: put before those that always help.

    Raises:
      ValueError: with what the plan needs and what there is.
    """
    moments, site = costs["moment_bytes"], costs["largest_site_bytes"]
    free = device_memory()
    if free is None or (site if sequential else max(moments, site)) <= free:
        return
    raise ValueError(
        f"rules: the plan needs {site / 1e9:.1f} GB for its largest site and {moments / 1e9:.1f} "
        f"GB for the moments of all, and {free / 1e9:.1f} GB are free; {remedy}calibrate layer "
        "after layer (sequential=wush_jax.Sequential()), use solver='rtn', or exclude layers by a "
        "rule"
    )


@contextmanager
def within_memory(costs: Mapping[str, int]) -> Iterator[None]:
    """Say what was planned where a device's memory runs out inside nevertheless.

    Args:
      costs: as for `check_device_memory`.

    Raises:
      MemoryError: with what the plan needs and what the device says.

    >>> with within_memory({"moment_bytes": 0, "largest_site_bytes": 0}):
    ...     raise jax.errors.JaxRuntimeError("Out of memory allocating 9 bytes.")
    Traceback (most recent call last):
    ...
    MemoryError: a device's memory ran out (Out of memory allocating 9 bytes.); the plan ...
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # The status in front may be that of a computation that waited for another.
        reason = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in reason and "out of memory" not in reason.lower():
            raise
        moments, site = (costs[k] / 1e9 for k in ("moment_bytes", "largest_site_bytes"))
        raise MemoryError(
            f"a device's memory ran out ({reason}); the plan needs "
            f"{site:.1f} GB for its largest site and {moments:.1f} GB for the moments, beside the "
            "model and its activations on a batch: pass smaller batches, and leave one-shot "
            "calibration for that layer after layer (sequential=wush_jax.Sequential())"
        ) from error


def device_memory() -> int | None:
    """Return the free bytes of all local devices together; None where they do not tell.

    >>> device_memory() > 0
    True
    """
    if jax.default_backend() == "cpu":
        return host_memory()
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in s for s in stats):
        return None
    return sum(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)


def _shapes(batch: Any) -> tuple:
    return tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch))


def host_memory() -> int:
    """Return the bytes of memory that programs can still have; all of it where that is unknown.

    >>> host_memory() > 0
    True
    """
    try:
        # Free pages alone would be far too few: files that were read fill the rest.
        text = Path("/proc/meminfo").read_text("utf8")
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
