"""The networks: a plain ConvNet is a line of numbers in ARCHITECTURES. Checkpoints.

    net = models.build("cifar10-he-max-student", num_classes=10, image_shape=(3, 32, 32))
    net(torch.zeros(8, 3, 32, 32))          # logits, (8, 10)
    net.embed(torch.zeros(8, 3, 32, 32))    # input of the last Linear, (8, 256)
    models.count_parameters(net)
"""
import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from recipes import fail, write_whole

# A line a network: channels, kernels and paddings have a number for each conv, all of stride
# 1; a 2×2 pool with stride 2 follows the convs named in pools, counted from 1; hidden are the
# widths of the fully connected layers before the logits. An entry may also be a function
# (image_shape, num_classes) -> Network, which has its own initial weights, pools, activation
# and norm: what the flags say of these is not for it. Its features end in maps (B, C, H, W).
ARCHITECTURES = {
    # Small enough for `make all` in minutes, far enough apart that there is something to distil.
    # A student with 32 hidden units dies on some seeds: all ReLUs off, accuracy at chance.
    "digits-teacher": dict(
        channels=(16, 32, 32, 64, 64), kernels=(3,) * 5, paddings=(1,) * 5,
        pools=(1, 3, 5), hidden=(128,)),
    "digits-student": dict(
        channels=(6, 12, 16), kernels=(3,) * 3, paddings=(1,) * 3, pools=(1, 2, 3), hidden=(64,)),
    # Reports 000 and 001 say: 12 convs and 1 pool, 4 convs and 1 pool, 12 filters first, one
    # hidden layer of 512. The other widths and the place of the pool are chosen here.
    "tinyimagenet-teacher": dict(
        channels=(12, 24, 48) + (96,) * 9, kernels=(3,) * 12, paddings=(1,) * 12,
        pools=(3,), hidden=(512,)),
    "tinyimagenet-student": dict(
        channels=(12, 20, 20, 16), kernels=(3,) * 4, paddings=(1, 0, 0, 0), pools=(1,),
        hidden=(512,)),
    # Report 002 says: 7 convs and 1 pool, 6 filters first; 2 convs and 1 pool; one hidden layer
    # of 256. Widths, kernels and the place of the pool are chosen here: doubling from 6 and capped
    # at 96 with the pool at the end underfits, an early pool buys width where it is cheap.
    "cifar10-he-max-teacher": dict(
        channels=(6, 48, 96, 128, 128, 128, 128), kernels=(3,) * 7, paddings=(1,) * 7,
        pools=(2,), hidden=(256,)),
    "cifar10-he-max-student": dict(
        channels=(12, 32), kernels=(3, 5), paddings=(1, 2), pools=(2,), hidden=(256,)),
    # Report 003, exactly: 75 264 and 14 400 inputs to the first fully connected layer. Both
    # networks of its EMA pair are the teacher.
    "cifar10-xavier-avg-teacher": dict(
        channels=(6, 12, 24, 48, 96, 192, 384), kernels=(3, 3, 3, 3, 3, 5, 5), paddings=(1,) * 7,
        pools=(7,), hidden=(256,)),
    "cifar10-xavier-avg-student": dict(
        channels=(6, 36, 64), kernels=(3, 3, 5), paddings=(1, 1, 1), pools=(3,), hidden=(256,)),
    # Report 004's teacher has a pool after each of 8 convs, which 32×32 pixels cannot bear
    # (32→16→8→4→2→1: the sixth pool has nothing left). Changed: a pool after every second conv.
    # Its student is as described. No widths are given: chosen here.
    "svhn-xavier-avg-teacher": dict(
        channels=(16, 32, 48, 64, 96, 96, 128, 128), kernels=(3,) * 8, paddings=(1,) * 8,
        pools=(2, 4, 6, 8), hidden=(256,)),
    "svhn-xavier-avg-student": dict(
        channels=(16, 32), kernels=(3, 3), paddings=(1, 1), pools=(1, 2), hidden=(128,)),
    "mlp": dict(hidden=(256, 256)),
}
# Report 000's MLPs, "hidden layers × nodes", in both readings of its columns: mlp-<layers>x<nodes>.
ARCHITECTURES |= {f"mlp-{layers}x{nodes}": dict(hidden=(nodes,) * layers)
                  for a, b in ((13, 3), (13, 2), (13, 4), (12, 3), (14, 3))
                  for layers, nodes in ((a, b), (b, a))}


