"""What accuracy does not say: calibration, agreement, KL, confusion, against sums done by hand and
against torch.
"""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from fake_runs import make_run, make_six, numbers, refused, rows_of

import compare
import plots
import render
import report


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
