"""Train the student with a teacher: a bigger network, or its own average.

    python distill.py                                  kd: teacher and labels (Hinton et al. 2015)
    python distill.py --objective kd-only              the teacher alone, no label is read
    python distill.py --objective consistency          mean teacher (Tarvainen & Valpola 2017)
    python distill.py --objective consistency --ema-decay 0       the teacher is the student itself
    python distill.py --teacher ema                    kd from the student's own average
    python distill.py --teacher results/digits/teacher-s1/best.pt --temperature 2 --alpha 0.5

The same seed sees the same batches and starts from the same student as train_student.py.
"""
import flags  # noqa: I001  first: it answers Ctrl-C while PyTorch loads
import contextlib
import hashlib
import json
import math
import os
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import common
import data
import download
import models
import runs
from files import absent_after_an_error, crc, new_array, read_array, sync, unless_damaged
from device import guard, processor, rank, share, silent, summed, wait
from train_student import CHOICES, announce, detail, prepare, run

STORED = {"bf16": np.int16, "fp32": np.float32}     # NumPy has no bf16: its bits are kept

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
                                     "labels", "seed", "results_dir", "device")
                        if vars(args)[name] != standard[name])
        typed += " --overwrite" * (path.parent / "final.json").exists()      # its best.pt is gone
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


def report_teacher(teacher, card, job, path):
    """Measure the teacher on the validation split before it teaches; warn if it knows nothing."""
    val = job.batches[1]
    if not len(val):
        return detail("from", f"{path} (no validation images to measure it on)")
    module = torch.nn.Module()
    module.forward = teacher
    found = common.evaluate(module, val, job.args.precision)
    if not math.isfinite(found["loss"]):
        flags.fail(f"--teacher {path}: what it says of images is not finite; give a whole one")
    detail("from", f"{path}: validation accuracy {100 * found['accuracy']:.2f} %")
    if card.get("val_fraction", 1) < job.args.val_fraction:
        flags.say("warning: this teacher held out fewer images (--val-fraction); it may have "
                  "learned from some that this run validates on")
    own, labels = card.get("labels", 0), job.args.labels
    if labels and (own is None or own > labels):
        flags.say(f"warning: this teacher learned from {own or 'all'} labels, the student has "
                  f"{labels}: what it gains may be theirs")
    if found["accuracy"] <= runs.chance(val.labels.cpu()):
        flags.say("warning: this teacher is not above chance; what it teaches is noise")


# ---- the teacher cache ------------------------------------------------------------------------

def pick_cache(args, own):
    """Return whether the teacher's outputs are kept; refuse --cache where they cannot be."""
    why = ("--teacher ema: this teacher changes with every step" if own else
           "--noise: every epoch draws its own" if args.noise else "")
    if args.cache and why:
        flags.fail(f"--cache with {why}; leave --cache out")
    return not why and (0 < args.views < args.epochs if args.cache is None else args.cache)


def kept_outputs(teacher, card, job, stream):
    """Return batch -> the teacher's logits, (B, classes), computed once for all views and kept in a
    file that is named by all that they depend on. A row's logits are those that the live teacher
    gives, bit for bit on the CPU: images in batches of one size, one precision, as many threads.
    """
    args, train, folder = job.args, job.batches[0], job.folder.parent / ".teacher"
    views = args.views or args.epochs       # fresh ones: as many as epochs, for the runs to come
    sources = models, data, common, common.device       # and this file
    code = b"".join(Path(f).read_bytes() for f in (__file__, *(m.__file__ for m in sources)))
    depends = dict(
        teacher=job.config["teacher_sha256"], build=card["build"], mean=card["mean"],
        std=card["std"], data=job.splits.key, pixels=(job.splits.mean, job.splits.std),
        images=len(train), augment=args.augment, views=(args.views, views), seed=args.seed,
        stream=stream, batch=train.step_size, device=processor(job.device),
        deterministic=args.deterministic, precision=args.precision, torch=torch.__version__,
        threads=torch.get_num_threads(), code=hashlib.sha256(code).hexdigest())
    form = shape, _ = (views, len(train), len(card["classes"])), STORED[args.precision]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    # Of two runs at once one computes; of one run's processes each its share of the views.
    with download.alone(folder) if rank() == 0 else contextlib.nullcontext():
        wait()
        if not summed(torch.tensor(int(not rank() and bool(whole_cache(folder, key, *form))))):
            fill(folder, key, shape, teacher, train, stream, args.precision)
        path = whole_cache(folder, key, *form)
    table = data.tensor(read_array(path))
    table = table.view(torch.bfloat16) if args.precision == "bf16" else table
    detail("cache", f"{views} views of {len(train)} images, {table.nbytes / 1e6:.1f} MB: {path}")
    table = common.device.near(table, job.device)
    return lambda batch: table[batch.epoch % views, batch.rows.to(table.device)].to(job.device)