class AHAF(nn.Module):
    """x·β·σ(γ·x), one β and one γ a layer, both learned; it starts as SiLU.

    Bodyanskiy & Kostiuk, "Adaptive hybrid activation function for deep neural networks".
    """

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.beta * torch.sigmoid(self.gamma * x)


# The module, and its gain: what a layer must multiply its weights by so that the activation does
# not shrink the variance. √2 for ReLU (He et al. 2015, arXiv 1502.01852, section 2.2) and, nearly,
# for its smooth kin; 1 for SELU, which normalises itself (arXiv 1706.02515, section 3), and ELU.
ACTIVATIONS = {
    "relu": (nn.ReLU, 2 ** 0.5), "elu": (nn.ELU, 1.0), "selu": (nn.SELU, 1.0),
    "silu": (nn.SiLU, 2 ** 0.5), "gelu": (nn.GELU, 2 ** 0.5), "ahaf": (AHAF, 2 ** 0.5),
}

# Standard deviation of a normal distribution, from the gain and the number of inputs and outputs
# of one unit. Xavier (Glorot & Bengio 2010, section 4.2.1) averages the two; with gain 1, as it is
# often copied, every ReLU layer loses half of the variance or more: deep plain nets never start.
INITS = {
    "he": lambda gain, fan_in, fan_out: gain / fan_in ** 0.5,
    "xavier": lambda gain, fan_in, fan_out: gain * (2 / (fan_in + fan_out)) ** 0.5,
    "xavier-gain1": lambda gain, fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5,
}
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
NORMS = {"none": None, "batch": nn.BatchNorm2d}


# ---- networks -----------------------------------------------------------------------

class Outputs(NamedTuple):
    logits: torch.Tensor                    # (B, classes)
    embedding: torch.Tensor | None = None   # (B, width), the input of the last Linear
    maps: tuple = ()                        # of each stage, (B, C, H, W)


class Network(nn.Module):
    """features, then classifier, whose last layer is a Linear.

    Input (B, C, H, W), normalised; output the logits, (B, classes), or Outputs.
    """

    def __init__(self, features, classifier):
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x, with_features=False):
        if not with_features:
            return self.classifier(self.features(x))
        maps = self.maps(x)
        embedding = self.classifier[:-1](maps[-1])
        return Outputs(self.classifier[-1](embedding), embedding, tuple(maps))

    def embed(self, x):
        """Return the input of the last Linear, (B, width)."""
        return self.classifier[:-1](self.features(x))

    def maps(self, x):
        """Return what each stage puts out, a list of (B, C, H, W): before each pool, and at
        the end of the features."""
        found = []
        for layer in self.features:
            if isinstance(layer, tuple(POOLS.values())):
                found.append(x)
            x = layer(x)
        return [*found, x]


def conv_net(image_shape, num_classes, hidden, channels=(), kernels=(), paddings=(), pools=(),
             pool="max", activation="relu", norm="none"):
    """Return the Network of (conv → norm → activation → pool?)*, (FC → activation)*, FC.

    Without channels it is an MLP: its features are empty. ValueError where images are too
    small for the network.
    """
    act = ACTIVATIONS[activation][0]
    inputs, height, width = image_shape
    layers = []
    for number, (outputs, k, p) in enumerate(zip(channels, kernels, paddings, strict=True), 1):
        # A bias before BatchNorm would be subtracted again.
        layers.append(nn.Conv2d(inputs, outputs, k, padding=p, bias=norm == "none"))
        if norm != "none":
            layers.append(NORMS[norm](outputs))
        layers.append(act())
        inputs, height, width = outputs, height + 2 * p - k + 1, width + 2 * p - k + 1
        if number in pools:
            layers.append(POOLS[pool](2))
            height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ValueError(f"images of {image_shape[1]}×{image_shape[2]} are too small for "
                             f"this network: nothing is left after conv {number}")
    features = nn.Sequential(*layers)

    inputs, layers = inputs * height * width, [nn.Flatten()]
    for outputs in hidden:
        layers += [nn.Linear(inputs, outputs), act()]
        inputs = outputs
    return Network(features, nn.Sequential(*layers, nn.Linear(inputs, num_classes)))


