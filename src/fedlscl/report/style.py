"""How all figures look, and their bytes: the same for the same runs."""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from fedlscl.report.groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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
AMONG = {"seen": "among all classes seen", "task": "among the task's own classes"}
"""Masks in words."""
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
