"""Every public function, by name, under every transformation of JAX. A new name needs an entry."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import chex
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
EXPERTS = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PACKED)
SIZES = np.int32([ROWS - 3, 3])


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of arrays; which of the transformations make sense, and what it keeps."""

    call: Callable
    args: tuple
    vmap: bool = True
    grad: bool = False
    jvp: bool = True  # where there is a gradient: forward mode as well
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
    "calibrate_layer": Case(lambda x: wush.calibrate_layer(x, rows=4), (X,)),
    "Sample": Case(lambda x: wush.Sample.of(x).weights, (X,)),
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
    "quantized_dot": Case(
        reference(wush.quantized_dot), (X, PACKED), grad=True, jvp=False, keeps=True
    ),
    "quantized_ragged_dot": Case(
        reference(lambda x, p, **o: wush.quantized_ragged_dot(x, p, SIZES, **o)),
        (X, EXPERTS),
        grad=True,
        jvp=False,
    ),
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
FORMATS = {"MXFP4", "NVFP4", "INT4", "NVINT4", "INT8", "MXFP8", "FP8", "MXFP6"}
STATIC = {"Format", "Recipe", "FAST", "PAPER", "BEST", "BEST_WIDE"} | FORMATS
RESULTS = {"QuantizedArray", "PackedWeight"}  # what the cases above take and return
# Models and files; tested with them.
HOST = {
    "Calibration",
    "Sequential",
    "calibrate",
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


@functools.cache
def jitted(name):
    def call(*args):
        return CASES[name].call(*args)

    call.__name__ = name  # chex counts by source and name
    return jax.jit(chex.assert_max_traces(call, n=1))


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
    strided = jitted(name)(*jax.tree.map(out_of_order, case.args))
    jax.tree.map(np.testing.assert_array_equal, first, strided)
    assert not [leaf for leaf in jax.tree.leaves(first) if leaf.dtype in ("float64", "int64")]


def out_of_order(leaf):
    """The same numbers, every second of a numpy array's memory and backwards."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    leaf = np.asarray(leaf)
    return leaf[::-1].repeat(2, 0)[::-2] if leaf.ndim else leaf


def float64_outside_constructions(jaxpr):
    """Primitives with float64 results that are not casts and not inside a construction's jit."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        assert "callback" not in name
        if eqn.params.get("name") in CONSTRUCTIONS:
            continue
        if name != "convert_element_type":
            yield from (name for v in eqn.outvars if v.aval.dtype == np.float64)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from float64_outside_constructions(getattr(inner, "jaxpr", inner))


def is_jaxpr(x):
    return hasattr(x, "eqns")


# The jitted functions under `linalg.float64_construction`.
CONSTRUCTIONS = {"_construct", "_exact_sum", "_gain", "_loss", "inverse_transpose"}


@pytest.mark.parametrize("x64", [False, True])
@each
def test_float64_is_in_constructions_only(name, x64):
    """Of all intermediates; with the global switch on or off."""
    with jax.enable_x64(x64):
        jaxpr = jax.make_jaxpr(CASES[name].call)(*CASES[name].args).jaxpr
    assert not list(float64_outside_constructions(jaxpr))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.vmap])
def test_vmap_equals_one_at_a_time(name):
    case = CASES[name]
    rolled = jax.tree.map(lambda a: np.roll(a, 1, 0) if np.ndim(a) else a, case.args)
    both = jax.tree.map(lambda *a: np.stack([np.asarray(v) for v in a]), case.args, rolled)
    out = jax.jit(jax.vmap(case.call))(*both)
    check_close(jax.tree.map(lambda a: a[0], out), result(name))
    check_close(jax.tree.map(lambda a: a[1], out), jax.jit(case.call)(*rolled))


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.vmap])
def test_a_scan_of_rematerialised_steps_over_donated_buffers(name):
    case = CASES[name]
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), jax.device_put(case.args))

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(args):
        step = jax.checkpoint(case.call)
        return jax.lax.scan(lambda carry, a: (carry + 1, step(*a)), jnp.int32(0), args)

    count, out = scan(twice)
    assert int(count) == 2
    for i in (0, 1):
        check_close(jax.tree.map(lambda a, i=i: a[i], out), result(name))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.grad])
def test_gradients_are_finite_and_not_zero(name):
    """The same with rematerialisation; forward mode agrees with backward."""
    case = CASES[name]

    def power(x):
        leaves = jax.tree.leaves(case.call(x, *case.args[1:]))
        return sum(jnp.sum(leaf * leaf) for leaf in leaves)

    @jax.jit
    def derivatives(x, tangent):
        forward = jax.jvp(power, (x,), (tangent,))[1] if case.jvp else None
        return jax.grad(power)(x), jax.grad(jax.checkpoint(power))(x), forward

    tangent = np.roll(case.args[0], 1)
    gradient, again, forward = derivatives(case.args[0], tangent)
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient).any()
    terms = np.asarray(gradient, np.float64) * tangent
    # Sums of 512 float32 terms each way.
    np.testing.assert_allclose(again, gradient, atol=1e-5 * np.abs(gradient).max())
    if case.jvp:
        np.testing.assert_allclose(forward, terms.sum(), atol=1e-5 * np.abs(terms).sum())


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


# Functions of one moment a block: a device may have its own blocks.
BLOCKWISE = {"BlockTransform", "wush_transform", "predicted_gain", "predicted_loss"}


@pytest.mark.usefixtures("eight_devices")
@each
def test_shard_map(name):
    """A row each, a block each, or the same on every device where all rows are needed."""
    case, expected = CASES[name], result(name)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def specs(tree, axis="x"):
        return jax.tree.map(lambda a: PartitionSpec(*axis[: np.ndim(a)]), tree)

    split = len(case.args) if name in BLOCKWISE else int(case.keeps)
    ins = (*specs(case.args[:split]), *specs(case.args[split:], ""))
    outs = specs(expected, "x" if split else "")
    mapped = jax.shard_map(case.call, mesh=mesh, in_specs=ins, out_specs=outs)
    check_close(jax.jit(mapped)(*case.args), expected)


@each
def test_works_with_x64_on(name):
    """The same values and the same dtypes for float32 arguments; and no result is NaN."""
    expected = result(name)
    with jax.enable_x64(True), jax.debug_nans(True):
        out = jax.jit(CASES[name].call)(*CASES[name].args)
    check_close(out, expected)


def test_no_nan_on_the_way():
    """Step by step, where `jax.debug_nans` sees every intermediate; of a grid that has a NaN."""
    with jax.debug_nans(True):
        assert wush.fake_quantize(jnp.ones(32), wush.MXFP8).shape == (32,)


def test_constants_under_jit_are_checked_too():
    """An array that a jitted function closes over is no tracer, but what is computed of it is."""
    eye = jnp.eye(8)

    @jax.jit
    def run(x):
        packed = wush.quantize_weight(jnp.asarray(X), jnp.asarray(BLOCKS), RECIPE)
        pair = wush.wush_transform(eye, x)
        gain = wush.predicted_gain(eye, eye)
        q = wush.quantize(jnp.asarray(X), wush.MXFP4, global_scale=jnp.float32(3))
        return packed, pair, gain, q, wush.second_moment(eye)

    assert run(eye)[2] == 1
    bad = eye * jnp.nan
    with pytest.raises(ValueError, match=r"weight_moment .* non-finite"):
        jax.jit(lambda x: wush.wush_transform(bad, x)).lower(eye)
