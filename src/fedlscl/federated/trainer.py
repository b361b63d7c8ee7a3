"""FederatedTrainer: Algorithm 1 from top to bottom, on Lightning Fabric."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedlscl.callbacks import AT_SERVER, Callback
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint
from fedlscl.federated.client import Client, ClientOffloader
from fedlscl.federated.distributed import Ranks, gather_accuracies, gather_clients, gather_history
from fedlscl.federated.engine import Engine, Precision, chosen_precision, connect
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.metrics import MASKS, AccuracyMatrix, correct
from fedlscl.federated.payload import Payload, Upload, num_bytes
from fedlscl.federated.seeding import Turn, seed_turn
from fedlscl.federated.validation import UploadLimits, UploadValidator
from fedlscl.nets.net import Net

# Bytes and numbers sent, by client, task and round.

Traffic = dict[str, Tensor]
"""``up`` and ``down`` in bytes, ``up_values`` and ``down_values`` in numbers, (clients, tasks, rounds) each."""


def no_traffic(num_clients: int, num_tasks: int, rounds_per_task: int) -> Traffic:
    """Of a run that has not begun."""
    shape = (num_clients, num_tasks, rounds_per_task)
    return {name: torch.zeros(shape, dtype=torch.int64) for name in ("up", "down", "up_values", "down_values")}


def count(traffic: Traffic, direction: str, client: int, progress: Progress, payload: Payload) -> None:
    """Enter one message, 'up' or 'down'."""
    place = client, *progress
    traffic[direction][place] = num_bytes(payload)
    traffic[f"{direction}_values"][place] = sum(value.numel() for value in payload.values())


def extrapolated(traffic: Traffic, direction: str, rounds_done: int) -> float:
    """Bytes of a whole run whose first task has had so many rounds, the last of which stands for all after it.

    Example:
        >>> traffic = no_traffic(num_clients=1, num_tasks=2, rounds_per_task=3)
        >>> traffic["up"][0, 0] = torch.tensor([10, 4, 0])
        >>> extrapolated(traffic, "up", rounds_done=2)
        36.0
    """
    _, tasks, rounds = traffic[direction].shape
    by_round = traffic[direction][:, 0].sum(0)[:rounds_done].tolist()
    return float(tasks * (sum(by_round) + (rounds - rounds_done) * by_round[-1]))


# Who takes part in a round: sampled clients, less those that fail.


@dataclass(frozen=True, kw_only=True)
class ClientSampling:
    """Draws the participants of every round anew from the run's seed; nothing has to be saved."""

    participation: float = 1.0
    """Share of the clients that are asked in a round; at least one is."""
    failure_rate: float = 0.0
    """Probability that a client that was asked fails: it does not train and gets no answer."""
    quorum: int = 1
    """Uploads without which a round cannot be aggregated."""
    absences: frozenset[tuple[int, int, int]] = frozenset()
    """Clients that fail besides, as (client, task, round)."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation {self.participation} is no share: choose more than 0, up to 1.")
        if not 0 <= self.failure_rate < 1:
            raise ValueError(f"failure_rate {self.failure_rate} is no share: choose 0 or more, below 1.")
        if self.quorum < 0:
            raise ValueError(f"quorum {self.quorum} cannot be counted: choose 0 or more.")

    def participants(self, num_clients: int, seed: int, progress: Progress) -> list[int]:
        """Clients that take part in a round, in order.

        Example:
            >>> Attendance(participation=0.5).present(4, 42, Progress(0, 0))
            [1, 2]
        """
        generator = np.random.default_rng(np.random.SeedSequence([seed, Turn.ATTENDANCE, *progress]))
        asked = generator.permutation(num_clients)[: max(1, round(self.participation * num_clients))]
        fails = generator.random(num_clients) < self.failure_rate
        named = {client for client, *place in self.absences if place == [*progress]}
        return sorted(int(client) for client in asked if not fails[client] and client not in named)

    def check_quorum(self, num_uploads: int, num_clients: int, progress: Progress) -> None:
        """Refuse to aggregate too few uploads.

        Raises:
            ValueError: if there are fewer than the quorum.
        """
        if num_uploads < self.quorum:
            raise ValueError(
                f"quorum {self.quorum} is not met: {num_uploads} of {num_clients} clients answered in task "
                f"{progress.task + 1}, round {progress.round + 1}; lower --trainer.quorum, or go on from the last "
                "checkpoint when more of them are there."
            )


# What a client does in its turn; the same in a simulation and on a node of a network.

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
            client.num_synced_rounds = 0
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


def seeded_stages(
    stages: Iterator[Stage], client: Client | None, train: TrainStage, seed: Callable[[int], None]
) -> None:
    """Go through stages; one is built, and trained, from a seed that no other stage's work has touched."""
    seed(0)
    for number, stage in enumerate(stages):
        train(client, stage)
        seed(number + 1)


