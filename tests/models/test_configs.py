"""config.json of every family: defaults, faults, and logits, against transformers' own classes."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import CONFIG

from wush_jax.models import LlamaConfig, RopeScaling
from wush_jax.models.families import FAMILIES
from wush_jax.models.rope import rope_frequencies

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]

SIZES = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "wush_llama"])
def test_defaults_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(name)
    for key, value in FAMILIES[name].defaults.items():
        if key == "head_dim" and value is None:  # theirs is worked out already
            continue
        if key == "num_key_value_heads" and value is None:
            value = theirs.num_attention_heads
        if key == "sliding_window" and not getattr(theirs, "use_sliding_window", True):
            value = None
        assert getattr(theirs, key) == value, key
    rope = theirs.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == FAMILIES[name].theta


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gpt_oss"])
def test_layers_take_turns_as_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(name, num_hidden_layers=13)
    ours = LlamaConfig.from_dict(SIZES | {"model_type": name, "num_hidden_layers": 13})
    types = ["full_attention" if ours.window(i) is None else "sliding_attention" for i in range(13)]
    assert types == theirs.layer_types
    local = theirs.rope_parameters.get("sliding_attention", {}).get("rope_theta")
    assert ours.rope_local_base_freq == local


def test_a_window_has_the_default_of_its_family():
    windows = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 30}
    qwen = LlamaConfig.from_dict(SIZES | windows | {"model_type": "qwen2"})
    assert [qwen.window(i) for i in (0, 27, 28, 29)] == [None, None, 5, 5]
    mistral = LlamaConfig.from_dict(SIZES | {"model_type": "mistral"})
    assert (mistral.window(0), mistral.max_position_embeddings) == (4096, 131072)
    free = LlamaConfig.from_dict(SIZES | {"model_type": "mistral", "sliding_window": None})
    assert free.window(0) is None


def test_all_faults_are_told_at_once():
    wrong = {
        "vocab_size": "64",
        "num_hidden_layers": 2.0,
        "tie_word_embeddings": None,
        "rms_norm_eps": float("nan"),
        "hidden_act": "gelu",
        "rope_scaling": {"rope_type": "linear"},
    }
    with pytest.raises(ValueError, match="mend the file") as error:
        LlamaConfig.from_dict(SIZES | wrong)
    for name in ("factor is missing", *wrong):
        assert name.replace("rope_scaling", "factor") in str(error.value)
    with pytest.raises(ValueError, match=r"num_key_value_heads = 3 .* hidden_size = 34"):
        LlamaConfig.from_dict(SIZES | {"hidden_size": 34, "num_key_value_heads": 3})


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma4"},
        {"is_causal": False},
        {"per_layer_config": {"0": {"head_dim": 4}}},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"layer_types": ["sliding_attention"] * 4},
    ],
)
def test_mathematics_that_we_lack_is_refused(changes):
    with pytest.raises(NotImplementedError, match=r"is not|is nested|where all"):
        LlamaConfig.from_dict(SIZES | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear", "factor": None}},
        {"rope_theta": None},
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        {"sliding_window": 0, "model_type": "mistral"},
        {"model_type": "qwen2", "sliding_window": 3, "layer_types": ["sliding_attention"] * 4},
        {"model_type": "qwen2", "layer_types": ["full_attention"]},
    ],
)
def test_nonsense_is_refused(changes):
    with pytest.raises(ValueError, match=r"expected|is not below|has windows"):
        LlamaConfig.from_dict(SIZES | changes)


def test_what_is_not_ours_is_kept():
    source = SIZES | {"eos_token_id": [2, 104], "pad_token_id": 0, "my_own": {"a": None}}
    config = LlamaConfig.from_dict(source)
    assert config.to_dict() == source
    shorter = dataclasses.replace(config, num_hidden_layers=1)
    again = shorter.to_dict()
    assert LlamaConfig.from_dict(again) == shorter
    assert (again["eos_token_id"], again["my_own"]) == ([2, 104], {"a": None})
    assert config == LlamaConfig.from_dict(SIZES)
    assert hash(config) == hash(LlamaConfig.from_dict(SIZES))


OWN = {
    "window of no family": {"sliding_window": 3, "attention_bias": True, "output_bias": True},
    "alternating": {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")},
    "bias of no family": {"output_bias": True},
    "yarn": {"rope_scaling": RopeScaling(4.0, None, None, 16, 32.0, 1.0, False, 1.2)},
    "linear": {"rope_scaling": RopeScaling(4.0)},
    "qwen3": {"qk_norm": True, "sliding_window": 3},
    "experts of no family": {"num_experts": 4, "mlp_only_layers": (0,), "swiglu_limit": 2.0},
    "mixtral": {"num_experts": 4, "norm_topk_prob": True},
    "gemma of no family": {"offset_norms": True, "hidden_act": "gelu_pytorch_tanh"},
    "sinks of no family": {"attention_sinks": True, "final_logit_softcapping": 3.0},
}


@pytest.mark.parametrize("name", OWN)
def test_a_config_of_ones_own_survives(name):
    config = dataclasses.replace(CONFIG, **OWN[name])
    again = LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    windows = [[c.window(i) for i in range(c.num_hidden_layers)] for c in (config, again)]
    assert windows[0] == windows[1]
    assert dataclasses.replace(again, layer_types=config.layer_types) == config


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear, old": {"type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
    "yarn, betas": YARN | {"attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 2.0},
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as Theirs

    extra = {"rope_scaling": dict(ROPES[name]), "head_dim": 16, "max_position_embeddings": 64}
    ours, theirs = LlamaConfig.from_dict(SIZES | extra), Theirs(**(SIZES | extra))
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        expected = 5e5 ** -(torch.arange(0, 16, 2) / 16).numpy()
        factor = 1.0
    else:
        expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs)
    # Theirs are float32.
    np.testing.assert_allclose(
        rope_frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling),
        np.asarray(expected),
        rtol=3e-6,
    )
    scaling = ours.rope_scaling
    assert (1.0 if scaling is None else scaling.attention_factor) == pytest.approx(factor)


def test_contradictions_come_with_all_other_faults():
    wrong = {"vocab_size": 0, "num_key_value_heads": 3, "hidden_size": 34, "rope_theta": "x"}
    with pytest.raises(ValueError, match="mend the file") as error:
        LlamaConfig.from_dict(SIZES | wrong)
    said = str(error.value)
    for part in (
        "vocab_size = 0",
        "rope_theta = 'x'",
        "num_key_value_heads = 3 does not divide num_attention_heads = 4",
        "hidden_size = 34 is no multiple",
    ):
        assert said.count(part) == 1
    with pytest.raises(ValueError, match="mend the file") as error:
        LlamaConfig.from_dict(
            SIZES
            | {"model_type": "qwen2", "num_hidden_layers": 10**9, "num_attention_heads": "4"}
            | {"use_sliding_window": True, "layer_types": ["full_attention"]}
        )
    # What hangs on a value that means nothing is not called wrong.
    assert "num_hidden_layers = 1000000000, expected" in str(error.value)
    assert str(error.value).count("expected") == 2
