"""What the training scripts share: device, EMA, evaluate, the loop, the folder of a run.

A script hands fit() a prepared run and loss_fn(model, batch) -> (terms, logits); terms is
a dict, name -> scalar already weighted, whose sum each step minimises.
"""
import contextlib
import copy
import csv
import datetime
import io
import json
import math
import os
import platform
import subprocess
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import models
import plots
from recipes import (
    DEFAULTS,
    SCHEMA,
    fail,
    folder_name,
    locked,
    progress,
    read_json,
    say,
    write_whole,
)

REGISTRIES = models.REGISTRIES | data.REGISTRIES
WAY_ON = "the same command with --resume goes on after the last finished epoch"


# ---- device -------------------------------------------------------------------------

def pick_device(name="auto"):
    """Return the torch.device of a name: auto is CUDA, else Apple's MPS, else the CPU."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if name == "auto":
        name = there[0]
    elif name.split(":")[0] not in there:
        fail(f"--device {name}: not on this machine, which has: {', '.join(there)}; give one of "
             "them, or leave it out")
    return torch.device(name)


def pick_precision(name, device):
    """Return fp32 or bf16; auto is bf16 where it is native, as emulation is slower than fp32."""
    if name != "auto":
        return name
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cpu_quota(file="/sys/fs/cgroup/cpu.max"):
    """Return how many CPUs a container may keep busy, by its cgroup (v2); None: no limit."""
    try:
        quota, period = Path(file).read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):       # no such file, or "max"
        return None


def set_up(args):
    """Resolve --device and --precision in a copy of the flags; return it and the device."""
    device = pick_device(args.device)
    join(device)
    args = copy.copy(args)
    args.device, args.precision = device.type, pick_precision(args.precision, device)
    quota = cpu_quota()
    if quota and "OMP_NUM_THREADS" not in os.environ and quota < torch.get_num_threads():
        torch.set_num_threads(quota)        # more would only wait for each other
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when CUDA starts
    if args.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(args.deterministic)      # it imports for seconds
    torch.backends.cudnn.benchmark = not args.deterministic
    return args, device


def processor(device):
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError):      # Linux
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
    return platform.processor() or platform.machine()


def peak_memory():
    """Return the most bytes held so far, of a GPU if one is used; None where nobody counts."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, IndexError):      # Linux
        kilobytes = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        return 1024 * int(kilobytes)
    return None


# ---- several processes, started by torchrun -----------------------------------------

def join(device):
    """Join the other processes, where torchrun started this one; each GPU serves one of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # One may compute the teacher's outputs, or decode images, while others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))


def rank():
    """Return this process's number; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Go on when all processes are here."""
    if world() > 1:
        dist.barrier()


def summed(tensor):
    """Return the sum of a tensor over all processes."""
    if world() == 1:
        return tensor
    total = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def share_buffers_(model):
    """Give every process the first one's buffers: BatchNorm's statistics are of its rows."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def leave():
    """Leave the other processes, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- EMA ----------------------------------------------------------------------------

def make_average(model):
    """Return the average at its start: a float32 copy of the model that takes no gradient."""
    return copy.deepcopy(model).float().requires_grad_(False)


@torch.no_grad()
def ema_update_(average, model, decay):
    """average ← decay·average + (1−decay)·model, in place, for two modules of one architecture.

    Parameters and float buffers (BatchNorm's running mean and variance) are averaged, integer
    buffers copied. decay is taken as given: 0 copies, 1 would freeze. Tarvainen & Valpola
    2017, arXiv 1703.01780, section 2.
    """
    averaged, current = [], []
    for a, m in zip((*average.parameters(), *average.buffers()),
                    (*model.parameters(), *model.buffers()), strict=True):
        if a.is_floating_point():
            averaged.append(a)
            current.append(m.to(a.dtype))
        else:
            a.copy_(m)
    torch._foreach_lerp_(averaged, current, 1 - decay)       # one call for all of them


def ema_decay(decay, update):
    """Return the decay at update 0, 1, …: low at first, to forget random weights; 0 before that."""
    return min(decay, (1 + update) / (10 + update)) if update >= 0 else 0.0


