"""Output losses of packed layers on the inputs that the original layers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.calibration.observe import Call, Site, capture_rows, plain_call
from wush_jax.layers.loss import over, powers
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.solvers.batched import over_batch
from wush_jax.solvers.site import PackedWeight


class LayerLoss(NamedTuple):
    """What a packed layer loses on a batch.

    Attributes:
      loss: ``mean (q(W) q(x) - W x)^2`` over tokens and outputs (paper eq. 1).
      relative: the loss over the mean of ``(W x)^2``.
      typical: the same two means over the tokens without a massive value, divided
        (`wush_jax.layer_loss`).
    """

    loss: float
    relative: float
    typical: float


def layer_losses(
    model: nnx.Module,
    batch: Any,
    sites: Sequence[Site],
    packed: Mapping[str, PackedWeight],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> dict[str, LayerLoss]:
    """Return the loss of every packed layer on one batch's original inputs."""
    graph, state = nnx.split(model)
    layers, _ = dense_layers(model, dense_types)
    inputs = _site_inputs(graph, tuple(sites), call, dense_types, state, batch)
    # One small compilation per shape of layer, not one large one per model.
    return {
        path: LayerLoss(*map(float, _losses(layers[path].weight, rows, packed[path])))
        for site, rows in zip(sites, inputs, strict=True)
        for path in site.layers
    }


@partial(jax.jit, static_argnums=(1, 2, 3))
def _site_inputs(graph, sites, call, dense_types, state, batch):
    model = nnx.merge(graph, state)
    layers, _ = dense_layers(model, dense_types)
    rows = capture_rows(model, batch, {s.name: layers[s.name] for s in sites}, call=call)
    return [rows[site.name] for site in sites]


@jax.jit
def _losses(weight, rows, packed) -> tuple[jax.Array, jax.Array, jax.Array]:
    weight, rows = weight.astype(jnp.float32), rows.astype(jnp.float32)
    each = over_batch(powers, weight.shape[:-2])(weight, rows, packed)
    found = jax.tree.map(jnp.mean, each)
    typical = over(found.typical_error, found.typical_output)
    return found.error, over(found.error, found.output), typical
