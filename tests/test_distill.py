"""The student and its teacher: which teachers are taken, which flags are read, what a run is
called, and what it warns of."""
import shlex
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch

import common
import distill
import models
import train_teacher

CONSISTENCY = ("--objective", "consistency")


@pytest.fixture
def best(results):
    return results / "digits" / "teacher-s0" / "best.pt"


def dry(easy, results, *flags):
    """Return the config of a run that is not made."""
    return tiny.run(distill, easy, results, "--dry-run", *flags)


def taught(results):
    """Return the runs that are there besides the teacher's."""
    return [path.name for path in (results / "digits").iterdir() if path.name != "teacher-s0"]


# ---- which teachers are taken -------------------------------------------------------

def test_a_missing_teacher_and_the_command_that_trains_it(easy, tmp_path, capsys):
    results = tmp_path / "my results"           # to be pasted into a shell as it stands
    words = tiny.words(easy, results, "--seed", 4)
    line = tiny.refused(capsys, distill, words, results / "digits/teacher-s4/best.pt",
                        "no such file", "train it with: python train_teacher.py --recipe digits")
    command = shlex.split(line.split("train it with: ")[1])
    more = ["--epochs", "1", "--precision", "fp32"]
    assert train_teacher.main([*command[2:], *more])["run"] == "teacher-s4"
    assert distill.main(words)["run"] == "kd-s4"

    plain = ["--dataset", "folder", "--data-dir", easy, "--results-dir", results]
    line = tiny.refused(capsys, distill, plain, results / "folder/teacher-s0/best.pt")
    command = shlex.split(line.split("train it with: ")[1])[2:]
    assert "--recipe" not in command
    config = train_teacher.main([*command, "--dry-run"])
    assert (config["recipe"], config["results_dir"]) == ("folder", str(results))
    assert config["arch"] == "cifar10-he-max-teacher"


def test_few_labels_are_in_the_command_too(easy, tmp_path, capsys):
    words = tiny.words(easy, tmp_path, "--labels", 40)
    tiny.refused(capsys, distill, words, "train it with", "--labels 40", "--val-fraction 0.25")


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut", "state", "checkpoint"])
def test_a_teacher_that_is_no_best_pt(easy, results, best, tmp_path, capsys, kind):
    path = tmp_path / "teacher.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("weights\n")
    elif kind == "cut":
        path.write_bytes(best.read_bytes()[:-1000])
    elif kind == "state":
        models.save_checkpoint(path, tiny.load(best)["model"])
    elif kind == "checkpoint":
        shutil.copy(best.with_name("checkpoint.pt"), path)
    tiny.refused(capsys, distill, tiny.words(easy, results, "--teacher", path), path)
    assert not taught(results)


@pytest.mark.parametrize("change", [
    lambda card: card["build"].update(arch="another"), lambda card: card["model"].popitem(),
    lambda card: card["build"].update(hidden=(3,)), lambda card: card.update(model=None)],
    ids=["arch", "weights", "build", "no weights"])
def test_a_teacher_that_does_not_fit_its_own_card(easy, results, best, capsys, change):
    card = tiny.load(best)
    change(card)
    models.save_checkpoint(best, card)
    tiny.refused(capsys, distill, tiny.words(easy, results))
    assert not taught(results)


def test_a_teacher_whose_outputs_are_not_finite(easy, results, best, capsys):
    card = tiny.load(best)
    card["model"] = {name: value * 1e20 for name, value in card["model"].items()}
    models.save_checkpoint(best, card)
    tiny.refused(capsys, distill, tiny.words(easy, results), f"--teacher {best}", "not finite")


def test_a_teacher_of_other_classes_is_refused_by_name(results, best, tmp_path, capsys):
    folder = tiny.make_folder(tmp_path / "root", train=4, test=2)
    for part in ("train", "test"):
        (folder / part / "red").rename(folder / part / "orange")
    tiny.refused(capsys, distill, tiny.words(folder, results), best, "'orange'")
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "orange")
    tiny.refused(capsys, distill, tiny.words(folder, results), best, "4 classes", "has 3",
                 "'red'")


def test_a_teacher_of_images_of_another_size(easy, results, best, capsys):
    tiny.refused(capsys, distill, tiny.words(easy, results, "--image-size", 24), best,
                 "(3, 16, 16)", "(3, 24, 24)", "--image-size")


