"""common.fit alone, every figure of its rows against arithmetic by hand; what stops a run; the
frozen teacher's images against its own normalisation."""
import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import distill
import runs

SIDE, CLASSES, STEPS, SIZE = 4, 3, 3, 4
CARD = dict(settings="of this run", classes=["a", "b", "c"])
FACTS = dict(setup_seconds=0.0, teacher_seconds=None)
TRAIN, VAL, TEST = np.arange(14) % CLASSES, [0, 0, 1, 1, 2] * 8, [0, 1, 1, 1, 2] * 8
NONE = np.zeros(0, int)


def splits(val=VAL, size=SIZE):
    """Three steps of four images in an epoch; validation and test of other shares of classes."""
    return tuple(data.Batches(data.Split(tiny.images(len(labels), seed, SIDE), np.array(labels)),
                              (0.5,) * 3, (0.3,) * 3, size)
                 for seed, labels in enumerate((TRAIN, val, TEST)))


def flags(**changed):
    return SimpleNamespace(**dict(
        epochs=3, resume=False, optimizer="adamw", lr=0.05, weight_decay=0.01, precision="fp32",
        schedule="cosine", clip=0.0, ema_decay=0.5, recipe="digits", seed=0, arch="mlp",
        device="cpu", norm="batch") | changed)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Flatten(), nn.Linear(36, CLASSES))


def loss_fn(model, batch):
    logits = model(batch.x)
    return F.cross_entropy(logits, batch.y), logits


# ---- its arithmetic, where training and evaluating do what they are told ----------------------

LOSSES = [1.0, 2.0, 4.5], [0.5, 0.25, 3.0], [0.125, 0.5, 0.5]
HITS, ROWS = ([1, 0, 2], [1, 0, 0], [0, 0, 0]), ([4, 1, 3], [1, 0, 0], [0, 0, 0])
OWN, AVERAGE = (0.5, 0.75, 0.75), (0.25, 0.125, 0.5)


class Line(nn.Linear):
    """One matrix, so one group of the optimizer: no bias, no norm."""

    def __init__(self, dtype=None):
        super().__init__(3, 2, bias=False, dtype=dtype)


