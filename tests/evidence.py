"""The pages of results/published, from what lies there: `make evidence`.

    python tests/evidence.py            writes those that are stale
    python tests/evidence.py --check    exit code 1 if one is

Figures come from published runs, sweeps, bench.json and soak.json; words from notes.json,
advice.json and reports.json. Advice and claims name the comparisons that they rest on, and
the verdicts that their words were written for: where a published verdict is another, no
page is written.
"""
import contextlib
import csv
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calc  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402
from recipes import Parser, fail, path, read_json, write_whole  # noqa: E402
from report import pipes, points  # noqa: E402

PUBLISHED = ROOT / "results" / "published"
PAGES = {
    "sweeps.md": "Sweeps: one setting varied, with plots",
    "advice.md": "Advice: which settings to choose, and what says so",
    "claims.md": "What the five reports claimed, and what was measured",
    "benchmark.md": "Speed and memory",
    "kills.md": "Runs that were killed and resumed",
    "shapes.md": "Shapes and parameters: the reports' questions answered",
}
SHOWN = ("run", "n", "parameters", "epochs", "test %", "gap", "seconds")    # in README.md
HIGHER = {"helps": "higher", "hurts": "lower"}      # of settings of a sweep
KINDS = {"cpu": "CPU", "cuda": "GPU"}
PHASES = ("start-up", "cache", "training", "end", "between_writes")         # of soak.json
KILLED = ("run", "kills", "in start-up", "cache", "training", "at the end",
          "of these while writing", "as if never killed")
HELD = ("run", "MB after 5 epochs", "after 50", "open files", "threads")


def page(title, key, notes, *blocks):
    """Return a page: its title, its notes, what was generated, and the notes of its end."""
    before, after = notes.get(key, []), notes.get(f"{key}/end", [])
    parts = [f"# {title}", *before, *blocks, *after]
    return "\n\n".join(parts) + "\n"


# ---- comparisons behind the words ---------------------------------------------------

def find_comparison(found, title):
    """Return a report's figures of a comparison, of the best epoch; None where it has none."""
    for entry in found["comparisons"]:
        if entry["title"] == title and entry["best"]["mean"] is not None:
            return entry["best"]
    return None


