"""Train the student alone, on the labels: what distillation has to beat.

    python train_student.py                    the embedded digits, in seconds
    python train_student.py --init xavier --pool avg --epochs 3 --run xavier-avg
    python train_student.py --recipe cifar10-he-max
    python train_student.py --ema-decay 0.99   with an average that looks on
    python train_student.py --dataset folder --data-dir PHOTOS

PHOTOS holds train/<class>/* and test/<class>/*.
"""
import time

from torch.nn import functional as F

import common
import models
from recipes import fail, one_line_errors, parse

GROUPS = ("data", "network", "training", "transfer", "run")


def hard_loss(model, batch):
    """Return {"labels": cross-entropy, mean over the batch} and the logits (B, classes)."""
    logits = model(batch.x)
    return {"labels": F.cross_entropy(logits.float(), batch.y)}, logits


def train(args, role, started):
    """Check, announce and run what the flags say; return the final dict."""
    known, lines, weights = {"init_sha256": None}, [], None
    if args.unfreeze_at and args.freeze == "none":
        fail(f"--unfreeze-at {args.unfreeze_at} with --freeze none: nothing is frozen; give "
             "--freeze features, or leave it out")
    if args.init_from:
        network, _ = models.load(args.init_from)
        weights = network.state_dict()
        known["init_sha256"] = models.weights_sha256(weights)
    run = common.prepare(args, f"train_{role}.py", role, started, known=known,
                         source=args.init_from)
    if run.final:
        return run.final
    if weights:
        lines.append(("from", start_from(run, weights)))
    if args.freeze != "none":
        lines.append(("frozen", frozen_features(run)))
    common.announce(run, f"{role} alone", "mean over the batch of −log softmax(logits)[label]",
                    lines)
    average = common.make_average(run.model) if args.ema_decay else None
    return common.fit(run, hard_loss, average)


def start_from(run, weights):
    """Take the weights of --init-from that fit; return what is said of it."""
    args = run.args
    left = models.take_weights_(run.model, weights)
    matrices = [name for name, value in run.model.state_dict().items() if value.ndim > 1]
    if set(matrices) <= set(left):
        fail(f"--init-from {args.init_from}: none of its weights fits {args.arch}; give the same "
             "--arch")
    return f"{args.init_from}; " + (
        f"not taken, for they do not fit: {', '.join(left)}" if left else "all fits")


def frozen_features(run):
    """Check --freeze features; return what is said of it."""
    args = run.args
    if not len(run.model.features):
        fail(f"--freeze {args.freeze} with --arch {args.arch}: it has no convolutions, which are "
             "the features; leave it out, or give another --arch")
    ends = 1 <= args.unfreeze_at <= args.epochs
    text = f"features, before epoch {args.unfreeze_at}" if ends else "features, to the end"
    if not args.init_from:
        text += "; without --init-from they stay as they were drawn"
    return text


def main(argv=None, role="student", doc=__doc__):
    started = time.perf_counter()
    args = parse(doc, (role,), common.REGISTRIES, argv, GROUPS)
    with one_line_errors(common.WAY_ON):
        return train(args, role, started)


if __name__ == "__main__":
    main()
