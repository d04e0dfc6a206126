"""Shapes, parameters and multiply-adds (macs), each with its formula.

    python calc.py shape 3x64x64 conv:32,k=5,p=2 max:2 conv:64,k=3,p=1 fc:128
    python calc.py mlp 50 10 1 --samples 1000 --batch-size 10 --epochs 100
    python calc.py attention --text "the cat sat" --width 100 --heads 4
    python calc.py vit --image 224x224 --patch 16 --width 768 --depth 12 \\
                       --heads 12 --mlp 3072
    python calc.py rnn --cell lstm --input 1 --hidden 64 --layers 2 --length 100
    python calc.py arch cifar10-he-max --batch-size 128
    python calc.py init cifar10-he-max
    python calc.py select --programme btech --roll 052 --birth 18/03/02
    python calc.py reports

COMMAND --help explains one, --json prints JSON, calc.main([...]) returns a dict. Macs are
those of convolutions and matrix products, for one input; bytes are those of fp32.
"""
import argparse
import inspect
import json
import math
import sys
from pathlib import Path

from recipes import RECIPES, Parser, fail, number, one_line_errors, read_json, say, settings

# What the reports select, ask and print.
REPORTS = Path(__file__).parent / "results" / "published" / "reports.json"


# ---- rows, and answers as text ------------------------------------------------------

def row(output, parameters="0", macs="0", steps=(), layer=""):
    """Return one layer as a dict; its numbers come from the formulas that are shown.

    output: its shape, a list. parameters, macs: sums of products, as "32·3·5·5 + 32".
    steps: lines that show how the output is found. layer: its name.
    """
    found, lines = dict(layer=layer, output=output), list(steps)
    for name, formula in dict(parameters=parameters, macs=macs).items():
        found[name] = 0
        for product in formula.split(" + "):
            found[name] += math.prod(map(int, product.split("·")))
        if found[name]:
            lines.append(f"{name} {formula} = {found[name]}")
    return found | dict(formula="; ".join(lines))


def total(layers):
    """Return rows as a dict of them and their sums."""
    parameters = sum(layer["parameters"] for layer in layers)
    macs = sum(layer["macs"] for layer in layers)
    return dict(layers=layers, parameters=parameters, macs=macs, bytes=4 * parameters)


def cell(value):
    """Return a shape as 3×32×32, a whole number as 1 234, a float with four digits."""
    if isinstance(value, list):
        separator = "×" if isinstance(value[0], int) else ", "
        return separator.join(map(cell, value))
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    return f"{value:.4g}" if isinstance(value, float) else value


def table(rows):
    """Return dicts with the same keys as lines of text, each with its formula under it."""
    names = [name for name in rows[0] if name not in ("formula", "of", "path")]
    lines = []
    for found in [dict(zip(names, names, strict=True)), *rows]:
        first, second, *others = [cell(found[name]) for name in names]
        line = first + second.rjust(80 - 16 * len(others) - len(first))
        for text in others:
            line += text.rjust(16)
        lines.append(line)
        if found.get("formula"):
            lines.append("    " + found["formula"].replace("; ", "\n    "))
    return lines


def as_text(answer):
    """Return an answer as lines of text."""
    lines = []
    for key, value in answer.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            lines += ["", f"{name}:", *as_text(value)]
        elif key in ("questions", "answers"):
            for item in value:
                lines += ["", *as_text(item)]
        elif key in ("layers", "gradients", "checks") and value:
            lines += table(value)
        elif key in ("question", "commands", "remark"):
            lines += value
        elif value != []:
            lines.append(f"{name}: {cell(value)}")
    return lines


# ---- layers: (shape, options) -> row ------------------------------------------------

