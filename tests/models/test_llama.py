import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_oracle import oracle
from weights import random_model

from wush_jax.models import LlamaConfig, RopeScaling, from_tensors, to_tensors
from wush_jax.models.rope import apply_rope, rope_frequencies

pytestmark = pytest.mark.once

SMALL = LlamaConfig(
    vocab_size=13,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
FULL = dataclasses.replace(
    SMALL,
    num_hidden_layers=1,
    attention_bias=True,
    output_bias=True,
    qk_norm=True,
    tie_word_embeddings=False,
    rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16),
)
TOKENS = np.random.default_rng(0).integers(13, size=(2, 7))


@nnx.jit
def run(model, tokens):
    with jax.default_matmul_precision("highest"):
        return model(tokens)


@functools.cache
def random_tensors(config):
    return to_tensors(random_model(config))


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["plain", "all options"])
def test_forward_equals_numpy(config):
    tensors = random_tensors(config)
    logits = run(from_tensors(config, tensors), TOKENS)
    expected = oracle(config, tensors, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


def test_grouped_heads_equal_repeated_heads():
    tensors = random_tensors(SMALL)
    wide = dataclasses.replace(SMALL, num_key_value_heads=SMALL.num_attention_heads)

    def repeat(name, t):
        if ".k_proj." not in name and ".v_proj." not in name:
            return t
        return t.reshape(2, 8, -1).repeat(2, axis=0).reshape(32, -1)

    repeated = {name: repeat(name, t) for name, t in tensors.items()}
    grouped = run(from_tensors(SMALL, tensors), TOKENS)
    wide_logits = run(from_tensors(wide, repeated), TOKENS)
    np.testing.assert_allclose(wide_logits, grouped, rtol=1e-4, atol=1e-4)


def test_causal():
    model = random_model(SMALL)
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    before, after = run(model, TOKENS), run(model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1).min() > 0


def test_rope_depends_on_distance_only():
    query, key = np.random.default_rng(2).standard_normal((2, 1, 1, 8)).astype(np.float32)

    def score(at, distance):
        turned = [
            apply_rope(
                x,
                jnp.array([position]),
                rope_frequencies(SMALL.head_dim, SMALL.rope_theta, SMALL.rope_scaling),
            )
            for x, position in ((query, at + distance), (key, at))
        ]
        return float(jnp.vdot(*turned))

    assert score(0, 5) == pytest.approx(score(900, 5), abs=1e-3)
    assert score(0, 5) != pytest.approx(score(0, 6), abs=1e-2)


def test_steps_equal_the_whole():
    model = random_model(SMALL)

    def steps(tokens):
        hidden = model.embed(tokens)
        for layer in model.layers:
            hidden = layer(hidden)
        return model.head(hidden)

    # The same program, so the same values, without compiling it twice.
    assert str(jax.make_jaxpr(steps)(TOKENS)) == str(jax.make_jaxpr(model.__call__)(TOKENS))


def test_layers_that_share_an_input_get_the_same_array():
    model = random_model(SMALL)
    seen = {}

    class Watched(nnx.Module):
        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def __call__(self, x):
            seen[self.name] = x
            return self.inner(x)

    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    for module, names in ((attention, "q_proj k_proj v_proj"), (mlp, "gate_proj up_proj")):
        for name in names.split():
            setattr(module, name, Watched(name, getattr(module, name)))
    jax.eval_shape(model.__call__, TOKENS)
    assert seen["q_proj"] is seen["k_proj"] is seen["v_proj"]
    assert seen["gate_proj"] is seen["up_proj"]


def test_bfloat16_gives_float32_logits_near_the_float32_ones():
    tensors = random_tensors(SMALL)
    low = run(from_tensors(SMALL, tensors, dtype=jnp.bfloat16), TOKENS)
    high = run(from_tensors(SMALL, tensors), TOKENS)
    assert low.dtype == jnp.float32
    assert float(jnp.linalg.norm(low - high) / jnp.linalg.norm(high)) < 0.05


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["plain", "all options"])
def test_config_survives_its_dictionary(config):
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_config_reads_hugging_face_dictionaries():
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "model_type": "llama",
    }
    qwen2 = LlamaConfig.from_dict(sizes | {"model_type": "qwen2", "tie_word_embeddings": True})
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert LlamaConfig.from_dict(sizes | {"model_type": "qwen3", "head_dim": 32}).qk_norm
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert LlamaConfig.from_dict(sizes | {"rope_parameters": rope}).rope_theta == 5e5
    for name, value in (("model_type", "phi3"), ("hidden_act", "gelu")):
        with pytest.raises(NotImplementedError, match=name):
            LlamaConfig.from_dict(sizes | {name: value})
    with pytest.raises(NotImplementedError, match="use_bidirectional_attention"):
        LlamaConfig.from_dict(sizes | {"model_type": "gemma2", "use_bidirectional_attention": True})
    with pytest.raises(NotImplementedError, match="longrope"):
        LlamaConfig.from_dict(sizes | {"rope_scaling": {"rope_type": "longrope"}})
    del sizes["model_type"]
    assert LlamaConfig.from_dict(sizes | {"architectures": ["Qwen3ForCausalLM"]}).qk_norm
    with pytest.raises(ValueError, match="model_type is missing; add it, one of llama"):
        LlamaConfig.from_dict(sizes)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_key_value_heads = 3"):
        dataclasses.replace(SMALL, num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim = 7"):
        dataclasses.replace(SMALL, head_dim=7)
    tensors = random_tensors(SMALL)
    first = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"missing \['model.layers.0.mlp.up_proj.weight'\]"):
        from_tensors(SMALL, {name: t for name, t in tensors.items() if name != first})
    with pytest.raises(ValueError, match="has shape"):
        from_tensors(SMALL, tensors | {first: tensors[first].T})
