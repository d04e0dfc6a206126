"""Train the student with a teacher: a bigger network, or its own average.

    python distill.py                                  kd: teacher and labels (Hinton et al. 2015)
    python distill.py --objective kd-only              the teacher alone, no label is read
    python distill.py --objective consistency          mean teacher: two views, the teacher is the
                                                       student's EMA (Tarvainen & Valpola 2017)
    python distill.py --objective consistency --ema-decay 0       the teacher is the student itself
    python distill.py --teacher ema                    kd from the student's own average
    python distill.py --teacher results/digits/teacher-s1/best.pt --temperature 2 --alpha 0.5

The same seed sees the same batches and starts from the same student as train_student.py.
"""
import math
import shlex
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import common
import flags
import models
from train_student import CHOICES, announce, detail, prepare, run

# ---- losses -----------------------------------------------------------------------------------

def kd_loss(student_logits, teacher_logits, labels, temperature, alpha):
    """Return alpha·T²·KL(teacher ‖ student) + (1−alpha)·CE, a scalar in float32.

    Logits (B, classes), labels (B,), −1 where unlabelled. KL is between the two softmaxes at
    temperature T, summed over classes, mean over all rows; T² keeps its gradient's size when T
    changes. CE is at temperature 1, mean over labelled rows, 0 if there are none. Gradient flows
    to the student only. Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2.
    """
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, 1)
    student = F.log_softmax(student_logits.float() / temperature, 1)
    # batchmean, not mean: mean would also divide by the number of classes.
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * temperature ** 2 * soft + (1 - alpha) * class_cost(student_logits, labels, "ce")


def consistency_loss(student_logits, teacher_logits):
    """Return the mean squared error of the two softmaxes, mean over rows and classes, in float32.

    Logits (B, classes). Gradient flows to the student only. Tarvainen & Valpola 2017,
    arXiv 1703.01780, section 2.
    """
    target = F.softmax(teacher_logits.detach().float(), 1)
    return F.mse_loss(F.softmax(student_logits.float(), 1), target)


def class_cost(logits, labels, kind):
    """Return the cost on the labels, mean over labelled rows (label ≥ 0), 0 if there are none.

    Logits (B, classes), labels (B,). kind "ce": cross-entropy. "bce": binary cross-entropy with
    the one-hot label, summed over classes. In float32.
    """
    if kind not in ("ce", "bce"):
        raise ValueError(f"class_cost: kind {kind!r}; ce or bce")
    known = labels >= 0
    count = known.sum().clamp(min=1)
    if kind == "ce":
        total = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    else:
        target = F.one_hot(labels.clamp(min=0), logits.shape[1]).float()
        each = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        total = (each.sum(1) * known).sum()
    return total / count


def ramp_up(epoch, epochs):
    """Return the factor on the consistency term in epoch 1, 2, …: exp(−5·(1−t)²), from 0.0067 in
    the first epoch to 1 after `epochs`; 0 before the first, in a warm start. Laine & Aila 2017,
    arXiv 1610.02242, section 3.1."""
    if epoch < 1:
        return 0.0
    t = min(1.0, (epoch - 1) / epochs) if epochs else 1.0
    return math.exp(-5 * (1 - t) ** 2)


# ---- teachers ---------------------------------------------------------------------------------

def find_teacher(args):
    """Return the path of the teacher, or None where it is the student's own average."""
    asked = args.teacher or ("ema" if args.objective == "consistency" else None)
    if asked == "ema":
        return None
    path = Path(asked or Path(args.results_dir, args.recipe, f"teacher-s{args.seed}", "best.pt"))
    if not path.is_file():
        standard = flags.settings(args.recipe, "teacher")
        typed = "".join(f" --{name.replace('_', '-')} {shlex.quote(str(vars(args)[name]))}"
                        for name in ("dataset", "data_dir", "image_size", "fit", "val_fraction",
                                     "seed", "results_dir", "device")
                        if vars(args)[name] != standard[name])
        fail = f"--teacher {path}: {'a folder' if path.is_dir() else 'no such file'}"
        flags.fail(f"{fail}; train it with: python train_teacher.py --recipe {args.recipe}{typed}"
                   if not asked else f"{fail}; give a best.pt, or ema")
    return path


def check_teacher(path, card, job):
    """Refuse a teacher whose classes or images are not the student's, by name."""
    theirs, mine = list(card["classes"]), list(job.splits.classes)
    if theirs != mine:
        odd = sorted(set(theirs) ^ set(mine))
        which = f"{odd[0]!r} is in only one of them" if odd else "they stand in another order"
        flags.fail(f"--teacher {path}: knows {len(theirs)} classes, the data has {len(mine)}; "
                   f"{which}; give a teacher trained on these classes")
    theirs, mine = tuple(card["build"]["image_shape"]), tuple(job.card["build"]["image_shape"])
    if theirs != mine:
        flags.fail(f"--teacher {path}: takes images of {theirs}, the data has {mine} "
                   "(channels, height, width); give --image-size or another teacher")


def frozen_teacher(network, card, job):
    """Return x -> logits without gradient, for batches normalised with the student's data."""
    network = network.to(job.device, memory_format=torch.channels_last)
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=job.device, dtype=torch.float32).view(1, 3, 1, 1)
        for values in (job.splits.mean, job.splits.std, card["mean"], card["std"]))
    same = torch.equal(mean, own_mean) and torch.equal(std, own_std)

    def teacher(x):
        with torch.no_grad():
            return network(x if same else (x * std + mean - own_mean) / own_std)
    return teacher


