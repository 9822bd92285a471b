"""Runs of the command that hypothesis draws; each returns what was done and what is wrong."""

import importlib.util
import json
import shutil

import numpy as np
from hypothesis import strategies as st
from machine import (
    WEIGHTS,
    Numpy,
    Torch,
    cross_entropy,
    divergence,
    quantized_twin,
    refused,
)
from machine_inputs import Run, token_name, tokenizer

# Of config.json, what is not of the mathematics: transformers may refuse it, and we need not.
FREE = (
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"),
    *("transformers_version", "attention_dropout", "quantization_config", "use_sliding_window"),
    *("max_window_layers", "is_causal"),
)


def reference(folder):
    """transformers' model, without what is not of the mathematics where that is refused.

    Where it is not installed, numpy's; None of what that does not compute.
    """
    if importlib.util.find_spec("transformers") is None:
        model = Numpy(folder)
        return model if model.known else None
    try:
        return Torch(folder)
    except Exception:
        tree = json.loads((folder / "config.json").read_text())
        kept = {k: v for k, v in tree.items() if k not in FREE}
        (folder / "config.json").write_text(json.dumps(kept))
        return Torch(folder)


def evaluate(r):
    """``wush evaluate``: the cross-entropy."""
    kind = r.pick(["source", "source", "packed", "exported"])
    folders = r.copies(kind)
    flags = r.flags(["length", "batch", "samples", "bos"])
    more, cut = r.texts(folders[0], flags)
    out = r.work / "figures.json"
    code, said = r.run(["evaluate", folders[0], *flags, *more, "--dtype", "float32", "--out", out])
    if code != 0:
        return refused(code, said, r.names)
    found = json.loads(out.read_text())["cross_entropy"]
    if len(folders) == 1:  # the same as from the folder that it was exported from
        origin = origin_of(folders[0], r.world.both, r.work / "origin")
        argv = ["evaluate", origin, *flags, *more, "--dtype", "float32", "--out", out]
        code, said = r.run(argv)
        expected = json.loads(out.read_text())["cross_entropy"] if code == 0 else said
    else:
        model = reference(folders[1])
        expected = found if model is None else cross_entropy(model, cut())
    return differs(found, expected)


def origin_of(exported, origin, out):
    """Copy the folder that another was exported from, with all that is not its weights edited."""
    weights = {"*.safetensors", "*.safetensors.index.json"}
    ignore = shutil.ignore_patterns(*weights)
    shutil.copytree(exported, out, ignore=ignore, ignore_dangling_symlinks=True)
    for pattern in weights:
        for file in origin.glob(pattern):
            shutil.copy(file, out)
    tree = json.loads((exported / "config.json").read_text())
    own = json.loads((origin / "config.json").read_text())
    tree["quantization_config"] = own["quantization_config"]
    for digest in ("digest", "model_digest"):  # of the entries before the edit
        tree["quantization_config"].pop(digest, None)
    (out / "config.json").write_text(json.dumps(tree))
    return out


def differs(found, expected, tolerance=1e-4):
    if isinstance(expected, float) and abs(found - expected) <= tolerance * max(1, abs(expected)):
        return None
    return f"found {found}, expected {expected}"


def generate(r):
    """``wush generate``: greedy text."""
    folders = r.copies(r.pick(["source", "source", "packed"]))
    prompt = r.pick(["w1 w2", "w1 w2 w3 w4", "w60", "", "<s> w5", "x", "é\n", "w1 </s>"])
    count = r.pick([4, 4, 4, 1, 0, -1, 40])
    flags = ["--prompt", prompt, "--max-new-tokens", count]
    greedy = r.pick([True, True, False])
    if not greedy:
        flags += r.pick([["--temperature", t] for t in ("1.0", "nan", "-1", "inf", "1e-30")])
        flags += r.pick([[], ["--top-p", "0.5"], ["--top-p", "2"], ["--top-p", "nan"]])
    flags += r.pick([[], [], ["--bos", "always"], ["--chat"], ["--system", "w3"]])
    r.log.append(" ".join(map(str, flags)))
    code, said = r.run(["generate", folders[0], *flags, "--dtype", "float32"])
    if code != 0:
        return refused(code, said, r.names)
    if not greedy or "--chat" in flags:
        return None
    inner = tokenizer(folders[1])
    tree = json.loads((folders[1] / "config.json").read_text())
    ids = inner.encode(prompt).ids
    names = json.loads((folders[1] / "tokenizer_config.json").read_text())
    if "--bos" in flags:
        first = inner.token_to_id(token_name(names["bos_token"]))
        ids = ids if ids[:1] == [first] else [first, *ids]
    stops = tree.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not stops and names.get("eos_token") is not None:
        stops = [inner.token_to_id(token_name(names["eos_token"]))]
    model = reference(folders[1])
    if model is None:
        return None
    new = model.greedy(ids, count, stops)
    before, whole = inner.decode(ids), inner.decode([*ids, *new])
    expected = prompt + whole[len(before) :] + "\n"
    return None if said.endswith(expected) else f"found {said!r}, expected {expected!r}"


