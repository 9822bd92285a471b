"""Commands on model folders: the same as Python's functions, and how they refuse."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import pair
from folders import contents
from tiny import BYTES
from weights import write_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.calibration.streaming import quantize_folder
from wush_jax.commands.options import recipe_of
from wush_jax.evaluation.generation import greedy_text, score_generation
from wush_jax.models import generate, load_pretrained
from wush_jax.models.demo import token_batches

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]

TEXT = " ".join(f"the quick brown fox, number {i}," for i in range(40)).encode()
CONFIG = dataclasses.replace(BYTES, max_position_embeddings=32)
FLAGS = ["--samples", "4", "--batch", "2", "--dtype", "float32"]
ONE_SHOT = ["--calibration", "one-shot"]
RECIPE = ["--format", "NVFP4", "--transform", "wush", "--solver", "rtn", "--damping", "0.02"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, CONFIG)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "text.txt").write_bytes(TEXT)
    return folder


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    text = ["--text", str(source / "text.txt")]
    assert cli.main(["quantize", str(source), "--out", str(out), *text, *FLAGS, *RECIPE]) == 0
    return out


def batches():
    return list(token_batches(TEXT, batch=2, length=32, limit=2))


def recipe():
    return wush.Recipe(format=wush.NVFP4, transform="wush", solver="rtn", damping=0.02)


def test_quantize_equals_python(source, quantized, tmp_path):
    rules = [("lm_head", None), (".*", recipe())]
    report = quantize_folder(source, tmp_path / "python", batches(), rules)
    assert contents(quantized / "checkpoint") == contents(tmp_path / "python")
    rows = json.loads((quantized / "report.json").read_text())["layers"]
    assert [row["loss"] for row in rows] == [row.loss for row in report.layers]
    assert (quantized / "plot.png").stat().st_size > 1000
    assert (quantized / "checkpoint" / "generation_config.json").is_file()
    names = ["checkpoint", "plot.png", "report.json", "run.jsonl"]
    assert sorted(p.name for p in quantized.iterdir()) == names
    lines = map(json.loads, (quantized / "run.jsonl").read_text().splitlines())
    assert [la["loss"] for la in lines if la["event"] == "layer"] == [r["loss"] for r in rows]


def test_weights_and_activations_of_two_formats(source, tmp_path, capsys):
    recipe = ["--format", "NVINT4", "--activation-format", "FP8", "--transform", "hadamard"]
    assert cli.main(["plan", str(source), *recipe]) == 0
    assert "NVINT4/FP8" in capsys.readouterr().out
    given = {"format": "NVINT4", "activation_format": "FP8"}
    assert recipe_of("best", given).input_format is wush.FP8
    wush.save(tmp_path / "pair", pair(wush.NVINT4, wush.FP8, block_size=32))
    assert cli.main(["inspect", str(tmp_path / "pair")]) == 0
    assert "NVINT4/FP8" in capsys.readouterr().out


def test_a_file_of_flags_and_one_of_tokens_give_the_same(source, quantized, tmp_path):
    np.save(tmp_path / "tokens.npy", np.frombuffer(TEXT, np.uint8))
    settings = {
        "out": str(tmp_path / "out"),
        "tokens": str(tmp_path / "tokens.npy"),
        "samples": 4,
        "batch": 2,
        "dtype": "float32",
        "format": "NVFP4",
        "solver": "rtn",
        "damping": 0.02,
        "skip": ["lm_head"],
    }
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert cli.main(["quantize", str(source), "--config", str(tmp_path / "run.json")]) == 0
    assert contents(tmp_path / "out" / "checkpoint") == contents(quantized / "checkpoint")


def test_one_shot(source, tmp_path):
    text = ["--text", str(source / "text.txt"), "--calibration", "one-shot"]
    out = ["--out", str(tmp_path)]
    assert cli.main(["quantize", str(source), *out, *text, *FLAGS, *RECIPE]) == 0
    model = load_pretrained(source, param_dtype=jnp.bfloat16)
    expected, _ = wush.quantize_model(model, batches(), recipe())
    found = wush.load(tmp_path / "checkpoint")
    for name in ("gate_proj", "down_proj"):
        codes = [getattr(m.layers[0].mlp, name).codes[...] for m in (found, expected)]
        np.testing.assert_array_equal(*codes)


def test_a_calibration_is_kept_and_used_again(source, tmp_path, capsys):
    kept = ["--calibrated", str(tmp_path / "kept")]
    text = ["--text", str(source / "text.txt")]
    base = ["quantize", str(source), *FLAGS, *RECIPE, *kept, "--out"]
    assert cli.main([*base, str(tmp_path / "a"), *ONE_SHOT, *text]) == 0
    assert cli.main([*base, str(tmp_path / "b"), *ONE_SHOT]) == 0  # no text: nothing is read
    assert cli.main([*base, str(tmp_path / "c"), *ONE_SHOT, *text]) == 0  # the same text
    a, b, c = (contents(tmp_path / name / "checkpoint") for name in "abc")
    assert a == b == c
    assert wush.Calibration.load(tmp_path / "kept").batches == 2
    (tmp_path / "other.txt").write_bytes(TEXT[::-1])
    other = ["--text", str(tmp_path / "other.txt")]
    assert cli.main([*base, str(tmp_path / "d"), *ONE_SHOT, *other]) == 2
    assert "kept is of another text" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*base, str(tmp_path / "d"), *text]) == 2
    assert "--calibrated is for --calibration one-shot" in capsys.readouterr().err


def test_plan_reads_no_weights(source, tmp_path, capsys):
    assert cli.main(["plan", str(source), *RECIPE]) == 0
    planned = capsys.readouterr().out
    text = ["--text", "nowhere.txt", "--dry-run"]
    assert cli.main(["quantize", str(source), "--out", str(tmp_path / "x"), *text, *RECIPE]) == 0
    assert capsys.readouterr().out == planned
    assert "layers.0.mlp.up_proj" in planned
    assert "lm_head" not in planned  # a rule that nobody gave, and no such layer
    assert "weights" in planned.strip().splitlines()[-1]  # the sum, last
    assert cli.main(["plan", str(source), *RECIPE, "--all-layers", "--skip", "lost"]) == 0
    planned = capsys.readouterr().out
    assert "layers.0.mlp.up_proj" in planned
    assert "rule without a layer: lost" in planned
    assert "NVFP4/NVFP4" in planned
    assert "largest_site_bytes" in planned
    assert not (tmp_path / "x").exists()


def test_presets_are_changed_by_flags():
    flags = {"format": "NVFP4", "damping": 0.5}
    expected = wush.PAPER.replace(format=wush.NVFP4, damping=0.5)
    assert recipe_of("paper", flags) == expected
    assert recipe_of("best", {}) == wush.BEST


def test_a_run_that_was_interrupted_goes_on(source, quantized, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    command = ["quantize", str(source), "--out", str(tmp_path / "out")]
    command += ["--text", str(source / "text.txt"), *FLAGS, *RECIPE]
    with monkeypatch.context() as patch:
        patch.setattr("wush_jax.calibration.streaming.write_folder", interrupt)
        assert cli.main(command) == 130
    assert "--resume" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "add --resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert contents(tmp_path / "out" / "checkpoint") == contents(quantized / "checkpoint")
    assert not (tmp_path / "out" / "layers").exists()


def test_evaluate_equals_python(source, quantized, tmp_path, capsys):
    checkpoint = quantized / "checkpoint"
    command = ["evaluate", str(checkpoint), "--text", str(source / "text.txt"), *FLAGS]
    out = tmp_path / "figures.json"
    assert cli.main([*command, "--reference", str(source), "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["tokens"] == 128
    model = wush.load(checkpoint)
    assert figures["perplexity"] == pytest.approx(wush.perplexity(model, batches()))
    kl = wush.kl_divergence(load_pretrained(source), model, batches())
    # The reference keeps its weights in float32 there and here: the file has bfloat16.
    assert figures["kl"] == pytest.approx(kl)
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.filterwarnings("always:prompts of up to")  # as outside of pytest
def test_evaluate_follows_greedy_text(source, quantized, tmp_path, capsys):
    checkpoint, out = quantized / "checkpoint", tmp_path / "figures.json"
    command = ["evaluate", str(checkpoint), "--text", str(source / "text.txt"), *FLAGS]
    assert cli.main([*command, "--generation", "2"]) == 2
    assert "--generation 2 needs the model to compare with" in capsys.readouterr().err
    command += ["--reference", str(source), "--out", str(out)]
    assert cli.main([*command, "--generation", "9"]) == 2
    assert "the text has 4 windows of 32 tokens" in capsys.readouterr().err
    assert cli.main([*command, "--generation", "2"]) == 0
    assert "wush: warning: prompts of up to 32 tokens" in capsys.readouterr().err
    figures = json.loads(out.read_text())
    model, exact = wush.load(checkpoint), load_pretrained(source)
    with pytest.warns(UserWarning, match="the model was made for 32"):
        text = greedy_text(exact, np.concatenate(batches())[:2])
    found = score_generation(exact, model, text)
    assert figures["generation_match"] == found.match
    assert figures["generation_kl"] == pytest.approx(found.kl, rel=1e-4)
    assert figures["floor_generation_kl"] < figures["generation_kl"]


@pytest.mark.slow
def test_a_promise_is_kept_and_verified(source, tmp_path, capsys, monkeypatch):
    # The candidates of the command are the presets, which take minutes to compile.
    four = wush.Recipe(transform="hadamard", share_transform=False)
    few = partial(wush.choose_recipes, candidates=[four, four.replace(format=wush.MXFP8), None])
    monkeypatch.setattr("wush_jax.commands.promise.choose_recipes", few)
    monkeypatch.setattr("wush_jax.commands.promise.FAST", four)
    out, text = tmp_path / "out", ["--text", str(source / "text.txt"), *FLAGS[:4]]
    command = ["quantize", str(source), "--out", str(out), *text, "--dtype", "float32"]
    assert cli.main([*command, "--max-kl", "0.05"]) == 2
    assert "--max-kl is for --calibration one-shot" in capsys.readouterr().err
    assert cli.main([*command, *ONE_SHOT, "--max-kl", "0.05"]) == 0
    promised = json.loads((out / "checkpoint" / "promise.json").read_text())
    assert promised["predicted"] <= promised["max_kl"] == 0.05
    check = ["verify", str(out / "checkpoint"), "--reference", str(source), *text]
    assert cli.main(check) == 0
    assert "the promise is kept" in capsys.readouterr().out
    promised["max_kl"] = 1e-9
    (out / "checkpoint" / "promise.json").write_text(json.dumps(promised))
    assert cli.main(check) == 2
    assert "the promise is broken: KL" in capsys.readouterr().err
    (out / "checkpoint" / "promise.json").unlink()
    assert cli.main(check) == 2
    assert "nothing was promised" in capsys.readouterr().err
    assert cli.main([*command, *ONE_SHOT, "--max-bits", "12"]) == 0
    files = out / "checkpoint" / "promise.json", out / "report.json"
    limited, report = (json.loads(file.read_text()) for file in files)
    assert report["details"]["kl_measured"] == pytest.approx(limited["measured"], rel=1e-5)
    assert cli.main(check) == 2
    assert "limits the size (max_bits=12.0) and promises no KL" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_devices")
def test_models_on_a_mesh(source, quantized, tmp_path, capsys):
    """Divided over two devices the figures are those of one, but for the order of sums."""
    checkpoint = str(quantized / "checkpoint")
    text = ["--text", str(source / "text.txt"), *FLAGS, "--reference", str(source)]
    found = []
    for name, mesh in (("one", []), ("two", ["--mesh", "model=2"])):
        out = ["--out", str(tmp_path / name)]
        assert cli.main(["evaluate", checkpoint, *text, *mesh, *out]) == 0
        found.append(json.loads((tmp_path / name).read_text()))
    assert found[1]["kl"] == pytest.approx(found[0]["kl"], rel=1e-3)  # float32 sums
    capsys.readouterr()
    written = []
    for mesh in ([], ["--mesh", "model=2"]):
        command = ["generate", checkpoint, "--prompt", "the quick", "--max-new-tokens", "6"]
        assert cli.main([*command, *mesh]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert cli.main(["generate", checkpoint, "--prompt", "x", "--mesh", "model=4"]) == 2
    assert "num_attention_heads=2" in capsys.readouterr().err
    assert cli.main(["generate", checkpoint, "--prompt", "x", "--mesh", "data=2"]) == 2
    assert "write model=N, with N from 1 to" in capsys.readouterr().err


def test_generate_equals_python(source, quantized, capsys):
    checkpoint = quantized / "checkpoint"
    command = ["generate", str(checkpoint), "--prompt", "the quick", "--max-new-tokens", "6"]
    assert cli.main(command) == 0
    found = generate(
        wush.load(checkpoint), [list(b"the quick")], max_new_tokens=6, stop_tokens=(1, 2)
    )
    new = bytes(found.tokens[0, : found.lengths[0]].tolist()).decode(errors="replace")
    assert capsys.readouterr().out == f"the quick{new}\n"


def test_export_and_inspect(quantized, tmp_path, capsys):
    out = tmp_path / "out"
    layout = ["--layout", "nvfp4-pack-quantized"]
    assert cli.main(["export", str(quantized / "checkpoint"), "--out", str(out), *layout]) == 2
    assert "nvfp4-pack-quantized" in capsys.readouterr().err  # which holds no such transform
    assert not out.exists()
    layout = ["--layout", "wush"]
    assert cli.main(["export", str(quantized / "checkpoint"), "--out", str(out), *layout]) == 0
    assert (out / "generation_config.json").is_file()
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "wush" in text
    assert "NVFP4" in text
    assert "layers.0.mlp.up_proj" in text  # as plans have it
    assert cli.main(["inspect", str(out), "--all-layers", "--kernels"]) == 0
    assert "layers.0.mlp.up_proj" in capsys.readouterr().out


def test_blocks_that_divide_no_layer_are_told_at_once(source, capsys):
    assert cli.main(["plan", str(source), "--block-size", "256"]) == 2
    said = capsys.readouterr().err
    assert "layer layers.0.self_attn.q_proj: K=64 is not a multiple of block_size=256" in said
    assert "layer layers.0.mlp.down_proj: K=64" in said
    assert "block_size=256, but of 64, 32;" in said
    assert "--block-size widest" in said


def test_bench_without_a_gpu_is_refused(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one, and minutes of measurements")
    assert cli.main(["bench", "--formats", "MXFP4"]) == 2
    assert "GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["quantize", "SOURCE", "--out", "OUT"], "give one of --text"),
        (["quantize", "SOURCE", "--out", "OUT", "--text", "nowhere.txt"], "nowhere.txt"),
        (["quantize", "nowhere", "--out", "OUT", "--text", "TEXT"], "is no model folder"),
        (["plan", "SOURCE", "--block-size", "48"], "block_size=48"),
        (["plan", "SOURCE", "--skip", "("], "regular expression"),
        (["evaluate", "OUT", "--text", "TEXT"], "is no model folder"),
        (["inspect", "OUT"], "not a folder"),
        (["evaluate", "SOURCE", "--text", "TEXT", "--length", "0"], "--length 0"),
        (["evaluate", "SOURCE", "--text", "TEXT", "--batch", "-1"], "--batch -1"),
        (["evaluate", "SOURCE", "--text", "TEXT", "--reference", "HERE"], "OUT/checkpoint"),
        (["evaluate", "SOURCE", "--tokens", "TEXT"], "no .npy file"),
        (["quantize", "SOURCE", "--out", "TEXT", "--text", "TEXT"], "is a file"),
        (
            ["quantize", "SOURCE", "--out", "OUT", "--text", "TEXT", *ONE_SHOT, "--resume"],
            "one shot",
        ),
        (["quantize", "SOURCE", "--out", "TAKEN", "--text", "TEXT", *ONE_SHOT], "other files"),
    ],
)
def test_bad_input_ends_with_two_and_a_message(command, message, source, tmp_path, capsys):
    (tmp_path / "taken" / "checkpoint").mkdir(parents=True)
    (tmp_path / "taken" / "checkpoint" / "letter.txt").touch()
    names = {
        "HERE": str(tmp_path),
        "TAKEN": str(tmp_path / "taken"),
        "SOURCE": str(source),
        "OUT": str(tmp_path / "out"),
        "TEXT": str(source / "text.txt"),
    }
    assert cli.main([names.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wush: ")
    assert message in error
    assert "path=" not in error  # an argument of Python's, which nobody wrote
    assert not (tmp_path / "out").exists()
