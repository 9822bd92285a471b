"""Tokens, texts and tokenizers on their way through the command: the right figure, or exit 2."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import write
from tiny import BYTES
from token_tools import TEMPLATE, byte_tokenizer, word_tokenizer
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.commands import models as commands
from wush_jax.models import generate, load_pretrained, stream, to_tensors
from wush_jax.models.text import Tokenizer
from wush_jax.storage.folder_writer import copy_companions

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]
CONFIG = dataclasses.replace(BYTES, vocab_size=64, max_position_embeddings=16)
WORDS = [f"w{i}" for i in range(61)]
FLOAT = ["--dtype", "float32"]
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of 64 words, whose tokenizer is that of Llama 2 and has a chat template."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    write(folder, CONFIG, to_tensors(random_model(CONFIG)))
    word_tokenizer(folder, WORDS, chat_template="{{ messages[-1].content }}{{ eos_token }} w9")
    return folder


def saved(folder, values):
    np.save(folder / "tokens.npy", values)
    return str(folder / "tokens.npy")


def figures(source, tmp_path, *flags):
    out = tmp_path / "figures.json"
    assert cli.main(["evaluate", str(source), *flags, *FLOAT, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_no_window_is_dropped_and_no_figure_depends_on_the_batch(source, tmp_path):
    tokens = RANDOM.integers(64, size=5 * 16 + 3)
    file = ["--tokens", saved(tmp_path, tokens)]
    found = [figures(source, tmp_path, *file, "--batch", str(b)) for b in (1, 2)]
    rows = tokens[:80].reshape(5, 16)
    expected = wush.perplexity(load_pretrained(source), [rows])
    for one in found:
        assert (one["tokens"], one["tokens_left_out"]) == (80, 3)
        assert one["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_rows_are_documents_and_their_padding_does_not_count(source, tmp_path):
    tokens = np.zeros((3, 12), np.int64)
    tokens[:, :8] = RANDOM.integers(1, 64, (3, 8))
    tokens[2, 5:8] = 0
    found = figures(source, tmp_path, "--tokens", saved(tmp_path, tokens), "--pad-id", "0")
    rows = [tokens[:2, :8], tokens[2:, :5]]
    assert found["tokens"] == 21
    expected = wush.perplexity(load_pretrained(source), rows)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_one_pass_gives_the_reference_too(source, tmp_path):
    tokens = RANDOM.integers(64, size=32)
    file = ["--tokens", saved(tmp_path, tokens), "--reference", str(source)]
    found = figures(source, tmp_path, *file)
    assert found["kl"] == 0
    assert found["reference_perplexity"] == found["perplexity"]


COMMANDS = (
    ["evaluate", "SOURCE"],
    ["quantize", "SOURCE", "--out", "OUT"],
    ["quantize", "SOURCE", "--out", "OUT", "--calibration", "one-shot"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=["evaluate", "sequential", "one-shot"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.r_[np.arange(60), 64], "1 id is outside of the model's vocabulary of 64 tokens: 64"),
        (np.full(64, -100), "64 ids are outside"),
        (np.full(64, 2**32 + 5), "4294967301 at row 0, column 0"),
        (np.ones(64), "holds float64, expected integers"),
        (np.arange(3), "3 tokens where one window takes 16"),
        (np.zeros((4, 9), int), "4 of 4 rows end with 4 or more ids 0"),
    ],
)
def test_what_is_no_token_ends_with_two(command, values, message, source, tmp_path, capsys):
    names = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    file = ["--tokens", saved(tmp_path, values)]
    assert cli.main([names.get(word, word) for word in command] + file) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"wush: --tokens {file[1]}")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            lambda t: jnp.full((*t.shape, 64), jnp.nan),
            "batches[0]: the figure at row 0, position 0",
        ),
        (lambda t: 1000 * jax.nn.one_hot(jnp.full(t.shape, 63), 64), "is 1000 nats a token"),
    ],
)
def test_a_figure_that_is_none_is_no_success(
    logits, message, source, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(commands, "open_model", lambda *_: logits)
    file = ["--tokens", saved(tmp_path, np.arange(32)), "--out", str(tmp_path / "figures.json")]
    assert cli.main(["evaluate", str(source), *file]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "figures.json").exists()


def test_a_reference_of_another_vocabulary_ends_with_two(source, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, vocab_size=32)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", config, {"x": np.zeros(1, np.float32)})
    file = ["--tokens", saved(tmp_path, np.arange(32)), "--reference", str(tmp_path / "other")]
    assert cli.main(["evaluate", str(source), *file]) == 2
    assert "has a vocabulary of 32 tokens" in capsys.readouterr().err


def test_a_continuation_keeps_its_spaces(source, capsys):
    command = ["generate", str(source), *FLOAT, "--max-new-tokens", "4", "--prompt"]
    assert cli.main([*command, "w1 w2"]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    tokenizer = Tokenizer.read(source)
    prompt = tokenizer.encode("w1 w2")
    out = generate(load_pretrained(source), [prompt], max_new_tokens=4, stop_tokens=(2,))
    new = out.tokens[0, : out.lengths[0]].tolist()
    assert text == tokenizer.inner.decode([*prompt, *new])
    assert cli.main([*command, "w1 w2", "--bos", "always"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*command, "<s> w1 w2", "--bos", "always"]) == 0
    assert "not added again" in capsys.readouterr().err


@pytest.mark.filterwarnings("always:prompts of up to")  # as outside of pytest
def test_a_prompt_beyond_the_models_positions_is_told_in_a_line(source, capsys):
    """Text comes all the same, as in transformers."""
    prompt = " ".join(WORDS[:20])
    command = ["generate", str(source), *FLOAT, "--max-new-tokens", "4", "--prompt", prompt]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert said.out.startswith(prompt)
    assert said.err == (
        "wush: warning: prompts of up to 20 tokens and max_new_tokens=4 need 24 positions; the "
        "model was made for 16, later text may degrade\n"
    )


def test_an_answer(source, tmp_path, capsys):
    pytest.importorskip("jinja2")
    command = ["generate", str(source), *FLOAT, "--max-new-tokens", "4", "--prompt", "w1", "--chat"]
    assert cli.main(command) == 0
    prompt = [4, 2, 12]  # w1 </s> w9
    out = generate(load_pretrained(source), [prompt], max_new_tokens=4, stop_tokens=(2,))
    new = out.tokens[0, : out.lengths[0]].tolist()
    assert capsys.readouterr().out == Tokenizer.read(source).continuation(prompt, new) + "\n"
    assert cli.main(["generate", str(source), "--prompt", "w1", "--system", "w2"]) == 2
    assert "--system belongs to --chat" in capsys.readouterr().err


def test_several_prompts_of_a_file(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "some.txt").write_text("w1 w2\n\nw5\n")
    command = ["generate", str(source), *FLOAT, "--max-new-tokens", "11", "--prompts"]
    assert cli.main([*command, str(tmp_path / "some.txt")]) == 0
    tokenizer, texts = Tokenizer.read(source), ("w1 w2", "w5")
    prompts = [tokenizer.encode(text) for text in texts]
    options = {"max_new_tokens": 11, "stop_tokens": tokenizer.stop_tokens}
    out = generate(load_pretrained(source), prompts, **options)
    parts = list(stream(load_pretrained(source), prompts, **options))
    assert [part.shape[1] for part in parts] == [1, 8, 2][: len(parts)]
    np.testing.assert_array_equal(
        np.concatenate(parts, axis=1), out.tokens[:, : sum(p.shape[1] for p in parts)]
    )
    expected = ""
    for text, prompt, row, count in zip(texts, prompts, out.tokens, out.lengths, strict=True):
        expected += text + tokenizer.continuation(prompt, row[:count].tolist()) + "\n\n"
    said = capsys.readouterr()
    assert (said.out, said.err) == (expected, "")
    (tmp_path / "some.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w5"}')
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*command, str(tmp_path / "some.jsonl")]) == 0
    said = capsys.readouterr()
    assert said.out == expected
    assert "tokens/s" in said.err
    assert cli.main([*command, str(tmp_path / "some.txt"), "--prompt", "w1"]) == 2
    assert "give one of --prompt TEXT and --prompts FILE" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_ends_with_two(source, tmp_path, capsys):
    write(tmp_path, CONFIG, to_tensors(random_model(CONFIG)))
    byte_tokenizer(tmp_path, bos="<s>")
    assert cli.main(["generate", str(tmp_path), "--prompt", "abc"]) == 2
    assert "prompts: 4 ids are outside of the model's vocabulary" in capsys.readouterr().err
    assert cli.main(["generate", str(tmp_path), "--prompt", "abc", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text("{}")
    assert cli.main(["generate", str(tmp_path), "--prompt", "abc"]) == 2
    assert "tokenizer.json is no tokenizer" in capsys.readouterr().err


def test_what_belongs_to_a_tokenizer_travels_along(tmp_path):
    names = ["added_tokens.json", "tekken.json", "chat_template.json", "chat_template.jinja"]
    names += ["tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
    names += ["LICENSE", "preprocessor_config.json", "tokenizer.model", "generation_config.json"]
    for folder in ("source", "target"):
        (tmp_path / folder).mkdir()
    for name in [*names, "model.bin"]:
        (tmp_path / "source" / name).write_text(TEMPLATE)
    copy_companions(tmp_path / "source", tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == sorted(names)
