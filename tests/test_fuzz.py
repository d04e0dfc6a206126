"""Random and boundary values at every flag of every script: success, or one line and exit code 2.

    FUZZ=2000 python -m pytest tests/test_fuzz.py -k values       as many calls for each flag

The flags are read off the parsers, so that a new one is fuzzed without anyone remembering.
"""
import argparse
import contextlib
import functools
import inspect
import io
import math
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import tiny
from fake_runs import SIX, make_six
from matplotlib.figure import Figure
from PIL import Image

import calc
import common
import data
import device
import digits
import distill
import download
import flags
import look
import models
import report
import runs
import train_student
import train_teacher

TRAINING = {"train_teacher": train_teacher, "train_student": train_student, "distill": distill}
CASES = {"train_teacher": 400, "train_student": 400, "distill": 600, "data": 150, "calc": 90,
         "report": 110, "look": 100, "common": 30, "calc init": 60, "calc reports": 20}
AT_A_FLAG = int(os.environ.get("FUZZ", 0))      # calls for each flag, where these are more
AT_A_PARSER = 2000      # values at every flag, without what comes after the parser
NUMBERS = (
    "0", "-0", "-0.0", "+1", "1", "2", "-1", "0.5", ".5", "5.", "1e3", "1e-3", "1e-300", "1e-320",
    "1e300", "1e308", "1e400", "-1e400", "nan", "-nan", "NaN", "inf", "-inf", "Infinity", "0x10",
    "0b1", "1_0", "1__0", "_1", "1 000", "1,5", "1e", "e1", "--1", "1j", "True", "None", "null",
    "٣", "１２", "²", "½", "Ⅷ", "−1", str(2**31), str(2**32 - 1), str(2**32), str(2**63),
    str(-2**63), str(10**30), "9" * 400, "9" * 5000, "0." + "0" * 400 + "1", "0" * 300 + "1", " 1",
    "1 ", "1\n", "\t1", "1\0")
WORDS = (
    "", " ", "  \t ", "\n", "a\nb", "a\rb", "\0", "a\0b", "\x1b[31m", "\x7f", "-", "--", "-x",
    "---", "--bogus", "-h x", "=", "a=b", ",", ",,,", ".", "..", "...", "./.", "a/b", "../x", "./",
    "a\\b", "a:b", "*", "?", "~", "$HOME", "$(id)", "`id`", "%s", "%(prog)s", "{}", "{seed}", "'",
    '"', "a b", "名前", "имя", "ñ", "e\u0301", "\u202eabc", "\ufeff", "\u2028", "\udcff",
    "a\ud800b", "😀", "x" * 254, "x" * 255, "x" * 300, "x/" * 3000, "é" * 200, "x" * 100_000, "all",
    "auto", "ema", "none", "digits", "folder", "best.pt", "con", "0,0,0,0", "1,1,1,1", "1,1,nan,1",
    "0.5,0.5,1e400,0.1", ",,,,", "1,2,3,4,5", "a=1,2", "alpha=0.5", "lr=1,1", "0,1,2", "0 1")
ALPHABET = "0123456789.-+eE_xn, \\\0\n\t=:;aé名\udc80\u200b"


# ---- what there is to fuzz --------------------------------------------------------------------

def parser_of(main, *argv):
    """The parser that a script reads these words with."""
    class Found(Exception):
        pass

    def stop(parser, *_):
        raise Found(parser)

    with mock.patch.object(flags.Parser, "parse_args", stop), pytest.raises(Found) as found:
        main(list(argv))
    return found.value.args[0]


def commands():
    """{name: (module, words before the flags, words after them, parser)} of all that there is."""
    found = {name: (module, [], [], parser_of(module.main))
             for name, module in {**TRAINING, "data": data, "common": common, "look": look}.items()}
    for name in report.COMMANDS:
        tail = ["--", "distill.py"] if name == "sweep" else []
        found[f"report {name}"] = report, [name], tail, parser_of(report.main, name, *tail)
    (choice,) = (a for a in parser_of(calc.main)._actions if a.choices and not a.option_strings)
    for name, parser in choice.choices.items():
        found[f"calc {name}"] = calc, [name], [], parser
    return found


COMMANDS = commands()


def actions(parser):
    """All flags and places of a parser but --help."""
    return [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]


# ---- values -----------------------------------------------------------------------------------

def bounds(action):
    """The values at, just inside and just outside the bounds of a flags.number."""
    known = inspect.getclosurevars(action.type).nonlocals if inspect.isfunction(action.type) else {}
    for edge in (known.get("low"), known.get("high")):
        if edge is not None:
            whole = known["kind"] is int
            yield from (str(v) for v in (
                (edge - 1, edge, edge + 1) if whole else
                (math.nextafter(edge, -math.inf), edge, math.nextafter(edge, math.inf))))


