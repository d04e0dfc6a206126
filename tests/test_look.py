"""look.py: its pictures against closed forms, its figures against what the runs kept."""
import csv
import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import data
import look
import models

NAMES = sorted(tiny.COLOURS)
WEIGHT = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def kept(folder):
    """The logits and labels on the test split that a run left."""
    with np.load(folder / "test.npz") as file:
        return torch.from_numpy(file["logits"]), torch.from_numpy(file["labels"])


def test_saliency_and_a_step_of_maximise_follow_the_gradient(monkeypatch):
    def linear(x):      # its gradient by its pixels is WEIGHT
        return x.flatten(1) @ WEIGHT.flatten(1).T

    classes = torch.tensor([2, 0, 3])
    found = look.saliency(linear, torch.rand(3, 3, 8, 8), classes)
    assert torch.allclose(found, WEIGHT[classes].abs().amax(1))
    monkeypatch.setattr(look, "START", 0)
    monkeypatch.setattr(torch, "randint", lambda *args, **options: torch.zeros(2, dtype=int))
    moved = look.maximise(linear, torch.arange(4), (0.5,) * 3, 8, steps=1) - 0.5
    expected = look.STEP * WEIGHT / WEIGHT.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    assert torch.allclose(moved, expected, atol=1e-5)


def test_pixels_are_normalised_and_maximise_raises_the_logit_of_its_class(chain, easy):
    one = look.Trained(chain[0] / "digits" / "teacher-s0")
    images = data.load("folder", easy, image_size=tiny.SIDE).test.images
    logits = one(torch.tensor(images).permute(0, 3, 1, 2) / 255)
    assert torch.allclose(logits, kept(one.file.parent)[0], atol=1e-4)
    found = look.maximise(one, torch.arange(4), one.mean, tiny.SIDE, steps=30)
    assert (one(found).diagonal() > logits.mean(0) + 1).all()
    assert found.min() >= 0 and found.max() <= 1


def test_filters_are_the_largest_of_the_first_layer():
    for arch, shape in (("digits-student", (6, 3, 3, 3)), ("mlp", (32, 3, 16, 16))):
        network = models.build(arch, 4, (3, 16, 16))
        found, total = look.filters(network, (3, 16, 16))
        weight = next(network.parameters()).view(total, *shape[1:])
        largest = sorted(weight, key=torch.linalg.norm, reverse=True)
        assert found.shape == shape and torch.equal(found, torch.stack(largest[:len(found)]))


def test_the_page_says_what_the_runs_kept(chain, tmp_path):
    root = chain[0] / "digits"
    found = look.main([root / "kd-s0", "--out", tmp_path / "page.html", "--device", "cpu"])
    source = Path(found["page"]).read_text(encoding="utf-8")
    assert not re.search("<script|<link|<iframe|http", source)
    text = html.unescape(re.sub("<[^>]+>", "\n", source))
    (a, labels), (b, _) = kept(root / "kd-s0"), kept(root / "teacher-s0")
    assert f"{100 * chain[1]['kd-s0']['test_accuracy']:.2f} %" in text
    tiles = re.findall(r"([✓✗]) kd-s0: (\w+), (.+) %\s+is (\w+) · #(\d+)", text)
    for mark, name, share, truth, row in tiles:
        chance, said = a[int(row)].softmax(0).max(0)
        assert (name, truth) == (NAMES[said], NAMES[labels[int(row)]])
        assert float(share) == pytest.approx(100 * chance.item(), abs=0.01)
        assert (mark == "✓") == (name == truth)
    wrong = (a.argmax(1) != labels).nonzero()[:, 0].tolist()
    surest = sorted(wrong, key=lambda row: a[row].softmax(0).max(), reverse=True)[:12]
    assert [int(row) for *_, row in tiles[12:]] == surest and found["mistakes"] == len(wrong) > 0
    differ = re.findall(r"#(\d+)", text.partition("kd-s0 and teacher-s0")[2])
    assert differ and all(a[int(row)].argmax() != b[int(row)].argmax() for row in differ)


def test_which_network_is_beside(chain, tmp_path):
    for name in ("kd-s0", "teacher-s0"):
        shutil.copytree(chain[0] / "digits" / name, tmp_path / name)
    one, file = look.Trained(tmp_path / "kd-s0"), tmp_path / "teacher-s0" / "best.pt"
    config = look.read_json(one.file.parent / "config.json")
    assert look.other_network(one, config)[0].file == file
    models.save_checkpoint(file, tiny.load(one.file))
    assert "is not the network that taught it" in look.other_network(one, config)[1]
    folder = chain[0] / "digits" / "mean-teacher-s0"
    for average, theirs in ((False, "ema"), (True, "model")):
        other, _ = look.other_network(look.Trained(folder, average=average), {})
        assert tiny.same({**other.network.state_dict()}, {**other.checkpoint[theirs]})


def test_bad_input(chain, noise, tmp_path, capsys):
    folder = chain[0] / "digits" / "kd-s0"
    for argv, *parts in (
            ([tmp_path / "none"], tmp_path / "none", "no such file"),
            ([folder, "--average"], "--ema-decay 0"),
            ([folder, "--data-dir", noise], noise, "data key", "--data-dir"),
            (["predict", folder], "IMAGE"), (["predict", folder, "no.png"], "no.png")):
        tiny.refused(capsys, look, argv, *parts)


def test_predict_a_folder_into_a_csv(chain, easy, tmp_path, capsys):
    """As often right as the run was, of its average; what is no image is left out."""
    run, photos, table = chain[0] / "digits/mean-teacher-s0", tmp_path / "a", tmp_path / "p.csv"
    shutil.copytree(easy / "test", photos)
    (photos / "notes.txt").write_text("no image")
    look.main(["predict", run, photos, "--average", "--out", table])
    assert "1 of 81 files left out" in tiny.said(capsys)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["path"] for row in rows] == sorted(map(str, photos.glob("*/*.png")))
    right = [row["class"] == Path(row["path"]).parent.name for row in rows]
    assert sum(right) / 80 == pytest.approx(chain[1]["mean-teacher-s0"]["ema_test_accuracy"])
    assert all(row[row["class"]] == row["probability"] for row in rows)
