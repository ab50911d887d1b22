"""Figures in one style: backprop blue, Forward-Forward orange, the seed's versions pale."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Image, display
from matplotlib.figure import Figure

from ff_utils.arms import ARMS
from ff_utils.live_bytes import CATEGORIES

MIB = 2**20
GIB = 2**30
BLUE, PALE_BLUE = "#1a6faf", "#9fc0dc"
ORANGE, PALE_ORANGE = "#d1541d", "#ecb795"
GREY = "#6b6b6b"
COLOURS = {
    "backprop": BLUE,
    "backprop_checkpoint": "#3f97c9",
    "backprop_optimizer_in_backward": "#2b4f81",
    "backprop_offload": "#5f8fb5",
    "backprop_micro_batches": "#1f9aa8",
    "backprop_frugal": "#0a3161",
    "backprop_streamed": "#4f4aa6",
    "backprop_streamed_frugal": "#8a86cf",
    "backprop_seed": PALE_BLUE,
    "ff_resident": ORANGE,
    "ff_hard_negatives": "#8f2f0a",
    "ff_hard_negatives_recomputed": "#c2571d",
    "ff_unsupervised": "#f0703a",
    "ff_local": "#a8501a",
    "ff_micro_batches": "#e58a1f",
    "ff_accumulated": "#c98a5e",
    "ff_streamed": "#b81f24",
    "ff_frugal": "#7d1533",
    "ff_layerwise": "#e0457b",
    "ff_seed": PALE_ORANGE,
    "ff_seed_uncached": "#dba183",
    "ff_recurrent": "#d8c08c",
    "ff_recurrent_analytic": "#b5761b",
    "ff_language": "#f2a35e",
    "backprop_language": "#7fb2d9",
}
POSITIVE, NEGATIVE = "#2a8c82", "#a5528f"
CATEGORY_COLOURS = dict(zip(CATEGORIES, [*sns.color_palette("colorblind", 5), GREY], strict=True))
INSTRUMENT_NAMES = {
    "tracked": "tracked: a real step's tensors",
    "rss": "rss: what the process takes",
    "cuda": "cuda: what the GPU's allocator gives",
}
# Shades of one scheme for any series that is not an arm.
SERIES = [ORANGE, BLUE, "#5b5f97", "#2a8c82", "#b8336a", GREY]
DPI = 140


def start(folder: Path) -> Callable[[Figure, str, str], None]:
    """Set the one style that every figure has; returns `show` for figures kept in `folder`."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.labelsize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "#e6e6e6",
            "axes.prop_cycle": matplotlib.cycler(color=SERIES),
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": DPI,
            "svg.hashsalt": "ff_utils",
            "svg.fonttype": "none",
            "font.family": "DejaVu Sans",
        },
    )
    return partial(show, folder=folder)


