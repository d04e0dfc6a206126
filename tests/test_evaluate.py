"""Scoring, the schedule and one epoch of training, against sums by hand and torch's own."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.optim import lr_scheduler

import common
import distill
import models
import train_student

# ---- evaluate -----------------------------------------------------------------------

ROWS = 23


@pytest.fixture
def scored():
    """A network, images, labels, and by hand its hits and the cross-entropy of each row."""
    torch.manual_seed(0)
    net = nn.Linear(6, 5)
    x = torch.randn(ROWS, 6)
    y = torch.arange(ROWS) % 5
    with torch.no_grad():
        logits = net(x).double()
    totals = logits.exp().sum(1).log()
    losses = totals - logits[range(ROWS), y]
    hits = logits.argmax(1) == y
    return net, x, y, hits, losses


@pytest.mark.parametrize("sizes", [23, [10, 10, 3], [1, 22], 1])
def test_evaluate_against_one_pass(scored, sizes):
    net, x, y, hits, losses = scored
    assert 0 < hits.sum() < ROWS
    batches = zip(x.split(sizes), y.split(sizes), strict=True)     # any iterable
    found = common.evaluate(net, batches)
    assert found["n"] == ROWS
    assert found["accuracy"] == hits.sum().item() / ROWS
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_evaluate_leaves_unlabelled_rows_out(scored):
    net, x, y, hits, losses = scored
    y[7:] = -1
    batches = [(x[:5], y[:5], "more"), (x[5:], y[5:])]
    found = common.evaluate(net, batches)
    assert found["n"] == 7
    assert found["accuracy"] == hits[:7].sum().item() / 7
    expected = losses[:7].mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no labelled rows"):
        common.evaluate(net, [(x[7:], y[7:])])
    with pytest.raises(ValueError, match="no labelled rows"):
        common.evaluate(net, [])


def test_evaluate_in_bfloat16_sums_in_float32_and_keeps_the_logits(scored):
    net, x, y, _, _ = scored
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = net(x).float()
    expected = nn.functional.cross_entropy(logits.double(), y).item()
    kept = []
    batches = zip(x.split(20), y.split(20), strict=True)
    found = common.evaluate(net, batches, "bf16", kept)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.cat(kept), logits)


def test_evaluate_gives_every_mode_back():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout())
    net[2].eval()       # one of them frozen
    before = copy.deepcopy(net.state_dict())
    x, y = torch.randn(8, 6), torch.arange(8)

    def broken():
        assert not net.training and not net[1].training
        yield x, y
        raise KeyError

    common.evaluate(net, [(x, y)])
    with pytest.raises(KeyError):
        common.evaluate(net, broken())
    assert net.training and net[1].training and not net[2].training
    assert tiny.same(dict(net.state_dict()), dict(before))


def test_evaluate_counts_exactly_what_float32_cannot():
    """float32 has 24 bits: a sum of ones stops at 16 777 216."""
    size, count = 100_001, 171
    logits = torch.zeros(size, 2)
    logits[::7, 1] = 1
    labels = torch.ones(size, dtype=torch.int64)
    found = common.evaluate(nn.Identity(), [(logits, labels)] * count)
    hits = -(-size // 7)
    assert found["n"] == size * count > 2 ** 24
    assert found["accuracy"] == hits / size


def test_chance_is_three_standard_errors_above_the_largest_class():
    labels = np.repeat([0, 1, -1], [30, 10, 60])    # unlabelled rows do not count
    expected = 0.75 + 3 * math.sqrt(0.75 * 0.25 / 40)
    assert common.chance(labels) == pytest.approx(expected)
    # Of few labels that is more than all: all right is above it, one wrong is not.
    assert 7 / 8 < common.chance([0, 1] * 4) < 1


# ---- schedule, optimizer ------------------------------------------------------------

def reference_schedule(kind, steps):
    """Return torch's learning rates, whose peak is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if kind == "onecycle":
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
    else:
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("kind", ["onecycle", "cosine"])
@pytest.mark.parametrize("steps", [2, 3, 7, 10, 33, 840])
def test_schedule_against_torch(kind, steps):
    found = [common.schedule(kind, step, steps) for step in range(steps)]
    assert found == pytest.approx(reference_schedule(kind, steps), rel=1e-9)
    assert common.schedule("constant", 1, steps) == 1


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_biases_and_norms_do_not_decay(name):
    net = models.build("digits-student", 4, (3, 16, 16), norm="batch")
    adapter = nn.Linear(2, 3)
    args = SimpleNamespace(optimizer=name, lr=0.1, weight_decay=0.5)
    optimizer = common.make_optimizer([net, adapter], args)
    assert type(optimizer).__name__.lower() == name
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0)
    expected = [adapter.weight]
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            expected.append(layer.weight)
    assert set(decayed["params"]) == set(expected)
    everything = {*net.parameters(), *adapter.parameters()}
    assert set(others["params"]) == everything - set(expected)


# ---- one epoch ----------------------------------------------------------------------

INPUTS, CLASSES = 4, 3
STEPS, EPOCHS, TOTAL = 4, 3, 12
FIRST = STEPS       # the first step of the second epoch


def make_batches():
    rng = np.random.default_rng(0)
    found = []
    for size in (5, 7, 6, 8):
        x = torch.tensor(rng.normal(size=(size, INPUTS)), dtype=torch.float32)
        y = torch.tensor(rng.integers(-1, CLASSES, size))
        found.append(SimpleNamespace(x=x, y=y))
    return found


