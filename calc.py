"""Shapes, parameters, multiply-adds, each with its formula. No network is built.

    python calc.py shape 3x64x64 conv:out=32,k=5,p=2 relu max:2 conv:64,k=3,p=1 fc:128 dropout:0.5
    python calc.py mlp 50 10 1 --samples 1000 --batch-size 10 --epochs 100
    python calc.py attention --text "the cat sat on the mat" --width 100 --heads 4
    python calc.py vit --image 224x224 --patch 16 --width 768 --depth 12 --heads 12 --mlp 3072
    python calc.py rnn --cell lstm --input 1 --hidden 64 --layers 2 --radius 0.9 --length 100
    python calc.py arch cifar10-he-max --batch-size 128
    python calc.py init cifar10-he-max
    python calc.py select --programme btech --roll 052 --birth 18/03/02
    python calc.py reports

COMMAND --help explains one, --json prints JSON, calc.main([...]) gives a dict.
Macs are multiply-adds of convolutions and matrix products, for one input.
"""
from flags import RECIPES, Parser, a_file, fail, launch, number, settings, words  # noqa: I001
import inspect
import json
import math
import re
from fractions import Fraction
from pathlib import Path

REPORTS = Path(__file__).parent / "tests" / "reports.json"   # what the reports select, ask, print
SLIDE = "floor((n + 2·p − (d·(k − 1) + 1)) / s) + 1"
CEIL = "min(ceil((n + 2·p − (d·(k − 1) + 1)) / s) + 1, ceil((n + p) / s))"
UNSLIDE = "(n − 1)·s − 2·p + d·(k − 1) + op + 1"
CONV, PLAIN = "out k s=1 p=0 d=1 groups=1 bias=1", ("", None, "c", "0", None)
# A kind of layer: its keys with defaults (none: must be given; the first value needs no key) | what
# becomes of a side (None: stays, "": flattened) | channels out | weights ("+ out" biases) | what
# multiplies them. c, h, w: input; n: pixels of a side or all numbers; H, W: output; kh, kw: window.
KINDS = {
    "conv": (CONV, SLIDE, "out", "out·c/groups·kh·kw", "·H·W"),
    "deconv": (CONV + " op=0", UNSLIDE, "out", "c·out/groups·kh·kw", "·h·w"),
    **dict.fromkeys(("max", "avg"), ("k s=k p=0 ceil=0", SLIDE, "c", "0", None)),
    "adaptive": ("size", "size", "c", "0", None), "flatten": ("", "", "n", "0", None),
    "fc": ("out bias=1", "", "out", "n·out", ""),
    "bn": ("", None, "c", "2·c", None), "ln": ("", None, "c", "2·n", None),
    "dropout": ("rate=0.5", *PLAIN[1:]), "ahaf": ("", None, "c", "2", None),
    **dict.fromkeys(["relu", "elu", "selu", "silu", "gelu", "sigmoid", "tanh", "softmax"], PLAIN)}
ITEM = r"([a-z]+=)?(\d?\.\d+|\d{1,9}(x\d{1,9})?|same)"      # key=value
ONE, TWO = (r"[1-9]\d*", "from 1"), (r"[1-9]\d*(x[1-9]\d*)?", "from 1, as 5 or 5x6")
BIT, ZERO = ("[01]", "0 or 1"), (r"\d+(x\d+)?", "from 0, as 1 or 1x2")
VALUES = dict(out=ONE, groups=ONE, k=TWO, s=TWO, d=TWO, size=TWO, bias=BIT, ceil=BIT, op=ZERO,
              p=(f"{ZERO[0]}|same", f"{ZERO[1]}; or same"), rate=(r"0?\.\d+|[01](\.0+)?", "0 to 1"))
ATTENTION = (      # name, shape, parameters, multiply-adds; t tokens, w width, h heads
    ("embedding X", "t w", "0", "0"), ("X + positional encoding, added once", "t w", "0", "0"),
    ("W_Q, W_K, W_V of each head", "w head_width", "3·h·(w·head_width + head_width)", "0"),
    ("Q, K, V = X·W + b of each head", "t head_width", "0", "3·h·t·w·head_width"),
    ("softmax(Q·Kᵀ/√d) of each head", "t t", "0", "h·t·t·head_width"),
    ("softmax(…)·V of each head", "t head_width", "0", "h·t·t·head_width"),
    ("heads side by side", "t joined", "0", "0"),
    ("W_O, the last linear layer", "joined w", "joined·w + w", "t·joined·w"))
