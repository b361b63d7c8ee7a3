"""FederatedTrainer: Algorithm 1 from top to bottom, on Lightning Fabric."""

import time
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.attendance import Attendance
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.callbacks import AT_SERVER, Callback
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint
from fedlscl.federated.client import Client
from fedlscl.federated.device import Precision, chosen_precision, connect
from fedlscl.federated.door import Door, Limits
from fedlscl.federated.engine import Engine
from fedlscl.federated.gathering import gather_accuracies, gather_clients, gather_history
from fedlscl.federated.local import LocalWork
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.metrics import AccuracyMatrix
from fedlscl.federated.parking import Parking
from fedlscl.federated.payload import Upload
from fedlscl.federated.ranks import Ranks
from fedlscl.federated.server import Server
from fedlscl.federated.state import state_of, take_up
from fedlscl.federated.traffic import count, no_traffic


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
        norm_factor: how many times the median norm an uploaded tensor's may be; 0 for any (docs/robustness.md).
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
        norm_factor: float = 1000.0,
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
        self.attendance = Attendance(participation=participation, failure_rate=failure_rate, quorum=quorum)
        self.limits = Limits(norm_factor=norm_factor, upload_gb=upload_gb)
        self.present: list[int] = []
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
        cache, parking = PrefixCache(datamodule, self.cache_gb * 2**30, cache_dtype), Parking(self.clients_gb * 2**30)
        self.engine, self.ranks = Engine(self.fabric, cache, parking=parking), Ranks(self.fabric)
        self.ranks.deal([datamodule.stream(i).num_samples for i in range(datamodule.num_clients)])
        if self.ranks.size > 1 and method.simulation_only:
            raise ValueError(f"{type(method).__name__} pools all data in one process: choose devices 1.")
        door = Door(self.method, datamodule.num_clients, datamodule.num_classes, self.limits)
        self.local, self.server = LocalWork(self.method, self.engine, seed), Server(self.method, seed, door)
        self.clients = [self._build_client(i) for i in range(datamodule.num_clients)]
        self.matrix = AccuracyMatrix(datamodule.num_clients, self.num_tasks)
        self.traffic = no_traffic(datamodule.num_clients, self.num_tasks, self.rounds_per_task)
        self.history = []

    def restore(self, path: Path, identity: str = "") -> Progress:
        """Take up the state of a checkpoint, after ``setup``; the beginning of its identity suffices."""
        return take_up(self, load_last_good(path, identity))

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
        self.present = self.attendance.present(len(self.clients), self.seed, progress)
        self._call("on_round_start")
        for client in self.clients:
            client.round = progress.round
        present, begun = [self.clients[index] for index in self.present], len(self.history)
        for client in filter(self._is_mine, present):
            self._local_round(client)
        gather_history(self.ranks, self.history, begun)
        if progress.last:
            gather_accuracies(self.ranks, self.matrix, "before", progress.task, present)
        if self.server_every == "round" or progress.last:
            uploads = self.ranks.gather([self.local.upload(client) for client in filter(self._is_mine, present)])
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
        uploads = self.server.admit(uploads, self.progress)
        self.attendance.check_quorum(len(uploads), len(self.clients), self.progress)
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
        self.engine.parking.leave(client)
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
        save_checkpoint(self.run_dir / "checkpoint.pt", state_of(self, progress))
        self._call("on_checkpoint")