def value(rng, action, paths):
    """One value for a flag: one of its own, one at its bounds, a path, a bad word, or noise."""
    kind = rng.random()
    own = [*map(str, action.choices or ()), *bounds(action)]
    if own and rng.random() < 0.5:
        word = rng.choice(own)
        return rng.choice((word, word, word.upper(), f" {word}", word[:-1])) if action.choices \
            else word
    if kind < 0.45:
        return str(rng.choice(paths))
    if kind < 0.65:
        return rng.choice(NUMBERS)
    if kind < 0.75:
        return repr(rng.choice((rng.uniform(-2, 2), rng.randint(-9, 99), 10.0**rng.randint(-9, 9))))
    if kind < 0.95:
        return rng.choice(WORDS)
    return "".join(rng.choices(ALPHABET, k=rng.randint(1, 12)))


def typed(rng, action, paths):
    """A flag as it may be typed, with a value or without, or the values of a place."""
    if not action.option_strings:
        count = rng.randint(0, 3) if action.nargs else rng.choice((0, 1, 1, 1, 1, 2))
        return [value(rng, action, paths) for _ in range(count)]
    flag = rng.choice(action.option_strings)
    if rng.random() < 0.03:
        flag = rng.choice((flag[:-1], flag + "s", flag.upper(), flag.replace("-", "_"), "—" + flag))
    if rng.random() < (0.85 if action.nargs == 0 else 0.03):
        return [flag]
    word = value(rng, action, paths)
    return [f"{flag}={word}"] if rng.random() < 0.5 else [flag, word]


# ---- a case -----------------------------------------------------------------------------------

