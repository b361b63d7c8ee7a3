"""What a client does in its turn; the same in a simulation and on a node of a network."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine
from fedlscl.federated.method import Method, Stage
from fedlscl.federated.metrics import MASKS, correct
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.seeding import Turn, seed_turn
from fedlscl.nets.net import Net

TrainStage = Callable[[Client | None, Stage], Any]
"""Goes through one stage of a client, or of the server (None)."""


class LocalWork:
    """Calls a method's hooks for one client at a time, each from a seed of its own.

    Args:
        method: whose hooks.
        engine: trains and infers.
        seed: of the run.
    """

    def __init__(self, method: Method, engine: Engine, seed: int) -> None:
        self.method, self.engine, self.seed = method, engine, seed

    def build(self, index: int, num_classes: int) -> Net:
        """The net of a client; all clients are seeded alike."""
        seed_turn(self.seed, Turn.BUILD)
        return self.method.build_net(index, num_classes)

    def begin_task(self, client: Client) -> None:
        """Before the first round of ``client.task``."""
        self._seed(Turn.BEGIN, client)
        with self.engine.on_device(client):
            client.answered = 0
            self.method.begin_task(client)

    def train(self, client: Client, train: TrainStage) -> None:
        """All stages of ``client.round``."""
        with self.engine.on_device(client):
            stages = self.method.stages(client)
            seeded_stages(stages, client, train, lambda number: self._seed(Turn.TRAIN, client, number))

    def upload(self, client: Client) -> Upload:
        """What the client sends after it has trained."""
        self._seed(Turn.UPLOAD, client)
        with self.engine.on_device(client):
            payload = self.method.upload(client)
        counts = client.data.class_counts(client.task)
        return Upload(client=client.id, task=client.task, round=client.round, payload=payload, class_counts=counts)

    def download(self, client: Client, answer: Payload) -> None:
        """Take over the server's answer of ``client.round``."""
        self._seed(Turn.DOWNLOAD, client)
        with self.engine.on_device(client):
            self.method.download(client, answer)
            client.answered += 1

    def end_task(self, client: Client) -> None:
        """After the last download of ``client.task``."""
        self._seed(Turn.END, client)
        with self.engine.on_device(client):
            self.method.end_task(client)

    def evaluate(self, client: Client) -> Tensor:
        """Accuracies (masks, tasks so far) of the client's net on its own test images."""
        rows = torch.zeros(len(MASKS), client.task + 1, dtype=torch.float64)
        with self.engine.on_device(client):
            for task in range(client.task + 1):
                ids = client.data.test_ids(task)
                for batch, output in client.infer(ids):
                    for mask, classes in enumerate((client.data.classes(task), client.seen)):
                        rows[mask, task] += correct(output.logits, batch.labels, classes).sum().item() / len(ids)
        return rows

    def _seed(self, kind: Turn, client: Client, number: int = 0) -> None:
        seed_turn(self.seed, kind, client.task, client.round, client.id, number)


def seeded_stages(
    stages: Iterator[Stage], client: Client | None, train: TrainStage, seed: Callable[[int], None]
) -> None:
    """Go through stages; one is built, and trained, from a seed that no other stage's work has touched."""
    seed(0)
    for number, stage in enumerate(stages):
        train(client, stage)
        seed(number + 1)
