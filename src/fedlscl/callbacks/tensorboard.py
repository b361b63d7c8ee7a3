"""TensorBoard: curves by round, the accuracy matrix as an image, hyper-parameters, embeddings for the projector."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from typing_extensions import override

from fedlscl.callbacks.formatting import MASK_TITLES
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.loggers import ScalarCallback, hyperparameters
from fedlscl.federated.metrics import MASKS, AccuracyMatrix, summary
from fedlscl.federated.state import Callback, RunState

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LAYOUT = {
    **{
        f"Accuracy, {title}": {
            name: ["Multiline", [f"accuracy_{mask}/{tag}$" for tag in tags]]
            for name, tags in (
                ("all tasks, current task, worst client", ("average", "current", "worst_client")),
                ("before and after aggregation", ("average_before_aggregation", "average")),
                ("forgetting and backward transfer", ("forgetting", "backward_transfer")),
                ("every client", (r"client_\d+",)),
            )
        }
        for mask, title in MASK_TITLES.items()
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
READOUTS = {
    "Own head and readouts": {
        title: ["Multiline", [f"accuracy_{mask}/average$", f"readout_{mask}/.*"]] for mask, title in MASK_TITLES.items()
    }
}
"""Further charts of a run with readouts."""
SHOWN = ("class_il/average", "class_il/worst_client", "class_il/forgetting", "task_il/average", "task_il/current")
"""Metrics that HParams shows without being asked: the first five."""


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
            self.writer.add_custom_scalars(LAYOUT | (READOUTS if run.readouts.names else {}))
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
            self.writer.add_image("accuracy_matrix", matrix_pixels(run.matrix), run.step, dataformats="HWC")
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
"""Tasks beyond which the cells hold no numbers."""


def matrix_pixels(matrix: AccuracyMatrix) -> np.ndarray:
    """Both masks side by side, mean over clients, as (height, width, 3) uint8.

    Row n is the model after task n, column t its accuracy on task t.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_clients, size = matrix.values.shape[2:4]
    is_small = size <= MAX_NUMBERS
    side = max(1.7, 0.44 * size) if is_small else 6.0
    figure = Figure(figsize=(2 * side + 0.7, side + 0.9), dpi=150, layout="constrained")
    figure.suptitle(f"Accuracy in percent, mean over {num_clients} client{'s' * (num_clients > 1)}", fontsize=10)
    panels, image = figure.subplots(1, len(MASKS), sharey=True), None
    ticks = range(0, size, max(1, size // 10))
    names = [str(tick + 1) for tick in ticks]
    for axes, mask in zip(panels, MASKS, strict=True):
        values = 100 * matrix.of(mask).mean(0).numpy()
        image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=100)
        axes.set_title(MASK_TITLES[mask], fontsize=9)
        axes.set_xlabel("accuracy on task", fontsize=9)
        axes.set_xticks(ticks, names, fontsize=9)
        axes.set_yticks(ticks, names, fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for n, t in np.argwhere(~np.isnan(values)) if is_small else ():
            value = values[n, t]
            text = f"{value:.1f}" if size <= 8 and value < 99.95 else f"{value:.0f}"
            axes.text(t, n, text, ha="center", va="center", fontsize=9, color="white" if value > 55 else "#10233f")
    panels[0].set_ylabel("after learning task", fontsize=9)
    if image is not None and not is_small:
        figure.colorbar(image, ax=panels, shrink=0.8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
        rows, labels = [], ["class\tclient\ttask"]
        for client in run.clients:
            for task in range(run.num_tasks):
                ids = client.data.evaluation_ids(task)
                classes = client.data.data.labels(ids)
                chosen = torch.cat([ids[classes == label][: self.per_class] for label in client.data.classes(task)])
                with run.engine.on_device(client):
                    for batch, output in client.infer(chosen):
                        points = getattr(output, self.pick).flatten(1).float().tolist()
                        rows += ["\t".join(f"{value:.5g}" for value in point) for point in points]
                        # Tasks counted from 1 and clients from 0, as on the terminal.
                        labels += [f"{names[label]}\t{client.id}\t{task + 1}" for label in batch.labels.tolist()]
        for name, text in (
            ("features.tsv", "\n".join(rows) + "\n"),
            ("metadata.tsv", "\n".join(labels) + "\n"),
            ("projector_config.pbtxt", PROJECTOR_CONFIG),
        ):
            write_atomically(run.run_dir / "tensorboard" / name, text.encode())
