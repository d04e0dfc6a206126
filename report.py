"""What the finished runs of a recipe say: a table, verdicts and one picture.

    python report.py --recipe digits            # report.md, report.json, comparison.png
    python report.py publish --recipe digits    # the same, and the small files into published/
    python report.py sweep --over alpha=0,0.5,1 --seeds 0,1,2 -- distill.py --recipe digits
    python report.py html                       # results/report.html: all of it in one file
    python report.py readme                     # fill the README's tables from published/
    python report.py readme --check             # exit code 1 if the README is stale
"""
from flags import Parser, a_file, a_path, fail, launch, plain, plain_name, words  # noqa: I001

import contextlib
import json
import re
import shlex
from pathlib import Path

import render
from compare import (
    add_beside,
    add_gaps,
    calibration,
    compare,
    confusion,
    group_runs,
    label,
    make_rows,
    read_runs,
)
from files import read_text, write_whole
from plots import MOST_BYTES, draw_comparison, draw_details
from recipes import DEFAULTS, RECIPES, settings
from runs import SUMS, refuse_altered_sweep, short, taught_by_others, this_version

SETTINGS = {  # said under a table -> key in config.json or final.json
    "data set": "dataset", "device": "device", "precision": "precision", "epochs": "epochs",
    "batch": "batch_size", "learning rate": "lr", "seeds": "seed", "torch": "torch",
    "commit": "git_commit", "date": "date",
}
MATTERS = {  # the same; runs that differ in one of these are compared with a warning
    "device": "device", "precision": "precision", "epochs": "epochs", "data": "data_key",
    "labels": "labels", "augmentation": "augment", "views": "views", "init": "init",
    "pool": "pool", "norm": "norm", "batch": "batch_size", "optimizer": "optimizer",
}
DETAILED = ("teacher", "student", "kd", "mean-teacher")     # rows that details.png shows
CLASSES = {"digits": 10, "cifar10": 10, "svhn": 10, "tinyimagenet": 200}
SCHEMA = 1  # of report.json
MARKER = re.compile(r"<!--\s*(?:([\w-]+):([\w.-]+)|/([\w-]+))\s*-->")
PUBLISHED = ("config.json", "metrics.csv", "final.json", SUMS, "curves.png")    # no weights


# ---------------------------------------------------------------- the report

def build(recipe, results_dir="results"):
    """A recipe's finished runs, read and compared: (the report as a dict, the runs, the outputs on
    test of each row)."""
    folder = Path(results_dir) / recipe
    runs, unfinished = read_runs(folder)
    if not runs:
        there = f" (unfinished: {', '.join(unfinished)})" if unfinished else ""
        fail(f"no finished run below {folder}{there}: train the teacher with "
             f"`{_command('teacher', recipe, results_dir, {})}`, or every run with "
             f"`make all RECIPE={recipe}`")
    groups = group_runs(runs)
    rows = make_rows(groups)
    made = {name: _spread(groups, key) for name, key in SETTINGS.items()}
    config = runs[0]["config"]
    few = "labels" in RECIPES[recipe]       # recipes of few labels have no teacher
    no_gap = add_gaps(rows)
    notes = _notes(groups, rows, made, no_gap, few and "teacher" not in rows)
    pooled = add_beside(rows, folder)
    keep_beside(rows, folder / "report.json")
    for role in ("student",) if few else ("teacher", "student"):
        if role not in rows:
            notes.append(f"Missing: the {label(role)}. "
                         f"`{_command(role, recipe, results_dir, config)}` makes it.")
    moved = [f"{run['name']} ({run['final']['run']})" for run in runs
             if run["final"].get("run", run["name"]) != run["name"]]
    if moved:
        notes.append(f"Ran under another name: {', '.join(moved)}.")
    if unfinished:
        notes.append(f"Unfinished, not shown: {', '.join(unfinished)}.")
    classes = config.get("classes") or CLASSES.get(config.get("dataset"))
    names = next((run["config"]["class_names"] for run in runs
                  if "class_names" in run["config"]), None)
    classes = len(classes) if isinstance(classes, list) else classes
    return {"schema": SCHEMA, "recipe": recipe, "settings": made, "rows": list(rows.values()),
            "comparisons": compare(rows), "notes": list(map(plain, notes)),
            "unfinished": unfinished,
            "chance": 1 / classes if classes else None,
            "classes": names and list(map(plain, names))}, runs, pooled


