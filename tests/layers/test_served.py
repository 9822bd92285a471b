"""Which implementation a layer runs, and why not a faster one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

import wush_jax as wush
from pallas_kernels import dispatch
from wush_jax.layers.nnx import QuantizedDense, dense_layers
from wush_jax.layers.ragged_linear import RaggedLinear
from wush_jax.layers.served import served, served_line, served_plan, served_table

pytestmark = pytest.mark.files


def model(**options):
    dense = dense_layers(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))[0][""]
    packed = wush.quantize_weight(dense.weight, None, wush.Recipe(transform="hadamard"))
    return packed, nnx.List([QuantizedDense(dense, packed, **options) for _ in range(3)])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="what a CPU runs")
def test_a_cpu_runs_the_reference_and_says_why():
    packed, layers = model()
    (found,) = served(layers)
    assert (found.name, found.shape) == ("0-2", (32, 64))
    assert found.runs == dict.fromkeys((1, 16, 64, 1024), "reference")
    assert list(found.reasons) == ["mosaic_gpu"]
    assert "jax 0.11" in found.reasons["mosaic_gpu"] or "GPU" in found.reasons["mosaic_gpu"]
    line = served_line([found])
    assert "3 layers by reference" in line
    console = Console(width=200, record=True, quiet=False)
    console.print(served_table([found]))
    text = console.export_text()
    assert "1024 tokens" in text
    assert "not mosaic_gpu:" in text
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed)
    (planned,) = served_plan({f"layers.{i}.q": shapes for i in range(2)}, jnp.bfloat16)
    assert planned.name == "layers.0-1.q"
    assert planned.runs == found.runs


def test_a_forced_implementation_is_what_runs():
    _, layers = model(implementation="xla")
    (found,) = served(layers, (1,))
    assert found.runs == {1: "xla"}


def test_what_runs_is_what_the_call_runs():
    packed, _ = model()
    x = jnp.ones((4, 64), jnp.bfloat16)
    name, _ = dispatch.explain(x, packed)
    forced = wush.quantized_dot(x, packed, implementation=name)
    assert (wush.quantized_dot(x, packed) == forced).all()


def test_experts_are_asked_as_experts():
    layer = RaggedLinear(64, 32, experts=3, rngs=nnx.Rngs(0))
    dense = dense_layers(layer)[0][""]
    each = [wush.quantize_weight(w, None, wush.Recipe(transform="hadamard")) for w in dense.weight]
    packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    model = nnx.List([QuantizedDense(dense, packed)])
    (found,) = served(model, (16,))
    assert found.shape == (3, 32, 64)
    if jax.default_backend() != "gpu":
        assert found.runs == {16: "xla"}
        assert list(found.reasons) == ["mosaic_gpu"]