def output_size(size, kernel, stride=1, padding=0, dilation=1, ceil_mode=False):
    """Return how many places a window finds along a side, in pixels, as PyTorch counts.

    floor((size + 2·padding − dilation·(kernel − 1) − 1) / stride) + 1. With ceil_mode it
    is rounded up, but the last window must start in the input or its left padding.
    ValueError where nothing is left.
    """
    if min(size, kernel, stride, dilation, padding + 1) < 1:
        raise ValueError("the padding must be 0 or more, all other numbers 1 or more")
    window = dilation * (kernel - 1) + 1
    room = size + 2 * padding - window
    places = room // stride + 1
    if ceil_mode:
        places = min(math.ceil(room / stride) + 1, math.ceil((size + padding) / stride))
    if places < 1:
        raise ValueError(f"nothing is left: {size} pixels, padding {padding}, window {window}")
    return places


def pair(value):
    """Return a number as that of height and of width, a pair as it is."""
    return value if isinstance(value, list) else [value, value]


def slide(shape, *options, ceil=0):
    """Return [height, width] that a window leaves, and lines that show how.

    options: kernel, stride, padding, dilation; each a number or a pair.
    """
    sides, steps = [], {}
    for n, k, s, p, d in zip(shape[1:], *map(pair, options), strict=True):
        size = output_size(n, k, s, p, d, ceil)
        places = f"({n} + 2·{p} − {d * (k - 1) + 1}) / {s}"
        formula = f"floor({places}) + 1 = {size}"
        if ceil:
            formula = f"{places} + 1, in ceil_mode: {size}"
        sides.append(size)
        steps[formula] = None       # a dict: one line for a square
    return sides, steps


def conv(shape, out, k, s=1, p=0, d=1, groups=1, bias=1):
    """Convolution; each of its groups sees a share of the channels."""
    channels = shape[0]
    if channels % groups or out % groups:
        raise ValueError(f"groups={groups} must divide {channels} channels and out={out}")
    (height, width), steps = slide(shape, k, s, p, d)
    kh, kw = pair(k)
    weights = f"{out}·{channels // groups}·{kh}·{kw}"
    macs = f"{weights}·{height}·{width}"
    return row([out, height, width], f"{weights} + {out * bias}", macs, steps)


def pool(shape, k, s=None, p=0, d=1, ceil=0):
    """Max or average pooling; the stride is that of the window unless it is given."""
    sides, steps = slide(shape, k, s or k, p, d, ceil=ceil)
    return row([shape[0], *sides], steps=steps)


def fully_connected(shape, out, bias=1):
    """Fully connected layer, which flattens by itself."""
    weights = "·".join(map(str, [*shape, out]))
    return row([out], f"{weights} + {out * bias}", weights)


# A layer's options are its function's parameters: conv:32,k=5 is conv(shape, 32, k=5).
LAYERS = {
    "conv": conv,
    "max": pool,
    "avg": pool,
    "adaptive": lambda shape, size: row([shape[0], *pair(size)]),
    "flatten": lambda shape: row([math.prod(shape)]),
    "fc": fully_connected,
    "bn": lambda shape: row(shape, f"2·{shape[0]}"),
    "ln": lambda shape: row(shape, f"2·{math.prod(shape)}"),
    "ahaf": lambda shape: row(shape, "1 + 1"),      # β and γ of x·β·σ(γ·x)
}
SAME = ("dropout", "relu", "elu", "selu", "silu", "gelu", "sigmoid", "tanh", "softmax")
LAYERS |= dict.fromkeys(SAME, lambda shape: row(shape))


def sizes(text):
    """argparse type: whole numbers joined by x, or a date's by /, as a list."""
    return [number(int, 0, 10**9)(size) for size in text.replace("/", "x").split("x")]


