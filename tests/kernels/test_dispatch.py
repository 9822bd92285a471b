"""Which implementation runs, and what it says when none can."""

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import wush_jax as wush
from pallas_kernels.benchmarks import bench
from pallas_kernels.benchmarks.cases import Case
from pallas_kernels.hopper import mosaic_gpu, tiles

X, T = Case(8, 128).arrays()


def test_a_forced_kernel_never_falls_back():
    if jax.default_backend() == "gpu" and jax.__version_info__ >= (0, 11):
        pytest.skip("the kernel runs here")
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*(NVIDIA GPU|jax 0.11)"):
        pallas_kernels.transform_quantize(X, T, wush.MXFP4, implementation="mosaic_gpu")


def test_all_reasons_are_gathered():
    x = X.astype(jnp.float32)
    names = ("mosaic_gpu", "xla")
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*; xla: .*float32"):
        pallas_kernels.transform_quantize(x, T, wush.MXFP4, implementation=names)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4])
@pytest.mark.parametrize("transform", [T, T[0], None])
def test_xla_equals_the_definition(fmt, transform):
    @jax.jit
    def run(x, t, g):
        return pallas_kernels.transform_quantize(x, t, fmt, global_scale=g, implementation="xla")

    got = run(X, transform, jnp.float32(fmt.global_scale))
    comparison.same(got, comparison.definition(X, transform, fmt), fmt, share=2 / X.size)


def test_codes_and_scales_have_no_gradient():
    def loss(x):
        codes, scales = pallas_kernels.transform_quantize(x, T, wush.MXFP4)
        return jnp.sum(x) + 0 * jnp.sum(scales.astype(jnp.float32)) + 0.0 * codes.sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(X.astype(jnp.float32)), 1.0)


def test_only_hopper_is_taken(monkeypatch):
    class Device:
        compute_capability, device_kind = "10.0", "NVIDIA B200"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    reason = "compute capability" if jax.__version_info__ >= (0, 11) else "need jax 0.11"
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.require_hopper()


def test_the_benchmark_wants_the_gpu_it_measures():
    if jax.default_backend() == "gpu":
        pytest.skip("it would run")
    with pytest.raises(NotImplementedError, match=r"NVIDIA GPU|jax 0.11"):
        bench.main([])


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4])
@pytest.mark.parametrize("device", ["NVIDIA H200", "unknown"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 16, 200, 1024, 1 << 20])
def test_chosen_tiles_fit_the_chip(rows, block, device, fmt):
    for layout in ("interchange", "kernel", "values"):
        chosen = tiles.choose(rows, 4096, fmt, block, False, layout, device)
        each = chosen.shared_memory(block, fmt.group_size, False, layout)
        assert each * max(1, chosen.ctas // 132) <= tiles.SHARED_MEMORY
        assert chosen.columns % (4 * fmt.group_size) == 0
        assert chosen.warpgroups >= 1
