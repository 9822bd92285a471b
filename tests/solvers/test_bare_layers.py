"""A layer of any framework, as arrays: what it takes, what it says, what it gives."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wush_jax as wush
from wush_jax.formats.checks import refuse_tensors
from wush_jax.solvers import effective_weight, quantize_site

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
N, K = 24, 64
W = RNG.standard_normal((N, K)).astype(np.float32)
X = (RNG.standard_normal((200, K)) * np.geomspace(0.1, 3, K)).astype(np.float32)
# All that looks at rows, without GPTQ's later rounds: seconds of compilation.
RECIPE = wush.BEST.replace(descent=0, refit=0)


@pytest.fixture(scope="module")
def moments():
    return wush.calibrate_layer([X[:80], X[80:160], X[160:]], rows=32)


@pytest.fixture(scope="module")
def packed(moments):
    return wush.quantize_weight(W, moments, RECIPE)


def test_calibrate_layer_is_the_moment_and_some_rows(moments):
    exact = X.astype(np.float64).T @ X / len(X)
    np.testing.assert_allclose(moments.finalize(), exact, atol=200 * 2**-24 * np.abs(exact).max())
    assert int(moments.count) == len(X)
    assert moments.largest == np.abs(X).max()
    assert all((np.asarray(row) == X).all(1).any() for row in moments.sample.rows)
    blocks = wush.calibrate_layer(X.reshape(2, 100, K), rows=0, block=32)
    assert blocks.sample is None
    np.testing.assert_allclose(blocks.mean[1], exact[32:, 32:], rtol=1e-4, atol=1e-5)
    assert wush.calibrate_layer(X).sample.rows.shape == (2048, K)


def test_layers_of_one_shape_and_recipe_compile_once(moments, packed, caplog):
    def compiled(call):
        caplog.clear()
        with jax.log_compiles():
            call()
        return [r for r in caplog.records if r.getMessage().startswith("Compiling")]

    assert not compiled(lambda: wush.quantize_weight(W[::-1], moments, RECIPE))
    assert compiled(lambda: jax.jit(lambda x: x + 1)(1.0))  # the check has teeth


def test_moments_are_moment_and_sample_together(moments, packed):
    apart = wush.quantize_weight(W, moments.finalize(), RECIPE, sample=moments.sample)
    jax.tree.map(np.testing.assert_array_equal, packed, apart)
    other = wush.quantize_weight(W, moments, RECIPE, sample=wush.Sample.of(X[:32]))
    assert (np.asarray(other.weight.codes) != np.asarray(packed.weight.codes)).any()
    shared = quantize_site([W, W[:8]], moments, RECIPE.replace(share_transform=True))
    assert shared[0].transform is shared[1].transform
    with pytest.raises(ValueError, match="moments are empty"):
        wush.quantize_weight(W, wush.Moments.init(K), wush.Recipe())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (X, "sample is a ndarray; it must be a Sample: of an array x of rows wush_jax.Sample.of"),
        (
            wush.Sample.of(X[:, :32]),
            r"sample: its rows have shape \(200, 32\), the weight has K=64",
        ),
        (wush.Sample.of(X).update(X * np.nan), r"sample: \d+ of its values are not finite"),
        (wush.Sample.init(K, 16), "sample: it is empty"),
        (wush.Sample.init(32, 0), r"sample: its rows have shape \(0, 32\).*; it is empty"),
    ],
)
def test_messages_name_the_sample(moments, sample, message):
    with pytest.raises(ValueError, match=message):
        wush.quantize_weight(W, moments, RECIPE, sample=sample)
    with pytest.raises(ValueError, match=message):
        quantize_site([W, W], moments, RECIPE.replace(share_transform=True), sample=sample)


def test_a_missing_sample_says_where_to_get_one(moments):
    with pytest.raises(ValueError, match=r"sample=None: block_gain=True.*wush_jax.calibrate_layer"):
        wush.quantize_weight(W, moments.finalize(), RECIPE.replace(block_gain=True))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([], {}, "x holds no array"),
        (X[0], {}, r"x\[0\] has shape \(64,\)"),
        (X[:0], {}, r"x\[0\] has shape \(0, 64\)"),
        ([X, X[:, :32]], {}, r"x\[1\] has shape \(200, 32\); it must be \(..., K=64, as before\)"),
        ([X[:8], X[:8] * np.inf], {}, r"the second moment up to x\[1\] .* non-finite"),
        (X, {"rows": -1}, "rows=-1"),
        (X, {"block": 48}, "block=48 does not divide"),
    ],
)
def test_bad_inputs_of_a_layer(x, options, message):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        wush.calibrate_layer(x, **options)


class Tensor:
    """What torch's tensor is to us: a class of that module."""

    shape, ndim = (N, K), 2