def read_layer(shape, text):
    """Return a layer's row: ([3, 64, 64], "conv:32,k=5") -> {"output": [32, 60, 60], ...}."""
    kind, _, typed = text.partition(":")
    if kind not in LAYERS:
        raise ValueError(f"choose from {', '.join(LAYERS)}")
    if len(shape) < 3 and kind in ("conv", "max", "avg", "adaptive"):
        raise ValueError("it takes channels×height×width")
    if kind == "dropout":       # its rate changes nothing here
        typed = ""
    first, options = [], {}
    for item in filter(None, typed.split(",")):
        name, _, value = item.rpartition("=")
        value = sizes(value)
        if len(value) == 1:
            value = value[0]
        if name:
            options[name] = value
        else:       # the first option needs no key
            first.append(value)
    try:
        return LAYERS[kind](shape, *first, **options)
    except TypeError:
        raise ValueError(f"{kind} takes {inspect.signature(LAYERS[kind])}") from None


# ---- commands -----------------------------------------------------------------------

# A command's parameters are its flags, after the * those with --. An annotation is what
# argparse is told of one; without, it is a whole number from 1.
WHOLE = dict(type=number(int, 1, 10**9))
SIDES = dict(type=sizes, metavar="HxW")
TEXT = {}
SWITCH = dict(action="store_true")
RECIPE = dict(choices=RECIPES, metavar="RECIPE")
POSITIONS = dict(choices=("learned", "2d", "sincos"))
PROGRAMME = dict(choices=("btech", "mtech"))
ROLL = dict(type=number(int, 0, 999), metavar="ABC")
BIRTH = dict(type=sizes, metavar="DD/MM/YY")
GATES = dict(rnn=1, gru=3, lstm=4)


def shape(input: dict(type=sizes, metavar="CxHxW"), layers: dict(nargs="+")):
    """What each layer of a chain puts out, with its parameters and multiply-adds.

    The input is CxHxW, HxW (one channel) or N; a layer is kind:value,key=value,... with
    k kernel (5x6: 5 high), s stride, p padding, d dilation, ceil=1 sizes rounded up.
    """
    output = [1, *input] if len(input) == 2 else input
    answer = dict(input=output)
    rows = []
    for place, text in enumerate(layers, 1):
        try:
            found = read_layer(output, text)
        except (ValueError, ArithmeticError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"layer {place}, {text!r} of {cell(output)}: {error}") from None
        rows.append(found | dict(layer=text))
        output = found["output"]
    return answer | total(rows) | dict(output=output)


def mlp(inputs, layers: WHOLE | dict(nargs="+"), *, samples=1, batch_size=1, epochs=1):
    """Weights, biases and updates of a fully connected network.

    With one output p = σ(z) also the gradients of MSE and BCE in z, for label 1.
    """
    answer = shape([inputs], [f"fc:{out}" for out in layers])
    parameters, biases = answer["parameters"], sum(layers)
    batches = math.ceil(samples / batch_size)
    answer |= dict(
        weights=parameters - biases,
        biases=biases,
        numbers_in_one_update=parameters,
        batches=batches,
        last_batch=samples - (batches - 1) * batch_size,
        updates=batches * epochs,
        unknown=["an update's numbers", "their mean over an epoch", "the final error"])
    if layers[-1] == 1:
        answer["gradients"] = []
        for p in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99):
            mse = 2 * (p - 1) * p * (1 - p)
            found = dict(p=p, mse=round(mse, 6), bce=round(p - 1, 6))
            answer["gradients"].append(found)
    return answer


