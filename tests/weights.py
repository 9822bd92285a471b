"""Decoders with random weights, without the seconds that compiling an initialisation takes."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.models import Llama, LlamaConfig


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """Every kind of weight (biases and norms too) away from its initial value."""
    random = np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = 0.3 * random.standard_normal(variable.shape) + (path[-1] == "scale")
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    nnx.update(model, nnx.from_flat_state(filled))
    return model
