"""Calibration: which layers share an input, and the second moments of what flows into them.

Layers are swapped for probes inside a traced function, so that capturing inputs is pure: arrays in,
moments out. Layers that receive the identical array share a *site*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from wush_jax.moments import Moments
from wush_jax.nnx import DENSE_TYPES, DenseTypes, dense_layers, replace_modules

Call = Callable[[nnx.Module, Any], Any]
# Called with what is done, the total where it is known, and what is under way.
Progress = Callable[[int, int | None, str], Any]


def plain_call(model: nnx.Module, batch: Any) -> Any:
    """Run a model the usual way: ``model(batch)``."""
    return model(batch)


@dataclass(frozen=True, order=True)  # ordered, so that a dictionary by site is a pytree
class Site:
    """An input shared by some layers.

    Attributes:
      layers: dotted paths, in the order in which the model calls them.
      size: channels K.
    """

    layers: tuple[str, ...]
    size: int

    @property
    def name(self) -> str:
        """The path of the first layer."""
        return self.layers[0]


class Probe(nnx.Module):
    """Stands in for a dense layer and shows its input to a function before calling it."""

    def __init__(self, layer: nnx.Module, see: Callable[[Any], None]):
        self.layer = layer
        self.see = see

    def __call__(self, x: Any, *args, **kwargs) -> Any:
        """Call the layer."""
        self.see(x)
        return self.layer(x, *args, **kwargs)


def run_and_capture(
    model: nnx.Module, batch: Any, call: Call, dense_types: DenseTypes = DENSE_TYPES
) -> tuple[Any, dict[str, list[Any]]]:
    """Run a model and return its output and, by layer path, the inputs of every dense layer.

    To be called inside a traced function: a layer that is called several times has several inputs.
    """
    inputs: dict[str, list[Any]] = {}
    layers, _ = dense_layers(model, dense_types)

    def probe(path: str, module: nnx.Module) -> nnx.Module | None:
        if path not in layers:
            return None
        return Probe(module, lambda x: inputs.setdefault(path, []).append(x))

    return call(replace_modules(model, probe), batch), inputs


def find_sites(
    model: nnx.Module,
    batch: Any,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> tuple[Site, ...]:
    """Find which dense layers receive the identical input, by an abstract run (nothing computed).

    Args:
      model: an NNX module.
      batch: one batch, or its shapes.
      call: how to run the model on a batch.
      dense_types: what counts as a dense layer.

    Returns:
      Sites in the order of their first call. Layers that the call does not reach are in none.

    >>> layer = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    >>> pair = nnx.List([layer, nnx.Linear(32, 8, rngs=nnx.Rngs(1))])
    >>> both = lambda model, x: (model[0](x), model[1](x))
    >>> [site.layers for site in find_sites(pair, jnp.ones((1, 32)), call=both)]
    [('0', '1')]
    """
    graph, state = nnx.split(model)
    layers, _ = dense_layers(model, dense_types)
    found: dict[Any, list[str]] = {}

    def trace(state, batch):
        _, inputs = run_and_capture(nnx.merge(graph, state), batch, call, dense_types)
        # Tracers stay alive in `inputs`, so their ids are distinct.
        for path, seen in inputs.items():
            found.setdefault(tuple(id(x) for x in seen), []).append(path)

    jax.eval_shape(trace, state, batch)
    return tuple(Site(tuple(p), layers[p[0]].contraction.shape[1]) for p in found.values())


def collect_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    blocks: Mapping[Site, int | None],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    progress: Progress | None = None,
) -> dict[Site, Moments]:
    """Run all batches and return the second moment of every site's input.

    ``M_X = sum_t x_t x_t^T / T`` over all tokens t of all batches; streamed, one batch at a time.

    Args:
      model: an NNX module.
      batches: inputs of the model, read once; batches of one shape compile once.
      blocks: the sites to observe, each with its block size d, or None for the full (K, K).
      call: how to run the model on a batch.
      dense_types: what counts as a dense layer.
      progress: called with the number of batches done, None and "calibrate".

    Returns:
      `Moments` by site.

    Raises:
      ValueError: no batches, inputs that are not finite, with the name of the site, or arrays on
        a mesh with explicit axes.
    """
    graph, state = nnx.split(model)
    check_sharding(state)
    totals = {site: Moments.init(site.size, block) for site, block in blocks.items()}
    ordered = list(totals.values())
    done = 0
    for done, batch in enumerate(batches, start=1):
        check_sharding(batch)
        ordered = _add_batch(graph, tuple(totals), call, dense_types, state, ordered, batch)
        if progress is not None:
            progress(done, None, "calibrate")
    if not done:
        raise ValueError("batches is empty; pass at least one calibration batch")
    totals = dict(zip(totals, _local(ordered), strict=True))
    for site, moments in totals.items():
        check_moments_finite(site, moments)
    return totals


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _add_batch(graph, sites, call, dense_types, state, totals, batch):
    model = nnx.merge(graph, state)
    layers, _ = dense_layers(model, dense_types)
    _, inputs = run_and_capture(model, batch, call, dense_types)
    return [add_inputs(m, s, inputs, layers) for s, m in zip(sites, totals, strict=True)]


def _local(tree: Any) -> Any:
    """Bring what several processes hold together to each of them."""
    return jax.tree.map(
        lambda x: (
            x
            if x.is_fully_addressable
            else jnp.asarray(multihost_utils.process_allgather(x, tiled=True))
        ),
        tree,
    )


def add_inputs(
    moments: Moments, site: Site, inputs: Mapping[str, list], layers: Mapping
) -> Moments:
    """Add a site's captured inputs to its moments."""
    for x in inputs[site.name]:
        moments = moments.update(layers[site.name].contraction.rows(x))
    return moments


def check_moments_finite(site: Site, moments: Moments) -> None:
    """Raise ValueError, with the site's name, when its moments hold NaN or infinities."""
    if not bool(jnp.all(jnp.isfinite(moments.mean))):
        raise ValueError(
            f"site {site.name}: its input is not finite on the calibration batches; look for the "
            "batch or the weights that overflow"
        )


def check_sharding(tree: Any) -> None:
    """Raise ValueError when an array or a sharding has explicit mesh axes."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(leaf, "sharding", leaf), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"the mesh axes {mesh.axis_names} are explicit, but reductions over tokens are the "
                "compiler's: make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * "
                f"{len(mesh.axis_names)}"
            )
