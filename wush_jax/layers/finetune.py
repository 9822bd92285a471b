"""Training the quantized weights themselves: rounded in every forward pass, straight through back.

`unpack` puts a float weight, in the layer's transformed coordinates, in place of the codes; the
model computes as if packed while any optimizer of ``nnx.Param`` trains it; `pack` rounds for good.
Transforms, formats and scales of activations stay what calibration made them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import dispatch, reference
from pallas_kernels.library.xla_ragged import transformed
from wush_jax.formats import Format, QuantizedArray, fake_quantize, quantize
from wush_jax.layers.kernel_layout import pack_for_kernels
from wush_jax.layers.nnx import (
    DENSE_TYPES,
    Dense,
    DenseTypes,
    Kernel,
    QuantizedDense,
    dense_layers,
    dotted,
    replace_modules,
)
from wush_jax.solvers.batched import over_batch
from wush_jax.solvers.site import PackedWeight
from wush_jax.transforms import apply_transform, linalg


class LatentDense(nnx.Module):
    """A quantized layer whose weight is rounded when it is called.

    ``y = q(x T_X^T) @ q(V)^T`` with V = W T_X^{-1} trained; both q pass gradients straight through.

    Args:
      twin: the packed layer; it keeps its transform, formats and bias.
      weight: W (N, K), or (*batch, N, K), in original coordinates.
      tied: the parameter W that several layers have in common, without a stack; what is trained
        is W then, and V is computed of it in every call.
    """

    def __init__(self, twin: QuantizedDense, weight: jax.Array, tied: nnx.Param | None = None):
        self.twin = twin
        self.tied = tied is not None
        move = over_batch(_to_latent, weight.shape[:-2])
        stack = twin.stack
        if tied is not None:
            self.latent = tied
            return
        self.natural = weight.shape if stack is None else weight.shape[len(stack.axes) :]
        latent = move(weight, twin.packed)
        self.latent = nnx.Param(latent if stack is None else stack.lay(latent))

    def _value(self) -> jax.Array:
        """The latent weight (N, K), or (*batch, N, K), also where a scan has taken a stack."""
        stack, latent = self.twin.stack, self.latent[...]
        if self.tied:
            return over_batch(_to_latent, latent.shape[:-2])(latent, self.twin.packed)
        return latent if stack is None else stack.undo(latent, self.natural)

    def __call__(self, *arguments: Any, **keywords: Any) -> jax.Array:
        """Apply the layer, to what `QuantizedDense` takes."""
        dot = _latent_ragged_dot if self.twin.contraction.ragged else _latent_dot
        return self.twin.applied(dot, arguments, keywords, self._value())

    def __getattr__(self, name: str) -> Any:
        # Models read what the replaced layer shows: features, shapes, the kernel itself.
        twin = vars(self).get("twin")
        if name.startswith("_") or twin is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return Kernel(twin, self.dense_weight) if name == twin.kernel_name else getattr(twin, name)

    def dense_weight(self) -> jax.Array:
        """Return the rounded weight in original coordinates, (N, K) or (*batch, N, K)."""
        latent, packed = self._value(), self.twin.packed
        return over_batch(_effective, latent.shape[:-2])(latent, packed)

    def pack(self) -> QuantizedDense:
        """Return the packed layer with the weight as it is now."""
        latent = self._value()
        rounded = over_batch(_round, latent.shape[:-2])(latent, self.twin.packed)
        self.twin.hold(rounded)
        return self.twin


@jax.jit
def _to_latent(weight: jax.Array, packed: PackedWeight) -> jax.Array:
    if packed.transform is None:
        return weight.astype(jnp.float32)
    inverse = jnp.linalg.inv(packed.transform.astype(jnp.float32))
    return apply_transform(weight.astype(jnp.float32), inverse.mT)


def _latent_dot(x: jax.Array, packed: PackedWeight, latent: jax.Array) -> jax.Array:
    fmt, scale = packed.weight.format, packed.weight.global_scale
    y = x if packed.transform is None else apply_transform(x, packed.transform)
    if packed.input_format is not None:
        y = fake_quantize(y, packed.input_format, global_scale=packed.input_global_scale)
    weight = fake_quantize(latent, fmt, global_scale=scale)
    dot = jnp.einsum(
        "...k,nk->...n",
        y.astype(jnp.float32),
        weight,
        precision=linalg.HIGHEST,
    )
    return dot.astype(x.dtype)


def _latent_ragged_dot(
    x: jax.Array, packed: PackedWeight, group_sizes: jax.Array, latent: jax.Array
) -> jax.Array:
    """As `_latent_dot`, each row with its expert's weight, transform and scales."""
    groups, _, k = latent.shape
    transforms = dispatch.of_groups(packed.transform, groups, k)
    y = x.astype(jnp.float32)
    if transforms is not None:
        y = transformed(y, transforms.astype(jnp.float32), group_sizes)
    if packed.input_format is not None:
        scale: Any = packed.input_global_scale
        if scale is None:
            scale = packed.input_format.global_scale
        if scale is None:
            raise NotImplementedError(
                f"{packed.input_format.name} derives its global scale from each expert's rows; "
                "calibrate a static one"
            )
        expert = jnp.minimum(reference.group_of_rows(group_sizes, len(x)), groups - 1)
        y = _each_rounded(y, jnp.broadcast_to(scale, groups)[expert], packed.input_format)
    scales = jnp.broadcast_to(packed.weight.global_scale, groups)
    weight = _each_rounded(latent, scales, packed.weight.format)
    sizes = group_sizes.astype(jnp.int32)
    return lax.ragged_dot(y, weight.mT, sizes, precision=linalg.HIGHEST).astype(x.dtype)


