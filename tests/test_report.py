"""report.py on run folders made in fake_runs.py: its numbers against sums done by hand, its words,
its files.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_runs import SIX, make_run, make_six
from PIL import Image

import compare
import plots
import render
import report

HOUSE = Path(report.__file__).parent


def run(*words):
    return report.main([str(word) for word in words])


def numbers(results):
    """The report without its files: drawing takes most of a second."""
    return report.build("digits", results)[0]


def rows_of(result):
    return {row["key"]: row for row in result["rows"]}


def compared(result):
    return {entry["title"]: entry for entry in result["comparisons"]}


def refused(capsys, *words, code=2):
    """The one line that a refusal prints."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith("error: ") and line.count("\n") == 1, line
    return line


# ---- numbers ----------------------------------------------------------------------------------

def test_interval_against_the_printed_table_of_student():
    # t(0.975, 2) = 4.302653; differences 3, 4, 2: mean 3, deviation 1, half width t / sqrt(3).
    centre, low, high = compare.interval([3.0, 4.0, 2.0])
    assert centre == 3
    assert low == pytest.approx(3 - 4.302653 / 3**0.5, abs=1e-5)
    assert high == pytest.approx(3 + 4.302653 / 3**0.5, abs=1e-5)
    # t(0.975, 4) = 2.776445; deviation of 1..5 is sqrt(2.5)
    assert compare.interval([1, 2, 3, 4, 5])[1] == pytest.approx(3 - 2.776445 * 0.5**0.5, abs=1e-5)
    # t(0.975, 1) = 12.706205; differences 1, 3: deviation sqrt(2), half width t
    assert compare.interval([1.0, 3.0]) == pytest.approx((2, -10.706205, 14.706205), abs=1e-5)
    assert compare.interval([3.0]) == (3, None, None)


@pytest.mark.parametrize("low, high, learned, said", [
    (0.1, 2, True, "helps"), (-2, -0.1, True, "hurts"), (-1, 1, True, "cannot tell"),
    (0, 1, True, "cannot tell"), (-1, 0, True, "cannot tell"), (None, None, True, "cannot tell"),
    (2, 2, True, "cannot tell"), (0.1, 2, False, "no conclusion"),
    (None, None, False, "no conclusion")])
def test_verdict(low, high, learned, said):
    assert compare.verdict(low, high, learned) == said
    assert not learned or compare.verdict(low, high) == said


def test_three_seeds_by_hand(tmp_path):
    make_six(tmp_path, 3)
    result = numbers(tmp_path)
    rows = rows_of(result)
    assert list(rows) == ["teacher", "student", "kd", "kd-only", "mean-teacher",
                          "mean-teacher/average", "mean-teacher-no-ema"]
    assert rows["kd"]["test_accuracy"]["mean"] == pytest.approx(0.74)
    assert rows["kd"]["test_accuracy"]["sd"] == pytest.approx(0.01)  # sample: / (n - 1)
    assert rows["kd"]["val_accuracy"]["mean"] == pytest.approx(0.75)
    assert rows["kd"]["last_test_accuracy"]["mean"] == pytest.approx(0.735)
    assert rows["mean-teacher/average"]["test_accuracy"]["values"] == [0.73, 0.75, 0.77]
    assert rows["mean-teacher/average"]["val_accuracy"]["mean"] == pytest.approx(0.76)
    assert rows["mean-teacher"]["test_accuracy"]["mean"] == pytest.approx(0.73)
    # alone 71, teacher 81, so ten points to close
    assert {key: round(row["gap"], 6) for key, row in rows.items()} == {
        "teacher": 1, "student": 0, "kd": 0.3, "kd-only": 0.3, "mean-teacher": 0.2,
        "mean-teacher/average": 0.4, "mean-teacher-no-ema": 0}

    half = 4.302653 / 3**0.5  # of three differences whose deviation is 1
    expected = {  # differences by hand -> mean, half width, verdict
        "kd - student alone": (3, half, "helps"),                    # 3, 4, 2
        "kd-only - student alone": (3, half, "helps"),               # 4, 3, 2
        "kd-only - kd": (0, half, "cannot tell"),                    # 1, -1, 0
        "kd - teacher": (-7, 0, "cannot tell"),                    # -7, -7, -7
        "mean teacher, student - alone": (2, 0, "cannot tell"),    # 2, 2, 2
        "mean teacher, average - alone": (4, half, "helps"), # 3, 4, 5
        "mean teacher, no EMA - alone": (0, half, "cannot tell"),    # 1, 0, -1
        "mean teacher, student - no EMA": (2, half, "cannot tell"),  # 1, 2, 3
        "mean teacher, average - no EMA": (4, 2 * half, "cannot tell"),  # 2, 4, 6
        "average - its student": (2, half, "cannot tell"),           # 1, 2, 3
        "student alone - teacher": (-10, half, "hurts")}             # -10, -11, -9
    found = compared(result)
    assert list(found) == list(expected)
    for title, (centre, width, said) in expected.items():
        best, last = found[title]["best"], found[title]["last"]
        assert best["mean"] == pytest.approx(centre, abs=1e-6)
        assert best["low"] == pytest.approx(centre - width, abs=1e-5)
        assert best["high"] == pytest.approx(centre + width, abs=1e-5)
        assert (best["n"], best["verdict"]) == (3, said)
        # last epoch: all half a point lower; of the average it is not recorded
        assert last["verdict"] == ("not recorded" if "average" in title else said)