def ema_reached(decay):
    """Return the first update at which the warm-up no longer holds the decay back."""
    return max(0, math.ceil((10 * decay - 1) / (1 - decay) - 1e-6))


# ---- evaluate -----------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batches, precision="fp32", keep=None):
    """Return {"loss": mean cross-entropy, "accuracy": 0 to 1, "n": rows} over labelled rows.

    batches: any iterable of items that begin (x, y), of any sizes: everything is a sum over
    rows, divided by n at the end. The model is in eval mode inside; every module gets its
    mode back. keep: a list that takes each batch's logits.
    """
    device = next((p.device for p in model.parameters()), None)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    losses, hits, rows = [], [], []
    try:
        for x, y, *_ in batches:
            x, y = x.to(device or x.device), y.to(device or x.device)
            with autocast(x.device, precision):
                logits = model(x)                               # (B, classes)
            if keep is not None:
                keep.append(logits.float())
            losses.append(F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="sum"))
            hits.append((logits.argmax(1) == y).sum())          # an unlabelled -1 is never hit
            rows.append((y >= 0).sum())
    finally:
        for module, training in modes:
            module.training = training
    # The first look at a value: no wait inside the loop.
    sums = torch.zeros(3, dtype=torch.float64)
    for i, values in enumerate((losses, hits, rows)):
        if values:
            sums[i] = torch.stack(values).cpu().double().sum()
    loss, right, n = summed(sums).tolist()
    if n == 0:
        raise ValueError("evaluate: no labelled rows in these batches")
    return {"loss": loss / n, "accuracy": right / n, "n": int(n)}


def chance(labels):
    """Return the accuracy that a network must pass to have learned anything: always naming the
    largest class, plus 3 standard errors of that share. labels: integers, −1 where unlabelled."""
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0])
    share = counts.max() / counts.sum()
    limit = share + 3 * math.sqrt(share * (1 - share) / counts.sum())
    return float(min(limit, math.nextafter(1, 0)))      # of few labels all right is above it


# ---- one epoch ----------------------------------------------------------------------

def schedule(kind, step, steps):
    """Return the factor on the learning rate at step 0 … steps−1.

    onecycle: from 1/25 up to 1 over the first 30 %, then down to nearly 0, both as half a
    cosine (Smith & Topin 2017, arXiv 1708.07120; the numbers are torch's).
    """
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    peak, last = 0.3 * steps - 1, steps - 1
    if step <= peak:
        low, t = 0.04, step / peak
    else:
        low, t = 4e-6, (last - step) / (last - peak)
    return low + (1 - low) * (1 - math.cos(math.pi * t)) / 2


def make_optimizer(modules, args):
    """Return the optimizer of all parameters of some modules; biases and norms do not decay."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    options = dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)      # in one pass
    if args.optimizer == "sgd":     # fused, it takes no parameter that joins the others later
        options["fused"] = not frozen_epochs(args)
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer]
    return kind(groups, **options)


def frozen_epochs(args):
    """Return in how many epochs, from the first on, the features take no gradient."""
    if vars(args).get("freeze", "none") == "none":
        return 0
    return args.unfreeze_at - 1 if args.unfreeze_at else math.inf


def set_training(model, args, epoch):
    """Put the model into training mode; frozen features take no gradient, and BatchNorm in
    them keeps its statistics."""
    model.train()
    if frozen_epochs(args):
        frozen = epoch <= frozen_epochs(args)
        model.features.train(not frozen).requires_grad_(not frozen)


def train_epoch(args, model, average, adapter, loss_fn, optimizer, batches, first_update, bar):
    """One pass over the batches; first_update: steps that were made before.

    Returns each step's loss and terms, (steps,) and (steps, terms), the names of the terms,
    hits, labelled rows, and norms of the layers' gradients, (steps, layers): on the device,
    for reading a value would force a GPU sync. On a CPU it is free.
    """
    losses, parts, hits, rows, norms = [], [], [], [], []
    steps = batches.steps()
    total, warm_start = args.epochs * steps, vars(args).get("warm_start", 0) * steps
    trained = [*model.parameters(), *(adapter.parameters() if adapter else ())]
    network, together = model, world() > 1
    if together:        # averages the gradients of all processes during backward
        network = DistributedDataParallel(model)
    for step, batch in enumerate(batches.epoch(1 + first_update // steps)):
        update = first_update + step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(args.schedule, update, total)

        # forward and loss
        with autocast(batch.x.device, args.precision):
            terms, logits = loss_fn(network, batch)         # name -> scalar, (B, classes)
        loss = sum(terms.values())

        # backward
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients_(adapter)

        # step
        gradients = [p.grad for p in trained if p.grad is not None]
        norms.append(torch.stack(torch._foreach_norm(gradients)))       # one a layer
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(trained, args.clip,
                                                 torch.linalg.vector_norm(norms[-1]))
        optimizer.step()

        # EMA
        share_buffers_(model)
        if average is not None:
            ema_update_(average, model, ema_decay(args.ema_decay, update - warm_start))

        # log
        losses.append(loss.detach().float())
        parts.append(torch.stack([term.detach().float() for term in terms.values()]))
        hits.append((logits.detach().argmax(1) == batch.y).sum())
        rows.append((batch.y >= 0).sum())
        bar.update()
        if loss.device.type == "cpu" and not together and not torch.isfinite(loss):
            break
    losses, parts, hits, rows = (summed(torch.stack(values)) for values in
                                 (losses, parts, hits, rows))
    return losses / world(), parts / world(), list(terms), hits, rows, torch.stack(norms)


def share_gradients_(adapter):
    """Average the gradients of an adapter over all processes, as DDP does the model's."""
    if adapter is not None and world() > 1:
        for p in adapter.parameters():
            p.grad = summed(p.grad) / world()


