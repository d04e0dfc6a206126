"""What a best.pt or a checkpoint.pt says, looked at before anything is made of it: such a file is
untrusted. No command of its own.
"""
import contextlib
import hashlib
import math
import reprlib

import torch

from decode import FITS
from flags import fail
from runs import METRICS, SCHEMA, is_accuracy, this_version


def unread(path, error):
    """Return why torch did not load a file: what it holds beside tensors and plain values, else the
    error, whose text may tell to load it all the same: then only its kind."""
    held, text, kind = [], str(error), type(error).__name__
    with contextlib.suppress(Exception):
        held = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if held:
        return f"holds more than tensors and plain values; not read: {', '.join(held)}"
    return f"cannot be read ({text if text and 'weights_only' not in text else kind})"


def absurd(card, choices):
    """Return what cannot be in what a card says, or None. choices: flag -> names that are known."""
    def numbers(values, low):
        return isinstance(values, (tuple, list)) and len(values) == 3 and all(
            type(v) in (int, float) and max(low, -1e30) <= v <= 1e30 for v in values)

    spec, classes, show = card["build"], card["classes"], reprlib.repr      # short, of anything
    if not isinstance(spec, dict) or set(spec) != {*choices, "num_classes", "image_shape"}:
        return "does not say how to build the network"
    for flag, known in choices.items():
        if not isinstance(spec[flag], str) or spec[flag] not in known:
            return f"names an unknown {flag} {show(spec[flag])}"
    shape = spec["image_shape"]
    if not (numbers(shape, 1) and all(type(v) is int for v in shape) and shape[0] == 3
            and shape[1] == shape[2] <= 4096):
        return f"is for images of {show(shape)}, not (3, side, side) with a side up to 4096"
    if not (isinstance(classes, (tuple, list)) and type(spec["num_classes"]) is int
            and 2 <= len(classes) == spec["num_classes"]
            and all(isinstance(c, str) and len(c) <= 255 for c in classes)):
        return f"has no names for its {show(spec['num_classes'])} classes but {show(classes)}"
    if not numbers(card["mean"], -math.inf) or not numbers(card["std"], 1e-6):
        return f"normalises by {show(card['mean'])} and {show(card['std'])}, not by 3 numbers each"
    if not isinstance(card.get("fit", "resize"), str) or card.get("fit", "resize") not in FITS:
        return f"has fit {show(card['fit'])}; known are {', '.join(FITS)}"
    if not isinstance(card.get("recipe", "digits"), str):
        return f"has recipe {show(card['recipe'])}"
    for key, kinds in (("val_fraction", (int, float)), ("labels", (int, type(None))),
                       ("epoch", (int, type(None))), ("ema_epoch", (int, type(None)))):
        value = card.get(key)
        if key in card and (type(value) not in kinds or "epoch" in key and value is not None
                            and not 1 <= value <= 10**6):
            return f"has {key} {show(value)}"
    return None


def unfit(weights, wanted):
    """Return what is wrong with weights, name -> tensor, for a network whose own are `wanted`."""
    if not isinstance(weights, dict) or set(weights) != set(wanted):
        odd = min(map(str, set(wanted) ^ set(weights))) if isinstance(weights, dict) else "all"
        return f"weights that do not fit the network it names ({reprlib.repr(odd)})"
    for name, value in weights.items():
        # A few bytes may claim to be a tensor of any size, each number of it the same.
        if not (isinstance(value, torch.Tensor) and value.layout is torch.strided
                and value.device.type == "cpu" and not value.is_quantized
                and value.dtype == wanted[name].dtype
                and value.numel() * value.element_size() <= value.untyped_storage().nbytes()):
            return f"{name} is no plain tensor of weights"
        if value.shape != wanted[name].shape:
            return (f"weights that do not fit the network it names ({name} is "
                    f"{tuple(value.shape)}, not {tuple(wanted[name].shape)})")
        if not value.isfinite().all() or name.endswith("running_var") and value.min() < 0:
            return f"{name} holds values that are not finite, or negative variances"
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
    return number and (key != "seconds" or 0 <= value < 1e18)


def unsound(state, settings, networks, optimizer, epochs):
    """Return what is wrong with a checkpoint for the run that is to go on from it, or None.

    settings: the run's hash, which a run of before there was one lacks; networks: name -> module;
    epochs: how many the run is to have.
    """
    if not isinstance(state, dict) or not this_version(state.get("schema")):
        return f"not of this version of the scripts (schema {SCHEMA})"
    if state.get("settings", settings) != settings:
        return "of a run with other settings than those in its config.json"
    history = state.get("history")
    if not isinstance(history, list) or not 1 <= len(history) <= epochs:
        return f"has no history of 1 to {epochs} epochs"
    for number, row in enumerate(history, 1):
        if not isinstance(row, dict) or set(row) != set(METRICS) or row["epoch"] != number:
            return f"has no row of metrics for epoch {number}"
        for key, value in row.items():
            known = history[0][key] is not None or not ("val_" in key and value is None)
            if known and not could_be(key, value):
                return f"says {reprlib.repr(value)} of {key} in epoch {number}"
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
    if not isinstance(kept, dict) or not kept or not set(kept) <= set(range(len(parameters))):
        return "has no state of this optimizer"
    names = {"SGD": {"momentum_buffer"}}.get(type(optimizer).__name__,
                                             {"step", "exp_avg", "exp_avg_sq"})
    for i, found in kept.items():
        wanted = {name: torch.zeros(()) if name == "step" else parameters[i] for name in names}
        wrong = unfit(found, wanted)
        if wrong:
            return f"has for the optimizer {wrong}"
    return None


def weights_sha256(state):
    """Return the SHA-256 of a state dict's names and values, whatever the file around them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
