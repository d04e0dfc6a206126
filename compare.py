"""Finished runs, read back: rows of a table, paired comparisons with intervals, and what accuracy
does not say. No command of its own, and no torch.
"""
import csv
import json
import zipfile
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from files import plain_file, read_text
from flags import fail, plain
from runs import ALTERED, FACTS, FREE, METRICS, altered, is_accuracy, refuse_version, teacher_of

# ---- rows of a table --------------------------------------------------------------------------

# Rows in the order of a table: run name without its seed -> (label, what it is). Any other run gets
# a row of its own; a run that kept an average of its weights gets a second one, "<run>/average",
# and with BatchNorm a third, "<run>/recomputed": the average, its statistics measured anew.
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
NUMBERS = ("seed", "parameters", "macs", "epochs", "seconds", "val_accuracy", "test_accuracy",
           "last_test_accuracy", "ema_val_accuracy", "ema_test_accuracy")
# ... of a config.json: what a report says of a run that had a teacher.
DESCRIBED = ("temperature", "alpha", "class_weight", "class_cost", "ramp_up", "ema_decay")
NULLABLE = ("val_accuracy", "ema_val_accuracy", "ema_test_accuracy")
AVERAGES = {"average": "ema_", "recomputed": "recomputed_"}     # row of a run -> its keys in final
COMPARISONS = {  # title -> (row, minus this row, the question that the difference answers)
    "kd - student alone": ("kd", "student", "does the teacher help?"),
    "kd-only - student alone": ("kd-only", "student", "does the teacher help, without labels?"),
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
        "mean-teacher/average", "mean-teacher-no-ema", "does EMA help, where its average is used?"),
    "mean teacher, average - teacher": (
        "mean-teacher/average", "teacher", "does it help a network of the teacher's size?"),
    "average - its student": ("mean-teacher/average", "mean-teacher", "is the average better?"),
    "student alone - teacher": ("student", "teacher", "is the small network better?"),
}
OF_TWO_SIZES = ("student", "teacher"), ("kd", "teacher")


# ---- reading ----------------------------------------------------------------------------------

def read_runs(folder):
    """Runs below a recipe's folder: (the finished ones, the names of the unfinished ones).

    A run is {"name", "config", "final", "history" (rows of metrics.csv, floats or None)}. A file
    that is missing, cut short or lacks a key: one line naming it, exit code 2.
    """
    folders = sorted(path for path in Path(folder).glob("*")
                     if path.is_dir() and not path.name.startswith("."))
    finished = [path for path in folders if (path / "final.json").exists()]
    return ([read_run(path) for path in finished],
            [path.name for path in folders if path not in finished])


def read_run(folder):
    """Return one finished run, or leave, as read_runs does."""
    way_out, facts = f"train this run again with --overwrite, or remove {folder}", {}
    try:
        for path in (folder / "config.json", folder / "final.json"):
            facts[path] = {**json.loads(read_text(path))}
        path = folder / "metrics.csv"
        history = [{key: float(row[key]) if row[key] != "" else None for key in METRICS}
                   for row in csv.DictReader(read_text(path).splitlines())]
    except KeyError as error:
        fail(f"{path}: lacks the column {error}; {way_out}")
    except (OSError, TypeError, ValueError, RecursionError, csv.Error) as error:
        fail(f"{path}: missing or cut short ({error}); {way_out}")
    for path, known in facts.items():
        refuse_version(path, known, way_out)
    config, final = facts.values()
    scores = [key for key in final if key.endswith("accuracy")]
    for key in (*NUMBERS, "recipe", "learned", "device", "precision", "torch", *scores):
        if key not in final or not _plausible(key, final[key]):
            wrong = f"{key} cannot be {final[key]!r}" if key in final else f"lacks {key!r}"
            fail(f"{folder / 'final.json'}: {wrong}; {way_out}")
    if odd := _odd_config(config):
        fail(f"{folder / 'config.json'}: {odd} cannot be {str(config.get(odd))[:99]}; {way_out}")
    kept = [name for name in ("test.npz", "curves.png") if (folder / name).exists()]
    for name in altered(folder, ("config.json", "final.json", "metrics.csv", *kept)):
        fail(f"{folder / name}: {ALTERED}; "
             + ("remove it" if name == "curves.png" else way_out))
    if [row["epoch"] for row in history] != list(range(1, len(history) + 1)) or (
            len(history) != final["epochs"]):
        fail(f"{folder / 'metrics.csv'}: not its {final['epochs']} epochs; {way_out}")
    return {"name": folder.name, "config": config, "final": final, "history": history}


