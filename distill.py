"""Train the student with a teacher: a bigger network, or its own average.

    python distill.py                          kd (Hinton et al. 2015)
    python distill.py --objective kd-only      the teacher alone, without labels
    python distill.py --objective consistency  mean teacher (Tarvainen 2017)
    python distill.py --objective consistency --ema-decay 0    without average
    python distill.py --teacher ema            kd from the student's own average
    python distill.py --teacher results/digits/teacher-s1/best.pt --alpha 0.5

The same seed sees the same batches and starts from the same student as
train_student.py.
"""
import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import shlex
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import common
import data
import models
from models import Outputs
from recipes import (
    RECIPES,
    fail,
    locked,
    one_line_errors,
    parse,
    progress,
    say,
    settings,
    write_whole,
)

# ---- losses -------------------------------------------------------------------------

def kl_divergence(student_logits, teacher_logits, temperature):
    """Return KL(teacher ‖ student) of the softmaxes at a temperature, a scalar in float32.

    Logits (B, classes). Summed over classes, mean over rows. Gradient flows to the student
    only.
    """
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, 1)
    student = F.log_softmax(student_logits.float() / temperature, 1)
    # batchmean, not mean: mean would also divide by the number of classes.
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def kd_loss(student_logits, teacher_logits, labels, temperature, alpha):
    """Return alpha·T²·KL(teacher ‖ student) + (1−alpha)·CE, a scalar in float32.

    Logits (B, classes), labels (B,), −1 where unlabelled. KL is over all rows; T² keeps its
    gradient's size when T changes. CE is at temperature 1, mean over labelled rows. Hinton,
    Vinyals & Dean 2015, arXiv 1503.02531, section 2.
    """
    terms = kd_terms(student_logits, teacher_logits, labels, temperature, alpha)
    return sum(weight * value for weight, value in terms.values())


def kd_terms(student_logits, teacher_logits, labels, temperature, alpha):
    """Return the two terms of kd_loss, name -> (weight, value)."""
    return {"teacher": (alpha * temperature ** 2,
                        kl_divergence(student_logits, teacher_logits, temperature)),
            "labels": (1 - alpha, class_cost(student_logits, labels, "ce"))}


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


# ---- objectives ---------------------------------------------------------------------

# An objective is a function of what student and teacher put out (models.Outputs), the batch
# and the flags. It returns its terms, name -> (weight, value): what is minimised is the sum
# of weight·value. A term called "labels" is the one that needs no teacher. They run under
# autocast: take logits as float(), as the losses above do. The teacher has no gradient.

def kd(student, teacher, batch, args):
    return kd_terms(student.logits, teacher.logits, batch.y, args.temperature, args.alpha)


def kd_only(student, teacher, batch, args):
    return {"teacher": (args.temperature ** 2,
                        kl_divergence(student.logits, teacher.logits, args.temperature))}


def consistency(student, teacher, batch, args):
    weight = (1 - args.class_weight) * ramp_up(batch.epoch - args.warm_start, args.ramp_up)
    return {"labels": (args.class_weight, class_cost(student.logits, batch.y, args.class_cost)),
            "consistency": (weight, consistency_loss(student.logits, teacher.logits))}


# loss: the function. formula: what is minimised, in words; a test wants it in the README's
# table of losses. reads: its flags, and the letter of each in the formula; they stand in
# recipes.FLAGS, or here in `flags`, those that are its own: flag -> (default, type, help),
# a type being recipes.number(float, 0), say. needs: "second view" (student
# and teacher see two views of an image), "features" (Outputs with embedding and maps; the
# teacher's outputs cannot be kept then). teacher: "ema" where the default is the student's
# own average. section: the objective whose section of a recipe it takes. adapter: (student,
# teacher, image_shape) -> a module that is trained beside the student; the loss takes it as
# its last argument, adapter.
OBJECTIVES = {
    "kd": dict(
        loss=kd, reads={"temperature": "T", "alpha": "α"},
        formula="α·T²·KL(teacher ‖ student, both at T) + (1−α)·CE(labels)"),
    "kd-only": dict(
        loss=kd_only, reads={"temperature": "T"}, section="kd",
        formula="T²·KL(teacher ‖ student, both at T)"),
    "consistency": dict(
        loss=consistency, reads={"class-weight": "λ", "class-cost": "cost",
                                 "ramp-up": "ramp-up", "warm-start": "warm-start"},
        needs=("second view",), teacher="ema",
        formula="λ·cost(labels) + (1−λ)·ramp·MSE(softmaxes of two views)"),
}


