"""Where a run computes: device, precision, processes, memory; a kernel faster than PyTorch's. No
command of its own.
"""
import contextlib
import copy
import ctypes
import datetime
import errno
import functools
import math
import mmap
import os
import platform
import re
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from flags import BEGUN, ENDINGS, PARENT, again, fail, say


def pick_device(name="auto"):
    """Return the torch.device of a name: auto is CUDA, else Apple's MPS, else the CPU."""
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available,
             "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind in there if there[kind]())
    elif not there.get(name.split(":")[0], lambda: False)():
        has = ", ".join(kind for kind in there if there[kind]())
        fail(f"--device {name}: not on this machine, which has: {has}; or leave it out")
    return torch.device(name)


def pick_precision(name, device):
    """Return fp32 or bf16; auto is bf16 where it is native, as emulation is slower than fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and native() else "fp32"


def around(groups, own, controller=""):
    """Return the folders of this process's cgroup and of those that it lies in: a limit of any of
    them holds. controller: of version 1; none for version 2."""
    there = os.listdir(groups) if os.path.isdir(groups) else ()
    # The folder is "cpu,cpuacct" where no link is called cpu.
    place = min((name for name in there if controller in name.split(",")), default=controller)
    line = rf"^\d+:(?:\S*,)?{controller}(?:,\S*)?:/(.*)$" if controller else "^0::/(.*)$"
    with contextlib.suppress(OSError, TypeError):       # no such file, or no such line
        path = Path(re.search(line, Path(own).read_text(), re.MULTILINE)[1])
        return [Path(groups, place, group) for group in (path, *path.parents)]
    return [Path(groups, place)] if controller else []


def cpus(groups="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Return how many CPUs this process may keep busy: those it may run on, or fewer where the
    quota of its cgroup (a container's, a cluster job's) is less. Files as Linux has them."""
    there = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    for group in around(groups, own, "cpu"):            # version 1
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text())
                             for name in ("quota", "period"))
            there = min(there, math.ceil(quota / period)) if quota > 0 else there
    for group in around(groups, own):                   # version 2
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            there = min(there, math.ceil(quota / period))
    return there


def threads():
    """Return how many threads to use beside torch's own: OMP_NUM_THREADS is in its count."""
    return min(cpus(), torch.get_num_threads())


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_up(args):
    """Resolve --device and --precision in a copy of the flags, join the processes of torchrun if
    one started us; return the copy and the torch.device."""
    device = pick_device(args.device)
    join(device)
    args = copy.copy(args)
    args.device, args.precision = device.type, pick_precision(args.precision, device)
    if "OMP_NUM_THREADS" not in os.environ and cpus() < torch.get_num_threads():
        torch.set_num_threads(cpus())       # more would only wait for each other
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when CUDA starts
    if args.deterministic != torch.are_deterministic_algorithms_enabled():   # imports a second long
        torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    return args, device


def near(tensor, device):
    """Return a tensor on the device where it fits in half of what is free of a GPU, so that no step
    waits for a copy; else where it is."""
    if device.type == "cuda" and tensor.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        return tensor.to(device)
    return tensor


def processor(device):
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError):      # Linux
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0].strip()
    return platform.processor() or platform.machine()