def quantize(r):
    """``wush quantize``, weights alone by rounding: the cross-entropy of the result."""
    folders = r.copies("source")
    flags = r.flags(["length", "batch", "samples", "bos"])
    more, _ = r.texts(folders[0], flags)
    recipe = [*WEIGHTS, "--preset", "rtn", "--dtype", "float32"]
    recipe += r.pick([[], [], ["--calibration", "one-shot"], ["--block-size", 48], ["--skip", "("]])
    r.log.append(" ".join(map(str, recipe)))
    code, said = r.run(["quantize", folders[0], "--out", r.work / "out", *flags, *more, *recipe])
    if code != 0:
        fault = refused(code, said, r.names)
        left = (r.work / "out" / "checkpoint").exists()
        return fault or ("left a checkpoint behind" if left else None)
    if "--skip" in recipe:
        return "an expression that is none was taken"
    out, tokens = r.work / "figures.json", r.work / "good.npy"
    np.save(tokens, np.arange(32) % 61 + 3)
    argv = ["evaluate", r.work / "out" / "checkpoint", "--tokens", tokens, "--length", 4]
    code, said = r.run([*argv, "--out", out])
    twin = reference(quantized_twin(folders[1], r.work / "rounded"))
    rows = (np.arange(32) % 61 + 3).reshape(8, 4)
    expected = None if twin is None else cross_entropy(twin, rows)
    if code != 0:  # finite weights may overflow, in the reference as well, or predict nothing
        overflows = expected is not None and not np.isfinite(expected) and "not finite" in said
        overflows |= expected is not None and expected > 709 and "beyond float64" in said
        return None if overflows else f"the result cannot be evaluated: {said[-300:]}"
    found = json.loads(out.read_text())["cross_entropy"]
    return None if expected is None else differs(found, expected, 1e-3)


def export(r):
    """``wush export``: what is written means the same."""
    folders = r.copies(r.pick(["packed", "exported", "source"]))
    layout = r.pick(["wush", "fp_quant", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "gguf"])
    flags = ["--layout", layout, *r.pick([[], ["--rotated"]])]
    r.log.append(" ".join(flags))
    code, said = r.run(["export", folders[0], "--out", r.work / "out", *flags])
    if code != 0:
        return refused(code, said, r.names)
    np.save(r.work / "tokens.npy", np.arange(32) % 61 + 3)
    figures = []
    for folder in (folders[0], r.work / "out"):
        out = r.work / "figures.json"
        argv = ["evaluate", folder, "--tokens", r.work / "tokens.npy", "--length", 4, "--out", out]
        code, said = r.run(argv)
        if code != 0:  # no model, as a config says that is not read for an export
            figures.append(said[:200])
            continue
        figures.append(json.loads(out.read_text())["cross_entropy"])
    if isinstance(figures[0], str):
        return None if isinstance(figures[1], str) else f"mended itself: {figures}"
    if isinstance(figures[1], str):
        return f"the export cannot be read: {figures[1]}"
    return differs(figures[1], figures[0], 1e-3)


def verify(r):
    """``wush verify``: kept or broken, by the KL of the twins."""
    folders = r.copies("packed", edits=(0, 0, 1, 1))
    promised = r.pick([0.05, 1e-9, 1e9, 0, -1, "0.1", None, float("nan"), [1], {}])
    if (folders[0] / "promise.json").is_file() and r.pick([True, False]):
        text = json.dumps({"max_kl": promised} if promised != {} else {})
        (folders[0] / "promise.json").write_text(text)
        r.log.append(text)
    flags = r.flags(["length", "batch"])
    more, cut = r.texts(folders[0], flags)
    argv = ["verify", folders[0], "--reference", r.world.source, *flags, *more]
    code, said = r.run(argv)
    broken = "the promise is broken" in said
    if code != 0 and not broken:
        return refused(code, said, r.names)
    promise = json.loads((folders[0] / "promise.json").read_text())["max_kl"]
    models = reference(folders[1]), reference(r.world.source)
    if None in models:
        return None
    kl = divergence(*models, cut())
    close = abs(kl - promise) < 1e-4
    return None if close or (kl > promise) == broken else f"KL {kl} of {promise}: {said[-200:]}"


def look(r):
    """``wush inspect`` and ``wush plan``: an answer or a refusal."""
    folders = r.copies(r.pick(["source", "packed", "exported"]), edits=(1, 1, 2))
    command = r.pick(["inspect", "inspect", "plan"])
    flags = []
    if command == "plan":
        flags = r.pick([["--preset", "rtn"], ["--for", "fp_quant"], ["--block-size", "7"]])
    r.log.append(f"{command} {' '.join(flags)}")
    code, said = r.run([command, folders[0], *flags])
    return None if code == 0 else refused(code, said, r.names)


KINDS = {f.__name__: f for f in (evaluate, generate, quantize, export, verify, look)}
WEIGHTED = (
    ["evaluate"] * 4 + ["generate"] * 2 + ["quantize"] * 2 + ["export", "verify"] + ["look"] * 2
)


def attempt(draw, world, work, log=None):
    """Return what was run, and what is wrong with what came out."""
    r = Run(draw, world, work)
    r.log = [] if log is None else log
    r.log.append(draw(st.sampled_from(WEIGHTED)))
    (work.parent / "elsewhere").unlink(missing_ok=True)
    return r.log, KINDS[r.log[0]](r)
