"""Run folders: opened, held and written by the scripts.

    results/<recipe>/<run>/     config.json, metrics.csv, best.pt, checkpoint.pt, final.json

No command of its own, and no torch.
"""
import contextlib
import csv
import datetime
import fcntl
import functools
import io
import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np

from files import HELD, damage, read_json, read_text, sha256, write_whole
from flags import DEFAULTS, fail, plain_name, say, shown

SCHEMA = 1      # of config.json, final.json and checkpoints: a reader refuses what it does not know
# What may differ between two calls for the same run: where things lie, and what to do about it.
FREE = {"results_dir", "data_dir", "skip_bad", "run", "resume", "overwrite", "dry_run", "teacher",
        "init_from", "cache"}
# ... and what is no setting, but a fact of a place or a day.
FACTS = {"versions", "git_commit", "date", "schema", "before", "class_names", "parameters"}
# What a run was made with whose config.json does not say.
UNSAID = DEFAULTS | {"init_sha256": None}
SUMS = "SHA256SUMS"     # of a finished run's files; `sha256sum -c` reads it too
ALTERED = f"not what {SUMS} says, one of the two was changed or damaged"
RUN_FILES = ("final.json", SUMS, "checkpoint.pt", "best.pt", "metrics.csv", "config.json",
             "curves.png", "test.npz", "look.html")
SWEEP_FILES = "sweep.csv", "sweep.png", "sweep.md"
VALIDATED = {"model": "val", "ema": "ema_val"}      # network -> its columns in metrics.csv
METRICS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "ema_val_loss",
           "ema_val_accuracy", "lr", "seconds", "images_per_second")

CONFIGS = {}    # run folder -> the bytes of its config.json, as long as this process holds it
SEEN = {}       # run folder -> which config.json was there when this process looked first


