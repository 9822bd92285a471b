"""Quantized layers in the layout that this device's matmul kernels read, and back.

Layers hold one layout at a time: codes and scales, which files and every other device know, or the
records of `pallas_kernels.fragments`. Values are equal, bit for bit but for the sign of zeros.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import exactly, fragments, stacks
from pallas_kernels.fragments import Fragments
from pallas_kernels.hopper import mosaic_gpu
from pallas_kernels.stacks import Stack
from wush_jax.formats import QuantizedArray, dequantize
from wush_jax.formats.partition import Partition, partition_of
from wush_jax.layers.linear import quantized_dot
from wush_jax.layers.nnx import QuantizedDense, dotted
from wush_jax.layers.parallel import check_parts
from wush_jax.layers.ragged import quantized_ragged_dot
from wush_jax.solvers.site import PackedWeight


def pack_for_kernels(model: nnx.Module, *, force: bool = False) -> dict[str, int]:
    """Lay out a model's quantized layers for the kernels, in place, one at a time.

    A layer changes where this device's kernels serve its calls, where its weight is one matrix, or
    those of experts whose rows come sorted, on one device, or one matrix divided over one axis of a
    mesh, and where records hold each of its values; all others stay as they are. Without a Hopper
    GPU that is all of them. A division that would cut records, blocks or scales stays with the
    compiler, and a warning gives the numbers.
    `wush_jax.quantize_model` and `wush_jax.load` end with this; ``implementation="reference"``
    there keeps codes and scales.

    Args:
      model: any NNX module; codes and scales are freed unless something else holds them.
      force: also where no kernel would read the records, for checks.

    Returns:
      The bytes that each changed layer gained, by path: its padding to whole records.

    >>> from wush_jax import Recipe, quantize_weight
    >>> from wush_jax.layers.nnx import dense_layers
    >>> dense = dense_layers(nnx.Linear(128, 48, rngs=nnx.Rngs(0)))[0][""]
    >>> packed = quantize_weight(dense.weight, None, Recipe(transform="hadamard"))
    >>> model = nnx.List([QuantizedDense(dense, packed)])
    >>> pack_for_kernels(model, force=True)
    {'0': 1092}
    >>> unpack_from_kernels(model)
    >>> bool((model[0].codes[...] == packed.weight.codes).all())
    True
    """
    gained = {}
    for path, layer in nnx.iter_modules(model):
        if not isinstance(layer, QuantizedDense) or not (force or _is_served(layer)):
            continue
        weight = layer.packed.weight
        partition = _partition(dotted(path), layer.packed)
        laid = _laid_out(layer.packed, partition, layer.contraction.ragged)
        if laid is not None:
            gained[dotted(path)] = laid.nbytes - weight.nbytes
            layer.hold(laid, partition)
    return gained


def unpack_from_kernels(model: nnx.Module) -> None:
    """Give a model's quantized layers codes and scales again, in place, one at a time.

    Args:
      model: any NNX module.
    """
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, QuantizedDense):
            layer.hold(layer.packed.interchange)


def _laid_out(
    packed: PackedWeight, partition: Partition | None, ragged: bool
) -> Fragments | Stack | None:
    """Return the records of a layer's weight, or None where there are none for it."""
    weight = packed.weight
    if len(_devices(weight)) != 1 and partition is None:
        return None
    for operand in _operands(packed):
        try:
            laid = _records(weight, operand, ragged)
        except NotImplementedError:
            continue
        if partition is not None:
            laid = replace(laid, records=jax.device_put(laid.records, partition.sharding()))
        if bool(_equal(weight, laid)):
            return laid
    return None


def _partition(path: str, packed: PackedWeight) -> Partition | None:
    """Return how a layer's codes are divided over a mesh, where records can be, too."""
    weight = packed.weight
    found = partition_of(weight.codes) if isinstance(weight, QuantizedArray) else None
    if found is None or len(packed.shape) != 2:
        return None
    try:
        check_parts(packed, found, fragments.ROWS, fragments.COLUMNS)
    except (ValueError, NotImplementedError) as error:
        warnings.warn(
            f"layer {path}: no kernels on this mesh, XLA serves it: {error}", stacklevel=3
        )
        return None
    return found


def _operands(packed: PackedWeight) -> tuple[str, ...]:
    """What records may expand to, best first: FP8 where both operands are exact in it."""
    weight, inputs = packed.weight.format, packed.input_format
    float8 = exactly.in_float8(weight) and inputs is not None
    float8 = float8 and exactly.multiplies_in_float8(inputs)
    return ("float8", "bfloat16") if float8 else ("bfloat16",)


def _records(weight: Any, operand: str, ragged: bool = False) -> Fragments | Stack:
    return (stacks if ragged else fragments).lay_out(weight, operand)


def _devices(weight: QuantizedArray | Fragments | Stack) -> set[jax.Device]:
    """Where the codes are; nowhere, if they are on the host, or records."""
    codes = getattr(weight, "codes", None)
    return codes.devices() if isinstance(codes, jax.Array) else set()


@jax.jit
def _equal(weight: QuantizedArray, laid: Fragments | Stack) -> jax.Array:
    def same(pair):
        one, two = map(dequantize, pair)
        return jnp.all((one == two) | (jnp.isnan(one) & jnp.isnan(two)))

    if isinstance(laid, Fragments):
        return same((weight, laid))
    scale = jnp.broadcast_to(weight.global_scale, weight.shape[:1])
    # One expert after another: values take eight times the room of codes.
    one = replace(weight, global_scale=scale)
    two = QuantizedArray(*laid.interchange, scale, weight.format)
    return jnp.all(jax.lax.map(same, (one, two)))


def _is_served(layer: QuantizedDense) -> bool:
    """Whether the kernels of this device take a token of a layer, if its weight is laid out."""
    if layer.implementation not in (None, "mosaic_gpu"):
        return False
    if not mosaic_gpu.on_hopper():
        return False
    if {d.platform for d in _devices(layer.packed.weight)} != {jax.default_backend()}:
        return False
    # A layer without a dtype of its own promotes its input to that of the kernel it had.
    dtype = jnp.dtype(layer.dtype or layer.kernel_dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layer.packed)
    return _takes(shapes, dtype, layer.contraction.ragged)


def as_held(packed: PackedWeight, dtype: Any) -> PackedWeight:
    """Return the shapes of a layer's weight as this device would hold it: records, or codes.

    Args:
      packed: shapes, in the interchange layout, of one matrix.
      dtype: of the layer's inputs.
    """
    try:
        mosaic_gpu.require_hopper()
        laid = jax.eval_shape(lambda w: _records(w, _operands(packed)[0]), packed.weight)
    except NotImplementedError:
        return packed
    return replace(packed, weight=laid) if _takes(packed, dtype) else packed


@functools.cache
def _takes(packed: PackedWeight, dtype, ragged: bool = False) -> bool:
    """Ask the dispatch itself, for one token: shapes alone."""

    def call(x, packed):
        laid = _records(packed.weight, _operands(packed)[0], ragged)
        packed = PackedWeight(
            laid, packed.transform, packed.input_global_scale, packed.input_format
        )
        if ragged:
            sizes = jnp.zeros(packed.shape[0], jnp.int32)
            return quantized_ragged_dot(x, packed, sizes, implementation="mosaic_gpu")
        return quantized_dot(x, packed, implementation="mosaic_gpu")

    try:
        jax.eval_shape(call, jax.ShapeDtypeStruct((1, packed.shape[-1]), dtype), packed)
    except NotImplementedError:
        return False
    return True
