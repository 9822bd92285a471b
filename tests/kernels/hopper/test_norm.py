"""RMSNorm and the addition before it: the definition, the kernel, and layers that begin with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_shapes

import pallas_kernels
import wush_jax as wush
from pallas_kernels import fragments, normed
from pallas_kernels.hopper import matmul, mosaic_gpu
from pallas_kernels.hopper.tiles import FEW_TOKENS

NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
EPS = 1e-5


def arrays(rows, k, seed=0):
    """x, a residual and a norm's weight; sums of bfloat16 numbers are exact: integers."""
    rng = np.random.default_rng(seed)
    x, residual = (jnp.asarray(rng.integers(-99, 99, (rows, k)), jnp.bfloat16) for _ in range(2))
    return x, residual, jnp.asarray(rng.uniform(0.5, 1.5, k), jnp.bfloat16)


def in_float64(h, weight):
    h = np.asarray(h, np.float64)
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)


def test_the_definition_against_float64():
    """Rounded to the dtype once: half a step of eight bits, and of 24."""
    x, residual, weight = arrays(5, 96)
    for dtype, step in ((jnp.bfloat16, 2.0**-8), (jnp.float32, 2.0**-21)):
        a, b = x.astype(dtype) * 0.7, residual.astype(dtype)
        n, total = jax.jit(normed.read)(a, (weight, EPS), b)
        wanted = np.asarray(a, np.float64) + np.asarray(b, np.float64)
        assert n.dtype == total.dtype == dtype
        np.testing.assert_allclose(np.asarray(total, np.float64), wanted, rtol=step)
        exact = in_float64(total, weight)
        np.testing.assert_allclose(np.asarray(n, np.float64), exact, rtol=step)
    same, total = normed.read(x)
    assert same is total is x


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_codes_and_products_are_those_of_the_normed_sum(implementation):
    x, residual, weight = arrays(4, 64)
    how = {"implementation": implementation}

    @jax.jit
    def both(x, residual, weight):
        norm, q = (weight, EPS), wush.quantize(jnp.eye(64), wush.MXFP4)
        codes = functools.partial(pallas_kernels.transform_quantize, fmt=wush.MXFP4, **how)
        layer = functools.partial(pallas_kernels.transform_quantize_matmul, fmt=wush.MXFP4, **how)
        n, total = normed.read(x, norm, residual)
        alone = normed.read(x, norm)[0]
        one = codes(x, None, norm=norm, residual=residual), codes(x, None, norm=norm)
        two = (*codes(n, None), total), codes(alone, None)
        one += layer(x, None, packed=q, norm=norm, residual=residual), layer(x, None, q, norm=norm)
        return one, (*two, (layer(n, None, q), total), layer(alone, None, q))

    one, two = both(x, residual, weight)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"residual": jnp.ones((4, 32))}, "residual has shape"),
        ({"norm": (jnp.ones(32), EPS)}, "must be a weight"),
        ({"norm": (jnp.ones(64), jnp.ones(()))}, "float of at least 0"),
    ],
)
def test_what_does_not_fit(change, word):
    with pytest.raises(ValueError, match=word):
        pallas_kernels.transform_quantize(jnp.ones((4, 64)), None, wush.MXFP4, **change)


def launch(x, residual, weight, t, fmt, layout, **options):
    options = {"global_scale": None, "device": "NVIDIA H200", **options}
    return mosaic_gpu.launch(
        x, t, fmt, layout=layout, norm=(weight, EPS), residual=residual, **options
    )


@NEEDS_MOSAIC
def test_the_interpreted_kernel_equals_the_definition():
    x, residual, weight = arrays(3, 192)
    t = jnp.asarray(np.random.default_rng(1).standard_normal((6, 32, 32)) / 6, jnp.bfloat16)
    codes, scales, total = launch(x, residual, weight, t, wush.MXFP4, "interchange", interpret=True)
    n, wanted = normed.read(x, (weight, EPS), residual)
    np.testing.assert_array_equal(total, wanted)
    run = jax.jit(functools.partial(pallas_kernels.transform_quantize, fmt=wush.MXFP4))
    for a, b in zip((codes, scales), run(n, t), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("inputs", "rows", "fused"),
    [
        (wush.MXFP4, 1, True),
        (wush.FP8, 16, True),
        (wush.MXFP4, FEW_TOKENS + 1, False),
        (wush.NVFP4, 16, False),
    ],
)
def test_a_layer_is_two_kernels(monkeypatch, inputs, rows, fused):
    """For more tokens, and to other formats, XLA normalises before them."""
    monkeypatch.setattr(mosaic_gpu, "require_hopper", lambda: "NVIDIA H200")
    x, residual, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(rows, 512))
    fmt = wush.NVFP4 if inputs is wush.NVFP4 else wush.MXFP4
    operand = "bfloat16" if inputs is wush.NVFP4 else "float8"
    laid = jax.eval_shape(
        lambda: fragments.lay_out(wush.quantize(jnp.zeros((64, 512)), fmt), operand)
    )

    def layer(x, residual, weight, laid):
        return matmul.layer(x, None, (laid,), inputs, norm=(weight, EPS), residual=residual)

    traced = jax.jit(layer).trace(x, residual, weight, laid)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    assert ("stablehlo.rsqrt" in text) == (not fused)
    (y,), total = traced.out_info
    assert (y.shape, total.shape) == ((rows, 64), x.shape)


@NEEDS_MOSAIC
@pytest.mark.usefixtures("eight_devices")
def test_row_shards_stay_where_they_are(monkeypatch):
    """The partitioning alone: the definition stands in for the launch."""
    norm_kernel = pytest.importorskip("pallas_kernels.hopper.norm_kernel")
    seen = []

    def stand_in(x, residual, weight, t, fmt, *, eps, global_scale, **_):
        seen.append((x.shape, residual.shape))
        n, total = normed.read(x, (weight, eps), residual)
        codes = pallas_kernels.reference.transform_quantize(n, t, fmt, global_scale=global_scale)
        return *codes, total

    monkeypatch.setattr(norm_kernel, "transform_quantize", stand_in)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("m",))
    x, residual, weight = arrays(8, 128)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("m"))
    x, residual = jax.device_put((x, residual), rows)
    t = jnp.eye(32, dtype=jnp.bfloat16)
    run = jax.jit(lambda *a: launch(*a, t, wush.MXFP4, "interchange"))
    codes, _, total = run(x, residual, weight)
    assert seen[-1] == ((2, 128), (2, 128))
    assert codes.sharding.spec[0] == total.sharding.spec[0] == "m"
    np.testing.assert_array_equal(total, x + residual)
    mapped = jax.vmap(lambda x, r: launch(x, r, weight, t, wush.MXFP4, "interchange"))
    for a, b in zip(mapped(x[None], residual[None]), run(x, residual, weight), strict=True):
        np.testing.assert_array_equal(np.asarray(a[0], np.float32), np.asarray(b, np.float32))


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_random_shapes_on_a_gpu(part):
    """A thousand shapes: the sum bit by bit, values but for one in a thousand."""
    wrong = [random_shapes.failure(s, "normed") for s in range(50 * part, 50 * part + 50)]
    assert not any(wrong), [text for text in wrong if text]
