"""A grid of settings and seeds: every run made once, summed up right."""
import csv
from pathlib import Path
from unittest import mock

import pytest
import tiny

import compare
import files
import plots
import report
import train_teacher
from sweep import mark, terminal


def sweep(easy, results, *own, script="distill.py", flags=(), epochs=2):
    swept = (flag for word in own for flag in word.partition("=")[0].split("+"))
    words = tiny.without(tiny.words(easy, results, *flags, epochs=epochs), *swept)
    with mock.patch.object(plots, "draw_curves", None):
        return report.main(["sweep", *own, "--", script, *words])


def test_a_grid_of_two_settings_and_two_seeds(easy, tmp_path, capsys):
    results = tmp_path
    for seed in (0, 1):
        tiny.run(train_teacher, easy, results, "--seed", seed)
    capsys.readouterr()
    grid = ("--over", "alpha=0,0.9", "--over", "temperature=1,4", "--seeds", "0,1")
    found = sweep(easy, results, *grid)
    first, *others = found["rows"]
    folder = results / "sweeps" / "distill-alpha-temperature"
    with open(folder / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["alpha"], line["temperature"], line["seed"]) for line in lines] == [
        (a, t, s) for a in ("0", "0.9") for t in ("1", "4") for s in ("0", "1")]
    for row in found["rows"]:
        mine = [float(line["test_accuracy"]) for line in lines
                if (line["alpha"], line["temperature"]) == (row["alpha"], row["temperature"])]
        assert row["test_accuracy"] == compare.interval(mine) and row["seeds"] == [0, 1]
        config = folder / "digits" / f"alpha={row['alpha']},temperature={row['temperature']}-s1"
        with open(config / "metrics.csv", newline="") as file:
            best = files.read_json(config / "final.json")["best_epoch"]
            train = list(csv.DictReader(file))[best - 1]["train_accuracy"]
        assert [line["train_accuracy"] for line in lines if line["seed"] == "1" and (
            line["alpha"], line["temperature"]) == (row["alpha"], row["temperature"])] == [train]
        config = files.read_json(config / "config.json")
        assert (config["alpha"], config["temperature"], config["seed"]) == (
            float(row["alpha"]), float(row["temperature"]), 1)
    tests = {(line["alpha"], line["temperature"], line["seed"]): float(line["test_accuracy"])
             for line in lines}
    assert first["above_first"] is None
    for row in others:
        above = [tests[row["alpha"], row["temperature"], seed] - tests["0", "1", seed]
                 for seed in "01"]
        assert row["above_first"] == compare.interval(above)
    assert found["best"]["val_accuracy"][0] == max(r["val_accuracy"][0] for r in found["rows"])
    text = (folder / "sweep.md").read_text()
    assert text.count("best by validation") == 1 and (folder / "sweep.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert said.count("epoch 1/2") == 8
    sweep(easy, results, *grid[:-1], "0,1,2"[:3])
    assert capsys.readouterr().out.count("finished already, kept") == 8
    assert "; seeds 0, 1; " in text
    sweep(easy, results, "--over", "alpha=0", "--over", "temperature=1")
    assert "; seeds 0; " in (folder / "sweep.md").read_text()       # of its own runs alone


def test_flags_that_go_together(easy, tmp_path):
    found = sweep(easy, tmp_path, "--over", "labels+batch-size=20+4,all+8",
                  "--over", "lr=1e-3,1e-2", script="train_student.py")
    runs_made = sorted((tmp_path / "sweeps/train_student-labels+batch-size-lr/digits").iterdir())
    configs = [files.read_json(run / "config.json") for run in runs_made]
    assert [run.name for run in runs_made] == [
        f"labels={n},batch-size={b},lr={lr}-s0" for n, b in (("20", 4), ("all", 8))
        for lr in ("1e-2", "1e-3")]
    assert [(c["labels"], c["batch_size"]) for c in configs] == [(20, 4)] * 2 + [(None, 8)] * 2
    assert [row["labels+batch-size"] for row in found["rows"]] == ["20+4"] * 2 + ["all+8"] * 2


def test_a_teacher_for_each_seed(easy, tmp_path):
    sweep(easy, tmp_path, "--over", "epochs=1,2", "--name", "T", script="train_teacher.py")
    teachers = ",".join(f"{tmp_path}/sweeps/T/digits/epochs={n}-s{{seed}}/best.pt" for n in (1, 2))
    found = sweep(easy, tmp_path, "--over", f"teacher={teachers}", "--name", "S")
    configs = sorted((tmp_path / "sweeps/S/digits").glob("*/config.json"))
    assert [path.parent.name for path in configs] == [
        f"teacher=epochs={n}-s0-s0" for n in (1, 2)]
    assert len({files.read_json(path)["teacher_sha256"] for path in configs}) == 2
    assert len(found["rows"]) == 2


@pytest.mark.parametrize("own, parts", [
    (["--over", "alpha"], ["'alpha'", "alpha=0.1,0.5"]),
    (["--over", "alpha=1,1"], ["twice"]), (["--over", "alpha+lr=1+1,1"], ["'1'", "alpha+lr"]),
    (["--over", "alpha+=1+1"], ["'alpha+=1+1'"]), (["--over", "seed=0,1"], ["--seeds"]),
    (["--over", "lr+run=0.1+a"], ["--name"]),
    (["--over", "alpha=0.1,0.9", "--over", "alpha=0.5"], ["alpha more than once"]),
    (["--over", "lr+epochs=0.1+2", "--over", "epochs=3"], ["epochs more than once"]),
    (["--over", "alpha=1", "--seeds", "0,0"], ["'0,0'", "0,1,2"]),
    (["--over", "alpha=1", "--seeds", "x"], ["'x'"]), ([], ["--over"])])
def test_wrong_input(easy, tmp_path, capsys, own, parts):
    tiny.refused(capsys, report, ["sweep", *own, "--", "distill.py"], *parts)
    assert not list(tmp_path.iterdir())


def test_two_settings_are_two_runs(easy, tmp_path, capsys):
    """A value after the -- would be told, and not be used; two folders of one name be one run."""
    for own, words, parts in (
            ("lr=0.1", ["--lr=0.5"], ["--lr after the --, too"]),
            ("batch-size=8,9", ["--batch-size", "8"], ["of make: BATCH_SIZE="]),
            ("compile=1", ["--no-compile"], ["--compile after the --"]),
            ("data-dir=a/x,b/x", [], ["data-dir=x-s0", "differ"]),
            (f"data-dir=./,{Path.cwd()}", [], [f"data-dir={Path.cwd().name}-s0", "differ"]),
            ("teacher=a/t-s0/best.pt,b/t-s0/best.pt", [], ["teacher=t-s0-s0", "differ"])):
        tiny.refused(capsys, report, ["sweep", "--over", own, "--", "distill.py",
                                      "--results-dir", tmp_path, "--teacher", "none.pt", *words]
                     if "teacher" not in own else ["sweep", "--over", own, "--", "distill.py"],
                     *parts)
    other = tiny.make_folder(tmp_path / "other", 4, 4)
    found = sweep(easy, tmp_path, "--over", f"data-dir={easy},{other}", script="train_student.py")
    assert [row["data-dir"] for row in found["rows"]] == [str(easy), str(other)]
    assert found["best"] is None and found["rows"][1]["above_first"] is None    # other images
    folder = tmp_path / "sweeps/train_student-data-dir/digits"
    assert {path.name for path in folder.iterdir()} == {
        f"data-dir={path.name}-s0" for path in (easy, other)}


@pytest.mark.parametrize("text", [None, "epoch,x\n", "changed"])
def test_a_sweep_takes_no_figure_that_was_changed(easy, tmp_path, capsys, text):
    own = "--over", "lr=0.1"
    sweep(easy, tmp_path, *own, script="train_student.py")
    path = tmp_path / "sweeps/train_student-lr/digits/lr=0.1-s0/metrics.csv"
    whole = path.read_text()
    path.unlink()
    if text:
        path.write_text(whole.replace("0.", "0.9", 3) if text == "changed" else text)
    words = tiny.without(tiny.words(easy, tmp_path), "lr")
    tiny.refused(capsys, report, ["sweep", *own, "--", "train_student.py", *words], path,
                 "--overwrite")


def test_a_script_is_needed(capsys):
    tiny.refused(capsys, report, ["sweep", "--over", "alpha=1"], "--", "distill.py")
    tiny.refused(capsys, report, ["sweep", "--over", "alpha=1", "--", "calc.py"], "'calc.py'",
                 "train_student.py")
    tiny.refused(capsys, report, ["sweep", "--over", "alpha=2", "--", "distill.py", "--teacher",
                                  "ema", "--ema-decay", "0.9"], "'2'")
    tiny.refused(capsys, report, ["sweep", "--over", "alpha=1", "--", "distill.py", "--run", "a"],
                 "--run", "--name")


def test_a_wrong_value_is_told_before_anything_is_trained(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path)
    tiny.refused(capsys, report, ["sweep", "--over", "lr=0.1,-1", "--", "train_student.py",
                                  *tiny.without(words, "lr")], "--lr", "'-1'")
    assert not list(tmp_path.iterdir())
    tiny.refused(capsys, report, ["sweep", "--over", "alpha=0.1,0.2", "--seeds", "3", "--",
                                  "distill.py", *words], "teacher-s3/best.pt",
                 "train_teacher.py --recipe digits --seed 3")


def test_a_row_that_cannot_be_ranked(easy, tmp_path, capsys):
    """One setting diverges, one learns nothing: the third is the best, and all are told."""
    found = sweep(easy, tmp_path, "--over", "lr=1e-9,1e20,0.006", "--seeds", "0,1",
                  script="train_student.py", epochs=3)
    nothing, infinite, learned = found["rows"]
    assert found["best"] is learned and learned["learned"] and not nothing["learned"]
    assert (infinite["failed"], infinite["seeds"], infinite["test_accuracy"]) == ([0, 1], [], None)
    assert learned["above_first"] is None       # the first row learned nothing
    assert mark(dict(nothing, silent=[1]), None) == "learned nothing: seed 1"
    folder = tmp_path / "sweeps" / "train_student-lr"
    text = (folder / "sweep.md").read_text()
    for part in ("| learned nothing |", "| not finite: seed 0, 1 |", "| best by validation |"):
        assert text.count(part) == 1, part
    with open(folder / "sweep.csv", newline="") as file:
        assert [line["learned"] for line in csv.DictReader(file)] == [
            "False"] * 4 + ["True"] * 2
    said = capsys.readouterr()
    assert "not finite" in said.out and "error: " in said.err
    assert max(map(len, said.out[said.out.rindex("\nlr"):].splitlines()[:8])) <= 80


def test_many_settings_are_told_apart_in_80_columns(capsys):
    row = dict(val_accuracy=(0.5, 0.4, 0.6), test_accuracy=(0.5, 0.4, 0.6), failed=[], silent=[],
               ema_test_accuracy=(0.5, 0.4, 0.6), above_first=None, seeds=[0, 1])
    names = ("alpha", "temperature", "ema-decay", "batch-size")
    rows = [row | dict(zip(names, (alpha, "4", "0.97", "128"), strict=True)) for alpha in "01"]
    lines = terminal(names, rows, rows[1]).splitlines()
    assert max(map(len, lines)) <= 80
    for setting in (", ".join(names), "0, 4, 0.97, 128", "1, 4, 0.97, 128"):
        assert lines.count(setting) == 1
    assert sum("50.00 ± 10.00" in line for line in lines) == 2
    few = terminal(names[:1], rows, rows[1]).splitlines()
    assert few[0].split()[0] == "alpha" and few[1].split()[0] == "0"


def test_the_recipe_says_whether_a_teacher_is_needed(easy, tmp_path):
    """Of a recipe whose objective is consistency none is; the last of two flags counts."""
    found = sweep(easy, tmp_path / "first", "--over", "class-weight=0.1,0.5", flags=(
        "--recipe", "digits-500-labels", "--labels", 40, "--arch", "digits-student",
        "--results-dir", tmp_path / "last"))
    assert len(found["rows"]) == 2 and (tmp_path / "last/sweeps").is_dir()
    assert not (tmp_path / "first").exists()


def test_a_sweep_is_published_and_shown_in_a_readme(easy, tmp_path, capsys):
    sweep(easy, tmp_path, "--over", "alpha=0,1", "--name", "mine", flags=("--teacher", "ema",
                                                                        "--ema-decay", 0.9))
    results = ["--results-dir", str(tmp_path)]
    report.main(["publish", *results, "--sweep", "mine"])
    kept = tmp_path / "published" / "sweeps" / "mine"
    assert sorted(path.name for path in kept.iterdir()) == [
        "SHA256SUMS", "sweep.csv", "sweep.md", "sweep.png"]
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- sweep:mine -->\n<!-- /sweep -->\nb\n")
    report.main(["readme", *results, "--readme", str(readme)])
    text = readme.read_text()
    assert (kept / "sweep.md").read_text().strip() in text
    for part in ("| alpha |", "data set folder", "precision fp32", "epochs 2", "seeds 0",
                 "date 20"):
        assert part in text, part
    for name in ("sweep.md", "sweep.csv", "sweep.png", "SHA256SUMS"):      # a bit turned
        for place in (kept, tmp_path / "sweeps" / "mine"):
            whole = (place / name).read_bytes()
            (place / name).write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
            command = ["readme", "--readme", readme] if place == kept else ["html"]
            tiny.refused(capsys, report, [*command, *results], place, "SHA256SUMS", "sweep")
            (place / name).write_bytes(whole)
    report.main(["html", *results])
    tiny.refused(capsys, report, ["publish", *results, "--sweep", "other"], "other")
    tiny.refused(capsys, report, ["publish", *results, "--sweep", "../x"], "--sweep")
