"""What the finished runs of a recipe say: tables, paired comparisons, pictures.

    python report.py                      report.md, report.json, comparison.png
    python report.py publish              the same; small files into published/
    python report.py publish --sweep NAME a sweep's table and plot, likewise
    python report.py html                 results/report.html: all in one file

A row is all seeds of one run name. Two rows are compared seed by seed: runs of one
seed see the same images in the same order.
"""
import base64
import csv
import html
import json
import os
import re
import textwrap
import zipfile
from pathlib import Path
from statistics import mean, stdev

import numpy as np

import plots
import recipes
from recipes import SCHEMA, fail, one_line_errors, printable, read_json, write_whole

# Run name without its seed -> (label, what it is), in the order of the table. Any other
# run follows with its own name. One that kept an average of its weights has a second
# row, "<run>/average", and with BatchNorm a third, its statistics measured anew.
ROWS = {
    "teacher": ("teacher", "the large network, trained on the labels"),
    "student": ("student alone", "the student's network, trained on the labels alone"),
    "kd": ("kd", "the student, trained on the teacher's outputs and the labels"),
    "kd-only": ("kd-only", "the student, trained on the teacher's outputs alone"),
    "kd-ema": ("kd-ema", "kd, with the student's own moving average (EMA) as its teacher"),
    "mean-teacher": ("mean teacher, student", "kept consistent with its own moving average"),
    "mean-teacher/average": ("mean teacher, average", "that moving average"),
    "mean-teacher/recomputed": (
        "mean teacher, recomputed", "that average, BatchNorm's statistics measured anew"),
    "mean-teacher-no-ema": ("mean teacher, no EMA", "kept consistent with itself"),
}
# End of a row's key -> beginning of its keys in final.json.
NETWORKS = {"": "", "/average": "ema_", "/recomputed": "recomputed_"}
COMPARISONS = {     # title -> (row, minus this row, the question it answers)
    "kd - student alone": ("kd", "student", "does the teacher help?"),
    "kd-only - student alone": (
        "kd-only", "student", "does the teacher help, without labels?"),
    "kd-only - kd": ("kd-only", "kd", "does it help to leave the labels out?"),
    "kd, average - kd": ("kd/average", "kd", "is the average better?"),
    "kd-ema - student alone": ("kd-ema", "student", "does its own EMA help as a teacher?"),
    "kd-ema, average - kd-ema": ("kd-ema/average", "kd-ema", "is the average better?"),
    "kd - teacher": ("kd", "teacher", "is the distilled student better than its teacher?"),
    "mean teacher, student - alone": ("mean-teacher", "student", "does mean teacher help?"),
    "mean teacher, average - alone": (
        "mean-teacher/average", "student", "does it help, where the average is used?"),
    "mean teacher, no EMA - alone": (
        "mean-teacher-no-ema", "student", "does consistency help without the EMA?"),
    "mean teacher, student - no EMA": (
        "mean-teacher", "mean-teacher-no-ema", "does the EMA teacher help its student?"),
    "mean teacher, average - no EMA": (
        "mean-teacher/average", "mean-teacher-no-ema",
        "does EMA help, where its average is used?"),
    "mean teacher, average - teacher": (
        "mean-teacher/average", "teacher", "does it help a network of the teacher's size?"),
    "average - its student": (
        "mean-teacher/average", "mean-teacher", "is the average better?"),
    "student alone - teacher": ("student", "teacher", "is the small network better?"),
}
OF_TWO_SIZES = {"student alone - teacher", "kd - teacher"}      # the others: of one network
SETTINGS = (        # said under the table
    "dataset", "labels", "augment", "views", "init", "pool", "norm", "epochs", "batch_size",
    "lr", "weight_decay", "optimizer", "ema_decay", "temperature", "alpha", "class_weight",
    "ramp_up", "device", "precision", "torch", "git_commit", "date")
