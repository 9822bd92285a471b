"""Model folders for tests: written as Hugging Face writes them, and read back whole."""

import json

from safetensors.numpy import save_file

from wush_jax.storage import TensorFolder


def write(folder, config, tensors, files=1, **extra):
    """Tensors in turn over some files, with an index as Hugging Face writes it."""
    names = [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    where = {name: names[i % files] for i, name in enumerate(tensors)}
    if files == 1:
        where = dict.fromkeys(tensors, "model.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | extra))
    return folder


def contents(path):
    folder = TensorFolder(path)
    tensors = {n: folder.read(n, [e.dtype], [e.shape]) for n, e in folder.entries.items()}
    return folder.config, {n: (str(t.dtype), t.shape, t.tobytes()) for n, t in tensors.items()}
