import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONFIG
from weights import random_model

from wush_jax.evaluation import evaluate, positions
from wush_jax.evaluation.evaluate import (
    Score,
    bits_per_byte,
    cross_entropy,
    kl_divergence,
    perplexity,
    perplexity_of,
    score,
)
from wush_jax.models import by_layer
from wush_jax.models.tokens import in_batches

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


def test_one_pass_scores_both_models(models):
    found = score(models[1], BATCHES, models[0])
    assert found.cross_entropy == pytest.approx(cross_entropy(models[1], BATCHES), rel=1e-6)
    expected = cross_entropy(models[0], BATCHES)
    assert found.reference_cross_entropy == pytest.approx(expected, rel=1e-6)
    assert found.kl == pytest.approx(kl_divergence(*models, BATCHES), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_no_figure_depends_on_the_batch(models, batch):
    rows = [*RANDOM.integers(11, size=(7, 6)), RANDOM.integers(11, size=4)]
    found = score(models[1], in_batches(rows, batch), models[0])
    whole = score(models[1], in_batches(rows, 8), models[0])
    assert found.cross_entropy == pytest.approx(whole.cross_entropy, rel=1e-6)
    assert found.kl == pytest.approx(whole.kl, rel=1e-6)


def test_only_what_the_mask_has_counts(models):
    rows = [RANDOM.integers(11, size=length) for length in (6, 4, 1)]
    tokens, mask = np.zeros((3, 6), np.int32), np.zeros((3, 6), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    padded = score(models[1], [(tokens, mask)], models[0])
    apart = score(models[1], in_batches(rows, 1), models[0])
    assert padded.cross_entropy == pytest.approx(apart.cross_entropy, rel=1e-6)
    assert padded.kl == pytest.approx(apart.kl, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"batches\[0\]: the mask is int64 \(3, 6\), expected bool"
    ):
        cross_entropy(models[0], [(tokens, mask.astype(int))])


@pytest.mark.parametrize("tie", [True, False])
def test_parts_of_a_text_give_what_the_whole_gives(tie, monkeypatch, float32_matmuls):
    """Logits of a few positions at a time, 7 of 25 here, the last part shorter."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tie)
    pair = [random_model(config, seed) for seed in (0, 1)]
    batches = [RANDOM.integers(config.vocab_size, size=(2, 25), dtype=np.int32)]
    whole = score(pair[1], batches, pair[0])
    monkeypatch.setattr(positions, "LOGITS_BYTES", 7 * 4 * 2 * 2 * config.vocab_size)
    jax.clear_caches()
    parts = score(pair[1], batches, pair[0])
    # float32 sums of 64 terms in another order.
    assert parts.cross_entropy == pytest.approx(whole.cross_entropy, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    loss = whole.reference_cross_entropy
    assert parts.reference_cross_entropy == pytest.approx(loss, rel=1e-5)


def test_logits_take_no_more_memory_than_said(monkeypatch):
    """Two models and their KL: one and a half times `LOGITS_BYTES`, whatever the text's length."""
    config = dataclasses.replace(CONFIG, vocab_size=2**14, num_hidden_layers=1)
    monkeypatch.setattr(positions, "LOGITS_BYTES", 2**22)
    readers = [positions.Reader(random_model(config, seed)) for seed in (0, 1)]
    graphs, states = zip(*(reader.head for reader in readers), strict=True)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    read = [jax.eval_shape(reader.run, tokens) for reader in readers]
    compiled = positions._compiled.lower(evaluate._scores, graphs, states, tuple(read), tokens)
    used = compiled.compile().memory_analysis().temp_size_in_bytes
    # All logits would be 64 MiB; beside 6 MiB stands what the layers make of 512 positions.
    assert used < 1.5 * 2**22 + 3 * 2**20


def test_a_reference_is_read_once():
    """What is remembered gives the same figures, batch by batch, without running the model."""
    model, other = (random_model(CONFIG, seed) for seed in (0, 1))
    batches = [RANDOM.integers(CONFIG.vocab_size, size=shape) for shape in ((3, 6), (2, 9))]
    reader = positions.Reader(model, remember=True)
    first = score(other, batches, reader)
    assert first == score(other, batches, model)
    assert len(reader.memory) == len(batches)
    reader.run = None  # would be called
    assert score(other, batches, reader) == first
    with pytest.raises(TypeError):
        score(other, [batches[0][:, :5]], reader)


def test_layers_that_are_alike_are_compiled_once():
    config = dataclasses.replace(CONFIG, num_hidden_layers=4)
    model = random_model(config)
    tokens = RANDOM.integers(config.vocab_size, size=(2, 9), dtype=np.int32)
    before = by_layer.run_merged._cache_size()
    hidden = by_layer.ByLayer.of(model).hidden(tokens)
    assert by_layer.run_merged._cache_size() - before <= 2  # the embedding, a layer
    # the same operations in programs of other sizes: a few roundings of float32
    np.testing.assert_allclose(
        hidden, jax.jit(lambda m, t: m.hidden(t))(model, tokens), rtol=1e-4, atol=1e-5
    )
    assert by_layer.ByLayer.of(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) is None


def test_tokens_that_cannot_come_add_nothing(models):
    """A model that rules tokens out has logits of minus infinity: 0 log 0 is 0."""
    bar = jnp.where(jnp.arange(11) < 10, 0.0, -jnp.inf)
    batches = [RANDOM.integers(10, size=(2, 5))]
    ruled = [lambda tokens, model=model: model(tokens) + bar for model in models]
    p, q = (log_probabilities(model, batches[0])[..., :10] for model in models)
    p, q = (values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in (p, q))
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert kl_divergence(*ruled, batches) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("value", "shown"), [(jnp.nan, "nan"), (-jnp.inf, "inf")])
def test_a_figure_that_is_no_number_is_refused(models, value, shown):
    def broken(tokens):
        return models[0](tokens).at[1, 2, tokens[1, 3]].set(value)

    with pytest.raises(
        ValueError, match=rf"batches\[0\]: the figure at row 1, position 2 is {shown}"
    ):
        cross_entropy(broken, BATCHES)
    with pytest.raises(ValueError, match="the figure at row 1, position 2"):
        kl_divergence(models[0], broken, BATCHES)


def test_a_perplexity_beyond_float64_is_refused():
    def sure(tokens):  # of the wrong token
        return 1000 * jax.nn.one_hot(jnp.full(tokens.shape, 3), 8)

    batches = [np.zeros((2, 5), np.int32)]
    assert cross_entropy(sure, batches) == pytest.approx(1000)
    with pytest.raises(ValueError, match="the cross entropy is 1000 nats"):
        perplexity(sure, batches)
    with pytest.raises(ValueError, match="the cross entropy is 710 nats"):
        Score(710.0, 0.0, 0.0).perplexity  # noqa: B018  # a property
    assert perplexity_of(709.0) == pytest.approx(np.exp(709.0))


def test_models_of_two_vocabularies_are_refused(models):
    with pytest.raises(ValueError, match=r"vocabularies of \[11, 12\] tokens"):
        kl_divergence(models[0], lambda tokens: jnp.zeros((*tokens.shape, 12)), BATCHES)
