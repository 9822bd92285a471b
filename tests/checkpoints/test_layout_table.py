"""The tables of layouts and encodings are those that the registry and the readers give."""

from pathlib import Path

import pytest
from layout_table import encodings, layouts

import wush_jax

pytestmark = pytest.mark.files

DOCS = Path(wush_jax.__file__).parents[1] / "docs"
PAGES = {"layouts": "files.md", "encodings": "other-libraries.md"}


@pytest.mark.parametrize("table", PAGES)
def test_the_page_says_what_the_readers_do(table, tmp_path):
    """Where this fails, `python tests/support/layout_table.py` prints what belongs there."""
    lines = list(layouts() if table == "layouts" else encodings(tmp_path))
    assert len(lines) > 10
    page = (DOCS / PAGES[table]).read_text(encoding="utf-8")
    assert "\n".join(lines) in page, "\n".join(["the page lacks this table:", *lines])
