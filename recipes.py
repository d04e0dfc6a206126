"""Flags, their defaults, and the recipes that change them. No torch.

    python recipes.py                  what each recipe changes
    python recipes.py --runs digits    the runs of its chain, for the Makefile
    python recipes.py --names          the recipes, for the Makefile

A recipe sets defaults, a flag that is typed wins, and nothing writes back. Below
that is what every script needs: one line for an error, files that are whole.
"""
import argparse
import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

try:
    import fcntl
except ImportError:     # Windows: no locks
    fcntl = None

SCHEMA = 1      # of config.json, final.json and checkpoints


# ---- types of flags -----------------------------------------------------------------

def number(kind, low, high=math.inf, above=False, below=False, words=None):
    """Return an argparse type: an int or a float from low to high.

    above, below: low or high itself is not allowed. words: text -> value, for words
    that stand for a value.
    """
    allowed = "a whole number" if kind is int else "a number"
    allowed += f" above {low:,}" if above else f" from {low:,}"
    if high < math.inf:
        allowed += f" below {high:,}" if below else f" to {high:,}"
    for word in words or {}:
        allowed += f", or {word}"

    def convert(text):
        if words and text in words:
            return words[text]
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        fits = low <= value <= high and math.isfinite(value)
        if not fits or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value
    return convert


