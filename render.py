"""A report in words: Markdown, the terminal, one HTML file; the frame and the tiles of look.py's
page. Reports come from report.build."""
import base64
import html
import io
import textwrap

from PIL import Image

from compare import ROWS, label
from decode import decoding
from files import read_text
from flags import fail
from runs import refuse_altered_sweep, short

COLUMNS = {  # column of a table -> its short form on the terminal (None: left out there)
    "run": "run", "n": "n", "parameters": "params", "multiply-adds": "MACs", "epochs": "epochs",
    "validation %": "val %", "test %": "test %", "test %, last epoch": None, "gap": "gap",
    "seconds": "sec",
}
COMPARED = ("comparison", "question", "n", "best epoch: points [95 %]", "verdict",
            "last epoch: points [95 %]", "verdict")
BESIDE = ("run", "calibration error %", "agreement with teacher %", "KL to teacher",
          "worst class %", "best class %")
MOST_CLASSES = 20       # of which each gets a column
COMPARED_NOTE = ("Points of test accuracy, paired by seed (of the same data, and of two that were "
                 "taught by the same teacher), with the 95 % interval of Student's t. Where it "
                 "holds 0 or has no width, and with one seed, the runs cannot tell.")
# Columns that a narrow screen leaves out.
LESSER = {"parameters", "multiply-adds", "epochs", "validation %", "test %, last epoch", "question",
          "last epoch: points [95 %]"}
# Columns of words; the others hold numbers, and stand to the right.
WORDS = {"question", "verdict", "claim", "printed", "measured here", "or", "advice",
         "points of test accuracy, measured here"}
BESIDE_NOTE = ("Calibration error: how far the confidence is from the share that is right, over 15 "
               "bins (Guo et al. 2017). Agreement: the share of test images where student and "
               "teacher say the same class; KL: from the teacher's softmax to the student's, mean "
               "over test.")
COMMAND_OF = {
    "teacher": "train_teacher.py", "student": "train_student.py",
    "kd": "distill.py --objective kd", "kd-only": "distill.py --objective kd-only",
    "kd-ema": "distill.py --objective kd --teacher ema",
    "mean-teacher": "distill.py --objective consistency",
    "mean-teacher-no-ema": "distill.py --objective consistency --ema-decay 0",
}
LARGEST = 160   # pixels a side of a picture in a tile
MARK = "(!)"  # before what did not learn; ASCII, for terminals of every kind


# ---- cells and tables -------------------------------------------------------------------------

def _percent(figure):
    if figure["mean"] is None:
        return "-"
    spread = "" if figure["sd"] is None else f" ±{100 * figure['sd']:.2f}"
    return f"{100 * figure['mean']:.2f}{spread}"


def _count(figure):
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if figure["mean"] >= size:
            return f"{figure['mean'] / size:.3g} {unit}"
    return f"{figure['mean']:.0f}"


def _points(entry):
    """A difference in words: "+1.20 [+0.31, +2.09]"; none that begs for a conclusion."""
    if entry["mean"] is None or entry["verdict"] == "no conclusion":
        return "-"
    bounds = "one seed: no interval" if entry["low"] is None else (
        f"{entry['low']:+.2f}, {entry['high']:+.2f}")
    return f"{entry['mean']:+.2f} [{bounds}]"


def _cells(row):
    """What a table shows of a row, in the order of COLUMNS."""
    sound = row["learned"] and not row.get("mixed")
    return [("" if sound else f"{MARK} ") + row["label"], str(len(row["seeds"])),
            _count(row["parameters"]), _count(row["macs"]), f"{row['epochs']['mean']:g}",
            _percent(row["val_accuracy"]), _percent(row["test_accuracy"]),
            _percent(row["last_test_accuracy"]),
            "-" if row["gap"] is None else f"{100 * row['gap']:.0f} %",
            f"{row['seconds']['mean']:.{0 if row['seconds']['mean'] >= 10 else 1}f}"]


