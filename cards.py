"""What a best.pt or a checkpoint.pt says, looked at before anything is made of it: such a file is
untrusted. No command of its own.
"""
import hashlib
import io
import math
import pickletools
import re
import zipfile

import torch

from decode import FITS
from flags import fail, shown
from runs import METRICS, SCHEMA, VALIDATED, frozen_for, is_accuracy, this_version

# ---- the pickle in it -------------------------------------------------------------------------

# All that these scripts write. PyTorch's own list (weights_only) holds more: what may compute for
# hours, or end Python without a word.
ORDERED, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
BYTES = dict(Float=4, Double=8, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1)
STORAGES = {f"torch {kind}Storage": size for kind, size in BYTES.items()}
INTS = {"BININT", "BININT1", "BININT2", "LONG1"}
NAMED = {*STORAGES, ORDERED, TENSOR}
PARTS = NAMED | {"a storage", "parts"}          # of a tensor, and of nothing else
NAMES = INTS - {"LONG1"} | {"BINUNICODE"}       # what a key may be
TRUTH = {"NEWTRUE", "NEWFALSE"}
ATOMS = INTS | NAMES | TRUTH | {"NONE", "BINFLOAT", "EMPTY_LIST", "EMPTY_DICT"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
# Storage, offset, sizes, strides, no gradient, no hooks; a seventh is of other kinds. "hooks" is an
# empty dict that some tensor has for them: what is put into it later, the tensor would have.
OF_TENSOR = {"a storage"}, INTS, {"ints"}, {"ints"}, {"NEWFALSE"}, {"a dict", "hooks"}
DICTS = {"a dict", "a filled dict"}             # OrderedDicts
MADE = {"EMPTY_LIST", "EMPTY_DICT", "REDUCE", *TUPLES}
MOST = 2**22, 2**18     # operations of a pickle, and what they make: 100 000 epochs take 3 million,
                        # and make 100 000 dicts
DIMENSIONS = 8          # of a tensor
WRITTEN = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment",
           ".data/serialization_id"}        # beside data/
DEEPEST = 20            # of what is nested


class Strange(Exception):
    """What a file holds beside tensors and plain values."""


def search(pickled):
    """Return the records that a checkpoint's pickle says to be beside it, [(name, bytes)]; raise
    Strange where it holds what these scripts do not write. Nothing is made of it: of what its
    operations would put on a stack, only kinds are kept, with a number's or a text's value."""
    stack, marks, memo, records = [], [0], {}, []       # stack: [kind, what a tuple holds, value]
    made = 0

    def above(count=None):
        """Take what is above the last mark from the stack, or so many, and return it."""
        at = marks.pop() if count is None else len(stack) - count
        if at < marks[-1]:
            raise ValueError("its pickle is cut short or damaged")
        taken, stack[at:] = stack[at:], []
        return taken

    def kinds_of(entries):
        return [kind for kind, *_ in entries]

    def fill(entry):        # no hooks of a tensor from here on
        entry[0] = "a filled dict" if entry[0] == "a dict" else entry[0]

    for count, (opcode, value, _) in enumerate(pickletools.genops(pickled)):
        name, fine, made = opcode.name, True, made + (opcode.name in MADE)
        if count >= MOST[0] or made > MOST[1]:
            raise Strange(f"more than {MOST[0]} operations of its pickle, or {MOST[1]} that make "
                          "lists, dicts, tuples and tensors")
        if name in ATOMS:
            stack.append([name, (), value])
        elif name == "GLOBAL":
            fine, name = value in NAMED, value.replace(" ", ".")
            stack.append([value, (), None])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in TUPLES:
            held = above(TUPLES[name])
            kinds = set(kinds_of(held))
            sizes = len(held) <= DIMENSIONS and kinds <= INTS
            kind = "ints" if sizes else "a tuple" if PARTS.isdisjoint(kinds) else "parts"
            stack.append([kind, held, None])
        elif name in ("APPEND", "APPENDS"):
            kinds = kinds_of(above(1 if name == "APPEND" else None))
            fine = stack[-1][0] == "EMPTY_LIST" and PARTS.isdisjoint(kinds)
        elif name in ("SETITEM", "SETITEMS"):
            kinds = kinds_of(above(2 if name == "SETITEM" else None))
            fine = (NAMES.issuperset(kinds[::2]) and PARTS.isdisjoint(kinds)
                    and stack[-1][0] in {"EMPTY_DICT", *DICTS})
            fill(stack[-1])
        elif name == "REDUCE":
            (called, *_), (given, held, _) = above(2)
            if called == TENSOR:
                fine = len(held) == 6 and all(map(set.__contains__, OF_TENSOR, kinds_of(held)))
                if fine:
                    held[5][0] = "hooks"
            else:
                fine = (called, given, len(held)) == (ORDERED, "ints", 0)
            stack.append(["a tensor" if called == TENSOR else "a dict", (), None])
        elif name == "BUILD":       # an OrderedDict's attributes, which plain() leaves out
            fine = kinds_of(above(1)) == ["EMPTY_DICT"] and stack[-1][0] in DICTS
            fill(stack[-1])
        elif name == "BINPERSID":
            _, held, _ = above(1)[0]
            kinds = kinds_of(held)
            fine = len(kinds) == 5 and kinds[1] in STORAGES and kinds[4] in INTS and (
                {kinds[0], *kinds[2:4]} <= NAMES)
            if fine:
                records.append((f"data/{held[2][2]}", STORAGES[kinds[1]] * held[4][2]))
            stack.append(["a storage", (), None])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        else:
            fine = name == "STOP" or (name, value) == ("PROTO", 2)
        if not fine:
            raise Strange(name if opcode.name == "GLOBAL" else f"{name} of its pickle")
    return records


