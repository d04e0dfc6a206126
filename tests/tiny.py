"""What the tests share: small image folders, runs on them in a blink, how results are read."""
import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import train_student
import train_teacher

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"        # archives of real images, where there are any
COLOURS = {"blue": (40, 40, 220), "green": (40, 200, 40), "grey": (128, 128, 128),
           "red": (220, 40, 40)}
SIDE = 16
ENOUGH = 6              # epochs after which a network has learned the easy folder
SIX = {
    "teacher-s0": (train_teacher, ()),
    "student-s0": (train_student, ()),
    "kd-s0": (distill, ()),
    "kd-only-s0": (distill, ("--objective", "kd-only")),
    "mean-teacher-s0": (distill, ("--objective", "consistency", "--ema-decay", 0.8)),
    "mean-teacher-no-ema-s0": (distill, ("--objective", "consistency", "--ema-decay", 0)),
}
CLOCKS = ("seconds", "images_per_second", "setup_seconds", "teacher_seconds", "peak_memory_bytes")


def images(count, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def make_folder(root, train=40, test=20, easy=True, side=SIDE, seed=0):
    """Write train/<class>/*.png and test/<class>/*.png; return root. Easy: a patch of the class's
    colour on noise; else noise alone."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, 200, (side, side, 3))
                if easy:
                    top, left = rng.integers(0, side // 2, 2)
                    pixels[top:top + side // 2, left:left + side // 2] = colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def words(folder, results, *flags, epochs=2):
    """The command line of a tiny run; flags that come later win."""
    return [str(word) for word in (
        "--recipe", "digits", "--dataset", "folder", "--data-dir", folder, "--image-size", SIDE,
        "--results-dir", results, "--epochs", epochs, "--batch-size", 16, "--lr", 0.01,
        "--val-fraction", 0.25, "--device", "cpu", "--precision", "fp32", *flags)]


def run(script, folder, results, *flags, epochs=2):
    """A tiny run; return its final dict."""
    return script.main(words(folder, results, *flags, epochs=epochs))


def make(*arguments, **options):
    """`make` in the checkout, as the user types it."""
    # Not as a part of the make that runs the tests.
    env = {key: value for key, value in (options.pop("env", None) or os.environ).items()
           if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "--no-print-directory", "-C", ROOT, *arguments], text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, env=env, **options)


def copy_teacher(source, results):
    shutil.copytree(source / "digits" / "teacher-s0", results / "digits" / "teacher-s0")
    return results


def metrics(folder, clocks=False):
    """The rows of a run's metrics.csv; without what a clock measured."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if clocks or key not in CLOCKS}
                for row in csv.DictReader(file)]


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nests of dicts, lists, tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
                and torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def outcome(folder):
    """All that a run leaves, but for what a clock measured and where it lies."""
    final = json.loads((folder / "final.json").read_text())
    state = load(folder / "checkpoint.pt")
    state["history"] = [{key: value for key, value in row.items() if key not in CLOCKS}
                        for row in state["history"]]
    return dict(final={key: value for key, value in final.items() if key not in CLOCKS},
                state=state, metrics=metrics(folder), best=load(folder / "best.pt"),
                outputs=(folder / "test.npz").read_bytes())


def said(capsys):
    """What was printed, as one line: long lines are folded wherever they get too long."""
    return " ".join(capsys.readouterr().out.split())


def refused(capsys, script, argv, *parts, code=2):
    """Assert that a call ends with one line on stderr that holds all the parts; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in argv])
    line = capsys.readouterr().err
    assert stop.value.code == code, line
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    for part in parts:
        assert str(part) in line, f"{part!r} is not in {line!r}"
    return line
