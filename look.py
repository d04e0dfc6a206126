"""Look at one trained network: a page of pictures, and predictions for pictures of one's own.

    python look.py results/digits/kd-s0                     writes look.html there, teacher beside
    python look.py --average results/digits/mean-teacher-s0
    python look.py results/digits/student-s0 --beside results/digits/kd-s0
    python look.py predict results/digits/kd-s0 photo.png another.jpg
    python look.py predict --average results/digits/mean-teacher-s0 photo.png

The page is one file: test images with prediction and truth, first-layer filters, the most confident
mistakes, saliency maps, what each class wants to see, and two networks on the same images.
"""
from flags import (  # noqa: I001
    FLAGS, Parser, a_file, a_path, could_be_a_path, fail, launch, number, plain, say, words)
import html
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import decode
import models
from compare import against, log_softmax
from device import guard, pick_precision
from render import frame, section, tile
from files import read_json, write_whole
from runs import short

FILTERS = 32        # of the first layer that are shown
# Activation maximisation. A step is the gradient scaled to this root mean square, so that networks
# with large and with small logits walk alike. Without blur and shifts the pictures of convolutional
# networks are stripes: patterns that a pixel's shift would undo.
STEPS, STEP, WEIGHT, START, BLURRED = 96, 0.02, 150, 0.01, 4
PAPER = "Simonyan, Vedaldi &amp; Zisserman 2013, arXiv 1312.6034"


# ---- networks ---------------------------------------------------------------------------------

def open_network(run, device="cpu", average=False):
    """Return one trained network: file, name, network, card, and logits, a function of pixels
    (B, 3, H, W) from 0 to 1, which it normalises as the network was trained.

    run: a run's folder, or its best.pt; average: the average of the weights.
    """
    file = Path(run)
    file = file / "best.pt" if file.is_dir() else file
    network, card = models.load(file, average)
    network = network.to(device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(card[key], dtype=torch.float32, device=device).view(1, 3, 1, 1)
                 for key in ("mean", "std"))
    return SimpleNamespace(
        file=file, name=file.parent.resolve().name + ", average" * average, network=network,
        card=card, epoch=card.get("ema_epoch" if average else "epoch"), device=device,
        logits=lambda pixels: network((pixels - mean) / std))


def outputs(one, test, precision):
    """Return a network's logits on a split, (N, classes)."""
    size = data.scoring_size(test.images.shape[1:3])
    batches = data.Batches(test, one.card["mean"], one.card["std"], size, one.device)
    common.evaluate(one.network, batches, precision, kept := [])
    return common.cards.finite(one.file, torch.cat(kept)).cpu().numpy()


def read_config(file):
    """Return the config.json beside a best.pt: it names the images to test on."""
    path = file.parent / "config.json"
    if not path.is_file():
        fail(f"{path}: no such file, and only it names the test images of {file.name}; give the "
             "whole folder of a run, or pictures of your own: look.py predict RUN IMAGE")
    config = read_json(path)
    for key in ("dataset", "data_dir", "data_key", "teacher", "teacher_sha256"):
        value, needed = config.get(key), not key.startswith("teacher")
        if needed and key not in config:
            fail(f"{path}: lacks {key!r}; train this run again with --overwrite")
        if not isinstance(value, str if needed else str | None) or not could_be_a_path(value or ""):
            fail(f"{path}: {key} is {value!r}, no text; train this run again with --overwrite")
    return config


def test_split(config, card, file, data_dir=None):
    """Return the test split that a run was scored on; refuse other images, by their key."""
    data_dir, size = data_dir or config["data_dir"], card["build"]["image_shape"][1]
    splits = data.load(config["dataset"], data_dir, image_size=size, fit=card.get("fit", "resize"),
                       skip_bad=bool(config.get("skip_bad")))
    if splits.key != config["data_key"]:
        fail(f"{data_dir}: not the images of {file} (data key {short(splits.key)}, in its "
             f"config.json {short(config['data_key'])}); give the right ones with --data-dir")
    return splits.test


