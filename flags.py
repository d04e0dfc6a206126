"""Recipes and flags: every default, its unit and its reason. No torch, so that it loads at once.

    python common.py --recipes                 the recipes as a table

A recipe sets the defaults, a typed flag wins, and nothing is written back.
"""
import argparse
import math
import os
import re
import signal
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

from tqdm import tqdm

# ---- recipes: what differs from DEFAULTS, and why --------------------------------------------

DEFAULTS = dict(
    report=None,          # the one of the five that a recipe comes from
    dataset="digits", data_dir="data", image_size=32, fit="resize", skip_bad=False, labels=None,
    val_fraction=0.1, normalise="train",
    init="he", pool="max", activation="relu", norm="none",
    epochs=20, batch_size=128,
    lr=1e-3,              # per step of AdamW, the peak of one cycle
    weight_decay=0.05,    # AdamW's, on weights of two or more dimensions
    optimizer="adamw", schedule="onecycle",
    clip=1.0,             # norm of the whole gradient: one bad batch cannot undo an epoch
    augment="flip-crop", views=0, ema_decay=0.0, seed=0,
    device="auto", precision="auto", compile=False, deterministic=False,
    results_dir="results", run=None, resume=False, overwrite=False, dry_run=False,
    objective="kd", teacher=None,
    temperature=4.0,      # within the 2.5 to 4 that Hinton et al. 2015 (section 3) found best for
                          # small students
    alpha=0.9,            # most of the weight on the teacher: its targets already hold the labels
    class_weight=0.5, class_cost="ce", ramp_up=5, warm_start=0, noise=None,
    cache=None,
    init_from=None, freeze="none", unfreeze_at=0,
)
# Pixels a side; images of a folder get --image-size.
SIDES = {"digits": 32, "cifar10": 32, "svhn": 32, "svhn-extra": 32, "tinyimagenet": 64}
# Top level: both networks. "teacher", "student": one of them. "kd", "consistency": the student
# under that objective.
RECIPES = {
    "digits": dict(
        augment="crop",                     # a mirrored digit is no digit
        epochs=12,
        teacher=dict(arch="digits-teacher", lr=5e-3),
        student=dict(arch="digits-student", lr=6e-3),     # few steps, so large ones
        consistency=dict(ema_decay=0.97)),                # 0.99 is not reached in 840 steps
    # The five reports. Epochs are theirs; what they leave open is chosen here, with its reason.
    # 000 names r without saying what it is; read as the labelled share it is --labels: here all.
    # λ, decay and ramp-up are not given: even weights, and a decay that 10 epochs reach.
    "tinyimagenet-meanteacher": dict(
        report="000", dataset="tinyimagenet", init="xavier", pool="avg", epochs=10,
        objective="consistency",
        teacher=dict(arch="tinyimagenet-teacher"), student=dict(arch="tinyimagenet-student"),
        consistency=dict(class_cost="bce", warm_start=1,
                         noise=(0.5, 0.5, 0.3, 0.1),           # visible, and readable by eye
                         ema_decay=0.99)),
    "tinyimagenet-kd": dict(                   # 0.7·CE + 0.3·T²·KL, T = 3
        report="001", dataset="tinyimagenet", init="xavier", pool="avg", epochs=8,
        teacher=dict(arch="tinyimagenet-teacher"), student=dict(arch="tinyimagenet-student"),
        kd=dict(temperature=3.0, alpha=0.3, ema_decay=0.99),        # an average that only looks on
        consistency=dict(ema_decay=0.99)),
    # Report 002. Its weights (1−α)·CE + 2α·T²·KL are ours with alpha = 2α/(1+α), up to a factor
    # that Adam does not see: our 0.9 is its 0.82.
    "cifar10-he-max": dict(
        report="002", dataset="cifar10",
        teacher=dict(arch="cifar10-he-max-teacher"),
        # It prints Adam, 0.001: 75.32 % for the student alone, one seed; 76.70 % with these.
        student=dict(arch="cifar10-he-max-student", lr=2e-3),
        consistency=dict(ema_decay=0.99)),
    "cifar10-xavier-avg": dict(                # of its three α the best printed
        report="003", dataset="cifar10", init="xavier", pool="avg", epochs=15,
        teacher=dict(arch="cifar10-xavier-avg-teacher"),
        student=dict(arch="cifar10-xavier-avg-student"),
        kd=dict(alpha=0.8),
        consistency=dict(arch="cifar10-xavier-avg-teacher", ema_decay=0.99)),
    "svhn-xavier-avg": dict(
        report="004", dataset="svhn", init="xavier", pool="avg",
        augment="crop",                        # house numbers: no mirror
        normalise="half",
        teacher=dict(arch="svhn-xavier-avg-teacher", epochs=10),
        student=dict(arch="svhn-xavier-avg-student", epochs=14),
        consistency=dict(ema_decay=0.99)),
    # Few labels, many images: is mean teacher ahead of the labels alone? The network is the small
    # one of five convs. λ is small, as the consistency cost is, a mean over the classes. Epochs of
    # the labels alone are short: 590 of 3 steps are the steps of mean teacher's 20 of 88.
    "digits-500-labels": dict(
        augment="crop", labels=500, objective="consistency",
        teacher=dict(arch="digits-teacher", lr=5e-3, epochs=590),
        student=dict(arch="digits-teacher", lr=5e-3, epochs=590),
        consistency=dict(ema_decay=0.97, class_weight=0.1, epochs=20)),
    "cifar10-1000-labels": dict(
        dataset="cifar10", labels=1000, objective="consistency",
        teacher=dict(arch="cifar10-he-max-teacher", epochs=100),
        student=dict(arch="digits-teacher", lr=2e-3, epochs=100),
        consistency=dict(ema_decay=0.99, class_weight=0.05, epochs=12, ramp_up=3)),
}


