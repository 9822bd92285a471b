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

from wush_jax.formats import elements
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Contraction,
    Dense,
    DenseTypes,
    dense_layers,
    dotted,
    replace_modules,
)
from wush_jax.models.tokens import model_inputs
from wush_jax.solvers.batched import empty_moments
from wush_jax.transforms.moments import Moments

Call = Callable[[nnx.Module, Any], Any]
See = Callable[[Any, Any], Any]
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


# XLA may leave out roundings to bfloat16 inside of what it fuses; more devices, other fusions.
ROUNDED = {"xla_allow_excess_precision": False}


class Seen(nnx.Variable):
    """What a probe keeps of the inputs it has seen: any pytree."""


class Probe(nnx.Module):
    """Stands in for a dense layer and folds its inputs into a variable before calling it.

    A variable, since flax carries it through `nnx.remat`, `nnx.scan`, `nnx.vmap` and their like;
    in a scan over stacked layers it gets their leading axis.

    Args:
      layer: the module that it stands for.
      see: (what was seen so far, input) -> what was seen.
      seen: before the first call, None for nothing.
    """

    def __init__(self, layer: nnx.Module, see: See, seen: Any = None):
        self.layer = layer
        self.see = see
        self.seen = nnx.data(None if seen is None else Seen(seen))

    def __call__(self, x: Any, *args, **kwargs) -> Any:
        """Call the layer."""
        if self.seen is None:
            self.seen = Seen(self.see(None, x))
        else:
            self.seen.set_value(self.see(self.seen.get_value(), x))
        return self.layer(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers, such as shapes.
        if name.startswith("_") or "layer" not in vars(self):
            raise AttributeError(name)
        return getattr(self.layer, name)


def run_probed(
    model: nnx.Module, batch: Any, call: Call, probes: Mapping[str, tuple[See, Any]]
) -> dict[str, Any]:
    """Run a model and return, by layer path, what the probes have seen.

    Args:
      model: an NNX module; it is left as it is.
      batch: passed to the call.
      call: how to run the model.
      probes: (see, seen before) of a `Probe` by the path of a layer.

    Returns:
      What was seen; without the layers that the call does not reach, or reaches only in a copy
      of the model that it makes by itself (`nnx.merge`).
    """

    def probe(path: str, module: nnx.Module) -> nnx.Module | None:
        return Probe(module, *probes[path]) if path in probes else None

    probed = replace_modules(model, probe)
    call(probed, batch)
    found = {dotted(p): m.seen for p, m in nnx.iter_modules(probed) if isinstance(m, Probe)}
    return {path: seen.get_value() for path, seen in found.items() if seen is not None}


def capture_rows(
    model: nnx.Module,
    batch: Any,
    layers: Mapping[str, Dense],
    *,
    call: Call = plain_call,
) -> dict[str, jax.Array]:
    """Run a model and return, by layer path, the (..., K) rows of each layer's first call.

    To be called inside a traced function. Rows of a batch of kernels are (*batch, ..., K).
    """

    def first(rows: Callable[[jax.Array], jax.Array], seen: Any, x: jax.Array) -> jax.Array:
        return rows(x) if seen is None else seen

    probes = {path: (partial(first, la.contraction.rows), None) for path, la in layers.items()}
    return run_probed(model, batch, call, probes)


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
    inputs: dict[str, list[Any]] = {}

    def note(path: str, seen: Any, x: Any) -> jax.Array:
        inputs.setdefault(path, []).append(x)
        return jnp.zeros(()) if seen is None else seen

    probes = {path: (partial(note, path), None) for path in layers}

    def trace(state, batch):
        return run_probed(nnx.merge(graph, state), batch, call, probes)

    reached = jax.eval_shape(trace, state, batch)
    found: dict[Any, list[str]] = {}
    for path, seen in inputs.items():
        if path in reached:
            # The tracers are still alive in `inputs`, so their ids are distinct.
            same = tuple(id(x) for x in seen), _reading(layers[path].contraction)
            found.setdefault(same, []).append(path)
    return tuple(Site(tuple(p), layers[p[0]].contraction.shape[1]) for p in found.values())


def _reading(contraction: Contraction) -> Any:
    """What layers of the same input must have in common to have the same rows of it."""
    return contraction.reading, contraction.batch, contraction.shape[1]


def collect_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    blocks: Mapping[Site, int | None],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    rows: int = 0,
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
      rows: of every site's input to keep as a sample (`wush_jax.transforms.sample`).
      progress: called with the number of batches done, None and "calibrate".

    Returns:
      `Moments` by site.

    Raises:
      ValueError: no batches, inputs that are not finite, with the name of the site, or arrays on
        a mesh with explicit axes.
    """
    graph, state = nnx.split(model)
    check_sharding(state)
    layers, _ = dense_layers(model, dense_types)
    totals = {
        site: empty_moments(site.size, block, layers[site.name].contraction.batch, rows)
        for site, block in blocks.items()
    }
    ordered = list(totals.values())
    done = 0
    inputs = model_inputs(model, batches) if call is plain_call else batches
    for done, batch in enumerate(inputs, start=1):
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


# The graph is no static argument: those are hashed, and configs in a model need not be hashable.
@partial(jax.jit, static_argnums=(1, 2, 3), compiler_options=ROUNDED)
def _add_batch(graph, sites, call, dense_types, state, totals, batch):
    model = nnx.merge(graph, state)
    layers, _ = dense_layers(model, dense_types)
    probes = {
        site.name: (partial(_add_input, layers[site.name].contraction), moments)
        for site, moments in zip(sites, totals, strict=True)
    }
    seen = run_probed(model, batch, call, probes)
    return [seen[site.name] for site in sites]


def _add_input(contraction: Contraction, moments: Moments, x: jax.Array) -> Moments:
    """Add a call's input to the moments of a layer: one moment, or one for each expert."""
    update = Moments.update if contraction.experts is None else jax.vmap(Moments.update)
    return update(moments, contraction.rows(x))


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


def check_moments_finite(site: Site, moments: Moments) -> None:
    """Raise ValueError, with the site's name, when its moments hold NaN or infinities."""
    if elements.not_finite(moments.mean):
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
