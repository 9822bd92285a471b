"""Models of others, all the way: the table of docs/zoos.md says what is seen here."""

import pytest
from zoo_table import CASES, PAGE, journey, planned, row

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of their libraries
    pytest.mark.usefixtures("float32_matmuls"),
]


# Those that were taken all the way when the table was written.
NAMES = [name for name in CASES if f"| {name} |" in PAGE.read_text("utf8")]


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_a_plan_finds(name):
    _, columns = planned(CASES[name]())
    assert row(name, columns) in PAGE.read_text("utf8")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_page_says_how_far_a_model_comes(name, tmp_path):
    """Where this fails for a row, `python tests/support/zoo_table.py` writes the table."""
    assert row(name, journey(CASES[name](), tmp_path)) in PAGE.read_text("utf8")
