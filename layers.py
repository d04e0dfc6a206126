"""What a layer makes of a shape, as formulas: outputs, parameters and multiply-adds, with steps.

No command of its own and no torch: calc.py asks the questions.

    layers.chain([3, 64, 64], ["conv:out=32,k=5,p=2", "relu", "max:2", "fc:10"])
    layers.output_size(256, kernel=5, stride=2, padding=1)      # 127
"""
import math
import re
from fractions import Fraction


# ---- formulas and tables ------------------------------------------------------------------------

def shown(value):
    """1234567 -> '1 234 567', [3, 32, 32] -> '3×32×32', anything else as it is."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def columns(first, *others):
    """One line of a table, 80 characters wide with three numbers."""
    return f"{first:<35}" + "".join(f"{shown(value):>15}" for value in others)


def work(formula, numbers):
    """Evaluate exactly: work("out·k + out", dict(out=2, k=3)) -> (8, "2·3 + 2 = 8").

    The formula that is shown is the one that is computed. ValueError where the result is not
    whole: what is divided here must divide.
    """
    names = {name: Fraction(value) for name, value in numbers.items()}
    value = eval(formula.translate(str.maketrans("·−", "*-")),
                 dict(floor=math.floor, ceil=math.ceil, min=min, **names))
    filled = re.sub("[A-Za-z_]+", lambda m: shown(numbers.get(m[0], m[0])), formula)
    if value != int(value):
        raise ValueError(f"{formula} must be a whole number, and {filled} is not")
    return int(value), f"{filled} = {shown(int(value))}"


def solve(parts, numbers, **formulas):
    """-> (answer, lines): named formulas, then a table of parts with their steps and totals.

    A formula may use the numbers and the formulas before it. A part: name, output (a shape, or the
    names of its sides), parameters, multiply-adds, and, if it has them, its own numbers and steps.
    """
    n, lines, layers = dict(numbers), [], []
    for name, formula in formulas.items():
        n[name], step = work(formula, n)
        lines.append(f"{name.replace('_', ' ')}: {step}")
    lines.append(columns("", "output", "parameters", "multiply-adds"))
    for name, output, parameters, macs, own, steps in [(*part, n, [])[:6] for part in parts]:
        (p, p_step), (m, m_step) = work(parameters, own), work(macs, own)
        output = [own[side] for side in output.split()] if isinstance(output, str) else output
        steps = steps + [f"parameters {p_step}"] * (p > 0) + [f"multiply-adds {m_step}"] * (m > 0)
        lines += [columns(name, output, p, m), *(f"    {step}" for step in steps)]
        layers.append(dict(layer=name, output=output, parameters=p, macs=m,
                           formula="; ".join(steps)))
    p, m = (sum(layer[key] for layer in layers) for key in ("parameters", "macs"))
    lines += [columns("total", "", p, m), f"weights in fp32: 4·{shown(p)} = {shown(4 * p)} bytes"]
    return {**{name: n[name] for name in formulas}, "layers": layers, "parameters": p, "macs": m,
            "bytes": 4 * p}, lines


# ---- the kinds of layers ------------------------------------------------------------------------

SLIDE = "floor((n + 2·p − (d·(k − 1) + 1)) / s) + 1"
CEIL = "ceil((n + 2·p − (d·(k − 1) + 1)) / s) + 1"
UNSLIDE = "(n − 1)·s − 2·p + d·(k − 1) + op + 1"
CONV, PLAIN = "out k s=1 p=0 d=1 groups=1 bias=1", ("", None, "c", "0", "0")
# A kind: its keys with their defaults (without "=": must be given; the first value may come
# without its key) | what becomes of a side (None: stays, "": flattened) | channels out | weights
# (and "+ out" biases, where it has them) | how often each weight is used, 0: not counted.
# c, h, w: of the input; n: its pixels along a side, or all its numbers; H, W: of the output; kh,
# kw: of the window.
KINDS = {
    "conv": (CONV, SLIDE, "out", "out·c/groups·kh·kw", "H·W"),
    "deconv": (CONV + " op=0", UNSLIDE, "out", "c·out/groups·kh·kw", "h·w"),
    "max": ("k s=k p=0 d=1 ceil=0", SLIDE, "c", "0", "0"),
    "avg": ("k s=k p=0 ceil=0", SLIDE, "c", "0", "0"),
    "adaptive": ("size", "size", "c", "0", "0"),
    "flatten": ("", "", "n", "0", "0"),
    "fc": ("out bias=1", "", "out", "n·out", "1"),
    "bn": ("", None, "c", "2·c", "0"),
    "ln": ("", None, "c", "2·n", "0"),
    "dropout": ("rate=0.5", None, "c", "0", "0"),
    "glu": ("", None, "c / 2", "0", "0"),
    "ahaf": ("", None, "c", "2", "0"),
    **dict.fromkeys("relu elu selu silu gelu sigmoid tanh softmax".split(), PLAIN),
}
NOTES = {
    "adaptive": "averages whatever size comes in to the one asked for",
    "bn": "a learned scale and shift for each channel",
    "ln": "a learned scale and shift for each number of the input",
    "dropout": "sets values to 0 while training, learns nothing: parameters 0",
    "glu": "half of the channels, times σ(the other half)",
    "ahaf": "β and γ of x·β·σ(γ·x), one each",
}

WHOLE = (r"[1-9]\d{0,8}", "a whole number from 1", int)
PAIR = (f"{WHOLE[0]}(x{WHOLE[0]})?", "a whole number from 1, or two as 5x6",
        lambda text: [int(side) for side in (text.split("x") * 2)[:2]])
PAIR_0 = (r"\d{1,9}(x\d{1,9})?", "a whole number, or two as 0x1", PAIR[2])
SWITCH = ("[01]", "0 or 1", int)
VALUES = {   # of a key: how it is spelt, in words, as a value
    "out": WHOLE, "groups": WHOLE, "k": PAIR, "s": PAIR, "d": PAIR, "size": PAIR, "op": PAIR_0,
    "p": (f"{PAIR_0[0]}|same", "a whole number, two as 1x2, or same",
          lambda text: [text, text] if text == "same" else PAIR[2](text)),
    "bias": SWITCH, "ceil": SWITCH, "rate": (r"0?\.\d+|[01](\.0*)?", "a number from 0 to 1", float),
}


def output_size(size, kernel, stride=1, padding=0, dilation=1, ceil_mode=False):
    """Return how many places a window finds along a side, in pixels, exactly as torch counts.

    floor((size + 2·padding − dilation·(kernel − 1) − 1) / stride) + 1. With ceil_mode it is ceil,
    but the last window must start inside the input or its left padding (torch.nn.MaxPool2d).
    ValueError where nothing is left, or where a number is out of range.
    """
    window, padded = dilation * (kernel - 1) + 1, size + 2 * padding
    if min(size, kernel, stride, dilation) < 1 or padding < 0:
        raise ValueError(f"size {size}, kernel {kernel}, stride {stride} and dilation {dilation} "
                         f"must be 1 or more, padding {padding} must be 0 or more")
    out = (padded - window + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    if out < 1:
        raise ValueError(f"nothing is left: its window of {window} is larger than its padded input"
                         f", {size} + 2·{padding} = {padded}; use a smaller window, more padding, "
                         "or fewer pools before it")
    return out


def one_side(formula, ceil, n, k, s, p, d, op):
    """-> (output, step) along one side; ceil: None for a convolution, 0 or 1 for a pool."""
    window = d * (k - 1) + 1
    if p == "same" and (s > 1 or formula == UNSLIDE or ceil is not None):
        raise ValueError("p=same is for conv with stride 1 alone, as in torch")
    p = Fraction(window - 1, 2) if p == "same" else p      # of an even window: half a pixel more
    if ceil is not None and 2 * p > window:
        raise ValueError(f"padding {p} is more than half of its window of {window}")
    if formula == UNSLIDE and op >= max(s, d):
        raise ValueError(f"op={op} must be smaller than its stride {s} or its dilation {d}")
    out = output_size(n, k, s, p, d, bool(ceil)) if formula == SLIDE else None
    formula = CEIL if ceil else formula
    size, step = work(formula.replace("(d·(k − 1) + 1)", "k") if d == 1 else formula,
                      dict(n=n, k=k, s=s, p=p, d=d, op=op))
    if size < 1:
        raise ValueError(f"nothing is left: {step}; use less padding")
    return out or size, step if out in (None, size) else (
        f"{step}, less 1 = {out}: window {size} would start past the input and its left padding")


def read_layer(text):
    """'conv:32,k=5' -> ("conv", {"out": 32, "k": [5, 5], ...}). ValueError names the character."""
    def stop(place, why):
        there = f"at {text[place:]!r}" if place < len(text) else "at the end"
        raise ValueError(f"character {place + 1}, {there}: {why}")

    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        stop(0, f"no such layer; choose from {', '.join(KINDS)}")
    options = dict((word + "=").split("=")[:2] for word in KINDS[kind][0].split())
    place, given = len(kind) + 1, set()
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not (equals or given) and options:
            key, value = next(iter(options)), part
        if key in given or key not in options:
            stop(place, f"{key} is given twice" if key in given else
                 f"{kind} takes {', '.join(f'{k}=' for k in options) or 'nothing after its name'}")
        spelling, words, _ = VALUES[key]
        if not re.fullmatch(spelling, value, re.ASCII):
            good = re.match(f"({spelling})?", value, re.ASCII).end()
            stop(place + len(part) - len(value) + good, f"{key} is {words}")
        options[key], place = value, place + len(part) + 1
        given.add(key)
    missing = [f"{key}=" for key, value in options.items() if not value]
    if missing:
        stop(len(text), f"{kind} also needs {' and '.join(missing)}")
    return kind, {key: VALUES[key][2](options["k"] if value == "k" else value)
                  for key, value in options.items()}


def one_layer(text, shape):
    """-> the part, for `solve`, that the layer `text` is on an input of this shape."""
    kind, o = read_layer(text)
    _, side, first, weights, times = KINDS[kind]
    if side and len(shape) != 3:
        raise ValueError(f"it takes channels×height×width, not {shape[0]} numbers in a row")
    (c, h, w), out, groups = (*shape, 1, 1)[:3], o.get("out", 0), o.get("groups", 1)
    if c % groups or out % groups:
        raise ValueError(f"groups={groups} must divide its {c} input channels and out={out}")
    n = dict(c=c, n=math.prod(shape), out=out, groups=groups, h=h, w=w)
    rest, steps = shape[1:] if side is None else o.get("size", []), [NOTES[kind]] * (kind in NOTES)
    if side in (SLIDE, UNSLIDE):
        (H, up), (W, across) = (one_side(side, o.get("ceil"), *values) for values in zip(
            (h, w), o["k"], o["s"], o["p"], o.get("d", (1, 1)), o.get("op", (0, 0)), strict=True))
        rest, steps = [H, W], [up] if up == across else [f"height {up}", f"width {across}"]
        n |= dict(H=H, W=W, kh=o["k"][0], kw=o["k"][1])
    if side == "" and len(shape) == 3:
        steps = ["flattens by itself: " * (kind == "fc") + work("c·h·w", n)[1]]
    weights = weights.replace("/groups", "") if groups == 1 else weights
    macs = weights if times == "1" else "0" if times == "0" else f"{weights}·{times}"
    biases = " + out" * o.get("bias", 0)
    return text, [work(first, n)[0], *rest], weights + biases, macs, n, steps


def chain(shape, layers):
    """-> (answer, lines) of layers one after the other; ValueError names the one that cannot be."""
    parts = []
    for place, text in enumerate(layers, 1):
        try:
            parts.append(one_layer(text, parts[-1][1] if parts else shape))
        except ValueError as error:
            raise ValueError(f"layer {place}, {text!r}: {error}") from None
    answer, lines = solve(parts, {})
    return {"input": shape, "output": parts[-1][1], **answer}, [f"input {shown(shape)}", *lines]
