"""Look at one trained network: a page of pictures, and predictions for images of your own.

    python look.py results/digits/kd-s0         writes look.html there
    python look.py --average results/digits/mean-teacher-s0
    python look.py results/digits/student-s0 --beside results/digits/kd-s0
    python look.py predict results/digits/kd-s0 photo.png another.jpg
    python look.py predict results/digits/kd-s0 PHOTOS --out predictions.csv

The page is one file: test images with prediction, truth and saliency maps, first-layer
filters, the most confident mistakes, what each class wants to see, and two networks on the
same images.
"""
import base64
import csv
import html
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import data
import models
import report
from recipes import Parser, fail, one_line_errors, path, read_json, say, write_whole

IMAGES = 12         # of a section, and classes
FILTERS = 32        # of the first layer
# Activation maximisation. Without blur and shifts the images are stripes: patterns that a
# shift by one pixel would undo.
STEPS = 96
STEP = 0.02         # root mean square of a step, whatever the size of the logits
WEIGHT = 150        # λ
START = 0.01        # deviation of the first image
BLUR_EVERY = 4      # steps
PAPER = "Simonyan, Vedaldi & Zisserman 2013, arXiv 1312.6034"


# ---- networks -----------------------------------------------------------------------

class Trained:
    """One trained network: a run's folder, or the best.pt in it; average: of its weights.

    Call it on pixels (B, 3, H, W), from 0 to 1: it normalises them as in its training and
    returns logits (B, classes). on_test: its logits on the test split, (N, classes).
    """

    def __init__(self, run, device="cpu", average=False):
        self.file = Path(run).resolve()
        if self.file.is_dir():
            self.file /= "best.pt"
        network, self.checkpoint = models.load(self.file, average)
        self.device = common.pick_device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.average, self.on_test = average, None
        self.name = self.file.parent.name
        if average:
            self.name += ", average"
        self.classes = self.checkpoint["classes"]
        self.image_shape = self.checkpoint["build"]["image_shape"]
        self.fit = self.checkpoint.get("fit", "resize")
        self.mean, self.std = self.checkpoint["mean"], self.checkpoint["std"]

    def __call__(self, pixels):
        mean = pixels.new_tensor(self.mean).view(3, 1, 1)
        std = pixels.new_tensor(self.std).view(3, 1, 1)
        return self.network((pixels - mean) / std)

    def outputs(self, split, precision="fp32"):
        """Return the logits on a split, (N, classes), on the CPU."""
        size, logits = data.scoring_size(split.images.shape[1:3]), []
        batches = data.Batches(split, self.mean, self.std, size, self.device)
        common.evaluate(self.network, batches, precision, logits)
        return torch.cat(logits).cpu()


def test_split(config, one, data_dir=None):
    """Return the test split that a run was scored on; refuse other images, by their key."""
    data_dir = data_dir or config["data_dir"]
    splits = data.load(config["dataset"], data_dir, image_size=one.image_shape[1],
                       fit=one.fit, skip_bad=config["skip_bad"])
    if splits.key != config["data_key"]:
        fail(f"{data_dir}: not the images of {one.file}, by their data key; give --data-dir")
    return splits.test


def other_network(one, config, beside=None):
    """Return (the network to set beside this one, or None; why there is none).

    beside: a run. Without it the teacher of config.json, if its weights are still those that
    taught, or the average of the network's own weights (of the average, the network).
    """
    if beside:
        other = Trained(beside, str(one.device))
    elif config.get("teacher_sha256"):
        runs = one.file.parent.parent
        file = Path(config["teacher"] or runs / f"teacher-s{config['seed']}" / "best.pt")
        if not file.is_file():
            return None, f"its teacher is not in {file}"
        other = Trained(file, str(one.device))
        if models.weights_sha256(other.checkpoint["model"]) != config["teacher_sha256"]:
            return None, f"{file} is not the network that taught it (other weights)"
    elif one.checkpoint.get("ema") is not None:
        other = Trained(one.file, str(one.device), not one.average)
    else:
        return None, "its config.json names no teacher"
    if (one.classes, one.image_shape) != (other.classes, other.image_shape):
        fail(f"{other.file}: other classes or images than {one.file}; give another --beside")
    if other.name == one.name:
        other.name = str(other.file.parent)
    return other, None


