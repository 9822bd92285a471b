"""What is compiled ahead is what `quantize_weight` runs."""

import jax
import jax.numpy as jnp
import pytest

import wush_jax as wush
from wush_jax.solvers.ahead import compile_ahead

pytestmark = pytest.mark.once

SOLVERS = ("jit(_steps)", "jit(_arrive)", "jit(_move)")


def compiled(caplog, function):
    """Run a function and count the solvers' programs that it compiles."""
    caplog.clear()
    with jax.log_compiles():
        function()
    said = [record.getMessage() for record in caplog.records]
    return sum(any(name in line for name in SOLVERS) for line in said if "Compiling" in line)


@pytest.mark.parametrize(
    ("recipe", "programs"),
    [
        (wush.PAPER.replace(damping=0.02), 1),
        (wush.BEST.replace(format=wush.NVFP4, descent=1, refit=1, damping=0.02), 3),
        (wush.PAPER.replace(transform="hadamard", solver_dtype="float64", damping=0.02), 1),
        (wush.Recipe(), 0),
        (wush.PAPER.replace(input_error="model", interleave=False), 0),
    ],
    ids=["interleaved", "refitted", "float64", "rounded", "of the inputs' error"],
)
def test_nothing_is_left_to_compile(recipe, programs, caplog):
    # A shape of its own: what other tests have compiled is there already.
    weight = jax.random.normal(jax.random.key(0), (24, 96))
    moments = wush.calibrate_layer(jax.random.normal(jax.random.key(1), (200, 96)))
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    assert compiled(caplog, lambda: compile_ahead(shape, recipe)) == programs
    if programs:
        assert compiled(caplog, lambda: wush.quantize_weight(weight, moments, recipe)) == 0


def test_weights_of_the_layers_dtype(caplog):
    weight = jnp.ones((24, 32), jnp.bfloat16)
    compile_ahead(jax.ShapeDtypeStruct(weight.shape, weight.dtype), wush.PAPER)
    done = compiled(caplog, lambda: wush.quantize_weight(weight, jnp.eye(32), wush.PAPER))
    assert done == 0