# ---- a run --------------------------------------------------------------------------

# What may differ between two calls for the same run: where things lie, and what to do.
FREE = {"results_dir", "data_dir", "skip_bad", "run", "resume", "overwrite", "dry_run", "teacher",
        "init_from", "cache"}
# ... and what is no setting, but a fact of a place or a day.
FACTS = {"versions", "git_commit", "date", "schema", "before", "class_names", "parameters",
         "minimises"}
TITLES = {"data_key": "the images, by their data_key",
          "teacher_sha256": "the teacher, which was trained again since, by its weights"}
RUN_FILES = ("final.json", "checkpoint.pt", "best.pt", "metrics.csv", "config.json",
             "curves.png", "test.npz", "look.html")
VALIDATED = {"model": "val", "ema": "ema_val"}      # network -> its columns in metrics.csv


@dataclass
class Run:
    """A run that is ready to train: its flags, data, network and folder."""
    args: object                # --device and --precision resolved
    device: torch.device
    splits: data.Splits
    model: torch.nn.Module
    folder: Path
    final: dict | None          # of a run that is finished already
    config: dict                # for config.json
    metadata: dict              # what best.pt needs to be used alone
    train: data.Batches
    val: data.Batches           # may be empty
    test: data.Batches
    macs: int
    started: float              # time.perf_counter() when the script began

    @property
    def judge(self):
        """The batches that tell whether it learned: validation's, or where it has none, test's."""
        return self.val if len(self.val) else self.test


