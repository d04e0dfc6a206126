"""Image files → uint8 arrays: any size, any mode, one folder a class, decoded in parallel.

    <root>/train/<class>/*    <root>/test/<class>/*  (or val/)
"""
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from flags import fail


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
        top = 65535 if pixels.max(initial=0) > 255 else 255
        image = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "black")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def read_image(path, size, fit):
    """Return one image file as (size, size, 3) uint8; a ValueError names the path if it cannot."""
    try:
        with Image.open(path) as image:
            rgb = to_rgb(image)
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:       # PIL decodes outside Python's lock
        for split, folders in listing.items():
            files = [path for name in classes for path in folders[name]]
            labels = np.repeat(np.arange(len(classes)), [len(folders[name]) for name in classes])
            images = np.empty((len(files), size, size, 3), np.uint8)
            jobs = [pool.submit(read_image, path, size, fit) for path in files]
            try:
                for i, job in enumerate(progress(jobs, f"decoding {split}")):
                    images[i] = job.result()
            except ValueError as error:
                pool.shutdown(cancel_futures=True)
                fail(f"{error}; mend or remove it")
            arrays[split] = images, labels
    return arrays, classes


def progress(items, what):
    return tqdm(items, what, leave=False, unit=" images", dynamic_ncols=True,
                disable=not sys.stderr.isatty())
