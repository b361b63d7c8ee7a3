"""The clients as the trainer sees them: `ClientPool`, and `LocalPool`, which simulates all of them in this process.

``fedlscl.flower.FlowerPool`` is the other implementation; its clients are on other machines.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.federated.distributed import Ranks, gather_accuracies, gather_clients, gather_history
from fedlscl.federated.engine import Engine
from fedlscl.federated.method import Method, Progress, Stage, StreamShape
from fedlscl.federated.metrics import MASKS, correct
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.seeding import Turn, seed_turn
from fedlscl.federated.state import RunState
from fedlscl.nets.net import Net

TrainStage = Callable[[Client | None, Stage], Any]
"""Trains one stage of a client, or of the server (None)."""


class Uploads(NamedTuple):
    """What came from the participants of a round."""

    received: list[Upload]
    unreadable: dict[int, str]
    """Clients whose message could not be read, with the reason."""


class ClientPool(Protocol):
    """Carries out the clients' part of Algorithm 1."""

    @property
    def stream(self) -> StreamShape | None:
        """Sizes of the data; None as long as no client has stated its classes."""
        ...

    def begin_task(self, task: int, first_round: int) -> None:
        """Start a task on all clients; with ``first_round`` > 0 the task was started before a restart."""
        ...

    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> Uploads:
        """Local work of one round on the participants, and their uploads if the server aggregates."""
        ...

    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        """Deliver the server's answers, by client."""
        ...

    def end_task(self, progress: Progress) -> None:
        """End a task on all clients and evaluate them."""
        ...

    def finish(self, save: Callable[[], None]) -> None:
        """After the last task; ``save`` writes a checkpoint where something new arrived."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The clients' part of a checkpoint: tensors, numbers and text by name."""
        ...

    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        """Restore the clients as they were before the round of ``progress``."""
        ...


class LocalPool:
    """All clients in this process, or distributed over the processes of ``ranks``.

    Args:
        run: gets clients, accuracies and history.
        datamodule: the clients' streams of tasks.
        ranks: which process trains which client.
        train_stage: trains one stage.
        call: calls a hook of all callbacks.
    """

    def __init__(
        self,
        run: RunState,
        datamodule: SpatialTemporalDataModule,
        ranks: Ranks,
        train_stage: TrainStage,
        call: Callable[..., None],
    ) -> None:
        self.run, self.datamodule, self.ranks = run, datamodule, ranks
        self.train_stage, self.call = train_stage, call
        self.runner = ClientRunner(run.method, run.engine, run.seed)
        ranks.deal([datamodule.stream(i).num_samples for i in range(datamodule.num_clients)])
        if ranks.size > 1 and run.method.simulation_only:
            raise ValueError(f"devices must be 1 for {type(run.method).__name__}, which pools all data in one process.")
        run.clients = [self._build_client(i) for i in range(datamodule.num_clients)]
        run.data = describe_data(datamodule, run.num_tasks)

    @property
    def stream(self) -> StreamShape:
        """Classes of the data set."""
        data = self.datamodule
        return StreamShape(data.num_classes, data.num_clients, data.num_tasks)

    def begin_task(self, task: int, first_round: int) -> None:
        """Set the task on all clients; on a fresh task call the method's hook."""
        for client in self.run.clients:
            client.task, client.round = task, first_round
            if first_round == 0 and self.ranks.owns(client.id):
                self.runner.begin_task(client)

    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> Uploads:
        """Train the participants one after another; in a task's last round they are evaluated before aggregation."""
        run = self.run
        for client in run.clients:
            client.round = progress.round
        present, start = [run.clients[index] for index in participants], len(run.history)
        for client in self._mine(present):
            self.call("on_client_start", client)
            self.runner.train(client, self.train_stage)
            if progress.last:
                self._evaluate(client, "before")
        gather_history(self.ranks, run.history, start)
        if progress.last:
            gather_accuracies(self.ranks, run.matrix, "before", progress.task, present)
        if not with_uploads:
            return Uploads([], {})
        uploads = self.ranks.gather([self.runner.upload(client) for client in self._mine(present)])
        return Uploads(sorted(uploads, key=lambda upload: upload.client), {})

    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        """Apply the server's answers."""
        for index, answer in answers.items():
            if self.ranks.owns(index):
                self.runner.download(self.run.clients[index], answer)

    def end_task(self, progress: Progress) -> None:
        """Call the method's hook on every client and evaluate it."""
        for client in self._mine(self.run.clients):
            self.runner.end_task(client)
            self._evaluate(client, "after")
        gather_accuracies(self.ranks, self.run.matrix, "after", progress.task, self.run.clients)

    def finish(self, save: Callable[[], None]) -> None:
        """Every process gets all clients."""
        gather_clients(self.ranks, self.run.engine, self.run.clients)

    def state_dict(self) -> dict[str, Any]:
        """The state of every client."""
        gather_clients(self.ranks, self.run.engine, self.run.clients)
        return {"clients": [client.state_dict() for client in self.run.clients]}

    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        """Restore every client."""
        for client, values in zip(self.run.clients, state["clients"], strict=True):
            with self.run.engine.on_device(client):
                client.load_state_dict(values)
            client.task, client.round = min(progress.task, self.run.num_tasks - 1), progress.round

    def _build_client(self, index: int) -> Client:
        net = self.runner.build(index, self.stream)
        client = Client(id=index, net=net, data=self.datamodule.stream(index), engine=self.run.engine)
        self.run.engine.offloader.leave(client)
        return client

    def _mine(self, clients: Iterable[Client]) -> Iterator[Client]:
        return (client for client in clients if self.ranks.owns(client.id))

    def _evaluate(self, client: Client, phase: str) -> None:
        self.call("on_evaluation_start", client, phase)
        start = time.perf_counter()
        self.run.matrix.record(phase, client.id, client.task, self.runner.evaluate(client))
        self.call("on_evaluation_end", client, phase, time.perf_counter() - start)