def prepare(args, script, name, started, pair=False, labelled_only=True, known=None,
            source=None):
    """Return a Run: load the data, build the network from its seed, look at the run's folder.

    Nothing is made yet. name: of the run, without its seed. pair, labelled_only: see
    data.Batches. known: what else config.json says, hashes of what is learned from. source:
    the file that is learned from, which the run must not replace.
    """
    args, device = set_up(args)
    splits = data.load(args.dataset, args.data_dir, args.labels, args.val_fraction, args.seed,
                       args.image_size, args.fit, args.normalise, args.skip_bad)
    shape = (3, *splits.train.images.shape[1:3])
    args.image_size = shape[1]
    if not callable(models.ARCHITECTURES.get(args.arch)):      # others have their own
        args.norm = args.norm or "none"

    torch.manual_seed(data.seed_for(args.seed, "weights"))
    build = dict(arch=args.arch, num_classes=len(splits.classes), image_shape=shape, init=args.init,
                 pool=args.pool, activation=args.activation, norm=args.norm)
    model = models.build(**build)
    config = make_config(args, script, device, data_key=splits.key, classes=len(splits.classes),
                         class_names=list(splits.classes),
                         parameters=models.count_parameters(model), **(known or {}))
    folder = run_folder(args, f"{name}-s{args.seed}")
    if source and Path(source).resolve().parent == folder.resolve():
        fail(f"{source}: lies in the folder of this run, which would replace it; give another "
             "--run NAME")
    final = look_at_folder(args, folder, config)
    macs = models.count_macs(model, shape)
    metadata = dict(schema=SCHEMA, build=build, classes=list(splits.classes), mean=splits.mean,
                std=splits.std, fit=args.fit, recipe=args.recipe, val_fraction=args.val_fraction,
                labels=args.labels)

    def batches(split, size, **options):
        return data.Batches(split, splits.mean, splits.std, size, device, rank=rank(),
                            world=world(), **options)

    train = batches(splits.train, args.batch_size, augment=args.augment, views=args.views,
                    seed=args.seed, pair=pair, labelled_only=labelled_only,
                    noise=vars(args).get("noise"))
    check_batch_size(args, train, model)
    size = data.scoring_size(shape[1:])
    val, test = batches(splits.val, size), batches(splits.test, size)
    model = model.to(device, memory_format=torch.channels_last)
    return Run(args, device, splits, model, folder, final, config, metadata, train, val, test, macs,
               started)


def check_batch_size(args, train, model):
    """Refuse a batch that holds too few images to learn from, or to share."""
    if len(train.unlabelled) and train.step_size < 2:
        fail(f"--batch-size {args.batch_size} with --labels {args.labels}: a batch needs at "
             "least 2, a labelled and an unlabelled image")
    unlabelled = train.step_size - train.labelled_per_batch
    if train.labelled_per_batch % world() or unlabelled % world():
        fail(f"--batch-size {args.batch_size}: {train.labelled_per_batch} labelled and "
             f"{unlabelled} unlabelled images of a step cannot be shared equally by {world()} "
             "processes; give another")
    if models.has_batchnorm(model) and train.step_size == world():
        fail(f"--batch-size {args.batch_size} with BatchNorm: one image has no deviation; give a "
             "larger one")


def make_config(args, script, device, **known):
    """Return what config.json holds: every flag, and what else the result depends on."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    system=platform.system(), device=processor(device),
                    threads=torch.get_num_threads(), processes=world())
    return {"schema": SCHEMA, "script": script, **vars(args), **known, "versions": versions,
            "git_commit": git_commit(), "date": datetime.date.today().isoformat()}


def git_commit():
    """Return the commit of these scripts, with -dirty where they were changed since; or None."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True)
    try:
        if git("cat-file", "-e", "HEAD:./common.py").returncode:    # another project's
            return None
        changed = git("diff", "--quiet", "HEAD", "--", ":(glob)*.py").returncode
        return git("rev-parse", "HEAD").stdout.strip() + ("-dirty" if changed else "")
    except OSError:     # no git: copied by hand, or into a notebook
        return None


