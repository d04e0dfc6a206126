"""calc.py's answers to the reports, and its command line."""
import itertools
import json
import re
import subprocess
import sys

import pytest
from test_calc import HOUSE, RECIPES, VIT_B, ask, complete, count

import calc
import flags
import models

# ---- the reports ---------------------------------------------------------------------------------

T12, T7 = "12 conv + 1 pool, 12 filters first", "7 conv + 1 pool, 6 filters first"
UNKNOWN, UNKNOWN_FC = "unknown, the recipe's own stays", "unknown, each network's own stays"


@pytest.mark.parametrize("words, values", [
    ("mtech --roll 061 --birth 21/06", ["Tiny ImageNet", "Xavier, average", T12, "4 conv + 1 pool",
                                        "one hidden FC of 512"]),                     # report 000
    ("mtech --roll 003 --birth 21/06/1999", ["Tiny ImageNet", "Xavier, average", T12,
                                             "4 conv + 1 pool", "one hidden FC of 512"]),     # 001
    ("btech --roll 052 --birth 18/03/02", ["CIFAR-10", "He, max", T7, "2 conv + 1 pool",
                                           "one hidden FC of 256"]),                          # 002
    ("btech --roll 051 --birth 17/04", ["SVHN"] + [UNKNOWN] * 3 + [UNKNOWN_FC]),              # 004
    ("btech --roll 056 --birth 17/04", ["CIFAR-10", UNKNOWN, UNKNOWN, UNKNOWN,
                                        "one hidden FC of 256"]),
    ("mtech --roll 004 --birth 18/03", ["Tiny ImageNet", UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN_FC]),
    ("btech --guess --roll 051 --birth 17/04", ["SVHN", "Xavier, average (a guess)",
                                                "8 conv (a guess)", "4 conv + 1 pool (a guess)",
                                                UNKNOWN_FC]),
    ("btech --guess --roll 052 --birth 18/03/02", ["CIFAR-10", "He, max", T7, "2 conv + 1 pool",
                                                   "one hidden FC of 256"]),
])
def test_select(words, values):
    answer = ask(f"select --programme {words}")
    assert list(answer["choices"]) == ["data", "init and pool", "teacher", "student", "classifier"]
    assert [choice["value"] for choice in answer["choices"].values()] == values


def test_select_names_what_is_missing_and_marks_guesses(capsys):
    for programme, roll, day, month, guess in itertools.product(
            ("btech", "mtech"), ("051", "052", "053", "054", "058", "059"), ("17", "18"),
            ("03", "04"), ("", " --guess")):
        words = f"select --programme {programme} --roll {roll} --birth {day}/{month}{guess}"
        choices = ask(words)["choices"].values()
        out = capsys.readouterr().out
        for choice in choices:
            assert f"{choice['value']}\n    {choice['why']}\n" in out
            assert ("GUESS" in choice["why"]) == ("a guess" in choice["value"]) <= bool(guess)
            if "unknown" in choice["value"]:
                assert choice["flags"] == "" and "rule: " not in choice["why"]
            elif not guess:
                assert choice["why"].startswith("rule: ")


def test_select_says_where_a_network_has_another_hidden_layer(monkeypatch):
    """No flag sets that layer: it comes with --arch, or with the recipe."""
    for recipe in RECIPES:
        complete(monkeypatch, recipe)
    seen = set()
    for programme, roll, day, guess in itertools.product(
            ("btech", "mtech"), range(50, 62), (17, 18), ("", " --guess")):
        answer = ask(f"select --programme {programme} --roll {roll:03} --birth {day}/03{guess}")
        found, others = answer["choices"]["classifier"], {}
        for role, command in zip(("teacher", "student"), answer["commands"], strict=False):
            words = dict(zip(*[iter(command.split()[2:])] * 2, strict=True))
            arch = words.get("--arch", flags.settings(words["--recipe"], role)["arch"])
            (width,) = models.ARCHITECTURES[arch]["hidden"]
            if "FC of" in found["value"] and not found["value"].endswith(f" {width}"):
                others[role] = width
        who = "networks have" if len(others) == 2 else f"{''.join(others)} has"
        seen.add(who)
        assert found["why"].endswith(f"{who} {max(others.values())}" if others else ")") or (
            "unknown" in found["value"] and not others), (answer, others)
    assert seen == {" has", "teacher has", "student has", "networks have"}


