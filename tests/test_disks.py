"""Disks and memory that give out: one line that names the file or the sizes, and nothing finished
is lost.
"""
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common
import data
import distill
import files
import runs
import train_student

HOUSE = Path(common.__file__).parent
RUN = "digits/student-s0"


# ---- disks that give out ----------------------------------------------------------------------

def child(words, prepare="", environment=()):
    """Run train_student (or what prepare calls script) in a process of its own, after some
    lines."""
    code = f"import resource, sys, distill, train_student\nscript = train_student\n{prepare}\n" \
           "script.main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=HOUSE, text=True,
                          capture_output=True, env=os.environ | dict(environment))


def one_line(done, *parts):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert str(part) in done.stderr, done.stderr


def test_a_file_that_may_not_grow_ends_the_run_and_resume_goes_on(easy, tmp_path):
    """A limit on the size of files stands for a full disk: the kernel refuses to write."""
    words = tiny.words(easy, tmp_path / "cut", epochs=3)
    limit = ("resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**4, -1))\n"
             "import atexit\n"      # what measures coverage writes at the end
             "atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, (-1, -1))")
    tiny.run(train_student, easy, tmp_path / "cut", epochs=1)       # the arrays are kept now
    shutil.rmtree(tmp_path / "cut")
    one_line(child(words, limit), tmp_path / "cut" / RUN / "best.pt", "too large", "--resume")
    assert sorted(p.name for p in (tmp_path / "cut" / RUN).iterdir()) == ["config.json"]
    tiny.run(train_student, easy, tmp_path / "cut", "--resume", epochs=3)
    tiny.run(train_student, easy, tmp_path / "whole", epochs=3)
    assert tiny.same(tiny.outcome(tmp_path / "cut" / RUN), tiny.outcome(tmp_path / "whole" / RUN))


@pytest.mark.parametrize("file", ["best.pt", "metrics.csv", "checkpoint.pt", "test.npz",
                                  "final.json", "curves.png", runs.SUMS])
def test_a_disk_that_is_full_at_any_file_leaves_the_last_state(easy, tmp_path, capsys, monkeypatch,
                                                               file):
    """What a full disk does to each file in turn, in its second writing where there is one."""
    words = tiny.words(easy, tmp_path / "cut", "--ema-decay", 0.9, epochs=3)
    seen, fsync = [], os.fsync

    def full(handle):
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name.removesuffix(".part")[1:]
        seen.append(name)
        if name == file and (seen.count(name) == 2 or name not in (
                "best.pt", "metrics.csv", "checkpoint.pt")):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    folder = tmp_path / "cut" / RUN
    tiny.refused(capsys, train_student, words, folder / file, "No space left", "--resume")
    monkeypatch.setattr(os, "fsync", fsync)
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    assert not (folder / "final.json").exists()
    kept = len(tiny.load(folder / "checkpoint.pt")["history"])
    assert kept == (1 if file in ("best.pt", "metrics.csv", "checkpoint.pt") else 3)
    train_student.main([*words, "--resume"])
    train_student.main(tiny.words(easy, tmp_path / "whole", "--ema-decay", 0.9, epochs=3))
    assert tiny.same(tiny.outcome(folder), tiny.outcome(tmp_path / "whole" / RUN))


def test_a_stop_while_a_file_is_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    files.write_whole(tmp_path / "final.json", b"old")
    monkeypatch.setattr(runs.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "final.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["final.json"]
    assert (tmp_path / "final.json").read_bytes() == b"old"


def test_a_small_file_system_that_runs_full(easy, tmp_path):
    """A real one of 300 kB, in which five checkpoints' worth of files do not fit."""
    script = textwrap.dedent("""
        mount -t tmpfs -o size=300k tutor "$1" && shift || exit 77
        "$@" --arch digits-teacher --augment none --weight-decay 0; code=$?
        ls -A "$0" >&2; exit $code""")
    (tmp_path / "small").mkdir()
    words = tiny.words(easy, tmp_path / "small")
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, tmp_path / "small" / RUN, tmp_path / "small",
             sys.executable, "train_student.py", *words], cwd=HOUSE, text=True, capture_output=True)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode in (1, 77):
        pytest.skip("no right to mount a file system here")
    assert done.returncode == 2, done.stderr
    error, *left = done.stderr.splitlines()
    assert error.startswith(f"error: {tmp_path / 'small' / RUN}") and "No space left" in error
    assert "--resume" in error and "config.json" in left
    assert not [name for name in left if name.endswith(".part")], left


def test_a_folder_that_vanishes_ends_the_run(easy, tmp_path, capsys, monkeypatch):
    def vanish(model, batch, whole=train_student.hard_loss):
        if batch.epoch == 2:
            shutil.rmtree(tmp_path / "digits", ignore_errors=True)
        return whole(model, batch)

    monkeypatch.setattr(train_student, "hard_loss", vanish)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), tmp_path / RUN,
                 "No such file or directory", "its folder is gone")
    assert not list(tmp_path.glob("digits*"))


