"""Models of a few thousand weights, for tests of whole models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.calibration.sequential import Stack
from wush_jax.layers.nnx import QuantizedDense
from wush_jax.models import LlamaConfig

# Every dense layer has K = 64: what quantizes one site is compiled for all.
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)

# For text: bytes are tokens. Tests that compare settings share its compiled functions.
BYTES = dataclasses.replace(CONFIG, vocab_size=256, num_hidden_layers=1)


def tokens(count, shape=(2, 16), seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(CONFIG.vocab_size, size=shape, dtype=np.int32) for _ in range(count)]


class Net(nnx.Module):
    """Two layers that share an input, one that is called twice, one that is not called."""

    def __init__(self, seed=0):
        options = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
        self.left = nnx.Linear(64, 32, **options)
        self.right = nnx.LinearGeneral(64, (2, 16), use_bias=False, **options)
        self.twice = nnx.Linear(32, 32, **options)
        self.idle = nnx.Linear(64, 32, **options)
        random = np.random.default_rng(seed)
        for layer in (self.left, self.right, self.twice, self.idle):
            layer.kernel[...] = jnp.float32(0.2 * random.standard_normal(layer.kernel.shape))

    def __call__(self, x):
        x = jnp.tanh(x)
        y = self.left(x) * self.right(x).reshape(*x.shape[:-1], 32)
        return self.twice(jnp.tanh(self.twice(y)))


def rows(count, shape=(40, 64), seed=0):
    """Correlated inputs of a `Net`."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((shape[-1], shape[-1])) / 8
    return [np.float32(random.standard_normal(shape) @ mixing) for _ in range(count)]


class Block(nnx.Module):
    """One of a stack: the second site sees what the first puts out."""

    def __init__(self, seed):
        options = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
        self.up, self.down = nnx.Linear(32, 32, **options), nnx.Linear(32, 32, **options)
        random = np.random.default_rng(seed)
        for layer in (self.up, self.down):
            layer.kernel[...] = np.float32(random.standard_normal((32, 32)) / 6)

    def __call__(self, x):
        return x + self.down(jax.nn.relu(self.up(x)))


class Blocks(nnx.Module):
    """A stack, random state, and a dense layer outside the stack."""

    def __init__(self, seed=0, count=3):
        self.layers = nnx.List([Block(seed + i) for i in range(count)])
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
        self.head = Block(seed + count).up

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x))


BLOCKS = Stack(embed=lambda model, x: x)


def codes(model):
    """The codes of every quantized layer, by path."""
    return {
        ".".join(map(str, path)): np.asarray(module.packed.interchange.codes)
        for path, module in nnx.iter_modules(model)
        if type(module) is QuantizedDense
    }