def plain(value, depth=0, made=None):
    """Return a value with each dict a dict and nothing else: an OrderedDict may hold functions of
    its own."""
    made = {} if made is None else made     # id -> what was made of it: a list may be in many
    if id(value) not in made:
        if depth > DEEPEST:
            raise Strange(f"lists or dicts in one another, more than {DEEPEST}")
        if isinstance(value, dict):
            made[id(value)] = {k: plain(v, depth + 1, made) for k, v in dict.items(value)}
        elif isinstance(value, (list, tuple)):
            made[id(value)] = type(value)(plain(v, depth + 1, made) for v in value)
        else:
            return value
    return made[id(value)]


def read(path):
    """Return what torch.save wrote, on the CPU; an exception where there is more in it. PyTorch is
    given what was searched: of an odd file its own reader may find another pickle."""
    memory = io.BytesIO()
    with zipfile.ZipFile(path) as had, zipfile.ZipFile(memory, "w") as searched:
        names = had.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        if len({name.lower() for name in names}) < len(names):
            raise Strange("two parts of one name")
        place = pickled.removesuffix("data.pkl")
        try:
            records = search(had.read(pickled))
        except LookupError:
            raise ValueError("its pickle is cut short or damaged") from None
        for name, size in records:
            if place + name not in names or had.getinfo(place + name).file_size != size:
                raise ValueError(f"{name} is not of {size} bytes, as its pickle says")
        for name in names:      # of TorchScript there may be more, and it would be taken for that
            if name.removeprefix(place) in WRITTEN or name.startswith(f"{place}data/"):
                searched.writestr(name, had.read(name))
    memory.seek(0)
    return plain(torch.load(memory, map_location="cpu", weights_only=True))


def unread(error):
    """Return why a file was not read. PyTorch's text may tell to load it all the same: then only
    the error's kind."""
    text, kind = str(error), type(error).__name__
    if isinstance(error, Strange):
        return f"holds more than tensors and plain values; not read: {text[:120]}"
    odd = re.search("weights_only|report|0x|arguments", text)      # of PyTorch's makers, for them
    told = kind if odd or not text else text.splitlines()[0][:200]
    return f"cannot be read ({told}); take a whole copy"


# ---- what it says -----------------------------------------------------------------------------

def absurd(card, choices):
    """Return what cannot be in what a card says, or None. choices: flag -> names that are known."""
    def numbers(values, low):
        return isinstance(values, (tuple, list)) and len(values) == 3 and all(
            type(v) in (int, float) and max(low, -1e30) <= v <= 1e30 for v in values)

    spec, classes = card["build"], card["classes"]
    if not isinstance(spec, dict) or set(spec) != {*choices, "num_classes", "image_shape"}:
        return "does not say how to build the network"
    for flag, known in choices.items():
        if not isinstance(spec[flag], str) or spec[flag] not in known:
            return f"names an unknown {flag} {shown(spec[flag])}"
    shape = spec["image_shape"]
    if not (numbers(shape, 1) and all(type(v) is int for v in shape) and shape[0] == 3
            and shape[1] == shape[2] <= 4096):
        return f"is for images of {shown(shape)}, not (3, side, side) with a side up to 4096"
    if not (isinstance(classes, (tuple, list)) and type(spec["num_classes"]) is int
            and 2 <= len(classes) == spec["num_classes"]
            and all(isinstance(c, str) and len(c) <= 255 for c in classes)):
        return f"has no names for its {shown(spec['num_classes'])} classes but {shown(classes)}"
    if not numbers(card["mean"], -math.inf) or not numbers(card["std"], 1e-6):
        return (f"normalises by {shown(card['mean'])} and {shown(card['std'])}, not by 3 numbers "
                "each")
    if not isinstance(card.get("fit", "resize"), str) or card.get("fit", "resize") not in FITS:
        return f"has fit {shown(card['fit'])}; known are {', '.join(FITS)}"
    if not isinstance(card.get("recipe", "digits"), str):
        return f"has recipe {shown(card['recipe'])}"
    whole = int, type(None)
    for key, kinds, low, high in (
            ("val_fraction", (int, float), 0, math.nextafter(1, 0)), ("labels", whole, 0, 10**9),
            ("epoch", whole, 1, 10**6), ("ema_epoch", whole, 1, 10**6)):
        value = card.get(key)
        if key in card and (type(value) not in kinds
                            or value is not None and not low <= value <= high):
            return f"has {key} {shown(value)}"
    return None


