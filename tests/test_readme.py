"""The README, taken at its word: its commands run, made tiny; tables and links are not stale."""
import importlib
import re
import shlex
import subprocess
import sys

import pytest
import tiny
from tiny import ROOT, make

import report

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
PYTHON = [line for line in LINES if re.match(r"python \w+\.py", line)]
MAKE = [line for line in LINES + re.findall(r"`(make [^`]*)`", README)
        if line.startswith("make ")]
TRAINING = {"train_teacher", "train_student", "distill"}


def test_there_are_commands_to_try():
    assert len(PYTHON) >= 10 and len(MAKE) >= 4


def test_every_python_command_runs(easy, chain, tmp_path, monkeypatch, capsys):
    """In the README's order, in one folder, as a reader types them."""
    tiny.copy_teacher(chain[0], tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    picture = next((easy / "test" / "red").iterdir())
    (tmp_path / "photo.png").write_bytes(picture.read_bytes())
    done = set()
    for line in PYTHON:
        script, *words = shlex.split(line.replace("DIR", shlex.quote(str(easy))))[1:]
        script = script.removesuffix(".py")
        if line in done:
            continue
        done.add(line)
        if script in TRAINING:
            words += tiny.words(easy, tmp_path / "results", epochs=1)
            words.append("--resume" if script != "train_teacher" else "--overwrite")
        if "sweep" in words:
            words += tiny.words(easy, tmp_path / "results", epochs=1)
        if script == "data":
            words += ["--image-size", "16", "--out", str(tmp_path / "grid.png")]
        result = importlib.import_module(script).main(words)
        assert result, line
    capsys.readouterr()
    assert (tmp_path / "results/digits/kd-s0/final.json").exists()


def test_every_make_command_names_a_target():
    for line in MAKE:
        words = shlex.split(line.replace("`", ""))[1:]
        dry = make("-n", *words, "VENV=", f"PYTHON={sys.executable}")
        assert dry.returncode == 0, f"{line}: {dry.stderr}"


def test_make_all(easy, tmp_path):
    """The whole chain as subprocesses; then kept, and refused where a variable differs."""
    flags = "--image-size 16 --batch-size 16 --lr 0.01 --val-fraction 0.25 --precision fp32"
    words = ["VENV=", f"PYTHON={sys.executable}", f"RESULTS={tmp_path}", "DATASET=folder",
             f"DATA_DIR={easy}", f"FLAGS={flags}", "DEVICE=cpu"]
    ran = make("all", *words, f"EPOCHS={tiny.ENOUGH}")
    assert ran.returncode == 0, ran.stderr
    finished = {path.parent.name for path in tmp_path.glob("digits/*/final.json")}
    assert finished == set(tiny.SIX)
    shown = ran.stdout.splitlines()
    assert shown[-1].endswith("comparison.png") and shown[-2].endswith("report.md")
    table = shown[-40:]
    for label in ("teacher", "student alone", "kd", "kd-only", "mean teacher, student",
                  "mean teacher, average", "mean teacher, no EMA"):
        assert any(line.startswith(label + " ") for line in table), label
    assert all(len(line) <= 80 for line in shown if not line.startswith(sys.executable)
               and str(tmp_path) not in line)

    kept = make("student", *words, f"EPOCHS={tiny.ENOUGH}")
    assert kept.returncode == 0 and "kept" in kept.stdout
    refused = make("student", *words, "EPOCHS=1")
    assert refused.returncode != 0
    assert f"epochs {tiny.ENOUGH} (asked for: 1)" in refused.stderr


def test_make_clean_spares_what_is_published(tmp_path):
    for folder in ("results/published/digits", "results/digits", ".venv"):
        (tmp_path / folder).mkdir(parents=True)
    ran = subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "results/published/digits").is_dir()
    assert not (tmp_path / "results/digits").exists() and not (tmp_path / ".venv").exists()


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.M)
    shown = make("help").stdout
    for target in targets:
        assert re.search(rf"^  {target} ", shown, re.M) or target == "help", target
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_tables_are_not_stale():
    assert report.main(["readme", "--check", "--readme", str(ROOT / "README.md"),
                        "--results-dir", str(ROOT / "results")])["changed"] is False


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()
