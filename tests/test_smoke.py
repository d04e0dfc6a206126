"""Every script and every Make target, tiny, as a user types them."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny

PLAIN = ("VENV=", f"PYTHON={sys.executable}", f"BASE={sys.executable}")


@pytest.fixture(scope="module")
def made(easy, tmp_path_factory):
    """`make all` on the easy folder, in results that the tests here share."""
    results = tmp_path_factory.mktemp("made")
    return results, make(easy, results, "all")


def make(easy, results, *words, **options):
    return tiny.make(*PLAIN, "RECIPE=digits", "DATASET=folder", f"DATA_DIR={easy}", "EPOCHS=1",
                     "BATCH_SIZE=16", f"RESULTS={results}", "FLAGS=--image-size 16 --lr 0.01",
                     *words, **options)


def finals(results):
    return {file.parent.name: file.read_bytes() for file in results.glob("digits/*/final.json")}


def test_make_all_trains_the_chain_and_reports(made):
    results, done = made
    assert done.returncode == 0, done.stderr
    assert finals(results).keys() == set(tiny.SIX)
    printed = done.stdout.splitlines()
    for name in tiny.SIX:       # a line a run
        assert sum(line.startswith(f"{name}: test ") for line in printed) == 1
    assert any(line.startswith("kd - student alone:") for line in printed)
    assert max(map(len, printed)) <= 80 or all("/" in line for line in printed if len(line) > 80)
    for file in ("report.md", "report.json", "comparison.png", "details.png"):
        assert (results / "digits" / file).exists()


def test_a_second_make_all_prints_again_and_trains_nothing(made, easy):
    results, first = made
    before = finals(results)
    done = make(easy, results, "all")
    assert done.returncode == 0, done.stderr
    assert finals(results) == before
    report = first.stdout[first.stdout.index("kd - student alone"):]
    assert report in done.stdout
    assert "kept" not in done.stdout        # the scripts were not even started


def test_other_settings_are_never_kept_silently(made, easy):
    results, _ = made
    before = finals(results)
    done = make(easy, results, "student", "EPOCHS=2")
    assert done.returncode == 2
    assert "finished with other settings: epochs 1 (asked for: 2)" in done.stderr
    assert finals(results) == before
    assert make(easy, results, "student").returncode == 0       # what was there is still kept


def test_a_failed_run_ends_the_chain_with_its_own_line(easy, tmp_path):
    done = make(easy, tmp_path, "all", "-j1", "FLAGS=--image-size 16 --lr 1e30")
    assert done.returncode != 0
    assert re.search("^error: the (loss|norm of the weights) is (nan|inf)", done.stderr, re.M)
    assert not (tmp_path / "digits" / "report.md").exists()


def test_one_after_the_other_gives_the_bits_of_side_by_side(made, easy, tmp_path):
    results, _ = made
    env = dict(os.environ, OMP_NUM_THREADS="1")     # as make all has it
    done = make(easy, tmp_path, "-j1", "objective", "OBJECTIVE=kd-only", env=env)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout       # a run that is asked for alone says all
    assert finals(tmp_path).keys() == {"teacher-s0", "kd-only-s0"}
    for name in finals(tmp_path):
        one, other = (json.loads((place / "digits" / name / "final.json").read_text())
                      for place in (results, tmp_path))
        assert one["weights_sha256"] == other["weights_sha256"]


def test_a_folder_with_a_space_is_refused_in_one_line(easy):
    done = tiny.make(*PLAIN, "all", "RESULTS=two words")
    assert done.returncode == 2 and "RESULTS=two words: give a folder without spaces" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_report_html_publish_and_a_sweep(made, easy, tmp_path):
    results, _ = made
    shutil.copytree(results, tmp_path / "results")
    for words in (["report"], ["html"], ["publish"],
                  ["sweep-ema", "SEEDS=0", "DECAYS=0,0.9"], ["publish", "SWEEP=distill-ema-decay"]):
        done = make(easy, tmp_path / "results", *words)
        assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "results" / "report.html").stat().st_size > 10_000
    published = tmp_path / "results" / "published"
    assert (published / "digits" / "kd-s0" / "metrics.csv").exists()
    assert not list(published.rglob("*.pt"))
    assert (published / "sweeps" / "distill-ema-decay" / "sweep.md").exists()


def test_a_data_set_without_a_recipe_has_its_own_folder(easy, tmp_path):
    done = tiny.make(*PLAIN, "student", "DATASET=folder", f"DATA_DIR={easy}", "EPOCHS=1",
                     f"RESULTS={tmp_path}", "FLAGS=--image-size 16 --arch digits-student")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "folder" / "student-s0" / "final.json").exists()


def test_help_fits_one_screen():
    done = tiny.make(*PLAIN, "help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    for target in ("all", "stats", "sweep-alpha", "test", "cifar10-he-max"):
        assert target in done.stdout


@pytest.mark.parametrize("target", ["reports", "stats", "teachers", "sweep-alpha", "sweep-labels",
                                    "sweep-epochs", "sweep-views", "sweep-mlp", "bench", "soak",
                                    "evidence", "notebook", "coverage", "lint", "clean"])
def test_every_target_is_a_plan_that_make_accepts(target, tmp_path):
    done = tiny.make(*PLAIN, "-n", target, f"RESULTS={tmp_path}")
    assert done.returncode == 0 and done.stdout, done.stderr


def test_scripts_that_read_or_explain(made, tmp_path):
    results, _ = made
    for words in (["recipes.py"], ["data.py", "--data-dir", tmp_path, "--show", "8"],
                  ["calc.py", "shape", "3x32x32", "conv:8,k=3", "max:2", "fc:10"],
                  ["look.py", results / "digits" / "kd-s0", "--out",
                   tmp_path / "look.html"]):
        done = subprocess.run([sys.executable, tiny.ROOT / words[0], *map(str, words[1:])],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "digits.png").exists() and (tmp_path / "look.html").exists()
