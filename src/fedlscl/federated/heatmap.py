"""The accuracy matrix as a picture."""

from typing import TYPE_CHECKING

import numpy as np

from fedlscl.federated.metrics import MASKS, AccuracyMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

TITLES = {"task": "among the task's own classes", "seen": "among all classes seen"}
MOST_NUMBERS = 20
"""Tasks beyond which the cells hold no numbers."""


def matrix_figure(matrix: AccuracyMatrix, phase: str = "after") -> "Figure":
    """Both masks side by side, mean over clients: row n is the model after task n, column t its accuracy on task t."""
    from matplotlib.figure import Figure

    num_clients, num_tasks = matrix.values.shape[2:4]
    side = max(1.7, 0.44 * num_tasks) if num_tasks <= MOST_NUMBERS else 6.0
    figure = Figure(figsize=(2 * side + 0.7, side + 0.9), dpi=150, layout="constrained")
    figure.suptitle(f"Accuracy in percent, mean over {num_clients} client{'s' * (num_clients > 1)}", fontsize=10)
    panels = figure.subplots(1, len(MASKS), sharey=True)
    images = []
    for axes, mask in zip(panels, MASKS, strict=True):
        axes.set_title(TITLES[mask], fontsize=9)
        images.append(_panel(axes, 100 * matrix.of(mask, phase).mean(0).numpy()))
    panels[0].set_ylabel("after learning task", fontsize=9)
    if num_tasks > MOST_NUMBERS:
        figure.colorbar(images[0], ax=panels, shrink=0.8)
    return figure


def matrix_pixels(matrix: AccuracyMatrix) -> np.ndarray:
    """The picture as (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(matrix_figure(matrix))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _panel(axes: "Axes", values: np.ndarray) -> "AxesImage":
    size = len(values)
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=100)
    axes.set_xlabel("accuracy on task", fontsize=9)
    ticks = list(range(0, size, max(1, size // 10)))
    names = [str(tick + 1) for tick in ticks]
    axes.set_xticks(ticks, names, fontsize=9)
    axes.set_yticks(ticks, names, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if size <= MOST_NUMBERS:
        edges = [tick + 0.5 for tick in range(size - 1)]
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        for n, t in zip(*np.nonzero(~np.isnan(values)), strict=True):
            value = values[n, t]
            text = f"{value:.1f}" if size <= 8 and value < 99.95 else f"{value:.0f}"
            axes.text(t, n, text, ha="center", va="center", fontsize=9, color="white" if value > 55 else "#10233f")
    return image
