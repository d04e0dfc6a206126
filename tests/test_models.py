"""The networks: shapes and counts against hand counts and torch's own, then what a start looks
like, layer by layer and at the end of twelve.
"""
import math

import pytest
import torch
from tiny import RECIPES, settings
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models

# Network -> classes, side, convs, pools, filters of the first conv, hidden layers; None: open.
REPORTS = {
    "digits-teacher": (10, 32, None, None, None, None),
    "digits-student": (10, 32, None, None, None, None),
    "tinyimagenet-teacher": (200, 64, 12, 1, 12, [512]),
    "tinyimagenet-student": (200, 64, 4, 1, 12, [512]),
    "cifar10-he-max-teacher": (10, 32, 7, 1, 6, [256]),
    "cifar10-he-max-student": (10, 32, 2, 1, None, [256]),
    "cifar10-xavier-avg-teacher": (10, 32, 7, 1, 6, [256]),
    "cifar10-xavier-avg-student": (10, 32, 3, 1, 6, [256]),
    "svhn-xavier-avg-teacher": (10, 32, 8, None, None, None),
    "svhn-xavier-avg-student": (10, 32, 2, 2, None, None),
    "mlp": (10, 32, 0, 0, None, None),
}
for a, b in ((13, 3), (13, 2), (13, 4), (12, 3), (14, 3)):      # layers × nodes, or the reverse
    REPORTS |= {f"mlp-{a}x{b}": (10, 32, 0, 0, None, [b] * a),
                f"mlp-{b}x{a}": (10, 32, 0, 0, None, [a] * b)}


def build(arch, **options):
    classes, side = REPORTS[arch][:2]
    torch.manual_seed(0)
    return models.build(arch, classes, (3, side, side), **options)


def layers(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def count_by_hand(spec, classes, side):
    """Parameters of a line of ARCHITECTURES: each conv in·out·k² + out, each FC in·out + out."""
    total, inputs = 0, 3
    for number, (outputs, k, p) in enumerate(zip(
            spec.get("channels", ()), spec.get("kernels", ()), spec.get("paddings", ()),
            strict=True), 1):
        total += inputs * outputs * k * k + outputs
        inputs, side = outputs, side + 2 * p - k + 1
        if number in spec["pools"]:
            side = side // 2
    inputs *= side * side
    for outputs in (*spec["hidden"], classes):
        total += inputs * outputs + outputs
        inputs = outputs
    return total


# ---- shapes and counts ------------------------------------------------------------------------

def test_the_table_above_holds_every_network():
    assert REPORTS.keys() == models.ARCHITECTURES.keys()


@pytest.mark.parametrize("arch", REPORTS)
def test_network_against_its_report_and_a_hand_count(arch):
    classes, side, convs, pools, first, hidden = REPORTS[arch]
    model = build(arch).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, side, side)).shape == (2, classes)
    found = (len(layers(model, nn.Conv2d)), len(layers(model, nn.MaxPool2d)),
             [c.out_channels for c in layers(model, nn.Conv2d)][:1],
             [fc.out_features for fc in layers(model, nn.Linear)][:-1])
    asked = (convs, pools, None if first is None else [first], hidden)
    assert all(a is None or a == f for a, f in zip(asked, found, strict=True)), (asked, found)
    # ReLU after each conv and each hidden layer, never after the logits
    assert len(layers(model, nn.ReLU)) == found[0] + len(found[3])
    assert isinstance(list(model.modules())[-1], nn.Linear)
    assert models.count_parameters(model) == count_by_hand(models.ARCHITECTURES[arch], classes,
                                                           side)


def test_report_003_exactly():
    def conv(i, o, k):
        return i * o * k * k + o

    teacher, student = (build(f"cifar10-xavier-avg-{role}", pool="avg")
                        for role in ("teacher", "student"))
    assert [fc.in_features for fc in layers(teacher, nn.Linear)] == [75_264, 256]
    assert [fc.in_features for fc in layers(student, nn.Linear)] == [14_400, 256]
    assert models.count_parameters(teacher) == (
        conv(3, 6, 3) + conv(6, 12, 3) + conv(12, 24, 3) + conv(24, 48, 3) + conv(48, 96, 3)
        + conv(96, 192, 5) + conv(192, 384, 5) + 75_264 * 256 + 256 + 2_570)
    assert models.count_parameters(student) == (
        conv(3, 6, 3) + conv(6, 36, 3) + conv(36, 64, 5) + 14_400 * 256 + 256 + 2_570)
    for model in (teacher, student):
        assert len(layers(model, nn.AvgPool2d)) == 1 and not layers(model, nn.MaxPool2d)


