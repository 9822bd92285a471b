"""Random arrays and weights, without the seconds that compiling each of their shapes takes."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from wush_jax.models import Llama, LlamaConfig, to_tensors


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_weights(make: Callable[[], nnx.Module], seed: int = 0, size: float = 0.3) -> nnx.Module:
    """Every kind of weight (biases and norms too) away from its initial value."""
    random = np.random.default_rng(seed)
    model = nnx.eval_shape(make)
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = size * random.standard_normal(variable.shape) + (path[-1] == "scale")
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """A decoder of random weights."""
    return random_weights(lambda: Llama(config, rngs=nnx.Rngs(0)), seed)


def write_model(folder: Path, config: LlamaConfig) -> None:
    """Write a decoder of random weights, in bfloat16, into a folder that is there."""
    tensors = to_tensors(random_model(config))
    save_file({n: t.astype(jnp.bfloat16) for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
