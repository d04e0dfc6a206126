"""calc.py against torch: every size, parameter and multiply-add is that of the real module.

The modules are built on the meta device, where shapes are computed and numbers are not.
"""
import itertools
import random
import shlex
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import calc
import flags
import models
import plots

HOUSE = Path(calc.__file__).parent
RECIPES = ("digits", "tinyimagenet-meanteacher", "tinyimagenet-kd", "cifar10-he-max",
           "cifar10-xavier-avg", "svhn-xavier-avg")
VIT_B = ["vit", "--image", "224x224", "--patch", "16", "--width", "768", "--depth", "12",
         "--heads", "12", "--mlp", "3072"]


def ask(words):
    return calc.main(shlex.split(words) if isinstance(words, str) else words)


def refused(capsys, words):
    """The one line on stderr that a refusal prints; exit code 2, and nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        ask(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err


def count(module):
    return sum(p.numel() for p in module.parameters())


def multiply_adds(module, *inputs):
    """Half of torch's count of floating-point operations, for one of the batch."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2 // inputs[0].shape[0]


# ---- shape: random chains ------------------------------------------------------------------------

PLAIN = {"relu": nn.ReLU, "elu": nn.ELU, "selu": nn.SELU, "silu": nn.SiLU, "gelu": nn.GELU,
         "ahaf": models.AHAF, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "flatten": nn.Flatten,
         "softmax": lambda: nn.Softmax(1), "dropout": nn.Dropout, "dropout:0.25": nn.Dropout}


def draw(rng, shape):
    """A random layer for this input, good or bad: (its text, a function that makes torch's)."""
    def pair(low, high):
        a, b = rng.randint(low, high), rng.randint(low, high)
        return (a, a) if rng.random() < 0.5 else (a, b)

    def text(sides):
        square = sides[0] == sides[1] and rng.random() < 0.7
        return f"{sides[0]}" if square else f"{sides[0]}x{sides[1]}"

    kinds = ["conv"] * 4 + ["deconv", "max", "avg", "adaptive", "bn", "ln"] + [*PLAIN][:8]
    kind = rng.choice(kinds if len(shape) == 3 else ["fc", "fc", "bn", "ln", *PLAIN])
    kind = "fc" if len(shape) == 3 and rng.random() < 0.05 else kind
    out, k, s, p = rng.randint(1, 8), pair(1, 5), pair(1, 3), pair(0, 2)
    d, groups = pair(1, 2) if rng.random() < 0.3 else (1, 1), rng.choice((1, 1, 1, 2, 3))
    bias, ceil = rng.random() < 0.7, rng.random() < 0.5
    if kind == "conv":
        if rng.random() < 0.15:
            p, s = "same", (1, 1) if rng.random() < 0.8 else s
        words = (f"conv:{out},k={text(k)},s={text(s)},p={p if p == 'same' else text(p)},"
                 f"d={text(d)},groups={groups},bias={int(bias)}")
        return words, lambda: nn.Conv2d(shape[0], out, k, s, p, d, groups, bias)
    if kind == "deconv":
        op = pair(0, 2)
        words = (f"deconv:out={out},k={text(k)},s={text(s)},p={text(p)},d={text(d)},op={text(op)},"
                 f"groups={groups},bias={int(bias)}")
        return words, lambda: nn.ConvTranspose2d(shape[0], out, k, s, p, op, groups, bias, d)
    if kind in ("max", "avg"):
        step = rng.random() < 0.6
        words = f"{kind}:{text(k)}" + f",s={text(s)}" * step + f",p={text(p)},ceil={int(ceil)}"
        make = nn.MaxPool2d if kind == "max" else nn.AvgPool2d
        return words, lambda: make(k, s if step else None, p, ceil_mode=ceil)
    if kind == "adaptive":
        return f"adaptive:{text(k)}", lambda: nn.AdaptiveAvgPool2d(k)
    if kind == "bn":
        return "bn", lambda: (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0])
    if kind == "ln":
        return "ln", lambda: nn.LayerNorm(shape)
    if kind == "fc":
        inputs = torch.Size(shape).numel()
        return f"fc:{out},bias={int(bias)}", lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, out, bias))
    return kind, PLAIN[kind]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_random_chains_agree_with_torch_or_are_refused_with_it():
    rng, good, refusals = random.Random(0), 0, 0
    while good < 500:
        start = [rng.randint(1, 6), rng.randint(3, 24), rng.randint(3, 24)]
        shape, texts, modules, outputs, broken = start, [], [], [], None
        for _ in range(rng.randint(1, 7)):
            text, make = draw(rng, shape)
            try:
                with torch.device("meta"):
                    module = make()
                    # The meta device does not check a deconv's output padding, nor with PyTorch
                    # 2.11 a conv's window; the CPU does.
                    device = "cpu" if text.startswith(("conv", "deconv")) else "meta"
                    x = torch.zeros(2, *shape, device=device)
                shape = list(module.to_empty(device=device)(x).shape[1:])
            except (RuntimeError, ValueError):
                broken = text
                break
            texts.append(text)
            modules.append(module.to("meta"))
            outputs.append(shape)
        if broken:
            refusals += 1
            with pytest.raises(ValueError, match=f"^layer {len(texts) + 1}, {broken!r}: "):
                calc.shape(start, [*texts, broken])
        if not texts:
            continue
        good += 1
        answer = calc.shape(start, texts)[0]
        assert [row["output"] for row in answer["layers"]] == outputs, (start, texts)
        assert [row["parameters"] for row in answer["layers"]] == [*map(count, modules)], texts
        assert answer["output"] == outputs[-1] and answer["input"] == start
        assert answer["parameters"] == sum(map(count, modules)) == answer["bytes"] / 4
        assert answer["macs"] == sum(row["macs"] for row in answer["layers"]) == multiply_adds(
            nn.Sequential(*modules), torch.zeros(2, *start, device="meta")), (start, texts)
    assert refusals >= 100          # both sides of the comparison were tried


