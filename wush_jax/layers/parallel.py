"""The quantized linear map on a mesh: every device runs the kernels on its part of the weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

import pallas_kernels
from pallas_kernels.fragments import Fragments
from wush_jax.formats.partition import Partition
from wush_jax.solvers.site import PackedWeight


def partitioned_dot(
    x: jax.Array,
    packed: tuple[PackedWeight, ...],
    *,
    gated: bool = False,
    implementation: str | None = None,
) -> Any:
    """Return what `pallas_kernels.transform_quantize_matmul` does, for weights on a mesh.

    Weights divided by rows: x is transformed and quantized on each device, and each result
    (..., N) stays divided. By columns: each device transforms and quantizes its channels, products
    are float32, summed over the axis by one ``psum``, and rounded once.

    Args:
      x: (..., K).
      packed: weights of one site, all divided alike (`PackedWeight.partition`).
      gated: return ``silu(first) * second``; only by rows.
      implementation: of each device's call.

    Returns:
      A tuple of (..., N), or with ``gated`` one.

    Raises:
      ValueError: weights that are divided differently.
      NotImplementedError: gated weights divided by columns, or a quantizer whose scale would be
        derived from parts of a token.
    """
    partition = cast(Partition, packed[0].partition)
    if any(weight.partition != partition for weight in packed):
        raise ValueError(f"weights of one site lie as {[weight.partition for weight in packed]}")
    columns, axis = partition.by_columns, partition.axis
    if gated and columns:
        raise NotImplementedError("gated weights divided by columns: sums come before silu")
    _check_static_scale(packed[0], partition)
    data = partition.data
    spread = data is not None and x.ndim > 1 and x.shape[0] % partition.mesh.shape[data] == 0
    lead = [data if spread and i == 0 else None for i in range(x.ndim - 1)]

    def on_each(x, packed):
        local = tuple(_part(weight, partition) for weight in packed)
        found = pallas_kernels.transform_quantize_matmul(
            *(x, local[0].transform, local),
            gated=gated,
            out_dtype=jnp.float32 if columns else None,
            implementation=implementation,
        )
        if not columns:
            return found
        return tuple(lax.psum(y, axis).astype(x.dtype) for y in found)

    result = PartitionSpec(*lead, None if columns else axis)
    return jax.shard_map(
        on_each,
        mesh=partition.mesh,
        in_specs=(
            PartitionSpec(*lead, axis if columns else None),
            tuple(_specs(weight, partition) for weight in packed),
        ),
        out_specs=result if gated else (result,) * len(packed),
        check_vma=False,  # kernels do not say how their results vary
    )(x, packed)


def check_parts(
    packed: PackedWeight, partition: Partition, rows: int = 1, columns: int = 1
) -> None:
    """Raise ValueError where a partition would cut a block, a group or a quantizer's scale.

    Args:
      packed: the whole weight.
      partition: how it is to be divided.
      rows: N of a part must be a multiple of it.
      columns: K of a part must be a multiple of it, too.

    Raises:
      ValueError: N or K does not divide so; with the numbers of devices that would.
      NotImplementedError: as `partitioned_dot`.
    """
    units = [columns, packed.weight.format.group_size]
    units += [] if packed.input_format is None else [packed.input_format.group_size]
    units += [] if packed.transform is None else [packed.transform.shape[-1]]
    partition.check(packed.shape, rows, math.lcm(*units))  # type: ignore[arg-type]
    _check_static_scale(packed, partition)


def _check_static_scale(packed: PackedWeight, partition: Partition) -> None:
    fmt = packed.input_format
    derived = fmt is not None and packed.input_global_scale is None and fmt.global_scale is None
    if derived and (partition.by_columns or partition.data is not None):
        raise NotImplementedError(
            "the activations' global scale is derived from all of x; calibrate a static one"
        )


def _specs(packed: PackedWeight, partition: Partition) -> PackedWeight:
    """The weight with the partition of each array in its place."""
    everywhere, spec = PartitionSpec(), partition.spec()
    divided = ("records",) if isinstance(packed.weight, Fragments) else ("codes", "scales")
    specs = jax.tree.map(lambda _: everywhere, packed)
    specs = replace(specs, weight=replace(specs.weight, **dict.fromkeys(divided, spec)))
    if packed.transform is not None and packed.transform.ndim == 3 and partition.by_columns:
        specs = replace(specs, transform=PartitionSpec(partition.axis))
    return specs


def _part(packed: PackedWeight, partition: Partition) -> PackedWeight:
    """One device's part as a weight of its own."""
    weight = packed.weight
    if isinstance(weight, Fragments):
        weight = replace(weight, shape=partition.part(weight.shape))
    return replace(packed, weight=weight, partition=None)
