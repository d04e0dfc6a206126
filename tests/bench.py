"""How fast the scripts are, as ratios to what surrounds them: `make bench`.

    python tests/bench.py --data-dir data/cifar10                all parts; writes bench.json
    python tests/bench.py --data-dir data/cifar10 --only ema start --out /tmp/bench.json

Needs CIFAR-10 as class folders. A ratio is of two speeds, taken in turn three times, the
best of each. Yardsticks are written out here: the loop as tutorials write it, and the bare
step, which has its batch in place and does nothing but learn from it.
"""
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import models  # noqa: E402
import report  # noqa: E402
import train_student  # noqa: E402
import train_teacher  # noqa: E402
from recipes import Parser, fail, path, read_json, settings, write_whole  # noqa: E402

OUT = ROOT / "results" / "published" / "bench.json"
PER_CLASS = 500         # train images of a class: an epoch of seconds
LARGE, SMALL = "cifar10-xavier-avg", "cifar10-he-max"
VIEWS, EPOCHS = 4, 15   # of the whole kd
IMAGES, WIDTHS = (10, 100, 1000), (1, 2, 4)         # thousands; times the channels
DEVICE = common.pick_device("auto")
PRECISION = common.pick_precision("auto", DEVICE)
HALF = transforms.Normalize((0.5,) * 3, (0.5,) * 3)


def best(rounds, *measures):
    """Call functions that return a speed in turn, three times, and note all speeds in rounds;
    return the best of each."""
    speeds = [[measure() for measure in measures] for _ in range(3)]
    rounds.append(speeds)
    return np.max(speeds, 0).tolist()


def sync():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(function, least=3.0):
    """Return calls per second of a function, over so many seconds, after two to warm up."""
    function()
    function()
    sync()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        function()
        calls += 1
        if calls % 10 == 0:
            sync()
    sync()
    return calls / (time.perf_counter() - started)


def network(recipe, role="student", layout=torch.channels_last):
    flags = settings(recipe, role)
    torch.manual_seed(0)
    model = models.build(flags["arch"], 10, (3, 32, 32), flags["init"], flags["pool"])
    return model.to(DEVICE, memory_format=layout)


