"""calc.py against PyTorch: sizes, parameters and multiply-adds are those of its modules."""
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import calc
import models
import recipes

VIT_B = "vit --image 224x224 --patch 16 --width 768 --depth 12 --heads 12 --mlp 3072"
WITHOUT_TORCH = [
    "shape 3x64x64 conv:32,k=5,p=2 max:2 flatten fc:128 dropout:0.5",
    "mlp 50 10 1 --samples 1000 --batch-size 10 --epochs 100",
    "attention --tokens 8 --width 100 --heads 4",
    VIT_B,
    "rnn --cell lstm --input 1 --hidden 64 --layers 2 --bidirectional",
    "select --programme btech --roll 052 --birth 18/03/02",
    "reports",
]


def ask(words):
    return calc.main(words.split())


def multiply_adds(module, *inputs):
    """Return half of PyTorch's count of floating-point operations, for one of the batch."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2 // inputs[0].shape[0]


def draw(rng, shape):
    """Return a layer as text and a function that makes PyTorch's; not all fit the shape."""
    k, wide = rng.randint(2, 5), rng.randint(2, 5)
    s, p, d = rng.randint(1, 3), rng.randint(0, 1), rng.randint(1, 2)
    out, groups, flag = rng.randint(1, 8), rng.choice((1, 1, 2)), rng.randint(0, 1)
    channels, kernel = shape[0], f"k={k}x{wide},s={s},p={p}"
    return rng.choice([
        (f"conv:{out},{kernel},d={d},groups={groups},bias={flag}",
         lambda: nn.Conv2d(channels, out, (k, wide), s, p, d, groups, bool(flag))),
        (f"max:{kernel},d={d},ceil={flag}",
         lambda: nn.MaxPool2d((k, wide), s, p, d, ceil_mode=bool(flag))),
        (f"avg:{kernel},ceil={flag}", lambda: nn.AvgPool2d((k, wide), s, p, bool(flag))),
        (f"max:{k}", lambda: nn.MaxPool2d(k)),
        (f"adaptive:{k}x{wide}", lambda: nn.AdaptiveAvgPool2d((k, wide))),
        (f"fc:{out},bias={flag}",
         lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(out, bool(flag)))),
        ("bn", lambda: nn.LazyBatchNorm1d() if len(shape) == 1 else nn.LazyBatchNorm2d()),
        ("ln", lambda: nn.LayerNorm(shape)),
        ("ahaf", models.AHAF),
        ("dropout:0.5", nn.Dropout),
        ("flatten", nn.Flatten),
    ])


def test_random_chains_are_as_in_torch_or_refused_with_it():
    rng, refusals = random.Random(0), 0
    for _ in range(60):
        start = [rng.randint(1, 4), rng.randint(3, 16), rng.randint(3, 16)]
        x, texts, network = torch.zeros(2, *start), [], nn.Sequential()
        for _ in range(4):
            text, make = draw(rng, list(x.shape[1:]))
            try:
                layer = make()
                x = layer(x)
            except (RuntimeError, ValueError, IndexError):
                refusals += 1
                with pytest.raises(ValueError, match=f"^layer {len(texts) + 1}, {text!r} of "):
                    calc.shape(start, [*texts, text])
                break
            texts.append(text)
            network.append(layer)
            found = calc.shape(start, texts)
            assert found["output"] == list(x.shape[1:]), (start, texts)
        if texts:
            assert found["parameters"] == models.count_parameters(network)
            assert found["macs"] == multiply_adds(network, torch.zeros(2, *start))
    assert refusals > 20


def test_output_size_and_exact_numbers():
    assert calc.output_size(256, 5, 2, 1) == 127
    # ceil((3 + 2·1 − 2) / 2) + 1 = 3, but the third window starts at 4 of 1 + 3 pixels.
    assert calc.output_size(3, 2, 2, 1, ceil_mode=True) == 2
    for wrong in ((0, 1), (4, 0), (4, 2, 0), (4, 2, 1, -1), (4, 2, 1, 0, 0), (2, 5)):
        with pytest.raises(ValueError):
            calc.output_size(*wrong)
    assert ask("shape 999999999 fc:999999999")["macs"] == 999999999 ** 2


def test_every_formula_that_is_shown_comes_to_what_it_says():
    words = "shape 4x16x15 conv:4,k=3,d=2,groups=2 max:3,p=1 bn ln conv:3,k=4x3,bias=0 fc:9"
    rows = [row for words in [*WITHOUT_TORCH[:5], words] for row in ask(words)["layers"]]
    steps = [step for row in rows for step in row["formula"].split("; ") if step]
    assert len(steps) == 45
    for step in steps:
        step = re.sub("^(parameters|macs) ", "", step).replace("·", "*").replace("−", "-")
        formula, value = step.rsplit(" = ", 1)
        assert eval(formula, dict(floor=math.floor)) == int(value), step


