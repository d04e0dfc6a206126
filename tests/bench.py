"""How fast the scripts are, as ratios to what surrounds them: `make bench`.

    python tests/bench.py --data-dir data/cifar10                 all rows; writes bench.json
    python tests/bench.py --data-dir data/cifar10 --only ema,start

Needs CIFAR-10 as class folders. Every figure is a ratio of two speeds taken in turn, three times,
the best of each. Yardsticks are written out here: the loop as tutorials write it, and the bare
step, which has its batch in place and does nothing but learn from it.
"""
import argparse
import contextlib
import datetime
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import common  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import models  # noqa: E402
import runs  # noqa: E402
import train_student  # noqa: E402
import train_teacher  # noqa: E402
from device import peak_resident, pick_precision, processor  # noqa: E402
from files import write_whole  # noqa: E402
from flags import fail, settings  # noqa: E402

OUT = ROOT / "results" / "published" / "bench.json"
PER_CLASS = 500         # train images of a class: an epoch of seconds
ROUNDS = []             # what best_in_turn measured in a part, all rounds of it
LARGE, SMALL = "cifar10-xavier-avg", "cifar10-he-max"
VIEWS, EPOCHS = 4, 15   # of the whole kd


def best_in_turn(*measures, rounds=3):
    """Run each measure (a function that returns a speed) in turn; return the best of each."""
    found = [[measure() for measure in measures] for _ in range(rounds)]
    ROUNDS.append(found)
    return [max(column) for column in zip(*found, strict=True)]


def timed(function, least=3.0):
    """Return calls per second of a function, over so many seconds at least, after two to warm up.
    """
    function(), function()
    sync()
    calls, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < least:
        function()
        calls += 1
        if calls % 10 == 0:
            sync()
    sync()
    return calls / (time.perf_counter() - started if torch.cuda.is_available() else seconds)


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device():
    return common.pick_device("auto")


def precision():
    return pick_precision("auto", device())


def network(recipe, role="student", layout=torch.channels_last):
    values = settings(recipe, role)
    torch.manual_seed(0)
    net = models.build(values["arch"], 10, (3, 32, 32), values["init"], values["pool"])
    return net.to(device(), memory_format=layout)


def plain_pools(model):
    """Put PyTorch's own average pools into a network in place of ours."""
    for name, layer in model.features.named_children():
        if isinstance(layer, torch.nn.AvgPool2d):
            setattr(model.features, name, torch.nn.AvgPool2d(2))


# ---- yardsticks -------------------------------------------------------------------------------

