"""The notebooks run from top to bottom in a real kernel, and are stored without outputs. Long work shows a bar."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_and_draws(file):
    notebook = nbformat.read(file, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(file.parent)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    # The answer to "How do I turn a JSON text into Python objects?", with its score.
    assert re.search(r"^0\.\d\d  json\.loads$", printed, re.MULTILINE)


def test_there_is_one_for_each_framework():
    assert [file.stem for file in NOTEBOOKS] == ["rag_langchain", "rag_llamaindex"]


INDEX = """
from mrl_rag import TwoStageIndex, TwoStageRetriever
from mrl_rag.testing import DeterministicEncoder
with warnings.catch_warnings(), TwoStageIndex() as index:
    warnings.simplefilter("error")
    TwoStageRetriever(DeterministicEncoder(8), index).index_texts([str(n) for n in range(100)], progress={progress})
"""


def outputs_of(*cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300).execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_notebook_without_ipywidgets_shows_a_bar_in_text_where_it_is_asked_to():
    without = "import sys, warnings\nsys.modules['ipywidgets'] = None"
    _, silent, shown = outputs_of(without, INDEX.format(progress=False), INDEX.format(progress=True))
    assert not silent
    assert {output.name for output in shown} == {"stderr"}
    assert "100/100" in "".join(output.text for output in shown)


def test_a_notebook_with_ipywidgets_shows_a_widget():
    pytest.importorskip("ipywidgets")
    _, (output,) = outputs_of("import warnings", INDEX.format(progress=True))
    assert "application/vnd.jupyter.widget-view+json" in output.data