class ClientRunner:
    """Calls a method's client-side hooks, each from its own seed; the same in a simulation and on a Flower node.

    Args:
        method: whose hooks.
        engine: trains and infers.
        seed: of the run.
    """

    def __init__(self, method: Method, engine: Engine, seed: int) -> None:
        self.method, self.engine, self.seed = method, engine, seed

    def build(self, index: int, stream: StreamShape) -> Net:
        """The net of a client; all clients are seeded alike."""
        seed_turn(self.seed, Turn.BUILD)
        return self.method.build_net(index, stream)

    def begin_task(self, client: Client) -> None:
        """Before the first round of ``client.task``."""
        self._seed(Turn.BEGIN, client)
        with self.engine.on_device(client):
            client.num_synced_rounds = 0
            self.method.begin_task(client)

    def train(self, client: Client, train_stage: TrainStage) -> None:
        """All stages of ``client.round``."""
        with self.engine.on_device(client):
            stages = self.method.stages(client)
            train_seeded(stages, client, train_stage, lambda number: self._seed(Turn.TRAIN, client, number))

    def upload(self, client: Client) -> Upload:
        """What the client sends after training."""
        self._seed(Turn.UPLOAD, client)
        with self.engine.on_device(client):
            payload = self.method.upload(client)
        counts = client.data.class_counts(client.task)
        return Upload(client=client.id, task=client.task, round=client.round, payload=payload, class_counts=counts)

    def download(self, client: Client, answer: Payload) -> None:
        """Apply the server's answer of ``client.round``."""
        self._seed(Turn.DOWNLOAD, client)
        with self.engine.on_device(client):
            self.method.download(client, answer)
            client.num_synced_rounds += 1

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


def train_seeded(
    stages: Iterator[Stage], client: Client | None, train_stage: TrainStage, seed: Callable[[int], None]
) -> None:
    """Train stages in order; each is built and trained from a seed that no other stage's work has touched."""
    seed(0)
    for number, stage in enumerate(stages):
        train_stage(client, stage)
        seed(number + 1)


def describe_data(data: SpatialTemporalDataModule, num_tasks: int) -> dict[str, Any]:
    """The data set and each client's share of it, by client and task."""
    tasks, streams = range(num_tasks), [data.stream(client) for client in range(data.num_clients)]
    return {
        "dataset": data.dataset,
        "fingerprint": data.data.fingerprint,
        "num_classes": data.num_classes,
        "num_clients": data.num_clients,
        "num_tasks": num_tasks,
        "classes": [[stream.classes(task).tolist() for task in tasks] for stream in streams],
        "train_samples": [[len(stream.train_ids(task)) for task in tasks] for stream in streams],
        "test_samples": [[len(stream.test_ids(task)) for task in tasks] for stream in streams],
    }
