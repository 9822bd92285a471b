"""Mixtures of experts: Mixtral, Qwen 3 MoE and gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wush_jax.models.family import Family, Fields, read_layer_types, write_layer_types
from wush_jax.models.typed_values import TypedValues

NAMES = ("num_experts", "num_local_experts")


def _experts(values: TypedValues) -> Fields:
    """Return how many experts there are; files have either of two names."""
    names = [n for v in (values.given, values.defaults) for n in NAMES if n in v]
    name = names[0]
    count, chosen = values.size(name), values.size("num_experts_per_tok")
    if chosen > count and not {name, "num_experts_per_tok"} & values.unknown:
        values.faults.append(f"num_experts_per_tok = {chosen}, expected at most {name} = {count}")
    return {"num_experts": count, "num_experts_per_tok": min(chosen, count)}


def _mixtral(values: TypedValues) -> Fields:
    values.need("hidden_act", "silu", "swish")
    window = values.size("sliding_window", optional=True)
    return {"norm_topk_prob": True, "sliding_window": window} | _experts(values)


def _qwen3_moe(values: TypedValues) -> Fields:
    values.need("hidden_act", "silu", "swish")
    bias = values.flag("attention_bias")
    windowed = values.flag("use_sliding_window")
    return {
        **{"attention_bias": bias, "output_bias": bias, "qk_norm": True},
        "sliding_window": values.size("sliding_window", optional=True) if windowed else None,
        "moe_intermediate_size": values.size("moe_intermediate_size"),
        "norm_topk_prob": values.flag("norm_topk_prob"),
        "decoder_sparse_step": values.size("decoder_sparse_step"),
        "mlp_only_layers": values.numbers("mlp_only_layers"),
        **_experts(values),
    }


def _gpt_oss(values: TypedValues) -> Fields:
    values.need("hidden_act", "silu", "swish")
    bias = values.flag("attention_bias")
    return {
        **{"attention_bias": bias, "output_bias": bias, "mlp_bias": True},
        **{"attention_sinks": True, "norm_topk_prob": True},
        **{name: values.number(name) for name in ("swiglu_alpha", "swiglu_limit")},
        **_experts(values),
        **read_layer_types(values, windowed=True, pattern=2),
    }


def _write_mixtral(config: Any) -> Fields:
    return {
        "intermediate_size": config.expert_width,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.sliding_window,
    }


def _write_qwen3_moe(config: Any) -> Fields:
    names = (
        *("attention_bias", "num_experts", "num_experts_per_tok"),
        *("norm_topk_prob", "decoder_sparse_step", "sliding_window"),
    )
    return {
        "moe_intermediate_size": config.expert_width,
        **{name: getattr(config, name) for name in names},
        "mlp_only_layers": list(config.mlp_only_layers),
        "use_sliding_window": config.sliding_window is not None,
    }


def _write_gpt_oss(config: Any) -> Fields:
    names = ("attention_bias", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit")
    # Said outright, since files without a scaling have the family's.
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        **{name: getattr(config, name) for name in names},
        "intermediate_size": config.expert_width,
        "num_local_experts": config.num_experts,
        **({"rope_parameters": plain} if config.rope_scaling is None else {}),
        **write_layer_types(config),
    }


MIXTRAL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
QWEN3_MOE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPT_OSS: dict[str, Any] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(MIXTRAL, _mixtral, theta=1_000_000.0, written=_write_mixtral),
    "qwen3_moe": Family(QWEN3_MOE, _qwen3_moe, written=_write_qwen3_moe),
    "gpt_oss": Family(GPT_OSS, _gpt_oss, theta=150_000.0, written=_write_gpt_oss),
}