def show(figure: Figure, name: str, alt: str, folder: Path) -> None:
    """Save as `folder`/`name`.svg and .png and show it inline with `alt` as its description."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"Description": alt}
    tight = {"bbox_inches": "tight", "pad_inches": 0.08}
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, **about}, **tight)
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, format="png", metadata={"Software": None, **about}, **tight)
    (folder / f"{name}.png").write_bytes(png.getvalue())
    plt.close(figure)
    pixels = int.from_bytes(png.getvalue()[16:20], "big")
    display(Image(png.getvalue(), width=round(pixels * 90 / DPI), alt=alt))


def _note(figure: Figure, text: str) -> None:
    """Say below a figure what its numbers were measured with."""
    if text:
        y = -0.06 / figure.get_figheight()
        figure.text(0.01, y, text, fontsize=8.5, color=GREY, va="top")


# --- The algorithm --------------------------------------------------------------------------


def images(rows: torch.Tensor, shape: tuple[int, ...], titles: Sequence[str]) -> Figure:
    """A strip of grey-scale images (N, pixels)."""
    figure, axes = plt.subplots(1, len(rows), figsize=(1.9 * len(rows), 2.3), squeeze=False)
    for axis, row, title in zip(axes[0], rows, titles, strict=True):
        _image(axis, row, shape)
        axis.set_title(title, fontsize=10, loc="center", weight="normal")
    return figure


def _image(axis: plt.Axes, row: torch.Tensor, shape: tuple[int, ...]) -> None:
    pixels = row.reshape(shape).cpu()
    if len(shape) == 3:
        pixels = pixels.permute(1, 2, 0).clamp(0, 1)
    axis.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=float(row.max()) or 1)
    axis.set(xticks=[], yticks=[])
    sns.despine(ax=axis, left=True, bottom=True)
    axis.grid(False)


def goodness_histograms(
    panels: Sequence[tuple[str, torch.Tensor, torch.Tensor]],
    theta: float | None,
    title: str,
    columns: int = 4,
    share_x: bool = True,
) -> Figure:
    """Goodness of positive and negative samples, one panel each: (title, positive, negative)."""
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(max(2.9 * columns, 8), 2.6 * lines), sharex=share_x, squeeze=False
    )
    flat = axes.ravel()
    every = torch.cat([torch.cat(panel[1:]) for panel in panels]).cpu()
    for axis, (name, positive, negative) in zip(flat, panels, strict=False):
        seen = every if share_x else torch.cat([positive, negative]).cpu()
        low = 0.0 if share_x else float(seen.quantile(0.002))
        bins = np.linspace(low, float(seen.quantile(0.998)), 40)
        for values, colour, label in (
            (positive, POSITIVE, "positive"),
            (negative, NEGATIVE, "negative"),
        ):
            axis.hist(values.cpu(), bins, color=colour, alpha=0.65, label=label)
        if theta is not None:
            axis.axvline(theta, color=GREY, lw=1, ls="--", label=f"theta = {theta:g}")
        axis.set_title(name, fontsize=10, weight="normal")
        axis.set(yticks=[])
    for axis in flat[len(panels) :]:
        axis.remove()
    for axis in axes[-1]:
        axis.set_xlabel("goodness")
    axes[0, 0].set_ylabel("samples")
    axes[0, -1].legend(fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    return figure


def label_goodness(
    cases: Sequence[tuple[torch.Tensor, torch.Tensor, int]], shape: tuple[int, ...], title: str
) -> Figure:
    """For each case (image, goodness of each label, true label): the image beside ten bars."""
    figure, axes = plt.subplots(
        1, 2 * len(cases), figsize=(5 * len(cases), 2.6), width_ratios=[1, 2.4] * len(cases)
    )
    for case, (image, found, true) in enumerate(cases):
        picture, bars = axes[2 * case], axes[2 * case + 1]
        _image(picture, image, shape)
        chosen = int(found.argmax())
        colours = [ORANGE if k == chosen else PALE_ORANGE for k in range(len(found))]
        bars.bar(range(len(found)), found.cpu(), color=colours)
        bars.set(xticks=range(len(found)), xlabel="label tried", ylabel="goodness")
        verdict = "right" if chosen == true else "wrong"
        bars.set_title(f"says {chosen}, is {true}: {verdict}", fontsize=10, weight="normal")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    return figure


# --- Training -------------------------------------------------------------------------------


def curves(
    series: dict[str, pd.DataFrame],
    x: str,
    y: str,
    title: str,
    ylabel: str,
    colours: Sequence[str] = SERIES,
    log: bool = False,
    percent: bool = True,
) -> Figure:
    """One line a table, labelled at its end; x is "epoch" or "elapsed" (seconds)."""
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    ends = []
    for (name, table), colour in zip(series.items(), colours, strict=False):
        values = table[y] * (100 if percent else 1)
        axis.plot(table[x], values, color=colour, marker="o", ms=3.5, lw=2)
        ends.append((float(table[x].iloc[-1]), float(values.iloc[-1]), name, colour))
    if log:
        _log_ticks(axis, "y", (1, 1.5, 2, 3, 5, 7))
    if x == "epoch":
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    xlabel = {"elapsed": "seconds of training, evaluation apart"}.get(x, x)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _label_ends(axis, ends)
    return figure


def _label_ends(
    axis: plt.Axes, ends: list[tuple[float, float, str, str]], all_right: bool = False
) -> None:
    """Names at the right of the axes, at the height of their lines' ends, moved apart."""
    to_axes = axis.transAxes.inverted()
    axis.figure.canvas.draw()
    heights = [to_axes.transform(axis.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    gap = (0.06 if all_right else 0.075) * 3.8 / axis.figure.get_figheight()
    right = max(x for x, _, _, _ in ends)
    order = np.argsort(heights)
    placed: dict[int, float] = {}
    floor, ceiling = -np.inf, 0.95 + gap
    for position in order:
        floor = placed[position] = max(heights[position], floor + gap)
    for position in order[::-1]:  # those that were pushed out at the top push the others down
        ceiling = placed[position] = min(placed[position], ceiling - gap)
    for position, (x, y, name, colour) in enumerate(ends):
        if x < right and not all_right:  # a line that ends early carries its name at its end
            lowest = y <= min(other for _, other, _, _ in ends)
            axis.annotate(
                name,
                (x, y),
                xytext=(0, -8 if lowest else 8),
                textcoords="offset points",
                ha="center",
                va="top" if lowest else "bottom",
                color=colour,
                fontsize=10,
                weight="bold",
            )
            continue
        axis.annotate(
            name,
            xy=(x, y),
            xycoords="data",
            xytext=(1.03, placed[position]),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10,
            weight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 2,
            },
        )


def bars(
    values: dict[str, float],
    title: str,
    xlabel: str,
    colours: Sequence[str],
    spreads: dict[str, float] | None = None,
    form: str = "{:.2f}",
) -> Figure:
    """Horizontal bars with their numbers; `spreads` draws a standard deviation."""
    figure, axis = plt.subplots(figsize=(7.2, 0.6 + 0.45 * len(values)))
    names = list(values)
    errors = [spreads.get(name, 0) for name in names] if spreads else None
    axis.barh(names, list(values.values()), xerr=errors, color=colours, height=0.62)
    top = max(values.values())
    for row, name in enumerate(names):
        end = values[name] + (errors[row] if errors else 0)
        text = form.format(values[name])
        if errors and errors[row]:
            text += f" ± {form.format(errors[row])}"
        axis.text(end + 0.015 * top, row, text, va="center", fontsize=10)
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlabel=xlabel, title=title, xlim=(0, 1.22 * top))
    return figure


