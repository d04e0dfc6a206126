"""Randomness without state: a run repeated, killed and resumed, or paired with another of
its seed is the same bit for bit."""
import shutil
import signal
from types import SimpleNamespace

import children
import pytest
import tiny
import torch
from torch.nn import functional as F

import common
import data
import distill
import models
import train_student
import train_teacher
from recipes import settings

EMA = ("--ema-decay", 0.9)
NOISE = ("--noise", "0.5,0.5,0.3,0.2")
MEAN_TEACHER = ("--objective", "consistency", *EMA)


def without_name(folder):
    found = tiny.outcome(folder)
    found["final"].pop("run")
    return found


# ---- repeated -----------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, name", [
    (train_student, (*EMA, "--norm", "batch"), "student-s0"),
    (distill, (*MEAN_TEACHER, *NOISE, "--labels", 40), "mean-teacher-s0"),
    (distill, ("--views", 1, "--precision", "bf16"), "kd-s0")])
def test_a_run_repeated_is_the_same_bit_for_bit(easy, chain, tmp_path, script, flags, name):
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
        states.append(tiny.load(tmp_path / f"digits/student-s{seed}/best.pt")["model"])
    first, second = states
    assert not any(torch.equal(first[name], second[name]) for name in first if "weight" in name)


# ---- killed and resumed -------------------------------------------------------------

KILLED = {
    "teacher-s1": ("train_teacher", ("--seed", 1)),
    "kd-s0": ("distill", ("--views", 2)),           # its teacher's outputs are kept
    "mean-teacher-s0": ("distill", (*MEAN_TEACHER, *NOISE)),
}
MODULES = {"train_teacher": train_teacher, "distill": distill}


@pytest.mark.parametrize("name", KILLED)
def test_a_run_that_was_killed_and_resumed_is_one_that_never_was(easy, chain, tmp_path, name):
    script, flags = KILLED[name]
    whole, cut = (tiny.copy_teacher(chain[0], tmp_path / part) for part in ("whole", "cut"))
    folder = cut / "digits" / name
    words = tiny.words(easy, cut, *flags, epochs=5)
    child = children.start(script, words, tmp_path / "printed")
    assert children.after_first_epoch(child, folder, signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / "final.json").exists()
    tiny.run(MODULES[script], easy, cut, *flags, "--resume", epochs=5)
    tiny.run(MODULES[script], easy, whole, *flags, epochs=5)
    assert tiny.same(tiny.outcome(folder), tiny.outcome(whole / "digits" / name))


