"""Run folders: opened and written by the scripts, read back as rows and compared for the report.

    results/<recipe>/<run>/     config.json, metrics.csv, best.pt, checkpoint.pt, final.json

No command of its own, and no torch.
"""
import csv
import fcntl
import io
import json
import math
import os
import subprocess
from pathlib import Path
from statistics import mean, stdev

from flags import DEFAULTS, fail, say

SCHEMA = 1      # of config.json, final.json and checkpoints: a reader refuses what it does not know
# What may differ between two calls for the same run: where things lie, and what to do about it.
FREE = {"results_dir", "data_dir", "run", "resume", "overwrite", "dry_run", "teacher",
        "init_from", "cache"}
RUN_FILES = ("final.json", "checkpoint.pt", "best.pt", "metrics.csv", "config.json", "curves.png")
VALIDATED = {"model": "val", "ema": "ema_val"}      # network -> its columns in metrics.csv
METRICS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "ema_val_loss",
           "ema_val_accuracy", "lr", "seconds", "images_per_second")


# ---- writing ----------------------------------------------------------------------------------

def write_whole(path, data):
    """Write bytes so that the file is either as it was or whole: aside, synced, then moved."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path):
    """Return a JSON file's dict; one line naming the file where it is cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        fail(f"{path}: cannot be read ({error}); remove its folder, or add --overwrite")


def short(value):
    """Return a value as text; twelve characters are enough of a hash."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def make_config(args, script, versions, **known):
    """Return what config.json holds: every resolved flag, and what else the result depends on."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], text=True,
                                cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    except OSError:      # no git: copied by hand, or into a notebook
        commit = None
    return {"schema": SCHEMA, "script": script, **vars(args), **known, "versions": versions,
            "git_commit": commit or None}


def open_run(args, config, name):
    """Return (folder, final): final is the dict of a finished run that is the one asked for.

    Nothing is made yet. A finished run that differs, an unfinished one without --resume or
    --overwrite, or a resumed one with other settings ends with one line naming what differs.
    """
    name = name if args.run is None else args.run
    if not name.strip(".") or set(name) & set("/\\\0\n"):
        fail(f"--run {name!r}: a plain folder name is needed, without slashes")
    folder = Path(args.results_dir) / args.recipe / name
    if args.overwrite or not folder.exists():
        return folder, None
    if not folder.is_dir():
        fail(f"{folder}: a file, where the run's folder should be; remove it or give --run")
    ways = "add --overwrite (make: OVERWRITE=1) to run it again, or --run NAME to keep both"
    finished = (folder / "final.json").exists()
    if (folder / "config.json").exists():
        had = read_json(folder / "config.json")     # a flag that is newer had its default
        if had.get("schema") != SCHEMA:
            fail(f"{folder}: written by another version of these scripts "
                 f"(schema {had.get('schema')}, now {SCHEMA}); {ways}")
        skip = FREE | {"versions", "git_commit", "schema"}
        now = json.loads(json.dumps(config))
        old = {**{key: DEFAULTS.get(key) for key in now.keys() - had.keys()}, **had}
        differs = [f"{key} {short(old.get(key))} (asked for: {short(now.get(key))})"
                   for key in (now.keys() | old.keys()) - skip if old.get(key) != now.get(key)]
        # A run stopped before its first epoch ended has nothing to lose.
        if differs and (finished or (folder / "checkpoint.pt").exists() or not args.resume):
            what = "finished" if finished else "begun"
            fail(f"{folder}: {what} with other settings: {', '.join(sorted(differs))}; {ways}")
    elif finished:
        fail(f"{folder}: final.json without config.json; {ways}")
    if finished:
        say(f"{folder}: finished already, kept")
        return folder, read_json(folder / "final.json")
    if not args.resume and any(folder.iterdir()):
        fail(f"{folder}: an unfinished run; add --resume to go on from its last finished epoch, "
             "or --overwrite to start again")
    return folder, None


def begin_run(args, folder, config):
    """Make the run's folder with its config.json; with --overwrite, the old files go first.

    Returns a file descriptor that keeps other processes out of the folder until it is closed, or
    until this process ends, however it does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if args.overwrite:
            for file in RUN_FILES:
                (folder / file).unlink(missing_ok=True)
        write_whole(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")
    except BlockingIOError:
        fail(f"{folder}: another process is training here; wait for it, or give --run NAME")
    except OSError as error:
        fail(f"{folder}: cannot be made or written ({error.strerror}); give another --results-dir")
    return lock


def write_history(path, history):
    """Write metrics.csv whole: a row an epoch, empty where a value does not apply."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, METRICS, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_whole(path, text.getvalue().encode())


