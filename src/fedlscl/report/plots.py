"""Figures of a report."""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedlscl.callbacks.formatting import MASK_TITLES, in_bytes, percent
from fedlscl.report.groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


# How all figures look, and their bytes: the same for the same runs.

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Okabe and Ito's palette for the colour-blind, whose black and yellow would vanish on one of two backgrounds."""
MARKERS = "osD^vP*Xh<>"
"""A second sign for each method; with the colours they repeat after 77."""
DASHES = ("-", "--", ":")
INK, PAPER, RULE = "#1f2430", "#fffffe", "#8b90a0"
"""Of text, background and grid; the page exchanges the first two for its own."""
WIDTH = 4.7
"""Inches: 10 points stay readable on a telephone."""
LONGEST_NAME = 34
RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.hashsalt": "fedlscl",
    "svg.fonttype": "path",
}


class Picture(NamedTuple):
    """A figure as it is written and shown."""

    name: str
    """Of its files, without a suffix."""
    caption: str
    alt: str
    """What it shows, in words and numbers."""
    svg: bytes
    png: bytes


class Look(NamedTuple):
    """How a group is drawn, in every figure."""

    colour: str
    marker: str
    dash: str


def looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Colour, marker and dash by group; in alphabetical order, so that results do not change them."""
    names = sorted(group.name for group in groups)
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, name in enumerate(names)
    }


def styled() -> AbstractContextManager[None]:
    """Matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    from matplotlib import style

    return style.context(["default", RC])


def picture(name: str, caption: str, alt: str, draw: Callable[["Figure"], None], height: float) -> Picture:
    """Draw a figure of ``WIDTH`` x ``height`` inches and save it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        files = {}
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            files[kind] = buffer.getvalue()
    return Picture(name, caption, alt, files["svg"], files["png"])


def legend(figure: "Figure", handles: list["Line2D"], names: list[str]) -> None:
    """Names below the axes."""
    texts = [shown(name) for name in names]
    figure.legend(handles, texts, loc="outside lower center", ncols=_legend_columns(names))


def legend_height(names: list[str]) -> float:
    """Inches that `legend` takes."""
    return 0.2 * -(-len(names) // _legend_columns(names)) + 0.15


def _legend_columns(names: list[str]) -> int:
    return 1 if max(len(shown(name)) for name in names) > 26 else 2


def shown(name: str) -> str:
    """A name that fits, and that matplotlib does not take for a hidden one.

    Example:
        >>> shown("FedAvg"), shown("a" * 40)
        ('FedAvg', 'aaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaa')
    """
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2 - 1]}…{name[-LONGEST_NAME // 2 :]}"
    return f" {name}" if name.startswith("_") else name


def percent_axis(axes: "Axes", label: str) -> None:
    """Ticks of fractions in percent."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g}")
    axes.set_ylabel(label)


def for_page(svg: bytes, prefix: str) -> str:
    """An SVG element that takes the page's text colour, has no background, and names that are unique in the page."""
    text = svg.decode()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Nothing refers to images, and equal ones have equal names.
    text = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"<svg \1", text, count=1)
    return re.sub(r"\n\s*", "\n", text.replace(INK, "currentColor").replace(PAPER, "none"))


# Figures with one line or one point per method: accuracy and forgetting over tasks, accuracy against cost.

HEIGHT = 2.9
"""Of axes in inches, without the legend."""
COURSES = {"average": ("accuracy", "accuracy over all tasks so far"), "forgetting": ("forgetting", "forgetting")}
"""Name of the files and words, by the summary's name."""
COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "up_bytes": ("bytes", "bytes uploaded by all clients", in_bytes),
    "total_seconds": (
        "seconds",
        "seconds of the whole run",
        lambda value: f"{value:.3g} s" if value < 100 else f"{value:.0f} s",
    ),
}


