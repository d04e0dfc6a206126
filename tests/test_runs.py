"""What a run leaves, which epoch counts, and what happens to a run's folder: runs that are
there already, other processes, disks that give out, stops, damaged files."""
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import children
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common
import data
import distill
import models
import plots
import recipes
import train_student

RUN = Path("digits/student-s0")
EMA = ("--ema-decay", 0.9)
FINAL = {       # section 5 of the design, and what was added to it
    "recipe", "run", "script", "seed", "arch", "parameters", "macs", "epochs", "best_epoch",
    "val_accuracy", "test_accuracy", "test_loss", "ema_best_epoch", "ema_val_accuracy",
    "ema_test_accuracy", "ema_last_test_accuracy", "last_test_accuracy", "learned", "seconds",
    "images_per_second", "setup_seconds", "teacher_seconds", "peak_memory_bytes", "device",
    "precision", "torch", "schema", "recomputed_val_accuracy", "recomputed_test_accuracy",
    "weights_sha256"}
METRICS = [
    "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "ema_val_loss",
    "ema_val_accuracy", "lr", "seconds", "images_per_second"]
TERMS = {
    "teacher-s0": ["labels"], "student-s0": ["labels"], "kd-s0": ["teacher", "labels"],
    "kd-only-s0": ["teacher"], "mean-teacher-s0": ["labels", "consistency"],
    "mean-teacher-no-ema-s0": ["labels", "consistency"]}


@pytest.fixture(scope="module")
def whole(easy, tmp_path_factory):
    """The outcome of three epochs that nothing disturbed, and the folder."""
    results = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda *args, **options: None)
        tiny.run(train_student, easy, results, *EMA, epochs=3)
    return tiny.outcome(results / RUN), results / RUN


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(whole[1], tmp_path / "results" / RUN)


def words(copy, easy, *flags, epochs=3):
    return tiny.words(easy, copy.parent.parent, *EMA, *flags, epochs=epochs)


# ---- what a run leaves --------------------------------------------------------------

@pytest.mark.parametrize("name", tiny.SIX)
def test_what_a_run_leaves(chain, name):
    folder, final = chain[0] / "digits" / name, chain[1][name]
    files = {"config.json", "metrics.csv", "best.pt", "checkpoint.pt", "final.json", "test.npz"}
    assert {path.name for path in folder.iterdir()} == files
    assert set(final) == FINAL and json.loads((folder / "final.json").read_text()) == final
    assert final["run"] == name and final["recipe"] == "digits" and final["learned"] is True
    assert final["val_accuracy"] > 0.9 and final["test_accuracy"] > 0.9     # chance is 0.25

    averaged = name == "mean-teacher-s0"
    for key in ("ema_best_epoch", "ema_val_accuracy", "ema_test_accuracy",
                "ema_last_test_accuracy"):
        assert (final[key] is not None) == averaged
    assert (final["teacher_seconds"] is not None) == name.startswith("kd")
    rows = tiny.metrics(folder, clocks=True)
    assert list(rows[0]) == METRICS + [f"train_{term}" for term in TERMS[name]]
    assert [row["epoch"] for row in rows] == [str(e + 1) for e in range(tiny.ENOUGH)]
    for row in rows:
        terms = sum(float(row[f"train_{term}"]) for term in TERMS[name])
        assert terms == pytest.approx(float(row["train_loss"]), rel=1e-5)
        assert (row["ema_val_accuracy"] != "") == averaged
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert final["best_epoch"] == accuracies.index(max(accuracies)) + 1
    speeds = [float(row["images_per_second"]) for row in rows]
    assert final["images_per_second"] == pytest.approx(np.median(speeds[1:]))
    assert final["seconds"] >= final["setup_seconds"] + sum(float(r["seconds"]) for r in rows)

    config = json.loads((folder / "config.json").read_text())
    assert (config["epochs"], config["batch_size"], config["lr"]) == (tiny.ENOUGH, 16, 0.01)
    assert len(config["data_key"]) == 64 and config["versions"]["torch"] == torch.__version__
    with np.load(folder / "test.npz") as outputs:
        right = (outputs["logits"].argmax(1) == outputs["labels"]).mean()
    assert right == pytest.approx(final["test_accuracy"])


