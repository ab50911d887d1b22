"""Figures in one style: backprop blue, Forward-Forward orange, direct labels, MB and GB of 10^6."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Image, display
from matplotlib import cycler, ticker
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import OffsetFrom, Text
from matplotlib.transforms import Bbox
from sklearn.isotonic import isotonic_regression

from ff_utils.memory.arms import ARMS

MB, GB = 1e6, 1e9
BLUE, PALE_BLUE = "#1a6faf", "#9fc0dc"
ORANGE, PALE_ORANGE = "#d1541d", "#ecb795"
GREY = "#6b6b6b"
POSITIVE, NEGATIVE = "#2a8c82", "#a5528f"
SERIES = [ORANGE, BLUE, "#5b5f97", "#2a8c82", "#b8336a", GREY]  # of what is not an arm
CATEGORIES = {  # of tensors: name and colour
    "parameters": ("parameters", "#0173b2"),
    "gradients": ("gradients", "#de8f05"),
    "optimizer_state": ("Adam's moments", "#029e73"),
    "activations": ("activations", "#d55e00"),
    "temporaries": ("temporaries", "#cc78bc"),
    "inputs": ("inputs, cached data", GREY),
}
DPI = 140
WIDTH = 7.2  # inches of a figure with one panel
SMALL, NORMAL, LARGE = 10, 11, 13  # points: legible when a figure is shown at half its size
# Offsets in points that `label_points` tries, the nearest first.
AROUND = [(9, 0), (0, 11), (0, -11), (-9, 0)]
AROUND += [(dx, dy * sign) for dy in range(11, 100, 6) for dx in (9, -9) for sign in (1, -1)]


def start(folder: Path) -> Callable[[Figure, str, str], None]:
    """Set the style of all figures; returns `show(figure, name, alt)`, which saves to `folder`."""
    sns.set_theme(style="ticks", font="DejaVu Sans")
    plt.rc("axes", titlelocation="left", titlesize=LARGE, titleweight="bold", labelsize=NORMAL)
    plt.rc("axes", prop_cycle=cycler(color=SERIES), grid=True)
    plt.rc("axes.spines", right=False, top=False)
    plt.rc("axes.grid", axis="y")
    plt.rc("grid", color="#e6e6e6")
    plt.rc(("xtick", "ytick"), labelsize=SMALL)
    plt.rc("legend", frameon=False, fontsize=SMALL)
    plt.rc("figure", dpi=DPI, titlesize=LARGE, titleweight="bold")
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("savefig", bbox="tight", pad_inches=0.08)
    plt.rc("svg", hashsalt="ff_utils", fonttype="none")
    return partial(_show, folder)


def _show(folder: Path, figure: Figure, name: str, alt: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        if text.get_fontsize() == LARGE:  # a title, which states what was found
            text.set_text(textwrap.fill(text.get_text(), round(8.2 * figure.get_figwidth())))
    for kind, left_out in (("svg", "Date"), ("png", "Software")):  # they differ between machines
        path = folder / f"{name}.{kind}"
        figure.savefig(path, metadata={left_out: None, "Description": alt})
    plt.close(figure)
    display(Image(path.read_bytes(), width=round(plt.imread(path).shape[1] * 90 / DPI), alt=alt))


def names_and_colours(series: Iterable, colours: Sequence[str] = SERIES) -> dict:
    """Title and colour of every series: an arm's own, or the next of `colours`."""
    return {
        name: (ARMS[name].title, ARMS[name].colour) if name in ARMS else (str(name), colour)
        for name, colour in zip(series, cycle(colours), strict=False)
    }