def play(monkeypatch, folder, model=None, averaged=True, val=VAL, spoil=None, size=SIZE,
         **changed):
    """Run fit with stand-ins: epoch e fills the weights with e and the average with 10·e, takes
    2e seconds and each evaluation 0.25. Return what they were given, and what fit returned."""
    seen = SimpleNamespace(now=100.0, modes=[], told=[], updates=[], bars=[], evaluated=[],
                           limits=[], drawn=[], final={"told": "by score"}, written=[])
    model = Line() if model is None else model
    average = common.make_average(model) if averaged else None

    def train_epoch(args, model, average, loss_fn, optimizer, batches, update, total, bar):
        (epoch,) = {batch.epoch for batch in batches}
        seen.now += 2 * epoch
        seen.updates.append((epoch, update, total))
        seen.modes.append(model.training)
        for one, value in ((model, epoch), (average, 10 * epoch)):
            if one is not None:
                nn.init.constant_(next(one.parameters()), value)
        optimizer.param_groups[0]["lr"] = epoch / 8
        losses = torch.tensor(LOSSES[epoch - 1])
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        if spoil:
            spoil(model, losses)
        return (losses, torch.tensor(HITS[epoch - 1]), torch.tensor(ROWS[epoch - 1]),
                torch.ones(STEPS, 1))

    def evaluate(network, batches, precision):
        seen.now += 0.25
        seen.evaluated.append((network is model, batches is parts[1], precision))
        weight = next(network.parameters()).flatten()[0].item()
        right = OWN[int(weight) - 1] if network is model else AVERAGE[int(weight) // 10 - 1]
        return {"loss": weight / 4, "accuracy": right, "n": 40}

    def score(args, folder, networks, best, history, splits, facts, limit):
        seen.networks, seen.best, seen.history = networks, best, history
        seen.limits.append(limit)
        seen.given = folder, splits, facts
        return seen.final

    def bar(**options):
        seen.bars.append(options)
        return SimpleNamespace(close=lambda: seen.bars.append("closed"))

    def learned_nothing(history, epochs, limit, classes):
        seen.limits.append((epochs, limit, classes))
        return f"warning after {len(history)}" if len(history) == 2 else None

    for name, one in dict(train_epoch=train_epoch, evaluate=evaluate, score=score, tqdm=bar,
                          time=SimpleNamespace(perf_counter=lambda: seen.now),
                          tell_time=lambda lot, total: seen.told.append(total) or lot).items():
        monkeypatch.setattr(common, name, one)
    monkeypatch.setattr(runs, "learned_nothing", learned_nothing)
    monkeypatch.setattr(runs, "write_final", lambda *given: seen.written.append(given))
    parts, args = splits(val, size), flags(**changed)
    seen.returned = common.fit(args, folder, model.eval(), loss_fn, parts, CARD, FACTS, average,
                               lambda *given, **more: seen.drawn.append((*given, more)))
    assert seen.given == (folder, parts, FACTS)
    return seen


def test_a_fit_writes_rows_of_figures_worked_out_by_hand(monkeypatch, tmp_path):
    seen = play(monkeypatch, tmp_path)
    expected = [
        # 7.5 / 3; 3 hits of 8; 12 images in 2 s; twice 0.25 s of evaluating on top
        dict(epoch=1, train_loss=2.5, train_accuracy=0.375, val_loss=0.25, val_accuracy=0.5,
             ema_val_loss=2.5, ema_val_accuracy=0.25, lr=0.125, seconds=2.5,
             images_per_second=6.0),
        # one labelled row is one; 12 images in 4 s
        dict(epoch=2, train_loss=1.25, train_accuracy=1.0, val_loss=0.5, val_accuracy=0.75,
             ema_val_loss=5.0, ema_val_accuracy=0.125, lr=0.25, seconds=4.5,
             images_per_second=3.0),
        # no labelled row is no division by zero; 12 images in 6 s
        dict(epoch=3, train_loss=0.375, train_accuracy=0.0, val_loss=0.75, val_accuracy=0.75,
             ema_val_loss=7.5, ema_val_accuracy=0.5, lr=0.375, seconds=6.5,
             images_per_second=2.0)]
    assert seen.history == expected and list(seen.history[0]) == list(runs.METRICS)
    assert [{k: float(v) for k, v in row.items()}
            for row in tiny.metrics(tmp_path, clocks=True)] == expected
    assert seen.evaluated == [(True, True, "fp32"), (False, True, "fp32")] * 3


def test_a_fit_hands_each_epoch_its_batches_and_the_number_of_its_first_update(
        monkeypatch, tmp_path):
    seen = play(monkeypatch, tmp_path)
    assert seen.updates == [(1, 0, 9), (2, 3, 9), (3, 6, 9)] and seen.modes == [True] * 3
    assert seen.told == [9]         # the first epoch alone measures, for all that are to come
    assert seen.bars == [dict(total=9, initial=0, desc=tmp_path.name, unit=" steps",
                              dynamic_ncols=True, leave=False, disable=common.silent()), "closed"]


def test_a_fit_counts_the_images_of_a_batch_that_is_not_full(monkeypatch, tmp_path):
    """All 14 images are one step, however many a batch might hold."""
    seen = play(monkeypatch, tmp_path, size=20)
    assert [row["images_per_second"] for row in seen.history] == [14 / 2, 14 / 4, 14 / 6]
    assert seen.updates == [(1, 0, 3), (2, 1, 3), (3, 2, 3)]


def test_a_fit_draws_no_bar_for_a_process_that_is_silent(monkeypatch, tmp_path):
    for still in (True, False):
        monkeypatch.setattr(common, "silent", lambda still=still: still)
        assert play(monkeypatch, tmp_path).bars[0]["disable"] is still


def test_a_fit_without_average_or_validation_leaves_these_columns_empty(monkeypatch, tmp_path):
    seen = play(monkeypatch, tmp_path, averaged=False)
    assert [row["val_accuracy"] for row in seen.history] == list(OWN)
    assert all(row["ema_val_loss"] is row["ema_val_accuracy"] is None for row in seen.history)
    assert seen.networks.keys() == seen.best.keys() == {"model"}
    seen = play(monkeypatch, tmp_path, val=NONE)
    assert all(row[key] is None for row in seen.history for key in runs.METRICS[3:7])
    assert seen.evaluated == [] and [row["seconds"] for row in seen.history] == [2, 4, 6]
    for name, value in (("model", 3), ("ema", 30)):         # the last, where none is better
        assert (seen.best[name]["weight"] == value).all()


@pytest.mark.parametrize("val, share, n", [(VAL, 0.4, 40), (NONE, 0.6, 40), ([2], 1, 1)])
def test_a_fit_takes_chance_from_validation_where_there_is_any(monkeypatch, tmp_path, val, share,
                                                               n):
    limit = min(share + 3 * math.sqrt(share * (1 - share) / n), math.nextafter(1, 0))
    seen = play(monkeypatch, tmp_path, val=val)
    assert [given[1:] for given in seen.limits[:3]] == [(pytest.approx(limit, rel=1e-12), 3)] * 3
    assert [given[0] for given in seen.limits[:3]] == [3] * 3
    assert seen.limits[3:] == [seen.limits[0][1]]


def test_a_fit_keeps_the_weights_of_each_network_s_first_best_epoch(monkeypatch, tmp_path):
    seen = play(monkeypatch, tmp_path)
    for name, value, last in (("model", 2, 3), ("ema", 30, 30)):
        assert (seen.best[name]["weight"] == value).all()
        assert (seen.networks[name].weight == last).all()
    best, state = tiny.load(tmp_path / "best.pt"), tiny.load(tmp_path / "checkpoint.pt")
    assert (best["epoch"], best["ema_epoch"]) == (2, 3) and best["classes"] == CARD["classes"]
    assert tiny.same({name: best[name] for name in ("model", "ema")}, state["best"])
    assert tiny.same({name: dict(kept) for name, kept in seen.best.items()}, state["best"])
    assert (state["networks"]["model"]["weight"] == 3).all() and state["history"] == seen.history


def test_a_fit_says_each_epoch_and_what_the_run_warns_of(monkeypatch, tmp_path, capsys):
    play(monkeypatch, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [re.split("  |/", line)[0] for line in lines] == [
        "epoch 1", "epoch 2", "warning after 2", "epoch 3"]


def test_a_fit_draws_and_writes_what_score_returns(monkeypatch, tmp_path):
    seen = play(monkeypatch, tmp_path, objective="kd")
    assert seen.returned is seen.final and seen.written == [(tmp_path, seen.final)]
    assert seen.drawn == [(seen.history, tmp_path / "curves.png", dict(objective="kd"))]
    assert play(monkeypatch, tmp_path).drawn[0][2] == dict(objective=None)


def test_a_fit_of_another_process_than_the_first_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "rank", lambda: 1)
    seen = play(monkeypatch, tmp_path)
    assert len(seen.history) == 3 and seen.returned is seen.final
    assert not seen.written and not seen.drawn and not list(tmp_path.iterdir())


# ---- what stops it ----------------------------------------------------------------------------

class Counted(Line):
    """With buffers as BatchNorm has them, of which one counts in integers."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("running_var", torch.full((2,), value))
        self.register_buffer("num_batches_tracked", torch.tensor(3))


def stopped(capsys, monkeypatch, folder, **how):
    with pytest.raises(SystemExit) as stop:
        play(monkeypatch, folder, **how)
    assert stop.value.code == 3
    assert not list(folder.iterdir())       # of the epoch that went wrong nothing is kept
    return capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fit_stops_where_a_loss_or_a_weight_is_not_finite(monkeypatch, tmp_path, capsys, value):
    def spoil(model, losses):
        losses[1] = value
    line = stopped(capsys, monkeypatch, tmp_path, spoil=spoil)
    assert f"the loss is {value} at epoch 1, step 2," in line

    def spoil(model, losses):
        nn.init.constant_(model.weight[1:], value)
    line = stopped(capsys, monkeypatch, tmp_path, spoil=spoil, val=NONE)
    assert f"the norm of the weights is {value} at epoch 1, step 3," in line
    line = stopped(capsys, monkeypatch, tmp_path, model=Counted(value))
    assert "the running variance is nan at epoch 1, step 3," in line


@pytest.mark.parametrize("which, what", [
    (0, "validation loss"), (1, "average's validation loss")])
def test_a_fit_stops_where_a_validation_loss_is_not_finite(monkeypatch, tmp_path, capsys, which,
                                                           what):
    def spoil(model, losses):       # once the stand-ins are in place
        def evaluate(network, batches, precision):
            wrong = (network is not model) == which
            return {"loss": math.inf if wrong else 0.5, "accuracy": 0.5, "n": 40}
        monkeypatch.setattr(common, "evaluate", evaluate)
    line = stopped(capsys, monkeypatch, tmp_path, spoil=spoil)
    assert f"error: the {what} is inf at epoch 1, step 3," in line


def test_a_fit_goes_on_where_what_is_large_is_finite(monkeypatch, tmp_path):
    """A variance of which the double is not, half-precision weights of which the norm is not."""
    assert len(play(monkeypatch, tmp_path, Counted(3e38)).history) == 3

    def spoil(model, losses):
        nn.init.constant_(model.weight, 60000)
    model = Line(torch.float16)
    seen = play(monkeypatch, tmp_path, model, averaged=False, val=NONE, spoil=spoil)
    assert len(seen.history) == 3 and torch.isinf(model.weight.detach().norm())


class Layers(nn.Module):
    """Five parameters; the first takes no gradient, so no norm is of it."""

    def __init__(self):
        super().__init__()
        for i, name in enumerate(("still", "first", "second", "third", "fourth")):
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))
            getattr(self, name).grad = torch.zeros(1) if i else None


@pytest.mark.parametrize("values, epoch, what, step, layer, norm, kept", [
    ([1, 1, 1, math.inf], 1, "loss", 4, "third", 12, "nothing is saved"),
    ([1, 1, math.nan, math.inf], 2, "loss", 3, "second", 11, "the state after epoch 1 is kept"),
    ([1, -math.inf], 3, "loss", 2, "first", 10, "the state after epoch 2 is kept"),
    ([math.nan], 1, "loss", 1, "first", 10, "nothing is saved"),        # no step is before it
    ([math.nan], 2, "norm", 4, "fourth", 13, "the state after epoch 1 is kept")])
def test_a_stop_names_where_and_the_layer_of_the_largest_gradient_before(
        monkeypatch, capsys, values, epoch, what, step, layer, norm, kept):
    asked = []
    monkeypatch.setattr(common, "schedule", lambda *given: asked.append(given) or 0.25)
    norms = torch.diag(torch.tensor([10.0, 11, 12, 13]))        # in each step another layer's
    with pytest.raises(SystemExit) as stop:
        common.stop_unless_finite(flags(lr=0.2, epochs=5), values, norms, Layers(), epoch, 4,
                                  "there", what)
    wrong = next(value for value in values if not math.isfinite(value))
    assert stop.value.code == 3 and asked == [("cosine", 4 * (epoch - 1) + step - 1, 20)]
    assert capsys.readouterr().err == (
        f"error: the {what} is {wrong} at epoch {epoch}, step {step}, learning rate 0.05; the "
        f"largest gradient before was that of {layer}, norm {norm}; {kept} in there; try a lower "
        "--lr or --clip 1\n")


@pytest.mark.parametrize("clip, precision, told", [
    (0, "bf16", "try a lower --lr or --clip 1 or --precision fp32"),
    (1.0, "bf16", "try a lower --lr or --precision fp32"), (1.0, "fp32", "try a lower --lr")])
def test_what_is_set_already_is_not_advised(clip, precision, told):
    assert runs.calmer(flags(clip=clip, precision=precision)) == told


def test_a_stop_takes_a_gradient_that_is_no_number_for_the_largest(capsys):
    norms = torch.tensor([[1.0, math.nan, 1e30, 5.0]])
    with pytest.raises(SystemExit):
        common.stop_unless_finite(flags(), [math.inf], norms, Layers(), 1, 1, "there")
    assert "was that of second, norm nan;" in capsys.readouterr().err


def test_a_stop_needs_a_value_that_is_not_finite():
    common.stop_unless_finite(flags(), [0.0, 1e300, -1e300], None, None, 1, 3, "there")


# ---- with all that it calls -------------------------------------------------------------------

def by_hand(args, model, average, parts):
    """The same run as a plain loop; return its rows and the states after each epoch."""
    train, val, _ = parts
    decays = {"params": [p for p in model.parameters() if p.ndim > 1]}
    others = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decays, others], args.lr, weight_decay=args.weight_decay)
    rows, states, update = [], [], 0
    for epoch in range(1, args.epochs + 1):
        losses, right, count = [], 0, 0
        for batch in train.epoch(epoch):
            lr = args.lr * (1 + math.cos(math.pi * update / (args.epochs * STEPS))) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr
            logits = model.train()(batch.x)
            loss = F.cross_entropy(logits, batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(args.ema_decay, (1 + update) / (10 + update))
            for a, m in zip(average.state_dict().values(), model.state_dict().values(),
                            strict=True):
                a.copy_(decay * a + (1 - decay) * m if a.is_floating_point() else m)
            losses.append(loss.item())
            right += (logits.argmax(1) == batch.y).sum().item()
            count, update = count + len(batch.y), update + 1
        row = dict(epoch=epoch, train_loss=np.mean(losses), train_accuracy=right / count, lr=lr)
        x = torch.cat([batch.x for batch in val])
        for name, one in (("val", model), ("ema_val", average)):
            with torch.no_grad():
                logits = one.eval()(x)
            row[f"{name}_loss"] = F.cross_entropy(logits, val.labels).item()
            row[f"{name}_accuracy"] = (logits.argmax(1) == val.labels).double().mean().item()
        rows.append(row)
        states.append({name: copy.deepcopy(dict(one.state_dict()))
                       for name, one in (("model", model), ("ema", average))})
    return rows, states


def whole(folder, loss_fn=loss_fn, **changed):
    """A fit of four epochs with an average, and no stand-in; return its final dict."""
    folder.mkdir(exist_ok=True)
    model = network()
    return common.fit(flags(epochs=4, **changed), folder, model, loss_fn, splits(), CARD, FACTS,
                      common.make_average(model))


def test_a_fit_against_a_plain_loop(tmp_path):
    final, model = whole(tmp_path), network()
    state = tiny.load(tmp_path / "checkpoint.pt")
    rows, states = by_hand(flags(epochs=4), model, common.make_average(model), splits())
    for found, expected in zip(state["history"], rows, strict=True):
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-4)
        assert found["seconds"] > 0 and found["images_per_second"] > 0
    assert len({row["val_accuracy"] for row in rows}) > 1
    for name, column, key in (("model", "val", ""), ("ema", "ema_val", "ema_")):
        values = [row[f"{column}_accuracy"] for row in rows]
        first = values.index(max(values))
        assert final[f"{key}best_epoch"] == first + 1
        for k, v in states[first][name].items():
            torch.testing.assert_close(state["best"][name][k], v, rtol=1e-4, atol=1e-5)


def test_a_fit_resumed_is_what_it_would_have_been(monkeypatch, tmp_path, capsys):
    class Cut(Exception):
        pass

    def cut(model, batch):
        if batch.epoch == 3:
            raise Cut
        return loss_fn(model, batch)

    expected, folder, asked = whole(tmp_path / "a"), tmp_path / "b", []
    folder.mkdir()
    with pytest.raises(Cut):
        whole(folder, cut)
    assert len(tiny.metrics(folder)) == 2
    (folder / "metrics.csv").unlink()

    def spy(batches, total):
        asked.append(total)
        assert len(tiny.metrics(folder)) == 2       # as the checkpoint says, before it goes on
        return batches

    def bar(kind=common.tqdm, **options):
        asked.append((options["total"], options["initial"]))
        return kind(**options)

    monkeypatch.setattr(common, "tell_time", spy)
    monkeypatch.setattr(common, "tqdm", bar)
    again = whole(folder, resume=True)
    assert asked == [(12, 6), 6] and "going on after epoch 2" in capsys.readouterr().out
    clocks = {"run", *tiny.CLOCKS}
    assert {k: v for k, v in again.items() if k not in clocks} == {
        k: v for k, v in expected.items() if k not in clocks}
    left = [tiny.load(tmp_path / name / "checkpoint.pt") for name in "ab"]
    for state in left:
        state["history"] = [{k: v for k, v in row.items() if k not in clocks}
                            for row in state["history"]]
    assert tiny.same(*left) and tiny.metrics(folder) == tiny.metrics(tmp_path / "a")


def test_a_fit_that_is_resumed_after_its_last_epoch_puts_its_files_right(monkeypatch, tmp_path):
    """A run may have ended between two of its files; and without --resume it starts again."""
    whole(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("best.pt", "metrics.csv")}
    for number in (1, 0):       # of the process: the first alone writes
        for name in before:
            (tmp_path / name).unlink(missing_ok=True)
        monkeypatch.setattr(common, "rank", lambda number=number: number)
        whole(tmp_path, resume=True)
        assert {name for name in before if (tmp_path / name).exists()} == (
            set() if number else {*before})
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    epochs = []
    whole(tmp_path, lambda model, batch: epochs.append(batch.epoch) or loss_fn(model, batch))
    assert epochs == [1] * STEPS + [2] * STEPS + [3] * STEPS + [4] * STEPS


# ---- the frozen teacher -----------------------------------------------------------------------

MEAN, STD, OTHER = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.45, 0.35, 0.7)


def taught(mean, std, own_mean, own_std):
    """Return network, teacher, pixels / 255 and the batch that the student sees of them."""
    net = network().eval()
    job = SimpleNamespace(device=torch.device("cpu"), splits=SimpleNamespace(mean=mean, std=std))
    teacher = distill.frozen_teacher(net, dict(mean=own_mean, std=own_std), job)
    pixels = torch.from_numpy(tiny.images(9, 0, SIDE)).permute(0, 3, 1, 2).double() / 255
    return net, teacher, pixels, normalised(pixels, mean, std).float()


def normalised(x, mean, std):
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (mean, std))
    return (x - mean) / std


def test_a_frozen_teacher_of_the_same_normalisation_is_the_network_bit_for_bit():
    net, teacher, _, x = taught(MEAN, STD, list(MEAN), list(STD))
    assert torch.equal(teacher(x), net(x))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert not torch.equal(net((x * std + mean - mean) / std), net(x))      # which rounds


@pytest.mark.parametrize("own_mean, own_std", [
    (OTHER, STD), (MEAN, OTHER), (OTHER, (0.3, 0.2, 0.1)), ((0, 0, 0), (1, 1, 1)),
    (np.array(OTHER), np.array(STD))])      # in float64, which the network is not
def test_a_frozen_teacher_sees_the_images_in_its_own_normalisation(own_mean, own_std):
    net, teacher, pixels, x = taught(MEAN, STD, own_mean, own_std)
    found = teacher(x.requires_grad_())
    expected = copy.deepcopy(net).double()(normalised(pixels, own_mean, own_std))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and not torch.allclose(found, net(x), atol=1e-2)


def test_a_frozen_teacher_is_laid_out_as_the_images_are():
    net, *_ = taught(MEAN, STD, MEAN, STD)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
