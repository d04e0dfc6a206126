"""Image folders and published sets: what is read, what is refused, what is kept on disk."""
import functools
import hashlib
import http.server
import os
import pickle
import shutil
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import data

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path):
    return tiny.make_folder(tmp_path / "root", train=4, test=2)


def load(root, size=tiny.SIDE, **options):
    return data.load("folder", root, image_size=size, **options)


def words(root, *flags):
    return ["--dataset", "folder", "--data-dir", root, "--image-size", 8, *flags]


def by_image(*parts):
    """Return {pixels: label} of some splits."""
    found = {}
    for images, labels in parts:
        for image, label in zip(images, labels, strict=True):
            found[image.tobytes()] = int(label)
    return found


# ---- image files --------------------------------------------------------------------

def palette_image():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, 1, 2, 3])
    return image


def grey_image(level):
    """Return an image of 16 bits."""
    return Image.fromarray(np.full((4, 4), level, np.uint16))


WHITE = (255, 255, 255)
MOVING = {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]}


@pytest.mark.parametrize("name, image, options, colour", [
    ("a.png", Image.new("RGB", (4, 4), (10, 200, 30)), {}, (10, 200, 30)),
    ("A", Image.new("RGB", (4, 4), GREEN), {"format": "BMP"}, GREEN),
    ("a.png", Image.new("L", (4, 4), 77), {}, (77, 77, 77)),
    ("a.png", Image.new("LA", (4, 4), (90, 255)), {}, (90, 90, 90)),
    ("a.png", Image.new("1", (4, 4), 1), {}, WHITE),
    ("a.png", palette_image(), {}, (1, 2, 3)),
    ("a.tif", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), {}, (0, 255, 255)),
    ("a.png", grey_image(32768), {}, (128, 128, 128)),
    ("a.png", grey_image(200), {}, (1, 1, 1)),
    # Transparency is drawn on white, in whichever way a file says it.
    ("a.png", Image.new("RGBA", (4, 4), (200, 100, 0, 255)), {}, (200, 100, 0)),
    ("a.png", Image.new("RGBA", (4, 4), (200, 100, 0, 128)), {}, (227, 177, 127)),
    ("a.png", Image.new("LA", (4, 4), (90, 0)), {}, WHITE),
    ("a.png", palette_image(), {"transparency": 1}, WHITE),
    ("a.png", Image.new("RGB", (4, 4), RED), {"transparency": RED}, WHITE),
    # Of an animation the first frame.
    ("a.gif", Image.new("RGB", (4, 4), BLUE), MOVING, BLUE)])
def test_any_mode_becomes_rgb(tmp_path, name, image, options, colour):
    image.save(tmp_path / name, **options)
    found = data.read_image(tmp_path / name, 4, "resize")
    assert found.shape == (4, 4, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - colour).max() <= 1, found[0, 0]


def test_a_phone_picture_is_set_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 200         # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6            # orientation: turn a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "lying.png", exif=exif)
    found = data.read_image(tmp_path / "lying.png", 8, "resize")
    assert (found[:4] == 200).all()
    assert (found[4:] == 0).all()


def test_what_each_fit_keeps(tmp_path):
    """Of three squares beside each other, red, green, blue."""
    path = tmp_path / "a.png"
    bands = Image.new("RGB", (24, 8), GREEN)
    bands.paste(RED, (0, 0, 8, 8))
    bands.paste(BLUE, (16, 0, 24, 8))
    bands.save(path)
    cropped = data.read_image(path, 8, "crop")
    assert (cropped == GREEN).all()
    padded = data.read_image(path, 24, "pad")
    np.testing.assert_array_equal(padded[8:16], bands)
    assert (padded[:8] == 0).all() and (padded[16:] == 0).all()
    squeezed = data.read_image(path, 8, "resize").astype(int)
    assert (squeezed == squeezed[:1]).all()
    for column, colour in ((0, RED), (4, GREEN), (7, BLUE)):
        assert np.abs(squeezed[0, column] - colour).max() < 60


@pytest.mark.parametrize("fit", data.FITS)
def test_any_size_fits(tmp_path, fit):
    for size in ((1, 1), (1, 50), (51, 3), (17, 16)):
        Image.new("RGB", size, (50, 60, 70)).save(tmp_path / "a.png")
        found = data.read_image(tmp_path / "a.png", 16, fit)
        assert found.shape == (16, 16, 3)
        assert fit == "pad" or (found == (50, 60, 70)).all()


