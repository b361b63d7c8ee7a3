"""TensorBoard: curves by round, the accuracy matrix as an image, hyper-parameters, embeddings for the projector."""

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import override

from fedlscl.callbacks.formatting import MASK_TITLES, percent
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.loggers import ScalarCallback, hyperparameters
from fedlscl.federated.metrics import MASKS, AccuracyMatrix, summary
from fedlscl.federated.state import Callback, RunState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

SHOWN = ("class_il/average", "class_il/worst_client", "class_il/forgetting", "task_il/average", "task_il/current")
"""Metrics that HParams shows without being asked: the first five."""
ACCURACIES = {
    "all tasks, current task, worst client": ("average", "current", "worst_client"),
    "before and after aggregation": ("average_before_aggregation", "average"),
    "forgetting and backward transfer": ("forgetting", "backward_transfer"),
    "every client": (r"client_\d+",),
}
"""Charts of accuracies under each mask, and their tags."""


def layout(has_readouts: bool) -> dict[str, dict[str, list[Any]]]:
    """Charts of the Custom Scalars page; entries are patterns of tags."""
    charts = {
        f"Accuracy, {title}": {name: [f"accuracy_{mask}/{tag}$" for tag in tags] for name, tags in ACCURACIES.items()}
        for mask, title in MASK_TITLES.items()
    }
    charts["Objective"] = {"mean over clients": ["loss/.*"]}
    charts["Cost"] = {
        "bytes of a round": [r"traffic/\w+_bytes$"],
        "seconds of a round": ["seconds/.*"],
        "images per second": ["speed/.*"],
        "memory": ["memory/.*"],
    }
    if has_readouts:
        charts["Own head and readouts"] = {
            title: [f"accuracy_{mask}/average$", f"readout_{mask}/.*"] for mask, title in MASK_TITLES.items()
        }
    return {name: {title: ["Multiline", tags] for title, tags in found.items()} for name, found in charts.items()}


