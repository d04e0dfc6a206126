"""Tiny trainings from two checkouts, compared bit for bit.

    python tests/same_bits.py OLD_TREE [NEW_TREE]           NEW_TREE: this one
    python tests/same_bits.py OLD_TREE --only kd kd-cache
    python tests/same_bits.py OLD_TREE --keep DIR           next time only NEW_TREE is run

Every training runs as a user starts it, on one thread of the CPU, with its settings
typed. Weights, optimizer states, metrics.csv without its clocks, and the accuracies of
final.json must be equal. Exit code 1 where they are not.
"""
import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

COLOURS = {
    "blue": (40, 40, 220), "green": (40, 200, 40),
    "grey": (128, 128, 128), "red": (220, 40, 40),
}
COMMON = """
    --recipe digits --dataset folder --data-dir {work}/images --image-size 16 --fit resize
    --no-skip-bad --labels all --val-fraction 0.25 --normalise train --augment flip-crop
    --views 0 --init he --pool max --activation relu --norm none --epochs 2 --batch-size 16
    --lr 0.01 --weight-decay 0.05 --optimizer adamw --schedule onecycle --clip 1
    --ema-decay 0 --seed 0 --device cpu --precision fp32 --no-compile --no-deterministic
    --results-dir {work}/results --run {name}"""
DIGITS = """--dataset digits --data-dir {work}/digits --image-size 32 --augment crop
    --epochs 1 --batch-size 64 --lr 0.006 """

STUDENT = "train_student.py --arch digits-student "
TEACHER = "--teacher {work}/results/digits/teacher/best.pt "
KD = "distill.py --arch digits-student --objective kd --temperature 4 --alpha 0.9 "
KD_ONLY = "distill.py --arch digits-student --objective kd-only --temperature 4 "
CONSISTENCY = """distill.py --arch digits-student --objective consistency --teacher ema
    --class-weight 0.5 --class-cost ce --ramp-up 1 --warm-start 0 --noise 0,0,0,0 """
NOISE = "--ema-decay 0.9 --noise 0.5,0.5,0.3,0.1 --warm-start 1 "

# name -> script and flags, on top of COMMON.
TRAININGS = {
    "teacher": "train_teacher.py --arch digits-teacher --lr 0.005",
    "student": STUDENT,
    "kd": KD + TEACHER + "--no-cache",
    "kd-cache": KD + TEACHER + "--cache --views 2 --epochs 5",
    "kd-only": KD_ONLY + TEACHER + "--no-cache",
    "kd-ema": KD + "--teacher ema --ema-decay 0.9",
    "mean-teacher": CONSISTENCY + NOISE + "--epochs 4",
    "no-ema": CONSISTENCY + "--class-cost bce --epochs 3",
    "frozen-views": CONSISTENCY + TEACHER + "--cache --views 2 --epochs 3",
    "few-labels": CONSISTENCY + NOISE + "--labels 100 --class-weight 0.1 --epochs 4",
    "few-labels-kd": KD + TEACHER + "--no-cache --labels 100 --normalise half",
    "batch-norm": STUDENT + "--norm batch --ema-decay 0.9 --activation silu",
    "xavier-avg": STUDENT + "--init xavier --pool avg --optimizer adam",
    "freeze": STUDENT + """--init-from {work}/results/digits/student/best.pt --epochs 3
        --freeze features --unfreeze-at 2 --optimizer sgd --schedule cosine""",
    "bf16": STUDENT + "--precision bf16 --augment none --schedule constant --clip 0",
    "digits": STUDENT + DIGITS,
    "digits-labels": CONSISTENCY + NOISE + DIGITS + """--warm-start 0 --ramp-up 0
        --labels 500 --class-weight 0.1 --seed 1""",
    # Killed after its first epoch and resumed in NEW_TREE, trained at one go in OLD_TREE.
    "resumed": CONSISTENCY + NOISE + "--epochs 12",
}
# Which training runs before: for its weights, or to make the arrays of its data set.
FIRST = dict.fromkeys(TRAININGS, "teacher")
FIRST.update({"teacher": None, "freeze": "student", "digits-labels": "digits"})

# Both trees must have these; of all else, what both have is compared.
NEEDED = re.compile(
    r"best\.pt (model|ema)\.|checkpoint\.pt (networks|optimizer\.state)\."
    r"|metrics\.csv .*(epoch|train_loss|val_accuracy)$|final\.json test_accuracy")
IGNORED = re.compile(r"seconds$|images_per_second$|param_groups.*(fused|foreach)$")
COMPARED = {"best.pt": ("model", "ema"), "checkpoint.pt": ("networks", "optimizer")}
ROUNDING = 1e-3     # allowed with --pool avg, where the kernels may differ


class Failed(Exception):
    """A training that did not end well."""


# ---- trainings ----------------------------------------------------------------------

