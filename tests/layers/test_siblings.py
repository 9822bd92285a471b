"""Layers of one input: together as one by one, quantized once, multiplied by one kernel."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import two_programs
from flax import nnx

import wush_jax as wush
from pallas_kernels.hopper import mosaic_gpu
from wush_jax.layers.kernel_layout import pack_for_kernels
from wush_jax.layers.nnx import dense_layers
from wush_jax.layers.siblings import (
    call_gated,
    call_together,
    normed_gated,
    normed_together,
)
from wush_jax.layers.swap import swap
from wush_jax.solvers.site import quantize_site

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]

WIDTHS = (128, 64, 70)


def layers(width=64, **kinds):
    return nnx.List(
        [nnx.Linear(width, n, use_bias=n != 64, rngs=nnx.Rngs(n), **kinds) for n in WIDTHS]
    )


def quantized(recipe=None, *, share=True, width=64, **kinds):
    """Three layers of one site, or of three."""
    model = layers(width, **kinds)
    dense, _ = dense_layers(model)
    recipe = recipe or wush.Recipe(solver="rtn", transform="wush")
    moments = jnp.diag(jnp.repeat(jnp.array([2.0, 1.0]), width // 2))
    weights = [d.weight for d in dense.values()]
    sites = [weights] if share else [[w] for w in weights]
    packed = [p for site in sites for p in quantize_site(site, moments, recipe)]
    return swap(model, dense, dict(zip(dense, packed, strict=True)))


X = jnp.sin(jnp.arange(5.0 * 64)).reshape(5, 64)


def each(model, x):
    return [layer(x) for layer in model]


@pytest.mark.parametrize(
    "make",
    [
        layers,
        quantized,
        lambda: quantized(share=False),
        lambda: quantized(wush.Recipe(format=wush.NVFP4, solver="rtn", transform="identity")),
        lambda: quantized(wush.Recipe(format=wush.INT4, solver="rtn", transform="wush")),
        lambda: quantized(dtype=jnp.bfloat16),
    ],
    ids=["floats", "one site", "three sites", "NVFP4", "INT4", "bfloat16"],
)
def test_together_is_one_by_one(make):
    model = make()
    for x in (X, X.reshape(1, 5, 64)):
        found = nnx.jit(call_together)(model, x)
        for a, b in zip(found, nnx.jit(each)(model, x), strict=True):
            two_programs(a, b)


def test_gradients_are_those_of_the_sum():
    model = quantized()
    grads = [
        nnx.jit(nnx.grad(lambda x, m, run=run: sum(jnp.sum(y**2) for y in run(m, x))))(X, model)
        for run in (call_together, each)
    ]
    # Another order of three float32 sums.
    np.testing.assert_allclose(grads[0], grads[1], rtol=1e-5, atol=1e-5 * jnp.abs(grads[1]).max())


def plain(norm, model, x, residual):
    total = x + residual
    return each(model, norm(total)), total


def with_norm(share=True):
    """A norm and layers that are laid out for kernels."""
    model = quantized(share=share)
    pack_for_kernels(model, force=True)
    norm = nnx.RMSNorm(64, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.linspace(0.5, 1.5, 64)
    return norm, model


@pytest.fixture
def kernels(monkeypatch):
    """Layers ask as on a Hopper GPU; the definition answers."""
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)


@pytest.mark.usefixtures("kernels")
def test_a_norm_is_the_first_step_of_layers(monkeypatch):
    """Outputs, the sum, and gradients in all of it, of float32."""
    norm, model = with_norm()

    @partial(nnx.jit, static_argnums=0)
    def everything(run, norm, x, residual):
        def power(norm, x, residual):
            ys, total = run(norm, model, x, residual)
            return sum(jnp.sum(y**2) for y in ys) + jnp.sum(total**3), (ys, total)

        return nnx.grad(power, argnums=(0, 1, 2), has_aux=True)(norm, x, residual)

    found, wanted = (everything(run, norm, X, X[::-1]) for run in (normed_together, plain))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        # Some hundred roundings of 2^-24, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    jaxpr = str(jax.make_jaxpr(lambda x: normed_together(norm, model, x, x))(X))
    assert "name=_normed" in jaxpr
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: False)
    jaxpr = str(jax.make_jaxpr(lambda x: normed_together(norm, model, x, x))(X))
    assert "name=_normed" not in jaxpr
    assert float(normed_together(norm, model, X)[1][0, 1]) == float(X[0, 1])


@pytest.mark.usefixtures("kernels")
def test_other_norms_and_layers_are_called_as_they_are():
    norm, model = with_norm()
    other = nnx.RMSNorm(64, use_scale=False, rngs=nnx.Rngs(0))
    apart, codes = with_norm(share=False)[1], quantized()
    for case in ((other, model), (norm, apart), (norm, codes), (norm, layers())):
        found, wanted = (nnx.jit(run)(*case, X, X[::-1]) for run in (normed_together, plain))
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            two_programs(a, b)


@pytest.mark.usefixtures("kernels")
def test_a_gated_layer_with_a_norm():
    norm, (gate, _, _) = with_norm()
    run = nnx.jit(lambda norm, gate: normed_gated(norm, gate, gate, X, X[::-1]))
    y, total = run(norm, gate)
    wanted = nnx.jit(lambda norm, gate: call_gated(gate, gate, norm(X + X[::-1])))(norm, gate)
    two_programs(y, wanted)
    np.testing.assert_array_equal(total, X + X[::-1])


def test_adapters_read_the_input_too():
    """Each of a site's layers adds its own; they are not lost where the site is called together."""
    model = nnx.List([nnx.LoRALinear(64, n, lora_rank=2, rngs=nnx.Rngs(n)) for n in WIDTHS])
    for layer in model:
        layer.lora.lora_b[...] = jnp.ones_like(layer.lora.lora_b[...])
    dense, _ = dense_layers(model)
    moments, recipe = jnp.eye(64), wush.Recipe(solver="rtn", transform="hadamard")
    packed = quantize_site([d.weight for d in dense.values()], moments, recipe)
    model = swap(model, dense, dict(zip(dense, packed, strict=True)))
    assert all(layer.adapter is not None for layer in model)
    for a, b in zip(call_together(model, X), each(model, X), strict=True):
        two_programs(a, b)


