"""common.train_epoch and common.score, alone, against the same arithmetic written out in NumPy."""
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import common
import data
import device
import distill

# ---- one epoch --------------------------------------------------------------------------------

D, C, SIZES = 4, 3, (5, 7, 6, 8)
FIRST, EPOCHS, STEPS = 2, 3, 4      # from the third step of the first epoch into the second


class Line(nn.Linear):
    """Softmax regression, and a parameter that no output depends on."""

    def __init__(self):
        super().__init__(D, C)
        self.spare = nn.Parameter(torch.full((2,), 3.0))
        self.spare.grad = torch.ones(2)     # left over from before it was frozen, say


def steps(seed=0):
    rng = np.random.default_rng(seed)
    return [SimpleNamespace(x=torch.tensor(rng.normal(size=(n, D)), dtype=torch.float32),
                            y=torch.tensor(rng.integers(-1, C, n))) for n in SIZES]


def loss_fn(model, batch):
    logits = model(batch.x)
    return distill.class_cost(logits, batch.y, "ce"), logits


def flags(**changed):
    args = dict(lr=2.0, schedule="cosine", precision="fp32", clip=0.0, ema_decay=0.15,
                epochs=EPOCHS, warm_start=1) | changed
    return SimpleNamespace(**{k: v for k, v in args.items() if v is not None})


def train(args, batches, model, average=None, loss_fn=loss_fn, weight_decay=0.1):
    """Return what train_epoch does, and how often the bar moved."""
    optimizer, moved = torch.optim.SGD(model.parameters(), 9.0, weight_decay=weight_decay), []
    bar = SimpleNamespace(update=lambda: moved.append(1))
    losses, hits, rows, *_ = common.train_epoch(args, model, average, loss_fn, optimizer,
                                                iter(batches), FIRST, EPOCHS * STEPS, bar)
    return losses, hits, rows, len(moved)


def by_hand(args, batches, weight, bias, weight_decay=0.1):
    """The same in float64. The gradient of cross-entropy on the logits is softmax − one-hot
    (Bishop 2006, Pattern Recognition and Machine Learning, section 4.3.4); clipping scales the
    whole gradient to the norm asked for (Pascanu et al. 2013, arXiv 1211.5063, section 3.2)."""
    theta = np.concatenate([weight, bias[:, None]], 1)      # (C, D + 1)
    average, losses, hits, rows = theta.copy(), [], [], []
    for t, batch in enumerate(batches, FIRST):
        x = np.concatenate([batch.x.double().numpy(), np.ones((len(batch.x), 1))], 1)
        y, known = batch.y.numpy(), batch.y.numpy() >= 0
        p = np.exp(x @ theta.T)
        p /= p.sum(1, keepdims=True)
        losses.append(-np.mean([math.log(p[i, y[i]]) for i in np.flatnonzero(known)]))
        hits.append(int(sum(p[i].argmax() == y[i] for i in range(len(y)))))
        rows.append(int(known.sum()))
        gradient = ((p - np.eye(C)[y]) * known[:, None]).T @ x / known.sum()
        norm = math.sqrt((gradient ** 2).sum())
        if args.clip and norm > args.clip:
            gradient *= args.clip / norm
        rate = args.lr * (1 + math.cos(math.pi * t / (EPOCHS * STEPS))) / 2
        theta = theta - rate * (gradient + weight_decay * theta)
        update = t - vars(args).get("warm_start", 0) * STEPS
        decay = min(args.ema_decay, (1 + update) / (10 + update)) if update >= 0 else 0
        average = decay * average + (1 - decay) * theta
    return theta, average, losses, hits, rows


def joined(model):
    return torch.cat([model.weight, model.bias[:, None]], 1).detach()


@pytest.mark.parametrize("changed", [
    dict(), dict(clip=0.3), dict(warm_start=None, ema_decay=0.9),
    dict(clip=0.6, schedule="constant")])
def test_an_epoch_against_numpy(changed, monkeypatch):
    torch.manual_seed(0)
    args, model, batches, shared = flags(**changed), Line(), steps(), []
    average = common.make_average(model)
    monkeypatch.setattr(device, "share_buffers_", lambda *modules: shared.append(modules))
    if args.schedule == "constant":
        monkeypatch.setattr(common, "schedule", lambda kind, step, steps: (
            1 + math.cos(math.pi * step / steps)) / 2 if kind == "constant" else None)
    start = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    losses, hits, rows, moved = train(args, batches, model, average)
    expected = by_hand(args, batches, *start)
    for found, reference in zip((joined(model), joined(average), losses), expected[:3],
                                strict=True):
        np.testing.assert_allclose(found.numpy(), reference, rtol=1e-4, atol=1e-5)
    assert (hits.tolist(), rows.tolist()) == expected[3:]
    assert moved == len(shared) == STEPS and all(modules == (model,) for modules in shared)
    assert not losses.requires_grad
    # Neither gradient nor decay: what takes no gradient stays as it is.
    assert (model.spare == 3).all() and model.spare.grad is None


