"""TensorBoard: scalars, heatmaps, embeddings and hyper-parameters."""

import time
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlscl.callbacks.results import Timed, peak_memory, plain
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.metrics import AT_SERVER, MASKS, AccuracyMatrix, average_accuracy, summary
from fedlscl.federated.state import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from torch.utils.tensorboard import SummaryWriter

    from fedlscl.federated.client import Client
    from fedlscl.federated.state import RunState


# The accuracy matrix as a picture.

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


# TensorBoard: curves by round, the accuracy matrix as a picture, the configuration, hyper-parameters with results.

LAYOUT = {
    **{
        f"Accuracy among {words}": {
            name: ["Multiline", [f"accuracy_{mask}/{tag}$" for tag in tags]]
            for name, tags in (
                ("all tasks, current task, worst client", ("average", "current", "worst_client")),
                ("before and after aggregation", ("average_before_aggregation", "average")),
                ("forgetting and backward transfer", ("forgetting", "backward_transfer")),
                ("every client", (r"client_\d+",)),
            )
        }
        for mask, words in (("seen", "all classes seen"), ("task", "the task's own classes"))
    },
    "Objective": {"mean over clients": ["Multiline", ["loss/.*"]]},
    "Cost": {
        "bytes of a round": ["Multiline", [r"traffic/\w+_bytes$"]],
        "seconds of a round": ["Multiline", ["seconds/.*"]],
        "images per second": ["Multiline", ["speed/.*"]],
        "memory": ["Multiline", ["memory/.*"]],
    },
}
"""Charts of the Custom Scalars page; entries are patterns of tags."""
SHOWN = ("seen/average", "seen/worst_client", "seen/forgetting", "task/average", "task/current")
"""Columns that the table of HParams begins with: it shows five."""


