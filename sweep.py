"""One script over a grid of settings and seeds: a table, a plot with intervals, the best row.

    python report.py sweep --over alpha=0.1,0.5 --over temperature=1,4 --seeds 0,1,2 -- distill.py
    python report.py sweep --over labels+epochs=500+281,all+12 -- train_student.py

Restartable: finished runs are kept, as every script keeps its own.
"""
from flags import (  # noqa: I001
    RECIPES, Parser, fail, launch, plain, plain_name, say, settings)
import argparse
import contextlib
import csv
import importlib
import io
import itertools
import re
import textwrap
import time
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure

import compare
import files
import runs
from plots import OTHER_COLOURS, OTHER_LINES, TEXT, save
from render import aligned, pipes

SCRIPTS = ("train_teacher.py", "train_student.py", "distill.py")
OWN = {"seed": "--seeds", "run": "--name, of the sweep's folder", "results-dir": "it after the --",
       "recipe": "it after the --", "resume": "nothing: a sweep goes on by itself",
       "overwrite": "it after the --", "dry-run": "it after the --"}     # flag -> give instead
OF_MAKE = {"DATASET", "DATA_DIR", "EPOCHS", "BATCH_SIZE", "LABELS", "VIEWS", "DEVICE", "PRECISION"}
FIGURES = {"train_accuracy": "train", "val_accuracy": "validation", "test_accuracy": "test",
           "ema_test_accuracy": "test, average"}
SHORT = {"val_accuracy": "val %", "test_accuracy": "test %", "ema_test_accuracy": "average %"}
NOTE = ("Mean over the seeds ± half of the 95 % interval (Student's t). Above the first row: "
        "points of test accuracy, paired by seed; where the interval holds 0, they cannot tell. "
        "Best: by validation.")


def over(text):
    """argparse type of --over: "alpha=0.1,0.5" -> ("alpha", ["0.1", "0.5"]). Flags that go together
    are joined by +: "labels+epochs=500+281,all+12"."""
    name, _, values = text.partition("=")
    name, values = name.strip().lstrip("-"), [value.strip() for value in values.split(",")]
    if not re.fullmatch(r"[a-z][a-z-]*(\+[a-z][a-z-]*)*", name) or not all(values):
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE,VALUE,…: alpha=0.1,0.5, say")
    uneven = [value for value in values if "+" in name and value.count("+") != name.count("+")]
    if uneven:
        raise argparse.ArgumentTypeError(f"{text!r}: {uneven[0]!r} is not a value each of {name}")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names a value twice")
    for flag in OWN.keys() & set(name.split("+")):
        raise argparse.ArgumentTypeError(f"{text!r}: no setting; give {OWN[flag]}")
    return name, values


def single(names, values):
    """Return flag -> value, of one setting; what is joined by +, apart."""
    return {flag: one for name, value in zip(names, values, strict=True) for flag, one in zip(
        name.split("+"), value.split("+") if "+" in name else [value], strict=True)}


def whole_numbers(text):
    """argparse type of --seeds."""
    try:
        seeds = [int(word) for word in re.split(r"[ ,]+", text.strip())]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds, each once: 0,1,2, say")
    return seeds


def split(argv):
    """Return (the sweep's own words, script, the script's words) of what stands before and after
    the --."""
    if "--" not in argv:
        fail("sweep: after its flags it needs -- and a script: -- distill.py --recipe digits")
    at = argv.index("--")
    script, *words = argv[at + 1:] or [""]
    if script not in SCRIPTS:
        fail(f"sweep: {script!r} after -- is none of {', '.join(SCRIPTS)}")
    for flag in {word.partition("=")[0] for word in words} & {"--seed", "--run"}:
        fail(f"sweep: {flag} after the --: give {OWN[flag[2:]]} before it")
    return argv[:at], script, words


def first_look(words):
    """Return what a script's words say of recipe, results, objective and teacher."""
    parser = Parser(add_help=False)
    for flag, default in (("recipe", "digits"), ("results-dir", "results"), ("objective", None),
                          ("teacher", None)):
        parser.add_argument(f"--{flag}", default=default)
    early = parser.parse_known_args(words)[0]
    if early.recipe not in RECIPES:
        fail(f"--recipe {early.recipe}: choose from {', '.join(RECIPES)}")
    early.objective = early.objective or settings(early.recipe, "student")["objective"]
    return early