def test_losses_of_an_epoch_in_bfloat16_are_kept_in_float32():
    seen = []

    def half(model, batch):
        logits = model(batch.x)
        seen.append(logits.dtype)
        return logits.square().mean(), logits       # in bfloat16, as autocast leaves it

    losses, *_ = train(flags(precision="bf16"), steps(), Line(), loss_fn=half)
    assert seen == [torch.bfloat16] * STEPS and losses.dtype == torch.float32


def test_an_epoch_ends_at_the_first_loss_that_is_not_finite():
    batches = steps()
    batches[1].x[0, 0] = math.inf
    losses, hits, rows, moved = train(flags(), batches, Line())
    assert len(losses) == len(hits) == len(rows) == moved == 2
    assert torch.isfinite(losses).tolist() == [True, False]


def test_two_processes_average_losses_and_add_hits_and_rows(monkeypatch):
    """As if the other process had drawn the same rows; it goes on where a loss is not finite, for
    the other one would wait for it."""
    torch.manual_seed(0)
    start = Line().state_dict()
    found, wrapped = [], []
    for processes in (1, 2):
        model = Line()
        model.load_state_dict(start)
        monkeypatch.setattr(common, "world", lambda processes=processes: processes)
        monkeypatch.setattr(common, "summed", lambda x, processes=processes: x * processes)
        monkeypatch.setattr(common, "DistributedDataParallel", lambda model, **options: (
            wrapped.append(options) or model))
        found.append([lot.tolist() for lot in train(flags(), steps(), model)[:3]])
    assert wrapped == [dict(broadcast_buffers=False)]       # share_buffers_ does that
    assert found[1][0] == found[0][0]
    assert found[1][1:] == [[2 * n for n in lot] for lot in found[0][1:]]
    batches = steps()
    batches[1].x[0, 0] = math.inf
    assert len(train(flags(), batches, Line())[0]) == STEPS


# ---- the last scoring -------------------------------------------------------------------------

N, CLASSES, SIDE = 60, 4, 8


def network(seed, norm):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5) if norm == "batch" else nn.ReLU(),
                          nn.Flatten(), nn.Linear(5 * 36, CLASSES))
    if norm == "batch":
        model[1].running_mean.normal_()
    return model


def splits():
    rng = np.random.default_rng(0)

    def batches(n, size):
        images = rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)
        return data.Batches(data.Split(images, np.arange(n) % CLASSES), (0.5,) * 3, (0.3,) * 3,
                            size, augment="crop")
    return batches(N, 16), batches(37, 16), batches(53, 20)


def measured(model, batches):
    """Accuracy, cross-entropy and logits of a network on a split, in one piece."""
    with torch.no_grad():
        logits = model.eval()(torch.cat([b.x for b in batches]))
    log = logits.double() - logits.double().exp().sum(1, keepdim=True).log()
    y = batches.labels
    return ((logits.argmax(1) == y).double().mean().item(),
            -log[torch.arange(len(y)), y].mean().item(), logits)


def remeasured(model, train, epoch):
    """Set a BatchNorm's statistics to the means, over the batches, of mean and variance."""
    with torch.no_grad():
        seen = [model[0](b.x) for b in train.epoch(epoch)]
    model[1].running_mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    model[1].running_var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    return model


def rows(own, average):
    speeds, seconds = (500.0, 10.0, 40.0, 20.0), (1.0, 2.0, 4.0, 8.0)
    return [dict(val_accuracy=v, ema_val_accuracy=a, seconds=s, images_per_second=speed)
            for v, a, s, speed in zip(own, average, seconds, speeds, strict=False)]


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("own, average", [      # which epochs are the best, of four
    ((0.2, 0.6, 0.5, 0.6), (0.1, 0.3, 0.4, 0.9)), ((0.2, 0.3, 0.4, 0.5), (0.7, 0.3, 0.4, 0.6))])
