"""Run folders for tests, made without training: what matters is what is made of them."""
import csv
import json
import math
import random
from pathlib import Path

import pytest

import report
import runs

SIX = {  # run -> test accuracy of seeds 0, 1, 2 (in %), with differences that are easy by hand
    "teacher": (80, 82, 81), "student": (70, 71, 72), "kd": (73, 75, 74), "kd-only": (74, 74, 74),
    "mean-teacher": (72, 73, 74), "mean-teacher-no-ema": (71, 71, 71)}
AVERAGE = (73, 75, 77)  # of the mean teacher's weights


def make_run(results, name, seed=0, test=70.0, average=None, learned=True, epochs=6, **changed):
    """Write a finished run's three files, with curves that rise to its accuracy."""
    folder = Path(results) / "digits" / name
    folder.mkdir(parents=True)
    noise = random.Random(f"{name} {seed}")
    big = name.startswith("teacher")
    final = dict(
        schema=runs.SCHEMA, recipe="digits", run=name, script="train_student.py", seed=seed,
        arch="digits-student",
        parameters=1_234_567 if big else 45_678, macs=58_000_000 if big else 3_200_000,
        epochs=epochs, best_epoch=epochs, ema_best_epoch=None, val_accuracy=(test + 1) / 100,
        test_accuracy=test / 100, test_loss=0.7, ema_val_accuracy=None, ema_test_accuracy=None,
        last_test_accuracy=(test - 0.5) / 100, learned=learned, seconds=41.5,
        images_per_second=5000.0, setup_seconds=1.0, teacher_seconds=0.0, peak_memory_bytes=10**9,
        device="cpu", precision="fp32", torch="2.14.1")
    if average is not None:
        final |= dict(ema_best_epoch=epochs, ema_val_accuracy=(average + 1) / 100,
                      ema_test_accuracy=average / 100)
    config = dict(
        schema=runs.SCHEMA, recipe="digits", dataset="digits", data_dir="data", device="cpu",
        precision="fp32", epochs=epochs, batch_size=128, lr=0.001, seed=seed, augment="crop",
        views=0, labels=None, data_key="d" * 64, git_commit="c" * 40, date="2026-01-02")
    for key, value in changed.items():
        (final if key in final else config)[key] = value
    rows = []
    for epoch in range(1, epochs + 1):
        share = 1 - 0.55 * math.exp(-4 * epoch / epochs) + noise.uniform(-0.015, 0.01)
        score = final["test_accuracy"] * share if learned else 0.1
        mean = None if average is None else average / 100 * (share - 0.4 * math.exp(-epoch))
        rows.append(dict(
            epoch=epoch, train_loss=1.2 * math.log(1 / score), train_accuracy=min(1, score * 1.09),
            val_loss=1.6 * math.log(1 / score), val_accuracy=score, lr=0.001, seconds=5.0,
            ema_val_loss=None if mean is None else 1.6 * math.log(1 / mean), ema_val_accuracy=mean,
            images_per_second=5000.0))
    with open(folder / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, runs.METRICS)
        table.writeheader()
        table.writerows(rows)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "final.json").write_text(json.dumps(final))
    return folder


def make_six(results, seeds=1, only=tuple(SIX), **changed):
    for name in only:
        for seed in range(seeds):
            make_run(results, f"{name}-s{seed}", seed, SIX[name][seed],
                     AVERAGE[seed] if name == "mean-teacher" else None, **changed)
    return Path(results) / "digits"


def run(*words):
    return report.main([str(word) for word in words])


def numbers(results):
    """The report without its files: drawing takes most of a second."""
    return report.build("digits", results)[0]


def rows_of(result):
    return {row["key"]: row for row in result["rows"]}


def compared(result):
    return {entry["title"]: entry for entry in result["comparisons"]}


def refused(capsys, *words, code=2):
    """The one line that a refusal prints."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith("error: ") and line.count("\n") == 1, line
    return line