# ---- what to look at ----------------------------------------------------------------

def mistakes(logits, labels):
    """Return the rows that are wrong, surest first; logits (N, classes), labels (N,)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    return wrong[confidence[wrong].argsort(descending=True, stable=True)]


def filters(network, image_shape):
    """Return (weights of the first layer, how many there are), the FILTERS of largest norm.

    The weights are (FILTERS, 3, k, k); those of a fully connected layer have the shape of an
    image.
    """
    layer = next(module for module in network.modules()
                 if isinstance(module, (nn.Conv2d, nn.Linear)))
    weight = layer.weight.detach().float().cpu()
    if weight.ndim == 2:
        weight = weight.view(len(weight), *image_shape)
    order = weight.flatten(1).norm(dim=1).argsort(descending=True, stable=True)
    return weight[order[:FILTERS]], len(weight)


def saliency(logits, pixels, classes):
    """Return |d logit / d pixel|, (B, H, W), the largest of the channels.

    logits: a function of pixels (B, 3, H, W). classes (B,): the logit of each image. PAPER,
    section 3.
    """
    pixels = pixels.detach().requires_grad_()
    chosen = logits(pixels).gather(1, classes[:, None]).sum()       # images do not mix
    slope, = torch.autograd.grad(chosen, pixels)
    return slope.abs().amax(1)


def maximise(logits, classes, grey, size, steps=STEPS):
    """Return an image for each class that makes its logit large, (classes, 3, size, size).

    Gradient ascent on logit − λ·mean (image − grey)², PAPER, section 2; grey: the colour that
    it starts from, (3,). Each gradient is taken with the image rolled by up to an eighth of
    its side, and every few steps the image is blurred by half.
    """
    g = torch.Generator().manual_seed(0)
    place, most = classes.device, size // 8
    grey = torch.tensor(grey, device=place).view(1, 3, 1, 1)
    # Noise breaks ties: of equal values a max pool passes the gradient to the first alone.
    noise = torch.randn(len(classes), 3, size, size, generator=g).to(place)
    x = (grey + START * noise).clamp(0, 1)
    for step in range(steps):
        shift = torch.randint(-most, most + 1, (2,), generator=g).tolist()
        x.requires_grad_()
        rolled = x.roll(shift, (2, 3))
        reached = logits(rolled).gather(1, classes[:, None]).sum()
        distance = (x - grey).pow(2).mean((1, 2, 3)).sum()
        slope, = torch.autograd.grad(reached - WEIGHT * distance, x)
        length = slope.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
        x = x.detach() + STEP * slope / length.clamp(min=1e-12)
        x = x.clamp(0, 1)
        if step % BLUR_EVERY == 1:
            padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = (x + F.avg_pool2d(padded, 3, 1)) / 2
    return x


# ---- HTML ---------------------------------------------------------------------------

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tutor</title><style>
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; }
h1, h2, p, figcaption { overflow-wrap: anywhere; }
.tiles { display: grid; gap: 1rem .75rem;
         grid-template-columns: repeat(auto-fill, minmax(min(var(--wide), 100%), 1fr)); }
figure { margin: 0; } .row { display: flex; gap: 3px; }
figcaption { font-size: .85rem; line-height: 1.35; }
img { flex: 1; width: 100%; min-width: 0; image-rendering: pixelated; }
</style></head><body>
"""


def section(title, text, tiles=(), width="14rem"):
    """Return a section of tiles, each at least this wide, below a paragraph of text."""
    return (f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
            f'<div class="tiles" style="--wide: {width}">{"".join(tiles)}</div>\n')


