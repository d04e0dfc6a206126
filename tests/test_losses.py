"""The losses against their sums, written out in float64 without torch's own losses."""
import math
from types import SimpleNamespace

import pytest
import torch

import distill
from distill import class_cost, consistency_loss, kd_loss, kl_divergence
from models import Outputs

N, C = 7, 5     # unequal, so that dividing by the wrong one shows
LABELS = torch.tensor([0, 4, -1, 2, 1, -1, 4])      # -1: unlabelled
ALL_LABELS = LABELS.clamp(min=0)
NO_LABELS = torch.full((N,), -1)


def random_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(N, C, generator=generator)


def leaf(logits):
    """Return a copy that takes a gradient."""
    return logits.clone().requires_grad_()


STUDENT = random_logits(0)
TEACHER = random_logits(1)


# ---- the sums -----------------------------------------------------------------------

def log_softmax(logits):
    top = logits.double().amax(1, keepdim=True)
    shifted = logits.double() - top
    total = shifted.exp().sum(1, keepdim=True)
    return shifted - total.log()


def kl_sum(student, teacher, temperature):
    s = log_softmax(student.double() / temperature)
    t = log_softmax(teacher.double() / temperature)
    terms = t.exp() * (t - s)
    return terms.sum() / N


def mse_sum(student, teacher):
    s = log_softmax(student).exp()
    t = log_softmax(teacher).exp()
    terms = (s - t) ** 2
    return terms.sum() / (N * C)


def ce_sum(student, labels):
    total, known = 0.0, 0
    for row, label in zip(log_softmax(student), labels, strict=True):
        if label >= 0:
            known += 1
            total -= float(row[label])
    return total / max(1, known)


def bce_sum(student, labels):
    total, known = 0.0, 0
    for row, label in zip(student.double(), labels, strict=True):
        if label >= 0:
            known += 1
            sign = torch.full((C,), -1)
            sign[label] = 1
            p = 1 / (1 + (-sign * row).exp())       # of being right, in each class
            total -= float(p.log().sum())
    return total / max(1, known)


def kd_sum(student, teacher, labels, temperature, alpha):
    soft = temperature ** 2 * kl_sum(student, teacher, temperature)
    return alpha * soft + (1 - alpha) * ce_sum(student, labels)


def check(found, expected):
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(float(expected), rel=2e-5)


# ---- kd -----------------------------------------------------------------------------

@pytest.mark.parametrize("labels", [LABELS, ALL_LABELS, NO_LABELS])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_against_the_sum(temperature, alpha, labels):
    check(kd_loss(STUDENT, TEACHER, labels, temperature, alpha),
          kd_sum(STUDENT, TEACHER, labels, temperature, alpha))


def test_kl_is_the_mean_over_the_batch_and_not_over_the_classes():
    check(kl_divergence(STUDENT, TEACHER, 2.0), kl_sum(STUDENT, TEACHER, 2.0))
    # The same over 200 classes, of which all but five never happen.
    never = torch.full((N, 195), -1000.0)
    student = torch.cat([STUDENT, never], 1)
    teacher = torch.cat([TEACHER, never], 1)
    check(kl_divergence(student, teacher, 2.0), kl_sum(STUDENT, TEACHER, 2.0))


def test_kl_goes_from_teacher_to_student():
    sure = torch.tensor([[20.0, -20.0]])
    guess = torch.zeros(1, 2)
    check(kl_divergence(guess, sure, 1.0), math.log(2))
    assert kl_divergence(sure, guess, 1.0) > 5


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_kd_is_that_of_its_paper(temperature):
    """∂/∂s of T²·KL is T·(softmax(s/T) − softmax(t/T))/N: Hinton et al. 2015, section 2.1."""
    student, teacher = leaf(STUDENT), leaf(TEACHER)
    kd_loss(student, teacher, LABELS, temperature, 1.0).backward()
    s = log_softmax(STUDENT / temperature).exp()
    t = log_softmax(TEACHER / temperature).exp()
    expected = temperature * (s - t) / N
    torch.testing.assert_close(student.grad, expected.float())
    assert teacher.grad is None


# ---- consistency, cost on the labels ------------------------------------------------

def test_consistency_against_the_sum():
    check(consistency_loss(STUDENT, TEACHER), mse_sum(STUDENT, TEACHER))
    # Sure of different classes: two of the C differences are 1.
    far = 1000 * torch.eye(C)
    check(consistency_loss(far[:1], far[1:2]), 2 / C)


def test_the_gradient_of_consistency_reaches_the_student_alone():
    student, teacher = leaf(STUDENT), leaf(TEACHER)
    consistency_loss(student, teacher).backward()
    assert (student.grad.abs().sum(1) > 1e-5).all()     # every row, labelled or not
    assert teacher.grad is None


@pytest.mark.parametrize("labels", [LABELS, ALL_LABELS, NO_LABELS])
@pytest.mark.parametrize("kind, reference", [("ce", ce_sum), ("bce", bce_sum)])
def test_class_cost_is_over_the_labelled_rows(kind, reference, labels):
    student = leaf(STUDENT)
    found = class_cost(student, labels, kind)
    found.backward()
    check(found, reference(STUDENT, labels))
    moved = (student.grad != 0).all(1)
    assert torch.equal(moved, labels >= 0)


