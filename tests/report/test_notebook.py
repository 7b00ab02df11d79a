"""The notebook of docs/ runs, and shows what it gives now."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = DOCS / "study_as_data.ipynb"
LARGEST = 200_000  # bytes: it is read on GitHub, and lies in everyone's clone


def texts(notebook):
    """The text of each output of each cell; of a figure, that there is one."""
    shown = []
    for cell in notebook.cells:
        outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        shown.append([output.get("text") or output["data"]["text/plain"] for output in outputs])
        shown[-1] += ["figure" for output in outputs if "image/png" in output.get("data", {})]
    return shown


def test_the_notebook_shows_what_it_gives():
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient, of the extra dev")
    from nbclient import NotebookClient

    committed, executed = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    NotebookClient(executed, timeout=300, resources={"metadata": {"path": str(DOCS)}}).execute()
    remedy = "execute it again, and commit it: jupyter execute --inplace docs/study_as_data.ipynb"
    assert texts(committed) == texts(executed), remedy
    assert sum("figure" in outputs for outputs in texts(committed)) == 3 and NOTEBOOK.stat().st_size < LARGEST
    assert not any(output.get("name") == "stderr" for cell in committed.cells for output in cell.get("outputs", []))