@pytest.mark.parametrize("what, name, error, parts", [
    (torch, "randn", RuntimeError("can't allocate memory: you tried to allocate 38535168 bytes"),
     ["out of memory: 38535168 bytes"]),
    (plots, "save", OSError(28, "No space left on device", "x.png"),
     ["x.png: cannot be written (No space left on device)", "--out"])])
def test_memory_or_a_disk_that_gives_out_is_told(capsys, monkeypatch, what, name, error, parts):
    monkeypatch.setattr(what, name, mock.Mock(side_effect=error))
    tiny.refused(capsys, calc, ["init", "digits", "--init", "he"], *parts)


def test_output_size_is_that_of_every_pool():
    sizes = itertools.product(range(1, 12), range(1, 6), range(1, 5), range(3), (1, 2, 3),
                              (False, True))
    seen = 0
    for size, kernel, stride, padding, dilation, ceil in sizes:
        if 2 * padding > kernel:
            continue        # no pool takes that much
        pool = nn.MaxPool2d((kernel, 1), stride, (padding, 0), dilation, ceil_mode=ceil)
        try:
            out = pool(torch.zeros(1, 1, size, 1, device="meta")).shape[2]
        except RuntimeError:
            with pytest.raises(ValueError, match="nothing is left"):
                calc.output_size(size, kernel, stride, padding, dilation, ceil)
        else:
            seen += 1
            assert calc.output_size(size, kernel, stride, padding, dilation, ceil) == out
    assert seen > 1500
    assert calc.output_size(256, 5, 2, 1) == 127 and calc.output_size(7, 3) == 5
    for wrong in ((0, 1), (4, 0), (4, 2, 0), (4, 2, 1, -1), (4, 2, 1, 0, 0)):
        with pytest.raises(ValueError):
            calc.output_size(*wrong)


def test_last_window_that_would_start_in_the_right_padding_is_dropped():
    # ceil((3 + 2·1 − 2) / 2) + 1 = 3, but the third window starts at 4 of 1 + 3 pixels.
    assert calc.output_size(3, 2, 2, 1, ceil_mode=True) == 2
    layer = ask("shape 3x3 max:2,p=1,ceil=1")["layers"][0]
    assert layer["output"] == [1, 2, 2]
    assert layer["formula"] == "min(ceil((3 + 2·1 − 2) / 2) + 1, ceil((3 + 1) / 2)) = 2"


