"""look.py's page: its pictures against closed forms, its figures against what the runs kept."""
import html
import json
import re
import shutil
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_page import Reader

import common
import data
import look
import models
import train_student

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]))


# ---- what is drawn ----------------------------------------------------------------------------

def linear(classes=4, side=8):
    """A network without hidden layers: (its function of pixels, its weights (classes, 3, H, W))."""
    weight = torch.randn(classes, 3, side, side, generator=torch.Generator().manual_seed(0))
    return lambda x: ((x - MEAN) / STD).flatten(1) @ weight.flatten(1).T, weight


def test_pixels_are_normalised_as_in_training(chain, easy):
    """The logits of the test images as pixels are those that the run kept."""
    for name in ("teacher-s0", "mean-teacher-s0"):
        images = data.load("folder", easy, image_size=tiny.SIDE).test.images
        pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255
        found = look.open_network(chain[0] / "digits" / name).logits(pixels)
        assert torch.allclose(found, torch.tensor(kept(chain[0] / "digits" / name)[0]), atol=1e-4)


def test_saliency_of_a_linear_network_is_its_weights():
    logits, weight = linear()
    classes = torch.tensor([2, 0, 3])
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = (weight[classes] / STD).abs().amax(1)
    assert torch.allclose(look.saliency(logits, pixels, classes), expected)


def test_saliency_is_the_slope_of_the_logit():
    """Of a smooth network, by differences, in float64."""
    torch.manual_seed(0)
    network = models.build("digits-student", 4, (3, 16, 16), pool="avg", activation="silu").double()
    pixels, step = torch.rand(2, 3, 16, 16, dtype=torch.float64), 1e-5
    found = look.saliency(network, pixels, torch.tensor([1, 3]))
    for image, c in ((0, 1), (1, 3)):
        for y, x in ((0, 0), (7, 9), (15, 3)):
            slopes = []
            for channel in range(3):
                moved = pixels[[image, image]]
                moved[:, channel, y, x] += torch.tensor([step, -step], dtype=torch.float64)
                with torch.no_grad():
                    up, down = network(moved)[:, c]
                slopes.append(abs(float(up - down)) / (2 * step))
            assert float(found[image, y, x]) == pytest.approx(max(slopes), rel=1e-5, abs=1e-9)


def test_maximise_raises_the_logit_of_its_class(chain):
    one = look.open_network(chain[0] / "digits" / "teacher-s0")
    classes, grey = torch.arange(4), one.card["mean"]
    found = look.maximise(one.logits, classes, grey, tiny.SIDE)
    start = torch.tensor(grey).float().view(1, 3, 1, 1).expand(1, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        before, after = one.logits(start)[0], one.logits(found).diagonal()
        assert (after > before + 1).all()
        assert (one.logits(found).argmax(1) == classes).all()
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal((found * 255).round() / 255, found)
    assert torch.equal(found, look.maximise(one.logits, classes, grey, tiny.SIDE))
    assert not torch.equal(found, look.maximise(one.logits, classes, grey, tiny.SIDE, seed=1))
    # Each class alone: the others do not matter to it.
    alone = look.maximise(one.logits, classes[:1], grey, tiny.SIDE)
    assert one.logits(alone)[0, 0] > before[0] + 1


def test_a_step_has_its_size_and_goes_up_a_linear_network(monkeypatch):
    monkeypatch.setattr(look, "START", 0)
    logits, weight = linear(side=7)     # 7 // 8: not rolled
    moved = look.maximise(logits, torch.arange(4), (0.5,) * 3, 7, steps=1) - 0.5
    assert moved.pow(2).mean((1, 2, 3)).sqrt().tolist() == pytest.approx([look.STEP] * 4, rel=0.02)
    direction = (weight / STD) / (weight / STD).pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    assert torch.allclose(moved, look.STEP * direction, atol=0.5 / 255 + 1e-6)


def test_lambda_holds_the_image_back(monkeypatch):
    logits, _ = linear()
    free = look.maximise(logits, torch.arange(4), (0.5,) * 3, 8)
    monkeypatch.setattr(look, "WEIGHT", 1e6)
    held = look.maximise(logits, torch.arange(4), (0.5,) * 3, 8)
    assert (held - 0.5).abs().mean() < 0.2 * (free - 0.5).abs().mean()


def test_mistakes_are_wrong_and_sorted():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (50, 4)), rng.integers(0, 4, 50)
    shares = torch.tensor(logits).softmax(1).numpy()
    wrong = [row for row in range(50) if shares[row].argmax() != labels[row]]
    assert look.mistakes(logits, labels).tolist() == sorted(wrong, key=lambda r: -shares[r].max())
    assert len(look.mistakes(logits, logits.argmax(1))) == 0


