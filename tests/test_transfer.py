"""--init-from, --freeze, --unfreeze-at: whose weights a run starts from, and which of them move."""
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch

import common
import distill
import models
import train_student
import train_teacher


@pytest.fixture
def source(chain):
    return chain[0] / "digits" / "student-s0" / "best.pt"


@pytest.fixture
def starts(monkeypatch):
    """The weights that each run started from."""
    seen = []

    def spy(args, folder, model, *more, whole=common.fit, **options):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return whole(args, folder, model, *more, **options)

    monkeypatch.setattr(common, "fit", spy)
    return seen


def weights(folder):
    return tiny.load(folder / "checkpoint.pt")["networks"]["model"]


def moved(before, after):
    """Which halves of the network changed."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_a_run_starts_from_the_weights_of_another(easy, source, tmp_path, starts, capsys):
    final = tiny.run(train_student, easy, tmp_path, "--init-from", source, "--ema-decay", 0.9,
                     "--lr", 1e-4, epochs=1)
    assert tiny.same(starts[0], dict(tiny.load(source)["model"]))
    assert "all fits" in tiny.said(capsys)
    assert final["val_accuracy"] > 0.9      # it knows all this already
    # the average, too, begins there: not at the random weights
    model = models.load(source)[0]
    average = tiny.load(tmp_path / "digits" / "student-s0" / "checkpoint.pt")["networks"]["ema"]
    start = dict(model.state_dict())
    assert all((average[k] - start[k]).abs().max() < 0.3 for k in start)


def test_what_does_not_fit_stays_as_the_seed_gave_it(easy, source, tmp_path, starts, capsys):
    three = tmp_path / "three"
    for part in ("train", "test"):
        for colour in ("blue", "green", "grey"):
            shutil.copytree(easy / part / colour, three / part / colour)
    tiny.run(train_student, three, tmp_path / "a", epochs=1)
    tiny.run(train_student, three, tmp_path / "b", "--init-from", source, epochs=1)
    fresh, taken = starts
    theirs = tiny.load(source)["model"]
    odd = [name for name in fresh if fresh[name].shape != theirs[name].shape]
    assert len(odd) == 2                    # the logits' weight and bias
    for name in fresh:
        assert torch.equal(taken[name], (fresh if name in odd else theirs)[name])
    printed = tiny.said(capsys)
    assert all(name in printed.split("not taken")[1] for name in odd)


@pytest.mark.parametrize("flags, halves", [
    (("--freeze", "none"), {"features", "classifier"}),
    (("--freeze", "features"), {"classifier"}),
    (("--freeze", "features", "--unfreeze-at", 4), {"classifier"}),     # never reached
    (("--freeze", "features", "--unfreeze-at", 3), {"features", "classifier"})])
def test_frozen_features_do_not_move(easy, tmp_path, starts, flags, halves):
    # BatchNorm's statistics belong to the features, and weight decay must not move them either.
    tiny.run(train_student, easy, tmp_path, *flags, "--norm", "batch", "--weight-decay", 0.5,
             epochs=3)
    assert moved(starts[0], weights(tmp_path / "digits" / "student-s0")) == halves


@pytest.mark.parametrize("options, features", [
    (dict(), True), (dict(freeze="none", unfreeze_at=0), True),
    (dict(freeze="features", unfreeze_at=0), False),
    (dict(freeze="features", unfreeze_at=4), False),
    (dict(freeze="features", unfreeze_at=3), True)])
def test_an_epoch_begins_in_training_mode(options, features):
    model = models.build("digits-student", 4, (3, 16, 16), norm="batch").eval()
    common.set_training(model, SimpleNamespace(**options), 3)
    assert model.training and {m.training for m in model.classifier.modules()} == {True}
    assert {m.training for m in model.features.modules()} == {features}
    assert {p.requires_grad for p in model.features.parameters()} == {features}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_features_move_from_the_epoch_that_unfreezes_them(
        easy, tmp_path, starts, monkeypatch, optimizer):
    states = []

    def spy(model, batch, whole=train_student.hard_loss):
        states.append((batch.epoch, {k: v.clone() for k, v in model.state_dict().items()}))
        return whole(model, batch)

    monkeypatch.setattr(train_student, "hard_loss", spy)
    tiny.run(train_student, easy, tmp_path, "--freeze", "features", "--unfreeze-at", 2,
             "--optimizer", optimizer, epochs=2)
    for epoch, state in states[:8]:         # up to the first batch of epoch 2
        assert moved(states[0][1], state) <= {"classifier"}, epoch
    assert moved(states[7][1], states[8][1]) == {"features", "classifier"}


def test_other_weights_to_start_from_are_another_run(easy, chain, source, tmp_path, capsys):
    final = tiny.run(train_student, easy, tmp_path, "--init-from", source, epochs=1)
    words = tiny.words(easy, tmp_path, epochs=1)
    copy = tmp_path / "copy.pt"
    shutil.copy(source, copy)
    assert train_student.main([*words, "--init-from", str(copy)]) == final
    tiny.refused(capsys, train_student, words, "init_sha256")
    other = chain[0] / "digits" / "kd-s0" / "best.pt"
    tiny.refused(capsys, train_student, [*words, "--init-from", other], "init_sha256")


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_run_from_drawn_weights_is_not_one_from_others(easy, source, tmp_path, capsys,
                                                         unfinished):
    tiny.run(train_student, easy, tmp_path)
    folder = tmp_path / "digits" / "student-s0"
    if unfinished:
        (folder / "final.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = tiny.words(easy, tmp_path, "--resume")
    tiny.refused(capsys, train_student, [*words, "--init-from", source], "init_sha256 None")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    train_student.main(words)


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_a_run_does_not_replace_what_it_learns_from(easy, chain, tmp_path, capsys, more):
    """It could not be gone on from: the weights would be gone with the first epoch."""
    results = tmp_path / "r"
    for name in ("student-s0", "teacher-s0"):
        shutil.copytree(chain[0] / "digits" / name, results / "digits" / name)
    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    own = results / "digits" / "student-s0" / "best.pt"
    link = tmp_path / "link.pt"
    link.symlink_to(own)
    for file in (own, link):
        tiny.refused(capsys, train_student, tiny.words(easy, results, "--init-from", file, *more),
                     file, "lies in the folder of this run", "--run")
    for teacher in ((), ("--teacher", results / "digits/teacher-s0/best.pt")):
        tiny.refused(capsys, distill, tiny.words(easy, results, "--run", "teacher-s0", *teacher,
                                                 *more), "teacher-s0/best.pt", "lies in")
    assert before == {path: path.read_bytes() for path in results.rglob("*.*")}


@pytest.mark.parametrize("flags, parts", [
    (("--init-from", "no.pt"), ("no.pt", "no such file")),
    (("--freeze", "all"), ("--freeze", "all", "features")),
    (("--unfreeze-at", -1), ("--unfreeze-at", "-1"))])
def test_wrong_input(easy, tmp_path, capsys, flags, parts):
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path / "r", *flags), *parts)
    assert not (tmp_path / "r").exists()


def test_weights_of_which_none_fits(easy, source, tmp_path, capsys):
    words = tiny.words(easy, tmp_path / "r", "--init-from", source, "--arch", "mlp")
    tiny.refused(capsys, train_teacher, words, source, "--arch")
    assert not (tmp_path / "r").exists()