def confusion(matrix: torch.Tensor, title: str) -> Figure:
    """Counts of (true, predicted) classes, the right ones blanked so that errors show."""
    wrong = matrix.clone().fill_diagonal_(0).cpu().numpy()
    figure, axis = plt.subplots(figsize=(5.4, 4.4))
    sns.heatmap(
        wrong,
        annot=True,
        fmt="d",
        cmap="Oranges",
        mask=np.eye(len(wrong), dtype=bool),
        linewidths=0.5,
        cbar_kws={"label": "test images"},
        ax=axis,
        annot_kws={"fontsize": 9},
    )
    axis.set(xlabel="predicted", ylabel="true", title=title)
    axis.tick_params(rotation=0)
    axis.grid(False)
    return figure


# --- Memory ---------------------------------------------------------------------------------


def memory_lines(
    table: pd.DataFrame,
    *,
    title: str,
    note: str = "",
    log: bool = False,
    x: str = "depth",
    measured: pd.DataFrame | None = None,
    unit: tuple[str, int] = ("GiB", GIB),
) -> Figure:
    """Peak memory against "depth" or "batch" (`x`), one line an arm, labelled at its end.

    log: both axes for batch, the memory axis alone for depth.
    measured: what `reference.compared` gives; of the arms drawn here, circles over the lines.
    """
    name, size = unit
    figure, axis = plt.subplots(figsize=(8, 4.8))
    ends = []
    for arm, rows in table.groupby("arm", sort=False):
        rows = rows.sort_values(x)
        axis.plot(rows[x], rows.peak_bytes / size, color=COLOURS[arm], lw=2.4)
        end = rows.iloc[-1]
        ends.append((end[x], end.peak_bytes / size, ARMS[arm].title, COLOURS[arm]))
    if measured is not None and len(measured := measured[measured.arm.isin(table.arm)]):
        note += f"; circles: {measured.gpu.iloc[0]}, peak of its allocator"
        axis.scatter(
            measured.depth,
            measured.measured / size,
            facecolors="none",
            edgecolors=[COLOURS[arm] for arm in measured.arm],
            s=55,
            lw=1.6,
            zorder=3,
        )
    if log and x != "depth":
        axis.set_xscale("log")
    ticks = sorted(table[x].unique())
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.tick_params(axis="x", which="minor", bottom=False)
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    else:
        axis.set_ylim(bottom=0)
    xlabel = {"depth": "hidden layers", "batch": "rows a step"}[x]
    axis.set(xlabel=xlabel, ylabel=f"peak memory of a training step ({name})", title=title)
    _label_ends(axis, ends)
    _note(figure, note)
    return figure