# What all seeds of one row have in common: every flag but those that say where and how.
COMMON = {"minimises", "data_key", *recipes.DEFAULTS} - {
    "seed", "teacher", "init_from", "cache", "data_dir", "skip_bad", "results_dir", "run",
    "resume", "overwrite", "dry_run"}
ACCURACIES = ("val_accuracy", "test_accuracy", "last_test_accuracy")
BINS = 15           # of confidence, as Guo et al. 2017 have it


# ---- runs and rows ------------------------------------------------------------------

def read_runs(folder):
    """Return the finished runs below a recipe's folder; final.json is written last."""
    return [read_run(file.parent) for file in sorted(Path(folder).glob("[!.]*/final.json"))]


def read_run(folder):
    """Return {"name", "config", "final", "history"} of a finished run.

    history: the rows of metrics.csv, floats or None.
    """
    folder, history = Path(folder), []
    config, final = read_json(folder / "config.json"), read_json(folder / "final.json")
    try:
        with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                history.append({key: float(text) if text else None for key, text in row.items()})
        if len(history) != final["epochs"]:
            raise ValueError(f"{len(history)} epochs, not {final['epochs']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{folder / 'metrics.csv'}: cannot be read ({error}); train this run again with "
             "--overwrite, or remove its folder")
    return {"name": folder.name, "config": config, "final": final, "history": history}


def read_outputs(folder, prefix=""):
    """Return (logits (N, C), labels (N,)) on the test split, or None where none were kept."""
    file = folder / "test.npz"
    if not file.exists():
        return None
    try:
        with np.load(file) as arrays:
            if prefix + "logits" in arrays:
                return arrays[prefix + "logits"], arrays["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        fail(f"{file}: cannot be read ({error}); train this run again with --overwrite, or "
             "remove the file")
    return None


def earlier_report(folder):
    """Return the report.json in a folder, or one without rows."""
    file = folder / "report.json"
    return read_json(file) if file.exists() else {"rows": []}


def group_runs(runs):
    """Return run name without its seed -> {seed: run}, in the order of the table.

    "kd-s0" is a seed of kd. A run that --run called "kd" may be anything: "run kd".
    """
    groups = {}
    for run in runs:
        seed = run["final"]["seed"]
        key = run["name"].removesuffix(f"-s{seed}")
        if key == run["name"]:
            key = f"run {key}"
        groups.setdefault(key, {})[seed] = run
    order = [key for key in ROWS if key in groups] + sorted(groups.keys() - ROWS.keys())
    return {key: dict(sorted(groups[key].items())) for key in order}


def label(key):
    """Return what a row is called: its entry in ROWS, else the run's own name."""
    name, _, network = key.partition("/")
    if key in ROWS:
        return ROWS[key][0]
    return f"{label(name)}, {network}" if network else printable(name)


def teacher_of(run):
    """Return the name of the run that taught this one; of a student alone, the teacher of
    its seed. None: the teacher is no run of this recipe."""
    given = run["config"].get("teacher")
    if given in (None, "ema"):
        return f"teacher-s{run['final']['seed']}"
    folder = Path(given).parent
    return folder.name if folder.parent.name == run["final"]["recipe"] else None


def make_rows(groups):
    """Return row key -> row: lists of one value a seed, and summaries of such lists."""
    rows = {}
    for group, members in groups.items():
        for network, prefix in NETWORKS.items():
            score = prefix + "test_accuracy"
            runs = [run for run in members.values() if run["final"].get(score) is not None]
            if runs:
                rows[group + network] = make_row(group + network, prefix, runs)
    return rows


