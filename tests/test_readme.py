"""What the README says: its table is what is published, its links and losses are there."""
import json
import re

import tiny

import data
import distill
import models
import recipes

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHED = tiny.ROOT / "results" / "published"


def published(recipe):
    return json.loads((PUBLISHED / recipe / "report.json").read_text(encoding="utf-8"))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_is_what_is_published():
    lines = README[README.index("| run | parameters | test % |"):].split("\n\n")[0].splitlines()
    rows = {row["label"]: row for row in published("digits")["rows"]}
    assert [cells(line)[0] for line in lines[2:]] == list(rows)
    for name, parameters, test, seconds in map(cells, lines[2:]):
        row = rows[name]
        assert parameters == f"{row['parameters']['mean'] / 1e3:.3g} k"
        accuracy = row["test_accuracy"]
        assert test == f"{100 * accuracy['mean']:.2f} ±{100 * accuracy['sd']:.2f}"
        assert seconds == f"{row['seconds']['mean']:.0f}"


def test_the_differences_are_what_is_published():
    said = re.findall(r"\+([\d.]+)\s(?:points\s)?\[([+−][\d.]+), \+([\d.]+)\]",
                      README.replace("\n", " "))
    known = set()
    for recipe in ("digits", "cifar10-he-max", "cifar10-xavier-avg", "digits-500-labels"):
        for entry in published(recipe)["comparisons"]:
            best = entry["best"]
            if best["mean"] is not None and best["low"] is not None:
                known.add((f"{best['mean']:.2f}", f"{best['low']:+.2f}".replace("-", "−"),
                           f"{best['high']:.2f}"))
    assert len(said) >= 3
    for mean, low, high in said:
        assert (mean, low, high) in known, (mean, low, high)


def test_links_lead_somewhere():
    for place in re.findall(r"\]\(([^)#]+)\)", README):
        assert (tiny.ROOT / place).exists(), place


def test_the_losses_are_those_of_the_code():
    for name, entry in distill.OBJECTIVES.items():
        assert f"| `{name}` | {entry['formula']} |" in README


def test_what_is_named_is_there():
    for script in re.findall(r"`(\w+\.py)`", README):
        assert (tiny.ROOT / script).exists(), script
    for registry in ("distill.OBJECTIVES", "models.ARCHITECTURES", "data.DATASETS",
                     "recipes.RECIPES"):
        module, name = registry.split(".")
        assert registry in README
        assert getattr({"distill": distill, "models": models, "data": data,
                        "recipes": recipes}[module], name)
    makefile = (tiny.ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z0-9-]+)", README)) - set(recipes.RECIPES):
        assert re.search(rf"^[a-z ]*\b{target}\b[a-z ]*:", makefile, re.M), target
