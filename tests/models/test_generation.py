"""Text token by token: the cache gives what the whole pass gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.models import Llama, generate, generation, sample
from wush_jax.models.generation import CHUNK

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

WINDOW = dataclasses.replace(
    CONFIG, sliding_window=5, layer_types=("full_attention", "sliding_attention")
)
OTHERS = dataclasses.replace(CONFIG, qk_norm=True, attention_bias=True, tie_word_embeddings=False)
BENT = dataclasses.replace(WINDOW, attn_logit_softcapping=3.0, attention_sinks=True)
LENGTHS = np.array([9, 4], np.int32)
PROMPTS = tokens(1, (2, 9))[0]


@nnx.jit
def whole(model, prompts):
    return model(prompts)


prefill = nnx.jit(Llama.prefill, static_argnums=3)
decode = nnx.jit(Llama.decode)
extend = nnx.jit(Llama.extend)


@functools.cache
def quantized_model():
    recipe = wush.Recipe(transform="hadamard")
    return wush.quantize_model(random_model(CONFIG), tokens(1), recipe)[0]


@pytest.mark.parametrize("config", [CONFIG, WINDOW, OTHERS], ids=["plain", "window", "others"])
def test_token_by_token_equals_the_whole(config):
    """Rows of unequal length, fed their own continuation, against a pass over all of it."""
    model = random_model(config)
    logits, cache = prefill(model, PROMPTS, LENGTHS, 14)
    texts = [list(row[:n]) for row, n in zip(PROMPTS, LENGTHS, strict=True)]
    for step in range(5):
        for row, text in enumerate(texts):
            padded = np.zeros((1, 14), np.int32)
            padded[0, : len(text)] = text
            expected = whole(model, padded)[0, len(text) - 1]
            # float32 sums of 64 terms in another order, over two layers.
            np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)
        following = np.array([3 * step + 1, 5 * step + 2], np.int32)
        for text, token in zip(texts, following, strict=True):
            text.append(token)
        logits, cache = decode(model, following, cache)
    assert cache.lengths.tolist() == [14, 9]


def test_quantized_token_by_token_equals_the_whole():
    """Activations are quantized token by token, so that it makes no difference to them."""
    model = quantized_model()
    logits, cache = prefill(model, PROMPTS[:, :8], np.full(2, 8, np.int32), 9)
    np.testing.assert_allclose(logits, whole(model, PROMPTS)[:, 7], rtol=1e-4, atol=1e-4)
    logits, _ = decode(model, PROMPTS[:, 8], cache)
    np.testing.assert_allclose(logits, whole(model, PROMPTS)[:, 8], rtol=1e-4, atol=1e-4)


def greedy(model, prompt, count):
    """The most likely continuation, by passes over the whole text."""
    text = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 14), np.int32)
        padded[0, : len(text)] = text
        text.append(int(jnp.argmax(whole(model, padded)[0, len(text) - 1])))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "make",
    [lambda: random_model(CONFIG), quantized_model],
)
def test_greedy_generation(make):
    model = make()
    prompts = [PROMPTS[0].tolist(), PROMPTS[1, :4].tolist()]
    expected = [greedy(model, prompt, 5) for prompt in prompts]
    out = generate(model, prompts, max_new_tokens=5)
    assert out.tokens.tolist() == expected
    assert out.lengths.tolist() == [5, 5]
    again = generate(model, PROMPTS, lengths=LENGTHS, max_new_tokens=5)
    np.testing.assert_array_equal(again.tokens, out.tokens)


def test_rows_end_with_their_stop_token():
    model = random_model(CONFIG)
    free = generate(model, PROMPTS, max_new_tokens=5)
    stop = int(free.tokens[0, 1])
    out = generate(model, PROMPTS, max_new_tokens=5, stop_tokens=stop)
    for row, all_of_it in zip(range(2), free.tokens.tolist(), strict=True):
        count = all_of_it.index(stop) + 1 if stop in all_of_it else 5
        assert out.lengths[row] == count
        assert out.tokens[row].tolist() == all_of_it[:count] + [0] * (5 - count)
    assert out.lengths[0] <= 2


def test_prompts_of_many_lengths_share_a_program(monkeypatch):
    """What fills a prompt up changes no token of it; lengths of one bucket are traced once."""
    model, traced = random_model(CONFIG), []
    graph, state = generation._apart(model)

    def noted(*arguments):
        traced.append(1)
        return sample(*arguments)

    monkeypatch.setattr(generation, "sample", noted)
    prompts = [tokens(1, (1, length), seed=length)[0] for length in (2, 11)]
    first = generate(model, prompts[0], max_new_tokens=7)
    assert traced
    traced.clear()
    second = generate(model, prompts[1], max_new_tokens=7)
    assert not traced
    for prompt, out in zip(prompts, (first, second), strict=True):
        lengths = np.array([prompt.shape[1]], np.int32)  # with nothing behind the prompt
        logits, cache = generation._begin(graph, prompt.shape[1] + 7, state, prompt, lengths)
        chosen, chance = jnp.argmax(logits, axis=-1), (jax.random.key(0), None, None)
        found, _, _ = generation._rest(graph, 7, (), state, chosen, cache, *chance)
        np.testing.assert_array_equal(out.tokens, found)


@pytest.mark.parametrize(
    "config", [CONFIG, WINDOW, OTHERS, BENT], ids=["plain", "window", "others", "bent"]
)
def test_prompts_read_in_chunks(config):
    """The logits of a whole pass, for rows that end in any chunk, and what a cache gives after."""
    model = random_model(config)
    prompts, lengths = tokens(1, (4, 12))[0], np.array([12, 3, 4, 9], np.int32)
    logits, cache = prefill(model, prompts[:, :4], np.minimum(lengths, 4), 14)
    found = np.array(logits)
    for start in (4, 8):
        new, cache = extend(model, prompts[:, start : start + 4], lengths, cache, np.int32(start))
        found[lengths > start] = new[lengths > start]
    expected = np.asarray(whole(model, prompts))
    # As above: float32 sums in another order.
    np.testing.assert_allclose(found, expected[range(4), lengths - 1], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == lengths.tolist()
    _, at_once = prefill(model, prompts, lengths, 14)
    following = np.array([1, 2, 3, 4], np.int32)
    after, expected = (decode(model, following, c)[0] for c in (cache, at_once))
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)


def test_long_prompts_are_read_in_chunks_and_seconds_are_told(monkeypatch):
    model, told = random_model(CONFIG), []
    prompts = [tokens(1, (1, length), seed=length)[0][0].tolist() for length in (37, 5)]
    expected = generate(model, prompts, max_new_tokens=11)
    monkeypatch.setattr(generation, "PROMPT_CHUNK", 16)
    out = generate(model, prompts, max_new_tokens=11)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    shown = [*generation.stream(model, prompts, max_new_tokens=11, watch=told.append)]
    np.testing.assert_array_equal(np.concatenate(shown, axis=1), expected.tokens)
    for seconds in (expected.seconds, out.seconds, told[-1]):
        assert seconds.read == 42
        assert min(seconds.compiling, seconds.reading, seconds.writing) > 0
    assert (out.seconds.written, told[0].written, told[0].writing) == (20, 0, 0)
    again = generate(model, prompts, max_new_tokens=11).seconds
    assert again.compiling < out.seconds.compiling / 4
    assert "42 prompt tokens, " in str(again)


def test_buckets_are_few_and_close():
    lengths = np.arange(1, 4097)
    found = np.array([generation.bucket(int(length)) for length in lengths])
    assert (found >= lengths).all()
    assert (found <= np.maximum(16, np.ceil(1.25 * lengths) + 15)).all()
    assert (found[lengths > 128] <= 1.25 * lengths[lengths > 128]).all()
    assert len(set(found)) <= 8 + 4 * 5


def test_stop_tokens_are_looked_for_in_chunks():
    """Also where the last chunk goes beyond the limit, and a row ends within one."""
    model, limit = random_model(CONFIG), CHUNK + 5
    free = generate(model, PROMPTS, max_new_tokens=limit).tokens
    unseen = next(t for t in range(CONFIG.vocab_size) if t not in free)
    out = generate(model, PROMPTS, max_new_tokens=limit, stop_tokens=unseen)
    np.testing.assert_array_equal(out.tokens, free)
    assert out.lengths.tolist() == [limit, limit]
    stop = int(free[0, CHUNK // 2])
    out = generate(model, PROMPTS, max_new_tokens=limit, stop_tokens=[stop, unseen])
    for row, found, count in zip(free.tolist(), out.tokens, out.lengths, strict=True):
        expected = row.index(stop) + 1 if stop in row else limit
        assert count == expected
        np.testing.assert_array_equal(found, row[:count] + [0] * (limit - count))


def test_more_positions_than_the_model_was_made_for_are_warned_of():
    model = random_model(dataclasses.replace(CONFIG, max_position_embeddings=11))
    few = generate(model, PROMPTS, max_new_tokens=2)
    with pytest.warns(UserWarning, match="need 12 positions; the model was made for 11"):
        more = generate(model, PROMPTS, max_new_tokens=3)
    np.testing.assert_array_equal(more.tokens[:, :2], few.tokens)


def test_logits_that_are_none_are_refused():
    """The likeliest of NaN would be token 0, again and again."""
    model = random_model(CONFIG)
    model.norm.scale[...] = model.norm.scale[...].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="logits are NaN in 2 of 2 rows, the first 0: look"):
        generate(model, PROMPTS, max_new_tokens=5)
    with pytest.raises(ValueError, match="logits are NaN"):
        next(generation.stream(model, PROMPTS, max_new_tokens=5))


def test_bfloat16_and_random_draws():
    tensors = wush.models.to_tensors(random_model(CONFIG))
    model = wush.models.from_tensors(CONFIG, tensors, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    draw = functools.partial(generate, model, PROMPTS, max_new_tokens=5, temperature=2.0, top_p=0.9)
    first, again = draw(key=jax.random.key(0)), draw(key=jax.random.key(0))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (draw(key=jax.random.key(1)).tokens != first.tokens).any()
    assert first.tokens.dtype == np.int32


def test_a_nucleus_of_one_is_greedy():
    model = random_model(CONFIG)
    nucleus = generate(
        model, PROMPTS, max_new_tokens=5, temperature=1.0, top_p=1e-6, key=jax.random.key(0)
    )
    expected = generate(model, PROMPTS, max_new_tokens=5)
    np.testing.assert_array_equal(nucleus.tokens, expected.tokens)


def test_samples_have_the_probabilities_of_the_nucleus():
    probability = np.array([0.05, 0.4, 0.25, 0.3])
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.log(probability) * 0.5  # taken back by the temperature
    drawn = jax.vmap(lambda key: sample(logits, key, 0.5, 0.6))(keys)
    counts = np.bincount(drawn, minlength=4) / 4000
    # 0.4 and 0.3 reach 0.6; three standard errors of 4000 draws are 0.024.
    np.testing.assert_allclose(counts, [0, 4 / 7, 0, 3 / 7], atol=0.024)


@pytest.mark.usefixtures("eight_devices")
def test_sharded_weights_give_the_same_text():
    model = random_model(dataclasses.replace(CONFIG, num_key_value_heads=2))
    expected = generate(model, PROMPTS, max_new_tokens=5)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    graph, state = nnx.split(model)
    rows = {"o_proj", "down_proj"}

    def place(path, value):
        names = [getattr(p, "key", None) for p in path]
        spec = PartitionSpec()
        if "kernel" in names:
            inner = bool(rows & set(names))
            spec = PartitionSpec("model", None) if inner else PartitionSpec(None, "model")
        return jax.device_put(value, NamedSharding(mesh, spec))

    sharded = nnx.merge(graph, jax.tree_util.tree_map_with_path(place, state))
    assert "model" in sharded.layers[0].self_attn.k_proj.kernel[...].sharding.spec
    out = generate(sharded, PROMPTS, max_new_tokens=5)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": []}, "at least one"),
        ({"lengths": [10, 1]}, "lengths"),
        ({"prompts": [[1]], "lengths": [1]}, "lengths"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0}, "key"),
    ],
)
def test_mistakes_are_named(options, message):
    options = {"prompts": PROMPTS, "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(random_model(CONFIG), **options)