def panels_of_lines(
    panels: dict[str, pd.DataFrame], *, title: str, note: str = "", columns: int = 2
) -> Figure:
    """Peak memory against depth in panels on one scale, lines labelled in the panel."""
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 3.1 * lines), sharex=True, sharey=True
    )
    for axis, (name, table) in zip(axes.ravel(), panels.items(), strict=True):
        for arm, rows in table.groupby("arm", sort=False):
            sizes = rows.sort_values("depth")
            label = sizes["label"].iloc[0] if "label" in sizes else ARMS[arm].title
            axis.plot(sizes.depth, sizes.peak_bytes / GIB, color=COLOURS[arm], lw=2.4, label=label)
        axis.legend(fontsize=8.5, loc="upper left")
        axis.set_title(name, fontsize=10, weight="normal")
    for axis in axes[-1]:
        axis.set_xlabel("hidden layers")
    for axis in axes[:, 0]:
        axis.set_ylabel("peak memory (GiB)")
    axes[0, 0].set_ylim(bottom=0)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    _note(figure, note)
    return figure


def saving_map(saved: pd.DataFrame, *, title: str, note: str = "") -> Figure:
    """Share of memory saved, in each cell of `saved`: depths down, batch sizes across."""
    figure, axis = plt.subplots(figsize=(7.6, 0.42 * len(saved) + 1.8))
    sns.heatmap(
        100 * saved,
        annot=True,
        fmt=".0f",
        cmap="PuOr_r",
        center=0,
        vmin=-60,
        vmax=60,
        linewidths=0.5,
        cbar_kws={"label": "% saved by FF"},
        annot_kws={"fontsize": 9},
        ax=axis,
    )
    axis.set(xlabel="rows a step", ylabel="hidden layers", title=title)
    axis.set_xticklabels([f"{int(label.get_text()):,}" for label in axis.get_xticklabels()])
    axis.tick_params(rotation=0)
    axis.grid(False)
    _note(figure, note)
    return figure


def memory_and_time(table: pd.DataFrame, *, title: str, note: str = "") -> Figure:
    """Peak memory of a step against seconds per 1000 images, one point an arm.

    Filled, joined by a line: the Pareto front, arms that no other beats in both.
    """
    figure, axis = plt.subplots(figsize=(7.2, 5.2))
    front = pareto_front(table)
    axis.plot(front.per_1000_images, front.peak_bytes / MIB, color=GREY, lw=1.2, ls="--", zorder=1)
    ends = []
    for row in table.itertuples():
        place, colour = (row.per_1000_images, row.peak_bytes / MIB), COLOURS[row.arm]
        inside = colour if row.arm in set(front.arm) else "white"
        axis.scatter(*place, s=70, color=inside, edgecolors=colour, lw=1.8, zorder=3)
        ends.append((*place, ARMS[row.arm].title, colour))
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.06, y=0.1)
    axis.set(xlabel="seconds for 1000 images", ylabel="peak memory of a step (MiB)", title=title)
    _label_ends(axis, ends, all_right=True)
    _note(figure, note)
    return figure


