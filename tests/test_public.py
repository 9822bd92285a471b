"""Every public function, by name, under every transformation of JAX. A new name needs an entry."""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
import wush_jax as wush

pytestmark = pytest.mark.usefixtures("strict")

ROWS, K, D = 8, 64, 32
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, K)).astype(np.float32)
MOMENTS = np.stack([oracle.random_moment(RNG, 8, 100) for _ in range(8)]).astype(np.float32)
OTHERS = np.stack([oracle.random_moment(RNG, 8, 100) for _ in range(8)]).astype(np.float32)
BLOCKS = np.stack([oracle.random_moment(RNG, D, 10) for _ in range(2)]).astype(np.float32)
HADAMARD = np.asarray(oracle.hadamard(D), np.float32)
RECIPE = wush.Recipe(transform="hadamard", solver="rtn")
Q = jax.jit(wush.quantize, static_argnums=1)(X, wush.MXFP4)
PACKED = wush.PackedWeight(Q, HADAMARD, None, wush.MXFP4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of arrays; which of the transformations make sense, and what it keeps."""

    call: Callable
    args: tuple
    vmap: bool = True
    grad: bool = False
    keeps: bool = False  # rows stay on their devices


def reference(op):
    return lambda *args: op(*args, implementation="reference")


CASES = {
    # numbers
    "quantize": Case(lambda x: wush.quantize(x, wush.MXFP4), (X,), keeps=True),
    "dequantize": Case(wush.dequantize, (Q,), keeps=True),
    "fake_quantize": Case(lambda x: wush.fake_quantize(x, wush.NVFP4), (X,), grad=True, keeps=True),
    # moments and transforms
    "second_moment": Case(lambda x: wush.second_moment(x, D), (X,), grad=True),
    "Moments": Case(lambda x: wush.Moments.init(K, D).update(x).finalize(), (X,), grad=True),
    "wush_transform": Case(wush.wush_transform, (MOMENTS, OTHERS)),
    "predicted_gain": Case(wush.predicted_gain, (MOMENTS, OTHERS)),
    "predicted_loss": Case(
        lambda w, x: wush.predicted_loss(w, x, wush.hadamard_transform(8)), (MOMENTS, OTHERS)
    ),
    "apply_transform": Case(wush.apply_transform, (X, HADAMARD), grad=True, keeps=True),
    "BlockTransform": Case(lambda t: wush.BlockTransform(t, t).astype(jnp.bfloat16), (MOMENTS,)),
    "identity_transform": Case(lambda: wush.identity_transform(4), (), vmap=False),
    "hadamard_transform": Case(lambda: wush.hadamard_transform(4), (), vmap=False),
    "hadamard_matrix": Case(lambda: wush.hadamard_matrix(12), (), vmap=False),
    "random_transform": Case(
        lambda k: wush.random_transform(k, 4), (jax.random.key(0),), vmap=False
    ),
    # layers
    "quantize_weight": Case(lambda w, m: wush.quantize_weight(w, m, RECIPE), (X, BLOCKS)),
    "quantized_dot": Case(reference(wush.quantized_dot), (X, PACKED), grad=True, keeps=True),
    "layer_loss": Case(wush.layer_loss, (X, X, PACKED)),
    # kernels
    "transform_quantize": Case(
        lambda x, t: pallas_kernels.transform_quantize(
            x, t, wush.MXFP4, implementation="reference"
        ),
        (X, HADAMARD),
        keeps=True,
    ),
    "quantized_matmul": Case(
        reference(pallas_kernels.quantized_matmul), (X, Q), grad=True, keeps=True
    ),
    "transform_quantize_matmul": Case(
        lambda x, t, q: pallas_kernels.transform_quantize_matmul(
            x, t, q, wush.MXFP4, implementation="reference"
        ),
        (X, HADAMARD, Q),
        keeps=True,
    ),
}
FORMATS = {"MXFP4", "NVFP4", "INT4", "INT8", "MXFP8", "MXFP6"}
STATIC = {"Format", "Recipe", "PAPER", "BEST", "BEST_WIDE"} | FORMATS
RESULTS = {"QuantizedArray", "PackedWeight"}  # what the cases above take and return
# Models and files; tested with them.
HOST = {
    "Sequential",
    "choose_recipes",
    "kl_divergence",
    "load",
    "perplexity",
    "plan",
    "quantize_model",
    "save",
}
each = pytest.mark.parametrize("name", CASES)


def public(package):
    return {n for n, v in vars(package).items() if n[0] != "_" and not inspect.ismodule(v)}


def test_every_public_name_has_an_entry():
    names = public(wush) | public(pallas_kernels)
    assert names - STATIC - RESULTS - HOST == set(CASES)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_are_static(name):
    fmt = getattr(wush, name)
    assert isinstance(fmt, wush.Format)
    assert fmt.name == name
    assert jax.tree.leaves(hash(fmt)) == [hash(fmt.replace())]


def check_close(got, expected):
    """Equal codes; values to the order of float32 sums of up to 64 terms."""

    def leaf(a, b):
        assert a.dtype == b.dtype
        if a.dtype in (jnp.uint8, jnp.float8_e8m0fnu):
            np.testing.assert_array_equal(a, b)
        else:
            a, b = (np.asarray(v, np.float64) for v in (a, b))
            np.testing.assert_allclose(a, b, atol=2e-6 * max(np.abs(b).max(), 1e-30))

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(leaf, got, expected)


TRACES = collections.Counter()


@functools.cache
def jitted(name):
    def counted(*args):
        TRACES[name] += 1
        return CASES[name].call(*args)

    return jax.jit(counted)


@functools.cache
def result(name):
    return jitted(name)(*jax.device_put(CASES[name].args))


@each
def test_jit_traces_once_transfers_nothing_and_stays_float32(name):
    case = CASES[name]
    args = jax.device_put(case.args)
    first = result(name)
    with jax.transfer_guard("disallow"):
        again = jitted(name)(*args)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert TRACES[name] == 1
    assert not [leaf for leaf in jax.tree.leaves(first) if leaf.dtype in ("float64", "int64")]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.vmap])
def test_vmap_equals_one_at_a_time(name):
    case = CASES[name]
    rolled = jax.tree.map(lambda a: np.roll(a, 1, 0) if np.ndim(a) else a, case.args)
    both = jax.tree.map(lambda *a: np.stack([np.asarray(v) for v in a]), case.args, rolled)
    out = jax.jit(jax.vmap(case.call))(*both)
    check_close(jax.tree.map(lambda a: a[0], out), result(name))
    check_close(jax.tree.map(lambda a: a[1], out), jax.jit(case.call)(*rolled))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.grad])
def test_gradients_are_finite_and_not_zero(name):
    case = CASES[name]

    def power(x):
        leaves = jax.tree.leaves(case.call(x, *case.args[1:]))
        return sum(jnp.sum(leaf * leaf) for leaf in leaves)

    gradient = jax.jit(jax.grad(power))(case.args[0])
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient).any()


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.keeps])
def test_rows_keep_their_devices(name):
    case = CASES[name]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    first = jax.tree.map(
        lambda a: jax.device_put(a, rows if np.ndim(a) else everywhere), case.args[0]
    )
    out = jax.jit(case.call)(first, *jax.device_put(case.args[1:], everywhere))
    check_close(out, result(name))
    for leaf in jax.tree.leaves(out):
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(rows, leaf.ndim)


@each
def test_works_with_x64_on(name):
    """The same values and the same dtypes for float32 arguments."""
    expected = result(name)
    with jax.enable_x64(True):
        out = jax.jit(CASES[name].call)(*CASES[name].args)
    check_close(out, expected)
