"""Disks and memory that give out, files that are not as they were written: one line that names the
file, and nothing finished is lost.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch

import common
import compare
import distill
import look
import models
import readers
import report
import runs
import train_student

HOUSE = Path(common.__file__).parent
RUN = "digits/student-s0"


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


# ---- damaged files ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def done(easy, tmp_path_factory):
    """A finished run with an average, and what its files were."""
    results = tmp_path_factory.mktemp("done")
    tiny.run(train_student, easy, results, "--ema-decay", 0.9, epochs=2)
    return results / RUN


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done.parent.parent, tmp_path / "r")
    return tmp_path / "r" / RUN


def test_damaged_outputs_are_named_or_as_they_were(copy, capsys):
    """numpy and zlib raise errors of many kinds."""
    path, own = copy / "test.npz", compare.read_outputs(copy)
    data, rng, named = path.read_bytes(), np.random.default_rng(0), 0
    for bit in rng.choice(8 * len(data), 300, replace=False):
        path.write_bytes(flipped(data, bit))
        try:
            found = compare.read_outputs(copy)
            assert all(np.array_equal(*pair) for pair in zip(found, own, strict=True)), bit
        except SystemExit as stop:
            line = capsys.readouterr().err
            assert stop.code == 2 and line.startswith(f"error: {path}: ") and line.count("\n") == 1
            named += 1
    assert named > 50
    for size in (0, 100):
        path.write_bytes(data[:size])
        with pytest.raises(SystemExit):
            compare.read_outputs(copy)
    for odd in (dict(labels=np.zeros(3)), dict(labels=np.zeros(5), ema_logitt=np.zeros((5, 4))),
                dict(labels=np.full(5, -1)), dict(labels=np.full(5, 4))):
        np.savez(path, **dict(logits=np.zeros((5, 4))) | odd)
        with pytest.raises(SystemExit):
            compare.read_outputs(copy)


def test_outputs_that_unpack_to_any_size_are_not_read(copy, capsys):
    np.savez_compressed(copy / "test.npz", logits=np.zeros((2**28, 4), "i1"), labels=np.zeros(1))
    capsys.readouterr()
    with pytest.raises(SystemExit), mock.patch.object(np, "load", side_effect=AssertionError):
        compare.read_outputs(copy)
    line = capsys.readouterr().err
    assert "test.npz" in line and "unpacks to 1,073,74" in line and line.count("\n") == 1, line


def test_a_picture_that_was_cut_is_named(easy, tmp_path, capsys):
    tiny.run(train_student, easy, tmp_path, curves=True)
    path = tmp_path / RUN / "curves.png"
    path.write_bytes(path.read_bytes()[:3000])
    for command in ("html", "publish"):
        tiny.refused(capsys, report, [command, "--results-dir", tmp_path], path, "remove it")
    path.unlink()
    assert report.main(["html", "--results-dir", str(tmp_path)])


def test_outputs_that_were_exchanged_are_not_reported(copy, capsys):
    np.savez_compressed(copy / "test.npz", logits=np.eye(4, dtype=np.float32),
                        labels=np.arange(4))
    tiny.refused(capsys, report, ["--results-dir", copy.parent.parent], copy / "test.npz",
                 "not as the run left it")


def test_a_run_that_was_killed_while_it_ended_writes_its_metrics_again(easy, done, copy):
    for name in ("final.json", runs.SUMS, "curves.png", "test.npz"):
        (copy / name).unlink(missing_ok=True)
    (copy / "metrics.csv").write_text("epoch\n1\n")
    tiny.run(train_student, easy, copy.parent.parent, "--ema-decay", 0.9, "--resume", epochs=2)
    assert (copy / "metrics.csv").read_bytes() == (done / "metrics.csv").read_bytes()
    assert runs.altered(copy, ("metrics.csv", "best.pt", "test.npz")) == []


@pytest.mark.parametrize("changed", [
    dict(versions=None), dict(versions="x"), dict(before=7), dict(before={"a": 1})])
def test_an_odd_config_is_named_where_a_run_goes_on(easy, copy, capsys, changed):
    for name in ("final.json", runs.SUMS):
        (copy / name).unlink()
    path = copy / "config.json"
    path.write_text(json.dumps(runs.read_json(path) | changed))
    words = tiny.words(easy, copy.parent.parent, "--ema-decay", 0.9, "--resume", epochs=2)
    tiny.refused(capsys, train_student, words, path, "damaged", "--overwrite")


@pytest.mark.parametrize("changed", [
    dict(val_accuracy=5.0), dict(val_accuracy=1), dict(val_accuracy=-1.0), dict(seconds=-1e300),
    dict(train_accuracy=10**400), dict(train_loss=10**400)])
def test_a_history_that_cannot_be_is_not_gone_on_from(easy, copy, capsys, changed):
    """Its report would refuse the run, after hours of training."""
    for name in ("final.json", runs.SUMS):
        (copy / name).unlink()
    state = tiny.load(copy / "checkpoint.pt")
    state["history"][0] |= changed
    common.save_checkpoint(copy / "checkpoint.pt", state)
    words = tiny.words(easy, copy.parent.parent, "--ema-decay", 0.9, "--resume", epochs=2)
    tiny.refused(capsys, train_student, words, copy / "checkpoint.pt",
                 f"of {next(iter(changed))} in epoch 1")


@pytest.mark.parametrize("changed", [
    dict(train_loss=-0.0165), dict(train_loss=6.9e27), dict(lr=9.9e19)])
def test_a_history_that_a_run_may_have_is_gone_on_from(easy, copy, changed):
    """T²·KL may round below 0, and --lr be anything up to 1e30."""
    for name in ("final.json", runs.SUMS):
        (copy / name).unlink()
    state = tiny.load(copy / "checkpoint.pt")
    state["history"][0] |= changed
    common.save_checkpoint(copy / "checkpoint.pt", state)
    tiny.run(train_student, easy, copy.parent.parent, "--ema-decay", 0.9, "--resume", epochs=2)
    assert report.read_runs(copy.parent)[0][0]["history"][0] | changed == (
        report.read_runs(copy.parent)[0][0]["history"][0])


@pytest.mark.parametrize("changed", [
    dict(epochs=9), dict(arch="digits-teacher"), None, dict(epochs=2.0), dict(schema=True),
    dict(schema=0), dict(test_accuracy="x"), dict(test_accuracy=1), dict(test_accuracy=5.0)])
def test_a_final_of_another_run_is_not_kept(easy, copy, capsys, changed):
    """As a second process may leave it that trained in a folder that was removed."""
    (copy / runs.SUMS).unlink()
    path = copy / "final.json"
    path.write_text("[]" if changed is None else json.dumps(runs.read_json(path) | changed))
    words = tiny.words(easy, copy.parent.parent, "--ema-decay", 0.9, "--resume", epochs=2)
    tiny.refused(capsys, train_student, words, path, "--overwrite")


@pytest.mark.parametrize("name", ["best.pt", "metrics.csv"])
def test_a_run_whose_files_were_removed_does_not_end(easy, tmp_path, capsys, monkeypatch, name):
    whole, folder = runs.write_outputs, tmp_path / RUN

    def removed(*what):
        (folder / name).unlink()
        whole(*what)

    monkeypatch.setattr(runs, "write_outputs", removed)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), folder / name, "--resume")
    assert not (folder / "final.json").exists()
    monkeypatch.undo()
    assert tiny.run(train_student, easy, tmp_path, "--resume")["epochs"] == 2
    assert len(tiny.metrics(folder)) == 2
    assert "going on after epoch 2" in tiny.said(capsys)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text('{"seed": 7}')])
def test_a_config_that_was_removed_or_changed_is_written_again(easy, tmp_path, monkeypatch, harm):
    whole, path, was = runs.write_outputs, tmp_path / RUN / "config.json", []

    def removed(*what):
        was.append(path.read_bytes())
        harm(path)
        whole(*what)

    monkeypatch.setattr(runs, "write_outputs", removed)
    tiny.run(train_student, easy, tmp_path)
    assert path.read_bytes() == was[0]
    assert not runs.altered(path.parent, ["config.json"])


@pytest.mark.parametrize("changed", [dict(epochs=2.0), dict(schema=True), dict(schema="1")])
def test_a_report_names_odd_numbers(copy, capsys, changed):
    (copy / runs.SUMS).unlink()
    path = copy / "final.json"
    path.write_text(json.dumps(runs.read_json(path) | changed))
    tiny.refused(capsys, report, ["--results-dir", copy.parent.parent], path)


@pytest.mark.parametrize("changed", [
    dict(dataset=["x"]), dict(data_dir=5), dict(data_dir=None),
    dict(teacher=5, teacher_sha256="a" * 64)])
def test_a_page_names_an_odd_config(copy, capsys, changed):
    path = copy / "config.json"
    path.write_text(json.dumps(runs.read_json(path) | changed))
    tiny.refused(capsys, look, [copy], path, "no text")


@pytest.mark.parametrize("table", [
    np.zeros((1, 6, 4), np.float32), np.zeros((2, 6, 4), ">f4"),
    np.zeros((2, 6, 4), object), np.zeros((2, 6, 4), np.int16), None])
def test_outputs_of_a_teacher_that_fit_their_sum_alone(tmp_path, capsys, table):
    """Made by hand: the sum is right, and the content is none."""
    aside = tmp_path / "aside.npy"
    good = np.ones((2, 6, 4), np.float32)
    np.save(aside, good if table is None else table, allow_pickle=True)
    path = tmp_path / f"key-{runs.crc(aside):08x}.npy"
    aside.rename(path)
    found = distill.whole_cache(tmp_path, "key", (2, 6, 4), np.float32)
    assert (found == path) is path.exists() is (table is None)
    assert ("made anew" in capsys.readouterr().out) is (table is not None)


def test_nothing_is_written_into_a_folder_that_was_made_anew(easy, tmp_path, capsys, monkeypatch):
    """The folder of a running process is removed, and another process begins there."""
    whole, folder = runs.write_history, tmp_path / RUN

    def exchanged(path, history):
        whole(path, history)
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(runs, "write_history", exchanged)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), folder, "removed")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not runs.HELD


def test_arrays_of_another_byte_order_are_made_anew(tmp_path):
    rng = np.random.default_rng(0)
    folder, made = tmp_path / "arrays", []

    def read():
        made.append(1)
        return {split: (rng.integers(0, 256, (6, 4, 4, 3), np.uint8), np.arange(6) % 2)
                for split in ("train", "test")}, ["a", "b"]

    readers.cached_arrays(folder, read)
    readers.cached_arrays(folder, read)
    assert len(made) == 1
    path = folder / "train_labels.npy"
    path.write_bytes(path.read_bytes().replace(b"'<i8'", b"'>i8'"))
    found, _ = readers.cached_arrays(folder, read)
    assert len(made) == 2 and found["train_labels"].dtype == np.int64


def test_a_flipped_bit_in_a_checkpoint_is_named_or_harmless(easy, tmp_path, capsys):
    """torch alone reads most of them as other weights; nobody is told."""
    tiny.run(train_student, easy, tmp_path, epochs=1)
    path = tmp_path / RUN / "best.pt"
    whole, data, silent = tiny.load(path), path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 200, replace=False):
        path.write_bytes(flipped(data, bit))
        with contextlib.suppress(Exception):
            silent += not tiny.same(torch.load(path, weights_only=True), whole)
        try:
            assert tiny.same(common.load_checkpoint(path), whole), bit      # in unused bytes
        except SystemExit as stop:
            assert stop.code == 2
            line = capsys.readouterr().err
            assert line.startswith(f"error: {path}: ") and line.count("\n") == 1
    assert silent > 50      # else this test shows nothing


def test_a_checkpoint_cut_anywhere_is_named(easy, tmp_path, capsys):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    path = tmp_path / RUN / "checkpoint.pt"
    data = path.read_bytes()
    for end in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:end])
        with pytest.raises(SystemExit):
            common.load_checkpoint(path)
        assert f"{path}: cut short or damaged" in capsys.readouterr().err
    (tmp_path / RUN / "final.json").unlink()
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, "--resume", epochs=1), path,
                 "--overwrite")


@pytest.mark.parametrize("file", ["config.json", "final.json", "metrics.csv"])
def test_a_digit_changed_in_a_result_is_named(easy, tmp_path, capsys, file):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    path = tmp_path / RUN / file
    text = path.read_text()
    path.write_text(text.replace("0.", "1." if file == "metrics.csv" else "0.0", 1))
    assert path.read_text() != text
    tiny.refused(capsys, report, ["--results-dir", tmp_path], path, "--overwrite")
    if file == "final.json":
        tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, epochs=1), path)


def test_the_checksums_of_a_run_are_those_of_sha256sum(easy, tmp_path):
    tiny.run(train_student, easy, tmp_path, curves=True)
    done = subprocess.run(["sha256sum", "-c", runs.SUMS], cwd=tmp_path / RUN, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 7, done
    assert len(list((tmp_path / RUN).iterdir())) == 8


def test_a_run_of_before_there_were_checksums_is_read(easy, tmp_path):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    (tmp_path / RUN / runs.SUMS).unlink()
    assert report.main(["--results-dir", str(tmp_path)])["rows"]


@pytest.mark.parametrize("harm", [lambda data: flipped(data, 8 * 1000), lambda data: data[:-100],
                                  lambda data: b""])
def test_teachers_outputs_that_are_damaged_are_made_anew(easy, results, capsys, harm):
    finals = []
    for name in ("first", "second"):
        tiny.run(distill, easy, results, "--views", 1, "--run", name)
        (kept,) = (results / "digits" / ".teacher").glob("*.npy")
        finals.append(tiny.outcome(results / "digits" / name) | dict(kept=kept.read_bytes()))
        kept.write_bytes(harm(finals[-1]["kept"]))
    assert f"{kept}: cut short or damaged, made anew" in tiny.said(capsys)
    assert finals[0]["kept"] == finals[1]["kept"]
    assert tiny.same(finals[0]["best"], finals[1]["best"])


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

    runs.write_whole(tmp_path / "final.json", b"old")
    monkeypatch.setattr(runs.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.write_whole(tmp_path / "final.json", b"new")
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
                 "No such file or directory")
    assert not list(tmp_path.glob("digits*"))


def test_a_full_disk_while_the_teachers_outputs_are_kept(easy, results, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(results / "digits/.teacher/x.part"))

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    tiny.refused(capsys, distill, tiny.words(easy, results, "--views", 1), "No space left",
                 ".teacher")
    assert not (results / "digits" / "kd-s0").exists()


# ---- memory that gives out --------------------------------------------------------------------

def test_a_batch_too_large_for_the_memory_names_it(easy, tmp_path):
    """A limit on data, which a mapped data set does not count in, and 0.5 GB for one layer."""
    words = tiny.words(easy, tmp_path, "--arch", "cifar10-he-max-teacher", "--image-size", 128,
                       "--batch-size", 60, epochs=1)
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9,) * 2)"
    one_line(child(words, limit), "out of memory", "batches of 60 images of 3×128×128",
             "lower --batch-size")


@pytest.mark.parametrize("kind, text, parts", [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total "
     "capacity of 7.79 GiB", ["out of memory: 2.50 GiB", "batches of 16 images of 3×16×16",
                              "lower --batch-size"]),
    (RuntimeError, "integer out of range", [
        "a kernel of PyTorch can count (integer out of range)", "batches of 16 images of 3×16×16",
        "lower --batch-size"]),
    (RuntimeError, "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation,"
     " but you set 'torch.use_deterministic_algorithms(True)'. You can …",
     ["--deterministic: adaptive_max_pool2d_backward_cuda", "leave --deterministic out"])])
def test_what_a_gpu_cannot_do_is_told(easy, tmp_path, capsys, monkeypatch, kind, text, parts):
    """What PyTorch raises there, as no GPU is at hand here."""
    def full(*_):
        raise kind(text)

    monkeypatch.setattr(train_student, "hard_loss", full)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), *parts)


# ---- numbers ----------------------------------------------------------------------------------

def test_the_layer_of_the_largest_gradient_is_named(easy, tmp_path, capsys, monkeypatch):
    """A loss of which one layer has nearly all the gradient, until it overflows."""
    def spoiled(model, batch, whole=train_student.hard_loss):
        loss, logits = whole(model, batch)
        weights = dict(model.named_parameters())["features.3.weight"]
        scale = float("inf") if batch.epoch == 2 else 1e4
        return loss + scale * weights.square().sum(), logits

    monkeypatch.setattr(train_student, "hard_loss", spoiled)
    words = tiny.words(easy, tmp_path, "--lr", 1e-5, "--schedule", "constant")
    line = tiny.refused(capsys, train_student, words, "epoch 2, step 1, learning rate 1e-05",
                        "features.3.weight", "epoch 1 is kept", code=3)
    assert "features.0" not in line


@pytest.mark.parametrize("flags", [("--val-fraction", 0), ()])
def test_weights_that_are_not_finite_after_the_last_step_are_not_kept(easy, tmp_path, capsys,
                                                                      monkeypatch, flags):
    """No loss has seen them yet, and without validation images none would before the test."""
    steps = []

    class Spoiled(torch.optim.AdamW):
        def step(self):
            super().step()
            steps.append(1)
            if len(steps) == 2 * self.steps:
                self.param_groups[1]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim, "AdamW", Spoiled)
    Spoiled.steps = 10 if flags else 7
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, *flags),
                 "the norm of the weights is nan at epoch 2, step", "epoch 1 is kept", code=3)
    assert len(steps) == 2 * Spoiled.steps
    assert len(tiny.load(tmp_path / RUN / "checkpoint.pt")["history"]) == 1


def test_a_loss_on_test_that_is_not_finite_is_no_result(easy, tmp_path, capsys, monkeypatch):
    def evaluate(model, batches, *rest, whole=common.evaluate):
        found = whole(model, batches, *rest)
        return found | dict(loss=float("inf")) if len(batches) == 80 else found

    monkeypatch.setattr(common, "evaluate", evaluate)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path),
                 "the loss of the model on test is inf", "--lr", code=3)
    assert not (tmp_path / RUN / "final.json").exists()


@pytest.mark.parametrize("images, said", [
    (40, "the average's validation loss is nan at epoch 1"), (80, "the loss of the ema on test")])
def test_an_average_whose_loss_is_not_finite_is_no_result(easy, tmp_path, capsys, monkeypatch,
                                                          images, said):
    def evaluate(model, batches, *rest, whole=common.evaluate):
        average = not next(model.parameters()).requires_grad
        found = whole(model, batches, *rest)
        return found | dict(loss=float("nan")) if average and len(batches) == images else found

    monkeypatch.setattr(common, "evaluate", evaluate)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, "--ema-decay", 0.9), said,
                 "--lr", code=3)
    assert not (tmp_path / RUN / "final.json").exists()


def test_statistics_that_are_not_finite_are_not_kept(easy, tmp_path, capsys, monkeypatch):
    """Of BatchNorm: what is divided by them is finite, and its best.pt would be refused."""
    def spoiled(args, model, *rest, whole=common.train_epoch):
        found = whole(args, model, *rest)
        if rest[4]:         # updates before this epoch
            dict(model.named_buffers())["features.1.running_var"].fill_(float("inf"))
        return found

    monkeypatch.setattr(common, "train_epoch", spoiled)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, "--norm", "batch"),
                 "the running variance is nan at epoch 2", "epoch 1 is kept", code=3)


def test_large_statistics_stop_nothing(easy, tmp_path, monkeypatch):
    """Their square would not be finite in float32."""
    def large(args, model, *rest, whole=common.train_epoch):
        found = whole(args, model, *rest)
        dict(model.named_buffers())["features.1.running_var"].fill_(1e30)
        return found

    monkeypatch.setattr(common, "train_epoch", large)
    assert tiny.run(train_student, easy, tmp_path, "--norm", "batch")["epochs"] == 2


class Fixed(torch.nn.Module):
    def forward(self, x):
        return x


def test_ten_million_rows_are_counted_exactly():
    """More than float32 can count: it has 24 bits, and a sum of ones stops at 16 777 216."""
    size, batches = 100_000, 200
    logits = torch.zeros(size, 2)
    logits[:, 1] = torch.arange(size) % 7 == 0
    labels = torch.ones(size, dtype=torch.int64)
    labels[5] = -1
    found = common.evaluate(Fixed(), ((logits, labels) for _ in range(batches)))
    hits = int((logits[:, 1] > 0)[labels >= 0].sum()) * batches
    assert found["n"] == (size - 1) * batches > 2**24
    assert found["accuracy"] == float(Fraction(hits, found["n"]))
    each = torch.nn.functional.cross_entropy(logits.double(), labels.clamp(min=0),
                                             reduction="none")[labels >= 0].sum()
    assert found["loss"] == pytest.approx(each.item() * batches / found["n"], rel=1e-6)


def test_a_teacher_with_weights_that_are_not_finite_is_refused(easy, results, capsys):
    path = results / "digits/teacher-s0/best.pt"
    card = tiny.load(path)
    next(iter(card["model"].values()))[0, 0, 0, 0] = float("nan")
    common.save_checkpoint(path, card)
    with pytest.raises(SystemExit):
        models.load(path)
    assert f"{path}: " in capsys.readouterr().err
    tiny.refused(capsys, distill, tiny.words(easy, results), path, "not finite")
