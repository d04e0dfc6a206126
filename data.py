"""Data sets as uint8 arrays, their splits, and the batches made from them on the device.

    python data.py --dataset digits                          make the arrays, print what they hold
    python data.py --dataset digits --show 32                and a picture of 32 images
    python data.py --dataset folder --data-dir data/cifar10
    python data.py --dataset cifar10 --download              fetch the published files, no more

A data set is read once into arrays below --data-dir; the next start maps those into memory. The
train images are kept in a fixed shuffled order, the same share of every class in any stretch of
it, so that the last tenth is a fair validation split and no image is copied to make it.
"""
from flags import SIDES, a_file, fail, launch, number, parse, plain  # noqa: I001
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import decode
import digits
import download
import plots
import readers
from common import generator, seed_for
from device import guard, near, rank, world


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


# ---- data sets --------------------------------------------------------------------------------

def open_digits(data_dir, size, fit, skip_bad):
    return readers.cached_arrays(data_dir / f"digits-{digits.VERSION}",
                                 lambda: (digits.splits(), range(10)))


def open_folder(data_dir, size, fit, skip_bad):
    return readers.image_arrays(data_dir / ".arrays", f"{size}-{fit}",
                                readers.folder_listing(data_dir), size, fit, skip_bad)


def open_tinyimagenet(data_dir, size, fit, skip_bad):
    root = download.ensure("tinyimagenet", data_dir)
    listing = readers.tiny_listing(root / download.FOLDERS["tinyimagenet"])
    return readers.image_arrays(root / ".arrays", "tinyimagenet", listing, size, fit, skip_bad)


def published(name, read):
    """Return an opener. The published checksums name the arrays; made once, they are enough."""
    def open_set(data_dir, size, fit, skip_bad):
        folder = download.root_of(name, data_dir) / ".arrays" / f"{name}-{download.key(name)}"
        return readers.cached_arrays(folder, lambda: read(download.ensure(name, data_dir)))
    return open_set


DATASETS = {
    "digits": open_digits,
    "cifar10": published("cifar10", readers.read_cifar10),
    "svhn": published("svhn", readers.read_svhn),
    "svhn-extra": published("svhn-extra", lambda root: readers.read_svhn(root, extra=True)),
    "tinyimagenet": open_tinyimagenet,
    "folder": open_folder,
}


def load(name, data_dir="data", labels=None, val_fraction=0.1, seed=0, image_size=None,
         fit="resize", normalise="train", skip_bad=False):
    """Return the Splits of a data set: train, val, test, mean, std, classes, key.

    labels: None for all, or how many train images keep theirs, the same number in each class,
    chosen by the seed; the others get -1. val_fraction of train is held out, whatever the seed.
    image_size: None for the set's own. normalise: "half" for a mean and deviation of 0.5, not the
    train split's. skip_bad: leave out, count and list image files that cannot be decoded. A
    published set that is not in data_dir is downloaded.
    """
    for what, value, known in (("data set", name, DATASETS), ("fit", fit, decode.FITS)):
        if value not in known:      # a part of paths, too
            fail(f"unknown {what} {value!r}; choose from: {', '.join(known)}")
    side = SIDES.get(name, image_size or 32)
    if image_size not in (None, side):
        fail(f"--image-size {image_size}: {name} is {side}×{side}; leave it out")
    if skip_bad and name not in ("folder", "tinyimagenet"):
        fail(f"--skip-bad: {name} is not made of image files; leave it out")
    try:
        arrays, facts = DATASETS[name](Path(data_dir), side, fit, skip_bad)
    except OSError as error:
        fail(f"{error.filename or data_dir}: cannot be read ({error.strerror or error})")
    images, targets = arrays["train_images"], np.array(arrays["train_labels"])
    cut = len(images) - round(val_fraction * len(images))
    if cut < 1:
        fail(f"--val-fraction {val_fraction} leaves none of {len(images)} images to train on")
    train = Split(images[:cut], targets[:cut])
    if labels is not None:
        train = Split(train.images, keep_labels(train.labels, labels, facts["classes"], seed))
    mean, std = ((0.5,) * 3,) * 2 if normalise == "half" else (facts["mean"], facts["std"])
    return Splits(train, Split(images[cut:], targets[cut:]),
                  Split(arrays["test_images"], np.array(arrays["test_labels"])),
                  tuple(mean), tuple(std), tuple(facts["classes"]), facts["key"])


def keep_labels(labels, count, classes, seed):
    """Return a copy in which `count` labels, the same number in each class, stay; others are -1."""
    each, rest = divmod(count, len(classes))
    fewest = np.bincount(labels, minlength=len(classes)).min()
    if rest or not 1 <= each <= fewest:
        fail(f"--labels {count}: must be a multiple of the {len(classes)} classes, from "
             f"{len(classes)} to {fewest * len(classes)}, or all")
    rng = np.random.default_rng(seed_for(seed, "labels"))
    kept = np.full_like(labels, -1)
    for c in range(len(classes)):
        rows = rng.choice(np.flatnonzero(labels == c), each, replace=False)
        kept[rows] = c
    return kept


