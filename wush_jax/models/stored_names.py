"""Where Hugging Face's files keep the experts, which the decoder holds in stacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wush_jax.models.config import LlamaConfig


@dataclass(frozen=True)
class Stored:
    """One tensor of the decoder in the files.

    Attributes:
        names: of the tensors that are stacked to it, or of the one that it is, or is a part of.
        part: the first entry of the last axis that is its, and the step to the next: gate and up of
            gpt-oss take turns.
        turned: files hold (..., K, N) for (..., N, K).
    """

    names: tuple[str, ...]
    part: tuple[int, int] = (0, 1)
    turned: bool = False

    def shapes(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that each of the files' tensors has, for the decoder's."""
        shape = whole[1:] if len(self.names) > 1 else whole
        shape = (*shape[:-2], shape[-1], shape[-2]) if self.turned else shape
        return (*shape[:-1], shape[-1] * self.part[1])

    def gather(self, tensors: list[np.ndarray]) -> np.ndarray:
        """Return the decoder's tensor from those of the files."""
        value = tensors[0] if len(tensors) == 1 else np.stack(tensors)
        first, step = self.part
        value = value[..., first::step]
        return value.mT if self.turned else value


def stored_experts(config: LlamaConfig) -> dict[str, Stored]:
    """Return where a family's files keep the tensors of sparse layers, by the decoder's names.

    >>> config = LlamaConfig(11, 16, 32, 1, 2, num_experts=2, norm_topk_prob=True)
    >>> stored_experts(config)["model.layers.0.mlp.experts.up_proj.weight"].names[1]
    'model.layers.0.block_sparse_moe.experts.1.w3.weight'
    """
    kind = config.family
    found: dict[str, Stored] = {}
    for layer in filter(config.is_sparse, range(config.num_hidden_layers)):
        prefix = f"model.layers.{layer}"
        if kind == "gpt_oss":
            found.update(_interleaved(f"{prefix}.mlp.experts"))
        else:
            found.update(_one_by_one(config, prefix, kind))
    return found


def _one_by_one(config: LlamaConfig, prefix: str, kind: str) -> Iterator[tuple[str, Stored]]:
    """Yield the stacks of files that hold each expert's matrices by themselves."""
    mixtral = kind == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield f"{prefix}.mlp.router.weight", Stored((f"{prefix}.{block}.gate.weight",))
    for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
        numbers = range(config.num_experts)
        files = tuple(f"{prefix}.{block}.experts.{i}.{theirs}.weight" for i in numbers)
        yield f"{prefix}.mlp.experts.{ours}.weight", Stored(files)


def _interleaved(experts: str) -> Iterator[tuple[str, Stored]]:
    """Yield the parts of gpt-oss's stacks: gate and up in one, turned."""
    for name, theirs, part in (
        ("gate_proj", "gate_up_proj", (0, 2)),
        ("up_proj", "gate_up_proj", (1, 2)),
        ("down_proj", "down_proj", (0, 1)),
    ):
        yield f"{experts}.{name}.weight", Stored((f"{experts}.{theirs}",), part, turned=True)
        yield f"{experts}.{name}.bias", Stored((f"{experts}.{theirs}_bias",), part)