def test_select_prints_commands_that_exist(capsys):
    answer = ask("select --programme btech --roll 052 --birth 18/03/02")
    assert answer["commands"] == [
        "python train_teacher.py --recipe cifar10-he-max --init he --pool max "
        "--arch cifar10-he-max-teacher",
        "python train_student.py --recipe cifar10-he-max --init he --pool max "
        "--arch cifar10-he-max-student",
        "python distill.py --recipe cifar10-he-max --init he --pool max "
        "--arch cifar10-he-max-student"]
    assert capsys.readouterr().out.splitlines()[-3:] == answer["commands"]
    known = {"--recipe": RECIPES, "--init": models.INITS, "--pool": models.POOLS,
             "--arch": models.ARCHITECTURES}
    for rules in json.loads(calc.REPORTS.read_text("utf-8"))["selection"].values():
        for rule in rules:
            words = rule["flags"].split()
            assert all(value in known[flag] for flag, value in zip(words[::2], words[1::2],
                                                                   strict=True))


def test_every_answer_of_section_five():
    questions = {q["point"]: q for q in ask("reports")["questions"]}
    assert list(questions) == list(range(1, 13))

    def verdicts(point):
        return [(check["true"], check["printed"], check["verdict"])
                for check in questions[point]["checks"]]

    def answer(point, place=0):
        return questions[point]["answers"][place]

    assert verdicts(1) == [(n, n, "right") for n in (127, 63, 30)]
    assert verdicts(2) == [
        (127, 126, "wrong"), (170, 169, "wrong"), (63, 62, "wrong"), (56, 56, "right"),
        (30, 30, "right"), (53, 53, "right"), (29, 30, "wrong")]
    assert verdicts(3) == [(521, 521, "right"), (100, 100, "right")]
    assert (answer(3)["weights"], answer(3)["biases"], answer(3)["updates"]) == (510, 11, 10_000)
    assert answer(3)["unknown"] and len(answer(3)["gradients"]) > 4
    assert verdicts(4) == [
        (2432, 2400, "wrong"), (18496, 18496, "right"), (8388736, 3211776, "wrong"),
        (0, 16384, "wrong"), (8409664, 3238672, "wrong"), (8409664, 3255056, "wrong"),
        (401536, 3211776, "wrong")]
    assert "2 400 + 18 496 + 3 211 776 = 3 232 672" in " ".join(questions[4]["remark"])
    assert 2400 + 18496 + 3211776 == 3232672
    assert verdicts(5) == [([100, 100], [100, 100], "right"), ([8, 8], [8, 8], "right"),
                           ([400, 100], [400, 100], "right")]
    usual = {row["layer"]: row["output"] for row in answer(5)["layers"]}
    assert usual["W_Q, W_K, W_V of each head"] == [100, 25]
    assert usual["W_O, the last linear layer"] == [100, 100]
    assert answer(6)["tokens"] == answer(6, 1)["tokens"] == 3 * 196 + 1
    assert answer(7)["lstm"] == 4 * answer(7)["rnn"] and answer(7)["gru"] == 3 * answer(7)["rnn"]
    assert questions[7]["answers"][0]["gradient_log10"]["100"] < -4
    assert questions[7]["answers"][1]["gradient_log10"]["100"] > 4
    assert answer(9)["layers"][2]["parameters"] == count(models.AHAF()) == 2
    assert answer(10)["parameters"] == answer(10, 1)["parameters"]
    assert answer(11)["layers"][1]["parameters"] == 2570


