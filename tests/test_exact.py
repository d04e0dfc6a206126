"""Randomness without state: a run repeated, killed and resumed, or paired with another is the
same bit for bit; and what a run folder lets happen to it.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
import tiny
import torch

import common
import distill
import files
import models
import runs
import train_student
import train_teacher

HOUSE = Path(common.__file__).parent
STUDENT = Path("digits/student-s0")


@pytest.fixture
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


# ---- repeated ---------------------------------------------------------------------------------

@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("script, flags, name", [
    (train_student, ("--ema-decay", 0.9, "--norm", "batch"), "student-s0"),
    (distill, ("--objective", "consistency", "--ema-decay", 0.9, "--labels", 40),
     "mean-teacher-s0"),
    (distill, ("--views", 2, "--precision", "bf16"), "kd-s0")])
def test_a_run_repeated_is_the_same_bit_for_bit(easy, chain, tmp_path, threads, script, flags,
                                                name):
    found = []
    for i in range(2):
        results = tiny.copy_teacher(chain[0], tmp_path / str(i))
        torch.manual_seed(i)                        # whatever was drawn before
        tiny.run(script, easy, results, *flags)
        found.append(tiny.outcome(results / "digits" / name))
    assert tiny.same(*found)


def test_another_seed_is_another_run(easy, tmp_path):
    states = []
    for seed in (0, 1):
        tiny.run(train_student, easy, tmp_path, "--seed", seed, epochs=1)
        states.append(tiny.load(tmp_path / "digits" / f"student-s{seed}" / "best.pt")["model"])
    assert not any(torch.equal(states[0][k], states[1][k]) for k in states[0] if "weight" in k)


# ---- stopped and resumed ----------------------------------------------------------------------

class Stop(Exception):
    """Stands for a lost machine."""


RESUMED = {
    "student-s0": (train_student, ("--ema-decay", 0.9, "--norm", "batch")),
    "mean-teacher-s0": (distill, ("--objective", "consistency", "--ema-decay", 0.9,
                                  "--labels", 40, "--optimizer", "sgd", "--warm-start", 1,
                                  "--noise", "0.5,0.5,0.3,0.2")),
    "kd-s0": (distill, ("--views", 2, "--schedule", "cosine")),
    "frozen": (train_teacher, ("--freeze", "features", "--unfreeze-at", 3, "--run", "frozen",
                               "--optimizer", "sgd")),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("step", [3, 7 * 2 + 3])    # in the first epoch, in the third
def test_a_run_stopped_in_an_epoch_and_resumed_is_the_same(easy, chain, tmp_path, monkeypatch,
                                                           name, step):
    script, flags = RESUMED[name]
    whole, cut = (tiny.copy_teacher(chain[0], tmp_path / x) for x in ("whole", "cut"))
    tiny.run(script, easy, whole, *flags, epochs=4)

    def stop(kind, at, steps, schedule=common.schedule):
        if at == min(step, steps - 1):
            raise Stop
        return schedule(kind, at, steps)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common, "schedule", stop)
        tiny.run(script, easy, cut, *flags, epochs=4)
    folder = cut / "digits" / name
    assert not (folder / "final.json").exists()
    if (folder / "checkpoint.pt").exists():
        assert len(tiny.load(folder / "checkpoint.pt")["history"]) == step // 6
    torch.manual_seed(step)                         # another process
    tiny.run(script, easy, cut, *flags, "--resume", epochs=4)
    assert tiny.same(tiny.outcome(folder), tiny.outcome(whole / "digits" / name))


@pytest.mark.parametrize("lost", ["best.pt", "metrics.csv", "checkpoint.pt", "final.json"])
def test_a_run_stopped_while_it_writes_and_resumed_is_the_same(easy, tmp_path, monkeypatch, lost):
    flags = ("--ema-decay", 0.9)
    tiny.run(train_student, easy, tmp_path / "whole", *flags, epochs=3)
    writes = []

    def stop(path, data, write=files.write_whole):
        writes.append(path.name)
        if path.name == lost and (writes.count(lost) == 2 or lost == "final.json"):
            raise Stop
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(runs, "write_whole", stop)
        patch.setattr(common, "write_whole", stop)
        tiny.run(train_student, easy, tmp_path / "cut", *flags, epochs=3)
    epoch = [name for name in writes if name not in ("config.json", "final.json")][:3]
    assert epoch == ["best.pt", "metrics.csv", "checkpoint.pt"]         # the last commits
    tiny.run(train_student, easy, tmp_path / "cut", *flags, "--resume", epochs=3)
    a, b = (tiny.outcome(tmp_path / x / STUDENT) for x in ("cut", "whole"))
    assert tiny.same(a, b)


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x"),
                                  lambda path: shutil.copy(path.with_name("first.pt"), path)])
def test_the_best_weights_are_those_of_finished_epochs(easy, tmp_path, monkeypatch, harm):
    """A killed run may leave a best.pt of an epoch that was not finished; on a GPU its second
    try need not be the best again. The checkpoint knows."""
    flags = ("--ema-decay", 0.9, "--lr", 0.003)
    final = tiny.run(train_student, easy, tmp_path / "whole", *flags, epochs=8)
    assert final["best_epoch"] < 8      # else the last epoch would hide the harm

    def stop(folder, card, history, best, *rest, save=common.save_epoch):
        save(folder, card, history, best, *rest)
        if len(history) == 1:
            shutil.copy(folder / "best.pt", folder / "first.pt")
        if len(history) == 7:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common, "save_epoch", stop)
        tiny.run(train_student, easy, tmp_path / "cut", *flags, epochs=8)
    harm(tmp_path / "cut" / STUDENT / "best.pt")
    tiny.run(train_student, easy, tmp_path / "cut", *flags, "--resume", epochs=8)
    assert tiny.same(*(tiny.outcome(tmp_path / x / STUDENT) for x in ("cut", "whole")))


def test_a_run_that_was_killed_and_resumed_is_the_same(easy, tmp_path):
    words = tiny.words(easy, tmp_path / "cut", epochs=20)
    folder = tmp_path / "cut" / STUDENT
    environment = os.environ | {"OMP_NUM_THREADS": "1"}     # as here: sums in the same order
    process = subprocess.Popen([sys.executable, HOUSE / "train_student.py", *words],
                               stdout=subprocess.DEVNULL, env=environment)
    try:
        patience = time.monotonic() + 60
        while not (folder / "checkpoint.pt").exists() and time.monotonic() < patience:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / "checkpoint.pt").exists() and not (folder / "final.json").exists()
    tiny.run(train_student, easy, tmp_path / "cut", "--resume", epochs=20)
    tiny.run(train_student, easy, tmp_path / "whole", epochs=20)
    assert tiny.same(tiny.outcome(folder), tiny.outcome(tmp_path / "whole" / STUDENT))


def test_resume_without_a_run_starts_one(easy, tmp_path):
    assert tiny.run(train_student, easy, tmp_path, "--resume", epochs=1)["epochs"] == 1


# ---- pairs ------------------------------------------------------------------------------------

@pytest.fixture
def fits(monkeypatch):
    """What common.fit was given by each script, in place of training: weights, batches, average."""
    seen = []

    def spy(args, folder, model, loss_fn, splits, card, facts, average=None, draw=None):
        seen.append(dict(
            name=folder.name, model=model, average=average, loss_fn=loss_fn,
            start={k: v.clone() for k, v in model.state_dict().items()},
            batches=[[(b.x, b.y, b.rows) for b in splits[0].epoch(e)] for e in (1, 2, 3)],
            first=next(splits[0].epoch(1)), val=[b.x for b in splits[1]]))
        return {}

    monkeypatch.setattr(common, "fit", spy)
    return seen


def test_all_students_of_a_seed_start_alike_and_see_the_same_batches(easy, results, fits):
    for flags in ((), ("--ema-decay", 0.9), ("--run", "bf16", "--precision", "bf16")):
        tiny.run(train_student, easy, results, *flags, "--overwrite")
    for flags in ((), ("--objective", "kd-only"), ("--teacher", "ema", "--ema-decay", 0.9),
                  ("--objective", "consistency"),
                  ("--objective", "consistency", "--ema-decay", 0)):
        tiny.run(distill, easy, results, *flags)
    assert [fit["name"] for fit in fits[3:]] == ["kd-s0", "kd-only-s0", "kd-ema-s0",
                                                 "mean-teacher-s0", "mean-teacher-no-ema-s0"]
    for fit in fits[1:]:
        for part in ("start", "batches", "val"):
            assert tiny.same(fit[part], fits[0][part]), (fit["name"], part)


def test_the_teacher_in_each_objective(easy, results, fits):
    tiny.run(distill, easy, results)
    tiny.run(distill, easy, results, "--objective", "consistency", "--class-cost", "bce")
    tiny.run(distill, easy, results, "--objective", "consistency", "--ema-decay", 0)
    kd, mean, own = fits
    batch = mean["first"]
    card = tiny.load(results / "digits" / "teacher-s0" / "best.pt")
    network = models.build(**card["build"])
    network.load_state_dict(card["model"])
    with torch.no_grad():
        for p in mean["average"].parameters():      # as if it had been left behind
            p.mul_(0.5)
        teacher = network.eval()(batch.x)
        average, student = mean["average"](batch.other), own["model"](batch.other)
    args = tiny.settings("digits", "kd")
    for fit, expected in (
            (kd, lambda out: distill.kd_loss(out, teacher, batch.y, args["temperature"],
                                             args["alpha"])),
            (mean, lambda out: 0.5 * distill.class_cost(out, batch.y, "bce") + 0.5
             * distill.ramp_up(1, args["ramp_up"]) * distill.consistency_loss(out, average)),
            (own, lambda out: 0.5 * distill.class_cost(out, batch.y, "ce") + 0.5
             * distill.ramp_up(1, args["ramp_up"]) * distill.consistency_loss(out, student))):
        loss, out = fit["loss_fn"](fit["model"], batch)
        torch.testing.assert_close(out, fit["model"](batch.x))
        torch.testing.assert_close(loss, expected(out))
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in fit["model"].parameters())
    assert kd["average"] is None and own["average"] is None


def test_a_teacher_of_other_constants_sees_the_images_as_it_learned_them(easy, tmp_path, results,
                                                                         fits):
    # Trained on darker images: its mean and std are not the student's.
    card = tiny.load(results / "digits" / "teacher-s0" / "best.pt")
    tiny.run(distill, easy, results, "--objective", "kd-only")
    batch = fits[0]["first"]
    pixels = batch.x * torch.tensor(card["std"]).view(3, 1, 1) + torch.tensor(card["mean"]).view(
        3, 1, 1)
    card |= dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    common.save_checkpoint(tmp_path / "other.pt", card)
    tiny.run(distill, easy, results, "--objective", "kd-only", "--teacher", tmp_path / "other.pt",
             "--run", "other")
    network = models.build(**card["build"]).eval()
    network.load_state_dict(card["model"])
    with torch.no_grad():
        seen = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
            [0.5, 0.4, 0.3]).view(3, 1, 1)
        teacher, temperature = network(seen), tiny.settings("digits", "kd")["temperature"]
    loss, out = fits[1]["loss_fn"](fits[1]["model"], batch)
    torch.testing.assert_close(loss, distill.kd_loss(out, teacher, batch.y, temperature, 1.0),
                               rtol=1e-4, atol=1e-5)


def test_tracking_an_average_changes_nothing_for_the_student(easy, tmp_path):
    for decay in (0, 0.9):
        tiny.run(train_student, easy, tmp_path, "--ema-decay", decay, "--run", decay, "--norm",
                 "batch")
    states = [tiny.load(tmp_path / "digits" / str(decay) / "checkpoint.pt") for decay in (0, 0.9)]
    assert tiny.same(states[0]["networks"]["model"], states[1]["networks"]["model"])
    assert not tiny.same(states[1]["networks"]["ema"], states[1]["networks"]["model"])
    assert "ema" not in states[0]["networks"]


def test_in_a_warm_start_the_average_is_a_copy_and_the_warm_up_comes_after(easy, tmp_path,
                                                                           monkeypatch):
    decays = []

    def update(average, model, decay, whole=common.ema_update_):
        decays.append(decay)
        whole(average, model, decay)

    monkeypatch.setattr(common, "ema_update_", update)
    tiny.run(distill, easy, tmp_path, "--objective", "consistency", "--warm-start", 1,
             "--ema-decay", 0.6)
    assert decays == pytest.approx([0] * 7 + [min(0.6, (1 + t) / (10 + t)) for t in range(7)])


def test_an_update_of_the_average_follows_each_step(easy, tmp_path, monkeypatch):
    decays, steps = [], []

    def update(average, model, decay, whole=common.ema_update_):
        decays.append(decay)
        whole(average, model, decay)

    def step(optimizer, *args, whole=torch.optim.AdamW.step, **options):
        steps.append(len(decays))
        return whole(optimizer, *args, **options)

    monkeypatch.setattr(common, "ema_update_", update)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tiny.run(train_student, easy, tmp_path, "--ema-decay", 0.6)
    assert decays == pytest.approx([min(0.6, (1 + t) / (10 + t)) for t in range(14)])
    assert steps == list(range(14))


@pytest.mark.parametrize("decay", [0, 0.9])
def test_the_student_is_in_train_mode_in_every_step(easy, tmp_path, monkeypatch, decay):
    modes = []

    def spy(model, batch, whole=train_student.hard_loss):
        modes.append({layer.training for layer in model.modules()})
        return whole(model, batch)

    monkeypatch.setattr(train_student, "hard_loss", spy)
    tiny.run(train_student, easy, tmp_path, "--ema-decay", decay, "--norm", "batch")
    assert modes == [{True}] * 14


def test_the_teacher_stays_as_it_was(easy, results, monkeypatch):
    networks = []

    def spy(network, card, job, whole=distill.frozen_teacher):
        networks.append(network)
        return whole(network, card, job)

    monkeypatch.setattr(distill, "frozen_teacher", spy)
    path = results / "digits" / "teacher-s0" / "best.pt"
    before = path.read_bytes()
    tiny.run(distill, easy, results)
    assert path.read_bytes() == before
    assert tiny.same(dict(networks[0].state_dict()), tiny.load(path)["model"])
    assert not networks[0].training
    assert all(p.grad is None and not p.requires_grad for p in networks[0].parameters())


@pytest.mark.parametrize("said, had, now, part", [
    ("epoch 1/9 x\nepoch 2/9 x\n", 0, 2, None), ("epoch 1/9 x\nepoch 2/9 x\n", 0, 3, None),
    ("going on after epoch 2\nepoch 3/9 x\n", 2, 3, None), ("", 3, 2, "3 epochs were there"),
    ("epoch 1/9 x\nepoch 2/9 x\n", 0, 1, "said epoch 2, and kept 1"),
    ("going on after epoch 2\nepoch 4/9 x\n", 2, 4, "it trained [4]"),
    ("epoch 3/9 x\n", 2, 3, "did not say")])
def test_the_soak_notices_epochs_that_are_lost(said, had, now, part):
    wrong = soak.check_goes_on(said, had, now)
    assert (part in wrong[0] if part else not wrong), wrong
