"""Whether what a calibration keeps on the host fits there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def check_host_memory(
    model: nnx.Module,
    batches: Sequence[Any],
    embed: Callable[[Any, Any], jax.Array],
    dtype: str,
) -> None:
    """Refuse a calibration whose hidden states cannot fit the host's memory.

    Args:
      model: an NNX module.
      batches: all that will be kept, by their hidden states.
      embed: (model, batch) -> hidden states.
      dtype: in which they are kept.

    Raises:
      ValueError: with what is needed and what there is.
    """
    graph, state = nnx.split(model)
    counts = Counter(map(_shapes, batches))
    examples = {_shapes(batch): batch for batch in batches}
    needed = 0
    for shapes, count in counts.items():
        hidden = jax.eval_shape(
            lambda state, batch: embed(nnx.merge(graph, state), batch), state, examples[shapes]
        )
        needed += count * hidden.size * jnp.dtype(dtype).itemsize
    free = host_memory()
    if needed > free:
        raise ValueError(
            f"batches: their hidden states need {needed / 1e9:.1f} GB of host memory and "
            f"{free / 1e9:.1f} GB are free; pass fewer or shorter batches"
        )


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
