"""What a run folder lets happen to it: kept, refused, resumed, overwritten; a loss that is not
finite; a dry run.
"""
import json
from types import SimpleNamespace

import pytest
import tiny
import torch

import common
import distill
import models
import runs
import train_student
import train_teacher

RUN = "digits/student-s0"


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def done(easy, tmp_path):
    """A finished run of one epoch: (its words, its folder, its final dict)."""
    final = tiny.run(train_student, easy, tmp_path, epochs=1)
    return tiny.words(easy, tmp_path, epochs=1), tmp_path / RUN, final


def test_a_finished_run_is_kept(done, capsys):
    words, folder, final = done
    before = times(folder)
    for more in ([], ["--resume"], ["--dry-run"]):
        assert train_student.main(words + more) == final
        assert f"{folder}: finished already, kept" in tiny.said(capsys)
    assert times(folder) == before


@pytest.mark.parametrize("flags, named", [
    (("--lr", "0.02"), ("lr 0.01", "0.02")), (("--epochs", "3"), ("epochs 1 ", "3")),
    (("--labels", "40"), ("labels None", "40")), (("--pool", "avg"), ("pool max", "avg")),
    (("--image-size", "8"), ("image_size", "data_key")),
    (("--precision", "bf16"), ("precision fp32", "bf16"))])
def test_a_finished_run_with_other_settings_is_refused(done, capsys, flags, named):
    words, folder, final = done
    before = times(folder)
    for more in ((), ("--resume",)):
        tiny.refused(capsys, train_student, [*words, *flags, *more], folder, "finished with",
                     *named, "--overwrite", "--run")
    assert times(folder) == before
    assert train_student.main([*words, *flags, "--run", "other", "--dry-run"])


def test_a_run_from_before_there_was_a_flag_had_its_default(done, capsys):
    words, folder, final = done
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("normalise") == "train"
    (folder / "config.json").write_text(json.dumps(config))
    assert train_student.main([*words, "--resume"]) == final
    assert "finished already, kept" in tiny.said(capsys)
    tiny.refused(capsys, train_student, [*words, "--normalise", "half"], folder,
                 "normalise train (asked for: half)")


def test_a_finished_run_on_other_data_is_refused(done, tmp_path, capsys):
    words, folder, _ = done
    other = tiny.make_folder(tmp_path / "other", seed=1)
    tiny.refused(capsys, train_student, [*words, "--data-dir", other], folder, "data_key")


def test_the_same_data_elsewhere_is_the_same_run(done, easy, tmp_path):
    words, folder, final = done
    (tmp_path / "link").mkdir()
    for part in ("train", "test"):
        (tmp_path / "link" / part).symlink_to(easy / part)
    assert train_student.main([*words, "--data-dir", str(tmp_path / "link")]) == final


def test_overwrite_runs_it_again(done, easy):
    words, folder, final = done
    (folder / "curves.png").write_bytes(b"of the old run")
    again = tiny.run(train_student, easy, folder.parent.parent, "--overwrite", "--lr", 0.02,
                     epochs=1)
    assert again["test_loss"] != final["test_loss"]
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.02
    assert not (folder / "curves.png").exists()
    # with --resume beside it, as the Makefile types it: from the start, not from the old state
    other = tiny.run(train_student, easy, folder.parent.parent, "--overwrite", "--resume", epochs=1)
    assert other["test_loss"] == final["test_loss"]


def test_another_teacher_is_another_run(easy, results, capsys):
    first = tiny.run(distill, easy, results, epochs=1)
    words = tiny.words(easy, results, epochs=1)
    copy = results / "copy.pt"                      # the same weights elsewhere: the same run
    copy.write_bytes((results / "digits/teacher-s0/best.pt").read_bytes())
    assert distill.main([*words, "--teacher", str(copy)]) == first
    tiny.run(train_teacher, easy, results, "--overwrite", epochs=1)
    tiny.refused(capsys, distill, words, "kd-s0", "teacher_sha256")


# ---- unfinished -------------------------------------------------------------------------------

