"""Features of every client for TensorBoard's projector: one point per test image."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlscl.federated.callbacks import Callback
from fedlscl.federated.checkpoint import write_atomically

if TYPE_CHECKING:
    from fedlscl.federated.client import Client
    from fedlscl.federated.trainer import FederatedTrainer

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

    def on_fit_start(self, trainer: "FederatedTrainer") -> None:
        """Refuse an output that the net lacks before anything is trained."""
        client = trainer.clients[0]
        with trainer.engine.on_device(client):
            _, output = next(iter(client.infer(client.data.test_ids(0)[:1])))
        if self.pick not in output._fields:
            raise ValueError(f"pick {self.pick!r} is no output of the net: choose from {', '.join(output._fields)}.")

    def on_fit_end(self, trainer: "FederatedTrainer") -> None:
        """Write points, labels and the projector's configuration beside the event file."""
        if trainer.run_dir is None:
            return
        names, rows, labels = trainer.datamodule.class_names, [], ["\t".join(COLUMNS)]
        for client in trainer.clients:
            with trainer.engine.on_device(client):
                for task, points, classes in self._points(client, trainer.num_tasks):
                    rows += ["\t".join(f"{value:.5g}" for value in point) for point in points.tolist()]
                    # Counted from 1 for tasks and from 0 for clients, as on the screen.
                    labels += [f"{_cell(names[label])}\t{client.id}\t{task + 1}" for label in classes.tolist()]
        folder = trainer.run_dir / "tensorboard"
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
