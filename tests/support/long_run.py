"""A sequential calibration that may kill itself; tests of resuming run it as a program.

Arguments: folder of the compilation cache, of the state, of the result; then where to die:
"never", "pass N" (a pass over a chunk), "rename N" (a finished stage before it gets its name) or
"seconds T".
"""

import os
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from tiny import BLOCKS, Blocks

import wush_jax as wush

RECIPE = wush.Recipe(wush.MXFP4, transform="hadamard")
LAYERS, BATCHES = 3, 2
PASSES = BATCHES * (2 * LAYERS + LAYERS - 1 + 1)  # two sites a layer, steps between, the head


def batches(seed=0):
    random = np.random.default_rng(seed)
    return [np.float32(random.standard_normal((64, 32))) for _ in range(BATCHES)]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(kind, value):
    """Return the progress callback that, with what is set up here, kills at the chosen point."""
    renamed = []
    rename = os.replace

    def rename_or_die(source, target):
        renamed.append(target)
        if kind == "rename" and len(renamed) == int(value):
            die()
        rename(source, target)

    os.replace = rename_or_die
    if kind == "seconds":
        threading.Timer(float(value), die).start()
    passes = []

    def progress(done, total, what):
        passes.append(done)
        if kind == "pass" and len(passes) == int(value):
            die()

    return progress


def main(cache, state, out, kind, value="0"):
    jax.config.update("jax_disable_most_optimizations", True)  # what is compiled runs once
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    settings = wush.Sequential(BLOCKS, state_dir=state, resume=True)
    quantized, report = wush.quantize_model(
        Blocks(), batches(), RECIPE, sequential=settings, progress=arrange(kind, value)
    )
    wush.save(out, quantized)
    report.to_json(Path(out) / "report.json")
    os._exit(0)  # a timer may still be waiting


if __name__ == "__main__":
    main(*sys.argv[1:])
