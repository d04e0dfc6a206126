"""Files and names from elsewhere: checkpoints that lie, names of any letters, terminals of any
encoding, runs of other versions."""
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import fake_runs
import pytest
import tiny
import torch

import cards
import common
import data
import distill
import look
import models
import report
import runs
import train_student
from flags import plain

HOUSE = Path(common.__file__).parent
NAMES = ("with space", "quo'te\"s $(touch x)", "new\nline", "猫 ж ß", "-dash", "--help", "a$b$c_{^",
         "<b>|pipe`", r"a$\frac{$", "\x1b[31mred", "\udcff\udcfe undecodable", "é" * 100)


RUNS = ("with space", "quo'te\"s", "猫 ж", "-dash", "--help", r"a$\frac{$", "<b>|pipe`",
        "\x1b[2J\udcff")


# ---- a best.pt that lies ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def card(chain):
    return tiny.load(chain[0] / "digits" / "student-s0" / "best.pt")


class Odd:
    """Something that no card may hold, but that weights_only=True lets pass."""
    huge = torch.zeros(1).expand(10**6, 10**6)      # 4 bytes that claim to be 4 TB
    nowhere = torch.empty(64, 64, device="meta")


def built(**changed):
    return lambda card: card | dict(build=card["build"] | changed)


def weights(name, value):
    return lambda card: card | dict(model=card["model"] | {name: value})


