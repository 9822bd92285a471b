"""Activations in FP8: the quantizer's kernel against the definition, and whole layers on a GPU."""

import functools
import itertools

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_tools import exact, transformed, weight_of

import pallas_kernels
import wush_jax as wush
from pallas_kernels import exactly, repack
from pallas_kernels.benchmarks.cases import Case
from pallas_kernels.hopper import mosaic_gpu, quantize_geometry
from pallas_kernels.hopper.tiles import FEW_TOKENS, Tiles, choose

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)

VALUES = "float8_values"


def launch(x, t, fmt, layout, tiles=None, **options):
    options = {"global_scale": None, "device": "NVIDIA H200", **options}
    return mosaic_gpu.launch(x, t, fmt, layout=layout, tiles=tiles, **options)


@NEEDS_MOSAIC
@pytest.mark.parametrize("layout", ["float8", "float8_values"])
def test_interpreted_fp8_activations_equal_the_definition(layout):
    x, t = Case(70, 64).arrays()
    tiles = Tiles(1, 1, ctas=2)
    values, powers = launch(x, t, wush.FP8, layout, tiles, interpret=True)
    codes = comparison.definition(x, t, wush.FP8)
    wanted, same_powers = repack.e4m3_to_float8(*codes, 512)
    if layout == "float8_values":
        wanted = exactly.bfloat16_parts(*codes, wush.FP8)[0]
    np.testing.assert_array_equal(np.float32(values), np.float32(wanted))
    np.testing.assert_array_equal(powers[:, :70], same_powers[:, :70])


@NEEDS_MOSAIC
@pytest.mark.parametrize("rows", [1, 11, 39, 64, 65, 300])
def test_each_power_is_stored_once_and_nothing_beside_them(rows):
    """No store is clipped: what lies beyond the powers is another array's memory."""
    for width in (64, 128, 192, 320, 640, 1664, 4096):
        for fmt, layout in ((wush.MXFP4, "float8"), (wush.FP8, "float8"), (wush.FP8, VALUES)):
            for block in (32, 64):
                options = *(block, True, layout), "none"
                tiles = choose(rows, width, fmt, *options)
                sizes = rows, width, block, fmt.group_size
                geo = quantize_geometry.Geometry(*sizes, True, layout, tiles, "wgmma")
                stores = itertools.product(range(geo.pairs[0]), range(tiles.beside))
                places = [place for place, mine in itertools.starmap(geo.power, stores) if mine]
                assert sorted(places) == list(range(geo.outputs[1][0])), (geo, places)


FP8_CASES = [Case(1), Case(13, 192), Case(40, 1088, block=64), Case(64, 640, block=128)]
FP8_CASES += [Case(100, 128), Case(1000, 1088), Case(1000, block=128, dtype="float16")]


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [wush.FP8, wush.FP8.replace(rule="ocp_floor")])
@pytest.mark.parametrize("case", FP8_CASES)
def test_fp8_activations_on_gpu(case, fmt):
    """The definition's codes and powers but for the order of sums; both layouts hold the same."""
    x, t = case.arrays()
    x = x.at[0, 40].set(jnp.inf) if case.rows > 1 else x
    columns = 128 if case.rows <= FEW_TOKENS else 512
    wanted, wanted_powers = (
        np.asarray(a, np.float32)
        for a in repack.e4m3_to_float8(*comparison.definition(x, t, fmt), columns)
    )
    run = jax.jit(functools.partial(launch, fmt=fmt), static_argnames="layout")
    found, powers = (np.asarray(a, np.float32) for a in run(x, t, layout="float8"))
    assert (found.shape, powers.shape) == (wanted.shape, wanted_powers.shape)
    rows = slice(0, case.rows)
    np.testing.assert_array_equal(powers[:, rows], wanted_powers[:, rows])
    groups = np.repeat(powers[:, rows].T, columns, axis=1)[:, : found.shape[1]]
    finite = np.isfinite(groups)
    assert finite.all() == (case.rows == 1)
    different = (found != wanted) & finite
    # E4M3 has eight times as many boundaries as E2M1 that another order of sums may cross.
    assert different.mean() <= max(8 * comparison.SHARE, 2 / x.size)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=2.0**-3, atol=2.0**-9)
    if case.block == 128:  # no room for both
        values = np.asarray(repack.from_float8(*run(x, t, layout="float8"), case.width), np.float32)
    else:
        values, same_powers = (np.asarray(a, np.float32) for a in run(x, t, layout="float8_values"))
        np.testing.assert_array_equal(same_powers[:, rows], powers[:, rows])
    in_order = found.reshape(len(found), -1, 2, 4, 4).transpose(0, 1, 4, 3, 2)
    in_order = in_order.reshape(found.shape)[:, : x.shape[1]] * groups[:, : x.shape[1]]
    finite = finite[:, : x.shape[1]]
    np.testing.assert_array_equal(values[finite], in_order[finite])
    assert np.isnan(values[~finite]).all()


WHOLE = [(4096, 6144, 32), (192, 70, 64), (1024, 200, 128), (64, 40, 32), (128, 64, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n", "block"), WHOLE)
@pytest.mark.parametrize("m", [1, 16, 40, 65, 200])
def test_whole_layer_with_fp8_activations(m, k, n, block):
    """The definition's codes but for 1e-5 of them (and two), which are a step of 2^-3 apart."""
    laid, weight = weight_of("gaussian", k, n, wush.MXFP4, "float8")
    x, t = transformed(m, k, block)
    run = functools.partial(
        pallas_kernels.transform_quantize_matmul, fmt=wush.FP8, implementation="mosaic_gpu"
    )
    y = jax.jit(functools.partial(run, out_dtype=jnp.float32))(x, t, laid)
    quantize = functools.partial(pallas_kernels.transform_quantize, fmt=wush.FP8)
    codes = jax.jit(functools.partial(quantize, implementation="reference"))(x, t)
    exactly = exact(wush.QuantizedArray(*codes, jnp.float32(1), wush.FP8)) @ weight.T
    error = np.linalg.norm(y - exactly) / np.linalg.norm(exactly)
    assert error <= (1e-5 + 2 / (m * k)) ** 0.5 / 8 + 2.0**-13
    assert jax.jit(run)(x[None], t, laid).shape == (1, m, n)
