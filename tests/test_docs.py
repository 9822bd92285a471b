"""The pages: their examples run, and the reference has every public name."""

import doctest
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import pallas_kernels
import wush_jax

DOCS = Path(wush_jax.__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LONG = ("lab-notes", "api", "modules")  # looked up, not read


@pytest.mark.files
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    """Those with a prompt; the others, which need a model or a folder, have to compile."""
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=options)
    assert not failed
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf8"), re.M | re.S):
        compile(block, str(page), "exec")


def test_prompts_are_examples():
    """A prompt that no example block holds would show as text."""
    pages = {page.name: page.read_text("utf8") for page in PAGES}
    blocks = r"^```pycon\n.*?^```$"
    assert not [
        n for n, text in pages.items() if ">>> " in re.sub(blocks, "", text, flags=re.M | re.S)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_enough_to_read(page):
    if page.stem not in LONG:
        assert len(page.read_text("utf8").splitlines()) <= 250


def test_reference_has_every_public_name():
    entries = re.findall(r"^\.\. \S+:: (\S+)$", (DOCS / "api.md").read_text("utf8"), re.M)
    names = [
        f"{package.__name__}.{name}"
        for package in (wush_jax, pallas_kernels)
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert sorted(entries) == sorted(names)


def example(name):
    spec = importlib.util.spec_from_file_location(name, DOCS.parent / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.files
def test_tables_of_quality_are_made_from_their_lines():
    page = example("09_quality_page")
    text = (DOCS / "quality.md").read_text("utf8")
    for model in ("llm", "demo"):
        lines = page.tables(page.read(DOCS / "figures" / f"quality_{model}.jsonl"))
        assert lines.split("\n\n", 1)[1] in text


@pytest.mark.files
def test_the_table_of_speed_is_made_from_its_figures():
    picture = example("10_readme_picture")
    assert picture.table(picture.speed()) in (DOCS / "speed.md").read_text("utf8")


@pytest.mark.files
def test_pictures_are_drawn_from_committed_figures(tmp_path):
    picture = example("10_readme_picture")
    picture.main(picture.Options(out=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["readme.png", "speed.png"]