HEAD = "classifier.3.weight"
LIES = {
    "arch": (built(arch="../../etc/passwd"), "unknown arch '../../etc/passwd'"),
    "no arch": (built(arch=None), "unknown arch None"),
    "list for a name": (built(pool=["max"] * 10**5), "unknown pool ['max', 'max'"),
    "another key": (built(hidden=(10**9,)), "how to build"),
    "no dict": (lambda card: card | dict(build="digits-student"), "how to build"),
    "huge images": (built(image_shape=(3, 10**9, 10**9)), "(3, 1000000000, 1000000000)"),
    "large images": (built(image_shape=(3, 4096, 4096)), "do not fit the network it names"),
    "negative images": (built(image_shape=(3, -16, -16)), "(3, -16, -16)"),
    "small images": (built(image_shape=(3, 1, 1)), "too small"),
    "grey images": (built(image_shape=(1, 16, 16)), "(1, 16, 16)"),
    "shape of words": (built(image_shape="abc"), "'abc'"),
    "classes in number": (built(num_classes=10**9), "1000000000 classes"),
    "classes of letters": (lambda card: card | dict(classes="abcd"), "'abcd'"),
    "long classes": (lambda card: card | dict(classes=["x" * 10**6] * 4), "4 classes"),
    "many classes": (lambda card: card | dict(classes=["x" * 100] * 10**5), "4 classes"),
    "classes that are none": (lambda card: card | dict(classes=[1, 2, 3, 4]), "[1, 2, 3, 4]"),
    "mean of two": (lambda card: card | dict(mean=(0.5, 0.5)), "(0.5, 0.5)"),
    "mean not finite": (lambda card: card | dict(mean=(0.5, 0.5, float("nan"))), "nan"),
    "std of zero": (lambda card: card | dict(std=(0.5, 0.0, 0.5)), "(0.5, 0.0, 0.5)"),
    "no std": (lambda card: card | dict(std=None), "None"),
    "epoch": (lambda card: card | dict(epoch="<script>"), "epoch '<script>'"),
    "epoch below 1": (lambda card: card | dict(epoch=-5), "epoch -5"),
    "epoch of truth": (lambda card: card | dict(ema_epoch=True), "ema_epoch True"),
    "fit is a path": (lambda card: card | dict(fit="x/../../../out/evil"), "fit 'x/../../../out"),
    "fit is a list": (lambda card: card | dict(fit=["resize"]), "fit ['resize']"),
    "recipe": (lambda card: card | dict(recipe=7), "recipe 7"),
    "val_fraction": (lambda card: card | dict(val_fraction="much"), "val_fraction 'much'"),
    "share of nothing": (lambda card: card | dict(val_fraction=float("nan")), "val_fraction nan"),
    "labels": (lambda card: card | dict(labels=[1]), "labels [1]"),
    "labels below 0": (lambda card: card | dict(labels=-1), "labels -1"),
    "no weights": (lambda card: card | dict(model=None), "do not fit"),
    "weights too many": (weights("extra", torch.zeros(1)), "'extra'"),
    "weights too few": (lambda card: card | dict(model={}), "do not fit"),
    "weights of a number": (lambda card: card | dict(model={1: 2}), "do not fit"),
    "a number for weights": (weights(HEAD, 0.5), f"{HEAD} is no plain tensor"),
    "weights of another shape": (weights(HEAD, torch.zeros(4, 63)), "(4, 63), not (4, 64)"),
    "weights of letters": (weights(HEAD, "x"), f"{HEAD} is no plain tensor"),
    "huge weights of 4 bytes": (weights(HEAD, Odd.huge), f"{HEAD} is no plain tensor"),
    "weights on no device": (weights(HEAD, Odd.nowhere), "torch._utils._rebuild_meta_tensor"),
    "sparse weights": (weights(HEAD, torch.zeros(4, 64).to_sparse()), "_rebuild_sparse_tensor"),
    "complex weights": (weights(HEAD, torch.zeros(4, 64) * 1j), "torch.ComplexFloatStorage"),
    "NaN": (weights(HEAD, torch.full((4, 64), float("nan"))), f"{HEAD} holds values that are not"),
    "whole numbers": (weights(HEAD, torch.zeros(4, 64, dtype=torch.int64)), "no plain tensor"),
    "inf": (weights(HEAD, torch.full((4, 64), float("inf"))), f"{HEAD} holds values that are not"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_card_that_lies_is_refused_in_a_line(card, tmp_path, capsys, lie):
    change, part = LIES[lie]
    common.save_checkpoint(tmp_path / "best.pt", change(card))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        models.load(tmp_path / "best.pt")
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and len(line) < 600
    assert part in line and line.startswith(f"error: {tmp_path / 'best.pt'}: "), line
    assert "--image-size" not in line, line


def test_no_class_is_said_where_outputs_are_not_finite(chain, easy, tmp_path, capsys):
    """Finite weights, but 1e20 times as large: argmax would say the first class of every image."""
    run = shutil.copytree(chain[0] / "digits" / "student-s0", tmp_path / "huge")
    (run / runs.SUMS).unlink()
    card = tiny.load(run / "best.pt")
    common.save_checkpoint(run / "best.pt", card | dict(
        model={name: value * 1e20 for name, value in card["model"].items()}))
    capsys.readouterr()
    for words in (["predict", run, easy / "test/red/0.png"], [run]):
        tiny.refused(capsys, look, words, run / "best.pt", "not finite")
    assert not (run / "look.html").exists()
    for flags in ((), ("--views", 1)):
        words = tiny.words(easy, tmp_path / "results", "--teacher", run / "best.pt", *flags)
        tiny.refused(capsys, distill, words, f"--teacher {run / 'best.pt'}", "not finite")


def test_a_variance_below_zero_is_none():
    network = models.build("digits-student", 4, (3, 16, 16), norm="batch")
    wanted = network.state_dict()
    name = next(name for name in wanted if name.endswith("running_var"))
    assert cards.unfit(wanted, wanted) is None
    assert name in cards.unfit(wanted | {name: wanted[name] - 2}, wanted)


@pytest.mark.parametrize("out", [".", "./", "/", "/dev/null", "new/", "folder"])
def test_what_is_no_file_is_not_written_over(chain, tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    device = os.stat("/dev/null")
    tiny.refused(capsys, look, [chain[0] / "digits" / "student-s0", "--out", out], "--out", "file")
    tiny.refused(capsys, data, ["--show", 2, "--out", out], "--out", "file")
    assert os.stat("/dev/null").st_mode == device.st_mode and not any(Path("folder").iterdir())
    os.mkfifo("pipe")
    tiny.refused(capsys, look, ["predict", chain[0] / "digits" / "student-s0", "pipe"], "pipe")


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "link.png").symlink_to("picture.png")
    data.main(["--show", "2", "--out", str(tmp_path / "link.png")])
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "picture.png").stat().st_size > 99


def test_the_card_is_good_as_it_is(card, tmp_path):
    common.save_checkpoint(tmp_path / "best.pt", card)
    network, _ = models.load(tmp_path / "best.pt")
    assert tiny.same(dict(network.state_dict()), card["model"])


def test_an_average_that_is_not_there(card, tmp_path, capsys):
    for lacks in (card | dict(ema=None), {k: v for k, v in card.items() if k != "ema"}):
        common.save_checkpoint(tmp_path / "best.pt", lacks)
        with pytest.raises(SystemExit):
            models.load(tmp_path / "best.pt", average=True)
        assert "holds no average" in capsys.readouterr().err


@pytest.mark.parametrize("fit", [None, "squash", ["crop"]])
def test_a_card_that_does_not_say_how_images_fit(card, easy, tmp_path, capsys, fit):
    common.save_checkpoint(tmp_path / "best.pt", card | dict(fit=fit))
    tiny.refused(capsys, look, ["predict", tmp_path, easy / "test/red/0.png"], tmp_path,
                 f"fit {fit!r}")


class Code:
    """Unpickling this would run a command."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_code_in_a_checkpoint_is_named_and_not_run(card, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for extra, name in ((Code(), "posix.system"), (Path("x"), "pathlib.PosixPath"),
                        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")):
        torch.save(card | dict(extra=extra), tmp_path / "best.pt")
        tiny.refused(capsys, look, ["predict", tmp_path, "x.png"], tmp_path / "best.pt", name)
    torch.save(Code(), tmp_path / "best.pt", _use_new_zipfile_serialization=False)
    tiny.refused(capsys, look, ["predict", tmp_path, "x.png"], tmp_path / "best.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_packed_checkpoint_is_not_unpacked(card, tmp_path, capsys):
    """A packed file of a few bytes may hold gigabytes."""
    common.save_checkpoint(tmp_path / "best.pt", card)
    with zipfile.ZipFile(tmp_path / "best.pt") as whole, zipfile.ZipFile(
            tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    tiny.refused(capsys, look, ["predict", tmp_path / "packed.pt", "x.png"], "packed.pt",
                 "data.pkl' in it is packed")


def test_no_advice_to_load_it_all_the_same(card, tmp_path, capsys):
    """PyTorch's own text says how to switch its care off."""
    whole = tmp_path / "whole.pt"
    common.save_checkpoint(whole, card)
    with zipfile.ZipFile(tmp_path / "empty.pt", "w"):
        pass
    with zipfile.ZipFile(whole) as had, zipfile.ZipFile(tmp_path / "odd.pt", "w") as odd:
        for name in had.namelist():
            odd.writestr(name, b"P" if name.endswith("data.pkl") else had.read(name))
    for name, part in (("empty.pt", "no data.pkl"), ("odd.pt", "cannot be read (")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            common.load_checkpoint(tmp_path / name)
        line = capsys.readouterr().err
        assert name in line and part in line and "weights_only" not in line and len(line) < 300


def test_memory_that_gives_out_is_not_taken_for_code(card, tmp_path, capsys, monkeypatch):
    common.save_checkpoint(tmp_path / "best.pt", card)
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1200000000 bytes"
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=RuntimeError(text)))
    with pytest.raises(SystemExit):
        common.load_checkpoint(tmp_path / "best.pt")
    line = capsys.readouterr().err
    assert text in line and "more than tensors" not in line


