"""compare.py on run folders made in fake_runs.py: figures, pairs and verdicts against sums done by
hand.
"""

import json

import pytest
from fake_runs import SIX, compared, make_run, make_six, numbers, rows_of, run

import compare
import render

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


def test_a_teacher_that_was_trained_again_is_not_that_of_its_student(tmp_path):
    make_six(tmp_path, 3, only=("student",))
    for seed in range(3):
        make_run(tmp_path, f"kd-s{seed}", seed, SIX["kd"][seed], teacher_sha256=f"{seed}" * 64)
        make_run(tmp_path, f"teacher-s{seed}", seed, SIX["teacher"][seed])
    for again, pairs in (((), [0, 1, 2]), ((1,), [0, 2]), ((0, 1, 2), [])):
        for seed in range(3):
            path = tmp_path / "digits" / f"teacher-s{seed}" / "final.json"
            sha = "f" * 64 if seed in again else f"{seed}" * 64
            path.write_text(json.dumps(json.loads(path.read_text()) | dict(weights_sha256=sha)))
        result = numbers(tmp_path)
        found = compared(result)["kd - teacher"]["best"]
        assert found["seeds"] == pairs and (found["verdict"] == "other teachers") == (not pairs)
        gap = next(row["gap"] for row in result["rows"] if row["key"] == "kd")
        assert (gap is None) == bool(again)
        told = ", ".join(f"kd-s{seed} (teacher-s{seed}, which was trained again since)"
                         for seed in again)
        assert any(told in note for note in result["notes"]) if again else not any(
            "Taught by another" in note for note in result["notes"])


@pytest.mark.parametrize("weights, shown", [(None, True), ("0" * 64, True), ("f" * 64, False)])
def test_a_teacher_whose_weights_are_unknown_is_taken_for_the_one(tmp_path, weights, shown):
    """Older runs do not say what theirs are."""
    make_six(tmp_path, only=("student",))
    make_run(tmp_path, "kd-s0", 0, SIX["kd"][0], teacher_sha256="0" * 64)
    path = make_run(tmp_path, "teacher-s0", 0, SIX["teacher"][0]) / "final.json"
    if weights:
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(weights_sha256=weights)))
    gap = next(row["gap"] for row in numbers(tmp_path)["rows"] if row["key"] == "kd")
    assert (gap is not None) == shown


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


def test_networks_of_two_sizes_are_not_one_thing_measured_twice(tmp_path):
    make_six(tmp_path, 2, only=("kd",))
    make_run(tmp_path, "student-s0", 0, 70)
    make_run(tmp_path, "student-s1", 1, 71, parameters=45_679)
    result = numbers(tmp_path)
    assert any("network's parameters 45678" in note and "45679" in note and "student-s1" in note
               for note in result["notes"]), result["notes"]


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
