"""A grid of settings and seeds: every run made once, summed up right."""
import argparse
import csv
import json

import pytest
import tiny

import plots
import report
import sweep
import train_teacher


@pytest.fixture
def unseen(monkeypatch):
    """No plot, which takes longer than the runs."""
    monkeypatch.setattr(plots, "save", lambda *args: None)


def run(easy, results, own, script, *flags, epochs=1):
    words = tiny.words(easy, results, "--image-size", 8, *flags, epochs=epochs)
    return sweep.main([*own, "--", script, *words])


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_grid_of_settings_and_seeds(easy, tmp_path, capsys):
    for seed in (0, 1):
        tiny.run(train_teacher, easy, tmp_path, "--image-size", 8, "--seed", seed, epochs=1)
    grid = ["--over", "alpha=0,0.1", "--over", "temperature=1,4", "--seeds", "0 1"]
    capsys.readouterr()
    found = run(easy, tmp_path, grid, "distill.py")
    assert capsys.readouterr().out.count("\nepoch 1/1") == 8
    folder, tests = tmp_path / "sweeps" / "distill-alpha-temperature", {}
    assert found["folder"] == str(folder)
    for line in csv.DictReader((folder / "sweep.csv").read_text().splitlines()):
        setting, seed = "alpha={alpha},temperature={temperature}".format(**line), line["seed"]
        made = folder / "digits" / f"{setting}-s{seed}"
        final, flags = json.loads((made / "final.json").read_text()), config(made)
        assert f"alpha={flags['alpha']:g},temperature={flags['temperature']:g}" == setting
        assert flags["teacher"] == str(tmp_path / f"digits/teacher-s{seed}/best.pt")
        assert line["test_accuracy"] == str(final["test_accuracy"])
        tests.setdefault(setting, []).append(final["test_accuracy"])
    assert list(tests) == [f"alpha={a},temperature={t}" for a in (0, 0.1) for t in (1, 4)]
    text = (folder / "sweep.md").read_text()
    (_, first), *others = tests.items()
    for setting, values in others:
        mean, low, high = report.interval([100 * (values[s] - first[s]) for s in (0, 1)])
        assert f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" in text
        assert found["rows"][setting]["test_accuracy"]["values"] == values
    for part in ("dataset folder", "epochs 1", "seed 0, 1;"):
        assert part in text, part
    assert (folder / "sweep.png").stat().st_size > 5000
    run(easy, tmp_path, ["--over", "alpha=0", *grid[2:]], "distill.py")
    assert capsys.readouterr().out.count("finished already, kept") == 4


def test_joined_flags_switches_and_seeds_in_values(easy, tmp_path, unseen):
    own = ["--over", "labels+batch-size=20+4,all+8", "--over", "deterministic=on,off"]
    run(easy, tmp_path, [*own, "--name", "T"], "train_teacher.py")
    runs = sorted((tmp_path / "sweeps/T/digits").iterdir())
    assert [(c["labels"], c["batch_size"], c["deterministic"]) for c in map(config, runs)] == [
        (20, 4, False), (20, 4, True), (None, 8, False), (None, 8, True)]
    teachers = [f"{path}/best.pt".replace("-s0", "-s{seed}") for path in runs[1::2]]
    found = run(easy, tmp_path, ["--over", 'teacher="{}","{}"'.format(*teachers)], "distill.py")
    assert list(found["rows"]) == [f"teacher={path.name[:-3]}" for path in runs[1::2]]
    hashes = {config(path)["teacher_sha256"] for path in (tmp_path / "sweeps").glob("d*/d*/t*")}
    assert len(hashes) == 2
    text = (tmp_path / "sweeps" / "distill-teacher" / "sweep.md").read_text()
    assert "other teachers" not in text


def test_quoted_values_and_what_diverges(easy, tmp_path, unseen):
    """One diverges, one learns nothing: another is the best. Consistency has no teacher."""
    own = ["--over", "lr=1e-9,1e20,0.006", "--name", "L"]
    found = run(easy, tmp_path, own, "train_student.py", "--image-size", 16, epochs=4)
    assert found["best"] == "lr=0.006" and list(found["rows"]) == ["lr=1e-9", "lr=0.006"]
    text = (tmp_path / "sweeps" / "L" / "sweep.md").read_text()
    for part in ("1 learned nothing |", "| lr=1e20 | 0 | - | - | diverged |",
                 "Best by validation: lr=0.006."):
        assert text.count(part) == 1, part
    own = ["--over", 'noise="0.5,0,0.15,0","0,0,0,0"', "--name", "N"]
    run(easy, tmp_path, own, "distill.py", "--objective", "consistency", "--ema-decay", 0.5)
    made = config(tmp_path / "sweeps/N/digits/noise=0.5,0,0.15,0-s0")
    assert made["noise"] == [0.5, 0, 0.15, 0]


@pytest.mark.parametrize("text", ["alpha", "alpha=", "alpha+lr=1+1,1", "seed=0,1"])
def test_wrong_values(text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        sweep.over(text)
    assert repr(text) in str(error.value) and "--seeds" in str(error.value)


def test_what_is_wrong_is_told_before_anything_is_trained(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path)
    for own, script, *parts in (
            (["alpha=0.1,2"], ["distill.py", "--teacher", "ema", *words], "--alpha", "'2'"),
            (["alpha=1", "--seeds", "3"], ["distill.py", *words], "teacher-s3/best.pt"),
            (["alpha=1", "--seeds", "0,a"], ["distill.py"], "'0,a'", "0,1,2"),
            (["compile=1"], ["train_student.py"], "--compile"),
            ([f"data-dir={easy},{easy}/"], ["train_student.py", *words], "data-dir=easy"),
            (["alpha=1", "--name", "a/b"], ["distill.py", *words], "--name"),
            (["alpha=1"], ["calc.py"], "calc.py", "train_student.py"),
            (["alpha=1"], [], "SCRIPT")):
        tiny.refused(capsys, sweep, ["--over", *own, "--", *script], *parts)
    tiny.refused(capsys, sweep, ["--", "distill.py"], "--over")
    assert not list(tmp_path.iterdir())
