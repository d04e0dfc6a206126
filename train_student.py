"""Train the student alone, on the labels: what distillation has to beat.

    python train_student.py                                       the embedded digits, in seconds
    python train_student.py --recipe digits --init xavier --pool avg --epochs 3
    python train_student.py --recipe cifar10-he-max --dataset folder --data-dir data/cifar10
    python train_student.py --ema-decay 0.99                      with an average, only evaluated
"""
import flags  # noqa: I001  first: it answers Ctrl-C while PyTorch loads
import copy
import platform
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

import common
import data
import models
import plots
import runs
from device import guard, processor, rank, set_up, wait, world

CHOICES = models.CHOICES | data.CHOICES
LOSS = "mean over the batch of −log softmax(student)[label]"


def hard_loss(model, batch):
    """Return cross-entropy with the labels, mean over the batch, and the logits (B, classes)."""
    logits = model(batch.x)
    return F.cross_entropy(logits.float(), batch.y), logits


def versions(device):
    """Return the versions and the device that config.json names."""
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                system=platform.system(), device=processor(device), threads=torch.get_num_threads(),
                processes=world())


def prepare(args, script, name, started, pair=False, labelled_only=True, noise=None, source=None,
            **known):
    """Load the data, build the network from its seed, find the run's folder; make nothing yet.

    Returns a namespace: args (device and precision resolved), device, splits, model, folder,
    final (of a finished run, else None), config, and what fit() wants of them.
    """
    args, device = set_up(args)
    splits = data.load(args.dataset, args.data_dir, args.labels, args.val_fraction, args.seed,
                       args.image_size, args.fit, args.normalise, args.skip_bad)
    shape = (3, *splits.train.images.shape[1:3])
    torch.manual_seed(common.seed_for(args.seed, "weights"))
    build = dict(arch=args.arch, num_classes=len(splits.classes), image_shape=shape, init=args.init,
                 pool=args.pool, activation=args.activation, norm=args.norm)
    model = models.build(**build)
    config = runs.make_config(args, script, versions(device), data_key=splits.key,
                              classes=len(splits.classes), class_names=list(splits.classes),
                              parameters=models.count_parameters(model), **known)
    folder, final = runs.open_run(args, config, name, source=source)
    facts = dict(script=script, parameters=config["parameters"],
                 macs=models.count_macs(model, shape))
    model = model.to(device, memory_format=torch.channels_last)
    card = dict(schema=runs.SCHEMA, settings=runs.settings_of(config), build=build,
                classes=list(splits.classes), mean=splits.mean, std=splits.std, fit=args.fit,
                recipe=args.recipe, val_fraction=args.val_fraction, labels=args.labels)

    def batches(split, size, **options):
        return data.Batches(split, splits.mean, splits.std, size, device, **options)

    train = batches(splits.train, args.batch_size, augment=args.augment, views=args.views,
                    seed=args.seed, pair=pair, labelled_only=labelled_only, noise=noise)
    if len(train.unlabelled) and train.step_size < 2:
        flags.fail(f"--batch-size {args.batch_size} with --labels {args.labels}: a batch needs at "
                   "least 2, a labelled and an unlabelled image")
    shares = train.taught % world(), (train.step_size - train.taught) % world()
    if any(shares):
        mixed = (f", {train.taught} labelled and {train.step_size - train.taught} unlabelled,"
                 if len(train.unlabelled) else "")
        fits = [size for size in range(2, train.step_size) if not (
            size % world() or mixed and train.labelled_of(size) % world())] or ["fewer processes"]
        flags.fail(f"--batch-size {args.batch_size}: the {train.step_size} images of a step{mixed} "
                   f"cannot be shared equally by {world()} processes; give {fits[-1]}")
    fixed = vars(args).get("freeze", "none") != "none" and not (
        1 <= args.unfreeze_at <= args.epochs or args.ema_decay)     # an average's are measured
    if args.norm == "batch" and train.step_size == world() and not fixed:
        try:
            copy.deepcopy(model).train()(torch.zeros(1, *shape, device=device))
        except ValueError:
            flags.fail(f"--norm batch with --batch-size {args.batch_size}: one image (a process) "
                       "is a single value to some layer, without a deviation; give a larger one")
    size = data.scoring_size(shape[1:])
    val, test = (batches(split, size) for split in (splits.val, splits.test))
    return SimpleNamespace(args=args, device=device, splits=splits, model=model, folder=folder,
                           final=final, config=config, facts=facts, card=card, started=started,
                           batches=(train, val, test))