def test_mlp_against_torch():
    found = ask("mlp 50 10 1 --samples 1003 --batch-size 10 --epochs 100")
    network = nn.Sequential(nn.Linear(50, 10), nn.Linear(10, 1))
    batches = list(torch.utils.data.DataLoader(torch.zeros(1003), batch_size=10))
    assert found["parameters"] == models.count_parameters(network)
    assert (found["batches"], found["last_batch"]) == (len(batches), len(batches[-1]))
    assert found["updates"] == 100 * len(batches)
    assert found["macs"] == multiply_adds(network, torch.zeros(1, 50))
    for row in found["gradients"]:
        z = torch.logit(torch.tensor(row["p"], dtype=torch.float64)).requires_grad_()
        (mse,) = torch.autograd.grad((torch.sigmoid(z) - 1) ** 2, z)
        (bce,) = torch.autograd.grad(-torch.log(torch.sigmoid(z)), z)
        assert (row["mse"], row["bce"]) == pytest.approx((mse.item(), bce.item()), abs=1e-6)


def test_attention_against_torch():
    layer = nn.MultiheadAttention(100, 4, batch_first=True, device="meta")
    x = torch.zeros(1, 8, 100, device="meta")
    found = ask("attention --tokens 8 --width 100 --heads 4")
    assert found["parameters"] == models.count_parameters(layer)
    assert found["macs"] == multiply_adds(layer, x, x, x)
    assert (found["convention"], found["head_width"]) == ("usual", layer.head_dim)


def test_vit_is_patches_blocks_and_a_classifier():
    with torch.device("meta"):
        patches, image = nn.Conv2d(3, 48, 8, 8), torch.zeros(1, 3, 32, 64)
        block = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True)
        x, norm, classifier = torch.zeros(1, 33, 48), nn.LayerNorm(48), nn.Linear(48, 7)
    found = ask("vit --image 32x64 --patch 8 --width 48 --depth 2 --heads 3 --mlp 96 --classes 7")
    parts = (patches, block, block, norm, classifier)
    assert found["parameters"] == sum(map(models.count_parameters, parts)) + 48 + 33 * 48
    assert found["tokens"] == 33 and found["positions_numbered_on"] == 33 * 48
    assert found["macs"] == (multiply_adds(patches, image) + 2 * multiply_adds(block, x)
                             + multiply_adds(classifier, x[:, 0]))


@pytest.mark.parametrize("flags, numbered_on, per_page", [
    ("--pages 3", (3 * 196 + 1) * 768, (197 + 3) * 768),
    ("--pages 3 --positions 2d", (3 * 14 + 14) * 384, (14 + 14) * 384 + 3 * 768),
    ("--positions sincos", 0, 768)])
def test_vit_positions(flags, numbered_on, per_page):
    found = ask(f"{VIT_B} {flags}")
    assert found["positions_numbered_on"] == numbered_on
    assert found["positions_per_page"] == per_page
    # torchvision's vit_b_16 has 86 567 656, with a learned vector for each of 197 tokens.
    assert found["parameters"] == 86_567_656 - 197 * 768 + numbered_on