def differences(old, new):
    """Return in words the settings in which two configs differ."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    defaults, found = {**DEFAULTS, "init_sha256": None}, []
    for key in sorted(new.keys() - FREE - FACTS):
        # A flag that is newer than the run had its default; any other thing was not asked about.
        before = old.get(key, defaults.get(key, new[key]))
        if before != new[key]:
            title = TITLES.get(key, key)
            found.append(f"{title} {str(before)[:40]} (asked for: {str(new[key])[:40]})")
    return found


def run_folder(args, name):
    """Return the folder of a run."""
    name = folder_name("--run", name if args.run is None else args.run)
    return Path(args.results_dir) / args.recipe / name


def look_at_folder(args, folder, config):
    """Return final.json of a finished run that is the one asked for, else None.

    A finished run of other settings, and an unfinished one without --resume, or resumed with
    other settings, end with one line.
    """
    if args.overwrite or not folder.exists():
        return None
    ways = "add --overwrite (make: OVERWRITE=1), or keep both with --run NAME"
    finished = (folder / "final.json").exists()
    if not finished and not (folder / "checkpoint.pt").exists():
        return None         # stopped in its first epoch: nothing is lost
    differs = differences(read_json(folder / "config.json"), config)
    if differs:
        fail(f"{folder}: {'finished' if finished else 'begun'} with other settings: "
             f"{', '.join(differs)}; {ways}")
    if finished:
        final = read_json(folder / "final.json")
        say(f"{folder}: finished already, kept; --overwrite runs it again")
        return final
    if not args.resume:
        fail(f"{folder}: an unfinished run; add --resume to go on after its last finished epoch, "
             "or --overwrite to start again")
    return None


def begin_run(args, folder, config):
    """Write config.json; the files of a run that is not gone on from are removed first."""
    if look_at_folder(args, folder, config) is not None:
        fail(f"{folder}: another process finished this run just now; the same command says with "
             "what")
    if args.overwrite or not (folder / "checkpoint.pt").exists():
        for file in RUN_FILES:
            (folder / file).unlink(missing_ok=True)
    else:
        old = read_json(folder / "config.json")
        config["before"] = old.get("before", [])
        was, now = ({**one["versions"], "commit": one["git_commit"]} for one in (old, config))
        changed = [f"{key} {was.get(key)} (now {now[key]})" for key in now
                   if was.get(key) != now[key]]
        if changed:
            say(f"note: begun with {', '.join(changed)}; the rest need not be the same bit for bit")
            config["before"].append(was)
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def announce(run, what, minimises, lines=()):
    """Print what a run will do, before it does it. lines: (title, text) of the script."""
    args, train = run.args, run.train
    mixed = ""
    if len(train.unlabelled):
        mixed = (f" ({len(train.unlabelled)} unlabelled; {train.labelled_per_batch} of a batch "
                 "are labelled)")
    say(f"{what}: {args.arch}, {run.config['parameters']:,} parameters, {run.macs:,} multiply-adds")
    detail("data", f"{args.dataset}: {len(train.labelled) + len(train.unlabelled)} train{mixed}, "
                   f"{len(run.val)} validation, {len(run.test)} test; "
                   f"{len(run.splits.classes)} classes")
    detail("loss", minimises)
    detail("steps", f"{args.epochs} epochs of {train.steps()}, batch {train.step_size}; "
                    f"{args.optimizer}, {args.schedule}, lr {args.lr:g}")
    init = f"{args.init} init, {args.pool} pool"
    if callable(models.ARCHITECTURES[args.arch]):
        init = f"{args.arch}'s own init and pools"
    detail("on", f"{args.device}, {args.precision}; {init}, seed {args.seed}; into {run.folder}")
    if args.ema_decay:
        first, steps = ema_reached(args.ema_decay), args.epochs * train.steps()
        never = "" if first < steps else f", never: the run has {steps}; lower --ema-decay"
        detail("ema", f"decay {args.ema_decay:g}, reached at update {first}{never}")
    for title, text in lines:
        detail(title, text)


def detail(title, text):
    """Print one indented line of what a run will do, folded at 80 columns, paths left whole."""
    say(textwrap.fill(text, 80, initial_indent=f"  {title:<6} ", subsequent_indent=" " * 9,
                      break_long_words=False, break_on_hyphens=False))


def fit(run, loss_fn, average=None, adapter=None, teacher_seconds=None):
    """Make the run's folder and train; return its final dict. With --dry-run make nothing.

    average: of make_average, updated and evaluated beside the model. adapter: a module that
    the objective trains beside the student: clipped and saved with it, averaged by none.
    teacher_seconds: what the teacher took before the first step.
    """
    if run.args.dry_run:
        say("dry run: all of the above was checked, no run was made")
        return run.config
    if rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
    wait()
    with locked(run.folder, wait=False) if rank() == 0 else contextlib.nullcontext():
        if rank() == 0:
            begin_run(run.args, run.folder, run.config)
        wait()
        if run.args.compile:
            run.model.compile(dynamic=False)       # one shape, one kernel
        seconds = dict(setup_seconds=time.perf_counter() - run.started - (teacher_seconds or 0),
                       teacher_seconds=teacher_seconds)
        history, best = train_epochs(run, loss_fn, average, adapter)
        final = score(run, average, history, best, seconds)
        if rank() == 0:
            write_whole(run.folder / "final.json", json.dumps(final, indent=1).encode() + b"\n")
            try:
                plots.draw_curves(history, run.folder / "curves.png", run.folder.name,
                                  terms=terms_of(history))
            except Exception as error:      # a picture is no reason to lose a run
                say(f"warning: curves.png was not drawn ({error})")
    wait()
    leave()
    return final


def train_epochs(run, loss_fn, average=None, adapter=None):
    """Train all epochs, or those that are left; return (history, best weights).

    history: a dict for each epoch, the rows of metrics.csv. After every epoch best.pt,
    metrics.csv and checkpoint.pt are written, in this order: the last one counts.
    """
    args, folder = run.args, run.folder
    networks, modules, saved = {"model": run.model}, [run.model], {"model": run.model}
    if average is not None:
        networks["ema"] = saved["ema"] = average
    if adapter is not None:
        saved["adapter"] = adapter
        modules.append(adapter)
    optimizer = make_optimizer(modules, args)
    history, best = [], {}
    if args.resume:
        history, best = restore(run, saved, optimizer)
    if history and rank() == 0:
        save_best(run, history, best)
        write_history(folder / "metrics.csv", history)
    limit = chance(run.judge.labels.cpu())
    steps, first = run.train.steps(), len(history) + 1
    bar = progress(args.epochs * steps, folder.name, "steps", done=len(history) * steps)
    for epoch in range(first, args.epochs + 1):
        started = time.perf_counter()
        set_training(run.model, args, epoch)
        losses, parts, names, hits, rows, norms = train_epoch(
            args, run.model, average, adapter, loss_fn, optimizer, run.train, (epoch - 1) * steps,
            bar)
        losses = losses.tolist()
        seconds = time.perf_counter() - started
        stop_unless_finite(run, losses, norms, epoch)

        row = dict(epoch=epoch, train_loss=sum(losses) / steps,
                   train_accuracy=int(hits.sum()) / max(1, int(rows.sum())))
        for name, column in VALIDATED.items():
            found = {}
            if name in networks and len(run.val):
                found = evaluate(networks[name], run.val, args.precision)
            row[f"{column}_loss"] = found.get("loss")
            row[f"{column}_accuracy"] = found.get("accuracy")
        row["lr"] = optimizer.param_groups[0]["lr"]
        row["seconds"] = time.perf_counter() - started
        row["images_per_second"] = steps * run.train.step_size / seconds
        for name, value in zip(names, parts.mean(0).tolist(), strict=True):
            row[f"train_{name}"] = value
        stop_unless_finite(run, [], norms, epoch, row)
        history.append(row)
        for name, network in networks.items():
            if best_epoch(history, name) == epoch:
                best[name] = {key: value.detach().cpu().clone()
                              for key, value in network.state_dict().items()}
        if rank() == 0:
            save_epoch(run, history, best, saved, optimizer)
        say(epoch_line(row, args.epochs))
        warn_if_nothing_learned(history, args.epochs, limit)
        if epoch == first and (args.epochs - epoch) * row["seconds"] > 60:
            say(f"about {(args.epochs - epoch) * row['seconds'] / 60:.0f} min left")
    bar.close()
    return history, best


def epoch_line(row, epochs):
    """Return what happened in an epoch, in at most 80 columns."""
    width = len(str(epochs))
    line = f"epoch {row['epoch']:{width}}/{epochs}  loss {row['train_loss']:.4f}"
    for column, title in (("train", "train"), ("val", "val"), ("ema_val", "ema")):
        accuracy = row[f"{column}_accuracy"]
        if accuracy is not None:
            line += f"  {title} {100 * accuracy:5.2f} %"
    return f"{line}  {row['seconds']:.1f} s"


def best_epoch(history, name):
    """Return a network's first epoch of highest validation accuracy; without any, the last."""
    values = [row[VALIDATED[name] + "_accuracy"] for row in history]
    return len(values) if None in values else values.index(max(values)) + 1