def announce(job, what, loss):
    """Print what the run will do, before it does it."""
    args, (train, val, test) = job.args, job.batches
    mixed = (f" ({len(train.unlabelled)} unlabelled; {train.taught} of a batch are labelled)"
             if len(train.unlabelled) else "")
    lines = {
        "data": f"{args.dataset}: {len(train.labelled) + len(train.unlabelled)} train{mixed}, "
                f"{len(val)} validation, {len(test)} test; {len(job.splits.classes)} classes",
        "loss": loss,
        "steps": f"{args.epochs} epochs of {train.steps()}, batch {train.step_size}; "
                 f"{args.optimizer}, {args.schedule}, lr {args.lr:g}",
        "on": f"{args.device}, {args.precision}; {args.init} init, {args.pool} pool, seed "
              f"{args.seed}; into {job.folder}"}
    if args.ema_decay:
        first, steps = common.ema_reached(args.ema_decay), args.epochs * train.steps()
        never = "" if first < steps else f", never: the run has {steps}; lower --ema-decay"
        lines["ema"] = f"decay {args.ema_decay:g}, reached at update {first}{never}"
    if vars(args).get("noise"):
        lines["noise"] = ("Gaussian of deviation {2:g} for {0:g} of the images; {3:g} of the "
                          "pixels erased for {1:g}").format(*args.noise)
    if vars(args).get("freeze", "none") != "none":
        at, ends = args.unfreeze_at, 1 <= args.unfreeze_at <= args.epochs
        lines["frozen"] = f"features, {f'before epoch {at}' if ends else 'to the end'}"
    flags.say(f"{what}: {args.arch}, {job.facts['parameters']:,} parameters, "
              f"{job.facts['macs']:,} multiply-adds")
    for title, text in lines.items():
        detail(title, text)


def detail(title, text):
    """Print one indented line of what a run will do, folded at 80 columns, paths left whole."""
    flags.say(textwrap.fill(text, 80, initial_indent=f"  {title:<6} ", subsequent_indent=" " * 9,
                            break_long_words=False, break_on_hyphens=False))


def run(job, loss_fn, average=None, teacher_seconds=None):
    """Make the folder and train; return the final dict. With --dry-run make no folder."""
    if job.args.dry_run:
        flags.say("dry run: all of the above was checked" + ", --compile was not tried"
                  * job.args.compile + ", no run was made")
        return job.config
    # A stop may come while an error of another process's end is on its way out of here, too.
    told = f"{job.folder}: ", f"{flags.again(job.args)} goes on after its last finished epoch"
    flags.BEGUN[:] = () if job.args.overwrite else told     # the old run may still be whole
    wait()          # until every process has seen the folder as it was
    lock = runs.begin_run(job.args, job.folder, job.config) if rank() == 0 else None
    wait()
    flags.BEGUN[:] = told
    if job.args.compile:
        job.model.compile(dynamic=False)       # one shape, one kernel, whatever came before
    job.facts["setup_seconds"] = time.perf_counter() - job.started - (teacher_seconds or 0)
    job.facts["teacher_seconds"] = teacher_seconds
    try:
        final = common.fit(job.args, job.folder, job.model, loss_fn, job.batches, job.card,
                           job.facts, average, plots.draw_curves)
        flags.BEGUN.clear()
        return final
    except KeyboardInterrupt:
        flags.stopped(*told)
    finally:
        if lock is not None:
            runs.release(job.folder, lock)


def train(args, role, started):
    """Check, announce and run what the flags say; return the final dict."""
    known = dict(source=args.init_from)
    if args.unfreeze_at and args.freeze == "none":
        flags.fail(f"--unfreeze-at {args.unfreeze_at} with --freeze none: nothing is frozen; give "
                   "--freeze features, or leave it out")
    if args.init_from:
        network, init_card = models.load(args.init_from)
        weights = network.state_dict()
        known["init_sha256"] = models.weights_sha256(weights)
    job = prepare(args, f"train_{role}.py", f"{role}-s{args.seed}", started, **known)
    if job.final:
        return job.final
    if args.freeze != "none" and not len(job.model.features):
        flags.fail(f"--freeze {args.freeze} with --arch {args.arch}: it has no convolutions, which "
                   "are the features; leave it out, or give another --arch")
    announce(job, f"{role} alone", LOSS.replace("student", role))
    if args.init_from:
        left = models.take_weights_(job.model, weights)
        if all(name in left for name, value in job.model.state_dict().items() if value.ndim > 1):
            flags.fail(f"--init-from {args.init_from}: none of its weights fits this network "
                       f"({args.arch}; its own is {init_card['build']['arch']}); give the same "
                       "--arch")
        detail("from", f"{args.init_from}; "
               + (f"not taken, for they do not fit: {', '.join(left)}" if left else "all fits"))
    elif args.freeze != "none":
        flags.say("warning: --freeze features without --init-from: they stay as they were drawn")
    average = common.make_average(job.model) if job.args.ema_decay else None
    return run(job, hard_loss, average)


def main(argv=None, role="student", doc=__doc__):
    started = time.perf_counter()
    args = flags.parse(doc, role, CHOICES, argv, ("data", "network", "training", "transfer", "run"))
    with guard(args):
        return train(args, role, started)


if __name__ == "__main__":
    flags.launch(main)