def make_row(key, prefix, runs):
    """Return one row. prefix: of NETWORKS. Accuracies go from 0 to 1."""
    finals, configs = each(runs, "final"), each(runs, "config")
    row = dict(
        key=key, label=label(key), prefix=prefix, seeds=each(finals, "seed"),
        runs=each(runs, "name"), teachers=list(map(teacher_of, runs)),
        taught=each(configs, "teacher_sha256"), data=each(configs, "data_key"),
        weights=each(finals, "weights_sha256"), learned=all(each(finals, "learned")), mixed={},
        silent=[final["seed"] for final in finals if not final["learned"]])
    for name in ("parameters", "macs", "epochs", "seconds"):
        row[name] = summary(each(finals, name))
    for name in ACCURACIES:
        row[name] = summary(each(finals, prefix + name))
    for setting in sorted(COMMON):
        values = runs_by_value(runs, setting)
        if len(values) > 1:     # not one thing measured several times
            row["mixed"][setting] = values
    return row


def each(dicts, key):
    return [one.get(key) for one in dicts]


def summary(values):
    """Return {"values", "mean", "sd"}; sd is the sample standard deviation."""
    found = {"values": values, "mean": None, "sd": None}
    if None not in values:
        found["mean"] = mean(values)
        if len(values) > 1:
            found["sd"] = stdev(values)
    return found


def runs_by_value(runs, setting):
    """Return value of a setting, as text -> names of the runs that have it."""
    found = {}
    for run in runs:
        known = {**run["config"], **run["final"]}
        if setting in known:
            value = known[setting]
            if setting == "labels" and value is None:
                value = "all"
            elif setting == "git_commit":
                value = str(value)[:12] + str(value)[40:]       # -dirty
            found.setdefault(str(value), []).append(run["name"])
    return found


# ---- comparisons --------------------------------------------------------------------

def interval(differences):
    """Return (mean, low, high) of paired differences, with the 95 % interval of Student's t;
    one difference has none: low and high are None."""
    n, centre = len(differences), mean(differences)
    if n < 2:
        return centre, None, None
    from scipy.special import stdtrit  # faster to import than scipy.stats
    half = float(stdtrit(n - 1, 0.975)) * stdev(differences) / n**0.5
    return centre, centre - half, centre + half


def verdict(low, high, learned=True):
    """Return what an interval says; one without width, or none at all, cannot tell."""
    if not learned:
        return "no conclusion"
    if low is None or low <= 0 <= high or np.isclose(low, high):
        return "cannot tell"
    return "helps" if low > 0 else "hurts"


def pair_up(a, b, name):
    """Return ({seed: (a's, b's)} of one figure, why there is no other pair).

    Pairs learned from the same data and the same teacher; where b is the teacher's row, a
    from b. What older runs do not say makes no difference.
    """
    pairs, reason = {}, "no shared seed"
    teacher = "weights" if b["key"] == "teacher" else "taught"
    for ours, seed in enumerate(a["seeds"]):
        if seed in b["seeds"]:
            theirs = b["seeds"].index(seed)
            if differ(a["data"][ours], b["data"][theirs]):
                reason = "other data"
            elif differ(a["taught"][ours], b[teacher][theirs]):
                reason = "other teachers"
            else:
                pairs[seed] = a[name]["values"][ours], b[name]["values"][theirs]
    return pairs, reason


def differ(a, b):
    return None not in (a, b) and a != b


def compare(rows, objectives=()):
    """Return the comparisons of the rows that are there, in points of accuracy.

    objectives: keys of other rows, to be compared with the student alone and with kd.
    """
    wanted, found = dict(COMPARISONS), []
    for key in objectives:
        wanted[f"{label(key)} - student alone"] = (key, "student", "does the objective help?")
        wanted[f"{label(key)} - kd"] = (key, "kd", "is it better than kd?")
    for title, (a, b, question) in wanted.items():
        if a not in rows or b not in rows:
            continue
        first, second = rows[a], rows[b]
        one_size = first["parameters"]["mean"] == second["parameters"]["mean"]
        if one_size or title in OF_TWO_SIZES:
            found.append({"title": title, "question": question, "a": a, "b": b,
                          "best": difference(first, second, "test_accuracy"),
                          "last": difference(first, second, "last_test_accuracy")})
    return found


