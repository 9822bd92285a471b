"""A whole model in, a quantized model and a report out."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import Net, rows

import wush_jax as wush
from wush_jax.calibration import model
from wush_jax.calibration.site_plan import site_cost
from wush_jax.calibration.steps import alike, quantize_all
from wush_jax.layers.nnx import Packed, QuantizedDense, dense_layers
from wush_jax.solvers.site import quantize_site

pytestmark = pytest.mark.usefixtures("float32_matmuls")

RECIPE = wush.Recipe()
BATCHES = rows(2)
run = nnx.jit(lambda model, x: model(x))  # one compilation, not one for every operation


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture(scope="module")
def result(net):
    before = bits(nnx.state(net))
    quantized, report = wush.quantize_model(net, iter(BATCHES), RECIPE)
    assert bits(nnx.state(net)) == before
    assert type(net.left) is nnx.Linear
    return quantized, report


def test_layers_are_swapped_and_share_their_transform(net, result):
    quantized, _ = result
    kinds = {path: type(getattr(quantized, path)) for path in ("left", "right", "twice", "idle")}
    assert set(map(kinds.get, ("left", "right", "twice"))) == {QuantizedDense}
    assert kinds["idle"] is nnx.Linear
    assert quantized.left.transform is quantized.right.transform
    assert quantized.left.transform is not quantized.twice.transform
    state = nnx.state(quantized, Packed)
    assert [p for p in nnx.to_flat_state(state).paths if p[-1] == "transform"] == [
        ("left", "transform"),
        ("twice", "transform"),
    ]
    y, exact = run(quantized, BATCHES[0]), run(net, BATCHES[0])
    assert y.shape == exact.shape
    assert 0 < float(jnp.abs(y - exact).max()) < float(jnp.abs(exact).max())


def test_every_layer_gets_the_widest_block_that_divides_it(net):
    recipe = wush.Recipe(block_size="widest", format=wush.NVFP4)
    planned = wush.plan(net, recipe, BATCHES[0])
    blocks = {item.site.name: item.recipe.block for item in planned.sites}
    assert blocks == {"left": 64, "twice": 32}
    assert {row.path: row.block for row in planned.report.layers} == {
        "left": 64,
        "right": 64,
        "twice": 32,
    }


def test_codes_are_those_of_quantizing_the_site_by_itself(net, result):
    layers, _ = dense_layers(net)
    moment = wush.second_moment(jnp.tanh(jnp.concatenate(BATCHES)), 32)
    weights = [layers[path].weight for path in ("left", "right")]
    expected = quantize_site(weights, moment, RECIPE)
    for path, packed in zip(("left", "right"), expected, strict=True):
        found = getattr(result[0], path).packed
        # The moments differ by float32 rounding: half a bit of bfloat16 in the transform at most,
        # and by that a code here and there.
        difference = np.asarray(found.transform, "f4") - np.asarray(packed.transform, "f4")
        assert (
            np.abs(difference).max() <= 2.0**-8 * np.abs(np.asarray(packed.transform, "f4")).max()
        )
        assert np.mean(np.asarray(found.weight.codes != packed.weight.codes)) < 0.01


def test_report_counts_the_bytes_and_losses_of_the_model(net, result):
    quantized, report = result
    packed = bits(nnx.state(quantized, Packed))
    assert report.bytes_after == sum(map(len, packed))
    planned = wush.plan(net, RECIPE, BATCHES[0]).report
    assert report.bytes_after == planned.bytes_after
    layers = {layer.path: layer for layer in report.layers}
    assert list(layers) == ["left", "right", "twice"]
    weight = dense_layers(net)[0]["left"].weight
    loss = jax.jit(wush.layer_loss)(weight, jnp.tanh(BATCHES[0]), quantized.left.packed)
    assert layers["left"].loss == pytest.approx(float(loss), rel=1e-4)  # two orders of summation
    power = float(jnp.mean((jnp.tanh(BATCHES[0]) @ weight.T) ** 2))
    assert layers["left"].relative_loss == pytest.approx(float(loss) / power, rel=1e-4)
    assert layers["right"].site == "left"
    assert 0 < layers["left"].predicted_gain == layers["right"].predicted_gain < 1
    assert report.skipped == {"idle": "not reached by the call"}


def test_transforms_of_ones_own(net):
    recipe = RECIPE.replace(share_transform=False)
    rules = [("left|right", recipe), ("twice", recipe.replace(transform="identity"))]
    quantized, report = wush.quantize_model(net, BATCHES, rules)
    left, right = quantized.left.transform, quantized.right.transform
    assert left is not right
    assert float(jnp.abs(left[...] - right[...]).max()) > 0
    assert quantized.twice.transform is None
    assert report.bytes_after == sum(map(len, bits(nnx.state(quantized, Packed))))


def test_a_dead_input_is_no_trouble(net):
    """Nothing comes in, nothing is lost; the report stays within JSON."""
    recipe = RECIPE.replace(transform="hadamard", damping=0.0)
    quantized, report = wush.quantize_model(net, [0 * BATCHES[0]], recipe)
    assert [layer.relative_loss for layer in report.layers] == [0, 0, 0]
    assert bool(jnp.isfinite(run(quantized, BATCHES[0])).all())


def test_a_gain_that_does_not_exist_is_none(net):
    """One token, no damping: nothing that a Hadamard matrix minds."""
    recipe = RECIPE.replace(transform="hadamard", damping=0.0)
    _, report = wush.quantize_model(net, [BATCHES[0][:1]], recipe)
    assert [layer.predicted_gain for layer in report.layers] == [None, None, None]
    assert min(layer.relative_loss for layer in report.layers) > 0


class Seen(list):
    """A progress callback that keeps what it is told, and what steps cost."""

    def __call__(self, *step):
        self.append(step)

    def weigh(self, costs):
        self.costs = list(costs)


@pytest.mark.parametrize("known", ["plan", "batches", "calibration"])
def test_progress_in_one_shot_goes_by_cost(known, net, monkeypatch):
    (one,) = rows(1)
    recipe, batches = wush.Recipe(), [one, jnp.concatenate([one, one])]
    planned = wush.plan(net, recipe, batches[0])
    seen, given = Seen(), {"plan": batches, "batches": iter(batches)}
    given["calibration"] = wush.calibrate(net, batches, recipe) if known == "calibration" else None
    options = {"planned": planned} if known == "plan" else {}
    with monkeypatch.context() as patched:
        if known == "plan":  # nothing is planned twice
            patched.setattr(model, "plan", None)
        wush.quantize_model(net, given[known], recipe, progress=seen, **options)
    first = 0 if known == "calibration" else 2
    names = [item.site.name for some in alike(planned.sites, dense_layers(net)[0]) for item in some]
    assert [what for *_, what in seen] == ["calibrate"] * first + names
    assert [done for done, *_ in seen] == list(range(1, first + len(names) + 1))
    assert {total for _, total, _ in seen[first if known == "batches" else 0 :]} == {len(seen)}
    assert len(seen.costs) == len(seen)
    assert min(seen.costs) > 0
    if known == "plan":  # twice the rows, twice the operations
        assert seen.costs[1] == 2 * seen.costs[0]
    layers, _ = dense_layers(net)
    solved = {item.site.name: site_cost(item, layers).solver_flops for item in planned.sites}
    assert seen.costs[first:] == [solved[name] for name in names]


def test_no_batches(net):
    with pytest.raises(ValueError, match="batches is empty"):
        wush.quantize_model(net, [], RECIPE)


@pytest.fixture(scope="module")
def mesh(eight_devices):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_sharded_batches_and_weights_give_the_same(net, result, mesh):
    """Rows over four devices, outputs over two: the compiler's sums come in another order."""

    def place(path, leaf):
        spec = PartitionSpec(None, "model") if path[-1] == "kernel" else PartitionSpec()
        return leaf.replace(jax.device_put(leaf.get_value(), NamedSharding(mesh, spec)))

    sharded = nnx.clone(net)
    flat = nnx.to_flat_state(nnx.state(sharded))
    nnx.update(sharded, nnx.from_flat_state([(path, place(path, leaf)) for path, leaf in flat]))
    rows_sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = [jax.device_put(b, rows_sharding) for b in BATCHES]
    quantized, report = wush.quantize_model(sharded, batches, [("left|right", RECIPE)])
    for path in ("left", "right"):
        found, expected = getattr(quantized, path), getattr(result[0], path)
        # as above: moments agree to float32 rounding, codes but for a few at a boundary
        assert np.mean(np.asarray(found.codes[...] != expected.codes[...])) < 0.01
    for found, expected in zip(report.layers, result[1].layers[:2], strict=True):
        assert found.predicted_gain == pytest.approx(expected.predicted_gain, rel=1e-4)
        assert found.relative_loss == pytest.approx(expected.relative_loss, rel=0.05)