# What the server does in a round; the same in a simulation and over a network.


class Server:
    """Turns the uploads of a round into one answer for each sender.

    Args:
        method: whose hooks.
        seed: of the run.
        validator: what uploads have to pass.
    """

    def __init__(self, method: Method, seed: int, validator: UploadValidator) -> None:
        self.method, self.seed, self.validator = method, seed, validator

    def filter(self, uploads: list[Upload], progress: Progress) -> list[Upload]:
        """The uploads that count; no other may be trained on or aggregated."""
        return self.validator.filter(uploads, progress)

    def train(self, uploads: list[Upload], progress: Progress, train: TrainStage) -> None:
        """What the method trains at the server."""

        def seed(number: int) -> None:
            place = (*progress, number) if number else tuple(progress)
            seed_turn(self.seed, Turn.SERVER_TRAIN, *place)

        seeded_stages(self.method.server_stages(uploads, progress), None, train, seed)

    def aggregate(self, uploads: list[Upload], progress: Progress) -> dict[int, Payload]:
        """One answer for each sender, by client."""
        seed_turn(self.seed, Turn.SERVER, *progress)
        answers = self.method.aggregate(uploads, progress)
        return {upload.client: answer for upload, answer in zip(uploads, answers, strict=True)}


# The whole federation between two rounds: what a checkpoint holds, and how it is taken up.


def federation_state(trainer: "FederatedTrainer", progress: Progress) -> dict[str, Any]:
    """Tensors and plain values, as they are before the round of ``progress``."""
    return {
        "identity": trainer.identity,
        "progress": list(progress),
        "method": trainer.method.state_dict(),
        "validator": trainer.server.validator.state_dict(),
        "clients": [client.state_dict() for client in trainer.clients],
        "matrix": trainer.matrix.values,
        "traffic": trainer.traffic,
        "history": trainer.history,
    }


def restore_state(trainer: "FederatedTrainer", state: dict[str, Any]) -> Progress:
    """Put a trainer whose clients are built where ``federation_state`` found one; returns the round that comes next."""
    trainer.method.load_state_dict(state["method"])
    trainer.server.validator.load_state_dict(state["validator"])
    progress = Progress(*state["progress"])
    for client, values in zip(trainer.clients, state["clients"], strict=True):
        with trainer.engine.on_device(client):
            client.load_state_dict(values)
        client.task, client.round = min(progress.task, trainer.num_tasks - 1), progress.round
    trainer.matrix.values = state["matrix"]
    trainer.traffic, trainer.history = state["traffic"], state["history"]
    return progress