def pareto_front(
    table: pd.DataFrame, x: str = "per_1000_images", y: str = "peak_bytes"
) -> pd.DataFrame:
    """The rows that no other beats in both `x` and `y`, the least `x` first."""
    ordered = table.dropna(subset=[x, y]).sort_values([x, y])
    best = ordered[y].astype(float).cummin().shift(fill_value=float("inf"))
    return ordered[ordered[y] < best]


def memory_bars(table: pd.DataFrame, *, title: str, note: str = "") -> Figure:
    """The seed's bar chart: arms side by side at every depth."""
    figure, axis = plt.subplots(figsize=(8, 4))
    arms = list(table.arm.unique())
    depths = sorted(table.depth.unique())
    width = 0.8 / len(arms)
    for position, arm in enumerate(arms):
        rows = table[table.arm == arm].set_index("depth").loc[depths]
        places = np.arange(len(depths)) + (position - (len(arms) - 1) / 2) * width
        axis.bar(places, rows.peak_bytes / GIB, width, color=COLOURS[arm], label=ARMS[arm].title)
    axis.set_xticks(range(len(depths)), depths)
    axis.set(xlabel="hidden layers", ylabel="peak memory (GiB)", title=title)
    axis.legend(loc="upper left")
    _note(figure, note)
    return figure


def breakdown(table: pd.DataFrame, *, title: str, note: str = "") -> Figure:
    """What the peak is made of: one stacked bar a row of `table`, an arm's, by category."""
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.5 * len(table)))
    names = [ARMS[arm].title for arm in table.arm]
    left = np.zeros(len(table))
    for category in CATEGORIES:
        sizes = table[category].to_numpy(float) / MIB
        axis.barh(
            names,
            sizes,
            left=left,
            color=CATEGORY_COLOURS[category],
            label=_category_name(category),
            height=0.65,
            lw=0,
        )
        left += sizes
    for row, total in enumerate(left):
        axis.text(total * 1.005, row, f" {total:,.0f}", va="center", fontsize=9)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlabel="MiB at the peak", title=title, xlim=(0, 1.1 * left.max()))
    figure.legend(ncols=6, fontsize=8.5, loc="outside upper left", columnspacing=1, handlelength=1)
    _note(figure, note)
    return figure


def anatomy(
    timelines: dict[str, list[tuple[str, dict[str, int]]]], *, title: str, note: str = ""
) -> Figure:
    """Live bytes through one training step, stacked by category, one panel an arm, one scale."""
    figure, axes = plt.subplots(
        1, len(timelines), figsize=(3.6 * len(timelines), 3.8), sharey=True, squeeze=False
    )
    for axis, (arm, steps) in zip(axes[0], timelines.items(), strict=True):
        sizes = {c: np.array([live[c] for _, live in steps]) / MIB for c in CATEGORIES}
        axis.stackplot(
            np.arange(1, len(steps) + 1),
            *sizes.values(),
            colors=[CATEGORY_COLOURS[c] for c in CATEGORIES],
            labels=[_category_name(c) for c in CATEGORIES],
            step="post",
            lw=0,
            rasterized=True,
        )
        total = sum(sizes.values())
        peak = int(total.argmax())
        axis.annotate(
            f"peak {total[peak]:,.0f} MiB",
            (peak + 1, total[peak]),
            xytext=(0, 7),
            textcoords="offset points",
            ha=("left", "center", "center", "right")[4 * peak // len(steps)],
            fontsize=9.5,
            weight="bold",
        )
        axis.set(xlabel="operation", xlim=(1, len(steps)))
        axis.set_title(ARMS[arm].title, color=COLOURS[arm], fontsize=11)
        axis.margins(y=0.12)
    axes[0, 0].set_ylabel("live memory (MiB)")
    # The last panel is the flattest: its sky is free.
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, -1].legend(handles[::-1], labels[::-1], fontsize=9, loc="upper right")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    _note(figure, note)
    return figure