def test_shape_answers_as_the_issue_has_it():
    answer = ask("shape 3x64x64 conv:out=32,k=5,s=1,p=2 max:k=2 conv:out=64,k=3,p=1 flatten fc:128 "
                 "dropout:0.5")
    assert list(answer["layers"][0]) == ["layer", "output", "parameters", "macs", "formula"]
    assert set(answer) == {"input", "layers", "output", "parameters", "macs", "bytes"}
    assert (answer["input"], answer["output"]) == ([3, 64, 64], [128])
    assert [layer["parameters"] for layer in answer["layers"]] == [2432, 0, 18496, 0, 8388736, 0]
    assert answer["parameters"] == 8409664 and answer["bytes"] == 4 * 8409664
    formula = ask("shape 256x256 conv:out=1,k=5,s=2,p=1")["layers"][0]["formula"]
    assert formula.startswith("floor((256 + 2·1 − 5) / 2) + 1 = 127; parameters 1·1·5·5 + 1 = 26; ")
    assert ask("shape 100x100 conv:1,k=3,d=2")["layers"][0]["formula"].startswith(
        "floor((100 + 2·0 − (2·(3 − 1) + 1)) / 1) + 1 = 96; ")
    assert ask("shape 20 fc:3 relu")["input"] == [20]


def test_fc_flattens_by_itself_and_says_so(capsys):
    by_itself, flat = (ask(f"shape 3x4x5 {layers}") for layers in ("fc:7", "flatten fc:7"))
    assert by_itself["parameters"] == flat["parameters"] == 60 * 7 + 7
    assert "flattens by itself: 3·4·5 = 60" in by_itself["layers"][0]["formula"]
    assert flat["layers"][0]["formula"] == "3·4·5 = 60"      # it was asked to
    assert "flattens by itself: 3·4·5 = 60" in capsys.readouterr().out


