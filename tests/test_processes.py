"""Two processes, as torchrun starts them: each draws the same epoch and takes its share of
every batch. Their losses are those of one process, but for rounding."""
import json

import children
import pytest
import tiny

import common
import data
import distill
import models
import train_student

MEAN_TEACHER = ("--objective", "consistency", "--labels", 60, "--noise", "0.5,0.5,0.3,0.1",
                "--ema-decay", 0.9)


def two(script, words, folder):
    """Train with two processes; return what the first one and the second one printed."""
    child = children.start(script, words, folder / "printed", target=children.torchrun)
    child.join(120)
    if child.is_alive():
        child.terminate()       # it ends its workers
        child.join()
    printed = [(folder / f"printed-{rank}").read_text() for rank in range(2)]
    assert child.exitcode == 0, printed
    return printed


def close(one, other):
    """Assert that two runs have the same figures, but for rounding."""
    rows = tiny.metrics(one), tiny.metrics(other)
    assert len(rows[0]) == len(rows[1])
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if value:
                assert float(value) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-5), key
            assert (value == "") == (b[key] == "")
    finals = [json.loads((folder / "final.json").read_text()) for folder in (one, other)]
    assert finals[0].keys() == finals[1].keys()
    assert finals[0]["test_loss"] == pytest.approx(finals[1]["test_loss"], rel=1e-4)
    for key in ("test_accuracy", "ema_test_accuracy", "best_epoch", "learned"):
        assert finals[0][key] == finals[1][key], key


@pytest.mark.parametrize("name, flags", [
    ("train_student", ("--schedule", "cosine")), ("distill", ("--views", 2)),
    ("distill", MEAN_TEACHER)])
def test_two_processes_learn_what_one_does(easy, results, tmp_path, name, flags):
    other = tiny.copy_teacher(results, tmp_path / "other")
    module = {"train_student": train_student, "distill": distill}[name]
    final = tiny.run(module, easy, results, *flags, epochs=3)
    first, second = two(name, tiny.words(easy, other, *flags, epochs=3), tmp_path)
    assert first.count("epoch 1/3") == 1 and second == ""       # one speaks
    folder = other / "digits" / final["run"]
    close(results / "digits" / final["run"], folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["processes"] == 2
    # The teacher's outputs: each its share of the views, in one file, bit for bit.
    kept = [list((place / "digits" / ".teacher").glob("*")) for place in (results, other)]
    assert [path.read_bytes() for path in kept[0]] == [path.read_bytes() for path in kept[1]]
    assert len(kept[0]) == (name == "distill" and flags[0] == "--views")


def test_two_processes_keep_outputs_in_half_precision(easy, results, tmp_path):
    flags = ("--views", 3, "--cache", "--precision", "bf16")
    other = tiny.copy_teacher(results, tmp_path / "other")
    tiny.run(distill, easy, results, *flags, epochs=1)
    two("distill", tiny.words(easy, other, *flags, epochs=1), tmp_path)
    (one,), (same,) = ((place / "digits" / ".teacher").glob("*") for place in (results, other))
    assert one.name == same.name and one.read_bytes() == same.read_bytes()


def test_two_processes_go_on_from_what_one_began(easy, tmp_path, monkeypatch):
    """With BatchNorm, whose statistics are of half a batch: what is saved must still give the
    accuracy that is written down."""
    def save(run, history, *rest, usual=common.save_epoch):
        usual(run, history, *rest)
        raise KeyboardInterrupt

    flags = ("--norm", "batch", "--ema-decay", 0.9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "save_epoch", save)
        tiny.run(train_student, easy, tmp_path, *flags, epochs=3)
    first, _ = two("train_student", tiny.words(easy, tmp_path, *flags, "--resume", epochs=3),
                   tmp_path)
    assert "going on after epoch 1" in first and "begun with" in first
    folder = tmp_path / "digits" / "student-s0"
    assert [row["epoch"] for row in tiny.metrics(folder)] == ["1", "2", "3"]
    final = json.loads((folder / "final.json").read_text())
    splits = data.load("folder", easy, val_fraction=0.25, image_size=tiny.SIDE)
    test = data.Batches(splits.test, splits.mean, splits.std, 80)
    for average, key in ((False, "test_accuracy"), (True, "ema_test_accuracy")):
        model, _ = models.load(folder / "best.pt", average)
        assert common.evaluate(model, test)["accuracy"] == pytest.approx(final[key])


@pytest.mark.parametrize("labels, size, told", [
    ("all", 15, "15 labelled and 0 unlabelled"), (40, 16, "5 labelled and 11 unlabelled")])
def test_a_batch_that_cannot_be_shared_is_refused(easy, tmp_path, monkeypatch, capsys, labels,
                                                  size, told):
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common, "wait", lambda: None)
    flags = ("--objective", "consistency", "--batch-size", size, "--labels", labels)
    tiny.refused(capsys, distill, tiny.words(easy, tmp_path, *flags), f"--batch-size {size}",
                 told, "2 processes")
    assert not (tmp_path / "digits").exists()


