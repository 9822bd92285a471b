"""The tests' world: reproducible examples, eight CPU devices, and strictness for the core.

Eight virtual devices let the tests of sharding run without hardware.
"""

import ctypes
import gc
import importlib.util
import os
import sys
from pathlib import Path

import jax
import jaxlib
import pytest
from hypothesis import HealthCheck, settings

# It has neither tests nor examples, and some of it needs an extra.
collect_ignore = ["support"]

MANY_MAPS = 32_000
MUCH_MEMORY = 3 << 29  # between modules, so that a worker stays under 3 GiB within one

# Before the first array: the number is fixed once the backend starts.
jax.config.update("jax_num_cpu_devices", 8)

# Nearly all of a run is XLA's compilation for the CPU, which takes a third of the time with LLVM's
# loops at -O0, in one thread for each worker, and without the fusion emitters that jaxlib 0.10 can
# do without. A GPU's programs are compiled as ever; so are anyone's who sets flags.
if "XLA_FLAGS" not in os.environ and importlib.util.find_spec("jax_cuda13_plugin") is None:
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if jaxlib.__version__.startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)

# A first example compiles, so no deadline; a fixed seed, so that two runs agree.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=1000, **COMMON)
settings.register_profile("machine", max_examples=10_000, **COMMON)
settings.load_profile("ci")


def pytest_configure(config):
    """Keep compiled programs where pytest keeps its own things: most of a run is compilation."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture
def strict():
    """Mixed dtypes and unequal ranks raise. The core survives this; flax's own layers do not."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def float32_matmuls():
    """Full precision where a module compares float32 models: a GPU's default for them is TF32.

    There even two compilations of one product differ by it, since the compiler may pick another
    kernel for each.
    """
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Let compiled programs go before they fill the memory, or the memory maps of a process.

    Beyond Linux's limit of 65,530 maps compiling one more ends in a segmentation fault.
    """
    yield
    process = Path("/proc/self")
    if not process.exists():
        return
    maps = (process / "maps").read_bytes().count(b"\n")
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if maps > MANY_MAPS or resident > MUCH_MEMORY:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # glibc keeps what was freed
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def eight_devices():
    """Skip where there are fewer devices, as on a machine with one GPU."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, virtual or not; there are {jax.device_count()}")


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their marks
def pytest_collection_modifyitems(items):
    """Mark the examples of docstrings; skip what needs a GPU where there is none."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.files)
        if item.get_closest_marker("files") and item.get_closest_marker("once"):
            raise pytest.UsageError(
                f"{item.nodeid} is marked once and files: CI would never run it"
            )
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; the backend is {jax.default_backend()}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