# ---- names ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A folder whose classes have odd names, in a folder with one: (folder, results)."""
    top = tmp_path_factory.mktemp("names") / "new\nline and $(space) ж \udcff"
    root = tiny.make_folder(top / "root", train=3, test=2)
    for part in ("train", "test"):
        for i, name in enumerate(NAMES):
            target = root / part / name
            target.mkdir()
            for file in (root / part / list(tiny.COLOURS)[i % 4]).iterdir():
                (target / f"{name}-{file.name}").hardlink_to(file)
    results = top / "results"
    tiny.run(train_student, root, results, epochs=1, curves=True)
    return root, results


def test_names_go_from_reading_to_report_and_prediction(named, capsys, recwarn):
    root, results = named
    classes = data.load("folder", root, image_size=16).classes
    assert set(classes) == {*NAMES, *tiny.COLOURS}
    assert list(tiny.load(results / "digits/student-s0/best.pt")["classes"]) == list(classes)

    image = root / "test" / "new\nline" / "new\nline-0.png"
    capsys.readouterr()
    (found,) = look.main(["predict", str(results / "digits" / "student-s0"), str(image)])
    assert found["image"] == str(image) and found["class"] in classes
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "new\\nline-0.png" in printed and printed.isascii() is False

    page = Path(look.main([str(results / "digits" / "student-s0"), "--images", "4"])["page"])
    assert "<b>|pipe" not in page.read_text(encoding="utf-8")
    made = data.main(["--dataset", "folder", "--data-dir", str(root), "--show", "16", "--out",
                      str(results / "grid $x$ ж.png")])
    assert Path(made["picture"]).stat().st_size > 1000
    assert "\\x1b[31mred" in capsys.readouterr().out
    report.main(["--results-dir", str(results)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\udcff" in out
    assert not [str(w.message) for w in recwarn if "lyph" in str(w.message)]


def test_runs_of_any_name_are_reported(tmp_path, capsys, recwarn):
    fake_runs.make_six(tmp_path, only=("teacher", "student"))
    for run in RUNS:
        fake_runs.make_run(tmp_path, "odd", test=75).rename(tmp_path / "digits" / run)
    made = report.main(["--results-dir", str(tmp_path)])
    assert {plain(run) for run in RUNS} < {row["label"] for row in made["rows"]}
    assert "\x1b" not in capsys.readouterr().out and not recwarn.list
    report.main(["html", "--results-dir", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>|pipe" not in page


@pytest.mark.parametrize("run", ["new\nline", "\x1b[31m", "\udcff", ".hidden", "..", "a/b",
                                 " ", ""])
def test_run_names_that_would_vanish_or_break_a_line_are_refused(easy, tmp_path, capsys, run):
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path / "r", f"--run={run}"), "--run")
    assert not (tmp_path / "r").exists()


# ---- terminals --------------------------------------------------------------------------------

def typed(*words, encoding="ascii", **options):
    """A script as typed where the language is C and nothing is UTF-8."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHON"))}
    env |= dict(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", OMP_NUM_THREADS="1",
                PYTHONIOENCODING=encoding)
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, **options)


def test_a_terminal_of_ascii(named, tmp_path):
    root, results = named
    shown = typed(HOUSE / "train_student.py", "--dry-run", *tiny.words(root, tmp_path))
    assert shown.returncode == 0, shown.stderr.decode()
    assert b"\\u2212log softmax" in shown.stdout and shown.stdout.isascii()
    image = next((root / "test" / "猫 ж ß").iterdir())
    for words in (("look.py", "predict", results / "digits/student-s0", image),
                  ("report.py", "--results-dir", results)):
        shown = typed(HOUSE / words[0], *words[1:])
        assert shown.returncode == 0, shown.stderr.decode()
        assert shown.stdout.isascii() and shown.stderr == b"", shown.stderr.decode()
    shown = typed(HOUSE / "report.py", "--recipe", "猫").stderr
    assert shown.startswith(b"error: ") and shown.isascii() and shown.count(b"\n") == 1


def test_no_terminal_and_no_streams(easy, tmp_path):
    """stdin, stdout and stderr closed, as under some servers."""
    words = [str(word) for word in tiny.words(easy, tmp_path, epochs=1)]
    code = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable,
                           HOUSE / "train_student.py", *words]).returncode
    assert code == 0 and (tmp_path / "digits/student-s0/final.json").exists()


def test_a_reader_of_what_is_printed_may_go(tmp_path):
    """`python common.py --recipes | head -0`, as a shell runs it."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, HOUSE / "common.py", "--recipes"], stdout=write,
                          stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                              signal.SIGPIPE, signal.SIG_DFL))
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


