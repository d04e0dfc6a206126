"""tutor.ipynb is the scripts of today, and runs in a real kernel; its cells use what was edited."""
import json
import subprocess
import sys

import notebook
import pytest
import tiny


def test_notebook_is_up_to_date():
    assert notebook.NOTEBOOK.read_text(encoding="utf-8") == notebook.build(), (
        "tutor.ipynb is stale: run `make notebook`")
    assert notebook.NOTEBOOK.stat().st_size < 200_000


def test_notebook_holds_no_output():
    cells = json.loads(notebook.build())["cells"]
    assert all(not cell.get("outputs") for cell in cells)


def test_notebook_runs_in_a_kernel_with_what_was_edited(tmp_path):
    """Slow, and needs tools for development: `make test-dev`."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    made = nbformat.reads(notebook.build(), as_version=4)
    for cell in made.cells:
        if cell.id == "settings":
            cell.source = cell.source.replace('"--resume"', '"--epochs 1 --overwrite"')
        if cell.id == "distill":        # a user edits the loss
            edited = 'print("the edited loss")\n    return {"teacher"'
            cell.source = cell.source.replace('return {"teacher"', edited, 1)
    nbclient.NotebookClient(made, timeout=600, resources={
        "metadata": {"path": str(tmp_path)}}).execute()
    printed = {cell.id: "".join(output.get("text", "") for output in cell.outputs)
               for cell in made.cells if cell.cell_type == "code"}
    assert "kd-s0: test" in printed["distil"] and "mean-teacher-s0: test" in printed["distil"]
    assert "the edited loss" in printed["distil"]
    assert "teacher-s0" in printed["table"]
    assert (tmp_path / "results" / "digits" / "kd-s0" / "curves.png").exists()


def test_check_is_a_command(tmp_path):
    done = subprocess.run([sys.executable, tiny.ROOT / "tests" / "notebook.py", "--check"])
    assert done.returncode == 0