def tell_time(batches, total):
    """Pass batches through; after 25 say how long `total` will take, from the last 20."""
    for i, batch in enumerate(batches):
        if i in (5, 25) and batch.x.is_cuda:        # else the clock sees only the work queued
            torch.cuda.synchronize()
        if i == 5:
            started = time.perf_counter()
        if i == 25:
            seconds = (time.perf_counter() - started) / 20 * total
            say(f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s")
        yield batch


# ---- a kernel ---------------------------------------------------------------------------------

class Averages(torch.autograd.Function):
    """2×2 averages with stride 2. Each one's gradient goes to its four pixels in one copy; PyTorch
    itself adds it up pixel by pixel, which takes a seventh of a small network's step on a CPU."""

    @staticmethod
    def forward(ctx, x):
        ctx.odd = 0, x.shape[3] % 2, 0, x.shape[2] % 2      # a last odd row is in no average
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx, gradient):
        gradient = (gradient / 4).contiguous(memory_format=torch.channels_last)
        gradient = F.interpolate(gradient, scale_factor=2)
        return F.pad(gradient, ctx.odd) if any(ctx.odd) else gradient


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d(2), with a faster gradient."""

    def forward(self, x):
        ours = self.kernel_size == self.stride == 2 and x.ndim == 4 and x.device.type == "cpu"
        return Averages.apply(x) if ours else super().forward(x)


# ---- several processes ------------------------------------------------------------------------

PATIENCE = datetime.timedelta(minutes=5)    # to find the others; torchrun starts all at once
# Between two steps that all take: one may compute the teacher's outputs, or decode images.
HOURS = datetime.timedelta(hours=12)


def join(device):
    """Join the other processes, where torchrun started this one; each GPU serves one of them."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    # DistributedDataParallel's, whose new name for it is not known to earlier versions.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    with contextlib.suppress(OSError, AttributeError):      # Linux: end when torchrun is killed
        if "TORCHELASTIC_RUN_ID" in os.environ:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG
            if os.getppid() != PARENT:
                fail("torchrun has ended; start it again")
    ENDINGS.append(dist.destroy_process_group)
    found = []
    try:
        if device.type == "cuda":
            own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if own >= there:
                fail(f"--nproc-per-node: no GPU is left for process {own + 1} of this machine, "
                     f"which has {there}; start as many processes, or give --device cpu")
            torch.cuda.set_device(own)
        # C++ that waits for others keeps Python, in its main thread, from answering a signal.
        thread = threading.Thread(target=meet, daemon=True, args=(
            "nccl" if device.type == "cuda" else "gloo", found))
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise ValueError((str(found[0]) or type(found[0]).__name__).splitlines()[0])
        ENDINGS[:] = [functools.partial(leave, found[0])]
    except (KeyError, ValueError) as error:
        fail(f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment, but not all that torchrun "
             f"sets, or no other process ({error}); start with torchrun, or unset WORLD_SIZE")


def meet(backend, found):
    """Find the others at the place that the environment names, and form a group with them; found:
    a list that takes their store, or what went wrong."""
    try:
        own, count = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
        if own >= count:
            raise ValueError(f"RANK={own} is not below it")
        # Torchrun is the host itself, mostly, and was there before us: if not now, it has ended.
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if own or hosted:
            await_host(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"),
                       min(PATIENCE.total_seconds(), 10 if hosted else math.inf))
        store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
        if store.add("here", 1) == count:       # one that started may be stuck before it is here
            store.set("all here", "")
        store.wait(["all here"], PATIENCE)
        store.set_timeout(HOURS)
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=HOURS)
        found.append(store)
    except BaseException as error:
        found.append(error)


def leave(store):
    """Leave the others once all are through: gloo takes a connection that closes for an error, even
    of what has arrived; and where it is left to Python's end, its threads may abort."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    with contextlib.suppress(RuntimeError):     # the host of the store has left: all are through
        through = store.add("through", 1)
        while through < world() and time.monotonic() < deadline:
            time.sleep(0.02)
            through = store.add("through", 0)
    dist.destroy_process_group()


def await_host(address, port, seconds):
    """Go on when somebody answers at that place; PyTorch itself would fill the screen meanwhile."""
    deadline = time.monotonic() + seconds
    if port and not 0 < int(port) < 2 ** 16:
        raise ValueError(f"MASTER_PORT={port} is no port")
    while address and port:
        try:
            return socket.create_connection((address, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"{address}:{port}: {error.strerror or error}") from None
            time.sleep(0.2)


def rank():
    """Return this process's number; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count):
    """Return which of so many parts of one file this process writes. On several machines the first
    writes all: what lies side by side in a file may be lost on a file system that they share."""
    if os.environ.get("LOCAL_WORLD_SIZE", str(world())) != str(world()):
        return range(0 if rank() else count)
    return range(rank(), count, world())


def silent():
    """Whether to draw no progress bar: on no terminal, and by no process but the first."""
    return rank() > 0 or not sys.stderr.isatty()


