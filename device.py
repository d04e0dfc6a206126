"""Where a run computes: device, precision, deterministic kernels, memory. No command of its own."""
import copy
import os
import resource
import sys

import torch

from flags import fail


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


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_up(args):
    """Resolve --device and --precision in a copy of the flags; return it and the torch.device."""
    device = pick_device(args.device)
    args = copy.copy(args)
    args.device, args.precision = device.type, pick_precision(args.precision, device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when CUDA starts
    if args.deterministic != torch.are_deterministic_algorithms_enabled():   # imports a second long
        torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    return args, device


def peak_memory():
    """Return the most bytes held so far: a GPU's memory if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
