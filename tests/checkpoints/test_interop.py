"""What other libraries decode of our files, and we of theirs, row by row of a table."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
import interop

import wush_jax

pytestmark = [pytest.mark.files, pytest.mark.filterwarnings("ignore")]

PAGE = Path(wush_jax.__file__).parents[1] / "docs" / "files.md"


@pytest.mark.parametrize("row", interop.ROWS, ids=lambda r: f"{r.layout}-{r.weights}-{r.writer}")
def test_decoded_weights_agree_as_the_page_says(row, tmp_path):
    """`python tests/support/interop.py` prints what belongs there, with the versions."""
    if row.version is None:
        pytest.skip(f"{row.library} is not installed")
    line = interop.without_versions(row.line(tmp_path / "folder"))
    page = interop.without_versions(PAGE.read_text(encoding="utf-8"))
    assert line in page.splitlines(), f"the page lacks this row: {line}"


def test_the_page_has_the_rows_that_are_tried():
    page = PAGE.read_text(encoding="utf-8")
    table = page[page.index("| layout | weights | written by |") :].split("\n\n")[0]
    rows = [line.split(" | ")[:4] for line in interop.without_versions(table).splitlines()[2:]]
    tried = [[f"| `{r.layout}`", r.weights, r.writer, r.reader] for r in interop.ROWS]
    assert rows == tried