VIT = (      # b blocks, each with two layer norms; m the MLP's width, c classes
    ("patch embedding", "patches w", "pixels·w + w", "patches·pixels·w"),
    ("class token, positions numbered on", "tokens w", "w + positions_numbered_on", "0"),
    ("layer norms", "tokens w", "(2·b + 1)·2·w", "0"),
    ("Q, K, V and last linear layers", "tokens w", "b·4·(w·w + w)", "b·4·tokens·w·w"),
    ("scores, weighted sums of V", "tokens tokens", "0", "b·2·tokens·tokens·w"),
    ("MLPs", "tokens w", "b·(2·w·m + m + w)", "b·2·tokens·w·m"),
    ("classifier of the class token", "c", "w·c + c", "w·c"))
# Positions: width of an axis (2d: row, column; sincos: sine, cosine of each), parameters if patches
# are numbered on from page to page, or if pages differ by a vector each (arXiv 2010.11929, D.4).
POSITIONS = {
    "learned": ("w", "(patches + 1)·w", "(rows·columns + 1 + pages)·w"),
    "2d": ("w / 2", "(pages·rows + columns)·axis_width", "(rows + columns)·axis_width + pages·w"),
    "sincos": ("w / 4", "0", "pages·w")}
GATES, ROLES = dict(rnn=1, gru=3, lstm=4), ("teacher", "student")
# A command's arguments are those of the command line, flags after the star, read as annotated.
INT, ON = dict(type=number(int, 1, 10**9)), dict(action="store_true")
NAME = dict(choices=RECIPES, metavar="RECIPE")
SIDES = dict(metavar="CxHxW", type=lambda text: [*map(INT["type"], text.split("x", 2))])
PIXELS = dict(metavar="HxW", type=lambda text: [*map(INT["type"], text.split("x", 1))])


