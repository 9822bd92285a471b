"""One site at a time: weights, moments and a recipe in, packed weights out.

The only place that turns the names of a recipe into transforms and solvers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax import linalg, moments, scale_search, transforms
from wush_jax.formats import Format, QuantizedArray, dequantize
from wush_jax.gptq import gptq
from wush_jax.recipe import Recipe
from wush_jax.rtn import rtn
from wush_jax.transforms import BlockTransform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight with what its inputs need at run time: a pytree.

    ``y = dequantize(q(x T_X^T)) @ dequantize(weight)^T``

    Attributes:
      weight: `QuantizedArray` (N, K), in transformed coordinates.
      transform: T_X, (K/d, d, d), or (d, d) shared by all blocks, or None for the identity.
      input_global_scale: global scale of the activations, float32 scalar, or None for the format's.
      input_format: format of the activations, or None to leave them unquantized; static.
    """

    weight: QuantizedArray
    transform: jax.Array | None
    input_global_scale: jax.Array | None
    input_format: Format | None = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its transform."""
        return self.weight.nbytes + (0 if self.transform is None else self.transform.nbytes)


def quantize_weight(
    weight: jax.Array,
    activation_moment: jax.Array | None,
    recipe: Recipe,
    *,
    transform: BlockTransform | None = None,
    name: str = "weight",
) -> PackedWeight:
    """Quantize one layer's weight under a recipe.

    Args:
      weight: W (N, K), outputs first.
      activation_moment: M_X of the layer's input, full (K, K) or diagonal blocks (K/d, d, d); GPTQ
        needs it full; may be None where neither the transform nor the solver looks at data.
      recipe: what to do.
      transform: the pair to use in place of the recipe's, such as one shared by a site; already
        rounded to its run-time dtype.
      name: of the layer, for messages.

    Returns:
      `PackedWeight` (N, K).

    Raises:
      ValueError: wrong shapes or orientation, a block that does not divide K, non-finite values, a
        moment that the recipe needs and that is missing or not full, a Hessian that is not
        positive definite.

    Source: WUSH paper, eq. 5-8, algorithms 1 and 2.

    >>> w = jax.random.normal(jax.random.key(0), (8, 64))
    >>> quantize_weight(w, jnp.eye(64), Recipe()).shape
    (8, 64)
    """
    blocks = _check_site([weight], activation_moment, recipe)
    solver_transform: BlockTransform | TransformRule | None = transform
    if transform is None:
        own = TransformRule(recipe.transform, recipe.transform_dtype)
        interleaved = recipe.solver == "gptq" and recipe.interleave and own.needs_data
        solver_transform = own if interleaved else build_transform([weight], blocks, recipe)
    quantized, used = _solve(weight, activation_moment, blocks, solver_transform, recipe, name)
    return _packed(quantized, used, blocks, recipe)


def quantize_site(
    weights: Sequence[jax.Array],
    activation_moment: jax.Array | None,
    recipe: Recipe,
    *,
    names: Sequence[str] | None = None,
) -> list[PackedWeight]:
    """Quantize all weights that share one input, with one transform.

    Each layer's moment is first scaled to unit output power ``tr(M_W M_X) = 1``: without that a
    layer with large weights would decide the transform for its neighbours. The rows of all layers
    are solved together; a global scale derived from data is therefore one for the site.

    Args:
      weights: (N_i, K) each.
      activation_moment: as for `quantize_weight`.
      recipe: for all of them; ``share_transform=False`` gives each its own transform.
      names: of the layers, for messages.

    Returns:
      One `PackedWeight` per weight. With a shared transform they hold the same array.

    Raises:
      ValueError: as for `quantize_weight`.
    """
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    if not recipe.share_transform or len(weights) == 1:
        return [
            quantize_weight(w, activation_moment, recipe, name=name)
            for w, name in zip(weights, names, strict=True)
        ]
    blocks = _check_site(weights, activation_moment, recipe)
    transform = build_transform(weights, blocks, recipe)
    stacked = jnp.concatenate(weights)
    quantized, used = _solve(
        stacked, activation_moment, blocks, transform, recipe, ", ".join(names)
    )
    stops = np.cumsum([w.shape[0] for w in weights])
    rows = [slice(stop - w.shape[0], stop) for w, stop in zip(weights, stops, strict=True)]
    whole = _packed(quantized, used, blocks, recipe)
    return [
        replace(
            whole, weight=replace(quantized, codes=quantized.codes[r], scales=quantized.scales[r])
        )
        for r in rows
    ]


def _solve(weight, activation_moment, blocks, transform, recipe: Recipe, name: str):
    """Run the recipe's solver: the quantized weight and the transform that was used."""
    if recipe.solver == "rtn":
        quantized = _rtn(
            weight,
            transform,
            recipe.format,
            scales=recipe.scale_search,
            activation_moment=blocks,
        )
        return quantized, transform
    return gptq(
        weight,
        activation_moment,
        transform,
        recipe.format,
        block_size=recipe.block,
        damping=recipe.damping,
        scales=recipe.scale_search,
        activation_order=recipe.activation_order,
        dtype=recipe.solver_dtype,
        name=name,
    )


# One compilation a shape: step by step the temporaries of a large layer would not fit.
_rtn = jax.jit(rtn, static_argnames=("fmt", "scales"))


def _packed(quantized, transform: BlockTransform, blocks, recipe: Recipe) -> PackedWeight:
    run_time = None if recipe.transform == "identity" else transform.activation
    fmt = recipe.input_format
    input_scale = None
    if blocks is not None:
        # Without a moment a derived scale stays None: found anew for each batch at run time.
        input_scale = scale_search.input_global_scale(
            fmt, activation_moment=blocks, transform=run_time
        )
    return PackedWeight(quantized, run_time, input_scale, fmt)


