"""report.py and plots.py on run folders made in fake_runs.py, against sums done by hand."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_runs import SIX, compared, edit, make_run, make_six, numbers, refused, rows_of, run
from PIL import Image

import plots
import report

draw_curves = plots.draw_curves     # conftest.py takes it away from training
ROOT = Path(report.__file__).parent
PUBLISHED = sorted((ROOT / "results" / "published").glob("*/report.json"))


def test_interval_and_verdict():
    """Against the printed table of Student's t: 4.302653 for 2 degrees, 2.776445 for 4."""
    half = 4.302653 / 3**0.5        # of 3, 4, 2, whose deviation is 1
    assert report.interval([3.0, 4.0, 2.0]) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
    assert report.interval([1, 2, 3, 4, 5])[1] == pytest.approx(3 - 2.776445 * 0.5**0.5)
    assert report.interval([3.0]) == (3, None, None)
    assert report.verdict(0.1, 2) == "helps" and report.verdict(-2, -0.1) == "hurts"
    for low, high in ((0, 1), (None, None), (2, 2)):
        assert report.verdict(low, high) == "cannot tell"
    assert report.verdict(0.1, 2, learned=False) == "no conclusion"


def test_three_seeds_by_hand(tmp_path):
    make_six(tmp_path, 3)
    result = numbers(tmp_path)
    rows = rows_of(result)
    assert rows["kd"]["last_test_accuracy"]["mean"] == pytest.approx(0.735)
    assert rows["kd"]["test_accuracy"]["sd"] == pytest.approx(0.01)     # sample: / (n - 1)
    # In this order. Alone 71, teacher 81: ten points to close.
    assert [(key, round(row["gap"], 6)) for key, row in rows.items()] == [
        ("teacher", 1), ("student", 0), ("kd", 0.3), ("kd-only", 0.3), ("mean-teacher", 0.2),
        ("mean-teacher/average", 0.4), ("mean-teacher-no-ema", 0)]
    half = 4.302653 / 3**0.5    # of three differences whose deviation is 1
    expected = {    # mean, half width, verdict of the differences
        "kd - student alone": (3, half, "helps"),                       # 3, 4, 2
        "kd - teacher": (-7, 0, "cannot tell"),                         # -7, -7, -7
        "mean teacher, average - alone": (4, half, "helps"),            # 3, 4, 5
        "student alone - teacher": (-10, half, "hurts")}                # -10, -11, -9
    found = compared(result)
    for title, (centre, width, said) in expected.items():
        best, last = found[title]["best"], found[title]["last"]
        assert (best["n"], best["mean"], best["low"], best["high"]) == pytest.approx(
            (3, centre, centre - width, centre + width), abs=1e-5)
        assert best["verdict"] == said
        # Of the last epoch all are half a point lower; of the average it is not recorded.
        assert last["verdict"] == ("not recorded" if "average" in title else said)


def test_calibration_by_hand():
    """Two bins: sure by 0.9 and right in 3 of 4, sure by 0.6 and right in 1 of 2."""
    high, low = math.log(9), math.log(1.5)
    logits = np.array([[high, 0]] * 3 + [[0, high], [low, 0], [0, low]])
    error, bins = report.calibration(logits, np.zeros(6, int))
    assert error == pytest.approx((4 * abs(0.75 - 0.9) + 2 * abs(0.5 - 0.6)) / 6)
    np.testing.assert_allclose(bins, [(0.6, 0.5, 2), (0.9, 0.75, 4)])
    assert report.confusion(logits, np.zeros(6, int)).tolist() == [[4, 2], [0, 0]]
    sure = report.calibration(np.array([[800.0, -800.0]]), np.array([0]))
    assert sure == (0, [(1.0, 1.0, 1)])         # full confidence is in the last bin


def test_agreement_and_divergence_against_scipy():
    from scipy.special import rel_entr, softmax
    student, teacher = np.random.default_rng(0).normal(size=(2, 50, 7)) * 4
    explicit = rel_entr(softmax(teacher, 1), softmax(student, 1)).sum(1).mean()
    agreement = (student.argmax(1) == teacher.argmax(1)).mean()
    assert report.against(student, teacher) == pytest.approx((agreement, explicit))


