"""Calibration: second moments of what flows into a model's dense layers, and some rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils

from wush_jax.calibration.sites import Call as Call
from wush_jax.calibration.sites import Masked as Masked
from wush_jax.calibration.sites import Observed as Observed
from wush_jax.calibration.sites import Site as Site
from wush_jax.calibration.sites import counted, inputs_of
from wush_jax.calibration.sites import find_sites as find_sites
from wush_jax.calibration.sites import observe_calls as observe_calls
from wush_jax.calibration.sites import plain_call as plain_call
from wush_jax.calibration.sites import stacked as stacked
from wush_jax.calibration.token_weights import check_token_weights, gradient_weights
from wush_jax.formats import elements
from wush_jax.layers.calls import Call as LayerCall
from wush_jax.layers.dense import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    dense_layers,
)
from wush_jax.layers.interpreter import Interpreter
from wush_jax.layers.meshes import automatic, whole
from wush_jax.layers.tagged_run import run_tagged, tagged_program
from wush_jax.models.tokens import model_inputs
from wush_jax.solvers.batched import empty_moments, over_batch
from wush_jax.transforms.grouped import GroupedRows, update_groups
from wush_jax.transforms.moments import Moments

# Called with what is done, the total where it is known, and what is under way.
Progress = Callable[[int, int | None, str], Any]


# XLA may leave out roundings to bfloat16 inside of what it fuses; more devices, other fusions.
ROUNDED = {"xla_allow_excess_precision": False}


def capture_rows(
    model: nnx.Module,
    batch: Any,
    layers: Mapping[str, Dense],
    *,
    call: Call = plain_call,
) -> dict[str, jax.Array]:
    """Run a model and return, by layer path, the (..., K) rows of each layer's first call.

    To be called inside a traced function. Rows of a batch of kernels are (*batch, ..., K); they are
    zeros where a branch with the call was not taken, and where a mask leaves tokens out. Those of
    ragged layers are `GroupedRows`.
    """
    shapes: dict[str, Any] = {}
    inputs = inputs_of(batch)

    def note(call: LayerCall, seen: Any) -> Any:
        stack = layers[call.tag.layer].contraction.stack
        shapes.setdefault(call.tag.layer, (stack, call.own_rows()))
        return seen

    def first(call: LayerCall, seen: Any) -> Any:
        if call.own_rows() != shapes[call.tag.layer][1]:
            return seen

        def keep(seen: Any, rows: Any) -> Any:
            rows = whole(rows)
            return jnp.bool_(True), jax.tree.map(partial(jnp.where, seen[0]), seen[1], rows)

        return seen | {call.tag.layer: call.fold(seen[call.tag.layer], keep)}

    show = tagged_program(model, inputs, call, layers)
    jax.eval_shape(lambda: show(Interpreter(note), {}))
    empty = {
        path: (jnp.zeros(stack, bool), jax.tree.map(partial(_zeros, stack), rows))
        for path, (stack, rows) in shapes.items()
    }

    def merge(layer: str, one: Any, two: Any) -> Any:
        return jax.tree.map(partial(_either, one[0]), one, two)

    found = show(Interpreter(first, merge), empty)
    return {path: _without_padding(path, batch, layers, rows) for path, (_, rows) in found.items()}


def _without_padding(path: str, batch: Any, layers: Mapping[str, Dense], rows: Any) -> Any:
    if not isinstance(batch, Masked):
        return rows
    mask = counted(path, batch, rows[(0,) * len(layers[path].contraction.batch)])
    return rows if mask is None else jnp.where(mask[..., None], rows, 0)


def _zeros(stack: tuple[int, ...], like: Any) -> jax.Array:
    return jnp.zeros((*stack, *like.shape), like.dtype)


def _either(taken: jax.Array, one: jax.Array, two: jax.Array) -> jax.Array:
    return jnp.where(taken.reshape(taken.shape + (1,) * (one.ndim - taken.ndim)), one, two)


def collect_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    blocks: Mapping[Site, int | None],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    rows: int = 0,
    token_weights: str | None = None,
    progress: Progress | None = None,
) -> dict[Site, Moments]:
    """Run all batches and return the second moment of every site's input.

    ``M_X = sum_t x_t x_t^T / T`` over all tokens t of all batches; streamed, one batch at a time.
    With weights a, of mean one in each batch, ``sum_t a_t x_t x_t^T / T``.

    Args:
      model: an NNX module.
      batches: inputs of the model, read once; batches of one shape compile once.
      blocks: the sites to observe, each with its block size d, or None for the full (K, K).
      call: how to run the model on a batch.
      dense_types: what counts as a dense layer.
      rows: of every site's input to keep as a sample (`wush_jax.transforms.sample`).
      token_weights: "gradient" weighs tokens by `wush_jax.calibration.token_weights`; None counts
        them alike.
      progress: called with the number of batches done, None and "calibrate".

    Returns:
      `Moments` by site.

    Raises:
      ValueError: no batches, or inputs that are not finite, with the name of the site.
    """
    check_token_weights(token_weights)
    graph, state = nnx.split(model)
    layers, _ = dense_layers(model, dense_types)
    weighted = token_weights is not None
    totals = {
        site: empty_moments(site.size, block, layers[site.name].contraction.batch, rows, weighted)
        for site, block in blocks.items()
    }
    ordered = list(totals.values())
    done = 0
    inputs = model_inputs(model, batches) if call is plain_call else batches
    for done, batch in enumerate(inputs, start=1):
        key = jax.random.key(done) if weighted else None
        ordered = _add_batch(graph, tuple(totals), call, dense_types, state, ordered, batch, key)
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
def _add_batch(graph, sites, call, dense_types, state, totals, batch, key):
    model = nnx.merge(graph, state)
    layers, _ = dense_layers(model, dense_types)
    chosen = {site.name: layers[site.name] for site in sites}
    weights: dict[Site, Any] = {}
    if key is not None:
        weights = gradient_weights(model, batch, sites, layers, key, call=call)

    def add(call: LayerCall, seen: Any) -> Any:
        path = call.tag.layer
        fault = call.fault
        if not fault and call.stack != chosen[path].contraction.positions:
            fault = f"is stacked at axes {call.stack} of its kernel; take `stacked(model, batch)`"
        if fault:
            raise ValueError(f"layer {path} {fault}")
        update = partial(_add_rows, path, call.tag.contraction, batch)
        return seen | {path: call.fold(seen[path], update)}

    def merge(path: str, one: tuple, two: tuple) -> tuple:
        return over_batch(Moments.merge, chosen[path].contraction.batch)(one[0], two[0]), None

    own = ((total, weights.get(site)) for site, total in zip(sites, totals, strict=True))
    given = dict(zip(chosen, own, strict=True))
    seen = run_tagged(model, inputs_of(batch), call, chosen, Interpreter(add, merge), given)
    return [seen[path][0] for path in chosen]


def _add_rows(path: str, contraction: Any, batch: Any, seen: Any, rows: Any) -> Any:
    """Add a call's rows to the moments of a layer: one moment, or one for each expert.

    What is seen is a pair of the moments and the tokens' weights, or None.
    """
    moments, weights = seen
    if isinstance(rows, GroupedRows):
        if isinstance(batch, Masked):
            raise ValueError(
                f"layer {path}: its rows are sorted by expert, which no mask follows; exclude the "
                "layer by a rule, or calibrate without a mask"
            )
        return update_groups(moments, rows), None
    assert contraction is not None  # a call without a fault has one
    mask = counted(path, batch, rows if contraction.experts is None else rows[0])

    def update(moments: Moments, rows: jax.Array, weights: jax.Array | None) -> Moments:
        return moments.update(rows, mask, weights)

    update = update if contraction.experts is None else jax.vmap(update)
    return automatic(update, moments, rows, weights), weights


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
            f"site {site.name}: its input is not finite on the calibration batches; mend the "
            "batch or the weights that overflow"
        )