def _plausible(key, value):
    if key.endswith("accuracy"):
        return is_accuracy(value) or value is None and (key in NULLABLE or key not in NUMBERS)
    if key not in NUMBERS:
        return isinstance(value, bool if key == "learned" else str)
    kinds = (int,) if key in ("seed", "epochs", "parameters", "macs") else (int, float)
    return type(value) in kinds and 0 <= value < 10**18


def _odd_config(config):
    """Return the first key of a config.json that cannot be so, of those a report reads, or None."""
    names, classes = config.get("class_names", []), config.get("classes", 1)
    good = {"class_names": isinstance(names, list) and {*map(type, names)} <= {str},
            "dataset": isinstance(config.get("dataset", ""), str),
            "classes": type(classes) is list and classes or type(classes) is int and classes > 0}
    read = DESCRIBED if config.get("objective") else {"ema_decay"} & config.keys()
    good |= {key: isinstance(config.get(key), str) if key == "class_cost" else
             _plausible("seconds", config.get(key)) for key in read}
    return next((key for key, fine in good.items() if not fine), None)


def group_runs(runs):
    """Run name without its seed -> {seed: run}, in the order of a table. "kd-s0" is a seed of kd. A
    run called "kd" by --run may be anything: it gets a row of its own."""
    groups = {}
    families = {*ROWS, *(name for name, seed in map(_family, runs) if seed is not None)}
    for run in runs:
        name, seed = _family(run)
        key = f"run {name}" if seed is None and name in families else name
        groups.setdefault(key, {})[run["final"]["seed"]] = run
    order = [key for key in ROWS if key in groups] + sorted(set(groups) - set(ROWS))
    return {key: dict(sorted(groups[key].items())) for key in order}


def _family(run):
    seed = run["final"]["seed"]
    name = run["name"].removesuffix(f"-s{seed}")
    return name, None if name == run["name"] else seed


def label(key):
    """What a row is called: ROWS, else the run's own name."""
    name, _, average = key.partition("/")
    default = f"{label(name)}, {average}" if average else name
    return ROWS.get(key, (plain(default),))[0]


def make_rows(groups):
    """Row key -> row; a figure is {"values" (one a seed), "mean", "sd"}, accuracies from 0 to 1."""
    rows = {}
    for group, members in groups.items():
        for name, prefix in {"": "", **AVERAGES}.items():
            key = f"{group}/{name}" if name else group
            runs = {seed: run for seed, run in members.items()
                    if run["final"].get(prefix + "test_accuracy") is not None}
            finals = [run["final"] for run in runs.values()]
            if finals:
                rows[key] = {
                    "key": key, "label": label(key), "prefix": prefix, "seeds": list(runs),
                    "runs": [run["name"] for run in runs.values()],
                    "teachers": [teacher_of(run) for run in runs.values()],
                    "taught": [run["config"].get("teacher_sha256") for run in runs.values()],
                    "data": [run["config"].get("data_key") for run in runs.values()],
                    "weights": [final.get("weights_sha256") for final in finals],
                    "learned": all(final["learned"] for final in finals), "mixed": mixed(runs),
                    "silent": [seed for seed, run in runs.items() if not run["final"]["learned"]],
                    **{name: _figure([final[name] for final in finals])
                       for name in ("parameters", "macs", "epochs", "seconds")},
                    **{name: _figure([final.get(prefix + name) for final in finals])
                       for name in ("val_accuracy", "test_accuracy", "last_test_accuracy")}}
    return rows


def mixed(runs):
    """Return the settings in which the seeds of one row differ: setting -> {value: run names}. Such
    runs are not one thing measured several times."""
    owners = {}
    for run in runs.values():
        known = run["config"] | {"network's parameters": run["final"]["parameters"]}
        for key, value in known.items():
            if key not in FREE | FACTS | {"seed"} and not key.endswith("_sha256"):
                owners.setdefault(key, {}).setdefault(json.dumps(value), []).append(run["name"])
    return {key: values for key, values in owners.items() if len(values) > 1}


def _figure(values):
    known = None not in values
    return {"values": values, "mean": mean(values) if known else None,
            "sd": stdev(values) if known and len(values) > 1 else None}