# Name, output, parameters and macs; t tokens, w width, h heads, d width of a head, j of all.
ATTENTION = [
    ("embedding X", "t w"),
    ("X + positional encoding, added once", "t w"),
    ("W_Q, W_K, W_V of each head", "w d", "3·{h}·{w}·{d} + 3·{h}·{d}"),
    ("Q, K, V = X·W + b of each head", "t d", "0", "3·{h}·{t}·{w}·{d}"),
    ("softmax(Q·Kᵀ/√d) of each head", "t t", "0", "{h}·{t}·{t}·{d}"),
    ("softmax(…)·V of each head", "t d", "0", "{h}·{t}·{t}·{d}"),
    ("heads side by side", "t j"),
    ("W_O, the last linear layer", "j w", "{j}·{w} + {w}", "{t}·{j}·{w}"),
]
# n patches of p numbers, e parameters of positions, b blocks, m width of an MLP, c classes.
VIT = [
    ("patch embedding", "n w", "{p}·{w} + {w}", "{n}·{p}·{w}"),
    ("class token, positions numbered on", "t w", "{w} + {e}"),
    ("layer norms", "t w", "2·{b}·2·{w} + 2·{w}"),
    ("Q, K, V and last linear layers", "t w",
     "4·{b}·{w}·{w} + 4·{b}·{w}", "4·{b}·{t}·{w}·{w}"),
    ("scores, weighted sums of V", "t t", "0", "2·{b}·{t}·{t}·{w}"),
    ("MLPs", "t w", "2·{b}·{w}·{m} + {b}·{m} + {b}·{w}", "2·{b}·{t}·{w}·{m}"),
    ("classifier of the class token", "c", "{w}·{c} + {c}", "{w}·{c}"),
]


def fill(parts, **numbers):
    """Return the rows of a table of parts, its numbers filled in, and their sums."""
    rows = []
    for name, output, *formulas in parts:
        sides = [numbers[side] for side in output.split()]
        filled = [formula.format(**numbers) for formula in formulas]
        rows.append(row(sides, *filled, layer=name))
    return total(rows)


def divide(what, whole, part):
    """Return whole / part; ValueError where a rest is left."""
    if whole % part:
        raise ValueError(f"{what} must divide without a rest, but {whole} / {part} does not")
    return whole // part


def attention(*, width, heads, tokens=None, text: TEXT = "", head_width=None):
    """Each matrix of self-attention, from the embedding to the last linear layer.

    A head: width / heads (torch; arXiv 1706.03762), or --head-width (report 003).
    """
    if bool(tokens) == bool(text.split()):
        raise ValueError("give either --tokens N or --text with a word or more")
    t = tokens or len(text.split())
    d = head_width or divide("width / heads", width, heads)
    joined = heads * d
    convention = "usual"
    if joined != width:
        convention = "--head-width (report 003: the full one)"
    facts = dict(convention=convention, tokens=t, head_width=d, joined=joined)
    return facts | fill(ATTENTION, t=t, w=width, h=heads, d=d, j=joined)


def vit(*, image: SIDES, patch: SIDES, width, depth, heads, mlp, classes=1000, pages=1,
        positions: POSITIONS = "learned"):
    """Tokens, positions, parameters and macs of a vision transformer (arXiv 2010.11929).

    --pages make one sequence, its patches numbered on, or each page with a vector of its own.
    --positions 2d: half of a vector for the row, half for the column (appendix D.4).
    """
    rows = divide("height / patch", image[0], patch[0])
    columns = divide("length / patch", image[-1], patch[-1])
    patches = pages * rows * columns
    pixels = 3 * patch[0] * patch[-1]
    half = width // 2
    parts, numbered_on, per_page = {
        "learned": (1, (patches + 1) * width, (rows * columns + 1 + pages) * width),
        "2d": (2, (pages * rows + columns) * half, (rows + columns) * half + pages * width),
        "sincos": (4, 0, pages * width),
    }[positions]
    facts = dict(
        rows=rows, columns=columns, patches=patches, tokens=patches + 1, pixels=pixels,
        head_width=divide("width / heads", width, heads),
        axis_width=divide("width / parts of a position", width, parts),
        positions_numbered_on=numbered_on, positions_per_page=per_page)
    parts = fill(
        VIT, n=patches, p=pixels, t=patches + 1, w=width, e=numbered_on,
        b=depth, m=mlp, c=classes)
    return facts | parts