def test_pairs_share_a_seed(tmp_path):
    """A seed that only one side has must not count: as means, kd would be 15 points ahead."""
    for seed, alone in enumerate((70, 71, 30)):
        make_run(tmp_path, f"student-s{seed}", seed, alone)
    for seed, kd in {0: 71, 1: 73, 3: 99}.items():
        make_run(tmp_path, f"kd-s{seed}", seed, kd)
    make_run(tmp_path, "teacher-s7", 7, 90)     # one teacher for all
    result = numbers(tmp_path)
    found = compared(result)
    assert found["kd - student alone"]["best"]["seeds"] == [0, 1]
    assert found["kd - student alone"]["best"]["mean"] == pytest.approx(1.5)
    assert found["student alone - teacher"]["best"]["verdict"] == "no shared seed"
    assert rows_of(result)["kd"]["gap"] == pytest.approx(1.5 / (90 - 70.5))


def test_pairs_share_data_and_teacher(tmp_path):
    folder = make_six(tmp_path, 3, only=("student",))
    for seed in range(3):
        taught = dict(teacher_sha256=f"{seed}" * 64)
        make_run(tmp_path, f"teacher-s{seed}", seed, 80, weights_sha256=f"{seed}" * 64)
        make_run(tmp_path, f"kd-s{seed}", seed, SIX["kd"][seed], **taught)
        make_run(tmp_path, f"kd-only-s{seed}", seed, SIX["kd-only"][seed], **taught)
    edit(folder / "kd-only-s2" / "config.json", teacher_sha256="1" * 64)
    edit(folder / "student-s0" / "config.json", data_key="e" * 64)
    edit(folder / "teacher-s1" / "final.json", weights_sha256="f" * 64)     # trained again
    found = compared(numbers(tmp_path))
    assert found["kd-only - kd"]["best"]["seeds"] == [0, 1]
    assert found["kd - student alone"]["best"]["seeds"] == [1, 2]
    assert found["kd - teacher"]["best"]["seeds"] == [0, 2]
    for seed in range(3):
        edit(folder / f"kd-s{seed}" / "config.json", teacher_sha256="a" * 64)
        edit(folder / f"student-s{seed}" / "config.json", data_key="e" * 64)
    found = compared(numbers(tmp_path))
    assert found["kd-only - kd"]["best"]["verdict"] == "other teachers"
    assert found["kd - student alone"]["best"]["verdict"] == "other data"


def test_seeds_with_other_settings_and_those_that_did_not_learn(tmp_path):
    make_six(tmp_path, 2, only=("teacher", "student", "kd"), temperature=4.0)
    make_run(tmp_path, "kd-s2", 2, 74, temperature=1.0)
    # On another day, from another folder: the same setting.
    make_run(tmp_path, "student-s2", 2, 72, temperature=4.0, date="2027-01-01", data_dir="x")
    make_run(tmp_path, "kd-only-s0", 0, 10, learned=False)
    result = numbers(tmp_path)
    said = [entry["best"]["verdict"] for entry in result["comparisons"]]
    assert said == 4 * ["no conclusion"] + ["hurts"]    # student alone - teacher
    out = report.terminal(result)
    assert "(!) kd " in out and "kd-only - kd: no conclusion\n" in out
    assert "(!) kd-only, seed 0: no conclusion, accuracy not above chance." in out
    assert "temperature 4.0, but 1.0 (kd-s2)" in " ".join(result["notes"])


def test_what_differs_and_what_is_missing_is_said(tmp_path):
    make_run(tmp_path, "teacher-s0", 0, 80, epochs=8)
    make_run(tmp_path, "kd-s0", 0, 73, labels=1000)
    make_run(tmp_path, "kd", 0, 20)     # --run kd may be anything: it is no seed of kd
    result = numbers(tmp_path)
    made, differ, missing = result["notes"]
    assert "batch_size 128; lr 0.001;" in made and "git_commit cccccccccccc;" in made
    assert differ == "The runs differ in: labels all, but 1000 (kd); epochs 6, but 8 (teacher)."
    assert "train_student.py" in missing and list(rows_of(result)) == ["teacher", "kd", "run kd"]
    out = report.terminal(result)
    assert out.startswith("kd - teacher: cannot tell, -7.00 points, n 1\nOne seed cannot tell; ")