def test_pairs_share_their_teacher(tmp_path):
    """Seed 2 of kd-only was taught by another network than seed 2 of kd: between the two it is no
    pair; against the student alone, who had no teacher, each is."""
    make_six(tmp_path, 3, only=("teacher", "student"))
    for seed in range(3):
        make_run(tmp_path, f"kd-s{seed}", seed, SIX["kd"][seed], teacher_sha256=f"{seed}" * 64)
        other = dict(teacher="results/digits/teacher-s1/best.pt") if seed == 2 else {}
        make_run(tmp_path, f"kd-only-s{seed}", seed, SIX["kd-only"][seed],
                 teacher_sha256=f"{seed - bool(other)}" * 64, **other)
    result = numbers(tmp_path)
    found = {title: entry["best"] for title, entry in compared(result).items()}
    assert found["kd-only - kd"]["seeds"] == [0, 1]
    assert found["kd-only - kd"]["mean"] == pytest.approx(0)             # 1, -1
    assert found["kd - student alone"]["n"] == found["kd-only - student alone"]["n"] == 3
    for seed in range(3):
        config = tmp_path / "digits" / f"kd-s{seed}" / "config.json"
        config.write_text(config.read_text().replace(f"{seed}" * 64, "f" * 64))
    found = compared(numbers(tmp_path))["kd-only - kd"]["best"]
    assert (found["n"], found["verdict"]) == (0, "other teachers")
    told = "Taught by another than the teacher of their seed: kd-only-s2 (teacher-s1)."
    assert told in result["notes"]


def test_pairs_share_their_data(tmp_path):
    """Seed 0 of the student alone learned from other images: no pair; of both seeds: no verdict."""
    make_six(tmp_path, 2, only=("teacher", "student", "kd"))
    for seed, pairs in ((0, [1]), (1, [])):
        config = tmp_path / "digits" / f"student-s{seed}" / "config.json"
        config.write_text(config.read_text().replace("d" * 64, "e" * 64))
        result = numbers(tmp_path)
        found = compared(result)["kd - student alone"]["best"]
        assert found["seeds"] == pairs
        assert all(row["gap"] is None for row in result["rows"])
        assert "No gap is shown: the teacher and the student alone are of other data." in (
            result["notes"])
    assert found["verdict"] == "other data"
    for seed in range(2):
        config = tmp_path / "digits" / f"teacher-s{seed}" / "config.json"
        config.write_text(config.read_text().replace("d" * 64, "e" * 64))
    rows = rows_of(numbers(tmp_path))
    assert rows["student"]["gap"] == 0 and rows["kd"]["gap"] is None


def test_pairs_share_a_seed(tmp_path):
    """A seed that only one side has must not count: as means, kd would look 15 points ahead."""
    for seed, (alone, kd) in enumerate([(70, 71), (71, 73), (30, None), (None, 99)]):
        if alone:
            make_run(tmp_path, f"student-s{seed}", seed, alone)
        if kd:
            make_run(tmp_path, f"kd-s{seed}", seed, kd)
    make_run(tmp_path, "teacher-s7", 7, 90)  # one teacher for all: its seed need not match
    result = numbers(tmp_path)
    entry = compared(result)["kd - student alone"]["best"]
    assert entry["seeds"] == [0, 1] and entry["mean"] == pytest.approx(1.5)
    assert rows_of(result)["kd"]["gap"] == pytest.approx(1.5 / (90 - 70.5))
    assert compared(result)["student alone - teacher"]["best"]["verdict"] == "no shared seed"


def test_two_seeds_of_which_one_is_not_recorded(tmp_path):
    make_six(tmp_path, 2, only=("teacher", "student"))
    make_run(tmp_path, "kd-s0", 0, 73)
    make_run(tmp_path, "kd-s1", 1, 75)
    rows = rows_of(numbers(tmp_path))
    assert rows["kd"]["test_accuracy"]["sd"] == pytest.approx(0.02 / 2**0.5)     # |73 − 75| / √2
    rows["kd"]["last_test_accuracy"]["values"][1] = None
    found = {entry["title"]: entry for entry in compare.compare(rows)}["kd - student alone"]
    assert found["last"]["verdict"] == "not recorded" and found["last"]["mean"] is None
    assert found["best"]["mean"] == pytest.approx(3.5)


def test_no_gap_where_teacher_and_student_are_equal_on_the_shared_seeds(tmp_path):
    for seed, (teacher, alone) in enumerate([(80, 80), (90, 70)]):
        make_run(tmp_path, f"teacher-s{seed}", seed, teacher)
        make_run(tmp_path, f"student-s{seed}", seed, alone)
    make_run(tmp_path, "kd-s0", 0, 85)
    rows = rows_of(numbers(tmp_path))
    assert rows["kd"]["gap"] is None and rows["student"]["gap"] == 0


def test_one_seed_cannot_tell(tmp_path):
    make_six(tmp_path)
    result = numbers(tmp_path)
    assert {entry["best"]["verdict"] for entry in result["comparisons"]} == {"cannot tell"}
    assert rows_of(result)["kd"]["test_accuracy"]["sd"] is None
    lines = render.terminal(result).splitlines()
    assert lines[3] == "kd                     1  45.7 k  3.2 M       6  74.00   73.00   30 %   42"
    assert "kd - student alone               +3.00 [one seed: no interval]  1  cannot tell" in lines
    assert "±" not in render.markdown(result)


# ---- doubtful and missing runs ----------------------------------------------------------------

def test_a_seed_that_is_in_no_pair_decides_nothing(tmp_path):
    make_six(tmp_path, 3, only=("teacher", "student", "kd"))
    before = numbers(tmp_path)
    make_run(tmp_path, "student-s3", 3, 10, learned=False)
    after = numbers(tmp_path)
    assert before["comparisons"] == after["comparisons"]
    assert rows_of(before)["kd"]["gap"] == rows_of(after)["kd"]["gap"] is not None
    assert any("student-s3" in note for note in after["notes"])
    assert not any("No gap" in note for note in after["notes"])


