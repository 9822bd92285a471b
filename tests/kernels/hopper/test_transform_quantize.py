"""The kernel against the definition: interpreted on CPU, lowered for CUDA, run on a GPU."""

import functools

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import wush_jax as wush
from pallas_kernels import exactly, repack
from pallas_kernels.benchmarks.cases import Case
from pallas_kernels.hopper import mosaic_gpu
from pallas_kernels.hopper.tiles import FEW_TOKENS, Tiles, choose
from wush_jax import formats

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
NVFP4_46 = wush.NVFP4.replace(rule="four_over_six")
NVFP4_3 = wush.NVFP4.replace(rule="three_candidates")
NVINT4_3 = wush.NVINT4.replace(rule="signed_candidates")
POW2 = {
    rule: wush.MXFP4.replace(rule=rule, global_scale=g)
    for rule, g in (("pow2_div3", 3.5), ("ocp_floor", 1.0), ("round_175", 1.0), ("ceil", 1.0))
}


def launch(x, t, fmt, layout="interchange", tiles=None, **options):
    options = {"global_scale": None, "device": "NVIDIA H200", **options}
    return mosaic_gpu.launch(x, t, fmt, layout=layout, tiles=tiles, **options)


# Under interpretation ----------------------------------------------------------------------------

INTERPRETED = {
    "ragged rows, one step": (Case(70, 192), wush.MXFP4, "interchange", Tiles(1, 1, ctas=2)),
    "two warpgroups, gathered scales": (
        *(Case(136, 512, block=64), wush.NVFP4, "kernel"),
        Tiles(2, 2, steps=2, ctas=3),
    ),
    "codes as lanes hold them": (Case(70, 192), wush.MXFP4, "lanes", Tiles(1, 1, ctas=2)),
    "a shared transform, 16-bit scales": (
        *(Case(3, 128, shared=True), wush.INT4, "interchange"),
        Tiles(1, 2, ctas=1),
    ),
}


@NEEDS_MOSAIC
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_equals_the_definition(name):
    case, fmt, layout, tiles = INTERPRETED[name]
    x, t = case.arrays()
    got = launch(x, t, fmt, layout, tiles, interpret=True)
    comparison.same(got, comparison.definition(x, t, fmt, layout), fmt, layout)


@NEEDS_MOSAIC
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.NVINT4], ids=lambda f: f.name)
def test_values_are_those_of_the_codes(fmt):
    x, t = Case(70, 192).arrays()
    run = functools.partial(launch, x, t, fmt, tiles=Tiles(1, 1, ctas=2), interpret=True)
    codes, scales = run("interchange")
    values, same_scales = run("values")
    np.testing.assert_array_equal(values, exactly.bfloat16_parts(codes, scales, fmt)[0])
    np.testing.assert_array_equal(same_scales, scales)


@NEEDS_MOSAIC
def test_fp8_values_are_those_of_the_codes():
    x, t = Case(70, 192).arrays()
    run = functools.partial(launch, x, t, wush.MXFP4, tiles=Tiles(1, 1, ctas=2), interpret=True)
    codes, scales = run("lanes")
    values, powers = run("float8")
    wanted, same_powers = repack.to_float8(codes, scales, 128)
    np.testing.assert_array_equal(bits(values), bits(wanted))
    np.testing.assert_array_equal(powers[:, :70], same_powers[:, :70])


def bits(values):
    return np.asarray(values).view(np.uint8)


@NEEDS_MOSAIC
def test_vmap_folds_mapped_rows_into_m():
    x, t = Case(6, 128).arrays()
    run = functools.partial(launch, t=t, fmt=wush.MXFP4, tiles=Tiles(1, 1, ctas=1), interpret=True)
    mapped = jax.vmap(run)(x.reshape(2, 3, 128))
    flat = [a.reshape(6, -1) for a in mapped]
    comparison.same(flat, comparison.definition(x, t, wush.MXFP4), wush.MXFP4)


# Lowered for CUDA on any host --------------------------------------------------------------------