def unfit(weights, wanted):
    """Return what is wrong with weights, name -> tensor, for a network whose own are `wanted`."""
    if not isinstance(weights, dict) or set(weights) != set(wanted):
        odd = min(map(str, set(wanted) ^ set(weights))) if isinstance(weights, dict) else "all"
        return f"weights that do not fit the network it names ({shown(odd)})"
    for name, value in weights.items():
        # A few bytes may claim to be a tensor of any size, each number of it the same.
        if not (isinstance(value, torch.Tensor) and value.layout is torch.strided
                and value.device.type == "cpu" and not value.is_quantized
                and value.dtype == wanted[name].dtype
                and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
                and (value.is_contiguous() or value.dim() == 4      # else kernels write beside it
                     and value.is_contiguous(memory_format=torch.channels_last))):
            return f"{name} is no plain tensor of weights"
        if value.shape != wanted[name].shape:
            return (f"weights that do not fit the network it names ({name} is "
                    f"{tuple(value.shape)}, not {tuple(wanted[name].shape)})")
        if not value.isfinite().all() or value.min() < 0 and name.endswith(
                ("running_var", "exp_avg_sq", "step")):
            return f"{name} holds values that are not finite, or below 0 where none can be"
    return None


def finite(file, logits):
    """Return what a network puts out; leave where that is no number: finite weights may lead there,
    and argmax would name a class all the same."""
    if not logits.isfinite().all():
        fail(f"{file}: what it says of an image is not finite; take a whole copy, or train it "
             "again with --overwrite")
    return logits


def could_be(key, value):
    """Return whether a run may have written this value of a metric."""
    if key.endswith("accuracy"):
        return is_accuracy(value)
    number = type(value) is float and math.isfinite(value) or (
        type(value) is int and abs(value) < 10**18)
    return number and (key not in ("seconds", "images_per_second") or 0 <= value < 1e18)


def unsound(state, settings, networks, optimizer, args, validated):
    """Return what is wrong with a checkpoint for the run that is to go on from it, or None.

    settings: the run's hash, which a run of before there was one lacks; networks: name -> module;
    args: the run's flags; validated: whether it has validation images.
    """
    if not isinstance(state, dict) or not this_version(state.get("schema")):
        return f"not of this version of the scripts (schema {SCHEMA})"
    if state.get("settings", settings) != settings:
        return "of a run with other settings than those in its config.json"
    history = state.get("history")
    if not isinstance(history, list) or not 1 <= len(history) <= args.epochs:
        return f"has no history of 1 to {args.epochs} epochs"
    blank = {f"{column}_{key}" for name, column in VALIDATED.items() for key in (
        "loss", "accuracy") if name not in networks or not validated}
    for number, row in enumerate(history, 1):
        if not isinstance(row, dict) or set(row) != set(METRICS) or (
                type(row["epoch"]) is not int or row["epoch"] != number):
            return f"has no row of metrics for epoch {number}"
        for key, value in row.items():
            if value is not None if key in blank else not could_be(key, value):
                return f"says {shown(value)} of {key} in epoch {number}"
    for what in ("networks", "best"):
        for name, network in networks.items():
            kept = state.get(what)
            wrong = (unfit(kept[name], network.state_dict())
                     if isinstance(kept, dict) and name in kept else f"no weights of {name}")
            if wrong:
                return f"has under {what} {wrong}"
    kept = state.get("optimizer")
    kept = kept.get("state") if isinstance(kept, dict) else None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    frozen = networks["model"].features.parameters() if len(history) <= frozen_for(args) else ()
    still = set(map(id, frozen))
    if not isinstance(kept, dict) or set(kept) != {
            i for i, p in enumerate(parameters) if id(p) not in still}:
        return "has no state of this optimizer, or not of all that was trained"
    names = {"SGD": {"momentum_buffer"}}.get(type(optimizer).__name__,
                                             {"step", "exp_avg", "exp_avg_sq"})
    places = [value.untyped_storage().data_ptr() for found in kept.values()
              for value in (found.values() if isinstance(found, dict) else ())
              if isinstance(value, torch.Tensor) and value.layout is torch.strided]
    for i, found in kept.items():
        wanted = {name: torch.zeros(()) if name == "step" else parameters[i] for name in names}
        wrong = unfit(found, wanted)
        # A fused kernel takes the numbers in the order in which they lie.
        wrong = wrong or next((f"{name} in another order than its weights" for name in names if
                               found[name].stride() != wanted[name].stride()), None)
        if wrong:
            return f"has for the optimizer {wrong}"
    if len(set(places)) < len(places):
        return "has for the optimizer two tensors in one place"
    return None


def weights_sha256(state):
    """Return the SHA-256 of a state dict's names and values, whatever the file around them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