def test_seeds_with_other_settings_are_not_one_row(tmp_path):
    make_six(tmp_path, 2, only=("teacher", "student", "kd"), temperature=4.0)
    make_run(tmp_path, "kd-s2", 2, 74, temperature=1.0)
    # On another day, from another folder: the same setting.
    make_run(tmp_path, "student-s2", 2, 72, temperature=4.0, date="2027-01-01", data_dir="else")
    result = numbers(tmp_path)
    said = {title: entry["best"]["verdict"] for title, entry in compared(result).items()}
    assert said == {"kd - student alone": "no conclusion", "kd - teacher": "no conclusion",
                    "student alone - teacher": "hurts"}
    (note,) = [note for note in result["notes"] if "other settings" in note]
    assert "kd: temperature 4.0 (kd-s0, kd-s1), but 1.0 (kd-s2)" in note
    assert render._cells(rows_of(result)["kd"])[0] == "(!) kd"


def test_no_conclusion_from_what_did_not_learn(tmp_path):
    make_six(tmp_path, 3, only=("teacher", "kd", "kd-only"))
    for seed in range(3):
        make_run(tmp_path, f"student-s{seed}", seed, 10, learned=seed != 1)
    result = numbers(tmp_path)
    said = {title: entry["best"]["verdict"] for title, entry in compared(result).items()}
    assert said == {"kd - student alone": "no conclusion", "kd-only - kd": "cannot tell",
                    "kd - teacher": "cannot tell",       # -7, -7, -7
                    "kd-only - student alone": "no conclusion",
                    "student alone - teacher": "no conclusion"}
    assert all(row["gap"] is None for row in result["rows"])
    out = render.terminal(result)
    assert "(!) student alone" in out and "(!) No conclusion from student-s1:" in out
    assert "No gap is shown: the student alone did not learn." in out
    assert "64.00" not in out  # kd's lead over it is not worth printing


def test_only_the_row_that_did_not_learn_loses_its_gap(tmp_path):
    make_six(tmp_path, only=("teacher", "student", "kd"))
    make_run(tmp_path, "kd-only-s0", 0, 10, learned=False)
    rows = rows_of(numbers(tmp_path))
    assert rows["kd-only"]["gap"] is None and rows["kd"]["gap"] == pytest.approx(0.3)


def test_no_gap_where_the_teacher_is_not_ahead(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, f"teacher-s{seed}", seed, 70)
        make_run(tmp_path, f"student-s{seed}", seed, 70)
    result = numbers(tmp_path)
    assert all(row["gap"] is None for row in result["rows"])
    assert "No gap is shown: the teacher is not above the student alone." in result["notes"]


def test_what_is_missing_is_named_with_its_command(tmp_path):
    make_run(tmp_path, "kd-s3", 3, 73, dataset="folder", data_dir="data/my pictures")
    (tmp_path / "digits" / "teacher-s3").mkdir()
    result = numbers(tmp_path)
    notes = " ".join(result["notes"])
    assert result["unfinished"] == ["teacher-s3"] and "Unfinished, not shown: teacher-s3." in notes
    for script in ("train_teacher.py", "train_student.py"):
        assert (f"`python {script} --recipe digits --dataset folder --data-dir 'data/my pictures' "
                f"--seed 3 --results-dir {tmp_path}`") in notes
    assert result["comparisons"] == [] and "points" not in render.terminal(result)