def settings(recipe, role):
    """Return every flag's value in a recipe; role: teacher, student, or an objective (with -ema:
    taught by the student's own average)."""
    values, chosen = dict(DEFAULTS), RECIPES[recipe]
    values.update((k, v) for k, v in chosen.items() if not isinstance(v, dict))
    role, own = role.removesuffix("-ema"), role.endswith("-ema")
    parts = {"teacher": ["teacher"], "student": ["student"], "kd-only": ["student", "kd"]}
    for part in parts.get(role, ["student", role]):
        values.update(chosen.get(part, {}))
    if role == "kd-only":
        values["alpha"] = 1.0       # no label is read
    if own:                         # kd from the student's own average needs one
        values["ema_decay"] = chosen.get("consistency", {}).get("ema_decay", 0.99)
    return values


# ---- flags ------------------------------------------------------------------------------------

RANK = int(os.environ.get("RANK", 0))       # torchrun's number of this process


def plain(text):
    """Return a name from outside as text that any terminal or file takes: newlines, escape codes
    and undecodable bytes written out as \\n, \\x1b, \\udcff."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def fail(message, code=2):
    """Print one line on stderr and leave: 2 for bad input, 3 for a loss that is not finite."""
    if RANK:        # of torchrun's processes each may fail alone
        message = f"process {RANK}: {message}"
    tqdm.write(f"error: {plain(message)}", file=sys.stderr)
    raise SystemExit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does, but for the exit code."""


def stopped(error, where, way_on):
    """Leave after Ctrl-C or SIGTERM, with a line that says how to go on."""
    fail(f"{where}stopped; {way_on}", 143 if isinstance(error, Terminated) else 130)


def launch(main):
    """Run a script's main as a program: Ctrl-C and SIGTERM end it with a line, not a traceback."""
    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    for name in ("stdout", "stderr"):       # closed; or of an encoding that lacks × and ²
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        if hasattr(stream, "reconfigure"):      # a notebook's %run has none
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        main()
    except BrokenPipeError:     # who reads what is printed has gone, as `| head` does
        os._exit(141)
    except KeyboardInterrupt as error:
        stopped(error, "", "nothing was begun that is not whole; start it again")