def test_exact_where_floats_are_not():
    layer = ask("shape 999999999x1x1 fc:999999999")["layers"][0]
    assert layer["parameters"] == 999999999 ** 2 + 999999999


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, parts", [
    # a window larger than its padded input, a size that reaches zero (report 004's sixth pool)
    ("shape 3x4x4 relu conv:4,k=9,p=1", ["layer 2, 'conv:4,k=9,p=1'", "9", "4 + 2·1 = 6"]),
    ("shape 32x32 max:2 max:2 max:2 max:2 max:2 max:2", ["layer 6, 'max:2'", "1 + 2·0 = 1"]),
    ("shape 1x1x1 max:4,s=2,ceil=1", ["layer 1, 'max:4,s=2,ceil=1'", "nothing is left"]),
    ("shape 1x2x2 deconv:4,k=1,p=1", ["layer 1", "(2 − 1)·1 − 2·1"]),
    ("shape 1x5x5 max:3,p=2", ["layer 1, 'max:3,p=2'", "padding 2", "half", "3"]),
    ("shape 1x5x5 avg:k=3x1,p=1", ["layer 1", "padding 1", "window of 1"]),
    ("shape 3x8x8 conv:4,k=3,groups=2", ["layer 1", "groups=2", "3 input channels", "out=4"]),
    ("shape 4x8x8 conv:3,k=3,groups=2", ["groups=2", "out=3"]),
    ("shape 3x8x8 conv:4,k=3,s=0", ["layer 1, 'conv:4,k=3,s=0'", "s=0", "from 1"]),
    ("shape 3x8x8 max:2,s=1x0", ["s=1x0"]),
    ("shape 3x8x8 conv:4,k=3,p=same,s=2", ["p=same", "stride 1"]),
    ("shape 3x8x8 max:3,p=same", ["p=same is for conv"]),
    ("shape 3x8x8 deconv:3,k=3,op=1", ["op=1 not below s=1, d=1"]),
    # malformed: the character
    ("shape 3x8x8 relu conv:out=32,,k=5", ["layer 2", "character 13, at ',k=5'"]),
    ("shape 3x8x8 conv:out=32,k=5y6", ["character 16, at 'y6'"]),
    ("shape 3x8x8 conv:out=32;k=5", ["character 12, at ';k=5'"]),
    ("shape 3x8x8 conv:out=32,k=5x", ["character 16, at 'x'"]),
    ("shape 3x8x8 conv:out=32,k=-5", ["character 13, at 'k=-5'"]),
    ("shape 3x8x8 conv:", ["character 6", "key=value"]),
    ("shape 3x8x8 conv:4,k=3,", ["character 12"]),
    ("shape 3x8x8 dropout:0.5z", ["character 12, at 'z'"]),
    ("shape 3x8x8 fc:1234567890", ["character 13, at '0'"]),
    (["shape", "3x8x8", "fc:\n4"], ["'fc:\\n4'", "character 4"]),
    (["shape", "3x8x8", "fc:4\n"], ["'fc:4\\n'", "character 5"]),
    (["shape", "3x8x8", "fc:٣"], ["character 4"]),
    ("shape 3x8x8 cnv:4,k=3", ["layer 1, 'cnv:4,k=3'", "character 1", "conv, deconv, max"]),
    ("shape 3x8x8 Conv:4,k=3", ["character 1"]),
    ("shape 3x8x8 maxi:4", ["character 1"]),
    # unknown, missing or impossible values
    ("shape 3x8x8 conv:4,k=3,q=5", ["q=5", "conv takes out", "groups"]),
    ("shape 3x8x8 conv:4,k=3,5", ["layer 1", "conv takes"]),
    ("shape 3x8x8 conv:4,k=3,k=5", ["k=5", "once"]),
    ("shape 3x8x8 conv:4", ["k= is missing"]),
    ("shape 3x8x8 fc", ["layer 1, 'fc'", "out= is missing"]),
    ("shape 3x8x8 fc:out=0", ["out=0"]),
    ("shape 3x8x8 conv:4x4,k=3", ["4x4"]),
    ("shape 3x8x8 conv:4,k=3,bias=2", ["bias=2", "0 or 1"]),
    ("shape 3x8x8 max:2,d=2", ["d=2"]),
    ("shape 3x8x8 dropout:1.5", ["1.5", "0 to 1"]),
    ("shape 3x8x8 relu:2", ["layer 1, 'relu:2'", "no values"]),
    ("shape 3x8x8 adaptive:0", ["layer 1, 'adaptive:0'"]),
    ("shape 3x8x8 flatten conv:4,k=3", ["layer 2", "channels×height×width", "192"]),
    ("shape 10 max:2", ["layer 1", "10"]),
    # the rest of the command line
    ("shape 3x8", ["layers"]),
    ("shape 3y8 relu", ["3y8", "CxHxW"]),
    ("shape 1x2x3x4 relu", ["3x4"]),
    ("shape 0x8x8 relu", ["'0'"]),
    ("shape 3x8x8 relu --jso", ["--jso"]),
    ("shape 3x8x8 relu --depth 3", ["--depth"]),
    ("", ["COMMAND"]),
    ("shapes 3x8x8 relu", ["shapes", "mlp"]),
    ("mlp 50", ["layers"]),
    ("mlp 50 0 1", ["'0'"]),
    ("mlp 50 1 --batch-size -3", ["'-3'"]),
    ("mlp 50 1 --epochs 1.5", ["'1.5'"]),
    ("attention --tokens 8 --width 100 --heads 3", ["width / heads", "100 / 3"]),
    ("attention --width 100 --heads 4", ["--tokens", "--text"]),
    ("attention --text ' ' --width 100 --heads 4", ["--tokens", "--text"]),
    ("attention --tokens 2 --text 'a b' --width 100 --heads 4", ["either"]),
    ("attention --tokens 8 --heads 4", ["--width"]),
    (["vit", "--image", "225x224", *VIT_B[3:]], ["height / patch", "225 / 16"]),
    (["vit", "--image", "224x230", *VIT_B[3:]], ["230 / 16"]),
    (["vit", "--image", "224x224x3", *VIT_B[3:]], ["224x3"]),
    ([*VIT_B, "--heads", "7"], ["width / heads", "768 / 7"]),
    ([*VIT_B, "--width", "6", "--heads", "1", "--positions", "sincos"], ["w / 4", "6 / 4"]),
    ([*VIT_B, "--width", "7", "--heads", "1", "--positions", "2d"], ["w / 2", "7 / 2"]),
    ([*VIT_B, "--positions", "3d"], ["3d", "learned"]),
    ("rnn --cell lstn --input 1 --hidden 2", ["lstn", "lstm"]),
    ("rnn --cell lstm --input 1 --hidden 2 --radius 0", ["0"]),
    ("rnn --cell lstm --input 1 --hidden 2 --radius nan", ["nan"]),
    ("rnn --cell lstm --input 1 --hidden 2 --layers 1001", ["1001"]),
    ("arch nothing", ["nothing", "digits"]),
    ("arch digits --batch-size 0", ["'0'"]),
    ("init digits --init kaiming", ["kaiming", "he"]),
    ("select --programme phd --roll 052 --birth 18/03", ["phd", "btech"]),
    ("select --programme btech --roll 52 --birth 18/03", ["'52'", "052"]),
    ("select --programme btech --roll 052 --birth 18-03", ["'18-03'", "18/03/02"]),
    ("select --programme btech --roll 052 --birth 31/04/02", ["'31/04/02'"]),
    ("select --programme btech --roll 052 --birth 30/02", ["'30/02'"]),
    ("select --programme btech --roll 052 --birth 18/13", ["'18/13'"]),
    ("reports 3", ["3"]),
])
def test_refused_in_one_line(capsys, words, parts):
    line = refused(capsys, words)
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_missing_data_file_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(calc, "REPORTS", tmp_path / "away.json")
    assert "away.json" in refused(capsys, "reports")


