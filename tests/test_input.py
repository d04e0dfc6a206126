"""Wrong input: one line that names the value, what is allowed and what to do; exit code 2; nothing
made. Most in this process, a few as the user types them.
"""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

import common
import data
import distill
import train_student
import train_teacher
from flags import words as words_of

HOUSE = Path(common.__file__).parent


@pytest.fixture
def folder(tmp_path):
    return tiny.make_folder(tmp_path / "root", train=4, test=2)


def best(results):
    return results / "digits" / "teacher-s0" / "best.pt"


# ---- the command line -------------------------------------------------------------------------

def test_a_home_folder_behind_an_equals_sign(tmp_path, monkeypatch):
    """Bash leaves the ~ there as it is, and `rm -r ~` would take back more than was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = train_student.main(["--data-dir=~/d", "--results-dir", "~/r", "--dry-run"])
    assert config["data_dir"] == str(tmp_path / "home/d")
    assert config["results_dir"] == str(tmp_path / "home/r")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_value_that_looks_like_a_flag(capsys):
    tiny.refused(capsys, train_student, ["--data-dir", "-images"], "--data-dir", "--flag=-value")


@pytest.mark.parametrize("script, words", [
    *((name, ()) for name in ("common", "data", "train_teacher", "train_student", "distill", "look",
                              "calc", "report")),
    ("report", ("sweep",)), ("report", ("publish",)), ("look", ("predict",))])
def test_help_fits_80_columns(script, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        __import__(script).main([*words, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and len(lines) > 8
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("launcher", [
    "/x/site-packages/ipykernel_launcher.py", "/x/site-packages/ipykernel/__main__.py",
    "/usr/local/lib/python3.12/dist-packages/colab_kernel_launcher.py"])
def test_main_in_a_notebook_does_not_take_the_kernels_words(launcher, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [launcher, "-f", "/root/kernel-1.json"])
    assert words_of(None) == []
    monkeypatch.setattr(sys, "argv", ["report.py", "--recipe", "x"])       # after %run
    assert words_of(None) == ["--recipe", "x"]


# ---- flags ------------------------------------------------------------------------------------

FLAGS = [
    (("--bogus", 1), ("--bogus",)),
    (("extra",), ("extra",)),
    (("--epoch", 3), ("--epoch",)),                     # no abbreviations
    (("--recip", "digits"), ("--recip",)),
    (("--recipe", "imagenet"), ("--recipe", "imagenet", "digits", "cifar10-he-max")),
    (("--dataset", "mnist"), ("--dataset", "mnist", "folder")),
    (("--arch", "resnet"), ("--arch", "resnet", "digits-student")),
    (("--init", "orthogonal"), ("--init", "orthogonal", "he", "xavier-gain1")),
    (("--pool", "mean"), ("--pool", "mean", "max", "avg")),
    (("--activation", "tanh"), ("--activation", "tanh", "ahaf")),
    (("--norm", "layer"), ("--norm", "layer", "none", "batch")),
    (("--optimizer", "lamb"), ("--optimizer", "lamb", "adamw", "sgd")),
    (("--schedule", "step"), ("--schedule", "step", "onecycle")),
    (("--augment", "rotate"), ("--augment", "rotate", "flip-crop")),
    (("--fit", "squash"), ("--fit", "squash", "crop", "pad")),
    (("--device", "tpu"), ("--device", "tpu", "cpu")),
    (("--precision", "fp16"), ("--precision", "fp16", "bf16")),
    (("--batch-size", 0), ("--batch-size", "'0'", "1")),
    (("--batch-size", "many"), ("--batch-size", "many")),
    (("--epochs", -1), ("--epochs", "'-1'", "1", "100000")),
    (("--epochs", 0), ("--epochs", "'0'")),
    (("--epochs", 100_001), ("--epochs", "100001")),
    (("--epochs", 1.5), ("--epochs", "1.5", "whole")),
    (("--epochs",), ("--epochs", "argument")),
    (("--lr", "nan"), ("--lr", "nan", "above 0")),
    (("--lr", "inf"), ("--lr", "inf")),
    (("--lr", 0), ("--lr", "'0'", "above 0")),
    (("--lr", -0.1), ("--lr", "-0.1")),
    (("--weight-decay", -1), ("--weight-decay", "-1")),
    (("--clip", -1), ("--clip", "-1")),
    (("--val-fraction", 1), ("--val-fraction", "'1'", "below 1")),
    (("--val-fraction", -0.1), ("--val-fraction", "-0.1")),
    (("--val-fraction", 0.999), ("--val-fraction", "0.999", "none of 160")),
    (("--ema-decay", 1), ("--ema-decay", "'1'", "below 1")),
    (("--views", -1), ("--views", "-1")),
    (("--seed", -1), ("--seed", "-1")),
    (("--seed", 2 ** 32), ("--seed", str(2 ** 32))),
    (("--labels", 41), ("--labels 41", "multiple of the 4 classes")),
    (("--labels", 160), ("--labels 160", "120")),       # 40 are held out
    (("--labels", 0), ("--labels", "'0'", "all")),
    (("--image-size", 0), ("--image-size", "'0'")),
    (("--image-size", 4, "--arch", "svhn-xavier-avg-teacher"), ("4×4", "--image-size")),
    (("--run", "a/b"), ("--run", "a/b")),
    (("--run", ".."), ("--run", "..")),
    (("--dataset", "digits", "--image-size", 16), ("--image-size 16", "32")),
    # a single value has no deviation, which BatchNorm divides by
    (("--arch", "cifar10-he-max-teacher", "--norm", "batch", "--image-size", 2, "--batch-size", 1),
     ("--norm batch", "--batch-size 1")),
]
TAUGHT = [
    (("--objective", "none"), ("--objective", "none", "kd-only", "consistency")),
    (("--temperature", 0), ("--temperature", "'0'", "above 0")),
    (("--temperature", "nan"), ("--temperature", "nan")),
    (("--alpha", 1.5), ("--alpha", "1.5")),
    (("--alpha", -0.5), ("--alpha", "-0.5")),
    (("--objective", "kd-only", "--alpha", 0.5), ("--alpha 0.5", "kd-only", "--objective kd")),
    (("--objective", "consistency", "--class-weight", 2), ("--class-weight", "'2'")),
    (("--objective", "consistency", "--class-cost", "mse"), ("--class-cost", "mse", "bce")),
    (("--objective", "consistency", "--ramp-up", -1), ("--ramp-up", "-1")),
    (("--objective", "consistency", "--warm-start", -1), ("--warm-start", "-1")),
    (("--noise", "0.5,0.5,0.1"), ("--noise", "0.5,0.5,0.1", "P1,P2,RHO1,RHO2")),
    (("--noise", "2,0,0.1,0.1"), ("--noise", "2,0,0.1,0.1")),
    (("--noise", "1,1,nan,0"), ("--noise", "nan")),
    (("--teacher", "ema", "--ema-decay", 0), ("--ema-decay 0", "--teacher ema")),
    # a batch of one row cannot hold a labelled and an unlabelled one: no label would be seen
    (("--objective", "consistency", "--labels", 40, "--batch-size", 1), ("--batch-size",)),
]


def name(case):
    return " ".join(map(str, case)) if isinstance(case, tuple) else None


@pytest.mark.parametrize("script", [train_student, train_teacher, distill])
@pytest.mark.parametrize("flags, parts", FLAGS[:4], ids=name)
def test_a_wrong_flag_of_any_script(easy, results, capsys, script, flags, parts):
    tiny.refused(capsys, script, tiny.words(easy, results, *flags), *parts)


@pytest.mark.parametrize("flags, parts", FLAGS[4:], ids=name)
def test_a_wrong_value(easy, tmp_path, capsys, flags, parts):
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path / "results", *flags), *parts)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flags, parts", TAUGHT, ids=name)
def test_a_wrong_value_of_distill(easy, results, capsys, flags, parts):
    tiny.refused(capsys, distill, tiny.words(easy, results, *flags), *parts)
    assert [path.name for path in (results / "digits").iterdir()] == ["teacher-s0"]


def test_a_typed_flag_wins_over_the_recipe(easy, results):
    for flags in ((), ("--alpha", 0.5), ("--objective", "consistency", "--seed", 7)):
        config = distill.main(tiny.words(easy, results, "--dry-run", "--teacher", best(results),
                                         *flags))
        recipe = tiny.settings("digits", "consistency" if "--seed" in flags else "kd")
        assert config["alpha"] == (0.5 if "--alpha" in flags else recipe["alpha"])
        assert config["ema_decay"] == recipe["ema_decay"] and config["arch"] == recipe["arch"]
        assert config["seed"] == (7 if "--seed" in flags else 0)
        assert config["lr"] == 0.01 and config["batch_size"] == 16
    assert tiny.settings("digits", "consistency")["ema_decay"] > 0


# ---- folders of images ------------------------------------------------------------------------

def refused(capsys, folder, results, *parts, flags=()):
    return tiny.refused(capsys, train_student, tiny.words(folder, results, *flags), *parts)


def test_a_folder_that_is_not_there(tmp_path, capsys):
    refused(capsys, tmp_path / "nowhere", tmp_path, tmp_path / "nowhere", "train/<class>")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_that_is_not_there(folder, tmp_path, capsys, part):
    shutil.rmtree(folder / part)
    refused(capsys, folder, tmp_path, folder, f"no folder {part}")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_folder_without_images(folder, tmp_path, capsys, part):
    for path in (folder / part / "grey").iterdir():
        path.unlink()
    refused(capsys, folder, tmp_path, folder / part / "grey", "without images")


@pytest.mark.parametrize("part", ["train", "test"])
def test_classes_that_differ_between_train_and_test(folder, tmp_path, capsys, part):
    shutil.copytree(folder / part / "grey", folder / part / "yellow")
    refused(capsys, folder, tmp_path, folder, "'yellow'", f"only in {part}")


def test_one_class_is_too_few(folder, tmp_path, capsys):
    for part in ("train", "test"):
        for colour in ("blue", "green", "grey"):
            shutil.rmtree(folder / part / colour)
    refused(capsys, folder, tmp_path, folder, "at least 2")


@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_an_image_that_does_not_decode(folder, tmp_path, capsys, damage):
    path = folder / "test" / "green" / "1.png"
    path.write_bytes({"text": b"no image\n", "empty": b"", "cut": path.read_bytes()[:300]}[damage])
    refused(capsys, folder, tmp_path / "results", path)
    assert not (tmp_path / "results").exists()


def test_a_bomb_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    line = refused(capsys, folder, tmp_path, folder / "train" / "blue" / "0.png")
    assert "decompression bomb" in line


def test_too_few_images_of_a_class_for_the_labels(folder, tmp_path, capsys):
    (folder / "train" / "red" / "0.png").unlink()
    refused(capsys, folder, tmp_path, "--labels 16", "12",
            flags=("--labels", 16, "--val-fraction", 0))


def test_load_takes_known_names_only(capsys):
    with pytest.raises(SystemExit):
        data.load("mnist")
    assert "mnist" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be(easy, tmp_path, capsys):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "student-s0").write_text("a file")
    refused(capsys, easy, tmp_path, tmp_path / "digits" / "student-s0", "a file")


# ---- teachers ---------------------------------------------------------------------------------

def test_a_teacher_that_is_not_there_and_the_command_that_trains_it(easy, tmp_path, capsys):
    results = tmp_path / "my results"               # to be pasted into a shell as it stands
    words = tiny.words(easy, results)
    line = tiny.refused(capsys, distill, words, results / "digits" / "teacher-s0" / "best.pt",
                        "python train_teacher.py --recipe digits")
    command = shlex.split(line.split("train it with: ", 1)[1])
    assert command[:2] == ["python", "train_teacher.py"]
    tiny.refused(capsys, distill, [*words, "--seed", 4], "teacher-s4", "--seed 4")
    train_teacher.main([*command[2:], "--epochs", "1", "--batch-size", "16"])
    assert tiny.run(distill, easy, results, epochs=1)["run"] == "kd-s0"


def test_a_teacher_typed_that_is_not_there(easy, tmp_path, capsys):
    for path in (tmp_path / "no.pt", tmp_path):
        tiny.refused(capsys, distill, tiny.words(easy, tmp_path, "--teacher", path), path, "ema")


@pytest.mark.parametrize("kind", ["text", "cut", "state", "checkpoint"])
def test_a_teacher_that_is_no_checkpoint(easy, results, tmp_path, capsys, kind):
    path = tmp_path / "teacher.pt"
    if kind == "text":
        path.write_text("weights\n")
    elif kind == "cut":
        path.write_bytes(best(results).read_bytes()[:-1000])
    elif kind == "state":
        common.save_checkpoint(path, tiny.load(best(results))["model"])
    else:
        shutil.copy(best(results).with_name("checkpoint.pt"), path)
    tiny.refused(capsys, distill, tiny.words(easy, results, "--teacher", path), path)
    assert not (results / "digits" / "kd-s0").exists()


@pytest.mark.parametrize("change", [
    lambda card: card["build"].update(arch="another"), lambda card: card["model"].popitem(),
    lambda card: card.update(schema=99)], ids=["arch", "weights", "schema"])
def test_a_teacher_from_another_version(easy, results, capsys, change):
    card = tiny.load(best(results))
    change(card)
    common.save_checkpoint(best(results), card)
    tiny.refused(capsys, distill, tiny.words(easy, results))


def test_a_teacher_of_other_classes_is_refused_by_name(folder, results, capsys):
    for part in ("train", "test"):
        (folder / part / "red").rename(folder / part / "orange")
    tiny.refused(capsys, distill, tiny.words(folder, results), best(results), "'orange'")
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "orange")
    tiny.refused(capsys, distill, tiny.words(folder, results), best(results), "4 classes", "has 3",
                 "'red'")


def test_a_teacher_of_other_images_is_refused_by_shape(easy, results, capsys):
    words = tiny.words(easy, results, "--image-size", 24)
    tiny.refused(capsys, distill, words, best(results), "(3, 16, 16)", "(3, 24, 24)")


# ---- as the user types it ---------------------------------------------------------------------

def typed(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_errors_in_a_shell(easy, tmp_path):
    for script, flags, part in (("train_student.py", ("--batch-size", 0), "--batch-size"),
                                ("distill.py", tiny.words(easy, tmp_path / "r"), "train it with")):
        found = typed(HOUSE / script, *flags, cwd=tmp_path)
        assert found.returncode == 2 and found.stdout == ""
        assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
        assert part in found.stderr and "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_importing_any_script_does_nothing_but_define(tmp_path):
    scripts = sorted(path.stem for path in HOUSE.glob("*.py"))
    assert {"common", "models", "data", "train_teacher", "train_student", "distill"} <= set(scripts)
    lines = f"import sys; sys.path.insert(0, {str(HOUSE)!r}); import {', '.join(scripts)}"
    found = typed("-c", lines, "--bogus", cwd=tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- found by readers -------------------------------------------------------------------------

def test_a_warm_start_without_augmentation_is_no_silent_teacher(easy, tmp_path):
    """In a warm start the average is the student, and says the same for more than 20 steps."""
    final = tiny.run(distill, easy, tmp_path, "--objective", "consistency", "--warm-start", 1,
                     "--augment", "none", "--ema-decay", 0.9, "--batch-size", 4)
    assert final["epochs"] == 2


def test_class_folders_under_a_published_name(easy, tmp_path, capsys):
    tiny.refused(capsys, data, ["--dataset", "cifar10", "--data-dir", easy], easy,
                 "--dataset folder")
    assert not (easy / ".download").exists()


def test_an_empty_folder_is_not_a_data_set(tmp_path, capsys):
    (tmp_path / "tiny-imagenet-200").mkdir()
    tiny.refused(capsys, data, ["--dataset", "tinyimagenet", "--data-dir", tmp_path, "--download"],
                 tmp_path / "tiny-imagenet-200", "remove the whole folder")


def test_a_teacher_of_more_labels_is_a_warning(easy, results, tmp_path, capsys):
    few = ("--labels", 40)
    tiny.run(distill, easy, results, *few)
    assert "warning: this teacher learned from all labels, the student has 40" in tiny.said(capsys)
    tiny.run(train_teacher, easy, results, *few, "--overwrite")
    tiny.run(distill, easy, results, *few, "--overwrite")
    assert "labels, the student has" not in tiny.said(capsys)
    tiny.refused(capsys, distill, tiny.words(easy, tmp_path, *few), "--labels 40")


@pytest.mark.parametrize("words, parts", [
    (("--init-from", "{teacher}"), ["none of its weights fits", "digits-teacher"]),
    (("--init-from", "{folder}"), ["a folder", "best.pt"]),
    (("--unfreeze-at", 2), ["--unfreeze-at 2", "--freeze features"])])
def test_weights_to_start_from(easy, chain, tmp_path, capsys, words, parts):
    folder = chain[0] / "digits" / "teacher-s0"
    words = [str(word).format(teacher=folder / "best.pt", folder=folder) for word in words]
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, *words), *parts)
    assert not (tmp_path / "digits").exists()


def test_what_is_put_into_the_images_is_announced(easy, tmp_path, capsys):
    tiny.run(distill, easy, tmp_path, "--objective", "consistency", "--noise", "0.5,0.2,0.3,0.1",
             "--dry-run")
    assert "Gaussian of deviation 0.3 for 0.5 of the images; 0.1 of the pixels erased for 0.2" in (
        tiny.said(capsys))
    config = distill.main(tiny.words(easy, tmp_path, "--recipe", "tinyimagenet-meanteacher",
                                     "--noise", "0,0,0,0", "--dry-run"))
    assert config["noise"] is None


def test_a_warm_start_that_never_ends(easy, tmp_path, capsys):
    tiny.refused(capsys, distill, tiny.words(easy, tmp_path, "--objective", "consistency",
                                             "--warm-start", 2), "--warm-start 2 of 2 epochs")


@pytest.mark.parametrize("flags, parts", [
    (("--warm-start", 1), ("--warm-start 1", "--objective kd", "leave it out")),
    (("--objective", "consistency", "--ema-decay", 0, "--augment", "none"),
     ("--ema-decay 0", "--augment none", "--noise"))], ids=name)
def test_flags_of_distill_that_cannot_go_together(easy, results, capsys, flags, parts):
    tiny.refused(capsys, distill, tiny.words(easy, results, *flags), *parts)
    assert [path.name for path in (results / "digits").iterdir()] == ["teacher-s0"]


def test_a_student_that_reads_no_label_is_warned_of(easy, results, capsys):
    tiny.run(distill, easy, results, "--objective", "consistency", "--class-weight", 0,
             "--dry-run")
    assert "warning: --class-weight 0: no label is read" in tiny.said(capsys)


def test_a_teacher_is_not_measured_where_no_image_was_held_out(easy, results, capsys):
    tiny.run(distill, easy, results, "--val-fraction", 0, "--dry-run")
    assert "no validation images to measure it on" in tiny.said(capsys)


def test_a_picture_that_cannot_be_written(easy, tmp_path, capsys):
    path = tmp_path / "absent" / "a.png"
    tiny.refused(capsys, data, ["--dataset", "folder", "--data-dir", easy, "--image-size", 16,
                                "--show", 4, "--out", path], path, "--out FILE")


def test_a_finished_run_without_its_config(easy, tmp_path, capsys):
    folder = tmp_path / "digits" / "student-s0"
    folder.mkdir(parents=True)
    (folder / "final.json").write_text("{}")
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path), folder,
                 "final.json without config.json", "--overwrite")
