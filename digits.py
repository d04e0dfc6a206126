"""The embedded data set: 32x32 RGB pictures of the digits 0-9, drawn with matplotlib's own fonts.

    python data.py --dataset digits --show 32                        # a labelled grid as PNG
    python -c "import digits; print(digits.render(10, 0)[1])"        # ten digits, one of each class

Nothing is downloaded and nothing is written: data.py keeps the arrays. The pictures imitate what
makes house numbers cut from photographs (SVHN) hard. The digit in the middle counts; there vary
- the face: 21 of DejaVu, STIX and Computer Modern, upright and slanted, light and bold;
- position, height, width, rotation, shear;
- the neighbours: other digits in the same face, cut by the left and right edges;
- the colours: faint to strong, light on dark as often as dark on light, any hue on any other;
- the background: gradient, stripes, blobs, clouds and mixtures; a shadow under some digits; light
  that falls off to one side;
- the camera: blur, and noise in each pixel and channel.
The constants below say by how much; each is uniform in its range. Absent are dirt, perspective,
handwriting and lenses, so an accuracy here says nothing about photographs.
Of 160 test images looked at in a grid, about five were too faint or too busy to be sure of.

Everything follows from the seed. Chunks of 500 images have a generator each, so image i is the
same whatever the count. Platforms may differ by a grey level where FreeType or the vector units
of the CPU round differently.
"""
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np

VERSION = 2           # part of the cache's key in data.py: raise it when a change moves any pixel
SIDE = 32             # pixels, as CIFAR and SVHN
TRAIN, TEST = 10_000, 2_000
CHUNK = 500           # images a generator; a multiple of 10 keeps classes balanced, more is slower
OVERSAMPLE = 2        # digits are posed at 64x64, then averaged: smooth edges at any angle