def tile(pictures, lines=()):
    """Return a figure: pictures, {what it shows: uint8 array}, above lines of text."""
    shown = []
    for alt, array in pictures.items():
        memory = io.BytesIO()
        Image.fromarray(array).save(memory, "PNG")
        code = base64.b64encode(memory.getvalue()).decode()
        shown.append(f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt)}">')
    return (f'<figure><div class="row">{"".join(shown)}</div>'
            f"<figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption></figure>")


def as_bytes(values):
    """Return images (..., 3, H, W), from 0 to 1, as uint8, channels last."""
    values = (values.detach().cpu() * 255).round().to(torch.uint8)
    return values.movedim(-3, -1).contiguous().numpy()


def percent(share):
    return f"{100 * share:.2f} %"


# ---- sections of the page -----------------------------------------------------------

def test_tiles(test, rows, networks):
    """Return a tile for each of some rows of the test split: the image, what each network
    says of it, and the saliency of that class."""
    classes, tiles = networks[0].classes, []
    for row in map(int, rows):
        image, truth = np.array(test.images[row]), test.labels[row]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255       # (1, 3, H, W)
        pictures, lines = {f"test image {row}": image}, []
        for one in networks:
            chance, predicted = one.on_test[row].softmax(0).max(0)
            mark = "✓" if predicted == truth else "✗"
            lines.append(f"{mark} {one.name}: {classes[predicted]}, {percent(chance)}")
            slope = saliency(one, pixels.to(one.device), predicted.to(one.device)[None])
            slope = slope / slope.max().clamp(min=1e-30)
            pictures[f"saliency of {one.name}"] = as_bytes(slope.expand(3, -1, -1))
        lines.append(f"is {classes[truth]} · #{row}")
        tiles.append(tile(pictures, lines))
    return tiles


def filter_section(one):
    weights, total = filters(one.network, one.image_shape)
    scaled = weights / weights.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    tiles = [tile({"filter": image}) for image in as_bytes((scaled + 1) / 2)]
    return section("First layer", (
        f"{len(weights)} of {total} filters, the largest norm first, each divided by its "
        "largest absolute weight; mid-grey is 0."), tiles, "4rem")


def class_section(one):
    classes, tiles = torch.arange(len(one.classes), device=one.device)[:IMAGES], []
    found = maximise(one, classes, one.mean, one.image_shape[1])
    with torch.no_grad():
        shares = one(found).softmax(1)
    for c, image in enumerate(as_bytes(found)):
        line = f"{one.classes[c]}, {percent(shares[c, c])}"
        tiles.append(tile({f"an image for {one.classes[c]}": image}, [line]))
    return section("What a class wants to see", (
        f"Activation maximisation ({PAPER}, section 2): {STEPS} steps up the gradient of "
        f"logit − {WEIGHT}·mean (image − grey)², from grey with a little noise; not in the "
        "paper: small shifts and a blur. Below: the class, its probability on the image."),
        tiles, "9rem")


def beside_section(test, one, other, order):
    """order: the rows of the test split in the order in which to take them."""
    agreement, divergence = report.against(one.on_test.numpy(), other.on_test.numpy())
    differ = one.on_test.argmax(1) != other.on_test.argmax(1)
    rows = order[differ[order].numpy()]
    return section(f"{one.name} and {other.name}", (
        f"They say the same class on {percent(agreement)} of the test images; mean KL from "
        f"{other.name} to {one.name}: {divergence:.3f}. Images on which they differ:"),
        test_tiles(test, rows[:IMAGES], [one, other]), "20rem")


# ---- the page -----------------------------------------------------------------------

