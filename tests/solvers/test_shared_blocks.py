"""One matrix for all blocks of a site: the closed form on mean moments, in every solver."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.solvers.costs import SiteCost
from wush_jax.solvers.site import effective_weight, quantize_site

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("strict")]

N, K, D = 64, 128, 32
RNG = np.random.default_rng(0)
# Blocks alike: what one matrix can serve.
MIXING = [np.kron(np.eye(K // D), oracle.correlated(RNG, D, D, D, spread=s)) for s in (1.0, 0.5)]
INPUTS = (RNG.standard_normal((512, K)) @ MIXING[0]).astype(np.float32)
WEIGHT = (RNG.standard_normal((N, K)) @ MIXING[1] / 10).astype(np.float32)
MOMENT = np.asarray(INPUTS.T @ INPUTS / len(INPUTS))


def test_the_matrix_is_the_closed_form_of_mean_moments():
    recipe = wush.Recipe(wush.MXFP4, transform_dtype="float32", shared_blocks=True)
    packed = wush.quantize_weight(WEIGHT, MOMENT, recipe)
    assert packed.transform.shape == (D, D)
    blocks = [slice(i, i + D) for i in range(0, K, D)]
    m_x = np.mean([MOMENT[b, b].astype(np.float64) for b in blocks], axis=0)
    m_w = np.mean([WEIGHT[:, b].T.astype(np.float64) @ WEIGHT[:, b] / N for b in blocks], axis=0)
    expected = wush.wush_transform(m_w, m_x).activation
    # The moments are float32 there.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(packed.transform, expected, atol=1e-4 * scale)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_it_serves_blocks_alike_better_than_hadamard(solver):
    def loss(**options):
        recipe = wush.Recipe(wush.MXFP4, solver=solver, **options)
        packed = wush.quantize_weight(WEIGHT, MOMENT, recipe)
        exact = INPUTS @ WEIGHT.T
        found = wush.quantized_dot(jnp.asarray(INPUTS), packed, implementation="reference")
        return np.mean((found - exact) ** 2) / np.mean(exact**2)

    shared, hadamard = loss(shared_blocks=True), loss(transform="hadamard")
    # By rounding 0.45 and 1.11 were seen.
    assert shared < 0.6 * hadamard
    assert shared < 1.2 * loss(interleave=False)  # a matrix for each block


def test_a_site_shares_it_and_weights_come_back():
    recipe = wush.Recipe(wush.INT8, shared_blocks=True, transform_dtype="float32")
    one, two = quantize_site([WEIGHT, 3 * WEIGHT], MOMENT, recipe)
    assert one.transform is two.transform
    assert one.transform.shape == (32, 32)
    error = np.linalg.norm(effective_weight(one) - WEIGHT) / np.linalg.norm(WEIGHT)
    assert error < 0.02
    assert SiteCost(recipe, K, (N * K,)).transform_bytes == 32 * 32 * 4


@pytest.mark.parametrize("other", [{"block_gain": True}, {"solver": "gptq", "refit": 1}])
def test_what_gives_blocks_their_own_is_refused(other):
    with pytest.raises(ValueError, match="matrix of its own; shared_blocks=False"):
        wush.Recipe(shared_blocks=True, interleave=False, **other)
