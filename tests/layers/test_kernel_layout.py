"""Layers in the layout of the matmul kernels: the same model, the same files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoint_tools import CONFIG, Pair, llama, pair
from comparison import two_programs
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import wush_jax as wush
from pallas_kernels.fragments import Fragments, lay_out
from pallas_kernels.hopper import mosaic_gpu
from wush_jax.checkpoints import interchange
from wush_jax.layers import finetune
from wush_jax.layers.kernel_layout import pack_for_kernels, unpack_from_kernels
from wush_jax.layers.nnx import QuantizedDense, dense_layers
from wush_jax.solvers.site import effective_weight

pytestmark = pytest.mark.usefixtures("float32_matmuls")

TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 5))
FORMATS = {fmt.name: fmt for fmt in (wush.MXFP4, wush.NVFP4, wush.INT4)}
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
X = np.float32(np.random.default_rng(1).standard_normal((6, 64)))


def layers(model):
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, QuantizedDense)]


def laid_out(model):
    """A copy whose layers hold records; the original is left alone."""
    copy = nnx.clone(model)
    gained = pack_for_kernels(copy, force=True)
    assert len(gained) == len(layers(copy))
    return copy


dequantize = jax.jit(wush.dequantize)
run = nnx.jit(lambda model, x: model(x))
first = nnx.jit(lambda model, x: model[0](x))


@nnx.jit
def outputs_and_gradient(model, tokens):
    """Logits, and the gradient of their power in what an optimizer trains."""

    def power(model):
        return jnp.sum(model(tokens).astype(jnp.float32) ** 2)

    return model(tokens), nnx.grad(power)(model)


@pytest.mark.files
def test_the_same_model():
    model = llama("mxfp4")
    twin = laid_out(model)
    for one, two in zip(layers(model), layers(twin), strict=True):
        assert one.records is None
        assert two.codes is two.scales is None
        assert isinstance(two.packed.weight, Fragments)
        assert two.packed.shape == one.packed.shape
        values = [dequantize(layer.packed.weight) for layer in (one, two)]
        np.testing.assert_array_equal(*values)
    (y, gradient), (other, found) = (outputs_and_gradient(m, TOKENS) for m in (model, twin))
    two_programs(other, y)
    assert np.asarray(y, np.float32).any()
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) > 5
    for a, b in zip(leaves, jax.tree.leaves(found), strict=True):
        two_programs(b, a)
    unpack_from_kernels(twin)
    assert nnx.graphdef(twin) == nnx.graphdef(model)


@pytest.fixture(scope="module")
def quantized():
    recipe = wush.Recipe(solver="rtn", transform="hadamard")
    return wush.quantize_model(tiny.Net(), tiny.rows(1), recipe)


def folder_bytes(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_the_same_files(quantized, tmp_path):
    """Byte by byte: quantizing writes no negative zeros, and these weights have no zero groups."""
    model, _ = quantized
    twin = laid_out(model)
    wush.save(tmp_path / "codes", model)
    wush.save(tmp_path / "records", twin)
    assert folder_bytes(tmp_path / "codes") == folder_bytes(tmp_path / "records")
    assert all(layer.codes is None for layer in layers(twin))  # saving changes nothing
    loaded = wush.load(tmp_path / "records", tiny.Net())
    np.testing.assert_array_equal(run(loaded, X), run(model, X))
    for source, name in ((model, "from_codes"), (twin, "from_records")):
        interchange.export(tmp_path / name, source, "fp_quant")
    assert folder_bytes(tmp_path / "from_codes") == folder_bytes(tmp_path / "from_records")


def test_random_codes_come_back_as_the_same_values(tmp_path):
    """With negative zeros, which records do not have."""
    twin = laid_out(pair())
    wush.save(tmp_path / "model", twin)
    loaded = wush.load(tmp_path / "model", Pair(nnx.Rngs(0)))
    for one, two in zip(layers(pair()), layers(loaded), strict=True):
        values = [dequantize(layer.packed.weight) for layer in (one, two)]
        np.testing.assert_array_equal(*values)


@each_format
def test_packed_weights_in_both_layouts(fmt):
    random = np.random.default_rng(2)
    weight = np.float32(random.standard_normal((24, 64)))
    packed = wush.quantize_weight(weight, None, wush.Recipe(fmt, transform="hadamard"))
    laid = dataclasses.replace(packed, weight=lay_out(packed.weight))
    assert laid.shape == packed.shape
    assert laid.nbytes - packed.nbytes == laid.weight.nbytes - packed.weight.nbytes > 0
    for a, b in zip(*map(jax.tree.leaves, (laid.interchange, packed.interchange)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    @jax.jit
    def everything(x, packed):
        dot = lambda x: wush.quantized_dot(x, packed, implementation="reference")  # noqa: E731
        y, pull = jax.vjp(dot, x)
        loss = wush.layer_loss(jnp.asarray(weight), x, packed)
        return y, pull(y), jax.vmap(dot)(x[:, None]), effective_weight(packed), loss

    for a, b in zip(
        *map(jax.tree.leaves, (everything(X, packed), everything(X, laid))), strict=True
    ):
        two_programs(b, a)
    zeros = jax.jit(jax.grad(lambda p: wush.quantized_dot(X, p).sum(), allow_int=True))(laid)
    for leaf in jax.tree.leaves(zeros):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf, np.float32).any()


def test_without_a_hopper_gpu_nothing_changes(quantized):
    if jax.default_backend() == "gpu":
        pytest.skip("it may change here")
    model, report = quantized
    assert pack_for_kernels(model) == {}
    assert all(layer.records is None for layer in layers(model))
    weights = 2 * 32 * 64 + 32 * 32
    # Codes and scales; a Hadamard matrix for each of two sites, a scalar for each of three layers.
    wanted = 4.25 + 8 * (2 * 2 * 32 * 32 + 3 * 4) / weights
    np.testing.assert_allclose(report.bits_per_weight, wanted, rtol=1e-12)


def test_what_has_no_records_keeps_its_codes(eight_devices):
    """A value that records lack, a stack, several devices, the host, another format."""
    recipe = wush.Recipe(solver="rtn", transform="identity")
    packed = wush.quantize_weight(jnp.eye(64), None, recipe)
    dense = dense_layers(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))[0][""]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    q = packed.weight
    far = np.asarray(q.scales).view(np.uint8).copy()
    far[0, 0], far[1, 1] = 100, 254
    kept = {
        "far": dataclasses.replace(
            q,
            codes=jnp.full_like(q.codes, 0x22),
            scales=jnp.asarray(far.view(q.scales.dtype)),
        ),
        "stack": jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), q),
        "sharded": dataclasses.replace(q, codes=jax.device_put(q.codes, rows)),
        "host": jax.device_get(q),
        "MXFP8": jax.jit(wush.quantize, static_argnums=1)(jnp.eye(64), wush.MXFP8),
    }
    model = nnx.List(
        [QuantizedDense(dense, dataclasses.replace(packed, weight=w)) for w in kept.values()]
    )
    with pytest.warns(UserWarning, match="layer 2: no kernels on this mesh.* N=64 over 8 devices"):
        assert pack_for_kernels(model, force=True) == {}
    model = nnx.List([QuantizedDense(dense, packed)])
    assert list(pack_for_kernels(model, force=True)) == ["0"]
    assert pack_for_kernels(model, force=True) == {}  # a second time


def test_fine_tuned_weights_leave_the_records(quantized):
    model, _ = quantized
    student = finetune.unpack(laid_out(model), tiny.Net())
    np.testing.assert_array_equal(run(finetune.pack(student), X), run(model, X))


# On a device that counts as a Hopper GPU: shapes alone, nothing runs --------------------------


@pytest.fixture
def hopper(monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU kernels need jax 0.11")
    monkeypatch.setattr(mosaic_gpu, "require_hopper", lambda: "NVIDIA H200")


def net(dtype, k=64):
    return nnx.Linear(k, 32, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.bfloat16)


CALL = {"call": lambda model, x: model[0](x)}


@pytest.mark.parametrize(
    ("dtype", "options", "implementation", "served"),
    [
        ("bfloat16", {}, None, True),
        (None, {}, None, True),  # x as the kernel was: bfloat16
        ("bfloat16", {"format": wush.INT4}, None, True),
        ("bfloat16", {"activation_format": None, "transform": "identity"}, None, True),
        ("bfloat16", {}, "reference", False),
        ("float32", {}, None, False),
        ("bfloat16", {"activation_format": None}, None, False),  # no kernel transforms alone
        ("bfloat16", {"transform_dtype": "float32"}, None, False),
        ("bfloat16", {"format": wush.INT8}, None, False),
    ],
)
def test_layers_that_kernels_serve_are_laid_out(hopper, dtype, options, implementation, served):
    recipe = wush.Recipe(**{"solver": "rtn", "transform": "hadamard", **options})
    model = nnx.List([net(dtype)])
    x = jnp.asarray(X, jnp.bfloat16)
    quantized, report = wush.quantize_model(
        model, [x], recipe, implementation=implementation, **CALL
    )
    assert (quantized[0].records is not None) == served
    assert report.bytes_after == quantized[0].packed.nbytes
    quantized[0].implementation = "reference"
    y = first(quantized, x)
    unpack_from_kernels(quantized)
    two_programs(first(quantized, x), y)


def test_loading_lays_out_what_is_served(hopper, tmp_path):
    model = nnx.clone(llama("mxfp4"))
    model.dtype = jnp.bfloat16  # of activations, as the files will say
    wush.save(tmp_path / "model", model)
    loaded = wush.load(tmp_path / "model")
    # The quantizer's kernel takes K in multiples of 64; that of the layer down is 96.
    without = [layer.packed.shape[1] for layer in layers(loaded) if layer.records is None]
    assert without == [96]
    kept = wush.load(tmp_path / "model", implementation="reference")
    assert all(layer.records is None for layer in layers(kept))


@pytest.mark.parametrize(
    ("inputs", "smallest", "operand"),
    [
        (wush.MXFP4, 1.0, "float8"),
        (wush.MXFP4, 2.0**-40, "bfloat16"),  # more octaves than FP8 has
        (wush.FP8, 1.0, "float8"),
        (wush.FP8, 2.0**-40, "bfloat16"),
        (None, 1.0, "bfloat16"),
        (wush.NVFP4, 1.0, "bfloat16"),
        (wush.MXFP8, 1.0, "bfloat16"),
    ],
)
def test_records_expand_to_what_holds_both_operands(inputs, smallest, operand):
    dense = dense_layers(nnx.Linear(64, 48, rngs=nnx.Rngs(0)))[0][""]
    weight = jnp.asarray(dense.weight).at[3].multiply(smallest)
    recipe = wush.Recipe(transform="identity", activation_format=inputs)
    packed = wush.quantize_weight(weight, None, recipe)
    model = nnx.List([QuantizedDense(dense, packed)])
    assert len(pack_for_kernels(model, force=True)) == 1
    assert model[0].operand == operand
    np.testing.assert_array_equal(
        wush.dequantize(model[0].packed.weight), wush.dequantize(packed.weight)
    )
