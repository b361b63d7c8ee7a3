"""Figures of a report; the same runs give the same bytes."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fedlscl.callbacks.formatting import MASK_TITLES, in_bytes, percent
from fedlscl.callbacks.tensorboard import heat_map, in_cell
from fedlscl.report.groups import ALL_UP, READOUTS, Group, Spread

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Okabe and Ito's palette for the colour-blind, without black and yellow, which vanish on one of two backgrounds."""
MARKERS = "osD^vP*Xh<>"
DASHES = ("-", "--", ":")
INK, PAPER, RULE = "#1f2430", "#fffffe", "#8b90a0"
"""Of text, background and grid; the page replaces the first two by its own."""
WIDTH, HEIGHT = 4.7, 2.9
"""Inches of a figure and of its axes: 10 points stay readable on a phone."""
MAX_NAME = 34
MAX_NUMBERS = 10
"""Tasks or clients up to which values are printed; they have a decimal up to half as many."""
COURSES = {"average": ("accuracy", "accuracy over all tasks so far"), "forgetting": ("forgetting", "forgetting")}
"""File name and title, by the summary's name."""
RC: dict[str, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "legend.fontsize": 9}
RC |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
RC |= dict.fromkeys(("figure.facecolor", "savefig.facecolor"), PAPER)
RC |= dict.fromkeys(("text.parse_math", "axes.spines.top", "axes.spines.right", "legend.frameon"), False)
RC |= {"axes.grid": True, "axes.facecolor": "none", "grid.color": RULE, "grid.alpha": 0.35, "grid.linewidth": 0.6}
RC |= {"lines.linewidth": 1.8, "lines.markersize": 5.5, "figure.dpi": 100, "savefig.dpi": 160}
RC |= {"figure.constrained_layout.use": True, "figure.figsize": (WIDTH, HEIGHT)}
RC |= {"svg.hashsalt": "fedlscl", "svg.fonttype": "path"}
styled = style.context(["default", RC])
"""Decorator of functions that draw: without the user's matplotlibrc."""


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "up_bytes": ("bytes", "bytes uploaded by all clients", in_bytes),
    "total_seconds": ("seconds", "seconds of the whole run", _seconds),
}
"""File name, title and unit, by the name of the figure."""


class Picture(NamedTuple):
    """A drawn figure."""

    name: str
    """File name without a suffix."""
    caption: str
    alt: str
    """Its content in words and numbers."""
    svg: bytes
    png: bytes


