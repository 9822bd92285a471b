"""Models of Google's tunix, which nobody wrote for us: their dense classes, remat and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo_models import decode, filled, tunix_module

import wush_jax as wush
from wush_jax.layers import expose_matrices
from wush_jax.layers.nnx import DENSE_TYPES, Contraction, Dense, QuantizedDense, replace_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("float32_matmuls"),
]

# Eight bits: what is wired wrongly is far off, what is rounded is not.
RTN = wush.Recipe(wush.INT8, solver="rtn")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(128, size=(2, 24)))
SIZES = {
    "num_layers": 2,
    "vocab_size": 128,
    "embed_dim": 64,
    "hidden_dim": 96,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}


run = nnx.jit(decode)


def tunix_types(module):
    """How to see its Einsum: the few lines that a user writes."""

    def view(layer):
        kernel = layer.w.get_value()
        dtype = getattr(layer, "dtype", None)
        return Dense(Contraction(layer.einsum_str, kernel.shape), kernel, None, dtype)

    return (*DENSE_TYPES, (module.Einsum, view))


def build(module, kind, **options):
    """A decoder with weights that are not zero, as some of tunix's are at first."""
    config = module.ModelConfig(**SIZES, **options)
    return filled(getattr(module, kind)(config, rngs=nnx.Rngs(0)))


def share_of_error(model, quantized):
    y, exact = run(quantized, TOKENS), run(model, TOKENS)
    return float(jnp.mean((y - exact) ** 2) / jnp.var(exact))


@pytest.mark.parametrize(("name", "kind"), [("llama3", "Llama3"), ("qwen3", "Qwen3")])
def test_decoders_with_an_einsum_class_of_their_own(name, kind):
    module = tunix_module(name)
    options = {} if name == "llama3" else {"dtype": jnp.float32, "param_dtype": jnp.float32}
    found = {}
    for remat in (module.RematConfig.NONE, module.RematConfig.BLOCK):
        model = build(module, kind, remat_config=remat, **options)
        types = tunix_types(module)
        quantized, report = wush.quantize_model(
            model, [TOKENS], RTN, call=decode, dense_types=types
        )
        sites = {}
        for layer in report.layers:
            sites.setdefault(layer.site, []).append(layer.path.removeprefix(layer.site[:9]))
        assert list(sites.values()) == [
            ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
            ["attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ] * 2 + [[""]]
        # its attention reads the shapes of its projections
        attention = quantized.layers[0].attn
        assert type(attention.q_proj) is QuantizedDense
        assert (attention.num_kv_heads, attention.head_dim) == (2, 16)
        assert "embedder" in report.skipped
        assert 0 < share_of_error(model, quantized) < 0.01
        found[remat] = quantized.layers[1].mlp.down_proj.codes[...]
    assert np.mean(np.asarray(found[module.RematConfig.NONE] != found[remat])) < 0.01


class Experts(nnx.Module):
    """A tunix MoE layer with its three bare parameters as modules: every expert sees all tokens."""

    def __init__(self, layer):
        self.router = layer.router
        self.chosen = layer.experts_per_tok

        def einsum(equation, kernel):
            make = nnx.eval_shape(lambda: nnx.Einsum(equation, kernel.shape, rngs=nnx.Rngs(0)))
            make.kernel = nnx.Param(kernel[...])
            return make

        self.gate = einsum("btd,edf->btef", layer.gate_proj)
        self.up = einsum("btd,edf->btef", layer.up_proj)
        self.down = einsum("btef,efd->bted", layer.down_proj)

    def __call__(self, x):
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.router(x), axis=-1), self.chosen)
        weights = weights / weights.sum(-1, keepdims=True)
        share = jnp.einsum("btke,btk->bte", jax.nn.one_hot(chosen, 4), weights)
        # what an expert does not see is no part of its moments
        hidden = jax.nn.silu(self.gate(x)) * self.up(x) * (share > 0)[..., None]
        return jnp.einsum("bted,bte->btd", self.down(hidden), share)


def test_experts_in_bare_parameters_are_named_and_can_be_rewritten():
    module = tunix_module("qwen3")
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = build(module, "Qwen3", num_experts=4, num_experts_per_tok=2, **kinds)
    options = {"call": decode, "dense_types": tunix_types(module)}
    planned = wush.plan(model, RTN, TOKENS, **options)
    reason = planned.report.skipped["layers.0.mlp"]
    assert reason.startswith("MoELayer is no registered dense layer; it holds ")
    assert "gate_proj (4, 64, 96)" in reason

    def rewrite(path, layer):
        return Experts(layer) if type(layer) is module.MoELayer else None

    rewritten = replace_modules(model, rewrite)
    exact = run(model, TOKENS)
    # float32, in another order: logits of a few units
    np.testing.assert_allclose(run(rewritten, TOKENS), exact, atol=2e-4)
    rules = [(r".*\.router", None), (".*", RTN)]
    quantized, report = wush.quantize_model(rewritten, [TOKENS], rules, **options)
    shapes = {la.path: la.shape for la in report.layers if la.path.startswith("layers.0.mlp")}
    assert shapes == {
        "layers.0.mlp.gate": (384, 64),
        "layers.0.mlp.up": (384, 64),
        "layers.0.mlp.down": (4, 64, 96),
    }
    assert 0 < share_of_error(model, quantized) < 0.01


def test_experts_in_bare_parameters_become_layers():
    module = tunix_module("qwen3")
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = build(module, "Qwen3", num_experts=4, num_experts_per_tok=2, **kinds)
    options = {"call": decode, "dense_types": tunix_types(module)}
    exposed = expose_matrices(model, TOKENS, **options)
    np.testing.assert_array_equal(run(exposed, TOKENS), run(model, TOKENS))
    rules = [(r".*\.router", None), (".*", RTN)]  # so that tokens reach the experts they did
    quantized, report = wush.quantize_model(exposed, [TOKENS], rules, **options)
    of_experts = {row.path for row in report.layers if row.path.startswith("layers.0.mlp")}
    assert of_experts == {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert 0 < share_of_error(model, quantized) < 0.01
