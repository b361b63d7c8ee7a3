"""Bytes and seconds of a run, estimated from a rehearsal: two clients, three tasks and rounds, few steps per stage."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from itertools import islice
from operator import length_hint
from statistics import median
from typing import NamedTuple

from typing_extensions import override

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Stage
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import ClientSampling, FederatedTrainer

TASKS = ROUNDS = 3
"""The second task brings new stages, the third shows how these grow; the first and the last round are special."""
STEPS = 3
"""Timed steps of a stage, after one to warm up."""


class Forecast(NamedTuple):
    """Estimate for a whole run: bytes of all clients, and seconds."""

    up: float
    down: float
    seconds: float


def forecast(
    trainer: FederatedTrainer, method: Method, datamodule: SpatialTemporalDataModule, seed: int = 42
) -> Forecast:
    """Rehearse with two typical clients and extrapolate to all clients, tasks and rounds; changes no argument."""
    num_tasks = trainer.count_tasks(datamodule)
    streams = [datamodule.stream(client) for client in range(datamodule.num_clients)]
    images = [[len(stream.train_ids(task)) for task in range(num_tasks)] for stream in streams]
    # A secure sum needs two clients; a method that pools all data has one that uploads.
    chosen = _typical(images, 1 if method.simulation_only else min(2, len(images)))
    few = copy(datamodule)
    few._splits, few.num_clients = [datamodule.splits[client] for client in chosen], len(chosen)
    short, rehearsal = copy(trainer), _Rehearsal(trainer.cache_gb > 0)
    short.rounds_per_task, short.max_tasks = min(ROUNDS, trainer.rounds_per_task), min(TASKS, num_tasks)
    short.sampling, short.max_norm_ratio = ClientSampling(quorum=0), 0.0
    short.callbacks, short.run_dir, short.devices = [rehearsal], None, 1
    short.fit(method, few, seed)
    participation, up, down, seconds = trainer.sampling.participation, 0.0, 0.0, 0.0
    senders = len(images) * participation / len(chosen)
    for task in range(num_tasks):
        known = min(task, len(rehearsal.tasks) - 1)
        done = {name: _whole_task(values, trainer.rounds_per_task) for name, values in rehearsal.tasks[known].items()}
        scale = sum(client[task] for client in images) / max(1, sum(images[client][known] for client in chosen))
        up += done["up"] * (1 if method.simulation_only else senders)
        down += done["down"] * senders
        # Outside of the rounds, most of the time is evaluation, on all tasks so far.
        outside = rehearsal.outside[known] * (task + 1) / (known + 1)
        seconds += scale * (participation * done["clients"] + outside) / trainer.devices + done["server"]
    return Forecast(up, down, seconds)


def _typical(images: list[list[int]], number: int) -> list[int]:
    """Clients without empty tasks if possible, and of these the closest to the median number of images."""
    middle = median(sum(client) for client in images)
    return sorted(sorted(range(len(images)), key=lambda i: (images[i].count(0), abs(sum(images[i]) - middle)))[:number])


def _whole_task(by_round: Sequence[float], rounds: int) -> float:
    """Sum over a task from its first round, another one if there are three, and its last."""
    return sum(by_round) + (by_round[1] * (rounds - len(by_round)) if rounds > len(by_round) else 0)


class _Rehearsal(Callback):
    """Shortens every stage, and records bytes and seconds by task and round, and seconds outside of rounds by task."""

    def __init__(self, has_cache: bool) -> None:
        self.has_cache, self.since = has_cache, time.perf_counter()
        self.tasks: list[dict[str, list[float]]] = []
        self.outside: list[float] = []

    @override
    def on_fit_start(self, run: RunState) -> None:
        self.engine, self.train, self.since = run.engine, run.engine.train, time.perf_counter()
        run.engine.train = self._few_steps

    @override
    def on_task_start(self, run: RunState) -> None:
        self.tasks.append({"up": [], "down": [], "clients": [], "server": []})
        self.outside.append(self._lap())

    @override
    def on_round_start(self, run: RunState) -> None:
        self.outside[-1] += self._lap()
        self.rest = self.server = 0.0

    @override
    def on_stage_start(self, run: RunState, client: Client | None, stage: Stage) -> None:
        self.at_server, self.fills_cache = client is None, run.progress.round == 0 and self.has_cache

    @override
    def on_round_end(self, run: RunState) -> None:
        done = self.tasks[-1]
        done["clients"].append(self._lap() + self.rest)
        done["server"].append(self.server)
        for name in ("up", "down"):
            done[name].append(int(run.traffic[name][:, *run.progress.position].sum()))

    @override
    def on_task_end(self, run: RunState) -> None:
        self.outside[-1] += self._lap()

    def _few_steps(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        if self.fills_cache and not self.at_server:
            for batch in stage.batches:
                if getattr(batch, "augmented", True):
                    break
                self.engine.prepare(batch, stage.module.net)
        steps, few = length_hint(stage.batches, 1) * stage.epochs, list(islice(stage.batches, STEPS + 1))
        if not few or not steps:
            return {}
        started = time.perf_counter()
        self.train(stage._replace(batches=few[:1], epochs=1))
        warm = time.perf_counter()
        terms = self.train(stage._replace(batches=few[-STEPS:], epochs=1))
        ended = time.perf_counter()
        whole = steps * (ended - warm) / len(few[-STEPS:])
        # A round takes its measured time with the estimate for the whole stage instead of these steps.
        self.rest += (0.0 if self.at_server else whole) - (ended - started)
        self.server += whole if self.at_server else 0.0
        return terms

    def _lap(self) -> float:
        since, self.since = self.since, time.perf_counter()
        return self.since - since