def write_cut(path):
    Image.fromarray(tiny.images(1, 0)[0]).save(path)
    path.write_bytes(path.read_bytes()[:-100])


BAD = {     # file -> (how it is written, what is said of it)
    "text.jpg": (lambda path: path.write_text("no image"), "cannot identify"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "cut.jpg": (write_cut, "truncated"),
    "cut.png": (write_cut, "truncated"),
    "float.tif": (lambda path: Image.new("F", (4, 4)).save(path), "floats"),
    "huge.png": (lambda path: Image.new("L", (40, 40)).save(path), "exceeds limit"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_path_and_reason(folder, capsys, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    path = folder / "test" / "green" / name
    write, reason = BAD[name]
    write(path)
    tiny.refused(capsys, data, words(folder), path, reason, "such files: 1 of 9 in test",
                 "--skip-bad")
    assert len(load(folder, skip_bad=True).test.labels) == 8
    path.unlink()
    load(folder)        # mended: nothing of the failure was kept


def test_bad_files_are_left_out_and_listed_where_that_is_asked_for(folder, capsys):
    whole = load(folder, val_fraction=0)
    bad = "train/blue/1.png", "train/red/3.png", "test/grey/0.png"
    for name in bad:
        (folder / name).write_text("no image")
    for _ in range(2):          # the second time from the arrays
        capsys.readouterr()
        splits = load(folder, val_fraction=0, skip_bad=True)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "--skip-bad: 3 image files left out" and len(lines) == 4
        for line, name in zip(lines[1:], bad, strict=True):
            assert str(folder / name) in line and "cannot identify" in line
    assert np.bincount(splits.train.labels).tolist() == [3, 4, 4, 3]
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 1, 2]
    # Those that stay are the ones that they were, with their labels.
    assert by_image(splits.train).items() < by_image(whole.train).items()
    assert splits.key != whole.key
    (folder / "test/grey/1.png").write_text("no image")
    tiny.refused(capsys, data, words(folder, "--skip-bad"), "no image of class 'grey' in test")
    tiny.refused(capsys, data, ["--skip-bad", "--data-dir", folder], "digits", "leave it out")


# ---- folders ------------------------------------------------------------------------

@pytest.mark.parametrize("remove, parts", [
    (".", ["no such folder"]), ("train", ["no folder train"]),
    ("test", ["no folder test (or val)"]),
    ("test/red", ["classes differ between train and test", "'red'"]),
    ("train/red/*", ["train/red", "without images"])])
def test_a_folder_that_is_not_as_it_must_be(folder, capsys, remove, parts):
    for path in folder.parent.glob(f"root/{remove}"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    tiny.refused(capsys, data, words(folder), folder, *parts)


def test_what_is_left_out_is_said(folder, capsys):
    load(folder)
    assert capsys.readouterr().out == ""
    hidden = folder / "train" / "blue" / ".DS_Store"
    hidden.write_text("x")
    load(folder)
    assert f"in no class folder: {hidden}\n" in capsys.readouterr().out
    (folder / "train" / "stray.png").write_text("x")
    (folder / "test" / ".hidden").mkdir()
    assert len(load(folder, val_fraction=0).train.labels) == 16
    assert "stray.png and 2 more" in capsys.readouterr().out


def test_val_is_the_validation_split_beside_test_and_the_test_split_alone(folder):
    plain = load(folder, val_fraction=0)
    tiny.make_folder(folder.parent / "more", train=1, test=3, seed=1)
    shutil.copytree(folder.parent / "more" / "test", folder / "val")
    splits = load(folder)
    assert by_image(splits.train) == by_image(plain.train)
    assert by_image(splits.test) == by_image(plain.test)
    assert len(splits.val.labels) == 12
    shutil.rmtree(folder / "test")
    alone = load(folder, val_fraction=0.25)
    assert by_image(alone.test) == by_image(splits.val)
    assert by_image(alone.train, alone.val) == by_image(plain.train)


def test_folders_inside_a_class_and_links_are_followed(folder, tmp_path):
    before = load(folder, val_fraction=0)
    root = tmp_path / "linked"
    (root / "train" / "red" / "deeper").mkdir(parents=True)
    (root / "test").symlink_to(folder / "test")
    for name in ("blue", "green", "grey"):
        (root / "train" / name).symlink_to(folder / "train" / name)
    for file in (folder / "train" / "red").iterdir():
        (root / "train" / "red" / "deeper" / file.name).symlink_to(file)
    assert load(root, val_fraction=0).key == before.key


# ---- arrays on disk -----------------------------------------------------------------

@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded."""
    names, read_image = [], data.read_image

    def spy(path, *more):
        names.append(path.name)
        return read_image(path, *more)

    monkeypatch.setattr(data, "read_image", spy)
    return names


def kept(folder):
    return sorted(path.name for path in (folder / ".arrays").iterdir())


def test_the_second_load_decodes_nothing(folder, decoded, monkeypatch):
    first = load(folder)
    assert len(decoded) == 24
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    again = load(Path("moved"))
    assert len(decoded) == 24 and isinstance(again.train.images, np.memmap)
    for a, b in zip(first[:3], again[:3], strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert first[3:] == again[3:]
    # Other sizes and fits have arrays of their own.
    load(moved, fit="crop")
    assert load(moved, 8).train.images.shape[1:] == (8, 8, 3)
    assert len(kept(moved)) == 3


@pytest.mark.parametrize("change", ["touched", "added", "removed"])
def test_a_changed_folder_is_read_again(folder, decoded, change):
    before, names = load(folder), kept(folder)
    path = folder / "train" / "red" / "0.png"
    if change == "touched":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif change == "added":
        shutil.copy(path, path.with_name("new.png"))
    else:
        path.unlink()
    decoded.clear()
    after = load(folder)
    assert len(decoded) == {"touched": 24, "added": 25, "removed": 23}[change]
    assert (before.key == after.key) == (change == "touched")
    assert kept(folder) != names and len(kept(folder)) == 1     # the old arrays are gone


@pytest.mark.parametrize("name, length", [
    ("meta.json", 0), ("meta.json", 100), ("train_images.npy", 0), ("train_images.npy", 100),
    ("train_images.npy", None)])
def test_damaged_arrays_are_made_anew(folder, capsys, name, length):
    before = load(folder)
    path = folder / ".arrays" / kept(folder)[0] / name
    if length is None:
        path.unlink()
    else:
        os.truncate(path, length)
    for _ in range(2):
        after = load(folder)
        assert after[3:] == before[3:]
        np.testing.assert_array_equal(after.train.images, before.train.images)
    assert capsys.readouterr().out.count("made anew") == 1


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder, capsys, monkeypatch):
    def read_only(path, *more):
        if os.path.isdir(os.path.dirname(path)):
            raise OSError(30, "Read-only file system", path)
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "mkdir", read_only)
    assert len(load(folder).test.labels) == 8
    said = capsys.readouterr().out
    assert said == f"note: arrays not kept in {folder}/.arrays (Read-only file system)\n"


def test_a_full_disk_does_not_cost_the_images_that_were_decoded(folder, capsys, decoded,
                                                               monkeypatch):
    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(load(folder).test.labels) == 8
    assert "arrays not kept" in capsys.readouterr().out
    assert len(decoded) == 24       # once


def test_of_two_runs_at_once_one_reads(tmp_path, monkeypatch):
    calls = []

    def read(root):
        calls.append(root)
        time.sleep(0.3)
        part = tiny.images(40, 0), np.arange(40) % 4
        return {"train": part, "test": part}, range(4)

    for name in ("slow", "slow-too"):
        monkeypatch.setitem(data.DATASETS, name, dict(read=read, side=32, mirror=True))
    data.load("slow-too", tmp_path)
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(data.load, "slow", tmp_path) for _ in range(3)]
    keys = {future.result().key for future in found}
    assert len(calls) == 2 and len(keys) == 1
    assert kept(tmp_path) == ["slow-1", "slow-too-1"]       # neither replaces the other


# ---- splits -------------------------------------------------------------------------

def test_splits_do_not_depend_on_the_seed(easy):
    first = load(easy, val_fraction=0.25)
    for seed, labels in ((1, None), (2, 40)):
        other = load(easy, val_fraction=0.25, seed=seed, labels=labels)
        for a, b in zip(first[:3], other[:3], strict=True):
            np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(first.val.labels, other.val.labels)
        assert first[3:] == other[3:]
    assert len(by_image(*first[:3])) == 240         # no image is in two of them
    for fraction, count in ((0, 0), (0.1, 4), (0.9, 36)):
        splits = load(easy, val_fraction=fraction)
        assert np.bincount(splits.val.labels, minlength=4).tolist() == [count] * 4


def test_every_stretch_has_each_class_in_proportion():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    order = data.shuffled(labels)
    assert sorted(order) == list(range(1000))
    for part in np.split(labels[order], 10):
        assert np.abs(np.bincount(part, minlength=3) - [60, 30, 10]).max() <= 1
    rows = order[labels[order] == 0]        # shuffled within a class too
    assert (np.diff(rows) < 0).sum() > 200


def test_mean_and_deviation_are_of_the_whole_train_split(easy):
    pixels = [np.asarray(Image.open(path)) for path in easy.glob("train/*/*.png")]
    pixels = np.stack(pixels) / 255
    for fraction in (0, 0.5):
        splits = load(easy, val_fraction=fraction)
        np.testing.assert_allclose(splits.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
        np.testing.assert_allclose(splits.std, pixels.std((0, 1, 2)), rtol=1e-9)
    half = load(easy, normalise="half")
    assert half.mean == half.std == (0.5, 0.5, 0.5)
    assert half.key == splits.key
    black = np.zeros((5, 4, 4, 3), np.uint8)
    assert min(data.mean_and_std(black)[1]) > 0     # nothing is divided by zero


def test_labels_are_kept_evenly_and_by_the_seed(easy, capsys):
    whole = load(easy).train.labels
    kept = [load(easy, labels=40, seed=seed).train.labels for seed in (0, 0, 1)]
    for labels in kept:
        assert np.bincount(labels[labels >= 0]).tolist() == [10] * 4
        np.testing.assert_array_equal(labels[labels >= 0], whole[labels >= 0])
    np.testing.assert_array_equal(kept[0], kept[1])
    assert (kept[0] != kept[2]).any()
    for count in (3, 6, 148):       # in each class 36 are left to train on
        tiny.refused(capsys, data, words(easy, "--labels", count), f"--labels {count}",
                     "from 4 to 144")


# ---- the command --------------------------------------------------------------------

def test_the_command_prints_what_the_data_holds_and_draws_it(easy, tmp_path, capsys):
    picture = tmp_path / "a.png"
    found = data.main(words(easy, "--show", 12, "--out", picture))
    assert (found["train"], found["val"], found["test"]) == (144, 16, 80)
    printed = capsys.readouterr().out
    for word in ("144", "8×8×3", *tiny.COLOURS, f"{found['mean'][0]:.4f}"):
        assert word in printed
    assert min(Image.open(picture).size) > 200


def test_the_digits(few_digits, tmp_path):
    found = data.main(["--data-dir", tmp_path])
    assert (found["train"], found["val"], found["test"]) == (90, 10, 50)
    assert found["classes"] == tuple("0123456789")


# ---- published sets, small ones of the same formats ---------------------------------

@pytest.fixture
def offline(monkeypatch):
    def refuse(*words, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture
def cifar(tmp_path, monkeypatch, offline):
    """The archive of a small CIFAR-10 in a folder: (folder, images, labels)."""
    from torchvision.datasets import CIFAR10

    images, labels = tiny.images(120, 1), np.arange(120) % 10
    made, root = tmp_path / "made" / CIFAR10.base_folder, tmp_path / "data"
    made.mkdir(parents=True)
    root.mkdir()
    files = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name, rows in zip(BATCHES, np.arange(120).reshape(6, 20), strict=True):
        flat = images[rows].transpose(0, 3, 1, 2).reshape(20, -1)
        files[name] = {"data": flat, "labels": labels[rows].tolist()}
    for name, content in files.items():
        (made / name).write_bytes(pickle.dumps(content))
    sums = [[name, md5(made / name)] for name in BATCHES]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    meta = CIFAR10.meta | {"md5": md5(made / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    archive = shutil.make_archive(root / "cifar-10-python", "gztar", made.parent, made.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(Path(archive)))
    return root, images, labels


def test_cifar10_is_unpacked_and_read(cifar):
    root, images, labels = cifar
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = data.load("cifar10", root)
    assert splits.classes == tuple(f"class {i}" for i in range(10))
    train = images[:100], labels[:100]
    assert by_image(splits.train, splits.val) == by_image(train)
    np.testing.assert_array_equal(splits.test.images, images[100:])
    np.testing.assert_array_equal(splits.test.labels, labels[100:])
    batches = data.Batches(splits.train, splits.mean, splits.std, 10, augment="crop")
    assert next(batches.epoch(1)).x.shape == (10, 3, 32, 32)
    # The unpacked folder may be given, too; and once the arrays are there, they are enough.
    (root / "cifar-10-python.tar.gz").unlink()
    assert data.load("cifar10", root / "cifar-10-batches-py").key == splits.key
    shutil.rmtree(root / "cifar-10-batches-py")
    again = data.load("cifar10", root)
    assert again.key == splits.key and isinstance(again.train.images, np.memmap)


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_no_pickle_is_opened_before_its_checksum_fits(cifar, tmp_path, capsys, name):
    from torchvision.datasets import CIFAR10

    root, _, _ = cifar
    shutil.copytree(tmp_path / "made", root, dirs_exist_ok=True)
    (root / "cifar-10-python.tar.gz").unlink()
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(pickle.dumps(Evil(tmp_path / "opened")))
    tiny.refused(capsys, data, ["--dataset", "cifar10", "--data-dir", root], root,
                 "cifar-10-python.tar.gz", CIFAR10.tgz_md5, CIFAR10.url)
    assert not (tmp_path / "opened").exists() and not list(root.glob(".arrays/*"))
    pickle.loads(path.read_bytes())         # it would have been noticed
    assert (tmp_path / "opened").exists()


@pytest.fixture
def svhn(tmp_path, monkeypatch, offline):
    """Two small .mat files: {part: (images, labels)}; 0 is written 10 in the files."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    parts, split_list = {}, {}
    for name, count in (("train", 60), ("test", 20)):
        images = tiny.images(count, count)
        labels = np.arange(count) % 10
        path = tmp_path / f"{name}_32x32.mat"
        written = np.where(labels == 0, 10, labels).astype(np.uint8)
        savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": written[:, None]})
        parts[name] = images, labels
        split_list[name] = ["http://127.0.0.1:9/", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    return parts


def test_svhn(svhn, tmp_path, capsys):
    splits = data.load("svhn", tmp_path)
    assert by_image(splits.train, splits.val) == by_image(svhn["train"])
    assert by_image(splits.test) == by_image(svhn["test"])
    assert splits.classes == tuple("0123456789")
    asked = ["--dataset", "svhn", "--data-dir"]
    tiny.refused(capsys, data, [*asked, tmp_path, "--image-size", 64], "32×32")
    empty = tmp_path / "empty"
    tiny.refused(capsys, data, [*asked, empty], empty, "no network", "train_32x32.mat",
                 "test_32x32.mat", md5(tmp_path / "test_32x32.mat"))


# ---- Tiny ImageNet ------------------------------------------------------------------

WNIDS = {"n03": "lemon", "n01": "goldfish, Carassius auratus", "n02": "monarch, butterfly",
         "n09": "lemon"}
LEVELS = {"n03": 40, "n01": 90, "n02": 140, "n09": 190}      # of grey


def make_tiny_imagenet(root, classes=WNIDS):
    """Write the published layout, with 4 train images a class."""
    lines = []
    for wnid in WNIDS:
        files = [root / "train" / wnid / "images" / f"{i}.JPEG" for i in range(4)]
        tests = [root / "val" / "images" / f"{wnid}_{i}.JPEG" for i in range(50)]
        lines += [f"{path.name}\t{wnid}\t0\t0\t62\t62\n" for path in tests]
        for path in (*files, *tests):
            path.parent.mkdir(parents=True, exist_ok=True)
            if wnid in classes:
                Image.new("L", (64, 64), LEVELS[wnid]).save(path)
        if wnid not in classes:
            shutil.rmtree(root / "train" / wnid)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    names = [f"{wnid}\t{name}\n" for wnid, name in WNIDS.items()]
    (root / "words.txt").write_text("".join(names))
    return root


def check_tiny_imagenet(splits, wnids):
    assert np.bincount(splits.test.labels).tolist() == [50] * len(wnids)
    levels = np.array([LEVELS[wnid] for wnid in wnids])
    for images, labels in splits[:3]:
        assert images.shape[1:] == (64, 64, 3)
        expected = levels[labels, None, None, None]
        assert np.abs(images.astype(int) - expected).max() <= 2


def test_tiny_imagenet_in_its_own_layout(tmp_path, capsys):
    folder = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    splits = data.load("tinyimagenet", tmp_path)
    check_tiny_imagenet(splits, list(WNIDS))        # in the order of wnids.txt
    assert splits.classes == ("lemon", "goldfish", "monarch", "n09")    # one lemon too many
    assert data.load("tinyimagenet", folder).key == splits.key
    assert capsys.readouterr().out == ""
    part = make_tiny_imagenet(tmp_path / "part" / "tiny-imagenet-200", ["n03", "n01"])
    check_tiny_imagenet(data.load("tinyimagenet", part), ["n03", "n01"])
    assert f"{part}: a part, 2 of 4 classes" in capsys.readouterr().out


@pytest.mark.parametrize("remove, parts", [
    ("val/images/n01_7.JPEG", ["49 labelled", "n01", "goldfish"]),
    ("wnids.txt", ["wnids.txt", "No such file"]), ("words.txt", ["words.txt", "No such file"]),
    ("train/n01/images/*", ["0 train", "n01"]), ("train/n0[123]", ["1 of the classes"])])
def test_a_damaged_tiny_imagenet_is_refused(tmp_path, capsys, remove, parts):
    folder = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    for path in folder.glob(remove):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    tiny.refused(capsys, data, ["--dataset", "tinyimagenet", "--data-dir", tmp_path], folder,
                 *parts)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a web server of tmp_path/served; nothing is printed."""
    from torchvision.datasets import utils

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    no_bar = functools.partial(utils.tqdm, disable=True)
    monkeypatch.setattr(utils, "tqdm", no_bar)
    handler = functools.partial(Quiet, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.handle_error = lambda *connection: None     # torchvision hangs up early
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_tiny_imagenet_is_downloaded_and_checked(server, tmp_path, capsys, monkeypatch):
    make_tiny_imagenet(tmp_path / "made" / "tiny-imagenet-200")
    archive = shutil.make_archive(tmp_path / "served" / "tiny", "zip", tmp_path / "made")
    place = tmp_path / "data" / "tiny-imagenet-200"
    asked = ["--dataset", "tinyimagenet", "--data-dir", place.parent]
    refusals = {        # address, MD5 -> what is said
        (f"{server}/absent.zip", "0" * 32): "404",
        (f"{server}/tiny.zip", "0" * 32): "corrupted",
        (f"{server}/tiny.zip", md5(Path(archive))): "16 train images in the archive",
    }
    for (url, checksum), reason in refusals.items():
        monkeypatch.setattr(data, "TINY_IMAGENET", (url, checksum))
        tiny.refused(capsys, data, asked, place.parent, Path(url).name, checksum, url, reason)
        assert not place.exists()
    monkeypatch.setattr(data, "TINY_TRAIN", 16)     # as if it were all of it
    data.download_tinyimagenet(place)
    check_tiny_imagenet(data.load("tinyimagenet", place.parent), list(WNIDS))
    assert sorted(path.name for path in place.parent.iterdir()) == [
        ".arrays", "tiny-imagenet-200", "tiny.zip"]


# ---- real images, where they are there ----------------------------------------------

def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_real_tiny_imagenet(real):
    folder, val = real
    splits = data.load("tinyimagenet", folder.parent)
    assert splits.classes == ("goldfish", "European fire salamander")
    train, test = by_image(splits.train, splits.val), by_image(splits.test)
    assert len(train) == 40 and len(test) == 100
    for label, (wnid, names) in enumerate(val.items()):
        for path in (folder / "train" / wnid / "images").iterdir():
            assert train[pixels_of(path).tobytes()] == label
        for name in names:
            path = folder / "val" / "images" / name
            assert test[pixels_of(path).tobytes()] == label


def test_photographs_are_read_as_pillow_reads_them(photographs):
    splits = load(photographs, 32)
    assert splits.train.images.shape == (360, 32, 32, 3)
    assert splits.classes[::9] == ("airplane", "truck")
    for label, name in enumerate(splits.classes):
        found = splits.test.images[splits.test.labels == label]
        paths = sorted((photographs / "test" / name).iterdir())
        for path, image in zip(paths, found, strict=True):
            np.testing.assert_array_equal(pixels_of(path), image)
    # Mean and deviation of all of CIFAR-10.
    np.testing.assert_allclose(splits.mean, (0.491, 0.482, 0.447), atol=0.03)
    np.testing.assert_allclose(splits.std, (0.247, 0.243, 0.262), atol=0.03)
