"""What cannot fit is refused before it starts, with the numbers of the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import BLOCKS, Blocks, Net, rows

import wush_jax as wush
from wush_jax.calibration import host_memory
from wush_jax.calibration.observe import plain_call

GPTQ = wush.Recipe(solver="gptq", transform="hadamard")


class Device:
    """A device of so much memory, or one that does not tell."""

    def __init__(self, limit=None, used=0):
        self.stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


def use(monkeypatch, *devices):
    monkeypatch.setattr(host_memory.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(host_memory.jax, "local_devices", lambda: list(devices))


def test_free_memory_of_devices(monkeypatch):
    use(monkeypatch, Device(100, 30), Device(50))
    assert host_memory.device_memory() == 120
    use(monkeypatch, Device(100), Device())
    assert host_memory.device_memory() is None  # nothing is refused on a guess


def test_costs_decide(monkeypatch):
    costs = {"moment_bytes": 40 * 10**9, "largest_site_bytes": 3 * 10**9}
    use(monkeypatch, Device(30 * 10**9, 10**9))
    with pytest.raises(ValueError, match=r"3\.0 GB for its largest.* 40\.0 GB.* 29\.0 GB are free"):
        host_memory.check_device_memory(costs, sequential=False)
    host_memory.check_device_memory(costs, sequential=True)
    use(monkeypatch, Device(2 * 10**9))
    with pytest.raises(ValueError, match=r"2\.0 GB are free; calibrate layer after layer"):
        host_memory.check_device_memory(costs, sequential=True)
    use(monkeypatch, Device())
    host_memory.check_device_memory(costs, sequential=False)


class Wide(nnx.Module):
    """A layer of a million channels, as shapes only."""

    def __init__(self):
        self.dense = nnx.Linear(2**20, 32, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x)


def test_a_model_too_wide_is_refused_by_its_plan(monkeypatch):
    """A full moment of 2^20 channels is 4.4 TB: no weight is needed to know it."""
    model = nnx.eval_shape(Wide)
    x = jax.ShapeDtypeStruct((1, 2**20), jnp.float32)
    use(monkeypatch, Device(10**12))
    with pytest.raises(ValueError, match=r"rules: the plan needs .* 4398\.\d GB .* 1000\.0 GB"):
        wush.quantize_model(model, [x], GPTQ)


@pytest.mark.parametrize("sequential", [None, wush.Sequential(BLOCKS)])
def test_nothing_runs_before_the_refusal(monkeypatch, sequential):
    model = Net() if sequential is None else Blocks()
    batches = rows(1) if sequential is None else rows(1, (8, 32))
    started = []
    use(monkeypatch, Device(1))
    with pytest.raises(ValueError, match="the plan needs"):
        wush.quantize_model(
            model, batches, GPTQ, sequential=sequential, progress=lambda *a: started.append(a)
        )
    assert not started


def huge(module, x):
    """Run a module by way of what no device has.

    That is 128 TiB for a host, which may promise more than it holds, and 1 TiB for a GPU, whose
    compiler numbers no more blocks than 2^31.
    """
    size = 2**45 if jax.default_backend() == "cpu" else 2**38
    ramp = jnp.arange(size, dtype=jnp.float32) * x.sum()
    ramp = jax.lax.fori_loop(0, x.argmax(), lambda _, ramp: ramp * 2, ramp)  # a loop keeps it whole
    return module(x + ramp[0])


HUGE = dataclasses.replace(BLOCKS, layer=huge)


@pytest.mark.parametrize("sequential", [None, wush.Sequential(HUGE)])
def test_memory_that_runs_out_on_the_way_tells_the_plan(sequential):
    model = Net() if sequential is None else Blocks()
    batches = rows(1) if sequential is None else rows(1, (8, 32))
    call = huge if sequential is None else plain_call
    with pytest.raises(MemoryError, match=r"allocat.* the plan needs 0\.0 GB .* smaller batches"):
        wush.quantize_model(model, batches, GPTQ, sequential=sequential, call=call)
