"""EMA, evaluate, the schedule, seeds and checkpoint files, against closed forms and torch's own."""
import copy
import importlib
import math
import os
from types import SimpleNamespace

import mutants
import numpy as np
import pytest
import torch
from tiny import best_epoch, learned_nothing
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import common
import device
import models
import runs


def net(seed=0, norm="batch"):
    """A network with two BatchNorms that have seen data; every tensor is random."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3),
                          nn.BatchNorm2d(6) if norm == "batch" else nn.Identity(), nn.ReLU(),
                          nn.Flatten(), nn.Linear(96, 5))
    stir(model)
    return model


def stir(model):
    """Move every parameter, and the buffers by a forward pass, as a training step does."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model.train()(torch.randn(8, 3, 8, 8))


def floats(model):
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


# ---- EMA --------------------------------------------------------------------------------------

def test_ema_closed_form_with_a_constant_model():
    model, average = net(0), common.make_average(net(1))
    start, decay, updates = copy.deepcopy(floats(average)), 0.9, 25
    for _ in range(updates):
        common.ema_update_(average, model, decay)
    for name, value in floats(average).items():
        expected = decay ** updates * start[name] + (1 - decay ** updates) * floats(model)[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_ema_of_a_moving_model_is_the_weighted_sum_of_all_its_states():
    model = net(0)
    average, decays = common.make_average(model), [0.1, 0.5, 0.9, 0.99]
    expected = {k: v.double() for k, v in floats(model).items()}
    for decay in decays:
        stir(model)
        common.ema_update_(average, model, decay)
        expected = {k: decay * v + (1 - decay) * floats(model)[k].double()
                    for k, v in expected.items()}
    for name, value in floats(average).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_ema_equals_torch():
    model = net(0)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    stir(model)
    reference.update_parameters(model)          # the first update copies
    average = common.make_average(model)
    for _ in range(5):
        stir(model)
        reference.update_parameters(model)
        common.ema_update_(average, model, 0.8)
    theirs = reference.module.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():           # BatchNorm's running mean and variance among them
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(value, model.state_dict()[name])
        else:                                   # batches counted: an average makes no sense
            assert torch.equal(value, model.state_dict()[name])
    assert sum("running" in name for name in theirs) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_equals_timm(dtype):
    pytest.importorskip("timm", "1.0.31")      # earlier ones' average knows no dtype
    timm = pytest.importorskip("timm.utils")
    model = net(0)
    # Without dtype timm's average has the model's, and rounds at random where that is bfloat16.
    reference = timm.ModelEmaV3(model.to(dtype), decay=0.8, use_warmup=False, dtype=torch.float32)
    average = common.make_average(model)
    for _ in range(5):
        stir(model.float())
        model.to(dtype)
        reference.update(model)
        common.ema_update_(average, model, 0.8)
    theirs = reference.module.state_dict()
    for name, value in average.state_dict().items():        # the count of batches among them
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)
    assert theirs["1.num_batches_tracked"] == 6 and theirs["1.running_var"].dtype == torch.float32


def test_ema_decay_0_copies_and_1_freezes():
    model, average = net(0), common.make_average(net(1))
    stir(model)         # one more batch counted than the average has
    before = copy.deepcopy(average.state_dict())
    common.ema_update_(average, model, 1)
    assert all(torch.equal(v, before[k]) for k, v in floats(average).items())
    common.ema_update_(average, model, 0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in average.state_dict().items())