def make_images(root):
    """Write train/<class>/*.png and test/<class>/*.png: a coloured patch on noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, 200, (16, 16, 3))
                top, left = rng.integers(0, 8, 2)
                pixels[top:top + 8, left:left + 8] = colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def with_those_before(names):
    """Return the names and all that must run before them, in the order of TRAININGS."""
    needed = set()
    for name in names:
        while name:
            needed.add(name)
            name = FIRST[name]
    return [name for name in TRAININGS if name in needed]


class Tree:
    """A checkout, and the folder in which its trainings leave their results."""

    def __init__(self, root, work):
        self.root, self.work = root.resolve(), work.resolve()
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        self.options = dict(cwd=self.root, env=environment, stdout=subprocess.DEVNULL)
        if not (self.work / "images").exists():
            make_images(self.work / "images")

    def folder(self, name):
        return self.work / "results" / "digits" / name

    def train(self, name, kill=False):
        """Run a training, unless the same command already did."""
        words = COMMON.split() + TRAININGS[name].split()[1:]    # the last of a flag counts
        command = [sys.executable, TRAININGS[name].split()[0]]
        command += [word.format(work=self.work, name=name) for word in words]
        done, text = self.work / f"{name}.txt", f"{self.root}\n" + "\n".join(command)
        if done.exists() and done.read_text() == text:
            return
        shutil.rmtree(self.folder(name), ignore_errors=True)
        if kill:
            self.kill_after_an_epoch(command, self.folder(name))
            command.append("--resume")
        ended = subprocess.run(command, text=True, stderr=subprocess.PIPE, **self.options)
        if ended.returncode != 0:
            last = ended.stderr.strip().splitlines()[-1:]
            raise Failed(f"exit code {ended.returncode} in {self.root}: {''.join(last)}")
        done.write_text(text)

    def kill_after_an_epoch(self, command, folder):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **self.options)
        while process.poll() is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.002)
        process.kill()
        if process.wait() != -signal.SIGKILL or (folder / "curves.png").exists():
            raise Failed(f"in {self.root} it ended before it was killed")
        epochs = len((folder / "metrics.csv").read_text().splitlines()) - 1
        print(f"     {folder.name:<14} killed after epoch {epochs}, now resumed")


# ---- comparison ---------------------------------------------------------------------

def flatten(value, key):
    """Return dotted key -> tensor or plain value, of a nest of dicts and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {key: value}
    flat = {}
    for name, inner in items:
        flat.update(flatten(inner, f"{key}.{name}"))
    return flat


def contents(folder):
    """Return "file key" -> value, of all in a run's folder that is compared."""
    found = {}
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for column, text in row.items():
                value = float(text) if text else None
                found[f"metrics.csv epoch {row['epoch']} {column}"] = value
    for name, parts in COMPARED.items():
        state = torch.load(folder / name, weights_only=True, map_location="cpu")
        for part in parts:
            if state.get(part) is not None:
                found.update(flatten(state[part], f"{name} {part}"))
    final = json.loads((folder / "final.json").read_text())
    for key, value in final.items():
        if key.endswith("_accuracy") and value is not None:
            found[f"final.json {key}"] = value
    return {key: value for key, value in found.items() if not IGNORED.search(key)}


def difference(old, new):
    """Return None where both have the same bits, else the largest absolute difference."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        if old == new:
            return None
        numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
        return abs(old - new) if numbers else math.inf
    if old.dtype != new.dtype or old.shape != new.shape:
        return math.inf
    # As bytes, -0 is not 0 and nan is nan.
    if old.contiguous().numpy().tobytes() == new.contiguous().numpy().tobytes():
        return None
    largest = (old.double() - new.double()).abs().max().item()
    return math.inf if math.isnan(largest) else largest


def compare(old_folder, new_folder, rounding):
    """Return whether two runs agree, and a sentence that says so or what differs.

    rounding: the largest difference allowed; 0 for the same bits.
    """
    old, new = contents(old_folder), contents(new_folder)
    for key in {**old, **new}:
        if NEEDED.match(key) and (key not in old or key not in new):
            return False, f"{key} is in one tree only"
    shared = [key for key in old if key in new]
    differences = {key: difference(old[key], new[key]) for key in shared}
    differences = {key: size for key, size in differences.items() if size is not None}
    if not differences:
        return True, f"same bits ({len(shared)} values and tensors)"
    first, most = next(iter(differences)), max(differences, key=differences.get)
    text = (f"{len(differences)} of {len(shared)} differ, first {first} by "
            f"{differences[first]:.2g}, most {most} by {differences[most]:.2g}")
    if not rounding:
        return False, text
    return differences[most] < rounding, f"to rounding ({rounding:g}), not bits: {text}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_TREE")
    parser.add_argument("new", type=Path, metavar="NEW_TREE", nargs="?",
                        default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--only", nargs="+", choices=TRAININGS, metavar="NAME",
                        default=list(TRAININGS), help=", ".join(TRAININGS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="keep OLD_TREE's results there, for the next call")
    args = parser.parse_args()

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        old = Tree(args.old, args.keep or Path(temporary, "old"))
        new = Tree(args.new, Path(temporary, "new"))
        right = run_and_compare(old, new, args.only, args.jobs)
    print(f"{right} of {len(args.only)} agree, {time.perf_counter() - started:.0f} s")
    return 0 if right == len(args.only) else 1


def run_and_compare(old, new, names, jobs):
    """Run the trainings of both trees, print a line each; return how many agree."""
    right, futures = 0, {}

    def train(tree, name):
        if FIRST[name]:     # submitted before this one, so it is under way
            futures[tree, FIRST[name]].result()
        tree.train(name, kill=name == "resumed" and tree is new)

    with ThreadPoolExecutor(jobs) as pool:
        for name in with_those_before(names):
            for tree in (old, new):
                futures[tree, name] = pool.submit(train, tree, name)
        for name in names:
            rounding = ROUNDING if "--pool avg" in TRAININGS[name] else 0
            try:
                futures[old, name].result()
                futures[new, name].result()
                agree, text = compare(old.folder(name), new.folder(name), rounding)
            except (Failed, OSError) as error:
                agree, text = False, str(error)
            right += agree
            print(f"{'ok  ' if agree else 'DIFF'} {name:<14} {text}", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