FACES = (  # every font of matplotlib 3.8 with full-height digits; the others hold symbols
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")
FONT_SIZE = 56        # pixels: digits about 40 high, near the largest that is drawn at OVERSAMPLE

HEIGHT = (14, 26)     # pixels, of the digit: a strip of three to one digit that fills most of it
WIDTH = (0.75, 1.3)   # times the face's own width: narrow and wide lettering
ROTATION = (-20, 20)  # degrees: far from turning a 6 into a 9
SHEAR = (-0.35, 0.35)  # pixels sideways for each pixel up, on top of the face's own slant
SHIFT = (-2, 2)       # pixels, both ways, as boxes drawn by hand; little, as the crop adds 4 more
NEIGHBOUR = 0.75      # chance of another digit, on each side
GAP = (-0.04, 0.22)   # between digits, in heights: from touching to a fifth
CONTRAST = (0.12, 0.6)  # brightness of ink less background, of 1; fainter ones cannot be read
MIDDLE = (0.35, 0.65)  # brightness half way between the two: little is clipped at 0 and 1
HUE = 0.25            # largest offset of a channel before the mean is taken off; no brightness
TEXTURE = (0.1, 1.0)  # background's brightness range, in contrasts: at 1 it reaches the ink's
SHADOW = (-0.6, 0.6)  # opacity of the shadow, 1 or 2 pixels off; negative is none
SHADE = (0.0, 0.35)   # light lost at the darkest edge, of 1
BLUR = (0.2, 1.1)     # pixels, standard deviation
NOISE = (0.02, 0.25)  # standard deviation, in contrasts: a faint digit stays readable


def splits():
    """-> {"train": (images, labels), "test": (images, labels)}, see `render`: 10 000 and 2 000."""
    return {"train": render(TRAIN, 0), "test": render(TEST, 1)}


def render(count, seed):
    """-> (images uint8 (count, 32, 32, 3), labels int64 (count,)).

    Image i depends on seed and i alone; of images 10k to 10k + 9 each shows another digit.
    ValueError if count or seed is below 0, RuntimeError if matplotlib lacks a font.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"digits.render: count {count} and seed {seed} must be 0 or more")
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        rng = np.random.default_rng(np.random.SeedSequence((seed, start // CHUNK)))
        digits = rng.permuted(np.tile(np.arange(10), (CHUNK // 10, 1)), axis=1).ravel()
        pictures = _paint(rng, _masks(rng, digits))  # whole chunks, or the count would matter
        stop = min(start + CHUNK, count)
        images[start:stop], labels[start:stop] = pictures[:stop - start], digits[:stop - start]
    return images, labels


@functools.cache
def _glyphs(face):
    """-> the ten digits of a face, uint8 (h, w) cut to the ink; drawn once a process."""
    from PIL import ImageFont
    matplotlib = Path(find_spec("matplotlib").origin).parent    # its fonts alone are needed
    path = matplotlib / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf"
    try:  # BASIC: the other layout engine is not built into every pillow
        font = ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise RuntimeError(f"font {path} cannot be read ({error}): reinstall matplotlib") from error
    glyphs = []
    for digit in "0123456789":
        mask = font.getmask(digit, mode="L")
        ink = np.asarray(mask, np.uint8).reshape(mask.size[::-1])
        rows = np.flatnonzero(ink.any(1))
        columns = np.flatnonzero(ink.any(0))
        glyphs.append(ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])
    return glyphs


def _strip(glyphs, digits, gaps):
    """Set left, middle and right digit (or None) on one base line -> uint8 (h, w), ink's height.

    The middle digit is centred; gaps (2,) are in its heights.
    """
    height, width = glyphs[digits[1]].shape
    strip = np.zeros((2 * FONT_SIZE, 6 * FONT_SIZE), np.uint8)
    bottom, left = (strip.shape[0] + height) // 2, (strip.shape[1] - width) // 2
    spaces = [round(gap * height) for gap in gaps]
    for place, digit in enumerate(digits):
        if digit is not None:
            h, w = glyphs[digit].shape
            x = (left - spaces[0] - w, left, left + width + spaces[1])[place]
            window = strip[bottom - h:bottom, x:x + w]
            np.maximum(window, glyphs[digit], out=window)  # neighbours may touch
    return strip, height


def _masks(rng, labels):
    """Draw labels (n,) with neighbours, each in a face and pose -> float32 (n, 32, 32), ink 1."""
    from PIL import Image
    n, side = len(labels), SIDE * OVERSAMPLE
    faces = rng.integers(len(FACES), size=n)
    others = rng.integers(10, size=(n, 2))
    present = rng.random((n, 2)) < NEIGHBOUR
    gaps = rng.uniform(*GAP, (n, 2))
    heights = rng.uniform(*HEIGHT, n) * OVERSAMPLE
    widths = rng.uniform(*WIDTH, n)
    shears = rng.uniform(*SHEAR, n)
    angles = np.radians(rng.uniform(*ROTATION, n))
    centres = side / 2 + rng.uniform(*SHIFT, (n, 2)) * OVERSAMPLE
    masks = np.empty((n, side, side), np.uint8)
    for i in range(n):
        left, right = np.where(present[i], others[i], None)
        strip, ink = _strip(_glyphs(FACES[faces[i]]), (left, labels[i], right), gaps[i])
        cos, sin = np.cos(angles[i]), np.sin(angles[i])
        pose = np.array([[cos, -sin], [sin, cos]]) @ [[widths[i], -shears[i]], [0, 1]]
        back = np.linalg.inv(pose * heights[i] / ink)  # PIL asks where each pixel comes from
        origin = np.array(strip.shape[::-1]) / 2 - back @ centres[i]
        masks[i] = Image.fromarray(strip).transform(
            (side, side), Image.Transform.AFFINE, np.column_stack([back, origin]).ravel().tolist(),
            Image.Resampling.BILINEAR)
    grid = masks.reshape(n, SIDE, OVERSAMPLE, SIDE, OVERSAMPLE)
    return grid.mean((2, 4), dtype=np.float32) / 255


def _uniform(rng, low_high, *shape):
    """-> float32: numpy draws uniform numbers in float64, which would double all that follows."""
    return rng.uniform(*low_high, shape).astype(np.float32)


def _plane(rng, n):
    """-> (n, 32, 32): a ramp in any direction, within -1 to 1."""
    angle = _uniform(rng, (0, 2 * np.pi), n, 1, 1)
    line = np.linspace(-1, 1, SIDE, dtype=np.float32) / np.float32(np.sqrt(2))
    return np.cos(angle) * line + np.sin(angle) * line[:, None]


def _stripes(rng, n):
    """-> (n, 32, 32): 1 to 5 waves in any direction, soft (cloth, shade) or hard (boards, bars)."""
    waves = _uniform(rng, (1, 5), n, 1, 1)
    phase = _uniform(rng, (0, 2 * np.pi), n, 1, 1)
    hardness = _uniform(rng, (1, 6), n, 1, 1)
    return np.clip(hardness * np.sin(np.float32(np.pi) * waves * _plane(rng, n) + phase), -1, 1)


def _blobs(rng, n):
    """-> (n, 32, 32): four round spots, light or dark, 2 to 8 pixels in standard deviation."""
    sizes = _uniform(rng, (2, 8), n, 4, 1)
    signs = rng.choice(np.float32([-1, 1]), (n, 4, 1))
    line = np.arange(SIDE, dtype=np.float32)
    down, across = (np.exp(-((line - _uniform(rng, (0, SIDE), n, 4, 1)) / sizes) ** 2 / 2)
                    for _ in range(2))
    return np.clip((down * signs).transpose(0, 2, 1) @ across, -1, 1)


def _clouds(rng, n, cells=6):
    """-> (n, 32, 32): random values on a coarse grid, interpolated between (stains, leaves)."""
    distance = np.linspace(0, cells - 1, SIDE)[:, None] - np.arange(cells)
    hats = np.maximum(0, 1 - np.abs(distance)).astype(np.float32)  # (32, cells)
    return hats @ _uniform(rng, (-1, 1), n, cells, cells) @ hats.T


TEXTURES = (_plane, _stripes, _blobs, _clouds)


def _shadow(rng, masks):
    """-> masks (n, 32, 32) moved by one or two pixels down and to a side, with an opacity each."""
    side = rng.integers(4, size=len(masks))
    shadow = np.empty_like(masks)
    for k, move in enumerate(((1, 1), (1, -1), (2, 2), (2, -2))):
        shadow[side == k] = np.roll(masks[side == k], move, (1, 2))
    return shadow * _uniform(rng, SHADOW, len(masks), 1, 1).clip(0)


def _blur(images, sigma):
    """Gaussian blur of images (n, h, w, c), sigma (n,) in pixels; edges are repeated."""
    radius = int(np.ceil(3 * BLUR[1]))
    weights = np.exp(-(np.arange(-radius, radius + 1) / sigma[:, None]) ** 2 / 2)
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)[..., None, None, None]
    for _ in range(2):  # down and, turned by the swap, across
        padded = np.pad(images, ((0, 0), (radius, radius), (0, 0), (0, 0)), mode="edge")
        shifted = (padded[:, k:k + images.shape[1]] for k in range(2 * radius + 1))
        images = sum(weights[:, k] * part for k, part in enumerate(shifted)).swapaxes(1, 2)
    return images


def _paint(rng, masks):
    """Give masks (n, 32, 32) colours, background, light and camera -> uint8 (n, 32, 32, 3)."""
    n = len(masks)
    contrast = _uniform(rng, CONTRAST, n, 1, 1, 1)
    sign = rng.choice(np.float32([-0.5, 0.5]), (n, 1, 1, 1))  # light on dark, or dark on light
    middle = _uniform(rng, MIDDLE, n, 1, 1, 1)
    hues = _uniform(rng, (-HUE, HUE), 3, n, 1, 1, 3)
    hues -= hues.mean(-1, keepdims=True)  # else a hue could cancel the contrast

    mixture = rng.dirichlet([0.4] * len(TEXTURES), n).astype(np.float32)  # mostly one, often two
    field = sum(mixture[:, k, None, None] * draw(rng, n) for k, draw in enumerate(TEXTURES))
    field = field[..., None] / 2  # (n, 32, 32, 1), -0.5 to 0.5; hue and brightness vary together
    back = middle - sign * contrast + field * contrast * _uniform(rng, TEXTURE, n, 1, 1, 1)
    back = back + hues[0] * (0.5 + field) + hues[1] * (0.5 - field)
    back *= 1 - _shadow(rng, masks)[..., None]

    images = back + masks[..., None] * (middle + sign * contrast + hues[2] - back)
    images *= 1 - (_uniform(rng, SHADE, n, 1, 1) * (_plane(rng, n) + 1) / 2)[..., None]
    images = _blur(images, rng.uniform(*BLUR, n))
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    images = images + noise * contrast * _uniform(rng, NOISE, n, 1, 1, 1)
    return (images.clip(0, 1) * 255 + 0.5).astype(np.uint8)