def difference(a, b, name):
    """Return a - b in points: seeds, n, mean, the ends of the interval, verdict."""
    pairs, said = pair_up(a, b, name)
    centre = low = high = None
    if pairs and None in sum(pairs.values(), ()):
        said = "not recorded"
    elif pairs:
        centre, low, high = interval([100 * (x - y) for x, y in pairs.values()])
        doubtful = a["mixed"] or b["mixed"] or pairs.keys() & {*a["silent"], *b["silent"]}
        said = verdict(low, high, not doubtful)
    return {"seeds": list(pairs), "n": len(pairs), "mean": centre, "low": low, "high": high,
            "verdict": said}


def gap(row, rows):
    """Return (row - student alone) / (teacher - student alone) in test accuracy, or None.

    Row and student alone are averaged over the seeds that both have; the teacher over
    these where it has any, else (one teacher for all) over its own.
    """
    if "student" not in rows or "teacher" not in rows:
        return None
    student, teacher = rows["student"], rows["teacher"]
    pairs, _ = pair_up(row, student, "test_accuracy")
    if not pairs or row["mixed"] or not all(each([row, student, teacher], "learned")):
        return None
    own, alone = map(mean, zip(*pairs.values(), strict=True))
    values = teacher["test_accuracy"]["values"]
    top = [one for seed, one in zip(teacher["seeds"], values, strict=True) if seed in pairs]
    whole = mean(top or values) - alone
    return (own - alone) / whole if whole > 0 else None


# ---- outputs on the test split ------------------------------------------------------