@styled
def over_tasks(groups: Sequence[Group], course: str, mask: str) -> Picture:
    """Mean over seeds after each task; a band of one standard deviation if there are several seeds."""
    file, what = COURSES[course]
    last = max(group.tasks for group in groups)
    # There is no forgetting after the first task.
    first = 1 if course == "forgetting" and last > 1 else 0
    figure, styles, ends = Figure(), looks(groups), []
    axes = figure.subplots()
    for group in groups:
        colour, marker, dash = styles[group.name]
        seeds = group.course(f"{mask}/{course}")
        tasks, mean = range(first + 1, group.tasks + 1), seeds.mean(0)[first:]
        axes.plot(tasks, mean, color=colour, marker=marker, linestyle=dash, label=shown(group.name))
        if len(seeds) > 1:
            deviation = seeds.std(0, ddof=1)[first:]
            axes.fill_between(tasks, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        ends.append(f"{group.name} {percent(float(seeds[:, -1].mean()))} %")
    if course == "forgetting":
        axes.axhline(0, color=RULE, linewidth=1)
    axes.set_xticks(range(first + 1, last + 1, -(-last // 12)))
    axes.set(xlim=(first + 0.8, last + 0.2), xlabel="after learning task", ylabel=f"{what}, %")
    title = f"{what.capitalize()}, {MASK_TITLES[mask]}"
    alt = f"Line chart of {what}, {MASK_TITLES[mask]}, after each task. After the last one: {', '.join(ends)}."
    return _chart(figure, f"{file}_{mask}", title, alt)


@styled
def against_cost(groups: Sequence[Group], cost: str, mask: str, readout: str = "") -> Picture | None:
    """Final accuracy by the cost of the whole run, on a logarithmic axis; None if no run has such a cost.

    With a readout, hollow markers are own heads, filled ones the readout, at the bytes of method and readouts. A run
    whose cost is zero is a dashed line at its accuracy.
    """
    file, what, unit = COSTS[cost]
    points: dict[str, list[tuple[Spread, Spread]]] = {}
    for group in groups:
        pairs = [(group.final(cost), group.final(f"{mask}/average"))]
        pairs += [(group.final(ALL_UP), group.final(f"{READOUTS}{readout}/{mask}"))] if readout else []
        if found := [(spent, reached) for spent, reached in pairs if spent and reached]:
            points[group.name] = found
    positive = [spent.mean for found in points.values() for spent, _ in found if spent.mean > 0]
    if not positive:
        return None
    figure, styles, words = Figure(), looks(groups), []
    axes = figure.subplots()
    for name, found in points.items():
        colour, marker, _ = styles[name]
        drawn = []
        for number, ((x, dx), (y, dy)) in enumerate(found):
            if x > 0:
                face = "none" if readout and number == 0 else colour
                drawn += axes.plot(x, y, marker, color=colour, mfc=face, alpha=0.85, markersize=9)
                axes.errorbar(x, y, dy, dx, "none", ecolor=colour, elinewidth=1.2)
            else:
                drawn.append(axes.axhline(y, color=colour, linestyle="--"))
            words.append(f"{name}{' with the readout' * bool(number)} {percent(y)} % at {unit(x)}")
        drawn[-1].set_label(shown(name if any(spent.mean > 0 for spent, _ in found) else f"{name} (none)"))
        if len(found) > 1 and found[0][0].mean > 0:
            (x, y), (x1, y1) = ((spent.mean, reached.mean) for spent, reached in found)
            axes.plot([x, x1], [y, y1], color=colour, linewidth=0.8, alpha=0.6)
    # Wide enough for a tick at 1, 2 or 5 times a power of ten on either side.
    low, high = min(positive), max(positive)
    axes.set(xscale="log", xlim=(low / 2.5, high * 2.5), xlabel=what, ylabel="final accuracy, %")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 8 * low else (1.0,), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: unit(value).replace(".0 ", " "))
    axes.margins(y=0.12)
    whose = f"Final accuracy of own heads and {readout}" if readout else "Final accuracy"
    title = f"{whose}, {MASK_TITLES[mask]}, against {what}"
    alt = f"Scatter plot of {title[0].lower()}{title[1:]}: {', '.join(words)}."
    return _chart(figure, "_".join([file, *re.findall(r"\w+", readout), mask]), title, alt)


@styled
def matrices(groups: Sequence[Group], mask: str) -> Picture:
    """Row n is the model after task n, column t its accuracy on task t; mean over clients and seeds."""
    values = [group.matrix(mask) for group in groups]
    lowest = np.floor(10 * min(np.nanmin(matrix) for matrix in values)) / 10
    figure, panels = _panels(groups, 2.15, 1.05)
    ends = []
    for panel, group, matrix in zip(panels, groups, values, strict=True):
        heat_map(panel, matrix, lowest, MAX_NUMBERS)
        ends.append(f"{group.name} {', '.join(map(percent, matrix[-1].tolist()))}")
    figure.supxlabel("accuracy on task", fontsize=9)
    figure.supylabel("after learning task", fontsize=9)
    bar = figure.colorbar(panels[0].images[0], ax=panels, format=_tick, location="top", shrink=0.7, aspect=30)
    bar.set_label("accuracy, %", fontsize=9)
    bar.outline.set_visible(False)
    alt = f"Heat maps of accuracy on each task after each task, {MASK_TITLES[mask]}. After the last, in percent: "
    return picture(figure, f"matrix_{mask}", f"Accuracy matrices, {MASK_TITLES[mask]}", f"{alt}{'; '.join(ends)}.")


@styled
def clients(groups: Sequence[Group], mask: str) -> Picture:
    """Final accuracy of every client, worst first; over seeds the mean of each rank, and a dot per seed."""
    figure, panels = _panels(groups, 1.75, 0.35, sharey=True)
    styles, ends = looks(groups), []
    for panel, group in zip(panels, groups, strict=True):
        ranked = group.ranked_clients(mask)
        heights, size = ranked.mean(0), ranked.shape[1]
        bars = panel.bar(range(size), heights, color=styles[group.name][0], width=0.8)
        bars[0].set(hatch="////", edgecolor=INK, linewidth=0.8)
        first, *others = group.runs
        names = [str(client) for client in np.argsort(first.client_averages(mask), kind="stable")]
        if others:
            names = [f"{rank + 1}." for rank in range(size)]
            ranks = np.broadcast_to(np.arange(size), ranked.shape)
            panel.scatter(ranks, ranked, s=7, color=INK, zorder=3, linewidths=0)
        for rank in range(size) if size <= MAX_NUMBERS else (0,):
            label = in_cell(float(heights[rank]), size <= MAX_NUMBERS // 2)
            panel.text(rank, ranked[:, rank].max() + 0.015, label, ha="center", va="bottom", fontsize=7.5)
        panel.set(ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1])
        panel.yaxis.set_major_formatter(_tick)
        panel.set_xticks(range(size), names)
        panel.tick_params(labelsize=8)
        ends.append(f"{group.name} {percent(float(heights[0]))} %")
    is_single = all(len(group.runs) == 1 for group in groups)
    figure.supxlabel("client, worst first" if is_single else "client's rank, worst first", fontsize=9)
    figure.supylabel("final accuracy, %", fontsize=9)
    alt = f"Bars of every client's final accuracy, {MASK_TITLES[mask]}. Worst clients: {', '.join(ends)}."
    return picture(figure, f"clients_{mask}", f"Clients, {MASK_TITLES[mask]}; the worst is hatched", alt)


def _panels(groups: Sequence[Group], height: float, margin: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Axes of each group in two columns."""
    rows = -(-len(groups) // 2)
    figure = Figure(figsize=(WIDTH, height * rows + margin))
    panels: list[Axes] = figure.subplots(rows, 2, squeeze=False, sharey=sharey).ravel().tolist()
    for panel in panels[len(groups) :]:
        panel.remove()
    for panel, group in zip(panels, groups, strict=False):
        panel.grid(False)
        panel.set_title(shown(group.name), fontsize=9)
    return figure, panels[: len(groups)]


def looks(groups: Sequence[Group]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash by group, in alphabetical order: independent of the results."""
    names = sorted(group.name for group in groups)
    return {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, name in enumerate(names)
    }


def _tick(fraction: float, _: object) -> str:
    return f"{round(100 * fraction, 1):g}"


def _chart(figure: Figure, name: str, caption: str, alt: str) -> Picture:
    """A picture of axes in percent, and below them a legend."""
    (axes,) = figure.axes
    handles, texts = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, texts)) > 26 else 2
    axes.yaxis.set_major_formatter(_tick)
    figure.set_size_inches(WIDTH, HEIGHT + 0.2 * -(-len(texts) // columns) + 0.15)
    figure.legend(handles, texts, loc="outside lower center", ncols=columns)
    return picture(figure, name, caption, alt)


def picture(figure: Figure, name: str, caption: str, alt: str) -> Picture:
    """A figure as SVG and PNG."""
    files = {}
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        files[kind] = buffer.getvalue()
    return Picture(name, caption, alt, **files)


def shown(name: str) -> str:
    """A shortened name; without a leading underscore, which hides it from matplotlib's legend.

    Example:
        >>> shown("FedAvg"), shown("a" * 40)
        ('FedAvg', 'aaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaa')
    """
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME // 2 - 1]}…{name[-MAX_NAME // 2 :]}"
    return f" {name}" if name.startswith("_") else name


def for_page(svg: bytes, prefix: str) -> str:
    """An SVG element in the page's text colour, without background, and with ids that are unique in the page."""
    text = svg.decode()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Nothing refers to images, and equal ones have equal ids.
    text = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"<svg \1", text, count=1)
    return re.sub(r"\n\s*", "\n", text.replace(INK, "currentColor").replace(PAPER, "none"))
