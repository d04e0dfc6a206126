"""Files → uint8 arrays: images of any size and mode in class folders, and three published sets.
The arrays are kept on disk, and mapped into memory at the next start.

    <root>/train/<class>/*    <root>/test/<class>/*  (or val/)
"""
import hashlib
import json
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import download
from device import cpus
from flags import fail, say


def resize(image, size):
    """Stretch to size × size: everything stays in the picture, the proportions do not."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def crop(image, size):
    """Scale the shorter side to size and cut the middle: proportions stay, the ends are lost."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def pad(image, size):
    """Scale the longer side to size, black around it: nothing is cut, the object gets smaller."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR),
                 ((size - width) // 2, (size - height) // 2))
    return canvas


FITS = {"resize": resize, "crop": crop, "pad": pad}


def to_rgb(image):
    """Return an image of any mode as RGB: 16 bits scaled to 8, transparent pixels on black."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 255
        image = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "black")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def upright(image):
    """Return the image as its EXIF says it was held: phones store pictures lying down."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:       # broken EXIF says nothing about the pixels, which are decoded later
        return image


def read_image(path, size, fit):
    """Return one image file as (size, size, 3) uint8; a ValueError names the path if it cannot."""
    try:
        with Image.open(path) as image:
            rgb = to_rgb(upright(image))
        if rgb.size != (size, size):
            rgb = FITS[fit](rgb, size)
        return np.asarray(rgb)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be decoded ({error})") from None


def image_files(folder, seen=()):
    """Return the files below a folder, sorted, links followed; hidden files are left out."""
    real = folder.resolve()
    if real in seen:
        fail(f"{folder}: a link that leads back to {real}, in a circle; remove it")
    found = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        fail(f"{folder}: cannot be read ({error.strerror})")
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += image_files(path, (*seen, real))
        elif path.exists():
            found.append(path)
        else:
            fail(f"{path}: a link that leads nowhere; remove it")
    return found


def folder_listing(root):
    """Return {"train": {class: files}, "test": ...} of root/train/<class>/*, root/test or val."""
    if not root.is_dir():
        fail(f"{root}: no such folder; --data-dir must hold train/<class>/* and test/<class>/*")
    test = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        missing = "train" if test else "test (or val)"
        fail(f"{root}: holds no folder {missing}; it must hold train/<class>/* and test/<class>/*")
    listing = {}
    for split, name in (("train", "train"), ("test", test)):
        folders = sorted(d for d in (root / name).iterdir()
                         if d.is_dir() and not d.name.startswith("."))
        listing[split] = {d.name: image_files(d) for d in folders}
        for d in folders:
            if not listing[split][d.name]:
                fail(f"{d}: a class folder without images; fill or remove it")
    if set(listing["train"]) != set(listing["test"]):
        odd = sorted(set(listing["train"]) ^ set(listing["test"]))
        where = "train" if odd[0] in listing["train"] else test
        fail(f"{root}: classes differ between train and {test}: {odd[0]!r} is only in {where} "
             f"({len(odd)} such classes); both must hold the same")
    if len(listing["train"]) < 2:
        fail(f"{root}/train: {len(listing['train'])} class folders; at least 2 are needed")
    return listing


def fingerprint(listing):
    """Hash of paths, sizes and times: changes whenever a file is added, removed or rewritten."""
    digest = hashlib.sha256()
    for split, classes in listing.items():
        for files in classes.values():
            for path in files:
                stat = path.stat()
                digest.update(f"{split}\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(
                    errors="surrogateescape"))
    return digest.hexdigest()[:16]


def read_folder(listing, size, fit):
    """Return {"train": (images, labels), "test": ...} and the classes, decoded in parallel."""
    classes, arrays = list(listing["train"]), {}
    with ThreadPoolExecutor(cpus()) as pool:       # PIL decodes outside Python's lock
        for split, folders in listing.items():
            files = [path for name in classes for path in folders[name]]
            labels = np.repeat(np.arange(len(classes)), [len(folders[name]) for name in classes])
            images = np.empty((len(files), size, size, 3), np.uint8)
            jobs = [pool.submit(read_image, path, size, fit) for path in files]
            try:
                for i, job in enumerate(progress(jobs, f"decoding {split}")):
                    images[i] = job.result()
            except ValueError as error:
                fail(f"{error}; mend or remove it")
            finally:        # an error or Ctrl-C would else wait until all of them are decoded
                for job in jobs:
                    job.cancel()
            arrays[split] = images, labels
    return arrays, classes


def progress(items, what):
    return tqdm(items, what, leave=False, unit=" images", dynamic_ncols=True,
                disable=not sys.stderr.isatty())


# ---- published sets ---------------------------------------------------------------------------

def read_cifar10(root):
    """Return {"train": (images, labels), "test": ...} and the classes of root/cifar-10-batches-py;
    torchvision opens no file of it before its MD5 fits."""
    from torchvision.datasets import CIFAR10  # slow to import, and digits need none of it

    with warnings.catch_warnings():     # of NumPy's, about how old the pickles are
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        parts = {"train": CIFAR10(root, train=True), "test": CIFAR10(root, train=False)}
    return ({name: (part.data, np.array(part.targets)) for name, part in parts.items()},
            parts["train"].classes)


def read_svhn(root, extra=False):
    """Return the same of root/*_32x32.mat; extra: with the 531 131 easier train images."""
    from torchvision.datasets import SVHN

    arrays = {}
    for name in ("train", "test", "extra")[:2 + extra]:
        part = SVHN(root, name)                     # the files' label 10 is its 0
        arrays[name] = part.data.transpose(0, 2, 3, 1), part.labels
    if extra:
        more = arrays.pop("extra")
        arrays["train"] = tuple(np.concatenate(pair) for pair in zip(
            arrays["train"], more, strict=True))
    return arrays, range(10)


TINY_TRAIN, TINY_VAL = 500, 50      # images of a class; val, which has labels, serves as test


def tiny_lines(path):
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); put it there, "
             "or remove the whole folder to have it made again from the archive")


def tiny_listing(root):
    """Return what folder_listing does of Tiny ImageNet's own layout, test being its val, whose
    labels are in val_annotations.txt. Classes are those of wnids.txt that are there, in its order,
    called by the first name in words.txt."""
    wnids = [line for line in tiny_lines(root / "wnids.txt") if line]
    words = dict(line.split("\t", 1) for line in tiny_lines(root / "words.txt") if "\t" in line)
    there = {path.name for path in image_files(root / "val" / "images")}
    labelled = {}
    for line in tiny_lines(root / "val" / "val_annotations.txt"):
        file, wnid = (*line.split("\t"), "", "")[:2]
        if file in there:
            labelled.setdefault(wnid, []).append(root / "val" / "images" / file)
    listing = {"train": {}, "test": {}}
    for wnid in wnids:
        if not (root / "train" / wnid).is_dir():
            continue
        files, tests = image_files(root / "train" / wnid / "images"), labelled.get(wnid, [])
        name = words.get(wnid, wnid).split(",")[0]
        if not files or len(tests) != TINY_VAL:
            fail(f"{root}: {len(files)} train and {len(tests)} labelled validation images of "
                 f"{wnid} ({name}); of each class that is there it must hold some and "
                 f"{TINY_VAL}; unpack the archive again")
        name = wnid if name in listing["train"] else name       # two that share a name
        listing["train"][name], listing["test"][name] = files, tests
    found = len(listing["train"])
    if found < 2:
        fail(f"{root}/train: {found} of the classes in wnids.txt; at least 2 are needed")
    images, whole = sum(map(len, listing["train"].values())), found * TINY_TRAIN
    if found < len(wnids) or images < whole:
        say(f"{root}: a part, {found} of {len(wnids)} classes, {images} of their {whole} train "
            "images")
    return listing


# ---- the arrays on disk -----------------------------------------------------------------------

CACHE_VERSION = 2      # raised when what is stored changes


def shuffled(labels):
    """Return a fixed order of the rows in which every stretch holds each class in proportion."""
    rng = np.random.default_rng(0)
    place = np.empty(len(labels))
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        place[rng.permutation(rows)] = (np.arange(len(rows)) + rng.random(len(rows))) / len(rows)
    return np.argsort(place)


def mean_and_std(images):
    """Per channel over all pixels, from 0 to 1; exact, because grey levels are counted first."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1000):
        block = images[start:start + 1000].reshape(-1, 3)
        counts += [np.bincount(block[:, c], minlength=256) for c in range(3)]
    share = counts / counts.sum(1, keepdims=True)
    levels = np.arange(256) / 255
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()     # a channel may be constant


def make_arrays(read):
    """Read a data set; return its four arrays and what is known of them."""
    arrays, classes = read()
    (images, labels), (test_images, test_labels) = arrays["train"], arrays["test"]
    order = shuffled(labels)
    arrays = {"train_images": images[order], "train_labels": labels[order].astype(np.int64),
              "test_images": test_images, "test_labels": test_labels.astype(np.int64)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name])
    mean, std = mean_and_std(images)
    return arrays, dict(version=CACHE_VERSION, classes=[str(c) for c in classes], mean=mean,
                        std=std, key=digest.hexdigest())


def mapped(folder):
    """Return (arrays, facts) of a folder of .npy files, mapped into memory, or None."""
    try:
        facts = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in
                  ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, EOFError, ValueError):
        return None
    return (arrays, facts) if facts.get("version") == CACHE_VERSION else None


def cached_arrays(folder, read):
    """Return (arrays, facts) from a folder of .npy files, made by read() where it is not there.
    Of several processes that start at once, one makes it."""
    found = mapped(folder)
    if found:
        return found
    with download.alone(folder.parent):
        return mapped(folder) or kept(folder, *make_arrays(read))


def kept(folder, arrays, facts):
    """Write arrays and facts to a folder that appears whole or not at all; return both."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)    # of an earlier process of that number, killed
    try:
        aside.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        (aside / "meta.json").write_text(json.dumps(facts))
        # Arrays of an earlier state of the same folder, or of an earlier version, are of no use,
        # nor those that a process was writing when it was killed.
        kind = folder.name.rpartition("-")[0]
        for old in folder.parent.iterdir():
            if old == folder or (old != aside and old.name.rpartition("-")[0] == kind
                                 and (old / "train_images.npy").is_file()):
                shutil.rmtree(old, ignore_errors=True)
        os.rename(aside, folder)
    except OSError as error:       # read-only data, say: learn from memory, decode again next time
        shutil.rmtree(aside, ignore_errors=True)
        if not (folder / "meta.json").exists():       # else another process was faster
            print(f"note: arrays not kept in {folder.parent} ({error.strerror})", file=sys.stderr)
    return arrays, facts