def log_softmax(logits):
    """Return log-probabilities of logits, (N, C), in float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def calibration(logits, labels):
    """Return (expected calibration error, bins), of logits (N, C) and labels (N,).

    The mean of |accuracy - confidence|, weighted by rows, from 0 to 1; a bin is (mean
    confidence, accuracy, rows). Guo et al. 2017, arXiv 1706.04599, section 2.
    """
    confidence = np.exp(log_softmax(logits).max(1))
    right = logits.argmax(1) == labels
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    _, places, rows = np.unique(places, return_inverse=True, return_counts=True)
    sure = np.bincount(places, confidence) / rows
    share = np.bincount(places, right) / rows
    error = (rows * abs(share - sure)).sum() / len(labels)
    return float(error), list(zip(sure, share, rows, strict=True))


def confusion(logits, labels):
    """Return counts, (C, C): row the true class, column the predicted one."""
    classes = logits.shape[1]
    places = labels * classes + logits.argmax(1)
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def against(student, teacher):
    """Return (share of rows where both predict the same class, mean KL(teacher ‖ student)).

    student, teacher: logits (N, C) of the same rows.
    """
    p, q = log_softmax(teacher), log_softmax(student)
    agreement = (student.argmax(1) == teacher.argmax(1)).mean()
    divergence = (np.exp(p) * (p - q)).sum(1).mean()
    return float(agreement), float(divergence)


def outdated_runs(rows):
    """Return the names of runs whose teacher, a run of this recipe, was trained again since."""
    weights, found = {}, []
    for row in rows.values():
        weights.update(zip(row["runs"], row["weights"], strict=True))
    for row in rows.values():
        for name, teacher, taught in zip(row["runs"], row["teachers"], row["taught"], strict=True):
            changed = taught and weights.get(teacher) not in (taught, None)
            if changed and name not in found:       # a run and its average are two rows
                found.append(name)
    return found


def add_output_figures(rows, folder):
    """Set row["beside"]: calibration, agreement with the teacher, accuracy of each class.

    From the outputs on test; where runs kept none, as in published/, from an earlier
    report of the same runs. Return row key -> [(logits, labels) of each run].
    """
    outputs, outdated = {}, outdated_runs(rows)
    for key, row in rows.items():
        errors, shares, pairs, row["beside"] = [], [], [], {}
        for name, teacher in zip(row["runs"], row["teachers"], strict=True):
            own = read_outputs(folder / name, row["prefix"])
            if own is None or row["mixed"]:
                continue
            outputs.setdefault(key, []).append(own)
            counts = confusion(*own)
            shares.append(counts.diagonal() / counts.sum(1).clip(1))
            errors.append(calibration(*own)[0])
            other = None
            if teacher and key != "teacher" and name not in outdated:
                other = read_outputs(folder / teacher)
            if other and np.array_equal(own[1], other[1]):
                pairs.append(against(own[0], other[0]))
        if shares:
            row["beside"] = {"n": len(shares), "calibration": summary(errors),
                             "classes": np.mean(shares, 0).tolist()}
        if pairs:
            agreement, divergence = map(list, zip(*pairs, strict=True))
            row["beside"].update(agreement=summary(agreement), divergence=summary(divergence))
    for old in earlier_report(folder)["rows"]:
        row = rows.get(old["key"], old)
        same = all(row[name] == old.get(name) for name in ("runs", "weights", "test_accuracy"))
        if same and not row["beside"]:
            row["beside"] = old["beside"]
    return outputs


# ---- the report ---------------------------------------------------------------------

def build(recipe, results_dir="results"):
    """Return (what report.json holds, runs, outputs of add_output_figures) of a recipe."""
    folder = Path(results_dir, recipe)
    runs = read_runs(folder)
    if not runs:
        fail(f"no finished run below {folder}; `make all` trains those of a recipe")
    unfinished = [place.name for place in sorted(folder.glob("[!.]*/"))
                  if not (place / "final.json").exists()]
    groups = group_runs(runs)
    rows = make_rows(groups)
    for row in rows.values():
        row["gap"] = gap(row, rows)
    outputs, known, objectives = add_output_figures(rows, folder), {}, []
    for key, members in groups.items():
        config = next(iter(members.values()))["config"]
        known.update(config)
        if key not in ROWS and config.get("objective"):
            objectives.append(key)
    report = dict(
        schema=SCHEMA, recipe=recipe, rows=list(rows.values()),
        comparisons=compare(rows, objectives), notes=make_notes(groups, rows, unfinished),
        chance=1 / known["classes"], classes=known.get("class_names"))
    return report, runs, outputs


def make_notes(groups, rows, unfinished):
    """Return the lines under the table: settings, and what is doubtful or missing."""
    common, differ, notes = [], [], []
    for setting in SETTINGS:
        owners = {}         # value -> labels of the rows that have it
        for group, members in groups.items():
            for value in runs_by_value(members.values(), setting):
                owners.setdefault(value, []).append(label(group))
        if len(owners) > 1:
            differ.append(f"{setting} {in_words(owners)}")
        elif owners:
            common.append(f"{setting} {in_words(owners)}")
    if differ:
        notes.append(f"The runs differ in: {'; '.join(differ)}.")
    for group, members in groups.items():
        notes += row_notes(rows[group], members.values())
    outdated = outdated_runs(rows)
    if outdated:
        notes.append(f"Their teacher was trained again since: {', '.join(outdated)}.")
    if unfinished:
        notes.append(f"Unfinished, not shown: {', '.join(unfinished)}.")
    if "student" not in rows:
        notes.append("Missing: the student alone, to compare with; train_student.py makes it.")
    return [f"Made with: {'; '.join(common)}.", *map(printable, notes)]


def in_words(owners):
    """Return "8, but 10 (teacher)" of {value: names}, the most common value first."""
    text, *others = sorted(owners, key=lambda value: -len(owners[value]))
    for value in others:
        text += f", but {value} ({', '.join(owners[value])})"
    return text


def row_notes(row, runs):
    """Return what a row's runs minimise, and what is doubtful about them."""
    name = row["label"]
    notes = [f"{name} minimises {text}." for text in runs_by_value(runs, "minimises")]
    others = [f"{run['name']} ({teacher_of(run) or run['config']['teacher']})" for run in runs
              if teacher_of(run) != f"teacher-s{run['final']['seed']}"]
    if others:
        notes.append(f"{name}: taught by another than the teacher of their seed: "
                     f"{', '.join(others)}.")
    for seed in row["silent"]:
        notes.append(f"(!) {name}, seed {seed}: no conclusion, accuracy not above chance.")
    for setting, owners in row["mixed"].items():
        notes.append(f"(!) {name}: no conclusion, its seeds have other settings: {setting} "
                     f"{in_words(owners)}. Remove runs, or run them under another --run.")
    return notes