# ---- batches ----------------------------------------------------------------------------------

class Batch(NamedTuple):
    x: torch.Tensor                         # (B, 3, H, W) float32, normalised, channels last
    y: torch.Tensor                         # (B,) int64; -1: unlabelled
    rows: torch.Tensor                      # (B,) which images of the split these are
    other: torch.Tensor | None = None       # (B, 3, H, W) the same images in another view
    epoch: int = 0


AUGMENTS = {"none": (), "crop": ("shift",), "flip-crop": ("shift", "flip")}    # what is drawn
CHOICES = {"dataset": DATASETS, "fit": decode.FITS, "augment": AUGMENTS}
# The share of a batch that is labelled, where some images are not: few labels seen often, but not
# so few in a batch that their gradient is mostly noise.
LABELLED_SHARE = 0.25


def tensor(array):
    """Return an array as a tensor on the same memory, mapped read-only perhaps: a private mapping
    that may be written counts as memory of the process, one that may not does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class Batches:
    """The batches of a split, made on the device: iterate for all rows in order and unaugmented,
    or take epoch(e) for a shuffled, augmented training epoch, the same whenever it is drawn.

    Of several processes each draws the same epoch and takes an equal share of every batch's
    labelled and of its unlabelled rows; iterating, it takes every so manyth batch.
    """

    def __init__(self, split, mean, std, batch_size, device="cpu", augment="none", views=0, seed=0,
                 pair=False, labelled_only=False, noise=None):
        self.batch_size, self.device, self.seed = batch_size, torch.device(device), seed
        self.draws, self.views, self.pair, self.noise = AUGMENTS[augment], views, pair, noise
        self.images = near(tensor(split.images), self.device)
        self.shape = self.images.shape[1:3]
        self.labels = torch.from_numpy(split.labels).to(self.device)
        known = torch.from_numpy(split.labels >= 0)
        self.labelled = known.nonzero().squeeze(1)
        self.unlabelled = (~known).nonzero().squeeze(1)[:0 if labelled_only else None]
        total = len(self.labelled) + len(self.unlabelled)
        self.step_size = size = min(batch_size, total)
        self.taught = size      # rows of a step that are labelled
        if len(self.unlabelled):
            self.taught = self.labelled_of(size)
        share = [*range(self.taught)[rank()::world()], *range(self.taught, size)[rank()::world()]]
        self.mine = torch.tensor(share, device=self.device) if world() > 1 else slice(None)
        # (x/255 − mean)/std in one multiplication and one addition
        std = torch.tensor(std, dtype=torch.float32, device=self.device)
        self.scale = 1 / (255 * std)
        self.offset = -torch.tensor(mean, dtype=torch.float32, device=self.device) / std

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        for start in range(0, len(self), self.batch_size)[rank()::world()]:
            stop = min(start + self.batch_size, len(self))
            rows = torch.arange(start, stop, device=self.images.device)
            yield Batch(self.look(rows), self.labels[start:stop], rows)

    def labelled_of(self, size):
        """Return how many of a step's rows are labelled, where there are unlabelled ones."""
        known, total = len(self.labelled), len(self.labelled) + len(self.unlabelled)
        return known and min(max(1, round(size * max(LABELLED_SHARE, known / total))), size - 1)

    def order(self, epoch):
        """Return the rows of each step, (steps, B): shuffled, cut to a multiple of the batch.

        With unlabelled rows an epoch goes once through those, a fixed share of each batch is
        labelled, and the labelled rows come round as often as it takes.
        """
        g = generator(self.seed, "order", epoch)

        def shuffle(rows, count):
            rounds = -(-count // len(rows))
            return torch.cat([rows[torch.randperm(len(rows), generator=g)]
                              for _ in range(rounds)])[:count]

        free = self.step_size - self.taught
        steps = len(self.unlabelled) // free if free else len(self.labelled) // self.taught
        parts = [shuffle(rows, steps * count).view(steps, -1) for rows, count in
                 ((self.unlabelled, free), (self.labelled, self.taught)) if count]
        return torch.cat(parts[::-1], 1)

    def steps(self):
        """Number of batches in a training epoch."""
        return len(self.order(0))

    def epoch(self, epoch):
        """Yield the batches of training epoch 1, 2, …

        What says which images and where to look is copied once an epoch: after that no step waits
        for a GPU.
        """
        place = self.images.device
        view = epoch % self.views if self.views else epoch
        streams = ("view", "other view") if self.pair else ("view",)
        draws = [self.draw(stream, view) for stream in streams]
        noises = ("noise", "other noise")[:len(draws)] if self.noise else ()
        lots = [torch.rand(2, len(self), generator=generator(self.seed, stream, epoch))
                .to(self.device) for stream in noises]
        order = self.order(epoch).to(self.device)[:, self.mine]
        for step, (rows, there) in enumerate(zip(order.to(place), order, strict=True)):
            looks = [self.look(rows, draw) for draw in draws]
            for i, stream in enumerate(noises):
                g = generator(self.seed, stream, epoch, step, device=self.device)
                looks[i] = disturb(looks[i], self.noise, lots[i][:, there], g, self.step_size,
                                   self.mine)
            yield Batch(looks[0], self.labels[there], rows, looks[1] if self.pair else None, epoch)

    def draw(self, stream, view):
        """Return, for every image of the split, where view number `view` looks; drawn on the CPU,
        so that every device sees the same."""
        g, n = generator(self.seed, stream, view), len(self)
        height, width = self.shape
        down = torch.randint(-(height // 8), height // 8 + 1, (n,), generator=g)
        right = torch.randint(-(width // 8), width // 8 + 1, (n,), generator=g)
        flip = torch.rand(n, generator=g) < 0.5
        down, right, flip = (tensor.to(self.images.device) for tensor in (down, right, flip))
        return dict(shift=(down, right), flip=flip)

    def look(self, rows, view=None):
        """Return the images of some rows, (B, 3, H, W), normalised; shifted by up to an eighth of
        the side with the edge mirrored, and flipped, as the view says."""
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
            x = x.pin_memory()      # made while the GPU is at the steps before, and copied ahead
        x = x.to(self.device, non_blocking=True).float() * self.scale + self.offset
        return x.permute(0, 3, 1, 2)         # a view: the memory stays channels last


def scoring_size(shape):
    """Return how many images of (H, W) are scored at once: 500 of 64×64, fewer of larger ones."""
    return max(1, min(500, 500 * 64 ** 2 // (shape[0] * shape[1])))


def disturb(x, noise, lots, g, step_size, mine):
    """Return x (B, 3, H, W) with noise (p1, p2, ρ1, ρ2): with probability p1 an image gets Gaussian
    noise of ρ1 standard deviations of the data, with p2 a share ρ2 of its pixels is erased (set to
    the data's mean). lots (2, B), from 0 to 1, say who; g, on x's device, draws the pixels of a
    whole step, of which `mine` are x's.
    """
    p1, p2, strength, share = noise
    one, two = (lots.view(2, -1, 1, 1, 1)[i] < p for i, p in enumerate((p1, p2)))
    shape = step_size, *x.shape[1:]
    bell = torch.randn(shape, generator=g, device=x.device)[mine]
    erased = torch.rand(step_size, 1, *shape[2:], generator=g, device=x.device)[mine] < share
    x = (x + one * strength * bell).masked_fill(two & erased, 0)
    return x.contiguous(memory_format=torch.channels_last)


def mirror(index, size):
    """Fold indices that run out of 0 … size−1 back in, as in a mirror at the edge pixel."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def main(argv=None):
    own = {"show": dict(type=number(int, 1, 1024), metavar="N", help="write a picture of N images"),
           "out": dict(type=a_file, metavar="FILE",
                       help="where to; default: <data-dir>/<dataset>.png"),
           "download": dict(action="store_true", help="fetch the published files, no more")}
    args = parse(__doc__, "student", CHOICES, argv, groups=("data",), own=own)
    with guard(args):
        return show(args)


def show(args):
    """Make the arrays, print what they hold, draw some of them; return it as a dict."""
    if args.download:
        return download.only(args.dataset, args.data_dir,
                             readers.tiny_listing if args.dataset == "tinyimagenet" else None)
    splits = load(args.dataset, args.data_dir, args.labels, args.val_fraction, 0, args.image_size,
                  args.fit, args.normalise, args.skip_bad)
    facts = {part: len(getattr(splits, part).labels) for part in ("train", "val", "test")}
    facts |= dict(classes=splits.classes, mean=splits.mean, std=splits.std, key=splits.key)
    print(f"{args.dataset}: {facts['train']} train, {facts['val']} validation, {facts['test']} "
          f"test images of {'×'.join(map(str, splits.train.images.shape[1:]))}")
    names = [*splits.classes[:20], "…"][:len(splits.classes)]
    print(plain(f"{len(splits.classes)} classes: {', '.join(names)}"))
    print("mean", *(f"{v:.4f}" for v in splits.mean), " std", *(f"{v:.4f}" for v in splits.std))
    if args.show:
        batches = Batches(splits.train, splits.mean, splits.std, args.show, augment=args.augment)
        rows = torch.arange(min(args.show, len(batches)))
        batch = Batch(batches.look(rows, batches.draw("view", 1)), batches.labels[rows], rows)
        facts["picture"] = args.out or str(Path(args.data_dir) / f"{args.dataset}.png")
        names = [(*splits.classes, "no label")[label] for label in batch.y]
        plots.draw_grid(splits.train.images[:len(rows)], batch.x.permute(0, 2, 3, 1).numpy(), names,
                        facts["picture"])
        print(plain(facts["picture"]))
    return facts


if __name__ == "__main__":
    launch(main)
