"""Second moments of a site and the block transforms that they give in closed form."""

from wush_jax.transforms.checks import check_finite
from wush_jax.transforms.closed_forms import (
    calibrated_hadamard_transform,
    hadamard_transform,
    identity_transform,
    random_transform,
    whitening_transform,
    wush_transform,
)
from wush_jax.transforms.linalg import hadamard_matrix
from wush_jax.transforms.moments import Moments, calibrate_layer, second_moment
from wush_jax.transforms.pair import BlockTransform, apply_transform, inverse_transpose
from wush_jax.transforms.predictions import predicted_gain, predicted_loss
from wush_jax.transforms.sample import Sample

__all__ = [
    "BlockTransform",
    "Moments",
    "Sample",
    "apply_transform",
    "calibrate_layer",
    "calibrated_hadamard_transform",
    "check_finite",
    "hadamard_matrix",
    "hadamard_transform",
    "identity_transform",
    "inverse_transpose",
    "predicted_gain",
    "predicted_loss",
    "random_transform",
    "second_moment",
    "whitening_transform",
    "wush_transform",
]
