"""What a best.pt from elsewhere says, looked at before anything is built from it: such a file is
untrusted. No command of its own.
"""
import math
import reprlib

import torch


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
    for key, kinds in (("val_fraction", (int, float)), ("labels", (int, type(None)))):
        if not isinstance(card.get(key, 0), kinds):
            return f"has {key} {show(card[key])}"
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
                and value.dtype in (torch.float32, torch.int64)
                and value.numel() * value.element_size() <= value.untyped_storage().nbytes()):
            return f"{name} is no plain tensor of weights"
        if value.shape != wanted[name].shape:
            return (f"weights that do not fit the network it names ({name} is "
                    f"{tuple(value.shape)}, not {tuple(wanted[name].shape)})")
        if not value.isfinite().all():
            return f"{name} holds values that are not finite"
    return None
