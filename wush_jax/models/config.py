"""Sizes and constants of a decoder, read from Hugging Face's ``config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary wavelengths to a longer context: ``llama3``, or by one factor.

    With a ``factor`` alone every wavelength is stretched by it (``linear``); otherwise only those
    longer than a part of the original context, as the other three say (``llama3``).

    Source: Hugging Face transformers, ``rope_type`` "linear" and "llama3".
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder, under the names of Hugging Face's ``config.json``.

    ``attention_bias`` is the bias of the query, key and value projections (Qwen 2),
    ``output_bias`` that of the attention output; ``qk_norm`` normalises each query and key
    head (Qwen 3). Layers from number ``max_window_layers`` on see ``sliding_window`` positions,
    their own the last (Mistral); None sees all.

    >>> LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128,
    ...             num_hidden_layers=2, num_attention_heads=4).head_dim
    16
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # None is only ever given, never found: __post_init__ fills it in.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    max_window_layers: int = 0

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {heads}; choose a divisor."
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = "
                    f"{heads}; give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embedding needs pairs.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read the content of a Hugging Face ``config.json`` (or of :meth:`to_dict`).

        Raises:
            NotImplementedError: if the file asks for mathematics that this decoder lacks.
        """
        kind = values.get("model_type", "llama")
        refused = {
            "model_type": kind not in ("llama", "mistral", "qwen2", "qwen3"),
            "hidden_act": values.get("hidden_act", "silu") != "silu",
            "mlp_bias": bool(values.get("mlp_bias")),
        }
        for name in (name for name, bad in refused.items() if bad):
            raise NotImplementedError(f"{name} = {values.get(name)!r} is not supported by Llama.")
        given = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        given.setdefault("tie_word_embeddings", False)  # Hugging Face's defaults
        given.setdefault("rms_norm_eps", 1e-6)
        bias = bool(values.get("attention_bias", kind == "qwen2"))
        given["attention_bias"] = bias
        given["output_bias"] = bool(values.get("output_bias", bias and kind != "qwen2"))
        given["qk_norm"] = bool(values.get("qk_norm", kind == "qwen3"))
        # transformers 5 keeps theta and the scaling together in ``rope_parameters``.
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        given["rope_scaling"] = _rope_scaling(rope)
        return cls(**given | _window(values, kind))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` and Hugging Face read back."""
        kind = "mistral" if self.sliding_window else "llama"
        if self.qk_norm:
            kind = "qwen3"
        elif self.attention_bias and not self.output_bias:
            kind = "qwen2"
        values = dataclasses.asdict(self) | {
            "model_type": kind,
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "use_sliding_window": self.sliding_window is not None,
        }
        if self.rope_scaling is not None:
            linear = self.rope_scaling.low_freq_factor is None
            found = {k: v for k, v in values["rope_scaling"].items() if v is not None}
            values["rope_scaling"] = found | {"rope_type": "linear" if linear else "llama3"}
        return values


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope["factor"])
    if kind != "llama3":
        raise NotImplementedError(f"rope_type = {kind!r} is not supported by Llama.")
    return RopeScaling(**{f.name: rope[f.name] for f in dataclasses.fields(RopeScaling)})


def _window(values: Mapping[str, Any], kind: str) -> dict[str, int | None]:
    """Return the size of the sliding window and the first layer that has it."""
    size = values.get("sliding_window")
    if not (size and values.get("use_sliding_window", kind == "mistral")):
        return {"sliding_window": None, "max_window_layers": 0}
    first = values.get("max_window_layers", 0) if kind != "mistral" else 0
    kinds = values.get("layer_types")
    if kinds:
        first = list(kinds).count("full_attention")
        if any(name != "sliding_attention" for name in kinds[first:]):
            raise NotImplementedError(f"layer_types = {kinds!r} is not supported by Llama.")
    return {"sliding_window": size, "max_window_layers": first}
