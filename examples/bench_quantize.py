"""Seconds of `wush quantize`, folder to folder, for a Llama-3.1-8B-shaped model of random weights.

    python examples/bench_quantize.py --layers 2 --presets rtn paper    # on a GPU
    python examples/bench_quantize.py --shape small --samples 4         # to see it run anywhere

The folder is made here, bfloat16, with as many decoder layers as asked for (the embedding and the
head are whole); its weights repeat a pool of normal numbers. Each preset runs in a process of its
own. The first layer compiles; the others take what each further layer of a model takes, so that 32
layers are the first one and 31 times the last.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from bench_generate import SHAPES

from wush_jax.storage.folder_writer import write_folder

WHOLE = 32  # layers of the model
POOL = 16_777_213  # a prime: no two rows are alike


def shapes_of(config):
    """Names, as Hugging Face has them, and shapes of all tensors."""
    hidden, wide, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, shared = config.num_attention_heads * head, config.num_key_value_heads * head
    inner = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    outer = {"model.embed_tokens": (config.vocab_size, hidden), "model.norm": (hidden,)}
    outer["lm_head"] = (config.vocab_size, hidden)
    layers = range(config.num_hidden_layers)
    return outer | {f"model.layers.{i}.{n}": s for i in layers for n, s in inner.items()}


def make_folder(folder, config):
    """Write a model of random weights."""
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32) * 0.02
    pool = pool.astype(jnp.bfloat16)
    tensors = {
        f"{name}.weight": np.ones(shape, jnp.bfloat16)
        if len(shape) == 1
        else np.resize(pool, shape)
        for name, shape in shapes_of(config).items()
    }
    write_folder(folder, tensors, config.to_dict())


def child(source, out, arguments):
    """One run of the command; prints its peaks of memory."""
    import jax

    from wush_jax.cli import main as command

    command(["quantize", source, "--out", out, *arguments])
    stats = jax.devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"device": stats.get("peak_bytes_in_use", 0) / 2**30, "host": host}))


def measure(folder, preset, tokens, options):
    """Run one preset; print and return what it took."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        flags = ["--tokens", str(tokens), "--length", str(options.length), "--preset", preset]
        flags += ["--samples", str(options.samples), "--batch", str(options.batch), *options.more]
        call = [sys.executable, __file__, "--child", str(folder), out, *flags]
        start = time.perf_counter()
        try:
            printed = subprocess.run(
                call, check=True, stdout=subprocess.PIPE, text=True, timeout=options.limit
            ).stdout
            memory = json.loads(printed.splitlines()[-1])
        except subprocess.TimeoutExpired:
            print(f"{preset}: not done within {options.limit} s; what was done:", flush=True)
            memory = {}
        seconds = time.perf_counter() - start
        log = Path(out) / "run.jsonl"
        lines = [json.loads(line) for line in log.open(encoding="utf8")] if log.exists() else []
    steps = [line for line in lines if line["event"] == "step"]
    layers = {}
    for step in steps:
        if step["step"].startswith("layers."):
            name = ".".join(step["step"].split(".")[:2])
            layers[name] = layers.get(name, 0.0) + step["seconds"]
    row = {"preset": preset, "seconds": seconds, "steps": steps, "layers": layers, **memory}
    if not memory:
        print(*(f"{s['step']} {s['seconds']:.1f} s" for s in steps), sep="\n", flush=True)
        return row
    row["other"] = seconds - sum(layers.values())
    each = list(layers.values())
    row["of_32_layers"] = row["other"] + each[0] + (WHOLE - 1) * each[-1]
    print(
        f"{preset}: {seconds:.1f} s; layers {', '.join(f'{s:.1f}' for s in each)}; start,"
        f" embedding and writing {row['other']:.1f}; 32 layers like these"
        f" {row['of_32_layers']:.0f}; peak {memory['device']:.1f} GiB on the device,"
        f" {memory['host']:.1f} on the host",
        flush=True,
    )
    return row


def main():
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--presets", nargs="*", default=["rtn"])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=float, help="seconds that a preset may take")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("more", nargs="*", help="flags of `wush quantize`, behind --")
    options = parser.parse_args()

    config = dataclasses.replace(SHAPES[options.shape], num_hidden_layers=options.layers)
    with tempfile.TemporaryDirectory() as place:
        folder, tokens = Path(place) / "model", Path(place) / "tokens.npy"
        start = time.perf_counter()
        make_folder(folder, config)
        drawn = np.random.default_rng(1).integers(
            config.vocab_size, size=(options.samples, options.length), dtype=np.int32
        )
        np.save(tokens, drawn)
        print(f"made in {time.perf_counter() - start:.1f} s", flush=True)
        rows = []
        for preset in options.presets:
            rows.append(measure(folder, preset, tokens, options))
            if options.output:
                Path(options.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
