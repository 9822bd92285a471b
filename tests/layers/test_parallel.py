"""Packed weights on a mesh: the same codes, outputs within float32 sums, one psum or none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from weights import normal

import wush_jax as wush
from pallas_kernels.hopper import mosaic_gpu
from wush_jax.formats import QuantizedArray
from wush_jax.formats.partition import Partition, partition_of
from wush_jax.layers import call_gated, call_together, dense_layers, pack_for_kernels
from wush_jax.layers.nnx import QuantizedDense
from wush_jax.layers.parallel import check_parts, partitioned_dot

eight = pytest.mark.usefixtures("eight_devices")

N, K = 256, 512
RECIPES = {
    "MXFP4": wush.Recipe(transform="wush"),
    "shared": wush.Recipe(transform="hadamard", format=wush.NVFP4, activation_format=None),
    "INT4": wush.Recipe(transform="identity", format=wush.INT4),
}


def mesh_of(*sizes, names=("model",)):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def quantized(recipe, seed=0):
    return wush.quantize_weight(normal(seed, (N, K)), jnp.eye(K), recipe)


def divided(packed, partition):
    """The weight with its codes on the mesh."""
    put = {n: jax.device_put(getattr(packed.weight, n), partition.sharding()) for n in PARTS}
    weight = replace(packed.weight, **put)
    return replace(packed, weight=weight, partition=partition)


PARTS = ("codes", "scales")


@eight
@pytest.mark.parametrize("split", ["rows", "columns"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_equal_to_one_device(recipe, parts, split):
    packed, x = quantized(recipe), normal(1, (3, K))
    partition = Partition(mesh_of(parts), "model", split)
    dot = jax.jit(lambda x, p: wush.quantized_dot(x, p, implementation="reference"))
    there = divided(packed, partition)
    found, expected = dot(x, there), dot(x, packed)
    size = np.abs(np.asarray(expected)).max()
    # The same products, summed in another order: float32 over 512 terms.
    np.testing.assert_allclose(found, expected, atol=2e-6 * size)
    text = dot.lower(x, there).compile().as_text()
    assert ("all-reduce" in text) == (split == "columns")
    assert "all-gather" not in text


@eight
def test_tokens_are_divided_over_a_data_axis():
    packed, x = quantized(RECIPES["MXFP4"]), normal(1, (4, 2, K))
    mesh = mesh_of(2, 2, names=("data", "model"))
    partition = Partition(mesh, "model", "rows", "data")
    x_there = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    dot = jax.jit(lambda x, p: wush.quantized_dot(x, p, implementation="reference"))
    found = dot(x_there, divided(packed, partition))
    assert found.sharding.spec == PartitionSpec("data", None, "model")
    np.testing.assert_allclose(found, dot(x, packed), atol=1e-4)


@eight
def test_gradients_pass_straight_through():
    packed, x = quantized(RECIPES["MXFP4"]), normal(1, (3, K))
    there = divided(packed, Partition(mesh_of(4), "model", "columns"))
    slope = jax.grad(lambda x, p: jnp.sum(wush.quantized_dot(x, p) ** 2))
    expected = slope(x, packed)
    np.testing.assert_allclose(slope(x, there), expected, atol=1e-4 * jnp.abs(expected).max())


class Pair(nnx.Module):
    """A gated layer and the way back."""

    def __init__(self):
        keys = iter(range(3))
        self.gate, self.up = (nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(i)) for i in (0, 1))
        self.down = nnx.Linear(N, K, rngs=nnx.Rngs(next(keys) + 2))

    def __call__(self, x):
        return self.down(call_gated(self.gate, self.up, x))


def place(model, mesh):
    """Gate and up by rows, down by columns."""
    for name, axes in (("gate", ("model",)), ("up", ("model",)), ("down", (None, "model"))):
        layer = getattr(model, name)
        for part in PARTS:
            variable = getattr(layer, part)
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            variable.set_value(jax.device_put(variable.get_value(), sharding))


@eight
def test_layers_keep_records_on_a_mesh():
    model, x = Pair(), normal(1, (5, K))
    one, _ = wush.quantize_model(model, [x], wush.Recipe(), implementation="reference")
    two, _ = wush.quantize_model(model, [x], wush.Recipe(), implementation="reference")
    place(two, mesh_of(2))
    pack_for_kernels(one, force=True)
    gained = pack_for_kernels(two, force=True)
    assert set(gained) == {"gate", "up", "down"}
    assert two.down.partition.by_columns
    assert not two.gate.partition.by_columns
    for name in ("gate", "up", "down"):  # bit for bit
        ours, theirs = (getattr(m, name).records[...] for m in (two, one))
        assert ours.sharding.spec == getattr(two, name).partition.spec()
        np.testing.assert_array_equal(ours, theirs)
    run = nnx.jit(lambda m, x: m(x))
    expected = run(one, x)
    np.testing.assert_allclose(run(two, x), expected, atol=1e-5 * jnp.abs(expected).max())
    both = nnx.jit(lambda m, x: call_together([m.gate, m.up], x))
    for ours, theirs in zip(both(two, x), both(one, x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@eight
def test_what_would_be_cut_is_named():
    packed = quantized(RECIPES["MXFP4"])
    mesh = mesh_of(8)
    with pytest.raises(ValueError, match=r"N=256 over 8 devices gives 32 each, no multiple of 64"):
        check_parts(packed, Partition(mesh, "model", "rows"), 64)
    with pytest.raises(ValueError, match=r"K=512 over 8 devices gives 64 each, no multiple of 128"):
        check_parts(packed, Partition(mesh, "model", "columns"), 64, 128)
    with pytest.raises(ValueError, match="'rows' is none of the mesh's axes"):
        Partition(mesh, "rows", "rows")
    derived = wush.NVFP4.replace(global_scale=None)
    loose = replace(packed, input_format=derived)
    with pytest.raises(NotImplementedError, match="calibrate a static one"):
        check_parts(loose, Partition(mesh_of(2), "model", "columns"))
    there = [
        divided(packed, Partition(mesh_of(2), "model", split)) for split in ("rows", "columns")
    ]
    with pytest.raises(ValueError, match="weights of one site lie as"):
        partitioned_dot(normal(1, (2, K)), tuple(there))
    with pytest.raises(NotImplementedError, match="sums come before silu"):
        partitioned_dot(normal(1, (2, K)), (there[1], there[1]), gated=True)


@eight
def test_a_layer_that_does_not_divide_stays_with_the_compiler():
    dense = dense_layers(nnx.Linear(K, 96, rngs=nnx.Rngs(0)))[0][""]
    packed = wush.quantize_weight(dense.weight, jnp.eye(K), wush.Recipe())
    layer = QuantizedDense(dense, packed)
    sharding = NamedSharding(mesh_of(2), PartitionSpec("model"))
    for part in PARTS:
        variable = getattr(layer, part)
        variable.set_value(jax.device_put(variable.get_value(), sharding))
    with pytest.warns(UserWarning, match="layer 0: no kernels on this mesh.*N=96 over 2 devices"):
        assert pack_for_kernels(nnx.List([layer]), force=True) == {}
    assert isinstance(layer.packed.weight, QuantizedArray)


@eight
def test_partitions_are_read_off_arrays():
    mesh = mesh_of(2, 2, names=("data", "model"))

    def found(*spec):
        return partition_of(
            jax.device_put(jnp.zeros((4, 4)), NamedSharding(mesh, PartitionSpec(*spec)))
        )

    assert found("model") == Partition(mesh, "model", "rows", "data")
    assert found(None, "model") == Partition(mesh, "model", "columns", "data")
    assert found() is found("data", "model") is found(("data", "model")) is None


def laid_out_pair(mesh, dtype=jnp.bfloat16):
    """The gated layer and the way back, in records on a mesh; and the same on one device."""
    model, x = Pair(), normal(1, (5, K)).astype(dtype)
    for layer in (model.gate, model.up, model.down):
        layer.dtype = dtype
    found = []
    for there in (None, mesh):
        packed, _ = wush.quantize_model(model, [x], wush.Recipe(), implementation="reference")
        if there is not None:
            place(packed, there)
        pack_for_kernels(packed, force=True)
        for layer in (packed.gate, packed.up, packed.down):
            layer.implementation = "mosaic_gpu"
        found.append(packed)
    return (*found, x)


@eight
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11")
def test_each_device_runs_the_kernels(monkeypatch):
    """Lowered for CUDA: three kernels before the one sum, as on one device."""
    monkeypatch.setattr(mosaic_gpu, "require_hopper", lambda: "NVIDIA H200")
    one, two, x = laid_out_pair(mesh_of(2))
    texts = []
    for model in (one, two):
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x))
        texts.append(run.trace(state, x).lower(lowering_platforms=("cuda",)).as_text())
    kernels = [text.count("custom_call @mosaic_gpu") for text in texts]
    assert kernels[0] == kernels[1] > 2
    assert [text.count("all_reduce") for text in texts] == [0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_two_gpus_compute_what_one_does(tokens):
    if jax.device_count() < 2:
        pytest.skip(f"needs two GPUs; there is {jax.device_count()}")
    one, two, _ = laid_out_pair(mesh_of(2))
    x = normal(2, (tokens, K)).astype(jnp.bfloat16)
    run = nnx.jit(lambda m, x: m(x))
    expected = np.asarray(run(one, x), np.float32)
    found = np.asarray(run(two, x), np.float32)
    # Rounded to bfloat16 after sums in another order, twice.
    np.testing.assert_allclose(found, expected, atol=2**-7 * np.abs(expected).max())