class TensorBoard(Timed):
    """Writes ``run_dir/tensorboard``; the step of every point is the number of rounds before it.

    A resumed run goes on in the same folder, and what it repeats replaces the points of the first try.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writer: SummaryWriter | None = None

    def on_fit_start(self, run: "RunState") -> None:
        """Open the folder; a fresh run gets its layout and configuration."""
        if run.run_dir is None or run.progress.task >= run.num_tasks:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run.run_dir / "tensorboard", purge_step=run.step)
        if run.step == 0:
            self.writer.add_custom_scalars(LAYOUT)
            config = run.run_dir / "config.yaml"
            if config.is_file():
                self.writer.add_text("config", f"```yaml\n{config.read_text()}\n```", 0)

    def on_round_start(self, run: "RunState") -> None:
        """Start the round's clock."""
        self.round_began = time.perf_counter()

    def on_round_end(self, run: "RunState") -> None:
        """Loss terms, bytes and seconds of the round."""
        lap = self.lap()
        scalars = dict(_losses(run))
        refused = [found for found in run.rejected if (found.task, found.round) == run.progress.position]
        scalars["uploads/rejected"] = len(refused)
        if refused and self.writer is not None:
            text = "\n".join(f"- client {found.client}: {found.reason}" for found in refused)
            self.writer.add_text("uploads/rejected", text, run.step)
        for direction in ("up", "down"):
            total = int(run.traffic[direction][:, *run.progress.position].sum())
            scalars[f"traffic/{direction}_bytes"] = total
            scalars[f"traffic/{direction}_bytes_per_client"] = total / max(1, len(run.participants))
        scalars |= {f"seconds/{name}": seconds for name, seconds in lap.seconds.items()}
        scalars |= {f"memory/{place}_peak_bytes": size for place, size in peak_memory().items() if size}
        scalars["seconds/round"] = time.perf_counter() - self.round_began
        if lap.training_seconds:
            scalars["speed/images_per_second"] = lap.images / lap.training_seconds
        self._write(scalars, run.step)

    def on_task_end(self, run: "RunState") -> None:
        """Accuracies and the matrix."""
        if self.writer is None:
            return
        task = run.progress.task
        scalars = {f"accuracy_{name}": value for name, value in summary(run.matrix, task).items()}
        for mask in MASKS:
            for client, average in enumerate(average_accuracy(run.matrix.of(mask))[:, task].tolist()):
                scalars[f"accuracy_{mask}/client_{client}"] = average
        self.writer.add_image("accuracy_matrix", matrix_pixels(run.matrix), run.step, dataformats="HWC")
        self._write(scalars, run.step)

    def on_fit_end(self, run: "RunState") -> None:
        """Hyper-parameters beside the last accuracies."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {"method": type(run.method).__name__, "seed": run.seed, "dataset": run.data["dataset"]}
        values |= {"rounds_per_task": run.rounds_per_task, **dict(_flat(plain(run.method)))}
        names = summary(run.matrix, run.num_tasks - 1)
        first = [name for name in SHOWN if name in names]
        metrics = {f"accuracy_{name}": 0.0 for name in dict.fromkeys([*first, *names])}
        # In the run's own file: SummaryWriter.add_hparams would open a second one and repeat the metrics in it.
        for proto in hparams(values, metrics):
            self.writer._get_file_writer().add_summary(proto)
        self.on_exception(run)

    def on_exception(self, run: "RunState") -> None:
        """Keep what was written."""
        if self.writer is not None:
            self.writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
            # Before the checkpoint that follows: a killed run must not lose a point that its resumption skips.
            self.writer.flush()


def _losses(run: "RunState") -> Iterator[tuple[str, float]]:
    """Loss terms of the round by client (of a stage's last pass where it has several), and means over clients."""
    entries = [entry for entry in run.history if (entry["task"], entry["round"]) == run.progress.position]
    by_term: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in entry["terms"].items():
            if entry["client"] == AT_SERVER:
                yield f"train/server/{entry['stage']}/{name}", value
                continue
            by_term.setdefault(f"{entry['stage']}/{name}", []).append(value)
            yield f"train/client_{entry['client']}/{entry['stage']}/{name}", value
    for name, values in by_term.items():
        yield f"loss/{name}", fmean(values)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names, as TensorBoard takes them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            # A truth value is a number to torch, which would show 1.0000.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            yield prefix + name, value if is_number else str(value)


# Features of every client for TensorBoard's projector: one point per test image.

CONFIG = """\
embeddings {
  tensor_name: "features"
  tensor_path: "features.tsv"
  metadata_path: "metadata.tsv"
}
"""
COLUMNS = ("class", "client", "task")


class FeatureProjector(Callback):
    """Writes what TensorBoard's projector reads, plain text, at the end of a run; needs no TensorFlow.

    Args:
        per_class: most images of a class that a client shows.
        pick: which output of the net; E of a Fed-LSCL client is 'features', its adapted ViT's features are 'tokens'.
    """

    def __init__(self, per_class: int = 20, pick: str = "features") -> None:
        if per_class < 1:
            raise ValueError(f"per_class {per_class} shows nothing: choose 1 or more.")
        self.per_class, self.pick = per_class, pick

    def on_fit_start(self, run: "RunState") -> None:
        """Refuse an output that the net lacks before anything is trained."""
        client = run.clients[0]
        with run.engine.on_device(client):
            _, output = next(iter(client.infer(client.data.test_ids(0)[:1])))
        if self.pick not in output._fields:
            raise ValueError(f"pick {self.pick!r} is no output of the net: choose from {', '.join(output._fields)}.")

    def on_fit_end(self, run: "RunState") -> None:
        """Write points, labels and the projector's configuration beside the event file."""
        if run.run_dir is None:
            return
        names, rows, labels = run.clients[0].data.data.class_names, [], ["\t".join(COLUMNS)]
        for client in run.clients:
            with run.engine.on_device(client):
                for task, points, classes in self._points(client, run.num_tasks):
                    rows += ["\t".join(f"{value:.5g}" for value in point) for point in points.tolist()]
                    # Counted from 1 for tasks and from 0 for clients, as on the screen.
                    labels += [f"{_cell(names[label])}\t{client.id}\t{task + 1}" for label in classes.tolist()]
        folder = run.run_dir / "tensorboard"
        for name, text in (
            ("features.tsv", "\n".join(rows) + "\n"),
            ("metadata.tsv", "\n".join(labels) + "\n"),
            ("projector_config.pbtxt", CONFIG),
        ):
            write_atomically(folder / name, text.encode())

    def _points(self, client: "Client", num_tasks: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """By task: features (n, width) and classes (n,) of the client's test images."""
        for task in range(num_tasks):
            ids = client.data.test_ids(task)
            labels = client.data.data.labels(ids)
            chosen = torch.cat([ids[labels == label][: self.per_class] for label in client.data.classes(task)])
            for batch, output in client.infer(chosen):
                yield task, getattr(output, self.pick).flatten(1).float().cpu(), batch.labels.cpu()


def _cell(text: str) -> str:
    return " ".join(text.split())
