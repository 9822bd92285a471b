"""Layers that read one input: quantized once for all of them, and multiplied together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.hopper import mosaic_gpu
from pallas_kernels.reference import swiglu
from wush_jax.layers.linear import gated_dot, normed_dot, quantized_dot
from wush_jax.layers.meshes import is_explicit
from wush_jax.layers.nnx import QuantizedDense
from wush_jax.layers.ragged import quantized_ragged_dot


def call_together(layers: Sequence[nnx.Module], x: jax.Array, *more: jax.Array) -> list[jax.Array]:
    """Return each layer's output for the same input.

    Equal to ``[layer(x, *more) for layer in layers]``. Quantized layers of one site, such as a
    decoder's query, key and value, share the transform: x is transformed and quantized once, and
    where few tokens make the product a matter of reading weights, one kernel reads all of them.

    Args:
      layers: modules that map an array to an array.
      x: as each of them takes it.
      *more: further arguments of each, such as the group sizes of experts.

    >>> import jax.numpy as jnp
    >>> from wush_jax import Recipe, quantize_model
    >>> model = nnx.List([nnx.Linear(32, 8, rngs=nnx.Rngs(i)) for i in range(2)])
    >>> x = jnp.ones((1, 32))
    >>> quantized, _ = quantize_model(model, [x], Recipe(), call=lambda m, x: [l(x) for l in m])
    >>> [y.shape for y in call_together(quantized, x)]
    [(1, 8), (1, 8)]
    """
    inputs = [_reading(layer) for layer in layers]
    if len(layers) < 2 or inputs[0] is None or any(i != inputs[0] for i in inputs[1:]):
        return [layer(x, *more) for layer in layers]  # type: ignore[operator]
    site = cast(Sequence[QuantizedDense], layers)
    first, packed = site[0], tuple(layer.packed for layer in site)
    rows = first.rows(x)
    options: dict[str, Any] = {"implementation": first.implementation}
    if first.contraction.ragged:
        grouped = quantized_ragged_dot(rows, packed, *more, **options)
        return [la.outputs_of_groups(y, *more) for la, y in zip(site, grouped, strict=True)]
    products = quantized_dot(rows, packed, **options)
    return [layer.outputs(y) for layer, y in zip(site, products, strict=True)]


def call_gated(gate: nnx.Module, up: nnx.Module, x: jax.Array) -> jax.Array:
    """Return ``silu(gate(x)) * up(x)``, the first half of a gated feed-forward layer.

    Quantized layers of one site without biases do it in one kernel, where there is one: see
    `wush_jax.layers.linear.gated_dot`.

    Args:
      gate: a module that maps an array to an array.
      up: another.
      x: as each of them takes it.

    Source: Shazeer, GLU Variants Improve Transformer (2020).

    >>> import jax.numpy as jnp
    >>> layers = [nnx.Linear(32, 8, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> call_gated(*layers, jnp.ones((1, 32))).shape
    (1, 8)
    """
    if not _are_gated(gate, up):
        return swiglu(*call_together([gate, up], x))
    first, second = cast(QuantizedDense, gate), cast(QuantizedDense, up)
    dot = partial(gated_dot, implementation=first.implementation)
    return first.outputs(dot(first.rows(x), first.packed, second.packed))


def _are_gated(gate: nnx.Module, up: nnx.Module) -> bool:
    """Whether two layers' products can be combined before anything else is done to them."""
    reading = _reading(gate)
    if reading is None or reading != _reading(up):
        return False
    first, second = cast(QuantizedDense, gate), cast(QuantizedDense, up)
    alike = first.bias is second.bias is None and first.contraction == second.contraction
    return alike and (first.partition is None or not first.partition.by_columns)


def normed_together(
    norm: nnx.Module, layers: Sequence[nnx.Module], x: jax.Array, residual: jax.Array | None = None
) -> tuple[list[jax.Array], jax.Array]:
    """Return each layer's output for a normed sum, and the sum.

    Equal to ``call_together(layers, norm(x + residual)), x + residual`` up to rounding. Before
    quantized layers of one site that are laid out for kernels, an `nnx.RMSNorm` and the addition
    are the quantizer's first steps: see `wush_jax.layers.linear.normed_dot`.

    Args:
      norm: a module that maps an array to an array.
      layers: modules that do.
      x: as the norm takes it.
      residual: like x, or None for nothing added.

    >>> import jax.numpy as jnp
    >>> norm = nnx.RMSNorm(32, rngs=nnx.Rngs(0))
    >>> layers = [nnx.Linear(32, 8, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> ys, total = normed_together(norm, layers, jnp.ones((1, 32)), jnp.ones((1, 32)))
    >>> len(ys), total[0, 0].item()
    (2, 2.0)
    """
    first = _fused(norm, layers, x)
    if first is None:
        total = x if residual is None else x + residual
        return call_together(layers, norm(total)), total  # type: ignore[operator]
    site = cast(Sequence[QuantizedDense], layers)
    products, total = first(tuple(layer.packed for layer in site), residual=residual)
    return [layer.outputs(y) for layer, y in zip(site, products, strict=True)], total


def normed_gated(
    norm: nnx.Module,
    gate: nnx.Module,
    up: nnx.Module,
    x: jax.Array,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return ``call_gated(gate, up, norm(x + residual))`` and the sum: see `normed_together`.

    >>> import jax.numpy as jnp
    >>> norm = nnx.RMSNorm(32, rngs=nnx.Rngs(0))
    >>> layers = [nnx.Linear(32, 8, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> normed_gated(norm, *layers, jnp.ones((1, 32)))[0].shape
    (1, 8)
    """
    first = _fused(norm, (gate, up), x)
    if first is None or not _are_gated(gate, up):
        total = x if residual is None else x + residual
        return call_gated(gate, up, norm(total)), total  # type: ignore[operator]
    one, two = cast(QuantizedDense, gate), cast(QuantizedDense, up)
    y, total = first((one.packed, two.packed), residual=residual, gated=True)
    return one.outputs(y), total


def _fused(norm: Any, layers: Sequence[Any], x: jax.Array) -> Any:
    """Return `normed_dot` of x for layers that read a norm's output, None where it is not theirs.

    Where their weights are records that a kernel here reads, and neither the norm nor a layer does
    anything else.
    """
    readings = [_reading(layer) for layer in layers]
    if type(norm) is not nnx.RMSNorm or readings[0] is None or len(set(readings)) > 1:
        return None
    if not mosaic_gpu.on_hopper():  # elsewhere it gains nothing, and rounds in another order
        return None
    one, scale = layers[0], cast(Any, norm.scale)
    own = scale is not None and norm.reduction_axes == norm.feature_axes == -1
    own = own and norm.axis_name is None and one.contraction.reading == ((-1,), ())
    if not own or is_explicit(x) or one.records is None or one.partition is not None:
        return None
    # What Flax promotes x to, where a module has no dtype of its own.
    reads = norm.dtype or jnp.promote_types(x.dtype, scale[...].dtype)
    takes = one.dtype or jnp.promote_types(x.dtype, one.kernel_dtype)
    if {jnp.dtype(kind) for kind in (reads, takes, one.result_dtype or takes)} != {x.dtype}:
        return None
    weight = scale[...].astype(x.dtype), float(norm.epsilon)
    how = {"norm": weight, "implementation": one.implementation}
    return partial(normed_dot, x, **how)


def _reading(layer: Any) -> tuple | None:
    """What decides how a quantized layer of one matrix, or of experts that read sorted rows, reads
    its input; None for other layers, and for those whose adapters read it, too.
    """
    if type(layer) is not QuantizedDense or layer.adapter is not None:
        return None
    own = layer.contraction
    if own.stack or (own.batch and not own.ragged):
        return None
    # One variable, not equal values: those are known only when the model runs.
    variables = (
        id(v) if v is not None else None for v in (layer.transform, layer.input_global_scale)
    )
    return (
        *(*variables, layer.input_format, layer.implementation, layer.partition),
        *(own.reading, own.ragged, layer.dtype, layer.kernel_dtype),
    )