def report_loop(folder, recipe, teacher=None, workers=0, seconds=12.0):
    """Images per second of the loop as the five reports write it."""
    from torchvision import datasets, transforms

    images = datasets.ImageFolder(folder / "train", transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]))
    loader = torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=workers,
                                         drop_last=True)
    model = network(recipe, layout=torch.contiguous_format).train()
    plain_pools(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    seen, started = 0, None
    for x, y in loader:
        if started is None:         # the first batch waits for the workers to start
            started = time.perf_counter()
            continue
        x, y = x.to(device()), y.to(device())
        logits = model(x)
        if teacher is None:
            loss = F.cross_entropy(logits, y)
        else:
            with torch.no_grad():
                target = F.softmax(teacher(x) / 4, 1)
            loss = 0.9 * 16 * F.kl_div(F.log_softmax(logits / 4, 1), target,
                                       reduction="batchmean") + 0.1 * F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seen += len(x)
        if time.perf_counter() - started > seconds:
            break
    return seen / (time.perf_counter() - started)


def bare_step(recipe, size=128, compiled=False, layout=torch.channels_last, kind=None,
              role="student", pools=None, fused=True):
    """Images per second of forward, loss, backward, step on one batch that is already in place."""
    model = network(recipe, role, layout).train()
    if pools:
        pools(model)
    if compiled:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    x = torch.randn(size, 3, 32, 32).to(device(), memory_format=layout)
    y = torch.randint(10, (size,)).to(device())

    def step():
        with common.autocast(device(), kind or precision()):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return size * timed(step)


# ---- the scripts ------------------------------------------------------------------------------

def script(module, recipe, folder, results, *flags, epochs=3):
    """The final dict of a run of the real script, silently."""
    words = ["--recipe", recipe, "--dataset", "folder", "--data-dir", folder, "--epochs", epochs,
             "--results-dir", results, "--overwrite", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        return module.main([str(word) for word in words])


def row(title, ratio, goal, **figures):
    """One line of the table; a goal reads "≥ 2.5", or is None."""
    kind, value = goal.split() if goal else ("≥", "-inf")
    met = ratio >= float(value) if kind == "≥" else ratio <= float(value)
    return dict(title=title, ratio=ratio, goal=goal, met=bool(met), figures=figures)


def bench_student(folder, results):
    """The student's loop against the report loop and the bare step."""
    rows = []
    workers = max((0, 2), key=lambda n: report_loop(folder, LARGE, workers=n, seconds=6))
    limits = (0.9, 0.9) if torch.cuda.is_available() else (0.95, 0.80)
    for recipe, limit in zip((LARGE, SMALL), limits, strict=True):
        ours, theirs, bare = best_in_turn(
            lambda r=recipe: script(train_student, r, folder, results)["images_per_second"],
            lambda r=recipe: report_loop(folder, r, workers=workers),
            lambda r=recipe: bare_step(r))
        figures = dict(ours=ours, report_loop=theirs, bare_step=bare, workers=workers)
        if recipe == LARGE:
            rows.append(row(f"student of {recipe}, augmented / report loop, not augmented",
                            ours / theirs, "≥ 2.5", **figures))
        rows.append(row(f"student of {recipe} / bare step, batch 128", ours / bare,
                        f"≥ {limit}", **figures))
    return rows


def bench_kd(folder, results):
    """kd from the cache against the student alone, and against the report loop's live teacher."""
    recipe, views = LARGE, ("--views", VIEWS)
    # What it has learned does not matter to a speed.
    script(train_teacher, recipe, folder, results, "--labels", 100, epochs=1)
    teacher = network(recipe, "teacher", torch.contiguous_format).eval()
    workers = max((0, 2), key=lambda n: report_loop(folder, recipe, workers=n, seconds=6))
    shutil.rmtree(results / recipe / ".teacher", ignore_errors=True)
    filled = script(distill, recipe, folder, results, *views, epochs=VIEWS + 1)
    kept = []

    def cached():
        kept.append(script(distill, recipe, folder, results, *views, epochs=VIEWS + 1))
        return kept[-1]["images_per_second"]

    ours, alone, theirs = best_in_turn(
        cached,
        lambda: script(train_student, recipe, folder, results, *views)["images_per_second"],
        lambda: report_loop(folder, recipe, teacher, workers))
    filling = filled["teacher_seconds"] - min(final["teacher_seconds"] for final in kept)
    return kd_rows(dict(cached=ours, alone=alone, report_loop=theirs, filling_seconds=filling,
                        views=VIEWS, workers=workers))


def kd_rows(figures):
    """The rows of kd from what was measured. The whole: filling, then epochs, all in proportion to
    the images; with fresh views as many are filled as there are epochs."""
    ours, theirs, images = figures["cached"], figures["report_loop"], PER_CLASS * 10 * 0.9
    a_view = figures["filling_seconds"] / figures["views"]
    whole, fresh = (EPOCHS * images / theirs / (views * a_view + EPOCHS * images / ours)
                    for views in (VIEWS, EPOCHS))
    return [row(f"epoch of kd, cached / of the student alone ({LARGE})", figures["alone"] / ours,
                "≤ 1.10", **figures),
            row("kd, cached / report loop with its live teacher", ours / theirs, "≥ 12", **figures),
            row(f"the same over {EPOCHS} epochs, filling {VIEWS} views included", whole, "≥ 4",
                **figures),
            row(f"kd over {EPOCHS} epochs, filling {EPOCHS} views (fresh ones) / report loop",
                fresh, "≥ 4", **figures)]


def bench_ema(folder, results):
    """The EMA update against a training step, and against torch's and timm's."""
    rows = []
    for recipe in (LARGE, SMALL):
        model = network(recipe)
        ours = common.make_average(model)
        multi = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
        theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=multi, use_buffers=True)
        theirs.update_parameters(model)
        measures = [lambda m=model, a=ours: timed(lambda: common.ema_update_(a, m, 0.99), 1.0),
                    lambda m=model, a=theirs: timed(lambda: a.update_parameters(m), 1.0),
                    lambda r=recipe: bare_step(r) / 128]
        try:
            from timm.utils import ModelEmaV3
            timm = ModelEmaV3(model, decay=0.99)
            measures.append(lambda m=model, a=timm: timed(lambda: a.update(m), 1.0))
        except ImportError:
            print("timm is not installed: its row is left out", file=sys.stderr)
        update, torchs, step, *timms = best_in_turn(*measures)
        figures = dict(update_ms=1e3 / update, torch_ms=1e3 / torchs, step_ms=1e3 / step,
                       timm_ms=1e3 / timms[0] if timms else None)
        rows += [row(f"EMA update / training step ({recipe})", step / update, "≤ 0.03", **figures),
                 row(f"EMA update / torch's ({recipe})", torchs / update, "≤ 1", **figures)]
        if timms:
            rows.append(row(f"EMA update / timm's ({recipe})", timms[0] / update, "≤ 1", **figures))
    return rows


def bench_start(folder, results):
    """From the command to the first step on 50 000 images of 32×32, arrays kept; and memory."""
    made = results / "made"
    if not made.exists():
        make_images(made, 50_000, listed=50_000)
    code = ("import sys, common, train_student\n"
            "step = common.make_optimizer\n"
            "def first(*a):\n"
            "    o = step(*a); s = o.step\n"
            "    def stop(*b, **c):\n"
            "        print(common.device.peak_resident(), flush=True)\n"
            "        import os; os._exit(0)\n"
            "    o.step = stop\n"
            "    return o\n"
            "common.make_optimizer = first\n"
            "train_student.main(sys.argv[1:])\n")
    words = ["--recipe", SMALL, "--dataset", "folder", "--data-dir", str(made), "--results-dir",
             str(results / "start"), "--overwrite"]
    memory, speeds = [], []
    for _ in range(4):          # the first is not counted
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *words], text=True, cwd=ROOT,
                              capture_output=True, check=True)
        speeds.append(time.perf_counter() - started)
        memory.append(int(done.stdout.split()[-1]) / 1e9)
    return [row("second start on 50 000 images, seconds to the first step", min(speeds[1:]),
                "≤ 5", seconds=speeds),
            row("the same, resident memory in GB", min(memory[1:]), "≤ 1.2")]


