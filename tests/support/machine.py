"""The command on mutated inputs, and what should have come out, by transformers and numpy alone."""

import contextlib
import io
import itertools
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from folders import write
from layout_tools import effective
from oracle import quantize as oracle_quantize
from safetensors.numpy import load_file, save_file
from token_tools import word_tokenizer
from weights import random_model

from wush_jax import cli
from wush_jax.formats import MXFP4
from wush_jax.models import LlamaConfig, to_tensors

SIZES = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    max_position_embeddings=16,
)
WORDS = [f"w{i}" for i in range(61)]
REMEDIES = (
    *("give", "use", "write", "choose", "convert", "leave", "fetch", "mend", "add", "remove"),
    *("copy", "save", "docs/", "pip install", "rename", "check", "wait", "must be", "expected"),
    *("keep ", "look at", "quantize with"),
)
KEPT = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class World:
    """Folders that are copied and mutated.

    Attributes:
      folder: of everything.
      source: a float32 model as Hugging Face writes it.
      packed: the same in MXFP4, weights alone; its twin holds what these weights mean, in float32.
      exported: in another library's layout, activations quantized, too; has no twin.
    """

    folder: Path

    @property
    def source(self):
        return self.folder / "source"

    @property
    def packed(self):
        return self.folder / "packed"

    @property
    def exported(self):
        return self.folder / "exported"

    def twin(self, name):
        return {"source": self.source, "packed": self.folder / "packed-twin"}.get(name)


def make(folder):
    """Write the folders."""
    world = World(folder)
    world.source.mkdir()
    write(world.source, SIZES, to_tensors(random_model(SIZES)))
    tree = json.loads((world.source / "config.json").read_text())
    tree |= {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (world.source / "config.json").write_text(json.dumps(tree))
    word_tokenizer(world.source, WORDS, chat_template="{{ messages[-1].content }}")
    np.save(folder / "some.npy", np.arange(40) % 61 + 3)
    tokens = ["--tokens", str(folder / "some.npy"), "--length", "8", "--preset", "rtn"]
    tokens += ["--calibration", "one-shot", "--dtype", "float32"]
    for name, flags in (("packed", WEIGHTS), ("both", ["--transform", "hadamard"])):
        flags = ["quantize", str(world.source), "--out", str(folder / name), *tokens, *flags]
        code, said = run(flags)
        assert code == 0, said
    os.rename(folder / "packed", folder / "run")
    os.rename(folder / "run" / "checkpoint", world.packed)
    (world.packed / "promise.json").write_text('{"max_kl": 0.05}')
    both = folder / "both" / "checkpoint"
    code, said = run(["export", str(both), "--out", str(world.exported), "--layout", "fp_quant"])
    assert code == 0, said
    twin = folder / "packed-twin"
    shutil.copytree(world.source, twin)
    rounded = dict(load_file(twin / "model.safetensors"))
    for name in rounded:
        if rounded[name].ndim == 2 and name not in KEPT:
            rounded[name] = np.float32(effective(world.packed, name.removesuffix(".weight")))
    save_file(rounded, twin / "model.safetensors", {"format": "pt"})
    return world


WEIGHTS = ["--transform", "identity", "--activation-format", "none"]


def run(argv):
    """Return the exit code and what was said; tyro ends by SystemExit."""
    said = io.StringIO()
    quiet = contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)
    with quiet[0], quiet[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as error:
            code = error.code
    return code, said.getvalue()


def refused(code, said, names):
    """Say what is wrong with a refusal, if anything: who is named, and what to do about it."""
    if code != 2:
        return f"exit code {code}: {said[-300:]}"
    if "For full helptext" in said:  # the parser of flags has named one, and what it takes
        return None
    if "wush: " not in said:
        return f"no message: {said[-300:]}"
    message = said[said.index("wush: ") :].lower()
    if not any(name.lower() in message for name in names):
        return f"names neither file nor flag: {message[:400]}"
    told = any(word in message for word in REMEDIES)
    return None if told else f"has no remedy: {message[:400]}"


def quantized_twin(folder, out):
    """Write a folder whose kernels are rounded to MXFP4 by numpy, and return it."""
    shutil.copytree(folder, out)
    tensors = dict(load_file(out / "model.safetensors"))
    for name, value in tensors.items():
        if value.ndim == 2 and name.removeprefix("model.").startswith("layers."):
            groups = value.astype(np.float64).reshape(-1, MXFP4.group_size)
            rounded = oracle_quantize(groups, MXFP4, MXFP4.global_scale)[2]
            tensors[name] = np.float32(rounded.reshape(value.shape))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


class Torch:
    """transformers' model of a folder in float32."""

    def __init__(self, folder):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch = torch
        tree = json.loads((folder / "config.json").read_text())
        tree.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(tree))
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

    def logits(self, row):
        with self.torch.no_grad():
            return self.model(self.torch.tensor(row[None]).long()).logits[0].double().numpy()

    def greedy(self, prompt, count, stops):
        row = list(prompt)
        for _ in range(count):
            row.append(int(self.logits(np.asarray(row))[-1].argmax()))
            if row[-1] in stops:
                break
        return row[len(prompt) :]


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(model, rows):
    """Nats a token, over all windows."""
    found = []
    for row in rows:
        logs = log_softmax(model.logits(row))
        found += [-logs[i, b] for i, (_, b) in enumerate(itertools.pairwise(row))]
    return float(np.mean(found))


def divergence(model, reference, rows):
    """KL of a model from its reference, nats a token."""
    found = []
    for row in rows:
        p, q = (log_softmax(m.logits(row)) for m in (reference, model))
        found += (np.exp(p) * (p - q)).sum(-1).tolist()
    return float(np.mean(found))
