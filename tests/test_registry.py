"""One registration a thing: a new objective, network, data set and recipe, each by its one
entry, from the command line to report.md."""
import csv
import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import data
import distill
import models
import recipes
import report
import train_student
import train_teacher

FEW = ("--epochs", 3, "--batch-size", 16, "--lr", 0.01, "--device", "cpu", "--precision", "fp32")


def words(*flags):
    return [str(flag) for flag in flags]


# ---- what a user would write --------------------------------------------------------

def hint(student, teacher, batch, args, adapter):
    """FitNets (arXiv 1412.6550), on the last maps, with a weight flag of its own."""
    adapted = adapter(student.maps[-1])
    target = teacher.maps[-1].detach()
    return {"hint": (args.hint_weight, F.mse_loss(adapted, target)),
            "labels": (1.0, distill.class_cost(student.logits, batch.y, "ce"))}


def hint_adapter(student, teacher, image_shape):
    images = torch.zeros(1, *image_shape)
    with torch.no_grad():
        inputs, outputs = student.maps(images)[-1], teacher.maps(images)[-1]
    return nn.Conv2d(inputs.shape[1], outputs.shape[1], 1)


HINT = dict(
    loss=hint, reads={"hint-weight": "w"}, needs=("features",), adapter=hint_adapter,
    formula="w·MSE(adapter(maps) − teacher's maps) + CE(labels)",
    flags={"hint-weight": (0.5, recipes.number(float, 0), "weight of the hint")})