def make_images(root, count, side=32, listed=10):
    """A made-up data set, straight into the arrays that a folder of images would become. listed:
    how many (empty) train files the folder holds, all of which a start looks at, but does not read.
    """
    import readers
    rng = np.random.default_rng(0)
    for split, files in (("train", listed), ("test", min(listed, 10_000))):
        for number in range(files):
            path = root / split / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    key = readers.fingerprint(readers.folder_listing(root))
    images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    labels = np.arange(count) % 10
    arrays = dict(train_images=images, train_labels=labels, test_images=images[:10_000],
                  test_labels=labels[:10_000])
    facts = dict(version=readers.CACHE_VERSION, classes=list("0123456789"), mean=[0.5] * 3,
                 std=[0.3] * 3, key=readers.key_of(arrays))
    (root / ".arrays").mkdir()
    readers.kept(root / ".arrays" / f"{side}-resize-{key}", arrays, facts)


def bench_validation(folder, results):
    """evaluate() on 10 000 images against the forward passes alone."""
    splits = data.load("folder", folder, image_size=32)
    test = data.Batches(splits.test, splits.mean, splits.std, 500, device())
    model = network(LARGE).eval()
    x = torch.randn(500, 3, 32, 32).to(device(), memory_format=torch.channels_last)

    @torch.no_grad()
    def forward():
        for _ in range(len(test) // 500):
            with common.autocast(device(), precision()):
                model(x)

    ours, bare = best_in_turn(lambda: timed(lambda: common.evaluate(model, test, precision())),
                              lambda: timed(forward))
    return [row(f"validation of {len(test)} images / the bare forward pass ({LARGE})", bare / ours,
                "≤ 1.1", seconds=1 / ours)]


def bench_precision(folder, results, seeds=20):
    """Accuracy of bf16 − float32 on digits, paired by seed, with its 95 % interval."""
    differences = []
    for seed in range(seeds):
        found = []
        for name in ("bf16", "fp32"):
            words = ["--precision", name, "--seed", seed, "--run", f"{name}-s{seed}", "--resume",
                     "--results-dir", results / "precision"]
            with contextlib.redirect_stdout(io.StringIO()):
                found.append(train_student.main([str(w) for w in words])["test_accuracy"])
        differences.append(100 * (found[0] - found[1]))
    mean, low, high = compare.interval(differences)
    return [row(f"accuracy, bf16 − float32, digits, {seeds} seeds: far end of the 95 % interval, "
                "points", max(abs(low), abs(high)), "≤ 1", mean=mean, low=low, high=high)]


def bench_parts(folder, results):
    """What each part gains, by itself."""
    from torchvision import datasets, transforms

    plain, last, low, theirs = best_in_turn(
        lambda: bare_step(LARGE, layout=torch.contiguous_format, kind="fp32"),
        lambda: bare_step(LARGE, kind="fp32"), lambda: bare_step(LARGE),
        lambda: bare_step(LARGE, pools=plain_pools))
    images = datasets.ImageFolder(folder / "train", transforms.Compose(
        [transforms.RandomCrop(32, 4, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
         transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]))
    splits = data.load("folder", folder, image_size=32, val_fraction=0)

    def passes(batches):
        count, started = 0, time.perf_counter()
        for x, *_ in batches:
            count += len(x)
        sync()
        return count / (time.perf_counter() - started)

    ours = data.Batches(splits.train, splits.mean, splits.std, 128, device(), "flip-crop")
    batches, loader, two = best_in_turn(
        lambda: passes(ours.epoch(1)),
        *(lambda n=n: passes(torch.utils.data.DataLoader(images, 128, shuffle=True, num_workers=n))
          for n in (0, 2)))
    model = network(LARGE)
    average = common.make_average(model)

    def one_by_one():
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.mul_(0.99).add_(p, alpha=0.01)

    fused, loop = best_in_turn(lambda: timed(lambda: common.ema_update_(average, model, 0.99), 1),
                               lambda: timed(one_by_one, 1))
    looped, step = best_in_turn(lambda: bare_step(SMALL, fused=False), lambda: bare_step(SMALL))
    return [row("bare step, channels last / plain layout, both float32", last / plain, None),
            row(f"bare step, average pools with our gradient / PyTorch's ({LARGE})", low / theirs,
                None),
            row(f"bare step, AdamW fused / not ({SMALL})", step / looped, None),
            row(f"bare step, {precision()} / float32, both channels last", low / last, None),
            row("batches alone, one gather / DataLoader with transforms, best of 0 and 2 workers",
                batches / max(loader, two), None, ours=batches, workers_0=loader, workers_2=two),
            row("EMA update, one foreach call / tensor by tensor", fused / loop, None)]


def bench_compile(folder, results):
    """--compile against without: the students in the real script, from the second epoch on, and a
    teacher in the bare step."""
    rows = []
    for recipe in (LARGE, SMALL):
        plain, compiled = best_in_turn(*(
            lambda r=recipe, flag=flag: script(train_student, r, folder, results, flag, "--run",
                                               flag[2:], epochs=2)["images_per_second"]
            for flag in ("--no-compile", "--compile")))
        rows.append(row(f"student of {recipe}, --compile / without", compiled / plain, None,
                        plain=plain, compiled=compiled))
    plain, compiled = best_in_turn(*(
        lambda compiled=compiled: bare_step(SMALL, compiled=compiled, role="teacher")
        for compiled in (False, True)))
    return [*rows, row(f"bare step of {SMALL}'s teacher, compiled / not", compiled / plain, None,
                       plain=plain, compiled=compiled)]


def bench_processes(folder, results):
    """Two processes with one thread each against one process with one thread; on two GPUs, where
    there are two."""
    env, speeds = dict(os.environ, OMP_NUM_THREADS="1"), {}
    place = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    for _ in range(3):
        for count in (1, 2):
            run = f"p{count}"
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node", str(count), "--", str(ROOT / "train_student.py"),
                     "--recipe", LARGE, "--dataset", "folder", "--data-dir", str(folder),
                     "--epochs", "2", "--results-dir", str(results), "--overwrite", "--run", run,
                     "--device", place]
            subprocess.run(words, env=env, cwd=ROOT, check=True, capture_output=True)
            final = json.loads((results / LARGE / run / "final.json").read_text())
            speeds[count] = max(speeds.get(count, 0), final["images_per_second"])
    return [row(f"two processes / one, a thread each ({LARGE}'s student, {place})",
                speeds[2] / speeds[1], None, one=speeds[1], two=speeds[2])]


def bench_scale(folder, results):
    """Seconds of an epoch and memory for 10, 100, 1000 thousand made-up images, for one, two, four
    times the width; each in a process of its own."""
    grid = [(10, 1), (100, 1), (1000, 1), (10, 2), (10, 4)]
    found, code = {}, (
        "import sys, json, time, resource, torch, numpy as np\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\n"
        "import bench\n"
        "print(json.dumps(bench.one_epoch(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))\n")
    for thousands, width in grid:
        made = results / f"scale-{thousands}"
        if not made.exists():
            make_images(made, 1000 * thousands)
        done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(made), str(width),
                               str(200)], text=True, capture_output=True, check=True)
        found[thousands, width] = json.loads(done.stdout.splitlines()[-1])
        if thousands > 100:
            shutil.rmtree(made)
    return scale_rows(found, grid)