def outcome(main, argv):
    """What a call did: "done", "help" or "refused"; anything else is an AssertionError that shows
    the words. Output is encoded as a terminal's is."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", handler)
                for handler in ("strict", "backslashreplace"))
    code = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            answer = main(argv)
            out.flush()
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        raise AssertionError(f"{argv!r}: {type(error).__name__}: {error}") from error
    err.flush()
    line = err.buffer.getvalue().decode()
    if code is None:
        assert isinstance(answer, (dict, list)), f"{argv!r}: returned {type(answer)}"
        assert "error" not in line and "Traceback" not in line, f"{argv!r}: {line!r}"
        return "done"
    if code == 0:
        assert any(w in ("-h", "--help") or w.startswith("-h") for w in argv), f"{argv!r}: left"
        return "help"
    assert code == 2 and line.startswith("error: "), f"{argv!r}: exit code {code}, {line[:600]!r}"
    assert line.splitlines() == [line[:-1]] and line[:-1].isprintable(), f"{argv!r}: {line[:600]!r}"
    assert len(line) > 15, f"{argv!r}: {line!r}"
    return "refused"


# ---- the house that the cases run in ----------------------------------------------------------

@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    """A folder to copy: images, results with a teacher and five finished runs, odd files."""
    root = tmp_path_factory.mktemp("stocked")
    tiny.make_folder(root / "images", train=4, test=2)
    tiny.run(train_teacher, root / "images", root / "results", epochs=1)
    shutil.copy(root / "results/digits/teacher-s0/best.pt", root / "best.pt")
    make_six(root / "made", only=list(SIX)[1:])
    (root / "text").write_text("a text\n")
    (root / "cut.pt").write_bytes((root / "best.pt").read_bytes()[:900])
    (root / "empty").touch()
    (root / "folder").mkdir()
    (root / "circle").symlink_to("circle")
    (root / "nowhere").symlink_to("missing")
    for name in ("shut.pt", "shut"):
        (root / name).mkdir() if name == "shut" else (root / name).touch()
    return root


@pytest.fixture
def house(stocked, tmp_path, monkeypatch):
    """A fresh copy, entered; returns the paths to throw at flags. No network, tiny digits, small
    networks where one is really built to be looked at, no pictures, little memory."""
    house = tmp_path / "house"
    shutil.copytree(stocked, house, symlinks=True)
    monkeypatch.chdir(house)
    for name in ("shut.pt", "shut"):
        (house / name).chmod(0)
    monkeypatch.setattr(download, "transfer", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setattr(digits, "splits", functools.cache(
        lambda: {"train": digits.render(40, 0), "test": digits.render(20, 1)}))
    monkeypatch.setattr(device, "memory", lambda: 3 * 10**8)
    build = models.build
    monkeypatch.setattr(models, "build", lambda arch, *rest, **more: build(
        "mlp" if sys._getframe(1).f_code.co_name == "init" else arch, *rest, **more))
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: Image.new("RGB", (1, 1)).save(
        file, "PNG"))
    for name in ("draw_comparison", "draw_details"):
        monkeypatch.setattr(report, name, lambda *words: Image.new("RGB", (1, 1)).save(
            next(word for word in words if isinstance(word, Path))))
    yield ["made", "best.pt", *(path.name for path in house.iterdir()), house, house / "best.pt",
           "images/train/blue/0.png", "text/x", "missing/x", "results/digits/teacher-s0", "x" * 255]
    (house / "shut").chmod(0o700)


def listing():
    """All below results, and every file of a run wherever it lies."""
    return sorted(str(path) for path in Path().rglob("*") if path.parts[0] == "results"
                  or path.name in (*runs.RUN_FILES, "digits") or path.suffix == ".part")


def dry(name, rng):
    """Words in front of a case, so that it is cheap, harmless, and reaches all of the checks."""
    if name in TRAINING or name == "report sweep":
        words = tiny.words("images", "results", "--dry-run")
        return words + ["--teacher", "best.pt"] * (name == "distill" and rng.random() < 0.7)
    if name == "data":
        return ["--dataset", "folder", "--data-dir", "images", "--image-size", "16"]
    if name == "look":
        return ["predict", "best.pt", "images/train/blue/0.png"][:rng.choice((0, 1, 2, 3, 3, 3))]
    return []


GOOD = {        # words with which a command answers, where flags alone are not enough
    "common": ["--recipes"], "calc shape": ["3x16x16", "conv:4,k=3"], "calc mlp": ["5", "3", "1"],
    "calc attention": ["--width", "8", "--heads", "2", "--tokens", "3"],
    "calc vit": ["--image", "16x16", "--patch", "4", "--width", "8", "--depth", "1", "--heads", "2",
                 "--mlp", "8"],
    "calc rnn": ["--cell", "gru", "--input", "1", "--hidden", "2"], "calc arch": ["digits"],
    "calc init": ["digits"],
    "calc select": ["--programme", "btech", "--roll", "052", "--birth", "18/03/02"],
    "report report": ["--results-dir", "made"], "report publish": ["--results-dir", "made"],
    "report readme": ["--readme", "text"], "report html": ["--results-dir", "made"],
    "report sweep": ["--over", "lr=0.1"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_values_at_every_flag(house, name):
    """Each flag in turn, alone or with up to three others, or twice."""
    module, head, tail, parser = COMMANDS[name]
    rng, known, before, found = random.Random(name), actions(parser), listing(), Counter()
    for i in range(max(CASES.get(name, CASES.get(name.split()[0])), AT_A_FLAG * len(known))):
        chosen = [known[i % len(known)]]
        if rng.random() < 0.4:
            chosen += rng.choices([*known, *chosen], k=rng.randint(1, 3))
        lot = [word for action in chosen for word in typed(rng, action, house)]
        front = [*dry(name, rng), *GOOD.get(name, ())]
        argv = [*head, *(lot + front if rng.random() < 0.05 else front + lot), *tail]
        if name == "report sweep":
            argv = [*head, *GOOD[name], *lot, "--", "train_student.py",
                    *tiny.without(dry(name, rng), "lr")]
        elif name in TRAINING:
            argv.append("--dry-run")
        found[outcome(module.main, argv)] += 1
        if name in TRAINING or name == "report sweep":
            assert listing() == before, argv
    assert found["refused"] and found["done"], found


@pytest.mark.parametrize("name", COMMANDS)
def test_values_at_every_parser(name, house):
    """What argparse makes of a value: it takes it, or says in one way that it does not."""
    rng, parser = random.Random(name), COMMANDS[name][3]
    for action in [action for action in actions(parser) if action.nargs != 0]:
        for _ in range(AT_A_PARSER):
            word = value(rng, action, house)
            if word == "--":        # the parser refuses it before
                continue
            try:
                taken = parser._get_values(action, [word])
            except argparse.ArgumentError as error:
                assert str(error), (action.dest, word)
            else:
                numbers = taken if isinstance(taken, (list, tuple)) else [taken]
                assert all(math.isfinite(n) for n in numbers if isinstance(n, float)), word


# ---- what parses, and must not explode later --------------------------------------------------

@pytest.mark.parametrize("words", [
    "--lr 1e30 --weight-decay 1e6", "--lr 1e30 --optimizer sgd --weight-decay 1e6",
    "--lr 1e30 --optimizer adam --weight-decay 1e6", "--lr 1e-320 --clip 1e-300",
    "--batch-size 1000000 --seed 4294967295 --views 1000000 --ema-decay 0.9999999999999999",
    "--labels 4 --batch-size 1 --norm batch --val-fraction 0", "--image-size 1 --arch mlp"])
def test_a_run_at_the_bounds(easy, tmp_path, capsys, words):
    try:
        assert tiny.run(train_student, easy, tmp_path, *words.split(), epochs=1)["epochs"] == 1
    except SystemExit as stop:
        assert stop.code == 3
        assert capsys.readouterr().err.startswith("error: the loss is ")


@pytest.mark.parametrize("words", ["--temperature 1e6", "--temperature 1e-300", "--alpha 5e-324",
                                   "--noise 1,1,1e300,0"])
def test_a_distillation_at_the_bounds(easy, results, capsys, words):
    try:
        assert tiny.run(distill, easy, results, *words.split(), epochs=1)["epochs"] == 1
    except SystemExit as stop:
        assert stop.code == 3
        assert capsys.readouterr().err.startswith("error: the loss is ")


def test_images_and_networks_that_no_memory_holds(easy, tmp_path, capsys, monkeypatch):
    words = tiny.words(easy, tmp_path, "--image-size", 4096)
    monkeypatch.setattr(device, "memory", lambda: 10**9)
    tiny.refused(capsys, train_student, words, "240 images of 4096×4096", "24.2 GB", "1.0 GB",
                 "--image-size")
    monkeypatch.setattr(device, "memory", lambda: 10**5)
    with pytest.raises(SystemExit):
        models.build("mlp", 10, (3, 32, 32))
    line = capsys.readouterr().err
    assert "mlp, of 855,050 parameters" in line and "--arch" in line and line.count("\n") == 1


# ---- impossible together ----------------------------------------------------------------------

@pytest.mark.parametrize("words, parts", [
    ("--temperature 2 --objective consistency", ["--temperature 2.0", "--objective kd"]),
    ("--alpha 0.3 --objective consistency", ["--alpha 0.3", "--objective kd"]),
    ("--class-weight 0.3", ["--class-weight 0.3", "--objective consistency"]),
    ("--class-cost bce --objective kd-only", ["--class-cost bce", "kd-only"]),
    ("--ramp-up 3", ["--ramp-up 3"]), ("--warm-start 1", ["--warm-start 1"])])
def test_a_flag_of_another_objective(easy, results, capsys, words, parts):
    tiny.refused(capsys, distill, tiny.words(easy, results, *words.split()), *parts, "leave it out")


def test_what_cannot_be_frozen(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path, "--freeze", "features", "--dry-run")
    tiny.refused(capsys, train_student, [*words, "--arch", "mlp"], "--arch mlp", "no convolutions")
    assert train_student.main(words)
    assert "warning: --freeze features without --init-from" in tiny.said(capsys)


@pytest.mark.parametrize("words, runs", [
    ("", True), ("--unfreeze-at 3", True), ("--unfreeze-at 2", False), ("--freeze none", False),
    ("--ema-decay 0.9", False)])
def test_one_image_and_batchnorm_where_it_is_frozen(easy, tmp_path, capsys, words, runs):
    """One image has no deviation; frozen statistics need none, until they thaw."""
    words = tiny.words(easy, tmp_path, "--arch", "cifar10-he-max-teacher", "--image-size", 2,
                       "--batch-size", 1, "--norm", "batch", "--freeze", "features", "--dry-run",
                       *words.split())
    if runs:
        assert train_student.main(words)
    else:
        tiny.refused(capsys, train_student, words, "--norm batch", "--batch-size 1")


def test_resume_names_what_differs(easy, tmp_path, capsys):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    (tmp_path / "digits/student-s0/final.json").unlink()
    tiny.refused(capsys, train_student, tiny.words(
        easy, tmp_path, "--resume", "--arch", "mlp", epochs=1), "begun with other settings",
        "arch digits-student (asked for: mlp)", "--overwrite", "--run")


def test_a_dry_sweep_makes_nothing(easy, tmp_path):
    found = report.main(["sweep", "--over", "lr=0.1,0.2", "--", "train_student.py", *tiny.without(
        tiny.words(easy, tmp_path / "results", "--dry-run"), "lr")])
    assert found["rows"] == [] and not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a\nb", "x" * 300])
def test_a_sweep_s_name_is_one_folder_s(easy, tmp_path, capsys, name):
    tiny.refused(capsys, report, ["sweep", "--over", "lr=0.1", "--name", name, "--",
                                  "train_student.py",
                                  *tiny.without(tiny.words(easy, tmp_path / "r"), "lr")],
                 "--name", "plain folder name")
    assert not (tmp_path / "r").exists()