def say(line):
    """Print a line on stdout, above a progress bar if there is one; of several processes one."""
    if not RANK:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def words(argv):
    """Return the words of a command line; inside a notebook sys.argv is the kernel's, not ours."""
    if argv is None:
        argv = [] if "ipykernel" in Path(sys.argv[0]).name else sys.argv[1:]
    return [str(word) for word in argv]


class Parser(argparse.ArgumentParser):
    """argparse with one line on an error, no abbreviations, and the docstring as it stands."""

    def __init__(self, **options):
        options = dict(usage="%(prog)s [--flag value ...]") | options
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        fail(f"{message}; see {self.prog} --help")


def number(kind, low, high, low_open=False, high_open=False, also=None):
    """Return an argparse type: a finite int or float between the bounds, or a word in `also`."""
    left, right = "above" if low_open else "from", "below" if high_open else "to"
    allowed = f"{'a whole number' if kind is int else 'a number'} {left} {low:g}" + (
        "" if high == math.inf else f" {right} {high}")

    def convert(text):
        if also and text in also:
            return also[text]
        try:
            value = kind(text)
            if low <= value <= high and math.isfinite(value) and not (
                    low_open and value == low or high_open and value == high):
                return value
        except ValueError:
            pass
        words = "".join(f", or {word}" for word in also or ())
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}{words}")
    return convert


def four_numbers(text):
    """argparse type of --noise: two probabilities, a strength, a share."""
    try:
        p1, p2, strength, share = map(float, text.split(","))
        if min(p1, p2, share) >= 0 and max(p1, p2, share) <= 1 and 0 <= strength < math.inf:
            return (p1, p2, strength, share) if p1 * strength or p2 * share else None
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not four numbers P1,P2,RHO1,RHO2: probabilities P1 and P2 and the share RHO2 "
        "from 0 to 1, the strength RHO1 from 0")