# ---- tables -------------------------------------------------------------------------

COLUMNS = ("run", "n", "parameters", "multiply-adds", "epochs", "validation %", "test %",
           "test %, last epoch", "gap", "seconds")
SHOWN = ("run", "n", "parameters", "epochs", "test %", "gap", "seconds")    # on the terminal
COMPARED = ("comparison", "question", "n", "best epoch: points [95 %]", "verdict",
            "last epoch: points [95 %]", "verdict")
OUTPUTS = ("run", "n", "calibration error %", "agreement with teacher %", "KL to teacher",
           "worst class %", "best class %")
WRAP = textwrap.TextWrapper(80, subsequent_indent="  ", break_on_hyphens=False)
EXPLANATION = """\
Accuracies are of the best validation epoch, or without validation images (-) of the last;
test was scored once. Figures are mean ± sample standard deviation over n seeds. Gap: the
share of the way from student alone to teacher, both over the row's seeds as far as they have
them (-: there is no such way, or one of the three learned nothing). Comparisons: points of
test accuracy, paired by seed (same data, same teacher), with the 95 % interval of Student's
t; where it holds 0 or has no width, and with one seed, the runs cannot tell. Calibration
error: how far confidence is from the share that is right (Guo et al. 2017). Agreement: the
share of test images where student and teacher say the same class. KL: from the teacher's
softmax to the student's, mean over test.
"""


def pipes(header, lines):
    """Return a Markdown table; words stand to the left, numbers to the right."""
    header = list(header)
    words = (header[0], "question", "verdict")
    sides = ["---" if name in words else "---:" for name in header]
    text = []
    for line in (header, sides, *lines):
        cells = " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line)
        text.append(f"| {cells} |")
    return "\n".join(text)


def aligned(lines, width=80):
    """Return a table for the terminal; the first column is cut where it would be too wide."""
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first = min(first, width - sum(others) - 2 * len(others))
    text = []
    for name, *cells in lines:
        padded = map(str.rjust, cells, others)
        text.append("  ".join([f"{name:<{first}.{first}}", *padded]))
    return "\n".join(text)


def percent(figure, scale=100, digits=2):
    """Return "73.00 ±1.00", or "-"."""
    if figure is None or figure["mean"] is None:
        return "-"
    text = f"{scale * figure['mean']:.{digits}f}"
    return text if figure["sd"] is None else f"{text} ±{scale * figure['sd']:.{digits}f}"


