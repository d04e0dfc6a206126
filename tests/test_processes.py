"""Two processes under torchrun: each draws the same epoch and takes its share of every batch."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import common
import data
import device
import distill

ROOT = Path(common.__file__).parent


def start(script, argv, processes=2):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(processes), "--", str(ROOT / script), *argv]
    return subprocess.Popen(words, env=dict(os.environ, OMP_NUM_THREADS="1"), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(worker):
    """Whether a process is gone, but for its exit code, which nobody may have asked for yet."""
    status = Path(f"/proc/{worker}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def both(script, module, easy, results, *flags, epochs=3):
    """The same run by one process, here, and by two; and what the two printed."""
    final = tiny.run(module, easy, results, "--run", "one", *flags, epochs=epochs)
    child = start(script, tiny.words(easy, results, "--run", "two", *flags, epochs=epochs))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    folder = results / "digits"
    rows = [tiny.metrics(folder / name) for name in ("one", "two")]
    finals = [final, json.loads((folder / "two" / "final.json").read_text())]
    return rows, finals, out


def close(rows, finals):
    assert len(rows[0]) == len(rows[1])
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert (one[key] == "") == (two[key] == "")
            if one[key]:
                assert float(one[key]) == pytest.approx(float(two[key]), rel=2e-4, abs=1e-5), key
    for key in ("test_accuracy", "test_loss", "ema_test_accuracy", "best_epoch"):
        assert finals[0][key] == pytest.approx(finals[1][key], rel=2e-4)


def test_two_processes_learn_what_one_does(easy, tmp_path):
    """Few labels, noise, an average as teacher: all that is shared out or drawn."""
    import distill
    rows, finals, out = both("distill.py", distill, easy, tmp_path, "--objective", "consistency",
                             "--labels", 60, "--noise", "0.5,0.5,0.3,0.1", "--ema-decay", 0.9)
    close(rows, finals)
    assert out.count("epoch 1/3") == 1 and out.count("student, consistency") == 1   # one speaks
    config = json.loads((tmp_path / "digits" / "two" / "config.json").read_text())
    assert config["versions"]["processes"] == 2


def test_two_processes_fill_the_teachers_outputs_together(easy, results, tmp_path):
    """Each its share of the views; the file is that of one process, bit for bit."""
    words = ("--views", 3, "--cache")
    two = tiny.copy_teacher(results, tmp_path / "two")
    tiny.run(distill, easy, results, *words, epochs=1)
    child = start("distill.py", tiny.words(easy, two, *words, epochs=1))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert out.count("cache  3 views of 120 images") == 1
    (one,), (other,) = ((place / "digits" / ".teacher").glob("*") for place in (results, two))
    assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_batchnorm_keeps_the_first_ones_statistics_and_all_agree(easy, tmp_path, monkeypatch):
    """Statistics are of half a batch, so the losses differ from one process's; but the weights
    that are saved must give the accuracies that are written down. Here torchrun leaves the store to
    the first process, as it may."""
    import look
    import train_student
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    rows, finals, _ = both("train_student.py", train_student, easy, tmp_path, "--norm", "batch",
                           "--ema-decay", 0.9)
    assert rows[0] != rows[1]
    found = look.predict(tmp_path / "digits" / "two", sorted(easy.glob("test/*/*.png")))
    right = [one["class"] == path.parent.name for one, path in
             zip(found, sorted(easy.glob("test/*/*.png")), strict=True)]
    assert sum(right) / len(right) == pytest.approx(finals[1]["test_accuracy"])


def test_the_end_of_one_ends_all_and_loses_nothing(easy, tmp_path):
    import train_student
    flags = ("--run", "cut", "--epochs", 100)
    child = start("train_student.py", tiny.words(easy, tmp_path, *flags))
    folder, deadline = tmp_path / "digits" / "cut", time.monotonic() + 100
    while not (folder / "checkpoint.pt").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(child.pid)], text=True, capture_output=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0 and "SIGKILL" in err
    for worker in workers.stdout.split():
        assert not Path(f"/proc/{worker}").exists()
    epochs = len(tiny.load(folder / "checkpoint.pt")["history"])
    final = tiny.run(train_student, easy, tmp_path, "--run", "cut", "--resume", epochs=100)
    assert epochs >= 1 and final["epochs"] == 100


@pytest.mark.parametrize("after", [0, 1])
def test_workers_of_a_torchrun_that_is_killed_while_they_start_end_too(easy, tmp_path, after):
    child = start("train_student.py", tiny.words(easy, tmp_path, "--run", "cut", epochs=400))
    deadline = time.monotonic() + 60
    workers = []
    while len(workers) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        found = subprocess.run(["pgrep", "-P", str(child.pid)], text=True, capture_output=True)
        workers = found.stdout.split()
        time.sleep(0.05)
    time.sleep(after)
    child.kill()
    child.communicate(timeout=60)        # their ends of the pipes are closed, too
    while not all(map(ended, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stop_reaches_both_and_leaves_neither(easy, tmp_path):
    """torchrun passes it on; its own traceback and exit code 1 come after."""
    child = start("train_student.py", tiny.words(easy, tmp_path, "--run", "cut", epochs=400))
    folder, deadline = tmp_path / "digits" / "cut", time.monotonic() + 100
    while not (folder / "checkpoint.pt").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(child.pid)], text=True, capture_output=True)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 2 and all("--resume" in line and str(folder) in line for line in said), err
    assert not re.search(re.escape(str(ROOT)) + r"/\w+\.py", err), err     # no traceback of ours
    assert len(workers.stdout.split()) == 2
    for worker in workers.stdout.split():
        assert not Path(f"/proc/{worker}").exists()
    assert tiny.load(folder / "checkpoint.pt")["history"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_leaves_the_others_before_python_ends(tmp_path, fails):
    """PyTorch's issue 179291: gloo's threads that still hold tensors then abort, now and then. One
    that fails does not wait for others, who may never come, and keeps its exit code."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import atexit, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
