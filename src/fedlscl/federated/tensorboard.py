"""TensorBoard: curves by round, the accuracy matrix as a picture, the configuration, hyper-parameters with results."""

import time
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedlscl.federated.callbacks import AT_SERVER
from fedlscl.federated.costs import Timed, peak_memory
from fedlscl.federated.description import plain
from fedlscl.federated.heatmap import matrix_pixels
from fedlscl.federated.metrics import MASKS, average_accuracy, summary

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from fedlscl.federated.trainer import FederatedTrainer

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

    def on_fit_start(self, trainer: "FederatedTrainer") -> None:
        """Open the folder; a fresh run gets its layout and configuration."""
        if trainer.run_dir is None or trainer.progress.task >= trainer.num_tasks:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(trainer.run_dir / "tensorboard", purge_step=trainer.step)
        if trainer.step == 0:
            self.writer.add_custom_scalars(LAYOUT)
            config = trainer.run_dir / "config.yaml"
            if config.is_file():
                self.writer.add_text("config", f"```yaml\n{config.read_text()}\n```", 0)

    def on_round_start(self, trainer: "FederatedTrainer") -> None:
        """Start the round's clock."""
        self.round_began = time.perf_counter()

    def on_round_end(self, trainer: "FederatedTrainer") -> None:
        """Loss terms, bytes and seconds of the round."""
        lap = self.lap()
        scalars = dict(_losses(trainer))
        refused = [found for found in trainer.server.door.refusals if (found.task, found.round) == (*trainer.progress,)]
        scalars["door/quarantined"] = len(refused)
        if refused and self.writer is not None:
            text = "\n".join(f"- client {found.client}: {found.reason}" for found in refused)
            self.writer.add_text("door/quarantined", text, trainer.step)
        for direction in ("up", "down"):
            total = int(trainer.traffic[direction][:, *trainer.progress].sum())
            scalars[f"traffic/{direction}_bytes"] = total
            scalars[f"traffic/{direction}_bytes_per_client"] = total / max(1, len(trainer.present))
        scalars |= {f"seconds/{name}": seconds for name, seconds in lap.seconds.items()}
        scalars |= {f"memory/{place}_peak_bytes": size for place, size in peak_memory().items() if size}
        scalars["seconds/round"] = time.perf_counter() - self.round_began
        if lap.training_seconds:
            scalars["speed/images_per_second"] = lap.images / lap.training_seconds
        self._write(scalars, trainer.step)

    def on_task_end(self, trainer: "FederatedTrainer") -> None:
        """Accuracies and the matrix."""
        if self.writer is None:
            return
        task = trainer.progress.task
        scalars = {f"accuracy_{name}": value for name, value in summary(trainer.matrix, task).items()}
        for mask in MASKS:
            for client, average in enumerate(average_accuracy(trainer.matrix.of(mask))[:, task].tolist()):
                scalars[f"accuracy_{mask}/client_{client}"] = average
        self.writer.add_image("accuracy_matrix", matrix_pixels(trainer.matrix), trainer.step, dataformats="HWC")
        self._write(scalars, trainer.step)

    def on_fit_end(self, trainer: "FederatedTrainer") -> None:
        """Hyper-parameters beside the last accuracies."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {"method": type(trainer.method).__name__, "seed": trainer.seed, "dataset": trainer.datamodule.dataset}
        values |= {"rounds_per_task": trainer.rounds_per_task, **dict(_flat(plain(trainer.method)))}
        names = summary(trainer.matrix, trainer.num_tasks - 1)
        first = [name for name in SHOWN if name in names]
        metrics = {f"accuracy_{name}": 0.0 for name in dict.fromkeys([*first, *names])}
        # In the run's own file: SummaryWriter.add_hparams would open a second one and repeat the metrics in it.
        for proto in hparams(values, metrics):
            self.writer._get_file_writer().add_summary(proto)
        self.on_exception(trainer)

    def on_exception(self, trainer: "FederatedTrainer") -> None:
        """Keep what was written."""
        if self.writer is not None:
            self.writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
            # Before the checkpoint that follows: a killed run must not lose a point that its resumption skips.
            self.writer.flush()


def _losses(trainer: "FederatedTrainer") -> Iterator[tuple[str, float]]:
    """Loss terms of the round by client (of a stage's last pass where it has several), and means over clients."""
    entries = [entry for entry in trainer.history if (entry["task"], entry["round"]) == tuple(trainer.progress)]
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