@pytest.mark.parametrize("name", ["kd-s0", "mean-teacher-s0"])
def test_best_pt_alone_classifies_images(chain, easy, name):
    folder, final = chain[0] / "digits" / name, chain[1][name]
    card = tiny.load(folder / "best.pt")
    assert final["weights_sha256"] == models.weights_sha256(card["model"])
    paths = sorted(easy.glob("test/*/*.png"))
    x = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    x = torch.tensor((x - card["mean"]) / card["std"], dtype=torch.float32).permute(0, 3, 1, 2)
    y = torch.tensor([card["classes"].index(path.parent.name) for path in paths])
    for average, key in ((False, "test_accuracy"), (True, "ema_test_accuracy")):
        if final[key] is not None:
            model, _ = models.load(folder / "best.pt", average)
            right = (model(x).argmax(1) == y).float().mean().item()
            assert right == pytest.approx(final[key])
    assert models.count_parameters(model) == final["parameters"]
    assert models.count_macs(model, (3, 16, 16)) == final["macs"]


@pytest.mark.parametrize("flags", [
    ("--optimizer", "sgd", "--lr", 0.05, "--schedule", "cosine", "--norm", "batch"),
    ("--optimizer", "adam", "--weight-decay", 0, "--schedule", "constant", "--clip", 0),
    ("--activation", "ahaf", "--pool", "avg", "--precision", "bf16", "--init", "xavier"),
    ("--arch", "mlp", "--lr", 0.003)])
def test_it_learns_with_other_flags(easy, tmp_path, flags):
    final = tiny.run(train_student, easy, tmp_path, *flags, epochs=tiny.ENOUGH)
    assert final["val_accuracy"] > 0.9


def test_a_run_that_cannot_learn_says_so(noise, tmp_path, capsys):
    final = tiny.run(train_student, noise, tmp_path, "--val-fraction", 0.5, epochs=3)
    printed = tiny.said(capsys)
    assert final["learned"] is False
    assert printed.count("warning: nothing learned in 1 of 3 epochs") == 1
    assert "--init he" in printed and printed.count("learned nothing") == 1


def test_a_loss_that_is_not_finite_ends_the_run(easy, tmp_path, capsys, monkeypatch):
    def spoil(model, batch, usual=train_student.hard_loss):
        terms, logits = usual(model, batch)
        if batch.epoch == 2:
            terms["labels"] = terms["labels"] * torch.inf
        return terms, logits

    with monkeypatch.context() as patch:
        patch.setattr(train_student, "hard_loss", spoil)
        tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), "epoch 2, step 1",
                     "the state after epoch 1 is kept", tmp_path / RUN, "--lr", code=3)
    assert tiny.run(train_student, easy, tmp_path, "--resume")["epochs"] == 2