def test_a_read_only_checkout_of_another_user(named, tmp_path):
    """In a folder with spaces, without a home folder, without git, the language C."""
    root, house = named[0], tmp_path / "a read-only 'house'"
    house.mkdir()
    for path in HOUSE.glob("*.py"):
        shutil.copy(path, house)
    house.chmod(0o555)
    drop = [shutil.which("setpriv") or "setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"]
    if os.getuid() or shutil.which("setpriv") is None or subprocess.run([*drop, "true"]).returncode:
        drop = []       # of root's rights, that of writing where nobody may
    env = dict(PATH=str(tmp_path), LANG="C", OMP_NUM_THREADS="1", MPLCONFIGDIR=str(tmp_path / "m"))
    words = tiny.words(root, tmp_path / "results", epochs=1)
    done = subprocess.run([*drop, sys.executable, "train_student.py", *words], cwd=house, env=env,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    house.chmod(0o755)
    assert done.returncode == 0 and not done.stderr, done.stderr
    config = json.loads((tmp_path / "results/digits/student-s0/config.json").read_text())
    assert config["git_commit"] is None
    assert not [path.name for path in house.iterdir() if path.suffix != ".py"]


# ---- other versions ---------------------------------------------------------------------------

def edit(path, **changed):
    facts = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not edit}))


