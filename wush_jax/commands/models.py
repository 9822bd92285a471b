"""``wush evaluate`` and ``wush generate``: any model folder, quantized or not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.table import Table

from wush_jax.checkpoints import checkpoint
from wush_jax.commands.options import Source, TextFlags, placement_of
from wush_jax.commands.terminal import console, progress
from wush_jax.evaluation.evaluate import cross_entropy, perplexity_of, score
from wush_jax.evaluation.generation import greedy_text, score_generation
from wush_jax.evaluation.harness import task_figures
from wush_jax.models import Seconds, stream
from wush_jax.models.documents import LINES, read_documents, read_text
from wush_jax.models.encodings import open_config
from wush_jax.models.hugging_face import load_pretrained, read_model_config
from wush_jax.models.text import Tokenizer
from wush_jax.models.tokens import Windows, in_batches

Model = tyro.conf.Positional[Path]
DType = Literal["bfloat16", "float32"]
PROMPT = 32  # tokens that the reference continues


def open_model(folder: Path, dtype: str, mesh: str | None = None) -> nnx.Module:
    """Read a model folder: quantized in any layout that we know, or as Hugging Face has it.

    With a mesh, ``model=N``, each tensor goes straight to its devices.

    A quantized model keeps the type of activations that it was saved with.
    """
    sharding = placement_of(mesh, folder)
    if "quantization_config" in open_config(folder):
        loaded = checkpoint.load(folder, sharding=sharding)
        if not isinstance(loaded, nnx.Module):
            raise ValueError(f"{folder} holds packed weights, no model; read them with wush.load")
        return loaded
    kinds: Any = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return load_pretrained(folder, sharding=sharding, **kinds)


def evaluate(
    model: Model,
    *,
    source: Source = TextFlags(samples=None),  # noqa: B008  # frozen
    reference: Path | None = None,
    generation: int = 0,
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    dtype: DType = "bfloat16",
    mesh: str | None = None,
    out: Path | None = None,
) -> None:
    """Measure the perplexity of a model on a text, its KL divergence from a reference, and tasks.

    Args:
      model: folder of a model, quantized or not.
      source: the text.
      reference: folder of the model to compare with, such as the unquantized one.
      generation: how many prompts of the text the reference continues greedily, to see how far the
        model follows; beside it the floor, the reference in bfloat16 against float32.
      tasks: of EleutherAI's harness (the extra eval), such as arc_easy, or YAML files of your own;
        with them there need be no text.
      limit: the most questions of each task.
      dtype: of an unquantized model's weights and activations.
      mesh: divide the model, and the reference, over devices: model=N.
      out: JSON file for the figures.
    """
    without = tasks and not source.text and source.tokens is None
    windows = None if without else source.windows(model)
    if windows is not None and all(len(row) < 2 for row in windows.rows):
        raise ValueError(
            f"--length {source.length}: windows of one token predict nothing; give 2 or more"
        )
    if generation and reference is None:
        raise ValueError(f"--generation {generation} needs the model to compare with: --reference")
    if windows is None and reference is not None:
        raise ValueError("--reference compares on a text: give --text FILE or --tokens FILE.npy")
    if reference is not None:
        check_same_vocabulary(model, reference)
    measured = open_model(model, dtype, mesh)
    figures: dict[str, Any] = {"model": str(model)}
    if windows is not None:
        figures |= _text_figures(measured, windows, source.batch, reference, dtype, mesh)
        if generation and reference is not None:
            figures |= generation_figures(reference, measured, windows.rows, generation, mesh)
    if tasks:
        tokenizer = Tokenizer.read(model)
        figures |= task_figures(measured, tokenizer, tasks, limit=limit, batch_size=source.batch)
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console().print(table)
    if out is not None:
        out.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


def _text_figures(
    measured: nnx.Module,
    windows: Windows,
    batch: int,
    reference: Path | None,
    dtype: str,
    mesh: str | None,
) -> dict[str, Any]:
    """Return what a text tells of a model."""
    batches = in_batches(windows.rows, batch)
    figures: dict[str, Any] = {"tokens": sum(map(len, windows.rows))}
    if windows.left_out:
        figures["tokens_left_out"] = windows.left_out
    with progress(len(batches)) as update:
        if reference is None:
            loss = cross_entropy(measured, batches, progress=update)
        else:
            found = score(measured, batches, open_model(reference, dtype, mesh), progress=update)
            loss = found.cross_entropy
    figures["cross_entropy"] = loss
    figures["perplexity"] = perplexity_of(loss)
    figures["bits_per_token"] = loss / math.log(2)
    if reference is not None:
        figures["reference"] = str(reference)
        figures["reference_perplexity"] = perplexity_of(found.reference_cross_entropy)
        figures["kl"] = found.kl
    return figures


def generation_figures(
    reference: Path,
    measured: nnx.Module,
    rows: Sequence[np.ndarray],
    count: int,
    mesh: str | None = None,
) -> dict[str, float]:
    """Return how far a model follows its reference's greedy text, and the noise floor.

    The floor is the reference in bfloat16 against itself in float32.

    Args:
      reference: folder.
      measured: the model.
      rows: windows of tokens; prompts are their first 32 tokens.
      count: how many prompts.
      mesh: that the model lies on, where it lies on one.

    Raises:
      ValueError: fewer windows of 32 tokens than that.
    """
    prompts = [row[:PROMPT] for row in rows if len(row) >= PROMPT][:count]
    if len(prompts) < count:
        raise ValueError(
            f"--generation {count}: the text has {len(prompts)} windows of {PROMPT} tokens or "
            "more; give more text, or a smaller --length"
        )
    exact: Any = open_model(reference, "float32", mesh)
    text = greedy_text(exact, np.stack(prompts))
    figures: dict[str, float] = {}
    for name, model in (("", measured), ("floor_", open_model(reference, "bfloat16", mesh))):
        found = asdict(score_generation(exact, model, text))
        figures |= {f"{name}generation_{field}": value for field, value in found.items()}
    return figures


def check_same_vocabulary(model: Path, reference: Path) -> None:
    """Refuse a reference of another vocabulary before any weight is read."""
    sizes = [read_model_config(folder).vocab_size for folder in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--reference {reference} has a vocabulary of {sizes[1]} tokens and {model} one of "
            f"{sizes[0]}: compare models of one tokenizer"
        )


def generate(
    model: Model,
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    bos: Literal["auto", "always", "never"] = "auto",
    special_tokens: bool = False,
    dtype: DType = "bfloat16",
    mesh: str | None = None,
) -> None:
    """Continue a prompt, or answer it; its tokens are shown as they come, then how fast they came.

    Args:
      model: folder of a model, quantized or not.
      prompt: the text to continue.
      prompts: a file of several, which are continued together: one a line, or of JSONL with "text"
        or "messages" in each.
      chat: take the prompt for a message, in the words of the model's chat template.
      system: with --chat, the message that comes first.
      max_new_tokens: the most tokens to add.
      temperature: 0 takes the most likely token.
      top_p: draw among the most likely tokens whose probabilities sum to this.
      seed: of the random draws.
      bos: the token that begins a text: auto, by the tokenizer's own rule; always; never. Never
        twice: a prompt that begins with it keeps its own.
      special_tokens: show special tokens in the text.
      dtype: of an unquantized model's weights and activations.
      mesh: divide the model over devices: model=N.
    """
    tokenizer = Tokenizer.read(model).with_bos(bos)
    if system is not None and not chat:
        raise ValueError("--system belongs to --chat: add --chat, or leave --system out")
    texts = _prompts(tokenizer, model, prompt, prompts, chat, system)
    rows = [tokenizer.encode(text, special=not chat) for text in texts]
    if not chat and any(map(tokenizer.begins_itself, texts)):
        print("a prompt brings its own BOS along; it is not added again", file=sys.stderr)
    if not all(rows):
        empty = texts[rows.index([])]
        raise ValueError(f"--prompt {empty!r} holds no token; give some text, or --bos always")
    loaded: Any = open_model(model, dtype, mesh)  # a Llama, as its config says
    told: list[Seconds] = []
    chunks = stream(
        loaded,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_tokens=tokenizer.stop_tokens,
        key=jax.random.key(seed),
        watch=told.append,
    )
    shown = "" if chat or len(rows) > 1 else texts[0]
    answers = _shown(chunks, tokenizer, rows, shown, special_tokens)
    if sys.stderr.isatty():  # for who is watching
        print(told[-1], file=sys.stderr)
    if len(rows) > 1:
        for text, answer in zip(texts, answers, strict=True):
            print(answer if chat else text + answer, end="\n\n")


def _shown(
    chunks: Iterable[np.ndarray], tokenizer: Tokenizer, rows: list, before: str, special: bool
) -> list[str]:
    """Return what follows each prompt; that of a single one is shown as it comes."""
    stops = set(tokenizer.stop_tokens)
    new: list[list[int]] = [[] for _ in rows]
    open_rows, done = set(range(len(rows))), ""
    for chunk in chunks:
        for row in list(open_rows):
            for token in chunk[row].tolist():
                new[row].append(token)
                if token in stops:
                    open_rows.discard(row)
                    break
        if len(rows) == 1:
            text = before + tokenizer.continuation(rows[0], new[0], special=special)
            whole = text.removesuffix("\ufffd")  # the rest of a character may be to come
            print(whole[len(done) :], end="", flush=True)
            done = whole
    pairs = zip(rows, new, strict=True)
    answers = [tokenizer.continuation(row, own, special=special) for row, own in pairs]
    if len(rows) == 1:
        print((before + answers[0])[len(done) :])
    return answers


def _prompts(
    tokenizer: Tokenizer,
    folder: Path,
    prompt: str | None,
    file: Path | None,
    chat: bool,
    system: str | None,
) -> list[str]:
    """Return the texts to continue, in the words of the chat template where they are messages."""
    if (prompt is None) == (file is None):
        raise ValueError("give one of --prompt TEXT and --prompts FILE")
    if file is not None and not file.is_file():
        raise ValueError(f"--prompts {file} is no file")
    if file is not None and file.suffix == LINES:
        if chat:
            raise ValueError(
                "--chat is for plain prompts: lines of JSONL say themselves what they are"
            )
        return read_documents(file, tokenizer.chat, answer=True)
    lines = [prompt or ""] if file is None else read_text(file).split("\n")
    texts = lines if file is None else [line for line in lines if line.strip()]
    return [_as_chat(tokenizer, folder, text, system) for text in texts] if chat else texts


def _as_chat(tokenizer: Tokenizer, folder: Path, prompt: str, system: str | None) -> str:
    if tokenizer.chat is None:
        raise ValueError(
            f"{folder} has no chat template (chat_template.jinja or tokenizer_config.json): add "
            "it, or leave --chat out"
        )
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = [*first, {"role": "user", "content": prompt}]
    return tokenizer.chat.render(messages, add_generation_prompt=True)
