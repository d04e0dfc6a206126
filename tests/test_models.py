"""The networks against their reports, counts by hand and torch's own; checkpoints."""
import copy
import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models

# Network -> convs, pools, filters of the first conv, as its report says; None: left open.
REPORTS = {
    "tinyimagenet-teacher": (12, 1, 12), "tinyimagenet-student": (4, 1, 12),
    "cifar10-he-max-teacher": (7, 1, 6), "cifar10-he-max-student": (2, 1, None),
    "cifar10-xavier-avg-teacher": (7, 1, 6), "cifar10-xavier-avg-student": (3, 1, 6),
    "svhn-xavier-avg-teacher": (8, None, None), "svhn-xavier-avg-student": (2, 2, None),
}
# ... and, by hand, the inputs of its first fully connected layer and its hidden layers.
CLASSIFIERS = {
    "digits-teacher": (64 * 4 * 4, [128]), "digits-student": (16 * 4 * 4, [64]),
    "tinyimagenet-teacher": (96 * 32 * 32, [512]),
    "tinyimagenet-student": (16 * 26 * 26, [512]),
    "cifar10-he-max-teacher": (128 * 16 * 16, [256]),
    "cifar10-he-max-student": (32 * 16 * 16, [256]),
    "cifar10-xavier-avg-teacher": (75_264, [256]),      # as report 003 prints them
    "cifar10-xavier-avg-student": (14_400, [256]),
    "svhn-xavier-avg-teacher": (128 * 2 * 2, [256]),
    "svhn-xavier-avg-student": (32 * 8 * 8, [128]),
    "mlp": (3072, [256, 256]), "mlp-13x3": (3072, 13 * [3]), "mlp-3x13": (3072, [13] * 3),
}


def make(arch, device="cpu", **options):
    """Return the network for its own images, and their side. On "meta" it has no memory."""
    classes, side = 10, 32
    if arch.startswith("tinyimagenet"):
        classes, side = 200, 64
    torch.manual_seed(0)
    with torch.device(device):
        return models.build(arch, classes, (3, side, side), **options), side


