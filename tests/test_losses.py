"""The losses against sums written out in float64, one row and one class at a time."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
from distill import class_cost, consistency_loss, kd_loss
from train_student import hard_loss

N, C = 7, 5         # unequal, so that dividing by the wrong one shows


def logits(seed, n=N, c=C, scale=3.0):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)) * scale


LABELS = torch.tensor([0, 4, -1, 2, 1, -1, 4])      # -1: unlabelled
STUDENT, TEACHER = logits(0), logits(1)


def log_softmax(row):
    top = max(row)
    total = top + math.log(sum(math.exp(v - top) for v in row))
    return [v - total for v in row]


def rows(tensor, temperature=1.0):
    return [log_softmax([v / temperature for v in row]) for row in tensor.double().tolist()]


def kl_sum(student, teacher, temperature):
    """KL(teacher ‖ student), mean over rows."""
    pairs = zip(rows(student, temperature), rows(teacher, temperature), strict=True)
    return sum(math.exp(t) * (t - s) for mine, theirs in pairs
               for s, t in zip(mine, theirs, strict=True)) / len(student)


def ce_sum(student, labels):
    known = [(row, y) for row, y in zip(rows(student), labels.tolist(), strict=True) if y >= 0]
    return -sum(row[y] for row, y in known) / len(known) if known else 0.0


def kd_sum(student, teacher, labels, temperature, alpha):
    return (alpha * temperature ** 2 * kl_sum(student, teacher, temperature)
            + (1 - alpha) * ce_sum(student, labels))


# ---- kd ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_kd_against_the_written_out_sum(temperature, alpha):
    expected = kd_sum(STUDENT, TEACHER, LABELS, temperature, alpha)
    found = kd_loss(STUDENT, TEACHER, LABELS, temperature, alpha)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("n, c", [(1, 2), (3, 200), (64, 2)])
def test_kd_at_other_numbers_of_rows_and_classes(n, c):
    student, teacher = logits(2, n, c), logits(3, n, c)
    labels = torch.arange(n) % c
    expected = kd_sum(student, teacher, labels, 3.0, 0.7)
    assert kd_loss(student, teacher, labels, 3.0, 0.7).item() == pytest.approx(expected, rel=2e-5)


def test_kd_of_a_network_with_itself_is_zero_and_otherwise_positive():
    assert abs(kd_loss(STUDENT, STUDENT, LABELS, 4.0, 1.0).item()) < 1e-6
    # Softmax does not see a constant that is added to a row.
    assert abs(kd_loss(STUDENT, STUDENT + 3, LABELS, 4.0, 1.0).item()) < 1e-5
    for seed in range(20):
        assert kd_loss(STUDENT, logits(seed + 9), LABELS, 4.0, 1.0).item() > 0.01


def test_kd_goes_from_teacher_to_student():
    # The teacher is sure, the student guesses: KL(teacher ‖ student) is ln 2 by hand, while the
    # other direction would be about 10.
    teacher, student = torch.tensor([[20.0, -20.0]]), torch.zeros(1, 2)
    labels = torch.zeros(1, dtype=torch.long)
    assert kd_loss(student, teacher, labels, 1.0, 1.0).item() == pytest.approx(math.log(2))
    assert kd_loss(teacher, student, labels, 1.0, 1.0).item() > 5


def test_kd_is_the_mean_of_its_rows():
    labels = LABELS.clamp(min=0)
    alone = [kd_loss(STUDENT[i:i + 1], TEACHER[i:i + 1], labels[i:i + 1], 4.0, 0.6).item()
             for i in range(N)]
    assert kd_loss(STUDENT, TEACHER, labels, 4.0, 0.6).item() == pytest.approx(np.mean(alone),
                                                                              rel=1e-5)
    other = TEACHER.clone()
    other[3] = logits(8)[3]
    moved = kd_loss(STUDENT, other, labels, 4.0, 1.0) - kd_loss(STUDENT, TEACHER, labels, 4.0, 1.0)
    row = (kd_loss(STUDENT[3:4], other[3:4], labels[3:4], 4.0, 1.0)
           - kd_loss(STUDENT[3:4], TEACHER[3:4], labels[3:4], 4.0, 1.0))
    assert moved.item() == pytest.approx(row.item() / N, rel=1e-4)


def test_kd_gradient_at_a_large_temperature():
    # Hinton et al. 2015, section 2.1: it tends to (s − t)/(C·N), logits centred in each row.
    student = STUDENT.clone().requires_grad_()
    kd_loss(student, TEACHER, LABELS, 500.0, 1.0).backward()
    centred = [x - x.mean(1, keepdim=True) for x in (STUDENT, TEACHER)]
    expected = (centred[0] - centred[1]) / (C * N)
    torch.testing.assert_close(student.grad, expected, rtol=0.02, atol=5e-4)


def test_kd_is_linear_in_alpha():
    at = {alpha: kd_loss(STUDENT, TEACHER, LABELS, 4.0, alpha).item()
          for alpha in (0.0, 0.25, 0.7, 1.0)}
    for alpha, value in at.items():
        assert value == pytest.approx(alpha * at[1.0] + (1 - alpha) * at[0.0], rel=1e-6)
    no_labels, no_teacher = LABELS.roll(1), logits(5)
    assert kd_loss(STUDENT, TEACHER, no_labels, 4.0, 1.0).item() == at[1.0]
    assert kd_loss(STUDENT, no_teacher, LABELS, 4.0, 0.0).item() == at[0.0]


def test_kd_without_labels():
    none = torch.full((N,), -1)
    student = STUDENT.clone().requires_grad_()
    loss = kd_loss(student, TEACHER, none, 4.0, 0.6)
    assert loss.item() == pytest.approx(0.6 * 16 * kl_sum(STUDENT, TEACHER, 4.0), rel=2e-5)
    loss.backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().sum() > 0
    # An unlabelled row enters KL but not CE.
    grown = torch.cat([LABELS, none])
    twice = [torch.cat([x, logits(6)]) for x in (STUDENT, TEACHER)]
    assert (kd_loss(*twice, grown, 4.0, 0.0).item()
            == pytest.approx(ce_sum(STUDENT, LABELS), rel=2e-5))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_finite_where_a_softmax_is_zero(temperature):
    big = torch.where(torch.eye(C).bool(), 1000.0, -1000.0)[torch.arange(N) % C]
    for student, teacher in ((big, -big), (-big, big), (big, TEACHER), (STUDENT, big)):
        student = student.clone().requires_grad_()
        loss = kd_loss(student, teacher, LABELS, temperature, 0.9)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
        expected = kd_sum(student.detach(), teacher, LABELS, temperature, 0.9)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_losses_are_summed_in_float32():
    half = [x.bfloat16() for x in (STUDENT, TEACHER)]
    plain = SimpleNamespace(x=half[0][LABELS >= 0], y=LABELS[LABELS >= 0])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = (kd_loss(*half, LABELS, 4.0, 0.9), consistency_loss(*half),
                     class_cost(half[0], LABELS, "ce"), class_cost(half[0], LABELS, "bce"),
                     hard_loss(lambda x: x, plain)[0])
        expected = (kd_sum(*half, LABELS, 4.0, 0.9), mse_sum(*half), ce_sum(half[0], LABELS),
                    bce_sum(half[0], LABELS), ce_sum(half[0], LABELS))
        for value, reference in zip(found, expected, strict=True):
            assert value.dtype == torch.float32
            # bfloat16 has 3 digits: a sum inside it would miss this by a hundredfold.
            assert value.item() == pytest.approx(reference, rel=2e-5)


@pytest.mark.parametrize("loss", [
    lambda s, t: kd_loss(s, t, LABELS, 4.0, 1.0), lambda s, t: kd_loss(s, t, LABELS, 4.0, 0.5),
    consistency_loss])
def test_gradient_reaches_the_student_alone(loss):
    student, teacher = (x.clone().requires_grad_() for x in (STUDENT, TEACHER))
    loss(student, teacher).backward()
    assert (student.grad.abs().sum(1) > 1e-5).all()     # every row, labelled or not
    assert teacher.grad is None


# ---- consistency, cost on the labels ----------------------------------------------------------

def mse_sum(student, teacher):
    pairs = zip(rows(student), rows(teacher), strict=True)
    return sum((math.exp(s) - math.exp(t)) ** 2 for mine, theirs in pairs
               for s, t in zip(mine, theirs, strict=True)) / student.numel()


def bce_sum(student, labels):
    total, known = 0.0, 0
    for row, y in zip(student.double().tolist(), labels.tolist(), strict=True):
        if y >= 0:
            known += 1
            for c, value in enumerate(row):
                p = 1 / (1 + math.exp(-value))
                total -= math.log(p if c == y else 1 - p)
    return total / known if known else 0.0


def test_consistency_against_the_written_out_sum():
    assert consistency_loss(STUDENT, TEACHER).item() == pytest.approx(mse_sum(STUDENT, TEACHER),
                                                                     rel=2e-5)
    assert consistency_loss(STUDENT, STUDENT).item() == 0
    # Sure of different classes: two of the C differences are 1.
    far = torch.eye(C)[:2] * 1000
    assert consistency_loss(far[:1], far[1:]).item() == pytest.approx(2 / C)


@pytest.mark.parametrize("kind, reference", [("ce", ce_sum), ("bce", bce_sum)])
def test_class_cost_against_the_written_out_sum(kind, reference):
    for labels in (LABELS, LABELS.clamp(min=0)):
        assert class_cost(STUDENT, labels, kind).item() == pytest.approx(
            reference(STUDENT, labels), rel=2e-5)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_class_cost_of_unlabelled_rows(kind):
    student = STUDENT.clone().requires_grad_()
    loss = class_cost(student, LABELS, kind)
    loss.backward()
    assert (student.grad[LABELS < 0] == 0).all() and (student.grad[LABELS >= 0] != 0).all()
    student.grad = None
    loss = class_cost(student, torch.full((N,), -1), kind)
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()


def test_class_cost_of_an_unknown_kind():
    with pytest.raises(ValueError, match="kind 'mse'; ce or bce"):
        class_cost(STUDENT, LABELS, "mse")


def test_class_cost_is_finite_at_large_logits():
    for kind in ("ce", "bce"):
        big = (1000 * STUDENT.sign()).requires_grad_()
        loss = class_cost(big, LABELS, kind)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(big.grad).all()


# ---- what a step is given ---------------------------------------------------------------------

def test_ramp_up():
    assert distill.ramp_up(1, 5) == pytest.approx(math.exp(-5))
    assert distill.ramp_up(3, 5) == pytest.approx(math.exp(-5 * 0.36))
    assert distill.ramp_up(6, 5) == distill.ramp_up(60, 5) == 1
    assert distill.ramp_up(1, 0) == 1 and distill.ramp_up(0, 5) == distill.ramp_up(-1, 0) == 0
    rising = [distill.ramp_up(e, 10) for e in range(1, 12)]
    assert rising == sorted(set(rising))


def batch(epoch=2):
    return SimpleNamespace(x=STUDENT.clone().requires_grad_(), other=TEACHER, y=LABELS, epoch=epoch)


def test_kd_objective_teaches_on_what_the_student_sees():
    args = SimpleNamespace(objective="kd", temperature=3.0, alpha=0.8, labels=None)
    loss_fn = distill.kd_objective(args, lambda batch: 2 * batch.x)
    loss, out = loss_fn(lambda x: x + 1, batch())
    assert torch.equal(out, STUDENT + 1)
    expected = kd_sum(STUDENT + 1, 2 * STUDENT, LABELS, 3.0, 0.8)
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    for part in ("0.8·3²·KL(teacher ‖ student", "T = 3", "0.2·CE"):
        assert part in distill.formula(args)
    args.alpha = 1.0
    assert "CE" not in distill.formula(args)
    args.alpha = 0.0
    assert "KL" not in distill.formula(args)


@pytest.mark.parametrize("kind, cost", [("ce", ce_sum), ("bce", bce_sum)])
@pytest.mark.parametrize("warm", [0, 1, 2])
def test_consistency_objective_teaches_on_the_other_view(kind, cost, warm):
    args = SimpleNamespace(objective="consistency", class_weight=0.3, class_cost=kind, ramp_up=4,
                           warm_start=warm, labels=40)
    loss_fn = distill.consistency_objective(args, lambda batch: 2 * batch.other)
    loss, out = loss_fn(lambda x: x + 1, batch(epoch=2))
    assert torch.equal(out, STUDENT + 1)
    # In a warm start of two epochs the second is still on the labels alone.
    ramp = {0: math.exp(-5 * (1 - 1 / 4) ** 2), 1: math.exp(-5), 2: 0.0}[warm]
    expected = 0.3 * cost(STUDENT + 1, LABELS) + 0.7 * ramp * mse_sum(STUDENT + 1, 2 * TEACHER)
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    for part in (f"0.3·{kind.upper()}", "0.7", "4 epochs", "MSE"):
        assert part in distill.formula(args)


@pytest.mark.parametrize("objective", [distill.kd_objective, distill.consistency_objective])
def test_a_teacher_that_moves_nothing_is_refused(objective, capsys):
    args = SimpleNamespace(temperature=3.0, alpha=0.8, class_weight=0.3, class_cost="ce", ramp_up=0,
                           warm_start=0)

    def steps(teacher, count):
        step = batch()
        step.other = step.x.detach()
        loss_fn = objective(args, lambda batch: teacher(batch.x))
        for i in range(count):
            loss, _ = loss_fn(lambda x: x, step)
            loss.backward()         # what was looked at can still be learned from
            assert torch.isfinite(loss)
            yield i

    assert len(list(steps(lambda x: -x, 40))) == 40
    with pytest.raises(SystemExit) as stop:         # says what the student says, on the same image
        list(steps(lambda x: x, 40))
    assert stop.value.code == 2 and "no gradient on the student" in capsys.readouterr().err
    calls = iter(range(100))                        # an average is the student itself at first
    assert len(list(steps(lambda x: -x if next(calls) > 3 else x, 40))) == 40


@pytest.mark.parametrize("objective, changed", [
    (distill.kd_objective, dict(alpha=0.0)), (distill.consistency_objective, dict(class_weight=1)),
    (distill.consistency_objective, dict(warm_start=2))])
def test_a_teacher_that_has_no_say_is_not_looked_at(objective, changed):
    """No weight, or still in the warm start's last epoch."""
    args = SimpleNamespace(**dict(temperature=3.0, alpha=0.8, class_weight=0.3, class_cost="ce",
                                  ramp_up=0, warm_start=0) | changed)
    loss_fn = objective(args, lambda batch: batch.x)
    for _ in range(40):
        assert torch.isfinite(loss_fn(lambda x: x, batch(epoch=2))[0])


def test_a_teacher_counts_as_silent_up_to_1e_5_a_row_and_for_20_steps():
    """The term's gradient on one logit of one of 4 rows is all there is."""
    logits, edge = torch.zeros(4, C, requires_grad=True), np.float32(1e-5).item() / 4

    def look(gradient, silent):
        distill.taught(-gradient * logits[2, 1], logits, silent)
        return silent

    assert look(1.004 * edge, [1] * 7) == []        # it moves: never looked at again
    assert len(look(edge, [1] * 7)) == 8
    silent = [1]
    for _ in range(19):
        look(0.0, silent)
    with pytest.raises(SystemExit):
        look(0.0, silent)