def test_weights_of_another_width_are_refused():
    packed = quantized()[0].packed
    other = wush.quantize_weight(jnp.eye(32), None, wush.Recipe(transform="hadamard"))
    with pytest.raises(ValueError, match=r"K=32"):
        wush.quantized_dot(X, (packed, other))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11")
@pytest.mark.parametrize(("share", "kernels"), [(True, 2), (False, 5)])
def test_one_site_is_two_kernels(monkeypatch, share, kernels):
    """Three sites are three products, and two quantizers: one for each shape of weights.

    Of more than one step of 128 columns: the joint product splits K.
    """
    monkeypatch.setattr(mosaic_gpu, "require_hopper", lambda: "NVIDIA H200")
    model = quantized(share=share, width=256, dtype=jnp.bfloat16)
    pack_for_kernels(model, force=True)
    for layer in model:
        layer.implementation = "mosaic_gpu"
    graph, state = nnx.split(model)

    def run(state, x):
        return call_together(nnx.merge(graph, state), x)

    lowered = jax.jit(run).trace(state, jnp.ones((5, 256))).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels


def test_a_decoder_quantizes_a_site_once():
    """Attention and feed-forward ask for their layers together."""
    from wush_jax.models import Llama, LlamaConfig

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8).reshape(1, 8)
    recipe = dataclasses.replace(wush.Recipe(), solver="rtn")
    model, _ = wush.quantize_model(model, [tokens], recipe)
    traced = jax.make_jaxpr(lambda t: model(t))(tokens)
    assert [str(traced).count(f"name={name}") for name in ("_dot", "_gated")] == [3, 1]
