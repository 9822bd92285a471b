"""One site, from weights and moments to packed weights: recipes and what carries them out."""

from wush_jax.solvers.presets import BEST, BEST_WIDE, FAST, PAPER
from wush_jax.solvers.recipe import Recipe, RuleBook, Rules
from wush_jax.solvers.site import PackedWeight, effective_weight, quantize_site, quantize_weight

__all__ = [
    "BEST",
    "BEST_WIDE",
    "FAST",
    "PAPER",
    "PackedWeight",
    "Recipe",
    "RuleBook",
    "Rules",
    "effective_weight",
    "quantize_site",
    "quantize_weight",
]