def needs(args, what):
    """Return whether the run's objective needs "features" or a "second view"."""
    return what in OBJECTIVES[args.objective].get("needs", ())


def outputs_of(network, x, args):
    """Return the Outputs of a network, with features where the objective needs them."""
    if needs(args, "features"):
        return network(x, with_features=True)
    return Outputs(network(x))


def own_flags():
    """Return the flags that objectives bring with them, as recipes.parse takes them."""
    found = {}
    for entry in OBJECTIVES.values():
        found.update(entry.get("flags", {}))
    return found


def minimises(args):
    """Return what is minimised, with its numbers."""
    entry = OBJECTIVES[args.objective]
    values = []
    for flag, symbol in entry.get("reads", {}).items():
        value = vars(args)[flag.replace("-", "_")]
        shown = f"{value:g}" if isinstance(value, float) else value
        values.append(f"{symbol} {shown}")
    return f"{entry['formula']}; {', '.join(values)}" if values else entry["formula"]


def make_loss(args, teacher, adapter=None):
    """Return loss_fn(model, batch) -> (terms, logits) of the run's objective.

    teacher: batch -> Outputs.
    """
    objective = OBJECTIVES[args.objective]["loss"]
    if adapter is not None:
        objective = functools.partial(objective, adapter=adapter)
    check = TeacherCheck()

    def loss_fn(model, batch):
        student = outputs_of(model, batch.x, args)
        terms = objective(student, teacher(batch), batch, args)
        check(student, terms)
        weighted = {name: weight * value for name, (weight, value) in terms.items()}
        return weighted, student.logits
    return loss_fn


class TeacherCheck:
    """Refuse to go on when the teacher's terms move nothing in 20 steps: the loss would look
    right and teach nothing."""

    def __init__(self):
        self.silent_steps, self.done = 0, False

    def __call__(self, student, terms):
        taught = sum(value for name, (weight, value) in terms.items()
                     if name != "labels" and weight)
        if self.done or not torch.is_tensor(taught):
            return
        outputs = [student.logits, *student.maps]
        if student.embedding is not None:
            outputs.append(student.embedding)
        for gradient in torch.autograd.grad(taught, outputs, retain_graph=True, allow_unused=True):
            # Rounding alone leaves 1e-8.
            if gradient is not None and gradient.abs().max() * len(student.logits) > 1e-5:
                self.done = True
                return
        self.silent_steps += 1
        if self.silent_steps > 20:
            fail("the teacher's term has no gradient on the student: both see and say the same, "
                 "or --temperature leaves nothing of it; give --augment, --noise, --ema-decay, "
                 "another --temperature or another teacher")


# ---- teachers -----------------------------------------------------------------------

def find_teacher(args):
    """Return the path of the teacher, or None where it is the student's own average."""
    asked = args.teacher or OBJECTIVES[args.objective].get("teacher")
    if asked == "ema":
        return None
    path = Path(asked or Path(args.results_dir, args.recipe, f"teacher-s{args.seed}", "best.pt"))
    if path.is_file():
        return path
    if asked:
        fail(f"--teacher {path}: no such file; give a best.pt, or ema")
    fail(f"--teacher {path}: no such file; train it with: {teacher_command(args)}")


def teacher_command(args):
    """Return the command that trains the teacher of these flags."""
    words = ["python", "train_teacher.py"]
    if args.recipe in RECIPES:
        words += ["--recipe", args.recipe]
    standard = settings(args.recipe, "teacher")
    for name in ("dataset", "data_dir", "image_size", "fit", "val_fraction", "labels", "seed",
                 "results_dir", "device"):
        value = vars(args)[name]
        if value != standard[name]:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


