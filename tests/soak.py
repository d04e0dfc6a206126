"""Runs killed with SIGKILL at random moments and resumed until they are done: `make soak`.

    python tests/soak.py                              all variants; writes soak.json
    python tests/soak.py --only teacher,two --kills 20 --seed 1
    python tests/soak.py --device cuda --kills 28     all but two, with --deterministic

Each has to leave what a run leaves that was never killed, bit for bit: best.pt, checkpoint.pt,
metrics.csv and final.json (but for what a clock measured), test.npz, curves.png. A moment is drawn
uniformly over what is left of the run, in processor time, so that other work beside moves nothing:
imports, decoding, the teacher's outputs, epochs, drawing the curves. A quarter of the kills wait
from that moment for the next file to be written, the teacher's outputs too, and strike while it is.
"""
import argparse
import contextlib
import datetime
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tiny  # noqa: E402
from PIL import Image  # noqa: E402

import device  # noqa: E402
import files  # noqa: E402
import render  # noqa: E402
import runs  # noqa: E402
import train_student  # noqa: E402
import train_teacher  # noqa: E402

OUT = ROOT / "results" / "published" / "soak.json"
KILLS = 104             # in all
EPOCHS = 10             # of about as much work as start and end together
IN_A_ROW = 5            # kills of one run, after which it may end
AIMED = 0.25            # share of the kills that wait for the next write
PHASES = ("start-up", "cache", "training", "end")
TICKS = os.sysconf("SC_CLK_TCK")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
AVERAGE = ("--ema-decay", 0.9)
# name: share of the kills, what runs it, script, flags
VARIANTS = {
    "teacher": (1, (), "train_teacher.py", ()),
    "student": (1, (), "train_student.py", ()),
    "kd": (1, (), "distill.py", ("--teacher", "{teacher}", "--no-cache")),
    "kd-cached": (1, (), "distill.py", ("--teacher", "{slow}", "--views", 6, "--cache")),
    "mean-teacher": (1, (), "distill.py", ("--objective", "consistency", *AVERAGE, "--labels", 60,
                                           "--noise", "0.5,0.5,0.3,0.1")),
    "batchnorm": (1, (), "train_student.py", ("--norm", "batch", *AVERAGE)),
    # Slow to start, and the same code.
    "compile": (0.5, (), "train_student.py", ("--compile", *AVERAGE)),
    "two": (0.5, TORCHRUN, "train_student.py", ("--norm", "batch", *AVERAGE)),
}
ON_GPU = ("--device", "cuda", "--precision", "bf16", "--deterministic")
STEADY = ("student", "kd-cached", "mean-teacher")
EARLY, LATE = 5, 50     # epochs after which memory, files and threads are compared
SLACK = 2 * 2**20       # bytes by which memory may grow: 1.3 kB for each of the 1 665 steps between


# ---- processes --------------------------------------------------------------------------------

def tree(pid):
    """Return a process and all that it started, and those in turn."""
    found = [pid]
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [each for child in listing.read_text().split() for each in tree(int(child))]
        except OSError:         # a thread that has ended since
            continue
    return found


def stat(pid):
    """Return the fields of /proc/PID/stat after the program's name; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def work(pid):
    """Return the processor seconds of a process, all below it, and those that they waited for."""
    return sum(int(ticks) for each in tree(pid) for ticks in stat(each)[11:15]) / TICKS


def left(pids, patience=30):
    """Wait for processes to be gone; return whether some never were, which are killed."""
    deadline = time.monotonic() + patience
    while any(stat(pid)[:1] not in ([], ["Z"]) for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                end(pid)
            return True
        time.sleep(0.01)
    return False


def end(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def strike(child, rng, together):
    """Kill a run without warning; return whether a process of it is left over. together: it runs
    under torchrun; one worker is killed, after which torchrun has to end all, or all are."""
    pids = tree(child.pid)
    workers = [pid for pid in pids if stat(pid)[1:2] == [str(child.pid)]]
    one = together and workers and rng.random() < 0.5
    for pid in [rng.choice(workers)] if one else pids if together else [child.pid]:
        end(pid)
    child.wait()
    return left(pids)


# ---- one process ------------------------------------------------------------------------------

def begin(variant, place, output, epochs=EPOCHS):
    """Start a variant's command, always the same, with --resume; return its process. place: the
    run's results folder, beside images and teachers; output: the file that takes what it prints."""
    _, launcher, script, flags = VARIANTS[variant]
    known = {name: place.parent / name / "digits/run/best.pt" for name in ("teacher", "slow")}
    words = tiny.words(place.parent / "images", place, "--lr", 0.001, "--run", "run", "--resume",
                       *(str(flag).format(**known) for flag in flags), epochs=epochs)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(place.parent / "inductor")}
    with open(output, "w") as file:
        return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *words],
                                env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT)


