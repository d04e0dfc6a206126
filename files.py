"""Files: written whole or not at all, and read with care: what lies in a stranger's folder may be a
pipe, which would be waited for, or a link to what has no end.

No command of its own, and no torch.
"""
import contextlib
import errno
import hashlib
import json
import os
import zipfile
import zlib

import numpy as np

from flags import fail

LARGEST = 2**28     # bytes of a text
HELD = {}           # run folder -> the descriptor by which this process keeps others out


# ---- writing ----------------------------------------------------------------------------------

def write_whole(path, data):
    """Write bytes so that the file is either as it was or whole: aside, synced, then moved. An
    OSError (a full disk, a folder that vanished) names the file, and leaves nothing beside it."""
    alone = path.parent in HELD         # else two processes may write it at the same time
    aside = path.with_name(f".{path.name}{'' if alone else os.getpid()}.part")
    if alone and path.parent.is_dir() and not os.path.samestat(
            os.fstat(HELD[path.parent]), os.stat(path.parent)):
        fail(f"{path.parent}: not the folder in which this run began: that was removed, and "
             "another process made this one; nothing is written here")
    with absent_after_an_error(aside, path):
        aside.unlink(missing_ok=True)       # of a process that was killed; or a link elsewhere
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def sync(path):
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def new_array(path, kind, shape):
    """Make an .npy file to be filled, and take the whole of its place on the disk: one that is full
    while a mapped file is written would end the process with SIGBUS, without a word."""
    with absent_after_an_error(path):
        np.lib.format.open_memmap(path, "w+", kind, shape)
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


@contextlib.contextmanager
def absent_after_an_error(path, named=None):
    """Remove a file that was not finished, because of an error or Ctrl-C. An OSError names it, or
    the file that it was to become."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(named or path)) from None
        raise


# ---- reading ----------------------------------------------------------------------------------

@contextlib.contextmanager
def unless_damaged():
    """Pass over what flipped bits in a file lead to, which is of many kinds; MemoryError where it
    is a lack of memory, and no fault of the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            raise MemoryError(str(error)) from error


def plain_file(path):
    """Return a path; OSError where it leads to no file, but to a pipe, a device or a folder."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return path


def read_text(path):
    """Return a file's text, UTF-8; OSError or ValueError where it is none."""
    if plain_file(path).stat().st_size > LARGEST:
        raise OSError(errno.EFBIG, f"more than {LARGEST:,} bytes", str(path))
    return path.read_text(encoding="utf-8")


def read_json(path):
    """Return a JSON file's dict; one line naming the file where it is cut short."""
    try:
        return dict(json.loads(read_text(path)))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        fail(f"{path}: cannot be read ({error}); remove its folder, or add --overwrite")


def read_array(path):
    """Return the array of an .npy file, mapped into memory. A header of which bits have flipped may
    lead to any exception."""
    return np.lib.format.open_memmap(plain_file(path), mode="r")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def crc(path):
    """Return a file's CRC32, read in pieces: it may be larger than memory."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            value = zlib.crc32(piece, value)
    return value


def damage(path):
    """Return what is wrong with the bytes of a checkpoint, a zip file with checksums of its own,
    which torch does not look at; None if nothing is."""
    if not path.is_file():
        return ("a folder; give its best.pt" if path.is_dir() else
                "no plain file" if path.exists() else "no such file")
    try:
        with zipfile.ZipFile(path) as bundle:
            # Torch packs nothing; what is packed, or in it often, may unpack to any size.
            infos = bundle.infolist()
            packed = [info.filename for info in infos if info.compress_type]
            other = f"{packed[0]!r} in it is packed" if packed else "its parts overlap" if (
                sum(info.file_size for info in infos) > path.stat().st_size) else None
            if [info.filename[-8:] for info in infos].count("data.pkl") != 1:
                other = "no data.pkl in it, as torch.save writes, or two"
            if other:
                return (f"damaged, or not written by torch.save ({other}); take a whole copy, or "
                        "train with --overwrite")
            wrong = bundle.testzip()
    except Exception as error:      # what flipped bits lead to is of many kinds
        if getattr(error, "errno", None) not in (None, errno.EINVAL):   # the disk, not the file
            return f"cannot be read ({error.strerror})"
        wrong = str(error) or type(error).__name__
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if (head := file.read(2)) == b"\x80\x02":
                return "in PyTorch's format of before 1.6, without checksums; ask for a newer copy"
            wrong = wrong if head == b"PK" else "it does not begin as a checkpoint does"
    return wrong and f"cut short or damaged ({wrong}); take a whole copy, or train with --overwrite"
