"""Following a reference's greedy text: against generating for real, and known cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, tokens
from weights import random_model

from wush_jax.evaluation.evaluate import kl_divergence
from wush_jax.evaluation.generation import GreedyText, greedy_text, score_generation
from wush_jax.models import generate

pytestmark = [pytest.mark.usefixtures("float32_matmuls"), pytest.mark.once]

PROMPTS = tokens(1, (4, 6))[0]
NEW = 8


@pytest.fixture(scope="module")
def models():
    """A model and a near one, which leaves its text after a while."""
    one, other = random_model(CONFIG), random_model(CONFIG)
    kernel = other.layers[1].mlp.down_proj.kernel
    noise = np.random.default_rng(5).standard_normal(kernel.shape)
    kernel[...] = kernel[...] + jnp.float32(0.05 * noise)
    return one, other


def test_it_finds_where_the_model_would_leave(models):
    reference, model = models
    text = greedy_text(reference, PROMPTS, max_new_tokens=NEW, batch=2)
    own = generate(model, PROMPTS, max_new_tokens=NEW).tokens
    match = np.cumprod(text.tokens == own, axis=1).sum(axis=1)
    assert 0 < match.mean() < NEW  # they do part, but not at once
    for batch in (3, 4):
        found = score_generation(reference, model, text, start=4, batch=batch)
        assert found.match == match.mean()
        assert found.same_start == np.mean(match >= 4)
        assert found.match_error == pytest.approx(match.std(ddof=1) / 2)
    whole = np.concatenate([PROMPTS, text.tokens], axis=1)
    logits = [np.asarray(m(whole), np.float64)[:, 5:-1] for m in models]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    expected = np.sum(np.exp(p) * (p - q), -1).mean()
    assert found.kl == pytest.approx(expected, rel=1e-4)  # float32 log-softmax
    assert found.kl != pytest.approx(kl_divergence(*models, [whole]), rel=1e-2)  # not the prompts


def test_the_reference_follows_itself(models):
    text = greedy_text(models[0], PROMPTS, max_new_tokens=NEW)
    found = score_generation(models[0], models[0], text)
    assert (found.match, found.same_start, found.kl) == (NEW, 1.0, 0.0)
    assert (found.match_error, found.same_error, found.kl_error) == (0, 0, 0)


def test_what_follows_a_difference_does_not_count():
    favourite = lambda tokens: jax.nn.one_hot(jnp.full(tokens.shape, 3), 8)  # noqa: E731
    text = GreedyText(np.zeros((2, 1), np.int32), np.int32([[3, 5, 3, 3], [5, 3, 3, 3]]))
    found = score_generation(favourite, favourite, text, start=1)
    assert (found.match, found.same_start) == (0.5, 0.5)


def test_mistakes_are_named(models):
    with pytest.raises(ValueError, match=r"prompts has shape \(3,\); it must be \(P, L\)"):
        greedy_text(models[0], [1, 2, 3])
    text = GreedyText(PROMPTS, PROMPTS)
    with pytest.raises(ValueError, match="start=0 must be at least 1"):
        score_generation(*models, text, start=0)