def make_page(args):
    """Write the page of a run; return {"page", "mistakes" (how many), "beside"}."""
    one = Trained(args.run, args.device, args.average)
    config = read_json(one.file.parent / "config.json")     # it names the test images
    test = test_split(config, one, args.data_dir)
    other, why = other_network(one, config, args.beside)
    one.on_test = one.outputs(test, config["precision"])

    n = len(test.labels)
    order = np.random.default_rng(0).permutation(n)
    wrong = mistakes(one.on_test, torch.from_numpy(test.labels))
    right = n - len(wrong)
    arch = one.checkpoint["build"]["arch"]
    parts = [
        section("Test images", (
            f"{arch} on {config['dataset']}: {right} of {n} right, {percent(right / n)}. "
            "Beside an image |d logit / d pixel| of the class that the network says, the "
            f"largest of the channels ({PAPER}, section 3), white the largest of its image. "
            "Below: that class, its probability, the true class, the row."),
            test_tiles(test, order[:IMAGES], [one])),
        filter_section(one),
        section("Most confident mistakes", (
            f"Of {len(wrong)} wrong test images those with the highest probability."),
            test_tiles(test, wrong[:IMAGES], [one])),
        class_section(one),
    ]
    name = None
    if other:
        name = other.name
        other.on_test = other.outputs(test, config["precision"])
        parts.append(beside_section(test, one, other, order))
    else:
        parts.append(section("Beside another network", f"None: {why}; give --beside RUN."))
    file = Path(args.out or one.file.parent / "look.html")
    page = f"{HEAD}<h1>{html.escape(one.name)}</h1>{''.join(parts)}</body></html>\n"
    write_whole(file, page.encode(errors="backslashreplace"))
    say(f"{file}: {right} of {n} test images right")
    return {"page": str(file), "mistakes": len(wrong), "beside": name}


# ---- predictions --------------------------------------------------------------------

def predict(run, images, average=False, device="cpu"):
    """Classify image files with a run's best.pt; return {path: {class: probability}}.

    images: paths of any size and mode; of a folder every image below it, sorted. Nothing else
    of the run is needed.
    """
    one, files, found = Trained(run, device, average), [], {}
    for file in map(Path, images):
        files += data.image_files(file, []) if file.is_dir() else [file]
    pixels, bad = data.decode(files, one.image_shape[1], one.fit, "decoding")
    why = next(iter(bad.values()), f"{images[0]}: an empty folder")
    if len(bad) == len(files):
        fail(why)
    if bad:
        say(f"note: {len(bad)} of {len(files)} files left out; the first: {why}")
    unknown = np.zeros(len(files), np.int64)
    shares = one.outputs(data.Split(pixels, unknown)).softmax(1).tolist()
    for row, file in enumerate(files):
        if row not in bad:
            found[str(file)] = dict(zip(one.classes, shares[row], strict=True))
    return found


def show_predictions(args):
    """Print what a network says of images, or write a CSV into --out; return predict's."""
    found = predict(args.run, args.files, args.average, args.device)
    lines = []
    for file, shares in found.items():
        likely = max(shares, key=shares.get)
        lines.append([file, likely, shares[likely], *shares.values()])
        say(f"{file}: {likely} {percent(shares[likely])}")
    if args.out:
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["path", "class", "probability", *shares])
        table.writerows(lines)
        write_whole(args.out, text.getvalue().encode(errors="surrogateescape"))
    return found


# ---- the script ---------------------------------------------------------------------

def main(argv=None):
    """Write the page of a run, or print predictions; see make_page and predict."""
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    predicting = argv[:1] == ["predict"]
    parser = Parser("%(prog)s [predict] RUN [IMAGE ...] [--flag value ...]",
                    description=__doc__)
    parser.add_argument("run", type=path, metavar="RUN",
                        help="a run's folder, or the best.pt in it")
    if predicting:
        argv = argv[1:]
        parser.add_argument("files", type=path, metavar="IMAGE", nargs="+",
                            help="an image, or a folder of them")
    else:
        parser.add_argument("--beside", type=path, metavar="RUN",
                            help="another run; default: the teacher of config.json")
        parser.add_argument("--data-dir", type=path, metavar="DIR",
                            help="where the images are; default: where they were")
    parser.add_argument("--average", action="store_true", help="of the weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    parser.add_argument("--out", type=path, metavar="FILE",
                        help="the page (RUN/look.html), or a CSV of predictions")
    args = parser.parse_args(argv)
    with one_line_errors():
        if predicting:
            return show_predictions(args)
        return make_page(args)


if __name__ == "__main__":
    main()
