"""The transform of a site: from weights, moments and a recipe to the pair that all layers use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from wush_jax import transforms
from wush_jax.solvers import noise, scale_search
from wush_jax.solvers.recipe import DATA_FREE, Recipe
from wush_jax.transforms import BlockTransform, moments
from wush_jax.transforms.sample import Sample


@dataclass(frozen=True)
class TransformRule:
    """From the moments of blocks to their transform, rounded for run time; static and hashable.

    Attributes:
      name: one of `wush_jax.solvers.recipe.TRANSFORMS`.
      dtype: what the run-time transform is rounded to.
      balance: of WUSH and WUS.

    >>> TransformRule("wush", "bfloat16")(jnp.eye(4), jnp.eye(4), 1e-2).activation.dtype
    dtype(bfloat16)
    """

    name: str
    dtype: str
    balance: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe) -> TransformRule:
        """Return the rule that a recipe names."""
        return cls(recipe.transform, recipe.transform_dtype, recipe.balance)

    @property
    def needs_data(self) -> bool:
        """Whether the moments matter."""
        return self.name not in DATA_FREE

    def __call__(self, weight_moment, activation_moment, damping) -> BlockTransform:
        """Return the transform of moments (..., d, d)."""
        wush = functools.partial(transforms.wush_transform, balance=self.balance)
        table: dict[str, Callable[..., BlockTransform]] = {
            "wush": wush,
            "wus": functools.partial(wush, hadamard=False),
            "calibrated_hadamard": transforms.calibrated_hadamard_transform,
            "whitening": transforms.whitening_transform,
        }
        built = table[self.name](weight_moment, activation_moment, damping=damping)
        return built.astype(jnp.dtype(self.dtype))


def build_transform(
    weights: Sequence[jax.Array],
    activation_blocks: jax.Array | None,
    recipe: Recipe,
    sample: Sample | None = None,
) -> BlockTransform:
    """Return the recipe's transform for a site, rounded to its run-time dtype.

    Args:
      weights: (N_i, K) each.
      activation_blocks: M_X (K/d, d, d), or None for transforms that look at no data.
      recipe: names the transform, the damping and the dtype.
      sample: rows of the site's input; for ``block_gain``.

    Raises:
      ValueError: no moments, or no sample, for a recipe that needs them.
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
    if recipe.shared_blocks:
        m_w, activation_blocks = (jnp.mean(m, axis=-3) for m in (m_w, activation_blocks))
    built = TransformRule.of(recipe)(m_w, activation_blocks, recipe.damping)
    return _with_gains(built, m_w, activation_blocks, recipe, sample)


def _with_gains(built: BlockTransform, m_w, m_x, recipe: Recipe, sample: Sample | None):
    """Multiply each block by its best gain, where the recipe asks for that."""
    fmt = recipe.input_format
    if not recipe.block_gain or fmt is None:
        return built
    if sample is None:
        raise ValueError("sample=None: block_gain=True needs rows of the input; calibrate first")
    scale = scale_search.input_global_scale(fmt, activation_moment=m_x, transform=built.activation)
    gains = _best_gains(sample, built, m_w, fmt, scale)[:, None, None]
    scaled = built.activation.astype(jnp.float32) * gains
    return BlockTransform(scaled, built.weight / gains).astype(jnp.dtype(recipe.transform_dtype))


def site_weight_moment(weights: Sequence[jax.Array], activation_blocks: jax.Array) -> jax.Array:
    """Return M_W (K/d, d, d) of a site: the mean of its layers' moments at unit output power.

    A single layer's moment is left as it is. Per layer l and block the weight is
    ``1 / sum_b tr(M_W,l,b M_X,b)``.
    """
    d = activation_blocks.shape[-1]
    each = [moments.second_moment(w, d, name="weight") for w in weights]
    return each[0] if len(each) == 1 else _at_unit_power(each, activation_blocks)


@jax.jit
def _at_unit_power(each, activation_blocks):
    """Mean of the moments of layers, each at unit output power."""
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


_best_gains = jax.jit(noise.best_gains, static_argnames="fmt")