@pytest.mark.parametrize("schema", [runs.SCHEMA + 1, None, True, edit])
@pytest.mark.parametrize("file", ["config.json", "final.json"])
def test_a_run_of_another_schema_is_not_reported(tmp_path, capsys, file, schema):
    folder = fake_runs.make_run(tmp_path, "student-s0")
    edit(folder / file, schema=schema)          # edit: left out
    tiny.refused(capsys, report, ["--results-dir", tmp_path], folder / file,
                 f"schema {None if schema is edit else schema}", f"now {runs.SCHEMA}")
    assert not (tmp_path / "digits" / "report.md").exists()


@pytest.mark.parametrize("text, part", [
    ('{"schema": 7, "rows": []}', "schema 7, now 1"), ("[" * 10**5, "RecursionError"),
    ('{"schema": 1, "rows": [{"parameters": {"mean": %s}}]}' % ("1" * 400), "make publish")])
def test_a_published_report_that_is_not_of_ours_is_named(tmp_path, capsys, text, part):
    place = tmp_path / "published" / "digits" / "report.json"
    place.parent.mkdir(parents=True)
    place.write_text(text)
    (tmp_path / "README.md").write_text("<!-- table:digits -->\n<!-- /table -->\n")
    tiny.refused(capsys, report, ["readme", "--results-dir", tmp_path, "--readme",
                                  tmp_path / "README.md"], place, part)


def test_a_commit_is_that_of_these_scripts_or_none(tmp_path):
    """None where they were copied into another project; -dirty where a script was changed since."""
    house = tmp_path / "other" / "tutor"
    house.mkdir(parents=True)
    for path in HOUSE.glob("*.py"):
        shutil.copy(path, house)

    def git(*words):
        done = subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words],
                              cwd=house.parent, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def told():
        code = "import runs, types; print(runs.make_config(types.SimpleNamespace(), '', {}))"
        done = subprocess.run([sys.executable, "-B", "-c", code], cwd=house, text=True,
                              capture_output=True)
        return ast.literal_eval(done.stdout)["git_commit"]

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert told() is None
    (house / "README.md").write_text("a table")
    git("add", ".")
    git("commit", "-q", "-m", "y")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40 and told() == commit
    (house / "README.md").write_text("a longer table")
    (house / "mine.py").write_text("")
    assert told() == commit                     # nothing that a run is made by
    (house / "runs.py").touch()
    (house / "calc.py").chmod(0o755)
    assert told() == commit                     # looked at, and the same
    with open(house / "models.py", "a") as file:
        file.write("# mine")
    assert told() == commit + "-dirty"
    assert runs.short(told()) == commit[:12] + "-dirty"


def test_a_run_from_before_there_were_some_flags_and_figures_is_reported(tmp_path):
    """What later versions of schema 1 added: keys of config and final, and columns."""
    fake_runs.make_six(tmp_path, only=("teacher", "student", "kd"))
    folder = tmp_path / "digits" / "kd-s0"
    for key in ("data_key", "labels", "views", "augment", "git_commit"):
        edit(folder / "config.json", **{key: edit})
    edit(folder / "final.json", ema_best_epoch=edit, peak_memory_bytes=edit)
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + ",later", *(line + ",1" for line in lines[1:])]) + "\n")
    made = report.main(["--results-dir", str(tmp_path)])
    assert [row["key"] for row in made["rows"]] == ["teacher", "student", "kd"]


def test_metrics_without_a_column_are_refused_by_it(tmp_path, capsys):
    folder = fake_runs.make_run(tmp_path, "student-s0")
    path = folder / "metrics.csv"
    path.write_text(path.read_text().replace("lr,", "rate,", 1))
    tiny.refused(capsys, report, ["--results-dir", tmp_path], path, "lacks the column 'lr'")


def test_an_older_best_pt_of_another_schema_is_refused_by_it(card, easy, tmp_path, capsys):
    common.save_checkpoint(tmp_path / "best.pt", card | dict(schema=0))
    for script, words in ((look, ["predict", tmp_path, easy / "test/red/0.png"]),
                          (distill, tiny.words(easy, tmp_path / "r", "--teacher",
                                               tmp_path / "best.pt"))):
        tiny.refused(capsys, script, words, tmp_path, "schema 0, now 1")
