"""Pictures of runs: curves, comparisons, calibration. No command of its own, and no torch.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

import io
import math
import warnings
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from files import write_whole
from flags import fail, plain

# Colours that stay apart for the colour-blind (Okabe & Ito 2008, without their yellow, too pale on
# paper), each with its own line style, so that a print in grey can still be read.
STYLES = {
    "teacher": ("#000000", "-"),
    "student": ("#D55E00", (0, (5, 2))),
    "kd": ("#0072B2", "-"),
    "kd-only": ("#56B4E9", (0, (6, 2, 1, 2))),
    "kd-ema": ("#8C6BB1", (0, (1, 1))),
    "kd-ema/average": ("#8C6BB1", (0, (3, 1, 1, 1, 1, 1))),
    "mean-teacher": ("#009E73", (0, (3, 1.5))),
    "mean-teacher/average": ("#009E73", "-"),
    "mean-teacher/recomputed": ("#009E73", (0, (1, 3))),
    "mean-teacher-no-ema": ("#CC79A7", (0, (1, 1.5))),
}
OTHER_COLOURS = ("#7F7F7F", "#E69F00", "#8C564B", "#4D4D9F", "#A0A000", "#117733",
                 "#882255")
OTHER_LINES = ((0, (8, 2)), (0, (4, 1, 1, 1)), (0, (2, 1)), (0, (8, 2, 1, 2, 1, 2)))
TEXT = 10  # points, in figures 10 inches wide: 5 points where a page is 5 inches wide
MOST_BYTES = 200_000
MOST_LINES = 8  # in one panel


def style(key, number=0):
    """Colour and line style of a row; `number` tells rows that STYLES does not hold apart."""
    other = OTHER_COLOURS[number % len(OTHER_COLOURS)], OTHER_LINES[number % len(OTHER_LINES)]
    return STYLES.get(key, other)


def draw_curves(history_rows, path, title="", chance=None, objective=None):
    """Draw loss and accuracy of one run over its epochs, training and validation together.

    history_rows: dicts with the columns of metrics.csv, values float or None (None is not drawn);
    path: the PNG to write; chance: the accuracy of guessing, from 0 to 1, as a dotted line;
    objective: what the training loss is where it is not cross-entropy, for then it is on another
    scale, and has a panel of its own.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    places = [["own", "accuracy"], ["loss", "accuracy"]] if objective else [["loss", "accuracy"]]
    panels = figure.subplot_mosaic(places)
    lines = {
        "train": ("training", "#D55E00", (0, (5, 2))),
        "val": ("validation", "#0072B2", "-"),
        "ema_val": ("validation, average of the weights", "#009E73", (0, (6, 2, 1, 2))),
    }
    for quantity, scale in (("loss", 1), ("accuracy", 100)):
        for part, (meaning, colour, line) in lines.items():
            epochs, values = _column(history_rows, f"{part}_{quantity}", scale)
            apart = objective and (part, quantity) == ("train", "loss")
            if epochs:
                panels["own" if apart else quantity].plot(
                    epochs, values, color=colour, linestyle=line, label=meaning, linewidth=1.8,
                    **_dots(epochs))
    for axes in panels.values():
        _epoch_axis(axes)
    if objective:
        _plain(panels["own"], f"training loss\n({objective})")
        panels["own"].set_xlabel(None)      # that of the panel below
    _plain(panels["loss"], "validation loss\n(cross-entropy)" if objective else
           "loss (cross-entropy)")
    _percent_axis(panels["accuracy"], "accuracy (%)", chance)
    handles, labels = panels["accuracy"].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False,
                      fontsize=TEXT, handlelength=3.5)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1)
    save(figure, path)