def by_seed(name, setting, reports, folder):
    """Return {seed: share} of a sweep's setting (test accuracy) or of a recipe's row
    (calibration error)."""
    if name in reports:
        rows = {row["key"]: row for row in reports[name]["rows"]}
        return dict(enumerate(rows[setting]["beside"]["calibration"]["values"]))
    found = {}
    with open(folder / "sweeps" / name / "sweep.csv", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            swept = next(iter(line.values()))
            if sweep.title(swept) == setting:
                found[line["seed"]] = float(line["test_accuracy"])
    return found


def compare_settings(first, second):
    """Return the figures of first - second, {seed: share} each, as a report has them."""
    differences = []
    for seed in sorted(first.keys() & second.keys()):
        differences.append(100 * (first[seed] - second[seed]))
    mean, low, high = report.interval(differences)
    verdict = report.verdict(low, high)
    return {
        "n": len(differences),
        "mean": mean,
        "low": low,
        "high": high,
        "verdict": HIGHER.get(verdict, verdict),
    }


def look_up(entry, reports, folder):
    """Yield (what, {name: its page}, figures, expected verdict) of an entry of evidence."""
    for recipe, expected in entry.get("verdicts", {}).items():
        figures = find_comparison(reports[recipe], entry["comparison"])
        yield entry["comparison"], {recipe: f"{recipe}/report.md"}, figures, expected
    if "what" in entry:
        pages, sides = {}, []
        for name, setting in (entry["first"], entry["second"]):
            pages[name] = f"{name}/report.md" if name in reports else f"sweeps.md#{name}"
            sides.append(by_seed(name, setting, reports, folder))
        yield entry["what"], pages, compare_settings(*sides), entry["verdict"]


def comparison_table(owner, evidence, reports, folder):
    """Return the comparisons behind some words as a table; refuse those that changed."""
    lines = []
    for entry in evidence:
        for what, pages, figures, expected in look_up(entry, reports, folder):
            verdict = figures["verdict"] if figures else "not published"
            if verdict != expected:
                fail(f"{owner}: its words were written for {expected!r}, but {what} of "
                     f"{', '.join(pages)} says {verdict!r}; write words and verdict anew, in "
                     "advice.json or reports.json", code=1)
            links = []
            for name, target in pages.items():
                links.append(f"[{name}]({target})")
            what += f" ({', '.join(links)})"
            lines.append([what, str(figures["n"]), points(figures), verdict])
    return pipes(("comparison", "n", "points [95 %]", "verdict"), lines)


def refuse_unlisted(claim, reports):
    """A recipe that answers a claim must be among its comparisons, whatever it says."""
    for entry in claim.get("evidence", ()):
        for recipe in entry.get("recipes", reports):
            there = recipe in reports and find_comparison(reports[recipe], entry["comparison"])
            if there and recipe not in entry["verdicts"]:
                verdict = there["verdict"]
                fail(f"{claim['claim']}: {recipe} answers it too, with {verdict!r}; add that "
                     "to the claim in reports.json", code=1)


def advice_page(reports, notes, folder):
    blocks = []
    for choice, entry in read_json(folder / "advice.json").items():
        table = comparison_table(choice, entry["evidence"], reports, folder)
        blocks += [f"## {choice}", entry["advice"], table]
    return page("Advice", "advice", notes, *blocks)


def claims_page(reports, notes, folder):
    blocks = []
    for claim in read_json(folder / "reports.json")["claims"]:
        refuse_unlisted(claim, reports)
        blocks.append(f"## {claim['report']}: {claim['claim']}")
        if "printed" in claim:
            blocks.append(f"Printed: {claim['printed']}.")
        if "measured" in claim:
            blocks.append(f"Measured here: {claim['measured']} ({claim['source']}).")
        evidence = claim.get("evidence", ())
        if any(entry["verdicts"] for entry in evidence):
            blocks.append(comparison_table(claim["claim"], evidence, reports, folder))
        blocks.append(f"Verdict: **{claim['verdict']}**.")
    return page("What the reports claimed", "claims", notes, *blocks)


# ---- runs and sweeps ----------------------------------------------------------------

def index_page(reports, sweeps, notes):
    """Return README.md: every recipe in short, and where the rest stands."""
    links, shortcuts = [], []
    for name in sweeps:
        shortcuts.append(f"[{name}](sweeps.md#{name})")
    for name, text in PAGES.items():
        links.append(f"- [{text}]({name})")
    blocks = ["## Pages", "\n".join(links), f"Sweeps: {', '.join(shortcuts)}."]
    places = [list(report.COLUMNS).index(name) for name in SHOWN]
    for recipe, found in reports.items():
        lines = []
        for cells in map(report.row_cells, found["rows"]):
            lines.append([cells[place] for place in places])
        verdicts = []
        for entry in found["comparisons"]:
            best = entry["best"]
            text = f"{points(best)}, n {best['n']}: **{best['verdict']}**"
            verdicts.append(f"- {entry['title']}: {text}")
        blocks.append(f"## {recipe}")
        blocks += notes.get(recipe, [])
        blocks.append(pipes(SHOWN, lines))
        blocks.append("\n".join(verdicts))
        blocks.append(f"[All figures, settings, commits and pictures]({recipe}/report.md)")
    return page("What the published runs say", "README", notes, *filter(None, blocks))


def sweeps_page(sweeps, notes, folder):
    blocks = []
    for name in sweeps:
        text = (folder / "sweeps" / name / "sweep.md").read_text(encoding="utf-8").strip()
        blocks.append(f"## {name}")
        blocks += notes.get(f"sweeps/{name}", [])
        blocks.append(text)
        blocks.append(f"![sweep {name}](sweeps/{name}/sweep.png)")
    return page("Sweeps", "sweeps", notes, *blocks)


def shapes_page(notes):
    """Return every question of the reports with what was printed and what is right."""
    blocks = []
    with contextlib.redirect_stdout(io.StringIO()):
        questions = calc.main(["reports"])["questions"]
    for question in questions:
        point, lines, commands = question["point"], [], []
        for check in question["checks"]:
            lines.append([
                check["what"],
                str(check["printed"]),
                str(check["true"]),
                check["verdict"],
            ])
        for command in question["commands"]:
            commands.append(f"python calc.py {command}")
        blocks.append(f"## {point}. Report {question['report']}")
        blocks.append(" ".join(question["question"]))
        if commands:
            blocks.append("\n".join(["```", *commands, "```"]))
        if lines:
            blocks.append(pipes(("what", "printed", "right", "verdict"), lines))
        blocks.append(" ".join(question["remark"]))
        blocks += notes.get(f"shapes/{point}", [])
    return page("Shapes and parameters", "shapes", notes, *blocks)


# ---- measurements -------------------------------------------------------------------

def measured_by(machine):
    """Return in words what measured something: machine, threads, torch, commit, date."""
    words = [machine.get("machine", machine["device"])]
    if "precision" in machine:
        words.append(machine["precision"])
    words.append(f"threads: {machine['threads']}")
    words.append(f"torch {machine['torch']}")
    words.append(f"commit {machine['commit'][:12]}")
    words.append(machine["date"])
    return ", ".join(words)


def list_makers(makers):
    """Return what each machine measured, {machine in words: names}, as a list."""
    lines = []
    for maker, names in makers.items():
        lines.append(f"- {maker}: {'; '.join(names)}")
    return "\n".join(lines)


def benchmark_page(notes, folder):
    ratios, growth, makers = {}, [], {}
    for kind, parts in read_json(folder / "bench.json").items():
        for name, part in parts.items():
            makers.setdefault(measured_by(part["machine"]), []).append(name)
            for row in part["rows"]:
                value = f"{row['ratio']:.3g}"
                if name == "scale":
                    growth.append([row["title"], value])
                    continue
                if not row["met"]:
                    value += " (missed)"
                measured = ratios.setdefault((row["title"], row["goal"]), {})
                measured[kind] = value
    lines = []
    for (title, goal), measured in ratios.items():
        values = [measured.get(kind, "not measured") for kind in KINDS]
        lines.append([title, goal or "-", *values])
    return page("Speed and memory", "benchmark", notes,
                pipes(("what", "goal", *KINDS.values()), lines),
                pipes(("how cost grows", "measured"), growth),
                list_makers(makers))


def kills_page(notes, folder):
    found = read_json(folder / "soak.json")
    killed, held, makers = [], [], {}
    for row in found["variants"].values():
        makers.setdefault(measured_by(row["machine"]), []).append(row["variant"])
        cells = [row["variant"], str(row["kills"])]
        for phase in PHASES:
            cells.append(str(row.get(phase, "-")))
        cells.append("yes" if row["identical"] else "NO")
        killed.append(cells)
    for row in found["memory"].values():
        name = f"memory of {row['variant']}"
        makers.setdefault(measured_by(row["machine"]), []).append(name)
        held.append([
            row["variant"],
            f"{row['early_bytes'] / 1e6:.1f}",
            f"{row['late_bytes'] / 1e6:.1f}",
            f"{row['early_files']}, {row['late_files']}",
            f"{row['early_threads']}, {row['late_threads']}",
        ])
    return page("Runs that were killed", "kills", notes,
                pipes(KILLED, killed), pipes(HELD, held), list_makers(makers))


# ---- the script ---------------------------------------------------------------------

def make_pages(folder):
    """Return {path in the folder: text} of all pages and reports; exit code 1 where a verdict
    is another than the one that words were written for."""
    recipes = sorted(file.parent.name for file in folder.glob("*/report.json"))
    sweeps = sorted(file.parent.name for file in folder.glob("sweeps/*/sweep.md"))
    notes, reports, pages = read_json(folder / "notes.json"), {}, {}
    for recipe in recipes:
        found, _, _ = report.build(recipe, folder)
        reports[recipe] = found
        pages[f"{recipe}/report.md"] = report.markdown(found)
        pages[f"{recipe}/report.json"] = json.dumps(found, indent=1) + "\n"
    pages |= {
        "README.md": index_page(reports, sweeps, notes),
        "sweeps.md": sweeps_page(sweeps, notes, folder),
        "advice.md": advice_page(reports, notes, folder),
        "claims.md": claims_page(reports, notes, folder),
        "benchmark.md": benchmark_page(notes, folder),
        "kills.md": kills_page(notes, folder),
        "shapes.md": shapes_page(notes),
    }
    return pages


def is_stale(file, text):
    """Return whether a file is not this text; last digits of a JSON's numbers may differ."""
    if not file.exists():
        return True
    old = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        old, text = map(rounded, (old, text))
    return old != text


def rounded(text):
    return json.loads(text, parse_float=lambda number: f"{float(number):.9g}")


def main(argv=None):
    """Write or check the pages; return the names of those that were stale."""
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--published", type=path, default=PUBLISHED, metavar="DIR",
                        help="where the results are (results/published)")
    args = parser.parse_args(argv)
    folder = Path(args.published)
    pages = make_pages(folder)
    stale = [name for name, text in pages.items() if is_stale(folder / name, text)]
    if args.check and stale:
        fail(f"stale: {', '.join(stale)}; make evidence writes them", code=1)
    for name in stale:
        write_whole(folder / name, pages[name].encode())
        print(f"written: {name}")
    print(f"{len(pages)} pages are as the results have it")
    return stale


if __name__ == "__main__":
    main()
