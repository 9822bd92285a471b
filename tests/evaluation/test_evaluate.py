import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wush_jax.evaluation.evaluate import bits_per_byte, cross_entropy, kl_divergence, perplexity

RANDOM = np.random.default_rng(0)
# Two shapes: a mean of batch means would be wrong.
BATCHES = [RANDOM.integers(11, size=shape) for shape in ((3, 6), (2, 9))]


class Bigram(nnx.Module):
    """The smallest language model: a row of logits for each token."""

    def __init__(self, seed):
        table = np.random.default_rng(seed).standard_normal((11, 11))
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def __call__(self, tokens):
        return self.table[...][tokens]


@pytest.fixture(scope="module")
def models():
    return [Bigram(seed) for seed in (0, 1)]


def log_probabilities(model, tokens):
    logits = np.asarray(model.table[...], np.float64)[tokens]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cross_entropy_equals_numpy(models):
    losses = []
    for tokens in BATCHES:
        table = log_probabilities(models[0], tokens)
        for row in range(tokens.shape[0]):
            for t in range(tokens.shape[1] - 1):
                losses.append(-table[row, t, tokens[row, t + 1]])
    expected = np.mean(losses)
    assert cross_entropy(models[0], BATCHES) == pytest.approx(expected, rel=1e-5)
    assert perplexity(models[0], iter(BATCHES)) == pytest.approx(np.exp(expected), rel=1e-5)
    bits = bits_per_byte(models[0], BATCHES, bytes_per_token=2.0)
    assert bits == pytest.approx(expected / np.log(2) / 2, rel=1e-5)


def test_kl_divergence_equals_numpy(models):
    values = []
    for tokens in BATCHES:
        p, q = (log_probabilities(model, tokens) for model in models)
        values += list((np.exp(p) * (p - q)).sum(-1).ravel())
    assert kl_divergence(*models, BATCHES) == pytest.approx(np.mean(values), rel=1e-4)
    assert kl_divergence(models[0], models[0], BATCHES) == 0


def test_functions_and_modules_give_the_same(models):
    expected = kl_divergence(*models, BATCHES)
    mixed = kl_divergence(models[0], lambda tokens: models[1](tokens), BATCHES)
    assert mixed == pytest.approx(expected, rel=1e-6)
    called = perplexity(models[0], BATCHES, call=lambda model, tokens: 0 * model(tokens))
    assert called == pytest.approx(11)


def test_changed_weights_are_seen(models):
    model = Bigram(2)

    def function(tokens):
        return model(tokens)

    before = perplexity(model, BATCHES), perplexity(function, BATCHES)
    nnx.update(model, nnx.state(models[0]))
    after = perplexity(model, BATCHES), perplexity(function, BATCHES)
    assert before[0] == pytest.approx(before[1])
    assert after[0] == pytest.approx(after[1])
    assert before[0] != pytest.approx(after[0], rel=1e-3)


def test_model_is_compiled_once_for_a_shape(models):
    traced = []

    def call(model, tokens):
        traced.append(tokens.shape)
        return model(tokens)

    for _ in range(2):
        perplexity(models[0], [*BATCHES, *BATCHES], call=call)
    assert traced == [(3, 6), (2, 9)]


def test_progress_counts_batches(models):
    seen = []
    perplexity(models[0], BATCHES, progress=lambda *now: seen.append(now))
    assert seen == [(1, None, "evaluate"), (2, None, "evaluate")]


@pytest.mark.parametrize("batches", [[], [np.zeros((2, 1), np.int32)]])
def test_nothing_to_predict_is_refused(models, batches):
    with pytest.raises(ValueError, match="batches"):
        perplexity(models[0], batches)
    with pytest.raises(ValueError, match="batches"):
        kl_divergence(*models, [])
