"""Run folders for tests, made without training: what matters is what is made of them."""
import csv
import json
import math
from pathlib import Path

import pytest

import report
from recipes import SCHEMA

SIX = {  # run -> test accuracy of seeds 0, 1, 2 (in %), with differences that are easy by hand
    "teacher": (80, 82, 81), "student": (70, 71, 72), "kd": (73, 75, 74),
    "kd-only": (74, 74, 74), "mean-teacher": (72, 73, 74), "mean-teacher-no-ema": (71, 71, 71)}
AVERAGE = (73, 75, 77)  # of the mean teacher's weights


def make_run(results, name, seed=0, test=70.0, average=None, learned=True, epochs=6,
             recipe="digits", **changed):
    """Write a finished run's three files, with curves that rise to its accuracy.

    changed: keys of final.json, and others of config.json.
    """
    folder = Path(results) / recipe / name
    folder.mkdir(parents=True)
    big = name.startswith("teacher")
    final = dict(
        schema=SCHEMA, recipe=recipe, run=name, seed=seed, epochs=epochs, best_epoch=epochs,
        parameters=1_234_567 if big else 45_678, macs=58_000_000 if big else 3_200_000,
        val_accuracy=(test + 1) / 100, test_accuracy=test / 100,
        last_test_accuracy=(test - 0.5) / 100, learned=learned, seconds=41.5, device="cpu",
        precision="fp32", torch="2.14.1", weights_sha256=None, ema_test_accuracy=None)
    if average is not None:
        final |= dict(ema_val_accuracy=(average + 1) / 100, ema_test_accuracy=average / 100)
    config = dict(
        schema=SCHEMA, recipe=recipe, dataset="digits", data_dir="data", device="cpu",
        precision="fp32", epochs=epochs, batch_size=128, lr=0.001, seed=seed,
        augment="crop", views=0, labels=None, data_key="d" * 64, classes=10,
        git_commit="c" * 40, date="2026-01-02")
    for key, value in changed.items():
        target = final if key in final else config
        target[key] = value
    write_history(folder / "metrics.csv", final, average)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "final.json").write_text(json.dumps(final))
    return folder


def write_history(path, final, average):
    """Write curves that rise to the test accuracy; where it did not learn they stay low."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                        "ema_val_loss", "ema_val_accuracy"])
        for epoch in range(1, final["epochs"] + 1):
            share = 1 - 0.55 * math.exp(-4 * epoch / final["epochs"])
            score = final["test_accuracy"] * share if final["learned"] else 0.1
            row = [epoch, math.log(1 / score), score, 1.6 * math.log(1 / score), score]
            if average is not None:
                row += [math.log(100 / average / share), average / 100 * share]
            table.writerow(row)


def make_six(results, seeds=1, only=tuple(SIX), **changed):
    for name in only:
        for seed in range(seeds):
            average = AVERAGE[seed] if name == "mean-teacher" else None
            make_run(results, f"{name}-s{seed}", seed, SIX[name][seed], average, **changed)
    return Path(results) / "digits"


def edit(file, **changed):
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def run(*words):
    return report.main([str(word) for word in words])


def numbers(results, recipe="digits"):
    """The report without its files: drawing takes most of a second."""
    return report.build(recipe, results)[0]


def rows_of(result):
    return {row["key"]: row for row in result["rows"]}


def compared(result):
    return {entry["title"]: entry for entry in result["comparisons"]}


def refused(capsys, *words):
    """The one line that a refusal prints."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line
