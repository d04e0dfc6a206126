"""Runs of the three scripts on small folders: that they learn, what they say and leave behind."""
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common
import data
import distill
import look
import models
import report
import train_student
import train_teacher

# Section 4 of the design, and what was added to it: the version of the file, the average's last.
FINAL = {
    "recipe", "run", "script", "seed", "arch", "parameters", "macs", "epochs", "best_epoch",
    "ema_best_epoch", "val_accuracy", "test_accuracy", "test_loss", "ema_val_accuracy",
    "ema_test_accuracy", "last_test_accuracy", "learned", "seconds", "images_per_second",
    "setup_seconds", "teacher_seconds", "peak_memory_bytes", "device", "precision", "torch",
    "schema", "ema_last_test_accuracy", "recomputed_val_accuracy", "recomputed_test_accuracy",
    "weights_sha256"}
METRICS = (
    "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "ema_val_loss",
    "ema_val_accuracy", "lr", "seconds", "images_per_second")
SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py"}


@pytest.fixture(params=tiny.SIX)
def finished(chain, request):
    """Each of the six runs: its name, folder and final dict."""
    results, finals = chain
    return request.param, results / "digits" / request.param, finals[request.param]


# ---- it learns --------------------------------------------------------------------------------

def test_every_run_learns_what_is_easy(finished):
    name, folder, final = finished
    assert final["learned"] is True
    assert final["val_accuracy"] > 0.9 and final["test_accuracy"] > 0.9    # chance is 0.25
    rows = tiny.metrics(folder)
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    if final["ema_test_accuracy"] is not None:
        assert final["ema_test_accuracy"] > 0.9


def test_twelve_plain_convs_learn_but_not_with_gain_1(easy, tmp_path, capsys):
    recipe = ("--recipe", "tinyimagenet-kd", "--image-size", 8)
    finals = {init: tiny.run(train_teacher, easy, tmp_path / init, *recipe, "--init", init,
                             "--optimizer", "sgd", "--lr", 0.05, epochs=3)
              for init in ("he", "xavier", "xavier-gain1")}
    assert finals["he"]["val_accuracy"] > 0.7 and finals["xavier"]["val_accuracy"] > 0.7
    assert finals["xavier-gain1"]["learned"] is False
    printed = tiny.said(capsys)
    assert printed.count("nothing learned") == 1 and "loss sits at ln(4) = 1.386" in printed

    for init, verdict in (("xavier", "cannot tell"), ("xavier-gain1", "no conclusion")):
        tiny.run(train_student, easy, tmp_path / init, *recipe, "--arch", "digits-student",
                 epochs=tiny.ENOUGH)
        made, *_ = report.build("tinyimagenet-kd", tmp_path / init)
        assert [(entry["title"], entry["best"]["verdict"]) for entry in made["comparisons"]] == [
            ("student alone - teacher", verdict)]
        doubt = [note for note in made["notes"] if "No conclusion from teacher-s0" in note]
        assert len(doubt) == (verdict == "no conclusion")


def test_a_run_that_cannot_learn_says_so(noise, tmp_path, capsys):
    final = tiny.run(train_student, noise, tmp_path, "--val-fraction", 0.5, epochs=3)
    printed = tiny.said(capsys)
    assert final["learned"] is False
    assert printed.count("warning: nothing learned in 1") == 1 and "--init he" in printed
    assert "learned nothing" in printed.split("warning:")[-1]


def test_a_teacher_that_knows_nothing_is_a_warning_and_no_refusal(noise, tmp_path, capsys):
    tiny.run(train_teacher, noise, tmp_path, "--val-fraction", 0.5, epochs=1)
    capsys.readouterr()
    final = tiny.run(distill, noise, tmp_path, "--val-fraction", 0.5, epochs=1)
    assert "warning: this teacher is not above chance" in tiny.said(capsys)
    assert final["run"] == "kd-s0" and final["learned"] is False