def over_tasks(groups: Sequence[Group], course: str, mask: str) -> Picture:
    """The mean over seeds after each task, with a band of one standard deviation where there are several."""
    file, what = COURSES[course]
    values = {group.name: group.course(f"{mask}/{course}") for group in groups}
    # Nothing can be forgotten after the first task.
    first = 1 if course == "forgetting" and max(group.tasks for group in groups) > 1 else 0

    def draw(figure: "Figure") -> None:
        axes, handles, styles = figure.subplots(), [], looks(groups)
        for name, seeds in values.items():
            look, tasks = styles[name], range(first + 1, seeds.shape[1] + 1)
            mean = seeds.mean(0)[first:]
            handles += axes.plot(tasks, mean, color=look.colour, marker=look.marker, linestyle=look.dash)
            if len(seeds) > 1:
                deviation = seeds.std(0, ddof=1)[first:]
                axes.fill_between(tasks, mean - deviation, mean + deviation, color=look.colour, alpha=0.15, linewidth=0)
        if course == "forgetting":
            axes.axhline(0, color=RULE, linewidth=1)
        last = max(group.tasks for group in groups)
        axes.set_xticks(range(first + 1, last + 1, -(-last // 12)))
        axes.set_xlim(first + 0.8, last + 0.2)
        axes.set_xlabel("after learning task")
        percent_axis(axes, f"{what}, %")
        legend(figure, handles, list(values))

    ends = ", ".join(f"{name} {percent(float(seeds[:, -1].mean()))} %" for name, seeds in values.items())
    return picture(
        f"{file}_{mask}",
        f"{what.capitalize()}, {MASK_TITLES[mask]}",
        f"Line chart of {what}, {MASK_TITLES[mask]}, after each task. After the last one: {ends}.",
        draw,
        HEIGHT + legend_height(list(values)),
    )


def against_cost(groups: Sequence[Group], cost: str, mask: str) -> Picture | None:
    """Final accuracy by what the whole run cost, on a logarithmic axis; None where no run has such a cost.

    A run whose cost is zero has no place on that axis: its accuracy is a dashed line.
    """
    file, what, unit = COSTS[cost]
    found = {group.name: (group.final(cost), group.final(f"{mask}/average")) for group in groups}
    known = {name: (spent, reached) for name, (spent, reached) in found.items() if spent and reached}
    if not any(spent.mean > 0 for spent, _ in known.values()):
        return None

    def draw(figure: "Figure") -> None:
        axes, handles, styles = figure.subplots(), [], looks(groups)
        for name, (spent, reached) in known.items():
            look = styles[name]
            if spent.mean > 0:
                handles += axes.plot(spent.mean, reached.mean, look.marker, color=look.colour, alpha=0.85, markersize=9)
                axes.errorbar(
                    spent.mean,
                    reached.mean,
                    reached.deviation,
                    spent.deviation,
                    "none",
                    ecolor=look.colour,
                    elinewidth=1.2,
                )
            else:
                handles.append(axes.axhline(reached.mean, color=look.colour, linestyle="--"))
        _logarithmic(axes, [spent.mean for spent, _ in known.values() if spent.mean > 0], unit)
        axes.margins(y=0.12)
        axes.set_xlabel(what)
        percent_axis(axes, "final accuracy, %")
        names = [name if spent.mean > 0 else f"{name} (none)" for name, (spent, _) in known.items()]
        legend(figure, handles, names)

    points = ", ".join(
        f"{name} {percent(reached.mean)} % at {unit(spent.mean)}" for name, (spent, reached) in known.items()
    )
    return picture(
        f"{file}_{mask}",
        f"Final accuracy, {MASK_TITLES[mask]}, against {what}",
        f"Scatter plot of final accuracy, {MASK_TITLES[mask]}, against {what}: {points}.",
        draw,
        HEIGHT + legend_height(list(known)),
    )


def _logarithmic(axes: "Axes", values: Sequence[float], unit: Callable[[float], str]) -> None:
    """Wide enough to hold a tick at 1, 2 or 5 times a power of ten on either side."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 2.5, high * 2.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 8 * low else (1.0,), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: unit(value).replace(".0 ", " "))


# Figures with one small panel per method: accuracy matrices, and clients from the worst to the best.

PANEL_COLUMNS = 2
MOST_DECIMALS, MOST_NUMBERS = 5, 10
"""Cells or bars per side up to which values have a decimal, and up to which they are printed."""


def matrices(groups: Sequence[Group], mask: str) -> Picture:
    """Row n is the model after task n, column t its accuracy on task t; mean over clients and seeds."""
    values = {group.name: group.matrix(mask) for group in groups}
    lowest = np.floor(10 * min(np.nanmin(matrix) for matrix in values.values())) / 10

    def draw(figure: "Figure") -> None:
        panels, images = _panels(figure, list(values)), []
        for panel, (name, matrix) in zip(panels, values.items(), strict=False):
            images.append(panel.imshow(matrix, cmap="YlGnBu", vmin=lowest, vmax=1))
            panel.set_title(shown(name), fontsize=9)
            _cells(panel, matrix, middle=(lowest + 1) / 2)
        figure.supxlabel("accuracy on task", fontsize=9)
        figure.supylabel("after learning task", fontsize=9)
        bar = figure.colorbar(
            images[0], ax=panels, location="top", shrink=0.7, aspect=30, format=lambda v, _: f"{100 * v:g}"
        )
        bar.set_label("accuracy, %", fontsize=9)
        bar.outline.set_visible(False)

    ends = "; ".join(f"{name} {', '.join(map(percent, m[-1].tolist()))}" for name, m in values.items())
    return picture(
        f"matrix_{mask}",
        f"Accuracy matrices, {MASK_TITLES[mask]}",
        f"Heat maps of accuracy on each task after each task, {MASK_TITLES[mask]}. After the last, in percent: {ends}.",
        draw,
        _height(len(values), 2.15) + 0.7,
    )


def clients(groups: Sequence[Group], mask: str) -> Picture:
    """Final accuracy of every client, worst first; over seeds the mean of each rank, and a dot per seed."""
    values = {group.name: group.ranked_clients(mask) for group in groups}

    def draw(figure: "Figure") -> None:
        panels, styles = _panels(figure, list(values), sharey=True), looks(groups)
        for panel, group in zip(panels, groups, strict=False):
            _bars(panel, group, values[group.name], styles[group.name].colour)
            is_single = len(group.runs) == 1
            order = np.argsort(group.runs[0].client_averages(mask), kind="stable") if is_single else []
            ranks = range(len(values[group.name][0]))
            panel.set_xticks(ranks, [str(c) for c in order] or [f"{rank + 1}." for rank in ranks], fontsize=8)
        single = all(len(group.runs) == 1 for group in groups)
        figure.supxlabel("client, worst first" if single else "client's rank, worst first", fontsize=9)
        figure.supylabel("final accuracy, %", fontsize=9)

    ends = ", ".join(f"{name} {percent(float(v[:, 0].mean()))} %" for name, v in values.items())
    return picture(
        f"clients_{mask}",
        f"Clients, {MASK_TITLES[mask]}; the worst is hatched",
        f"Bars of every client's final accuracy, {MASK_TITLES[mask]}. Worst clients: {ends}.",
        draw,
        _height(len(values), 1.75),
    )


def _panels(figure: "Figure", names: list[str], sharey: bool = False) -> list["Axes"]:
    rows = -(-len(names) // PANEL_COLUMNS)
    grid = figure.subplots(rows, PANEL_COLUMNS, squeeze=False, sharey=sharey).ravel().tolist()
    for panel in grid:
        panel.grid(False)
    for unused in grid[len(names) :]:
        unused.remove()
    return grid[: len(names)]


def _height(panels: int, each: float) -> float:
    return each * -(-panels // PANEL_COLUMNS) + 0.35


def _cells(panel: "Axes", matrix: np.ndarray, middle: float) -> None:
    size = len(matrix)
    ticks = range(0, size, max(1, size // 5))
    names = [str(tick + 1) for tick in ticks]
    panel.set_xticks(ticks, names, fontsize=8)
    panel.set_yticks(ticks, names, fontsize=8)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    if size > MOST_NUMBERS:
        return
    for n, t in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
        text = _number(float(matrix[n, t]), size)
        colour = "#ffffff" if matrix[n, t] > middle else "#10233f"
        panel.text(t, n, text, ha="center", va="center", fontsize=7.5, color=colour)


def _bars(panel: "Axes", group: Group, ranked: np.ndarray, colour: str) -> None:
    heights, size = ranked.mean(0), ranked.shape[1]
    bars = panel.bar(range(size), heights, color=colour, width=0.8)
    bars[0].set(hatch="////", edgecolor=INK, linewidth=0.8)
    if len(ranked) > 1:
        places = np.broadcast_to(np.arange(size), ranked.shape)
        panel.scatter(places, ranked, s=7, color=INK, zorder=3, linewidths=0)
    tops = ranked.max(0)
    for rank in range(size) if size <= MOST_NUMBERS else (0,):
        label = _number(heights[rank], size)
        panel.text(rank, tops[rank] + 0.015, label, ha="center", va="bottom", fontsize=7.5)
    panel.set_ylim(0, 1.12)
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.tick_params(labelsize=8)
    panel.set_title(shown(group.name), fontsize=9)


def _number(value: float, size: int) -> str:
    return f"{100 * value:.1f}" if size <= MOST_DECIMALS and value < 0.9995 else f"{100 * value:.0f}"
