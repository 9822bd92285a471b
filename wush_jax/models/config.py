"""Sizes and constants of a decoder, read from Hugging Face's ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from wush_jax.models.families import FAMILIES, FULL, SIZES, read_fields
from wush_jax.models.rope import RopeScaling

# What `LlamaConfig.to_dict` may write anew: all other keys of a source are kept as they are.
OWNED = (
    *("model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", "original_max_position_embeddings"),
    *{key for family in FAMILIES.values() for key in family.defaults},
    *("output_bias", "qk_norm", "layer_types", "max_window_layers", "use_sliding_window"),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder, under the names of Hugging Face's ``config.json``.

    ``attention_bias`` is the bias of the query, key and value projections (Qwen 2),
    ``output_bias`` that of the attention output; ``qk_norm`` normalises each query and key
    head (Qwen 3). Layers that ``layer_types`` calls "sliding_attention", or all of them without
    types, see ``sliding_window`` positions, their own the last (Mistral); None sees all.
    ``source`` is the text of the ``config.json`` that it was read from.

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
    layer_types: tuple[str, ...] | None = None
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        heads, faults = self.num_attention_heads, []
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if heads % self.num_key_value_heads:
            faults.append(
                f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {heads}; choose a divisor"
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                faults.append(
                    f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = "
                    f"{heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", max(self.hidden_size // heads, 1))
        if self.head_dim % 2 and not faults:
            faults.append(f"head_dim = {self.head_dim} is odd; rotary embedding needs pairs")
        if faults:
            raise ValueError(". ".join(faults) + ".")

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer sees; None for all."""
        full = self.layer_types is not None and self.layer_types[layer] == FULL
        return None if full else self.sliding_window

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """Read the content of a Hugging Face ``config.json`` (or of :meth:`to_dict`).

        Missing keys have the defaults of their family (`wush_jax.models.families`).

        Raises:
            ValueError: values that are missing, of a wrong kind or contradict each other.
            NotImplementedError: if the file asks for mathematics that this decoder lacks.
        """
        fields = read_fields(values)
        own = {k: v for k, v in values.items() if k != "quantization_config"}
        return cls(**fields, source=json.dumps(own))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` and Hugging Face read back.

        What was read is returned as it was; a config that was changed since has its own keys
        anew, and everything else of its source.
        """
        source = {} if self.source is None else json.loads(self.source)
        if source and LlamaConfig.from_dict(source) == self:
            return source
        kind = self._family()
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_scaling": None}
        if self.rope_scaling is not None:
            rope["rope_scaling"] = self.rope_scaling.to_dict()
        kept = {key: value for key, value in source.items() if key not in OWNED}
        names = (*SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
        architecture = {"architectures": [f"{kind.capitalize()}ForCausalLM"]}
        return {
            **kept,
            "model_type": kind,
            **({} if kind == "wush_llama" else architecture),
            **{name: getattr(self, name) for name in names},
            **rope,
            **FAMILIES[kind].written(self),
        }

    def _family(self) -> str:
        """Return the family of transformers that has this mathematics, or our own."""
        biases = self.attention_bias, self.output_bias
        if self.qk_norm:
            return "qwen3" if biases in ((False, False), (True, True)) else "wush_llama"
        if biases == (True, False):
            return "qwen2"
        if self.sliding_window is None:
            return "llama" if biases in ((False, False), (True, True)) else "wush_llama"
        plain = biases == (False, False) and self.layer_types is None
        return "mistral" if plain else "wush_llama"