on_off = dict(action=argparse.BooleanOptionalAction)
FLAGS = {
    "data": {
        "dataset": dict(help="images to learn from"),
        "data-dir": dict(metavar="DIR", help="where they lie, or will lie"),
        "image-size": dict(type=number(int, 1, 4096), metavar="N", help="side in pixels (folder)"),
        "fit": dict(help="how an image gets that size (folder)"),
        "skip-bad": dict(**on_off, help="leave out, count and list image files that cannot be "
                                        "decoded (folder, tinyimagenet)"),
        "labels": dict(type=number(int, 1, 10**9, also={"all": None}), metavar="N",
                       help="labels kept, the same number in each class; or all, the default"),
        "val-fraction": dict(type=number(float, 0, 1, high_open=True), metavar="F",
                             help="share of train held out to choose the best epoch"),
        "normalise": dict(choices=["train", "half"],
                          help="by mean and deviation of the train split, or by 0.5 and 0.5"),
        "augment": dict(help="random views of an image"),
        "views": dict(type=number(int, 0, 10**6), metavar="V",
                      help="epoch e uses view e mod V; 0: a fresh one each epoch"),
    },
    "network": {
        "arch": dict(metavar="NAME", help="network, a key of models.ARCHITECTURES"),
        "init": dict(help="initial weights"),
        "pool": dict(help="pooling"),
        "activation": dict(help="after each conv and hidden layer"),
        "norm": dict(help="after each conv"),
    },
    "training": {
        "epochs": dict(type=number(int, 1, 100_000), metavar="N", help="passes over the images"),
        "batch-size": dict(type=number(int, 1, 10**6), metavar="N", help="images a step"),
        "lr": dict(type=number(float, 0, math.inf, low_open=True), help="peak learning rate"),
        "weight-decay": dict(type=number(float, 0, math.inf), metavar="W", help="of the weights"),
        "optimizer": dict(choices=["adamw", "adam", "sgd"], help="sgd: momentum 0.9, Nesterov"),
        "schedule": dict(choices=["onecycle", "cosine", "constant"], help="of the learning rate"),
        "clip": dict(type=number(float, 0, math.inf), metavar="C",
                     help="largest norm of the gradient; 0: off"),
        "ema-decay": dict(type=number(float, 0, 1, high_open=True), metavar="D",
                          help="decay of the average of the weights; 0: no average"),
        "seed": dict(type=number(int, 0, 2**32 - 1), metavar="S", help="of all that is random"),
    },
    "distillation": {
        "objective": dict(choices=["kd", "kd-only", "consistency"],
                          help="kd: teacher and labels; kd-only: teacher; consistency: two views"),
        "teacher": dict(metavar="ema|FILE",
                        help="the student's own average, or a best.pt; default: the recipe's "
                             "teacher of the same seed, for consistency ema"),
        "temperature": dict(type=number(float, 0, math.inf, low_open=True), metavar="T",
                            help="softens both sides of kd"),
        "alpha": dict(type=number(float, 0, 1), help="weight of the teacher; the labels get the "
                                                     "rest"),
        "class-weight": dict(type=number(float, 0, 1), metavar="λ",
                             help="weight of the labels in consistency"),
        "class-cost": dict(choices=["bce", "ce"], help="cost on the labels in consistency"),
        "ramp-up": dict(type=number(int, 0, 100_000), metavar="N",
                        help="epochs over which the consistency term grows to its weight"),
        "warm-start": dict(type=number(int, 0, 100_000), metavar="N",
                           help="epochs on the labels alone, before the teacher teaches"),
        "cache": dict(**on_off, help="compute the teacher's outputs once for all views; default: "
                                     "where --views is above 0 and below --epochs"),
        "noise": dict(type=four_numbers, metavar="P1,P2,RHO1,RHO2",
                      help="with P1 Gaussian noise of RHO1 standard deviations, with P2 a share "
                           "RHO2 of the pixels erased; 0,0,0,0: off"),
    },
    "transfer": {
        "init-from": dict(metavar="FILE", help="start from the weights of a best.pt that fit"),
        "freeze": dict(choices=["none", "features"], help="features: train the classifier only"),
        "unfreeze-at": dict(type=number(int, 0, 100_000), metavar="EPOCH",
                            help="train all from this epoch on; 0: never"),
    },
    "run": {
        "device": dict(choices=["auto", "cpu", "cuda", "mps"], help="where to compute"),
        "precision": dict(choices=["auto", "fp32", "bf16"],
                          help="auto: bf16 where the hardware multiplies it natively"),
        "compile": dict(**on_off, help="torch.compile"),
        "deterministic": dict(**on_off, help="only deterministic kernels on a GPU"),
        "results-dir": dict(metavar="DIR", help="run folders are DIR/<recipe>/<run>"),
        "run": dict(metavar="NAME", help="name of the run's folder; default: <what>-s<seed>"),
        "resume": dict(**on_off, help="go on from the last finished epoch, if there is one"),
        "overwrite": dict(**on_off, help="throw an earlier run of this name away"),
        "dry-run": dict(**on_off, help="check everything, print it, make no run"),
    },
}


