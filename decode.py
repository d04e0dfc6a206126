"""An image file → RGB pixels of one size, or a line that says why not. Files are untrusted: their
sizes are held against a limit, and no other program is started.

No command of its own, and no torch.
"""
import contextlib
import errno
import mmap
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from flags import fail

# What is read. PIL knows more; some of it holds files of other formats, with none of their limits.
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG",
           "PPM", "SGI", "TGA", "TIFF", "WEBP"}
SCANS = 100     # of one JPEG: each is a pass over all of its pixels; libtiff allows as many
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd8\xff\x01])")     # of JPEG, with what has a length

# Else PIL starts Ghostscript for PostScript, which is a program; IPTC files may hold some, too.
EpsImagePlugin.gs_binary = False


def resize(image, size):
    """Stretch to size × size: everything stays in the picture, the proportions do not."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def crop(image, size):
    """Scale the shorter side to size and cut the middle: proportions stay, the ends are lost."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}×{image.height} pixels are too long and thin to crop")
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


def white(image):
    """Return the white of grey levels beyond 8 bits, where the file says it; else None."""
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535
    signed = image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(258) == (16,)
    return 32767 if signed else None


def to_rgb(image, white=None):
    """Return an image of any mode as RGB: 16 bits scaled to 8, transparent pixels on black. Numbers
    beyond 8 bits must be from 0 to 65535; without a known white, floats up to 1 count as shares of
    it, and it is 255 for what is not above that."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(pixels).all():
            kind = "NaN" if np.isnan(pixels).any() else "inf"
            raise ValueError(f"holds pixels that are not finite, {kind}")
        low, high = pixels.min(initial=0), pixels.max(initial=0)
        if low < 0 or high > 65535:
            raise ValueError(f"holds pixels from {low:g} to {high:g}; 0 to 65535 can be read")
        top = white or (65535 if high > 255 else 255)
        top = 1 if image.mode == "F" and high <= 1 else top
        pixels *= 255 / top         # in place: of a large picture each copy is a gigabyte
        image = Image.fromarray(pixels.round(out=pixels).astype(np.uint8))
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
    except MemoryError:
        raise
    except Exception:       # broken EXIF says nothing about the pixels, which are decoded already
        return image


@contextlib.contextmanager
def decoding():
    """Let PIL refuse images above its limit of pixels, where it would warn, and warn of nothing
    else. For the main thread: warnings' filters are those of all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def scans(data):
    """Return how many scans the bytes of a JPEG file hold, up to its end."""
    at, count = 2, 0
    while (found := MARKER.search(data, at)) and found[1] != b"\xd9":
        count += found[1] == b"\xda"
        at = found.end() + max(2, int.from_bytes(data[found.end():found.end() + 2]))
    return count


def refuse_before_decoding(image, path):
    """Raise ValueError for what PIL would run, decode for hours, or take for a black picture."""
    if image.format == "EPS":
        raise ValueError("PostScript is a program, which is not run")
    if image.format not in FORMATS:
        raise ValueError(f"{image.format}, a format that is not read; convert it to PNG")
    if image.format == "TIFF":
        width, length = (image.tag_v2.get(tag, 1) for tag in (322, 323))     # a tile's
        if width * length > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"tiles of {width}×{length} pixels, a bomb")
        if image.tag_v2.get(262) == 0 and image.mode[0] in "IF":    # PIL would show the negative
            raise ValueError("grey levels beyond 8 bits, 0 for white; convert it to PNG")
    if image.format in ("JPEG", "MPO", "JPEG2000"):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if image.format == "JPEG2000":
                if data.find(b"\xff\x93") < 0:      # the marker before the first of its data
                    raise ValueError("cut short behind its header")
            elif (count := scans(data)) > SCANS:
                raise ValueError(f"{count:,} scans, a bomb; {SCANS} are decoded")


def read_image(path, size, fit):
    """Return one image file as (size, size, 3) uint8, of an animated one the first frame, whatever
    its name ends in. A ValueError names the path and what is wrong with the file; an OSError, or a
    MemoryError, is no fault of the file."""
    needs = "it"
    try:
        if path.exists() and not path.is_file():        # a pipe would be waited for
            raise ValueError("a folder, a pipe or a device")
        with Image.open(path) as image:
            refuse_before_decoding(image, path)
            needs = f"its {image.width}×{image.height} pixels"
            image.load()        # before upright(), which passes over errors, these too
            rgb = to_rgb(upright(image), white(image))
        if rgb.size != (size, size):
            rgb = FITS[fit](rgb, size)
        return np.asarray(rgb)
    except Exception as error:      # PIL raises nearly any kind for damaged files
        none = "decoder error -9|out of memory"         # found by libtiff, or another decoder
        if isinstance(error, MemoryError) or re.search(none, str(error)):
            raise MemoryError(f"{path}: not enough memory to decode {needs}") from None
        # A decoder that is led to a place before the file's start meets EINVAL.
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise OSError(f"{path}: cannot be read ({error.strerror})") from None
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no known format, or cut short" if os.path.getsize(path) else "empty"
        raise ValueError(f"{path}: not an image that can be decoded ({reason})") from None


def decode_all(files, size, fit, what, threads):
    """Return (N, size, size, 3) uint8, decoded in parallel, and {row: why} of files that cannot be
    decoded."""
    images, bad = np.empty((len(files), size, size, 3), np.uint8), {}

    def fill(row):
        images[row] = read_image(files[row], size, fit)

    # PIL decodes outside Python's lock.
    with decoding(), ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(fill, row) for row in range(len(files))]
        try:
            for row, job in enumerate(tqdm(jobs, what, leave=False, unit=" images",
                                           dynamic_ncols=True, disable=None)):     # on no terminal
                try:
                    job.result()
                except ValueError as error:
                    bad[row] = str(error)
        except MemoryError as error:
            fail(f"{error}, and up to {threads} images at once; lower OMP_NUM_THREADS, or remove "
                 "this one")
        except OSError as error:
            fail(error)
        finally:        # an error or Ctrl-C would else wait until all of them are decoded
            for job in jobs:
                job.cancel()
    return images, bad