def wait():
    """Go on when all processes are here."""
    if world() > 1:
        dist.barrier()


def summed(tensor):
    """Return the sum of a tensor over all processes."""
    if world() == 1:
        return tensor
    there = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(there)
    return there.to(tensor.device)


def share_buffers_(*modules):
    """Give every process the buffers of the first: BatchNorm's statistics are of its rows."""
    if world() > 1:
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


# ---- memory -----------------------------------------------------------------------------------

SPARE = 2**24       # bytes


@contextlib.contextmanager
def guard(args=SimpleNamespace()):      # noqa: B008
    """End with one line where memory or a disk gives out, or another process has ended."""
    BEGUN.clear()
    spare = None
    try:
        tqdm.get_lock()             # made when it is first asked for, which takes memory, too
        # For the line that says so: counted by a limit, and untouched, so that it fills nothing.
        spare = mmap.mmap(-1, SPARE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        yield
    except SystemExit:          # with a line of its own
        BEGUN.clear()
        raise
    except BrokenPipeError:     # who reads what is printed has gone; flags.launch ends it
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        del spare
        text = str(error)
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            where = error.filename or "standard output, or a file"
            gone = error.errno == errno.ENOENT and error.filename and not (
                Path(os.fsdecode(error.filename)).parent.exists())
            fail(f"{where}: {error.strerror or error}; " + (
                f"its folder is gone: put it back, or {again(args)} begins anew" if gone else
                f"all that was finished is kept: mend that, and {again(args)} goes on"))
        if world() > 1 and re.search("gloo|NCCL|[Cc]onnection", text):
            fail(f"another process ended; {again(args)} goes on after the "
                 f"last finished epoch ({text.splitlines()[0][:100]})", 1)
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            fail(f"--compile: PyTorch could not compile this network ({text.splitlines()[0]}); "
                 "leave --compile out, or mend that")
        if "have a deterministic implementation" in text:
            fail(f"--deterministic: {text.split()[0]} of PyTorch cannot, on this device; leave "
                 "--deterministic out, or give another --arch, --pool or --device")
        counted = re.search("integer out of range|32-bit ind", text)        # of a GPU's kernels
        lacking = ("not enough memory|allocate memory|bad_alloc|out of memory|start new thread|"
                   "could not create a primitive")      # oneDNN's word for it
        if not (counted or isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or re.search(lacking, text)):
            raise
        asked = re.search(r"allocate ([\d.]+ ?\w+)", text)
        lack = (f"out of memory: {asked[1] if asked else 'more'} asked for beside "
                f"{peak_memory() / 1e9:.2f} GB")
        if counted:
            lack = f"more numbers than a kernel of PyTorch can count ({text.splitlines()[0]})"
        if "batch_size" not in vars(args):
            fail(f"{lack}; end other programs, or give a smaller --image-size where there is one")
        fail(f"{lack}, with batches of {args.batch_size} images of "
             f"3×{args.image_size}×{args.image_size}; lower --batch-size"
             + " or --image-size" * (args.dataset == "folder") + ", or end other programs")


def memory(groups="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Return the bytes of memory that this process may fill: the machine's, or its group's."""
    limits = [*(group / "memory.limit_in_bytes" for group in around(groups, own, "memory")),
              *(group / "memory.max" for group in around(groups, own))]
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in limits:
        with contextlib.suppress(OSError, ValueError):      # no such limit, or none set
            most = min(most, int(limit.read_text()))
    return most


def refuse_beyond_memory(needed, what, way_out):
    """Leave with one line before something is made that cannot fit; the system would end this
    process without a word. needed: bytes."""
    if needed > memory():
        fail(f"{what} needs {needed / 1e9:.1f} GB of memory, this process may use "
             f"{memory() / 1e9:.1f} GB; {way_out}")


def peak_memory():
    """Return the most bytes held so far: a GPU's memory if there is one, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():     # 0: it lies idle
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def peak_resident():
    """Return the most bytes of the machine's memory that this process held so far."""
    with contextlib.suppress(OSError, IndexError):      # Linux, whose ru_maxrss a child inherits
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
