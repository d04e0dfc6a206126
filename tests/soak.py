"""Runs killed at random moments and resumed until they end: `make soak`.

    python tests/soak.py                        all variants; writes soak.json
    python tests/soak.py --only kd --kills 20 --out /tmp/soak.json
    python tests/soak.py --device cuda          with --deterministic

Each run must end as one that was never stopped, bit for bit (tiny.outcome). SIGKILL comes
at a moment drawn uniformly over the length of the undisturbed run, imports included.
"""
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tiny  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import train_teacher  # noqa: E402
from recipes import Parser, number, path, read_json, write_whole  # noqa: E402

OUT = ROOT / "results" / "published" / "soak.json"
EPOCHS = 40             # take about as long as the start
IN_A_ROW = 5            # kills of one run, after which it may end
AVERAGE = ("--ema-decay", 0.9)
VARIANTS = {            # name -> (script, flags)
    "teacher": ("train_teacher.py", ()),
    "student": ("train_student.py", ()),
    "kd": ("distill.py", ("--no-cache",)),
    "kd-cached": ("distill.py", ("--views", 6, "--cache")),
    "mean-teacher": ("distill.py", ("--objective", "consistency", *AVERAGE, "--labels", 60,
                                    "--noise", "0.5,0.5,0.3,0.1")),
    "batchnorm": ("train_student.py", ("--norm", "batch", *AVERAGE)),
}
ON_GPU = ("--precision", "bf16", "--deterministic")


def begin(name, place, device):
    """Start a variant, always with the same command; return its process.

    place: its results folder, beside the images and the teacher's results.
    """
    script, flags = VARIANTS[name]
    flags = [*flags, "--device", device, "--run", "run", "--resume"]
    if script == "distill.py" and "consistency" not in flags:
        flags += ["--teacher", place.parent / "teacher" / "digits" / "run" / "best.pt"]
    if device == "cuda":
        flags += ON_GPU
    words = tiny.words(place.parent / "images", place, "--lr", 0.001, *flags, epochs=EPOCHS)
    with open(place.with_suffix(".txt"), "a", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, ROOT / script, *words], stdout=output,
                                stderr=subprocess.STDOUT)


def finish(child, place):
    """Wait for a run's end; an error of its own ends the soak with what it printed."""
    if child.wait():
        raise SystemExit(place.with_suffix(".txt").read_text(encoding="utf-8"))


def phase(folder, started):
    """Return where a run was when it was killed, by the files that it had written."""
    config = folder / "config.json"
    if not config.exists() or config.stat().st_mtime < started:
        return "start-up"
    if (folder / "metrics.csv").exists() and len(tiny.metrics(folder)) == EPOCHS:
        return "end"
    return "training"


def killed_run(name, place, device, seconds, most, rng):
    """Kill a run at most so many times, each within so many seconds of its start, and let it
    end; return the phase of each kill."""
    phases = []
    while len(phases) < most:
        started, child = time.time(), begin(name, place, device)
        try:
            child.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            phases.append(phase(place / "digits" / "run", started))
            continue
        finish(child, place)
        return phases       # it had ended before its moment came
    finish(begin(name, place, device), place)
    return phases


def soak(name, place, device, kills, rng):
    """Kill a variant so many times; return its row for the table."""
    started, whole = time.perf_counter(), place / f"{name}-whole"
    finish(begin(name, whole, device), whole)
    seconds = time.perf_counter() - started
    expected = tiny.outcome(whole / "digits" / "run")
    phases, runs, wrong = [], 0, []
    while len(phases) < kills:
        shutil.rmtree(place / "images" / ".arrays")     # decoding may be killed too
        cut, most = place / f"{name}-{runs}", min(IN_A_ROW, kills - len(phases))
        phases += killed_run(name, cut, device, seconds, most, rng)
        found = tiny.outcome(cut / "digits" / "run")
        for part, value in expected.items():
            if not tiny.same(found[part], value):
                wrong.append(f"run {runs}: {part}")
        runs += 1
    row = dict(variant=name, runs=runs, kills=len(phases), identical=not wrong, wrong=wrong)
    for where in ("start-up", "training", "end"):
        row[where] = phases.count(where)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def publish(file, row, device):
    """Add a row to the JSON file."""
    table = {"variants": {}, "memory": {}}
    if file.exists():
        table = read_json(file)
    if device == "cuda":
        row["variant"] += ", GPU"
    row["machine"] = dict(
        machine=common.processor(torch.device(device)), device=device,
        threads=int(os.environ["OMP_NUM_THREADS"]), torch=torch.__version__,
        commit=common.git_commit() or "unknown", date=date.today().isoformat())
    table["variants"][row["variant"]] = row
    write_whole(file, json.dumps(table, indent=1).encode() + b"\n")


def main(argv=None):
    """Kill every variant; exit code 1 where one did not end as if it had not been."""
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=number(int, 1), default=15, metavar="N",
                        help="of each variant (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=list(VARIANTS), help="one variant")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--out", type=path, default=OUT, metavar="FILE", help="JSON, added to")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        images = tiny.make_folder(place / "images")
        with contextlib.redirect_stdout(io.StringIO()):
            tiny.run(train_teacher, images, place / "teacher", "--run", "run",
                     epochs=tiny.ENOUGH)
        for name in [args.only] if args.only else VARIANTS:
            rng = random.Random(f"{args.seed} {name}")
            row = soak(name, place, args.device, args.kills, rng)
            result = ", ".join(row["wrong"]) or "as if never killed"
            print(f"{name}: {row['kills']} kills in {row['runs']} runs: {result}; "
                  f"{row['seconds']} s", flush=True)
            publish(Path(args.out), row, args.device)
            wrong += row["wrong"]
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