def write_final(folder, final):
    """Write final.json, the last file of a run, and before it the checksums of all its files."""
    for name in ("best.pt", "metrics.csv"):
        if not (folder / name).exists():
            fail(f"{folder / name}: was removed while the run was under way; run it again with "
                 "--resume, which makes it from checkpoint.pt")
    if folder in CONFIGS:       # as it was when the run began, whatever became of it
        write_whole(folder / "config.json", CONFIGS[folder])
    data = json.dumps(final, indent=1).encode() + b"\n"
    sums = {path.name: sha256(path.read_bytes()) for path in map(folder.joinpath, RUN_FILES)
            if path.is_file() and path.name not in (SUMS, "final.json")} | {
            "final.json": sha256(data)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    write_whole(folder / SUMS, lines.encode())
    write_whole(folder / "final.json", data)


def altered(folder, names, last="final.json", known=RUN_FILES):
    """Return those of a run's files that are not as the run left them. Runs of before there were
    checksums are taken as they are. last: of the list of checksums; known: what it may name."""
    if not (folder / SUMS).exists():
        return []
    try:
        lines = read_text(folder / SUMS).splitlines()
    except (OSError, ValueError) as error:
        fail(f"{folder / SUMS}: cannot be read ({error}); train this run again with --overwrite")
    sums = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    if last not in sums or sums.keys() - set(known):
        fail(f"{folder / SUMS}: cut short or damaged; put a whole copy there, or train this run "
             "again with --overwrite (a sweep: its command)")
    return [name for name in names if not (folder / name).is_file()
            or sums.get(name) != sha256((folder / name).read_bytes())]


def sum_sweep(folder):
    """Write the checksums of a sweep's files."""
    lines = (f"{sha256((folder / name).read_bytes())}  {name}\n" for name in SWEEP_FILES)
    write_whole(folder / SUMS, "".join(lines).encode())


def refuse_altered_sweep(folder):
    """Leave with one line where a sweep's files are not as it left them."""
    for name in altered(folder, SWEEP_FILES, SWEEP_FILES[-1], SWEEP_FILES):
        fail(f"{folder / name}: {ALTERED}; the sweep's command makes both anew")


def this_version(schema):
    """Return whether a file's schema is one that these scripts know; True and 1.0 are not."""
    return type(schema) is int and schema == SCHEMA


def refuse_version(path, known, way_out):
    """Leave with one line where what a file holds is of another schema, or says none."""
    if not this_version(known.get("schema")):
        fail(f"{path}: written by another version of these scripts (schema "
             f"{shown(known.get('schema'))}, now {SCHEMA}); {way_out}")


def is_accuracy(value):
    """Return whether a value from a file may be an accuracy: a float from 0 to 1."""
    return type(value) is float and 0 <= value <= 1


def short(value):
    """Return a value as text; of a hash twelve digits are enough."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", str(value))


def commit():
    """Return the commit of these scripts, with -dirty where they were changed since; or None."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True)
    with contextlib.suppress(OSError):      # no git: copied by hand, or into a notebook
        found = git(["git", "rev-parse", "HEAD", "HEAD:./runs.py"])
        if not found.returncode:            # else it is another project's
            changed = git(["git", "-c", "core.fileMode=false", "diff", "--quiet", "HEAD", "--",
                           ":(glob)*.py"]).returncode
            return found.stdout.decode().split()[0] + "-dirty" * bool(changed)
    return None


def make_config(args, script, versions, **known):
    """Return what config.json holds: every resolved flag, and what else the result depends on."""
    return {"schema": SCHEMA, "script": script, **vars(args), **known, "versions": versions,
            "git_commit": commit(), "date": datetime.date.today().isoformat()}


def settings_of(config):
    """Return a hash of all that a result depends on, for the files that must be of the same run. A
    flag at its default does not count: an older run did not know it."""
    kept = {key: value for key, value in json.loads(json.dumps(config)).items()
            if key not in FREE | FACTS and value != DEFAULTS.get(key)}
    return sha256(json.dumps(kept, sort_keys=True).encode())


def hold(folder, how=fcntl.LOCK_EX):
    """Return a file descriptor that keeps other processes out of a run's folder until it is closed,
    or until this process ends, however it does; leave with one line where another has it."""
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
    except BlockingIOError:
        fail(f"{folder}: another process trains here; wait, or give --run NAME (a sweep: --name)")
    except OSError as error:
        fail(f"{folder}: cannot be read ({error.strerror}); give another --results-dir")
    return lock


def release(folder, lock):
    """Let other processes into a run's folder again."""
    HELD.pop(folder, None)
    CONFIGS.pop(folder, None)
    os.close(lock)


def which(path):
    """Return what tells a file from one that was written in its place; None where there is none."""
    with contextlib.suppress(OSError):
        return (found := path.stat()).st_ino, found.st_mtime_ns


def open_run(args, config, name, held=False, source=None):
    """Return (folder, final): final is the dict of a finished run that is the one asked for.

    Nothing is made yet. A finished run that differs, an unfinished one without --resume or
    --overwrite, or a resumed one with other settings ends with one line naming what differs; so
    does one where another process trains, unless this one has the folder (held). source: a file
    that the run learns from, which must be of another one.
    """
    name = plain_name("--run", name if args.run is None else args.run)
    folder = Path(args.results_dir) / args.recipe / name
    if source and Path(source).resolve().parent == folder.resolve():
        fail(f"{source}: lies in the folder of this run, which would replace it; give another "
             "--run NAME")
    if not held:
        SEEN[folder] = which(folder / "config.json")
    elif args.overwrite and SEEN[folder] != which(folder / "config.json"):
        fail(f"{folder}: another process trained here just now; the same command would throw that "
             "away")
    if args.overwrite or not folder.exists():
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            what = "may not be written" if place.is_dir() else "not a folder"
            fail(f"{place.absolute()}: {what}; give another --results-dir, or --run")
        return folder, None
    if not folder.is_dir():
        fail(f"{folder}: a file, where the run's folder should be; remove it or give --run")
    if not held:        # shared: all processes of one run look at the same time
        release(folder, hold(folder, fcntl.LOCK_SH))
    if all(path.name == "config.json" or path.suffix == ".part" for path in folder.iterdir()):
        return folder, None     # stopped before its first epoch ended: nothing is lost
    ways = "add --overwrite (make: OVERWRITE=1), or keep both by --run NAME (a sweep: --name)"
    finished = (folder / "final.json").exists()
    if (folder / "config.json").exists():
        had = read_json(folder / "config.json")     # a flag that is newer had its default
        refuse_version(folder, had, ways)
        skip = FREE | FACTS
        now = json.loads(json.dumps(config))
        # ... and a fact that is newer was not asked about.
        old = {**{key: UNSAID.get(key, now[key]) for key in now.keys() - had.keys()}, **had}
        words = {"data_key": "the images, by their data_key"}
        differs = [f"{words.get(key, key)} {short(old.get(key))} (asked for: {short(now.get(key))})"
                   for key in (now.keys() | old.keys()) - skip if old.get(key) != now.get(key)]
        # With best.pt alone there is no epoch to go on from.
        if differs and (finished or (folder / "checkpoint.pt").exists() or not args.resume):
            what = "finished" if finished else "begun"
            fail(f"{folder}: {what} with other settings: {', '.join(sorted(differs))}; {ways}")
    elif finished or (folder / "checkpoint.pt").exists():
        fail(f"{folder}: {'final.json' if finished else 'checkpoint.pt'} without config.json, "
             f"which says with what settings; {ways}")
    for name in altered(folder, ("final.json",)) if finished else ():
        fail(f"{folder / name}: {ALTERED}; {ways}")
    if finished:
        final = read_json(folder / "final.json")
        refuse_version(folder / "final.json", final, ways)
        if not is_accuracy(final.get("test_accuracy")):
            fail(f"{folder / 'final.json'}: test_accuracy {final.get('test_accuracy')!r} is no "
                 f"accuracy: damaged; {ways}")
        odd = [key for key in ("recipe", "arch", "epochs", "seed") if final.get(key) != config[key]
               or type(final[key]) is not type(config[key])]
        if odd:
            fail(f"{folder / 'final.json'}: {odd[0]} {final.get(odd[0])!r}, where config.json says "
                 f"{config[odd[0]]!r}: of another run, or damaged; {ways}")
        had = final.get("parameters")
        if type(had) is int and had != config["parameters"]:
            fail(f"{folder}: finished with another network, of {had:,} parameters; {args.arch} has "
                 f"{config['parameters']:,} now; {ways}")
        say(f"{folder}: finished already, kept")
        return folder, final
    if not args.resume:
        fail(f"{folder}: an unfinished run; add --resume to go on from its last finished epoch, "
             "or --overwrite to start again")
    wrong = not held and (folder / "checkpoint.pt").exists() and damage(folder / "checkpoint.pt")
    if wrong:
        fail(f"{folder / 'checkpoint.pt'}: {wrong}")
    return folder, None


def places_before(folder, config):
    """Return what versions, devices and commits the earlier epochs of a run were made with, where
    they are others; and say so: the bits may differ then."""
    had = read_json(folder / "config.json")
    try:
        was, now = ({**dict(one["versions"]), "commit": one.get("git_commit")}
                    for one in (had, config))
        before = list(map(dict, had.get("before", [])))
    except (LookupError, TypeError, ValueError) as error:
        fail(f"{folder / 'config.json'}: damaged ({type(error).__name__}: {error}); add "
             "--overwrite to start again")
    differs = [f"{key} {short(was.get(key))} (now {short(now[key])})" for key in now
               if was.get(key) != now[key]]
    if differs:
        say(f"note: begun with {', '.join(differs)}; what follows need not be the same bit for bit")
    return before + [was] * bool(differs)


def begin_run(args, folder, config):
    """Make the run's folder with its config.json; with --overwrite, the old files go first. Return
    what holds the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = HELD[folder] = hold(folder)
        try:
            # Alone here from now on; but another run may have come and gone since the first look.
            if open_run(args, config, folder.name, held=True)[1] is not None:
                fail(f"{folder}: finished by another process just now; the same command says with "
                     "what")
            if args.overwrite or not (folder / "checkpoint.pt").exists():
                for file in RUN_FILES:
                    (folder / file).unlink(missing_ok=True)
            else:
                config = config | dict(before=places_before(folder, config))
            CONFIGS[folder] = json.dumps(config, indent=1).encode() + b"\n"
            write_whole(folder / "config.json", CONFIGS[folder])
        except BaseException:
            release(folder, lock)
            raise
    except OSError as error:
        fail(f"{error.filename or folder}: cannot be made or written ({error.strerror}); mend "
             "that, or give another --results-dir")
    return lock


def frozen_for(args):
    """Return in how many epochs, from the first on, the features take no gradient."""
    if vars(args).get("freeze", "none") == "none":
        return 0
    return (args.unfreeze_at or math.inf) - 1


def calmer(args):
    """Return what keeps a loss finite, but for the flags that are set so already."""
    return ("try a lower --lr" + " or --clip 1" * (not args.clip)
            + " or --precision fp32" * (args.precision != "fp32"))


def teacher_of(run):
    """Return the name of the run that this one is set beside: the teacher that was typed, else that
    of its seed, for a student alone and one of its own average too. None where the one that was
    typed is no run of this recipe."""
    typed = run["config"].get("teacher")
    if typed in (None, "ema"):
        return f"teacher-s{run['final']['seed']}"
    *_, recipe, name, file = "", "", *Path(str(typed)).parts
    return name if (recipe, file) == (run["final"]["recipe"], "best.pt") else None


def taught_by_others(groups):
    """Return the names of runs, group -> seed -> run, that another network than the teacher of
    their seed has taught: one of another name, or of this name, and trained again since."""
    runs = [(seed, run) for members in groups.values() for seed, run in members.items()]
    weights, found = {run["name"]: run["final"].get("weights_sha256") for _, run in runs}, []
    for seed, run in runs:
        teacher, taught = teacher_of(run), run["config"].get("teacher_sha256")
        changed = taught and weights.get(teacher) not in (taught, None)
        if changed or teacher != f"teacher-s{seed}":
            since = ", which was trained again since" * bool(changed)
            found.append(f"{run['name']} ({teacher or run['config']['teacher']}{since})")
    return found


def write_outputs(path, outputs, labels):
    """Write the best epochs' outputs on the test split, for what accuracy does not say. outputs:
    "model" and, where there is an average, "ema" -> (N, classes)."""
    memory = io.BytesIO()
    average = dict(ema_logits=outputs["ema"]) if "ema" in outputs else {}
    np.savez_compressed(memory, logits=outputs["model"], labels=labels, **average)
    write_whole(path, memory.getvalue())


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


def chance(labels):
    """Return the accuracy that a network must pass to have learned anything: always naming the
    largest class, plus 3 standard errors of that share. labels: integers, −1 where unlabelled."""
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0])
    share = counts.max() / counts.sum()
    limit = share + 3 * math.sqrt(share * (1 - share) / counts.sum())
    return float(min(limit, math.nextafter(1, 0)))      # of few labels all right is above it


def learned_nothing(history, epochs, limit, classes):
    """Return a warning with the usual causes if, after a third of the epochs, no validation
    accuracy is above the limit of chance(); else None."""
    row = history[-1]
    if len(history) != max(1, math.ceil(epochs / 3)) or row["val_accuracy"] is None:
        return None
    if max(row["val_accuracy"] for row in history) > limit:
        return None
    floor = math.log(classes)
    sits = (f"\n  Validation loss sits at ln({classes}) = {floor:.3f}: it tells nothing apart."
            if abs(row["val_loss"] / floor - 1) < 0.02 else "")
    return (f"warning: nothing learned in {len(history)} of {epochs} epochs: validation is not "
            f"above chance.{sits}\n  Usual causes: an init without the ReLU gain (--init he), a "
            "learning rate too\n  high or too low (--lr), dead ReLUs, labels that do not belong "
            "to the images.")