@pytest.mark.parametrize("mean, std", [
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))])
def test_a_teacher_sees_the_images_as_it_learned_them(best, mean, std):
    """The student's normalisation, --normalise half say, is undone and the teacher's done."""
    network, card = models.load(best)
    network.double()
    run = SimpleNamespace(device=torch.device("cpu"), args=SimpleNamespace(objective="kd"),
                          splits=SimpleNamespace(mean=mean, std=std))
    teacher = distill.frozen_teacher(network, card, run)
    pixels = torch.rand(9, 3, 16, 16, dtype=torch.float64)

    def normalised(mean, std):
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    found = teacher(normalised(mean, std).requires_grad_()).logits
    expected = network(normalised(card["mean"], card["std"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    own = SimpleNamespace(device=run.device, args=run.args,
                          splits=SimpleNamespace(mean=card["mean"], std=card["std"]))
    same = distill.frozen_teacher(network, card, own)
    x = normalised(card["mean"], card["std"])
    assert torch.equal(same(x).logits, network(x))      # bit for bit


def test_a_student_of_another_normalisation_learns(easy, results):
    final = tiny.run(distill, easy, results, "--normalise", "half", epochs=tiny.ENOUGH)
    assert final["val_accuracy"] > 0.9


def test_the_teacher_stays_as_it_was(easy, results, best, monkeypatch):
    networks = []

    def spy(network, card, run, usual=distill.frozen_teacher):
        networks.append(network)
        return usual(network, card, run)

    monkeypatch.setattr(distill, "frozen_teacher", spy)
    before = best.read_bytes()
    tiny.run(distill, easy, results, "--norm", "batch")
    assert best.read_bytes() == before and not networks[0].training
    assert tiny.same(dict(networks[0].state_dict()), tiny.load(best)["model"])


def test_a_warm_start_is_no_silent_teacher(easy, results):
    """In it the average is the student, and says the same for more than 20 steps."""
    final = tiny.run(distill, easy, results, *CONSISTENCY, "--warm-start", 1, "--augment",
                     "none", "--ema-decay", 0.9, "--batch-size", 4)
    assert final["epochs"] == 2


# ---- flags and names ----------------------------------------------------------------

@pytest.mark.parametrize("flags, part", [
    (("--objective", "kd-only", "--alpha", 0.5), "--alpha with --objective kd-only"),
    (("--warm-start", 1), "--objective consistency"),
    (("--class-cost", "bce"), "--class-cost with --objective kd"),
    ((*CONSISTENCY, "--temperature", 2), "--objective kd or kd-only"),
    (("--warm-start", 2, *CONSISTENCY), "--warm-start 2 of 2 epochs"),
    (("--teacher", "ema", "--ema-decay", 0), "--ema-decay 0 with --teacher ema"),
    ((*CONSISTENCY, "--ema-decay", 0, "--augment", "none"), "--augment none and no --noise"),
    (("--cache", "--noise", "1,0,0.1,0"), "--cache with --noise"),
    (("--cache", "--teacher", "ema", "--ema-decay", 0.9), "--cache with --teacher ema"),
    (("--cache", *CONSISTENCY), "--cache with --teacher ema"),
    ((*CONSISTENCY, "--labels", 40, "--batch-size", 1), "--batch-size 1 with --labels 40"),
    (("--objective", "none"), "kd-only"), (("--temperature", 0), "above 0"),
    (("--alpha", 1.5), "from 0 to 1"), ((*CONSISTENCY, "--class-cost", "mse"), "bce"),
    (("--noise", "0.5,0.5,0.1"), "P1,P2,RHO1,RHO2"), (("--noise", "1,1,nan,0"), "nan")],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)))
def test_what_cannot_be(easy, results, capsys, flags, part):
    tiny.refused(capsys, distill, tiny.words(easy, results, *flags), part)
    assert not taught(results)


def test_run_names(easy, results, best, monkeypatch):
    folders = []
    monkeypatch.setattr(common, "fit", lambda run, *more: folders.append(run.folder))
    for flags, name in (
            ((), "kd-s0"), (("--seed", 3, "--teacher", best), "kd-s3"),
            (("--run", "mine"), "mine"), (("--objective", "kd-only"), "kd-only-s0"),
            (("--teacher", "ema", "--ema-decay", 0.5), "kd-ema-s0"),
            (("--objective", "kd-only", "--teacher", "ema", "--ema-decay", 0.5),
             "kd-only-ema-s0"),
            (CONSISTENCY, "mean-teacher-s0"),
            ((*CONSISTENCY, "--ema-decay", 0), "mean-teacher-no-ema-s0"),
            ((*CONSISTENCY, "--teacher", best), "consistency-s0")):
        tiny.run(distill, easy, results, *flags)
        assert folders[-1] == results / "digits" / name


@pytest.mark.parametrize("flags, reads, formula", [
    ((), {"temperature", "alpha"}, "KL"),
    (("--objective", "kd-only"), {"temperature"}, "KL"),
    (CONSISTENCY, {"class_weight", "class_cost", "ramp_up", "warm_start"}, "MSE")])
def test_a_config_holds_the_flags_that_are_read(easy, results, flags, reads, formula):
    config = dry(easy, results, *flags)
    every = {"temperature", "alpha", "class_weight", "class_cost", "ramp_up", "warm_start"}
    assert config.keys() & every == reads
    assert formula in config["minimises"]
    for flag in reads:
        shown = config[flag] if isinstance(config[flag], str) else f"{config[flag]:g}"
        assert shown in config["minimises"]


def test_a_typed_flag_wins_over_the_recipe(easy, results):
    config = dry(easy, results, "--alpha", 0.5)
    assert config["alpha"] == 0.5 and config["lr"] == 0.01 and config["ema_decay"] == 0
    assert dry(easy, results, *CONSISTENCY)["ema_decay"] > 0
    assert dry(easy, results, "--teacher", "ema")["ema_decay"] > 0
    off = dry(easy, results, "--recipe", "tinyimagenet-meanteacher", "--noise", "0,0,0,0")
    assert off["noise"] is None and off["objective"] == "consistency"


# ---- what it says -------------------------------------------------------------------

def test_warnings_of_a_teacher(easy, results, capsys):
    dry(easy, results)
    printed = tiny.said(capsys)
    assert "validation accuracy" in printed and "warning:" not in printed
    dry(easy, results, "--val-fraction", 0.5)
    assert "warning: this teacher held out fewer images" in tiny.said(capsys)
    dry(easy, results, "--labels", 40)
    assert "warning: this teacher learned from all labels, the student has 40" in (
        tiny.said(capsys))
    dry(easy, results, "--val-fraction", 0)
    assert "no validation images to measure it on" in tiny.said(capsys)
    dry(easy, results, *CONSISTENCY, "--class-weight", 0)
    assert "warning: --class-weight 0: no label is read" in tiny.said(capsys)


def test_a_teacher_at_chance_is_a_warning_and_no_refusal(noise, tmp_path, capsys):
    tiny.run(train_teacher, noise, tmp_path, "--val-fraction", 0.5, epochs=1)
    capsys.readouterr()
    final = tiny.run(distill, noise, tmp_path, "--val-fraction", 0.5, epochs=1)
    assert "warning: this teacher is not above chance" in tiny.said(capsys)
    assert final["run"] == "kd-s0" and final["learned"] is False


def test_a_start_says_what_it_will_do(easy, results, capsys):
    dry(easy, results, *CONSISTENCY, "--noise", "0.5,0.2,0.3,0.1", "--labels", 16)
    printed = tiny.said(capsys)
    assert "student, consistency: digits-student, 6,992 parameters" in printed
    assert "120 train (104 unlabelled; 4 of a batch are labelled)" in printed
    assert "λ·cost(labels) + (1−λ)·ramp·MSE(softmaxes of two views)" in printed
    assert ("Gaussian of deviation 0.3 for 0.5 of the images; 0.1 of the pixels erased for 0.2"
            in printed)


@pytest.mark.parametrize("flags", [(), (*CONSISTENCY, "--ema-decay", 0.8)])
def test_few_labels_and_many_images(easy, results, flags):
    final = tiny.run(distill, easy, results, *flags, "--labels", 16, epochs=8)
    assert final["learned"] and final["val_accuracy"] > 0.8
