"""The published sets, on small files of the same formats, written here, and on real ones."""
import os
import pickle
import shutil
import time
import warnings
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import tiny
import torchvision.datasets
from PIL import Image

import data
import download
import readers


def words(root, name, *more):
    return ["--dataset", name, "--data-dir", root, *more]


def by_image(split):
    """Image -> label."""
    return {image.tobytes(): int(label)
            for image, label in zip(split.images, split.labels, strict=True)}


# ---- CIFAR-10 ---------------------------------------------------------------------------------

def check_batches(splits):
    """At the first load too, when arrays lie in memory as the reader made them."""
    made = data.Batches(splits.train, (0, 0, 0), (1, 1, 1), 10, augment="flip-crop")
    expected = data.Batches(data.Split(splits.train.images.copy(order="C"), splits.train.labels),
                            (0, 0, 0), (1, 1, 1), 10, augment="flip-crop")
    for a, b in zip(made.epoch(1), expected.epoch(1), strict=True):
        assert (a.x == b.x).all() and (a.y == b.y).all()


class Old:
    """Pickled much as NumPy's types were when CIFAR-10 was made: NumPy 2.4 warns at reading it."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 0)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


FOLDER = "cifar-10-batches-py"
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.fixture
def cifar(place, root, monkeypatch, tmp_path):
    """Place the archive of a small CIFAR-10 of six pickles: (images, labels) of all of them."""
    pictures, labels = tiny.images(120, 1), np.arange(120) % 10
    files = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name, rows in zip(NAMES, np.split(np.arange(120), 6), strict=True):
        files[name] = {"data": pictures[rows].transpose(0, 3, 1, 2).reshape(20, -1),
                       "labels": labels[rows].tolist(), "batch_label": Old()}
    folder, sums = tmp_path / "made" / FOLDER, {}
    folder.mkdir(parents=True)
    for name, content in files.items():
        body = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(body)
        sums[name] = md5(body).hexdigest()
    official = torchvision.datasets.CIFAR10
    monkeypatch.setattr(official, "train_list", [[name, sums[name]] for name in NAMES[:5]])
    monkeypatch.setattr(official, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(official, "meta", dict(official.meta, md5=sums["batches.meta"]))
    archive = shutil.make_archive(tmp_path / "made" / "archive", "gztar", tmp_path / "made", FOLDER)
    place("cifar10", **{"cifar-10-python.tar.gz": Path(archive).read_bytes()})
    return pictures, labels


def test_cifar10_is_unpacked_and_read(cifar, root, capsys):
    pictures, labels = cifar
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = data.load("cifar10", root)
    assert splits.classes == tuple(f"class {i}" for i in range(10))
    expected = {p.tobytes(): int(y) for p, y in zip(pictures[:100], labels, strict=False)}
    assert by_image(splits.train) | by_image(splits.val) == expected
    np.testing.assert_array_equal(splits.test.images, pictures[100:])
    np.testing.assert_array_equal(splits.test.labels, labels[100:])
    assert splits.train.images.shape == (90, 32, 32, 3)
    np.testing.assert_allclose(splits.mean, pictures[:100].mean((0, 1, 2)) / 255, rtol=1e-9)
    np.testing.assert_allclose(splits.std, pictures[:100].std((0, 1, 2)) / 255, rtol=1e-9)
    assert "unpacking" in capsys.readouterr().out
    check_batches(splits)

    for path in (root / FOLDER).iterdir():              # the arrays are enough from now on
        path.unlink()
    again = data.load("cifar10", root)
    assert again.key == splits.key and isinstance(again.train.images, np.memmap)
    np.testing.assert_array_equal(again.train.images, splits.train.images)


def test_the_unpacked_folder_may_be_given_and_needs_no_archive(cifar, root):
    first = data.load("cifar10", root)
    (root / "cifar-10-python.tar.gz").unlink()
    for path in (root / ".arrays").rglob("*.npy"):
        path.unlink()
    assert data.load("cifar10", root / FOLDER).key == first.key
    assert len(list((root / ".arrays").iterdir())) == 1


@pytest.mark.parametrize("name", [*NAMES, "batches.meta"])
def test_no_pickle_is_opened_before_its_checksum_fits(cifar, root, tmp_path, capsys, name):
    download.ensure("cifar10", root)
    path = root / FOLDER / name
    path.write_bytes(pickle.dumps(Evil(tmp_path / "opened")))
    for flags in ([], ["--download"]):
        tiny.refused(capsys, data, words(root, "cifar10", *flags), path, "wrong checksum",
                     md5(path.read_bytes()).hexdigest(), f"remove {root / FOLDER}")
    path.unlink()
    tiny.refused(capsys, data, words(root, "cifar10"), path, "missing")
    assert not (tmp_path / "opened").exists() and not list(root.glob(".arrays/*"))
    pickle.loads(pickle.dumps(Evil(tmp_path / "opened")))       # it would have been noticed
    assert (tmp_path / "opened").exists()


# ---- SVHN -------------------------------------------------------------------------------------

def digit(part):
    """Image -> digit; ten is written 10 in the files."""
    return {p.tobytes(): int(y) % 10 for p, y in zip(*part, strict=True)}


def test_svhn_is_read_without_extra_unless_asked(svhn, root):
    plain = data.load("svhn", root)
    check_batches(plain)
    assert by_image(plain.train) | by_image(plain.val) == digit(svhn["train"])
    assert by_image(plain.test) == digit(svhn["test"])
    assert plain.classes == tuple("0123456789")
    more = data.load("svhn-extra", root)
    assert by_image(more.train) | by_image(more.val) == digit(svhn["train"]) | digit(svhn["extra"])
    assert by_image(more.test) == digit(svhn["test"]) and more.key != plain.key
    assert len(list((root / ".arrays").iterdir())) == 2         # neither replaces the other
    shutil.rmtree(root / ".arrays" / f"svhn-{download.key('svhn')}")
    assert data.load("svhn", root).key == plain.key
    assert isinstance(data.load("svhn-extra", root).train.images, np.memmap)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_the_size_of_a_published_set_is_its_own(root, capsys, name):
    tiny.refused(capsys, data, words(root, name, "--image-size", 64), "--image-size 64", "32×32")


# ---- Tiny ImageNet ----------------------------------------------------------------------------

WNIDS = {"n03": "lemon", "n01": "goldfish, Carassius auratus", "n02": "monarch, milkweed butterfly",
         "n09": "reel"}


def tiny_imagenet(root, classes=("n01", "n02", "n03"), train=4):
    """Write the published layout, half of the images grey; return {wnid: grey level of class}."""
    levels, rng = {w: 40 + 50 * i for i, w in enumerate(WNIDS)}, np.random.default_rng(0)

    def write(path, level, grey):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if grey else "RGB", (64, 64), level if grey else (level,) * 3).save(path)

    for wnid in classes:
        for i in range(train):
            write(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", levels[wnid], i % 2)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image\n")
    lines = []
    for i, wnid in enumerate(rng.permutation(np.repeat(list(WNIDS), 50))):
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
        if wnid in classes:
            write(root / "val" / "images" / f"val_{i}.JPEG", levels[wnid], i % 2)
    write(root / "test" / "images" / "test_0.JPEG", 255, True)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("n00\tentity\n" + "".join(
        f"{wnid}\t{name}\n" for wnid, name in WNIDS.items()))
    return levels


def check_tiny(splits, levels, wnids):
    assert splits.classes == tuple(WNIDS[wnid].split(",")[0] for wnid in wnids)
    assert np.bincount(splits.test.labels).tolist() == [50] * len(wnids)
    for part in splits[:3]:
        assert part.images.shape[1:] == (64, 64, 3)
        for image, label in zip(part.images, part.labels, strict=True):
            assert np.abs(image.astype(int) - levels[wnids[label]]).max() <= 2


def test_tiny_imagenet_in_its_own_layout(root, capsys):
    folder = root / "tiny-imagenet-200"
    levels = tiny_imagenet(folder, classes=WNIDS, train=10)
    hidden = folder / "val" / "images" / "._val_0.JPEG"         # as macOS leaves them
    hidden.write_bytes(b"")
    (folder / "train" / "n01" / "images" / "._n01_0.JPEG").write_bytes(b"")
    splits = data.load("tinyimagenet", root)
    check_tiny(splits, levels, list(WNIDS))             # in the order of wnids.txt
    assert np.bincount(splits.train.labels).tolist() == [9] * 4     # ours is held out of train
    assert np.bincount(splits.val.labels).tolist() == [1] * 4
    said = capsys.readouterr().out
    assert "40 of their 2000 train images" in said and f"{hidden} and 1 more" in said
    again = data.load("tinyimagenet", root / "tiny-imagenet-200")
    assert again.key == splits.key and isinstance(again.train.images, np.memmap)


def test_bad_files_of_tiny_imagenet_are_left_out_where_that_is_asked_for(root, capsys):
    folder = root / "tiny-imagenet-200"
    tiny_imagenet(folder, classes=("n01", "n03"), train=4)
    bad = folder / "train" / "n01" / "images" / "n01_2.JPEG"
    bad.write_bytes(b"")
    tiny.refused(capsys, data, words(root, "tinyimagenet"), bad, "empty", "1 of 108",
                 "--skip-bad")
    facts = data.main([*map(str, words(root, "tinyimagenet")), "--skip-bad", "--val-fraction", "0"])
    assert facts["train"] == 7 and facts["test"] == 100
    assert "1 of 108 image files left out" in capsys.readouterr().out


def test_a_part_of_tiny_imagenet_is_accepted_and_said(root, capsys):
    levels = tiny_imagenet(root / "tiny-imagenet-200", classes=("n01", "n03"), train=500)
    splits = data.load("tinyimagenet", root)
    check_tiny(splits, levels, ["n03", "n01"])
    said = capsys.readouterr().out
    assert "2 of 4 classes" in said and str(root) in said
    facts = data.main([str(w) for w in words(root, "tinyimagenet")])        # 64×64 without a flag
    assert facts["classes"] == ("lemon", "goldfish") and facts["test"] == 100
    tiny_imagenet(root / "tiny-imagenet-200", classes=("n02",))             # another part on top
    assert data.load("tinyimagenet", root).classes == ("lemon", "goldfish", "monarch")
    assert len(list((root / ".arrays").iterdir())) == 1


def test_tiny_imagenet_from_the_archive(place, root, tmp_path):
    levels = tiny_imagenet(tmp_path / "made" / "tiny-imagenet-200")
    archive = shutil.make_archive(tmp_path / "archive", "zip", tmp_path / "made")
    place("tinyimagenet", **{"tiny-imagenet-200.zip": Path(archive).read_bytes()})
    check_tiny(data.load("tinyimagenet", root), levels, ["n03", "n01", "n02"])


def break_val(folder):
    next((folder / "val" / "images").iterdir()).unlink()


def break_annotations(folder):
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n01", "n02", 1))


@pytest.mark.parametrize("damage, parts", [
    (break_val, ["49 labelled validation images", "50"]),
    (break_annotations, ["labelled validation images", "50"]),
    (lambda folder: (folder / "wnids.txt").unlink(), ["wnids.txt", "No such file"]),
    (lambda folder: (folder / "words.txt").unlink(), ["words.txt"]),
    (lambda folder: (folder / "val" / "val_annotations.txt").unlink(), ["val_annotations.txt"]),
    (lambda folder: (folder / "wnids.txt").write_text("n01\n"), ["1 of the classes", "2"]),
    (lambda folder: [p.unlink() for p in (folder / "train/n01/images").iterdir()], ["n01", "0 tr"]),
])
def test_a_damaged_tiny_imagenet_is_named(root, capsys, damage, parts):
    folder = root / "tiny-imagenet-200"
    tiny_imagenet(folder, train=2)
    damage(folder)
    tiny.refused(capsys, data, words(root, "tinyimagenet"), folder, *parts)
    assert not list(root.glob(".arrays/*"))


def test_the_real_tiny_imagenet(real, capsys):
    folder, val = real
    splits = data.load("tinyimagenet", folder.parent)
    assert splits.classes == ("goldfish", "European fire salamander")
    assert "2 of 200 classes, 40 of their 1000 train images" in capsys.readouterr().out
    assert len(splits.train.labels) == 36 and len(splits.val.labels) == 4
    train = by_image(splits.train) | by_image(splits.val)
    for label, (wnid, names) in enumerate(val.items()):
        assert len(names) == 50
        for path in (folder / "train" / wnid / "images").iterdir():
            assert train[np.asarray(Image.open(path).convert("RGB")).tobytes()] == label
        test = by_image(splits.test)
        for name in names:
            pixels = np.asarray(Image.open(folder / "val" / "images" / name).convert("RGB"))
            assert test[pixels.tobytes()] == label


# ---- several processes ------------------------------------------------------------------------

def make_arrays(root, log):
    """In a process of its own: load a data set whose reading takes a while and is written down."""
    def read():
        with open(log, "a") as lines:
            lines.write("read\n")
        time.sleep(0.5)
        pictures = tiny.images(40, 0)
        return {part: (pictures, np.arange(40) % 4) for part in ("train", "test")}, range(4)

    arrays, facts = readers.cached_arrays(root / ".arrays" / "some-set", read)
    (root / f"{os.getpid()}.key").write_text(facts["key"])
    os._exit(0 if arrays["train_images"].shape == (40, 32, 32, 3) else 1)


def test_two_processes_make_the_arrays_once(root, tmp_path):
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                make_arrays(root, tmp_path / "log")
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "read\n"
    assert len({path.read_text() for path in root.glob("*.key")}) == 1
    assert [path.name for path in (root / ".arrays").iterdir()] == ["some-set"]
