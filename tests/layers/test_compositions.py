"""Layers in random compositions of transformations: nothing changes, every row is seen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from wush_jax.calibration.observe import collect_moments, observe_calls
from wush_jax.layers.dense import dense_layers
from wush_jax.layers.interpreter import Interpreter
from wush_jax.layers.tagged_run import tagged_program

K, LAYERS, TIMES = 4, 2, 2

# A composition is ("layer", i), ("then", one, two) or (name of a way, one).


def repeated(f, x):
    return lax.fori_loop(0, TIMES, lambda _, x: f(x), x)


def while_repeated(f, x):
    return lax.while_loop(lambda s: s[0] < TIMES, lambda s: (s[0] + 1, f(s[1])), (0, x))[1]


def scan_repeated(f, x):
    return lax.scan(lambda x, _: (f(x), None), x, None, length=TIMES)[0]


def branch(f, x):
    return lax.cond(jnp.sum(x) > -1e9, f, lambda x: x, x)


def switched(f, x):
    return lax.switch(jnp.int32(1), (lambda x: x, f), x)


def rows_in_turn(f, x):
    return lax.map(f, x)


def sharded(f, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)(x)


ONCE = {
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "last axis but one": lambda f, x: jax.vmap(f, in_axes=-2, out_axes=-2)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "derivative": lambda f, x: jax.vjp(f, x)[0],
    "cond": branch,
    "switch": switched,
    "map": rows_in_turn,
}
AGAIN = {"fori": repeated, "while": while_repeated, "scan": scan_repeated}
SPREAD = {"shard_map": sharded}
WAYS = ONCE | AGAIN | SPREAD
# These take an axis away from what is inside.
NARROWER = ("vmap", "last axis but one", "map")

compositions = st.recursive(
    st.tuples(st.just("layer"), st.integers(0, LAYERS - 1)),
    lambda inner: (
        st.tuples(st.just("then"), inner, inner)
        | st.tuples(st.sampled_from([*ONCE, *AGAIN]), inner)
    ),
    max_leaves=3,
)


def run(composition, layers, x):
    """In jax; ways that need an axis do nothing where there is none left."""
    name, *inner = composition
    if name == "layer":
        return jnp.tanh(layers[inner[0]](x))
    if name == "then":
        return run(inner[1], layers, run(inner[0], layers, x))
    body = partial(run, inner[0], layers)
    return body(x) if name in NARROWER and x.ndim < 2 else WAYS[name](body, x)


def rows(composition, kernels, x, seen):
    """The same in numpy on rows (R, K); notes what each layer sees."""
    name, *inner = composition
    if name == "layer":
        seen[inner[0]].append(x)
        return np.tanh(x @ kernels[inner[0]])
    if name == "then":
        return rows(inner[1], kernels, rows(inner[0], kernels, x, seen), seen)
    for _ in range(TIMES if name in AGAIN else 1):
        x = rows(inner[0], kernels, x, seen)
    return x


class Model(nnx.Module):
    def __init__(self, composition):
        self.composition = composition
        layers = [nnx.Linear(K, K, use_bias=False, rngs=nnx.Rngs(i)) for i in range(LAYERS)]
        self.layers = nnx.List(layers)

    def __call__(self, x):
        return run(self.composition, self.layers, x)


def check(composition):
    model = Model(composition)
    x = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)

    # Compiled with and without the interpreter: the same equations, so the same bits.
    layers = dense_layers(model)[0]
    outputs = []

    class Listening(Interpreter):
        def run(self, body, values, seen):
            out, seen = super().run(body, values, seen)
            outputs.append(out)
            return out, seen

    tagged_program(model, x, lambda m, x: m(x), layers)(Listening(lambda call, seen: seen), {})
    graph, state = nnx.split(model)
    program = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, x)
    want = jax.core.eval_jaxpr(program.jaxpr, program.consts, *jax.tree.leaves(state), x)
    np.testing.assert_array_equal(outputs[-1][0].array, want[0])

    kernels = [np.asarray(layer.kernel[...], np.float64) for layer in model.layers]
    seen = {i: [] for i in range(LAYERS)}
    rows(composition, kernels, x.astype(np.float64).reshape(-1, K), seen)
    sites = observe_calls(model, x).sites
    assert {s.layers[0] for s in sites for _ in s.layers} <= {f"layers.{i}" for i in range(LAYERS)}
    moments = collect_moments(model, [x], dict.fromkeys(sites))
    found = {path: moments[site] for site in sites for path in site.layers}
    assert set(found) == {f"layers.{i}" for i in range(LAYERS) if seen[i]}
    for path, moment in found.items():
        flat = np.concatenate(seen[int(path[-1])])
        assert int(moment.count) == len(flat)
        # float32 sums of few rows
        np.testing.assert_allclose(moment.mean, flat.T @ flat / len(flat), atol=2e-6)


@given(compositions)
@settings(max_examples=12)
def test_an_observed_model_computes_what_the_model_does(composition):
    check(composition)


def test_rows_on_every_device_are_seen(eight_devices):
    check(("shard_map", ("then", ("vmap", ("layer", 0)), ("fori", ("layer", 1)))))
