"""Ctrl-C, SIGTERM, and two runs into one folder."""
import datetime
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import fake_runs
import pytest
import tiny
import torch
from PIL import Image

import common
import device
import train_student

ROOT = Path(common.__file__).parent


def start(easy, results, *flags, script="train_student.py"):
    return subprocess.Popen([sys.executable, ROOT / script,
                             *tiny.words(easy, results, "--epochs", 400, *flags)],
                            env=dict(os.environ, OMP_NUM_THREADS="1"), text=True,
                            # A test run in the background may have been told to ignore Ctrl-C.
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(condition, child):
    deadline = time.monotonic() + 120
    while not condition():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_is_stopped_with_a_line_and_goes_on(easy, tmp_path, sent, code):
    folder = tmp_path / "digits" / "student-s0"
    child = start(easy, tmp_path, "--epochs", 100)
    until((folder / "checkpoint.pt").exists, child)
    child.send_signal(sent)
    _, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert err.count("\n") == 1 and str(folder) in err and "--resume" in err, err
    assert not (folder / "final.json").exists()
    whole = len(tiny.load(folder / "checkpoint.pt")["history"])
    assert tiny.run(train_student, easy, tmp_path, "--resume", epochs=100)["epochs"] == 100
    assert len(tiny.metrics(folder)) == 100 > whole


@pytest.mark.parametrize("after, sent, expected", [
    (0.3, signal.SIGINT, 130), (0.8, signal.SIGTERM, 143), (1.5, signal.SIGINT, 130)])
def test_a_stop_while_pytorch_loads(easy, tmp_path, after, sent, expected):
    child = start(easy, tmp_path)
    time.sleep(after)
    code, lines = stop(child, sent)
    assert code == expected and len(lines) == 1 and lines[0].startswith("error: "), lines


@pytest.mark.parametrize("gap", [0, 0.003, 0.05, 0.2])
def test_an_impatient_second_ctrl_c_changes_nothing(easy, tmp_path, gap):
    child = start(easy, tmp_path)
    until((tmp_path / "digits" / "student-s0" / "checkpoint.pt").exists, child)
    child.send_signal(signal.SIGINT)
    time.sleep(gap)
    code, lines = stop(child, signal.SIGINT)
    assert code == 130 and len(lines) == 1 and "--resume" in lines[0], lines


def test_who_reads_the_lines_may_leave(easy, tmp_path):
    """As `train_student.py | head -1` does: no traceback, no line about a file."""
    child = start(easy, tmp_path)
    assert child.stdout.readline()
    child.stdout.close()
    child.wait(timeout=120)
    assert child.returncode == 141 and not child.stderr.read()
    child.stderr.close()


@pytest.mark.parametrize("main", ["None", "flags.fail('of no use')",
                                  "os.kill(os.getpid(), signal.SIGINT)"])
def test_ipython_keeps_its_own_handlers_after_a_script(main):
    code = (f"import os, signal, sys, types; sys.path.insert(0, {str(ROOT)!r})\n"
            "sys.modules['IPython'] = types.ModuleType('IPython'); import flags\n"
            "ours = lambda *_: None\n"
            "for each in (signal.SIGINT, signal.SIGTERM): signal.signal(each, ours)\n"
            f"try: flags.launch(lambda: {main})\n"
            "except SystemExit: pass\n"
            "assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is ours\n"
            "flags.say('no stop is left over')\n")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_who_reads_the_report_may_leave(tmp_path):
    fake_runs.make_six(tmp_path, 2)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, str(ROOT / "report.py"), "--results-dir", tmp_path],
                          stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("main, lines", [("None", 0), ("flags.fail('of no use')", 1)])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_python_ends_after_a_script(main, lines, sent):
    done = subprocess.run([sys.executable, "-c", "import atexit, flags, os, signal\n"
                           "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                           f"atexit.register(lambda: os.kill(os.getpid(), {int(sent)}))\n"
                           f"flags.launch(lambda: {main})"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == -sent and done.stderr.count("\n") == lines, done.stderr


@pytest.mark.parametrize("first, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_stops_at_the_same_time(first, code):
    """Both wait until Python looks, as behind a long step: the lower number is met first."""
    done = subprocess.run([sys.executable, "-c", f"""if True:
        import flags, os, signal
        both = {{signal.SIGINT, signal.SIGTERM}}
        def main():
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            os.kill(os.getpid(), {int(first)})
            if {first == signal.SIGINT}:
                os.kill(os.getpid(), signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
            for _ in range(10**6):
                pass
        signal.signal(signal.SIGINT, signal.default_int_handler)
        flags.launch(main)"""], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr


SWALLOWED = {       # where a stop comes -> what a script does
    "in the lock of a line": """
        import tqdm.std
        lock = tqdm.std.TqdmDefaultWriteLock
        lock.acquire = lambda *args, usual=lock.acquire, **more: ask() or usual(*args, **more)
        flags.say("a line")""",
    "while that lock is made": """
        import tqdm.std
        lock = tqdm.std.TqdmDefaultWriteLock
        lock.create_mp_lock = lambda usual=lock.create_mp_lock: ask() or usual()
        flags.say("a line")""",
    "in a callback": """
        class Dropped:
            def __del__(self):
                ask()
                for _ in range(1000): pass
        thing = Dropped()
        del thing
        time.sleep(20)""",
    "where all is caught": """
        try: ask(); time.sleep(1)
        except BaseException: pass
        flags.say("a line")""",
    "where it becomes another error": """
        try: ask(); time.sleep(1)
        except BaseException: raise ImportError("numpy failed to import") from None""",
    "where it becomes a refusal": """
        try: ask(); time.sleep(1)
        except BaseException: flags.fail("another process ended", 1)""",
    "twice": """
        launch.IMPATIENT = 0.05
        try: ask(); time.sleep(1)
        except BaseException: pass
        time.sleep(0.1)
        ask()
        time.sleep(20)"""}


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", SWALLOWED)
def test_a_stop_that_a_library_loses_is_none_the_less(where, sent, code):
    """It may be dropped, caught, or turned into another error by what it meets."""
    text = f"""if True:
        import flags, launch, os, signal, time
        def ask():
            os.kill(os.getpid(), {int(sent)})
        def main():
            {textwrap.indent(textwrap.dedent(SWALLOWED[where]), " " * 12)}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        flags.launch(main)"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and time.monotonic() - started < 10


@pytest.mark.parametrize("script", ["calc.py", "report.py", "train_student.py"])
def test_ctrl_c_is_answered_before_the_rest_is_imported(script):
    """A stop as soon as launch.py has set its answer, before it imports anything else."""
    done = subprocess.run([sys.executable, "-c", f"""if True:
        import os, runpy, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Stop:
            def find_spec(self, name, *_):
                if name in ("argparse", "tqdm", "numpy", "torch", "json", "textwrap"):
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Stop())
        runpy.run_path({script!r}, run_name="__main__")"""], cwd=ROOT, text=True,
        capture_output=True)
    assert done.returncode == 130 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("script, flags", [
    ("common.py", ["--recipes"]), ("calc.py", ["arch", "digits"]), ("train_student.py", []),
    ("calc.py", ["arch", "none"])])
def test_no_room_where_it_is_printed(tmp_path, script, flags):
    """A line and exit code 2; where the line itself has no room, the code alone."""
    flags = flags or ["--dry-run", f"--results-dir={tmp_path}"]
    command = [sys.executable, ROOT / script, *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 2


@pytest.mark.parametrize("script, flags, there, code, named", [
    ("train_student.py", (), {"RANK": "abc"}, 0, ""),
    ("train_student.py", (), {"WORLD_SIZE": "2", "RANK": "0"}, 2, "torchrun"),
    ("train_student.py", (), {"WORLD_SIZE": "two"}, 2, "torchrun"),
    ("train_student.py", (), {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": "9"}, 2, "RANK=5"),
    ("train_student.py", (), {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": "99999999"}, 2, "MASTER_PORT=99999999"),
    ("calc.py", ("shape", "3x8x8", "fc:2"), {}, 0, "")])
def test_an_environment_that_is_not_whole(easy, tmp_path, script, flags, there, code, named):
    flags = flags or tiny.words(easy, tmp_path, "--epochs", 1)
    done = subprocess.run([sys.executable, ROOT / script, *flags], text=True, capture_output=True,
                          env=os.environ | there)
    assert done.returncode == code and named in done.stderr
    assert done.stderr.count("\n") == (code > 0)


def test_a_number_that_a_cluster_left_behind_silences_nothing(easy, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train_student.py",
                           *tiny.words(easy, tmp_path, "--epochs", 1)], text=True,
                          capture_output=True, env=os.environ | {"RANK": "1"})
    assert done.returncode == 0 and "student-s0: test" in done.stdout


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_finds_no_others_can_be_stopped(easy, tmp_path, number):
    """The first one waits for the others, these for the first, in C++ that answers no signal."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = subprocess.Popen(
        [sys.executable, "-c", "import device, flags, torch\n"
         "def main():\n    print('waits', flush=True)\n    device.join(torch.device('cpu'))\n"
         "flags.launch(main)"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"WORLD_SIZE": "2", "RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port)})
    assert child.stdout.readline() == "waits\n"
    time.sleep(1)
    code, lines = stop(child, signal.SIGTERM)
    assert code == 143 and len(lines) == 1 and "stopped" in lines[0], lines


@pytest.fixture
def one_of_two(monkeypatch):
    """This process is the second of two, with little patience; give the port of the first."""
    monkeypatch.setattr(device, "PATIENCE", datetime.timedelta(seconds=1))
    monkeypatch.setattr(device, "ENDINGS", [])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in dict(WORLD_SIZE=2, RANK=1, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    return port


def not_joined(capsys):
    """Join, in vain; return the line."""
    with pytest.raises(SystemExit) as left:
        device.join(torch.device("cpu"))
    line = capsys.readouterr().err
    assert left.value.code == 2 and line.count("\n") == 1, line
    return line


def test_a_process_that_finds_no_others_ends_with_a_line(one_of_two, capsys):
    assert f"127.0.0.1:{one_of_two}" in not_joined(capsys)


def test_a_first_process_that_stays_silent_is_not_waited_for(one_of_two, monkeypatch, capsys):
    """Torchrun's store answers for it, so all looks well."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.TCPStore("127.0.0.1", one_of_two, is_master=True,
                                       wait_for_workers=False)
    started = time.monotonic()
    assert "no other process" in not_joined(capsys)
    assert time.monotonic() - started < 20 and store.port == one_of_two


@pytest.mark.parametrize("under, ended", [(True, True), (False, False)])
def test_only_under_torchrun_another_parent_is_an_end(one_of_two, monkeypatch, capsys, under,
                                                      ended):
    """A launcher of another kind may start us and go; torchrun goes only when it is killed."""
    monkeypatch.setattr(device, "PARENT", -1)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    if under:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert ("torchrun has ended" in not_joined(capsys)) == ended


@pytest.mark.parametrize("old, told", [(False, True), (True, False)])
def test_a_stop_before_the_old_run_is_gone_does_not_say_that_it_goes_on(easy, tmp_path, monkeypatch,
                                                                        old, told):
    """Of several processes one waits for the others there; the old run may not be this one's."""
    flags = ["--overwrite"] if old else []
    seen = []

    def wait():
        seen.append(list(train_student.flags.BEGUN))

    monkeypatch.setattr(train_student, "wait", wait)
    for _ in range(1 + old):
        tiny.run(train_student, easy, tmp_path, *flags, epochs=1)
        assert [bool(begun) for begun in seen[-2:]] == [told, told]
    assert not train_student.flags.BEGUN


def stop(child, sent):
    """Stop a process; return its exit code and the lines on stderr."""
    child.send_signal(sent)
    _, err = child.communicate(timeout=120)
    return child.returncode, err.splitlines()


def test_a_run_is_stopped_while_it_decodes(tmp_path):
    """Images so large that decoding them is under way for seconds."""
    images, results, large = tmp_path / "images", tmp_path / "results", tmp_path / "large.png"
    Image.new("RGB", (3000, 3000)).save(large)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (images / split / name).mkdir(parents=True)
            for i in range(20):
                os.link(large, images / split / name / f"{i}.png")
    child = start(images, results)
    until((images / ".arrays").exists, child)
    code, lines = stop(child, signal.SIGINT)
    assert (code, len(lines)) == (130, 1) and "start it again" in lines[0], lines
    assert not (images / ".arrays").exists() and not results.exists()


def test_a_run_is_stopped_while_the_teacher_fills_the_cache(easy, results):
    """So many views that it takes seconds."""
    child = start(easy, results, "--views", 300, "--cache", script="distill.py")
    cache = results / "digits" / ".teacher"
    until(lambda: any(cache.glob("*.part")), child)
    code, lines = stop(child, signal.SIGTERM)
    assert (code, len(lines)) == (143, 1) and "start it again" in lines[0], lines
    assert not cache.exists()
    assert not (results / "digits" / "kd-s0").exists()


def test_a_second_run_into_a_folder_is_refused(easy, tmp_path, capsys):
    folder = tmp_path / "digits" / "student-s0"
    child = start(easy, tmp_path)
    until((folder / "checkpoint.pt").exists, child)
    for flags in ([], ["--resume"], ["--overwrite"], ["--resume", "--lr", 0.5]):
        tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, *flags, epochs=400), folder,
                     "another process", "--run NAME")
    assert child.poll() is None and (folder / "checkpoint.pt").exists()
    child.kill()            # what a dead process held is free
    child.communicate()
    assert tiny.run(train_student, easy, tmp_path, "--overwrite")["epochs"] == 2


def test_a_finished_run_holds_nothing(easy, tmp_path):
    tiny.run(train_student, easy, tmp_path)
    handle = os.open(tmp_path / "digits" / "student-s0", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
