"""The command on mutated inputs, and what should have come out, by transformers and numpy alone."""

import contextlib
import io
import itertools
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoint_tools import quantized
from folders import write
from layout_tools import effective
from llama_oracle import oracle
from oracle import quantize as oracle_quantize
from safetensors.numpy import load_file, save_file
from token_tools import word_tokenizer
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.checkpoints import interchange
from wush_jax.formats import MXFP4
from wush_jax.models import LlamaConfig, load_pretrained, to_tensors
from wush_jax.storage import copy_companions

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


@dataclass(frozen=True)
class World:
    """Folders that are copied and mutated.

    Attributes:
      folder: of everything.
      source: a float32 model as Hugging Face writes it.
      packed: random codes of MXFP4, weights alone; its twin holds what they mean, in float32.
      both: activations quantized, too.
      exported: the same in another library's layout; has no twin.
    """

    folder: Path

    @property
    def source(self):
        return self.folder / "source"

    @property
    def packed(self):
        return self.folder / "packed"

    @property
    def both(self):
        return self.folder / "both"

    @property
    def exported(self):
        return self.folder / "exported"

    def twin(self, name):
        return {"source": self.source, "packed": self.folder / "packed-twin"}.get(name)


def make(folder):
    """Write the folders; nothing is compiled."""
    world = World(folder)
    world.source.mkdir()
    write(world.source, SIZES, to_tensors(random_model(SIZES)))
    tree = json.loads((world.source / "config.json").read_text())
    tree |= {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (world.source / "config.json").write_text(json.dumps(tree))
    word_tokenizer(world.source, WORDS, chat_template="{{ messages[-1].content }}")
    for name, recipe in RECIPES.items():
        wush.save(folder / name, quantized(load_pretrained(world.source), recipe, SITES))
        copy_companions(world.source, folder / name)
    (world.packed / "promise.json").write_text('{"max_kl": 0.05}')
    interchange.export(world.exported, world.both, "fp_quant")
    twin = shutil.copytree(world.source, folder / "packed-twin")
    rounded = dict(load_file(twin / "model.safetensors"))
    for name in rounded:
        if "proj" in name:
            rounded[name] = np.float32(effective(world.packed, name.removesuffix(".weight")))
    save_file(rounded, twin / "model.safetensors", {"format": "pt"})
    return world


WEIGHTS = ["--transform", "identity", "--activation-format", "none"]
RECIPES = {
    "packed": wush.Recipe(MXFP4, None, transform="identity"),
    "both": wush.Recipe(MXFP4, transform="hadamard"),
}
ATTENTION, MLP = "layers.0.self_attn.", "layers.0.mlp."
SITES = [[ATTENTION + f"{name}_proj" for name in "qkv"], [ATTENTION + "o_proj"]]
SITES += [[MLP + "gate_proj", MLP + "up_proj"], [MLP + "down_proj"]]


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


class Greedy:
    """A model whose logits `logits(row)` gives."""

    def greedy(self, prompt, count, stops):
        row = list(prompt)
        for _ in range(count):
            row.append(int(self.logits(np.asarray(row))[-1].argmax()))
            if row[-1] in stops:
                break
        return row[len(prompt) :]


class Torch(Greedy):
    """transformers' model of a folder in float32."""

    def __init__(self, folder):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch = torch
        tree = json.loads((folder / "config.json").read_text())
        tree.pop("quantization_config", None)
        if type(epsilon := tree.get("rms_norm_eps")) is int:  # refused there, a number here
            tree["rms_norm_eps"] = float(epsilon)
        (folder / "config.json").write_text(json.dumps(tree))
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

    def logits(self, row):
        with self.torch.no_grad():
            tokens = self.torch.tensor(row[None]).long()
            return self.model(tokens, use_cache=False).logits[0].double().numpy()


class Numpy(Greedy):
    """The same in numpy, where transformers is not installed: of what the oracle computes."""

    def __init__(self, folder):
        self.config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
        self.tensors = load_file(folder / "model.safetensors")
        scaling = self.config.rope_scaling
        plain = scaling is None or scaling.rope_type == "llama3"
        self.known = plain and self.config.sliding_window is None

    def logits(self, row):
        return oracle(self.config, self.tensors, row[None])[0]


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
