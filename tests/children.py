"""Scripts in processes of their own: to kill, to stop, or to train as two.

A fork server loads PyTorch once for all of them, which takes longer than their runs.
"""
import importlib
import multiprocessing
import os
import sys
import time

import torch

import plots

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "pytest", "torch", "torch._dynamo", "torch.distributed.launcher.api", "PIL.Image", "tqdm"])


def start(script, words, out, lacks=(), target=None):
    """Start a script; what it prints goes to the file `out`. lacks: modules it cannot import."""
    child = SERVER.Process(target=target or work, args=(script, words, out, lacks))
    child.start()
    return child


def torchrun(script, words, out, lacks):
    """What `torchrun --standalone --nproc-per-node 2` does, whose workers fork here."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          run_id="test", max_restarts=0, start_method="fork",
                          monitor_interval=0.05)
    elastic_launch(config, work)(script, words, out, lacks)


def work(script, words, out, lacks):
    """What the child does."""
    sys.modules.update(dict.fromkeys(lacks))        # None there: an ImportError
    out = f"{out}-{os.environ.get('RANK', 0)}"
    torch.set_num_threads(1)        # as in the tests: sums in the same order
    plots.draw_curves = lambda *args, **options: None
    with open(out, "w", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        importlib.import_module(script).main(words)


def after_first_epoch(child, folder, sent):
    """Send a signal when a run's first checkpoint is there; return the exit code."""
    patience = time.monotonic() + 100
    while not (folder / "checkpoint.pt").exists():
        assert child.is_alive() and time.monotonic() < patience
        time.sleep(0.005)
    os.kill(child.pid, sent)
    child.join(60)
    return child.exitcode