# ---- the other questions -------------------------------------------------------------------------

def test_mlp_against_torch_and_a_real_loader():
    answer = ask("mlp 50 10 1 --samples 1003 --batch-size 10 --epochs 100")
    network = nn.Sequential(nn.Linear(50, 10), nn.Linear(10, 1))
    batches = list(torch.utils.data.DataLoader(torch.zeros(1003), batch_size=10))
    assert answer["parameters"] == count(network) == answer["numbers_in_one_update"] == 521
    assert (answer["weights"], answer["biases"]) == (510, 11)
    assert (answer["batches"], answer["last_batch"]) == (len(batches), len(batches[-1])) == (101, 3)
    assert answer["updates"] == 10100
    assert answer["macs"] == multiply_adds(network, torch.zeros(1, 50))
    assert len(answer["unknown"]) == 3
    assert ask("mlp 50 1 --samples 5 --batch-size 10")["last_batch"] == 5
    assert "gradients" not in ask("mlp 50 10 2")


def test_gradients_of_mse_and_bce_are_autograds():
    for row in ask("mlp 5 1")["gradients"]:
        for name, loss in (("mse", lambda p: (p - 1) ** 2), ("bce", lambda p: -torch.log(p))):
            z = torch.logit(torch.tensor(row["p"], dtype=torch.float64)).requires_grad_()
            loss(torch.sigmoid(z)).backward()
            assert row[name] == pytest.approx(z.grad.item(), abs=1e-6)


@pytest.mark.parametrize("tokens, width, heads", [(8, 100, 4), (1, 64, 8), (197, 768, 12)])
def test_attention_against_torch(tokens, width, heads):
    layer = nn.MultiheadAttention(width, heads, batch_first=True, device="meta")
    x = torch.zeros(1, tokens, width, device="meta")
    answer = ask(f"attention --tokens {tokens} --width {width} --heads {heads}")
    assert answer["parameters"] == count(layer)
    assert answer["macs"] == multiply_adds(layer, x, x, x)
    assert answer["head_width"] == layer.head_dim and answer["convention"] == "usual"


def test_attention_in_both_conventions():
    def outputs(words):
        return {row["layer"]: row["output"] for row in ask(words)["layers"]}
    usual = outputs("attention --tokens 8 --width 100 --heads 4")
    theirs = outputs("attention --tokens 8 --width 100 --heads 4 --head-width 100")
    assert usual["W_Q, W_K, W_V of each head"] == [100, 25]
    assert theirs["W_Q, W_K, W_V of each head"] == [100, 100]
    assert usual["W_O, the last linear layer"] == [100, 100]
    assert theirs["W_O, the last linear layer"] == [400, 100]
    for shapes in (usual, theirs):
        assert shapes["softmax(Q·Kᵀ/√d) of each head"] == [8, 8]
        assert shapes["X + positional encoding, added once"] == [8, 100]
    words = ask("attention --text 'the cat  sat\n on' --width 9 --heads 2 --head-width 4")
    assert words["tokens"] == 4