class TensorBoard(ScalarCallback):
    """Writes ``run_dir/tensorboard``. A resumed run replaces the points of rounds that it repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.writer: SummaryWriter | None = None

    @override
    def on_fit_start(self, run: RunState) -> None:
        if run.run_dir is None or run.progress.task >= run.num_tasks:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run.run_dir / "tensorboard", purge_step=run.step)
        if run.step == 0:
            self.writer.add_custom_scalars(layout(bool(run.readouts.names)))
            config = run.run_dir / "config.yaml"
            if config.is_file():
                self.writer.add_text("config", f"```yaml\n{config.read_text()}\n```", 0)

    @override
    def log(self, scalars: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
            # Before the checkpoint that follows: a killed run must not lose a point that its resumption skips.
            self.writer.flush()

    @override
    def on_round_end(self, run: RunState) -> None:
        rejected = [found for found in run.rejected if (found.task, found.round) == run.progress.position]
        if rejected and self.writer is not None:
            text = "\n".join(f"- client {found.client}: {found.reason}" for found in rejected)
            self.writer.add_text("uploads/rejected", text, run.step)
        super().on_round_end(run)

    @override
    def on_task_end(self, run: RunState) -> None:
        if self.writer is not None:
            self.writer.add_figure("accuracy_matrix", matrix_figure(run.matrix), run.step, close=False)
            super().on_task_end(run)

    @override
    def on_fit_end(self, run: RunState) -> None:
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        names = dict.fromkeys([*SHOWN, *summary(run.matrix, run.num_tasks - 1)])
        # In the run's own file: SummaryWriter.add_hparams would open a second one and repeat the metrics in it.
        for proto in hparams(hyperparameters(run), {f"accuracy_{name}": 0.0 for name in names}):
            self.writer._get_file_writer().add_summary(proto)
        self.writer.close()

    @override
    def on_exception(self, run: RunState) -> None:
        if self.writer is not None:
            self.writer.close()


MAX_NUMBERS = 20
"""Tasks up to which values are printed."""


def matrix_figure(matrix: AccuracyMatrix) -> "Figure":
    """Both masks side by side, mean over clients; row n is the model after task n, column t its accuracy on task t."""
    from matplotlib.figure import Figure

    num_clients, size = matrix.values.shape[2:4]
    is_small = size <= MAX_NUMBERS
    side = max(1.7, 0.44 * size) if is_small else 6.0
    figure = Figure(figsize=(2 * side + 0.7, side + 0.9), dpi=150, layout="constrained")
    figure.suptitle(f"Accuracy in percent, mean over {num_clients} client{'s' * (num_clients > 1)}", fontsize=10)
    panels = figure.subplots(1, len(MASKS), sharey=True)
    for axes, mask in zip(panels, MASKS, strict=True):
        heat_map(axes, matrix.of(mask).mean(0).numpy(), 0.0, MAX_NUMBERS)
        axes.set_title(MASK_TITLES[mask], fontsize=9)
        axes.set_xlabel("accuracy on task", fontsize=9)
    panels[0].set_ylabel("after learning task", fontsize=9)
    if not is_small:
        figure.colorbar(panels[0].images[0], ax=panels, shrink=0.8, format=lambda value, _: percent(value, 0))
    return figure


def heat_map(axes: "Axes", matrix: np.ndarray, lowest: float, max_numbers: int) -> None:
    """Draw accuracies (after task, on task), NaN where not measured, as colours from ``lowest`` to 1 and in percent.

    Values are printed up to ``max_numbers`` tasks, and have a decimal up to half as many.
    """
    axes.imshow(matrix, cmap="YlGnBu", vmin=lowest, vmax=1)
    size, max_decimals = len(matrix), max_numbers // 2
    ticks = range(0, size, max(1, size // max_decimals))
    names = [str(tick + 1) for tick in ticks]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for n, t in np.argwhere(~np.isnan(matrix)).tolist() if size <= max_numbers else ():
        colour = "#ffffff" if matrix[n, t] > (lowest + 1) / 2 else "#10233f"
        text = in_cell(float(matrix[n, t]), size <= max_decimals)
        axes.text(t, n, text, ha="center", va="center", fontsize=7.5, color=colour)


def in_cell(value: float, has_decimal: bool) -> str:
    """A fraction in percent in at most four characters: 99.9, then 100."""
    return percent(value, int(has_decimal and value < 0.9995))


PROJECTOR_CONFIG = """\
embeddings {
  tensor_name: "features"
  tensor_path: "features.tsv"
  metadata_path: "metadata.tsv"
}
"""


class FeatureProjector(Callback):
    """Writes one point per test image, with class, client and task, for TensorBoard's projector at the end of a run.

    Args:
        per_class: maximum number of images per class and client.
        pick: output of the net; E of a Fed-LSCL client is 'features', the adapted ViT's features are 'tokens'.
    """

    def __init__(self, per_class: int = 20, pick: str = "features") -> None:
        if per_class < 1:
            raise ValueError(f"per_class must be >= 1, got {per_class}.")
        self.per_class, self.pick = per_class, pick

    @override
    def on_fit_start(self, run: RunState) -> None:
        client = run.clients[0]
        with run.engine.on_device(client):
            _, output = next(iter(client.infer(client.data.evaluation_ids(0)[:1])))
        if self.pick not in vars(output):
            raise ValueError(f"pick must be one of {', '.join(vars(output))}, got {self.pick!r}.")

    @override
    def on_fit_end(self, run: RunState) -> None:
        if run.run_dir is None:
            return
        names = [" ".join(name.split()) for name in run.clients[0].data.data.class_names]
        points, labels = [], ["class\tclient\ttask"]
        for client, task in product(run.clients, range(run.num_tasks)):
            ids = client.data.evaluation_ids(task)
            classes = client.data.data.labels(ids)
            chosen = torch.cat([ids[classes == label][: self.per_class] for label in client.data.classes(task)])
            with run.engine.on_device(client):
                for batch, output in client.infer(chosen):
                    points.append(getattr(output, self.pick).flatten(1).float().cpu())
                    # Tasks counted from 1 and clients from 0, as on the terminal.
                    labels += [f"{names[label]}\t{client.id}\t{task + 1}" for label in batch.labels.tolist()]
        folder = run.run_dir / "tensorboard"
        np.savetxt(folder / "features.tsv", torch.cat(points).numpy(), fmt="%.5g", delimiter="\t")
        write_atomically(folder / "metadata.tsv", ("\n".join(labels) + "\n").encode())
        write_atomically(folder / "projector_config.pbtxt", PROJECTOR_CONFIG.encode())