def test_few_labels_and_many_images(easy, results, capsys):
    # A step of consistency holds 4 labelled and 12 unlabelled rows; the student alone sees 16.
    taught = tiny.run(distill, easy, results, "--objective", "consistency", "--labels", 16,
                      "--ema-decay", 0.8, epochs=8)
    assert "120 train (104 unlabelled; 4 of a batch are labelled)" in tiny.said(capsys)
    alone = tiny.run(train_student, easy, results, "--labels", 16, epochs=2)
    assert "16 train, 40 validation" in tiny.said(capsys)
    assert taught["learned"] and taught["val_accuracy"] > 0.8 and alone["epochs"] == 2


@pytest.mark.parametrize("labels, size, share", [(16, 16, 4), (80, 16, 11), (4, 2, 1)])
def test_a_start_says_how_many_of_a_batch_are_labelled(easy, tmp_path, capsys, labels, size, share):
    tiny.run(distill, easy, tmp_path, "--objective", "consistency", "--labels", labels,
             "--batch-size", size, "--dry-run")
    assert f"{120 - labels} unlabelled; {share} of a batch are labelled" in tiny.said(capsys)
    splits = data.load("folder", easy, labels, 0.25, image_size=tiny.SIDE)
    batches = list(data.Batches(splits.train, splits.mean, splits.std, size).epoch(1))
    assert {(len(batch.y), int((batch.y >= 0).sum())) for batch in batches} == {(size, share)}


@pytest.mark.parametrize("flags", [
    ("--optimizer", "sgd", "--lr", 0.05, "--schedule", "cosine"), ("--norm", "batch"),
    ("--optimizer", "adam", "--weight-decay", 0, "--schedule", "constant", "--clip", 0),
    ("--arch", "mlp", "--lr", 0.003), ("--activation", "ahaf", "--pool", "avg"),
    ("--precision", "bf16", "--init", "xavier"), ("--views", 2, "--augment", "flip-crop")])
def test_it_learns_with_other_flags(easy, tmp_path, flags):
    final = tiny.run(train_student, easy, tmp_path, *flags, epochs=tiny.ENOUGH)
    assert final["val_accuracy"] > 0.9


# ---- what a run leaves ------------------------------------------------------------------------

def test_final_json(finished):
    name, folder, final = finished
    assert set(final) == FINAL
    assert json.loads((folder / "final.json").read_text()) == final
    kind = name.removesuffix("-s0")
    assert final["run"] == name and final["recipe"] == "digits" and final["seed"] == 0
    assert final["script"] == SCRIPTS.get(kind, "distill.py")
    assert final["arch"] == f"digits-{'teacher' if kind == 'teacher' else 'student'}"
    for key in ("val_accuracy", "test_accuracy", "last_test_accuracy"):
        assert 0 <= final[key] <= 1
    averaged = kind == "mean-teacher"
    for key in ("ema_best_epoch", "ema_val_accuracy", "ema_test_accuracy",
                "ema_last_test_accuracy"):
        assert (final[key] is not None) == averaged
    assert final["recomputed_val_accuracy"] is final["recomputed_test_accuracy"] is None
    clocks = [final["setup_seconds"], final["teacher_seconds"] or 0.0,
              *(float(row["seconds"]) for row in tiny.metrics(folder, clocks=True))]
    assert final["seconds"] >= sum(clocks) and final["setup_seconds"] > 0
    if kind.startswith("kd"):           # 40 validation images take the teacher a moment
        assert final["teacher_seconds"] > 1e-4
    else:
        assert final["teacher_seconds"] is None
    speeds = [float(r["images_per_second"]) for r in tiny.metrics(folder, clocks=True)]
    assert final["images_per_second"] == pytest.approx(np.median(speeds[1:]))


def test_metrics_csv(finished):
    name, folder, final = finished
    rows = tiny.metrics(folder, clocks=True)
    assert tuple(rows[0]) == METRICS
    assert [row["epoch"] for row in rows] == [str(e) for e in range(1, tiny.ENOUGH + 1)]
    for prefix, key in (("val", ""), ("ema_val", "ema_")):
        values = [row[f"{prefix}_accuracy"] for row in rows]
        if final[f"{key}best_epoch"] is None:
            assert set(values) == {""}
        else:
            values = [float(v) for v in values]
            assert final[f"{key}val_accuracy"] == max(values)
            assert final[f"{key}best_epoch"] == values.index(max(values)) + 1
    assert rows[-1]["lr"] == str(0.01 * common.schedule("onecycle", 7 * tiny.ENOUGH - 1,
                                                        7 * tiny.ENOUGH))