LOWERED = [
    (Case(1), wush.MXFP4, "interchange", "wgmma"),
    (Case(16384), wush.NVFP4, "kernel", "wgmma"),
    (Case(77, 14336, block=128), wush.INT4, "interchange", "wgmma"),
    (Case(1024, block=64, dtype="float16"), NVFP4_46, "interchange", "wgmma"),
    (Case(100, 1088, block=16), wush.NVINT4, "values", "wgmma"),
    (Case(1024), NVINT4_3, "kernel", "wgmma"),
    (Case(16384), wush.MXFP4, "interchange", "mma"),
    (Case(13), wush.MXFP4, "float8", "wgmma"),
    (Case(100, 1088, block=64), wush.MXFP4, "float8", "wgmma"),
    (Case(1024, block=128), wush.MXFP4, "float8", "wgmma"),
    (Case(13, 1088), wush.FP8, "float8", "wgmma"),
    (Case(1024, block=64), wush.FP8, "float8_values", "wgmma"),
    (Case(1024, block=128), wush.FP8, "float8", "wgmma"),
]


@NEEDS_MOSAIC
@pytest.mark.parametrize(("case", "fmt", "layout", "unit"), LOWERED)
def test_lowers_for_cuda_as_one_kernel(case, fmt, layout, unit):
    arrays = jax.eval_shape(case.arrays)
    run = functools.partial(launch, fmt=fmt, layout=layout, unit=unit)
    traced = jax.jit(run).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x, t: launch(x.astype(jnp.float32), t, wush.MXFP4), "dtype float32"),
        (lambda x, t: launch(x, t.astype(jnp.float32), wush.MXFP4), "one dtype"),
        (lambda x, t: launch(x[:, :96], t[:3], wush.MXFP4), "multiple of 64"),
        (lambda x, t: launch(x[:, :128], t[:1, :8, :8], wush.MXFP4), "block d=8"),
        (lambda x, t: launch(x, t, formats.MXFP8), "no register epilogue"),
        (lambda x, t: launch(x, t, wush.NVFP4.replace(global_scale=None)), "pass one"),
        (lambda x, t: launch(x[None], t, wush.MXFP4, "kernel"), "flatten"),
        (lambda x, t: launch(x, t, wush.INT4, "values"), "no bfloat16 numbers"),
        (lambda x, t: launch(x[None], t, wush.MXFP4, "float8"), "flatten"),
        (lambda x, t: launch(x, t, wush.NVFP4, "float8"), "not exact in FP8"),
    ],
)
def test_what_the_kernel_lacks_is_not_implemented(make, reason):
    with pytest.raises(NotImplementedError, match=reason):
        make(*Case(4, 256).arrays())