def best_epoch(history, name):
    """Return a network's first epoch of highest validation accuracy; without any, the last."""
    values = [row[VALIDATED[name] + "_accuracy"] for row in history]
    return len(values) if None in values else values.index(max(values)) + 1


def epoch_line(row, epochs):
    """Return what happened in an epoch, in at most 80 columns."""
    def score(name, title):
        value = row[name + "_accuracy"]
        return "" if value is None else f"  {title} {100 * value:5.2f} %"

    width = len(str(epochs))
    return (f"epoch {row['epoch']:{width}}/{epochs}  loss {row['train_loss']:.4f}"
            f"{score('train', 'train')}{score('val', 'val')}{score('ema_val', 'ema')}"
            f"  {row['seconds']:.1f} s")


def learned_nothing(history, epochs, limit, classes):
    """Return a warning with the usual causes if, after a third of the epochs, no validation
    accuracy is above the limit of common.chance; else None."""
    row = history[-1]
    if len(history) != max(1, math.ceil(epochs / 3)) or row["val_accuracy"] is None:
        return None
    if max(row["val_accuracy"] for row in history) > limit:
        return None
    floor = math.log(classes)
    sits = (f"\n  Validation loss sits at ln({classes}) = {floor:.3f}, what a network scores that "
            "tells nothing apart." if abs(row["val_loss"] / floor - 1) < 0.02 else "")
    return (f"warning: nothing learned in {len(history)} of {epochs} epochs: validation is not "
            f"above chance.{sits}\n  Usual causes: an init without the ReLU gain (--init he), a "
            "learning rate too\n  high or too low (--lr), dead ReLUs, labels that do not belong "
            "to the images.")


# ---- rows of a table --------------------------------------------------------------------------

# Rows in the order of a table: run name without its seed -> (label, what it is). Any other run gets
# a row of its own; a run that kept an average of its weights gets a second one, "<run>/average",
# and with BatchNorm a third, "<run>/recomputed": the average, its statistics measured anew.
ROWS = {
    "teacher": ("teacher", "the large network, trained on the labels"),
    "student": ("student alone", "the small network, trained on the labels"),
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
NULLABLE = ("val_accuracy", "ema_val_accuracy", "ema_test_accuracy")
AVERAGES = {"average": "ema_", "recomputed": "recomputed_"}     # row of a run -> its keys in final
COMPARISONS = {  # title -> (row, minus this row, the question that the difference answers)
    "kd - student alone": ("kd", "student", "does the teacher help?"),
    "kd-only - student alone": ("kd-only", "student", "does the teacher help, without labels?"),
    "kd-only - kd": ("kd-only", "kd", "does it help to leave the labels out?"),
    "kd, average - kd": ("kd/average", "kd", "is the average better than its student?"),
    "kd-ema - student alone": ("kd-ema", "student", "does its own EMA help as a teacher?"),
    "mean teacher, student - alone": (
        "mean-teacher", "student", "does consistency with the EMA help?"),
    "mean teacher, average - alone": (
        "mean-teacher/average", "student", "does it help, where the average is used?"),
    "mean teacher, student - no EMA": (
        "mean-teacher", "mean-teacher-no-ema", "does the EMA teacher help its student?"),
    "mean teacher, average - no EMA": (
        "mean-teacher/average", "mean-teacher-no-ema", "does EMA help, where its average is used?"),
    "mean teacher, average - teacher": (
        "mean-teacher/average", "teacher", "does it help a network of the teacher's size?"),
    "average - its student": (
        "mean-teacher/average", "mean-teacher", "is the average better than its student?"),
    "student alone - teacher": ("student", "teacher", "is the small network better?"),
}


# ---- reading ----------------------------------------------------------------------------------

def read_runs(folder):
    """Runs below a recipe's folder: (the finished ones, the names of the unfinished ones).

    A run is {"name", "config", "final", "history" (rows of metrics.csv, floats or None)}. A file
    that is missing, cut short or lacks a key: one line naming it, exit code 2.
    """
    folders = sorted(path for path in Path(folder).glob("*")
                     if path.is_dir() and not path.name.startswith("."))
    finished = [path for path in folders if (path / "final.json").exists()]
    return ([_read_run(path) for path in finished],
            [path.name for path in folders if path not in finished])


def _read_run(folder):
    way_out = f"train this run again with --overwrite, or remove {folder}"
    try:
        path = folder / "config.json"
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        path = folder / "final.json"
        final = dict(json.loads(path.read_text(encoding="utf-8")))
        path = folder / "metrics.csv"
        with open(path, newline="", encoding="utf-8") as file:
            history = [{key: float(row[key]) if row[key] != "" else None for key in METRICS}
                       for row in csv.DictReader(file)]
    except KeyError as error:
        fail(f"{path}: lacks the column {error}; {way_out}")
    except (OSError, TypeError, ValueError) as error:
        fail(f"{path}: missing or cut short ({error}); {way_out}")
    for key in (*NUMBERS, "learned", "device", "precision", "torch"):
        if key not in final:
            fail(f"{folder / 'final.json'}: lacks {key!r}; {way_out}")
        if not _plausible(key, final[key]):
            fail(f"{folder / 'final.json'}: {key} cannot be {final[key]!r}; {way_out}")
    if [row["epoch"] for row in history] != list(range(1, final["epochs"] + 1)):
        fail(f"{folder / 'metrics.csv'}: not its {final['epochs']} epochs; {way_out}")
    return {"name": folder.name, "config": config, "final": final, "history": history}


def _plausible(key, value):
    if value is None:
        return key in NULLABLE
    if key not in NUMBERS:
        return isinstance(value, bool if key == "learned" else str)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (not key.endswith("accuracy") or 0 <= value <= 1)


def group_runs(runs):
    """Run name without its seed -> {seed: run}, in the order of a table.

    "kd-s0" is a seed of kd. A run called "kd" by --run may be anything: it gets a row of its own.
    """
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
    return ROWS.get(key, (default,))[0]


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
                    "learned": all(final["learned"] for final in finals),
                    **{name: _figure([final[name] for final in finals])
                       for name in ("parameters", "macs", "epochs", "seconds")},
                    **{name: _figure([final.get(prefix + name) for final in finals])
                       for name in ("val_accuracy", "test_accuracy", "last_test_accuracy")}}
    return rows