def whole_cache(folder, key, shape, kind):
    """Return the file of that key, <key>-<CRC32>.npy, or None; one that was damaged is removed."""
    for path in folder.glob(f"{key}-*.npy"):
        with unless_damaged():
            table, told = read_array(path), f"-{crc(path):08x}"
            if (table.shape, table.dtype) == (shape, kind) and path.stem.endswith(told):
                return path
        flags.say(f"{path}: cut short or damaged, made anew")
        path.unlink(missing_ok=True)
    return None


@torch.no_grad()
def fill(folder, key, shape, teacher, train, stream, precision):
    """Write the teacher's logits for every view of every train image, (V, N, classes)."""
    aside, (views, n, _), size = folder / f"{key}.part", shape, train.step_size
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.part"):       # of a process that was killed
            old.unlink(missing_ok=True)
        new_array(aside, STORED[precision], shape)
    wait()
    table, mine = np.lib.format.open_memmap(aside, "r+"), share(views)
    with absent_after_an_error(aside), tqdm(
            total=len(mine) * n, desc="teacher's outputs", unit=" images", dynamic_ncols=True,
            leave=False, disable=silent()) as bar:
        for view in mine:
            # The last of the fresh ones, which count from 1, is at epochs mod epochs = 0.
            draw = train.draw(stream, view or (0 if train.views else views))
            for start in range(0, n, size):
                rows = torch.arange(start, start + size).clamp(max=n - 1)      # a padded tail
                with common.autocast(train.device, precision):
                    logits = teacher(train.look(rows, draw))[:n - start]
                row = logits.float() if precision == "fp32" else logits.bfloat16().view(torch.int16)
                table[view, start:start + size] = row.cpu().numpy()
                bar.update(len(logits))
    table.flush()
    wait()
    if rank() == 0:
        sync(aside)
        os.replace(aside, folder / f"{key}-{crc(aside):08x}.npy")
    wait()


# ---- objectives -------------------------------------------------------------------------------