def check_teacher(path, checkpoint, run):
    """Refuse a teacher whose classes or images are not the student's, by name."""
    theirs, mine = list(checkpoint["classes"]), list(run.splits.classes)
    if theirs != mine:
        unshared = sorted(set(theirs) ^ set(mine))
        which = "they stand in another order"
        if unshared:
            which = f"{unshared[0]!r} is in only one of them"
        fail(f"--teacher {path}: knows {len(theirs)} classes, the data has {len(mine)}; {which}; "
             "give a teacher trained on these classes")
    theirs, mine = (tuple(one["build"]["image_shape"]) for one in (checkpoint, run.metadata))
    if theirs != mine:
        fail(f"--teacher {path}: takes images of {theirs}, the data has {mine} (channels, height, "
             "width); give --image-size or another teacher")


def frozen_teacher(network, checkpoint, run):
    """Return x -> Outputs without gradient, for batches normalised with the student's data."""
    network = network.to(run.device, memory_format=torch.channels_last)
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=run.device, dtype=torch.float32).view(1, 3, 1, 1)
        for values in (run.splits.mean, run.splits.std, checkpoint["mean"], checkpoint["std"]))
    same = torch.equal(mean, own_mean) and torch.equal(std, own_std)

    @torch.no_grad()
    def teacher(x):
        if not same:
            x = (x * std + mean - own_mean) / own_std
        return outputs_of(network, x, run.args)
    return teacher


def own_teacher(run, average):
    """Return x -> Outputs of the student's average; with --ema-decay 0 of the student itself, in
    train mode: BatchNorm then sees both views."""
    network = run.model if average is None else average.eval()

    @torch.no_grad()
    def teacher(x):
        return outputs_of(network, x, run.args)
    return teacher


def report_teacher(teacher, checkpoint, run, path):
    """Measure the teacher on the validation split before it teaches; warn if it knows nothing."""
    if not len(run.val):
        return common.detail("from", f"{path} (no validation images to measure it on)")
    module = torch.nn.Module()
    module.forward = lambda x: teacher(x).logits
    found = common.evaluate(module, run.val, run.args.precision)
    if not math.isfinite(found["loss"]):
        fail(f"--teacher {path}: what it says of images is not finite; give a whole one")
    common.detail("from", f"{path}: validation accuracy {100 * found['accuracy']:.2f} %")
    if checkpoint.get("val_fraction", 1) < run.args.val_fraction:
        say("warning: this teacher held out fewer images (--val-fraction); it may have learned "
            "from some that this run validates on")
    theirs, mine = checkpoint.get("labels", 0), run.args.labels
    if mine and (theirs is None or theirs > mine):
        say(f"warning: this teacher learned from {theirs or 'all'} labels, the student has "
            f"{mine}: what it gains may be theirs")
    if found["accuracy"] <= common.chance(run.val.labels.cpu()):
        say("warning: this teacher is not above chance; what it teaches is noise")


# ---- the teacher's outputs, kept ----------------------------------------------------

def pick_cache(args, path):
    """Return whether the teacher's outputs are kept; refuse --cache where they cannot be."""
    why = None
    if path is None:
        why = "--teacher ema: this teacher changes with every step"
    elif args.noise:
        why = "--noise: every epoch draws its own"
    elif needs(args, "features"):
        why = f"--objective {args.objective}: it reads features, of which only logits are kept"
    if args.cache and why:
        fail(f"--cache with {why}; leave --cache out")
    if args.cache is None:
        return not why and 0 < args.views < args.epochs
    return args.cache