@pytest.mark.parametrize("arch", REPORTS)
def test_multiply_adds_against_torch(arch):
    side = REPORTS[arch][1]
    model = build(arch)
    model.features.eval()       # a mode of its own, that counting must give back
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    assert 2 * models.count_macs(model, (3, side, side)) == counter.get_total_flops()
    assert model.training and not model.features.training
    assert not any(layer._forward_hooks for layer in model.modules())


def test_counting_multiply_adds_leaves_no_trace_and_runs_where_the_network_is():
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert models.count_macs(model, (3, 8, 8)) == 36 * 27 + 36        # by hand: 6·6 places, 3·3·3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert models.count_macs(model.to("meta"), (3, 8, 8)) == 36 * 28


def test_multiply_adds_stay_within_what_a_cpu_trains():
    macs = {arch: models.count_macs(build(arch), (3, REPORTS[arch][1], REPORTS[arch][1]))
            for arch in REPORTS if "tinyimagenet" not in arch}      # that one is for a GPU
    assert macs["digits-teacher"] <= 60e6
    assert all(macs[f"{name}-teacher"] <= 300e6 for name in ("cifar10-he-max", "svhn-xavier-avg"))
    assert all(count <= 15e6 for arch, count in macs.items()
               if arch.endswith("student") and arch != "cifar10-xavier-avg-student")
    for arch in macs:
        if arch.endswith("teacher"):
            assert macs[arch] > 2 * macs[arch.replace("teacher", "student")]


def test_every_recipe_names_networks_that_exist():
    for recipe in RECIPES:
        pair = [settings(recipe, role)["arch"] for role in ("teacher", "student")]
        assert set(pair) <= models.ARCHITECTURES.keys()
        assert pair[0] != pair[1] or recipe == "digits-500-labels"      # whose chain has no teacher
        for role in ("kd", "kd-only"):
            assert settings(recipe, role)["arch"] == pair[1]
        # Both networks of report 003's EMA pair are its teacher.
        assert settings(recipe, "consistency")["arch"] == pair[recipe != "cifar10-xavier-avg"]


@pytest.mark.parametrize("recipe, role, facts", [
    ("tinyimagenet-meanteacher", "student", dict(init="xavier", pool="avg", epochs=10)),
    ("tinyimagenet-meanteacher", "consistency", dict(class_cost="bce", warm_start=1)),
    ("tinyimagenet-kd", "teacher", dict(init="xavier", pool="avg", epochs=8)),
    ("tinyimagenet-kd", "kd", dict(temperature=3, alpha=0.3)),      # 0.7·CE + 0.3·T²·KL
    ("cifar10-he-max", "teacher", dict(init="he", pool="max", epochs=20)),
    ("cifar10-xavier-avg", "student", dict(pool="avg")),
    ("cifar10-xavier-avg", "kd", dict(alpha=0.8)),
    ("svhn-xavier-avg", "teacher", dict(init="xavier", pool="avg", epochs=10)),
    ("svhn-xavier-avg", "student", dict(init="xavier", pool="avg", epochs=14))])
