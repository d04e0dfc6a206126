"""Write tutor.ipynb from the sources: `make notebook`. Fixed cell ids, no outputs.

    python tests/notebook.py            write it
    python tests/notebook.py --check    exit code 1 if it is stale
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tutor.ipynb"
# In the order of reading: what a file imports stands above it.
FILES = ("recipes", "launch", "flags", "files", "runs", "device", "common", "cards", "models",
         "digits", "download", "decode", "readers", "data", "plots", "train_student",
         "train_teacher", "distill", "calc", "compare", "sweep", "render", "report", "look")

INTRODUCTION = """\
# Tutor

Train a small network with a bigger one: teacher, student, distillation and mean teacher (EMA), in
flat PyTorch scripts. The next cells write the scripts, each into a file; below, they are run on
embedded digits, some minutes in all. Nothing has to be installed where PyTorch is there, as on
Colab. Run all cells, from top to bottom."""
SETTINGS = """\
# Flags of every run. A first look in a minute: FLAGS = ["--epochs", "3"]; then, to train in full,
# FLAGS = ["--overwrite"]
FLAGS = []"""
RUN = """\
import distill
import train_student
import train_teacher

teacher = train_teacher.main(["--resume", *FLAGS])
student = train_student.main(["--resume", *FLAGS])"""
DISTILL = """\
kd = distill.main(["--objective", "kd", "--resume", *FLAGS])
mean_teacher = distill.main(["--objective", "consistency", "--resume", *FLAGS])"""
REPORT = """\
import re
from pathlib import Path

from IPython.display import HTML, Image, Markdown, display

import report

report.main([])
folder = Path("results/digits")
for part in re.split(r"!\\[.*?\\]\\((.*?)\\)", (folder / "report.md").read_text()):
    display(Image(str(folder / part)) if part.endswith(".png") else Markdown(part))
display(Image(str(folder / "kd-s0" / "curves.png")))"""
LOOK = """\
import look

look.main([str(folder / "kd-s0")])      # what the distilled student saw, its teacher beside it
display(HTML(filename=str(folder / "kd-s0" / "look.html")))"""
CIFAR = """\
## CIFAR-10, and a GPU

On Colab choose Runtime → Change runtime type → GPU first; the scripts find it themselves, and
compute in bf16 where the GPU does so natively. The set is downloaded, checked and unpacked below
`data/`. Set `CIFAR = True` to run it: teacher, student and distilled student, 20 epochs each; on
two CPU cores that takes more than an hour."""
CIFAR_RUN = """\
CIFAR = False
if CIFAR:
    for main in (train_teacher.main, train_student.main, distill.main):
        main(["--recipe", "cifar10-he-max", "--resume"])
    report.main(["--recipe", "cifar10-he-max"])
    display(Image("results/cifar10-he-max/comparison.png"))"""
FLAGS_TOO = """\
## Your own settings

`distill.main(["--temperature", "2", "--alpha", "0.5", "--run", "kd-T2"])` is another run under
its own name; `["--help"]` lists the flags of a script. A grid of settings and seeds is
`report.main(["sweep", "--over", "temperature=1,4", "--seeds", "0", "--", "distill.py"])`. Images
of your own, in `DIR/train/<class>/*` and `DIR/test/<class>/*`: `["--dataset", "folder",
"--data-dir", "DIR"]`."""


def cells():
    """Return (id, kind, source) of every cell."""
    yield "introduction", "markdown", INTRODUCTION
    for name in FILES:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8").rstrip("\n")
        yield f"file-{name}".replace("_", "-"), "code", f"%%writefile {name}.py\n{source}"
    yield "settings", "code", SETTINGS
    yield "train", "code", RUN
    yield "distill", "code", DISTILL
    yield "report", "code", REPORT
    yield "look", "code", LOOK
    yield "cifar", "markdown", CIFAR
    yield "cifar-run", "code", CIFAR_RUN
    yield "more", "markdown", FLAGS_TOO


def notebook():
    """Return the notebook's text."""
    made = []
    for name, kind, source in cells():
        cell = dict(cell_type=kind, id=name, metadata={}, source=source.splitlines(keepends=True))
        made.append(cell | (dict(execution_count=None, outputs=[]) if kind == "code" else {}))
    whole = dict(cells=made, metadata=dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python")), nbformat=4, nbformat_minor=5)
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main(argv):
    text = notebook()
    fresh = NOTEBOOK.exists() and NOTEBOOK.read_text(encoding="utf-8") == text
    if "--check" in argv and not fresh:
        print("error: tutor.ipynb is stale: run make notebook", file=sys.stderr)
        return 1
    if not fresh:
        NOTEBOOK.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