def cached_teacher(teacher, checkpoint, run, stream):
    """Return batch -> Outputs, computed once for all views and kept in a file that is named by
    all that they depend on.

    A row's logits are those that the live teacher gives, bit for bit on the CPU: images in
    batches of one size, one precision, as many threads.
    """
    args, train = run.args, run.train
    views = args.views or args.epochs       # fresh ones: as many as epochs
    sources = (__file__, models.__file__, data.__file__, common.__file__)
    code = b"".join(Path(file).read_bytes() for file in sources)
    depends = dict(
        teacher=run.config["teacher_sha256"], build=checkpoint["build"], mean=checkpoint["mean"],
        std=checkpoint["std"], data=run.splits.key, pixels=(run.splits.mean, run.splits.std),
        images=len(train), augment=args.augment, views=(args.views, views), seed=args.seed,
        stream=stream, batch=train.step_size, device=common.processor(run.device),
        deterministic=args.deterministic, precision=args.precision, torch=torch.__version__,
        threads=torch.get_num_threads(), code=hashlib.sha256(code).hexdigest())
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    path = run.folder.parent / ".teacher" / f"{key[:32]}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One run computes the cache, others wait.
    with locked(path.parent) if common.rank() == 0 else contextlib.nullcontext():
        common.wait()
        table = read_cache(path)
        if not common.summed(torch.tensor(int(table is None))):
            table = torch.from_numpy(table)
        else:
            table = teacher_outputs(teacher, run, stream, views)
            if common.rank() == 0:
                memory = io.BytesIO()
                np.savez(memory, outputs=table.numpy())
                write_whole(path, memory.getbuffer())
    if args.precision == "bf16":
        table = table.view(torch.bfloat16)
    common.detail("cache", f"{views} views of {len(train)} images, {table.nbytes / 1e6:.1f} MB: "
                           f"{path}")
    table = data.to_device_if_it_fits(table, run.device)

    def outputs(batch):
        rows = batch.rows.to(table.device)
        return Outputs(table[batch.epoch % views, rows].to(run.device))
    return outputs


def read_cache(path):
    """Return the table in a file of kept outputs, or None; the zip's checksums find damage."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return file["outputs"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"{path}: damaged ({error}); made anew")
        return None


def teacher_outputs(teacher, run, stream, views):
    """Return the teacher's logits for every view of every train image, (views, N, classes).

    bf16 as int16, for NumPy has no bf16. Every rank computes its share of the views.
    """
    train, precision = run.train, run.args.precision
    n, size = len(train), train.step_size
    dtype = torch.int16 if precision == "bf16" else torch.float32
    table = torch.zeros(views, n, len(run.splits.classes), dtype=dtype)
    mine = range(views)[common.rank()::common.world()]
    bar = progress(len(mine) * n, "teacher's outputs", "images")
    for view in mine:
        # The last of the fresh ones, which count from 1, is at epochs mod epochs = 0.
        draw = train.draw(stream, view or (0 if train.views else views))
        for start in range(0, n, size):
            rows = torch.arange(start, start + size).clamp(max=n - 1)      # a padded tail
            with common.autocast(train.device, precision):
                logits = teacher(train.look(rows, draw)).logits[:n - start]
            if precision == "bf16":
                logits = logits.bfloat16().view(torch.int16)
            table[view, start:start + size] = logits.cpu()
            bar.update(len(logits))
    bar.close()
    # As bytes: not every backend can add int16.
    return common.summed(table.view(torch.uint8)).view(dtype)


# ---- the script ---------------------------------------------------------------------

def run_name(args, path):
    """Return the run's name without its seed."""
    if args.objective == "consistency" and path is None:
        return "mean-teacher" if args.ema_decay else "mean-teacher-no-ema"
    default = OBJECTIVES[args.objective].get("teacher")
    return args.objective + ("-ema" if path is None and default != "ema" else "")


def sections(seen):
    """Return the recipe's sections of --objective and --teacher."""
    entry = OBJECTIVES.get(seen.objective, {})
    found = ("student", entry.get("section", seen.objective))
    if seen.teacher == "ema" and entry.get("teacher") != "ema":
        found += ("kd-ema",)
    return found