def warn_if_nothing_learned(history, epochs, limit):
    """Warn, with the usual causes, if after a third of the epochs no validation accuracy is
    above the limit of chance()."""
    accuracies = [row["val_accuracy"] for row in history]
    if len(history) != max(1, math.ceil(epochs / 3)) or None in accuracies:
        return
    if max(accuracies) <= limit:
        say(f"warning: nothing learned in {len(history)} of {epochs} epochs: validation is not "
            "above chance.\n  Usual causes: too few epochs, an init without the ReLU gain "
            "(--init he), a learning\n  rate too high or too low (--lr), dead ReLUs, labels "
            "that do not belong to the images.")


def stop_unless_finite(run, losses, norms, epoch, row=None):
    """End with exit code 3 where a step's loss is not finite, or (row) what is left after the
    epoch; name the layer whose gradient was largest in the step before it."""
    args, steps = run.args, run.train.steps()
    step = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    what = f"loss is {losses[step]}" if step is not None else None
    if row:
        size = sum(p.detach().float().norm() for p in run.model.parameters())
        buffers = sum(buffer.double().sum() for buffer in run.model.buffers())
        for name, value in (("norm of the weights", size), ("running variance", buffers),
                            ("validation loss", row["val_loss"]),
                            ("average's validation loss", row["ema_val_loss"])):
            if not math.isfinite(value or 0):
                what, step = f"{name} is {float(value)}", steps - 1
    if what is None:
        return
    layers = [name for name, p in run.model.named_parameters() if p.grad is not None]
    before = norms[max(0, min(step, len(norms)) - 1)][:len(layers)]
    largest = before.nan_to_num(nan=math.inf).argmax().item()
    lr = args.lr * schedule(args.schedule, (epoch - 1) * steps + step, args.epochs * steps)
    kept = f"the state after epoch {epoch - 1} is kept" if epoch > 1 else "nothing is saved"
    fail(f"the {what} at epoch {epoch}, step {step + 1}, learning rate {lr:.2g}; the largest "
         f"gradient before was that of {layers[largest]}, norm {before[largest]:.2g}; {kept} in "
         f"{run.folder}; try a lower --lr, --clip 1 or --precision fp32", code=3)