@pytest.mark.parametrize("arch, side, shown", [("digits-student", 3, 6), ("mlp", 16, 32)])
def test_filters_are_what_the_first_layer_answers_to(arch, side, shown):
    """The answer of unit u to an image of one lit number is the weight that the filter holds."""
    torch.manual_seed(0)
    network = models.build(arch, 4, (3, 16, 16))
    found, total = look.filters(network, (3, 16, 16))
    layer = network.features[0] if arch == "digits-student" else network.classifier[1]
    assert tuple(found.shape) == (shown, 3, side, side) and total == len(layer.weight)
    norms = found.flatten(1).norm(dim=1)
    assert (norms.diff() <= 0).all()
    lit = torch.zeros(1, 3, 16, 16)
    lit[0, 1, 2, 0] = 1
    with torch.no_grad():
        answers = (torch.nn.functional.conv2d(lit[:, :, :3, :3], layer.weight) if arch != "mlp"
                   else layer(lit.flatten(1))).flatten()
    order = layer.weight.flatten(1).norm(dim=1).argsort(descending=True)
    assert torch.allclose(found[:, 1, 2, 0], answers[order[:shown]])


# ---- the page ---------------------------------------------------------------------------------

def page(*argv):
    """Write a page; return (what main returns, a Reader of it, its text by section)."""
    found = look.main([*argv, "--device", "cpu"])
    reader, source = Reader(), Path(found["page"]).read_text(encoding="utf-8")
    reader.feed(source)
    assert not reader.open
    texts = [html.unescape(re.sub(r"<br>|<[^>]+>", "\n", part)) for part in source.split("<h2>")]
    return found, reader, {text.split("\n")[0]: text for text in texts}


def kept(folder):
    with np.load(folder / "test.npz") as file:
        return file["logits"], file["labels"]


def test_the_page_says_what_the_runs_kept(chain, tmp_path):
    root, finals = chain[0] / "digits", chain[1]
    found, _, texts = page(root / "kd-s0", "--out", tmp_path / "p.html", "--images", 9)
    (a, labels), (b, _) = kept(root / "kd-s0"), kept(root / "teacher-s0")
    assert found["test_accuracy"] == pytest.approx(finals["kd-s0"]["test_accuracy"])
    assert found["mistakes"] == (a.argmax(1) != labels).sum()
    assert found["beside"] == "teacher-s0"
    assert found["agreement"] == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert list(found["reached"]) == sorted(tiny.COLOURS)

    shares, names = torch.tensor(a).softmax(1).numpy(), sorted(tiny.COLOURS)
    rows = {}
    for title in ("Test images", "Most confident mistakes", "Saliency"):
        tiles = re.findall(r"([✓✗]) says (\w+), ([\d.]+)\s%\nis (\w+) · #(\d+)", texts[title])
        rows[title] = [int(row) for *_, row in tiles]
        for mark, said, share, true, row in tiles:
            assert names[a[int(row)].argmax()] == said and names[labels[int(row)]] == true
            assert float(share) == pytest.approx(100 * shares[int(row)].max(), abs=0.06)
            assert (mark == "✓") == (said == true)
    wrong = np.flatnonzero(a.argmax(1) != labels)
    assert len(wrong) > 1, "nothing to sort: give the runs another seed"
    assert rows["Most confident mistakes"] == sorted(wrong, key=lambda r: -shares[r].max())[:9]
    assert rows["Test images"] == rows["Saliency"] and len(set(rows["Saliency"])) == 9

    both = [int(row) for row in re.findall(r"#(\d+)", texts["kd-s0 and teacher-s0 on the same "
                                                            "images"])]
    differ = [bool(a[row].argmax() != b[row].argmax()) for row in both]
    assert len(set(both)) == 9 and differ == sorted(differ, reverse=True)
    assert sum(differ) == min(6, int((a.argmax(1) != b.argmax(1)).sum()))


