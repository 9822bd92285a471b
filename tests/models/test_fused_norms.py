"""A decoder whose norms are the first step of its quantized layers: the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wush_jax as wush
from pallas_kernels.hopper import mosaic_gpu
from wush_jax.layers import linear, siblings
from wush_jax.layers.kernel_layout import pack_for_kernels
from wush_jax.layers.nnx import dense_layers
from wush_jax.layers.swap import swap
from wush_jax.models import Llama, LlamaConfig
from wush_jax.solvers.site import quantize_weight

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = np.random.default_rng(0).integers(64, size=(3, 4))
INPUTS = {"W4A16": None, "W4A4": wush.MXFP4, "W4A8": wush.FP8}
quantize = jax.jit(quantize_weight, static_argnums=2)


def decoder(dtype, inputs, factor=1, **changes):
    """A decoder, and it quantized, in the layout of kernels; its norms' weights are not all one."""
    sizes = {name: size * (factor if "size" in name else 1) for name, size in SIZES.items()}
    kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
    model = Llama(LlamaConfig(**(sizes | changes)), **kinds)
    for i, (_, norm) in enumerate(nnx.iter_modules(model)):
        if isinstance(norm, nnx.RMSNorm):
            drawn = jax.random.normal(jax.random.key(i), norm.scale.shape)
            norm.scale[...] = (1 + 0.1 * drawn).astype(dtype)
    layers, _ = dense_layers(model)
    recipe = wush.Recipe(solver="rtn", transform="identity", activation_format=inputs)
    inner = {path: dense for path, dense in layers.items() if path.startswith("layers.")}
    packed = {p: quantize(jnp.float32(d.weight), None, recipe) for p, d in inner.items()}
    quantized = swap(model, inner, packed)
    pack_for_kernels(quantized, force=True)
    return model, quantized


@pytest.fixture
def counted(monkeypatch):
    """How often a norm was the first step of layers, and which were gated, as on a Hopper GPU."""
    calls = []
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)

    def counting(*arguments, **options):
        calls.append(options.get("gated", False))
        return linear.normed_dot(*arguments, **options)

    monkeypatch.setattr(siblings, "normed_dot", counting)
    return calls


def steps(model):
    """Logits of a prompt and of one more token, float64."""

    @nnx.jit
    def run(model):
        lengths = jnp.full(3, 4, jnp.int32)
        first, cache = model.prefill(jnp.asarray(TOKENS), lengths, 8)
        return first, model.decode(jnp.asarray(TOKENS[:, 0]), cache)[0]

    return [np.asarray(logits, np.float64) for logits in run(model)]


def distance(one, other):
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(one, other, strict=True))


@pytest.mark.files
@pytest.mark.parametrize("inputs", [wush.MXFP4, wush.FP8], ids=lambda f: f.name)
def test_logits_agree_to_rounding(counted, inputs, monkeypatch):
    """In float32: few values are rounded to another code. In bfloat16 it is a GPU's test."""
    _, model = decoder(jnp.float32, inputs)
    fused = steps(model)
    assert counted == [False, True] * 2 * 2  # queries to values, gate and up; both layers and calls
    monkeypatch.setattr(siblings, "_fused", lambda *_: None)
    assert distance(fused, steps(model)) <= 1e-4


@pytest.mark.files
def test_norms_of_another_kind_are_called_as_they_are(counted):
    _, model = decoder(jnp.float32, wush.MXFP4, offset_norms=True)
    steps(model)
    assert counted == []


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_logits_of_bfloat16_agree_on_a_gpu(counted, inputs, monkeypatch):
    """To roundings of 2^-9; where these move codes, to less than half of what quantizing costs."""
    exact, model = decoder(jnp.bfloat16, inputs, 8)
    fused = steps(model)
    assert counted == [False, True] * 2 * 2
    monkeypatch.setattr(siblings, "_fused", lambda *_: None)
    unfused = steps(model)
    bound = 2.0**-6 if inputs is None else distance(unfused, steps(exact)) / 2
    assert distance(fused, unfused) <= bound
