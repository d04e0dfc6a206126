"""The recipes at full depth, as `make` runs them, on a few dozen images each; and their table."""
import importlib
import json
import math
import re
import shlex

import pytest
import tiny
import torch
from tiny import RECIPES, settings

import common
import distill
import flags
import plots
import readers
import report
import train_teacher

FIVE = ("tinyimagenet-meanteacher", "tinyimagenet-kd", "cifar10-he-max", "cifar10-xavier-avg",
        "svhn-xavier-avg")


def kd(temperature, alpha, ema_decay=0, **more):
    return dict(objective="kd", temperature=temperature, alpha=alpha, ema_decay=ema_decay, **more)


def mean_teacher(class_weight, class_cost, ema_decay, warm_start=0, noise=None, **more):
    return dict(objective="consistency", class_weight=class_weight, class_cost=class_cost,
                ema_decay=ema_decay, warm_start=warm_start, noise=noise, **more)


NOISE, FIVE_CONVS = [0.5, 0.5, 0.3, 0.1], dict(arch="digits-teacher")
# Recipe -> its networks, init, pool, normalisation; run -> what else config.json must hold. The
# five reports' own, where they say it.
CHAINS = {
    "digits": ("digits", "he", "max", "train", {
        "teacher": {}, "student": {}, "kd": kd(4, 0.9),
        "kd-only": kd(4, 1) | dict(objective="kd-only"),
        "mean-teacher": mean_teacher(0.5, "ce", 0.97),
        "mean-teacher-no-ema": mean_teacher(0.5, "ce", 0)}),
    "tinyimagenet-meanteacher": ("tinyimagenet", "xavier", "avg", "train", {
        "teacher": {}, "student": {}, "kd-only": kd(4, 1) | dict(objective="kd-only"),
        "mean-teacher": mean_teacher(0.5, "bce", 0.99, 1, NOISE),
        "mean-teacher-no-ema": mean_teacher(0.5, "bce", 0, 1, NOISE)}),
    "tinyimagenet-kd": ("tinyimagenet", "xavier", "avg", "train", {
        "teacher": {}, "student": {}, "kd": kd(3, 0.3, 0.99)}),
    "cifar10-he-max": ("cifar10-he-max", "he", "max", "train", {
        "teacher": {}, "student": {}, "kd": kd(4, 0.9),
        "kd-only": kd(4, 1) | dict(objective="kd-only"),
        "kd-ema": kd(4, 0.9, 0.99, teacher="ema")}),
    "cifar10-xavier-avg": ("cifar10-xavier-avg", "xavier", "avg", "train", {
        "teacher": {}, "student": {}, "kd": kd(4, 0.8),
        "mean-teacher": mean_teacher(0.5, "ce", 0.99, arch="cifar10-xavier-avg-teacher")}),
    "svhn-xavier-avg": ("svhn-xavier-avg", "xavier", "avg", "half", {
        "teacher": {}, "student": {}, "kd": kd(4, 0.9)}),
    "digits-500-labels": ("digits", "he", "max", "train", {
        "student": FIVE_CONVS, "mean-teacher": mean_teacher(0.1, "ce", 0.97, **FIVE_CONVS),
        "mean-teacher-no-ema": mean_teacher(0.1, "ce", 0, **FIVE_CONVS)}),
    "cifar10-1000-labels": ("digits", "he", "max", "train", {
        "student": FIVE_CONVS,
        "mean-teacher": mean_teacher(0.05, "ce", 0.99, ramp_up=3, **FIVE_CONVS)}),
}


# ---- make -------------------------------------------------------------------------------------