def test_the_page_is_one_file_and_the_same_again(chain, tmp_path):
    first, reader, _ = page(chain[0] / "digits" / "kd-s0", "--out", tmp_path / "1.html")
    again, *_ = page(chain[0] / "digits" / "kd-s0", "--out", tmp_path / "2.html")
    text = (tmp_path / "1.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "2.html").read_text(encoding="utf-8")
    assert first | dict(page=0) == again | dict(page=0)
    assert not {"script", "link", "iframe", "object"} & reader.tags
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme" in text
    for picture in reader.pictures:
        kind, _, code = picture["src"].partition(",")
        assert kind == "data:image/png;base64" and picture["alt"].strip()
        assert min(Image.open(BytesIO(b64decode(code))).size) in (3, tiny.SIDE)
    assert len(reader.pictures) > 50
    for kind, inside in re.findall(r"<figure([^>]*)>(.*?)</figure>", text, re.S):
        assert ("wrong" in kind) == ("✗" in inside)


def test_names_are_escaped_and_two_classes_do(tmp_path, monkeypatch, capsys):
    """An MLP with --normalise half, on two classes with odd names; beside a run of four it is
    refused."""
    monkeypatch.setattr(tiny, "COLOURS", {'<b>&"x\'': (220, 40, 40), "grün": (40, 200, 40)})
    images = tiny.make_folder(tmp_path / "images")
    tiny.run(train_student, images, tmp_path, "--arch", "mlp-2x13", "--norm", "batch",
             "--normalise", "half", "--run", "<i>&s0")
    folder = tmp_path / "digits" / "<i>&s0"
    found, reader, texts = page(folder)
    assert not {"b", "i"} & reader.tags and list(found["reached"]) == ['<b>&"x\'', "grün"]
    assert "".join(reader.text).count('<b>&"x\'') > 3 and "Tutor: <i>&s0" in "".join(reader.text)
    assert found["page"] == str(folder / "look.html") and found["beside"] is None
    assert "names no teacher" in texts["Beside another network"]
    assert "All 13 filters" in texts["First layer"]


def test_few_classes_of_many(chain, tmp_path):
    found, _, texts = page(chain[0] / "digits" / "student-s0", "--out", tmp_path / "p.html",
                           "--images", 3)
    assert len(found["reached"]) == 3 and set(found["reached"]) < set(tiny.COLOURS)
    assert "3 of 4 classes, drawn with seed 0" in texts["What a class wants to see"]


def test_no_mistakes_and_no_disagreement(chain, tmp_path, monkeypatch):
    """A network beside itself, all of whose answers are right."""
    def outputs(one, test, precision):
        return np.eye(4, dtype=np.float32)[test.labels]

    monkeypatch.setattr(look, "outputs", outputs)
    folder = chain[0] / "digits" / "kd-s0"
    found, _, texts = page(folder, "--beside", folder, "--out", tmp_path / "p.html")
    assert (found["test_accuracy"], found["mistakes"], found["agreement"]) == (1, 0, 1)
    assert "every test image is right" in texts["Most confident mistakes"]


# ---- which network stands beside --------------------------------------------------------------

def copied(chain, tmp_path, *names):
    for name in names:
        shutil.copytree(chain[0] / "digits" / name, tmp_path / "digits" / name)
    return tmp_path / "digits"


def companion(folder, average=False):
    one = look.open_network(folder, average=average)
    return look.companion(one, look.read_config(one.file), average=average)


def test_the_teacher_that_taught_stands_beside(chain, tmp_path, monkeypatch):
    folder = copied(chain, tmp_path, "kd-s0", "teacher-s0", "student-s0")
    other, why = companion(folder / "kd-s0")
    assert other.file == folder / "teacher-s0" / "best.pt" and why is None
    assert companion(folder / "student-s0")[0] is None
    monkeypatch.chdir(folder / "kd-s0")
    assert companion("best.pt")[0].file == folder / "teacher-s0" / "best.pt"
    card = tiny.load(folder / "teacher-s0" / "best.pt")
    card["model"]["classifier.1.bias"][0] += 1e-3
    common.save_checkpoint(folder / "teacher-s0" / "best.pt", card)
    other, why = companion(folder / "kd-s0")
    assert other is None and "is not the network that taught it" in why
    (folder / "teacher-s0" / "best.pt").unlink()
    other, why = companion(folder / "kd-s0")
    assert other is None and str(folder / "teacher-s0" / "best.pt") in why
    config = json.loads((folder / "kd-s0" / "config.json").read_text())
    config["teacher"] = str(chain[0] / "digits" / "teacher-s0" / "best.pt")     # as it was typed
    (folder / "kd-s0" / "config.json").write_text(json.dumps(config))
    assert str(companion(folder / "kd-s0")[0].file) == config["teacher"]


def test_a_student_and_its_own_average(chain, tmp_path):
    folder = chain[0] / "digits" / "mean-teacher-s0"
    card = tiny.load(folder / "best.pt")
    for average, theirs in ((False, "ema"), (True, "model")):
        other, _ = companion(folder, average)
        assert tiny.same(dict(other.network.state_dict()), dict(card[theirs]))
        flags = ["--average"] if average else []
        found, *_ = page(folder, *flags, "--out", tmp_path / "p.html")
        key = ("ema_" if average else "") + "test_accuracy"
        assert found["test_accuracy"] == pytest.approx(chain[1]["mean-teacher-s0"][key])
        assert found["beside"] == "mean-teacher-s0" + ", average" * (not average)
    assert companion(chain[0] / "digits" / "mean-teacher-no-ema-s0")[0] is None


# ---- bad input --------------------------------------------------------------------------------

def test_bad_input(chain, easy, noise, tmp_path, capsys):
    folder, out = chain[0] / "digits" / "kd-s0", ["--out", tmp_path / "p.html"]
    for argv, *parts in (
            ([], "RUN"), ([tmp_path / "none"], tmp_path / "none", "no such file"),
            ([folder, "--average", *out], "--ema-decay 0"), ([folder, "--images", "0"], "'0'"),
            ([folder, "--data-dir", noise, *out], noise, "data key", "--data-dir"),
            ([folder, "--data-dir", tmp_path, *out], tmp_path, "train"),
            ([folder, "--beside", tmp_path / "no", *out], tmp_path / "no"),
            ([folder, "--out", tmp_path / "no" / "p.html"], "p.html", "--out")):
        tiny.refused(capsys, look, argv, *parts)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "best.pt", bare)
    tiny.refused(capsys, look, [bare / "best.pt"], bare / "config.json", "look.py predict")
    for text, *parts in (("{", "config.json"), ("{}", "'dataset'"), ("[]", "'dataset'")):
        (bare / "config.json").write_text(text)
        tiny.refused(capsys, look, [bare], bare / "config.json", *parts)
    known = dict(dataset="folder", data_dir="x", data_key="y")
    for key, value in (("data_dir", "a\0b"), ("data_dir", "\ud800"), ("teacher", "a\0b")):
        (bare / "config.json").write_text(json.dumps(known | {key: value}))
        tiny.refused(capsys, look, [bare], bare / "config.json", key)
    assert not list(tmp_path.glob("*.html"))


def test_beside_a_run_of_other_classes(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "COLOURS", {"a": (220, 40, 40), "b": (40, 200, 40)})
    tiny.run(train_student, tiny.make_folder(tmp_path / "images", train=8), tmp_path, epochs=1)
    tiny.refused(capsys, look, [chain[0] / "digits" / "kd-s0", "--beside",
                                tmp_path / "digits" / "student-s0"], "2 classes", "'a'", "--beside")