@pytest.mark.parametrize("image, patch, width, depth, heads, mlp, classes", [
    (224, 16, 768, 12, 12, 3072, 1000), (32, 8, 48, 2, 3, 96, 7)])
def test_vit_against_torchvision(image, patch, width, depth, heads, mlp, classes):
    with torch.device("meta"):
        network = torchvision.models.VisionTransformer(image, patch, depth, heads, width, mlp,
                                                       num_classes=classes)
        x = torch.zeros(1, 3, image, image)
    answer = ask(f"vit --image {image}x{image} --patch {patch} --width {width} --depth {depth} "
                 f"--heads {heads} --mlp {mlp} --classes {classes}")
    assert answer["parameters"] == count(network)
    assert answer["macs"] == multiply_adds(network, x)
    assert answer["tokens"] == network.seq_length
    assert answer["positions_numbered_on"] == network.encoder.pos_embedding.numel()


def test_vit_b_16_is_the_one_everybody_knows():
    with torch.device("meta"):
        assert ask(VIT_B)["parameters"] == count(torchvision.models.vit_b_16()) == 86_567_656
    assert 17e9 < ask(VIT_B)["macs"] < 18e9


def test_vit_pages_and_positions():
    pages = ask([*VIT_B, "--pages", "3"])
    assert pages["patches"] == 3 * 196 and pages["tokens"] == 589
    assert pages["positions_numbered_on"] == torch.zeros(589, 768).numel()
    # Alike on each page: 197 rows as for one page, and a vector for each of the 3.
    assert pages["positions_per_page"] == torch.zeros(197 + 3, 768).numel()
    plane = ask([*VIT_B, "--pages", "3", "--positions", "2d"])
    # 3·14 rows numbered on and 14 columns, each half a vector.
    assert plane["positions_numbered_on"] == torch.zeros(42 + 14, 384).numel()
    assert plane["positions_per_page"] == torch.zeros(14 + 14, 384).numel() + 3 * 768
    fixed = ask([*VIT_B, "--positions", "sincos"])
    assert fixed["positions_numbered_on"] == 0
    assert fixed["parameters"] == 86_567_656 - 197 * 768
    wide = ask([*VIT_B, "--image", "32x64", "--patch", "8x16"])
    assert (wide["rows"], wide["columns"], wide["pixels"]) == (4, 4, 3 * 8 * 16)