def companion(one, config, beside=None, average=False):
    """Return (the network to set beside this one, or None; why there is none).

    beside: a run; without it the teacher that config.json names, if its weights are still those
    that taught; for a student of its own average, that average (or, of the average, the student).
    """
    if beside:
        other = open_network(beside, one.device)
    elif config.get("teacher_sha256"):
        default = one.file.parent.resolve().parent / f"teacher-s{config.get('seed')}" / "best.pt"
        path = Path(config.get("teacher") or default)
        if not path.is_file():
            return None, f"its teacher is not in {path}"
        other = open_network(path, one.device)
        if models.weights_sha256(other.card["model"]) != config["teacher_sha256"]:
            return None, f"{path} is not the network that taught it (other weights)"
    elif config.get("objective") and one.card.get("ema") is not None:
        other = open_network(one.file, one.device, not average)
    else:
        return None, "its config.json names no teacher"
    mine, theirs = ((list(n.card["classes"]), list(n.card["build"]["image_shape"]))
                    for n in (one, other))
    if mine != theirs:
        fail(f"{other.file}: {len(theirs[0])} classes, {theirs[0][0]!r} the first, images of "
             f"{theirs[1]}; {one.file}: {len(mine[0])}, {mine[0][0]!r}, {mine[1]}; both must be of "
             "the same images and classes: give another --beside")
    if other.name == one.name:
        one.name, other.name = str(one.file.parent), str(other.file.parent)
    return other, None


# ---- what to look at --------------------------------------------------------------------------

def mistakes(logits, labels):
    """Return the rows that are wrong, surest first; logits (N, classes), labels (N,)."""
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    return wrong[np.argsort(-log_softmax(logits[wrong]).max(1), kind="stable")]


