"""--compile changes the speed, and nothing that a run leaves behind."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import common
import train_student

FLAGS = ("--ema-decay", 0.9, "--norm", "batch")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_run_learns_the_same_and_is_resumed_exactly(easy, tmp_path, monkeypatch):
    def run(name, *flags):
        tiny.run(train_student, easy, tmp_path, *FLAGS, "--run", name, *flags, epochs=3)
        return tmp_path / "digits" / name

    plain, whole = run("plain"), run("whole", "--compile")
    for one, two in zip(tiny.metrics(plain), tiny.metrics(whole), strict=True):
        for key in ("train_loss", "val_loss", "ema_val_loss"):
            assert float(one[key]) == pytest.approx(float(two[key]), rel=1e-3)
    assert tiny.load(plain / "best.pt")["model"].keys() == tiny.load(
        whole / "best.pt")["model"].keys()

    save = common.save_epoch

    def cut(folder, card, history, *rest):
        save(folder, card, history, *rest)
        if len(history) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "save_epoch", cut)
        run("cut", "--compile")
    resumed = run("cut", "--compile", "--resume")
    one, two = tiny.outcome(whole), tiny.outcome(resumed)
    assert one["final"].pop("run") != two["final"].pop("run")
    assert tiny.same(one, two)


def test_without_a_compiler_one_line_says_so(easy, tmp_path):
    words = tiny.words(easy, tmp_path, "--compile", epochs=1)
    environment = os.environ | {"CXX": str(tmp_path / "none"),
                                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, Path(common.__file__).with_name("train_student.py"),
                           *words], text=True, capture_output=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --compile: ")
    tiny.run(train_student, easy, tmp_path)     # what it advises is taken


def test_a_dry_run_says_that_it_did_not_compile(easy, tmp_path, capsys):
    for flag, told in (("--compile", "--compile was not tried"), ("--no-compile", "checked")):
        tiny.run(train_student, easy, tmp_path, "--dry-run", flag)
        assert f"{told}, no run was made" in tiny.said(capsys)
