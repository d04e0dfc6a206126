"""Files → uint8 arrays: images of any size and mode in class folders, and three published sets.
The arrays are kept on disk, and mapped into memory at the next start.

    <root>/train/<class>/*    <root>/test/<class>/*  (or val/)
"""
import hashlib
import json
import mmap
import os
import shutil
import sys
import warnings

import numpy as np

import download
from decode import decode_all
from device import memory, refuse_beyond_memory, threads
from files import read_array, read_text, unless_damaged, write_whole
from flags import fail, plain, say


def image_files(folder, seen=(), left=None):
    """Return the files below a folder, sorted, links followed. Hidden files and folders are left
    out, and added to the list `left`."""
    if len(seen) > 100:
        fail(f"{folder}: more than 100 folders deep; remove it")
    real = folder.resolve()
    if real in seen:        # what lies behind the link is no link
        link = next((path for path in (folder, *folder.parents) if path.is_symlink()), folder)
        fail(f"{link}: a link that leads back to {real}, in a circle; remove the link")
    found = []
    try:
        with os.scandir(folder) as listing:     # knows which are files, without a look at each
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        fail(f"{folder}: cannot be read ({error.strerror})")
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            if left is not None:
                left.append(path)
        elif entry.is_dir():
            found += image_files(path, (*seen, real), left)
        elif entry.is_file():
            found.append(path)
        else:
            refuse(path)
    return found


def refuse(path):
    """Leave because of what is neither a file nor a folder."""
    fail(f"{path}: " + ("neither a file nor a folder" if path.exists() else
                        "a link that leads nowhere") + "; remove it")


def folder_listing(root):
    """Return {"train": {class: files}, "test": ...} of root/train/<class>/*, root/test or val."""
    if not root.is_dir():
        fail(f"{root}: no such folder; --data-dir must hold train/<class>/* and test/<class>/*")
    test = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        missing = "train" if test else "test (or val)"
        fail(f"{root}: holds no folder {missing}; it must hold train/<class>/* and test/<class>/*")
    ours = "train", test, ".arrays"
    listing, left = {}, [path for path in sorted(root.iterdir()) if path.name not in ours]
    for split, name in (("train", "train"), ("test", test)):
        there = sorted((root / name).iterdir())
        folders = [d for d in there if d.is_dir() and not d.name.startswith(".")]
        for path in there:
            if path not in folders:
                if not (path.name.startswith(".") or path.is_file()):
                    refuse(path)
                left.append(path)
        listing[split] = {d.name: image_files(d, left=left) for d in folders}
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
    tell_left(left)
    return listing


def tell_left(left):
    """Say what was left out of a listing; nothing is skipped in silence."""
    if left:
        say(plain(f"note: not read, as hidden or in no class folder: {left[0]}"
                  + f" and {len(left) - 1} more" * (len(left) > 1)))


def top_of(listing):
    """Return the folder that all files of a listing lie in."""
    return os.path.commonpath([files[0] for classes in listing.values()
                               for files in classes.values()])


def fingerprint(listing):
    """Hash of paths, sizes and times: changes whenever a file is added, removed or rewritten, and
    not with the way that leads to the folder."""
    digest, top = hashlib.sha256(), len(top_of(listing))
    for split, classes in listing.items():
        for files in classes.values():
            for path in files:
                stat = path.stat()
                digest.update(f"{split}\0{str(path)[top:]}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(
                    errors="surrogateescape"))
    return digest.hexdigest()[:16]


def read_folder(listing, size, fit, skip_bad=False):
    """Return {"train": (images, labels), "test": ...}, the classes, and a line for each file left
    out as it cannot be decoded, from where all files lie; without skip_bad one ends with a line."""
    classes, arrays, skipped = list(listing["train"]), {}, []
    refuse_beyond_memory(2 * count(listing) * size * size * 3,      # once more while shuffled
                         f"{count(listing)} images of {size}×{size}", "give a smaller --image-size")
    for split, folders in listing.items():
        files = [path for name in classes for path in folders[name]]
        labels = np.repeat(np.arange(len(classes)), [len(folders[name]) for name in classes])
        images, bad = decode_all(files, size, fit, f"decoding {split}", threads())
        if bad:
            images, labels = (np.delete(array, list(bad), 0) for array in (images, labels))
        skipped += bad.values()
        arrays[split] = images, labels
    if skipped and not skip_bad:
        fail(f"{skipped[0]}; mend or remove it (such files: {len(skipped)} of {count(listing)}), "
             "or leave them out with --skip-bad")
    for split, (_, labels) in arrays.items():
        for label in set(range(len(classes))) - set(labels.tolist()):
            name = classes[label]
            fail(f"--skip-bad would leave no image of class {name!r} in {split}, where "
                 f"{listing[split][name][0]} is the first that cannot be decoded; mend them, or "
                 "remove the class")
    top = top_of(listing) + os.sep
    return arrays, classes, [line.removeprefix(top) for line in skipped]


def count(listing):
    return sum(len(files) for classes in listing.values() for files in classes.values())


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
    labelled, left = {}, []
    there = {path.name for path in image_files(root / "val" / "images", left=left)}
    for line in tiny_lines(root / "val" / "val_annotations.txt"):
        file, wnid = (*line.split("\t"), "", "")[:2]
        if file in there:
            labelled.setdefault(wnid, []).append(root / "val" / "images" / file)
    listing = {"train": {}, "test": {}}
    for wnid in wnids:
        if not (root / "train" / wnid).is_dir():
            continue
        files = image_files(root / "train" / wnid / "images", left=left)
        tests = labelled.get(wnid, [])
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
    tell_left(left)
    return listing