def shown(value):
    """1234567 -> '1 234 567', [3, 32, 32] -> '3×32×32', anything else as it is."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def columns(*values):
    name, value, *rest = map(shown, values)      # two spaces between: one separates thousands
    return f"{name} {value.rjust(45 - len(name))}" + "".join(f"  {v:>15}" for v in rest)


def work(formula, numbers):
    """work("out·k + out", dict(out=2, k=3)) -> (8, "2·3 + 2 = 8"). What is divided must divide."""
    value = eval(formula.translate(str.maketrans("·−", "*-")), dict(
        floor=math.floor, ceil=math.ceil, min=min, **{k: Fraction(v) for k, v in numbers.items()}))
    filled = re.sub("[A-Za-z_]+", lambda m: shown(numbers.get(m[0], m[0])), formula)
    if value != int(value):
        raise ValueError(f"{formula} must divide without a rest, but {filled} does not")
    return int(value), filled if filled == shown(int(value)) else f"{filled} = {shown(int(value))}"


def solve(parts, n, **formulas):
    """-> (answer, lines): formulas over n and those before them, then a table of parts. A part is:
    name, output (or names for it), parameters, multiply-adds, and its own numbers and steps."""
    lines, rows = [], []
    for name, formula in formulas.items():
        n[name], step = work(formula, n)
        lines.append(f"{name.replace('_', ' ')}: {step}")
    lines.append(columns("part", "output", "parameters", "multiply-adds"))
    for name, output, parameters, macs, own, steps in [(*part, n, [])[:6] for part in parts]:
        (p, p_step), (m, m_step) = work(parameters, own), work(macs, own)
        output = [own[side] for side in output.split()] if isinstance(output, str) else output
        steps = steps + [f"parameters {p_step}"] * (p > 0) + [f"multiply-adds {m_step}"] * (m > 0)
        lines += [columns(name, output, p, m), *(f"    {step}" for step in steps)]
        rows += [dict(layer=name, output=output, parameters=p, macs=m, formula="; ".join(steps))]
    p, m = (sum(r[key] for r in rows) for key in ("parameters", "macs"))
    lines.append(columns(f"total, {shown(4 * p)} bytes in fp32", "", p, m))
    return {k: n[k] for k in formulas} | dict(layers=rows, parameters=p, macs=m, bytes=4 * p), lines


def output_size(size, kernel, stride=1, padding=0, dilation=1, ceil_mode=False):
    """Return how many places a window finds along a side, in pixels, exactly as torch counts them:
    floor((size + 2·padding − dilation·(kernel − 1) − 1) / stride) + 1; with ceil_mode ceil, but the
    last window must start in the input or its left padding. ValueError where nothing is left."""
    window, padded = dilation * (kernel - 1) + 1, size + 2 * padding
    if min(size, kernel, stride, dilation, padding + 1) < 1:
        raise ValueError(f"too small: {size=} {kernel=} {stride=} {padding=} {dilation=}")
    out = (padded - window + (stride - 1 if ceil_mode else 0)) // stride + 1
    out -= bool(ceil_mode and (out - 1) * stride >= size + padding)
    if out < 1:
        raise ValueError(f"nothing is left: the window of {window} is larger than the padded input"
                         f", {size} + 2·{padding} = {padded}; take a smaller one or fewer pools")
    return out


def one_side(formula, ceil, n, k, s, p, d, op):
    """-> (output, step) along one side; ceil: None for a convolution, 0 or 1 for a pool."""
    window = d * (k - 1) + 1
    if p == "same" and (s > 1 or formula == UNSLIDE or ceil is not None):
        raise ValueError("p=same is for conv with stride 1 alone, as in torch")
    p = Fraction(window - 1, 2) if p == "same" else p      # of an even window: half a pixel more
    if ceil is not None and 2 * p > window:
        raise ValueError(f"padding {p} is more than half of its window of {window}")
    if formula == SLIDE:
        output_size(n, k, s, p, d, bool(ceil))
    formula = CEIL if ceil else formula
    size, step = work(formula.replace("(d·(k − 1) + 1)", "k") if d == 1 else formula,
                      dict(n=n, k=k, s=s, p=p, d=d, op=op))
    if size < 1 or op and op >= max(s, d):
        raise ValueError(f"{step}: nothing left" if size < 1 else f"op={op} not below s={s}, d={d}")
    return size, step


def read_layer(text):
    """'conv:32,k=5' -> ("conv", {"out": [32, 32], "k": [5, 5], ...}), both sides of each value."""
    kind, _, rest = text.partition(":")
    good = re.match(f"({'|'.join(KINDS)})(:({ITEM},)*({ITEM})?|$)", text, re.ASCII)
    if kind not in KINDS or not re.fullmatch(f"[a-z]+(:{ITEM}(,{ITEM})*)?", text, re.ASCII):
        end, hope = (good.end(), "key=value, as k=3") if good else (0, f"one of {', '.join(KINDS)}")
        raise ValueError(f"character {end + 1}, at {text[end:]!r}: expected {hope}")
    options, given = dict((word + "=").split("=")[:2] for word in KINDS[kind][0].split()), {}
    takes = f"{kind} takes {', '.join(f'{k} ({VALUES[k][1]})' for k in options) or 'no values'}"
    for item in filter(None, rest.split(",")):
        key, _, value = item.rpartition("=")
        key = key if key or given else next(iter(options), "")
        if key in given or key not in options or not re.fullmatch(VALUES[key][0], value):
            raise ValueError(f"{item} cannot be; {takes}, each once")
        given[key] = value
    options |= given
    if "" in options.values():
        raise ValueError(f"{[k for k, v in options.items() if not v][0]}= is missing; {takes}")
    return kind, {key: [v if v == "same" else float(v) if "." in v else int(v) for v in (
        (options["k"] if o == "k" else o).split("x") * 2)[:2]] for key, o in options.items()}


def one_layer(text, shape):
    """-> the part, for `solve`, that the layer `text` is on an input of this shape."""
    kind, o = read_layer(text)
    _, side, first, weights, times = KINDS[kind]
    if side and len(shape) < 3:
        raise ValueError(f"it takes channels×height×width, not {shown(shape)}")
    (c, h, w), out, groups = (*shape, 1, 1)[:3], o.get("out", [0])[0], o.get("groups", [1])[0]
    if c % groups or out % groups:
        raise ValueError(f"groups={groups} must divide its {c} input channels and out={out}")
    n = dict(c=c, n=c * h * w, out=out, groups=groups, h=h, w=w)
    rest = shape[1:] if side is None else o.get("size", [])
    flattens, how = side == "" and len(shape) == 3, "flattens by itself: " * (kind == "fc")
    steps = [how + work("c·h·w", n)[1]] * flattens
    if side in (SLIDE, UNSLIDE):
        (H, up), (W, across) = (one_side(side, o.get("ceil", [None])[0], *values) for values in zip(
            (h, w), o["k"], o["s"], o["p"], o.get("d", (1, 1)), o.get("op", (0, 0)), strict=True))
        rest, steps = [H, W], [up] if up == across else [f"height {up}", f"width {across}"]
        n |= dict(H=H, W=W, kh=o["k"][0], kw=o["k"][1])
    weights = weights.replace("/groups" * (groups == 1), "")
    biases, macs = " + out" * o.get("bias", [0])[0], "0" if times is None else weights + times
    return text, [work(first, n)[0], *rest], weights + biases, macs, n, steps


def shape(input: SIDES, layers: dict(nargs="+")):
    """What each layer of a chain puts out, with its parameters and multiply-adds.

    INPUT is CxHxW, HxW (one channel) or N, a layer kind:value,key=value,... with
    k kernel (5x6: 5 high), s stride, p padding, d dilation, op output padding:
    """
    size, parts = [1] * (len(input) == 2) + input, []
    for place, text in enumerate(layers, 1):
        try:
            parts.append(one_layer(text, parts[-1][1] if parts else size))
        except ValueError as error:
            raise ValueError(f"layer {place}, {text!r}: {error}") from None
    answer, lines = solve(parts, {})
    return {"input": size, "output": parts[-1][1], **answer}, [f"input {shown(size)}", *lines]


def mlp(inputs: INT, layers: dict(INT, nargs="+"), *, samples: INT = 1, batch_size: INT = 1,
        epochs: INT = 1):
    """Weights, biases and updates of a fully connected network."""
    pairs = list(zip([inputs, *layers], layers, strict=False))
    answer, lines = solve(
        [(f"fc:{o}", [o], f"{n}·{o} + {o}", f"{n}·{o}") for n, o in pairs],
        dict(samples=samples, batch=batch_size, epochs=epochs),
        weights=" + ".join(f"{n}·{o}" for n, o in pairs), biases=" + ".join(map(str, layers)),
        batches="ceil(samples / batch)", last_batch="samples − (batches − 1)·batch",
        updates="batches·epochs", numbers_in_one_update="weights + biases")
    answer["unknown"] = ["an update's numbers", "their mean over an epoch", "the final error"]
    lines.append(f"does not follow: {', '.join(answer['unknown'])}")
    if layers[-1] == 1:
        answer["gradients"] = [dict(p=p, mse=round(2 * (p - 1) * p * (1 - p), 6),
                                    bce=round(p - 1, 6)) for p in (.001, .01, .1, .5, .9, .99)]
        lines += ["gradient in z at p = σ(z), label 1: MSE 2(p − 1)·p(1 − p), BCE p − 1",
                  columns("p", "MSE", "BCE"), *(columns(*g.values()) for g in answer["gradients"])]
    return answer, lines


def attention(*, width: INT, heads: INT, tokens: INT = None, text: {} = "", head_width: INT = None):
    """Each matrix of self-attention, from the embedding to the last linear layer.
    A head: width / heads (torch; arXiv 1706.03762), or --head-width (report 003)."""
    if bool(tokens) == bool(text.split()):
        raise ValueError("give either --tokens N or --text with a word or more")
    n = dict(t=tokens or len(text.split()), w=width, h=heads, width=width, heads=heads)
    answer, lines = solve(ATTENTION, n, tokens="t", head_width=str(head_width or "width / heads"),
                          joined="h·head_width")
    kind = "usual" if n["joined"] == width else "--head-width (report 003: the full one)"
    return {"convention": kind, **answer}, [f"convention: {kind}", *lines]


def vit(*, image: PIXELS, patch: PIXELS, width: INT, depth: INT, heads: INT, mlp: INT,
        classes: INT = 1000, pages: INT = 1, positions: dict(choices=POSITIONS) = "learned"):
    """Tokens, positions, parameters, macs of a vision transformer (arXiv 2010.11929).
    --pages make one sequence. --positions 2d: half the row, half the column."""
    n = dict(w=width, width=width, heads=heads, b=depth, m=mlp, c=classes, pages=pages,
             height=image[0], length=image[-1], patch=patch[0], patch_side=patch[-1])
    names = "axis_width", "positions_numbered_on", "positions_per_page"
    return solve(VIT, n, rows="height / patch", columns="length / patch_side",
                 patches="pages·rows·columns", tokens="patches + 1", head_width="width / heads",
                 pixels="3·patch·patch_side", **dict(zip(names, POSITIONS[positions], strict=True)))


def rnn(*, cell: dict(choices=GATES), input: INT, hidden: INT, bidirectional: ON = False,
        layers: dict(type=number(int, 1, 1000)) = 1, length: INT = 100,
        radius: dict(type=number(float, 1e-9, 1e9)) = 0.9):
    """Parameters as torch counts; gradient over --length steps at a spectral --radius."""
    answer, lines = solve(
        [(f"layer {k}, a step", "output", f"D·g·(h·{i} + h·h + 2·h)", f"D·g·(h·{i} + h·h)")
         for k, i in enumerate(["i"] + ["output"] * (layers - 1), 1)],
        dict(D=1 + bidirectional, h=hidden, i=input, g=GATES[cell]), output="D·h")
    answer |= {name: answer["parameters"] // GATES[cell] * g for name, g in GATES.items()}
    answer["gradient_log10"] = {str(t): t * math.log10(radius) for t in sorted({1, 10, length})}
    return answer, [*lines, *(f"parameters as {name}: {shown(answer[name])}" for name in GATES), *(
        f"plain RNN's gradient {t} back, tanh aside: about {radius}^{t} = 10^{log:.3f}"
        for t, log in answer["gradient_log10"].items())]


def arch(recipe: NAME, *, batch_size: INT = 128):
    """Layers of a recipe's teacher and student; totals, bytes of weights and outputs."""
    from models import ARCHITECTURES
    answer, lines, (side, classes) = {}, [], (64, 200) if recipe[:4] == "tiny" else (32, 10)
    for role in ROLES:
        flags, layers = settings(recipe, role), []
        spec, act, bn = ARCHITECTURES[flags["arch"]], flags["activation"], flags["norm"] == "batch"
        rows = zip(*(spec.get(key, ()) for key in ("channels", "kernels", "paddings")), strict=True)
        for i, (out, k, p) in enumerate(rows, 1):
            layers += [f"conv:{out},k={k},p={p}" + ",bias=0" * bn, *["bn"] * bn, act,
                       *[f"{flags['pool']}:2"] * (i in spec["pools"])]
        layers += [text for out in spec["hidden"] for text in (f"fc:{out}", act)]
        found, table = shape([3, side, side], [*layers, f"fc:{classes}"])
        answer[role] = {"arch": flags["arch"], **found, "bytes_in_bf16": found["bytes"] // 2,
                        "activation_bytes": 4 * batch_size * sum(
                            math.prod(layer["output"]) for layer in found["layers"])}
        lines += [f"{role}: {flags['arch']}", *(t for t in table if t[:4] != "    "), ""]
    a, b = answer.values()
    answer["ratio"] = {key: round(a[key] / b[key], 2) for key in a if isinstance(a[key], int)}
    return answer, [*lines, columns(f"fp32, a batch of {batch_size}", *ROLES, "ratio"), *(columns(
        key.replace("_", " "), a[key], b[key], ratio) for key, ratio in answer["ratio"].items())]