def draw_comparison(rows, runs, path, title="", chance=None):
    """Draw all runs of a recipe: accuracy and loss over epochs, and the final test accuracies.

    rows: of runs.make_rows; runs: of runs.read_runs; path: the PNG to write; chance: as above.
    Several seeds: the line is their mean, the band goes from the lowest to the highest. Of many
    rows only those of a recipe's own chain get a line.
    """
    histories = {run["name"]: run["history"] for run in runs}
    rows = [{**row, "histories": [histories[name] for name in row["runs"]]} for row in rows]
    legend_lines = math.ceil(len(rows) / 3)
    figure = Figure(figsize=(10, max(5.8, 3.2 + 0.34 * len(rows)) + 0.25 * legend_lines),
                    layout="constrained")
    panels = figure.subplot_mosaic([["accuracy", "test"], ["loss", "test"]],
                                   width_ratios=(1.15, 1), height_ratios=(1.9, 1))
    seen, highest, lowest = 0, [], []
    own = {row["key"] for row in rows if row["key"] in STYLES or len(rows) <= MOST_LINES}
    own = own or {row["key"] for row in rows[:MOST_LINES]}
    lengths = [len(history) for row in rows for history in row["histories"]]
    apart = max(lengths) > 3 * min(lengths)     # else the shorter run's curve would be a streak
    for row in rows:
        row["whole"] = 100 / max(map(len, row["histories"])) if apart else 1
        row["colour"], row["line"] = style(row["key"], seen)
        seen += row["key"] not in STYLES
        if row["key"] not in own:
            continue
        if not row["prefix"]:  # an average is not trained: its student's line stands for both
            lowest += _mean_line(panels["accuracy"], row, "train_accuracy", 100, faint=True)[:1]
        lowest += _mean_line(panels["accuracy"], row, f"{row['prefix']}val_accuracy", 100)[:1]
        highest += _mean_line(panels["loss"], row, f"{row['prefix']}val_loss", 1)[1:]
    each = f"share of the run (%), of {min(lengths)} to {max(lengths)} epochs" if apart else "epoch"
    _epoch_axis(panels["accuracy"], each)
    _epoch_axis(panels["loss"], each)
    # Runs end close together: what is below where the slowest is after a third needs no room.
    bottom = min((min(values[len(values) // 3:]) for values in lowest), default=0) - 5
    _percent_axis(panels["accuracy"], "validation accuracy (%)\nthin, faint: training", chance,
                  bottom)
    _plain(panels["loss"], "validation loss\n(cross-entropy)")
    if highest:  # a first epoch far above the rest must not flatten every later difference
        late = max(value for values in highest for value in values[len(values) // 5:])
        if max(map(max, highest)) > 3 * late:
            panels["loss"].set_ylim(top=1.2 * late)
    _test_panel(panels["test"], rows, chance)
    handles, labels = panels["loss"].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False,
                      fontsize=TEXT, handlelength=4.5)
    if title:
        some = " (lines: the recipe's own rows)" * (len(own) < len(rows))
        figure.suptitle(title + some, fontsize=TEXT + 2)
    save(figure, path)


def draw_details(panels, path, title="", classes=None):
    """Write a PNG: reliability diagram and confusion matrix of each network.

    panels: title -> (bins of compare.calibration, counts of compare.confusion); classes: names.
    """
    figure = Figure(figsize=(3.3 * len(panels) + 0.6, 6.8), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 2)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (title, (bins, counts)) in enumerate(panels.items()):
        top, low = axes[:, column]
        sure, share, rows = zip(*bins, strict=True)
        top.plot([0, 1], [0, 1], color="#555555", linestyle=":", linewidth=1.2)
        top.plot(sure, share, color="#0072B2", linewidth=1.2)
        top.scatter(sure, share, [12 + 160 * n / sum(rows) for n in rows], color="#0072B2",
                    clip_on=False, zorder=3)
        top.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        top.set_title(_short(title), fontsize=TEXT)
        _plain(top, "share that is right" if not column else None, "confidence (area: images)")
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        # Errors are small shares: by the square root they can be seen.
        image = low.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="cividis")
        _plain(low, "true class" if not column else None, "class that was said")
        for (row, said), share in np.ndenumerate(shares) if len(shares) <= 12 else ():
            if (percent := f"{100 * share:.0f}") != "0":
                low.text(said, row, percent, ha="center", va="center", fontsize=6.5,
                         color="black" if share > 0.3 else "white")
        if len(shares) <= 20:
            known = classes if classes and len(classes) == len(shares) else range(len(shares))
            names = [_short(name, 10) for name in known]
            low.set_xticks(range(len(names)), names, fontsize=7,
                           rotation=90 if max(map(len, names)) > 2 else 0)
            low.set_yticks(range(len(names)), names if not column else [""] * len(names),
                           fontsize=7)
    figure.colorbar(image, ax=list(axes[1]), shrink=0.8,
                    label="share of the true class\n(numbers: per cent)")
    save(figure, path)


def draw_grid(stored, seen, names, path):
    """Write a PNG: images as they are stored, (N, H, W, 3) uint8, and as the network sees them,
    normalised. Those have no natural colours: −2 is drawn black, +2 white.
    """
    n = len(stored)
    rows, columns = -(-n // 8), min(n, 8)
    figure = Figure(figsize=(1.9 * columns, 1.15 * rows + 0.6), layout="constrained")
    for half, title, images in zip(figure.subfigures(1, 2), ("stored", "as the network sees it"),
                                   (stored, (seen + 2).clip(0, 4) / 4), strict=True):
        half.suptitle(title)
        for i, axes in enumerate(half.subplots(rows, columns, squeeze=False).flat):
            axes.axis("off")
            if i < n:
                axes.imshow(images[i])
                axes.set_title(_short(names[i], 12), fontsize=8, pad=2)
    try:
        write_whole(Path(path), _png(figure, 100))
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}); give --out FILE")


def _test_panel(axes, rows, chance):
    """Dots with values: the mean of the seeds, each seed faintly, first row on top."""
    everything = [100 * value for row in rows for value in row["test_accuracy"]["values"]]
    low, high = min(everything), max(everything)
    room = max(high - low, 4)
    axes.set_xlim(max(0, low - 0.12 * room) if low > 0 else -1, high + 0.3 * room)
    for place, row in enumerate(rows):
        values = [100 * value for value in row["test_accuracy"]["values"]]
        middle = mean(values)
        axes.plot([min(values), max(values)], [place, place], color=row["colour"], linewidth=2)
        axes.plot(values, [place] * len(values), "o", color=row["colour"], markersize=4, alpha=0.4)
        axes.plot([middle], [place], "o", color=row["colour"], markersize=9, markeredgewidth=1.8,
                  markerfacecolor=row["colour"] if row["learned"] else "white")
        axes.annotate(f"{middle:.2f}" + ("" if row["learned"] else " (!)"), (max(values), place),
                      xytext=(9, 0), textcoords="offset points", va="center", fontsize=TEXT)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_short(row["label"]) for row in rows])
    seeds = max(len(row["seeds"]) for row in rows)
    label = "test accuracy (%) of the best validation epoch"
    label += "\nlarge: mean, small: each seed" if seeds > 1 else ""
    label += "" if all(row["learned"] for row in rows) else "\n(!) hollow: learned nothing"
    _plain(axes, None, label)
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    if chance is not None and 100 * chance >= axes.get_xlim()[0]:
        axes.axvline(100 * chance, color="#555555", linestyle=":", linewidth=1.2)


def _mean_line(axes, row, column, scale, faint=False):
    """Draw one column: mean over seeds, min-max band; returns (lowest, highest values), or ()."""
    seeds = [dict(zip(*_column(history, column, scale), strict=True))
             for history in row["histories"]]
    epochs = sorted(set.intersection(*(set(seed) for seed in seeds))) if seeds else []
    if not epochs:
        return ()
    values = [[seed[epoch] for seed in seeds] for epoch in epochs]
    epochs = [epoch * row["whole"] for epoch in epochs]
    middle = [mean(at) for at in values]
    low, high = [min(at) for at in values], [max(at) for at in values]
    if faint:
        axes.plot(epochs, middle, color=row["colour"], linestyle=row["line"], linewidth=0.9,
                  alpha=0.45)
        return low, high
    if len(seeds) > 1:
        axes.fill_between(epochs, low, high, color=row["colour"], alpha=0.15, linewidth=0)
    axes.plot(epochs, middle, color=row["colour"], linestyle=row["line"], linewidth=1.9,
              label=_short(row["label"]), **_dots(epochs))
    return low, high


def _column(rows, name, scale):
    """Epochs and values of one column, without what is missing or not finite."""
    pairs = [(int(row["epoch"]), scale * row[name]) for row in rows
             if row.get(name) is not None and math.isfinite(row[name])]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _dots(epochs):
    return {"marker": "o", "markersize": 3} if len(epochs) < 3 else {}


def _short(label, most=28):
    """A name in a picture: not too long, and no mathematics where it holds dollars."""
    label = plain(label)
    return (label if len(label) <= most else label[:most - 2] + "..").replace("$", r"\$")


def _plain(axes, ylabel, xlabel=None):
    if ylabel:
        axes.set_ylabel(ylabel, fontsize=TEXT)
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=TEXT)
    axes.tick_params(labelsize=TEXT)
    axes.spines[["top", "right"]].set_visible(False)