@pytest.mark.usefixtures("eight_devices")
def test_row_shards_stay_where_they_are(monkeypatch):
    """The partitioning alone: the definition stands in for the launch."""
    quantize_kernel = pytest.importorskip("pallas_kernels.hopper.quantize_kernel")
    seen = []

    def stand_in(x, t, fmt, *, global_scale, layout, tiles, unit, interpret, after, early):
        assert [a.shape for a in after] == [(3, 5)]
        seen.append((x.shape, early))
        return pallas_kernels.reference.transform_quantize(x, t, fmt, global_scale=global_scale)

    monkeypatch.setattr(quantize_kernel, "transform_quantize", stand_in)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("m", "k"))
    x, t = Case(8, 128).arrays()
    spec = jax.sharding.PartitionSpec("m", "k")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    later = jnp.zeros((3, 5), jnp.uint32)
    codes, scales = jax.jit(lambda x, t: launch(x, t, wush.MXFP4, after=[later]))(sharded, t)
    assert seen[-1] == ((4, 128), False)  # others may read what is put together from shards
    assert codes.sharding.spec[0] == scales.sharding.spec[0] == "m"
    comparison.same((codes, scales), comparison.definition(x, t, wush.MXFP4), wush.MXFP4)


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["gaussian", "octaves", "damaged"])
@pytest.mark.parametrize(
    "case",
    [Case(5, 64), Case(64, 1088, block=64), Case(70, 192), Case(300, 4096), Case(65, 1024, 128)],
)
def test_fp8_activations_on_gpu_are_those_of_the_codes(case, data):
    """Byte for byte; a power for 128 columns of few tokens, for 512 of more."""
    x, t = case.arrays()
    if data == "octaves":
        powers = np.random.default_rng(0).integers(-40, 40, size=(len(x), x.shape[1] // 32))
        x = x * jnp.exp2(jnp.repeat(jnp.float32(powers), 32, axis=1)).astype(x.dtype)
    if data == "damaged":
        x = x.at[3, 40].set(jnp.nan).at[0, 0].set(jnp.inf).at[2].set(0)
    run = functools.partial(launch, fmt=wush.MXFP4)
    codes, scales = jax.jit(functools.partial(run, layout="lanes"))(x, t)
    values, powers = jax.jit(functools.partial(run, layout="float8"))(x, t)
    columns = 128 if len(x) <= FEW_TOKENS else 512
    wanted, same_powers = repack.to_float8(codes, scales, columns)
    assert (values.shape, powers.shape) == (wanted.shape, same_powers.shape)
    np.testing.assert_array_equal(*(np.asarray(v, np.float32) for v in (values, wanted)))
    np.testing.assert_array_equal(powers[:, : len(x)], same_powers[:, : len(x)])


@NEEDS_MOSAIC
def test_no_tile_lies_beside_a_single_one():
    """Mosaic leaves out the index of an axis of one tile: beyond it nothing would be clipped."""
    for layout in ("interchange", "kernel", "float8"):
        for device in ("NVIDIA H200", "none"):
            tiles = choose(4096, 128, wush.MXFP4, 32, True, layout, device)
            assert (tiles.beside, tiles.steps) == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("rows", [80, 353])
@pytest.mark.parametrize("layout", ["interchange", "kernel", "values", "float8"])
def test_a_single_tile_of_columns_on_gpu(layout, rows, width):
    """Again and again: what was written beside it once came before, once after it."""
    x, t = Case(rows, width, shared=True).arrays()
    run = jax.jit(functools.partial(launch, fmt=wush.MXFP4), static_argnames="layout")
    found, *_ = got = run(x, t, layout=layout)
    if layout in ("interchange", "kernel"):
        definition = comparison.definition(x, t, wush.MXFP4, layout)
        share = max(comparison.SHARE, 2 / x.size)
        comparison.same(got, definition, wush.MXFP4, layout, share)
    else:
        if layout == "float8":
            wanted, _ = repack.to_float8(*run(x, t, layout="lanes"), 128)
        else:
            wanted = exactly.bfloat16_parts(*run(x, t, layout="interchange"), wush.MXFP4)[0]
        np.testing.assert_array_equal(*(np.float32(v) for v in (found, wanted)))
    for _ in range(50):
        again = run(x, t, layout=layout)[0]
        np.testing.assert_array_equal(np.float32(again), np.float32(found))


ON_GPU = [
    *((Case(m, k), fmt, "interchange") for m, k in ((1, 4096), (16, 14336), (77, 1088))
      for fmt in (wush.MXFP4, wush.NVFP4, wush.INT4, wush.NVINT4)),
    *((Case(1000, 4096), fmt, "kernel") for fmt in (wush.MXFP4, wush.NVFP4, wush.INT4, NVINT4_3)),
    *((Case(1032, block=d), fmt, "interchange") for d in (64, 128)
      for fmt in (wush.MXFP4, wush.NVFP4)),
    *((Case(2048), fmt, "interchange") for fmt in (*POW2.values(), NVFP4_46, NVFP4_3, NVINT4_3)),
    (Case(1000, shared=True), wush.MXFP4, "interchange"),
    (Case(1000, dtype="float16"), wush.MXFP4, "interchange"),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "fmt", "layout"), ON_GPU)
def test_kernel_equals_the_definition_on_gpu(case, fmt, layout):
    x, t = case.arrays()
    run = functools.partial(
        pallas_kernels.transform_quantize, fmt=fmt, layout=layout, implementation="mosaic_gpu"
    )
    share = max(comparison.SHARE, 2 / (case.rows * case.width))
    comparison.same(
        jax.jit(run)(x, t), comparison.definition(x, t, fmt, layout), fmt, layout, share
    )


@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 128])
def test_codes_as_lanes_hold_them_on_gpu(block):
    """What the layer's own call asks for; the dispatch does not offer it."""
    x, t = Case(1000, block=block).arrays()
    got = jax.jit(functools.partial(launch, fmt=wush.MXFP4, layout="lanes"))(x, t)
    comparison.same(got, comparison.definition(x, t, wush.MXFP4, "lanes"), wush.MXFP4, "lanes")


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [wush.MXFP4, *POW2.values(), NVFP4_46, NVFP4_3, wush.NVINT4])
@pytest.mark.parametrize("m", [1, 13, 1000])
def test_values_are_those_of_the_codes_on_gpu(m, fmt):
    """Groups that are not finite are NaN in one, an infinity times a zero in the other."""
    x, t = Case(m, 1088).arrays()
    x = x.at[0, 40].set(jnp.nan)
    run = jax.jit(functools.partial(launch, fmt=fmt), static_argnames="layout")
    codes, scales = run(x, t, layout="interchange")
    values, same_scales = run(x, t, layout="values")
    wanted = exactly.bfloat16_parts(codes, scales, fmt)[0]
    # In float32: numpy takes two NaN for different in bfloat16.
    np.testing.assert_array_equal(np.float32(values), np.float32(wanted))
    np.testing.assert_array_equal(*(np.asarray(s).view(np.uint8) for s in (same_scales, scales)))


