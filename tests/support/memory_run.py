"""How much host memory quantizing a folder takes: a process of its own, for the high-water marks.

python memory_run.py make FOLDER LAYERS WIDTH    writes a random bfloat16 Llama
python memory_run.py run FOLDER OUT [SOLVER]     quantizes it; prints a line of JSON, sizes in MiB
python memory_run.py trace FOLDER OUT [SOLVER]   the same, and what numpy and Python allocate

16 layers of width 2048 are 2 GiB, 128 MiB each. A run has three marks of the process's resident
memory: ``started``, once the backend has computed something; ``warm``, once a model of two layers
of that width went the same way and was let go, so that programs for these sizes, and what jax, its
compiler and the device's runtime take, are there; and ``peak``, the most while the folder was
quantized. ``ratio`` is peak - warm over the largest layer and the hidden states kept. ``anon`` is
the part of the peak that is no mapped file, sampled. Those of the same work once more, when all
that libraries keep is kept, are ``again``, their ``warm`` the memory before it.
"""

import ctypes
import gc
import json
import sys
import tempfile
import threading
import time
import tracemalloc
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import wush_jax as wush
from wush_jax.calibration.streaming import quantize_folder
from wush_jax.models import LlamaConfig
from wush_jax.models.hugging_face import FolderTensors, abstract, to_shapes

BATCH, LENGTH = 4, 256
MIB = 2**20


def make(folder, layers, width):
    """One file a decoder layer; weights of the size that training leaves."""
    config = LlamaConfig(
        vocab_size=16 * width,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    random = np.random.default_rng(0)
    # Random numbers are what takes time: tensors are pieces of one stock of them.
    stock = random.standard_normal(20 * width**2, np.float32) * np.float32(0.02)
    stock = stock.astype(jnp.bfloat16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    files, where = {}, {}
    for name, shape in to_shapes(abstract(config)).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, shapes in files.items():
        save_file({n: weight(random, stock, n, s) for n, s in shapes.items()}, folder / file)
        where |= dict.fromkeys(shapes, file)
    index = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def weight(random, stock, name, shape):
    start = random.integers(len(stock) - np.prod(shape) + 1)
    value = stock[start : start + np.prod(shape)].reshape(shape)
    return (value + np.asarray(1, value.dtype)) if "norm" in name else value


def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def return_freed():
    """Give what was freed back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Peaks:
    """The most resident memory inside a with statement: the kernel's mark, or samples of it."""

    def __enter__(self):
        self.sampled = {"VmRSS": 0.0, "RssAnon": 0.0}
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
            self.marked = True
        except OSError:
            self.marked = False
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.005):
            self._sample()

    def _sample(self):
        for key, before in self.sampled.items():
            self.sampled[key] = max(before, status(key))

    def __exit__(self, *error):
        self._sample()
        self.done.set()
        self.thread.join()

    @property
    def total(self):
        return max(self.sampled["VmRSS"], status("VmHWM") if self.marked else 0.0)


def batches_of(vocab):
    random = np.random.default_rng(1)
    return [random.integers(vocab, size=(BATCH, LENGTH), dtype=np.int32) for _ in range(2)]


def quantize(folder, out, solver):
    recipe = wush.Recipe(transform="wush", solver=solver)
    quantize_folder(folder, out, batches_of(256), recipe, dtype=jnp.bfloat16)


def marks(work, unit):
    """The process's memory before a piece of work and at its peak, in MiB and in units."""
    gc.collect()
    return_freed()
    warm = status("VmRSS")
    start = time.perf_counter()
    with Peaks() as peaks:
        work()
    return {
        "warm": warm,
        "peak": peaks.total,
        "anon": peaks.sampled["RssAnon"],
        "grown": peaks.total - warm,
        "ratio": (peaks.total - warm) / unit,
        "seconds": time.perf_counter() - start,
    }


def run(folder, out, solver="rtn", trace=False):
    tensors = FolderTensors(folder)
    sizes = {n: tensors[n].nbytes for n in tensors}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name) / MIB
    hidden = 2 * BATCH * LENGTH * tensors.config.hidden_size * 2 / MIB
    jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
    started = status("VmRSS")
    with tempfile.TemporaryDirectory() as small:
        make(Path(small) / "model", 2, tensors.config.hidden_size)
        quantize(Path(small) / "model", Path(small) / "out", solver)
    once = partial(marks, lambda: quantize(folder, out, solver), layer + hidden)
    if trace:
        tracemalloc.start()  # what the host allocates: neither devices nor the runtime
    found = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "solver": solver,
        "model": sum(sizes.values()) / MIB,
        "layer": layer,
        "hidden": hidden,
        "largest_tensor": max(sizes.values()) / MIB,
        "started": started,
        **once(),
    }
    if trace:
        found["host"] = tracemalloc.get_traced_memory()[1] / MIB
    else:
        found["again"] = once()
    print(json.dumps(jax.tree.map(lambda v: v if isinstance(v, str) else round(v, 2), found)))


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "make":
        make(Path(folder), int(rest[0]), int(rest[1]))
    else:
        run(Path(folder), *rest, trace=what == "trace")
