"""What ``config.json`` means, family by family: keys, their defaults, and what we lack.

A `Family` has the defaults of transformers' configuration class of the same name (a test compares
them key by key) and a function from typed values to the fields of `LlamaConfig`. A key that stands
in a file and that transformers' class for the family ignores is ignored here, or refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from wush_jax.models import gemma, mixtures
from wush_jax.models.family import (
    FULL,
    SLIDING,
    Family,
    Fields,
    count_layers,
    read_layer_types,
)
from wush_jax.models.rope import read_rope
from wush_jax.models.typed_values import TypedValues

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def read_fields(given: Mapping[str, Any]) -> Fields:
    """Return the fields of a `LlamaConfig` from the content of a ``config.json``.

    Raises:
        ValueError: values that are missing or of a wrong kind, all of them.
        NotImplementedError: a config that asks for mathematics that we lack, in all its points.
    """
    kind = _model_type(given)
    values = TypedValues(given, FAMILIES[kind].defaults if kind in FAMILIES else LLAMA)
    if kind is None:
        values.faults.append(f"model_type is missing; add it, one of {', '.join(FAMILIES)}")
    elif kind not in FAMILIES:
        values.lack(f"model_type = {kind!r}", f"is not one of {', '.join(FAMILIES)}")
    family = FAMILIES.get(kind, FAMILIES["llama"])
    values.need("is_causal", True)
    values.need("per_layer_config", None, {})
    fields = {name: values.size(name) for name in SIZES}
    fields["num_hidden_layers"] = count_layers(values)
    fields |= {
        "num_key_value_heads": values.size("num_key_value_heads", optional=True),
        "head_dim": values.size("head_dim", optional=family.defaults.get("head_dim") is None),
        "rms_norm_eps": values.number("rms_norm_eps", zero=True),
        "tie_word_embeddings": values.flag("tie_word_embeddings"),
    }
    fields |= family.fields(values) | read_rope(values, family.theta)
    values.faults += contradictions(fields, values.unknown)
    values.check()
    return fields


def contradictions(fields: Mapping[str, Any], unknown: Collection[str] = ()) -> list[str]:
    """Say which fields of a `LlamaConfig` contradict each other.

    Args:
        fields: by name; those that are left out have their defaults.
        unknown: names whose values mean nothing.

    >>> contradictions({"num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 8})
    ['num_key_value_heads = 3 does not divide num_attention_heads = 4; choose a divisor']
    """
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    pairs, given = fields.get("num_key_value_heads"), fields.get("head_dim")
    experts, chosen = fields.get("num_experts", 0), fields.get("num_experts_per_tok", 2)
    act = fields.get("hidden_act", "silu")
    dim = width // heads if given is None else given
    found: list[tuple[bool, set[str], str]] = [
        (
            pairs is not None and heads % pairs != 0,
            {"num_attention_heads", "num_key_value_heads"},
            f"num_key_value_heads = {pairs} does not divide num_attention_heads = {heads}; choose "
            "a divisor",
        ),
        (
            given is None and width % heads != 0,
            {"hidden_size", "num_attention_heads", "head_dim"},
            f"hidden_size = {width} is no multiple of num_attention_heads = {heads}; give head_dim",
        ),
        (
            dim % 2 == 1 and (given is not None or width % heads == 0),
            {"hidden_size", "num_attention_heads", "head_dim"},
            f"head_dim = {dim} is odd; rotary embedding needs pairs",
        ),
        (
            act not in ACTIVATIONS,
            {"hidden_act"},
            f"hidden_act = {act!r} is none of {', '.join(ACTIVATIONS)}",
        ),
        (
            experts > 0 and not 0 < chosen <= experts,
            {"num_experts", "num_experts_per_tok"},
            f"num_experts_per_tok = {chosen} must be from 1 to num_experts = {experts}",
        ),
    ]
    return [text for wrong, names, text in found if wrong and not names & set(unknown)]


def _model_type(given: Mapping[str, Any]) -> Any:
    """Return the family's name, which files without one tell by their architecture; or None."""
    if "model_type" in given:
        return str(given["model_type"])[:40]
    names = given.get("architectures")
    if not names:
        return None
    first = names[0] if isinstance(names, list) else names
    return str(first).removesuffix("ForCausalLM").lower()


def _llama(values: TypedValues) -> Fields:
    values.need("hidden_act", "silu", "swish")
    bias = values.flag("attention_bias")
    _need_layers(values, FULL)
    return {"attention_bias": bias, "output_bias": bias, "mlp_bias": values.flag("mlp_bias")}


def _mistral(values: TypedValues) -> Fields:
    values.need("hidden_act", "silu", "swish")
    window = values.size("sliding_window", optional=True)
    _need_layers(values, FULL if window is None else SLIDING)
    return {"sliding_window": window}


def _need_layers(values: TypedValues, kind: str) -> None:
    """Refuse kinds of layers that transformers' code for the family would not look at."""
    names = values.names("layer_types") or ()
    if any(name != kind for name in names):
        values.lack(f"layer_types = {list(names)!r}"[:80], f"where all layers are of {kind!r}")


def _qwen(values: TypedValues) -> Fields:
    values.need("hidden_act", "silu", "swish")
    return read_layer_types(values, windowed=values.flag("use_sliding_window"))


def _qwen2(values: TypedValues) -> Fields:
    return {"attention_bias": True} | _qwen(values)


def _qwen3(values: TypedValues) -> Fields:
    bias = values.flag("attention_bias")
    return {"attention_bias": bias, "output_bias": bias, "qk_norm": True} | _qwen(values)


def _own(values: TypedValues) -> Fields:
    """Read what no family of transformers has: every field of `LlamaConfig` by its own name."""
    sizes = ("num_experts_per_tok", "decoder_sparse_step")
    return {
        **{name: values.flag(name) for name in FLAGS},
        **{name: values.number(name, optional=True) for name in NUMBERS},
        **{name: values.size(name) for name in sizes},
        "num_experts": int(values.number("num_experts", zero=True)),
        "moe_intermediate_size": values.size("moe_intermediate_size", optional=True),
        "hidden_act": values.text("hidden_act"),
        "sliding_window": values.size("sliding_window", optional=True),
        "layer_types": values.names("layer_types"),
        "mlp_only_layers": values.numbers("mlp_only_layers"),
    }


def _write_own(config: Any) -> Fields:
    names = (*FLAGS, *NUMBERS, *OTHERS)
    values = {name: getattr(config, name) for name in names}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _write_qwen(config: Any) -> Fields:
    """Say which layers see a window, for versions that look at types and those that count."""
    types = config.layer_types or (SLIDING,) * config.num_hidden_layers
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": list(types),
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
    }


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
FLAGS = {
    **dict.fromkeys(("attention_bias", "output_bias", "qk_norm", "mlp_bias"), False),
    **dict.fromkeys(("attention_sinks", "offset_norms", "sandwich_norms"), False),
    **dict.fromkeys(("scaled_embeddings", "norm_topk_prob"), False),
}
NUMBERS = {
    **dict.fromkeys(("rope_local_base_freq", "query_pre_attn_scalar", "swiglu_limit"), None),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), None),
    "swiglu_alpha": 1.702,
}
OTHERS = {
    **{"num_experts": 0, "num_experts_per_tok": 2, "moe_intermediate_size": None},
    **{"decoder_sparse_step": 1, "mlp_only_layers": None},
    **{"hidden_act": "silu", "sliding_window": None, "layer_types": None},
}
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
MISTRAL: dict[str, Any] = {
    k: v for k, v in LLAMA.items() if k not in ("attention_bias", "mlp_bias")
} | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2: dict[str, Any] = {k: v for k, v in MISTRAL.items() if k != "head_dim"} | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
QWEN3 = QWEN2 | {"head_dim": 128, "attention_bias": False}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        LLAMA,
        _llama,
        written=lambda c: {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias},
    ),
    "mistral": Family(MISTRAL, _mistral, written=lambda c: {"sliding_window": c.sliding_window}),
    "qwen2": Family(QWEN2, _qwen2, written=_write_qwen),
    "qwen3": Family(
        QWEN3,
        _qwen3,
        written=lambda c: {"attention_bias": c.attention_bias} | _write_qwen(c),
    ),
    **gemma.FAMILIES,
    **mixtures.FAMILIES,
    "wush_llama": Family(LLAMA | FLAGS | NUMBERS | OTHERS, _own, written=_write_own),
}