def initialise_(model, init, gain):
    """Fill every conv and fully connected weight, (out, in, ...), as INITS[init] says."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not layer.weight.is_meta:
            window = layer.weight[0, 0].numel()      # k·k for a conv, 1 for a linear layer
            fan_out, fan_in = layer.weight.shape[0] * window, layer.weight.shape[1] * window
            nn.init.normal_(layer.weight, std=INITS[init](gain, fan_in, fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build(arch, num_classes, image_shape, init="he", pool="max", activation="relu", norm=None):
    """Return the network ARCHITECTURES[arch] for images (C, H, W), on the CPU.

    Weights are normal with the deviation that INITS[init] gives, drawn from torch's
    generator, biases zero. norm None is the network's own, for a line of numbers none. An
    unknown name, or an image too small for the network: one line, exit code 2.
    """
    chosen = {"arch": (arch, ARCHITECTURES), "init": (init, INITS), "pool": (pool, POOLS),
              "activation": (activation, ACTIVATIONS), "norm": (norm or "none", NORMS)}
    for flag, (name, known) in chosen.items():
        if name not in known:
            fail(f"unknown {flag} {name!r}; choose from: {', '.join(known)}")
    spec = ARCHITECTURES[arch]
    if callable(spec):
        return spec(image_shape, num_classes)
    try:
        model = conv_net(image_shape, num_classes, pool=pool, activation=activation,
                         norm=norm or "none", **spec)
    except ValueError as error:
        fail(f"{error}; give a larger --image-size")
    initialise_(model, init, ACTIVATIONS[activation][1])
    return model


def has_batchnorm(model):
    """Return whether a network measures statistics of its batches."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def count_parameters(model):
    """Return the number of learned scalars."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model, image_shape):
    """Return the multiply-adds of all convs and linear layers for one image (C, H, W)."""
    counts = []

    def count(layer, inputs, output):
        # Every output number is a sum over one row of the weight.
        counts.append(output.shape[1:].numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in model.modules()
             if isinstance(layer, (nn.Conv2d, nn.Linear))]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return sum(counts)


# ---- checkpoints --------------------------------------------------------------------

def save_checkpoint(path, state):
    """Write tensors and plain values so that the file is as it was or whole."""
    memory = io.BytesIO()
    torch.save(state, memory)
    write_whole(path, memory.getbuffer())


def load_checkpoint(path):
    """Return what save_checkpoint wrote, on the CPU; no code in the file is ever run."""
    path = Path(path)
    if not path.is_file():
        what = "a folder; give the best.pt in it" if path.is_dir() else "no such file"
        fail(f"{path}: {what}")
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()       # PyTorch does not look at the checksums
    except Exception as error:      # flipped bits lead to many kinds
        damaged = str(error) or type(error).__name__
    if damaged:
        fail(f"{path}: cut short, damaged, or not written by torch.save ({damaged}); take a "
             "whole copy, or train it again with --overwrite")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # foreign files lead to many kinds
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {code[1]}" if code else type(error).__name__
        fail(f"{path}: holds more than tensors and plain values ({reason}); nothing of it was "
             "run; train it again, or save a state dict")


def load(path, average=False):
    """Return (network, checkpoint) of a best.pt: in eval mode, without gradient, on the CPU.

    average: the average of the weights in place of the weights. The checkpoint says classes,
    mean, std, and how the network is built.
    """
    checkpoint = load_checkpoint(path)
    needed = {"build", "model", "classes", "mean", "std"}
    if not isinstance(checkpoint, dict) or not needed <= set(checkpoint):
        fail(f"{path}: not a best.pt of these scripts: it does not say how to build the network")
    weights = checkpoint["ema"] if average else checkpoint["model"]
    if weights is None:
        fail(f"{path}: holds no average: the run had --ema-decay 0")
    try:
        network = build(**checkpoint["build"])
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        fail(f"{path}: its weights do not fit the network that it names ({lines[-1].strip()}); "
             "train it again")
    return network.eval().requires_grad_(False), checkpoint


def take_weights_(model, weights):
    """Copy all of a state dict that fits into a model; return the names that it lacks."""
    mine = model.state_dict()
    fits = {name: value for name, value in weights.items()
            if name in mine and mine[name].shape == value.shape}
    model.load_state_dict(fits, strict=False)
    return [name for name in mine if name not in fits]


def weights_sha256(weights):
    """Return the SHA-256 of a state dict's names and values, whatever the file around them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


REGISTRIES = {"arch": ARCHITECTURES, "init": INITS, "pool": POOLS, "activation": ACTIVATIONS,
              "norm": NORMS}