class FederatedTrainer:
    """Runs a method over clients, tasks and rounds.

    Args:
        rounds_per_task: communication rounds between two tasks (R; 5 in the paper).
        server_every: whether the server aggregates in every 'round', or once per 'task' (Algorithm 1's letter).
        accelerator: where to train, as in Fabric: auto, cpu, gpu, cuda, mps.
        devices: processes that share the clients, each on a device of its own (or on cores of its own, on a CPU).
        precision: 32-true, bf16-mixed, or 16-mixed on CUDA; auto is bf16-mixed where the hardware has it.
        cache_gb: memory for frozen ViT tokens that are computed once per image; 0 turns the cache off.
        clients_gb: memory for idle clients; above it those that worked longest ago wait in files.
        checkpoint_every: rounds between two checkpoints; the end of a task always has one.
        participation: share of the clients that are asked in a round, drawn anew each time; the others sit it out.
        failure_rate: share of those asked that fail in a round, drawn likewise: they do not train and get no answer.
        quorum: uploads without which a round cannot be aggregated; with 0 it then passes without.
        max_norm_ratio: how many times the median norm an uploaded tensor's may be; 0 for any (docs/robustness.md).
        upload_gb: largest upload; what is larger, or malformed in any other way, is left out of its round.
        max_tasks: stop after so many tasks; all where not given.
        default_root_dir: folder of all runs.
        name: name of the run's folder in it; the method's name where not given.
        callbacks: observers beside the built-in ones.
    """

    def __init__(
        self,
        *,
        rounds_per_task: int = 5,
        server_every: Literal["round", "task"] = "round",
        accelerator: str = "auto",
        devices: int = 1,
        precision: Precision = "32-true",
        cache_gb: float = 4.0,
        clients_gb: float = 16.0,
        checkpoint_every: int = 1,
        participation: float = 1.0,
        failure_rate: float = 0.0,
        quorum: int = 1,
        max_norm_ratio: float = 1000.0,
        upload_gb: float = 1.0,
        max_tasks: int | None = None,
        default_root_dir: str = "runs",
        name: str | None = None,
        callbacks: list[Callback] | None = None,
    ) -> None:
        if rounds_per_task < 1:
            raise ValueError(f"rounds_per_task {rounds_per_task} trains nothing: choose 1 or more.")
        if max_tasks is not None and max_tasks < 1:
            raise ValueError(f"max_tasks {max_tasks} trains nothing: choose 1 or more, or leave it out.")
        for field, value in (("cache_gb", cache_gb), ("clients_gb", clients_gb)):
            if value < 0:
                raise ValueError(f"{field} {value} is no amount of memory: choose 0 or more.")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every {checkpoint_every} cannot be counted: choose 1 or more.")
        self.clients_gb, self.checkpoint_every = clients_gb, checkpoint_every
        self.sampling = ClientSampling(participation=participation, failure_rate=failure_rate, quorum=quorum)
        self.limits = UploadLimits(max_norm_ratio=max_norm_ratio, upload_gb=upload_gb)
        self.participants: list[int] = []
        self.rounds_per_task, self.server_every, self.max_tasks = rounds_per_task, server_every, max_tasks
        self.accelerator, self.devices, self.cache_gb = accelerator, devices, cache_gb
        self.precision = chosen_precision(precision, accelerator)
        self.default_root_dir, self.name = default_root_dir, name
        self.callbacks = list(callbacks or [])
        self.run_dir: Path | None = None
        self.clients: list[Client] = []
        self.traffic: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.progress = Progress(0, 0)

    @property
    def num_tasks(self) -> int:
        """Tasks of this run."""
        return min(self.datamodule.num_tasks, self.max_tasks or self.datamodule.num_tasks)

    @property
    def step(self) -> int:
        """Rounds completed or under way since the start, counted from 0."""
        return self.progress.task * self.rounds_per_task + self.progress.round

    def fit(
        self,
        method: Method,
        datamodule: SpatialTemporalDataModule,
        seed: int = 42,
        checkpoint: Path | None = None,
        identity: str = "",
    ) -> AccuracyMatrix:
        """Learn all tasks; from ``checkpoint`` on where one is given.

        ``identity`` names the configuration; a checkpoint of another one is refused.
        """
        self.setup(method, datamodule, seed)
        start = self.progress = Progress(0, 0) if checkpoint is None else self.restore(checkpoint, identity)
        self.identity = identity
        try:
            self._call("on_fit_start")
            self.run_dir = self.ranks.from_first(self.run_dir)
            for task in range(start.task, self.num_tasks):
                self._learn_task(task, start.round if task == start.task else 0)
            gather_clients(self.ranks, self.engine, self.clients)
            self._call("on_fit_end")
        except BaseException:
            self._call("on_exception")
            raise
        return self.matrix

    def setup(self, method: Method, datamodule: SpatialTemporalDataModule, seed: int) -> None:
        """Build Fabric, data and clients without training.

        The trainer works on a copy of the method, whose server state would otherwise reach into its next run.
        """
        self.method, self.datamodule, self.seed = deepcopy(method), datamodule, seed
        datamodule.run_seed = seed
        datamodule.setup()
        self.fabric = connect(self.accelerator, self.devices, self.precision)
        cache_dtype = torch.float32 if self.precision == "32-true" else torch.bfloat16
        cache, offloader = (
            PrefixCache(datamodule, self.cache_gb * 2**30, cache_dtype),
            ClientOffloader(self.clients_gb * 2**30),
        )
        self.engine, self.ranks = Engine(self.fabric, cache, offloader=offloader), Ranks(self.fabric)
        self.ranks.deal([datamodule.stream(i).num_samples for i in range(datamodule.num_clients)])
        if self.ranks.size > 1 and method.simulation_only:
            raise ValueError(f"{type(method).__name__} pools all data in one process: choose devices 1.")
        validator = UploadValidator(self.method, datamodule.num_clients, datamodule.num_classes, self.limits)
        self.local, self.server = LocalWork(self.method, self.engine, seed), Server(self.method, seed, validator)
        self.clients = [self._build_client(i) for i in range(datamodule.num_clients)]
        self.matrix = AccuracyMatrix(datamodule.num_clients, self.num_tasks)
        self.traffic = no_traffic(datamodule.num_clients, self.num_tasks, self.rounds_per_task)
        self.history = []

    def restore(self, path: Path, identity: str = "") -> Progress:
        """Take up the state of a checkpoint, after ``setup``; the beginning of its identity suffices."""
        return restore_state(self, load_last_good(path, identity))

    def _learn_task(self, task: int, first_round: int) -> None:
        self.progress = Progress(task, first_round)
        for client in self.clients:
            client.task, client.round = task, first_round
            if first_round == 0 and self.ranks.owns(client.id):
                self.local.begin_task(client)
        self._call("on_task_start")
        for round_ in range(first_round, self.rounds_per_task):
            self._round(Progress(task, round_, round_ == self.rounds_per_task - 1, task == self.num_tasks - 1))
            if not self.progress.last and (round_ + 1) % self.checkpoint_every == 0:
                self._checkpoint(Progress(task, round_ + 1))
        for client in filter(self._is_mine, self.clients):
            self.local.end_task(client)
            self._evaluate(client, "after")
        gather_accuracies(self.ranks, self.matrix, "after", task, self.clients)
        self._call("on_task_end")
        self._checkpoint(Progress(task + 1, 0))

    def _round(self, progress: Progress) -> None:
        self.progress = progress
        self.participants = self.sampling.participants(len(self.clients), self.seed, progress)
        self._call("on_round_start")
        for client in self.clients:
            client.round = progress.round
        participants, begun = [self.clients[index] for index in self.participants], len(self.history)
        for client in filter(self._is_mine, participants):
            self._local_round(client)
        gather_history(self.ranks, self.history, begun)
        if progress.last:
            gather_accuracies(self.ranks, self.matrix, "before", progress.task, participants)
        if self.server_every == "round" or progress.last:
            uploads = self.ranks.gather([self.local.upload(client) for client in filter(self._is_mine, participants)])
            self._server_round(sorted(uploads, key=lambda upload: upload.client))
        self._call("on_round_end")

    def _local_round(self, client: Client) -> None:
        self._call("on_client_start", client)
        self.local.train(client, self._train)
        if self.progress.last:
            self._evaluate(client, "before")

    def _train(self, client: Client | None, stage: Stage) -> None:
        self._call("on_stage_start", client, stage)
        started = time.perf_counter()
        terms = self.engine.train(stage, lambda size: self._call("on_batch_end", client, size))
        seconds = time.perf_counter() - started
        task, round_ = self.progress
        where = {"task": task, "round": round_, "client": AT_SERVER if client is None else client.id}
        self.history.append({**where, "stage": stage.name, "terms": terms})
        self._call("on_stage_end", client, stage, terms, seconds)

    def _server_round(self, uploads: list[Upload]) -> None:
        for upload in uploads:
            count(self.traffic, "up", upload.client, self.progress, upload.payload)
        uploads = self.server.filter(uploads, self.progress)
        self.sampling.check_quorum(len(uploads), len(self.clients), self.progress)
        if not any(upload.num_samples for upload in uploads):
            return
        self.server.train(uploads, self.progress, self._train)
        started = time.perf_counter()
        answers = self.server.aggregate(uploads, self.progress)
        self._call("on_server_end", time.perf_counter() - started)
        for index, answer in answers.items():
            count(self.traffic, "down", index, self.progress, answer)
            if self.ranks.owns(index):
                self.local.download(self.clients[index], answer)

    def _evaluate(self, client: Client, phase: str) -> None:
        self._call("on_evaluation_start", client, phase)
        started = time.perf_counter()
        self.matrix.record(phase, client.id, client.task, self.local.evaluate(client))
        self._call("on_evaluation_end", client, phase, time.perf_counter() - started)

    def _build_client(self, index: int) -> Client:
        net = self.local.build(index, self.datamodule.num_classes)
        client = Client(id=index, net=net, data=self.datamodule.stream(index), engine=self.engine)
        self.engine.offloader.leave(client)
        return client

    def _is_mine(self, client: Client) -> bool:
        return self.ranks.owns(client.id)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks if self.ranks.is_first else ():
            getattr(callback, hook)(self, *args)

    def _checkpoint(self, progress: Progress) -> None:
        if self.run_dir is None:
            return
        gather_clients(self.ranks, self.engine, self.clients)
        if not self.ranks.is_first:
            return
        save_checkpoint(self.run_dir / "checkpoint.pt", federation_state(self, progress))
        self._call("on_checkpoint")