def script(module, recipe, folder, results, *flags, epochs=3):
    """Return the final dict of a run of the real script, silently."""
    words = ["--recipe", recipe, "--dataset", "folder", "--data-dir", folder,
             "--epochs", epochs, "--results-dir", results, "--overwrite", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        return module.main(list(map(str, words)))


def student_speed(*arguments, **options):
    torch._dynamo.reset()       # it stops compiling a function that was compiled too often
    return script(train_student, *arguments, **options)["images_per_second"]


def in_process(function, *arguments, before=""):
    """Return what a function of this file returns, in a process of its own. before: shell."""
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import bench\n"
            f"print(json.dumps(bench.{function}(*sys.argv[2:])))")
    words = ["bash", "-c", before + 'exec "$@"', "-", sys.executable, "-c", code,
             Path(__file__).parent, *arguments]
    done = subprocess.run(list(map(str, words)), text=True, capture_output=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ---- yardsticks ---------------------------------------------------------------------

def report_loop(folder, recipe, workers, teacher=None, seconds=12.0):
    """Return images per second of the loop as the five reports write it."""
    images = datasets.ImageFolder(folder / "train",
                                  transforms.Compose([transforms.ToTensor(), HALF]))
    loader = DataLoader(images, 64, shuffle=True, num_workers=workers, drop_last=True)
    model = network(recipe, layout=torch.contiguous_format).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    seen, started = 0, None
    for x, y in loader:
        if started is None:         # the first batch waits for the workers to start
            started = time.perf_counter()
            continue
        x, y = x.to(DEVICE), y.to(DEVICE)
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if teacher is not None:
            with torch.no_grad():
                target = F.softmax(teacher(x) / 4, 1)
            soft = F.kl_div(F.log_softmax(logits / 4, 1), target, reduction="batchmean")
            loss = 0.9 * 16 * soft + 0.1 * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seen += len(x)
        if time.perf_counter() - started > seconds:
            break
    return seen / (time.perf_counter() - started)


def best_workers(folder):
    """Return with how many DataLoader workers the report loop is faster, 0 or 2."""
    without = report_loop(folder, LARGE, 0, seconds=6)
    two = report_loop(folder, LARGE, 2, seconds=6)
    return 2 if two > without else 0


def learn(model, optimizer, x, y, precision=PRECISION):
    with common.autocast(DEVICE, precision):
        loss = F.cross_entropy(model(x).float(), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def bare_step(recipe, role="student", precision=PRECISION, layout=torch.channels_last,
              fused=True, compiled=False):
    """Return images per second of learning from one batch of 128 that is in place."""
    model = network(recipe, role, layout).train()
    if compiled:
        torch._dynamo.reset()
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    x = torch.randn(128, 3, 32, 32, device=DEVICE)
    x = x.to(memory_format=layout)
    y = torch.randint(10, (128,), device=DEVICE)
    return 128 * timed(lambda: learn(model, optimizer, x, y, precision))


# ---- parts: each yields (what, ratio, goal) -----------------------------------------

def bench_student(folder, results, rounds):
    """The student's loop against the report loop and the bare step."""
    workers = best_workers(folder)
    limits = {LARGE: "≥ 0.95", SMALL: "≥ 0.8"}
    if DEVICE.type == "cuda":
        limits = dict.fromkeys(limits, "≥ 0.9")
    for recipe, limit in limits.items():
        ours, theirs, bare = best(
            rounds,
            lambda r=recipe: student_speed(r, folder, results),
            lambda r=recipe: report_loop(folder, r, workers),
            lambda r=recipe: bare_step(r))
        if recipe == LARGE:
            yield (f"student of {recipe}, augmented / report loop, not augmented",
                   ours / theirs, "≥ 2.5")
        yield f"student of {recipe} / bare step, batch 128", ours / bare, limit


def bench_kd(folder, results, rounds):
    """kd from the cache against the student alone, and the report loop's live teacher."""
    # What it has learned does not matter to a speed.
    script(train_teacher, LARGE, folder, results, "--labels", 100, epochs=1)
    teacher = network(LARGE, "teacher", torch.contiguous_format).eval()
    workers, views, finals = best_workers(folder), ("--views", VIEWS), []

    def kd():
        final = script(distill, LARGE, folder, results, *views, epochs=VIEWS + 1)
        finals.append(final)
        return final["images_per_second"]

    kd()        # fills the cache
    ours, alone, theirs = best(
        rounds,
        kd,
        lambda: student_speed(LARGE, folder, results, *views),
        lambda: report_loop(folder, LARGE, workers, teacher))
    title = f"epoch of kd, cached / of the student alone ({LARGE})"
    yield title, alone / ours, "≤ 1.10"
    yield "kd, cached / report loop with its live teacher", ours / theirs, "≥ 12"
    # The whole: filling, then epochs. With fresh views as many are filled as there are epochs.
    first, *others = report.each(finals, "teacher_seconds")
    a_view = (first - min(others)) / VIEWS
    images = EPOCHS * PER_CLASS * 10 * 0.9
    seconds = VIEWS * a_view + images / ours
    yield (f"the same over {EPOCHS} epochs, filling {VIEWS} views included",
           images / theirs / seconds, "≥ 4")
    seconds = EPOCHS * a_view + images / ours
    yield (f"kd over {EPOCHS} epochs, filling {EPOCHS} views (fresh ones) / report loop",
           images / theirs / seconds, "≥ 4")


def bench_ema(folder, results, rounds):
    """The EMA update against a training step, and against torch's and timm's."""
    from timm.utils import ModelEmaV3
    average_of = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    for recipe in (LARGE, SMALL):
        model = network(recipe)
        average = common.make_average(model)
        timm = ModelEmaV3(model, decay=0.99)
        swa = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average_of,
                                                  use_buffers=True)
        swa.update_parameters(model)
        update, torchs, timms, step = best(
            rounds,
            lambda a=average, m=model: timed(lambda: common.ema_update_(a, m, 0.99), 1),
            lambda a=swa, m=model: timed(lambda: a.update_parameters(m), 1),
            lambda a=timm, m=model: timed(lambda: a.update(m), 1),
            lambda r=recipe: bare_step(r) / 128)
        title = f"EMA update / {{}} ({recipe})"
        yield title.format("training step"), step / update, "≤ 0.03"
        yield title.format("torch's"), torchs / update, "≤ 1"
        yield title.format("timm's"), timms / update, "≤ 1"


def bench_start(folder, results, rounds):
    """From the command to the first step on 50 000 images, arrays kept; and memory."""
    made = make_images(results / "made", 50_000, listed=50_000)
    for _ in range(4):
        started = time.perf_counter()
        memory = in_process("until_first_step", made, results / "start") / 1e9
        rounds.append((time.perf_counter() - started, memory))
    seconds, memory = np.min(rounds[1:], 0).tolist()        # the first start is slower
    yield "second start on 50 000 images, seconds to the first step", seconds, "≤ 5"
    yield "the same, resident memory in GB", memory, "≤ 1.2"


def until_first_step(made, results):
    """Start the student's script; at its first step print the peak memory and end."""
    def stop(*_):
        os.write(1, f"{common.peak_memory()}\n".encode())
        os._exit(0)
    torch.optim.AdamW.step = stop
    script(train_student, SMALL, made, results)


def bench_validation(folder, results, rounds):
    """evaluate() against the forward passes alone."""
    splits = data.load("folder", folder, image_size=32)
    test = data.Batches(splits.test, splits.mean, splits.std, 500, DEVICE)
    model = network(LARGE).eval()
    x = torch.randn(500, 3, 32, 32, device=DEVICE)
    x = x.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward():
        for _ in range(len(test) // 500):
            with common.autocast(DEVICE, PRECISION):
                model(x)

    def evaluate():
        common.evaluate(model, test, PRECISION)

    ours, bare = best(rounds, lambda: timed(evaluate), lambda: timed(forward))
    title = f"validation of {len(test)} images / the bare forward pass ({LARGE})"
    yield title, bare / ours, "≤ 1.1"


def bench_parts(folder, results, rounds):
    """What each part gains, by itself."""
    plain, last, low = best(
        rounds,
        lambda: bare_step(LARGE, precision="fp32", layout=torch.contiguous_format),
        lambda: bare_step(LARGE, precision="fp32"),
        lambda: bare_step(LARGE))
    yield "bare step, channels last / plain layout, both float32", last / plain, None
    yield f"bare step, {PRECISION} / float32, both channels last", low / last, None
    looped, fused = best(rounds, lambda: bare_step(SMALL, fused=False),
                         lambda: bare_step(SMALL))
    yield f"bare step, AdamW fused / not ({SMALL})", fused / looped, None

    augment = transforms.Compose([
        transforms.RandomCrop(32, 4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), HALF])
    images = datasets.ImageFolder(folder / "train", augment)
    splits = data.load("folder", folder, image_size=32, val_fraction=0)
    gather = data.Batches(splits.train, splits.mean, splits.std, 128, DEVICE, "flip-crop")
    ours, none, two = best(
        rounds,
        lambda: images_per_second(gather.epoch(1)),
        lambda: images_per_second(DataLoader(images, 128, shuffle=True)),
        lambda: images_per_second(DataLoader(images, 128, shuffle=True, num_workers=2)))
    yield ("batches alone, one gather / DataLoader with transforms, best of 0 and 2 workers",
           ours / max(none, two), None)

    model = network(LARGE)
    average = common.make_average(model)

    @torch.no_grad()
    def one_by_one():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.mul_(0.99).add_(p, alpha=0.01)

    foreach, single = best(
        rounds,
        lambda: timed(lambda: common.ema_update_(average, model, 0.99), 1),
        lambda: timed(one_by_one, 1))
    yield "EMA update, one foreach call / tensor by tensor", foreach / single, None


def images_per_second(batches):
    count, started = 0, time.perf_counter()
    for x, *_ in batches:
        count += len(x)
    sync()
    return count / (time.perf_counter() - started)


def bench_compile(folder, results, rounds):
    """--compile against without: the students in the script, a teacher in the bare step."""
    for recipe in (LARGE, SMALL):
        plain, compiled = best(
            rounds,
            lambda r=recipe: student_speed(r, folder, results, epochs=2),
            lambda r=recipe: student_speed(r, folder, results, "--compile", epochs=2))
        yield f"student of {recipe}, --compile / without", compiled / plain, None
    plain, compiled = best(rounds, lambda: bare_step(SMALL, "teacher"),
                           lambda: bare_step(SMALL, "teacher", compiled=True))
    yield f"bare step of {SMALL}'s teacher, compiled / not", compiled / plain, None


def bench_processes(folder, results, rounds):
    """Two processes of one thread each against one; on two GPUs, where there are two."""
    place = "cuda" if torch.cuda.device_count() > 1 else "cpu"

    def speed(count):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
                 "--", ROOT / "train_student.py", "--recipe", LARGE, "--dataset", "folder",
                 "--data-dir", folder, "--epochs", 2, "--results-dir", results, "--overwrite",
                 "--run", "processes", "--device", place]
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        return read_json(results / LARGE / "processes" / "final.json")["images_per_second"]

    one, two = best(rounds, lambda: speed(1), lambda: speed(2))
    title = f"two processes / one, a thread each ({LARGE}'s student, {place})"
    yield title, two / one, None


def bench_precision(folder, results, rounds, seeds=20):
    """Accuracy of bf16 − float32 on digits, paired by seed, with its 95 % interval."""
    for seed in range(seeds):
        accuracies = []
        for name in ("bf16", "fp32"):
            words = ["--precision", name, "--seed", str(seed), "--overwrite", "--results-dir",
                     str(results / "precision")]
            with contextlib.redirect_stdout(io.StringIO()):
                accuracies.append(train_student.main(words)["test_accuracy"])
        rounds.append(100 * (accuracies[0] - accuracies[1]))
    _, low, high = report.interval(rounds)
    yield (f"accuracy, bf16 − float32, digits, {seeds} seeds: far end of the 95 % interval, "
           "points", max(abs(low), abs(high)), "≤ 1")


# ---- growth -------------------------------------------------------------------------

def make_images(root, count, listed=10):
    """Make up a data set, as the arrays that a folder of images becomes; return its folder.

    listed: how many (empty) train files it holds, at all of which a start looks.
    """
    for split, files in (("train", listed), ("test", min(listed, 10_000))):
        folders = [root / split / str(label) for label in range(10)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(files):
            file = folders[number % 10] / f"{number}.png"
            file.touch()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = np.arange(count) % 10
    test = images[:10_000], labels[:10_000]
    arrays, meta = data.make_arrays({"train": (images, labels), "test": test}, range(10))
    key = data.fingerprint(data.folder_files(root))
    folder = root / ".arrays" / f"folder-32-resize-{key}"
    folder.parent.mkdir()
    data.write_arrays(folder, arrays, meta)
    return root


def one_epoch(folder, width, most_steps, held=""):
    """Time the first steps of an epoch of SMALL's student, its channels times `width`."""
    spec = models.ARCHITECTURES[f"{SMALL}-student"]
    channels = [int(width) * count for count in spec["channels"]]
    models.ARCHITECTURES["wide"] = dict(spec, channels=channels)
    splits = data.load("folder", folder, image_size=32)
    train = splits.train
    if held:
        train = train._replace(images=np.array(train.images))
    batches = data.Batches(train, splits.mean, splits.std, 128, DEVICE, "flip-crop")
    model = models.build("wide", 10, (3, 32, 32))
    model.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    epoch = batches.epoch(1)
    next(epoch)
    started = time.perf_counter()
    for steps, batch in enumerate(epoch, 1):
        learn(model, optimizer, batch.x, batch.y)
        if steps == int(most_steps):
            break
    sync()
    speed = steps * 128 / (time.perf_counter() - started)
    return speed, len(batches) / speed, common.peak_memory() / 1e9


def bench_scale(folder, results, rounds):
    """Seconds of an epoch and memory over images and width; each in its own process."""
    growth = {"images": [], "width": []}
    for thousands in IMAGES:
        made = make_images(results / f"scale-{thousands}", 1000 * thousands)
        for width in WIDTHS if thousands == IMAGES[0] else (1,):
            _, seconds, memory = in_process("one_epoch", made, width, 200)
            if width == 1:
                growth["images"].append((thousands, seconds))
            if thousands == IMAGES[0]:
                growth["width"].append((width, seconds))
            title = f"{thousands} thousand images, width {width}"
            yield f"{title}: seconds an epoch", seconds, None
            yield f"{title}: peak memory in GB", memory, None
    for title, measured in growth.items():
        x, y = np.log(measured).T
        slope, _ = np.polyfit(x, y, 1)
        yield f"seconds an epoch grow with the {title} to the power of", float(slope), None


def bench_memory(folder, results, rounds):
    """A data set of 4 GB, mapped, under a limit of 2 GB, against the same held in memory."""
    made = make_images(results / "large", 1_400_000)
    held, mapped = best(
        rounds,
        lambda: in_process("one_epoch", made, 1, 300, "held")[0],
        lambda: in_process("one_epoch", made, 1, 300, before="ulimit -d 2000000; ")[0])
    yield ("4 GB of images mapped, under a limit of 2 GB / held in memory, images per second",
           mapped / held, None)


# ---- the script ---------------------------------------------------------------------

BENCHES = dict(
    student=bench_student, kd=bench_kd, ema=bench_ema, start=bench_start,
    validation=bench_validation, compile=bench_compile, parts=bench_parts,
    processes=bench_processes, scale=bench_scale, memory=bench_memory,
    precision=bench_precision)


def subset(source, target):
    """Link PER_CLASS train images of each class, and all test images, into a folder."""
    for split, most in (("train", PER_CLASS), ("test", 10**9)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:most]:
                link = target / split / folder.name / file.name
                link.symlink_to(file.resolve())
    return target


def measure(name, folder, results):
    """Return the entry of a part for bench.json, and print its rows."""
    started, rounds, rows = time.perf_counter(), [], []
    for title, ratio, goal in BENCHES[name](folder, results, rounds):
        met = True
        if goal:
            kind, limit = goal.split()
            met = ratio >= float(limit)
            if kind == "≤":
                met = ratio <= float(limit)
        rows.append({"title": title, "ratio": ratio, "goal": goal, "met": met})
        print(f"{ratio:8.3f}  {goal or '':7}  {title}", flush=True)
    return {
        "rows": rows,
        "rounds": rounds,
        "seconds": time.perf_counter() - started,
        "machine": {
            "device": common.processor(DEVICE),
            "threads": torch.get_num_threads(),
            "precision": PRECISION,
            "torch": torch.__version__,
            "commit": common.git_commit() or "unknown",
            "date": date.today().isoformat(),
        },
    }


def main(argv=None):
    """Measure the parts, one after the other; each is written when it is done."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data-dir", type=path, default="data/cifar10", metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES),
                        metavar="PART", help=f"parts, of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--out", type=path, default=OUT, metavar="FILE", help="JSON, added to")
    args = parser.parse_args(argv)
    source, out = Path(args.data_dir), Path(args.out)
    table = {}
    if not (source / "train").is_dir():
        fail(f"--data-dir {source}: no folder train; give CIFAR-10 as class folders")
    if out.exists():
        table = read_json(out)
    with tempfile.TemporaryDirectory() as place:
        folder = subset(source, Path(place) / "images")
        for name in args.only:
            found = measure(name, folder, Path(place) / "results")
            table.setdefault(DEVICE.type, {})[name] = found
            write_whole(out, (json.dumps(table, indent=1) + "\n").encode())
    return table


if __name__ == "__main__":
    main()
