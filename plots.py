"""Pictures of runs: curves, comparisons, calibration, a grid of images.

matplotlib is imported where a picture is drawn, without pyplot: no window, no global
state. Its own defaults hold, whatever the user's matplotlibrc says.
"""
import contextlib
import io
import math
import os
from statistics import mean

from recipes import write_whole

# Colours that the colour-blind can tell apart (Okabe & Ito 2008, without their yellow,
# too pale on paper), each with its own line style for prints in grey.
STYLES = {
    "teacher": ("#000000", "-"),
    "student": ("#D55E00", "--"),
    "kd": ("#0072B2", "-"),
    "kd-only": ("#56B4E9", "-."),
    "kd-ema": ("#8C6BB1", ":"),
    "kd-ema/average": ("#8C6BB1", (0, (3, 1, 1, 1, 1, 1))),
    "mean-teacher": ("#009E73", (0, (3, 1.5))),
    "mean-teacher/average": ("#009E73", "-"),
    "mean-teacher/recomputed": ("#009E73", (0, (1, 3))),
    "mean-teacher-no-ema": ("#CC79A7", (0, (1, 1.5))),
}
OTHER_COLOURS = ("#7F7F7F", "#E69F00", "#8C564B", "#4D4D9F", "#A0A000", "#117733", "#882255")
OTHER_LINES = ("--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
CURVES = {              # of one run: its columns in metrics.csv
    "train": ("training", "#D55E00", "--"),
    "val": ("validation", "#0072B2", "-"),
    "ema_val": ("validation, average of the weights", "#009E73", "-."),
}
CHANCE = dict(color="#555555", linestyle=":", linewidth=1.2)
LOOK = {                # on top of matplotlib's defaults
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.axisbelow": True, "grid.color": "#E4E4E4", "legend.frameon": False,
    "legend.handlelength": 4, "lines.linewidth": 1.8, "lines.markersize": 4,
}
MOST_BYTES = 200_000
MOST_CURVES = 8         # in one panel


def style(key, number=0):
    """Return colour and line style of a row; number tells apart rows not in STYLES."""
    colour = OTHER_COLOURS[number % len(OTHER_COLOURS)]
    return STYLES.get(key, (colour, OTHER_LINES[number % len(OTHER_LINES)]))


@contextlib.contextmanager
def defaults():
    """Inside it matplotlib draws with its own defaults and LOOK."""
    asked = os.environ.pop("MPLBACKEND", "")    # one that is not there stops the import
    import matplotlib
    if asked:
        os.environ["MPLBACKEND"] = asked
    settings = dict(matplotlib.rcParamsDefault)
    del settings["backend"]     # looking for one would import pyplot
    with matplotlib.rc_context(settings):
        matplotlib.rcParams.update(LOOK)
        yield


# ---- one run ------------------------------------------------------------------------

@defaults()
def draw_curves(history, path, title="", chance=None, terms=()):
    """Draw loss and accuracy of one run over its epochs, training and validation.

    history: dicts with the columns of metrics.csv, floats or None (None is not drawn).
    chance: accuracy of guessing, from 0 to 1. terms: names of the loss terms, each of
    which is drawn. The training loss has a panel of its own: its terms may have any scale.
    """
    figure = new_figure(10, 5.4, title)
    panels = figure.subplot_mosaic([["terms", "accuracy"], ["loss", "accuracy"]])
    for part, (label, *look) in CURVES.items():
        curve(panels["accuracy"], column(history, f"{part}_accuracy"), *look, label)
        if part != "train":
            curve(panels["loss"], column(history, f"{part}_loss"), *look, label)
    for number, term in enumerate(terms):
        points, look = column(history, f"train_{term}"), style(None, number)
        curve(panels["terms"], points, *look, shorten(term))
    curve(panels["terms"], column(history, "train_loss"), "#000000", ":", "total")
    panels["terms"].set_ylabel("training loss")
    panels["terms"].legend(ncols=2)
    panels["loss"].set_ylabel("validation loss\n(cross-entropy)")
    for axes in panels.values():
        epoch_axis(axes)
    percent_axis(panels["accuracy"], "accuracy (%)", chance)
    legend_below(figure, panels["accuracy"])
    save(figure, path)


def column(history, name):
    """Return epochs and values of one column, finite ones only; accuracies in per cent."""
    epochs, values = [], []
    for row in history:
        value = row.get(name)
        if value is not None and math.isfinite(value):
            epochs.append(row["epoch"])
            values.append(100 * value if name.endswith("accuracy") else value)
    return epochs, values


def curve(axes, points, colour, line, label, **options):
    """Draw one line; where it has one or two points only, dots too."""
    x, y = points
    if x:
        marker = "o" if len(x) < 3 else None
        axes.plot(x, y, color=colour, linestyle=line, label=label, marker=marker, **options)


# ---- all runs of a recipe -----------------------------------------------------------

@defaults()
def draw_comparison(rows, runs, path, title="", chance=None):
    """Draw accuracy and loss of all runs over their epochs, and the test accuracies.

    rows, runs: of report.build. Lines are means over the seeds, bands go from the
    lowest to the highest. Of many rows only the first get curves.
    """
    percents, losses = [], []       # of the later epochs
    lengths, looks = [], []
    for run in runs:
        lengths.append(len(run["history"]))
    for place, row in enumerate(rows):
        looks.append(style(row["key"], place))
    figure = new_figure(10, 5 + 0.25 * len(rows), title)
    panels = figure.subplot_mosaic([["accuracy", "test"], ["loss", "test"]],
                                   width_ratios=(1.15, 1), height_ratios=(1.9, 1))
    accuracy, loss = panels["accuracy"], panels["loss"]
    for row, look in zip(rows[:MOST_CURVES], looks, strict=False):
        members = [run["history"] for run in runs if run["name"] in row["runs"]]
        prefix, label = row["prefix"], shorten(row["label"])
        percents += draw_band(accuracy, members, f"{prefix}val_accuracy", look, label)
        losses += draw_band(loss, members, f"{prefix}val_loss", look, label)
        if not prefix:  # an average is not trained: its student's line is for both
            percents += draw_band(accuracy, members, "train_accuracy", look)
    for axes in (accuracy, loss):
        epoch_axis(axes)
        if max(lengths) > 3 * min(lengths):     # else the shortest curve is a streak
            axes.set_xscale("log")
    # Runs end close together: the first third, far from there, must not flatten the rest.
    bottom = min(percents, default=5) - 5
    percent_axis(accuracy, "validation accuracy (%)\nthin, faint: training", chance, bottom)
    _, highest = loss.get_ylim()
    top = 1.2 * max(losses, default=highest)
    loss.set(ylabel="validation loss\n(cross-entropy)", ylim=(None, min(top, highest)))
    draw_test(panels["test"], rows, looks)
    legend_below(figure, loss)
    save(figure, path)


def draw_band(axes, histories, name, look, label=None):
    """Draw one column: the mean of the seeds, and a band from lowest to highest.

    Without a label a faint line. Return the values after the first third of the epochs.
    """
    seeds, values = [], []
    for history in histories:
        seeds.append(dict(zip(*column(history, name), strict=True)))
    epochs = sorted(set.intersection(*map(set, seeds)))
    for epoch in epochs:
        values.append([seed[epoch] for seed in seeds])
    points = epochs, list(map(mean, values))
    if label is None:
        curve(axes, points, *look, label, linewidth=0.9, alpha=0.45)
    else:
        curve(axes, points, *look, label)
        low = list(map(min, values))
        high = list(map(max, values))
        axes.fill_between(epochs, low, high, color=look[0], alpha=0.15, linewidth=0)
    return sum(values[len(values) // 3:], [])


def draw_test(axes, rows, looks):
    """Dots with values: the mean of the seeds, each seed faintly, first row on top."""
    for place, (row, (colour, _)) in enumerate(zip(rows, looks, strict=True)):
        values = [100 * value for value in row["test_accuracy"]["values"]]
        centre = mean(values)
        text, face = f"   {centre:.2f}", colour
        if not row["learned"]:
            text += " (!)"
            face = "white"
        axes.plot(values, [place] * len(values), "o-", color=colour, alpha=0.5)
        axes.plot(centre, place, "o", color=colour, markersize=9, markerfacecolor=face)
        axes.annotate(text, (max(values), place), va="center")
    axes.margins(x=0.2)     # room for the values
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [shorten(row["label"]) for row in rows])
    axes.set_xlabel("test accuracy (%) of the best validation epoch\n"
                    "large: mean, small: each seed\n(!) hollow: learned nothing")
    axes.grid(axis="x")


@defaults()
def draw_details(panels, path, title="", classes=None):
    """Draw reliability diagram and confusion matrix of each network.

    panels: title -> (bins of report.calibration, counts (C, C) of report.confusion).
    classes: their names, or None.
    """
    figure = new_figure(3.3 * len(panels) + 0.6, 6.8, title)
    upper, lower = figure.subplots(2, len(panels), sharey="row", squeeze=False)
    for axes, matrix, name in zip(upper, lower, panels, strict=True):
        bins, counts = panels[name]
        confidence, share, counted = zip(*bins, strict=True)
        areas = [12 + 160 * images / sum(counted) for images in counted]
        axes.axline((0, 0), slope=1, **CHANCE)
        axes.plot(confidence, share, color="#0072B2")
        axes.scatter(confidence, share, areas, "#0072B2", clip_on=False, zorder=3)
        axes.set(title=shorten(name), xlabel="confidence (area: images)", aspect="equal",
                 xlim=(0, 1), ylim=(0, 1))
        image = draw_confusion(matrix, counts, classes)
    upper[0].set_ylabel("share that is right")
    lower[0].set_ylabel("true class")
    figure.colorbar(image, ax=list(lower), shrink=0.8,
                    label="share of the true class\n(numbers: per cent)")
    save(figure, path)


def draw_confusion(axes, counts, classes):
    from matplotlib.colors import PowerNorm
    number = len(counts)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    # Errors are small shares: by the square root they can be seen.
    image = axes.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="cividis")
    axes.set_xlabel("predicted class")
    if number <= 12:
        for true, said in zip(*(shares >= 0.005).nonzero(), strict=True):
            share = shares[true, said]
            axes.text(said, true, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5,
                      color="black" if share > 0.3 else "white")
    if number <= 20:
        if not classes or len(classes) != number:
            classes = range(number)
        names = [shorten(name, 10) for name in classes]
        axes.set_xticks(range(number), names, fontsize=7, rotation=90)
        axes.set_yticks(range(number), names, fontsize=7)
    return image


@defaults()
def draw_grid(stored, seen, names, path):
    """Draw images as they are stored, (N, H, W, 3) uint8, and below as the network sees them.

    seen: (N, H, W, 3), normalised. Those have no natural colours: −2 is black, +2 white.
    """
    columns, rows = min(len(stored), 8), math.ceil(len(stored) / 8)
    title = "as stored, and below as the network sees it"
    figure = new_figure(1.2 * columns + 2, 2.6 * rows + 0.5, title)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, name in enumerate(names):
        row, column = divmod(place, 8)
        upper, lower = grid[2 * row:2 * row + 2, column]
        upper.set_title(shorten(name, 12), fontsize=8)
        upper.imshow(stored[place])
        lower.imshow((seen[place] + 2).clip(0, 4) / 4)
    save(figure, path)


def new_figure(width, height, title=""):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(shorten(title, 80))
    return figure


def shorten(text, most=28):
    """Return a name for a picture, of at most `most` letters; a dollar is no mathematics."""
    text = str(text)
    if len(text) > most:
        text = text[:most - 2] + ".."
    return text.replace("$", r"\$")


def epoch_axis(axes):
    from matplotlib.ticker import MaxNLocator
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid()


def percent_axis(axes, label, chance, bottom=0):
    """Accuracies from bottom up to 100 at most."""
    top = min(101, 1.03 * axes.get_ylim()[1])
    if chance is not None:
        label += f"\nchance: {100 * chance:.2g} %"
        axes.axhline(100 * chance, **CHANCE)
    axes.set(ylabel=label, ylim=(max(0, bottom), top))


def legend_below(figure, axes):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


@defaults()
def save(figure, path):
    """Write a PNG of 256 colours, coarser where it would have 200 KB, whole or not at all."""
    from PIL import Image
    for dots_per_inch in (150, 110, 80, 60):
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dots_per_inch)
        Image.open(drawn).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
        if small.tell() < MOST_BYTES:
            break
    write_whole(path, small.getvalue())