def by_hand(args, weights, scale):
    """Train in float64; return weights (C, D + 1), scale, average, and what is logged.

    The gradient of cross-entropy on the logits is softmax − one-hot (Bishop 2006, section
    4.3.4); clipping scales all of the gradient to a norm (Pascanu et al. 2013, section 3.2).
    """
    average, log = weights, []
    for step, batch in enumerate(make_batches(), FIRST):
        x = np.insert(batch.x.double().numpy(), INPUTS, 1, axis=1)
        y = batch.y.numpy()
        known = np.flatnonzero(y >= 0)
        p = np.exp(x @ weights.T)
        p /= p.sum(1, keepdims=True)
        right = p[known, y[known]]
        hits = (p.argmax(1) == y).sum()
        error = p - np.eye(CLASSES)[y]
        gradient = error[known].T @ x[known] / len(known)
        norms = [
            np.linalg.norm(gradient[:, :INPUTS]),
            np.linalg.norm(gradient[:, INPUTS]),
            abs(scale),
        ]
        log.append([-np.log(right).mean(), scale ** 2 / 2, hits, len(known), *norms])

        rate = args.lr * (1 + math.cos(math.pi * step / TOTAL)) / 2
        norm = np.linalg.norm(norms)
        if args.clip and norm > args.clip:
            rate *= args.clip / norm
        weights = weights - rate * gradient
        scale = scale - rate * scale
        decay = 0       # in a warm start
        update = step - args.warm_start * STEPS
        if update >= 0:
            decay = min(args.ema_decay, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weights
    return weights, scale, average, log


def joined(net):
    """Return weight and bias as one array, (C, D + 1)."""
    weight, bias = net.weight.detach(), net.bias.detach()
    return torch.cat([weight, bias[:, None]], 1).double().numpy()


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("warm_start", [1, 2])
def test_an_epoch_against_a_loop_by_hand(clip, warm_start):
    torch.manual_seed(0)
    args = SimpleNamespace(lr=2.0, schedule="cosine", precision="fp32", clip=clip,
                           ema_decay=0.15, epochs=EPOCHS, warm_start=warm_start)
    net = nn.Linear(INPUTS, CLASSES)
    adapter = nn.Linear(1, 1, bias=False)
    average = common.make_average(net)
    expected = by_hand(args, joined(net), adapter.weight.item())
    epochs = []

    def epoch(number):
        epochs.append(number)
        return iter(make_batches())

    def loss_fn(model, batch):
        logits = model(batch.x)
        cost = distill.class_cost(logits, batch.y, "ce")
        return {"labels": cost, "adapter": adapter.weight.square().sum() / 2}, logits

    bar = SimpleNamespace(update=lambda: None)
    optimizer = torch.optim.SGD([*net.parameters(), adapter.weight], lr=9.0)
    batches = SimpleNamespace(steps=lambda: STEPS, epoch=epoch)
    losses, parts, names, hits, rows, norms = common.train_epoch(
        args, net, average, adapter, loss_fn, optimizer, batches, FIRST, bar)
    log = torch.cat([parts, hits[:, None], rows[:, None], norms], 1)
    found = joined(net), adapter.weight.item(), joined(average), log
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert names == ["labels", "adapter"] and epochs == [2]
    torch.testing.assert_close(losses, parts.sum(1))
    assert not losses.requires_grad


# ---- a loss that is not finite ------------------------------------------------------

def test_a_loss_that_is_not_finite_ends_the_run(easy, tmp_path, capsys, monkeypatch):
    """One layer has nearly all of the gradient, until the loss overflows."""
    def spoiled(model, batch, hard_loss=train_student.hard_loss):
        terms, logits = hard_loss(model, batch)
        weights = model.features[3].weight
        scale = math.inf if batch.epoch == 2 else 1e4
        terms["spoiled"] = scale * weights.square().sum()
        return terms, logits

    monkeypatch.setattr(train_student, "hard_loss", spoiled)
    words = tiny.words(easy, tmp_path, "--lr", 1e-5, "--schedule", "constant")
    tiny.refused(capsys, train_student, words, "the loss is inf at epoch 2, step 1",
                 "learning rate 1e-05", "that of features.3.weight", "epoch 1 is kept",
                 "try a lower --lr", code=3)
    folder = tmp_path / "digits" / "student-s0"
    assert len(tiny.metrics(folder)) == 1
    assert not (folder / "final.json").exists()


def test_a_learning_rate_that_explodes(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path, "--lr", 1e30, "--clip", 0, "--optimizer", "sgd",
                       "--schedule", "constant")
    tiny.refused(capsys, train_student, words, "epoch 1, step 2", "1e+30",
                 "nothing is saved", "--clip 1", code=3)


# ---- device -------------------------------------------------------------------------

def test_pick_device_and_precision(capsys):
    cpu = common.pick_device("cpu")
    assert cpu == torch.device("cpu")
    assert common.pick_device().type in ("cpu", "cuda", "mps")
    assert common.pick_precision("bf16", cpu) == "bf16"
    assert common.pick_precision("fp32", cpu) == "fp32"
    assert common.pick_precision("auto", cpu) in ("bf16", "fp32")
    if not torch.backends.mps.is_available():
        with pytest.raises(SystemExit) as stop:
            common.pick_device("mps")
        line = capsys.readouterr().err
        assert stop.value.code == 2 and "--device mps" in line and "cpu" in line


@pytest.mark.parametrize("text, quota", [
    ("max 100000\n", None), ("250000 100000\n", 3), ("50000 100000\n", 1), ("nonsense", None)])
def test_the_quota_of_a_container(tmp_path, text, quota):
    (tmp_path / "cpu.max").write_text(text)
    assert common.cpu_quota(tmp_path / "cpu.max") == quota
    assert common.cpu_quota(tmp_path / "absent") is None
