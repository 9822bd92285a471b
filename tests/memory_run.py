"""How much host memory quantizing a folder takes: a process of its own, for the high-water mark.

python memory_run.py make FOLDER LAYERS WIDTH    writes a random bfloat16 Llama
python memory_run.py run FOLDER OUT [SOLVER]     quantizes it, prints MiB as JSON
"""

import json
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import wush_jax as wush
from wush_jax.models import LlamaConfig
from wush_jax.models.hugging_face import FolderTensors, abstract, to_shapes
from wush_jax.streaming import quantize_folder

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
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    files, where = {}, {}
    for name, shape in to_shapes(abstract(config)).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, shapes in files.items():
        save_file({n: weight(random, n, s) for n, s in shapes.items()}, folder / file)
        where |= dict.fromkeys(shapes, file)
    index = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def weight(random, name, shape):
    value = random.standard_normal(shape, np.float32) * 0.02
    return (value + 1 if "norm" in name else value).astype(jnp.bfloat16)


def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def run(folder, out, solver="rtn"):
    tensors = FolderTensors(folder)
    sizes = {n: tensors[n].nbytes for n in tensors}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    random = np.random.default_rng(1)
    batches = [random.integers(256, size=(BATCH, LENGTH), dtype=np.int32) for _ in range(2)]
    jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
    base = status("VmRSS")
    recipe = wush.Recipe(transform="wush", solver=solver)
    tracemalloc.start()  # what the host allocates: neither devices nor the runtime
    quantize_folder(folder, out, batches, recipe, dtype=jnp.bfloat16)
    found = {
        "device": jax.devices()[0].device_kind,
        "model": sum(sizes.values()) / MIB,
        "layer": layer / MIB,
        "hidden": 2 * BATCH * LENGTH * tensors.config.hidden_size * 2 / MIB,
        "base": base,
        "peak": status("VmHWM"),
        "host": tracemalloc.get_traced_memory()[1] / MIB,
    }
    print(json.dumps({key: v if isinstance(v, str) else round(v, 1) for key, v in found.items()}))


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "make":
        make(Path(folder), int(rest[0]), int(rest[1]))
    else:
        run(Path(folder), *rest)