def whole_run(variant, place):
    """Run a variant undisturbed; return the processor seconds of the whole, and of filling the
    cache and of training in it: files say when, and a record says what had been used by then."""
    output, walls, works = place.with_suffix(".txt"), [time.time()], [0.0]
    child = begin(variant, place, output)
    while child.poll() is None:
        walls.append(time.time())
        works.append(max(works[-1], work(child.pid)))
        time.sleep(0.01)
    if child.returncode:
        raise RuntimeError(output.read_text())
    folder = place / "digits" / "run"

    def at(file):
        return np.interp(file.stat().st_mtime, walls, works)

    cached = [at(file) - np.interp(file.stat().st_mtime - json.loads(
        (folder / "final.json").read_text())["teacher_seconds"], walls, works)
        for file in (place / "digits" / ".teacher").glob("*.npy")]
    return SimpleNamespace(total=works[-1], cache=sum(cached), training=at(
        folder / "checkpoint.pt") - at(folder / "config.json"))


def state(folder):
    """Return how many epochs a run's folder holds; a file in it that is not whole is an error."""
    if not folder.exists():
        return 0
    for file in folder.glob("[!.]*"):
        if file.suffix == ".pt":
            tiny.load(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".npz":
            assert len(np.load(file)["logits"]), file
        elif file.suffix == ".png":
            Image.open(file).load()
    checkpoint = folder / "checkpoint.pt"
    count = len(tiny.load(checkpoint)["history"]) if checkpoint.exists() else 0
    if count:
        rows = [int(row["epoch"]) for row in tiny.metrics(folder)]
        # The last of the three files commits: the others may be an epoch ahead.
        assert rows in (list(range(1, count + 1)), list(range(1, count + 2))), rows
        assert tiny.load(folder / "best.pt")["epoch"] <= count + 1
    return count


def phase(place, started, epochs):
    """Return where a run was when it was killed, by what was there, and whether between writes."""
    folder, kept = place / "digits" / "run", place / "digits" / ".teacher"
    names, filled = ([file.name for file in where.glob("*") if file.stat().st_mtime >= started]
                     for where in (folder, kept))
    if "config.json" not in names:
        return "cache" if any(name.endswith(".part") for name in filled) else "start-up", False
    if epochs == EPOCHS:
        return "end", any(name.endswith(".part") for name in names)
    ahead = [tiny.load(folder / "best.pt")["epoch"] > epochs] if "best.pt" in names else []
    ahead += [len(tiny.metrics(folder)) > epochs] if "metrics.csv" in names else []
    return "training", any(ahead) or any(name.endswith(".part") for name in names)


# ---- a run, killed again and again ------------------------------------------------------------

def killed_run(variant, place, whole, most, rng):
    """Run a variant, kill it at most so many times, let it end; return its kills: where each was,
    and what was wrong, if something was."""
    folder, kept, kills, wrong, had = place / "digits/run", place / "digits/.teacher", [], [], 0
    while not (folder / "final.json").exists():
        cached = any(kept.glob("*.npy"))
        rest = whole.total - whole.training * had / EPOCHS - whole.cache * cached
        moment = rng.uniform(0, rest) if len(kills) < most else None
        output = place.with_name(f"{place.name}-{len(kills)}.txt")
        started = time.time()
        child = begin(variant, place, output)
        while child.poll() is None and (moment is None or work(child.pid) < moment):
            time.sleep(0.01)
        aimed = moment is not None and rng.random() < AIMED
        while aimed and child.poll() is None and not (
                any(folder.glob(".*.part")) or any(kept.glob("*.part"))):
            time.sleep(0.0005)
        struck = child.poll() is None
        if struck and strike(child, rng, bool(VARIANTS[variant][1])):
            wrong.append("a process was left over")
        said = output.read_text()
        if child.returncode and not struck:
            return kills, [*wrong, f"it ended with code {child.returncode}: {said[-500:]}"]
        try:
            now = state(folder)
        except Exception as error:
            return kills, [*wrong, f"a file is not whole: {error}"]
        wrong += check_goes_on(said, had, now)
        if struck and child.returncode:         # else it had just ended by itself
            where, between = phase(place, started, now)
            kills.append(dict(phase=where, epochs=now, between_writes=between,
                              moment=round(moment / rest, 3), aimed=aimed))
        had = now
    return kills, wrong


def check_goes_on(said, had, now):
    """Return what is wrong with what a run printed that began after epoch `had`."""
    trained = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", said, re.M)]
    wrong = [f"{had} epochs were there, now {now}"] if now < had else []
    if trained and now < trained[-1]:       # its line is printed after it is kept
        wrong.append(f"it said epoch {trained[-1]}, and kept {now}")
    if trained and trained != list(range(had + 1, had + 1 + len(trained))):
        wrong.append(f"after epoch {had} it trained {trained}")
    if trained and (f"going on after epoch {had}\n" in said) != bool(had):
        wrong.append(f"it did not say that it goes on after epoch {had}")
    return wrong


def differing(one, two):
    """Return the names of the files in which two finished runs differ, times aside."""
    a, b = tiny.outcome(one), tiny.outcome(two)
    parts = {"final": "final.json", "state": "checkpoint.pt", "metrics": "metrics.csv",
             "best": "best.pt"}
    found = [file for part, file in parts.items() if not tiny.same(a[part], b[part])]
    found += [file for file in a["files"].keys() | b["files"].keys()
              if a["files"].get(file) != b["files"].get(file)]
    listed = [{path.name for path in folder.iterdir()} for folder in (one, two)]
    return sorted({*found, *(listed[0] ^ listed[1])})


def soak(variant, place, count, rng):
    """Kill a variant so often; return a row of the table, with every kill."""
    started, kills, wrong, runs_ = time.monotonic(), [], [], 0
    first, whole = place / f"{variant}-first", place / f"{variant}-whole"
    if variant == "compile":        # its first run also compiles, which is kept
        whole_run(variant, first)
    took = whole_run(variant, whole)
    if first.exists():
        wrong = differing(first / "digits" / "run", whole / "digits" / "run")
    while len(kills) < count and not wrong:
        shutil.rmtree(place / "images" / ".arrays", ignore_errors=True)
        cut, runs_ = place / f"{variant}-{runs_}", runs_ + 1
        more, found = killed_run(variant, cut, took, min(IN_A_ROW, count - len(kills)), rng)
        kills += more
        wrong += found or differing(cut / "digits" / "run", whole / "digits" / "run")
        shutil.rmtree(cut)
    places = {name: sum(kill["phase"] == name for kill in kills) for name in PHASES}
    return dict(variant=variant, runs=runs_, kills=len(kills), **places,
                between_writes=sum(kill["between_writes"] for kill in kills),
                identical=not wrong, wrong=wrong,
                whole_run_cpu_seconds=round(took.total, 2),
                seconds=round(time.monotonic() - started, 1), each=kills)


# ---- memory and threads -----------------------------------------------------------------------

def held(pid):
    """Return a process's resident memory in bytes, open files and threads."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return dict(bytes=pages * os.sysconf("SC_PAGE_SIZE"), threads=int(stat(pid)[17]),
                files=len(os.listdir(f"/proc/{pid}/fd")))


def both(variant, place):
    """Return [what a run holds after epoch EARLY, after LATE]."""
    output, found = place.with_suffix(".txt"), []
    child = begin(variant, place, output, epochs=LATE + 1)
    while child.poll() is None and len(found) < 2:
        if len(re.findall("^epoch ", output.read_text(), re.M)) >= (EARLY, LATE)[len(found)]:
            found.append(held(child.pid))
        time.sleep(0.01)
    end(child.pid)
    child.wait()
    if len(found) < 2:
        raise RuntimeError(output.read_text())
    return found


def steady(variant, place):
    """Return what a run holds early and late, and whether that is the same: of three runs that in
    the middle, as where the allocator lays things moves resident memory by some MB."""
    three = [both(variant, place.with_name(f"{place.name}-{run}")) for run in range(3)]
    early, late = sorted(three, key=lambda pair: pair[1]["bytes"] - pair[0]["bytes"])[1]
    wrong = [f"{early[key]} {key} after {EARLY} epochs, {late[key]} after {LATE}" for key in early
             if late[key] - early[key] > (SLACK if key == "bytes" else 0)]
    return dict(variant=variant, **{f"early_{key}": value for key, value in early.items()},
                **{f"late_{key}": value for key, value in late.items()}, steady=not wrong,
                wrong=wrong)


# ---- the whole --------------------------------------------------------------------------------

def prepare(place):
    """Draw the images, in a blink, and train the two teachers: the slow one makes filling the
    cache take about as long as the epochs."""
    tiny.make_folder(place / "images", train=200, test=40)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, arch in (("teacher", "digits-teacher"), ("slow", "cifar10-he-max-teacher")):
            tiny.run(train_teacher, place / "images", place / name, "--run", "run", "--arch", arch,
                     "--lr", 0.001, epochs=1)


def show(rows, columns):
    """Print a table of some keys of the rows."""
    lines = [["yes" if row[key] is True else "no" if row[key] is False else str(row[key])
              for key in columns] for row in rows]
    print(render.pipes([key.replace("_", " ") for key in columns], lines))
    for row in rows:
        for line in row["wrong"]:
            print(f"{row['variant']}: {line}")


def machine(on):
    """Return what the figures were made on and with. on: the torch.device."""
    return train_student.versions(on) | dict(
        machine=device.processor(on), device=on.type, threads=int(os.environ["OMP_NUM_THREADS"]),
        cores=len(os.sched_getaffinity(0)),
        commit=runs.commit(), date=datetime.date.today().isoformat())


def publish(part, row):
    """Put a row into soak.json, in place of an earlier one of that variant there."""
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    gpu = row["machine"]["device"] == "cuda"
    row = row | dict(variant=row["variant"] + ", GPU" * gpu)
    found.setdefault(part, {})[row["variant"]] = row
    OUT.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(OUT, (json.dumps(found, indent=1) + "\n").encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help="of all variants together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="variants, with commas between")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    args = parser.parse_args(argv)
    on = device.pick_device(args.device)
    if on.type == "cuda":
        del VARIANTS["two"]         # each process needs a GPU of its own
        VARIANTS.update({name: (*how, (*flags, *ON_GPU))
                         for name, (*how, flags) in VARIANTS.items()})
    chosen = args.only.split(",") if args.only else list(VARIANTS)
    if set(chosen) - set(VARIANTS):
        parser.error(f"--only {args.only}: choose from {','.join(VARIANTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, rows, memory, on = time.monotonic(), [], [], machine(on)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stopped:
        stopped.callback(lambda: [end(pid) for pid in tree(os.getpid())[1:]])       # by Ctrl-C, say
        place = Path(place)
        prepare(place)
        total = sum(VARIANTS[name][0] for name in chosen)
        for name in chosen:
            count = math.ceil(args.kills * VARIANTS[name][0] / total)
            rows.append(soak(name, place, count, random.Random(f"{args.seed} {name}")))
            print(f"{name}: {rows[-1]['kills']} kills, {rows[-1]['seconds']:.0f} s", flush=True)
            publish("variants", rows[-1] | dict(seed=args.seed, machine=on))
        for name in (name for name in STEADY if name in chosen):
            memory.append(steady(name, place / f"{name}-steady"))
            publish("memory", memory[-1] | dict(machine=on))
    show(rows, ("variant", "runs", "kills", *PHASES, "between_writes",
                "identical"))
    show(memory, ("variant", "early_bytes", "late_bytes", "early_files", "late_files",
                  "early_threads", "late_threads", "steady"))
    print(f"{sum(row['kills'] for row in rows)} kills, {time.monotonic() - started:.0f} s")
    raise SystemExit(any(row["wrong"] for row in rows + memory))


if __name__ == "__main__":
    main()