def count(number):
    """Return "45.7 k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def points(entry):
    """Return "+1.20 [+0.31, +2.09]", or "-" where nothing may be concluded."""
    if entry["mean"] is None or entry["verdict"] == "no conclusion":
        return "-"
    if entry["low"] is None:
        return "{mean:+.2f}".format(**entry)
    return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**entry)


def row_cells(row):
    """Return what a table shows of a row, in the order of COLUMNS."""
    name, share = row["label"], "-"
    if row["mixed"] or not row["learned"]:
        name = f"(!) {name}"
    if row["gap"] is not None:
        share = f"{100 * row['gap']:.0f} %"
    sizes = map(count, each([row["parameters"], row["macs"]], "mean"))
    scores = map(percent, map(row.get, ACCURACIES))
    return [name, str(len(row["seeds"])), *sizes, f"{row['epochs']['mean']:g}", *scores, share,
            f"{row['seconds']['mean']:.0f}"]


def output_cells(row, names):
    """Return one line of OUTPUTS; names: of the classes, or None."""
    found, shares = row["beside"], row["beside"]["classes"]
    if not names or len(names) != len(shares):
        names = range(len(shares))
    cells = [row["label"], str(found["n"]), percent(found["calibration"]),
             percent(found.get("agreement")), percent(found.get("divergence"), 1, 3)]
    for place in (np.argmin(shares), np.argmax(shares)):
        cells.append(f"{100 * shares[place]:.2f} ({names[place]})")
    return cells


def markdown(report):
    """Return report.md."""
    notes = "\n".join(f"- {note}" for note in report["notes"])
    parts = [f"# {report['recipe']}", pipes(COLUMNS, map(row_cells, report["rows"])), notes,
             "![all runs](comparison.png)"]
    compared, outputs, known = [], [], []
    for entry in report["comparisons"]:
        best, last = entry["best"], entry["last"]
        compared.append([entry["title"], entry["question"], str(best["n"]), points(best),
                         best["verdict"], points(last), last["verdict"]])
    for row in report["rows"]:
        if row["beside"]:
            outputs.append(output_cells(row, report["classes"]))
        if row["key"] in ROWS:
            known.append(f"- {': '.join(ROWS[row['key']])}")
    if compared:
        parts += ["## Comparisons", pipes(COMPARED, compared)]
    if outputs:
        parts += ["## Calibration, agreement, classes", pipes(OUTPUTS, outputs),
                  "![calibration and confusion](details.png)"]
    return "\n\n".join([*parts, "## Rows and figures", "\n".join(known), EXPLANATION])


def terminal(report):
    """Return what is printed, in 80 columns: verdicts, table, notes."""
    lines, table = [], [SHOWN]
    for entry in report["comparisons"]:
        title, best = entry["title"], entry["best"]
        sentence = f"{title}: {best['verdict']}"
        if points(best) != "-":
            sentence += f", {points(best)} points, n {best['n']}"
        lines.append(WRAP.fill(sentence))
    if max(map(len, each(report["rows"], "seeds"))) == 1:
        lines.append('One seed cannot tell; for more add SEEDS="0 1 2" to make, or --seed 1')
    for cells in map(row_cells, report["rows"]):
        table.append([cells[COLUMNS.index(name)] for name in SHOWN])
    return "\n".join([*lines, "", aligned(table), "", *map(WRAP.fill, report["notes"])])


# ---- one HTML file ------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tutor: results</title><style>
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8888; text-align: left; }
td { white-space: nowrap; }
img { max-width: 100%; background: #fff; }
</style></head><body><h1>Tutor: results</h1>"""


def to_html(text, folder):
    """Return the Markdown of a report or a sweep as HTML, its pictures inside."""
    def picture(found):
        data = base64.b64encode((folder / found[2]).read_bytes()).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{found[1]}">'

    text = html.escape(html.unescape(text))
    for start, new in (
            ("## (.*)", r"<h3>\1</h3>"), ("# (.*)", r'<h2 id="\1">\1</h2>'),
            ("- (.*)", r"<li>\1</li>"), (r"!\[(.*)\]\((.*)\)", picture),
            (r"(?:\|.*\n)+", html_table)):
        text = re.sub(f"^{start}", new, text, flags=re.MULTILINE)
    return text.replace("\n\n", "\n<p>")


def html_table(found):
    """Return a Markdown table that a regular expression found, as HTML."""
    header, _, *lines = found[0].splitlines()
    table = ""
    for line in (header, *lines):
        tag = "th" if line is header else "td"
        cells = line[2:-2].replace(" | ", f"</{tag}><{tag}>").replace("\\|", "|")
        table += f"<tr><{tag}>{cells}</{tag}></tr>\n"
    return f"<table>{table}</table>\n"