def test_two_processes_that_write_one_file_leave_it_whole(tmp_path, monkeypatch):
    """The other one begins and ends while this one is about to move its file into place."""
    path, replace = tmp_path / "report.md", os.replace

    def late(aside, whole):
        code = "import files, pathlib, sys; files.write_whole(pathlib.Path(sys.argv[1]), b'b')"
        subprocess.run([sys.executable, "-c", code, path], cwd=HOUSE, check=True)
        assert path.read_bytes() == b"b"
        replace(aside, whole)

    monkeypatch.setattr(os, "replace", late)
    files.write_whole(path, b"aa")
    assert path.read_bytes() == b"aa" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_the_teachers_outputs_are_kept(easy, results, capsys, monkeypatch):
    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")        # NumPy names no file

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    line = tiny.refused(capsys, distill, tiny.words(easy, results, "--views", 1), "No space left",
                        results / "digits" / ".teacher", ".part: ", "goes on")
    assert "gone" not in line and not (results / "digits" / "kd-s0").exists()
    assert not (results / "digits" / ".teacher").exists()


def test_ctrl_c_while_the_teachers_outputs_are_kept_leaves_none(easy, results, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.Batches, "look", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(distill, easy, results, "--views", 1)
    assert not (results / "digits" / ".teacher").exists()


@pytest.mark.parametrize("place, part", [("/dev/null", "not a folder"), ("file", "not a folder")])
def test_a_dry_run_looks_whether_there_is_a_place(easy, tmp_path, capsys, place, part):
    (tmp_path / "file").touch()
    words = tiny.words(easy, tmp_path / place, "--dry-run")
    tiny.refused(capsys, train_student, words, f"{tmp_path / place}: {part}", "--results-dir")


# ---- memory that gives out --------------------------------------------------------------------

def test_a_batch_too_large_for_the_memory_names_it(easy, tmp_path):
    """A limit on data, which a mapped data set does not count in, and 0.5 GB for one layer."""
    words = tiny.words(easy, tmp_path, "--arch", "cifar10-he-max-teacher", "--image-size", 128,
                       "--batch-size", 60, epochs=1)
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9,) * 2)"
    one_line(child(words, limit), "out of memory", "batches of 60 images of 3×128×128",
             "lower --batch-size")


def test_memory_that_is_gone_to_the_last_byte_leaves_room_for_the_line():
    code = """if True:
        import resource, sys
        from types import SimpleNamespace
        sys.path.insert(0, ".")
        import device
        with device.guard(SimpleNamespace(batch_size=4, image_size=8, dataset="digits")):
            resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9,) * 2)
            size, kept = 2**28, []
            while size > 16:
                try:
                    kept.append(bytearray(size))
                except MemoryError:
                    size //= 2
            kept = [kept, [[] for _ in range(10**9)]]
    """
    one_line(subprocess.run([sys.executable, "-c", code], cwd=HOUSE, text=True,
                            capture_output=True), "out of memory", "batches of 4 images")


def test_pictures_that_lack_memory_are_told(easy, tmp_path, capsys, monkeypatch):
    def lacking(*_):
        raise ValueError("quantization error")      # PIL's word for it

    monkeypatch.setattr(Image.Image, "quantize", lacking)
    with pytest.raises(SystemExit) as stop:
        train_student.main(tiny.words(easy, tmp_path, epochs=1))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "out of memory" in line


def test_a_disk_that_turns_read_only_is_told_by_the_file_that_was_to_be(tmp_path, monkeypatch):
    def read_only(path, **_):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match="Read-only") as error:
        files.write_whole(tmp_path / "best.pt", b"1")
    assert error.value.filename == str(tmp_path / "best.pt")


@pytest.mark.parametrize("fault, lacks", [
    ("raise MemoryError", True), ("raise OSError('Cannot allocate memory')", True),
    ("raise ImportError('libc10.so: failed to map segment from shared object')", True),
    ("try: 1 / 0\nexcept ZeroDivisionError: raise MemoryError", True),
    ("try: raise MemoryError\nexcept MemoryError: raise AttributeError('no _C')", True),
    ("raise AttributeError('no _C')", False)])
def test_where_there_is_no_room_to_load_pytorch_a_line_says_so(tmp_path, fault, lacks):
    """What PyTorch's own import raises then; anything else keeps its traceback."""
    (tmp_path / "torch.py").write_text(fault)
    done = subprocess.run([sys.executable, "train_student.py"], cwd=HOUSE, text=True,
                          capture_output=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    if lacks:
        one_line(done, "out of memory", "loaded")
    else:
        assert done.returncode == 1 and "Traceback" in done.stderr and "no _C" in done.stderr


@pytest.mark.parametrize("kind, text, parts", [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total "
     "capacity of 7.79 GiB", ["out of memory: 2.50 GiB", "batches of 16 images of 3×16×16",
                              "lower --batch-size"]),
    (RuntimeError, "could not create a primitive", ["out of memory", "lower --batch-size"]),
    (RuntimeError, "can't start new thread", ["out of memory", "lower --batch-size"]),
    (lambda text: OSError(12, text, "/lib/api.py"), "Cannot allocate memory", ["out of memory"]),
    (RuntimeError, "integer out of range", [
        "a kernel of PyTorch can count (integer out of range)", "batches of 16 images of 3×16×16",
        "lower --batch-size"]),
    (RuntimeError, "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation,"
     " but you set 'torch.use_deterministic_algorithms(True)'. You can …",
     ["--deterministic: adaptive_max_pool2d_backward_cuda", "leave --deterministic out"])])
def test_what_a_device_cannot_do_is_told(easy, tmp_path, capsys, monkeypatch, kind, text, parts):
    """What PyTorch raises there, as no GPU is at hand here, nor always the same lack of memory."""
    def full(*_):
        raise kind(text)

    monkeypatch.setattr(train_student, "hard_loss", full)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), *parts)