def test_recipe_against_its_report(recipe, role, facts):
    found = settings(recipe, role)
    assert {key: found[key] for key in facts} == facts


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("pool", models.POOLS)
def test_every_choice_builds_and_every_parameter_gets_a_gradient(activation, norm, pool):
    torch.manual_seed(0)
    model = models.build("digits-student", 3, (3, 20, 16), "he", pool, activation, norm)
    # pictures that are not square: H and W in the right order
    out = model(torch.randn(8, 3, 20, 16))
    assert out.shape == (8, 3)
    F.cross_entropy(out, torch.arange(8) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    convs, norms = len(layers(model, nn.Conv2d)), len(layers(model, nn.BatchNorm2d))
    assert norms == (convs if norm == "batch" else 0)


def test_ahaf_starts_as_silu_and_has_two_parameters():
    ahaf, x = models.AHAF(), torch.linspace(-6, 6, 50)
    torch.testing.assert_close(ahaf(x), F.silu(x))
    with torch.no_grad():
        ahaf.beta.fill_(2.0)
        ahaf.gamma.fill_(0.5)
    torch.testing.assert_close(ahaf(x), 2 * x / (1 + torch.exp(-x / 2)))
    assert models.count_parameters(ahaf) == 2


# ---- initialisation ---------------------------------------------------------------------------

REFERENCES = {      # torch's own; with the same random numbers the weights must be the same
    "he": lambda w: nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"),
    "xavier": lambda w: nn.init.xavier_normal_(w, gain=nn.init.calculate_gain("relu")),
    "xavier-gain1": lambda w: nn.init.xavier_normal_(w),
}


@pytest.mark.parametrize("init", models.INITS)
def test_init_against_torch(init):
    model = build("cifar10-xavier-avg-student")
    model.smallest = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(1, 1))
    torch.manual_seed(1)
    models.initialise_(model, init, math.sqrt(2))
    torch.manual_seed(1)
    for layer in layers(model, (nn.Conv2d, nn.Linear)):
        expected = REFERENCES[init](torch.empty_like(layer.weight))
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-8)
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("init", models.INITS)
@pytest.mark.parametrize("activation, gain", [("relu", math.sqrt(2)), ("selu", 1.0)])
def test_deviation_of_the_weights_that_build_gives(init, activation, gain):
    model = build("cifar10-xavier-avg-student", init=init, activation=activation)
    for layer in layers(model, (nn.Conv2d, nn.Linear)):
        out, inputs = layer.weight.shape[:2]
        window = layer.weight[0, 0].numel()
        expected = {"he": gain / math.sqrt(inputs * window),
                    "xavier": gain * math.sqrt(2 / ((inputs + out) * window)),
                    "xavier-gain1": math.sqrt(2 / ((inputs + out) * window))}[init]
        n = layer.weight.numel()        # the deviation of n numbers errs by 1/√(2n)
        assert layer.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * n))
        assert layer.weight.mean().abs().item() < 5 * expected / math.sqrt(n)
        assert (layer.bias == 0).all()


def test_batch_norm_starts_as_the_identity_and_needs_no_bias_before_it():
    model = build("digits-student", norm="batch")
    for norm in layers(model, nn.BatchNorm2d):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert all(conv.bias is None for conv in layers(model, nn.Conv2d))
    assert all(fc.bias is not None for fc in layers(model, nn.Linear))


def test_logits_of_twelve_convs_at_the_start():
    # Report 000's teacher: with gain 1 the logits are near nothing, and it sat at ln 200.
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    deviation = {}
    for init in models.INITS:
        torch.manual_seed(0)
        model = models.build("tinyimagenet-teacher", 200, (3, 32, 32), init, "avg")
        with torch.no_grad():
            deviation[init] = model(x).std().item()
    assert deviation["he"] > 0.1 and deviation["xavier"] > 0.1
    assert deviation["xavier-gain1"] < 0.01


def test_the_same_seed_gives_the_same_network():
    first, again = build("mlp"), build("mlp")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(),
                                                 strict=True))
    torch.manual_seed(1)
    other = models.build("mlp", 10, (3, 32, 32))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


# ---- wrong input ------------------------------------------------------------------------------

@pytest.mark.parametrize("options, parts", [
    (dict(arch="resnet"), ("resnet", "digits-teacher")), (dict(init="orthogonal"), ("he",)),
    (dict(pool="mean"), ("mean", "avg")), (dict(activation="tanh"), ("tanh", "relu")),
    (dict(norm="layer"), ("layer", "batch")),
    (dict(arch="svhn-xavier-avg-teacher", image_shape=(3, 8, 8)), ("8×8", "too small"))])
def test_what_cannot_be_built_is_refused_by_name(options, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        models.build(**dict(arch="mlp", num_classes=10, image_shape=(3, 32, 32)) | options)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 7), (5, 3), (2, 2)])
def test_the_average_pool_is_torchs_bit_for_bit(size, kind, layout):
    x = torch.randn(3, 5, *size).to(kind).contiguous(memory_format=layout)
    upwards = torch.randn(3, 5, *(side // 2 for side in size)).to(kind)
    found = []
    for pool in (models.POOLS["avg"](2), torch.nn.AvgPool2d(2)):
        leaf = x.clone(memory_format=layout).requires_grad_()
        out = pool(leaf)
        out.backward(upwards)
        found.append((out, leaf.grad))
    (ours, slope), (theirs, right) = found
    assert torch.equal(ours, theirs) and torch.equal(slope, right) and slope.dtype == kind