def add_beside(rows, folder):
    """Set row["beside"]: figures from the outputs on the test split, where the runs kept them: the
    calibration error, and against its teacher (teacher_of) agreement and KL. Return the pooled
    outputs of each row as {key: (logits, labels)}."""
    pooled = {}
    weights = {name: sha256 for row in rows.values()
               for name, sha256 in zip(row["runs"], row["weights"], strict=True)}
    teachers = {name: read_outputs(folder / name) if name in weights else None
                for name in {name for row in rows.values() for name in row["teachers"]}}
    for key, row in rows.items():
        row["beside"] = {}
        kept = {seed: one for seed, name in zip(row["seeds"], row["runs"], strict=True)
                if (one := read_outputs(folder / name, row["prefix"]))}     # older runs kept none
        if not kept:
            continue
        classes = next(iter(kept.values()))[0].shape[1]      # other data sets have others
        found = [one for one in kept.values() if one[0].shape[1] == classes]
        row["beside"]["n"] = len(found)
        row["beside"]["calibration"] = _figure([calibration(*one)[0] for one in found])
        beside = {seed: teachers[name] for seed, name, taught in zip(
            row["seeds"], row["teachers"], row["taught"], strict=True)
            if teachers[name] and not (taught and weights[name] and taught != weights[name])}
        known = [(one[0], beside[seed][0]) for seed, one in kept.items()
                 if seed in beside and beside[seed][0].shape == one[0].shape
                 and np.array_equal(beside[seed][1], one[1])]
        if known and key != "teacher":
            pairs = zip(*(against(*pair) for pair in known), strict=True)
            for name, values in zip(("agreement", "divergence"), pairs, strict=True):
                row["beside"][name] = _figure(list(values))
        shares = [np.diag(c) / c.sum(1).clip(1) for c in (confusion(*one) for one in found)]
        row["beside"]["classes"] = np.mean(shares, 0).tolist()
        pooled[key] = tuple(np.concatenate(part) for part in zip(*found, strict=True))
    return pooled


def read_outputs(folder, prefix=""):
    """Return (logits, labels) on the test split, None where none were kept; prefix: of AVERAGES."""
    try:
        with zipfile.ZipFile(plain_file(folder / "test.npz")) as file:
            if (size := sum(part.file_size for part in file.infolist())) > 2**30:   # far too much
                raise ValueError(f"unpacks to {size:,} bytes")
        with np.load(folder / "test.npz") as file:
            if not {*file} <= {"logits", "labels", "ema_logits"}:
                raise ValueError(f"holds {', '.join(file)}")
            if prefix and f"{prefix}logits" not in file:
                return None
            logits, labels = file[f"{prefix}logits"], file["labels"]
        if logits.ndim != 2 or not len(logits) or labels.shape != logits.shape[:1] or (
                not np.isfinite(logits).all()):
            raise ValueError(f"outputs {logits.shape}, labels {labels.shape}")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"labels that are no numbers of {logits.shape[1]} classes")
        return logits, labels.astype(np.int64)
    except FileNotFoundError:
        return None
    except Exception as error:      # what flipped bits lead to is of many kinds
        fail(f"{folder / 'test.npz'}: cut short or damaged ({error}); train this run again with "
             "--overwrite, or remove that file")


# ---- comparing --------------------------------------------------------------------------------