def test_a_command_says_no_more_than_it_must(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("results", "teacher-s0", 0, 80)
    assert "Missing: the student alone. `python train_student.py --recipe digits` makes it." in (
        numbers("results")["notes"])


def test_other_runs_get_rows_of_their_own(tmp_path):
    make_six(tmp_path, only=("teacher", "student", "kd"))
    for seed, test in enumerate((72, 74)):
        make_run(tmp_path, f"kd-t8-s{seed}", seed, test)
    make_run(tmp_path, "kd", 0, 20)  # --run kd may be anything: it is no seed of kd
    make_run(tmp_path, "wide", 5, 75, 76)
    make_run(tmp_path, "kd-ema-s0", 0, 74, 75)
    rows = rows_of(numbers(tmp_path))
    assert list(rows)[3:] == ["kd-ema", "kd-ema/average", "kd-t8", "run kd", "wide", "wide/average"]
    assert rows["kd-t8"]["test_accuracy"]["mean"] == pytest.approx(0.73)
    assert rows["kd"]["test_accuracy"]["values"] == [0.73]
    assert rows["wide/average"]["label"] == "wide, average"
    assert rows["wide"]["gap"] is None  # seed 5 has no student alone to be measured against


def test_settings_that_differ_are_said(tmp_path):
    make_run(tmp_path, "teacher-s0", 0, 80, epochs=8, device="cuda", precision="bf16",
             weight_decay=0.5)
    make_run(tmp_path, "student-s0", 0, 70)
    make_run(tmp_path, "kd-s0", 0, 73, data_key="e" * 64, labels=1000)
    result = numbers(tmp_path)
    note = next(note for note in result["notes"] if note.startswith("The runs differ"))
    assert note == ("The runs differ in what matters: device cpu, but cuda (teacher); precision "
                    "fp32, but bf16 (teacher); epochs 6, but 8 (teacher); data dddddddddddd, but "
                    "eeeeeeeeeeee (kd); labels all, but 1000 (kd).")
    assert result["settings"]["epochs"] == "6, but 8 (teacher)"
    assert "teacher: weight decay 0.5; kd: 1000 labels." in result["notes"]


def test_of_a_row_that_is_not_of_one_piece_the_runs_are_named(tmp_path):
    make_six(tmp_path, 2, only=("kd",))
    make_run(tmp_path, "student-s0", 0, 70)
    for name in ("student-s1", "teacher-s0", "teacher-s1"):
        make_run(tmp_path, name, int(name[-1]), 70, git_commit="e" * 40)
    assert numbers(tmp_path)["settings"]["commit"] == (
        "eeeeeeeeeeee, but cccccccccccc (student-s0, kd)")


def test_same_settings_are_no_news(tmp_path):
    make_six(tmp_path, 3)
    result = numbers(tmp_path)
    assert not any("differ" in note for note in result["notes"])
    assert result["notes"][0] == (
        "Data set digits; device cpu; precision fp32; epochs 6; batch 128; learning rate 0.001; "
        "seeds 0, 1, 2; torch 2.14.1; commit cccccccccccc; date 2026-01-02.")


def test_without_validation_images(tmp_path):
    folder = make_run(tmp_path, "teacher-s0", val_accuracy=None)
    text = (folder / "metrics.csv").read_text().splitlines()
    blank = [",".join("" if place in (3, 4) else cell for place, cell in enumerate(line.split(",")))
             for line in text[1:]]
    (folder / "metrics.csv").write_text("\n".join([text[0], *blank]) + "\n")
    result = run("--results-dir", tmp_path)
    assert result["rows"][0]["val_accuracy"]["mean"] is None
    assert "Without validation images (-) the last epoch counts as the best." in result["notes"]


def test_networks_of_different_size_are_not_compared(tmp_path):
    make_run(tmp_path, "teacher-s0", 0, 80)
    make_run(tmp_path, "student-s0", 0, 70)
    make_run(tmp_path, "kd-s0", 0, 73, parameters=45_679)       # all but the student's
    make_run(tmp_path, "kd-only-s0", 0, 74)
    make_run(tmp_path, "mean-teacher-s0", 0, 81, 83, parameters=1_234_567)      # the teacher's
    make_run(tmp_path, "mean-teacher-no-ema-s0", 0, 71)
    found = compared(numbers(tmp_path))
    assert {title: round(entry["best"]["mean"], 6) for title, entry in found.items()} == {
        "kd-only - student alone": 4, "mean teacher, no EMA - alone": 1,
        "kd - teacher": -7, "mean teacher, average - teacher": 3,
        "average - its student": 2, "student alone - teacher": -10}


# ---- what is written --------------------------------------------------------------------------

def test_files_and_terminal(tmp_path, capsys):
    folder = make_six(tmp_path, 3)
    make_run(tmp_path, "a-name-that-nobody-would-want-to-type-s0", 0, 70, 71)
    result = run("--results-dir", tmp_path)
    out = capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text()) == result
    assert [line for line in out.splitlines()
            if len(line) > 80 and not line.startswith(("report ", "picture "))] == []
    assert out.endswith(f"report   {folder / 'report.md'}\npicture  {folder / 'comparison.png'}\n")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert ("| kd | 3 | 45.7 k | 3.2 M | 6 | 75.00 ±1.00 | 74.00 ±1.00 | 73.50 ±1.00 | 30 % | 42 |"
            in text)
    assert ("| kd - student alone | does the teacher help? | 3 | +3.00 [+0.52, +5.48] | helps | "
            "+3.00 [+0.52, +5.48] | helps |") in text
    assert "a-name-that-nobody-would-want-to-type" in text
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    run("--results-dir", tmp_path)
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def size_of(png):
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 200_000
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_pictures(tmp_path):
    folder = make_six(tmp_path, 3, epochs=40)
    make_run(tmp_path, "kd-ema-s0", 0, 10, 10, learned=False, epochs=1)
    run("--results-dir", tmp_path)
    assert size_of(folder / "comparison.png")[0] > 1000
    history = compare.read_runs(folder)[0][0]["history"]
    history[0]["val_loss"] = None  # as before the first validation, and where there is none
    plots.draw_curves(history, tmp_path / "curves.png", "teacher-s0", chance=0.1)
    wide, high = size_of(tmp_path / "curves.png")
    assert wide > 2 * high
    plots.draw_curves(history[:1], tmp_path / "one.png")
    above_the_legend = Image.open(tmp_path / "one.png").convert("HSV").crop((0, 0, 1500, 500))
    assert sum(above_the_legend.getchannel("S").histogram()[100:]) > 50  # one epoch is seen, too


def test_losses_of_another_scale_have_a_panel_of_their_own(monkeypatch):
    history = [dict(epoch=e, train_loss=9 / e, val_loss=1 / e, train_accuracy=0.5, val_accuracy=0.6)
               for e in (1, 2, 3)]
    monkeypatch.setattr(plots, "save", lambda figure, path: path.append(figure))

    def panels(**how):
        plots.draw_curves(history, found := [], **how)
        return {axes.get_ylabel(): [list(line.get_ydata()) for line in axes.lines]
                for axes in found[0].axes}

    train, val = ([row[key] for row in history] for key in ("train_loss", "val_loss"))
    assert panels()["loss (cross-entropy)"] == [train, val]
    apart = panels(objective="kd")
    assert apart.pop("accuracy (%)") == [[50.0] * 3, [60.0] * 3]
    assert apart == {"training loss\n(kd)": [train], "validation loss\n(cross-entropy)": [val]}


@pytest.mark.parametrize("third, last, bottom, said", [
    (40, 80, 35, "chance: 10 %"), (11, 12, 6, "chance")])