RESUMED = {
    "student-s0": (train_student, (*EMA, "--norm", "batch")),
    "mean-teacher-s0": (distill, (*MEAN_TEACHER, *NOISE, "--labels", 40, "--optimizer", "sgd",
                                  "--warm-start", 1)),
    "kd-s0": (distill, ("--views", 2, "--schedule", "cosine")),
    "frozen": (train_teacher, ("--freeze", "features", "--unfreeze-at", 2, "--run", "frozen",
                               "--optimizer", "sgd")),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_from_every_epoch(easy, chain, tmp_path, monkeypatch, name):
    script, flags = RESUMED[name]
    if script is distill:
        flags += ("--teacher", chain[0] / "digits/teacher-s0/best.pt") if name == "kd-s0" else ()

    def save(run, history, *rest, usual=common.save_epoch):
        usual(run, history, *rest)
        copy = tmp_path / str(len(history)) / "digits" / name
        shutil.copytree(run.folder, copy)
        (copy / "best.pt").unlink()         # the checkpoint holds it too

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_epoch", save)
        tiny.run(script, easy, tmp_path / "whole", *flags, epochs=3)
    expected = tiny.outcome(tmp_path / "whole" / "digits" / name)
    for epoch in range(1, 4):
        torch.manual_seed(epoch)            # another process
        tiny.run(script, easy, tmp_path / str(epoch), *flags, "--resume", epochs=3)
        found = tiny.outcome(tmp_path / str(epoch) / "digits" / name)
        assert tiny.same(found, expected), epoch


def test_resume_without_a_run_starts_one(easy, tmp_path):
    assert tiny.run(train_student, easy, tmp_path, "--resume", epochs=1)["epochs"] == 1


# ---- pairs --------------------------------------------------------------------------

@pytest.fixture
def fits(monkeypatch):
    """What common.fit was given, in place of training: run, start, batches, loss, average."""
    seen = []

    def fit(run, loss_fn, average=None, adapter=None, seconds=None):
        batches = [batch for epoch in (1, 2) for batch in run.train.epoch(epoch)]
        start = {name: value.clone() for name, value in run.model.state_dict().items()}
        seen.append(SimpleNamespace(
            run=run, model=run.model, loss_fn=loss_fn, average=average, first=batches[0],
            pair=dict(start=start, batches=[batch[:3] for batch in batches],
                      val=[batch.x for batch in run.val])))
        return {}

    monkeypatch.setattr(common, "fit", fit)
    return seen


def test_all_students_of_a_seed_start_alike_and_see_the_same_batches(easy, results, fits):
    for flags in ((), EMA, ("--precision", "bf16")):
        tiny.run(train_student, easy, results, *flags)
    for flags in ((), ("--objective", "kd-only"), ("--teacher", "ema", *EMA), MEAN_TEACHER,
                  ("--objective", "consistency", "--ema-decay", 0)):
        tiny.run(distill, easy, results, *flags)
    names = [fit.run.folder.name for fit in fits[3:]]
    assert names == ["kd-s0", "kd-only-s0", "kd-ema-s0", "mean-teacher-s0",
                     "mean-teacher-no-ema-s0"]
    for fit in fits[1:]:
        assert tiny.same(fit.pair, fits[0].pair), fit.run.folder.name


def test_kd_that_listens_to_labels_alone_is_the_student_alone(easy, results):
    tiny.run(train_student, easy, results)
    tiny.run(distill, easy, results, "--alpha", 0)
    alone, kd = (tiny.load(results / "digits" / name / "checkpoint.pt")
                 for name in ("student-s0", "kd-s0"))
    assert tiny.same(alone["networks"], kd["networks"])
    assert tiny.same(alone["optimizer"]["state"], kd["optimizer"]["state"])


def test_an_average_that_only_looks_on_changes_nothing_for_the_student(easy, tmp_path):
    for decay in (0, 0.9):
        tiny.run(train_student, easy, tmp_path, "--ema-decay", decay, "--run", decay, "--norm",
                 "batch")
    plain, averaged = (tiny.load(tmp_path / "digits" / str(decay) / "checkpoint.pt")["networks"]
                       for decay in (0, 0.9))
    assert tiny.same(plain["model"], averaged["model"]) and "ema" not in plain
    assert not tiny.same(averaged["ema"], averaged["model"])


# ---- the teacher in each objective --------------------------------------------------

def test_the_teacher_in_each_objective(easy, results, fits):
    ramp = distill.ramp_up(1, settings("digits")["ramp_up"])
    args = settings("digits", "student", "kd")
    for flags in ((), ("--teacher", "ema", *EMA), (*MEAN_TEACHER, "--class-cost", "bce"),
                  ("--objective", "consistency", "--ema-decay", 0)):
        tiny.run(distill, easy, results, *flags)
    kd, kd_ema, mean, own = fits
    assert kd.average is None and own.average is None
    for fit in (kd_ema, mean):              # as if it had been left behind
        for p in fit.average.parameters():
            p.data.mul_(0.5)
    network, _ = models.load(results / "digits" / "teacher-s0" / "best.pt")
    batch = mean.first

    def soft(teacher):
        return lambda out: distill.kd_loss(out, teacher, batch.y, args["temperature"],
                                           args["alpha"])

    def two_views(teacher, cost):
        return lambda out: (0.5 * distill.class_cost(out, batch.y, cost)
                            + 0.5 * ramp * distill.consistency_loss(out, teacher))

    with torch.no_grad():
        expected = [soft(network(batch.x)), soft(kd_ema.average(batch.x)),
                    two_views(mean.average(batch.other), "bce"),
                    two_views(own.model(batch.other), "ce")]
    for fit, by_hand in zip(fits, expected, strict=True):
        terms, out = fit.loss_fn(fit.model, batch)
        loss = sum(terms.values())
        torch.testing.assert_close(loss, by_hand(fit.model(batch.x)))
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in fit.model.parameters())


