"""Sizes and constants of a decoder, read from Hugging Face's ``config.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from wush_jax.models.families import FAMILIES, SIZES, contradictions, read_fields
from wush_jax.models.family import FULL, SLIDING
from wush_jax.models.rope import RopeScaling

# What `LlamaConfig.to_dict` may write anew: all other keys of a source are kept as they are.
OWNED = (
    *("model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", "original_max_position_embeddings"),
    *{key for family in FAMILIES.values() for key in family.defaults},
    *("num_experts", "num_local_experts", "layer_types", "use_sliding_window"),
    *("rope_local_base_freq", "sliding_window_pattern"),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder, under the names of Hugging Face's ``config.json``.

    Fields beyond sizes switch pieces; `wush_jax.models.families` says which family has which.

    Attention: ``attention_bias`` is the bias of the query, key and value projections (Qwen 2),
    ``output_bias`` that of the attention output; ``qk_norm`` normalises each query and key head
    (Qwen 3). Logits are products times ``query_pre_attn_scalar ** -0.5`` (None: head_dim), bent by
    ``cap tanh(logits / cap)`` where ``attn_logit_softcapping`` is given (Gemma 2), and
    ``attention_sinks`` gives each head one more logit that takes weight from all (gpt-oss). Layers
    that ``layer_types`` calls "sliding_attention", or all of them without types, see
    ``sliding_window`` positions, their own the last (Mistral); None sees all. They turn by
    ``rope_local_base_freq``, unstretched, where it is given (Gemma 3).

    Norms and ends: ``offset_norms`` multiply by 1 + w, ``sandwich_norms`` stand behind attention
    and feed-forward, too, ``scaled_embeddings`` are times sqrt(hidden_size), final logits are bent
    by ``final_logit_softcapping`` (Gemma).

    Feed-forward: ``hidden_act``, ``mlp_bias``; with ``num_experts`` each token goes to the
    ``num_experts_per_tok`` that a router likes best, of width ``moe_intermediate_size`` (None:
    ``intermediate_size``), weighted by its probabilities (``norm_topk_prob``: summed to one), in
    every ``decoder_sparse_step``-th layer but ``mlp_only_layers``. ``swiglu_limit`` clips gate and
    up as gpt-oss does.

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
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_sinks: bool = False
    offset_norms: bool = False
    sandwich_norms: bool = False
    scaled_embeddings: bool = False
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        faults = contradictions(dataclasses.asdict(self))
        if faults:
            raise ValueError(". ".join(faults) + ".")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer sees; None for all."""
        full = self.layer_types is not None and self.layer_types[layer] == FULL
        return None if full else self.sliding_window

    @property
    def max_window_layers(self) -> int:
        """Number of layers before the first that sees a window."""
        seen = [self.window(i) is None for i in range(self.num_hidden_layers)]
        return seen.index(False) if False in seen else len(seen)

    def digest(self) -> str:
        """Return a hash of what is computed: of all fields but those that have their default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.compare}
        values = {n: v for n, d in defaults.items() if (v := getattr(self, n)) != d}
        return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]

    def rope(self, *, windowed: bool) -> tuple[float, RopeScaling | None]:
        """Return theta and its scaling, for a windowed layer or for another."""
        local = self.rope_local_base_freq if windowed else None
        return (self.rope_theta, self.rope_scaling) if local is None else (local, None)

    @property
    def expert_width(self) -> int:
        """Width of an expert's feed-forward layer."""
        width = self.moe_intermediate_size
        return self.intermediate_size if width is None else width

    def is_sparse(self, layer: int) -> bool:
        """Return whether a layer's feed-forward is a mixture of experts."""
        chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and chosen

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
        return self._written(self.family, source)

    def _written(self, kind: str, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return a dictionary of a family, and what of the source is not ours."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_scaling": None}
        if self.rope_scaling is not None:
            rope["rope_scaling"] = self.rope_scaling.to_dict()
        kept = {key: value for key, value in source.items() if key not in OWNED}
        names = (
            *SIZES,
            "num_hidden_layers",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
        words = kind.removesuffix("_text").split("_")
        architecture = {"architectures": ["".join(map(str.capitalize, words)) + "ForCausalLM"]}
        return {
            **kept,
            "model_type": kind,
            **({} if kind == "wush_llama" else architecture),
            **{name: getattr(self, name) for name in names},
            **rope,
            **FAMILIES[kind].written(self),
        }

    @property
    def family(self) -> str:
        """The family of transformers that has this mathematics, or our own."""
        for kind in FAMILIES:
            try:
                read = LlamaConfig(**read_fields(self._written(kind, {})))
            except (ValueError, NotImplementedError):
                continue
            if read._meaning == self._meaning:
                return kind
        return "wush_llama"

    @property
    def _meaning(self) -> LlamaConfig:
        """The config with each thing said in one way."""
        layers = range(self.num_hidden_layers)
        types = tuple(FULL if self.window(i) is None else SLIDING for i in layers)
        scalar, width = self.query_pre_attn_scalar, self.expert_width
        dense = not self.num_experts or not all(map(self.is_sparse, layers))
        return dataclasses.replace(
            self,
            layer_types=types,
            sliding_window=self.sliding_window if SLIDING in types else None,
            query_pre_attn_scalar=float(self.head_dim if scalar is None else scalar),
            moe_intermediate_size=width if self.num_experts else None,
            intermediate_size=self.intermediate_size if dense else width,
            num_experts_per_tok=self.num_experts_per_tok if self.num_experts else 2,
            rope_local_base_freq=self.rope_local_base_freq if SLIDING in types else None,
        )