def test_an_unknown_objective_has_a_row_and_comparisons(tmp_path):
    """Of a data set without a recipe; config.json has only the flags that it reads."""
    words = dict(recipe="svhn", objective="dkd", minimises="β·T²·KL(a ‖ b)", beta=2.0)
    for name, test in {"student-s0": 70, "kd-s0": 72, "longer-s0": 74}.items():
        make_run(tmp_path, name, 0, test, recipe="svhn")
    make_run(tmp_path, "dkd-s0", 0, 74, **words)
    make_run(tmp_path, "dkd-wide-s0", 0, 74, parameters=1, **words)
    result = numbers(tmp_path, "svhn")
    found = compared(result)
    assert list(rows_of(result)) == ["student", "kd", "dkd", "dkd-wide", "longer"]
    assert list(found) == ["kd - student alone", "dkd - student alone", "dkd - kd"]
    assert found["dkd - kd"]["best"]["mean"] == pytest.approx(2)
    assert "dkd minimises β·T²·KL(a ‖ b)." in result["notes"]


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_published_figures_are_what_the_published_runs_say(file):
    known = json.loads(file.read_text(encoding="utf-8"))
    result = numbers(file.parent.parent, file.parent.name)
    for key in ("recipe", "rows", "comparisons", "chance", "classes"):
        assert result[key] == known[key], key


def outputs(folder, logits, labels, **more):
    np.savez_compressed(folder / "test.npz", logits=np.float32(logits), labels=labels, **more)


def test_files_terminal_and_a_second_call(tmp_path, capsys, monkeypatch):
    """With outputs on test, which stay behind when the rest is published."""
    folder = make_six(tmp_path, 2, only=("teacher", "student", "kd"))
    labels = np.arange(8) % 2
    right = np.where(labels[:, None] == [0, 1], 3.0, 0.0)
    for seed in (0, 1):
        outputs(folder / f"teacher-s{seed}", right, labels)
        outputs(folder / f"kd-s{seed}", right if seed else right[:, ::-1], labels)
    averaged = make_run(tmp_path, "mean-teacher-s0", 0, 72, 73)
    outputs(averaged, right, labels, ema_logits=np.float32(right[:, ::-1]))
    outputs(make_run(tmp_path, "kd-only-s0", 0, 72), np.eye(3), [0, 1, 2])  # another test set
    make_run(tmp_path, "a-name-that-nobody-would-want-to-type-$5-$6-s0")
    result = run("--results-dir", tmp_path)
    out = capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text()) == result
    assert out.startswith("kd - student alone: cannot tell, +3.50 [-2.85, +9.85] points, n 2\n")
    assert out.endswith(f"report   {folder}/report.md\npicture  {folder}/comparison.png\n")
    assert max(map(len, out.split("\nreport ")[0].splitlines())) <= 80
    beside = {key: row["beside"] for key, row in rows_of(result).items()}
    assert beside["student"] == {}          # an older run, that kept no outputs
    assert beside["mean-teacher/average"]["agreement"]["mean"] == 0
    assert "agreement" not in beside["teacher"] and "agreement" not in beside["kd-only"]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| kd | 2 | 45.7 k | 3.2 M | 6 | 75.00 ±1.41 | 74.00 ±1.41 | 73.50 ±1.41 |" in text
    # Half of 0.953 - 0.047, and KL is 0 or 3·(0.953 - 0.047): each deviation is that / √2.
    assert "| kd | 2 | 50.00 ±64.00 | 50.00 ±70.71 | 1.358 ±1.920 | 50.00 (0) | 50.00 (0) |" in text
    assert Image.open(folder / "comparison.png").size[0] == 1500

    monkeypatch.setattr(plots, "save", None)        # nothing changed: nothing is drawn
    run("publish", "--results-dir", tmp_path)
    assert capsys.readouterr().out == f"{out}published in {tmp_path}/published/digits\n"
    assert numbers(tmp_path / "published")["rows"] == result["rows"]
    edit(tmp_path / "published" / "digits" / "kd-s0" / "final.json", test_accuracy=0.5)
    again = rows_of(numbers(tmp_path / "published"))
    assert again["kd"]["beside"] == {} and again["teacher"]["beside"] == beside["teacher"]
    shutil.rmtree(folder / "kd-s1")
    with pytest.raises(TypeError):
        run("--results-dir", tmp_path)