def test_class_cost_of_an_unknown_kind():
    with pytest.raises(ValueError, match="kind 'mse'; ce or bce"):
        class_cost(STUDENT, LABELS, "mse")


# ---- large logits, few bits ---------------------------------------------------------

LOSSES = {      # loss, its sum
    "kd": (
        lambda s, t: kd_loss(s, t, LABELS, 4.0, 0.9),
        lambda s, t: kd_sum(s, t, LABELS, 4.0, 0.9)),
    "consistency": (consistency_loss, mse_sum),
    "ce": (
        lambda s, t: class_cost(s, LABELS, "ce"),
        lambda s, t: ce_sum(s, LABELS)),
    "bce": (
        lambda s, t: class_cost(s, LABELS, "bce"),
        lambda s, t: bce_sum(s, LABELS)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_at_logits_of_1000(name):
    loss, reference = LOSSES[name]
    big = 1000 * STUDENT.sign()
    pairs = (big, -big), (big, TEACHER), (STUDENT, big)
    for student, teacher in pairs:
        student = leaf(student)
        found = loss(student, teacher)
        found.backward()
        assert torch.isfinite(student.grad).all()
        assert torch.isfinite(found)
        if name == "kd":
            check(found, reference(student.detach(), teacher))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_of_bfloat16_are_summed_in_float32(name, autocast):
    """bfloat16 has 3 digits: a sum inside it would miss this by a hundredfold."""
    loss, reference = LOSSES[name]
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = loss(student, teacher)
    check(found, reference(student, teacher))


def test_ramp_up():
    """Laine & Aila 2017, section 3.1: exp(−5·(1−t)²)."""
    assert distill.ramp_up(1, 5) == pytest.approx(math.exp(-5))
    assert distill.ramp_up(3, 5) == pytest.approx(math.exp(-5 * 0.36))
    assert distill.ramp_up(6, 5) == distill.ramp_up(60, 5) == 1
    assert distill.ramp_up(1, 0) == 1
    assert distill.ramp_up(0, 5) == distill.ramp_up(-1, 0) == 0     # in a warm start


# ---- what a step minimises ----------------------------------------------------------

def flags(objective, **changed):
    values = dict(temperature=3.0, alpha=0.8, class_weight=0.3, class_cost="ce", ramp_up=4,
                  warm_start=0)
    return SimpleNamespace(objective=objective, **(values | changed))


def run_steps(args, teacher, count=1):
    """Run some steps of epoch 2, of a student that puts out what it sees; return the terms."""
    loss_fn = distill.make_loss(args, lambda batch: Outputs(teacher(batch)))
    for _ in range(count):
        x = leaf(STUDENT)
        batch = SimpleNamespace(x=x, y=LABELS, epoch=2)
        terms, logits = loss_fn(lambda x: x, batch)
        sum(terms.values()).backward()
        assert torch.equal(logits, x)
    return terms


def test_terms_of_kd():
    terms = run_steps(flags("kd"), lambda batch: TEACHER)
    assert list(terms) == ["teacher", "labels"]
    check(terms["labels"], 0.2 * ce_sum(STUDENT, LABELS))
    check(sum(terms.values()), kd_loss(STUDENT, TEACHER, LABELS, 3.0, 0.8))
    terms = run_steps(flags("kd-only"), lambda batch: TEACHER)
    assert list(terms) == ["teacher"]
    check(terms["teacher"], kd_loss(STUDENT, TEACHER, LABELS, 3.0, 1.0))


@pytest.mark.parametrize("kind, cost", [("ce", ce_sum), ("bce", bce_sum)])
@pytest.mark.parametrize("warm_start, ramp", [
    (0, math.exp(-5 * 0.75 ** 2)), (1, math.exp(-5)), (2, 0.0)])
def test_terms_of_consistency(kind, cost, warm_start, ramp):
    """In a warm start of two epochs the second is still on the labels alone."""
    args = flags("consistency", class_cost=kind, warm_start=warm_start)
    terms = run_steps(args, lambda batch: TEACHER)
    assert list(terms) == ["labels", "consistency"]
    check(terms["labels"], 0.3 * cost(STUDENT, LABELS))
    check(terms["consistency"], 0.7 * ramp * mse_sum(STUDENT, TEACHER))


@pytest.mark.parametrize("objective", ["kd", "kd-only", "consistency"])
def test_a_teacher_that_moves_nothing_is_refused(objective, capsys):
    args = flags(objective)
    run_steps(args, lambda batch: -batch.x, count=40)
    run_steps(args, lambda batch: batch.x, count=20)    # an average is the student at first
    with pytest.raises(SystemExit) as stop:
        run_steps(args, lambda batch: batch.x, count=21)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert "no gradient on the student" in line


@pytest.mark.parametrize("args", [
    flags("kd", alpha=0.0), flags("consistency", class_weight=1),
    flags("consistency", warm_start=2)])
def test_a_teacher_without_weight_may_say_the_same(args):
    run_steps(args, lambda batch: batch.x, count=40)


def test_a_teacher_of_the_features_alone_moves_the_student():
    look = distill.TeacherCheck()
    for _ in range(40):
        embedding = torch.ones(N, 3, requires_grad=True)
        student = Outputs(leaf(STUDENT), embedding)
        look(student, {"features": (1.0, embedding.square().mean())})