def rnn(*, cell: dict(choices=GATES), input, hidden, bidirectional: SWITCH = False, layers=1,
        length=100, radius: dict(type=number(float, 1e-9, 1e9)) = 0.9):
    """Parameters as torch counts; multiply-adds of a step and of a sequence.

    And the power of ten by which a plain RNN's gradient shrinks over 1, 10 and --length
    steps, tanh aside, at a spectral --radius of its hidden weights.
    """
    output = hidden * (1 + bidirectional)
    gates = f"{GATES[cell]}·{output}"
    rows = []
    for layer in range(1, layers + 1):
        weights = f"{gates}·{input} + {gates}·{hidden}"
        rows.append(row([output], f"{weights} + {gates}·2", weights, layer=f"layer {layer}"))
        input = output      # of the next layer
    answer = total(rows)
    for part in [*rows, answer]:
        part["macs_a_step"] = part.pop("macs")
        part["macs_a_sequence"] = length * part["macs_a_step"]
    for name, gates in GATES.items():
        answer[name] = answer["parameters"] // GATES[cell] * gates
    powers = {}
    for steps in (1, 10, length):
        powers[str(steps)] = steps * math.log10(radius)
    return answer | dict(output=output, gradient_log10=powers)


def run_network(recipe, role, images, init=None):
    """Run a recipe's network on noise; return its layers, and what those with macs put out.

    images: how many. init: initial weights other than the recipe's.
    """
    import torch

    import models
    flags = settings(recipe, role)
    side, classes = 32, 10
    if flags["dataset"] == "tinyimagenet":
        side, classes = 64, 200
    torch.manual_seed(0)
    model = models.build(flags["arch"], classes, (3, side, side), init or flags["init"],
                         flags["pool"], flags["activation"], flags["norm"])
    rows, outputs = [], []

    def record(layer, inputs, output):      # output (images, ...)
        found = dict(
            layer=type(layer).__name__,
            output=list(output.shape[1:]),
            parameters=models.count_parameters(layer),
            macs=0,
            formula=layer.extra_repr())
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            found["macs"] = output[0].numel() * layer.weight[0].numel()
            outputs.append(output)
        rows.append(found)

    for layer in model.modules():
        if not list(layer.children()) and not isinstance(layer, torch.nn.Flatten):
            layer.register_forward_hook(record)
    model(torch.randn(images, 3, side, side))
    return dict(arch=flags["arch"], input=[3, side, side], **total(rows)), outputs


def arch(recipe: RECIPE, *, batch_size=128):
    """Layers of a recipe's teacher and student; totals, bytes of weights and outputs."""
    answer, ratio = {}, {}
    for role in ("teacher", "student"):
        network, _ = run_network(recipe, role, images=2)
        numbers = sum(math.prod(layer["output"]) for layer in network["layers"])
        answer[role] = network | dict(
            output=network["layers"][-1]["output"],
            bytes_in_bf16=network["bytes"] // 2,
            activation_bytes=4 * batch_size * numbers)
    for key, value in answer["student"].items():
        if isinstance(value, int):
            ratio[key] = round(answer["teacher"][key] / value, 2)
    return answer | dict(ratio=ratio)