def test_config_json(finished):
    name, folder, final = finished
    config = json.loads((folder / "config.json").read_text())
    assert (config["epochs"], config["batch_size"], config["lr"]) == (tiny.ENOUGH, 16, 0.01)
    assert config["arch"] == final["arch"] and config["dataset"] == "folder"
    assert len(config["data_key"]) == 64 and config["versions"]["torch"] == torch.__version__
    if name.startswith("kd"):
        teacher = tiny.load(folder.parent / "teacher-s0" / "best.pt")["model"]
        assert config["teacher_sha256"] == models.weights_sha256(teacher)
    assert not list(folder.glob(".*"))              # nothing half written is left


def test_best_pt_alone_classifies_images(finished, easy):
    name, folder, final = finished
    card = tiny.load(folder / "best.pt")
    assert card["epoch"] == final["best_epoch"] and card["recipe"] == "digits"
    assert final["weights_sha256"] == models.weights_sha256(card["model"])
    assert card["classes"] == sorted(tiny.COLOURS)
    paths = sorted(easy.glob("test/*/*.png"))
    x = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    x = torch.tensor((x - card["mean"]) / card["std"], dtype=torch.float32).permute(0, 3, 1, 2)
    y = torch.tensor([card["classes"].index(path.parent.name) for path in paths])
    for key, prefix in (("model", ""), ("ema", "ema_")):
        if final[f"{prefix}test_accuracy"] is None:
            assert card[key] is None
            continue
        model = models.build(**card["build"])
        model.load_state_dict(card[key])
        with torch.no_grad():
            hits = (model.eval()(x).argmax(1) == y).float().mean().item()
        assert hits == pytest.approx(final[f"{prefix}test_accuracy"])
    assert models.count_parameters(model) == final["parameters"]
    assert models.count_macs(model, (3, 16, 16)) == final["macs"]


def test_predict_on_pictures_of_ones_own(chain, easy, capsys):
    folder, final = chain[0] / "digits" / "mean-teacher-s0", chain[1]["mean-teacher-s0"]
    paths = sorted(easy.glob("test/*/*.png"))
    for average, prefix in ((False, ""), (True, "ema_")):
        found = look.predict(folder, paths, average)
        hits = sum(one["class"] == path.parent.name
                   for one, path in zip(found, paths, strict=True))
        assert hits / len(paths) == pytest.approx(final[f"{prefix}test_accuracy"])
        assert all(one["probability"] == max(p for _, p in one["top"]) <= 1 for one in found)
    look.main(["predict", str(folder), str(paths[0])])
    assert str(paths[0]) in tiny.said(capsys)
    tiny.refused(capsys, look, ["predict", folder, easy / "no.png"], easy / "no.png")
    tiny.refused(capsys, look, ["predict", easy, paths[0]], easy)
    tiny.refused(capsys, look, ["predict", "--average", folder.parent / "kd-s0", paths[0]], "kd-s0",
                 "--ema-decay")


def test_last_test_accuracy_is_of_the_last_weights(chain, easy):
    splits = data.load("folder", easy, image_size=tiny.SIDE, val_fraction=0.25)
    for name, final in chain[1].items():
        folder = chain[0] / "digits" / name
        model = models.build(**tiny.load(folder / "best.pt")["build"])
        for key, prefix in (("model", ""), ("ema", "ema_")):
            if final[f"{prefix}test_accuracy"] is not None:
                model.load_state_dict(tiny.load(folder / "checkpoint.pt")["networks"][key])
                found = common.evaluate(model, data.Batches(splits.test, splits.mean, splits.std,
                                                            64))
                assert found["accuracy"] == final[f"{prefix}last_test_accuracy"]


def accuracy(model, batches):
    with torch.no_grad():
        return torch.cat([model.eval()(b.x).argmax(1) == b.y for b in batches]).float().mean()