def check(args, path):
    """Refuse what cannot be: one line that names the flags and the way out."""
    entry = OBJECTIVES[args.objective]
    if vars(args).get("warm_start", 0) >= args.epochs:
        fail(f"--warm-start {args.warm_start} of {args.epochs} epochs: the teacher would never "
             "teach; give fewer, or more --epochs")
    if path is None and "second view" not in entry.get("needs", ()) and not args.ema_decay:
        fail("--ema-decay 0 with --teacher ema: the teacher would be the student on the same "
             "images, and teach it nothing; give a decay, 0.99 say")
    if path is None and args.augment == "none" and not (args.ema_decay or args.noise):
        fail("--ema-decay 0 with --augment none and no --noise: the two views would be the same, "
             "and teach nothing; give one of the three")
    if vars(args).get("class_weight") == 0:
        say("warning: --class-weight 0: no label is read, and two views that say the same of "
            "every image are all that is asked for")


def flags_that_are_read(args):
    """Return the flags less those of other objectives; refuse one of these that was typed."""
    reads = set(OBJECTIVES[args.objective].get("reads", ()))
    others = {flag for entry in OBJECTIVES.values() for flag in entry.get("reads", ())} - reads
    standard = settings(args.recipe, *sections(args))
    kept = vars(args).copy()
    for flag in sorted(others):
        name = flag.replace("-", "_")
        default = standard.get(name, own_flags().get(flag, (None,))[0])
        if kept.pop(name) != default:
            readers = [key for key, entry in OBJECTIVES.items() if flag in entry.get("reads", ())]
            fail(f"--{flag} with --objective {args.objective}, which does not read it; leave it "
                 f"out, or give --objective {' or '.join(readers)}")
    return argparse.Namespace(**kept)


def train(args, started):
    """Check, announce and run what the flags say; return the final dict."""
    args = flags_that_are_read(args)
    path = find_teacher(args)
    check(args, path)
    args.cache = pick_cache(args, path)
    known = dict(minimises=minimises(args), teacher_sha256=None)
    network = checkpoint = average = adapter = seconds = None
    if path:
        network, checkpoint = models.load(path)
        known["teacher_sha256"] = models.weights_sha256(checkpoint["model"])
    two_views = needs(args, "second view")
    run = common.prepare(args, "distill.py", run_name(args, path), started, pair=two_views,
                         labelled_only=False, known=known, source=path)
    if path:
        check_teacher(path, checkpoint, run)
    if run.final:
        return run.final

    if args.ema_decay:
        average = common.make_average(run.model)
    if path:
        teacher = frozen_teacher(network, checkpoint, run)
    else:
        teacher = own_teacher(run, average)
    if "adapter" in OBJECTIVES[args.objective]:
        torch.manual_seed(data.seed_for(args.seed, "weights", 1))
        build_adapter = OBJECTIVES[args.objective]["adapter"]
        adapter = build_adapter(run.model, network, run.metadata["build"]["image_shape"])
        adapter = adapter.to(run.device)

    def outputs(batch):
        return teacher(batch.other) if two_views else teacher(batch.x)

    what = f"{known['minimises']}; means over the batch"
    if args.labels:
        what += "; that on labels over the labelled rows"
    lines = []
    if args.noise:
        lines.append(("noise", "Gaussian of deviation {2:g} for {0:g} of the images; {3:g} of the "
                               "pixels erased for {1:g}".format(*args.noise)))
    common.announce(run, f"student, {args.objective}", what, lines)
    if path:
        before = time.perf_counter()
        report_teacher(teacher, checkpoint, run, path)
        if args.cache and not args.dry_run:
            run.train.pair = False
            stream = "other view" if two_views else "view"
            outputs = cached_teacher(teacher, checkpoint, run, stream)
        seconds = time.perf_counter() - before
    return common.fit(run, make_loss(run.args, outputs, adapter), average, adapter, seconds)


def main(argv=None):
    started = time.perf_counter()
    groups = ("data", "network", "training", "distillation", "run")
    registries = common.REGISTRIES | {"objective": OBJECTIVES}
    extra = {"distillation": own_flags()}
    args = parse(__doc__ + formulas(), sections, registries, argv, groups, extra)
    with one_line_errors(common.WAY_ON):
        return train(args, started)


def formulas():
    """Return what each objective minimises, for --help."""
    lines = [f"    {name:<11} {entry['formula']}" for name, entry in OBJECTIVES.items()]
    return "\n".join(["\nobjectives:\n", *lines])


if __name__ == "__main__":
    main()