def test_a_comparison_has_room_for_what_lies_close_together(monkeypatch, third, last, bottom, said):
    """All above 40 % after a third of the epochs: nothing below 35 % is drawn; chance in words."""
    runs = [dict(name=f"{key}-s0", history=[
        dict(epoch=e + 1, train_accuracy=value / 100, val_accuracy=value / 100, val_loss=1.0)
        for e, value in enumerate((10, 20, third, last, last, last))])
        for key in ("teacher", "student")]
    rows = [dict(key=key, label=key, prefix="", runs=[f"{key}-s0"], seeds=[0], learned=True,
                 test_accuracy=dict(values=[last / 100])) for key in ("teacher", "student")]
    monkeypatch.setattr(plots, "save", lambda figure, path: path.append(figure))
    plots.draw_comparison(rows, runs, found := [], chance=0.1)
    axes = next(axes for axes in found[0].axes if "training" in axes.get_ylabel())
    assert axes.get_ylim()[0] == pytest.approx(bottom)
    assert [text.get_text() for text in axes.texts] == [said]


@pytest.mark.parametrize("more, lines", [(6, 8), (7, 2)])
def test_of_many_rows_only_the_chains_have_lines(monkeypatch, more, lines):
    keys = ["teacher", "student", *(f"try{i}" for i in range(more))]
    runs = [dict(name=f"{key}-s0", history=[
        dict(epoch=e, train_accuracy=0.5, val_accuracy=0.5, val_loss=1.0) for e in (1, 2)])
        for key in keys]
    rows = [dict(key=key, label=key, prefix="", runs=[f"{key}-s0"], seeds=[0], learned=True,
                 test_accuracy=dict(values=[0.5])) for key in keys]
    monkeypatch.setattr(plots, "save", lambda figure, path: path.append(figure))
    plots.draw_comparison(rows, runs, found := [], "x")
    (loss,) = (axes for axes in found[0].axes if "loss" in axes.get_ylabel())
    (test,) = (axes for axes in found[0].axes if "test accuracy" in axes.get_xlabel())
    assert len(loss.lines) == lines and len(test.get_yticks()) == len(keys)
    assert ("own rows" in found[0].get_suptitle()) is (lines < len(keys))


def test_lines_of_a_picture_can_be_told_apart():
    styles = [plots.style(key, 0) for key in compare.ROWS]
    styles += [plots.style("another", number) for number in range(10)]
    assert len({str(style) for style in styles}) == len(styles)


def test_no_torch():
    code = "import sys, report; assert 'torch' not in sys.modules; sys.exit(7)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOUSE).returncode == 7


def test_publish_copies_the_small_files_only(tmp_path, capsys):
    folder = make_six(tmp_path)
    for name, size in (("best.pt", 9), ("checkpoint.pt", 9), ("curves.png", 1999)):
        (folder / "kd-s0" / name).write_bytes(b"x" * size)
    (folder / "teacher-s0" / "curves.png").write_bytes(b"x" * 200_000)
    (folder / "kd-only-s1").mkdir()  # unfinished
    target = tmp_path / "published" / "digits"
    (target / "gone\x1b[2J-s0").mkdir(parents=True)
    result = run("publish", "--results-dir", tmp_path)
    three = {"config.json", "metrics.csv", "final.json"}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {"report.md", "report.json", "comparison.png", "kd-s0/curves.png"} | {
        f"{name}-s0/{file}" for name in SIX for file in three}
    assert (target / "kd-s0/final.json").read_bytes() == (folder / "kd-s0/final.json").read_bytes()
    assert json.loads((target / "report.json").read_text()) == result
    assert rf"{target}/gone\x1b[2J-s0 is not among these runs" in capsys.readouterr().out
    # the published folder has the layout of any other, so a report can be made of it
    again = run("--results-dir", tmp_path / "published")
    assert rows_of(again) == rows_of(result)


# ---- README -----------------------------------------------------------------------------------