def _each_rounded(x: jax.Array, global_scales: jax.Array, fmt: Format) -> jax.Array:
    return jax.vmap(lambda x, scale: fake_quantize(x, fmt, global_scale=scale))(x, global_scales)


def _effective(latent: jax.Array, packed: PackedWeight) -> jax.Array:
    scale = packed.weight.global_scale
    weight = fake_quantize(latent, packed.weight.format, global_scale=scale)
    if packed.transform is None:
        return weight
    return apply_transform(weight, packed.transform.astype(jnp.float32).mT)


@jax.jit
def _round(latent: jax.Array, packed: PackedWeight) -> QuantizedArray:
    return quantize(latent, packed.weight.format, global_scale=packed.weight.global_scale)


def unpack(
    quantized: nnx.Module, original: nnx.Module, *, dense_types: DenseTypes = DENSE_TYPES
) -> nnx.Module:
    """Return a quantized model whose weights can be trained; both models are left as they are.

    Args:
      quantized: from `wush_jax.quantize_model`.
      original: the model that it was made of; the weights start from its, before rounding.
      dense_types: module types that are dense layers.

    Returns:
      The model with `LatentDense` layers, float32 parameters ``latent``. A layer that was rounded
      to nearest computes the same as before; one that GPTQ rounded starts from its nearest codes.
      Layers on one Param of the original stay on one: what they share is W itself.

    Raises:
      ValueError: nothing quantized, or a quantized layer that the original does not have.

    >>> from wush_jax import Recipe, quantize_model
    >>> model = nnx.List([nnx.Linear(32, 8, rngs=nnx.Rngs(0))])
    >>> x, call = jnp.ones((1, 32)), lambda m, x: m[0](x)
    >>> quantized, _ = quantize_model(model, [x], Recipe(solver="rtn"), call=call)
    >>> student = unpack(quantized, model)
    >>> student[0].latent.shape, type(pack(student)[0]).__name__
    ((8, 32), 'QuantizedDense')
    """
    layers, _ = dense_layers(original, dense_types)
    found, tied = [], _tied(original, layers)

    def latent(path: str, module: nnx.Module) -> nnx.Module | None:
        if not isinstance(module, QuantizedDense):
            return None
        found.append(path)
        weight = _weight(layers, path, module)
        if path in tied and module.stack is None:
            return LatentDense(module, weight, tied[path].setdefault(weight.shape, _latent(weight)))
        return LatentDense(module, weight)

    unpacked = replace_modules(quantized, latent)
    if not found:
        raise ValueError("quantized has no quantized layers; pass what quantize_model returned")
    return unpacked


def _latent(weight: jax.Array) -> nnx.Param:
    return nnx.Param(weight.astype(jnp.float32))


def _tied(original: nnx.Module, layers: dict[str, Dense]) -> dict[str, dict]:
    """Return, for layers on one Param and in one orientation, what they have in common."""
    holders: dict[Any, list[str]] = {}
    for path, module in nnx.iter_modules(original):
        layer = layers.get(dotted(path))
        if layer is not None and layer.kernel_name:
            kernel = getattr(module, layer.kernel_name)
            holders.setdefault((id(kernel), layer.contraction), []).append(dotted(path))
    found: dict[str, dict] = {}
    for paths in holders.values():
        if len(paths) > 1:
            common: dict = {}
            found |= {path: common for path in paths}  # one for all
    return found


def _weight(layers: dict[str, Dense], path: str, twin: QuantizedDense) -> jax.Array:
    if path not in layers:
        raise ValueError(f"original has no dense layer {path!r}; give the model that was quantized")
    return twin.contraction.weight(layers[path].kernel)


def pack(model: nnx.Module) -> nnx.Module:
    """Round the weights of `unpack` for good: a quantized model as `quantize_model` makes it."""
    packed = replace_modules(
        model, lambda path, module: module.pack() if isinstance(module, LatentDense) else None
    )
    pack_for_kernels(packed)
    return packed