def test_ema_leaves_the_model_alone_and_takes_no_gradient():
    model = net(0)
    average = common.make_average(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in average.state_dict().items())
    before = copy.deepcopy(model.state_dict())
    common.ema_update_(average, net(1), 0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_ema_of_another_architecture_is_an_error():
    average = common.make_average(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="zip"):
        common.ema_update_(average, nn.Linear(2, 2), 0.5)


def test_ema_of_a_bfloat16_model_moves():
    model = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    average = common.make_average(model)
    assert average.weight.dtype == torch.float32
    nn.init.constant_(model.weight, 1 + 2 ** -7)    # the next bfloat16: 0.999 of the way is lost
    for _ in range(10):
        common.ema_update_(average, model, 0.999)
    expected = 1 + 2 ** -7 * (1 - 0.999 ** 10)
    torch.testing.assert_close(average.weight.detach(), torch.full((1, 2), expected), rtol=1e-6,
                               atol=0)


def test_ema_warm_up():
    assert [common.ema_decay(0.9, t) for t in (0, 1, 8, 80, 81)] == pytest.approx(
        [1 / 10, 2 / 11, 9 / 18, 81 / 90, 0.9])
    assert common.ema_decay(0.0, 50) == common.ema_decay(0.9, -1) == 0
    assert common.ema_reached(0.99) == 890 and common.ema_reached(0.999) == 8990
    for decay in (0.0, 0.1, 0.5, 0.9, 0.97, 0.99, 0.996, 0.999):
        first = common.ema_reached(decay)
        assert (1 + first) / (10 + first) >= decay - 1e-12
        assert first == 0 or first / (9 + first) < decay


@pytest.mark.parametrize("decay, first", [      # 1e-6 is taken for rounding, no more than that
    (0.10000009044999092, 1), (0.10000008999, 0), (0.25000006281249476, 3), (0.2500000624, 2)])
def test_ema_is_reached_an_update_later_from_a_millionth_on(decay, first):
    assert common.ema_reached(decay) == first


# ---- evaluate ---------------------------------------------------------------------------------

def labelled(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(5, (n,), generator=g)


def test_evaluate_unequal_batches_against_one_pass():
    model, (x, y) = net(norm="none").eval(), labelled(23)
    logits = model(x).double()
    loss = -sum(torch.log_softmax(logits[i], 0)[y[i]].item() for i in range(23)) / 23
    hits = sum(int(logits[i].argmax()) == int(y[i]) for i in range(23))
    assert 0 < hits < 23
    for sizes in ([23], [10, 10, 3], [1, 22], [1] * 23):
        found = common.evaluate(model, list(zip(x.split(sizes), y.split(sizes), strict=True)))
        assert found["n"] == 23 and found["accuracy"] == hits / 23
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert {k: type(v) for k, v in found.items()} == {"loss": float, "accuracy": float,
                                                         "n": int}


def test_evaluate_ignores_unlabelled_rows():
    model, (x, y) = net(), labelled(12)
    expected = common.evaluate(model, [(x[:7], y[:7])])
    y[7:] = -1
    found = common.evaluate(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert found["n"] == 7 and found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_evaluate_takes_any_iterable_and_a_model_without_parameters():
    x, y = torch.eye(4)[[0, 1, 2, 3, 3]] * 5, torch.tensor([0, 1, 2, 0, 3])
    expected = F.cross_entropy(x, y).item()
    batches = [[x[:4], y[:4], "more", None], (x[4:], y[4:])]
    for given in (batches, iter(batches), (item for item in batches)):
        found = common.evaluate(nn.Identity(), given)
        assert found["accuracy"] == 0.8 and found["loss"] == pytest.approx(expected)


def test_evaluate_goes_to_the_device_of_the_model():
    class There(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, x):
            return x

    def item(tensor):
        return SimpleNamespace(device=tensor.device, to=lambda place: asked.append(place) or tensor)

    asked, x, y = [], torch.eye(4), torch.arange(4)
    assert common.evaluate(There(), [(item(x), item(y))])["accuracy"] == 1
    assert asked == [torch.device("meta")] * 2


def test_evaluate_in_bfloat16_sums_in_float32_and_keeps_the_logits():
    torch.manual_seed(0)
    model, x, y, kept = nn.Linear(6, 5), torch.randn(40, 6), torch.arange(40) % 5, []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    loss = -sum(torch.log_softmax(logits[i].double(), 0)[y[i]].item() for i in range(40)) / 40
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    found = common.evaluate(model, batches, "bf16", kept)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert [len(part) for part in kept] == [30, 10]
    assert torch.cat(kept).dtype == torch.float32 and torch.equal(torch.cat(kept), logits.float())


def test_evaluate_adds_up_in_float64():
    # One loss of 2**26, by hand, and 100 of ln 2: in float32 the small ones would vanish.
    x = torch.cat([torch.tensor([[0, 2.0 ** 26]]), torch.zeros(100, 2)])
    batches = [(row[None], torch.tensor([0])) for row in x]
    expected = (2 ** 26 + 100 * np.float32(math.log(2)).item()) / 101
    assert common.evaluate(nn.Identity(), batches)["loss"] == pytest.approx(expected, rel=1e-12)


def test_evaluate_runs_in_eval_mode_and_gives_every_mode_back():
    model, (x, y) = net(), labelled(6)
    model[1].eval()                             # one frozen BatchNorm in a network that trains
    before = copy.deepcopy(model.state_dict())
    alone = common.evaluate(copy.deepcopy(model).eval(), [(x, y)])
    assert common.evaluate(model, [(x[:2], y[:2]), (x[2:], y[2:])])["loss"] == pytest.approx(
        alone["loss"], rel=1e-5)                # in train mode a row would depend on its batch
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    class Broken(Exception):
        pass

    def broken():
        assert not any(layer.training for layer in model)
        yield x, y
        raise Broken

    with pytest.raises(Broken):
        common.evaluate(model, broken())
    assert [layer.training for layer in model] == [True, False] + [True] * 6 and model.training
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_without_labels_is_an_error():
    x, y = labelled(4)
    with pytest.raises(ValueError, match="no labelled rows"):
        common.evaluate(net(), [(x, torch.full_like(y, -1))])
    with pytest.raises(ValueError, match="no labelled rows"):
        common.evaluate(net(), [])


def test_evaluate_adds_to_those_of_other_processes_even_without_a_batch_of_its_own(monkeypatch):
    def summed(sums):
        assert sums.dtype == torch.float64      # or the sum over processes would fail
        return sums + torch.tensor([6.0, 1.0, 4.0])

    monkeypatch.setattr(common, "summed", summed)
    assert common.evaluate(nn.Identity(), []) == dict(loss=1.5, accuracy=0.25, n=4)


# ---- schedule, optimizer, best epoch, chance --------------------------------------------------

@pytest.mark.parametrize("steps", [2, 3, 4, 7, 10, 33, 100, 840, 1001])
def test_onecycle_against_torch(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert common.schedule("onecycle", step, steps) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            reference.step()


def test_the_other_schedules():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        expected = optimizer.param_groups[0]["lr"]
        assert common.schedule("cosine", step, 50) == pytest.approx(expected, rel=1e-9)
        assert common.schedule("constant", step, 50) == 1
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizer_decays_weights_but_not_biases_and_norms(name):
    model = models.build("digits-student", 4, (3, 16, 16), norm="batch")
    args = SimpleNamespace(optimizer=name, lr=0.1, weight_decay=0.5)
    optimizer = common.make_optimizer(model, args)
    assert type(optimizer).__name__.lower() == name and optimizer.defaults["fused"]
    found = {p: (group["weight_decay"], group["lr"]) for group in optimizer.param_groups
             for p in group["params"]}
    assert found == {p: (0.5 if name.endswith("weight") and p.ndim > 1 else 0.0, 0.1)
                     for name, p in model.named_parameters()}


def test_sgd_is_nesterovs_with_a_momentum_of_a_tenth_lost():
    """v ← 0.9·v + g, w ← w − lr·(g + 0.9·v): Sutskever et al. 2013 (ICML 28), section 2, in the
    form in which w is where the gradient was taken. With a constant g of 1, by hand."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    args = SimpleNamespace(optimizer="sgd", lr=0.1, weight_decay=0.0)
    optimizer = common.make_optimizer(model, args)
    for total in (1 + 0.9, 1.9 + 1 + 0.9 * 1.9, 4.61 + 1 + 0.9 * 2.71):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        assert model.weight.item() == pytest.approx(-0.1 * total, rel=1e-6)


def test_best_epoch_is_the_first_of_the_highest():
    def history(*values):
        return [dict(val_accuracy=v, ema_val_accuracy=1 - v) for v in values]

    assert best_epoch(history(0.1, 0.7, 0.5, 0.7), "model") == 2
    assert best_epoch(history(0.1, 0.7, 0.5, 0.7), "ema") == 1
    assert best_epoch(history(0.3), "model") == 1
    assert best_epoch([dict(val_accuracy=None)] * 3, "model") == 3     # without any: the last


def test_chance_is_three_standard_errors_above_the_largest_class():
    labels = torch.tensor([0] * 30 + [1] * 10 + [-1] * 60)      # unlabelled rows do not count
    assert runs.chance(labels) == pytest.approx(0.75 + 3 * math.sqrt(0.75 * 0.25 / 40))
    assert runs.chance(torch.arange(1000) % 10) == pytest.approx(0.1 + 3 * math.sqrt(9e-5))
    # Of few labels 3 standard errors are more than all: all right is above it, one wrong is not.
    assert 7 / 8 < runs.chance([0, 1] * 4) < 1


def test_the_warning_after_a_third_of_the_epochs():
    def warn(epochs, losses, accuracy):
        return learned_nothing([dict(train_loss=loss, val_loss=loss, val_accuracy=accuracy)
                                for loss in losses], epochs, 0.3, 10)

    for epochs, third in ((1, 1), (2, 1), (3, 1), (4, 2), (9, 3), (10, 4)):
        for length in range(1, epochs + 1):
            said = warn(epochs, [2.0] * length, 0.25)
            assert (length == third) == bool(said), (epochs, length)
    said = warn(3, [2.302], 0.1)
    assert said.startswith("warning: nothing learned")
    for cause in ("ln(10)", "--init he", "--lr", "ReLU"):
        assert cause in said
    assert "ln(" not in warn(3, [2.0], 0.1)
    assert not warn(3, [2.302], 0.31) and not warn(3, [2.302], None)
    # One epoch above chance is enough, whichever it was.
    rows = [dict(train_loss=2.3, val_loss=2.3, val_accuracy=v) for v in (0.5, 0.1)]
    assert not learned_nothing(rows, 6, 0.3, 10)


# ---- seeds, device ----------------------------------------------------------------------------

def test_seeds_of_different_uses_differ():
    seeds = [common.seed_for(s, stream, epoch) for s in range(5) for stream in common.STREAMS
             for epoch in range(60)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2 ** 32 for s in seeds)
    at = list(common.STREAMS).index("order")
    assert common.seed_for(3, "order", 7) == np.random.SeedSequence((3, at, 7)).generate_state(1)[0]
    draws = [torch.rand(4, generator=common.generator(2 ** 32 - 1, "view", e)) for e in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_pick_device(capsys):
    assert common.pick_device("cpu") == torch.device("cpu")
    assert common.pick_device().type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stop:
            common.pick_device("cuda")
        line = capsys.readouterr().err
        assert stop.value.code == 2 and "--device cuda" in line and "cpu" in line


def test_pick_precision():
    cpu = torch.device("cpu")
    assert device.pick_precision("bf16", cpu) == "bf16"
    assert device.pick_precision("fp32", cpu) == "fp32"
    assert device.pick_precision("auto", cpu) in ("bf16", "fp32")


# ---- checkpoint files -------------------------------------------------------------------------

def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = dict(model=net().state_dict(), epoch=3, classes=["a", "b"], mean=(0.5, 0.25), ema=None)
    common.save_checkpoint(tmp_path / "x.pt", state)
    back = common.load_checkpoint(tmp_path / "x.pt")
    assert all(torch.equal(v, state["model"][k]) for k, v in back.pop("model").items())
    state.pop("model")
    assert back == state
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_write_that_is_cut_short_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    common.save_checkpoint(tmp_path / "x.pt", dict(epoch=1))

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        common.save_checkpoint(tmp_path / "x.pt", dict(epoch=2))
    assert common.load_checkpoint(tmp_path / "x.pt") == dict(epoch=1)


class Code:
    """Unpickling this would run code."""

    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save(dict(model=Code()), tmp_path / "x.pt")
    whole = tmp_path / "whole.pt"
    common.save_checkpoint(whole, dict(x=torch.arange(1000)))
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-500])
    (tmp_path / "text.pt").write_text("not a checkpoint\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("x.pt", "cut.pt", "text.pt", "empty.pt", "absent.pt"):
        with pytest.raises(SystemExit) as stop:
            common.load_checkpoint(tmp_path / name)
        found = capsys.readouterr()
        assert stop.value.code == 2 and found.err.count("\n") == 1 and name in found.err
        assert "was run" not in found.out


# ---- processors -------------------------------------------------------------------------------

@pytest.mark.parametrize("files, own, expected", [
    ({}, "", 8), ({"cpu.max": "max 100"}, "0::/\n", 8), ({"cpu.max": "250 100"}, "0::/", 3),
    ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, "1:x:/y\n0::/a/b\n", 1),
    ({"a/b/cpu.max": "400000 100000", "cpu.max": "900000 100000"}, "0::/a/b", 4),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", 2),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", 8),
    *(({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
        "cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"},
       f"5:cpuset:/\n4:{listed}:/a/b c\n0::/x\n", 2) for listed in (
        "cpu", "cpu,cpuacct", "cpuacct,cpu", "net_cls,cpu,cpuacct")),
    ({"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"},
     "5:cpuset:/a\n4:cpuacct:/a\n", 8),
    ({"cpu,cpuacct/a/cpu.cfs_quota_us": "150000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
      "cpuset/a/x": ""}, "5:cpuset:/\n4:cpu,cpuacct:/a\n", 2),
    ({"cpu.max": "nonsense"}, "0::/", 8)])
def test_the_quota_of_a_cgroup_is_honoured(tmp_path, monkeypatch, files, own, expected):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert device.cpus(tmp_path / "groups", tmp_path / "own") == expected


def test_no_more_threads_than_processors(monkeypatch):
    threads = torch.get_num_threads()
    try:
        for environment, expected in (({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)):
            torch.set_num_threads(2)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setattr(device, "cpus", lambda: 1)
            device.set_up(SimpleNamespace(device="cpu", precision="fp32", deterministic=False))
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("files, own, expected", [
    ({}, "", None), ({"memory.max": "max\n"}, "0::/\n", None),
    ({"a/memory.max": "5000\n", "a/b/memory.max": "max\n"}, "0::/a/b\n", 5000),
    ({"memory/memory.limit_in_bytes": "7000\n"}, "4:memory:/\n", 7000),
    ({"memory/memory.limit_in_bytes": "7000\n", "memory/a/b/memory.limit_in_bytes": "600\n"},
     "5:cpuset:/\n4:memory:/a/b\n3:cpu:/\n", 600)])
def test_the_memory_of_a_cgroup_is_honoured(tmp_path, files, own, expected):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device.memory(tmp_path / "groups", tmp_path / "own") == (expected or whole)


def test_every_target_of_the_mutants_is_there():
    """`make mutants` takes long; that a name is gone is to be seen before."""
    for file, names in mutants.TARGETS.items():
        for name, starts in names.items():
            assert next(mutants.mutants(importlib.import_module(file), name))
            for start in starts:
                where, _, test = start.partition("::")
                assert f"def {test}" in (mutants.HERE / where).read_text("utf-8"), start