def _epoch_axis(axes, label="epoch"):
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes, None, label)


def _percent_axis(axes, label, chance, bottom=0):
    """Accuracies up to 100, from `bottom`; chance is said in words where it lies below that."""
    _plain(axes, label)
    bottom, top = max(0, bottom), min(101, 1.03 * axes.get_ylim()[1])
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    if chance is None:
        return
    text = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right",
            "fontsize": TEXT - 1, "color": "#555555"}
    if 100 * chance < bottom:
        axes.annotate(f"chance: {100 * chance:g} %", (1, bottom), xytext=(-2, 3), va="bottom",
                      **text)
        return
    axes.axhline(100 * chance, color="#555555", linestyle=":", linewidth=1.2)
    below = 100 * chance - bottom > 0.08 * (top - bottom)  # where no curve should be
    axes.annotate("chance", (1, 100 * chance), xytext=(-2, -3 if below else 3),
                  va="top" if below else "bottom", **text)


def _png(figure, dots_per_inch):
    buffer = io.BytesIO()
    with warnings.catch_warnings():     # a box stands for letters that the font lacks
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


def save(figure, path):
    """Write the PNG in 256 colours, coarser where it would still pass 200 KB."""
    for dots_per_inch in (150, 110, 80, 60):
        small, picture = io.BytesIO(), Image.open(io.BytesIO(_png(figure, dots_per_inch)))
        picture = picture.convert("RGB")
        try:
            picture = picture.quantize(256)
        except ValueError as error:         # "quantization error": its word for no memory
            raise MemoryError(f"{path}: {error}") from None
        picture.save(small, "PNG", optimize=True)
        if small.tell() < MOST_BYTES:
            break
    write_whole(Path(path), small.getvalue())
