"""Flax models of transformers 4, which nobody wrote for us: BERT, GPT-2 with its own dense class.

Version 5 has none: run with ``pip install "transformers<5"``.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wush_jax as wush
from wush_jax.layers.linen import LINEN_TYPES, LinenModel
from wush_jax.layers.nnx import Contraction, Dense

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of a library that has ended
    pytest.mark.usefixtures("float32_matmuls"),
]

# Eight bits: what is wired wrongly is far off, what is rounded is not.
RTN = wush.Recipe(wush.INT8, solver="rtn")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(128, size=(2, 16)))
POSITIONS = jnp.broadcast_to(jnp.arange(16), (2, 16))


def import_flax(name):
    return pytest.importorskip(
        f"transformers.models.{name}.modeling_flax_{name}", exc_type=Exception
    )


def check(model, call, library, bound=0.01):
    quantized, report = wush.quantize_model(model, [TOKENS], RTN, call=call)
    run = nnx.jit(call)
    y, exact = run(quantized, TOKENS), run(model, TOKENS)
    np.testing.assert_allclose(exact, library(TOKENS)[0], atol=1e-4)  # float32, in another order
    assert 0 < float(jnp.mean((y - exact) ** 2) / jnp.var(exact)) < bound
    return report


def test_bert():
    flax_bert = import_flax("bert")
    config = flax_bert.BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=16,
        initializer_range=0.15,
    )
    bert = flax_bert.FlaxBertModel(config, input_shape=(2, 16))
    rest = (jnp.ones_like(TOKENS), jnp.zeros_like(TOKENS), POSITIONS, None)
    model = LinenModel(bert.module, {"params": bert.params}, TOKENS, *rest)
    report = check(model, lambda m, x: m(x, *rest)[0], bert)
    assert len(report.layers) == 2 * 6 + 1  # with the pooler
    sites = {layer.path: layer.site for layer in report.layers}
    attention = "encoder.layer.1.attention.self."
    assert sites[attention + "value"] == sites[attention + "key"] == attention + "query"
    assert "Embed is no registered" in report.skipped["embeddings.word_embeddings"]


def test_gpt2():
    flax_gpt2 = import_flax("gpt2")
    config = flax_gpt2.GPT2Config(
        vocab_size=128, n_positions=16, n_embd=64, n_layer=2, n_head=2, initializer_range=0.15
    )
    gpt2 = flax_gpt2.FlaxGPT2LMHeadModel(config, input_shape=(2, 16))

    def conv1d(module, params, x):  # its kernel is (N, K)
        kernel = params["kernel"].get_value()
        return Dense(
            Contraction("...k,nk->...n", kernel.shape), kernel, params["bias"], module.dtype
        )

    rest = (jnp.ones_like(TOKENS), POSITIONS)
    types = (*LINEN_TYPES, (flax_gpt2.FlaxConv1D, conv1d))
    model = LinenModel(gpt2.module, {"params": gpt2.params}, TOKENS, *rest, types=types)
    report = check(model, lambda m, x: m(x, *rest)[0], gpt2)
    assert [layer.shape for layer in report.layers[:4]] == [
        (192, 64),
        (64, 64),
        (256, 64),
        (64, 256),
    ]