# ---- the files of a run -------------------------------------------------------------

METRICS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "ema_val_loss",
           "ema_val_accuracy", "lr", "seconds", "images_per_second")    # then train_<term>


def terms_of(history):
    """Return the names of the loss terms in a history."""
    return [key.removeprefix("train_") for key in history[0] if key not in METRICS]


def write_history(path, history):
    """Write metrics.csv whole: a row an epoch, empty where a value does not apply."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_whole(path, text.getvalue().encode())


def save_best(run, history, best):
    """Write best.pt: the best weights by validation, and all that is needed to use them."""
    epochs = {name: best_epoch(history, name) for name in best}
    models.save_checkpoint(run.folder / "best.pt", run.metadata | dict(
        model=best["model"], ema=best.get("ema"), epoch=epochs["model"],
        ema_epoch=epochs.get("ema")))


def save_epoch(run, history, best, saved, optimizer):
    """Write best.pt, metrics.csv, checkpoint.pt in this order: the last is the commit point."""
    if any(best_epoch(history, name) == len(history) for name in best):
        save_best(run, history, best)
    write_history(run.folder / "metrics.csv", history)
    settings = {key: value for key, value in run.config.items() if key not in FREE | FACTS}
    models.save_checkpoint(run.folder / "checkpoint.pt", dict(
        schema=SCHEMA, settings=json.dumps(settings), history=history, best=best,
        networks={name: network.state_dict() for name, network in saved.items()},
        optimizer=optimizer.state_dict()))


def restore(run, saved, optimizer):
    """Load the last finished epoch, if there is one; return its history and the best weights."""
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        return [], {}
    state = models.load_checkpoint(path)
    try:
        differs = differences(json.loads(state["settings"]), run.config)
        if differs:
            fail(f"{path}: of a run with other settings than its config.json: "
                 f"{', '.join(differs)}; put the right one there, or add --overwrite")
        for name, network in saved.items():
            network.load_state_dict(state["networks"][name])
        groups = optimizer.state_dict()["param_groups"]     # the flags', not the file's
        optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
        history, best = state["history"], state["best"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        fail(f"{path}: not a checkpoint of this run ({reason}); put the right one there, or add "
             "--overwrite to start again")
    say(f"going on after epoch {len(history)}")
    return history, best


def write_outputs(path, logits, labels):
    """Write the outputs on the test split, for what accuracy does not say. logits: "model" and,
    where there is an average, "ema" -> (N, classes)."""
    memory = io.BytesIO()
    arrays = {"logits": logits["model"].numpy(), "labels": labels.numpy()}
    if "ema" in logits:
        arrays["ema_logits"] = logits["ema"].numpy()
    np.savez_compressed(memory, **arrays)
    write_whole(path, memory.getvalue())


def score(run, average, history, best, seconds):
    """Score the test split, once, with the last and the best weights; return the final dict."""
    started, args = time.perf_counter(), run.args
    networks = {"model": run.model}
    if average is not None:
        networks["ema"] = average
    epochs, last, val, outputs = {}, {}, {}, {}
    tested = {"ema": {}, "recomputed": {}}
    for name, network in networks.items():
        logits = []
        last[name] = tested[name] = evaluate(network, run.test, args.precision, logits)
        epochs[name] = epoch = best_epoch(history, name)
        if epoch < len(history):
            logits = []
            network.load_state_dict(best[name])
            tested[name] = evaluate(network, run.test, args.precision, logits)
        val[name] = history[epoch - 1][VALIDATED[name] + "_accuracy"]
        if world() == 1:        # of several processes each has seen a part
            outputs[name] = torch.cat(logits).cpu()
    if outputs:
        write_outputs(run.folder / "test.npz", outputs, run.test.labels.cpu())
    if average is not None and models.has_batchnorm(average):
        # Averaged statistics are not those of averaged weights.
        with autocast(run.device, args.precision):
            torch.optim.swa_utils.update_bn(run.train.epoch(args.epochs), average)
        share_buffers_(average)
        tested["recomputed"] = evaluate(average, run.test, args.precision)
        if len(run.val):
            val["recomputed"] = evaluate(average, run.val, args.precision)["accuracy"]
    for name, found in tested.items():
        if found and not math.isfinite(found["loss"]):
            fail(f"{run.folder}: the loss of the {name} on test is {found['loss']}; try a lower "
                 "--lr", code=3)

    speeds = [row["images_per_second"] for row in history]
    judged = val["model"]
    if judged is None:
        judged = tested["model"]["accuracy"]
    final = dict(
        schema=SCHEMA, recipe=args.recipe, run=run.folder.name, script=run.config["script"],
        seed=args.seed, arch=args.arch, parameters=run.config["parameters"], macs=run.macs,
        epochs=args.epochs, best_epoch=epochs["model"],
        val_accuracy=val["model"], test_accuracy=tested["model"]["accuracy"],
        test_loss=tested["model"]["loss"], last_test_accuracy=last["model"]["accuracy"],
        ema_best_epoch=epochs.get("ema"),
        ema_val_accuracy=val.get("ema"), ema_test_accuracy=tested["ema"].get("accuracy"),
        ema_last_test_accuracy=last.get("ema", {}).get("accuracy"),
        recomputed_val_accuracy=val.get("recomputed"),
        recomputed_test_accuracy=tested["recomputed"].get("accuracy"),
        learned=judged > chance(run.judge.labels.cpu()), **seconds,
        images_per_second=float(np.median(speeds[1:] or speeds)),
        peak_memory_bytes=peak_memory(), device=args.device, precision=args.precision,
        torch=torch.__version__, weights_sha256=models.weights_sha256(run.model.state_dict()))
    final["seconds"] = (seconds["setup_seconds"] + (seconds["teacher_seconds"] or 0)
                        + sum(row["seconds"] for row in history) + time.perf_counter() - started)
    line = (f"{run.folder.name}: test {100 * final['test_accuracy']:.2f} % "
            f"(epoch {final['best_epoch']}/{args.epochs})")
    if average is not None:
        line += f", average {100 * final['ema_test_accuracy']:.2f} %"
    if tested["recomputed"]:
        line += f", its statistics recomputed {100 * final['recomputed_test_accuracy']:.2f} %"
    if not final["learned"]:
        say("warning: this network learned nothing; no report draws a conclusion from it")
    say(f"{line}, {final['seconds']:.0f} s")
    return final
