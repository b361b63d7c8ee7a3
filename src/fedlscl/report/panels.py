"""Figures with one small panel per method: accuracy matrices, and clients from the worst to the best."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedlscl.federated.wording import percent
from fedlscl.report.groups import Group
from fedlscl.report.style import AMONG, INK, Picture, looks, picture, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
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
        f"Accuracy matrices, {AMONG[mask]}",
        f"Heat maps of accuracy on each task after each task, {AMONG[mask]}. After the last task, in percent: {ends}.",
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
        f"Clients, {AMONG[mask]}; the worst is hatched",
        f"Bars of every client's final accuracy, {AMONG[mask]}. Worst clients: {ends}.",
        draw,
        _height(len(values), 1.75),
    )


def _panels(figure: "Figure", names: list[str], sharey: bool = False) -> list["Axes"]:
    rows = -(-len(names) // COLUMNS)
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharey=sharey).ravel().tolist()
    for panel in grid:
        panel.grid(False)
    for unused in grid[len(names) :]:
        unused.remove()
    return grid[: len(names)]


def _height(panels: int, each: float) -> float:
    return each * -(-panels // COLUMNS) + 0.35


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