def filters(network, image_shape, count=FILTERS):
    """Return the weights of the first layer, (at most count, 3, k, k), largest norm first, and
    how many there are; those of a fully connected layer as images of image_shape."""
    layer = next(m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    weight = layer.weight.detach().float().cpu()
    weight = weight.view(len(weight), *image_shape) if weight.ndim == 2 else weight
    order = weight.flatten(1).norm(dim=1).argsort(descending=True, stable=True)
    return weight[order[:count]], len(weight)


def saliency(logits, pixels, classes):
    """Return |d logit / d pixel|, (B, H, W), the largest of the channels.

    logits: a function of pixels (B, 3, H, W); classes (B,): the logit of each image. Simonyan,
    Vedaldi & Zisserman 2013, arXiv 1312.6034, section 3.
    """
    pixels = pixels.detach().requires_grad_()
    chosen = logits(pixels).gather(1, classes[:, None]).sum()       # images do not mix
    (slope,) = torch.autograd.grad(chosen, pixels)
    return slope.abs().amax(1)


def maximise(logits, classes, grey, size, seed=0, steps=STEPS):
    """Return an image for each class that makes its logit large, (len(classes), 3, size, size), in
    steps of 1/255 from 0 to 1.

    Gradient ascent on logit − λ·mean (image − grey)², the same paper, section 2; grey: the colour
    that it starts from, (3,). Each gradient is taken with the image rolled by up to an eighth of
    its side, and every few steps the image is blurred by half.
    """
    g, place = torch.Generator().manual_seed(seed), classes.device
    grey = torch.tensor(grey, dtype=torch.float32, device=place).view(1, 3, 1, 1)
    # The noise breaks ties: of equal values a max pool would pass the gradient to the first alone.
    noise = START * torch.randn(len(classes), 3, size, size, generator=g).to(place)
    x = (grey + noise).clamp(0, 1)
    for step in range(steps):
        shift = torch.randint(-(size // 8), size // 8 + 1, (2,), generator=g).tolist()
        x.requires_grad_()
        score = logits(x.roll(shift, (2, 3))).gather(1, classes[:, None]).sum()
        score = score - WEIGHT * (x - grey).pow(2).mean((1, 2, 3)).sum()
        (slope,) = torch.autograd.grad(score, x)
        length = slope.pow(2).mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        x = (x.detach() + STEP * slope / length).clamp(0, 1)
        if step % BLURRED == 0 and step < steps - BLURRED:
            x = (x + F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)) / 2
    return (x * 255).round() / 255


# ---- the page ---------------------------------------------------------------------------------

def as_bytes(values):
    """Return images (B, 3, H, W) or maps (B, H, W), from 0 to 1, as uint8, channels last."""
    values = (values.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return (values.permute(0, 2, 3, 1) if values.ndim == 4 else values).contiguous().numpy()


def heat(maps):
    """Return maps (B, H, W) as uint8, each divided by its own largest value."""
    return as_bytes(maps / maps.flatten(1).amax(1)[:, None, None].clamp(min=1e-30))


def test_tiles(test, rows, seen, maps=True):
    """Return a figure for each of some test images: the image, with maps a saliency map for each
    network of seen, ((network, its logits on test), ...), and what they say."""
    labels, names = test.labels[rows], seen[0][0].card["classes"]
    pixels = torch.from_numpy(test.images[rows]).to(seen[0][0].device).permute(0, 3, 1, 2) / 255
    pictures = [[(image, f"test image {row}: {names[label]}")] for image, row, label in
                zip(as_bytes(pixels), rows, labels, strict=True)]
    lines, wrong = [[] for _ in rows], np.zeros(len(rows), bool)
    for one, logits in seen:
        said = logits[rows].argmax(1)
        chances = 100 * np.exp(log_softmax(logits[rows]).max(1))
        if maps:
            hot = heat(saliency(one.logits, pixels, torch.from_numpy(said).to(one.device)))
        wrong |= said != labels
        for i, c in enumerate(said):
            mark = "✗" if c != labels[i] else "✓"
            who = f"{one.name}:" if len(seen) > 1 else "says"
            lines[i].append(f"{mark} {who} {names[c]}, {chances[i]:.1f}\u00a0%")
            pictures[i] += [(hot[i], f"saliency of {names[c]}, {one.name}")] if maps else []
    for line, label, row in zip(lines, labels, rows, strict=True):
        line.append(f"is {names[label]} · #{row}")
    return [tile(*parts) for parts in zip(pictures, lines, wrong, strict=True)]


def filter_section(one):
    """Return the section of the first layer's weights."""
    weights, total = filters(one.network, one.card["build"]["image_shape"])
    scaled = weights / weights.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    some = f"The {len(weights)} largest of {total}" if len(weights) < total else f"All {total}"
    return section("First layer", (
        f"{some} filters of the first layer, {weights.shape[3]}×{weights.shape[2]} pixels, by the "
        "norm of their weights. Red, green and blue are the weights of these (normalised) "
        "channels, each filter divided by its own largest absolute weight; mid-grey is 0."),
        [tile([(image, f"filter {i}")], ())
         for i, image in enumerate(as_bytes((scaled + 1) / 2), 1)], "4rem")


def class_section(one, classes, seed):
    """Return (section, {class: probability reached}) of activation maximisation."""
    card, chosen = one.card, torch.tensor(classes, device=one.device)
    names, total = [card["classes"][c] for c in classes], len(card["classes"])
    found = maximise(one.logits, chosen, card["mean"], card["build"]["image_shape"][1], seed)
    with torch.no_grad():
        reached = one.logits(found).softmax(1).gather(1, chosen[:, None])[:, 0].tolist()
    drawn = f"{len(names)} of {total} classes, drawn with seed {seed}. " * (len(names) < total)
    return section("What a class wants to see", (
        f"{drawn}Activation maximisation ({PAPER}, section 2): {STEPS} steps up the gradient of "
        f"logit − λ·mean (image − grey)², λ {WEIGHT}, pixels from 0 to 1; grey, where it starts "
        f"with noise of deviation {START}, seed {seed}, is the colour that normalises to 0; a step "
        f"is the gradient scaled to a root mean square of {STEP}. Not in the paper: at each step "
        f"the image is rolled by up to an eighth of its side, and every {BLURRED} steps averaged "
        "with its own 3×3 blur. Below: the class, and its probability on the image as shown."),
        [tile([(image, f"an image for the class {name}")], (f"{name}, {100 * p:.1f}\u00a0%",))
         for image, name, p in zip(as_bytes(found), names, reached, strict=True)],
    ), dict(zip(names, reached, strict=True))


def beside_section(test, mine, theirs, order, count):
    """Return (section, agreement) of two networks, each (network, its logits on test)."""
    (one, a), (other, b) = mine, theirs
    agreement, divergence = against(a, b)
    right = [logits.argmax(1) == test.labels for logits in (a, b)]
    differ = order[(a.argmax(1) != b.argmax(1))[order]][:count - count // 3]
    agree = order[(a.argmax(1) == b.argmax(1))[order]][:count - len(differ)]
    shares = [(np.mean(x & y), title) for title, x, y in (
        ("both are right", *right), (f"only {one.name}", right[0], ~right[1]),
        (f"only {other.name}", ~right[0], right[1]), ("neither", ~right[0], ~right[1]))]
    told = ", ".join(f"{html.escape(title)} on {100 * share:.2f}&nbsp;%" for share, title in shares)
    names = html.escape(f"{one.name} and {other.name}")
    return section(f"{names} on the same images", (
        f"Of {len(a)} test images they say the same class on {100 * agreement:.2f}&nbsp;%; {told}. "
        f"Mean KL from {html.escape(other.name)} to {html.escape(one.name)}: {divergence:.3f}. "
        f"Each image, and its saliency for {names}, of the class that each says, as above: "
        f"{len(differ)} images on which they differ, then {len(agree)} on which they agree."),
        test_tiles(test, np.concatenate([differ, agree]), (mine, theirs)), "20rem"), agreement


def build(args):
    """Return (the page as HTML, the network, what main returns)."""
    device = common.pick_device(args.device)
    one = open_network(args.run, device, args.average)
    config, names = read_config(one.file), one.card["classes"]
    test = test_split(config, one.card, one.file, args.data_dir)
    other, why = companion(one, config, args.beside, args.average)
    # As the run was scored; bf16 only where it is native.
    auto = pick_precision("auto", device)
    precision = "fp32" if config.get("precision") == "fp32" else auto
    logits = outputs(one, test, precision)
    rng, n = np.random.default_rng(args.seed), len(test.labels)
    order, wrong = rng.permutation(n), mistakes(logits, test.labels)
    sample, mine = order[:args.images], (one, logits)
    classes = sorted(rng.permutation(len(names))[:args.images].tolist())
    wanted, reached = class_section(one, classes, args.seed)
    accuracy = 1 - len(wrong) / n
    parts = [
        f"<p>{html.escape(one.card['build']['arch'])}, {models.count_parameters(one.network):,} "
        f"parameters, weights after epoch {one.epoch}. {n - len(wrong)} of {n} test images right "
        f"({100 * accuracy:.2f} %); {html.escape(str(config['dataset']))}, {len(names)} classes; "
        f"{device.type}, {precision}.</p>",
        section("Test images", f"{len(sample)} of {n}, drawn with seed {args.seed}: the class that "
                "the network says, its probability (softmax), the true class and the image's row.",
                test_tiles(test, sample, (mine,), maps=False)),
        filter_section(one),
        section("Most confident mistakes", f"Of {len(wrong)} wrong test images those with the "
                "highest probability." if len(wrong) else "None: every test image is right.",
                test_tiles(test, wrong[:args.images], (mine,), maps=False) if len(wrong) else ()),
        section("Saliency", "The first images again; beside each |d logit / d pixel| of the class "
                f"that the network says, the largest of the three channels ({PAPER}, section 3). "
                "White is the largest of its image.",
                test_tiles(test, sample, (mine,)), "15rem"),
        wanted]
    agreement = None
    if other:
        theirs = other, outputs(other, test, precision)
        found, agreement = beside_section(test, mine, theirs, order, args.images)
        parts.append(found)
    else:
        parts.append(f"<h2>Beside another network</h2><p>None is shown: {html.escape(why)}; "
                     "--beside RUN takes any run on the same images.</p>")
    facts = dict(network=one.name, test_accuracy=accuracy, mistakes=len(wrong), reached=reached,
                 beside=other and other.name, agreement=agreement)
    return frame(f"Tutor: {one.name}", "\n".join(parts)), one, facts, why


# ---- predictions ------------------------------------------------------------------------------

def predict(run, images, average=False, top=3):
    """Classify image files with a run's best.pt; nothing else of the project's data is needed.

    run: the run's folder or its best.pt; images: paths, of any size and mode. Returns a list of
    {"image", "class", "probability", "top": [(class, probability), …]}.
    """
    one, found = open_network(run, average=average), []
    if str(one.card.get("fit")) not in decode.FITS:
        fail(f"{one.file}: does not say how images are brought to its size; train it again")
    for image in images:
        try:
            with decode.decoding():
                pixels = decode.read_image(Path(image), one.card["build"]["image_shape"][1],
                                           one.card["fit"])
        except (ValueError, OSError, MemoryError) as error:
            fail(error)
        x = torch.tensor(pixels).permute(2, 0, 1)[None] / 255               # (1, 3, H, W)
        shares = common.cards.finite(one.file, one.logits(x)).softmax(1)[0]
        best = shares.argsort(descending=True)[:top].tolist()
        likely = [(one.card["classes"][i], float(shares[i])) for i in best]
        found.append({"image": str(image), "class": likely[0][0], "probability": likely[0][1],
                      "top": likely})
    return found


def main_predict(argv):
    parser = Parser(prog="look.py predict", description=__doc__,
                    usage="%(prog)s [--average] RUN IMAGE [IMAGE ...]")
    parser.add_argument("run", type=a_path, metavar="RUN", help="a run's folder, or a best.pt")
    parser.add_argument("images", type=a_path, metavar="IMAGE", nargs="+",
                        help="any image that PIL reads")
    parser.add_argument("--average", action="store_true", help="use the average of the weights")
    args = parser.parse_args(argv)
    with guard(args):
        found = predict(args.run, args.images, args.average)
    for one in found:
        shares = "  ".join(f"{name} {100 * p:.1f} %" for name, p in one["top"])
        print(plain(f"{one['image']}: {shares}"))
    return found


def main(argv=None):
    """Write the page of a run; returns a dict: page, network, test_accuracy, mistakes (a count),
    reached ({class: probability}), beside, agreement. `predict`: its list."""
    argv = words(argv)
    if argv[:1] == ["predict"]:
        return main_predict(argv[1:])
    parser = Parser(description=__doc__, usage="%(prog)s RUN [--flag value ...]")
    parser.add_argument("run", type=a_path, metavar="RUN",
                        help="a run's folder, or the best.pt in it")
    parser.add_argument("--average", action="store_true", help="use the average of the weights")
    parser.add_argument("--beside", type=a_path, metavar="RUN",
                        help="another run to set beside; default: the teacher that config.json "
                             "names")
    parser.add_argument("--images", type=number(int, 1, 100), default=12, metavar="N",
                        help="images, and classes, of a section (12)")
    parser.add_argument("--seed", default=0, **FLAGS["training"]["seed"])
    parser.add_argument("--data-dir", type=a_path, metavar="DIR",
                        help="where the images lie; default: where they lay")
    parser.add_argument("--device", default="auto", **FLAGS["run"]["device"])
    parser.add_argument("--out", type=a_file, metavar="FILE",
                        help="where to; default: look.html in the run's folder")
    args = parser.parse_args(argv)
    with guard(args):
        page, one, facts, why = build(args)
    path = Path(args.out or one.file.parent / "look.html")
    try:
        write_whole(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}); give another --out FILE")
    say(plain(f"page     {path}, {len(page) / 1e6:.1f} MB"))
    say(f"test     {100 * facts['test_accuracy']:.2f} %, {facts['mistakes']} mistakes")
    say(f"beside   {facts['beside']}, the same class on {100 * facts['agreement']:.2f} %"
        if facts["beside"] else f"beside   none: {why}")
    return dict(page=str(path), **facts)


if __name__ == "__main__":
    launch(main)