def taught(term, logits, silent):
    """Refuse to go on when the teacher's term has moved nothing in the first 20 steps: the loss
    would look right and teach nothing. silent: a list that counts them; emptied once it moves."""
    (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
    if gradient.abs().max() * len(logits) > 1e-5:       # rounding alone leaves 1e-8
        silent.clear()
    elif silent.append(1) or len(silent) > 20:
        flags.fail("the teacher's term has no gradient on the student: both see and say the same, "
                   "or --temperature leaves nothing of it; give --augment, --noise, --ema-decay, "
                   "another --temperature or another teacher")


def kd_objective(args, teacher):
    silent = [1]

    def loss_fn(model, batch):
        logits, targets = model(batch.x), teacher(batch)
        if silent and args.alpha:
            taught(kd_loss(logits, targets, batch.y, args.temperature, 1.0), logits, silent)
        return kd_loss(logits, targets, batch.y, args.temperature, args.alpha), logits
    return loss_fn


def consistency_objective(args, teacher):
    silent = [1]

    def loss_fn(model, batch):
        logits = model(batch.x)
        labels = class_cost(logits, batch.y, args.class_cost)
        views = consistency_loss(logits, teacher(batch))
        # In a warm start the average is the student: on one view they say the same.
        if silent and args.class_weight < 1 and batch.epoch > args.warm_start:
            taught(views, logits, silent)
        weight = (1 - args.class_weight) * ramp_up(batch.epoch - args.warm_start, args.ramp_up)
        return args.class_weight * labels + weight * views, logits
    return loss_fn


def formula(args):
    """Return what is minimised, with its numbers and reductions."""
    if args.objective == "consistency":
        weight, ramp = args.class_weight, f"·ramp over {args.ramp_up} epochs" * bool(args.ramp_up)
        ramp += f" after {args.warm_start} on the labels alone" * bool(args.warm_start)
        parts = [f"{weight:g}·{args.class_cost.upper()}(labels)",
                 f"{1 - weight:g}{ramp}·MSE(softmaxes of two views)"]
    else:
        t, a = args.temperature, args.alpha
        share = "" if a == 1 else f"{a:g}·"
        parts = [f"{share}{t:g}²·KL(teacher ‖ student, T = {t:g})"] * (a > 0)
        parts += [f"{1 - a:g}·CE(labels)"] * (a < 1)
    rows = "; that on the labels over its labelled rows" if args.labels else ""
    return " + ".join(parts) + f", means over the batch{rows}"


def run_name(args, own):
    if args.objective == "consistency":
        kind = "consistency" if not own else "mean-teacher" + "-no-ema" * (args.ema_decay == 0)
    else:
        kind = args.objective + "-ema" * own
    return f"{kind}-s{args.seed}"


def role_of(early):
    """Return the role of flags.settings() from --objective and --teacher."""
    return early.objective + "-ema" * (early.teacher == "ema" and early.objective != "consistency")


KD_READS = ("temperature", "alpha")
CONSISTENCY_READS = ("class_weight", "class_cost", "ramp_up", "warm_start")


def check(args, path):
    """Refuse what cannot be: one line that names the flags and the way out."""
    own, consistency = path is None, args.objective == "consistency"
    if args.objective == "kd-only" and args.alpha != 1:
        flags.fail(f"--alpha {args.alpha:g} with --objective kd-only, where no label is read and "
                   "alpha is 1; use --objective kd")
    standard = flags.settings(args.recipe, role_of(args))
    for name in KD_READS if consistency else CONSISTENCY_READS:
        value = vars(args)[name]
        if value != standard[name]:
            flags.fail(f"--{name.replace('_', '-')} {value} with --objective {args.objective}, "
                       "which has no use for it; leave it out, or give --objective "
                       f"{'kd' if consistency else 'consistency'}")
    if args.warm_start >= args.epochs:
        flags.fail(f"--warm-start {args.warm_start} of {args.epochs} epochs: the teacher would "
                   "never teach; give fewer, or more --epochs")
    if own and not consistency and not args.ema_decay:
        flags.fail("--ema-decay 0 with --teacher ema: the teacher would be the student on the same "
                   "images, and teach it nothing; give a decay, 0.99 say")
    if consistency and not args.class_weight:
        flags.say("warning: --class-weight 0: no label is read, and two views that say the same of "
                  "every image are all that is asked for")
    if own and consistency and args.augment == "none" and not (args.ema_decay or args.noise):
        flags.fail("--ema-decay 0 with --augment none and no --noise: the two views would be the "
                   "same, and teach nothing; give one of the three")


def train(args, started):
    """Check, announce and run what the flags say; return the final dict."""
    path = find_teacher(args)
    check(args, path)
    args.cache = pick_cache(args, path is None)
    network, card = models.load(path) if path else (None, None)
    sha256 = models.weights_sha256(card["model"]) if path else None
    consistency = args.objective == "consistency"
    job = prepare(args, "distill.py", run_name(args, path is None), started, labelled_only=False,
                  pair=consistency, noise=args.noise, source=path, teacher_sha256=sha256)
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

    def outputs(batch):
        return teacher(batch.other if consistency else batch.x)

    announce(job, f"student, {args.objective}", formula(args))
    before, seconds = time.perf_counter(), None
    if path:
        report_teacher(teacher, card, job, path)
        if args.cache and not args.dry_run:
            job.batches[0].pair = False
            outputs = kept_outputs(teacher, card, job, "other view" if consistency else "view")
        seconds = time.perf_counter() - before
    objective = consistency_objective if consistency else kd_objective
    return run(job, objective(args, outputs), average, seconds)


def main(argv=None):
    started = time.perf_counter()
    args = flags.parse(__doc__, role_of, CHOICES, argv,
                       groups=("data", "network", "training", "distillation", "run"))
    with guard(args):
        return train(args, started)


if __name__ == "__main__":
    flags.launch(main)