def scale_rows(found, grid):
    """The rows of {(thousands, width): figures}, with the slopes; and their plot."""
    rows, slopes = [], []
    for (thousands, width), figures in found.items():
        rows.append(row(f"{thousands} thousand images, width {width}: seconds an epoch",
                        figures["seconds_an_epoch"], None, **figures))
        rows.append(row(f"{thousands} thousand images, width {width}: peak memory in GB",
                        figures["peak_gb"], None))
    for title, over, axis in (("images", grid[:3], 0), ("width", [grid[0], *grid[3:]], 1)):
        x = np.log([pair[axis] for pair in over])
        y = np.log([found[pair]["seconds_an_epoch"] for pair in over])
        slopes.append(float(np.polyfit(x, y, 1)[0]))
        rows.append(row(f"seconds an epoch grow with the {title} to the power of", slopes[-1],
                        None))
    draw_scale(found, grid, slopes, OUT.with_name("bench-scale.png"))
    return rows


def draw_scale(found, grid, slopes, path):
    """Seconds of an epoch and peak memory over the number of images and over the width."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, slope, over, place, title in (
            (panels[0], slopes[0], grid[:3], 0, "thousand images, width 1"),
            (panels[1], slopes[1], [grid[0], *grid[3:]], 1, "width, 10 thousand images")):
        x = [pair[place] for pair in over]
        seconds = f"seconds an epoch, to the power of {slope:.2f}"
        for key, label, style in (("seconds_an_epoch", seconds, "o-"),
                                  ("peak_gb", "peak memory, GB", "s--")):
            axes.loglog(x, [found[pair][key] for pair in over], style, label=label,
                        color="#0072B2" if style == "o-" else "#D55E00")
        axes.set(xlabel=title, ylabel="seconds, GB", ylim=(0.5, 1000))
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.grid(color="#E4E4E4")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def bench_memory(folder, results):
    """A data set of 4 GB, mapped, under `ulimit -d` of 2 GB, against the same held in memory."""
    made = results / "large"
    if not made.exists():
        make_images(made, 1_400_000)
    code = ("import sys, json\n"
            "sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\n"
            "import bench\n"
            "print(json.dumps(bench.one_epoch(sys.argv[2], 1, 300, sys.argv[3] == 'held')))\n")
    speeds = {"held": 0.0, "mapped": 0.0}
    for _ in range(3):
        for kind, limit in (("held", ""), ("mapped", "ulimit -d 2000000; ")):
            words = [sys.executable, "-c", code, str(ROOT), str(made), kind]
            done = subprocess.run(["bash", "-c", limit + 'exec "$@"', "-", *words], text=True,
                                  capture_output=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            seconds = json.loads(done.stdout.splitlines()[-1])["seconds_an_image"]
            speeds[kind] = max(speeds[kind], 1 / seconds)
    shutil.rmtree(made)
    return [row("4 GB of images mapped, under a limit of 2 GB / held in memory, images per second",
                speeds["mapped"] / speeds["held"], None, **speeds)]


def one_epoch(folder, width, most_steps, held=False):
    """Time the first steps of an epoch of SMALL's student, its channels times `width`."""
    started = time.perf_counter()
    spec = models.ARCHITECTURES["cifar10-he-max-student"]
    models.ARCHITECTURES["wide"] = dict(spec, channels=tuple(width * c for c in spec["channels"]))
    splits = data.load("folder", folder, image_size=32)
    train = splits.train._replace(images=np.array(splits.train.images)) if held else splits.train
    batches = data.Batches(train, splits.mean, splits.std, 128, device(), "flip-crop")
    model = models.build("wide", 10, (3, 32, 32)).to(device(), memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    epoch = batches.epoch(1)
    first = next(epoch)
    ready = time.perf_counter()
    for steps, batch in enumerate(epoch, 1):
        with common.autocast(device(), precision()):
            loss = F.cross_entropy(model(batch.x).float(), batch.y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if steps == min(most_steps, batches.steps() - 1):
            break
    sync()
    seconds = (time.perf_counter() - ready) / (steps * len(first.y))
    return dict(seconds_an_image=seconds, seconds_an_epoch=seconds * len(batches),
                start_seconds=ready - started,
                peak_gb=peak_resident() / 1e9)


BENCHES = dict(student=bench_student, kd=bench_kd, ema=bench_ema, start=bench_start,
               validation=bench_validation, compile=bench_compile,
               parts=bench_parts, processes=bench_processes, scale=bench_scale,
               memory=bench_memory, precision=bench_precision)


def subset(source, target):
    """Link PER_CLASS train images of each class, and all test images, into a folder."""
    for split, most in (("train", PER_CLASS), ("test", 10**9)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:most]:
                os.symlink(path.resolve(), target / split / folder.name / path.name)
    return target


def main(argv=None):
    global OUT      # where the plot goes, too
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data" / "cifar10")
    parser.add_argument("--only", default=",".join(BENCHES),
                        help="parts, separated by commas (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="a JSON file, added to (%(default)s)")
    args = parser.parse_args(argv)
    OUT = args.out
    unknown = sorted(set(args.only.split(",")) - set(BENCHES))
    if unknown:
        fail(f"--only {unknown[0]!r}: choose from {', '.join(BENCHES)}")
    if not (args.data_dir / "train").is_dir():
        fail(f"{args.data_dir}/train/<class>/* is not there; give --data-dir, CIFAR-10 as class "
             "folders")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    table, wrong = json.loads(OUT.read_text()) if OUT.exists() else {}, {}
    with tempfile.TemporaryDirectory() as place:
        folder = subset(args.data_dir, Path(place) / "images")
        for name in args.only.split(","):
            started = time.perf_counter()
            ROUNDS.clear()
            try:
                rows = BENCHES[name](folder, Path(place) / "results")
            except (Exception, SystemExit) as error:      # the other parts are worth having
                traceback.print_exc()
                wrong[name] = error
                continue
            machine = dict(device=processor(torch.device(kind)), threads=torch.get_num_threads(),
                           precision=precision(), torch=torch.__version__,
                           commit=runs.short(runs.commit()),
                           date=datetime.date.today().isoformat())
            made = dict(rows=rows, rounds=ROUNDS[:], seconds=time.perf_counter() - started,
                        machine=machine)
            table.setdefault(kind, {})[name] = made
            for line in rows:
                print(f"{line['ratio']:8.3f}  {line['goal'] or '':7}  {line['title']}", flush=True)
            OUT.parent.mkdir(parents=True, exist_ok=True)
            write_whole(OUT, (json.dumps(table, indent=1) + "\n").encode())
    if wrong:
        fail(f"not measured: {', '.join(wrong)}; {next(iter(wrong.values()))!r}", code=1)
    return table


if __name__ == "__main__":
    main()
