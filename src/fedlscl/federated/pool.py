"""ClientPool, the clients' part of Algorithm 1, and LocalPool, which simulates all clients in this process.

``fedlscl.flower.server.FlowerPool`` is the other implementation; its clients are on other machines.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.data import Batch, SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine, Ranks
from fedlscl.federated.method import Method, Progress, Stage, StreamShape
from fedlscl.federated.metrics import MASKS, correct
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.readout import ReadoutConfig, check_widths, client_sums, heads_of, readout_logits
from fedlscl.federated.state import RunState
from fedlscl.nets.net import Net

TrainStage = Callable[[Client | None, Stage], Any]
"""Trains one stage of a client, or of the server (None)."""


class ClientPool(ABC):
    """Runs the clients' part of Algorithm 1."""

    @abstractmethod
    def setup(self, run: RunState) -> None:
        """Build the clients of a run; once the sizes of the data are known, its validator gets them, too."""

    @abstractmethod
    def begin_task(self, task: int, first_round: int) -> None:
        """Start a task on all clients; with ``first_round`` > 0 a resumed one."""

    @abstractmethod
    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> list[Upload]:
        """Local training of one round, evaluation in a task's last round, and uploads if the server aggregates.

        Of a message that cannot be read, ``run.validator.reject`` gets the reason.
        """

    @abstractmethod
    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        """Deliver the server's responses, by client."""

    @abstractmethod
    def end_task(self, progress: Progress) -> None:
        """End a task on all clients and evaluate them."""

    @abstractmethod
    def readout_sums(self, progress: Progress, save: Callable[[], None]) -> list[Upload]:
        """All clients' sums of the features of a task that has ended; ``save`` writes a checkpoint before them."""

    @abstractmethod
    def evaluate_readouts(self, progress: Progress, answer: Payload) -> None:
        """Deliver the readouts' heads to all clients, which evaluate them."""

    @abstractmethod
    def finish(self, save: Callable[[], None]) -> None:
        """Called after the last task; ``save`` writes a checkpoint."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The clients' part of a checkpoint: tensors, numbers and text by name."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        """Restore the result of ``state_dict``; ``progress`` is the next round."""


@dataclass(eq=False, repr=False)
class LocalPool(ClientPool):
    """All clients in this process, or distributed over the processes of ``ranks``."""

    datamodule: SpatialTemporalDataModule
    ranks: Ranks
    train_stage: TrainStage
    call: Callable[..., None]
    """Calls a hook of all callbacks."""

    @override
    def setup(self, run: RunState) -> None:
        if self.ranks.size > 1 and run.method.simulation_only:
            raise ValueError(
                f"devices must be 1 for {type(run.method).__name__}, which reads all clients' data in one process, got "
                f"{self.ranks.size}."
            )
        self.run, self.runner = run, ClientRunner(run.method, run.engine, run.seed, run.readout_config)
        data, tasks = self.datamodule, range(run.num_tasks)
        shape = run.validator.stream = StreamShape(data.num_classes, data.num_clients, data.num_tasks)
        streams = [data.stream(index) for index in range(data.num_clients)]
        ranks = assign([stream.num_samples for stream in streams], self.ranks.size)
        for index, stream in enumerate(streams):
            net = self.runner.build(index, shape)
            run.clients.append(Client(id=index, net=net, data=stream, engine=run.engine))
            run.engine.offloader.release(run.clients[-1])
        self.own = {client.id: client for client in run.clients if ranks[client.id] == self.ranks.rank}
        run.readouts.widths = check_widths(run.readout_config, run.nets)
        run.data = {
            "dataset": data.dataset,
            "fingerprint": data.data.fingerprint,
            "num_classes": data.num_classes,
            "num_clients": data.num_clients,
            "num_tasks": run.num_tasks,
            "classes": [[stream.classes(task).tolist() for task in tasks] for stream in streams],
            "train_samples": [[len(stream.train_ids(task)) for task in tasks] for stream in streams],
            "test_samples": [[len(stream.evaluation_ids(task)) for task in tasks] for stream in streams],
            **evaluated_on(data),
        }

    @override
    def begin_task(self, task: int, first_round: int) -> None:
        for client in self.run.clients:
            client.task, client.round = task, first_round
        for client in self.own.values() if first_round == 0 else ():
            self.runner.begin_task(client)

    @override
    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> list[Upload]:
        run = self.run
        for client in run.clients:
            client.round = progress.round
        start = len(run.history)
        uploads: list[Upload] = []
        accuracies: list[tuple[int, Tensor]] = []
        for client in (self.own[index] for index in participants if index in self.own):
            self.call("on_client_start", client)
            with run.engine.on_device(client):
                self.runner.train(client, self.train_stage)
                if progress.last:
                    accuracies.append(self._evaluate(client, "before"))
                if with_uploads:
                    uploads.append(self.runner.upload(client))
        if self.ranks.size > 1:
            run.history[start:] = sorted(self.ranks.gather(run.history[start:]), key=lambda entry: entry["client"])
        if progress.last:
            self._gather_accuracies("before", progress.task, accuracies)
        return self._gather_uploads(uploads)

    @override
    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        for index, answer in answers.items():
            if index in self.own:
                self.runner.download(self.own[index], answer)

    @override
    def end_task(self, progress: Progress) -> None:
        accuracies: list[tuple[int, Tensor]] = []
        for client in self.own.values():
            with self.run.engine.on_device(client):
                self.runner.end_task(client)
                accuracies.append(self._evaluate(client, "after"))
        self._gather_accuracies("after", progress.task, accuracies)

    @override
    def readout_sums(self, progress: Progress, save: Callable[[], None]) -> list[Upload]:
        return self._gather_uploads([self.runner.readout_sums(client) for client in self.own.values()])

    @override
    def evaluate_readouts(self, progress: Progress, answer: Payload) -> None:
        measured = [(index, self.runner.evaluate_readouts(client, answer)) for index, client in self.own.items()]
        for index, found in self.ranks.gather(measured):
            for name, rows in found.items():
                self.run.readouts.record(name, index, progress.task, rows)

    @override
    def finish(self, save: Callable[[], None]) -> None:
        self._gather_clients()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._gather_clients()
        return {"clients": [client.state_dict() for client in self.run.clients]}

    @override
    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        for client, values in zip(self.run.clients, state["clients"], strict=True):
            with self.run.engine.on_device(client):
                client.load_state_dict(values)
            client.task, client.round = min(progress.task, self.run.num_tasks - 1), progress.round

    def _evaluate(self, client: Client, phase: str) -> tuple[int, Tensor]:
        self.call("on_evaluation_start", client, phase)
        start = time.perf_counter()
        rows = self.runner.evaluate(client)
        self.run.matrix.record(phase, client.id, client.task, rows)
        self.call("on_evaluation_end", client, phase, time.perf_counter() - start)
        return client.id, rows

    def _gather_uploads(self, own: list[Upload]) -> list[Upload]:
        return sorted(self.ranks.gather(own), key=lambda upload: upload.client)

    def _gather_accuracies(self, phase: str, task: int, own: list[tuple[int, Tensor]]) -> None:
        for index, rows in self.ranks.gather(own):
            self.run.matrix.record(phase, index, task, rows)

    def _gather_clients(self) -> None:
        if self.ranks.size > 1:
            for index, state in self.ranks.gather([(index, client.state_dict()) for index, client in self.own.items()]):
                if index not in self.own:
                    with self.run.engine.on_device(self.run.clients[index]):
                        self.run.clients[index].load_state_dict(state)


def evaluated_on(data: SpatialTemporalDataModule) -> dict[str, str]:
    """What results say of the images that clients are evaluated on: nothing for test images."""
    return {} if data.evaluate_on == "test" else {"evaluated_on": data.evaluate_on}


def assign(work: Sequence[int], num_ranks: int) -> list[int]:
    """Rank of each client: the clients with most samples first, each to the rank with least work so far.

    Example:
        >>> assign([5, 1, 4, 3], num_ranks=2)
        [0, 0, 1, 1]
    """
    loads, ranks = [0] * num_ranks, [0] * len(work)
    for client in sorted(range(len(work)), key=lambda index: -work[index]):
        ranks[client] = loads.index(min(loads))
        loads[ranks[client]] += work[client]
    return ranks


@dataclass(eq=False)
class ClientRunner:
    """Calls a method's client-side hooks, each from its own seed; the same in a simulation and on a Flower node."""

    method: Method
    engine: Engine
    seed: int
    readouts: ReadoutConfig = field(default_factory=ReadoutConfig)

    def build(self, index: int, stream: StreamShape) -> Net:
        """The net of a client; all clients are seeded alike."""
        seed_turn(self.seed, Turn.BUILD)
        return self.method.build_net(index, stream)

    def begin_task(self, client: Client) -> None:
        """Start ``client.task``."""
        with self._turn(Turn.BEGIN, client):
            client.num_synced_rounds = 0
            self.method.begin_task(client)

    def train(self, client: Client, train_stage: TrainStage) -> None:
        """Train all stages of ``client.round``."""
        with self.engine.on_device(client):
            for stage in seeded(self.method.stages(client), partial(self._seed, Turn.TRAIN, client)):
                train_stage(client, stage)

    def upload(self, client: Client) -> Upload:
        """The client's message of ``client.round``."""
        with self._turn(Turn.UPLOAD, client):
            return self._message(client, self.method.upload(client))

    def download(self, client: Client, answer: Payload) -> None:
        """Apply the server's response of ``client.round``."""
        with self._turn(Turn.DOWNLOAD, client):
            self.method.download(client, answer)
            client.num_synced_rounds += 1

    def end_task(self, client: Client) -> None:
        """End ``client.task``."""
        with self._turn(Turn.END, client):
            self.method.end_task(client)

    def evaluate(self, client: Client) -> Tensor:
        """Accuracies (masks, tasks so far) of the client's net on its own test images."""
        with self.engine.on_device(client):
            return self._accuracies(client, lambda output: {"own": output.logits})["own"]

    def readout_sums(self, client: Client) -> Upload:
        """The client's sums of features of ``client.task``, masked where the method masks sums."""
        is_masked = self.method.masks_sums
        with self._turn(Turn.READOUT, client):
            sums = client_sums(client, self.readouts, whole=is_masked)
            return self._message(client, self.method.mask_sums(client, sums) if is_masked else sums)

    def evaluate_readouts(self, client: Client, answer: Payload) -> dict[str, Tensor]:
        """Keep the readouts' heads; their accuracies (masks, tasks so far) on the client's test images, by name."""
        with self.engine.on_device(client):
            client.readouts = heads_of(answer)
            heads = self.engine.fabric.to_device(client.readouts)
            views = partial(self.readouts.views, client.net)
            return self._accuracies(client, lambda features: readout_logits(features, heads), views)

    def _accuracies(
        self, client: Client, logits: Callable[[Any], dict[str, Tensor]], views: Callable[[Batch], Any] | None = None
    ) -> dict[str, Tensor]:
        """Accuracies (masks, tasks so far) of each of the ``logits`` of the net's outputs, or of ``views``, by name."""
        rows: dict[str, Tensor] = {}
        for task in range(client.task + 1):
            ids, device = client.data.evaluation_ids(task), self.engine.fabric.device
            masks = [classes.to(device) for classes in (client.data.classes(task), client.seen)]
            counts: dict[str, list[Tensor]] = {}  # of each batch, on the device until the end
            for batch, output in self.engine.infer(client.net, client.data, ids, views=views):
                for name, scores in logits(output).items():
                    hits = [correct(scores, batch.labels, classes).sum() for classes in masks]
                    counts.setdefault(name, []).append(torch.stack(hits))
            for name, hits in counts.items():
                row = rows.setdefault(name, torch.zeros(len(MASKS), client.task + 1, dtype=torch.float64))
                row[:, task] = sum(torch.stack(hits).cpu().double() / len(ids))
        return rows

    def _message(self, client: Client, payload: Payload) -> Upload:
        counts = client.data.class_counts(client.task)
        return Upload(client=client.id, task=client.task, round=client.round, payload=payload, class_counts=counts)

    @contextmanager
    def _turn(self, kind: "Turn", client: Client) -> Iterator[None]:
        self._seed(kind, client)
        with self.engine.on_device(client):
            yield

    def _seed(self, kind: "Turn", client: Client, number: int = 0) -> None:
        seed_turn(self.seed, kind, client.task, client.round, client.id, number)


def seeded(stages: Iterator[Stage], seed: Callable[[int], None]) -> Iterator[Stage]:
    """Yield stages to train, each of which is built and trained from its own seed."""
    seed(0)
    for number, stage in enumerate(stages, start=1):
        yield stage
        seed(number)


class Turn(IntEnum):
    """Kinds of turn, part of every seed."""

    BUILD = 0
    BEGIN = 1
    TRAIN = 2
    UPLOAD = 3
    SERVER = 4
    DOWNLOAD = 5
    END = 6
    SERVER_TRAIN = 7
    SAMPLING = 8
    READOUT = 9


def seed_turn(seed: int, *entropy: int) -> None:
    """Seed Python, NumPy and torch for one turn: its kind, task, round, client and stage.

    No random state is ever saved: a resumed run, another order of clients and a run over a network draw the same
    numbers.
    """
    state = np.random.SeedSequence([seed, *entropy]).generate_state(4, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))
