"""Commands on the pages: each is one that the program takes, with flags that it has.

They are not run here: they need a model, a download or minutes. Notebooks run what README shows.
"""

import functools
import re
import shlex
from pathlib import Path

import pytest

import wush_jax
from wush_jax import cli

pytestmark = pytest.mark.files

ROOT = Path(wush_jax.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """Yield the words of every shell command of a page; "..." is what was given before."""
    for block in re.findall(r"^```(?:sh|text)?\n(.*?)^```$", page.read_text("utf8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(wush|python3?) ", line):
                words = shlex.split(line.replace("...", "MODEL --out OUT"), comments=True)
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
