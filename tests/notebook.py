"""Write tutor.ipynb from the scripts of the training path: `make notebook`.

    python tests/notebook.py            write it
    python tests/notebook.py --check    exit code 1 if it is stale
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tutor.ipynb"
# In the order of reading: what a file imports stands above it.
FILES = ("recipes", "digits", "plots", "data", "models", "common", "train_student",
         "train_teacher", "distill")

INTRODUCTION = """\
# Tutor

Train a small network with a bigger one: teacher, student, distillation and mean teacher (EMA),
in flat PyTorch scripts. The next cells write the scripts, each into a file; the cells below run
them on embedded digits, some minutes in all. Where PyTorch is there, as on Colab, nothing has to
be installed. Change a cell, run it again, then run the training cells below: each starts a fresh
Python, which reads the files as they are now."""
SETTINGS = """\
# Flags of every run. A first look in a minute: FLAGS = "--epochs 3 --overwrite"
import sys

PYTHON, FLAGS = sys.executable, "--resume\""""
TRAIN = """\
!{PYTHON} train_teacher.py {FLAGS}
!{PYTHON} train_student.py {FLAGS}"""
DISTILL = """\
!{PYTHON} distill.py --objective kd {FLAGS}
!{PYTHON} distill.py --objective consistency {FLAGS}"""
TABLE = """\
import json
from pathlib import Path

from IPython.display import Image, display

for file in sorted(Path("results/digits").glob("*/final.json")):
    final = json.loads(file.read_text())
    average = final["ema_test_accuracy"]
    print(f"{final['run']:<16} {final['parameters']:>8,} parameters   "
          f"test {100 * final['test_accuracy']:.2f} %",
          f"  average {100 * average:.2f} %" if average else "")
display(Image("results/digits/kd-s0/curves.png"))"""
CLOSING = """\
One seed shows what happened once. The same runs with `--seed 1`, `--seed 2` and so on are other
draws of everything random: compare runs of the same seed, and look at how much the differences
vary. The repository's `make all SEEDS="0 1 2"` does that, with intervals."""


def cell(kind, name, text):
    """Return a cell; its id is its name, so that the file does not change by itself."""
    made = dict(cell_type=kind, id=name, metadata={}, source=text)
    if kind == "code":
        made |= dict(execution_count=None, outputs=[])
    return made


def build():
    """Return the notebook as text."""
    cells = [cell("markdown", "introduction", INTRODUCTION)]
    for name in FILES:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8").rstrip("\n")
        cells.append(cell("code", name.replace("_", "-"), f"%%writefile {name}.py\n{source}"))
    cells += [cell("code", "settings", SETTINGS),
              cell("markdown", "alone", "## Teacher and student, each alone on the labels"),
              cell("code", "train", TRAIN),
              cell("markdown", "taught", "## The student with a teacher"),
              cell("code", "distil", DISTILL),
              cell("code", "table", TABLE),
              cell("markdown", "closing", CLOSING)]
    notebook = dict(cells=cells, metadata=dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python")), nbformat=4, nbformat_minor=5)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main():
    text = build()
    if "--check" in sys.argv:
        if NOTEBOOK.read_text(encoding="utf-8") != text:
            sys.exit("tutor.ipynb is stale: run `make notebook`")
        return
    NOTEBOOK.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