@pytest.mark.parametrize("layers", (1, 2, 3))
@pytest.mark.parametrize("bidirectional", (False, True))
def test_rnn_against_torch(layers, bidirectional):
    for name, make in (("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)):
        network = make(5, 7, layers, bidirectional=bidirectional, batch_first=True, device="meta")
        answer = ask(f"rnn --cell {name} --input 5 --hidden 7 --layers {layers}"
                     + " --bidirectional" * bidirectional)
        x = torch.zeros(1, 1, 5, device="meta")
        assert answer["parameters"] == answer[name] == count(network)
        assert answer["macs"] == multiply_adds(network, x)
        assert answer["output"] == network(x)[0].shape[-1]


@pytest.mark.parametrize("radius", (0.8, 1.0, 1.3))
def test_gradient_through_time_against_autograd(radius):
    torch.manual_seed(0)
    matrix = radius * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    start = torch.randn(6, dtype=torch.float64, requires_grad=True)
    state = start
    for _ in range(30):
        state = matrix @ state
    seed = torch.randn(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(state, start, seed)
    answer = ask(f"rnn --cell rnn --input 1 --hidden 6 --radius {radius} --length 30")
    ratio = (gradient.norm() / seed.norm()).item()
    assert 10 ** answer["gradient_log10"]["30"] == pytest.approx(ratio)


def complete(monkeypatch, recipe, **more):
    """A recipe under its name, also where flags.RECIPES does not hold it (yet)."""
    family = "tinyimagenet" if recipe.startswith("tiny") else recipe
    own = flags.RECIPES.get(recipe, dict(teacher=dict(arch=f"{family}-teacher"),
                                         student=dict(arch=f"{family}-student")))
    monkeypatch.setitem(flags.RECIPES, recipe, {**own, **more})


@pytest.mark.parametrize("recipe, more", [
    *((recipe, {}) for recipe in RECIPES), ("digits", dict(norm="batch", activation="ahaf"))])
def test_arch_against_the_networks_themselves(monkeypatch, recipe, more):
    complete(monkeypatch, recipe, **more)
    answer = ask(["arch", recipe, "--batch-size", "32"])
    size, classes = ((3, 64, 64), 200) if recipe.startswith("tiny") else ((3, 32, 32), 10)
    for role in ("teacher", "student"):
        values = flags.settings(recipe, role)
        with torch.device("meta"):
            model = models.build(values["arch"], classes, size, "he", values["pool"],
                                 values["activation"], values["norm"])
        kept = []
        for layer in [*model.features, *model.classifier]:
            if not isinstance(layer, nn.Flatten):
                layer.register_forward_hook(lambda layer, x, y, kept=kept: kept.append(y.numel()))
        assert answer[role]["macs"] == multiply_adds(model, torch.zeros(1, *size, device="meta"))
        assert answer[role]["parameters"] == models.count_parameters(model)
        assert answer[role]["bytes"] == 2 * answer[role]["bytes_in_bf16"] == 4 * count(model)
        assert answer[role]["activation_bytes"] == 32 * 4 * sum(kept)
    assert answer["ratio"]["macs"] == pytest.approx(
        answer["teacher"]["macs"] / answer["student"]["macs"], abs=0.005)


def test_arch_has_the_first_fully_connected_layers_of_report_003(monkeypatch):
    complete(monkeypatch, "cifar10-xavier-avg")
    answer = ask("arch cifar10-xavier-avg")
    for role, inputs in (("teacher", 75264), ("student", 14400)):
        layer = next(row for row in answer[role]["layers"] if row["layer"] == "fc:256")
        assert layer["macs"] == inputs * 256


def test_init_shows_why_twelve_convs_from_plain_xavier_do_not_learn(monkeypatch, tmp_path, capsys):
    deep = dict(channels=(8,) * 12, kernels=(3,) * 12, paddings=(1,) * 12, pools=(3,), hidden=(16,))
    monkeypatch.setitem(models.ARCHITECTURES, "digits-teacher", deep)
    answer = ask(["init", "digits", "--out", str(tmp_path / "new" / "plot.png")])
    found = answer["inits"]
    assert list(found) == list(models.INITS)
    assert all(len(values["output"]) == len(values["gradient"]) == 14 for values in found.values())
    assert found["xavier-gain1"]["output"][-1] < found["he"]["output"][-1] / 20
    assert found["xavier-gain1"]["gradient"][0] < found["he"]["gradient"][0] / 20
    assert 0.1 < found["he"]["output"][11] / found["he"]["output"][0] < 10
    with Image.open(answer["plot"]) as picture:
        assert picture.format == "PNG" and picture.width >= 800
    out = capsys.readouterr().out
    assert f"plot: {answer['plot']}" in out and out.count("\n") == 2 * 15 + 1
    assert list(ask(["init", "digits", "--init", "he", "--out", str(tmp_path / "he.png")])["inits"]
                ) == ["he"]


def test_init_measures_the_real_networks(tmp_path):
    """The deviations of one layer, taken again by hand."""
    found = ask(["init", "digits", "--init", "xavier", "--out", str(tmp_path / "a.png")])
    found = found["inits"]["xavier"]
    values = flags.settings("digits", "teacher")
    torch.manual_seed(0)
    model = models.build(values["arch"], 10, (3, 32, 32), "xavier", values["pool"],
                         values["activation"], values["norm"])
    x = torch.randn(32, 3, 32, 32)
    logits = model(x)
    (gradient,) = torch.autograd.grad(
        nn.functional.cross_entropy(logits, torch.arange(32) % 10), logits)
    assert found["output"][0] == pytest.approx(model.features[0](x).std().item(), rel=1e-4)
    assert found["output"][-1] == pytest.approx(logits.std().item(), rel=1e-4)
    assert found["gradient"][-1] == pytest.approx(gradient.std().item(), rel=1e-4)
