"""One script over a grid of settings and seeds: a table, a plot with intervals, the best row.

    python sweep.py --over alpha=0.1,0.5 --seeds 0,1,2 -- distill.py
    python sweep.py --over alpha=0.1,0.5 --over temperature=1,4 -- distill.py
    python sweep.py --over labels+epochs=500+281,all+12 -- train_student.py
    python sweep.py --over 'noise="0.5,0,0.15,0","0,0,0,0"' -- distill.py

Flags joined by + change together; a switch is on or off. After -- stands one of the training
scripts, with the flags of all runs; {seed} in a value is the run's seed. Runs are in
results/sweeps/NAME; the teachers of distill.py are the recipe's, of the same seed. The same
command goes on where it was stopped.
"""
import argparse
import contextlib
import csv
import importlib
import io
import itertools
from pathlib import Path

import plots
import report
from recipes import Parser, fail, folder_name, one_line_errors, say, write_whole

SCRIPTS = ("train_teacher.py", "train_student.py", "distill.py")
FIGURES = ("val_accuracy", "test_accuracy", "ema_test_accuracy", "last_test_accuracy",
           "learned", "parameters", "best_epoch", "epochs", "seconds")     # in sweep.csv
COLUMNS = ("setting", "n", "test %", "above first [95 %]", "verdict", "validation %",
           "test of average %", "parameters")
ON_TERMINAL = 5         # columns
ABOUT = ("dataset", "device", "precision", "epochs", "seed", "git_commit", "date")
NOTE = ("Mean ± standard deviation over the seeds, of the best validation epoch. Above first: "
        "points of test accuracy above the first row, paired by seed, with the 95 % interval "
        "of Student's t.")


# ---- the grid -----------------------------------------------------------------------

def over(text):
    """argparse type of --over: "alpha=0.1,0.5" -> ("alpha", ["0.1", "0.5"])."""
    name, _, values = text.partition("=")
    # As in a CSV, quotes stand around a value that holds commas.
    values = list(map(str.strip, next(csv.reader([values], skipinitialspace=True))))
    name = name.strip().lstrip("-")
    fits = all(value.count("+") >= name.count("+") for value in values)
    if not values or not fits or name in ("", "seed", "run"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FLAG=VALUE,VALUE, as alpha=0.1,0.5 or labels+epochs=50+9,all+3; "
            "seeds are given as --seeds")
    return name, values