def pipes(header, lines):
    """A Markdown table; numbers to the right, the first column and words to the left."""
    header = list(header)
    sides = ["---" if not i or name in WORDS else "---:" for i, name in enumerate(header)]
    lines = [header, sides, *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;")
                                       for cell in line) + " |" for line in lines)


def aligned(lines, width=80):
    """A table for the terminal: columns as narrow as they can be, names cut to fit the width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    space = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    widths[0] = min(widths[0], width - sum(widths[1:]) - space * (len(widths) - 1))
    return "\n".join((" " * space).join(
        [line[0][:widths[0]].ljust(widths[0])]
        + [cell.rjust(wide) for cell, wide in zip(line[1:], widths[1:], strict=True)])
        for line in lines)


def markdown_table(report):
    """The rows of a report as Markdown, with settings and notes; also what the README shows."""
    table = pipes(COLUMNS, map(_cells, report["rows"]))
    return table + "\n\n" + "<br>\n".join(report["notes"]).replace("<", "&lt;").replace(
        "&lt;br>\n", "<br>\n")


def _compared(report):
    """The lines of the table of comparisons, in the order of COMPARED."""
    return [[entry["title"], entry["question"], str(entry["best"]["n"]), _points(entry["best"]),
             entry["best"]["verdict"], _points(entry["last"]), entry["last"]["verdict"]]
            for entry in report["comparisons"]]


def markdown_comparisons(report):
    """The comparisons of a report as Markdown."""
    return pipes(COMPARED, _compared(report))


def beside(report):
    """The lines of what accuracy does not say, in the order of BESIDE; none where no outputs were
    kept."""
    rows = [row for row in report["rows"] if row.get("beside")]
    return [[_counted(row), _percent(row["beside"]["calibration"]),
             *((_percent(row["beside"]["agreement"]) + _pairs(row),
                _plain(row["beside"]["divergence"])) if "agreement" in row["beside"] else "--"),
             *(_class(report, row["beside"]["classes"], which) for which in (min, max))]
            for row in rows]


def _plain(figure):
    return f"{figure['mean']:.3f}" + ("" if figure["sd"] is None else f" ±{figure['sd']:.3f}")


def _pairs(row):
    """How many of a row's runs were set beside their teacher, where not all that could were."""
    n, there = len(row["beside"]["agreement"]["values"]), row["beside"].get("n", len(row["seeds"]))
    return f" ({n} of {there})" * (n < there)


def _counted(row):
    """A row's label, with how many of its runs kept their outputs where not all did."""
    n = row["beside"].get("n", len(row["seeds"]))
    return row["label"] + f" ({n} of {len(row['seeds'])})" * (n < len(row["seeds"]))


def _class(report, shares, which):
    """The accuracy of the worst or the best class, and its name."""
    names = report.get("classes") or ()
    names = names if len(names) == len(shares) else range(len(shares))
    place = shares.index(which(shares))
    return f"{100 * shares[place]:.2f} ({names[place]})"


def per_class(report):
    """Header and lines of each row's accuracy on every class; none where classes are many."""
    rows = [row for row in report["rows"] if row.get("beside")]
    count = max((len(row["beside"]["classes"]) for row in rows), default=0)
    if not 0 < count <= MOST_CLASSES:
        return None
    names = report.get("classes") or list(map(str, range(count)))
    return ["test % by class", *names], [
        [row["label"], *(f"{100 * share:.1f}" for share in row["beside"]["classes"])]
        for row in rows if len(row["beside"]["classes"]) == len(names)]


def markdown_commands(report):
    """The command of each run with the accuracy and the time to expect, as Markdown."""
    recipe = "" if report["recipe"] == "digits" else report["recipe"]
    lines = []
    for row in report["rows"]:
        if row["key"] in COMMAND_OF:
            words = COMMAND_OF[row["key"]] + (f" --recipe {recipe}" if recipe else "")
            target = f"make {row['key']}" + (f" RECIPE={recipe}" if recipe else "")
            lines.append([f"`python {words}`", f"`{target}`", _percent(row["test_accuracy"]),
                          f"{row['seconds']['mean']:.0f}"])
    return pipes(("command", "or", "test %", "seconds"), lines)