# ---- commands -----------------------------------------------------------------------

def update(recipe, results_dir):
    """Return a recipe's report; write it and its pictures where a run or a script is newer."""
    folder = Path(results_dir, recipe)
    report, picture = earlier_report(folder), folder / "comparison.png"     # written last
    finals = list(folder.glob("[!.]*/final.json"))
    if picture.exists() and len(finals) == len({*sum(each(report["rows"], "runs"), [])}):
        times = map(os.path.getmtime, [*finals, __file__, plots.__file__])
        if max(times) < os.path.getmtime(picture):
            return report
    report, runs, outputs = build(recipe, results_dir)
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / "report.md", markdown(report).encode())
    panels = {}
    for key in list(outputs)[:4]:
        logits, labels = map(np.concatenate, zip(*outputs[key], strict=True))
        panels[label(key)] = calibration(logits, labels)[1], confusion(logits, labels)
    if panels:
        plots.draw_details(panels, folder / "details.png", recipe, report["classes"])
    plots.draw_comparison(report["rows"], runs, picture, recipe, report["chance"])
    return report


def write_report(args):
    """Write the report of a recipe, unless nothing has changed, and print it."""
    report, folder = update(args.recipe, args.results_dir), Path(args.results_dir, args.recipe)
    print(f"{terminal(report)}\n\nreport   {printable(folder / 'report.md')}")
    print(f"picture  {printable(folder / 'comparison.png')}")
    return report


def publish(args):
    """Copy a report, or a sweep's table, and small files of its runs, into published/."""
    root, place = Path(args.results_dir), Path(args.recipe)
    if not args.sweep:
        write_report(args)
    else:
        place = Path("sweeps", args.sweep)
        if not (root / place / "sweep.md").exists():
            fail(f"--sweep {args.sweep}: no sweep.md in {root / place}; sweep.py makes it")
    for pattern in PUBLISHED:
        for source in (root / place).glob(pattern):
            target = root / "published" / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, source.read_bytes())
    print(f"published in {printable(root / 'published' / place)}")
    return place


def write_page(args):
    """All recipes and sweeps of a results folder in one HTML file, pictures inside."""
    root, body = Path(args.results_dir), []
    for folder in sorted({file.parents[1] for file in root.glob("[!.]*/*/final.json")}):
        body.append(to_html(markdown(update(folder.name, root)), folder))
    for file in sorted(root.glob("sweeps/*/sweep.md")):
        title, text = f"# sweeps/{file.parent.name}", file.read_text(encoding="utf-8")
        body.append(to_html(f"{title}\n\n{text}\n\n![sweep](sweep.png)\n", file.parent))
    if not body:
        fail(f"no finished run below {root}; `make all` trains those of the digits")
    names = re.findall('<h2 id="(.*)">', "".join(body))
    links = [f'<a href="#{name}">{name}</a>' for name in names]
    page = root / "report.html"
    write_whole(page, "\n".join([PAGE, ", ".join(links), *body]).encode())
    print(f"page     {printable(page)}")
    return names


COMMANDS = {"report": write_report, "publish": publish, "html": write_page}
PUBLISHED = ("*.md", "*.json", "*.csv", "*.png", "*/*.json", "*/*.csv", "*/curves.png")


def main(argv=None):
    """Run one command; return the report (publish, html: what they show)."""
    parser = recipes.Parser(description=__doc__)
    parser.add_argument("command", nargs="?", default="report", help="report, publish or html")
    parser.add_argument("--results-dir", type=recipes.path, default="results", metavar="DIR")
    parser.add_argument("--recipe", default="digits", metavar="NAME", help="(%(default)s)")
    parser.add_argument("--sweep", metavar="NAME", help="publish: a sweep")
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        parser.error(f"unknown command {args.command!r}; give report, publish or html")
    if args.sweep and args.command != "publish":
        parser.error("--sweep: publish takes it alone")
    with one_line_errors():
        return COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