def test_reports_are_computed_not_stored(monkeypatch, capsys):
    stored = json.loads(calc.REPORTS.read_text("utf-8"))["questions"]
    assert all({"point", "report", "question", "commands", "checks", "remark"} == set(q)
               for q in stored)
    assert all({"what", "of", "path", "printed"} == set(c) for q in stored for c in q["checks"])
    monkeypatch.setitem(calc.KINDS, "conv", (*calc.KINDS["conv"][:3], "out·c", "·H·W"))
    wrong = ask("reports")["questions"][3]["checks"][1]
    assert wrong["true"] != 18496 and wrong["verdict"] == "wrong"
    assert "second conv: " + calc.shown(wrong["true"]) in capsys.readouterr().out


# ---- the command line ----------------------------------------------------------------------------

TORCHLESS = [
    "shape 3x64x64 conv:out=32,k=5,s=1,p=2 max:k=2 conv:out=64,k=3,p=1 flatten fc:128 dropout:0.5",
    "mlp 50 10 1 --samples 1000 --batch-size 10 --epochs 100",
    "attention --tokens 8 --width 100 --heads 4",
    " ".join(VIT_B),
    "rnn --cell lstm --input 1 --hidden 64 --layers 2 --bidirectional",
    "select --programme btech --roll 052 --birth 18/03/02",
    "reports",
]


def test_torch_is_not_loaded_for_what_needs_none():
    code = ("import sys, calc\n"
            "for words in sys.argv[1:]:\n"
            "    calc.main(words.split())\n"
            "    heavy = {'torch', 'torchvision', 'numpy', 'matplotlib'} & set(sys.modules)\n"
            "    assert not heavy, (words, heavy)\n")
    subprocess.run([sys.executable, "-c", code, *TORCHLESS], cwd=HOUSE, check=True,
                   stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [*TORCHLESS, "arch digits"])
def test_json_is_the_dict(words, capsys):
    answer = ask(words + " --json")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out) == answer
    assert ask(words) == answer
    assert not capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize("words", [*TORCHLESS, "arch digits"])
def test_fits_80_columns(words, capsys):
    ask(words)
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80 or "python " in line, line


def test_columns_stand_apart(capsys):
    """One space parts thousands, so two part columns, however large the numbers."""
    answer = ask([*VIT_B, "--depth", "99", "--pages", "3"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MLPs")]
    assert answer["layers"][5]["macs"] > 10**11
    assert re.split("  +", rows[0]) == [
        "MLPs", "589×768", *map(calc.shown, (answer["layers"][5][key]
                                             for key in ("parameters", "macs")))]


def test_examples_and_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    examples = [line.split("calc.py ")[1] for line in calc.__doc__.splitlines()
                if line.startswith("    python calc.py")]
    assert [words.split()[0] for words in examples] == list(calc.COMMANDS)
    for words in examples:
        if not words.startswith("init"):         # takes seconds; tested above
            assert ask(words)
    capsys.readouterr()
    for name in ["", *calc.COMMANDS]:
        with pytest.raises(SystemExit) as stop:
            ask([*[name] * bool(name), "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert "usage: " in out and "[--flag value" not in out
        assert all(len(line) <= 80 for line in out.splitlines()), out
    with pytest.raises(SystemExit):
        ask("shape --help")
    out = capsys.readouterr().out
    assert all(f"\n  {kind}" in out for kind in calc.KINDS)


def test_as_a_user_types_it():
    done = subprocess.run([sys.executable, "calc.py", "shape", "256x256", "conv:out=1,k=5,s=2,p=1"],
                          cwd=HOUSE, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    assert "floor((256 + 2·1 − 5) / 2) + 1 = 127" in done.stdout
    done = subprocess.run([sys.executable, "calc.py", "shape", "3x3", "max:5"], cwd=HOUSE,
                          capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
def test_a_reader_that_leaves_is_no_error():
    with subprocess.Popen([sys.executable, "calc.py", "reports"], cwd=HOUSE, text=True,
                          encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