def layers(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


# ---- shapes and counts --------------------------------------------------------------

@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_multiply_adds_against_torch(arch):
    model, side = make(arch, "meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device="meta"))
    macs = models.count_macs(model, (3, side, side))
    assert 2 * macs == counter.get_total_flops()


def test_counting_multiply_adds_leaves_no_trace():
    layers = nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 1)
    model = nn.Sequential(*layers)
    before = copy.deepcopy(model.state_dict())
    # By hand: 6·6 places of 3·3·3 numbers.
    assert models.count_macs(model, (3, 8, 8)) == 36 * 27 + 36
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not layers[0]._forward_hooks and model.training


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_network_against_its_report_and_a_count_by_hand(arch):
    model, _ = make(arch, "meta")
    convs, linear = layers(model, nn.Conv2d), layers(model, nn.Linear)
    inputs, hidden = CLASSIFIERS[arch]
    assert linear[0].in_features == inputs
    assert [layer.out_features for layer in linear[:-1]] == hidden
    # ReLU after each conv and each hidden layer, never after the logits
    assert len(layers(model, nn.ReLU)) == len(convs) + len(hidden)
    assert model.classifier[-1] is linear[-1]
    if arch in REPORTS:
        first = convs[0].out_channels
        found = len(convs), len(layers(model, nn.MaxPool2d)), first
        for ours, theirs in zip(found, REPORTS[arch], strict=True):
            assert theirs in (ours, None)
    expected = 0
    for conv in convs:
        window = conv.kernel_size[0] ** 2
        expected += (conv.in_channels * window + 1) * conv.out_channels
    for width in (*hidden, linear[-1].out_features):
        expected += (inputs + 1) * width
        inputs = width
    assert models.count_parameters(model) == expected


@pytest.mark.parametrize("arch", ["digits-teacher", "tinyimagenet-student", "mlp"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_features_and_logits_agree(arch, pool):
    model, side = make(arch, pool=pool)
    x = torch.randn(2, 3, side, side)
    before_pools = []

    def look(layer, inputs):
        before_pools.append(inputs[0])

    for layer in layers(model, models.POOLS[pool]):
        layer.register_forward_pre_hook(look)
    logits = model(x)
    expected = [*before_pools, model.features(x)]
    again, embedding, maps = model(x, True)
    assert torch.equal(logits, again)
    assert torch.equal(logits, model.classifier[-1](embedding))
    assert torch.equal(embedding, model.embed(x))
    for found, reference in zip(maps, expected, strict=True):
        assert torch.equal(found, reference)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("norm", models.NORMS)
def test_every_choice_builds_and_every_parameter_gets_a_gradient(activation, norm):
    torch.manual_seed(0)    # images that are not square: height and width in the right order
    model = models.build("digits-student", 3, (3, 20, 16), "he", "avg", activation, norm)
    logits = model(torch.randn(8, 3, 20, 16))
    F.cross_entropy(logits, torch.arange(8) % 3).backward()
    for p in model.parameters():
        assert p.grad.abs().sum() > 0
    assert models.has_batchnorm(model) == (norm == "batch")
    for conv in layers(model, nn.Conv2d):       # BatchNorm would subtract a bias again
        assert (conv.bias is None) == (norm == "batch")


def test_ahaf_starts_as_silu():
    ahaf = models.AHAF()
    x = torch.linspace(-6, 6, 50)
    torch.testing.assert_close(ahaf(x), F.silu(x))
    nn.init.constant_(ahaf.beta, 2)
    nn.init.constant_(ahaf.gamma, 0.5)
    torch.testing.assert_close(ahaf(x), 2 * x / (1 + torch.exp(-x / 2)))


# ---- initial weights ----------------------------------------------------------------

REFERENCES = {      # torch's own: with the same random numbers the weights must be the same
    "he": lambda w: nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"),
    "xavier": lambda w: nn.init.xavier_normal_(w, gain=math.sqrt(2)),
    "xavier-gain1": lambda w: nn.init.xavier_normal_(w),
}


@pytest.mark.parametrize("init", models.INITS)
def test_init_against_torch(init):
    model, _ = make("cifar10-xavier-avg-student")
    torch.manual_seed(1)
    models.initialise_(model, init, math.sqrt(2))
    torch.manual_seed(1)
    for layer in layers(model, (nn.Conv2d, nn.Linear)):
        expected = REFERENCES[init](torch.empty_like(layer.weight))
        torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-8)
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("activation, gain", [("relu", 2), ("selu", 1)])
def test_build_takes_the_gain_of_the_activation(activation, gain):
    model, _ = make("mlp", activation=activation)
    weight = model.classifier[1].weight
    assert weight.std().item() == pytest.approx(math.sqrt(gain / 3072), rel=0.01)


def test_logits_of_twelve_convs_at_the_start():
    """With gain 1 the logits of report 000's teacher are near nothing: it sat at ln 200."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    deviation = {}
    for init in models.INITS:
        torch.manual_seed(0)
        model = models.build("tinyimagenet-teacher", 200, (3, 32, 32), init, "avg")
        deviation[init] = model(x).std().item()
    assert deviation["he"] > 0.1 and deviation["xavier"] > 0.1
    assert deviation["xavier-gain1"] < 0.01


# ---- what cannot be built, what cannot be read --------------------------------------

def refused(capsys, call, *parts):
    """Assert that a call ends with one line on stderr that holds all the parts."""
    with pytest.raises(SystemExit) as stop:
        call()
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.err.count("\n") == 1
    for part in parts:
        assert str(part) in found.err
    assert not found.out


@pytest.mark.parametrize("options, parts", [
    (dict(arch="resnet"), ("'resnet'", "digits-teacher")),
    (dict(init="orthogonal"), ("'orthogonal'", "he")), (dict(pool="mean"), ("'mean'", "avg")),
    (dict(activation="tanh"), ("'tanh'", "relu")), (dict(norm="layer"), ("'layer'", "batch")),
    (dict(arch="svhn-xavier-avg-teacher", image_shape=(3, 8, 8)), ("8×8", "--image-size"))])
def test_what_cannot_be_built_is_refused_by_name(options, parts, capsys):
    options = dict(arch="mlp", num_classes=10, image_shape=(3, 32, 32)) | options
    refused(capsys, lambda: models.build(**options), *parts)


@pytest.fixture
def saved(tmp_path):
    """A best.pt, its network and what was saved."""
    build = dict(arch="digits-student", num_classes=3, image_shape=(3, 16, 16), norm="batch")
    torch.manual_seed(0)
    network = models.build(**build)
    state = dict(build=build, model=network.state_dict(), ema=None, classes=["a", "b", "c"],
                 mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    path = tmp_path / "best.pt"
    models.save_checkpoint(path, state)
    return path, network, state


def test_a_checkpoint_comes_back(saved, tmp_path, capsys):
    path, network, state = saved
    found, checkpoint = models.load(path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(found(x), network.eval()(x))
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert checkpoint["classes"] == ["a", "b", "c"] and checkpoint["mean"] == (0.5,) * 3
    weights = models.weights_sha256(checkpoint["model"])
    assert weights == models.weights_sha256(network.state_dict())
    assert list(tmp_path.iterdir()) == [path]
    refused(capsys, lambda: models.load(path, average=True), path, "--ema-decay 0")


def test_a_write_that_fails_leaves_the_old_checkpoint(saved, monkeypatch):
    path, _, _ = saved
    before = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        models.save_checkpoint(path, {"epoch": 2})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"mkdir '{self.path}'",)


def test_a_checkpoint_that_cannot_be_read_is_refused(saved, tmp_path, capsys):
    whole, network, state = saved
    body = whole.read_bytes()
    flipped = bytearray(body)
    flipped[len(body) // 2] ^= 1
    (tmp_path / "cut.pt").write_bytes(body[:-500])
    (tmp_path / "flipped.pt").write_bytes(flipped)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    torch.save(state | {"model": Code(tmp_path / "made")}, tmp_path / "code.pt")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    other = state["build"] | {"arch": "digits-teacher"}
    models.save_checkpoint(tmp_path / "other.pt", state | {"build": other})
    reasons = {"cut": "cut short", "flipped": "damaged", "empty": "cut short",
               "folder": "a folder", "code": "system", "absent": "no such file",
               "weights": "does not say how to build", "other": "do not fit the network"}
    for name, reason in reasons.items():
        path = tmp_path / f"{name}.pt"
        refused(capsys, lambda path=path: models.load(path), path, reason)
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "code.pt", weights_only=False)    # it would have been noticed
    assert (tmp_path / "made").exists()