def sweep(args, script, words):
    """Run the grid; return {"rows": one a setting, "best": the best by validation}."""
    main = importlib.import_module(script.removesuffix(".py")).main
    if {"-h", "--help"} & {*words}:
        main(["--help"])
    early = first_look(words)
    names = [name for name, _ in args.over]
    flags = [flag for name in names for flag in name.split("+")]
    for flag in flags:
        if flags.count(flag) > 1:
            fail(f"sweep: --over names {flag} more than once; give all of its values in one")
        if {f"--{flag}", f"--no-{flag}"} & {word.partition("=")[0] for word in words}:
            made = flag.upper().replace("-", "_")
            made = f" (of make: {made}=)" if made in OF_MAKE else ""
            fail(f"sweep: --{flag} after the --{made}, too: leave it out, --over sets it")
    name = "-".join([script.removesuffix(".py"), *names]) if args.name is None else args.name
    name = plain_name("--name", name)
    folder = Path(early.results_dir) / "sweeps" / name
    grid = list(itertools.product(*(values for _, values in args.over)))
    plan = [(seed, values, *command(early, script, single(names, values), seed))
            for seed in args.seeds for values in grid]
    for run, count in Counter(run for _, _, run, _ in plan).items():
        if count > 1:
            fail(f"sweep: two values would have one run, {run}: their paths have to differ in the "
                 "name of the folder, or of the run")
    shared, started = [*words, "--results-dir", str(folder), "--resume"], time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):     # a wrong value is told before hours of runs
        for _, _, _, line in plan[:len(grid)]:
            main([*shared, *line, "--dry-run"])
    found = {}
    for done, (seed, values, run, line) in enumerate(plan, 1):
        say(f"== {done}/{len(plan)}: {run}")
        try:
            final = main([*shared, *line])
        except SystemExit as error:
            if error.code != 3:
                raise
            final = None        # its loss was not finite, as the line on stderr says
        if final and "learned" in final:
            final = final | trained(folder / early.recipe / run, final)
        found.setdefault(values, {})[seed] = final
    if any(final and "learned" not in final for row in found.values() for final in row.values()):
        return {"rows": [], "best": None, "folder": str(folder)}        # a dry run
    rows = [summary(names, values, finals, found[grid[0]]) for values, finals in found.items()]
    data = {final["data"] for finals in found.values() for final in finals.values() if final}
    known = [row for row in rows if row["learned"] and row["val_accuracy"] is not None
             and len(data) == 1]        # of other images none is the best
    best = max(known, key=lambda row: row["val_accuracy"][0], default=None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.SUMS).unlink(missing_ok=True)
    write_csv(folder / "sweep.csv", names, found)
    draw(folder / "sweep.png", names, args.over, rows, f"{script} {' '.join(words)}")
    made = [folder / early.recipe / run for _, _, run, _ in plan]
    text = table(names, rows, best) + about(made, script, words)
    files.write_whole(folder / "sweep.md", text.encode())
    runs.sum_sweep(folder)
    print(f"\n{terminal(names, rows, best)}\n\n{folder}/sweep.csv, sweep.md, sweep.png; "
          f"{time.perf_counter() - started:.0f} s")
    return {"rows": rows, "best": best, "folder": str(folder)}


def command(early, script, setting, seed):
    """Return (name of the run, the words that make it) of one setting and seed."""
    setting = {flag: value.replace("{seed}", str(seed)) for flag, value in setting.items()}
    run = ",".join(f"{flag}={last(value)}" for flag, value in setting.items()) + f"-s{seed}"
    line = ["--seed", str(seed), "--run", run]
    for flag, value in setting.items():
        line += [f"--{flag}", value]
    objective = setting.get("objective", early.objective)
    if script == "distill.py" and objective != "consistency" and not (
            early.teacher or "teacher" in setting):
        teacher = Path(early.results_dir, early.recipe, f"teacher-s{seed}", "best.pt")
        if not teacher.exists():
            fail(f"{teacher}: no such file; make it with `python train_teacher.py --recipe "
                 f"{early.recipe} --seed {seed}`, or give --teacher after the --")
        line += ["--teacher", str(teacher)]
    return run, line