def _category_name(category: str) -> str:
    names = {"optimizer_state": "Adam's moments", "inputs": "inputs, cached data"}
    return names.get(category, category)


def _family(arm: str) -> tuple[str, str]:
    if "seed" in ARMS[arm].title:
        return "the seed's", PALE_BLUE
    return ("backprop", BLUE) if arm.startswith("backprop") else ("FF", ORANGE)


def predicted_and_measured(table: pd.DataFrame, title: str) -> Figure:
    """Every measured peak against its closed form, one panel an instrument, with y = x."""
    instruments = list(table.instrument.unique())
    figure, axes = plt.subplots(
        1, len(instruments), figsize=(4.4 * len(instruments), 4.2), squeeze=False
    )
    for axis, instrument in zip(axes[0], instruments, strict=True):
        rows = table[table.instrument == instrument]
        for (family, colour), points in rows.groupby(rows.arm.map(_family), sort=False):
            place = points.predicted_bytes / MIB, points.peak_bytes / MIB
            axis.scatter(*place, color=colour, label=family, s=42, alpha=0.7)
        ends = [rows.predicted_bytes.min() / MIB * 0.8, rows.predicted_bytes.max() / MIB * 1.25]
        axis.plot(ends, ends, color=GREY, lw=1, ls="--", zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="closed form (MiB)", ylabel="measured (MiB)")
        axis.set_title(INSTRUMENT_NAMES[instrument], fontsize=11)
    axes[0, 0].legend(loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    return figure


def points(
    table: pd.DataFrame, x: str, y: str, title: str, xlabel: str, ylabel: str, note: str = ""
) -> Figure:
    """Named points (columns name, colour): error against memory, say."""
    figure, axis = plt.subplots(figsize=(7.2, 4))
    for row in table.itertuples():
        place = (getattr(row, x), getattr(row, y))
        axis.scatter(*place, color=row.colour, s=90, zorder=3)
        axis.annotate(
            row.name,
            place,
            xytext=(9, 5),
            textcoords="offset points",
            color=row.colour,
            fontsize=10,
            weight="bold",
        )
    ends = {"xlim": (0, 1.25 * table[x].max()), "ylim": (0, 1.25 * table[y].max())}
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, **ends)
    _note(figure, note)
    return figure


# --- Past one machine -----------------------------------------------------------------------


def pipelines(
    measured: Sequence[Sequence[tuple[float, float]]],
    computed: Sequence[Sequence[tuple[float, float, str]]],
    *,
    title: str,
    note: str = "",
) -> Figure:
    """Ranks at work over time: FF as measured, above backprop as computed, one row a rank.

    measured: (start, end) of every batch on each rank, numbered as drawn; computed: (start, end,
    "forward" or "backward"). Seconds; the first rank is at the bottom, as its layers are.
    """
    figure, axes = plt.subplots(
        2, 1, figsize=(8, 1.6 + 0.9 * len(measured)), sharex=True, sharey=True
    )
    for rank, (spans, parts) in enumerate(zip(measured, computed, strict=True)):
        for batch, (start, end) in enumerate(spans):
            colour = (ORANGE, PALE_ORANGE)[batch % 2]
            axes[0].barh(rank, end - start, left=start, color=colour, height=0.8, lw=0)
            place = {"ha": "center", "va": "center", "fontsize": 8}
            axes[0].text((start + end) / 2, rank, str(batch + 1), **place)
        for start, end, kind in parts:
            colour = BLUE if kind == "forward" else PALE_BLUE
            label = kind if rank == 0 and kind not in axes[1].get_legend_handles_labels()[1] else ""
            bar = {"color": colour, "height": 0.8, "lw": 0.4, "edgecolor": "white"}
            axes[1].barh(rank, end - start, left=start, label=label, **bar)
    for axis in axes:
        axis.set_yticks(range(len(measured)), [f"rank {rank}" for rank in range(len(measured))])
        axis.grid(False)
    axes[0].set_title("Forward-Forward, measured: batches, by number", fontsize=10, weight="normal")
    name = "backpropagation, computed from the same times: parts of as many batches"
    axes[1].set_title(name, fontsize=10, weight="normal")
    axes[1].set_xlabel("seconds")
    figure.legend(ncols=2, fontsize=8.5, loc="outside upper right")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    _note(figure, note)
    return figure


