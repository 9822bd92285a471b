"""Win back accuracy after 4-bit rounding: distill the original model into its quantized twin.

What is trained: the weights themselves, rounded in every forward pass (the default); or, with the
packed weights as they are, only norms and embeddings, or low-rank adapters as well:

    python examples/03_fine_tune.py
    python examples/03_fine_tune.py --train rest --rate 1e-3
    python examples/03_fine_tune.py --train adapters --rate 1e-3
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import jax
import tyro
from flax import nnx

import wush_jax as wush
from wush_jax.layers.distill import distill
from wush_jax.layers.finetune import pack, unpack
from wush_jax.layers.nnx import QuantizedDense, replace_modules
from wush_jax.models.demo import load_demo_model, stdlib_text, token_batches


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      steps: of AdamW, each on new text.
      batch: windows a step.
      length: bytes in a window.
      rate: highest learning rate; it falls to zero along half a cosine.
      train: what is trained.
      rank: of the adapters.
      transform: of the recipe: round to nearest, MXFP4.
      evaluation_batches: of held-out text, 16 windows of 256 bytes each.
    """

    steps: int = 100
    batch: int = 8
    length: int = 128
    rate: float = 3e-5
    train: Literal["weights", "rest", "adapters"] = "weights"
    rank: int = 8
    transform: Literal["identity", "hadamard", "wush"] = "identity"
    evaluation_batches: int = 4


def with_adapters(model: nnx.Module, rank: int) -> nnx.Module:
    """Return the model with ``y + x A B`` in place of every quantized layer; B starts at zero."""
    rngs = nnx.Rngs(0)

    def adapt(path: str, module: nnx.Module) -> nnx.Module | None:
        if type(module) is not QuantizedDense:
            return None
        outputs, inputs = module.contraction.shape
        return nnx.LoRA(inputs, rank, outputs, base_module=module, rngs=rngs)

    return replace_modules(model, adapt)


def main(options: Options) -> None:
    """Quantize, measure, train, measure again."""
    teacher = load_demo_model()
    size = {"batch": options.batch, "length": options.length}
    calibration = token_batches(stdlib_text("calibration"), **size, limit=16, seed=0)
    recipe = wush.Recipe(wush.MXFP4, transform=options.transform, solver="rtn")
    student, _ = wush.quantize_model(teacher, calibration, recipe)
    held_out = list(
        token_batches(
            stdlib_text("evaluation"), batch=16, length=256, limit=options.evaluation_batches
        )
    )

    def report(when: str) -> None:
        kl = wush.kl_divergence(teacher, student, held_out)
        perplexity = wush.perplexity(student, held_out)
        print(f"{when}: KL {kl:.4f} nats, perplexity {perplexity:.4f} on held-out text", flush=True)

    print(f"original: perplexity {wush.perplexity(teacher, held_out):.4f}")
    report("quantized")
    if options.train == "weights":
        student = unpack(student, teacher)
    elif options.train == "adapters":
        student = with_adapters(student, options.rank)
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(student, nnx.Param)))
    print(f"training {trained:,} parameters")
    start = time.monotonic()
    text = list(token_batches(stdlib_text("train"), **size, limit=options.steps, seed=1))
    losses = distill(student, teacher, text, rate=options.rate)
    seconds = time.monotonic() - start
    print(f"KL of the first batch {losses[0]:.4f}, of the last {losses[-1]:.4f}, {seconds:.0f} s")
    student = pack(student)
    report("fine-tuned")


if __name__ == "__main__":
    main(tyro.cli(Options))
