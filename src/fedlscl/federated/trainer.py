"""FederatedTrainer: Algorithm 1 from top to bottom, on Lightning Fabric."""

import time
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.callbacks import AT_SERVER, Callback
from fedlscl.federated.checkpoint import load_checkpoint, save_checkpoint
from fedlscl.federated.client import Client
from fedlscl.federated.device import Precision, connect
from fedlscl.federated.engine import Engine
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.metrics import MASKS, AccuracyMatrix, correct
from fedlscl.federated.payload import Payload, Upload, num_bytes
from fedlscl.federated.seeding import seed_turn

BUILD, BEGIN, TRAIN, UPLOAD, SERVER, DOWNLOAD, END, SERVER_TRAIN = range(8)
"""Kinds of turn, part of every seed."""


class FederatedTrainer:
    """Runs a method over clients, tasks and rounds.

    Args:
        rounds_per_task: communication rounds between two tasks (R; 5 in the paper).
        server_every: whether the server aggregates in every 'round', or once per 'task' (Algorithm 1's letter).
        accelerator: where to train, as in Fabric: auto, cpu, gpu, cuda, mps.
        devices: number of devices.
        precision: 32-true, bf16-mixed, or 16-mixed on CUDA.
        cache_gb: memory for frozen ViT tokens that are computed once per image; 0 turns the cache off.
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
        max_tasks: int | None = None,
        default_root_dir: str = "runs",
        name: str | None = None,
        callbacks: list[Callback] | None = None,
    ) -> None:
        if rounds_per_task < 1:
            raise ValueError(f"rounds_per_task {rounds_per_task} trains nothing: choose 1 or more.")
        if max_tasks is not None and max_tasks < 1:
            raise ValueError(f"max_tasks {max_tasks} trains nothing: choose 1 or more, or leave it out.")
        if cache_gb < 0:
            raise ValueError(f"cache_gb {cache_gb} is no amount of memory: choose 0 or more.")
        self.rounds_per_task, self.server_every, self.max_tasks = rounds_per_task, server_every, max_tasks
        self.accelerator, self.devices, self.cache_gb = accelerator, devices, cache_gb
        self.precision: Precision = precision
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
            for task in range(start.task, self.num_tasks):
                self._learn_task(task, start.round if task == start.task else 0)
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
        self.engine = Engine(self.fabric, PrefixCache(datamodule, self.cache_gb * 2**30, cache_dtype))
        self.clients = [self._build_client(i) for i in range(datamodule.num_clients)]
        self.matrix = AccuracyMatrix(datamodule.num_clients, self.num_tasks)
        shape = (datamodule.num_clients, self.num_tasks, self.rounds_per_task)
        names = ("up", "down", "up_values", "down_values")
        self.traffic = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
        self.history = []

    def restore(self, path: Path, identity: str = "") -> Progress:
        """Take up the state of a checkpoint, after ``setup``; the beginning of its identity suffices."""
        state = load_checkpoint(path, identity)
        self.method.load_state_dict(state["method"])
        progress = Progress(*state["progress"])
        for client, values in zip(self.clients, state["clients"], strict=True):
            client.load_state_dict(values)
            client.task, client.round = min(progress.task, self.num_tasks - 1), progress.round
        self.matrix.values = state["matrix"]
        self.traffic, self.history = state["traffic"], state["history"]
        return progress

    def evaluate(self, client: Client) -> Tensor:
        """Accuracies (masks, tasks so far) of a client's net."""
        rows = torch.zeros(len(MASKS), client.task + 1, dtype=torch.float64)
        for task in range(client.task + 1):
            ids = client.data.test_ids(task)
            for batch, output in client.infer(ids):
                for mask, classes in enumerate((client.data.classes(task), client.seen)):
                    rows[mask, task] += correct(output.logits, batch.labels, classes).sum().item() / len(ids)
        return rows

    def _learn_task(self, task: int, first_round: int) -> None:
        self.progress = Progress(task, first_round)
        for client in self.clients:
            client.task, client.round = task, first_round
            if first_round == 0:
                self._turn(BEGIN, client)
                with self.engine.on_device(client):
                    self.method.begin_task(client)
        self._call("on_task_start")
        for round_ in range(first_round, self.rounds_per_task):
            is_last = round_ == self.rounds_per_task - 1
            self.progress = Progress(task, round_, is_last, task == self.num_tasks - 1)
            self._call("on_round_start")
            for client in self.clients:
                self._local_round(client, is_last)
            if self.server_every == "round" or is_last:
                self._server_round([self._upload(client) for client in self.clients])
            self._call("on_round_end")
            if not is_last:
                self._checkpoint(Progress(task, round_ + 1))
        for client in self.clients:
            self._turn(END, client)
            with self.engine.on_device(client):
                self.method.end_task(client)
            self._evaluate(client, "after")
        self._call("on_task_end")
        self._checkpoint(Progress(task + 1, 0))

    def _local_round(self, client: Client, is_last: bool) -> None:
        client.round = self.progress.round
        self._call("on_client_start", client)
        with self.engine.on_device(client):
            self._turn(TRAIN, client)
            for number, stage in enumerate(self.method.stages(client)):
                self._train(client, stage)
                self._turn(TRAIN, client, number + 1)
            if is_last:
                self._evaluate(client, "before")

    def _upload(self, client: Client) -> Upload:
        self._turn(UPLOAD, client)
        with self.engine.on_device(client):
            payload = self.method.upload(client)
        self._count("up", client, payload)
        counts = client.data.class_counts(client.task)
        return Upload(client=client.id, task=client.task, round=client.round, payload=payload, class_counts=counts)

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
        seed_turn(self.seed, SERVER_TRAIN, *self.progress)
        for number, stage in enumerate(self.method.server_stages(uploads, self.progress)):
            self._train(None, stage)
            seed_turn(self.seed, SERVER_TRAIN, *self.progress, number + 1)
        seed_turn(self.seed, SERVER, *self.progress)
        started = time.perf_counter()
        answers = self.method.aggregate(uploads, self.progress)
        self._call("on_server_end", time.perf_counter() - started)
        for client, answer in zip(self.clients, answers, strict=True):
            self._count("down", client, answer)
            self._turn(DOWNLOAD, client)
            self.method.download(client, answer)

    def _evaluate(self, client: Client, phase: str) -> None:
        self._call("on_evaluation_start", client, phase)
        started = time.perf_counter()
        with self.engine.on_device(client):
            self.matrix.record(phase, client.id, client.task, self.evaluate(client))
        self._call("on_evaluation_end", client, phase, time.perf_counter() - started)

    def _build_client(self, index: int) -> Client:
        seed_turn(self.seed, BUILD)
        net = self.method.build_net(index, self.datamodule.num_classes)
        return Client(id=index, net=net, data=self.datamodule.stream(index), engine=self.engine)

    def _turn(self, kind: int, client: Client, number: int = 0) -> None:
        seed_turn(self.seed, kind, client.task, client.round, client.id, number)

    def _count(self, direction: str, client: Client, payload: Payload) -> None:
        place = client.id, self.progress.task, self.progress.round
        self.traffic[direction][place] = num_bytes(payload)
        self.traffic[f"{direction}_values"][place] = sum(value.numel() for value in payload.values())

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def _checkpoint(self, progress: Progress) -> None:
        if self.run_dir is None:
            return
        state = {
            "identity": self.identity,
            "progress": list(progress),
            "method": self.method.state_dict(),
            "clients": [client.state_dict() for client in self.clients],
            "matrix": self.matrix.values,
            "traffic": self.traffic,
            "history": self.history,
        }
        save_checkpoint(self.run_dir / "checkpoint.pt", state)
        self._call("on_checkpoint")