@dataclass(frozen=True)
class TransformRule:
    """From the moments of blocks to their transform, rounded for run time; static and hashable.

    Attributes:
      name: one of `wush_jax.recipe.TRANSFORMS`.
      dtype: what the run-time transform is rounded to.

    >>> TransformRule("wush", "bfloat16")(jnp.eye(4), jnp.eye(4), 1e-2).activation.dtype
    dtype(bfloat16)
    """

    name: str
    dtype: str

    @property
    def needs_data(self) -> bool:
        """Whether the moments matter."""
        return self.name not in ("identity", "random", "hadamard")

    def __call__(self, weight_moment, activation_moment, damping) -> BlockTransform:
        """Return the transform of moments (..., d, d)."""
        table: dict[str, Callable[..., BlockTransform]] = {
            "wush": transforms.wush_transform,
            "wus": functools.partial(transforms.wush_transform, hadamard=False),
            "calibrated_hadamard": transforms.calibrated_hadamard_transform,
            "whitening": transforms.whitening_transform,
        }
        built = table[self.name](weight_moment, activation_moment, damping=damping)
        return built.astype(jnp.dtype(self.dtype))


def build_transform(
    weights: Sequence[jax.Array], activation_blocks: jax.Array | None, recipe: Recipe
) -> BlockTransform:
    """Return the recipe's transform for a site, rounded to its run-time dtype.

    Args:
      weights: (N_i, K) each.
      activation_blocks: M_X (K/d, d, d), or None for transforms that look at no data.
      recipe: names the transform, the damping and the dtype.
    """
    d = recipe.block
    pair = {
        "identity": lambda: transforms.identity_transform(d),
        # A fixed key: a quantized model is a function of its inputs.
        "random": lambda: transforms.random_transform(jax.random.key(d), d),
        "hadamard": lambda: transforms.hadamard_transform(d),
    }.get(recipe.transform)
    if pair is not None:
        return pair().astype(jnp.dtype(recipe.transform_dtype))
    if activation_blocks is None:
        raise ValueError(f"activation_blocks=None: transform={recipe.transform!r} needs moments")
    m_w = site_weight_moment(weights, activation_blocks)
    rule = TransformRule(recipe.transform, recipe.transform_dtype)
    return rule(m_w, activation_blocks, recipe.damping)


def site_weight_moment(weights: Sequence[jax.Array], activation_blocks: jax.Array) -> jax.Array:
    """Return M_W (K/d, d, d) of a site: the mean of its layers' moments at unit output power.

    A single layer's moment is left as it is. Per layer l and block the weight is
    ``1 / sum_b tr(M_W,l,b M_X,b)``.
    """
    d = activation_blocks.shape[-1]
    each = [moments.second_moment(w, d) for w in weights]
    if len(each) == 1:
        return each[0]
    total = jnp.zeros_like(each[0])
    for m in each:
        power = jnp.sum(m * activation_blocks)
        total += m / jnp.where(power > 0, power, 1.0)
    # Back to the scale of weights, so that the transform's entries keep a usual size.
    return (
        total
        * (sum(jnp.mean(jnp.abs(m)) for m in each) / len(each))
        / jnp.maximum(jnp.mean(jnp.abs(total)), jnp.finfo(jnp.float32).tiny)
    )


def effective_weight(packed: PackedWeight) -> jax.Array:
    """Return the weight in its original coordinates: ``dequantize(weight) T_X``, (N, K)."""
    values = dequantize(packed.weight)
    if packed.transform is None:
        return values
    return transforms.apply_transform(values, packed.transform.astype(jnp.float32).mT)


def _check_site(weights, activation_moment, recipe: Recipe) -> jax.Array | None:
    """Check a site's arrays against its recipe; return M_X as diagonal blocks, or None."""
    d = recipe.block
    k = weights[0].shape[-1]
    for w in weights:
        if w.ndim != 2 or 0 in w.shape:
            raise ValueError(f"weight has shape {w.shape}; it must be (N, K), both at least 1")
        if w.shape[-1] != k:
            raise ValueError(f"weights of one site differ in K: {[w.shape for w in weights]}")
        transforms.check_finite("weight", w)
    if k % d:
        raise ValueError(
            f"weight has shape {weights[0].shape}: K={k} is not a multiple of block_size={d}; "
            "choose another block_size or format, or exclude the layer by a rule"
        )
    if activation_moment is None:
        if recipe.transform not in ("identity", "random", "hadamard") or recipe.solver == "gptq":
            raise ValueError(
                f"activation_moment is None, but transform={recipe.transform!r} with solver="
                f"{recipe.solver!r} needs the second moment of the layer's input: calibrate first"
            )
        return None
    shape = activation_moment.shape
    if shape not in ((k, k), (k // d, d, d)):
        n = weights[0].shape[0]
        hint = " (is the weight (K, N)? it must be (N, K))" if n in (shape[-1], shape[0]) else ""
        raise ValueError(
            f"activation_moment has shape {shape}; for weight {weights[0].shape} and block size "
            f"{d} it must be {(k, k)} or {(k // d, d, d)}{hint}"
        )
    if recipe.solver == "gptq" and shape != (k, k):
        raise ValueError(
            f"activation_moment has shape {shape}; solver='gptq' needs the full moment {(k, k)}: "
            "collect it with block=None, or use solver='rtn'"
        )
    transforms.check_finite("activation_moment", activation_moment)
    if len(shape) == 2:
        return linalg.diagonal_blocks(activation_moment, d)
    return activation_moment