def test_readme_is_filled_and_checked(tmp_path, capsys):
    make_six(tmp_path)
    run("publish", "--results-dir", tmp_path)
    page = tmp_path / "README.md"
    words = ("readme", "--results-dir", tmp_path, "--readme", page)
    page.write_text("# Tutor\n<!-- table:digits -->\nold\n<!-- /table -->\nmiddle <!-- plain -->\n"
                    "<!-- comparisons:digits --><!-- /comparisons -->\nend\n", encoding="utf-8")
    capsys.readouterr()
    assert "is stale" in refused(capsys, *words, "--check", code=1)
    assert "old" in page.read_text(encoding="utf-8")
    assert run(*words)["changed"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Tutor\n<!-- table:digits -->\n\n| run | n | parameters |")
    assert "| kd | 1 | 45.7 k | 3.2 M | 6 | 74.00 | 73.00 | 72.50 | 30 % | 42 |" in text
    assert "\n\n<!-- /table -->\nmiddle <!-- plain -->\n<!-- comparisons:digits -->\n\n| c" in text
    assert text.endswith("<!-- /comparisons -->\nend\n") and "old" not in text
    assert run(*words) == {"readme": str(page), "changed": False}
    assert not run(*words, "--check")["changed"]
    page.write_text(text.replace("73.00", "93.00"), encoding="utf-8")  # typed by hand
    refused(capsys, *words, "--check", code=1)


@pytest.mark.parametrize("text, told", [
    ("<!-- tabel:digits --><!-- /tabel -->", "unknown marker tabel:digits (choose from table"),
    ("<!-- table:digits -->", "the last table is not closed by <!-- /table -->"),
    ("<!-- table:digits --> <!-- table:digits --> <!-- /table -->", "<!-- /table --> should be"),
    ("<!-- /table -->", "where a marker that opens should be"),
    ("<!-- table:svhn --><!-- /table -->", "`make publish RECIPE=svhn` makes it")])
def test_readme_with_wrong_markers_is_left_alone(tmp_path, capsys, text, told):
    make_six(tmp_path)
    run("publish", "--results-dir", tmp_path)
    capsys.readouterr()
    page = tmp_path / "README.md"
    page.write_text(text)
    assert told in refused(capsys, "readme", "--results-dir", tmp_path, "--readme", page)
    assert page.read_text() == text


# ---- refusals ---------------------------------------------------------------------------------

@pytest.mark.parametrize("words, told", [
    (["--recipe", "digtis"], "digtis"), (["--recip", "digits"], "--recip"),
    (["--colour"], "--colour"), (["--check"], "--check"),
    (["readme", "--recipe", "digits"], "--recipe"),
    (["pubish"], "unknown command 'pubish' (choose from report, publish, readme, sweep, html)"),
    (["readme", "--readme", "no/such.md"], "such.md: No such file")])
def test_wrong_words(capsys, words, told):
    assert told in refused(capsys, *words)


def test_no_finished_run(tmp_path, capsys):
    line = refused(capsys, "--results-dir", tmp_path)
    assert f"`python train_teacher.py --recipe digits --results-dir {tmp_path}`" in line
    assert "`make all RECIPE=digits`" in line
    (tmp_path / "digits" / "teacher-s0").mkdir(parents=True)
    assert "(unfinished: teacher-s0)" in refused(capsys, "--results-dir", tmp_path)


def change(**changes):
    def edit(path):
        final = json.loads(path.read_text())
        final.update(changes)
        path.write_text(json.dumps({k: v for k, v in final.items() if v != "drop"}))
    return edit


@pytest.mark.parametrize("file, edit, told", [
    ("final.json", lambda path: path.write_text(path.read_text()[:99]), "cut short"),
    ("final.json", lambda path: path.write_text("[]"), "not a mapping"),
    ("final.json", change(seed="drop"), "lacks 'seed'"),
    ("final.json", change(recipe="drop"), "lacks 'recipe'"),
    ("final.json", change(recomputed_val_accuracy="x"), "recomputed_val_accuracy cannot be 'x'"),
    ("config.json", lambda path: path.write_text("[[1, 2]]"), "not a mapping"),
    ("config.json", change(dataset=[5]), "dataset cannot be [5]"),
    ("final.json", change(learned="drop"), "lacks 'learned'"),
    ("final.json", change(test_accuracy=None), "test_accuracy cannot be None"),
    ("final.json", change(test_accuracy=70.5), "test_accuracy cannot be 70.5"),
    ("final.json", change(macs="many"), "macs cannot be 'many'"),
    ("final.json", change(parameters=10**400), "parameters cannot be 1000"),
    ("final.json", change(epochs=10**14), "not its 100000000000000 epochs"),
    ("final.json", change(seconds=math.nan), "seconds cannot be nan"),
    ("final.json", lambda path: path.write_text("[" * 100_000), "cut short"),
    ("config.json", change(class_names=5), "class_names cannot be 5"),
    ("config.json", change(classes="x"), "classes cannot be x"),
    ("config.json", change(objective="kd"), "temperature cannot be None"),
    ("metrics.csv", lambda path: path.write_text(path.read_text() + "9" * 200_000), "cut short"),
    ("config.json", lambda path: path.unlink(), "missing or cut short"),
    ("metrics.csv", lambda path: path.write_text(path.read_text()[:-20]), "cut short"),
    ("metrics.csv", lambda path: path.write_text("epoch,loss\n1,2\n"), "the column 'train_loss'"),
    ("metrics.csv", lambda path: path.write_text("".join(path.open().readlines()[:4])),
     "not its 6 epochs")])
def test_broken_files_are_named(tmp_path, capsys, file, edit, told):
    folder = make_six(tmp_path) / "kd-s0"
    edit(folder / file)
    line = refused(capsys, "--results-dir", tmp_path)
    file = "metrics.csv" if "not its" in told else file
    assert str(folder / file) in line and told in line
    assert f"train this run again with --overwrite, or remove {folder}" in line


# ---- beside accuracy --------------------------------------------------------------------------

def outputs(folder, logits, labels):
    np.savez_compressed(folder / "test.npz", logits=np.float32(logits), labels=np.int64(labels))


def test_calibration_by_hand():
    """Two bins: sure by 0.9 and right in 3 of 4, sure by 0.6 and right in 1 of 2."""
    def logits(p, said):
        other = math.log((1 - p) / p)
        return [0.0, other] if said == 0 else [other, 0.0]

    rows = [logits(0.9, 0)] * 3 + [logits(0.9, 1)] + [logits(0.6, 0), logits(0.6, 1)]
    labels = np.array([0, 0, 0, 0, 0, 0])
    error, bins = compare.calibration(np.array(rows), labels)
    assert error == pytest.approx((4 * abs(0.75 - 0.9) + 2 * abs(0.5 - 0.6)) / 6)
    assert [count for _, _, count in bins] == [2, 4]
    assert bins[1][0] == pytest.approx(0.9) and bins[1][1] == 0.75
    np.testing.assert_array_equal(compare.confusion(np.array(rows), labels), [[4, 2], [0, 0]])
    sure = compare.calibration(np.array([[800.0, -800.0]]), np.array([0]))
    assert sure[0] == 0 and sure[1] == [(1.0, 1.0, 1)]


def test_a_run_under_another_name_is_told(tmp_path, capsys):
    make_six(tmp_path, only=["teacher"])
    (tmp_path / "digits/teacher-s0").rename(tmp_path / "digits/student-s0")
    notes = report.main(["--results-dir", str(tmp_path)])["notes"]
    assert "Ran under another name: student-s0 (teacher-s0)." in notes


def test_calibration_has_fifteen_bins_and_full_confidence_is_in_the_last():
    """Edges at multiples of 1/15: 0.65 | 0.68 | … | 0.90 | 0.95 and 1."""
    logits = np.array([[math.log(p / (1 - p)), 0.0] for p in (0.65, 0.68, 0.9, 0.95)]
                      + [[800.0, -800.0]])
    bins = compare.calibration(logits, np.zeros(5, int))[1]
    assert [count for _, _, count in bins] == [1, 1, 1, 2]
    assert [sure for sure, _, _ in bins] == pytest.approx([0.65, 0.68, 0.9, 0.975])


def test_confusion_has_a_row_for_a_class_that_never_comes():
    found = compare.confusion(np.eye(3)[[0, 1, 0]], np.array([0, 0, 0]))
    np.testing.assert_array_equal(found, [[2, 1, 0], [0, 0, 0], [0, 0, 0]])


def test_agreement_and_divergence_against_torch():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 50, 7)) * 4
    same, divergence = compare.against(student, teacher)
    log = [torch.log_softmax(torch.from_numpy(x), 1) for x in (student, teacher)]
    assert divergence == pytest.approx(torch.nn.functional.kl_div(
        log[0], log[1], log_target=True, reduction="batchmean").item())
    assert same == (student.argmax(1) == teacher.argmax(1)).mean()
    assert compare.against(teacher, teacher) == (1.0, 0.0)