def markdown_bench(found):
    """published/bench.json as Markdown: what has a goal, what each part gains, how cost grows; a
    column for each kind of device."""
    kinds = {"cpu": "CPU", "cuda": "GPU"}
    goals, gains, machines = {}, {}, {}
    for kind in kinds:
        for name, part in found.get(kind, {}).items():
            made = part["machine"]
            who = (f"{made['device']}, {made['threads']} thread{'s' * (made['threads'] > 1)}, "
                   f"{made['precision']}, torch {made['torch']}"
                   + "".join(f", {title}{made[key]}" for title, key in (
                       ("commit ", "commit"), ("", "date")) if key in made))
            machines.setdefault(f"{kinds[kind]}: {who}", []).append(name)
            for row in part["rows"] if name != "scale" else ():
                value = f"{row['ratio']:.3g}" + ("" if row["met"] else " (missed)")
                place, key = (goals, (row["title"], row["goal"])) if row["goal"] else (
                    gains, (row["title"],))
                place.setdefault(key, {})[kind] = value
    tables = [pipes((*titles, *kinds.values()), [
        [*key, *(values.get(kind, "not measured") for kind in kinds)]
        for key, values in lines.items()])
        for titles, lines in ((("what", "goal"), goals), (("what a part gains",), gains)) if lines]
    for kind, title in kinds.items():
        if "scale" in found.get(kind, {}):
            rows = found[kind]["scale"]["rows"]
            sizes = [row["title"].split(":")[0] for row in rows if row["figures"]]
            values = [row["figures"] for row in rows if row["figures"]]
            tables.append(pipes((f"how cost grows, {title}", "seconds an epoch", "peak GB"), [
                [size, f"{value['seconds_an_epoch']:.1f}", f"{value['peak_gb']:.2f}"]
                for size, value in zip(sizes, values, strict=True)]))
            tables.append("; ".join(f"{row['title']} {row['ratio']:.2f}" for row in rows
                                    if "power" in row["title"]).capitalize() + ".")
    told = [f"{who}: {', '.join(names)}" for who, names in machines.items()]
    return "\n\n".join([*tables, "<br>\n".join(told)])


def markdown_soak(found):
    """published/soak.json as Markdown: what was killed when, and what is held after 50 epochs."""
    phases = ("start-up", "cache", "training", "end")
    rows, held = found["variants"].values(), found.get("memory", {}).values()
    killed = pipes(("run", "kills", "in start-up", "cache", "training", "at the end",
                    "of these while writing", "as if never killed"),
                   [[row["variant"], str(row["kills"]), *(str(row[phase]) for phase in phases),
                     str(row["between_writes"]),
                     "yes" if row["identical"] else "NO"] for row in rows])
    kept = pipes(("run", "MB after 5 epochs", "after 50", "open files", "threads"),
                 [[row["variant"], *(f"{row[f'{when}_bytes'] / 1e6:.1f}" for when in (
                     "early", "late")), *(f"{row[f'early_{what}']}, {row[f'late_{what}']}"
                                          for what in ("files", "threads"))] for row in held])
    made = sorted({f"{row['machine']['machine']}, {row['machine']['threads']} thread(s), torch "
                   f"{row['machine']['torch']}, {row['machine']['date']}, commit "
                   f"{short(row['machine']['commit'])}" for row in (*rows, *held)})
    return "\n\n".join([killed, *[kept] * bool(held), "<br>\n".join(made)])