def remeasured(folder, images):
    """Accuracy on validation and test of a run's average, each BatchNorm's statistics set to the
    mean, over the batches of the last epoch, of their means and unbiased variances."""
    card, config = tiny.load(folder / "best.pt"), json.loads((folder / "config.json").read_text())
    model = models.build(**card["build"])
    model.load_state_dict(card["ema"])
    splits = data.load("folder", images, None, 0.25, image_size=tiny.SIDE)
    train, val, test = (data.Batches(split, splits.mean, splits.std, 16, augment=config["augment"])
                        for split in splits[:3])
    inputs = {layer: [] for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0]))
             for layer in inputs]
    with torch.no_grad():
        for batch in train.epoch(config["epochs"]):
            model.train()(batch.x)
    for layer, seen in inputs.items():
        layer.running_mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        layer.running_var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    for hook in hooks:
        hook.remove()
    return accuracy(model, val), accuracy(model, test)


@pytest.mark.parametrize("folder, rate, epochs, best", [("easy", 0.002, 2, 2),
                                                        ("noise", 0.006, 4, 3)])
def test_the_average_with_its_statistics_measured_anew(folder, rate, epochs, best, tmp_path,
                                                       request):
    images = request.getfixturevalue(folder)
    final = tiny.run(distill, images, tmp_path, "--objective", "consistency", "--ema-decay", 0.8,
                     "--norm", "batch", "--lr", rate, "--schedule", "constant", epochs=epochs)
    assert final["ema_best_epoch"] == best, "choose another rate: best and last must be seen apart"
    val, test = remeasured(tmp_path / "digits" / "mean-teacher-s0", images)
    assert final["recomputed_val_accuracy"] == pytest.approx(val.item())
    assert final["recomputed_test_accuracy"] == pytest.approx(test.item())
    assert final["recomputed_test_accuracy"] != final["ema_test_accuracy"]

    plain = tiny.run(train_student, images, tmp_path, "--norm", "batch", epochs=1)   # no average
    assert plain["recomputed_val_accuracy"] is plain["recomputed_test_accuracy"] is None
    rows = {row["key"]: row for row in report.main(["--results-dir", str(tmp_path)])["rows"]}
    assert list(rows) == ["student", "mean-teacher", "mean-teacher/average",
                          "mean-teacher/recomputed"]
    row = rows["mean-teacher/recomputed"]
    assert row["test_accuracy"]["values"] == [final["recomputed_test_accuracy"]]
    assert row["last_test_accuracy"]["values"] == [None]        # not recorded
    lines = (tmp_path / "digits" / "report.md").read_text().splitlines()
    written = next(line for line in lines if "mean teacher, recomputed |" in line)
    assert written.split("|")[7:9] == [f" {100 * test:.2f} ", " - "]


def test_normalise_half_reaches_best_pt_and_predictions(easy, tmp_path):
    tiny.run(train_student, easy, tmp_path, "--normalise", "half")
    card = tiny.load(tmp_path / "digits" / "student-s0" / "best.pt")
    assert card["mean"] == card["std"] == (0.5, 0.5, 0.5)
    model = models.build(**card["build"]).eval()
    model.load_state_dict(card["model"])
    paths = sorted(easy.glob("test/*/0.png"))
    x = np.stack([np.asarray(Image.open(path)) for path in paths]) / 127.5 - 1
    with torch.no_grad():
        shares = model(torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)).softmax(1)
    found = look.predict(tmp_path / "digits" / "student-s0", paths)
    assert [one["probability"] for one in found] == pytest.approx(shares.amax(1).tolist(), rel=1e-4)


def test_curves_are_drawn(easy, tmp_path):
    tiny.run(train_student, easy, tmp_path, curves=True)
    assert min(Image.open(tmp_path / "digits" / "student-s0" / "curves.png").size) > 200


