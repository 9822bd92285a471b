"""Output losses of packed layers on the inputs that the original layers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax import linalg
from wush_jax.batched import over_batch
from wush_jax.calibrate import Call, Site, capture_rows, plain_call
from wush_jax.linear import layer_loss
from wush_jax.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.site import PackedWeight


def layer_losses(
    model: nnx.Module,
    batch: Any,
    sites: Sequence[Site],
    packed: Mapping[str, PackedWeight],
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
) -> dict[str, tuple[float, float]]:
    """Return (loss, loss / output power) of every packed layer on one batch's original inputs.

    Loss as in `layer_loss` (paper eq. 1).
    """
    graph, state = nnx.split(model)
    layers, _ = dense_layers(model, dense_types)
    inputs = _site_inputs(graph, tuple(sites), call, dense_types, state, batch)
    # One small compilation per shape of layer, not one large one per model.
    return {
        path: jax.tree.map(float, _loss_and_share(layers[path].weight, rows, packed[path]))
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
def _loss_and_share(weight, rows, packed):
    def loss_and_power(weight, rows, packed):
        exact = jnp.einsum("...k,nk->...n", rows, weight, precision=linalg.HIGHEST)
        return layer_loss(weight, rows, packed), jnp.mean(exact**2)

    weight, rows = weight.astype(jnp.float32), rows.astype(jnp.float32)
    each = over_batch(loss_and_power, weight.shape[:-2])(weight, rows, packed)
    loss, power = jax.tree.map(jnp.mean, each)
    # A dead site has neither loss nor output: no loss relative to that.
    return loss, loss / jnp.maximum(power, jnp.finfo(jnp.float32).tiny)