def test_score_against_one_pass(own, average, norm, tmp_path, capsys, monkeypatch):
    shared = []
    monkeypatch.setattr(device, "share_buffers_", lambda *modules: shared.append(modules))
    train, val, test = splits()
    last = {"model": network(0, norm), "ema": network(1, norm)}
    kept = {"model": network(2, norm), "ema": network(3, norm)}
    first = {"model": own.index(max(own)) + 1, "ema": average.index(max(average)) + 1}
    best = {name: (kept if first[name] < 4 else last)[name] for name in kept}
    expected = {name: measured(best[name], test) for name in best}
    ends = {name: measured(last[name], test)[0] for name in last}
    states = {name: {k: v.clone() for k, v in best[name].state_dict().items()} for name in best}
    args = SimpleNamespace(recipe="digits", seed=3, arch="mlp", epochs=4, device="cpu",
                           precision="fp32", norm=norm)
    facts = dict(setup_seconds=100.0, teacher_seconds=1000.0, parameters=7)
    started = time.perf_counter()
    final = common.score(args, tmp_path, last, best=states, history=rows(own, average),
                         splits=(train, val, test), facts=facts, limit=0.59)
    took = time.perf_counter() - started
    assert 1115 < final["seconds"] <= 1115 + took
    assert final["images_per_second"] == 20         # median of the last three
    assert (final["best_epoch"], final["ema_best_epoch"]) == (first["model"], first["ema"])
    assert final["val_accuracy"] == max(own) and final["ema_val_accuracy"] == max(average)
    assert final["test_accuracy"] == pytest.approx(expected["model"][0])
    assert final["test_loss"] == pytest.approx(expected["model"][1], rel=1e-5)
    assert final["ema_test_accuracy"] == pytest.approx(expected["ema"][0])
    assert final["last_test_accuracy"] == pytest.approx(ends["model"])
    assert final["ema_last_test_accuracy"] == pytest.approx(ends["ema"])
    assert final["learned"] is (max(own) > 0.59) and facts.items() <= final.items()
    assert ("learned nothing" in capsys.readouterr().out) is not final["learned"]
    with np.load(tmp_path / "test.npz") as file:        # of the best weights, not of the average
        np.testing.assert_allclose(file["logits"], expected["model"][2], atol=1e-5)
        np.testing.assert_array_equal(file["labels"], test.labels)
        np.testing.assert_allclose(file["ema_logits"], expected["ema"][2], atol=1e-5)
    assert shared == ([(last["ema"],)] if norm == "batch" else [])      # measured anew, and shared
    if norm == "none":
        assert final["recomputed_test_accuracy"] is final["recomputed_val_accuracy"] is None
    else:
        again = remeasured(best["ema"], train, 4)
        assert final["recomputed_test_accuracy"] == pytest.approx(measured(again, test)[0])
        assert final["recomputed_val_accuracy"] == pytest.approx(measured(again, val)[0])
        assert final["recomputed_test_accuracy"] != final["ema_test_accuracy"]


def test_score_of_one_epoch_without_average_or_validation(tmp_path):
    train, val, test = splits()
    none = data.Batches(data.Split(np.zeros((0, SIDE, SIDE, 3), np.uint8), np.zeros(0, int)),
                        (0.5,) * 3, (0.3,) * 3, 16)
    model = network(0, "batch")
    right = measured(model, test)[0]
    args = SimpleNamespace(recipe="digits", seed=3, arch="mlp", epochs=1, device="cpu",
                           precision="fp32", norm="batch")
    facts = dict(setup_seconds=100.0, teacher_seconds=None)

    def score(networks, limit):
        return common.score(args, tmp_path, networks, best={}, history=rows([None], [None]),
                            splits=(train, none, test), facts=facts, limit=limit)

    started = time.perf_counter()
    final = score({"model": model}, limit=right)
    assert 101 < final["seconds"] < 101 + time.perf_counter() - started
    assert final["learned"] is False                # at the limit is not above it
    assert final["test_accuracy"] == final["last_test_accuracy"] == pytest.approx(right)
    assert final["images_per_second"] == 500
    for key in ("val_accuracy", "ema_best_epoch", "ema_val_accuracy", "ema_test_accuracy",
                "ema_last_test_accuracy", "recomputed_val_accuracy", "recomputed_test_accuracy"):
        assert final[key] is None
    assert score({"model": model}, limit=right - 1e-6)["learned"] is True
    # With an average, its statistics can be measured anew, but there is nothing to validate on.
    final = score({"model": model, "ema": network(1, "batch")}, limit=0)
    assert final["recomputed_test_accuracy"] > 0 and final["recomputed_val_accuracy"] is None


@pytest.mark.parametrize("processes, kept", [(1, True), (2, False)])
def test_only_one_process_alone_keeps_its_outputs(processes, kept, tmp_path, monkeypatch):
    """Of several each has seen a part of the test split."""
    train, val, test = splits()
    monkeypatch.setattr(common, "world", lambda: processes)
    args = SimpleNamespace(recipe="digits", seed=0, arch="mlp", epochs=1, device="cpu",
                           precision="fp32", norm="none")
    common.score(args, tmp_path, {"model": network(0, "none")}, {}, rows([0.5], [None]),
                 (train, val, test), dict(setup_seconds=0, teacher_seconds=0), 0.1)
    assert (tmp_path / "test.npz").exists() is kept


def test_scoring_in_bfloat16_is_in_bfloat16(tmp_path, monkeypatch):
    train, val, test = splits()
    asked = []

    def spy(model, batches, precision="fp32", kept=None, whole=common.evaluate):
        asked.append(precision)
        return whole(model, batches, precision, kept)

    monkeypatch.setattr(common, "evaluate", spy)
    args = SimpleNamespace(recipe="digits", seed=0, arch="mlp", epochs=2, device="cpu",
                           precision="bf16", norm="batch")
    networks = {"model": network(0, "batch"), "ema": network(1, "batch")}
    common.score(args, tmp_path, networks, {name: one.state_dict() for name, one in
                                            networks.items()}, rows([0.5, 0.4], [0.5, 0.4]),
                 (train, val, test), dict(setup_seconds=0, teacher_seconds=0), 0.1)
    assert asked == ["bf16"] * 6
