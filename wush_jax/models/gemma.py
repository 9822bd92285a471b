"""Gemma, Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wush_jax.models.family import (
    FULL,
    SLIDING,
    Family,
    Fields,
    read_layer_types,
    write_layer_types,
)
from wush_jax.models.typed_values import TypedValues

LOCAL_THETA = 10_000.0


def _common(values: TypedValues) -> Fields:
    values.need("use_bidirectional_attention", None, False)
    bias = values.flag("attention_bias")
    return {
        **{"attention_bias": bias, "output_bias": bias, "hidden_act": "gelu_pytorch_tanh"},
        **{"offset_norms": True, "scaled_embeddings": True},
    }


def _gemma(values: TypedValues) -> Fields:
    # The first files say "gelu" and mean its approximation, as transformers knows.
    values.need("hidden_act", "gelu_pytorch_tanh", "gelu")
    return _common(values)


def _gemma2(values: TypedValues) -> Fields:
    values.need("hidden_activation", "gelu_pytorch_tanh")
    numbers = ("attn_logit_softcapping", "final_logit_softcapping")
    pattern = values.given.get("sliding_window_pattern", 2)
    return {
        **_common(values),
        "sandwich_norms": True,
        "query_pre_attn_scalar": values.number("query_pre_attn_scalar"),
        **{name: values.number(name, optional=True) for name in numbers},
        **read_layer_types(values, windowed=True, pattern=pattern),
    }


def _gemma3(values: TypedValues) -> Fields:
    values.given.setdefault("sliding_window_pattern", 6)
    values.size("sliding_window_pattern")
    local = {"rope_theta": values.given.get("rope_local_base_freq", LOCAL_THETA)}
    nested = values.given.get("rope_parameters")
    if isinstance(nested, Mapping) and {FULL, SLIDING} & set(nested):
        # Each kind of layer has its own: what stays is that of the full ones.
        values.given["rope_parameters"] = nested.get(FULL) or {}
        found = nested.get(SLIDING) or {}
        local |= found if isinstance(found, Mapping) else {"rope_theta": found}
    entries = TypedValues(local, {})
    entries.need("rope_type", "default")
    theta = entries.number("rope_theta")
    values.merge(entries)
    return _gemma2(values) | {"qk_norm": True, "rope_local_base_freq": theta}


def _write_gemma(config: Any) -> Fields:
    return {"attention_bias": config.attention_bias, "hidden_act": config.hidden_act}


def _write_gemma2(config: Any) -> Fields:
    names = ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias")
    scalar = config.query_pre_attn_scalar
    return {
        **{name: getattr(config, name) for name in names},
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": config.head_dim if scalar is None else scalar,
        **write_layer_types(config),
    }


def _write_gemma3(config: Any) -> Fields:
    return _write_gemma2(config) | {"rope_local_base_freq": config.rope_local_base_freq}


GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
GEMMA2: dict[str, Any] = {k: v for k, v in GEMMA.items() if k != "hidden_act"} | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
FAMILIES: Mapping[str, Family] = {
    "gemma": Family(GEMMA, _gemma, written=_write_gemma),
    "gemma2": Family(GEMMA2, _gemma2, written=_write_gemma2),
    "gemma3_text": Family(GEMMA3, _gemma3, theta=1_000_000.0, written=_write_gemma3),
}
