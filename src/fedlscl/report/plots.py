"""Figures of a report; the same runs give the same bytes."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedlscl.callbacks.formatting import MASK_TITLES, in_bytes, percent
from fedlscl.report.groups import ALL_UP, READOUTS, Group, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Okabe and Ito's palette for the colour-blind, without black and yellow, which vanish on one of two backgrounds."""
MARKERS = "osD^vP*Xh<>"
DASHES = ("-", "--", ":")
INK, PAPER, RULE = "#1f2430", "#fffffe", "#8b90a0"
"""Of text, background and grid; the page replaces the first two by its own."""
WIDTH, HEIGHT = 4.7, 2.9
"""Inches of a figure and of its axes: 10 points stay readable on a phone."""
MAX_NAME = 34
MAX_DECIMALS, MAX_NUMBERS = 5, 10
"""Cells or bars per side up to which values have a decimal, and up to which they are printed."""
COURSES = {"average": ("accuracy", "accuracy over all tasks so far"), "forgetting": ("forgetting", "forgetting")}
"""File name and title, by the summary's name."""
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


class Look(NamedTuple):
    """How a group is drawn, in every figure."""

    colour: str
    marker: str
    dash: str


def over_tasks(groups: Sequence[Group], course: str, mask: str) -> Picture:
    """Mean over seeds after each task; a band of one standard deviation if there are several seeds."""
    file, what = COURSES[course]
    values = {group.name: group.course(f"{mask}/{course}") for group in groups}
    last = max(group.tasks for group in groups)
    # There is no forgetting after the first task.
    first = 1 if course == "forgetting" and last > 1 else 0

    def draw(axes: "Axes") -> list["Line2D"]:
        handles, styles = [], looks(groups)
        for name, seeds in values.items():
            look, tasks, mean = styles[name], range(first + 1, seeds.shape[1] + 1), seeds.mean(0)[first:]
            handles += axes.plot(tasks, mean, color=look.colour, marker=look.marker, linestyle=look.dash)
            if len(seeds) > 1:
                deviation = seeds.std(0, ddof=1)[first:]
                axes.fill_between(tasks, mean - deviation, mean + deviation, color=look.colour, alpha=0.15, linewidth=0)
        if course == "forgetting":
            axes.axhline(0, color=RULE, linewidth=1)
        axes.set_xticks(range(first + 1, last + 1, -(-last // 12)))
        axes.set_xlim(first + 0.8, last + 0.2)
        axes.set_xlabel("after learning task")
        axes.set_ylabel(f"{what}, %")
        return handles

    ends = ", ".join(f"{name} {percent(float(seeds[:, -1].mean()))} %" for name, seeds in values.items())
    title = f"{what.capitalize()}, {MASK_TITLES[mask]}"
    alt = f"Line chart of {what}, {MASK_TITLES[mask]}, after each task. After the last one: {ends}."
    return chart(f"{file}_{mask}", title, alt, list(values), draw)


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
    names = [name if any(spent.mean > 0 for spent, _ in found) else f"{name} (none)" for name, found in points.items()]
    if not positive:
        return None

    def draw(axes: "Axes") -> list["Line2D"]:
        from matplotlib.ticker import LogLocator, NullLocator

        handles, styles = [], looks(groups)
        for name, found in points.items():
            colour, marker = styles[name].colour, styles[name].marker
            drawn: list[Line2D] = []
            for number, ((x, dx), (y, dy)) in enumerate(found):
                if x > 0:
                    face = "none" if readout and number == 0 else colour
                    drawn += axes.plot(x, y, marker, color=colour, mfc=face, alpha=0.85, markersize=9)
                    axes.errorbar(x, y, dy, dx, "none", ecolor=colour, elinewidth=1.2)
                else:
                    drawn.append(axes.axhline(y, color=colour, linestyle="--"))
            if len(found) > 1 and found[0][0].mean > 0:
                (x, y), (x1, y1) = ((spent.mean, reached.mean) for spent, reached in found)
                axes.plot([x, x1], [y, y1], color=colour, linewidth=0.8, alpha=0.6)
            handles.append(drawn[-1])
        # Wide enough for a tick at 1, 2 or 5 times a power of ten on either side.
        low, high = min(positive), max(positive)
        axes.set_xscale("log")
        axes.set_xlim(low / 2.5, high * 2.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 8 * low else (1.0,), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: unit(value).replace(".0 ", " "))
        axes.margins(y=0.12)
        axes.set_xlabel(what)
        axes.set_ylabel("final accuracy, %")
        return handles

    words = ", ".join(
        f"{name}{' with the readout' * bool(number)} {percent(reached.mean)} % at {unit(spent.mean)}"
        for name, found in points.items()
        for number, (spent, reached) in enumerate(found)
    )
    whose = f"Final accuracy of own heads and {readout}" if readout else "Final accuracy"
    title = f"{whose}, {MASK_TITLES[mask]}, against {what}"
    alt = f"Scatter plot of {title[0].lower()}{title[1:]}: {words}."
    suffix = "".join(f"_{part}" for part in re.findall(r"\w+", readout))
    return chart(f"{file}{suffix}_{mask}", title, alt, names, draw)


def matrices(groups: Sequence[Group], mask: str) -> Picture:
    """Row n is the model after task n, column t its accuracy on task t; mean over clients and seeds."""
    values = {group.name: group.matrix(mask) for group in groups}
    lowest = np.floor(10 * min(np.nanmin(matrix) for matrix in values.values())) / 10

    def draw(figure: "Figure") -> None:
        panels, images = _panels(figure, len(values)), []
        for panel, (name, matrix) in zip(panels, values.items(), strict=True):
            images.append(panel.imshow(matrix, cmap="YlGnBu", vmin=lowest, vmax=1))
            panel.set_title(shown(name), fontsize=9)
            _cells(panel, matrix, middle=(lowest + 1) / 2)
        figure.supxlabel("accuracy on task", fontsize=9)
        figure.supylabel("after learning task", fontsize=9)
        style: dict[str, Any] = {"location": "top", "shrink": 0.7, "aspect": 30}
        bar = figure.colorbar(images[0], ax=panels, format=lambda value, _: f"{100 * value:g}", **style)
        bar.set_label("accuracy, %", fontsize=9)
        bar.outline.set_visible(False)

    ends = "; ".join(f"{name} {', '.join(map(percent, matrix[-1].tolist()))}" for name, matrix in values.items())
    title = f"Accuracy matrices, {MASK_TITLES[mask]}"
    alt = (
        f"Heat maps of accuracy on each task after each task, {MASK_TITLES[mask]}. After the last, in percent: {ends}."
    )
    return picture(f"matrix_{mask}", title, alt, draw, 2.15 * -(-len(values) // 2) + 1.05)


def clients(groups: Sequence[Group], mask: str) -> Picture:
    """Final accuracy of every client, worst first; over seeds the mean of each rank, and a dot per seed."""
    values = {group.name: group.ranked_clients(mask) for group in groups}
    is_single = all(len(group.runs) == 1 for group in groups)

    def draw(figure: "Figure") -> None:
        styles = looks(groups)
        for panel, group in zip(_panels(figure, len(groups), sharey=True), groups, strict=True):
            _bars(panel, values[group.name], styles[group.name].colour)
            panel.set_title(shown(group.name), fontsize=9)
            ranks = range(values[group.name].shape[1])
            order = np.argsort(group.runs[0].client_averages(mask), kind="stable") if len(group.runs) == 1 else []
            panel.set_xticks(ranks, [str(client) for client in order] or [f"{rank + 1}." for rank in ranks], fontsize=8)
        figure.supxlabel("client, worst first" if is_single else "client's rank, worst first", fontsize=9)
        figure.supylabel("final accuracy, %", fontsize=9)

    ends = ", ".join(f"{name} {percent(float(ranked[:, 0].mean()))} %" for name, ranked in values.items())
    title = f"Clients, {MASK_TITLES[mask]}; the worst is hatched"
    alt = f"Bars of every client's final accuracy, {MASK_TITLES[mask]}. Worst clients: {ends}."
    return picture(f"clients_{mask}", title, alt, draw, 1.75 * -(-len(values) // 2) + 0.35)


def _panels(figure: "Figure", number: int, sharey: bool = False) -> list["Axes"]:
    """Two columns of axes without a grid."""
    axes = figure.subplots(-(-number // 2), 2, squeeze=False, sharey=sharey).ravel().tolist()
    for panel in axes:
        panel.grid(False)
    for unused in axes[number:]:
        unused.remove()
    return axes[:number]


def _cells(panel: "Axes", matrix: np.ndarray, middle: float) -> None:
    size = len(matrix)
    ticks = range(0, size, max(1, size // 5))
    names = [str(tick + 1) for tick in ticks]
    panel.set_xticks(ticks, names, fontsize=8)
    panel.set_yticks(ticks, names, fontsize=8)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for n, t in zip(*np.nonzero(~np.isnan(matrix)), strict=True) if size <= MAX_NUMBERS else ():
        colour = "#ffffff" if matrix[n, t] > middle else "#10233f"
        panel.text(t, n, _number(float(matrix[n, t]), size), ha="center", va="center", fontsize=7.5, color=colour)


def _bars(panel: "Axes", ranked: np.ndarray, colour: str) -> None:
    heights, size = ranked.mean(0), ranked.shape[1]
    bars = panel.bar(range(size), heights, color=colour, width=0.8)
    bars[0].set(hatch="////", edgecolor=INK, linewidth=0.8)
    if len(ranked) > 1:
        ranks = np.broadcast_to(np.arange(size), ranked.shape)
        panel.scatter(ranks, ranked, s=7, color=INK, zorder=3, linewidths=0)
    for rank in range(size) if size <= MAX_NUMBERS else (0,):
        top, label = ranked[:, rank].max(), _number(float(heights[rank]), size)
        panel.text(rank, top + 0.015, label, ha="center", va="bottom", fontsize=7.5)
    panel.set_ylim(0, 1.12)
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.tick_params(labelsize=8)


def _number(value: float, size: int) -> str:
    return f"{100 * value:.1f}" if size <= MAX_DECIMALS and value < 0.9995 else f"{100 * value:.0f}"


def picture(name: str, caption: str, alt: str, draw: Callable[["Figure"], None], height: float) -> Picture:
    """Draw a figure of ``WIDTH`` x ``height`` inches as SVG and PNG."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without the user's matplotlibrc.
    with style.context(["default", RC]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        files = {}
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            files[kind] = buffer.getvalue()
    return Picture(name, caption, alt, files["svg"], files["png"])


def looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Colour, marker and dash by group, in alphabetical order: independent of the results."""
    names = sorted(group.name for group in groups)
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, name in enumerate(names)
    }


def chart(file: str, caption: str, alt: str, names: list[str], draw: Callable[["Axes"], list["Line2D"]]) -> Picture:
    """Axes in percent, and below them a legend with a name for each line that ``draw`` returns."""
    texts = [shown(name) for name in names]
    columns = 1 if max(map(len, texts)) > 26 else 2

    def with_legend(figure: "Figure") -> None:
        axes = figure.subplots()
        handles = draw(axes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g}")
        figure.legend(handles, texts, loc="outside lower center", ncols=columns)

    return picture(file, caption, alt, with_legend, HEIGHT + 0.2 * -(-len(texts) // columns) + 0.15)


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