@pytest.fixture
def failing(monkeypatch):
    """The loss is not finite from epoch 2 on, until this is called. Holds the steps' epochs."""
    steps = []

    def spoiled(model, batch, whole=train_student.hard_loss):
        steps.append(batch.epoch)
        loss, logits = whole(model, batch)
        return (loss * float("nan") if batch.epoch == 2 else loss), logits

    with monkeypatch.context() as patch:
        patch.setattr(train_student, "hard_loss", spoiled)
        yield SimpleNamespace(steps=steps, mend=patch.undo)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(easy, tmp_path, capsys,
                                                                       failing):
    words = tiny.words(easy, tmp_path / "a", epochs=3)
    tiny.refused(capsys, train_student, words, "the loss is nan at epoch 2, step 1", "epoch 1 is",
                 tmp_path / "a" / RUN, "--lr", code=3)
    assert failing.steps == [1] * 7 + [2]           # on a CPU it stops there
    folder = tmp_path / "a" / RUN
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "checkpoint.pt",
                                                              "config.json", "metrics.csv"]
    assert len(tiny.load(folder / "checkpoint.pt")["history"]) == len(tiny.metrics(folder)) == 1

    # unfinished: refused by name, without harm
    before = times(folder)
    tiny.refused(capsys, train_student, words, folder, "an unfinished run", "--resume",
                 "--overwrite")
    tiny.refused(capsys, train_student, [*words, "--resume", "--lr", 0.02], folder, "begun", "lr",
                 "0.02")
    assert times(folder) == before
    tiny.refused(capsys, train_student, [*words, "--resume"], "epoch 2", code=3)    # again

    failing.mend()      # the cause is mended: it goes on as if nothing had been
    tiny.run(train_student, easy, tmp_path / "a", "--resume", epochs=3)
    tiny.run(train_student, easy, tmp_path / "b", epochs=3)
    assert tiny.same(tiny.outcome(folder), tiny.outcome(tmp_path / "b" / RUN))


def test_a_learning_rate_that_explodes(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path, "--lr", 1e30, "--clip", 0, "--optimizer", "sgd",
                       "--schedule", "constant")
    tiny.refused(capsys, train_student, words, "the loss is", "epoch 1, step 2", "nothing is saved",
                 "1e+30", code=3)
    folder = tmp_path / RUN
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    # Nothing was finished, so it starts again, with other settings too.
    for more in ([], ["--resume"]):
        tiny.refused(capsys, train_student, [*words, *more], "epoch 1, step 2", code=3)
    tiny.run(train_student, easy, tmp_path)


def test_a_folder_of_strangers_is_left_alone(easy, tmp_path, capsys):
    folder = tmp_path / RUN
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    words = tiny.words(easy, tmp_path, epochs=1)
    tiny.refused(capsys, train_student, words, folder, "--overwrite")
    tiny.run(train_student, easy, tmp_path, "--overwrite", epochs=1)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("file", ["config.json", "checkpoint.pt", "final.json"])
def test_a_damaged_run_is_refused_by_the_file(done, capsys, file):
    words, folder, _ = done
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    if file != "final.json":
        (folder / "final.json").unlink()
    tiny.refused(capsys, train_student, [*words, "--resume"], folder / file)


def test_a_run_of_another_schema_is_refused(done, capsys):
    words, folder, _ = done
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(schema=99)))
    tiny.refused(capsys, train_student, [*words, "--resume"], folder, "99", "--overwrite")


def first(state, **changes):
    return state | dict(history=[state["history"][0] | changes])


def adam(state, **changes):
    kept = state["optimizer"]["state"]
    return state | dict(optimizer=dict(state=kept | {0: kept[0] | changes}))


@pytest.mark.parametrize("change, said", [
    (lambda state: {"schema": 99}, "schema 1"), (lambda state: {"history": []}, "schema 1"),
    (lambda state: [1, 2], "schema 1"), (lambda state: {"schema": torch.tensor(1)}, "schema 1"),
    (lambda state: {"schema": 1}, "history"), (lambda state: state | {"history": "abc"}, "history"),
    (lambda state: state | {"history": 9 * state["history"]}, "1 to 1 epochs"),
    (lambda state: state | {"history": [3]}, "epoch 1"), (lambda state: first(state, epoch=7), "1"),
    (lambda state: first(state, more=7), "epoch 1"),
    (lambda state: first(state, val_accuracy=float("nan")), "val_accuracy"),
    (lambda state: first(state, images_per_second="a"), "images_per_second"),
    (lambda state: first(state, seconds=None), "seconds"),
    (lambda state: state | {"networks": {}}, "model"),
    (lambda state: state | {"networks": {"model": {"features.0.weight": 1}}}, "do not fit"),
    (lambda state: state | {"best": {"x": 1}}, "best"),
    (lambda state: state | {"best": {"model": state["best"]["model"] | {"features.0.bias": 1}}},
     "features.0.bias"),
    (lambda state: state | {"optimizer": {}}, "optimizer"),
    (lambda state: state | {"optimizer": {"state": {}}}, "optimizer"),
    (lambda state: adam(state, exp_avg=torch.zeros(3)), "exp_avg"),
    (lambda state: adam(state, exp_avg_sq=None), "exp_avg_sq")])