def test_mean_teacher_against_a_plain_loop(easy, tmp_path):
    epochs, decay = 3, 0.7
    tiny.run(distill, easy, tmp_path, "--objective", "consistency", "--ema-decay", decay,
             "--labels", 40, "--ramp-up", 2, "--class-weight", 0.3, epochs=epochs)
    found = tiny.load(tmp_path / "digits/mean-teacher-s0/checkpoint.pt")

    splits = data.load("folder", easy, labels=40, val_fraction=0.25, image_size=tiny.SIDE)
    batches = data.Batches(splits.train, splits.mean, splits.std, 16, augment="crop", pair=True)
    torch.manual_seed(data.seed_for(0, "weights"))
    model, average = (models.build("digits-student", 4, (3, 16, 16)) for _ in range(2))
    average.load_state_dict(model.state_dict())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05),
                                   dict(params=biases, weight_decay=0)], lr=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs * batches.steps(),
                                               cycle_momentum=False)
    update = 0
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in batches.epoch(epoch):
            logits = model(batch.x)
            known = batch.y >= 0
            target = average(batch.other).softmax(1).detach()
            ramp = (0.0067379, 0.2865048, 1)[epoch - 1]         # exp(−5·(1 − t)²)
            loss = (0.3 * F.cross_entropy(logits[known], batch.y[known])
                    + 0.7 * ramp * ((logits.softmax(1) - target) ** 2).mean())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            share = min(decay, (1 + update) / (10 + update))
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.data = share * a.data + (1 - share) * p.data
            losses.append(loss.item())
            update += 1
        row = found["history"][epoch - 1]
        assert row["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
        assert row["train_labels"] + row["train_consistency"] == pytest.approx(
            row["train_loss"], rel=1e-5)
    for name, network in (("model", model), ("ema", average)):
        torch.testing.assert_close(dict(found["networks"][name]), dict(network.state_dict()),
                                   rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("decay", [0, 0.9])
def test_the_student_is_in_train_mode_in_every_step(easy, tmp_path, monkeypatch, decay):
    modes = []

    def spy(model, batch, usual=train_student.hard_loss):
        modes.append({module.training for module in model.modules()})
        return usual(model, batch)

    monkeypatch.setattr(train_student, "hard_loss", spy)
    tiny.run(train_student, easy, tmp_path, "--ema-decay", decay, "--norm", "batch")
    assert modes == [{True}] * 14


# ---- the teacher's outputs, kept ----------------------------------------------------

def kept(results):
    return sorted((results / "digits" / ".teacher").glob("*"))


@pytest.mark.parametrize("flags", [
    ("--views", 2, "--labels", 40), ("--views", 2, "--precision", "bf16"),
    ("--views", 0, "--objective", "kd-only"),
    ("--views", 2, "--objective", "consistency", "--teacher", "{}", "--ramp-up", 0)])
def test_a_student_learns_the_same_from_kept_outputs(easy, results, flags):
    """Batches of 16 of 120 images leave a tail of 8, which the teacher is fed padded."""
    teacher = results / "digits/teacher-s0/best.pt"
    flags = [str(flag).format(teacher) for flag in flags]
    tiny.run(distill, easy, results, "--run", "live", "--no-cache", *flags, epochs=3)
    assert not kept(results)
    tiny.run(distill, easy, results, "--run", "kept", "--cache", *flags, epochs=3)
    assert len(kept(results)) == 1
    live, read = (without_name(results / "digits" / name) for name in ("live", "kept"))
    assert tiny.same(live, read)


@pytest.mark.parametrize("harm", [lambda body: body[:-100], lambda body: b"",
                                  lambda body: body[:2000] + b"?" + body[2001:]])
def test_damaged_outputs_are_made_anew(easy, results, capsys, harm):
    runs = []
    for name in ("first", "second", "third"):
        tiny.run(distill, easy, results, "--views", 1, "--run", name)
        (path,) = kept(results)
        runs.append(without_name(results / "digits" / name))
        runs[-1]["table"] = path.read_bytes()
        if name == "first":
            path.write_bytes(harm(runs[0]["table"]))
    assert tiny.said(capsys).count(f"{path}: damaged") == 1
    assert tiny.same(runs[0], runs[1]) and tiny.same(runs[0], runs[2])


def test_kept_outputs_are_never_used_for_anything_else(easy, chain, results, fits):
    tiny.run(distill, easy, results, "--views", 2, "--cache")
    (first,) = kept(results)
    filled = first.stat().st_mtime_ns
    teacher = ("--teacher", results / "digits/teacher-s0/best.pt")
    others = [("--views", 3), ("--augment", "none"), ("--batch-size", 8), ("--views", 0),
              ("--precision", "bf16"), ("--val-fraction", 0.5), ("--normalise", "half"),
              ("--seed", 1, *teacher), ("--teacher", chain[0] / "digits/student-s0/best.pt")]
    for count, flags in enumerate(others, 2):
        tiny.run(distill, easy, results, "--views", 2, "--cache", *flags)
        assert len(kept(results)) == count, flags
    assert first.stat().st_mtime_ns == filled
    tiny.run(distill, easy, results, "--views", 2, "--cache", "--objective", "kd-only")
    assert len(kept(results)) == len(others) + 1        # the same teacher on the same images


def test_outputs_are_kept_where_that_pays(easy, results, fits):
    for flags, epochs, pays in (
            (("--views", 2), 3, True), (("--views", 2), 2, False), (("--views", 0), 3, False),
            (("--views", 2, "--no-cache"), 3, False), (("--views", 2, *NOISE), 3, False),
            (("--views", 2, "--dry-run"), 3, False)):
        shutil.rmtree(results / "digits" / ".teacher", ignore_errors=True)
        tiny.run(distill, easy, results, *flags, epochs=epochs)
        assert bool(kept(results)) is pays, flags


# ---- whose weights a run starts from, and which of them move ------------------------

@pytest.fixture
def source(chain):
    return chain[0] / "digits" / "student-s0" / "best.pt"


def moved(before, after):
    """Return which halves of the network changed."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("flags, halves", [
    (("--freeze", "features"), {"classifier"}),
    (("--freeze", "features", "--unfreeze-at", 4), {"classifier"}),     # never reached
    (("--freeze", "features", "--unfreeze-at", 3, "--optimizer", "sgd"),
     {"features", "classifier"})])
def test_frozen_features_do_not_move(easy, tmp_path, monkeypatch, flags, halves):
    """Weight decay must not move them, nor batches BatchNorm's statistics in them."""
    states = []

    def spy(model, batch, usual=train_student.hard_loss):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return usual(model, batch)

    monkeypatch.setattr(train_student, "hard_loss", spy)
    tiny.run(train_student, easy, tmp_path, *flags, "--norm", "batch", "--weight-decay", 0.5,
             epochs=3)
    last = tiny.load(tmp_path / "digits/student-s0/checkpoint.pt")["networks"]["model"]
    assert moved(states[0], last) == halves
    assert moved(states[0], states[14]) == {"classifier"}       # before epoch 3


def test_a_run_starts_from_the_weights_of_another(easy, source, tmp_path, fits, capsys):
    tiny.run(train_student, easy, tmp_path, "--init-from", source, *EMA)
    theirs = tiny.load(source)["model"]
    assert tiny.same(fits[0].pair["start"], dict(theirs))
    assert tiny.same(dict(fits[0].average.state_dict()), dict(theirs))
    assert "all fits" in tiny.said(capsys)


def test_what_does_not_fit_stays_as_the_seed_gave_it(easy, source, tmp_path, fits, capsys):
    three = tmp_path / "three"
    for part in ("train", "test"):
        for colour in ("blue", "green", "grey"):
            shutil.copytree(easy / part / colour, three / part / colour)
    tiny.run(train_student, three, tmp_path)
    tiny.run(train_student, three, tmp_path, "--init-from", source)
    drawn, taken = (fit.pair["start"] for fit in fits)
    theirs = tiny.load(source)["model"]
    odd = [name for name in drawn if drawn[name].shape != theirs[name].shape]
    assert len(odd) == 2                    # the logits' weight and bias
    for name in drawn:
        assert torch.equal(taken[name], (drawn if name in odd else theirs)[name])
    assert f"do not fit: {', '.join(odd)}" in tiny.said(capsys)


def test_other_weights_to_start_from_are_another_run(easy, chain, source, tmp_path, capsys):
    final = tiny.run(train_student, easy, tmp_path, "--init-from", source, epochs=1)
    words = tiny.words(easy, tmp_path, epochs=1)
    copy = shutil.copy(source, tmp_path / "copy.pt")
    assert train_student.main([*words, "--init-from", copy]) == final
    other = chain[0] / "digits" / "kd-s0" / "best.pt"
    tiny.refused(capsys, train_student, [*words, "--init-from", other], "init_sha256")
    tiny.refused(capsys, train_student, words, "init_sha256")


def test_a_run_from_drawn_weights_is_not_one_from_others(easy, source, tmp_path, capsys):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    words = tiny.words(easy, tmp_path, "--init-from", source, epochs=1)
    tiny.refused(capsys, train_student, words, "init_sha256", "--overwrite")


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_a_run_does_not_replace_what_it_learns_from(easy, results, capsys, more):
    own = results / "digits" / "teacher-s0" / "best.pt"
    before = own.read_bytes()
    tiny.refused(capsys, train_teacher, tiny.words(easy, results, "--init-from", own, *more),
                 own, "lies in the folder of this run", "--run")
    words = tiny.words(easy, results, "--run", "teacher-s0", *more)
    tiny.refused(capsys, distill, words, own, "lies in the folder of this run")
    assert own.read_bytes() == before