def test_what_accuracy_does_not_say_is_in_the_report(tmp_path):
    folder = make_six(tmp_path, 2, only=("teacher", "student", "kd"))
    labels = np.arange(8) % 2
    for seed in (0, 1):
        right = np.where(labels[:, None] == [0, 1], 3.0, 0.0)
        outputs(folder / f"teacher-s{seed}", right, labels)
        outputs(folder / f"kd-s{seed}", right if seed else right[:, ::-1], labels)
    result = numbers(tmp_path)
    rows = rows_of(result)
    assert rows["student"]["beside"] == {}              # an older run, that kept no outputs
    assert rows["kd"]["beside"]["agreement"]["values"] == [0.0, 1.0]
    sure = 1 / (1 + math.exp(-3))
    assert rows["kd"]["beside"]["calibration"]["values"] == pytest.approx([sure, 1 - sure])
    assert rows["teacher"]["beside"]["classes"] == [1.0, 1.0]
    assert rows["kd"]["beside"]["classes"] == [0.5, 0.5]
    text = render.markdown(result)
    assert "## Beside accuracy" in text and "| kd | " in text.split("## Beside accuracy")[1]
    report.main(["--results-dir", str(tmp_path)])
    assert (folder / "details.png").stat().st_size > 5000


def test_the_average_and_the_classes_have_figures_of_their_own(tmp_path):
    folder = make_six(tmp_path, 1, only=("teacher", "student", "mean-teacher"),
                      class_names=["a|b", "c"])
    labels = np.array([0, 0, 1, 1])
    right = np.where(labels[:, None] == [0, 1], 3.0, 0.0)
    outputs(folder / "teacher-s0", right, labels)
    outputs(folder / "student-s0", right, labels)
    wrong = right.copy()
    wrong[0] = [0, 3]
    np.savez_compressed(folder / "mean-teacher-s0" / "test.npz", logits=np.float32(right),
                        labels=labels, ema_logits=np.float32(wrong))
    rows = rows_of(numbers(tmp_path))
    assert rows["mean-teacher"]["beside"]["agreement"]["values"] == [1.0]
    assert rows["mean-teacher/average"]["beside"]["agreement"]["values"] == [0.75]
    assert rows["mean-teacher/average"]["beside"]["classes"] == [0.5, 1.0]
    text = render.markdown(numbers(tmp_path))
    assert "| 50.00 (a\\|b) | 100.00 (c) |" in text
    assert "| mean teacher, average | 50.0 | 100.0 |" in text
    report.main(["--results-dir", str(tmp_path)])
    assert (folder / "details.png").stat().st_size > 5000


def test_agreement_of_some_runs_says_of_how_many(tmp_path):
    folder, labels = make_six(tmp_path, 2, only=("teacher", "student", "kd")), np.array([0, 1])
    for run in ("teacher-s0", "kd-s0", "kd-s1", "student-s0", "student-s1"):
        outputs(folder / run, np.eye(2), labels)        # the teacher of seed 1 kept none
    assert "| kd | 26.89 ±0.00 | 100.00 (1 of 2) | 0.000 |" in render.markdown(numbers(tmp_path))