def seed_list(text):
    """argparse type of --seeds: "0,1,2", or "0 1 2"."""
    words = text.replace(",", " ").split()
    if not words or not all(map(str.isdecimal, words)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds, as 0,1,2")
    return sorted(set(map(int, words)))


def title(value):
    """Return a value as names show it: of a teacher's file its run, of a folder its name."""
    path = Path(value).absolute()       # ./ has no name of its own
    name = path.parent.name if path.suffix == ".pt" else path.name
    return name.removesuffix("-s{seed}")


def flags_of(names, values):
    """Return (setting, as "alpha=0.1,temperature=4", its flags as words)."""
    shown, words = [], []
    for name, value in zip(names, values, strict=True):
        parts = value.split("+", name.count("+"))
        for flag, part in zip(name.split("+"), parts, strict=True):
            shown.append(f"{flag}={title(part)}")
            switch = {"on": f"--{flag}", "off": f"--no-{flag}"}
            words.append(switch.get(part, f"--{flag}={part}"))
    return ",".join(shown), words


def check(script, line, seed):
    """Check a run by a dry run; return (results_dir, words that name the recipe's teacher)."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = script.main([*line, "--dry-run"])
    root, words = Path(config["results_dir"]), []
    # The run will not lie beside the teacher of the recipe.
    if config.get("teacher_sha256") and not config["teacher"]:
        words = ["--teacher", str(root / config["recipe"] / f"teacher-s{seed}" / "best.pt")]
    return root, words


# ---- the runs -----------------------------------------------------------------------

def make_run(script, words, folder):
    """Make a run, or go on with it; return {its seed: report.read_run}, {} if it diverged."""
    try:
        final = script.main([*words, "--results-dir", str(folder), "--resume"])
    except SystemExit as error:
        if error.code != 3:
            raise
        return {}
    run = report.read_run(folder / final["recipe"] / final["run"])
    run["config"]["teacher_sha256"] = None      # settings with other teachers are compared
    return {final["seed"]: run}


def pick_best(rows, count):
    """Return the setting of highest validation accuracy; count: seeds that it has to have."""
    known = {}
    for setting, row in rows.items():
        score = row["val_accuracy"]["mean"]
        whole = row["learned"] and len(row["seeds"]) == count
        if score and whole and not row["prefix"]:
            known[setting] = score
    return max(known, key=known.get, default=None)


# ---- what is written ----------------------------------------------------------------

def write_csv(file, names, grid, runs):
    """Write one line a finished run: setting, seed, FIGURES."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*names, "seed", *FIGURES])
    for setting, values in grid.items():
        for seed, run in runs[setting].items():
            lines.writerow([*values, seed, *map(run["final"].get, FIGURES)])
    write_whole(file, text.getvalue().encode())


def table_line(setting, rows, first, count):
    """Return what COLUMNS say of a setting.

    first: the setting that it is compared with. count: the seeds that it should have.
    """
    if setting not in rows:
        return [setting, "0", "-", "-", "diverged", "-", "-", "-"]
    row, above, verdict = rows[setting], "-", "-"
    if first in rows and setting != first:
        found = report.difference(row, rows[first], "test_accuracy")
        above, verdict = report.points(found), found["verdict"]
    n = len(row["seeds"])
    if row["silent"]:
        verdict = f"{len(row['silent'])} learned nothing"
    if n < count:
        verdict = f"{count - n} diverged"
    average = rows.get(f"{setting}/average", {})
    return [
        setting,
        str(n),
        report.percent(row["test_accuracy"]),
        above,
        verdict,
        report.percent(row["val_accuracy"]),
        report.percent(average.get("test_accuracy")),
        report.count(row["parameters"]["mean"]),
    ]


def about(runs):
    """Return what the runs have in common, or how they differ, in a line."""
    lines = []
    for key in ABOUT:
        values = set()
        for members in runs.values():
            values |= {str(run["config"][key]) for run in members.values()}
        lines.append(f"{key} {', '.join(sorted(values))}")
    return "; ".join(lines)


@plots.defaults()
def draw(file, names, grid, rows):
    """Draw test accuracy over the first setting, a line for each value of the others."""
    axes = plots.new_figure(9, 5).subplots()
    lines = {}
    for setting, values in grid.items():
        first, *others = map(title, values)
        if setting in rows:
            centre, low, _ = report.interval(rows[setting]["test_accuracy"]["values"])
            half = 0 if low is None else centre - low
            points = lines.setdefault(", ".join(others), [])
            points.append((first, 100 * centre, 100 * half))
    for number, (label, points) in enumerate(lines.items()):
        x, y, half = zip(*points, strict=True)      # x: words, which stand evenly spaced
        colour, line = plots.style(None, number)
        axes.errorbar(x, y, half, color=colour, linestyle=line, marker="o", capsize=3,
                      label=label)
    axes.set(xlabel=names[0], ylabel="test accuracy (%), mean and 95 % interval")
    axes.grid(axis="y")
    if len(names) > 1:
        axes.legend(title=", ".join(names[1:]))
    plots.save(axes.figure, file)


def write(folder, names, grid, runs, args):
    """Write the files of a sweep, print its table; return what main returns.

    grid: setting -> its values. runs: setting -> {seed: run}.
    """
    rows = report.make_rows(runs)
    first, count = next(iter(grid)), len(args.seeds)
    best = pick_best(rows, count)
    lines = [table_line(setting, rows, first, count) for setting in grid]
    command = f"{args.script} {' '.join(args.words)}"
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "sweep.csv", names, grid, runs)
    draw(folder / "sweep.png", names, grid, rows)
    best_line = f"Best by validation: {best}."
    text = report.pipes(COLUMNS, lines)
    text += f"\n\n{NOTE} {best_line}\n\n`{command}`: {about(runs)}.\n"
    write_whole(folder / "sweep.md", text.encode())
    narrow = [line[:ON_TERMINAL] for line in (COLUMNS, *lines)]
    say(f"\n{report.aligned(narrow)}\n\n{best_line}\n{folder}/sweep.csv, sweep.md, sweep.png")
    return {"rows": rows, "best": best, "folder": str(folder)}


# ---- the script ---------------------------------------------------------------------

def sweep(args, script):
    """Check the settings, make the runs, write what they say; script: a module."""
    names, grids = zip(*args.over, strict=True)
    name = folder_name("--name", args.name or "-".join([script.__name__, *names]))
    grid, planned = {}, []
    for values in itertools.product(*grids):        # a wrong value is told before hours
        setting, flags = flags_of(names, values)
        if setting in grid:
            fail(f"two settings are called {setting}: give paths whose last parts differ")
        grid[setting] = values
        for seed in args.seeds:
            line = [word.replace("{seed}", str(seed)) for word in (*args.words, *flags)]
            line += ["--seed", str(seed), "--run", f"{setting}-s{seed}"]
            root, teacher = check(script, line, seed)
            planned.append((setting, line + teacher))
    if "--dry-run" in args.words:
        say("dry run: all runs were checked, none was made")
        return {}

    folder, runs = root / "sweeps" / name, {setting: {} for setting in grid}
    for number, (setting, line) in enumerate(planned, 1):
        say(f"== {number}/{len(planned)}: {setting}")
        runs[setting].update(make_run(script, line, folder))
    return write(folder, names, grid, runs, args)


def main(argv=None):
    """Run a sweep; return {"rows", "best" (the best setting by validation), "folder"}."""
    parser = Parser("%(prog)s --over FLAG=VALUE,... [--flag value ...] -- SCRIPT [...]",
                    description=__doc__)
    parser.add_argument("--over", type=over, action="append", required=True,
                        metavar="FLAG=VALUE,...", help="a flag of the script and its values")
    parser.add_argument("--seeds", type=seed_list, default=[0], metavar="LIST",
                        help="of each setting: 0,1,2 say (0)")
    parser.add_argument("--name", help="of the folder; default: the script and the flags")
    parser.add_argument("script", choices=SCRIPTS, metavar="SCRIPT", help=", ".join(SCRIPTS))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="flags of all runs")
    args = parser.parse_args(argv)
    with one_line_errors("the same command goes on where this one stopped"):
        return sweep(args, importlib.import_module(Path(args.script).stem))


if __name__ == "__main__":
    main()
