"""The flags of all scripts: what each may be, one line where it is not. No torch, so that it loads
at once. Their defaults are in recipes.py; how a script ends is in launch.py.
"""
from launch import (  # noqa: F401, I001    first: it answers Ctrl-C before the rest is imported
    BEGUN,
    ENDINGS,
    PARENT,
    again,
    fail,
    in_kernel,
    launch,
    plain,
    say,
    stopped,
)

import argparse
import math
import os
import re
import reprlib
import sys
import textwrap

from recipes import (  # noqa: F401
    DEFAULTS,
    RECIPES,
    SIDES,
    recipes_table,
    same_in_all,
    settings,
)


def words(argv):
    """Return the words of a command line; inside a notebook sys.argv is the kernel's, not ours."""
    if hasattr(sys.stdout, "reconfigure"):      # a path that is no text must not stop a script
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv is None:
        argv = [] if in_kernel() else sys.argv[1:]
    return [str(word) for word in argv]


def narrow(doc, width=80):
    """Return a docstring in lines of at most 80 columns: paragraphs filled, what commands do under
    them where it does not fit beside them, a long command broken as a shell reads it."""
    lines = []
    for block in (doc or "").strip().split("\n\n"):
        fits = all(len(line) <= width for line in block.splitlines())
        if not fits and not block.startswith("    "):
            block, fits = textwrap.fill(" ".join(block.split()), width), True
        for line in block.splitlines():
            command, *told = re.split(r"\s{2,}(?:# )?", line.strip(), maxsplit=1)
            broken = textwrap.wrap(command, width - 10, break_on_hyphens=False)
            lines += [line] if fits else ["    " + " \\\n        ".join(broken),
                                          *(f"        {text}" for text in told)]
        lines.append("")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse with one line on an error, no abbreviations, and the docstring line by line."""

    def __init__(self, usage="%(prog)s [--flag value ...]", description=None, **options):
        super().__init__(allow_abbrev=False, usage=usage, description=narrow(description),
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            if word.startswith("-") and word.endswith("=--"):      # argparse makes a list of it
                self.error(f"argument {word[:-3]}: no value after the =")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if "expected one argument" in message:
            message += "; one that begins with - is given as --flag=-value"
        fail(f"{message}; see " + ("main(['--help'])" if in_kernel() else f"{self.prog} --help"))


def number(kind, low, high, low_open=False, high_open=False, also=None):
    """Return an argparse type: a finite int or float between the bounds, or a word in `also`."""
    left, right = "above" if low_open else "from", "below" if high_open else "to"
    allowed = f"{'a whole number' if kind is int else 'a number'} {left} {low:g}" + (
        "" if high == math.inf else f" {right} {high}") + "".join(f", or {w}" for w in also or ())

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
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return convert


def a_path(text):
    """argparse type: a path that can be, whether anything is there or not; ~ is the home folder,
    which a shell does not put in behind a =."""
    text = os.path.expanduser(text)
    wrong = "empty" if not text else "too long" * (len(text) > 2000)     # more is put behind it
    try:
        os.stat(os.path.join(text, "."))        # of a folder, whether it may be entered
    except (OSError, ValueError) as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            wrong = wrong or getattr(error, "strerror", None) or error
    if wrong:
        raise argparse.ArgumentTypeError(f"{text[:99]!r} cannot be a path here ({wrong})")
    return text


class Short(reprlib.Repr):
    """Values from a file in a few words. Of a tensor no numbers: a few bytes may claim to be any
    number of them."""

    def repr_instance(self, x, level):
        name = type(x).__name__
        if name == "Tensor":
            return f"a tensor of {x.dim()} dimensions"
        return repr(x) if name in ("float", "bool", "NoneType") else f"a {name}"


SHORT = Short()
SHORT.maxlevel, shown = 3, SHORT.repr


def could_be_a_path(text):
    """Return whether a text from a file may name one."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def a_file(text):
    """argparse type: a file to write, there or not; of a link, what it leads to."""
    text = a_path(text)
    path = os.path.realpath(text)
    if os.path.exists(path) and not os.path.isfile(path) or not os.path.basename(text):
        raise argparse.ArgumentTypeError(f"{text[:99]!r} is no file but a folder or a device; give "
                                         "the name of a file")
    return path if os.path.islink(text) else text


def plain_name(flag, name):
    """Return a typed name, which must be one of a folder, anywhere; else leave with one line."""
    if (not name.strip() or name[0] == "." or set(name) & set("/\\") or not name.isprintable()
            or len(name.encode()) > 200):       # 255 on most file systems, .part and all
        fail(f"{flag} {name!r}: a plain folder name is needed, without slashes or a dot in front, "
             "of at most 200 bytes")
    return name


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
        "data-dir": dict(type=a_path, metavar="DIR", help="where they lie, or will lie"),
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
        "lr": dict(type=number(float, 0, 1e30, low_open=True), help="peak learning rate"),
        "weight-decay": dict(type=number(float, 0, 10**6), metavar="W", help="of the weights"),
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
        "teacher": dict(type=a_path, metavar="ema|FILE",
                        help="the student's own average, or a best.pt; default: the recipe's "
                             "teacher of the same seed, for consistency ema"),
        "temperature": dict(type=number(float, 0, 10**6, low_open=True), metavar="T",
                            help="softens both sides of kd"),
        "alpha": dict(type=number(float, 0, 1), help="the teacher's weight; labels get the rest"),
        "class-weight": dict(type=number(float, 0, 1), metavar="λ",
                             help="weight of the labels in consistency"),
        "class-cost": dict(choices=["bce", "ce"], help="cost on the labels in consistency"),
        "ramp-up": dict(type=number(int, 0, 100_000), metavar="N",
                        help="epochs over which the consistency term grows to its weight"),
        "warm-start": dict(type=number(int, 0, 100_000), metavar="N",
                           help="epochs on the labels alone, before the teacher teaches"),
        "cache": dict(**on_off, help="compute the teacher's outputs once for all views, for "
                                     "all runs of this seed; default: where --views is above 0 "
                                     "and below --epochs"),
        "noise": dict(type=four_numbers, metavar="P1,P2,RHO1,RHO2",
                      help="with P1 Gaussian noise of RHO1 standard deviations, with P2 a share "
                           "RHO2 of the pixels erased; 0,0,0,0: off"),
    },
    "transfer": {
        "init-from": dict(type=a_path, metavar="FILE", help="start from the weights of a best.pt"),
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
        "results-dir": dict(type=a_path, metavar="DIR", help="run folders are DIR/<recipe>/<run>"),
        "run": dict(metavar="NAME", help="name of the run's folder; default: <what>-s<seed>"),
        "resume": dict(**on_off, help="go on from the last finished epoch, if there is one"),
        "overwrite": dict(**on_off, help="throw an earlier run of this name away, also "
                                         "beside --resume"),
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
    for flag in ("recipe", "objective", "teacher"):
        first.add_argument("--" + flag)
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
