"""Weights of a :class:`Llama` under Hugging Face's names, and its safetensors folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from wush_jax.models.config import LlamaConfig
from wush_jax.models.llama import Llama


def tensor_name(path: tuple[Any, ...]) -> str:
    """Return Hugging Face's name of the variable at a path of :class:`Llama`.

    >>> tensor_name(("layers", 0, "mlp", "up_proj", "kernel"))
    'model.layers.0.mlp.up_proj.weight'
    """
    *modules, _ = path  # kernel, scale and embedding are all called weight there
    name = ".".join(map(str, [*modules, "bias" if path[-1] == "bias" else "weight"]))
    return name if name.startswith("lm_head.") else f"model.{name}"


def to_tensors(model: Llama) -> dict[str, np.ndarray]:
    """Return the weights under Hugging Face's names, dense ones turned to (out, in).

    >>> config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> to_tensors(Llama(config, rngs=nnx.Rngs(0)))["model.layers.0.mlp.up_proj.weight"].shape
    (32, 16)
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        value = value.T if path[-1] == "kernel" else value
        tensors[tensor_name(path)] = np.ascontiguousarray(value)
    return tensors


def from_tensors(
    config: LlamaConfig,
    tensors: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention_implementation: str | None = None,
) -> Llama:
    """Build a model from weights named and turned as in :func:`to_tensors`.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape than ``config`` implies.
    """
    kinds = {"dtype": dtype, "param_dtype": param_dtype}
    model = nnx.eval_shape(
        lambda: Llama(
            config, rngs=nnx.Rngs(0), attention_implementation=attention_implementation, **kinds
        )
    )
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = {path: tensor_name(path) for path, _ in state}
    if set(names.values()) != set(tensors):
        missing = sorted(set(names.values()) - set(tensors))
        extra = sorted(set(tensors) - set(names.values()))
        raise ValueError(
            f"tensors do not fit the config: missing {missing[:4]} ({len(missing)} in all), "
            f"left over {extra[:4]} ({len(extra)} in all); check layers, biases and tying."
        )
    filled = []
    for path, variable in state:
        value = jnp.asarray(tensors[names[path]], variable.dtype)
        value = value.T if path[-1] == "kernel" else value
        if value.shape != variable.shape:
            raise ValueError(
                f"tensors[{names[path]!r}] has shape {value.shape} where the config implies "
                f"{variable.shape} (input first); check the sizes in config."
            )
        filled.append((path, variable.replace(value)))
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def load_pretrained(
    folder: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> Llama:
    """Read a Hugging Face model folder: ``config.json`` and its ``*.safetensors`` files.

    Raises:
        ValueError: if the folder holds no safetensors file, or files that do not fit the config.
        NotImplementedError: if the config asks for mathematics that the decoder lacks.
    """
    folder = Path(folder)
    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"folder = {str(folder)!r} holds no .safetensors file; convert it first.")
    tensors: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="flax") as content:
            tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some files repeat the embedding
    return from_tensors(config, tensors, dtype=dtype, param_dtype=param_dtype)
