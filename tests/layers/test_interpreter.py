"""Tagged inputs: nothing that is computed changes, and everything that flows in is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from wush_jax.calibration.observe import capture_rows, collect_moments, observe_calls
from wush_jax.calibration.observe import stacked as nnx_stacked
from wush_jax.layers.dense import dense_layers

K = 4


def linear(seed=0, **options):
    return nnx.Linear(K, K, use_bias=False, rngs=nnx.Rngs(seed), **options)


class Model(nnx.Module):
    """Layers called the way a function says."""

    def __init__(self, call, *layers):
        self.call, self.layers = call, nnx.List(layers)

    def __call__(self, x):
        return self.call(self.layers, x)


def stacked(length, axis=0):
    """A layer with the kernels of several, stacked along an axis."""
    layer = linear()
    kernels = [np.asarray(linear(i).kernel[...]) for i in range(length)]
    layer.kernel = nnx.Param(jnp.stack(kernels, axis))
    return layer


# Ways to call layers, each: (layers, x (B, T, K)) -> (B, T, K), and the same in plain numpy, which
# notes the rows that each kernel sees. A kernel is named by (layer, position in its stack).
def plain(layers, x):
    return layers[0](x)


def vmapped(layers, x):
    return jax.vmap(layers[0])(x)


def twice_mapped(layers, x):
    return jax.vmap(jax.vmap(layers[0]), in_axes=1, out_axes=1)(x)


def remat(layers, x):
    return jax.checkpoint(lambda x: layers[0](x))(x)


def compiled(layers, x):
    return nnx.jit(lambda m, x: m(x))(layers[0], x)


def looped(layers, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(layers[0](x)), x)


def while_looped(layers, x):
    return lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(layers[0](s[1]))), (0, x)
    )[1]


def branched(layers, x):
    return nnx.cond(x.sum() > -1e9, lambda m, x: m(x), lambda m, x: x, layers[0], x)


def scanned_shared(layers, x):
    step = nnx.scan(
        lambda x, m: jnp.tanh(m(x)), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3
    )
    return step(x, layers[0])


@jax.custom_vjp
def scaled(x):
    return x * 2.0


scaled.defvjp(lambda x: (x * 2.0, None), lambda _, g: (g * 2.0,))


def differentiated(layers, x):
    return jax.grad(lambda x: jnp.sum(scaled(layers[0](x)) ** 2))(x)


def hidden(layers, x):
    """In a copy that the model makes by itself."""
    graph, state = nnx.split(layers[0])
    return lax.map(lambda x: nnx.merge(graph, state)(x), x)


WAYS = (
    plain,
    vmapped,
    twice_mapped,
    remat,
    compiled,
    looped,
    while_looped,
    branched,
    scanned_shared,
    differentiated,
    hidden,
)


def tanh_rows(x, kernel, steps):
    """The inputs of a layer called again and again with tanh in between."""
    rows = []
    for _ in range(steps):
        rows.append(x)
        x = np.tanh(x @ kernel)
    return np.concatenate([r.reshape(-1, K) for r in rows])


STEPS = {"looped": 3, "while_looped": 2, "scanned_shared": 3}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_moments_are_of_every_row_in_every_loop(way):
    x = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)
    model = Model(way, linear())
    (site,) = observe_calls(model, x).sites
    moments = collect_moments(model, [x], {site: None})[site]
    kernel = np.asarray(model.layers[0].kernel[...], np.float64)
    rows = tanh_rows(x.astype(np.float64), kernel, STEPS.get(way.__name__, 1))
    assert int(moments.count) == len(rows)
    # float32 products of few rows
    np.testing.assert_allclose(moments.mean, rows.T @ rows / len(rows), atol=1e-6)
    found = capture_rows(model, x, dense_layers(model)[0])["layers.0"]
    first = rows[: x.shape[1]] if way is hidden else rows[: x.shape[0] * x.shape[1]]
    rows = np.sort(np.asarray(found).reshape(-1, K), 0)
    np.testing.assert_allclose(rows, np.sort(first, 0), atol=1e-6)


def over_stack(axis):
    def call(layers, x):
        graph, state = nnx.split(layers[0])
        step = lambda x, s: (jnp.tanh(nnx.merge(graph, s)(x)), None)  # noqa: E731
        return lax.scan(step, x, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), state))[0]

    return call


def nnx_scan(axis):
    def call(layers, x):
        step = nnx.scan(lambda x, m: jnp.tanh(m(x)), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
        return step(x, layers[0])

    return call


def indexed(axis):
    def call(layers, x):
        graph, state = nnx.split(layers[0])

        def step(i, x):
            own = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, axis, False), state)
            return jnp.tanh(nnx.merge(graph, own)(x))

        return lax.fori_loop(0, 3, step, x)

    return call


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("way", [over_stack, nnx_scan, indexed], ids=lambda way: way.__name__)
def test_layers_stacked_at_any_axis_have_moments_of_their_own(way, axis):
    x = np.random.default_rng(1).standard_normal((2, 3, K)).astype(np.float32)
    model = Model(way(axis), stacked(3, axis))
    found = observe_calls(model, x)
    assert found.stacks == {"layers.0": (axis,)}
    model = nnx_stacked(model, x)
    moments = collect_moments(model, [x], {found.sites[0]: None})[found.sites[0]]
    rows = x.astype(np.float64)
    for i in range(3):
        flat = rows.reshape(-1, K)
        np.testing.assert_allclose(moments.mean[i], flat.T @ flat / len(flat), atol=1e-6)
        kernel = np.take(np.asarray(model.layers[0].kernel[...], np.float64), i, axis)
        rows = np.tanh(rows @ kernel)
