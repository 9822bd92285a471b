"""``wush evaluate`` and ``wush generate``: any model folder, quantized or not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.table import Table

from wush_jax.checkpoints import checkpoint
from wush_jax.commands.options import Text
from wush_jax.commands.terminal import console, progress
from wush_jax.evaluation.evaluate import cross_entropy, kl_divergence
from wush_jax.models import generate as generate_tokens
from wush_jax.models.hugging_face import load_pretrained
from wush_jax.models.text import Tokenizer
from wush_jax.storage.tensor_folder import read_config

Model = tyro.conf.Positional[Path]
DType = Literal["bfloat16", "float32"]


def open_model(folder: Path, dtype: str) -> nnx.Module:
    """Read a model folder: quantized in any layout that we know, or as Hugging Face has it.

    A quantized model keeps the type of activations that it was saved with.
    """
    if "quantization_config" in read_config(folder):
        return checkpoint.load(folder)
    return load_pretrained(folder, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))


def evaluate(
    model: Model,
    *,
    source: Annotated[Text, tyro.conf.arg(name="")] = Text(samples=None),  # noqa: B008  # frozen
    reference: Path | None = None,
    dtype: DType = "bfloat16",
    out: Path | None = None,
) -> None:
    """Measure the perplexity of a model on a text, and its KL divergence from a reference.

    Args:
      model: folder of a model, quantized or not.
      source: the text.
      reference: folder of the model to compare with, such as the unquantized one.
      dtype: of an unquantized model's weights and activations.
      out: JSON file for the figures.
    """
    batches = source.batches(model)
    if reference is not None:
        read_config(reference)
    measured = open_model(model, dtype)
    with progress(len(batches)) as update:
        loss = cross_entropy(measured, batches, progress=update)
        figures = {
            "model": str(model),
            "tokens": sum(b.size for b in batches),
            "cross_entropy": loss,
            "perplexity": math.exp(loss),
            "bits_per_token": loss / math.log(2),
        }
        if reference is not None:
            original = open_model(reference, dtype)
            figures["reference"] = str(reference)
            figures["kl"] = kl_divergence(original, measured, batches, progress=update)
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console().print(table)
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


def generate(
    model: Model,
    *,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: DType = "bfloat16",
) -> None:
    """Continue a prompt.

    Args:
      model: folder of a model, quantized or not.
      prompt: the text to continue.
      max_new_tokens: the most tokens to add.
      temperature: 0 takes the most likely token.
      top_p: draw among the most likely tokens whose probabilities sum to this.
      seed: of the random draws.
      dtype: of an unquantized model's weights and activations.
    """
    tokenizer = Tokenizer.read(model)
    found: Any = generate_tokens(
        open_model(model, dtype),  # type: ignore[arg-type]  # a Llama, as its config says
        [tokenizer.encode(prompt)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_tokens=tokenizer.stop_tokens,
        key=jax.random.key(seed),
    )
    print(prompt + tokenizer.decode(found.tokens[0, : found.lengths[0]].tolist()))