class Two(nnx.Module):
    """Layers that ask for the sharding of their outputs, as explicit axes want it."""

    def __init__(self):
        self.up = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(64, 32, rngs=nnx.Rngs(1))

    def __call__(self, x, spec=None):
        return self.down(jnp.tanh(self.up(x, out_sharding=spec)))


@pytest.mark.parametrize("entered", [True, False], ids=["set_mesh", "no context"])
def test_explicit_mesh_axes(eight_devices, entered):
    """Rows over the devices; the codes are those of one device."""
    recipe = wush.Recipe(wush.INT8, transform="identity", solver="rtn")
    x = np.random.default_rng(0).standard_normal((16, 3, 32)).astype(np.float32)
    alone, _ = wush.quantize_model(Two(), [x], recipe)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    # outside of the mesh's context jax takes no spec alone
    spec = NamedSharding(mesh, PartitionSpec("data"))
    spec = spec.spec if entered else spec
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        quantized, report = wush.quantize_model(Two(), [rows], recipe, call=lambda m, x: m(x, spec))
        y = nnx.jit(lambda m, x: m(x, spec))(quantized, rows)
        assert jax.typeof(y).sharding.spec == PartitionSpec("data", None, None)
    assert [row.path for row in report.layers] == ["up", "down"]
    np.testing.assert_array_equal(quantized.up.codes[...], alone.up.codes[...])
    # float32 products in another order
    np.testing.assert_allclose(y, alone(x), atol=1e-5)


def test_sites_alike_are_solved_together():
    """As one by one, but for values in the middle between two; what differs in shape is apart."""
    sizes = ((32, 32), (32, 32), (32, 32), (32, 64))
    model = nnx.List([nnx.Linear(*size, rngs=nnx.Rngs(i)) for i, size in enumerate(sizes)])

    def call(model, x):
        for layer in model:
            x = jnp.tanh(layer(x))
        return x

    batch = jax.random.normal(jax.random.key(0), (64, 32))
    known = wush.calibrate(model, [batch], RECIPE, call=call)
    planned = wush.plan(model, RECIPE, known, call=call)
    layers, _ = dense_layers(model)
    asked = []

    def two(item):
        asked.append(item.site.name)
        return 2

    together = quantize_all(planned.sites, layers, known.of, two)
    alone = quantize_all(planned.sites, layers, known.of)
    assert asked == ["0", "3"]
    assert together.keys() == alone.keys() == set("0123")
    for path, packed in alone.items():
        assert np.mean(np.asarray(packed.weight.codes != together[path].weight.codes)) < 0.01
