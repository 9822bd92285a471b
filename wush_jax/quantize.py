"""One site at a time: weights, moments and a recipe in, packed weights out.

The only place that turns the names of a recipe into transforms and solvers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from wush_jax import linalg, moments, transforms
from wush_jax.formats import Format, QuantizedArray, dequantize
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
) -> PackedWeight:
    """Quantize one layer's weight under a recipe.

    Args:
      weight: W (N, K), outputs first.
      activation_moment: M_X of the layer's input, full (K, K) or diagonal blocks (K/d, d, d); may
        be None where neither the transform nor the solver looks at data.
      recipe: what to do.
      transform: the pair to use in place of the recipe's, such as one shared by a site; already
        rounded to its run-time dtype.

    Returns:
      `PackedWeight` (N, K).

    Raises:
      ValueError: wrong shapes or orientation, a block that does not divide K, non-finite values, a
        moment that the recipe needs and that is missing.

    Source: WUSH paper, eq. 5-8 and algorithm 1.

    >>> w = jax.random.normal(jax.random.key(0), (8, 64))
    >>> quantize_weight(w, jnp.eye(64), Recipe()).shape
    (8, 64)
    """
    blocks = _check_site([weight], activation_moment, recipe)
    if transform is None:
        transform = build_transform([weight], blocks, recipe)
    if recipe.solver == "rtn":
        quantized = rtn(weight, transform, recipe.format)
    else:
        raise ValueError("solver='gptq' is not available yet; use 'rtn'")
    run_time = None if recipe.transform == "identity" else transform.activation
    return PackedWeight(quantized, run_time, None, recipe.input_format)


def quantize_site(
    weights: Sequence[jax.Array], activation_moment: jax.Array | None, recipe: Recipe
) -> list[PackedWeight]:
    """Quantize all weights that share one input, with one transform.

    Each layer's moment is first scaled to unit output power ``tr(M_W M_X) = 1``: without that a
    layer with large weights would decide the transform for its neighbours.

    Args:
      weights: (N_i, K) each.
      activation_moment: as for `quantize_weight`.
      recipe: for all of them; ``share_transform=False`` gives each its own transform.

    Returns:
      One `PackedWeight` per weight. With a shared transform they hold the same array.

    Raises:
      ValueError: as for `quantize_weight`.
    """
    if not recipe.share_transform:
        return [quantize_weight(w, activation_moment, recipe) for w in weights]
    blocks = _check_site(weights, activation_moment, recipe)
    transform = build_transform(weights, blocks, recipe)
    return [quantize_weight(w, activation_moment, recipe, transform=transform) for w in weights]


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
    m_w = site_weight_moment(weights, activation_blocks)
    options = {"damping": recipe.damping}
    built = {
        "wush": lambda: transforms.wush_transform(m_w, activation_blocks, **options),
        "wus": lambda: transforms.wush_transform(m_w, activation_blocks, hadamard=False, **options),
        "calibrated_hadamard": lambda: transforms.calibrated_hadamard_transform(
            m_w, activation_blocks, **options
        ),
        "whitening": lambda: transforms.whitening_transform(m_w, activation_blocks, **options),
    }[recipe.transform]()
    return built.astype(jnp.dtype(recipe.transform_dtype))


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
    transforms.check_finite("activation_moment", activation_moment)
    if len(shape) == 2:
        return linalg.diagonal_blocks(activation_moment, d)
    return activation_moment
