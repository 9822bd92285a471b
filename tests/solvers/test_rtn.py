"""Round to nearest: the transformed weight, quantized."""

import jax
import numpy as np
import oracle
import pytest

import wush_jax as wush
from wush_jax.solvers.rtn import rtn

pytestmark = pytest.mark.usefixtures("strict")

N, D = 12, 32
run = jax.jit(rtn, static_argnums=2)
quantize = jax.jit(wush.quantize, static_argnums=1)
dequantize = jax.jit(wush.dequantize)


def layer(blocks=3):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((N, blocks * D)).astype(np.float32)
    pairs = [
        np.stack([oracle.random_moment(rng, D, 30) for _ in range(blocks)]).astype(np.float32)
        for _ in range(2)
    ]
    return weight, wush.wush_transform(*pairs)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4], ids=lambda f: f.name)
def test_equals_the_oracle(fmt):
    weight, pair = layer()
    q = run(weight, pair, fmt)
    t_w = np.asarray(pair.weight, np.float64)
    moved = np.einsum("nbi,bji->nbj", weight.reshape(N, -1, D).astype(np.float64), t_w)
    groups = moved.reshape(-1, fmt.group_size)
    _, scales, values, _ = oracle.quantize(groups, fmt, fmt.global_scale)
    got = np.asarray(dequantize(q)).reshape(groups.shape)
    # The float32 transform errs by 1e-6 of a group's size: about that share of the values falls
    # to the other side of a boundary, and none further than one step.
    same = np.isclose(got, values, rtol=1e-6, atol=0)
    assert same.mean() > 0.998
    assert (np.abs(got - values) <= 2.001 * (scales / fmt.global_scale)[:, None])[~same].all()


def test_identity_is_quantize():
    weight, _ = layer()
    q = run(weight, wush.identity_transform(D), wush.MXFP4)
    jax.tree.map(np.testing.assert_array_equal, q, quantize(weight, wush.MXFP4))


def test_zero_rows_stay_zero():
    weight, pair = layer()
    weight[3] = 0
    assert not np.asarray(dequantize(run(weight, pair, wush.NVFP4)))[3].any()


def test_mistakes_are_named():
    weight, pair = layer()
    with pytest.raises(ValueError, match=r"\(3, 32, 32\); for x \(12, 64\)"):
        rtn(weight[:, :64], pair, wush.MXFP4)
    with pytest.raises(ValueError, match="scales='best' is unknown; choose 'rule' or 'sweep'"):
        rtn(weight, pair, wush.MXFP4, scales="best")