def test_curves_that_cannot_be_drawn_are_a_warning(easy, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise ValueError("no fonts")

    monkeypatch.setattr(plots, "draw_curves", fail)
    tiny.run(train_student, easy, tmp_path, epochs=1)
    assert "warning: curves.png was not drawn (no fonts)" in tiny.said(capsys)
    assert (tmp_path / RUN / "final.json").exists()


# ---- which epoch counts -------------------------------------------------------------

def fickle(folder, results, *flags, epochs):
    """A run whose validation accuracy goes up and down: on noise, at a constant rate."""
    return tiny.run(train_student, folder, results, "--schedule", "constant", "--lr", 0.003,
                    *flags, epochs=epochs)


def test_best_pt_holds_the_weights_after_the_best_epoch(noise, tmp_path):
    final = fickle(noise, tmp_path, epochs=6)
    assert 1 <= final["best_epoch"] < 6, "choose another seed: the last epoch is no test"
    fickle(noise, tmp_path / "short", epochs=final["best_epoch"])
    best = tiny.load(tmp_path / RUN / "best.pt")["model"]
    states = [tiny.load(place / RUN / "checkpoint.pt")["networks"]["model"]
              for place in (tmp_path / "short", tmp_path)]
    assert tiny.same(best, states[0]) and not tiny.same(best, states[1])
    splits = data.load("folder", noise, image_size=tiny.SIDE, val_fraction=0.25)
    model, _ = models.load(tmp_path / RUN / "best.pt")
    model.load_state_dict(states[1])
    test = data.Batches(splits.test, splits.mean, splits.std, 64)
    assert common.evaluate(model, test)["accuracy"] == final["last_test_accuracy"]


def test_the_test_split_chooses_nothing(noise, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "train").symlink_to(noise / "train")
    (other / "test").symlink_to(tiny.make_folder(tmp_path / "easy", train=1, test=7) / "test")
    fickle(noise, tmp_path / "a", epochs=4)
    fickle(other, tmp_path / "b", epochs=4)
    a, b = (tiny.outcome(tmp_path / part / RUN) for part in "ab")
    assert tiny.same([a["best"], a["metrics"], a["state"]["networks"]],
                     [b["best"], b["metrics"], b["state"]["networks"]])
    differs = {key for key in a["final"] if a["final"][key] != b["final"][key]}
    assert "test_loss" in differs
    assert differs <= {"test_loss", "test_accuracy", "last_test_accuracy"}


def test_without_validation_the_last_epoch_counts(easy, tmp_path):
    final = tiny.run(train_student, easy, tmp_path, "--val-fraction", 0, "--ema-decay", 0.5,
                     epochs=tiny.ENOUGH)
    assert final["best_epoch"] == final["ema_best_epoch"] == tiny.ENOUGH
    assert final["val_accuracy"] is None and final["ema_val_accuracy"] is None
    assert final["test_accuracy"] == final["last_test_accuracy"] > 0.9
    assert final["learned"] is True
    for row in tiny.metrics(tmp_path / RUN):
        assert row["val_loss"] == row["val_accuracy"] == row["ema_val_accuracy"] == ""


def test_the_average_with_its_statistics_measured_anew(easy, tmp_path):
    """BatchNorm's statistics: the mean, over the last epoch's batches, of theirs."""
    final = tiny.run(distill, easy, tmp_path, "--objective", "consistency", "--ema-decay", 0.8,
                     "--norm", "batch", "--lr", 0.002, "--schedule", "constant")
    model, _ = models.load(tmp_path / "digits/mean-teacher-s0/best.pt", average=True)
    splits = data.load("folder", easy, None, 0.25, image_size=tiny.SIDE)
    train, val, test = (data.Batches(split, splits.mean, splits.std, 16, augment="crop")
                        for split in splits[:3])
    inputs = {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            inputs[layer] = []
            layer.register_forward_pre_hook(lambda layer, x: inputs[layer].append(x[0]))
    for batch in train.epoch(2):
        model.train()(batch.x)
    seen = {layer: list(batches) for layer, batches in inputs.items()}
    for layer, batches in seen.items():
        layer.running_mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
        layer.running_var = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    for split, key in ((val, "recomputed_val_accuracy"), (test, "recomputed_test_accuracy")):
        assert common.evaluate(model, split)["accuracy"] == pytest.approx(final[key])
    assert final["recomputed_test_accuracy"] != final["ema_test_accuracy"]


# ---- runs that are there already ----------------------------------------------------

def test_a_finished_run_is_kept(copy, easy, capsys):
    final = json.loads((copy / "final.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    for more in ((), ("--resume",), ("--skip-bad",)):
        assert train_student.main(words(copy, easy, *more)) == final
        assert "student-s0: finished already, kept" in tiny.said(capsys)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_other_settings_are_refused_by_name(copy, easy, capsys):
    before = {path: path.read_bytes() for path in copy.iterdir()}
    for flags, part in ((("--lr", 0.5), "lr 0.01 (asked for: 0.5)"),
                        (("--optimizer", "sgd"), "optimizer adamw (asked for: sgd)"),
                        (("--image-size", 24), "the images, by their data_key")):
        line = tiny.refused(capsys, train_student, words(copy, easy, *flags), copy, part,
                            "finished with other settings", "--overwrite", "--run NAME")
        assert "epochs" not in line
    (copy / "final.json").unlink()
    tiny.refused(capsys, train_student, words(copy, easy, "--resume", "--lr", 0.5), copy,
                 "begun with other settings: lr 0.01 (asked for: 0.5)")
    del before[copy / "final.json"]
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


def test_an_unfinished_run_needs_a_word(copy, easy, capsys, whole):
    (copy / "final.json").unlink()
    line = tiny.refused(capsys, train_student, words(copy, easy), copy, "an unfinished run",
                        "--resume", "--overwrite")
    assert "settings" not in line
    train_student.main(words(copy, easy, "--resume"))
    assert "going on after epoch 3" in tiny.said(capsys)
    assert tiny.same(tiny.outcome(copy), whole[0])


def test_overwrite_throws_the_old_run_away(copy, easy, whole):
    (copy / "mine.txt").write_text("no file of a run")
    (copy / "look.html").write_text("of the old run")
    train_student.main(words(copy, easy, "--overwrite", "--seed", 0, epochs=1))
    assert len(tiny.metrics(copy)) == 1 and (copy / "mine.txt").exists()
    assert not (copy / "look.html").exists()
    train_student.main(words(copy, easy, "--overwrite", "--resume"))
    assert tiny.same(tiny.outcome(copy), whole[0])


def test_a_dry_run_makes_nothing(easy, results, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    for script, flags in tiny.SIX.values():
        config = tiny.run(script, easy, results, "--run", "new", "--views", 1, *flags, "--dry-run")
        assert config["epochs"] == 2
    assert tiny.said(capsys).count("no run was made") == 6
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_stopped_in_its_first_epoch_starts_again(copy, easy, whole):
    for name in ("final.json", "checkpoint.pt", "test.npz"):
        (copy / name).unlink()
    train_student.main(words(copy, easy))
    assert tiny.same(tiny.outcome(copy), whole[0])


def test_a_run_of_the_first_edition_is_kept(copy, easy, capsys):
    """Its config lacks newer flags, holds others that nobody reads, and says norm none."""
    config = json.loads((copy / "config.json").read_text())
    for newer in ("views", "normalise", "deterministic", "fit"):
        del config[newer]
    config |= dict(norm="none", source=None, class_weight=0.5)
    (copy / "config.json").write_text(json.dumps(config))
    final = json.loads((copy / "final.json").read_text())
    assert train_student.main(words(copy, easy)) == final
    tiny.refused(capsys, train_student, words(copy, easy, "--normalise", "half"),
                 "normalise train (asked for: half)")
    tiny.refused(capsys, train_student, words(copy, easy, "--norm", "batch"), "norm none")


def test_a_run_that_goes_on_elsewhere_says_so(copy, easy, capsys):
    (copy / "final.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["versions"] |= dict(torch="1.0", threads=64)
    (copy / "config.json").write_text(json.dumps(config))
    train_student.main(words(copy, easy, "--resume"))
    printed = tiny.said(capsys)
    assert "note: begun with" in printed and "1.0" in printed and "64" in printed
    assert json.loads((copy / "config.json").read_text())["before"][0]["torch"] == "1.0"


# ---- other processes ----------------------------------------------------------------

@contextlib.contextmanager
def held(folder):
    """Lock a folder as another process that trains there does."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def test_a_second_run_into_a_folder_is_refused(copy, easy, capsys, whole):
    for name in ("final.json", "test.npz"):
        (copy / name).unlink()
    before = {path: path.read_bytes() for path in copy.iterdir()}
    with held(copy):
        for flag in ("--resume", "--overwrite"):
            tiny.refused(capsys, train_student, words(copy, easy, flag), copy,
                         "another process trains here", "--run NAME")
    assert {path: path.read_bytes() for path in copy.iterdir()} == before
    train_student.main(words(copy, easy, "--resume"))       # what a dead process held is free
    assert tiny.same(tiny.outcome(copy), whole[0])
    with held(copy):                                        # a finished run holds nothing
        pass


def test_where_there_are_no_locks_it_trains_all_the_same(easy, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)       # Lustre, some NFS
        tiny.run(train_student, easy, tmp_path, epochs=1)
    assert f"note: {tmp_path / RUN} cannot be locked here (Function not implemented)" in (
        tiny.said(capsys))
    monkeypatch.setattr(recipes, "fcntl", None)     # Windows
    with held(tmp_path / RUN):
        tiny.run(train_student, easy, tmp_path, "--overwrite", epochs=1)
    assert "locked" not in tiny.said(capsys)


def test_scripts_train_without_modules_that_windows_lacks(easy, results, tmp_path):
    """They import without a word, too, and make nothing by it."""
    for script in ("train_student", "distill"):
        argv = tiny.words(easy, results, "--views", 1, epochs=2)
        child = children.start(script, argv, tmp_path / "printed", ("fcntl", "resource"))
        child.join(100)
        assert child.exitcode == 0, (tmp_path / "printed-0").read_text()
    assert (results / RUN / "final.json").exists()
    assert (results / "digits/kd-s0/final.json").exists()


# ---- disks that give out, stops -----------------------------------------------------

@pytest.mark.parametrize("file", ["best.pt", "metrics.csv", "checkpoint.pt", "test.npz",
                                  "final.json"])
def test_a_disk_that_is_full_at_any_file_leaves_the_last_state(
        easy, tmp_path, capsys, monkeypatch, whole, file):
    """In the second writing of a file where there is one."""
    argv, seen = tiny.words(easy, tmp_path, *EMA, epochs=3), []
    once = file in ("test.npz", "final.json")

    def replace(aside, path, usual=os.replace):
        seen.append(Path(path).name)
        if seen.count(file) == 2 or (once and file in seen):
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(aside, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        tiny.refused(capsys, train_student, argv, f"{tmp_path / RUN / file}: No space left",
                     "--resume", "last finished epoch")
    assert not list((tmp_path / RUN).glob(".*")) and not (tmp_path / RUN / "final.json").exists()
    history = tiny.load(tmp_path / RUN / "checkpoint.pt")["history"]
    assert len(history) == (3 if once else 1)
    train_student.main([*argv, "--resume"])
    assert tiny.same(tiny.outcome(tmp_path / RUN), whole[0])


def test_a_file_that_may_not_grow_ends_the_run(easy, tmp_path, capsys, whole):
    """A limit on the size of files stands for a full disk: the kernel refuses to write."""
    resource = pytest.importorskip("resource")
    tiny.run(train_student, easy, tmp_path, "--dry-run")        # the images are kept now
    argv = tiny.words(easy, tmp_path, *EMA, epochs=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        tiny.refused(capsys, train_student, argv, tmp_path / RUN / "best.pt", "too large",
                     "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / RUN).iterdir()] == ["config.json"]
    train_student.main([*argv, "--resume"])
    assert tiny.same(tiny.outcome(tmp_path / RUN), whole[0])


def test_a_folder_that_vanishes_ends_the_run(easy, tmp_path, capsys, monkeypatch):
    def vanish(model, batch, usual=train_student.hard_loss):
        if batch.epoch == 2:
            shutil.rmtree(tmp_path / "digits", ignore_errors=True)
        return usual(model, batch)

    monkeypatch.setattr(train_student, "hard_loss", vanish)
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), tmp_path / RUN,
                 "No such file or directory", "last finished epoch")


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_is_stopped_with_a_line_and_goes_on(easy, tmp_path, sent, code):
    argv = tiny.words(easy, tmp_path, epochs=12)
    child = children.start("train_student", argv, tmp_path / "printed")
    assert children.after_first_epoch(child, tmp_path / RUN, sent) == code
    printed = (tmp_path / "printed-0").read_text()
    assert printed.splitlines()[-1].startswith("error: stopped; ") and "--resume" in printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert not (tmp_path / RUN / "final.json").exists()
    epochs = len(tiny.load(tmp_path / RUN / "checkpoint.pt")["history"])
    assert tiny.run(train_student, easy, tmp_path, "--resume", epochs=12)["epochs"] == 12
    assert len(tiny.metrics(tmp_path / RUN)) == 12 > epochs


# ---- damaged files ------------------------------------------------------------------

LOADER = SimpleNamespace(main=lambda argv: models.load_checkpoint(*argv))


def test_a_checkpoint_cut_anywhere_is_named(copy, easy, capsys):
    for name in ("best.pt", "checkpoint.pt"):
        body = (copy / name).read_bytes()
        for end in np.linspace(0, len(body) - 1, 15).astype(int):
            (copy / name).write_bytes(body[:end])
            tiny.refused(capsys, LOADER, [copy / name], copy / name, "cut short", "--overwrite")
    (copy / "final.json").unlink()
    tiny.refused(capsys, train_student, words(copy, easy, "--resume"), copy / "checkpoint.pt")
    argv = words(copy, easy, "--init-from", copy / "best.pt", "--run", "other")
    tiny.refused(capsys, train_student, argv, copy / "best.pt")


def test_a_flipped_bit_in_a_checkpoint_is_named_or_harmless(copy, capsys):
    """torch alone reads most of them as other weights, and tells nobody."""
    path = copy / "best.pt"
    whole, body, silent = tiny.load(path), path.read_bytes(), 0
    for bit in np.random.default_rng(0).choice(8 * len(body), 150, replace=False):
        spoiled = bytearray(body)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        with contextlib.suppress(Exception):
            silent += not tiny.same(torch.load(path, weights_only=True), whole)
        try:
            assert tiny.same(models.load_checkpoint(path), whole), bit      # in unused bytes
        except SystemExit as stop:
            line = capsys.readouterr().err
            assert stop.code == 2 and line.startswith(f"error: {path}: ")
            assert line.count("\n") == 1
    assert silent > 40      # else this test shows nothing


def test_a_checkpoint_that_is_none_of_this_run_is_named(copy, chain, easy, capsys):
    (copy / "final.json").unlink()
    for other in (chain[0] / RUN / "checkpoint.pt", copy / "best.pt"):
        shutil.copy(other, copy / "checkpoint.pt")
        tiny.refused(capsys, train_student, words(copy, easy, "--resume"),
                     copy / "checkpoint.pt", "--overwrite")


@pytest.mark.parametrize("name", ["config.json", "final.json"])
def test_json_that_cannot_be_read_is_named(copy, easy, capsys, name):
    for body in (b"", b"[1]", b"{", b"\xff"):
        (copy / name).write_bytes(body)
        tiny.refused(capsys, train_student, words(copy, easy), copy / name)
    (copy / name).unlink()
    if name == "config.json":
        tiny.refused(capsys, train_student, words(copy, easy), copy / name)