def panels(
    titles: Sequence[str],
    *,
    title: str,
    columns: int = 4,
    size: tuple[float, float] = (2.9, 2.8),
    note: str = "",
    **kind: object,
) -> tuple[Figure, list[plt.Axes]]:
    """Axes side by side, one for each of `titles`; size: inches of each; kind: of `subplots`."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    inches = (max(size[0] * columns, WIDTH), size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, **kind)
    for axis, name in zip(axes.flat, titles, strict=False):
        axis.set_title(name, fontsize=NORMAL, weight="normal")
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    figure.suptitle(title, x=0.01, ha="left")
    write_note(figure, note)
    return figure, list(axes.flat[: len(titles)])


Place = tuple[float, float, str, str]


def label_ends(axis: plt.Axes, ends: Sequence[Place]) -> None:
    """Name lines at their ends (x, y, name, colour), in a column to the right of all of them.

    Names that would overlap are moved apart, as little as is possible, and a thin line leads to
    each that has moved; the axis grows to the right until the column is inside.
    """
    ends = sorted(ends, key=lambda end: end[1])
    right = max(x for x, *_ in ends)
    kind = {"textcoords": "offset points", "va": "center", "weight": "bold", "fontsize": NORMAL}
    texts = [
        axis.annotate(name, (right, y), (9, 0), color=colour, in_layout=False, **kind)
        for _, y, name, colour in ends
    ]
    axis.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    points = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    room = max(box.width for box in boxes) + 14 * points
    scale = axis.xaxis.get_transform()
    axis.set_xticks([tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= right])
    left, last = scale.transform([axis.get_xlim()[0], right])
    limit = left + (last - left) * frame.width / max(frame.width - room, frame.width / 3)
    axis.set_xlim(right=float(scale.inverted().transform([limit])[0]))

    height = 1.08 * max(box.height for box in boxes)
    below = height * np.arange(len(ends))
    wanted = np.array([(box.y0 + box.y1) / 2 for box in boxes])
    least = frame.y0 + height / 2
    most = max(least, frame.y1 - height / 2 - below[-1])
    found = below + isotonic_regression(wanted - below, y_min=least, y_max=most)
    for (x, y, _, colour), text, moved in zip(ends, texts, (found - wanted) / points, strict=True):
        text.set_position((9, moved))
        if abs(moved) > 4 or x < right:
            leader = {"arrowstyle": "-", "color": colour, "lw": 0.8, "ls": ":"}
            leader |= {"shrinkA": 0, "shrinkB": 3}
            where = {"textcoords": OffsetFrom(text, (0, 0.5)), "arrowprops": leader}
            axis.annotate("", (x, y), (-2, 0), in_layout=False, **where)


def label_points(axis: plt.Axes, places: Sequence[Place], line: np.ndarray) -> None:
    """Name points (x, y, name, colour) beside them, where there is no name or point yet, nor the
    `line` through points (N, 2)."""
    axis.figure.canvas.draw()
    frame = axis.get_window_extent()
    near = axis.figure.dpi / 15
    taken = [
        Bbox.from_bounds(x - near, y - near, 2 * near, 2 * near)
        for x, y in axis.transData.transform([place[:2] for place in places])
    ]
    steps = np.linspace(0, 1, 30)[:, None]
    for start, end in pairwise(axis.transData.transform(line)):
        taken += [Bbox.from_extents(x, y, x, y) for x, y in start + (end - start) * steps]
    kind = {"textcoords": "offset points", "weight": "bold", "va": "center", "fontsize": SMALL}
    for x, y, name, colour in sorted(places, key=lambda place: -place[1]):
        text = axis.annotate(name, (x, y), (0, 0), color=colour, in_layout=False, **kind)
        for dx, dy in AROUND:
            text.set_position((dx, dy))
            text.set_horizontalalignment(("right", "center", "left")[np.sign(dx) + 1])
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        if abs(dy) > 14:
            leader = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 4}
            where = {"textcoords": "offset points", "arrowprops": leader, "in_layout": False}
            axis.annotate("", (x, y), (dx, dy), **where)


def lines(
    table: pd.DataFrame | dict[str, pd.DataFrame],
    x: str,
    y: str,
    by: str = "line",
    *,
    scale: float = 1,
    log: str = "",
    note: str = "",
    colours: Sequence[str] = SERIES,
    axis: plt.Axes | None = None,
    **texts: str,
) -> Figure:
    """`y` times `scale` against `x`, one line for each value of `by`, labelled at its end.

    The line is the mean of the rows at an `x` (seeds, say), its band reaches from the least to the
    most. table: one table, or a table for each line by name. log: the logarithmic axes, as in "xy".
    axis: draw there. texts: title, xlabel, ylabel.
    """
    if isinstance(table, dict):
        table = pd.concat(table, names=[by]).reset_index(by)
    table = table.dropna(subset=[x, y]).assign(**{y: lambda rows: rows[y] * scale})
    style = names_and_colours(table[by].unique(), colours)
    palette = {name: colour for name, (_, colour) in style.items()}
    # The first line is the widest, so that one of equal values is seen below the next.
    widths = dict(zip(style, np.linspace(3.4, 2, len(style)), strict=True))
    axis = axis or plt.subplots(figsize=(WIDTH, 4.4))[1]
    kind = {"errorbar": ("pi", 100), "marker": "o", "ms": 4.5, "mew": 0, "legend": False}
    sns.lineplot(table, x=x, y=y, hue=by, palette=palette, size=by, sizes=widths, ax=axis, **kind)
    if "y" not in log and table[y].min() >= 0:
        axis.set_ylim(bottom=0)
    _write_ticks(axis, log)
    _ticks_at(axis, table[x].unique(), "x" in log)
    axis.set(**texts)
    mean = table.groupby([by, x], sort=False)[y].mean().reset_index()
    last = mean.sort_values(x).groupby(by, sort=False).tail(1)
    label_ends(axis, [(row[x], row[y], *style[row[by]]) for _, row in last.iterrows()])
    write_note(axis.figure, note)
    return axis.figure


def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    *,
    scale: float = 1,
    log: str = "",
    note: str = "",
    **texts: str,
) -> Figure:
    """`y` times `scale` against `x`, a colour for each value of `by`; texts as of `lines`.

    Filled points, joined by a line: the Pareto front, which no other row beats in both.
    """
    table = table.dropna(subset=[x, y]).assign(**{y: lambda rows: rows[y] * scale})
    style = names_and_colours(table[by].unique())
    front = pareto_front(table, x, y)
    table = pd.concat([table.drop(front.index), front])  # filled points above the others
    figure, axis = plt.subplots(figsize=(WIDTH, 4.8))
    axis.plot(front[x], front[y], color=GREY, lw=1.2, ls="--", zorder=1)
    edges = table[by].map(lambda name: style[name][1])
    inside = edges.where(table.index.isin(front.index), "white")
    axis.scatter(table[x], table[y], 70, inside, edgecolors=edges, lw=1.8, zorder=3)
    _write_ticks(axis, log)
    if "x" not in log:
        axis.set_xlim(0, 1.15 * table[x].max())
    if "y" not in log:
        axis.set_ylim(0, 1.15 * table[y].max())
    axis.set(**texts)
    if table[by].is_unique:
        places = [(row[x], row[y], *style[row[by]]) for _, row in table.iterrows()]
        label_points(axis, places, front[[x, y]].to_numpy(float))
    else:
        for name, colour in style.values():
            axis.scatter([], [], 70, colour, label=name)
        axis.legend()
    write_note(figure, f"{note}; filled: no other is lower in both".removeprefix("; "))
    return figure


def pareto_front(
    table: pd.DataFrame, x: str = "per_1000_images", y: str = "peak_bytes"
) -> pd.DataFrame:
    """The rows that no other beats in both `x` and `y`, the least `x` first."""
    ordered = table.dropna(subset=[x, y]).sort_values([x, y])
    best = ordered[y].astype(float).cummin().shift(fill_value=float("inf"))
    return ordered[ordered[y] < best]


def bars(
    values: dict[str, float],
    title: str,
    xlabel: str,
    colours: Sequence[str],
    spreads: dict[str, float] | None = None,
) -> Figure:
    """Horizontal bars with their numbers; spreads: standard deviations."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.8 + 0.5 * len(values)))
    spreads = spreads or dict.fromkeys(values, 0)
    errors = [spreads[name] for name in values]
    drawn = axis.barh(list(values), list(values.values()), 0.62, xerr=errors, color=colours)
    texts = [f"{values[n]:.2f}" + (f" ± {spreads[n]:.2f}" if spreads[n] else "") for n in values]
    axis.bar_label(drawn, texts, padding=5, fontsize=NORMAL)
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlabel=xlabel, title=title, xlim=(0, 1.25 * max(values.values())))
    return figure