@pytest.mark.parametrize("cell, make", [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_rnn_against_torch(cell, make):
    for layers, flag in ((1, ""), (2, "--bidirectional")):
        network = make(5, 7, layers, bidirectional=bool(flag), batch_first=True, device="meta")
        found = ask(f"rnn --cell {cell} --input 5 --hidden 7 --layers {layers} --length 3 {flag}")
        step, sequence = torch.zeros(1, 1, 5, device="meta"), torch.zeros(1, 3, 5, device="meta")
        assert found["parameters"] == found[cell] == models.count_parameters(network)
        assert found["output"] == network(step)[0].shape[-1]
        assert found["macs_a_step"] == multiply_adds(network, step)
        assert found["macs_a_sequence"] == multiply_adds(network, sequence)
    assert sum(row["macs_a_sequence"] for row in found["layers"]) == found["macs_a_sequence"]
    assert found["gradient_log10"]["10"] == pytest.approx(10 * math.log10(0.9))


def pooled(image_shape, num_classes):
    """A network that is no line of numbers, with a block in a block."""
    block = nn.Sequential(nn.Conv2d(image_shape[0], 8, 3), nn.BatchNorm2d(8))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(8, num_classes))
    return models.Network(nn.Sequential(block, nn.AdaptiveAvgPool2d(1)), classifier)


@pytest.mark.parametrize("recipe, changes", [
    ("digits", {}), ("tinyimagenet-kd", {}), ("digits", dict(norm="batch", activation="ahaf")),
    ("digits", dict(student=dict(arch="pooled"), pool="max"))])
def test_arch_counts_the_networks_themselves(monkeypatch, recipe, changes):
    monkeypatch.setitem(models.ARCHITECTURES, "pooled", pooled)
    monkeypatch.setitem(recipes.RECIPES, recipe, recipes.RECIPES[recipe] | changes)
    found = ask(f"arch {recipe} --batch-size 32")
    image, classes = ((3, 32, 32), 10) if recipe == "digits" else ((3, 64, 64), 200)
    for role in ("teacher", "student"):
        flags = recipes.settings(recipe, role)
        model = models.build(flags["arch"], classes, image, flags["init"], flags["pool"],
                             flags["activation"], flags["norm"])
        counted = found[role]
        assert counted["macs"] == multiply_adds(model, torch.zeros(1, *image))
        assert counted["bytes"] == 4 * models.count_parameters(model)
        assert (counted["input"], counted["output"]) == (list(image), [classes])
        numbers = sum(math.prod(row["output"]) for row in counted["layers"])
        assert counted["activation_bytes"] == 32 * 4 * numbers
    ratio = found["teacher"]["macs"] / found["student"]["macs"]
    assert found["ratio"]["macs"] == pytest.approx(ratio, abs=0.005)


def test_init_measures_the_real_network(tmp_path):
    found = ask(f"init digits --init xavier --out {tmp_path}/new/a.png")
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    torch.manual_seed(0)
    model = models.build("digits-teacher", 10, (3, 32, 32), "xavier")
    logits = model(torch.randn(32, 3, 32, 32))
    loss = nn.functional.cross_entropy(logits, torch.arange(32) % 10)
    (gradient,) = torch.autograd.grad(loss, logits)
    measured = found["inits"]["xavier"]
    assert measured["output"][-1] == pytest.approx(logits.std().item(), rel=1e-4)
    assert measured["gradient"][-1] == pytest.approx(gradient.std().item(), rel=1e-4)


@pytest.mark.parametrize("words, values", [
    ("mtech --roll 061 --birth 21/06", "Tiny ImageNet; Xavier; 12 conv; 4 conv; one hidden FC of"),
    ("btech --roll 052 --birth 18/03/02", "CIFAR-10; He; 7 conv; 2 conv; one hidden FC of 256"),
    ("btech --roll 051 --birth 17/04/2002", "SVHN; unknown; unknown; unknown; unknown"),
    ("btech --roll 051 --birth 17/04 --guess", "SVHN; Xavier; 8 conv (a; 4 conv; unknown")])
def test_select(words, values):
    found = ask(f"select --programme {words}")
    choices = [choice["value"] for choice in found["choices"].values()]
    assert all(map(str.startswith, choices, values.split("; "))), choices
    known = [*recipes.RECIPES, *models.ARCHITECTURES, *models.INITS, *models.POOLS]
    for command in found["commands"]:
        assert set(command.split()[3::2]) <= set(known)


def test_every_question_of_the_reports():
    questions = ask("reports")["questions"]
    found = [[check["true"] for check in question["checks"]] for question in questions[:5]]
    assert found == [
        [127, 63, 30], [127, 170, 63, 56, 30, 53, 29], [521, 100],
        [2432, 18496, 8388736, 0, 8409664, 8409664, 401536], [[100, 100], [8, 8], [400, 100]]]
    wrong = [question["verdict"].split()[0] for question in questions]
    assert wrong == ["0", "4", "0", "6", "0"] + ["none"] * 7


@pytest.mark.parametrize("words, part", [
    ("shape 3x4x4 relu conv:4,k=9,p=1", "layer 2, 'conv:4,k=9,p=1' of 3×4×4: nothing is left"),
    ("shape 3x8x8 avg:3,x=2", "avg takes (shape, k, s=None, p=0"),
    ("shape 3x8x8 conv:4,k=3,groups=2", "groups=2 must divide 3 channels and out=4"),
    ("shape 3x8x8 conv:4,k=5y6", "'5y6' is not a whole number"),
    ("shape 3x8x8 flatten max:2", "of 192: it takes channels×height×width"),
    ("mlp 50 0 1", "'0' is not a whole number from 1"),
    ("attention --width 100 --heads 4", "give either --tokens N or --text"),
    (f"{VIT_B} --image 225x224", "height / patch must divide without a rest, but 225 / 16"),
    (f"{VIT_B} --patch 0", "zero"),
    ("rnn --cell lstn --input 1 --hidden 2", "'lstn' (choose from"),
    ("init digits --init kaiming", "'kaiming'; choose from: he"),
    ("select --programme btech --roll 052 --birth 18", "--birth takes a day and a month")])
def test_refused_in_one_line(capsys, words, part):
    with pytest.raises(SystemExit) as stop:
        ask(words)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1) and part in err, err


def test_torch_and_matplotlib_are_not_loaded_for_what_needs_none():
    code = ("import sys, calc\n"
            "for words in sys.argv[1:]:\n"
            "    calc.main(words.split())\n"
            "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", code, *WITHOUT_TORCH], check=True,
                   cwd=Path(calc.__file__).parent, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [*WITHOUT_TORCH, "arch digits"])
def test_json_is_the_answer_and_lines_fit_a_terminal(words, capsys):
    found = ask(f"{words} --json")
    assert json.loads(capsys.readouterr().out) == found
    assert ask(words) == found
    lines = capsys.readouterr().out.splitlines()
    commands = ("python ", "shape ", "vit ")
    assert all(len(line) <= 80 or line.startswith(commands) for line in lines)