def trained(folder, final):
    """Return a run's accuracy on its train images, as augmented, in its best epoch, and its data;
    a file that is not as the run left it is refused."""
    run = compare.read_run(folder)
    return dict(train_accuracy=run["history"][final["best_epoch"] - 1]["train_accuracy"],
                data=run["config"].get("data_key"))


def summary(names, values, finals, first):
    """One row: the settings, seeds, and each figure as (mean, low, high): its 95 % interval; and
    how far its test accuracy is above the first row's, seed by seed. finals: seed -> final.json, or
    None where the loss was not finite."""
    known = {seed: final for seed, final in finals.items() if final}
    row = dict(zip(names, values, strict=True)) | dict(
        seeds=list(known), failed=[seed for seed in finals if seed not in known],
        learned=len(known) == len(finals) and all(final["learned"] for final in known.values()),
        silent=[seed for seed, final in known.items() if not final["learned"]],
        parameters=next((final["parameters"] for final in known.values()), None),
        tests={seed: final["test_accuracy"] for seed, final in known.items()})
    for figure in FIGURES:
        each = [final.get(figure) for final in known.values()]
        row[figure] = None if None in each or not each else compare.interval(each)
    fair = finals is not first and row["learned"] and all(
        final and final["learned"] and final["data"] == finals[seed]["data"]
        for seed, final in first.items())
    row["above_first"] = compare.interval([final["test_accuracy"] - first[seed]["test_accuracy"]
                                           for seed, final in known.items()]) if fair else None
    return row


def write_csv(path, names, found):
    """One line a run: settings, seed, accuracies, seconds."""
    keys = (*FIGURES, "last_test_accuracy", "learned", "parameters", "best_epoch", "epochs",
            "seconds")
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*names, "seed", *keys])
    for values, finals in found.items():
        for seed, final in finals.items():
            final = final or dict(dict.fromkeys(keys), learned=False)
            lines.writerow([*values, seed, *(final[key] for key in keys)])
    files.write_whole(path, text.getvalue().encode())


def last(value):
    """Return a value as a name shows it: of a teacher's file its run, of a folder its name."""
    path = Path(value).absolute()       # ./ has no name of its own
    return value if "/" not in value else (path.parent if path.suffix == ".pt" else path).name


def title(value):
    """Return a value as a table shows it."""
    return last(value).removesuffix("-s{seed}")


def percent(figure, sign=""):
    if figure is None:
        return "-"
    centre, low, _ = figure
    return f"{100 * centre:{sign}.2f}" + ("" if low is None else f" ± {100 * (centre - low):.2f}")


def table(names, rows, best):
    """The rows as Markdown; the best by validation is marked."""
    shown = [figure for figure in FIGURES if any(row[figure] for row in rows)]
    header = [*names, "n", "parameters", *(f"{FIGURES[figure]} %" for figure in shown),
              "test above the first row's", ""]
    lines = []
    for row in rows:
        lines.append([*(title(row[name]) for name in names), str(len(row["seeds"])),
                      "-" if row["parameters"] is None else f"{row['parameters']:,}",
                      *(percent(row[figure]) for figure in shown),
                      percent(row["above_first"], "+"), mark(row, best)])
    return f"{pipes(header, lines)}\n\n{NOTE}\n"


def mark(row, best):
    """What is said of a row at its end."""
    if row["failed"]:
        return "not finite: seed " + ", ".join(map(str, row["failed"]))
    if row["silent"]:
        some = len(row["silent"]) < len(row["seeds"])
        return "learned nothing" + some * f": seed {', '.join(map(str, row['silent']))}"
    return "best by validation" * (row is best)


def terminal(names, rows, best):
    """The same in 80 columns."""
    shown = [figure for figure in SHORT if any(row[figure] for row in rows)]
    lines = [[*names, *(SHORT[figure] for figure in shown), "above first", ""]]
    for row in rows:
        lines.append([*(title(row[name]) for name in names),
                      *(percent(row[figure]) for figure in shown), percent(row["above_first"], "+"),
                      mark(row, best).removesuffix(" by validation")])
    if sum(max(map(len, column)) + 1 for column in zip(*lines, strict=True)) > 81:
        settings = [", ".join(line[:len(names)]) for line in lines]     # on lines of their own
        text = aligned([["", *line[len(names):]] for line in lines]).splitlines()
        text = "\n".join(f"{a}\n {b}" for a, b in zip(settings, text, strict=True))
    else:
        text = aligned(lines)
    return f"{text}\n\n{textwrap.fill(NOTE, 80)}"