def breakdown(table: pd.DataFrame, *, title: str, note: str = "") -> Figure:
    """What the peak is made of: one bar for each row of `table` (an arm), bytes by category."""
    sizes = table[list(CATEGORIES)].astype(float) / MB
    sizes.index = [ARMS[arm].title for arm in table.arm]
    sizes.columns, colours = zip(*CATEGORIES.values(), strict=True)
    figure, axis = plt.subplots(figsize=(WIDTH, 1.3 + 0.55 * len(table)))
    sizes.plot.barh(stacked=True, color=colours, width=0.65, lw=0, legend=False, ax=axis)
    totals = [f"{total:,.0f}" for total in sizes.sum(axis=1)]
    axis.bar_label(axis.containers[-1], totals, padding=4, fontsize=NORMAL)
    axis.margins(x=0.12)
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _in_words(value)))
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlabel="MB at the peak", ylabel="")
    figure.suptitle(title, x=0.01, ha="left")
    handles = axis.get_legend_handles_labels()
    axis.legend(*handles, ncols=3, loc="lower left", bbox_to_anchor=(-0.3, 1), columnspacing=1)
    write_note(figure, note)
    return figure


def timelines(
    steps: dict[str, list[tuple[str, dict[str, int]]]], *, title: str, note: str = ""
) -> Figure:
    """Live bytes after each operation of a training step, by category; one panel for each arm."""
    titles = [ARMS[arm].title for arm in steps]
    kind = {"columns": 2, "size": (4.2, 3), "sharey": True}
    figure, axes = panels(titles, title=title, note=note, **kind)
    names, colours = zip(*CATEGORIES.values(), strict=True)
    for axis, operations in zip(axes, steps.values(), strict=True):
        sizes = pd.DataFrame([live for _, live in operations])[list(CATEGORIES)] / MB
        kind = {"colors": colours, "labels": names, "lw": 0, "rasterized": True}
        axis.stackplot(sizes.index + 1, sizes.T.to_numpy(), step="post", **kind)
        total = sizes.sum(axis=1)
        peak = int(total.argmax())
        side = ("left", "center", "center", "right")[4 * peak // len(total)]
        place = {"xytext": (0, 7), "textcoords": "offset points", "ha": side, "weight": "bold"}
        axis.annotate(f"peak {total[peak]:,.0f} MB", (peak + 1, total[peak]), **place)
        axis.set(xlabel=f"operation, of {len(total):,}", xlim=(1, len(total)))
        axis.margins(y=0.14)
    for axis in axes[::2]:
        axis.set_ylabel("live memory (MB)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, reverse=True, loc="outside right center")
    return figure


def heat_map(
    cells: pd.DataFrame,
    *,
    label: str,
    form: str = ".3g",
    centre: float | None = None,
    high: float | None = None,
    note: str = "",
    axis: plt.Axes | None = None,
    **texts: str,
) -> Figure:
    """A number in each cell of two parameters, as `DataFrame.pivot_table` gives them.

    A cell without a number is empty. label: what the numbers are. centre: the value that is neither
    good nor bad. high: the end of the colours, which larger numbers share. axis: draw there,
    without a colour bar. texts: as of `lines`.
    """
    cells = cells.astype(float).rename(index=_in_words, columns=_in_words)
    kind = {"cmap": "Blues" if centre is None else "PuOr_r", "center": centre, "vmax": high}
    kind |= {"annot": True, "fmt": form, "annot_kws": {"fontsize": SMALL}, "linewidths": 0.5}
    if axis is None:
        size = (max(WIDTH, 0.9 * len(cells.columns) + 2.4), max(3, 0.5 * len(cells) + 1.8))
        axis = plt.subplots(figsize=size)[1]
        kind["cbar_kws"] = {"label": label, "extend": "max" if high else "neither"}
    else:
        kind["cbar"] = False
    sns.heatmap(cells, ax=axis, **kind)
    axis.set_xlabel(axis.get_xlabel().replace("_", " "))
    axis.set_ylabel(axis.get_ylabel().replace("_", " "))
    axis.set(**texts)
    axis.tick_params(rotation=0)
    axis.grid(False)
    write_note(axis.figure, note)
    return axis.figure


def images(rows: torch.Tensor, shape: tuple[int, ...], titles: Sequence[str]) -> Figure:
    """Images (N, pixels) side by side; shape: (height, width) or (channels, height, width)."""
    figure, axes = plt.subplots(1, len(rows), figsize=(1.9 * len(rows), 2.3), squeeze=False)
    for axis, row, title in zip(axes[0], rows, titles, strict=True):
        _image(axis, row, shape)
        axis.set_title(title, fontsize=NORMAL, loc="center", weight="normal")
    return figure


def _image(axis: plt.Axes, row: torch.Tensor, shape: tuple[int, ...]) -> None:
    pixels = row.reshape(shape).cpu()
    if len(shape) == 3:
        pixels = pixels.permute(1, 2, 0).clamp(0, 1)
    axis.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=float(row.max()) or 1)
    axis.set_axis_off()


def label_goodness(digits: dict[str, dict], title: str, below: str, *, digit: str) -> Figure:
    """Two of `digits`, each a row: the image, and a bar a label for each layer and for all of them.

    digits: by name, as `live.digits` gives them; a label of None is not known. digit: the one on
    top. below: the other one.
    """
    layers = len(digits[digit]["goodness"])
    names = [f"layer {number}" for number in range(1, layers + 1)] + ["all layers"]
    kind = {"columns": layers + 2, "size": (2.6, 2.5), "width_ratios": [0.8] + [1] * len(names)}
    figure, axes = panels([""] * 2 * (layers + 2), title=title, **kind)
    for row, name in enumerate((digit, below)):
        shown, (picture, *charts) = digits[name], axes[row * (layers + 2) :][: layers + 2]
        true, chosen = shown["label"], shown["predicted"]
        pixels = torch.tensor(shown["pixels"])
        _image(picture, pixels, tuple(pixels.shape))
        verdict = "right" if chosen == true else "wrong"
        about = f"true label {true}\nread as {chosen}: {verdict}"
        about = f"drawn,\nread as {chosen}" if true is None else about
        picture.set_title(about, fontsize=NORMAL)
        found = np.array(shown["goodness"])
        for axis, values, heading in zip(charts, [*found, found.sum(0)], names, strict=True):
            drawn = axis.bar(range(len(values)), values, color=PALE_ORANGE, lw=0)
            drawn[int(values.argmax())].set_facecolor(ORANGE)
            if true is not None:
                drawn[true].set(edgecolor="black", linewidth=1.5)
            axis.set_title(heading, fontsize=NORMAL, weight="normal")
            axis.set_xticks(range(len(values)))
            axis.set_xlabel("label tried" if row else "")
        charts[0].set_ylabel("goodness")
    write_note(figure, "framed: the true label; dark: the label with the most goodness")
    return figure


def goodness_in_training(chart: dict, title: str, *, step: int) -> Figure:
    """Goodness of positive and negative inputs after `step` training steps, and its mean over time.

    chart: as `live.goodness_chart` gives it.
    """
    names = [f"at training step {step}", "mean during training; black: the step at the left"]
    figure, (left, right) = panels(names, title=title, columns=2, size=(4, 3.2))
    edges, moment = np.array(chart["edges"]), chart["steps"].index(step)
    ends = []
    for kind, colour in (("positive", POSITIVE), ("negative", NEGATIVE)):
        counts = np.array(chart[kind])
        left.stairs(counts[moment], edges, fill=True, color=colour, alpha=0.65, label=kind)
        means = counts @ (edges[1:] + edges[:-1]) / 2 / counts.sum(1)
        right.plot(chart["steps"], means, color=colour, lw=2.4)
        ends.append((chart["steps"][-1], means[-1], kind, colour))
    dashed = {"color": GREY, "lw": 1.2, "ls": "--"}
    left.axvline(chart["theta"], label="theta", **dashed)
    right.axhline(chart["theta"], **dashed)
    right.axvline(step, color="black", lw=1)
    left.set(xlabel=f"goodness (last bar: {edges[-2]:.2g} or more)", ylabel="inputs")
    left.set(xlim=(0, max(edges[-1], 1.1 * chart["theta"])))
    right.set(xlabel="training steps", ylim=(0, None))
    left.legend()
    label_ends(right, ends)
    return figure


def histograms(
    cases: Sequence[tuple[str, torch.Tensor, torch.Tensor]],
    theta: float | None,
    title: str,
    share_x: bool = True,
) -> Figure:
    """Goodness of positive and negative inputs; a panel for each (title, positive, negative)."""
    figure, axes = panels([name for name, *_ in cases], title=title, sharex=share_x)
    every = torch.cat([torch.cat(case[1:]) for case in cases])
    for axis, (_, positive, negative) in zip(axes, cases, strict=True):
        seen = every if share_x else torch.cat([positive, negative])
        low = 0.0 if share_x else float(seen.quantile(0.002))
        bins = np.linspace(low, float(seen.quantile(0.998)), 40)
        axis.hist(positive, bins, color=POSITIVE, alpha=0.65, label="positive")
        axis.hist(negative, bins, color=NEGATIVE, alpha=0.65, label="negative")
        if theta is not None:
            axis.axvline(theta, color=GREY, lw=1, ls="--", label=f"theta = {theta:g}")
        axis.set(yticks=[], xlabel="goodness")
    axes[0].set_ylabel("inputs")
    axes[:4][-1].legend()
    return figure


def ranks(
    batches: Sequence[Sequence[tuple[float, float]]],
    parts: Sequence[Sequence[tuple[float, float, str]]],
    *,
    title: str,
    note: str = "",
) -> Figure:
    """Measured work of each rank over time, in seconds: FF above pipelined backprop.

    batches: (start, end) of every batch on each rank. parts: (start, end, "forward", "backward" or
    "update") of every micro-batch and update. The first rank is at the bottom.
    """
    titles = ["Forward-Forward: each number is a batch"]
    titles += ["backprop, pipelined in micro-batches"]
    kind = {"columns": 1, "size": (8, 0.8 + 0.45 * len(batches)), "sharex": True, "sharey": True}
    figure, axes = panels(titles, title=title, note=note, **kind)
    colours = {"forward": BLUE, "backward": PALE_BLUE, "update": GREY}
    for rank, (own, own_parts) in enumerate(zip(batches, parts, strict=True)):
        spans = [(start, end - start) for start, end in own]
        axes[0].broken_barh(spans, (rank - 0.4, 0.8), facecolors=PALE_ORANGE, ec="white", lw=1)
        for number, (start, end) in enumerate(own, start=1):
            axes[0].text((start + end) / 2, rank, number, ha="center", va="center", fontsize=9)
        spans = [(start, end - start) for start, end, _ in own_parts]
        filled = [colours[name] for *_, name in own_parts]
        axes[1].broken_barh(spans, (rank - 0.4, 0.8), facecolors=filled, ec="white", lw=0.4)
    for axis in axes:
        axis.set_yticks(range(len(batches)), [f"rank {rank}" for rank in range(len(batches))])
        axis.grid(False)
    axes[1].set_xlabel("seconds")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes[1].legend(handles=handles, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.97))
    return figure


