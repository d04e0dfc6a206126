"""Bad input: one line that names the value, what is allowed and what to do; exit code 2;
nothing made. And what --help and the defaults say."""
import importlib
import subprocess
import sys

import pytest
import tiny

import common
import distill
import recipes
import train_student
import train_teacher

TRAINING = [train_student, train_teacher, distill]
SCRIPTS = ["recipes", "data", "train_teacher", "train_student", "distill", "calc", "report",
           "look", "sweep"]


def name(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else None


def script_name(value):
    return getattr(value, "__name__", None)


# ---- the command line ---------------------------------------------------------------

@pytest.mark.parametrize("script", TRAINING, ids=script_name)
@pytest.mark.parametrize("flags, parts", [
    (("--bogus", 1), ["--bogus", "--help"]), (("extra",), ["extra"]),
    (("--epoch", 3), ["--epoch"]),                      # no abbreviations
    (("--batch-size", "many"), ["--batch-size", "'many'", "whole number"]),
    (("--recipe", "imagenet"), ["imagenet", "digits", "cifar10-he-max"]),
    (("--dataset", "mnist"), ["--dataset", "mnist", "folder"]),
    (("--data-dir", "-images"), ["--data-dir", "--flag=-value"]),
    (("--data-dir", ""), ["--data-dir", "empty path"]),
    (("--run", "a/b"), ["--run 'a/b'", "slashes"])], ids=name)
def test_a_wrong_flag_of_any_script(easy, results, capsys, script, flags, parts):
    tiny.refused(capsys, script, tiny.words(easy, results, *flags), *parts)
    assert [path.name for path in (results / "digits").iterdir()] == ["teacher-s0"]


WRONG = [
    (("--arch", "resnet"), "digits-student"), (("--init", "orthogonal"), "xavier-gain1"),
    (("--pool", "mean"), "avg"), (("--activation", "tanh"), "ahaf"),
    (("--norm", "layer"), "batch"), (("--optimizer", "lamb"), "sgd"),
    (("--schedule", "step"), "onecycle"), (("--augment", "rotate"), "flip-crop"),
    (("--fit", "squash"), "pad"), (("--device", "tpu"), "cpu"),
    (("--precision", "fp16"), "bf16"),
    (("--batch-size", 0), "--batch-size: '0' is not a whole number from 1"),
    (("--epochs", 1.5), "--epochs: '1.5' is not a whole number from 1"),
    (("--epochs",), "--epochs: expected one argument"),
    (("--lr", "nan"), "--lr: 'nan' is not a number above 0"), (("--lr", 0), "above 0"),
    (("--lr=-0.1",), "above 0"), (("--weight-decay=-1",), "--weight-decay: '-1' is not a"),
    (("--clip", "inf"), "--clip: 'inf'"), (("--val-fraction", 1), "--val-fraction: '1' is not"),
    (("--val-fraction", 0.999), "--val-fraction 0.999 leaves none of 160"),
    (("--ema-decay", 1), "below 1"), (("--views=-1",), "--views"),
    (("--seed", 2 ** 32), "--seed"),
    (("--labels", 41), "--labels 41: must be a multiple of the 4 classes"),
    (("--labels", 0), "or all"), (("--labels", 160), "120"),        # 40 are held out
    (("--image-size", 0), "--image-size"), (("--run", ".."), "--run '..'"),
    (("--run", ""), "plain folder name"), (("--run", "x" * 201), "200 characters"),
    (("--image-size", 4, "--arch", "svhn-xavier-avg-teacher"), "--image-size"),
    (("--dataset", "digits", "--image-size", 16), "--image-size 16: digits is 32×32"),
    (("--dataset", "digits", "--image-size", 32, "--skip-bad"), "--skip-bad: digits"),
    (("--unfreeze-at", 2), "--freeze features"), (("--freeze", "all"), "features"),
    (("--freeze", "features", "--arch", "mlp"), "no convolutions"),
    (("--init-from", "no.pt"), "no.pt: no such file"),
    # a single value has no deviation, which BatchNorm divides by
    (("--batch-size", 1, "--norm", "batch"), "--batch-size 1 with BatchNorm"),
]


@pytest.mark.parametrize("flags, part", WRONG, ids=name)
def test_a_wrong_value(easy, tmp_path, capsys, flags, part):
    words = tiny.words(easy, tmp_path / "results", *flags)
    tiny.refused(capsys, train_student, words, part)
    assert not (tmp_path / "results").exists()


def test_weights_to_start_from_that_fit_nothing(easy, results, capsys):
    teacher = results / "digits/teacher-s0/best.pt"
    words = tiny.words(easy, results, "--init-from", teacher, "--arch", "mlp")
    tiny.refused(capsys, train_student, words, teacher, "none of its weights fits mlp", "--arch")


@pytest.mark.parametrize("run", ["new\nline", "\x1b[31m", "\udcff", " "])
def test_names_that_would_break_a_line_are_refused(easy, tmp_path, capsys, run):
    words = tiny.words(easy, tmp_path, f"--run={run}")
    line = tiny.refused(capsys, train_student, words, "--run")
    assert "\x1b" not in line


def test_escape_codes_are_written_out():
    written = recipes.printable("\x1b[31mred\x07 \n\udcff 猫 λ")
    assert written == r"\x1b[31mred\x07 \n\udcff 猫 λ"


def test_a_home_folder_behind_an_equals_sign(few_digits, tmp_path, monkeypatch):
    """Bash leaves the ~ there as it is, and `rm -r ~` would take back more than was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = train_student.main(["--data-dir=~/d", "--results-dir", "~/r", "--dry-run"])
    assert config["data_dir"] == str(tmp_path / "home/d")
    assert config["results_dir"] == str(tmp_path / "home/r")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


# ---- folders ------------------------------------------------------------------------

def test_a_data_folder_that_is_not_there(easy, tmp_path, capsys):
    for root in (tmp_path / "nowhere", easy / "train/red/0.png", easy / "train"):
        words = tiny.words(root, tmp_path / "results")
        tiny.refused(capsys, train_student, words, root, "train/<class>")
    assert not (tmp_path / "results").exists()


def test_a_file_where_the_results_should_be(easy, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path / "file"), tmp_path / "file")
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "student-s0").write_text("")
    words = tiny.words(easy, tmp_path)
    tiny.refused(capsys, train_student, words, tmp_path / "digits/student-s0")


# ---- help and defaults --------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_80_columns(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and len(lines) > 8
    assert [line for line in lines if len(line) > 80] == []


def test_recipes_need_no_torch(tmp_path):
    code = ("import sys\n"
            "sys.modules.update(torch=None, numpy=None, torchvision=None)\n"
            "import recipes\n"
            "recipes.main(['--runs', 'digits'])\n"
            "recipes.main(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, text=True,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("teacher student kd") and "--runs" in done.stdout
    done = subprocess.run([sys.executable, tiny.ROOT / "recipes.py", "--run", "x"], text=True,
                          cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_a_data_set_without_a_recipe(easy, tmp_path):
    argv = ["--dataset", "folder", "--data-dir", str(easy), "--results-dir", str(tmp_path),
            "--dry-run"]
    config = train_student.main(argv)
    assert (config["recipe"], config["image_size"]) == ("folder", 32)
    assert config["augment"] == "flip-crop" and config["arch"] == "cifar10-he-max-student"
    assert train_student.main([*argv, "--recipe", "digits"])["recipe"] == "digits"

    def parsed(*words):
        return recipes.parse("", ("student",), common.REGISTRIES, words)

    svhn, digits = parsed("--dataset", "svhn"), parsed()
    assert (svhn.recipe, svhn.augment) == ("svhn", "crop")       # no mirrored house numbers
    assert (digits.recipe, digits.arch) == ("digits", "digits-student")
    cifar = parsed("--dataset", "cifar10")
    assert (cifar.recipe, cifar.augment) == ("cifar10", "flip-crop")
    assert parsed("--dataset", "svhn", "--augment", "none").augment == "none"


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_recipe_sets_the_defaults(recipe):
    for section in ("teacher", "student"):
        args = recipes.parse("", (section,), common.REGISTRIES, ["--recipe", recipe])
        expected = recipes.settings(recipe, section)
        assert args.recipe == recipe
        found = vars(args)
        del found["recipe"]
        assert found == {key: expected[key] for key in found}