def markdown(report):
    """report.md."""
    keys = [row["key"] for row in report["rows"] if row["key"] in ROWS]
    return "\n\n".join([
        f"# {report['recipe']}", markdown_table(report), "![all runs](comparison.png)",
        *(["## Comparisons", markdown_comparisons(report), COMPARED_NOTE]
          if report["comparisons"] else []),
        *(["## Beside accuracy", pipes(BESIDE, beside(report)),
           *([pipes(*per_class(report))] if per_class(report) else []),
           "![calibration and confusion](details.png)", BESIDE_NOTE] if beside(report) else []),
        "## Rows", "\n".join(f"- {label(key)}: {ROWS[key][1]}" for key in keys)]) + "\n"


def terminal(report):
    """What is printed: 80 columns, plain text."""
    shown = [place for place, short in enumerate(COLUMNS.values()) if short]
    lines = [list(COLUMNS.values()), *map(_cells, report["rows"])]
    notes = [textwrap.fill(note, 80, break_on_hyphens=False, break_long_words=False)
             for note in report["notes"]]
    compared = [[entry["title"], _points(entry["best"]), str(entry["best"]["n"]),
                 entry["best"]["verdict"]] for entry in report["comparisons"]]
    blocks = [aligned([[line[place] for place in shown] for line in lines]), "\n".join(notes)]
    if compared:
        blocks.append(aligned([["points of test accuracy", "[95 %]", "n", "verdict"], *compared]))
    return "\n\n".join(blocks)


