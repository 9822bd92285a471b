"""Measuring models and comparing settings."""

from wush_jax.evaluation.draws import compare_draws
from wush_jax.evaluation.evaluate import (
    bits_per_byte,
    cross_entropy,
    kl_divergence,
    perplexity,
    score,
)
from wush_jax.evaluation.generation import greedy_text, score_generation
from wush_jax.evaluation.study import Study, compare

__all__ = [
    "Study",
    "bits_per_byte",
    "compare",
    "compare_draws",
    "cross_entropy",
    "greedy_text",
    "kl_divergence",
    "perplexity",
    "score",
    "score_generation",
]