def parse(doc, role, choices, argv=None, groups=("data", "network", "training", "run"), own=None):
    """Return the flags as a Namespace; the recipe's values are the defaults, a typed flag wins.

    role: of settings(), or a function to one from a first look at --objective and --teacher.
    choices: flag -> names allowed, from the registries of models and data. groups: of FLAGS.
    own: flags of this script alone.
    """
    argv = words(argv)
    first = Parser(add_help=False)
    first.add_argument("--recipe", default="digits")
    first.add_argument("--objective")
    first.add_argument("--teacher")
    early = first.parse_known_args(argv)[0]
    recipe = early.recipe if early.recipe in RECIPES else "digits"
    early.objective = early.objective or RECIPES[recipe].get("objective", "kd")
    defaults = settings(recipe, role(early) if callable(role) else role)
    defaults |= dict(objective=early.objective) if callable(role) else {}

    parser = Parser(description=doc)
    parser.add_argument("--recipe", choices=RECIPES, default="digits", metavar="NAME",
                        help=f"one of {', '.join(RECIPES)}; sets the defaults of the flags below, "
                             f"shown for {recipe}")
    for group in (*groups, *([own] if own else ())):
        title, specs = (group, FLAGS[group]) if isinstance(group, str) else ("this script", group)
        section = parser.add_argument_group(title)
        for flag, spec in specs.items():
            default = defaults.get(flag.replace("-", "_"))
            listed = default if isinstance(default, tuple) else (default,)
            shown = "" if default is None or isinstance(default, bool) else (
                f" ({','.join(map(str, listed))})")
            if flag in choices and "metavar" not in spec:
                spec = dict(spec, choices=list(choices[flag]))
            spec = dict(spec, help=spec["help"] + shown)
            section.add_argument("--" + flag, default=default, **spec)
    parser.set_defaults(image_size=None)        # only a typed one is held against a set's own
    args = parser.parse_args(argv)
    args.image_size = args.image_size or SIDES.get(args.dataset, defaults["image_size"])
    if "arch" in vars(args) and args.arch not in choices["arch"]:
        parser.error(f"argument --arch: unknown network {args.arch!r} "
                     f"(choose from {', '.join(choices['arch'])})")
    return args


# Rows of the table of recipes: settings of the teacher, the student alone, kd and consistency.
SHOWN = {
    "report": "{s[report]}", "data": "{s[dataset]}", "labels": "{s[labels]}",
    "normalise": "{s[normalise]}",
    "augment": "{s[augment]}", "views": "{s[views]}", "teacher": "{t[arch]}",
    "student": "{s[arch]}", "init, pool": "{s[init]}, {s[pool]}", "objective": "{s[objective]}",
    "epochs: T, S": "{t[epochs]}, {s[epochs]}", "lr: T, S": "{t[lr]:g}, {s[lr]:g}",
    "kd: T, α": "{k[temperature]:g}, {k[alpha]:g}", "kd: EMA": "{k[ema_decay]:g}",
    "kd-ema: EMA": "{own[ema_decay]:g}",
    "mean teacher": "{m[arch]}", "  epochs": "{m[epochs]}", "  EMA": "{m[ema_decay]:g}",
    "  λ, cost": "{m[class_weight]:g}, {m[class_cost]}", "  ramp-up": "{m[ramp_up]}",
    "  warm start": "{m[warm_start]}", "  noise": "{m[noise]}",
}


def recipes_table(width=80):
    """Return the recipes as text: a column each, as many side by side as the width holds."""
    columns = []
    for recipe in RECIPES:
        s, t, k, own, m = (settings(recipe, role) for role in
                           ("student", "teacher", "kd", "kd-ema", "consistency"))
        cells = [recipe, *(row.format(s=s, t=t, k=k, own=own, m=m) for row in SHOWN.values())]
        cells = ["-" if cell in ("None", "0") else cell.strip("()") for cell in cells]
        wide = max(len(piece) for cell in cells for piece in re.split("(?<=-)| ", cell))
        columns.append([textwrap.wrap(cell, wide) for cell in cells])
    titles = [[title] for title in ("", *SHOWN)]
    blocks = [[titles]]
    for column in columns:
        if len("\n".join(_side_by_side([*blocks[-1], column])).splitlines()[0]) > width:
            blocks.append([titles])
        blocks[-1].append(column)
    return "\n\n".join("\n".join(line.rstrip() for line in _side_by_side(block))
                       for block in blocks)


def same_in_all():
    """Return what no recipe changes, as text."""
    names = ("batch_size", "optimizer", "schedule", "weight_decay", "clip", "activation", "norm",
             "val_fraction")
    return textwrap.fill("The same in all: " + ", ".join(f"{n} {DEFAULTS[n]}" for n in names), 80)


def _side_by_side(columns):
    """Lines of a table; a cell is a list of lines."""
    wide = [max(len(line) for cell in column for line in cell) for column in columns]
    return [" ".join(line.ljust(size) for line, size in zip(lines, wide, strict=True))
            for row in zip(*columns, strict=True) for lines in zip_longest(*row, fillvalue="")]