def test_a_checkpoint_that_is_none_is_refused(done, capsys, change, said):
    words, folder, _ = done
    (folder / "final.json").unlink()
    state = tiny.load(folder / "checkpoint.pt")
    common.save_checkpoint(folder / "checkpoint.pt", change(state))
    before = (folder / "best.pt").read_bytes()
    tiny.refused(capsys, train_student, [*words, "--resume"], folder / "checkpoint.pt", said,
                 "--overwrite")
    assert (folder / "best.pt").read_bytes() == before


@pytest.mark.parametrize("script, flags", [(train_student, ("--seed", 1)),
                                           (train_student, ("--epochs", 5)), (train_teacher, ())])
def test_a_checkpoint_of_another_run_is_refused(done, easy, tmp_path, capsys, script, flags):
    """Of the same shapes it would be taken for this run's, and its figures published."""
    words, folder, _ = done
    tiny.run(script, easy, tmp_path / "other", "--run", "other", *flags)
    (folder / "final.json").unlink()
    other = tmp_path / "other" / "digits" / "other" / "checkpoint.pt"
    (folder / "checkpoint.pt").write_bytes(other.read_bytes())
    tiny.refused(capsys, train_student, [*words, "--resume"], folder / "checkpoint.pt",
                 "settings", "--overwrite")


@pytest.mark.parametrize("flags, own, said", [
    (("--alpha", 0.5), (), "alpha 0.5"), (("--views", 1), (), "by another process"),
    (("--views", 1), ("--overwrite",), "another process trained here")])
def test_a_run_that_comes_and_goes_while_another_gets_ready_is_not_harmed(easy, results, capsys,
                                                                          monkeypatch, flags, own,
                                                                          said):
    """The second look at the folder is taken when nobody else can be there."""
    folder, words = results / "digits" / "kd-s0", tiny.words(easy, results, "--views", 1, *own)
    report = distill.report_teacher

    def meanwhile(*job):
        monkeypatch.setattr(distill, "report_teacher", report)
        tiny.run(distill, easy, results, *flags)
        return report(*job)

    monkeypatch.setattr(distill, "report_teacher", meanwhile)
    tiny.refused(capsys, distill, words, folder, said)
    assert not runs.altered(folder, ("best.pt", "checkpoint.pt", "config.json", "metrics.csv"))


def test_going_on_with_other_versions_is_said_and_kept(done, capsys):
    words, folder, _ = done
    (folder / "final.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["versions"] |= dict(torch="2.0.0", threads=7)
    (folder / "config.json").write_text(json.dumps(config))
    train_student.main([*words, "--resume"])
    assert "note: begun with torch 2.0.0" in capsys.readouterr().out
    (before,) = json.loads((folder / "config.json").read_text())["before"]
    assert (before["torch"], before["threads"]) == ("2.0.0", 7)


def test_a_finished_run_of_a_network_that_was_changed_since_is_no_other(done, capsys, monkeypatch):
    words, folder, _ = done
    monkeypatch.setitem(models.ARCHITECTURES, "digits-student",
                        models.ARCHITECTURES["digits-teacher"])
    tiny.refused(capsys, train_student, words, folder, "finished with another network", "has",
                 "--overwrite")


# ---- dry run ----------------------------------------------------------------------------------

def test_a_dry_run_says_all_and_makes_nothing(easy, results, capsys):
    before = sorted(results.rglob("*"))
    words = tiny.words(easy, results, "--dry-run", "--temperature", 3, "--alpha", 0.25)
    distill.main(words)
    printed = tiny.said(capsys)
    for part in ("digits-student", "parameters", "multiply-adds", "120 train", "40 validation",
                 "80 test", "4 classes", "0.25·3²·KL(teacher ‖ student, T = 3)", "0.75·CE", "cpu",
                 "fp32", "2 epochs of 7", "validation accuracy", "dry run"):
        assert part in printed, part
    assert sorted(results.rglob("*")) == before


def test_a_start_says_whether_the_decay_is_ever_reached(easy, tmp_path, capsys):
    for decay, never in ((0.5, False), (0.99, True)):
        tiny.run(train_student, easy, tmp_path, "--dry-run", "--ema-decay", decay)
        printed = tiny.said(capsys)
        assert f"decay {decay}" in printed and ("never" in printed) == never