import device, flags
def main():
    device.join(torch.device("cpu"))
    if {fails} and device.rank():
        dist.all_reduce(torch.ones(5), async_op=True)       # the other never does
        flags.fail("of no use", 3)
    device.wait() if not {fails} else __import__("time").sleep(60)
atexit.register(lambda: os.write(1, b"in a group at the end: %d\\n" % dist.is_initialized()))
flags.launch(main)
""")
    child = start(script, [])
    out, err = child.communicate(timeout=50)
    if fails:
        assert child.returncode == 1 and "in a group" not in out, out
        assert re.search(r"exitcode +: 3 ", err) and err.count("of no use") == 1, err
    else:
        assert child.returncode == 0, err
        assert out.splitlines() == ["in a group at the end: 0"] * 2


@pytest.mark.parametrize("labels, size, said, give", [
    (None, 15, "the 15 images", 14), (40, 16, "5 labelled and 11 unlabelled", 12)])
def test_a_batch_that_cannot_be_shared_is_refused(easy, tmp_path, monkeypatch, capsys, labels,
                                                  size, said, give):
    import train_student
    monkeypatch.setattr(train_student, "world", lambda: 2)
    flags = ["--objective", "consistency"] if labels else []
    flags += ["--labels", labels] if labels else []
    tiny.refused(capsys, distill if labels else train_student,
                 tiny.words(easy, tmp_path, "--batch-size", size, *flags), f"--batch-size {size}",
                 said, "2 processes", f"give {give}")
    assert not (tmp_path / "digits").exists()
    tiny.run(distill if labels else train_student, easy, tmp_path, *flags, "--batch-size", give,
             "--dry-run")       # what it proposes is taken


def test_shares_of_a_batch_make_it_up(monkeypatch):
    split = data.Split(tiny_images(40), tiny_labels(40))

    def rows(number, of):
        monkeypatch.setattr(data, "rank", lambda: number)
        monkeypatch.setattr(data, "world", lambda: of)
        batches = data.Batches(split, (0,) * 3, (1,) * 3, 16, noise=(1, 1, 0.1, 0.1))
        return (list(batches.epoch(1)), [batch.rows.tolist() for batch in batches])

    (whole, everything), *parts = rows(0, 1), rows(0, 2), rows(1, 2)
    assert sorted(parts[0][1] + parts[1][1]) == everything
    for step, batch in enumerate(whole):
        a, b = parts[0][0][step], parts[1][0][step]
        assert sorted([*a.rows.tolist(), *b.rows.tolist()]) == sorted(batch.rows.tolist())
        for part in (a, b):
            assert (part.y >= 0).sum() == 4 - 2             # a quarter of 16, shared
            at = [batch.rows.tolist().index(row) for row in part.rows.tolist()]
            assert (batch.x[at] == part.x).all()            # the noise is that of the whole batch


def tiny_images(count):
    import numpy as np
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def tiny_labels(count):
    import numpy as np
    return np.where(np.arange(count) < 8, np.arange(count) % 4, -1)


def test_alone_there_is_nothing_to_share():
    assert device.world() == 1 and device.rank() == 0


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_sum_and_the_first_ones_buffers_go_round_where_there_are_several(processes, monkeypatch):
    """torch.distributed as seen by the second of processes that all hold the same."""
    calls = []
    monkeypatch.setattr(device, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: processes, get_backend=lambda: "gloo",
        all_reduce=lambda x: calls.append("sum") or x.mul_(processes),
        broadcast=lambda buffer, source: calls.append(source) or buffer.fill_(7)))
    assert device.summed(torch.tensor([1.0, 2.0])).tolist() == [processes, 2.0 * processes]
    models = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(3)
    device.share_buffers_(*models)
    several = processes > 1
    assert calls == ["sum"] * several + [0] * 6 * several       # mean, variance, batches counted
    assert all((buffer == 7).all() == several for model in models for buffer in model.buffers())