def keep_beside(rows, path):
    """Take from an earlier report what rows say beside accuracy whose runs kept no outputs: those
    that are published did not. The runs have to be the same, and their test accuracies."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError,
                             RecursionError, OverflowError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for old in earlier["rows"]:
            row = rows.get(old["key"], {"beside": True})
            same = all(row.get(name) == old[name] for name in ("runs", "weights", "test_accuracy"))
            if not row["beside"] and same and render.beside(trial := {**earlier, "rows": [old]}):
                render.per_class(trial)         # as far as it can be shown
                row["beside"] = old["beside"]


def _command(role, recipe, results_dir, config):
    """The command that trains the teacher or the student, on the data of a run that is there."""
    words = ["python", f"train_{role}.py", "--recipe", recipe]
    default = {**settings(recipe, role), "results_dir": "results"}
    for key, value in {**config, "results_dir": results_dir}.items():
        if key in ("dataset", "data_dir", "image_size", "fit", "val_fraction", "normalise", "seed",
                   "results_dir") and value != default[key]:
            words += ["--" + key.replace("_", "-"), str(value)]
    return plain(shlex.join(words))


def _spread(groups, key):
    """What the runs have for one setting, in words: "8", or "8, but 10 (teacher)"."""
    owners = {}
    for group, members in groups.items():
        texts = {}
        for run in members.values():
            value = {**run["config"], **run["final"]}.get(key)
            if value is None:
                value = "all" if key == "labels" else "unknown"
            text = f"{value:g}" if isinstance(value, float) else plain(short(value))[:20]
            texts.setdefault(text, []).append(plain(run["name"]))
        for text, names in texts.items():       # a row as a whole, or some of its runs
            who = owners.setdefault(text, {})
            who.update({label(group): len(names)} if len(texts) == 1 else dict.fromkeys(names, 1))
    if key == "seed":
        return ", ".join(sorted(owners, key=int))
    common, *others = sorted(owners, key=lambda text: -sum(owners[text].values()))
    return ", but ".join([common] + [f"{text} ({', '.join(owners[text])})" for text in others])


def _told(group, members):
    """What else defines a row: labels kept, a weight decay that is not the usual one, and how its
    teacher teaches; "" where nothing does."""
    config = next(iter(members.values()))["config"]
    words = [f"{config['labels']} labels"] if config.get("labels") else []
    if config.get("weight_decay", usual := DEFAULTS["weight_decay"]) != usual:
        words.append(f"weight decay {config['weight_decay']}")
    if config.get("objective") == "consistency":
        words += [f"λ {config['class_weight']:g}", f"{config['class_cost']} on the labels",
                  f"ramp-up {config['ramp_up']}"]
    elif config.get("objective"):
        words += [f"T {config['temperature']:g}", f"α {config['alpha']:g}"]
    if config.get("ema_decay"):
        words.append(f"EMA {config['ema_decay']:g}")
    return f"{label(group)}: {', '.join(words)}" if words else ""


def _notes(groups, rows, made, no_gap, silent):
    """The lines under a table: settings, what is doubtful, which epoch counts."""
    doubtful = [run["name"] for members in groups.values() for run in members.values()
                if not run["final"]["learned"]]
    differ = {name: _spread(groups, key) for name, key in MATTERS.items()}
    differ = "; ".join(f"{name} {text}" for name, text in differ.items() if ", but " in text)
    line = "; ".join(f"{name} {text}" for name, text in made.items())
    told = "; ".join(filter(None, (_told(group, members) for group, members in groups.items())))
    unlike = "; ".join(
        f"{label(key)}: " + ", ".join(
            f"{name} " + ", but ".join(f"{value} ({', '.join(names)})"
                                       for value, names in values.items())
            for name, values in row["mixed"].items())
        for key, row in rows.items() if row["mixed"] and not row["prefix"])
    others = taught_by_others(groups)
    notes = (
        (True, f"{line[0].upper()}{line[1:]}."),
        (told, f"{told}."),
        (others, f"Taught by another than the teacher of their seed: {', '.join(others)}."),
        (doubtful, f"{render.MARK} No conclusion from {', '.join(doubtful)}: learned nothing, "
                   "accuracy not above chance."),
        (unlike, f"{render.MARK} No conclusion where the seeds of one row have other settings: "
                 f"{unlike}. Remove these runs, or run them again under another --run."),
        (differ, f"The runs differ in what matters: {differ}."),
        (True, "Accuracies are of the best validation epoch; test was scored once."),
        (any(row["val_accuracy"]["mean"] is None for row in rows.values()),
         "Without validation images (-) the last epoch counts as the best."),
        (any(len(row["seeds"]) > 1 for row in rows.values()),
         "Figures are mean ± sample standard deviation over n seeds."),
        (no_gap and not silent, f"No gap is shown: {no_gap}."),
        (not no_gap, "Gap: the share of the way from student alone to teacher, in test accuracy, "
                     "both over the row's seeds as far as they have them (-: not learned, or no "
                     "seed in common)."))
    return [note for applies, note in notes if applies]


LISTS = {"claims": ("report", "claim", "printed", "measured here", "verdict"),
         "advice": ("choice", "advice", "points of test accuracy, measured here")}
# Markers of the README.
BLOCKS = {"table": render.markdown_table, "comparisons": render.markdown_comparisons,
          "commands": render.markdown_commands, "bench": render.markdown_bench,
          "claims": lambda found: render.pipes(LISTS["claims"], listed(found)),
          "advice": lambda found: render.pipes(LISTS["advice"], listed(found)),
          "beside": lambda report: render.pipes(render.BESIDE, render.beside(report)),
          "soak": render.markdown_soak, "sweep": None}
# ... of which these have a file of their own; the others are in <recipe>/report.json.
FILES = {kind: f"{kind}.json" for kind in ("bench", "claims", "advice", "soak")}


def listed(found):
    return [[str(cell) for cell in one.values()] for one in found]


# ---------------------------------------------------------------- commands

def write(flags):
    """`report.py`: print the table, write report.md, report.json, comparison.png."""
    report, runs, pooled = build(flags.recipe, flags.results_dir)
    folder = Path(flags.results_dir) / flags.recipe
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / "report.md", render.markdown(report).encode(errors="backslashreplace"))
    draw(report, runs, pooled, folder)
    print(f"{render.terminal(report)}\n\nreport   {plain(folder / 'report.md')}\n"
          f"picture  {plain(folder / 'comparison.png')}")
    return report


def draw(report, runs, pooled, folder):
    """Write comparison.png and, where runs kept their outputs, details.png."""
    recipe = report["recipe"]
    draw_comparison(report["rows"], runs, folder / "comparison.png", recipe, report["chance"])
    if pooled:
        draw_details({label(key): (calibration(*pooled[key])[1], confusion(*pooled[key]))
                      for key in [key for key in DETAILED if key in pooled] or list(pooled)[:4]},
                     folder / "details.png", recipe, report["classes"])


def publish(flags):
    """`report.py publish`: the report anew, then every small file into published/<recipe>/; of a
    sweep its table, plot and CSV into published/sweeps/<name>/."""
    if flags.sweep:
        place = Path("sweeps", plain_name("--sweep", flags.sweep))
        target = Path(flags.results_dir) / "published" / place
        made = [Path(flags.results_dir) / place / f"sweep.{kind}" for kind in ("md", "csv", "png")]
        if not all(path.is_file() for path in made):
            there = sorted(p.parent.name for p in Path(flags.results_dir).glob("sweeps/*/sweep.md"))
            fail(f"--sweep {flags.sweep}: none, or not whole, below {flags.results_dir}/sweeps "
                 f"(there are: {', '.join(there) or 'none'}); the sweep's command makes it")
        refuse_altered_sweep(made[0].parent)
        target.mkdir(parents=True, exist_ok=True)
        for path in (*made, *made[0].parent.glob(SUMS)):
            write_whole(target / path.name, path.read_bytes())
        print(f"published in {plain(target)}")
        return {"sweep": flags.sweep}
    report = write(flags)
    source = Path(flags.results_dir) / flags.recipe
    target = Path(flags.results_dir) / "published" / flags.recipe
    names = sorted({name for row in report["rows"] for name in row["runs"]})
    for file in ("report.md", "report.json", "comparison.png", "details.png",
                 *(f"{name}/{file}" for name in names for file in PUBLISHED)):
        small = (source / file).exists() and (source / file).stat().st_size < MOST_BYTES
        if small or not file.endswith(("curves.png", "details.png", SUMS)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            write_whole(target / file, (source / file).read_bytes())
    print(f"published in {plain(target)}")
    for old in sorted(path.name for path in target.iterdir() if path.is_dir()):
        if old not in names:
            print(f"{plain(target / old)} is not among these runs: remove it if it should not stay")
    return report


def readme(flags):
    """`report.py readme`: fill what stands between <!-- table:RECIPE --> and <!-- /table -->."""
    path = Path(flags.readme)
    try:
        old = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"{path}: not a text in UTF-8; give --readme FILE")
    pieces, end, opened = [], 0, None  # end: of what is in the pieces already
    for mark in MARKER.finditer(old):
        kind, recipe, closed = mark.groups()
        if closed != opened:
            wanted = f"<!-- /{opened} -->" if opened else "a marker that opens"
            fail(f"{path}: {mark[0]} where {wanted} should be")
        if not closed:
            pieces += [old[end:mark.end()], "\n\n", _block(flags, kind, recipe), "\n\n"]
        end, opened = mark.start(), kind
    if opened:
        fail(f"{path}: the last {opened} is not closed by <!-- /{opened} -->")
    new = "".join([*pieces, old[end:]])
    if new != old and flags.check:
        fail(f"{path} is stale: run `python report.py readme`", code=1)
    if new != old:
        write_whole(path, new.encode())
    return {"readme": str(path), "changed": new != old}


def _block(flags, kind, recipe):
    place = Path(flags.results_dir) / "published"
    source = place / FILES.get(kind, f"{recipe}/report.json")
    source = place / "sweeps" / recipe / "sweep.md" if kind == "sweep" else source
    what = "SWEEP" if kind == "sweep" else "RECIPE"
    if kind not in BLOCKS:
        fail(f"{flags.readme}: unknown marker {kind}:{recipe} (choose from {', '.join(BLOCKS)})")
    try:
        if kind == "sweep":
            refuse_altered_sweep(source.parent)
        text = read_text(source)
        known = text.strip() if kind == "sweep" else json.loads(text)
        if isinstance(known, dict) and not this_version(known.get("schema", SCHEMA)):
            fail(f"{flags.readme}: {source} is of another version of these scripts (schema "
                 f"{known['schema']!r}, now {SCHEMA}); `make publish {what}={recipe}` writes it")
        return known if kind == "sweep" else BLOCKS[kind](known)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError,
            AttributeError) as error:
        fail(f"{flags.readme}: {kind}:{recipe} needs {source} ({type(error).__name__}): "
             f"`make {kind if kind in FILES else f'publish {what}={recipe}'}` makes it")


def sweep(args):
    """`report.py sweep`: one script over a grid of settings and seeds."""
    import sweep as grid  # its scripts load torch, which no other command needs

    return grid.sweep(args, *args.script)


def page(args):
    """`report.py html`: all that a results folder holds in one file, pictures drawn anew."""
    root, reports = Path(args.results_dir), []
    for folder in sorted(root.glob("*")):
        if folder.name in RECIPES and any(folder.glob("*/final.json")):
            report, *known = build(folder.name, root)
            draw(report, *known, folder)
            reports.append(report)
    sweeps = [path.parent for path in sorted(root.glob("sweeps/*/sweep.md"))]
    if not reports and not sweeps:
        fail(f"no finished run below {root}: make all trains those of the digits")
    lists = {}
    for path in (root / FILES[kind] for kind in LISTS):
        if path.is_file():
            lines, header = [], LISTS[path.stem]
            with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                lines = listed(json.loads(path.read_text(encoding="utf-8")))
            if {*map(len, lines)} != {len(header)}:
                fail(f"{path}: cut short or damaged; `make claims` writes it")
            lists[path.stem] = header, lines
    text = render.html_page(root, reports, sweeps, lists)
    write_whole(root / "report.html", text.encode(errors="backslashreplace"))
    print(f"page     {plain(root / 'report.html')}, {len(text) / 1e6:.1f} MB")
    return {"page": str(root / "report.html"), "recipes": [found["recipe"] for found in reports],
            "sweeps": [path.name for path in sweeps]}


COMMANDS = {"report": write, "publish": publish, "readme": readme, "sweep": sweep, "html": page}


def parse(command, argv):
    """Flags of one command."""
    doc = __doc__ if command == "report" else COMMANDS[command].__doc__
    parser = Parser(prog=f"report.py {command}".removesuffix(" report"), description=doc)
    if command == "sweep":
        import sweep as grid
        parser = Parser("%(prog)s --over FLAG=A,B,… [--seeds 0,1] -- SCRIPT "
                        "[--flag value]", prog="report.py sweep", description=grid.__doc__)
        if {"-h", "--help"} & set(argv[:argv.index("--")] if "--" in argv else argv):
            argv = ["--help"]
        own, *script = grid.split(argv) if argv != ["--help"] else (argv,)
        parser.add_argument("--over", action="append", type=grid.over, required=True,
                            metavar="FLAG=A,B,…", help="a flag of the script and its values; may "
                            "stand more than once; flags that go together: F+G=A+X,B+Y")
        parser.add_argument("--seeds", type=grid.whole_numbers, default=[0],
                            help="each setting with each of them, 0,1,2 say (0)")
        parser.add_argument("--name", help="of the folder <results>/sweeps/NAME; default: the "
                                           "script and the flags")
        args = parser.parse_args(own)
        args.script = script
        return args
    parser.add_argument("--results-dir", type=a_path, default="results", metavar="DIR",
                        help="run folders are DIR/<recipe>/<run> (%(default)s)")
    if command == "readme":
        parser.add_argument("--readme", type=a_file, default="README.md", metavar="FILE",
                            help="(%(default)s)")
        parser.add_argument("--check", action="store_true", help="exit 1 if stale; write nothing")
    elif command != "html":
        parser.add_argument("--recipe", choices=RECIPES, default="digits", metavar="NAME",
                            help=f"whose runs: {', '.join(RECIPES)} (%(default)s)")
    if command == "publish":
        parser.add_argument("--sweep", metavar="NAME", help="a sweep, in place of a recipe's runs")
    return parser.parse_args(argv)


def main(argv=None):
    """Run one command; returns the report as a dict (readme: {"readme", "changed"})."""
    argv = words(argv)
    command, *rest = argv if argv and not argv[0].startswith("-") else ["report", *argv]
    if command not in COMMANDS:
        fail(f"unknown command {command!r} (choose from {', '.join(COMMANDS)})")
    try:
        return COMMANDS[command](parse(command, rest))
    except BrokenPipeError:     # who reads what is printed has gone; flags.launch ends it
        raise
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror}; mend that")


if __name__ == "__main__":
    launch(main)
