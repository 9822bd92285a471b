"""Can gradient descent find better transforms than the closed form? On layers of a real model.

Each block's transform is refined with Adam through the straight-through estimator, on the W4A4
output loss by rounding to nearest (paper eq. 1), once from WUSH and once from Hadamard, with the
same steps and rows; the best learning rate of each counts. Prints held-out losses relative to
WUSH's closed form, by rounding to nearest and by GPTQ on the same transforms:

    python examples/05_learned_transforms.py --steps 300
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import wush_jax as wush
from wush_jax.calibration.observe import capture_rows
from wush_jax.layers.nnx import dense_layers
from wush_jax.models.demo import load_demo_model, stdlib_text, token_batches
from wush_jax.transforms.linalg import HIGHEST, diagonal_blocks, inverse

LAYERS = tuple(
    f"layers.{i}.{name}"
    for i in (1, 4)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
)
FORMATS = {fmt.name: fmt for fmt in (wush.MXFP4, wush.NVFP4)}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      out: JSON file for all numbers.
      layers: dotted paths.
      formats: names of formats.
      steps: of gradient descent.
      rates: learning rates to try, relative to the size of the transform's entries.
      batch: rows in a step.
    """

    out: Path = Path("learned.json")
    layers: tuple[str, ...] = LAYERS
    formats: tuple[str, ...] = ("MXFP4", "NVFP4")
    steps: int = 300
    rates: tuple[float, ...] = (1e-3, 1e-2)
    batch: int = 1024


def output_loss(matrix, weight, x, fmt):
    """``||q(W T_W^T) q(x T_X^T) - W x||^2``, differentiable in T_X."""
    moved = wush.apply_transform(x, matrix)
    turned = wush.apply_transform(weight, inverse(matrix).mT)
    y = jnp.einsum(
        "tk,nk->tn",
        wush.fake_quantize(moved, fmt),
        wush.fake_quantize(turned, fmt),
        precision=HIGHEST,
    )
    return jnp.mean((y - jnp.einsum("tk,nk->tn", x, weight, precision=HIGHEST)) ** 2)


@functools.partial(jax.jit, static_argnames=("fmt", "steps", "batch"))
def refine(matrix, weight, rows, rate, *, fmt, steps, batch):
    """Return T_X after some steps of Adam with a cosine schedule."""
    size = jnp.sqrt(jnp.mean(matrix**2))
    optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))

    def step(state, key):
        matrix, moments = state
        some = rows[jax.random.randint(key, (batch,), 0, len(rows))]
        gradient = jax.grad(output_loss)(matrix, weight, some, fmt)
        updates, moments = optimizer.update(gradient, moments)
        return (matrix + rate * size * updates, moments), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (matrix, optimizer.init(matrix)), keys)[0][0]


def starts(weight, moment, fmt) -> dict[str, jax.Array]:
    """Return the closed form and the Hadamard matrix, one matrix a block."""
    d = fmt.group_size
    closed = wush.wush_transform(wush.second_moment(weight, d), diagonal_blocks(moment, d))
    hadamard = jnp.broadcast_to(wush.hadamard_matrix(d), closed.activation.shape)
    return {"wush": closed.activation, "hadamard": hadamard}


def losses(weight, moment, matrix, held_out, fmt) -> dict[str, float]:
    """Held-out losses of a transform, rounded for run time, under both solvers."""
    pair = wush.BlockTransform(matrix, inverse(matrix).mT).astype(jnp.bfloat16)
    found = {}
    for solver in ("rtn", "gptq"):
        recipe = wush.Recipe(format=fmt, solver=solver, interleave=False)
        packed = wush.quantize_weight(weight, moment, recipe, transform=pair)
        found[solver] = float(_loss(weight, held_out, packed))
    return found


_loss = jax.jit(wush.layer_loss)


def study(weight, rows, held_out, fmt, options: Options) -> dict[str, dict[str, float]]:
    """Return the losses of every transform of one layer, at the learning rate that trains best."""
    moment = wush.second_moment(rows)
    found = {}
    for name, start in starts(weight, moment, fmt).items():
        found[name] = losses(weight, moment, start, held_out, fmt)
        tried = []
        for rate in options.rates:
            learned = refine(
                start, weight, rows, rate, fmt=fmt, steps=options.steps, batch=options.batch
            )
            tried.append((float(output_loss(learned, weight, rows[:4096], fmt)), rate, learned))
        best = min(tried, key=lambda item: (not np.isfinite(item[0]), item[0]))[2]
        found[f"learned from {name}"] = losses(weight, moment, best, held_out, fmt)
    return found


def main(options: Options) -> None:
    """Study every layer in every format and print the ratios to the closed form."""
    model = load_demo_model()
    layers, _ = dense_layers(model)
    chosen = {path: layers[path] for path in options.layers}
    capture = jax.jit(lambda batch: capture_rows(model, batch, chosen))

    def rows(split: str, count: int) -> dict[str, jax.Array]:
        batches = token_batches(stdlib_text(split), batch=16, length=256, limit=count, seed=0)
        seen = [capture(batch) for batch in batches]
        return {
            p: jnp.concatenate([s[p].reshape(-1, s[p].shape[-1]) for s in seen]) for p in chosen
        }

    train, held_out = rows("calibration", 8), rows("evaluation", 2)
    start, results = time.perf_counter(), {}
    for name in options.formats:
        for path in options.layers:
            weight = jnp.asarray(layers[path].weight, jnp.float32)
            fmt = FORMATS[name]
            results[f"{name} {path}"] = study(weight, train[path], held_out[path], fmt, options)
            print(f"{time.perf_counter() - start:6.0f} s  {name} {path}", flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"held-out loss / closed form, {options.steps} steps")
    for column in ("format", "transform", "rtn", "gptq"):
        table.add_column(column)
    for name in options.formats:
        some = [r for key, r in results.items() if key.startswith(name + " ")]
        for transform in some[0]:
            ratios = [
                np.exp(np.mean([np.log(r[transform][s] / r["wush"][s]) for r in some]))
                for s in ("rtn", "gptq")
            ]
            table.add_row(name, transform, *(f"{x:.3f}" for x in ratios))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