def interval(differences):
    """Mean of paired differences and its 95 % interval by Student's t: (mean, low, high); of one
    difference, which has no interval, low and high are None."""
    n, centre = len(differences), mean(differences)
    if n < 2:
        return centre, None, None
    from scipy.stats import t as student_t  # slow to import, and training has no use for it

    half = float(student_t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5
    return centre, centre - half, centre + half


def verdict(low, high, learned=True):
    """helps, hurts, cannot tell (no interval, 0 in it, no width), no conclusion (not learned)."""
    if not learned:
        return "no conclusion"
    if low is None or low <= 0 <= high or np.isclose(low, high):
        return "cannot tell"
    return "helps" if low > 0 else "hurts"


def by_seed(row, name):
    """One figure of a row, or what it lists, as {seed: value}."""
    values = row[name]["values"] if isinstance(row[name], dict) else row[name]
    return dict(zip(row["seeds"], values, strict=True))


def same(a, b, name, its=None):
    """Return the seeds of which two rows have the same, or the second `its`, as far as known."""
    one, other = by_seed(a, name), by_seed(b, its or name)
    return {seed for seed in one if seed in other
            and (one[seed] == other[seed] or not (one[seed] and other[seed]))}


def compare(rows):
    """COMPARISONS of the rows that are there, paired by seed, in points (100 x accuracy); none of
    two networks that differ in more than their training, but OF_TWO_SIZES."""
    found = []
    for title, (a, b, question) in COMPARISONS.items():
        if a in rows and b in rows and ((a, b) in OF_TWO_SIZES or (
                rows[a]["parameters"]["mean"] == rows[b]["parameters"]["mean"])):
            found.append({"title": title, "question": question, "a": a, "b": b,
                          "best": _difference(rows[a], rows[b], "test_accuracy"),
                          "last": _difference(rows[a], rows[b], "last_test_accuracy")})
    return found


def _difference(a, b, name):
    ours, theirs = by_seed(a, name), by_seed(b, name)
    shared = [seed for seed in ours if seed in theirs]
    data, taught = same(a, b, "data"), same(    # a pair are two of one teacher, or one and its own
        a, b, "taught", "weights" if b["key"] == "teacher" else None)
    seeds = [seed for seed in shared if seed in data & taught]
    learned = not (a["mixed"] or b["mixed"] or set(seeds) & {*a["silent"], *b["silent"]})
    entry = {"seeds": seeds, "n": len(seeds), "mean": None, "low": None, "high": None}
    if not seeds:
        return {**entry, "verdict": "no shared seed" if not shared else
                "other data" if not data & {*shared} else "other teachers"}
    if any(ours[seed] is None or theirs[seed] is None for seed in seeds):
        return {**entry, "verdict": "not recorded"}
    centre, low, high = interval([100 * (ours[seed] - theirs[seed]) for seed in seeds])
    return {**entry, "mean": centre, "low": low, "high": high,
            "verdict": verdict(low, high, learned)}


def add_gaps(rows):
    """Set row["gap"] = (x - alone) / (teacher - alone), or None; returns why all are None.

    x and the student alone are averaged over the seeds that both have; the teacher over these
    where it has any of them, else (one teacher for all students) over its own.
    """
    for row in rows.values():
        row["gap"] = None
    for key in ("teacher", "student"):
        if key not in rows:
            return f"the {label(key)} is missing"
        if len(rows[key]["silent"]) == len(rows[key]["seeds"]):
            return f"the {label(key)} did not learn"
    teacher, alone = (by_seed(rows[key], "test_accuracy") for key in ("teacher", "student"))
    silent = {*rows["teacher"]["silent"], *rows["student"]["silent"]}
    if len({*rows["teacher"]["data"], *rows["student"]["data"]} - {None}) > 1:
        return "the teacher and the student alone are of other data"
    if mean(teacher.values()) <= mean(alone.values()):
        return "the teacher is not above the student alone"
    known = {*rows["teacher"]["weights"], None}
    for row in rows.values():
        own = by_seed(row, "test_accuracy")
        seeds = [seed for seed in own if seed in alone]
        others = len(known) > 1 and {*row["taught"]} - known        # teachers
        if (others or silent & {*seeds} or row["mixed"]
                or {*seeds} - same(row, rows["student"], "data")):
            continue
        taught = [seed for seed in seeds if seed in teacher] or list(teacher)
        if seeds and row["learned"]:
            base = mean(alone[seed] for seed in seeds)
            whole = mean(teacher[seed] for seed in taught) - base
            row["gap"] = (mean(own[seed] for seed in seeds) - base) / whole if whole > 0 else None
    doubtful = [label(key) for key in ("teacher", "student") if rows[key]["silent"]]
    return (f"the {' and the '.join(doubtful)} did not learn"
            if doubtful and all(row["gap"] is None for row in rows.values()) else None)


# ---- beside accuracy --------------------------------------------------------------------------

BINS = 15       # of confidence, as Guo et al. 2017 have it


def log_softmax(logits):
    """Return log-probabilities of logits, (N, C), in float64."""
    logits = np.asarray(logits, np.float64) - np.max(logits, 1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def calibration(logits, labels):
    """Return (error, bins): the expected calibration error, from 0 to 1, and of each bin of
    confidence that holds any rows (mean confidence, accuracy, rows). Guo et al. 2017,
    arXiv 1706.04599, section 2: the mean of |accuracy − confidence|, weighted by rows."""
    confidence = np.exp(log_softmax(logits).max(1))
    right = logits.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    found = [(confidence[bins == b].mean(), right[bins == b].mean(), int((bins == b).sum()))
             for b in np.unique(bins)]
    error = sum(rows * abs(share - sure) for sure, share, rows in found) / len(labels)
    return float(error), [(float(sure), float(share), rows) for sure, share, rows in found]


def confusion(logits, labels):
    """Return counts, (C, C): row the true class, column the class that was said."""
    classes = logits.shape[1]
    said = logits.argmax(1)
    return np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)


def against(student, teacher):
    """Return (share of rows where both say the same class, mean KL(teacher ‖ student)), of logits
    (N, C) of the same rows."""
    p, q = log_softmax(teacher), log_softmax(student)
    return (float((student.argmax(1) == teacher.argmax(1)).mean()),
            float((np.exp(p) * (p - q)).sum(1).mean()))