@pytest.fixture
def tensor(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setattr(Tensor, "__module__", "torch")
    return Tensor()


def test_tensors_of_torch_are_told_what_to_become(tensor, packed):
    calls = {
        "weight": lambda: wush.quantize_weight(tensor, None, wush.Recipe()),
        "activation_moment": lambda: wush.quantize_weight(W, tensor, wush.Recipe()),
        "x": lambda: wush.calibrate_layer(tensor),
        "inputs": lambda: wush.layer_loss(W, tensor, packed),
    }
    calls |= {
        f"x of {function.__name__}": lambda function=function: function(tensor)
        for function in (wush.second_moment, wush.Sample.of)
    }
    calls["x of quantize"] = lambda: wush.quantize(tensor, wush.MXFP4)
    calls["x of fake_quantize"] = lambda: wush.fake_quantize(tensor, wush.MXFP4)
    calls["x of quantized_dot"] = lambda: wush.quantized_dot(tensor, packed)
    for name, call in calls.items():
        argument = name.split(" ")[0]
        with pytest.raises(ValueError, match=rf"{argument}\.detach\(\)\.float\(\)\.numpy\(\)"):
            call()
    with pytest.raises(ValueError, match=r"w and x: a torch tensor"):
        refuse_tensors(w=tensor, m=W, x=tensor)


def test_losses_on_arrays(packed):
    """Against numpy in float64, massive tokens left out by hand."""
    massive = np.zeros((1, K), np.float32)
    massive[0, 3] = 500.0
    x = np.concatenate([X, massive])
    exact = x.astype(np.float64) @ W.T
    error = np.asarray(wush.quantized_dot(x, packed, implementation="reference")) - exact
    for rows, options in ((slice(None), {}), (slice(-1), {"massive": False})):
        loss, power = np.mean(error[rows] ** 2), np.mean(exact[rows] ** 2)
        # The error is a difference of float32 products of 64 terms.
        assert wush.layer_loss(W, x, packed, **options) == pytest.approx(loss, rel=1e-3)
        relative = wush.layer_loss(W, x, packed, relative=True, **options)
        assert relative == pytest.approx(loss / power, rel=1e-3)
    assert wush.layer_loss(0 * W, x, packed, relative=True) > 0  # finite: no output
    with pytest.raises(ValueError, match=r"weight has shape \(64, 24\), packed \(24, 64\)"):
        wush.layer_loss(W.T, x, packed)


def test_a_packed_weight_in_its_own_coordinates(packed):
    with pytest.raises(ValueError, match=r"q is a PackedWeight.*effective_weight\(packed\)"):
        wush.dequantize(packed)
    restored = np.asarray(effective_weight(packed))
    assert np.mean((restored - W) ** 2) < 0.03 * np.mean(W**2)
    y = jnp.einsum("mk,nk->mn", X, restored)
    assert wush.layer_loss(restored, X, packed, relative=True) < 0.1
    assert y.shape == (200, N)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.float32(1), r"weight has shape \(\)"),
        (np.ones((4, K), np.int32), "weight has dtype int32; give floating-point values"),
    ],
)
def test_what_is_no_weight_is_named(weight, message):
    with pytest.raises(ValueError, match=message):
        wush.quantize_weight(weight, np.eye(K, dtype=np.float32), wush.Recipe())