def init(recipe: NAME, *, init: {} = None, out: dict(type=a_file) = None):
    """Standard deviation of each output and gradient of a teacher's layers, on noise."""
    import torch

    import plots
    from device import guard
    from models import INITS, build
    answer, lines, (side, classes) = {}, [], (64, 200) if recipe[:4] == "tiny" else (32, 10)
    arch, *options = map(settings(recipe, "teacher").get, ("arch", "pool", "activation", "norm"))
    for name in [init] if init else INITS:
        with guard():
            torch.manual_seed(0)
            model = build(arch, classes, (3, side, side), name, *options)
            x, kept = torch.randn(32, 3, side, side), []
            for layer in [*model.features, *model.classifier]:
                x = layer(x)
                kept += [x] * isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
            loss = torch.nn.functional.cross_entropy(x, torch.arange(32) % classes)
            answer[name] = {key: [tensor.std().item() for tensor in tensors] for key, tensors in (
                ("output", kept), ("gradient", torch.autograd.grad(loss, kept)))}
    figure = plots.Figure(figsize=(10, 4), layout="constrained")
    for key, axes in zip(("output", "gradient"), figure.subplots(1, 2), strict=True):
        rows = [*zip(*(found[key] for found in answer.values()), strict=True)]     # a layer each
        lines += [columns(f"layer, deviation of its {key}", *answer)]
        lines += [columns(i, *map("{:.2g}".format, row)) for i, row in enumerate(rows, 1)]
        axes.semilogy(range(1, len(rows) + 1), rows, "o-", label=[*answer])
        axes.set(xlabel=f"layer of {arch}", title=f"standard deviation of its {key}")
        axes.legend()
    out = Path(out or f"results/{recipe}/init.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, out)
    return {"inits": answer, "plot": str(out)}, [*lines, f"plot: {out}"]


def select(*, programme: dict(choices=("btech", "mtech")), roll: {}, birth: {}, guess: ON = False):
    """The parts of a training that a roll number ABC and a birth date DD/MM/YY select.
    A rule holds inside the programme it was seen in; --guess: elsewhere by parity."""
    if not re.fullmatch(r"\d{3} (?!3[01]/02|31/(0[469]|11))(0[1-9]|[12]\d|3[01])/(0[1-9]|1[0-2])"
                        r"(/\d\d|/\d{4})?", f"{roll} {birth}", re.ASCII):
        raise ValueError(f"--roll {roll!r} --birth {birth!r}: give ABC as 052, a day as 18/03/02")
    values = dict(ABC=int(roll), SUM=sum(map(int, roll)), DD=int(birth[:2]), MM=int(birth[3:5]))
    true = {f"{name} {('even', 'odd')[value % 2]}" for name, value in values.items()} | {
        programme, "C below 6" if roll[2] < "6" else "C from 6", *["guess"] * guess}
    choices = {choice: next(rule for rule in rules if true >= {*rule["when"]})
               for choice, rules in json.loads(REPORTS.read_text("utf-8"))["selection"].items()}
    data, start, teacher, student, _ = (rule["flags"] for rule in choices.values())
    commands = [" ".join(filter(None, ("python", script, data, start, part))) for script, part in (
        ("train_teacher.py", teacher), ("train_student.py", student), ("distill.py", student))]
    lines = [f"{key}: {rule['value']}\n    {rule['why']}" for key, rule in choices.items()]
    return dict(choices=choices, commands=commands), lines + commands


def reports():
    """Every question of the reports: answer, steps, what was printed, verdict."""
    questions, lines = json.loads(REPORTS.read_text("utf-8"))["questions"], []
    for q in questions:
        lines += ["", f"{q['point']}. Report {q['report']}", *q["question"]]
        found = [ask(command.split()) for command in q["commands"]]
        for command, (_, steps, _) in zip(q["commands"], found, strict=True):
            lines += [f"$ python calc.py {command}", *steps]
        for c in q["checks"]:
            true = found[c["of"]][0]
            for key in c["path"]:
                true = true[key]
            c |= dict(true=true, verdict="right" if true == c["printed"] else "wrong")
            lines += [f"{c['what']}: {shown(true)}, printed {shown(c['printed'])}: {c['verdict']}"]
        q["answers"] = [answer for answer, *_ in found]
        v = [c["verdict"] for c in q["checks"]]
        q["verdict"] = f"{v.count('wrong')} of {len(v)} printed are wrong" if v else "none printed"
        lines += [f"Verdict: {q['verdict']}.", *q["remark"]]
    return dict(questions=questions), lines


COMMANDS = {f.__name__: f for f in (shape, mlp, attention, vit, rnn, arch, init, select, reports)}


def ask(argv):
    """-> (answer, lines, whether JSON is wanted) of a command line."""
    parser = Parser(description=__doc__, usage=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function) + "".join(
            f"\n  {kind:<9} {keys[0]}".rstrip() for kind, keys in KINDS.items() if name == "shape")
        command = commands.add_parser(name, help=text.split("\n")[0], description=text, usage=None)
        command.add_argument("--json", action="store_true", help="the answer as JSON")
        for key, p in inspect.signature(function).parameters.items():
            flag, given = p.kind is p.KEYWORD_ONLY, p.default
            note = f"default: {given}" * (given not in (p.empty, None, False, ""))
            extra = dict(default=given, required=given is p.empty, help=note) if flag else {}
            command.add_argument("--" * flag + key.replace("_", "-"), **p.annotation, **extra)
    args = vars(parser.parse_args(words(argv)))
    function, as_json = COMMANDS[args.pop("command")], args.pop("json")
    try:
        return *function(**args), as_json
    except (ValueError, OSError) as error:
        fail(error if isinstance(error, ValueError) else
             f"{error.filename}: cannot be written ({error.strerror}); give another --out FILE")


def main(argv=None):
    """Answer one question, as lines or JSON, and return it as a dict."""
    answer, lines, as_json = ask(argv)
    print(json.dumps(answer) if as_json else "\n".join(lines))
    return answer


if __name__ == "__main__":
    launch(main)