def _figure(values):
    known = None not in values
    return {"values": values, "mean": mean(values) if known else None,
            "sd": stdev(values) if known and len(values) > 1 else None}


# ---- comparing --------------------------------------------------------------------------------

def interval(differences):
    """Mean of paired differences and its 95 % interval by Student's t: (mean, low, high).

    One difference has no interval: low and high are then None.
    """
    n, centre = len(differences), mean(differences)
    if n < 2:
        return centre, None, None
    from scipy.stats import t as student_t  # slow to import, and training has no use for it

    half = float(student_t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5
    return centre, centre - half, centre + half


def verdict(low, high, learned=True):
    """helps, hurts, cannot tell (no interval, or it holds 0), or no conclusion (not learned)."""
    if not learned:
        return "no conclusion"
    if low is None or low <= 0 <= high:
        return "cannot tell"
    return "helps" if low > 0 else "hurts"


def by_seed(row, name):
    """One figure of a row as {seed: value}."""
    return dict(zip(row["seeds"], row[name]["values"], strict=True))


def compare(rows):
    """COMPARISONS of the rows that are there, paired by seed, in points (100 x accuracy); none of
    two networks that differ in more than their training, but for student and teacher."""
    found = []
    for title, (a, b, question) in COMPARISONS.items():
        if a in rows and b in rows and ((a, b) == ("student", "teacher") or (
                rows[a]["parameters"]["mean"] == rows[b]["parameters"]["mean"])):
            learned = rows[a]["learned"] and rows[b]["learned"]
            found.append({"title": title, "question": question, "a": a, "b": b,
                          "best": _difference(rows[a], rows[b], "test_accuracy", learned),
                          "last": _difference(rows[a], rows[b], "last_test_accuracy", learned)})
    return found


def _difference(a, b, name, learned):
    ours, theirs = by_seed(a, name), by_seed(b, name)
    seeds = [seed for seed in ours if seed in theirs]
    entry = {"seeds": seeds, "n": len(seeds), "mean": None, "low": None, "high": None}
    if not seeds:
        return {**entry, "verdict": "no shared seed"}
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
        if not rows[key]["learned"]:
            return f"the {label(key)} did not learn"
    teacher, alone = (by_seed(rows[key], "test_accuracy") for key in ("teacher", "student"))
    if mean(teacher.values()) <= mean(alone.values()):
        return "the teacher is not above the student alone"
    for row in rows.values():
        own = by_seed(row, "test_accuracy")
        seeds = [seed for seed in own if seed in alone]
        taught = [seed for seed in seeds if seed in teacher] or list(teacher)
        if seeds and row["learned"]:
            base = mean(alone[seed] for seed in seeds)
            whole = mean(teacher[seed] for seed in taught) - base
            row["gap"] = (mean(own[seed] for seed in seeds) - base) / whole if whole > 0 else None
    return None