# ---- the arrays on disk -----------------------------------------------------------------------

CACHE_VERSION = 3      # raised when what is stored changes
CHECKED = 2**31         # bytes of arrays up to which each start holds the images against their key
LISTED = 20             # files left out that the terminal shows; skipped.txt has all


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
    """Read a data set; return its four arrays and what is known of them. read() returns what
    read_cifar10 does, perhaps followed by the lines of files that were left out."""
    arrays, classes, *skipped = read()
    (images, labels), (test_images, test_labels) = arrays["train"], arrays["test"]
    order = shuffled(labels)
    arrays = {"train_images": images[order], "train_labels": labels[order].astype(np.int64),
              "test_images": test_images, "test_labels": test_labels.astype(np.int64)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    mean, std = mean_and_std(images)
    return arrays, dict(version=CACHE_VERSION, classes=[str(c) for c in classes], mean=mean,
                        std=std, key=key_of(arrays), skipped=sum(skipped, []))


def key_of(arrays):
    """Return the SHA-256 of a data set's arrays, which names it."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name])
    return digest.hexdigest()


def labels_key(arrays):
    """Return the same of its labels alone, which are small enough to be looked at every time."""
    return key_of({name: array for name, array in arrays.items() if "labels" in name})


def sum_of(facts):
    """Return the SHA-256 of what is known of the arrays, their key included."""
    told = {key: value for key, value in facts.items() if key != "sum"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def could_be(facts, arrays):
    """Return whether what is said of arrays makes sense, whose sum may be as new as a change."""
    mean, std, classes, skipped = (facts[key] for key in ("mean", "std", "classes", "skipped"))
    return (type(skipped) is type(classes) is list and len(mean) == len(std) == 3 and min(std) > 0
            and {*map(type, skipped)} <= {str} == {*map(type, classes)}
            and all(type(v) in (int, float) and -1e18 < v < 1e18 for v in mean + std)
            and all(labels.min() >= 0 and labels.max() < len(classes) for labels in (
                arrays["train_labels"], arrays["test_labels"])))


def mapped(folder):
    """Return (arrays, facts) of a folder of .npy files, mapped into memory, or None: they are not
    there, of another version, or, if they are not too large to look at, not as they were written.
    """
    with unless_damaged():
        facts = json.loads(read_text(folder / "meta.json"))
        arrays = {name: read_array(folder / f"{name}.npy") for name in
                  ("train_images", "train_labels", "test_images", "test_labels")}
        for split in ("train", "test"):     # as written: not of another byte order, say
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            if not (images.dtype == np.uint8 and labels.dtype == np.int64 and images.ndim == 4
                    and labels.shape == images.shape[:1]):
                return None
        known = facts.get("version") == CACHE_VERSION
        small = sum(array.nbytes for array in arrays.values()) <= CHECKED
        if (facts["sum"] != sum_of(facts) or facts["labels"] != labels_key(arrays)
                or small and key_of(arrays) != facts["key"] or not could_be(facts, arrays)):
            return None
        for array in arrays.values():
            if array.nbytes > memory() / 2:     # else each image would bring 128 kB of neighbours
                array._mmap.madvise(mmap.MADV_RANDOM)
        return (arrays, facts) if known else None
    return None


def image_arrays(folder, kind, listing, size, fit, skip_bad=False):
    """Return (arrays, facts) of a listing's files, kept in folder/<kind>-<their fingerprint>. Where
    files are left out they are kept under another name, and say so at every start."""
    whole = folder / f"{kind}-{fingerprint(listing)}"
    if not skip_bad or mapped(whole):
        return cached_arrays(whole, lambda: read_folder(listing, size, fit))
    part = whole.with_name(f"{whole.name}+skip")
    arrays, facts = cached_arrays(part, lambda: read_folder(listing, size, fit, skip_bad=True))
    skipped, kept_list = facts["skipped"], part / "skipped.txt"
    if skipped:
        say(f"--skip-bad: {len(skipped)} of {count(listing)} image files left out")
        shown, top = LISTED if kept_list.is_file() else None, top_of(listing)
        for line in skipped[:shown]:
            say(f"  {plain(os.path.join(top, line))}")
        if len(skipped) > len(skipped[:shown]):
            say(plain(f"  ... and {len(skipped) - LISTED} more: {kept_list}"))
    return arrays, facts


def cached_arrays(folder, read):
    """Return (arrays, facts) from a folder of .npy files, made by read() where it is not there.
    Of several processes that start at once, one makes it."""
    found = mapped(folder)
    if found:
        return found
    with download.alone(folder.parent):
        found = mapped(folder)
        if not found and folder.exists():
            say(f"{plain(folder)}: damaged, or of another version; made anew")
        return found or kept(folder, *make_arrays(read))


def kept(folder, arrays, facts):
    """Write arrays and facts to a folder that appears whole or not at all; return both."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)    # of an earlier process of that number, killed
    try:
        aside.mkdir(parents=True)
        for name, array in arrays.items():
            with open(aside / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        if facts.get("skipped"):
            lines = "".join(f"{plain(line)}\n" for line in facts["skipped"])
            (aside / "skipped.txt").write_text(lines, encoding="utf-8")
        told = facts | {"labels": labels_key(arrays)}
        write_whole(aside / "meta.json", json.dumps(told | {"sum": sum_of(told)}).encode())
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
