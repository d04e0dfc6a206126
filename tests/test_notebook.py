"""tutor.ipynb: written from the sources, and run by a real kernel where one is installed."""
import json
import os

import notebook
import pytest


def test_it_is_not_stale():
    assert notebook.NOTEBOOK.read_text(encoding="utf-8") == notebook.notebook(), "make notebook"


def test_it_writes_every_script_that_it_runs():
    made = json.loads(notebook.notebook())
    ids = [cell["id"] for cell in made["cells"]]
    assert len(set(ids)) == len(ids) and not any(cell.get("outputs") for cell in made["cells"])
    scripts = {path.stem for path in notebook.ROOT.glob("*.py")}
    assert set(notebook.FILES) == scripts


def test_every_cell_runs_in_a_fresh_kernel(tmp_path):
    """Two epochs; the files are written into an empty folder, as on Colab."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    made = nbformat.reads(notebook.notebook(), as_version=4)
    settings = next(cell for cell in made.cells if cell.id == "settings")
    settings.source = settings.source.replace("FLAGS = []", 'FLAGS = ["--epochs", "2"]')
    client = nbclient.NotebookClient(made, timeout=600, resources={"metadata": {"path": tmp_path}})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    client.execute()
    nbformat.validate(made)
    outputs = [output for cell in made.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    shown = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert "## Comparisons" in shown and "test % by class" in shown
    assert any("<!doctype html>" in str(output.get("data", {}).get("text/html", ""))
               for output in outputs)
    assert (tmp_path / "results/digits/kd-s0/final.json").exists()
