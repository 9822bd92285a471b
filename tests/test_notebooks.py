"""The notebooks run from their first cell to their last, and are committed with what they show."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = pytest.mark.files


def code_cells(notebook):
    cells = json.loads(notebook.read_text("utf8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_committed_with_output_and_pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output.get("text") for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "/tmp/" not in notebook.read_text("utf8")  # nobody's machine


@pytest.mark.filterwarnings("default")  # of Jupyter's own start
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute()


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["quantize-an-llm", "wush-in-ten-minutes"]
