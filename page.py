"""One HTML file of all that a results folder holds: pictures inside, no script.

    python report.py html                       # results/report.html
"""
import base64
import html
from pathlib import Path

import report
from runs import write_whole

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
td.words { white-space: normal; text-align: left; min-width: 12rem; }
img { max-width: 100%; height: auto; background: #fff; padding: .3rem; border-radius: 4px; }
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
figure { margin: 0; } figcaption, .notes { font-size: .85rem; opacity: .85; }
@media print { body { max-width: none; } figure, table, h2, h3 { break-inside: avoid; }
               details > * { display: block; } }
"""


def table(header, lines, words=()):
    """Return a table; columns in `words` hold sentences."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(
        f"<td{' class=words' if header[place] in words else ''}>{html.escape(cell)}</td>"
        for place, cell in enumerate(line)) + "</tr>" for line in lines)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def picture(path, caption):
    """Return a picture with its bytes inside, or nothing where there is none."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def recipe_section(folder, results_dir):
    """Return the section of one recipe: table, notes, comparisons, pictures of all runs."""
    found, _ = report.build(folder.name, results_dir)
    compared = [[entry["title"], entry["question"], str(entry["best"]["n"]),
                 report._points(entry["best"]), entry["best"]["verdict"]]
                for entry in found["comparisons"]]
    names = sorted(name for row in found["rows"] for name in row["runs"])
    curves = "".join(picture(folder / name / "curves.png", name) for name in dict.fromkeys(names))
    parts = [f'<h2 id="{html.escape(folder.name)}">{html.escape(folder.name)}</h2>',
             table(list(report.COLUMNS), map(report._cells, found["rows"])),
             '<p class=notes>' + "<br>".join(map(html.escape, found["notes"])) + "</p>"]
    if compared:
        parts += ["<h3>Comparisons</h3>",
                  table(["comparison", "question", "n", "points [95 %]", "verdict"], compared,
                        words=("question",))]
    parts.append(picture(folder / "comparison.png", f"all runs of {folder.name}"))
    parts.append(f"<h3>Runs</h3><div class=runs>{curves}</div>" if curves else "")
    return "\n".join(parts)


def sweep_section(folder):
    """Return the section of one sweep: its table and plot."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split(" | ")]
             for line in (folder / "sweep.md").read_text(encoding="utf-8").splitlines()
             if line.startswith("|")]
    return (f"<h3>{html.escape(folder.name)}</h3>" + table(lines[0], lines[2:])
            + picture(folder / "sweep.png", f"sweep {folder.name}"))


def write(results_dir):
    """Write report.html into a results folder; return {"page", "recipes", "sweeps"}."""
    root = Path(results_dir)
    recipes = [path for path in sorted(root.glob("*"))
               if path.name in report.RECIPES and any(path.glob("*/final.json"))]
    sweeps = [path.parent for path in sorted(root.glob("sweeps/*/sweep.md"))]
    if not recipes and not sweeps:
        report.fail(f"no finished run below {root}: make all trains those of the digits")
    links = "".join(f'<a href="#{html.escape(path.name)}">{html.escape(path.name)}</a> '
                    for path in recipes) + ('<a href="#sweeps">sweeps</a>' if sweeps else "")
    body = [recipe_section(path, results_dir) for path in recipes]
    if sweeps:
        body += ['<h2 id="sweeps">Sweeps</h2>', *map(sweep_section, sweeps)]
    text = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Tutor: results</title><style>{STYLE}</style></head><body>"
            f"<h1>Tutor: results</h1><nav>{links}</nav>" + "\n".join(body) + "</body></html>\n")
    write_whole(root / "report.html", text.encode())
    print(f"page     {root / 'report.html'}, {len(text) / 1e6:.1f} MB")
    return {"page": str(root / "report.html"), "recipes": [path.name for path in recipes],
            "sweeps": [path.name for path in sweeps]}