def test_run_names(easy, results):
    for flags, name in (
            (("--seed", 3), "student-s3"), (("--run", "mine"), "mine")):
        assert tiny.run(train_student, easy, results, *flags, epochs=1)["run"] == name
    for flags, name in (
            (("--teacher", "ema", "--ema-decay", 0.5), "kd-ema-s0"),
            (("--objective", "kd-only", "--teacher", "ema", "--ema-decay", 0.5), "kd-only-ema-s0"),
            (("--objective", "consistency"), "mean-teacher-s0"),
            (("--objective", "consistency", "--ema-decay", 0), "mean-teacher-no-ema-s0"),
            (("--objective", "consistency", "--teacher",
              results / "digits" / "teacher-s0" / "best.pt"), "consistency-s0")):
        assert tiny.run(distill, easy, results, *flags, epochs=1)["run"] == name


# ---- which epoch counts -----------------------------------------------------------------------

def fickle(folder, results, *flags, epochs):
    """A run whose validation accuracy goes up and down: on noise, at a constant rate."""
    return tiny.run(train_student, folder, results, "--schedule", "constant", "--lr", 0.003,
                    *flags, epochs=epochs)


def test_best_pt_holds_the_weights_after_the_best_epoch(noise, tmp_path):
    final = fickle(noise, tmp_path, epochs=6)
    assert 1 <= final["best_epoch"] < 6, "choose another seed: the last epoch is no test"
    fickle(noise, tmp_path / "short", epochs=final["best_epoch"])
    run = "digits/student-s0"
    best = tiny.load(tmp_path / run / "best.pt")["model"]
    assert tiny.same(best, tiny.load(tmp_path / "short" / run / "checkpoint.pt")["networks"][
        "model"])
    assert not tiny.same(best, tiny.load(tmp_path / run / "checkpoint.pt")["networks"]["model"])


def test_the_test_split_chooses_nothing(noise, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "train").symlink_to(noise / "train")
    tiny.make_folder(tmp_path / "easy", train=1, test=7)
    (other / "test").symlink_to(tmp_path / "easy" / "test")
    fickle(noise, tmp_path / "a", epochs=4)
    fickle(other, tmp_path / "b", epochs=4)
    a, b = (tiny.outcome(tmp_path / x / "digits" / "student-s0") for x in "ab")
    for one in (a, b):      # a hash of all data, the test images among them
        assert one["best"].pop("settings") == one["state"].pop("settings")
    assert tiny.same([a["best"], a["metrics"], a["state"]], [b["best"], b["metrics"], b["state"]])
    differs = {key for key in a["final"] if a["final"][key] != b["final"][key]}
    assert "test_loss" in differs and differs <= {"test_loss", "test_accuracy",
                                                  "last_test_accuracy"}


def test_without_validation_the_last_epoch_counts(easy, tmp_path):
    final = tiny.run(train_student, easy, tmp_path, "--val-fraction", 0, "--ema-decay", 0.5,
                     epochs=tiny.ENOUGH)
    assert final["best_epoch"] == final["ema_best_epoch"] == tiny.ENOUGH
    assert final["val_accuracy"] is None and final["ema_val_accuracy"] is None
    assert final["test_accuracy"] == final["last_test_accuracy"] > 0.9 and final["learned"] is True
    folder = tmp_path / "digits" / "student-s0"
    for row in tiny.metrics(folder):
        assert row["val_loss"] == row["val_accuracy"] == row["ema_val_accuracy"] == ""
    assert tiny.same(tiny.load(folder / "best.pt")["model"],
                     tiny.load(folder / "checkpoint.pt")["networks"]["model"])


# ---- data sets by name ------------------------------------------------------------------------

def test_the_default_recipe_on_some_of_its_digits(few_digits, tmp_path):
    final = train_student.main(["--data-dir", str(tmp_path / "data"), "--results-dir",
                                str(tmp_path), "--epochs", "1", "--device", "cpu"])
    assert final["recipe"] == "digits" and final["run"] == "student-s0"
    config = json.loads((tmp_path / "digits" / "student-s0" / "config.json").read_text())
    expected = tiny.settings("digits", "student") | dict(
        epochs=1, device="cpu", results_dir=str(tmp_path), data_dir=str(tmp_path / "data"),
        precision=final["precision"])
    expected = {k: v for k, v in expected.items() if k in config}
    assert {k: config[k] for k in expected} == expected
    assert {"lr", "augment", "arch", "init", "batch_size", "schedule", "views"} <= expected.keys()
