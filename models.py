"""The networks: one ConvNet and one MLP, each built from a line of numbers in ARCHITECTURES.

    net = models.build("cifar10-he-max-student", num_classes=10, image_shape=(3, 32, 32))
    net(torch.zeros(8, 3, 32, 32))        # logits, (8, 10)
    models.count_parameters(net)

What varies beside the widths is given by name: initialisation, pooling, activation, norm.
"""

import torch
from torch import nn

import cards
import device
from cards import weights_sha256  # noqa: F401  the scripts take it from here
from common import load_checkpoint
from flags import fail
from runs import refuse_version

# A line a network. channels, kernels, paddings: a number for each conv, all of stride 1. pools:
# the convs, counted from 1, that a 2×2 pool with stride 2 follows. hidden: widths of the fully
# connected layers before the logits. A line without channels is an MLP.
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
POOLS = {"max": nn.MaxPool2d, "avg": device.AvgPool2d}
NORMS = {"none": None, "batch": nn.BatchNorm2d}
CHOICES = {"arch": ARCHITECTURES, "init": INITS, "pool": POOLS, "activation": ACTIVATIONS,
           "norm": NORMS}


class ConvNet(nn.Module):
    """(conv → norm → activation → pool?)*, then (FC → activation)*, then the logits.

    `features` holds the convolutions (for an MLP: nothing), `classifier` the rest.
    Input (B, C, H, W), normalised; output (B, classes).
    """

    def __init__(self, image_shape, num_classes, hidden, channels=(), kernels=(), paddings=(),
                 pools=(), pool="max", activation="relu", norm="none"):
        super().__init__()
        act = ACTIVATIONS[activation][0]
        inputs, height, width = image_shape
        layers = []
        for number, (outputs, k, p) in enumerate(zip(channels, kernels, paddings, strict=True), 1):
            # A bias before BatchNorm would be subtracted again.
            layers.append(nn.Conv2d(inputs, outputs, k, padding=p, bias=norm == "none"))
            layers += [NORMS[norm](outputs)] if norm != "none" else []
            layers.append(act())
            inputs, height, width = outputs, height + 2 * p - k + 1, width + 2 * p - k + 1
            if number in pools:
                layers.append(POOLS[pool](2))
                height, width = height // 2, width // 2
            if min(height, width) < 1:
                raise ValueError(f"images of {image_shape[1]}×{image_shape[2]} are too small for "
                                 f"this network: nothing is left after conv {number}")
        self.features = nn.Sequential(*layers)
        inputs, layers = inputs * height * width, [nn.Flatten()]
        for outputs in hidden:
            layers += [nn.Linear(inputs, outputs), act()]
            inputs = outputs
        self.classifier = nn.Sequential(*layers, nn.Linear(inputs, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x))


def MLP(image_shape, num_classes, hidden, **options):
    """A ConvNet without convolutions: the image flattened, then the fully connected layers."""
    return ConvNet(image_shape, num_classes, hidden, **options)


def build(arch, num_classes, image_shape, init="he", pool="max", activation="relu", norm="none"):
    """Return the network ARCHITECTURES[arch] for images (C, H, W), initialised from torch's RNG.

    Weights are normal with the deviation INITS[init] gives, biases zero. An unknown name, or an
    image too small for the network or too large for memory, ends with one line and exit code 2.
    """
    asked = {"arch": arch, "init": init, "pool": pool, "activation": activation, "norm": norm}
    for flag, name in asked.items():
        if name not in CHOICES[flag]:
            fail(f"unknown {flag} {name!r}; choose from: {', '.join(CHOICES[flag])}")
    asked |= dict(num_classes=num_classes, image_shape=image_shape)
    try:
        with torch.device("meta"):      # takes no memory
            size = count_parameters(construct(**asked))
    except ValueError as error:
        fail(f"{error}; give a larger --image-size")
    # Weight, gradient and Adam's two moments, of 4 bytes each.
    device.refuse_beyond_memory(16 * size, f"training {arch}, of {size:,} parameters,",
                                "give a smaller --image-size or another --arch")
    return construct(**asked)


def construct(arch, num_classes, image_shape, init, pool, activation, norm):
    """Return the network of names that are known; ValueError where images are too small for it."""
    spec = ARCHITECTURES[arch]
    kind = ConvNet if "channels" in spec else MLP
    model = kind(image_shape, num_classes, pool=pool, activation=activation, norm=norm, **spec)
    initialise_(model, init, ACTIVATIONS[activation][1])
    return model


def initialise_(model, init, gain):
    """Fill every conv and fully connected weight, (out, in, ...), as INITS[init] says."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not layer.weight.is_meta:
            window = layer.weight[0, 0].numel()      # k·k for a conv, 1 for a linear layer
            fan_out, fan_in = layer.weight.shape[0] * window, layer.weight.shape[1] * window
            nn.init.normal_(layer.weight, std=INITS[init](gain, fan_in, fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load(path, average=False):
    """Return (network, card) of a best.pt: in eval mode, taking no gradient, on the CPU.

    average: the average of the weights instead of the weights. card: classes, mean, std, build …
    """
    card = load_checkpoint(path)
    if not isinstance(card, dict) or not {"build", "model", "classes", "mean", "std"} <= set(card):
        fail(f"{path}: not a best.pt of these scripts: it does not say how to build the network")
    refuse_version(path, card, "train it again")
    weights = card.get("ema") if average else card["model"]
    if average and weights is None:
        fail(f"{path}: holds no average: the run had --ema-decay 0")
    wrong = cards.absurd(card, CHOICES)
    try:        # no memory for what a file claims before its weights fit
        with torch.device("meta"):
            wrong = wrong or cards.unfit(weights, construct(**card["build"]).state_dict())
    except ValueError as error:
        wrong = str(error)
    if wrong:
        fail(f"{path}: {wrong}; train it again")
    network = construct(**card["build"])
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False), card


def take_weights_(model, weights):
    """Copy all of a state dict that fits into a model; return the model's names that it lacks."""
    mine = model.state_dict()
    fit = {name: value for name, value in weights.items()
           if name in mine and mine[name].shape == value.shape}
    model.load_state_dict(fit, strict=False)
    return [name for name in mine if name not in fit]


def count_parameters(model):
    """Number of learned scalars."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model, image_shape):
    """Multiply-adds of the convs and fully connected layers for one image (C, H, W)."""
    counts = []

    def count(layer, inputs, output):
        # Every output number is a sum over one row of the weight.
        counts.append(output.shape[1:].numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in model.modules()
             if isinstance(layer, (nn.Conv2d, nn.Linear))]
    held = {name: value.to("meta") for name, value in model.state_dict().items()}   # only shapes
    with torch.no_grad():
        torch.func.functional_call(model, held, torch.zeros(2, *image_shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return sum(counts)