def with_batchnorm(image_shape, num_classes):
    features = nn.Sequential(nn.Conv2d(image_shape[0], 8, 3, padding=1), nn.BatchNorm2d(8),
                             nn.ReLU(), nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return models.Network(features, classifier)


def read_stripes(root):
    """Upright or lying stripes, 16×16, with validation images of its own."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 80), ("val", 24), ("test", 40)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 120, (count, 16, 16, 3), np.uint8)
        for image, label in zip(images, labels, strict=True):
            stripes = image.swapaxes(0, 1) if label else image
            stripes[::4] += 120
        splits[split] = images, labels
    return splits, ["lying", "upright"]


# ---- each walks from its entry to report.md -----------------------------------------

def test_an_objective_is_one_entry(monkeypatch, easy, results, capsys):
    monkeypatch.setitem(distill.OBJECTIVES, "hint", HINT)
    tiny.run(train_student, easy, results)
    tiny.run(distill, easy, results, "--objective", "kd")
    final = tiny.run(distill, easy, results, "--objective", "hint", "--hint-weight", 0.25)
    assert "w·MSE(adapter(maps) − teacher's maps) + CE(labels); w 0.25" in tiny.said(
        capsys)

    folder = results / "digits" / "hint-s0"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in rows:
        parts = float(row["train_hint"]) + float(row["train_labels"])
        assert parts == pytest.approx(float(row["train_loss"]), rel=1e-4)

    # The adapter is trained and saved beside the student, and is no part of it.
    state = tiny.load(folder / "checkpoint.pt")
    assert set(state["networks"]) == {"model", "adapter"}
    torch.manual_seed(data.seed_for(0, "weights", 1))
    first = nn.Conv2d(16, 64, 1).state_dict()
    trained = state["networks"]["adapter"]
    assert trained["weight"].shape == first["weight"].shape
    assert not torch.equal(trained["weight"], first["weight"])
    assert not any("adapter" in name for name in tiny.load(folder / "best.pt")["model"])

    made = report.main(words("--recipe", "digits", "--results-dir", results))
    assert final["test_accuracy"] in [
        value for row in made["rows"] if row["key"] == "hint"
        for value in row["test_accuracy"]["values"]]
    titles = [entry["title"] for entry in made["comparisons"]]
    assert "hint - student alone" in titles and "hint - kd" in titles
    text = (results / "digits" / "report.md").read_text()
    assert "w·MSE(adapter(maps) − teacher's maps)" in text

    # Its flag is refused elsewhere, and its teacher's features cannot be kept.
    tiny.refused(capsys, distill, tiny.words(easy, results, "--hint-weight", 2), "--hint-weight",
                 "--objective hint")
    tiny.refused(capsys, distill, tiny.words(easy, results, "--objective", "hint", "--cache"),
                 "--cache", "features")


def test_an_adapter_resumes_exactly(monkeypatch, easy, results, tmp_path):
    monkeypatch.setitem(distill.OBJECTIVES, "hint", HINT)
    tiny.run(distill, easy, results, "--objective", "hint", epochs=3)
    whole = tiny.outcome(results / "digits" / "hint-s0")
    again = tiny.copy_teacher(results, tmp_path / "again")

    class Stop(Exception):
        pass

    def stop_after_the_first(row, epochs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("common.epoch_line", stop_after_the_first)
        with pytest.raises(Stop):
            tiny.run(distill, easy, again, "--objective", "hint", epochs=3)
    tiny.run(distill, easy, again, "--objective", "hint", "--resume", epochs=3)
    assert tiny.same(tiny.outcome(again / "digits" / "hint-s0"), whole)


def test_a_network_is_one_entry(monkeypatch, easy, tmp_path, capsys):
    monkeypatch.setitem(models.ARCHITECTURES, "small-bn", with_batchnorm)
    final = tiny.run(train_student, easy, tmp_path, "--arch", "small-bn", "--ema-decay", 0.8)
    assert final["arch"] == "small-bn"
    assert final["recomputed_test_accuracy"] is not None       # it has BatchNorm, by its modules
    made = report.main(words("--recipe", "digits", "--results-dir", tmp_path))
    assert made["rows"][0]["parameters"]["mean"] == final["parameters"] == 276
    assert "student alone" in (tmp_path / "digits" / "report.md").read_text()
    assert "small-bn's own init and pools" in tiny.said(capsys)


def test_a_data_set_is_one_entry(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(data.DATASETS, "stripes", dict(read=read_stripes, side=16, mirror=True))
    place = ("--dataset", "stripes", "--data-dir", tmp_path / "data", "--results-dir", tmp_path)
    small = ("--arch", "digits-student")
    for script in (train_teacher, train_student, distill):
        final = script.main(words(*place, *small, *FEW))
        assert final["recipe"] == "stripes"
    said = tiny.said(capsys)
    assert "stripes: 80 train, 24 validation, 40 test; 2 classes" in said
    config = json.loads((tmp_path / "stripes" / "kd-s0" / "config.json").read_text())
    assert config["augment"] == "flip-crop" and config["class_names"] == ["lying", "upright"]
    made = report.main(words("--recipe", "stripes", "--results-dir", tmp_path))
    assert [row["key"] for row in made["rows"]] == ["teacher", "student", "kd"]
    assert (tmp_path / "stripes" / "report.md").exists()
    assert data.main(words("--dataset", "stripes", "--data-dir", tmp_path / "data"))["val"] == 24


def test_a_recipe_is_one_entry(monkeypatch, easy, tmp_path, capsys):
    monkeypatch.setitem(recipes.RECIPES, "mine", dict(
        dataset="folder", augment="none", epochs=2, runs=("teacher", "student", "kd"),
        teacher=dict(arch="digits-teacher", lr=0.01), student=dict(arch="digits-student", lr=0.02),
        kd=dict(temperature=2.0)))
    place = ("--recipe", "mine", "--data-dir", easy, "--image-size", 16, "--results-dir", tmp_path,
             "--device", "cpu")
    for script in (train_teacher, train_student, distill):
        script.main(words(*place))
    config = json.loads((tmp_path / "mine" / "kd-s0" / "config.json").read_text())
    assert (config["temperature"], config["lr"], config["augment"]) == (2.0, 0.02, "none")
    made = report.main(words("--recipe", "mine", "--results-dir", tmp_path))
    assert len(made["rows"]) == 3 and (tmp_path / "mine" / "report.md").exists()
    recipes.main(["--runs", "mine"])
    recipes.main(["--names"])
    printed = capsys.readouterr().out
    assert "teacher student kd\n" in printed and printed.splitlines()[-1].endswith(" mine")