def test_curves_of_runs_of_other_lengths_are_shares(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    make_run(tmp_path, "student-s0", 0, epochs=40)
    make_run(tmp_path, "kd-s0", 0, epochs=10)
    for longest in ("of 10 to 40 epochs", "epoch"):
        result, read, _ = report.build("digits", tmp_path)
        plots.draw_comparison(result["rows"], read, tmp_path / "a.png")
        axes = figures[-1].axes[0]
        assert longest in axes.get_xlabel()
        assert {max(line.get_xdata()) for line in axes.lines} == (
            {100} if longest != "epoch" else {10, 20})
        shutil.rmtree(tmp_path / "digits" / "student-s0")
        make_run(tmp_path, "student-s0", 0, epochs=20)


def test_agreement_is_with_the_network_that_taught(tmp_path):
    folder, labels = make_six(tmp_path, 1, only=("teacher", "student")), np.array([0, 0, 1, 1])
    right = np.where(labels[:, None] == [0, 1], 3.0, 0.0)
    outputs(folder / "teacher-s0", right, labels)
    outputs(make_run(tmp_path, "teacher-s1", 1), right[:, ::-1], labels)
    for run, typed in (("kd-s1", "results/digits/teacher-s0/best.pt"), ("kd-only-s1", None),
                       ("kd-ema-s1", "elsewhere/teacher-s0/best.pt"), ("far-s1", "best.pt")):
        outputs(make_run(tmp_path, run, 1, teacher=typed), right, labels)
    result = numbers(tmp_path)
    rows = rows_of(result)
    assert [rows[key]["beside"]["agreement"]["values"] for key in ("kd", "kd-only")] == [[1], [0]]
    assert not any("agreement" in rows[key]["beside"] for key in ("kd-ema", "far"))
    assert ("Taught by another than the teacher of their seed: kd-s1 (teacher-s0), kd-ema-s1 "
            "(elsewhere/teacher-s0/best.pt), far-s1 (best.pt).") in result["notes"]


def test_outputs_of_other_sets_are_not_mixed(tmp_path):
    folder = make_six(tmp_path, 2, only=("teacher", "student"), class_names=["a", "b"])
    for run, classes in (("teacher-s0", 2), ("student-s0", 3), ("student-s1", 2)):
        outputs(folder / run, np.eye(classes), np.arange(classes))
    report.main(["--results-dir", str(tmp_path)])
    rows = rows_of(numbers(tmp_path))
    assert rows["student"]["beside"]["classes"] == [1, 1, 1]
    assert "agreement" not in rows["student"]["beside"]
    outputs(folder / "teacher-s0", np.eye(2), [0, 1])
    outputs(folder / "student-s0", np.eye(2), [1, 0])       # another test set of the same size
    outputs(folder / "student-s1", np.eye(2), [0, 1])
    assert "agreement" not in rows_of(numbers(tmp_path))["student"]["beside"]
    np.savez(folder / "teacher-s0" / "test.npz", logits=np.eye(40), labels=np.uint8(range(40)))
    assert rows_of(numbers(tmp_path))["teacher"]["beside"]["classes"] == [1] * 40
    np.savez(folder / "teacher-s0" / "test.npz", logits=np.eye(2), labels=np.uint64([1, 1]))
    assert rows_of(numbers(tmp_path))["teacher"]["beside"]["classes"] == [0.0, 0.5]


@pytest.mark.parametrize("weights, known", [("a" * 64, True), ("b" * 64, False)])
def test_agreement_is_not_with_a_teacher_that_was_trained_anew(tmp_path, weights, known):
    folder = make_six(tmp_path, 1, only=("student",))
    outputs(make_run(tmp_path, "teacher-s0", weights_sha256=weights), [[1, 0]], [0])
    final = json.loads((folder / "teacher-s0" / "final.json").read_text())
    (folder / "teacher-s0" / "final.json").write_text(json.dumps(final | dict(
        weights_sha256=weights)))
    outputs(make_run(tmp_path, "kd-s0", teacher_sha256="a" * 64), [[1, 0]], [0])
    assert ("agreement" in rows_of(numbers(tmp_path))["kd"]["beside"]) == known


def test_outputs_of_odd_runs_alone_are_drawn_too(tmp_path):
    folder = make_six(tmp_path, only=("teacher", "student"))
    outputs(make_run(tmp_path, "longer-s0", 0, 50), [[1, 0], [0, 1]], [0, 0])
    report.main(["--results-dir", str(tmp_path)])
    assert (folder / "details.png").stat().st_size > 5000


def test_damaged_outputs_are_named(tmp_path, capsys):
    folder = make_six(tmp_path, only=("teacher",))
    (folder / "teacher-s0" / "test.npz").write_bytes(b"PK\x03\x04 cut")
    assert "teacher-s0/test.npz" in refused(capsys, "--results-dir", str(tmp_path))
    for logits, labels in (([[1, 0]], [2]), ([[1, 0]], [-1]), (np.zeros((0, 2)), [])):
        outputs(folder / "teacher-s0", logits, labels)
        assert "teacher-s0/test.npz" in refused(capsys, "--results-dir", str(tmp_path))
    np.savez(folder / "teacher-s0" / "test.npz", logits=np.eye(2), labels=np.zeros(2))
    assert "teacher-s0/test.npz" in refused(capsys, "--results-dir", str(tmp_path))


def test_what_files_say_cannot_steer_a_terminal(tmp_path, capsys):
    folder = make_six(tmp_path, only=("teacher", "student"), torch="\x1b[2J", date="a\nb")
    (folder / "begun\x1b[0m").mkdir()
    print(render.terminal(numbers(tmp_path)))
    told = capsys.readouterr().out
    assert "\\x1b[2J" in told and "a\\nb" in told and "\x1b" not in told


def test_the_speed_table_from_what_was_measured():
    def part(device, ratio, met):
        machine = dict(device=device, threads=2, precision="fp32", torch="2.14.1", commit="abc",
                       date="2026-01-02")
        return dict(machine=machine, rows=[dict(title="a step", goal="1.5", ratio=ratio, met=met)])

    lines = render.markdown_bench(dict(cpu=dict(steps=part("x86_64", 1.2345, False)))).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "a step", "1.5", "1.23 (missed)", "not measured"]
    assert lines[-1] == "CPU: x86_64, 2 threads, fp32, torch 2.14.1, commit abc, 2026-01-02: steps"