def init(recipe: RECIPE, *, init: TEXT = None, out: TEXT = None):
    """Standard deviation of each output and gradient of a teacher's layers, on noise."""
    import torch

    import models
    import plots
    inits = {}
    for name in [init] if init else models.INITS:
        _, outputs = run_network(recipe, "teacher", 32, name)
        labels = torch.arange(32) % outputs[-1].shape[1]
        loss = torch.nn.functional.cross_entropy(outputs[-1], labels)
        gradients = torch.autograd.grad(loss, outputs)
        inits[name] = dict(
            output=[tensor.std().item() for tensor in outputs],
            gradient=[tensor.std().item() for tensor in gradients])
    with plots.defaults():
        figure = plots.new_figure(8, 5, "standard deviation, layer by layer")
        axes = figure.subplots()
        for name, deviations in inits.items():
            axes.semilogy(deviations["output"], "o-", label=f"output, {name}")
            axes.semilogy(deviations["gradient"], "x--", label=f"gradient, {name}")
        axes.legend()
    path = Path(out or f"results/{recipe}/init.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, path)
    return dict(inits=inits, plot=str(path))


def select(*, programme: PROGRAMME, roll: ROLL, birth: BIRTH, guess: SWITCH = False):
    """The parts of a training that a roll number ABC and a birth date DD/MM/YY select.

    A rule holds inside the programme it was seen in; --guess: elsewhere by parity.
    """
    if len(birth) < 2:
        raise ValueError("--birth takes a day and a month, as 18/03/02")
    true = {programme, "C below 6" if roll % 10 < 6 else "C from 6"}
    if guess:
        true.add("guess")
    numbers = dict(ABC=roll, SUM=sum(map(int, str(roll))), DD=birth[0], MM=birth[1])
    for name, value in numbers.items():
        true.add(f"{name} odd" if value % 2 else f"{name} even")
    choices, commands = {}, []
    for choice, rules in read_json(REPORTS)["selection"].items():
        choices[choice] = next(rule for rule in rules if true.issuperset(rule["when"]))
    data, start = choices["data"]["flags"], choices["init and pool"]["flags"]
    scripts = dict(train_teacher="teacher", train_student="student", distill="student")
    for script, part in scripts.items():
        command = f"python {script}.py {data} {start} {choices[part]['flags']}"
        commands.append(" ".join(command.split()))
    return dict(choices=choices, commands=commands)


def reports():
    """Every question of the reports: answer, what was printed, verdict."""
    questions = read_json(REPORTS)["questions"]
    for question in questions:
        answers = [ask(command.split())[0] for command in question["commands"]]
        wrong = 0
        for check in question["checks"]:
            true = answers[check["of"]]
            for key in check["path"]:
                true = true[key]
            check.update(true=true, verdict="right")
            if true != check["printed"]:
                check["verdict"] = "wrong"
                wrong += 1
        question.update(answers=answers, verdict="none printed")
        if question["checks"]:
            question["verdict"] = f"{wrong} of {len(question['checks'])} printed are wrong"
    return dict(questions=questions)


# ---- the command line ---------------------------------------------------------------

def make_parser():
    """Return the parser of all commands, made from their parameters and docstrings."""
    parser = Parser(description=__doc__, usage=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function in (shape, mlp, attention, vit, rnn, arch, init, select, reports):
        text = inspect.getdoc(function)
        command = commands.add_parser(
            function.__name__, description=text, help=text.split("\n")[0], usage=None)
        command.set_defaults(command=function)
        command.add_argument("--json", action="store_true", help="the answer as JSON")
        for name, flag in inspect.signature(function).parameters.items():
            options = dict(function.__annotations__.get(name, WHOLE))
            if flag.kind is flag.KEYWORD_ONLY:
                name = "--" + name.replace("_", "-")
                options["required"] = flag.default is flag.empty
                if not options["required"]:
                    options.update(default=flag.default, help=f"default: {flag.default}")
            command.add_argument(name, **options)
    return parser


def ask(argv):
    """Return (answer, whether JSON is wanted) of a command line."""
    flags = vars(make_parser().parse_args(argv))
    function, as_json = flags.pop("command"), flags.pop("json")
    try:
        return function(**flags), as_json
    except (ValueError, ArithmeticError) as error:
        fail(error)


def main(argv=None):
    """Answer one question, as lines or JSON, and return the answer as a dict."""
    if hasattr(sys.stdout, "reconfigure"):      # a terminal whose encoding lacks − and ×
        sys.stdout.reconfigure(errors="backslashreplace")
    with one_line_errors("ask again"):
        answer, as_json = ask(argv)
        say(json.dumps(answer) if as_json else "\n".join(as_text(answer)))
    return answer


if __name__ == "__main__":
    main()
