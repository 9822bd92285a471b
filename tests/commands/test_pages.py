"""Commands on the pages: each is one that the program takes; `-m slow` runs them on a small model.

Not run: scripts, which need a GPU or minutes; what reads folders of other libraries (the readers'
own tests do); tasks that the harness downloads.
"""

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
from tiny import BYTES
from weights import write_model

import wush_jax
from wush_jax import cli

pytestmark = pytest.mark.files

ROOT = Path(wush_jax.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """Yield the words of every shell command of a page; "..." is what was given before."""
    before = "MODEL --out OUT"
    for block in re.findall(r"^```(?:sh|text)?\n(.*?)^```$", page.read_text("utf8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(wush|python3?) ", line):
                words = shlex.split(line.replace("...", before), comments=True)
                if words[:2] == ["wush", "quantize"]:
                    before = shlex.join(words[2:])
                for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
                    yield shlex.split(part)


FOUND = [(page, words) for page in PAGES for words in commands(page)]


def test_there_are_commands():
    assert len(FOUND) > 30
    assert {words[0] for _, words in FOUND} == {"wush", "python", "python3"}


def title(value):
    return value.stem if isinstance(value, Path) else " ".join(value)


@pytest.mark.parametrize(("page", "words"), FOUND, ids=title)
def test_a_command_is_one(page, words, monkeypatch):
    if words[0] != "wush":
        files = [w for w in words if w.endswith(".py")]
        assert all((ROOT / f).is_file() for f in files)
        return
    taken = []

    def noted(command):
        return functools.wraps(command)(lambda **values: taken.append(command.__name__))

    monkeypatch.setattr(cli, "COMMANDS", [noted(command) for command in cli.COMMANDS])
    assert cli.main(words[1:]) == 0
    assert taken == [words[1]]


CONFIG = dataclasses.replace(BYTES, max_position_embeddings=128)
TEXT = " ".join(f"the quick brown fox, number {i}," for i in range(60))
FILES = ("text.txt", "calibration.txt", "evaluation.txt", "other.txt", "valid.txt", "test.txt")
RUN = (
    *("README", "quantize-a-model", "use-a-quantized-model"),
    *("calibrate-once", "exports", "model-free"),
)
#: Sizes for a text of 2000 bytes; a command that observes a model gets them where it names none.
SMALL = {"--samples": "4", "--length": "32", "--batch": "2"}
LOOSE = {"--max-kl": "0.5"}  # random weights on 2000 bytes keep no closer promise
GIVEN = {"FOLDER": "model", "MODEL": "model", "OUT": "quantized", "README.md": "text.txt"}


def small(words):
    """The words of a command with a small model's names and sizes."""
    words = [GIVEN.get(word, word) for word in words]
    for flag, value in {**SMALL, **LOOSE}.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    if words[1] == "quantize" and not {"--model-free", "--samples"} & set(words):
        words += [part for pair in SMALL.items() for part in pair]
        words += [] if "--text" in words or "--calibrated" in words else ["--text", "text.txt"]
    return words


def on_page(name):
    page = next(page for page in PAGES if page.stem == name)
    return [w for w in commands(page) if w[0] == "wush" and w[1] != "demo" and "--tasks" not in w]


@pytest.mark.slow  # two minutes of compilation
@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    write_model(Path("model"), CONFIG)
    for file in FILES:
        Path(file).write_text(TEXT)
    found = on_page(name)
    assert found
    if not any("quantize" in words for words in found):
        found.insert(0, shlex.split("wush quantize model --out quantized --preset rtn"))
    for words in map(small, found):
        status = cli.main(words[1:])
        assert status == 0, (words, capsys.readouterr())
