"""Output losses of packed layers on the inputs that the original layers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import dispatch, reference
from pallas_kernels.library import xla_ragged
from wush_jax.calibration.observe import Call, Masked, Site, capture_rows, plain_call
from wush_jax.layers.loss import over, powers, powers_of
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.layers.ragged import quantized_ragged_dot
from wush_jax.solvers.batched import over_batch
from wush_jax.solvers.site import PackedWeight
from wush_jax.transforms import apply_transform, linalg
from wush_jax.transforms.grouped import GroupedRows


class LayerLoss(NamedTuple):
    """What a packed layer loses on a batch.

    Attributes:
      loss: ``mean (q(W) q(x) - W x)^2`` over tokens and outputs (paper eq. 1).
      relative: the loss over the mean of ``(W x)^2``.
      typical: the same two means over the tokens without a massive value, divided
        (`wush_jax.layer_loss`).
      saturated: share of the inputs' groups whose scale is beyond the largest that there is.
      vanished: share whose scale is below the smallest.
    """

    loss: float
    relative: float
    typical: float
    saturated: float
    vanished: float


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
    found = {}
    for site, rows in zip(sites, inputs, strict=True):
        for path in site.layers:
            # One small compilation per shape of layer, not one large one per model.
            own = packed[path] if isinstance(rows, GroupedRows) else _in_blocks(packed[path])
            losses = map(float, _losses(layers[path].weight, rows, own))
            found[path] = _scaled(*losses, batch=batch)
    return found


def _in_blocks(packed: PackedWeight) -> PackedWeight:
    """Give each block a transform of its own, so that one program serves every transform."""
    *lead, _, k = packed.shape
    transform = packed.transform
    if transform is None:  # an identity is exact
        transform = jnp.eye(packed.weight.format.group_size, dtype=jnp.bfloat16)
    elif transform.ndim == len(lead) + 2:
        transform = transform[..., None, :, :]
    d = transform.shape[-1]
    return replace(packed, transform=jnp.broadcast_to(transform, (*lead, k // d, d, d)))


def _scaled(unit: float, loss: float, *others: float, batch: Any) -> LayerLoss:
    """The means are over all tokens, with zeros for padding: over those that count."""
    share = float(jnp.mean(batch.mask.astype(jnp.float32))) if isinstance(batch, Masked) else 1.0
    return LayerLoss(unit**2 * loss / share, *others)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _site_inputs(graph, sites, call, dense_types, state, batch):
    model = nnx.merge(graph, state)
    layers, _ = dense_layers(model, dense_types)
    rows = capture_rows(model, batch, {s.name: layers[s.name] for s in sites}, call=call)
    return [rows[site.name] for site in sites]


@jax.jit
def _losses(weight, rows, packed) -> tuple[jax.Array, ...]:
    weight, rows = jax.tree.map(_float, (weight, rows))
    grouped = isinstance(rows, GroupedRows)
    # The experts of a ragged layer share their rows; what is beyond them is a stack.
    lead = weight.shape[:-3] if grouped else weight.shape[:-2]
    powers_on, transformed = (
        (_group_powers, _transformed_groups) if grouped else (powers, _transformed)
    )
    each = over_batch(powers_on, lead)(weight, rows, packed)
    unit = jnp.max(each.unit)
    found = jax.tree.map(lambda power: jnp.mean(power * (each.unit / unit) ** 2), each)
    typical = over(found.typical_error, found.typical_output)
    measure = partial(_out_of_range, transformed)
    shares = jax.tree.map(jnp.mean, over_batch(measure, lead)(rows, packed))
    return unit, found.error, over(found.error, found.output), typical, *shares


def _float(leaf: jax.Array) -> jax.Array:
    return leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(jnp.float32)


def _group_powers(weight, grouped, packed):
    """The powers of rows that are sorted by expert; all of them belong to one."""
    rows, sizes = grouped.rows, grouped.sizes
    exact = lax.ragged_dot(rows, weight.mT, sizes, precision=linalg.HIGHEST)
    error = quantized_ragged_dot(rows, packed, sizes, implementation="reference") - exact
    return powers_of(rows, error, exact)


def _transformed(rows, packed) -> tuple[jax.Array, jax.Array]:
    """Return ``T x`` of rows, and the global scale of each."""
    if packed.transform is not None:
        rows = apply_transform(rows, packed.transform.astype(jnp.float32))
    g = packed.input_global_scale
    return rows, packed.input_format.derive_global_scale(jnp.max(jnp.abs(rows))) if g is None else g


def _transformed_groups(grouped, packed) -> tuple[jax.Array, jax.Array]:
    rows, sizes = grouped.rows, grouped.sizes
    transforms = dispatch.of_groups(packed.transform, len(sizes), rows.shape[-1])
    if transforms is not None:
        rows = xla_ragged.transformed(rows, transforms.astype(jnp.float32), sizes)
    g = packed.input_global_scale
    if g is None:
        g = packed.input_format.derive_global_scale(jnp.max(jnp.abs(rows)))
    g = jnp.broadcast_to(g, sizes.shape)
    return rows, g[reference.group_of_rows(sizes, len(rows))][:, None]


def _out_of_range(transformed, rows, packed) -> tuple[jax.Array, jax.Array]:
    """Return the shares of the inputs' groups that saturate, and that vanish, in E4M3 scales."""
    fmt = packed.input_format
    if fmt is None or fmt.scale_dtype != "e4m3":
        return jnp.zeros(()), jnp.zeros(())
    rows, g = transformed(rows, packed)
    amax = jnp.max(jnp.abs(rows.reshape(*rows.shape[:-1], -1, fmt.group_size)), axis=-1)
    # Rounding to the nearest scale: half a step beyond the largest, half of the smallest.
    scale = g * amax / fmt.element.max
    large, small = scale > 464.0, (scale < 2.0**-10) & (amax > 0)
    return jnp.mean(large.astype(jnp.float32)), jnp.mean(small.astype(jnp.float32))