def write_note(figure: Figure, text: str) -> None:
    """Write below a figure what its numbers were measured with."""
    y, wide = -0.06 / figure.get_figheight(), round(12 * figure.get_figwidth())
    figure.text(0.01, y, textwrap.fill(text, wide), fontsize=SMALL, color=GREY, va="top")


def _write_ticks(axis: plt.Axes, log: str = "") -> None:
    """Ticks with commas in thousands; logarithmic axes, of "xy", with a handful of them, whatever
    their range."""
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _in_words(value)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _in_words(value)))
    for direction in log:
        axis.set(**{f"{direction}scale": "log"})
        ticks = getattr(axis, f"{direction}axis")
        decades = np.log10(np.divide(*ticks.get_view_interval()[::-1]))
        steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
        ticks.set_major_locator(ticker.LogLocator(subs=steps))
        ticks.set_major_formatter(ticker.FuncFormatter(lambda value, _: _in_words(value)))
        ticks.set_minor_locator(ticker.NullLocator())


def _ticks_at(axis: plt.Axes, values: np.ndarray, log: bool) -> None:
    """Ticks at whole numbers only, and at the values themselves if these are few and apart."""
    if np.any(values % 1):
        return
    values = np.sort(values)
    apart = log or len(values) < 2 or np.diff(values).min() >= np.ptp(values) / 20
    if len(values) <= 12 and apart:
        axis.set_xticks(values, [f"{int(value):,}" for value in values])
    elif not log:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _in_words(value: object) -> str:
    """A tick's text: 5,000 and 0.001, not 5e+03 and 1e-03."""
    return f"{value:,.7g}" if isinstance(value, int | float) else str(value)
