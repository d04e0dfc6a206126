"""Files that are not as they were written: one line that names the file, and nothing finished is
lost.
"""
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch

import common
import compare
import distill
import files
import look
import readers
import report
import runs
import train_student

RUN = "digits/student-s0"


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


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
                 "not what SHA256SUMS says")


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
    path.write_text(json.dumps(files.read_json(path) | changed))
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
    path.write_text("[]" if changed is None else json.dumps(files.read_json(path) | changed))
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
    path.write_text(json.dumps(files.read_json(path) | changed))
    tiny.refused(capsys, report, ["--results-dir", copy.parent.parent], path)


@pytest.mark.parametrize("changed", [
    dict(dataset=["x"]), dict(data_dir=5), dict(data_dir=None),
    dict(teacher=5, teacher_sha256="a" * 64)])
def test_a_page_names_an_odd_config(copy, capsys, changed):
    path = copy / "config.json"
    path.write_text(json.dumps(files.read_json(path) | changed))
    tiny.refused(capsys, look, [copy], path, "no text")


@pytest.mark.parametrize("table", [
    np.zeros((1, 6, 4), np.float32), np.zeros((2, 6, 4), ">f4"),
    np.zeros((2, 6, 4), object), np.zeros((2, 6, 4), np.int16), None])
def test_outputs_of_a_teacher_that_fit_their_sum_alone(tmp_path, capsys, table):
    """Made by hand: the sum is right, and the content is none."""
    aside = tmp_path / "aside.npy"
    good = np.ones((2, 6, 4), np.float32)
    np.save(aside, good if table is None else table, allow_pickle=True)
    path = tmp_path / f"key-{files.crc(aside):08x}.npy"
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
    assert not files.HELD


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


@pytest.mark.filterwarnings("ignore:Data type alias")
def test_any_flipped_bit_in_a_header_of_numbers_is_noticed_or_harmless(tmp_path, capsys):
    """NumPy reads such a header as Python does, and bits that have flipped lead to errors of half a
    dozen kinds."""
    labels, table = np.arange(6) % 2, np.ones((2, 6, 4), np.float32)
    images = np.zeros((6, 4, 4, 3), np.uint8)
    readers.cached_arrays(tmp_path / "arrays", lambda: (
        dict.fromkeys(("train", "test"), (images, labels)), ["a", "b"]))
    np.save(tmp_path / "table.npy", table)
    one, raised = tmp_path / f"key-{files.crc(tmp_path / 'table.npy'):08x}.npy", set()
    for path, read in ((tmp_path / "arrays" / "train_labels.npy", readers.mapped),
                       (one, lambda where: distill.whole_cache(
                           where.parent, "key", (2, 6, 4), np.float32))):
        good = (tmp_path / "table.npy" if path == one else path).read_bytes()
        for bit in (*range(1024), None):
            path.write_bytes(b"PK\3\4" + good[4:] if bit is None else flipped(good, bit))
            try:
                np.load(path)
            except Exception as error:
                raised.add(type(error))
            found = read(tmp_path / "arrays")
            if path != one and found:           # of the spaces that fill it
                assert np.array_equal(found[0]["train_labels"], labels)
            assert path != one or not found and not path.exists()
        path.write_bytes(good)
        assert read(tmp_path / "arrays")
    assert len(raised) > 3      # else this test shows nothing


@pytest.mark.parametrize("name", ["config.json", "final.json", "metrics.csv", runs.SUMS, "test.npz",
                                  "best.pt", "checkpoint.pt"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_what_is_no_file_in_a_run_is_named_and_not_waited_for(
        chain, easy, tmp_path, capsys, name, kind):
    folder = tmp_path / "digits" / "student-s0"
    shutil.copytree(chain[0] / "digits" / "student-s0", folder)
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(kind)
    again = tiny.words(easy, tmp_path, "--resume", epochs=tiny.ENOUGH)
    if name not in ("best.pt", "checkpoint.pt"):        # of which the report reads nothing
        tiny.refused(capsys, report, ["--recipe", "digits", "--results-dir", tmp_path],
                     folder / name)
    if name in ("best.pt", "config.json"):
        tiny.refused(capsys, look, [folder], folder / name)
    if name in ("config.json", "final.json", runs.SUMS):
        tiny.refused(capsys, train_student, again, folder / name)
    if name == "checkpoint.pt":
        (folder / "final.json").unlink()
        tiny.refused(capsys, train_student, again, folder / name, "no plain file")


def test_a_link_in_the_place_of_a_part_is_not_followed(chain, easy, tmp_path):
    """A stranger's folder may hold one, to a file of the user's."""
    folder, mine = tmp_path / "digits" / "student-s0", tmp_path / "mine"
    shutil.copytree(chain[0] / "digits" / "student-s0", folder)
    mine.write_text("precious")
    (folder / "final.json").unlink()
    for name in runs.RUN_FILES:
        (folder / f".{name}.part").symlink_to(mine)
    tiny.run(train_student, easy, tmp_path, "--resume", epochs=tiny.ENOUGH, curves=True)
    assert mine.read_text() == "precious" and (folder / "final.json").is_file()


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


def test_outputs_are_not_removed_for_a_lack_of_memory(easy, results, capsys, monkeypatch):
    words = tiny.words(easy, results, "--views", 1, "--cache", epochs=1)
    distill.main(words)
    (kept,) = (results / "digits" / ".teacher").glob("*.npy")

    def lacking(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(distill, "read_array", lacking)
    tiny.refused(capsys, distill, [*words, "--overwrite"], "out of memory", "end other programs")
    assert kept.exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc here")
def test_a_file_that_cannot_be_read_at_all_is_named(capsys):
    tiny.refused(capsys, look, ["predict", "/proc/self/mem", "x.png"], "/proc/self/mem")


def test_checksums_that_are_cut_short_are_named_themselves(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path, epochs=1)
    tiny.run(train_student, easy, tmp_path, epochs=1)
    sums = tmp_path / "digits" / "student-s0" / "SHA256SUMS"
    whole = sums.read_bytes()
    for size in (*range(0, len(whole) - 2, 9), len(whole) - 2):
        sums.write_bytes(whole[:size])
        tiny.refused(capsys, train_student, words, f"{sums}: cut short or damaged", "--overwrite")
    sums.write_bytes(whole.replace(b"best.pt", b"bestXpt"))
    tiny.refused(capsys, report, ["--results-dir", tmp_path], f"{sums}: cut short or damaged")


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