def commands(*words):
    """The scripts and flags that make would run, line by line."""
    shown = tiny.make("-n", *words, "PYTHON=python", "VENV=")
    assert shown.returncode == 0, shown.stderr
    return [shlex.split(line)[1:] for line in shown.stdout.splitlines()
            if line.startswith("python ")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_target_of_make(recipe):
    assert commands(recipe) == commands("all", f"RECIPE={recipe}")


@pytest.mark.parametrize("target", ["kd", "digits", "report", "sweep-alpha"])
def test_a_folder_of_any_name_reaches_the_scripts(target):
    """Quotes and dollars are neither the shell's nor make's; two spaces stay two."""
    name = """-it's "a  b" $HOME $(RECIPE) `x`"""
    found = commands(target, f"RESULTS={name}", f"DATA_DIR={name}")
    assert found and all(f"--results-dir={name}" in words for words in found)
    assert target == "report" or f"--data-dir={name}" in found[0]


def test_what_make_publishes():
    assert commands("publish", "RECIPE=digits")[0] == [
        "report.py", "publish", "--recipe", "digits", "--results-dir=results"]
    assert commands("publish", "SWEEP=alpha")[0][-1] == "--sweep=alpha"


@pytest.mark.parametrize("target", ["stats", "teachers"])
def test_no_seeds_are_not_all_that_was_asked_for(target):
    done = tiny.make(target, "SEEDS=", "PYTHON=python", "VENV=")
    assert done.returncode == 2 and f'make {target} SEEDS="0 1 2"' in done.stderr


def test_make_knows_the_recipes_and_no_other():
    makefile = (tiny.ROOT / "Makefile").read_text()
    names = dict(re.findall(r"^(\w+) += (.*)$", makefile, re.M))
    assert names["REPORTS"].split() == list(FIVE)
    assert names["RECIPES"].replace("$(REPORTS)", names["REPORTS"]).split() == list(RECIPES)
    assert re.findall(r"^CHAIN_(\S+)", makefile, re.M) == list(RECIPES) == list(CHAINS)


def test_make_reports_runs_the_five_in_order():
    assert commands("reports") == sum((commands("all", f"RECIPE={name}") for name in FIVE), [])


# ---- each chain -------------------------------------------------------------------------------

@pytest.fixture
def few(monkeypatch):
    """Whatever the data set, 24 of its train images, which are shuffled, and a fifth of test."""
    def cut(folder, read, whole=readers.cached_arrays):
        arrays, facts = whole(folder, read)
        return {name: array[:24] if name.startswith("train") else array[::5]
                for name, array in arrays.items()}, facts

    monkeypatch.setattr(readers, "cached_arrays", cut)


def place_images(recipe, request):
    """Make or unpack a recipe's images; return the flags that find them."""
    ask, name = request.getfixturevalue, settings(recipe, "student")["dataset"]
    if name == "tinyimagenet":
        return ["--data-dir", ask("real")[0].parent]
    if name == "cifar10":
        return ["--dataset", "folder", "--data-dir", ask("photographs")]
    ask("svhn" if name == "svhn" else "few_digits")
    return ["--data-dir", ask("root")]


@pytest.fixture
def room(tmp_path):
    """A results folder; its weights go at the end: Tiny ImageNet's teacher leaves 800 MB."""
    yield tmp_path / "results"
    for path in tmp_path.rglob("*.pt"):
        path.unlink()


@pytest.mark.parametrize("recipe", CHAINS)
def test_the_chain_of_a_recipe(recipe, room, few, request, monkeypatch):
    networks, init, pool, normalise, runs = CHAINS[recipe]
    monkeypatch.setattr(plots, "draw_curves", None)      # would take longer than the rest
    *lines, last = commands("all", f"RECIPE={recipe}", f"RESULTS={room}")
    more = ["--batch-size", 8, "--device", "cpu", "--precision", "fp32",
            *place_images(recipe, request)]
    more += ["--labels", 10] if recipe.endswith("labels") else []
    for (name, own), (script, *words) in zip(runs.items(), lines, strict=True):
        expected = dict(arch=f"{networks}-{'teacher' if name == 'teacher' else 'student'}",
                        init=init, pool=pool, normalise=normalise, recipe=recipe) | own
        epochs = 1 + own.get("warm_start", 0)
        final = importlib.import_module(script.removesuffix(".py")).main(
            [*words, *more, "--epochs", epochs])
        folder = room / recipe / f"{name}-s0"
        assert json.loads((folder / "final.json").read_text()) == final
        config, card = json.loads((folder / "config.json").read_text()), tiny.load(
            folder / "best.pt")
        assert {key: config[key] for key in expected} == expected
        assert card["build"].items() >= dict(arch=final["arch"], init=init, pool=pool).items()
        assert sum(v.numel() for v in card["model"].values()) == final["parameters"] > 0
        rows = tiny.metrics(folder)
        assert len(rows) == epochs and all(math.isfinite(float(row["train_loss"])) for row in rows)
        assert math.isfinite(final["test_loss"])
    assert last[0] == "report.py"
    made = report.main(last[1:])
    assert {run for row in made["rows"] for run in row["runs"]} == {f"{name}-s0" for name in runs}
    assert (room / recipe / "report.md").read_text().startswith(f"# {recipe}\n")


def test_the_init_that_report_001_prints_leaves_its_teacher_without_a_signal(real, few, tmp_path,
                                                                            monkeypatch):
    deviation = {}

    def spy(args, folder, model, loss_fn, splits, *more, **options):
        batch = next(iter(splits[2]))
        with torch.no_grad():
            deviation[args.init] = model(batch.x).std(0).mean().item()      # over the images
        return {}

    monkeypatch.setattr(common, "fit", spy)
    words = ["--recipe", "tinyimagenet-kd", "--data-dir", real[0].parent, "--results-dir", tmp_path,
             "--device", "cpu", "--precision", "fp32"]
    train_teacher.main(words)
    train_teacher.main([*words, "--init", "xavier-gain1", "--run", "as-printed"])
    assert deviation["xavier"] > 0.1 and deviation["xavier-gain1"] < 0.01
    # 12 convs and 2 FC, the same random numbers, each layer smaller by √2: the network by 2⁷
    assert deviation["xavier"] == pytest.approx(128 * deviation["xavier-gain1"], rel=1e-4)


# ---- the table, the defaults ------------------------------------------------------------------

def read_table():
    """Recipe -> row -> cell of the printed table, folded cells made whole again."""
    found = {}
    for block in flags.recipes_table().split("\n\n"):
        lines, title = block.splitlines(), ""
        starts = [name.start() for name in re.finditer(r"\S+", lines[0])]
        columns = [{} for _ in starts]
        for line in lines:
            title = line[:starts[0]].strip() or title
            for column, start, end in zip(columns, starts, [*starts[1:], None], strict=True):
                cell, more = column.get(title, ""), line[start:end].strip()
                gap = " " if cell and more and not cell.endswith("-") else ""
                column[title] = cell + gap + more
        found |= {column.pop(""): column for column in columns}
    return found


def test_the_table_of_recipes_holds_what_the_recipes_hold():
    assert all(len(line) <= 80 for line in flags.recipes_table().splitlines())
    table = read_table()
    assert list(table) == list(RECIPES)
    for recipe, row in table.items():
        s, t, k, m = (settings(recipe, role) for role in ("student", "teacher", "kd",
                                                          "consistency"))
        for title, value in {
                "data": s["dataset"], "labels": s["labels"], "normalise": s["normalise"],
                "augment": s["augment"], "teacher": t["arch"], "student": s["arch"],
                "init, pool": f"{s['init']}, {s['pool']}", "objective": s["objective"],
                "epochs: T, S": f"{t['epochs']}, {s['epochs']}", "lr: T, S":
                f"{t['lr']}, {s['lr']}", "kd: T, α": f"{k['temperature']:g}, {k['alpha']}",
                "kd: EMA": k["ema_decay"] or None, "mean teacher": m["arch"],
                "epochs": m["epochs"], "EMA": m["ema_decay"],
                "λ, cost": f"{m['class_weight']}, {m['class_cost']}",
                "warm start": m["warm_start"] or None,
                "noise": m["noise"] and ", ".join(map(str, m["noise"]))}.items():
            assert row[title] == ("-" if value is None else str(value)), (recipe, title)


def test_the_objective_of_a_recipe_is_the_default_and_a_typed_one_wins(easy, results):
    def config(*words):
        return distill.main(tiny.words(easy, results, "--dry-run", *words))

    teacher = ("--teacher", results / "digits" / "teacher-s0" / "best.pt")
    recipe = ("--recipe", "tinyimagenet-meanteacher", "--dataset", "folder")
    assert config(*teacher)["objective"] == "kd"            # of digits
    own = config(*recipe)
    assert own["objective"] == "consistency" and own["class_cost"] == "bce"
    assert own["warm_start"] == 1 and own["ema_decay"] == 0.99
    for objective, alpha in (("kd", 0.9), ("kd-only", 1.0)):
        typed = config(*recipe, *teacher, "--objective", objective)
        assert (typed["objective"], typed["alpha"], typed["warm_start"]) == (objective, alpha, 0)
    assert config(*recipe, "--objective", "consistency") == own