# --- Sweeps ---------------------------------------------------------------------------------


def sweep_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    note: str = "",
    log: str = "",
) -> Figure:
    """`y` against `x`, one line for each value of `by`: the mean of all its rows (seeds, say) at
    an `x`, and a band from the least to the most of them. log: the axes to draw so, "x", "xy"."""
    figure, axis = plt.subplots(figsize=(8, 4.6))
    ends = []
    for number, (name, rows) in enumerate(table.dropna(subset=[y]).groupby(by, sort=False)):
        spread = rows.groupby(x)[y].agg(["mean", "min", "max"])
        label, colour = _series(name, number)
        axis.plot(spread.index, spread["mean"], color=colour, marker="o", ms=4, lw=2.2)
        axis.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.18)
        ends.append((spread.index[-1], spread["mean"].iloc[-1], label, colour))
    for direction in log:
        _log_ticks(axis, direction)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _label_ends(axis, ends)
    _note(figure, note)
    return figure


def sweep_map(
    table: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    title: str,
    label: str,
    note: str = "",
    form: str = ".3g",
    centre: float | None = None,
) -> Figure:
    """The mean of `value` in each cell of two parameters, `x` across and `y` down; a cell without
    any is empty. centre: the value that is neither good nor bad."""
    cells = table.dropna(subset=[value]).pivot_table(index=y, columns=x, values=value)
    cells = cells.reindex(index=sorted(table[y].unique()), columns=sorted(table[x].unique()))
    size = (max(6, 0.85 * len(cells.columns) + 2.4), max(3, 0.5 * len(cells) + 1.8))
    figure, axis = plt.subplots(figsize=size)
    sns.heatmap(
        cells.astype(float),
        annot=True,
        fmt=form,
        cmap="cividis_r" if centre is None else "PuOr_r",
        center=centre,
        linewidths=0.5,
        cbar_kws={"label": label},
        annot_kws={"fontsize": 9},
        ax=axis,
    )
    axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), title=title)
    axis.tick_params(rotation=0)
    axis.grid(False)
    _note(figure, note)
    return figure


def sweep_front(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    note: str = "",
) -> Figure:
    """Every row at its `x` and `y`, `by` as colours. Filled, joined by a line: the Pareto front,
    rows that no other beats in both."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    front = pareto_front(table, x, y)
    axis.plot(front[x], front[y], color=GREY, lw=1.2, ls="--", zorder=1)
    for number, (name, rows) in enumerate(table.groupby(by, sort=False)):
        label, colour = _series(name, number)
        inside = [colour if found else "white" for found in rows.index.isin(front.index)]
        axis.scatter(rows[x], rows[y], s=55, color=inside, edgecolors=colour, lw=1.6, zorder=3)
        axis.scatter([], [], s=55, color=colour, label=label)
    _log_ticks(axis, "x")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend()
    _note(figure, note)
    return figure


def _log_ticks(axis: plt.Axes, direction: str, steps: Sequence[float] = (1, 2, 5)) -> None:
    axis.set(**{f"{direction}scale": "log"})
    ticks = getattr(axis, f"{direction}axis")
    ticks.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
    ticks.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ticks.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _series(name: object, number: int) -> tuple[str, str]:
    """What a series is called and its colour: an arm's own, else the next of the style's."""
    if name in COLOURS:
        return ARMS[name].title, COLOURS[name]
    return str(name), SERIES[number % len(SERIES)]