def path(text):
    """argparse type: a path, there or not; ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; give a file or a folder")
    return os.path.expanduser(text)


def noise(text):
    """argparse type of --noise: two probabilities, a strength, a share."""
    try:
        p1, p2, strength, share = map(float, text.split(","))
    except ValueError:
        p1 = p2 = strength = share = math.nan
    if not (0 <= p1 <= 1 and 0 <= p2 <= 1 and 0 <= share <= 1 and 0 <= strength < math.inf):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not P1,P2,RHO1,RHO2: probabilities P1, P2 and the share RHO2 "
            "from 0 to 1, the strength RHO1 from 0")
    changes_nothing = p1 * strength == 0 and p2 * share == 0
    return None if changes_nothing else (p1, p2, strength, share)


def folder_name(flag, name):
    """Return a typed name that becomes a folder; leave with one line where it cannot."""
    if not name.strip() or name.startswith(".") or not name.isprintable() or len(name) > 200:
        fail(f"{flag} {name!r}: give a plain folder name, of at most 200 characters")
    if "/" in name or "\\" in name:
        fail(f"{flag} {name!r}: give a plain folder name, without slashes")
    return name


# ---- every flag once ----------------------------------------------------------------

REGISTRY = None     # the choices are the keys of a registry that the script hands over
WHOLE, NOT_NEGATIVE = number(int, 1, 10**6), number(float, 0)
SHARE = number(float, 0, 1, below=True)

# group -> flag -> (default, type or choices, help)
FLAGS = {
    "data": {
        "dataset": ("digits", REGISTRY, "images to learn from"),
        "data-dir": ("data", path, "where they are, or are downloaded to"),
        "image-size": (None, number(int, 1, 4096), "side in pixels (folder: 32)"),
        "fit": ("resize", REGISTRY, "how an image gets that size (folder)"),
        "skip-bad": (False, bool, "leave out files that cannot be decoded (folder)"),
        "labels": (None, number(int, 1, 10**9, words={"all": None}),
                   "labels kept, the same number in each class, or all"),
        "val-fraction": (0.1, SHARE, "share of train held out to choose the epoch"),
        "normalise": ("train", ["train", "half"],
                      "by mean and deviation of the train split, or by 0.5 and 0.5"),
        "augment": ("flip-crop", REGISTRY, "random views of an image"),
        "views": (0, number(int, 0, 10**6), "epoch e uses view e mod V; 0: a fresh one each epoch"),
    },
    "network": {
        "arch": (None, REGISTRY, "network"),
        "init": ("he", REGISTRY, "initial weights"),
        "pool": ("max", REGISTRY, "pooling"),
        "activation": ("relu", REGISTRY, "after each conv and hidden layer"),
        "norm": (None, REGISTRY, "after each conv; default: the network's own"),
    },
    "training": {
        "epochs": (20, number(int, 1, 100_000), "passes over the images"),
        "batch-size": (128, WHOLE, "images a step, of all processes together"),
        "lr": (1e-3, number(float, 0, above=True), "learning rate at its peak"),
        "weight-decay": (0.05, NOT_NEGATIVE, "of weights with two or more dimensions"),
        "optimizer": ("adamw", ["adamw", "adam", "sgd"], "sgd: momentum 0.9, Nesterov"),
        "schedule": ("onecycle", ["onecycle", "cosine", "constant"], "of the learning rate"),
        # One bad batch cannot undo an epoch.
        "clip": (1.0, NOT_NEGATIVE, "largest norm of the gradient; 0: off"),
        "ema-decay": (0.0, SHARE, "decay of the average of the weights; 0: none"),
        "seed": (0, number(int, 0, 2**32 - 1), "of everything random"),
    },
    "distillation": {
        "objective": ("kd", REGISTRY, "what the student learns from"),
        "teacher": (None, path, "FILE: a best.pt; ema: the student's own average; default: "
                                "the recipe's teacher of the same seed, or ema"),
        # Hinton et al. 2015, section 3: 2.5 to 4 are best for small students.
        "temperature": (4.0, number(float, 0, above=True), "softens both sides of kd"),
        # Most of the weight on the teacher: its targets already hold the labels.
        "alpha": (0.9, number(float, 0, 1), "the teacher's weight; labels get the rest"),
        "class-weight": (0.5, number(float, 0, 1), "λ, the weight of the labels"),
        "class-cost": ("ce", ["ce", "bce"], "cost on the labels"),
        "ramp-up": (5, number(int, 0, 100_000), "epochs over which consistency grows"),
        "warm-start": (0, number(int, 0, 100_000), "epochs on the labels alone, first"),
        "noise": (None, noise, "P1,P2,RHO1,RHO2: with P1 Gaussian noise of RHO1 "
                               "deviations, with P2 a share RHO2 of the pixels erased"),
        "cache": (None, bool, "compute the teacher's outputs once for all views; "
                              "default: where --views is above 0 and below --epochs"),
    },
    "transfer": {
        "init-from": (None, path, "start from the weights of a best.pt"),
        "freeze": ("none", ["none", "features"], "features: train the classifier only"),
        "unfreeze-at": (0, number(int, 0, 100_000), "train all from this epoch on; 0: never"),
    },
    "run": {
        "device": ("auto", ["auto", "cpu", "cuda", "mps"], "where to compute"),
        "precision": ("auto", ["auto", "fp32", "bf16"], "auto: bf16 where it is native"),
        "compile": (False, bool, "torch.compile"),
        "deterministic": (False, bool, "only deterministic kernels on a GPU"),
        "results-dir": ("results", path, "runs are in DIR/<recipe or data set>/<run>"),
        "run": (None, str, "name of the run's folder; default: <what>-s<seed>"),
        "resume": (False, bool, "go on after the last finished epoch, if there is one"),
        "overwrite": (False, bool, "throw an earlier run of this name away"),
        "dry-run": (False, bool, "check everything, print it, make no run"),
    },
}
DEFAULTS = {
    flag.replace("-", "_"): default
    for group in FLAGS.values() for flag, (default, _, _) in group.items()
}
METAVARS = {path: "PATH", str: "NAME", noise: "P1,P2,RHO1,RHO2"}


# ---- recipes ------------------------------------------------------------------------

# What a recipe changes, and why. "runs" is its chain, in the order of the report. A dict
# is a section: "teacher", "student", or an objective of distill.py, whose flags come on
# top of the student's. "kd-ema" is kd from the student's own average.
RECIPES = {
    "digits": dict(
        runs=("teacher", "student", "kd", "kd-only", "mean-teacher", "mean-teacher-no-ema"),
        augment="crop",                     # a mirrored digit is no digit
        epochs=12,
        teacher=dict(arch="digits-teacher", lr=5e-3),
        student=dict(arch="digits-student", lr=6e-3),     # few steps, so large ones
        consistency=dict(ema_decay=0.97),   # 0.99 is not reached in 840 steps
        **{"kd-ema": dict(ema_decay=0.97)}),

    # The recipes of the five reports. Epochs are theirs; what they leave open is chosen
    # here. 000 names r without saying what it is; read as the labelled share it is
    # --labels: here all. Its λ, decay and ramp-up are not given: even weights, and a
    # decay that 10 epochs reach.
    "tinyimagenet-meanteacher": dict(
        report="000", dataset="tinyimagenet", init="xavier", pool="avg", epochs=10,
        runs=("teacher", "student", "kd-only", "mean-teacher", "mean-teacher-no-ema"),
        objective="consistency",
        teacher=dict(arch="tinyimagenet-teacher"),
        student=dict(arch="tinyimagenet-student"),
        consistency=dict(
            class_cost="bce", warm_start=1, ema_decay=0.99,
            noise=(0.5, 0.5, 0.3, 0.1))),   # visible, and readable by eye
    "tinyimagenet-kd": dict(                # 0.7·CE + 0.3·T²·KL, T = 3
        report="001", dataset="tinyimagenet", init="xavier", pool="avg", epochs=8,
        runs=("teacher", "student", "kd"),
        teacher=dict(arch="tinyimagenet-teacher"),
        student=dict(arch="tinyimagenet-student"),
        kd=dict(temperature=3.0, alpha=0.3, ema_decay=0.99)),   # an average that only looks on
    # 002's weights (1−α)·CE + 2α·T²·KL are ours with alpha = 2α/(1+α), up to a factor
    # that Adam does not see: our 0.9 is its 0.82.
    "cifar10-he-max": dict(
        report="002", dataset="cifar10",
        runs=("teacher", "student", "kd", "kd-only", "kd-ema"),
        teacher=dict(arch="cifar10-he-max-teacher"),
        # It prints Adam, 0.001: 75.32 % for the student alone, one seed; 76.70 with this.
        student=dict(arch="cifar10-he-max-student", lr=2e-3)),
    "cifar10-xavier-avg": dict(             # of its three α the best printed
        report="003", dataset="cifar10", init="xavier", pool="avg", epochs=15,
        runs=("teacher", "student", "kd", "mean-teacher"),
        # By validation: seed 0 had 84.3 % with a decay of 0.05, 85.2 with 0.5.
        teacher=dict(arch="cifar10-xavier-avg-teacher", weight_decay=0.5),
        # By validation: seed 1 had 77.6 % with a rate of 0.001, 80.4 with 0.003.
        student=dict(arch="cifar10-xavier-avg-student", lr=3e-3),
        kd=dict(alpha=0.8),
        consistency=dict(arch="cifar10-xavier-avg-teacher", lr=1e-3, weight_decay=0.5)),
    "svhn-xavier-avg": dict(
        report="004", dataset="svhn", init="xavier", pool="avg", normalise="half",
        runs=("teacher", "student", "kd"),
        augment="crop",                     # house numbers: no mirror
        teacher=dict(arch="svhn-xavier-avg-teacher", epochs=10),
        student=dict(arch="svhn-xavier-avg-student", epochs=14)),

    # Few labels, many images. The network is the small one of five convs. λ is small, as
    # the consistency cost is, a mean over the classes. 590 epochs of 3 steps on the
    # labels alone are the steps of mean teacher's 20 epochs of 88.
    "digits-500-labels": dict(
        augment="crop", labels=500, objective="consistency",
        runs=("student", "mean-teacher", "mean-teacher-no-ema"),
        teacher=dict(arch="digits-teacher", lr=5e-3, epochs=590),
        student=dict(arch="digits-teacher", lr=5e-3, epochs=590),
        consistency=dict(ema_decay=0.97, class_weight=0.1, epochs=20)),
    "cifar10-1000-labels": dict(
        dataset="cifar10", labels=1000, objective="consistency",
        runs=("student", "mean-teacher"),
        teacher=dict(arch="cifar10-he-max-teacher", epochs=100),
        student=dict(arch="digits-teacher", lr=2e-3, epochs=100),
        consistency=dict(class_weight=0.05, epochs=12, ramp_up=3)),
}
# A data set without a recipe: the networks and rates that did well on photographs.
WITHOUT_RECIPE = dict(
    runs=("teacher", "student", "kd"),
    teacher=dict(arch="cifar10-he-max-teacher"),
    student=dict(arch="cifar10-he-max-student", lr=2e-3))
# Defaults of a section in every recipe: what these objectives cannot do without.
SECTIONS = {"consistency": dict(ema_decay=0.99), "kd-ema": dict(ema_decay=0.99)}


def flags_of(chosen):
    """Return the flags that a recipe sets for all of its runs; "teacher" may be a section."""
    return {key: value for key, value in chosen.items()
            if key in DEFAULTS and not isinstance(value, dict)}


def settings(recipe, *sections):
    """Return every flag's value: the defaults, then the recipe's, then its sections'.

    recipe: a key of RECIPES; any other is a data set without a recipe.
    """
    chosen = RECIPES.get(recipe, WITHOUT_RECIPE)
    values = dict(DEFAULTS)
    for name in sections:
        values.update(SECTIONS.get(name, {}))
    values.update(flags_of(chosen))
    for name in sections:
        values.update(chosen.get(name, {}))
    return values


def describe(recipe):
    """Return what a recipe changes, as lines of text."""
    chosen = RECIPES[recipe]
    report = f", report {chosen['report']}" if "report" in chosen else ""
    lines = [f"{recipe}{report}", f"  runs         {', '.join(chosen['runs'])}"]
    parts = {"all": flags_of(chosen)}
    parts |= {key: value for key, value in chosen.items() if isinstance(value, dict)}
    for part, values in parts.items():
        changed = [f"{key} {value}" for key, value in values.items()]
        lines.append(f"  {part:<12} {', '.join(changed) or 'as the defaults'}")
    return lines


# ---- the command line ---------------------------------------------------------------

def wrap_help(text):
    """Return a docstring with its paragraphs filled to 80 columns; what is indented stays."""
    blocks = text.strip().split("\n\n")
    for i, block in enumerate(blocks):
        if not block.startswith("  "):
            blocks[i] = textwrap.fill(" ".join(block.split()), 80)
    return "\n\n".join(blocks)


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, no abbreviations, and docstrings as they are."""

    def __init__(self, usage="%(prog)s [--flag value ...]", description="", **options):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):      # a terminal whose encoding lacks α and ²
                stream.reconfigure(errors="backslashreplace")
        super().__init__(usage=usage, allow_abbrev=False, description=wrap_help(description),
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        if "expected one argument" in message:
            message += "; a value that begins with - is given as --flag=-value"
        fail(f"{message}; see {self.prog} --help")


def add_flag(section, flag, default, kind, text, choices=()):
    """Add one entry of FLAGS to an argparse group."""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    if shown is not None and kind is not bool:
        text += f" ({shown})"
    options = dict(default=default, help=text.replace("%", "%%"))
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is REGISTRY or isinstance(kind, list):
        options["choices"] = list(choices if kind is REGISTRY else kind)
        if flag == "arch":      # too many to list in the usage
            options["metavar"] = "NAME"
            options["help"] += f"; one of {', '.join(options['choices'])}"
    else:
        options.update(type=kind, metavar=METAVARS.get(kind, "N"))
    section.add_argument("--" + flag, **options)


def parse(doc, sections, registries, argv=None,
          groups=("data", "network", "training", "run"), extra=None):
    """Return the flags as a Namespace; the recipe's values are the defaults.

    sections: of the recipe, a tuple, or a function to one from the first look at the
    flags. registries: flag -> dict whose keys are the choices. extra: group -> flag ->
    (default, type, help), flags of this script or of an objective alone.
    """
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    first = Parser(add_help=False)
    for flag in ("recipe", "dataset", "objective", "teacher"):
        first.add_argument("--" + flag)
    seen, _ = first.parse_known_args(argv)

    datasets = registries["dataset"]
    recipe = seen.recipe
    if recipe is None and seen.dataset in (None, "digits"):
        recipe = "digits"
    if recipe not in RECIPES and recipe is not None:
        fail(f"--recipe {recipe}: no such recipe; choose from {', '.join(RECIPES)}")
    if seen.objective is None:
        seen.objective = settings(recipe)["objective"]
    defaults = settings(recipe, *(sections(seen) if callable(sections) else sections))
    if recipe is None and seen.dataset in datasets and not datasets[seen.dataset]["mirror"]:
        defaults["augment"] = "crop"

    parser = Parser(description=doc)
    parser.add_argument("--recipe", default=recipe, metavar="NAME",
                        help=f"sets the defaults of all other flags ({recipe}); one of "
                             f"{', '.join(RECIPES)}; default: digits, and for another "
                             "--dataset none")
    wanted = {name: dict(FLAGS[name]) for name in groups}
    for name, flags in (extra or {}).items():
        wanted.setdefault(name, {}).update(flags)
    for name, flags in wanted.items():
        section = parser.add_argument_group(name)
        for flag, (default, kind, text) in flags.items():
            default = defaults.get(flag.replace("-", "_"), default)
            add_flag(section, flag, default, kind, text, registries.get(flag, ()))
    args = parser.parse_args(argv)
    args.recipe = recipe or args.dataset
    return args


# ---- messages -----------------------------------------------------------------------

def printable(text):
    """Return a name from outside so that any terminal takes it: escape codes written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def write_line(text, file):
    """Print above a progress bar, if there is one."""
    tqdm = sys.modules.get("tqdm")      # where it was not loaded, there is no bar
    if tqdm:
        tqdm.tqdm.write(text, file=file)
    else:
        print(text, file=file)
    file.flush()


def say(text):
    """Print on stdout; of several processes the first one does."""
    if os.environ.get("RANK", "0") == "0":
        write_line("\n".join(map(printable, text.split("\n"))), sys.stdout)


def fail(message, code=2):
    """Print one line on stderr and leave: 2 for bad input, 3 for a loss that is not finite."""
    write_line(f"error: {printable(message)}", sys.stderr)
    raise SystemExit(code)


def progress(total, title, unit, done=0):
    """Return a progress bar on stderr: on a terminal, of the first process, and not where runs
    go side by side (make sets TQDM_DISABLE)."""
    from tqdm import tqdm

    hidden = (not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
              or "TQDM_DISABLE" in os.environ)
    return tqdm(total=total, initial=done, desc=title, unit=f" {unit}", leave=False,
                dynamic_ncols=True, disable=hidden)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a stop like Ctrl-C, with an exit code of its own."""


def raise_terminated(*_):
    raise Terminated


@contextlib.contextmanager
def one_line_errors(way_on="the same command starts again"):
    """End a script with one line where it is stopped, or a disk or memory gives out.

    way_on: what the user does next; what was finished is kept.
    """
    before = None
    with contextlib.suppress(ValueError):       # not in the main thread
        before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    except KeyboardInterrupt as stop:
        code = 143 if isinstance(stop, Terminated) else 130
        fail(f"stopped; {way_on}", code)
    except BrokenPipeError:     # nobody reads what is printed, as behind `| head`
        os._exit(141)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            fail(f"out of memory; lower --batch-size, or end other programs; {way_on}")
        name = error.filename or "standard output, or a file"
        fail(f"{name}: {error.strerror or error}; mend that, then {way_on}")
    except (MemoryError, RuntimeError) as error:
        lines = str(error).splitlines() or [""]
        memory = re.search("out of memory|not enough memory|t allocate memory|bad_alloc",
                           str(error))
        if memory or isinstance(error, MemoryError):
            fail(f"out of memory ({lines[0][:150]}); lower --batch-size or --image-size, or "
                 f"end other programs; {way_on}")
        if re.search("gloo|NCCL|onnection", str(error)):
            fail(f"another process ended ({lines[0][:150]}); {way_on}", code=1)
        raise
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


# ---- files --------------------------------------------------------------------------

def write_whole(path, data):
    """Write bytes so that the file is as it was or whole: aside, synced, then renamed."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):      # a write that fails does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def read_json(path):
    """Return the dict in a JSON file; one line naming the file where it cannot be read."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fail(f"{path}: cannot be read ({error}); take a whole copy, or remove its folder")


@contextlib.contextmanager
def locked(folder, wait=True):
    """Keep other processes out of a folder. wait=False: leave with one line if one is in it."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(lock)
        fail(f"{folder}: another process trains here; wait for it, or give --run NAME")
    except OSError as error:        # Lustre, some NFS
        say(f"note: {folder} cannot be locked here ({error.strerror}); start one run at a time")
    try:
        yield
    finally:
        os.close(lock)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--runs", metavar="RECIPE", help="print the runs of a recipe's chain")
    parser.add_argument("--names", action="store_true", help="print the names of the recipes")
    args = parser.parse_args(argv)
    if args.runs:       # a name that is no recipe is a data set without one
        print(*RECIPES.get(args.runs, WITHOUT_RECIPE)["runs"])
        return RECIPES
    if args.names:
        print(*RECIPES)
        return RECIPES
    for recipe in RECIPES:
        print("\n".join(describe(recipe)), end="\n\n")
    return RECIPES


if __name__ == "__main__":
    main()