def about(folders, script, words):
    """What all of the sweep's runs have in common, or how they differ, in a line."""
    configs = [files.read_json(folder / "config.json") for folder in folders]
    told = []
    for title, key in (("data set", "dataset"), ("device", "device"), ("precision", "precision"),
                       ("epochs", "epochs"), ("seeds", "seed"), ("commit", "git_commit"),
                       ("date", "date")):
        values = sorted({config.get(key, "unknown") for config in configs},
                        key=lambda value: (type(value) is not int, str(value).zfill(9)))
        told.append(f"{title} {', '.join(runs.short(v)[:20] for v in values)}")
    told = plain(f"`{script} {' '.join(words)}`: best validation epoch; {'; '.join(told)}.")
    return f"\n{told}\n"


def draw(path, names, grids, rows, heading):
    """Test accuracy over the first setting, a line for each value of the others, with intervals.
    Evenly spaced: the values may be words, or go by powers."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    places = {value: place for place, value in enumerate(grids[0][1])}
    ordered = all(re.search(r"(^|=)[\d.]|^all", title(value)) for value in places)
    lines, silent = {}, []
    for row in rows:
        lines.setdefault(tuple(row[name] for name in names[1:]), []).append(row)
    for number, (others, members) in enumerate(lines.items()):
        for figure_name, filled in (("test_accuracy", True), ("ema_test_accuracy", False)):
            shown = [row for row in members if row[figure_name] is not None]
            if not shown:
                continue
            side = number - (len(lines) - 1) / 2 + (0 if filled else 0.7)      # bars side by side
            x = [places[row[names[0]]] + 0.08 * side for row in shown]
            y = [100 * row[figure_name][0] for row in shown]
            half = [0 if low is None else 100 * (mid - low)
                    for mid, low, _ in (row[figure_name] for row in shown)]
            silent += [point for *point, row in zip(x, y, shown, strict=True)
                       if filled and not row["learned"]]
            label = ", ".join(f"{n} {v}" for n, v in zip(names[1:], others, strict=True))
            label = f"{label or 'test'}{'' if filled else ', average'}"
            colour = OTHER_COLOURS[number % len(OTHER_COLOURS)] if others else "#0072B2"
            axes.errorbar(x, y, half, color=colour, marker="o", capsize=3, label=label,
                          linestyle="none" if not ordered else OTHER_LINES[
                              number % len(OTHER_LINES)] if others else "-" if filled else "--",
                          markerfacecolor=colour if filled else "white")
    # Pairs, behind: where all seeds rise together, the setting does it.
    for seed in rows[0]["tests"] if len(lines) == 1 and ordered else ():
        pairs = [(place, row["tests"][seed]) for place, row in enumerate(rows)
                 if seed in row["tests"]]
        axes.plot([place for place, _ in pairs], [100 * value for _, value in pairs],
                  color="#B0B0B0", linewidth=0.8, zorder=0, label="_")
    if silent:
        axes.plot(*zip(*silent, strict=True), "x", color="black", markersize=11, markeredgewidth=2,
                  label="learned nothing")
    shown = list(map(title, places))
    long = sum(map(len, shown)) > 60
    axes.set_xticks(range(len(places)), shown, rotation=35 if long else 0,
                    ha="right" if long else "center")
    axes.set_xlabel(names[0], fontsize=TEXT)
    axes.set_ylabel("test accuracy (%), best validation epoch", fontsize=TEXT)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(frameon=False, fontsize=TEXT - 1)
    seeds = max(len(row["seeds"]) for row in rows)
    each = "; grey: each seed" * (len(lines) == 1 and ordered)
    note = f"bars: 95 % interval of {seeds} seeds{each}" if seeds > 1 else "one seed: no interval"
    axes.set_title(f"{textwrap.fill(plain(heading), 78)}\n{note}", fontsize=TEXT, parse_math=False)
    save(figure, path)


if __name__ == "__main__":
    launch(lambda: fail("sweep.py: a command of report.py; give: python report.py sweep …"))
