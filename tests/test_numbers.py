"""What is not finite ends a run; what is counted is exact."""
from fractions import Fraction

import pytest
import tiny
import torch

import common
import distill
import models
import train_student

RUN = "digits/student-s0"


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