# ---- one HTML file ----------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d5d5d5; --soft: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --line: #444; --soft: #212121; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
nav a { margin-right: 1rem; } a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: var(--soft); }
.words { white-space: normal; text-align: left; min-width: 6rem; } .long { min-width: 15rem; }
img { max-width: 100%; height: auto; background: #fff; padding: .3rem; border-radius: 4px; }
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
@media screen and (max-width: 42rem) { .lesser { display: none; } body { padding: .5rem; }
  th, td { padding: .3rem .35rem; } }
figure { margin: 0; } figcaption, .notes { font-size: .85rem; opacity: .85; }
.tiles { display: grid; gap: 1rem .75rem; margin-top: .75rem;
         grid-template-columns: repeat(auto-fill, minmax(var(--wide), 1fr)); }
.tiles figcaption { overflow-wrap: anywhere; line-height: 1.35; opacity: 1; padding-top: .25rem;
                    border-top: 3px solid transparent; }
.tiles .wrong figcaption { border-top: 3px dashed; }
.tiles img { flex: 1; width: 100%; min-width: 0; padding: 0; border-radius: 0; background: none;
             image-rendering: pixelated; }
.row { display: flex; gap: 3px; }
@media print { body { max-width: none; } figure, table, h2, h3, p { break-inside: avoid; }
               h2, h3, h2 + p { break-after: avoid; }
               details > * { display: block; } }
"""


def table(header, lines, lesser=()):
    """Return a table of text; columns of lesser are left out on a narrow screen."""
    lines = [list(line) for line in lines]
    long = {name for name, *cells in zip(header, *lines, strict=True)
            if max(map(len, cells), default=0) > 120}
    marks = [f" class='words{' long' * (name in long)}'" if name in WORDS else
             " class=lesser" if name in lesser else "" for name in header]

    def cells(kind, line):
        return "".join(f"<{kind}{mark}>{html.escape(cell)}</{kind}>"
                       for mark, cell in zip(marks, line, strict=True))

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f"<div class=wide><table><tr>{cells('th', header)}</tr>{body}</table></div>"


def picture(path, caption):
    """Return a picture with its bytes inside, or nothing where there is none."""
    if not path.is_file():
        return ""
    try:
        with decoding():        # a stranger's may be a bomb
            Image.open(path, formats=["PNG"]).load()
    except Exception as error:      # what flipped bits lead to is of many kinds
        fail(f"{path}: cut short or damaged ({error}); remove it, or make it anew")
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def recipe_section(folder, found):
    """Return the section of one recipe: table, notes, comparisons, pictures of all runs."""
    names = sorted(name for row in found["rows"] for name in row["runs"])
    curves = "".join(picture(folder / name / "curves.png", name) for name in dict.fromkeys(names))
    parts = [f'<h2 id="{html.escape(folder.name)}">{html.escape(folder.name)}</h2>',
             table(list(COLUMNS), map(_cells, found["rows"]), LESSER),
             '<p class=notes>' + "<br>".join(map(html.escape, found["notes"])) + "</p>"]
    if found["comparisons"]:
        parts += ["<h3>Comparisons</h3>", table(COMPARED, _compared(found)),
                  f"<p class=notes>{html.escape(COMPARED_NOTE)}</p>"]
    parts.append(picture(folder / "comparison.png", f"all runs of {folder.name}"))
    if beside(found):
        parts += ["<h3>Beside accuracy</h3>", table(BESIDE, beside(found)),
                  *([table(*per_class(found))] if per_class(found) else []),
                  f"<p class=notes>{html.escape(BESIDE_NOTE)}</p>",
                  picture(folder / "details.png", f"calibration and confusion of {folder.name}")]
    parts.append(f"<h3>Runs</h3><div class=runs>{curves}</div>" if curves else "")
    return "\n".join(parts)


def sweep_section(folder):
    """Return the section of one sweep: its table, notes and plot."""
    refuse_altered_sweep(folder)
    try:
        text = read_text(folder / "sweep.md").replace("&lt;", "<").splitlines()
        lines = [[cell.strip().replace("\\|", "|") for cell in line.strip().strip("|").split(" | ")]
                 for line in text if line.startswith("|")]
        shown = table(lines[0], lines[2:])
    except (OSError, ValueError, IndexError) as error:
        fail(f"{folder / 'sweep.md'}: cut short or damaged ({error}); the sweep's command makes it")
    notes = [line for line in text if line.strip() and not line.startswith("|")]
    return (f"<h3>{html.escape(folder.name)}</h3>" + shown
            + '<p class=notes>' + "<br>".join(map(html.escape, notes)) + "</p>"
            + picture(folder / "sweep.png", f"sweep {folder.name}"))


def tile(pictures, lines, wrong=False):
    """Return a figure: small pictures side by side, (uint8 array, what it shows) each, above lines
    of text. Pixels are kept as they are, but for pictures of more than LARGEST a side."""
    shown = []
    for array, alt in pictures:
        image, memory = Image.fromarray(array), io.BytesIO()
        image.thumbnail((LARGEST, LARGEST))
        image.save(memory, "PNG", optimize=True)
        code = base64.b64encode(memory.getvalue()).decode()
        shown.append(f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt)}">')
    caption = "<br>".join(html.escape(line) for line in lines)
    return (f"<figure{' class=wrong' if wrong else ''}><div class=row>{''.join(shown)}</div>"
            f"<figcaption>{caption}</figcaption></figure>")


def section(title, caption, tiles, wide="9.5rem"):
    """Return a section of tiles, each at least `wide`; title and caption are HTML."""
    return (f'<h2>{title}</h2><p>{caption}</p>'
            f'<div class=tiles style="--wide: {wide}">{"".join(tiles)}</div>')


def frame(title, body):
    """Return a whole page; title is text, body HTML."""
    title = html.escape(title)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head><body>"
            f"<h1>{title}</h1>{body}</body></html>\n")


def html_page(root, reports, sweeps, lists):
    """Return report.html of a results folder: the reports of its recipes, its sweeps, and lists,
    name -> (header, lines)."""
    names = [*(found["recipe"] for found in reports), *["sweeps"] * bool(sweeps), *lists]
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a> ' for name in names)
    body = [recipe_section(root / found["recipe"], found) for found in reports]
    if sweeps:
        body += ['<h2 id="sweeps">Sweeps</h2>', *map(sweep_section, sweeps)]
    body += [f'<h2 id="{name}">{name.capitalize()}</h2>{table(*lists[name])}' for name in lists]
    return frame("Tutor: results", f"<nav>{links}</nav>" + "\n".join(body))
