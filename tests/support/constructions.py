"""The closed forms by name, and moments to build them from."""

import functools

import jax
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax import transforms

D, B = 8, 3
CONSTRUCTIONS = {
    "wush": wush.wush_transform,
    "wus": functools.partial(wush.wush_transform, hadamard=False),
    "calibrated_hadamard": transforms.calibrated_hadamard_transform,
    "whitening": transforms.whitening_transform,
}
build = {name: jax.jit(lambda w, x, f=f: f(w, x, damping=0.0)) for name, f in CONSTRUCTIONS.items()}
every = pytest.mark.parametrize("name", CONSTRUCTIONS)


def moments(seed=0, condition=1e3):
    """Two stacks of B float32 moments, and the same in float64."""
    rng = np.random.default_rng(seed)
    pair = [
        np.stack([oracle.random_moment(rng, D, condition) for _ in range(B)]).astype(np.float32)
        for _ in range(2)
    ]
    return *pair, *(m.astype(np.float64) for m in pair)


def singular(m_w, m_x):
    return np.stack([oracle.wush(w, x)[2] for w, x in zip(m_w, m_x, strict=True)])
