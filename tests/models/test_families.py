"""Every family of decoders against Hugging Face's own code, on random weights."""

import jax
import numpy as np
import pytest

from wush_jax.models import LlamaConfig, generate, load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("float32_matmuls")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LOCAL = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24}
OSS = {"head_dim": 16, "sliding_window": 6, "swiglu_limit": 1.5}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES = {
    "llama 2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama 3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, long": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, biased": ("Llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 6}),
    "qwen 2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen 2, window": ("Qwen2", WINDOW),
    "qwen 3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen 3, biased": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, biased feed-forward": ("Llama", {"mlp_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    "qwen 3 moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen 3 moe, some dense": ("Qwen3Moe", EXPERTS | {"mlp_only_layers": [1]}),
    "qwen 3 moe, every other": ("Qwen3Moe", EXPERTS | {"decoder_sparse_step": 2}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma 2": ("Gemma2", CAPS | {"head_dim": 16, "sliding_window": 5}),
    "gemma 3": ("Gemma3Text", LOCAL | {"head_dim": 16, "sliding_window": 5}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2} | OSS),
}
TOKENS = np.random.default_rng(0).integers(61, size=(2, 24))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model of Hugging Face's, every weight random, and the folder it was saved in."""
    kind, options = FAMILIES[request.param]
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    config._attn_implementation = "eager"  # the default of some versions drops caps and sinks
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    for module in theirs.modules():  # some versions fix the limit of gpt-oss
        if hasattr(module, "limit"):
            module.limit = config.swiglu_limit
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape) + ("norm" in name))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder, max_shard_size="20KB")
    return theirs, folder


def test_logits_equal_those_of_transformers(pair):
    theirs, folder = pair
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    got = np.asarray(jax.jit(load_pretrained(folder).__call__)(TOKENS))
    # float32 throughout, in another order of sums.
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_greedy_text_equals_that_of_transformers(pair):
    theirs, folder = pair
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(TOKENS),
            attention_mask=torch.ones(TOKENS.shape, dtype=torch.int64),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    out = generate(load_pretrained(folder), TOKENS, max_new_tokens=6)
    np.testing.assert_array_equal(out.tokens, expected[:, 24:].numpy())


def test_our_config_is_theirs(pair):
    """What `LlamaConfig.to_dict` writes means the same to transformers."""
    ours = LlamaConfig.from_dict(pair[0].config.to_dict())
    read = transformers.AutoConfig.for_model(**ours.to_dict())
    assert LlamaConfig.from_dict(read.to_dict()) == ours