def test_a_page_and_a_sweep(tmp_path, capsys, monkeypatch):
    assert "make all" in refused(capsys, "html", "--results-dir", tmp_path)
    assert "no sweep.md" in refused(capsys, "publish", "--sweep", "a", "--results-dir", tmp_path)
    monkeypatch.setattr(plots, "save", lambda figure, path: path.write_bytes(b"PNG"))
    make_six(tmp_path, 3)
    make_run(tmp_path, "odd<b>&|-s0", 0, 50)        # a name from --run is only text
    (tmp_path / "sweeps" / "a").mkdir(parents=True)
    table = "| alpha | n |\n| --- | ---: |\n| 0.5 | 3 |\n\nBest: 0.5.\n"
    (tmp_path / "sweeps" / "a" / "sweep.md").write_text(table)
    (tmp_path / "sweeps" / "a" / "sweep.png").write_bytes(b"PNG")
    assert run("html", "--results-dir", tmp_path) == ["digits", "sweeps/a"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 and page.count("<table") == 3 and "<b>" not in page
    for cell in ("73.00 ±1.00", "+3.00 [+0.52, +5.48]", "odd&lt;b&gt;&amp;|", "0.5"):
        assert f"<td>{cell}</td>" in page
    run("publish", "--sweep", "a", "--results-dir", tmp_path)
    assert (tmp_path / "published" / "sweeps" / "a" / "sweep.md").read_text() == table


def test_wrong_words(capsys):
    assert "--recip" in refused(capsys, "--recip", "digits")
    assert "'publisch'" in refused(capsys, "publisch")
    assert "--sweep" in refused(capsys, "--sweep", "a")
    assert "results/none" in refused(capsys, "--recipe", "none")


def test_curves_and_rows_that_are_drawn(tmp_path, monkeypatch):
    """Every loss term; runs of other lengths, and many rows."""
    figures, lines, history = [], {}, []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    for epoch in (1, 2, 3):
        history.append(dict(epoch=epoch, train_loss=9 / epoch, train_kd=6 / epoch,
                            train_labels=3 / epoch, val_loss=6 / epoch, val_accuracy=0.6,
                            train_accuracy=None if epoch == 1 else 0.5))
    draw_curves(history, None, terms=("kd", "labels"))
    for axes in figures[-1].axes:
        name = axes.get_ylabel().split("\n")[0]
        lines[name] = [list(line.get_ydata()) for line in axes.lines]
    assert lines == {"training loss": [[6, 3, 2], [3, 1.5, 1], [9, 4.5, 3]],
                     "validation loss": [[6, 3, 2]], "accuracy (%)": [[50] * 2, [60] * 3]}

    make_run(tmp_path, "student-s0", 0, epochs=40)
    make_run(tmp_path, "kd-s0", 0, 60, epochs=10)
    for number in range(9):
        make_run(tmp_path, f"try{number}-s0")
    result, runs, _ = report.build("digits", tmp_path)
    plots.draw_comparison(result["rows"], runs, None, "digits", 0.1)
    accuracy, test, loss = figures[-1].axes
    assert accuracy.get_xscale() == "log" and len(test.get_yticks()) == 11
    assert accuracy.get_ylim()[0] > 30          # chance, at 10 %, needs no room
    looks = {(line.get_color(), line.get_linestyle()) for line in loss.lines}
    assert len(looks) == len(loss.lines) == 8   # each row can be told from the others


def test_pictures_whatever_the_users_matplotlib_says(tmp_path):
    """Text by LaTeX, 900 dots an inch; details of 200 classes, a grid, under 200 KB."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 900\n")
    code = """
import sys
import numpy as np
import plots, report
assert not {"torch", "matplotlib", "PIL"} & set(sys.modules)    # each takes a second
history = [dict(epoch=1, train_loss=1.0, val_loss=1.0, val_accuracy=0.5)]
plots.draw_curves(history, "curves.png", "$5 and $6", 0.005, ("a_b", "c$"))
numbers = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
plots.draw_details({"kd $": ([(0.5, 0.4, 9)], numbers[:, :, 0])}, "details.png")
images = numbers[:48].reshape(3, 80, 40, 3)
plots.draw_grid(images, images / 64.0 - 2, ["a very long $name$"] * 3, "grid.png")
"""
    words = dict(os.environ, MATPLOTLIBRC=str(tmp_path), PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=words, check=True)
    for name in ("curves.png", "details.png", "grid.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < plots.MOST_BYTES