def report_teacher(teacher, job, path, seen):
    """Measure the teacher on the validation split before it teaches; warn if it knows nothing."""
    val = job.batches[1]
    if not len(val):
        detail("from", f"{path} (no validation images to measure it on)")
        return
    module = torch.nn.Module()
    module.forward = teacher
    accuracy = common.evaluate(module, val, job.args.precision)["accuracy"]
    detail("from", f"{path}: validation accuracy {100 * accuracy:.2f} %")
    if seen:
        flags.say("warning: this teacher held out fewer images (--val-fraction); it may have "
                  "learned from some that this run validates on")
    if accuracy <= common.chance(val.labels):
        flags.say("warning: this teacher is not above chance; what it teaches is noise")


# ---- objectives -------------------------------------------------------------------------------

def taught(term, logits, silent):
    """Refuse to go on when the teacher's term has moved nothing in the first 20 steps: the loss
    would look right and teach nothing. silent: a list that counts them; emptied once it moves."""
    (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
    if gradient.abs().max() * len(logits) > 1e-5:       # rounding alone leaves 1e-8
        silent.clear()
    elif silent.append(1) or len(silent) > 20:
        flags.fail("the teacher's term has no gradient on the student: teacher and student see the "
                   "same and say the same; give --augment, --noise, --ema-decay or another teacher")


def kd_objective(args, teacher):
    silent = [1]

    def loss_fn(model, batch):
        logits, targets = model(batch.x), teacher(batch.x)
        if silent and args.alpha:
            taught(kd_loss(logits, targets, batch.y, args.temperature, 1.0), logits, silent)
        return kd_loss(logits, targets, batch.y, args.temperature, args.alpha), logits
    t, a = args.temperature, args.alpha
    share = "" if a == 1 else f"{a:g}·"
    parts = [f"{share}{t:g}²·KL(teacher ‖ student, T = {t:g})"] * (a > 0)
    parts += [f"{1 - a:g}·CE(labels)"] * (a < 1)
    return loss_fn, " + ".join(parts) + ", means over the batch"


def consistency_objective(args, teacher):
    silent = [1]

    def loss_fn(model, batch):
        logits = model(batch.x)
        labels = class_cost(logits, batch.y, args.class_cost)
        views = consistency_loss(logits, teacher(batch.other))
        if silent and args.class_weight < 1:
            taught(views, logits, silent)
        weight = (1 - args.class_weight) * ramp_up(batch.epoch - args.warm_start, args.ramp_up)
        return args.class_weight * labels + weight * views, logits
    ramp = f"·ramp over {args.ramp_up} epochs" if args.ramp_up else ""
    ramp += f" after {args.warm_start} on the labels alone" if args.warm_start else ""
    return loss_fn, (f"{args.class_weight:g}·{args.class_cost.upper()}(labels) + "
                     f"{1 - args.class_weight:g}{ramp}·MSE(softmaxes of two views), means over the "
                     "batch")


def run_name(args, own):
    if args.objective == "consistency":
        kind = "consistency" if not own else "mean-teacher" + "-no-ema" * (args.ema_decay == 0)
    else:
        kind = args.objective + "-ema" * own
    return f"{kind}-s{args.seed}"


def role_of(early):
    """Return the role of flags.settings() from --objective and --teacher."""
    return early.objective + "-ema" * (early.teacher == "ema" and early.objective != "consistency")


def main(argv=None):
    started = time.perf_counter()
    args = flags.parse(__doc__, role_of, CHOICES, argv,
                       groups=("data", "network", "training", "distillation", "run"))
    if args.objective == "kd-only" and args.alpha != 1:
        flags.fail(f"--alpha {args.alpha:g} with --objective kd-only, where no label is read and "
                   "alpha is 1; use --objective kd")
    if args.objective != "consistency" and args.warm_start:
        flags.fail(f"--warm-start {args.warm_start} with --objective {args.objective}: only "
                   "consistency has a warm start; leave it out")
    path = find_teacher(args)
    if path is None and args.objective != "consistency" and not args.ema_decay:
        flags.fail("--ema-decay 0 with --teacher ema: the teacher would be the student on the same "
                   "images, and teach it nothing; give a decay, 0.99 say")
    if path is None and args.objective == "consistency" and args.augment == "none" and not (
            args.ema_decay or args.noise):
        flags.fail("--ema-decay 0 with --augment none and no --noise: the two views would be the "
                   "same, and teach nothing; give one of the three")
    network, card = models.load(path) if path else (None, None)
    sha256 = models.weights_sha256(card["model"]) if path else None
    job = prepare(args, "distill.py", run_name(args, path is None), started, labelled_only=False,
                  pair=args.objective == "consistency", noise=args.noise, teacher_sha256=sha256)
    if path:
        check_teacher(path, card, job)
    if job.final:
        return job.final
    model, args = job.model, job.args
    average = common.make_average(model) if args.ema_decay else None
    if path:
        teacher = frozen_teacher(network, card, job)
    else:       # its own average; with decay 0 itself, in train mode, as BatchNorm then sees both
        own = average.eval() if average is not None else model

        def teacher(x):
            with torch.no_grad():
                return own(x)
    objective = consistency_objective if args.objective == "consistency" else kd_objective
    loss_fn, formula = objective(args, teacher)
    announce(job, f"student, {args.objective}", formula)
    before, seconds = time.perf_counter(), None
    if path:
        report_teacher(teacher, job, path, card.get("val_fraction", 1) < args.val_fraction)
        seconds = time.perf_counter() - before
    return run(job, loss_fn, average, seconds)


if __name__ == "__main__":
    main()