@pytest.mark.gpu
def test_warp_level_instructions_give_the_same_on_gpu():
    """What Blackwell would run, on the GPU that is here."""
    x, t = Case(1000).arrays()
    got = jax.jit(functools.partial(launch, fmt=wush.NVFP4, unit="mma"))(x, t)
    comparison.same(got, comparison.definition(x, t, wush.NVFP4), wush.NVFP4)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4, wush.NVINT4, *POW2.values()])
def test_every_kind_of_number_on_gpu(fmt):
    """Ties, zeros, infinities, NaN, tiny and huge values, untransformed: bit by bit."""
    x, _ = Case(512).arrays()
    x = x.at[0].set(0).at[1].mul(2.0**100).at[2].mul(2.0**-110)
    x = x.at[3, 5].set(jnp.inf).at[4, 40].set(jnp.nan).at[5, 100].set(-jnp.inf)
    x = x.at[6].set(jnp.round(x[6] * 4) / 4)  # ties
    x = x.at[7].set(jnp.where(jnp.arange(4096) % 2, 1e-40, -1e-40)).at[8].set(3.3e38)
    got = pallas_kernels.transform_quantize(x, None, fmt, implementation="mosaic_gpu")
    share = 0 if fmt.scale_dtype == "e8m0" else 2e-5
    comparison.same(got, comparison.definition(x, None, fmt), fmt, share=share)
    bad = np.isnan(np.asarray(got[1], np.float32))
    assert bad.any(axis=1).nonzero()[0].tolist() == [3, 4, 5]
    assert bad.sum() == 3


@pytest.mark.gpu
def test_compiled_quantization_still_rounds_on_gpu():
    """Excess precision may delete casts to narrow floats and back; ours is arithmetic."""
    x, t = Case(256).arrays()

    @jax.jit
    def round_trip(x, t):
        codes, scales = pallas_kernels.transform_quantize(x, t, wush.MXFP4)
        q = wush.QuantizedArray(codes, scales, jnp.float32(3.0), wush.MXFP4)
        return wush.dequantize(q), codes

    values, codes = round_trip(x, t)
    exact = pallas_kernels.reference.apply_transform(x, t)
    assert 0.05 < float(jnp.linalg.norm(values - exact) / jnp.linalg.norm(exact)) < 0.2
    assert len(np.unique(np.asarray(codes) & 15)) == 15
    assert "mosaic_gpu" in round_trip.lower(x, t).compile().as_text()
