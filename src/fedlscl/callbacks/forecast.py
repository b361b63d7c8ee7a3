"""Bytes and seconds of a run, estimated from a rehearsal: two clients, three tasks and rounds, few steps per stage."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from itertools import islice
from operator import length_hint
from statistics import median
from typing import Any, NamedTuple, cast

from typing_extensions import override

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Stage
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer

TASKS = 3
"""Rehearsed tasks: the second brings new stages, the third shows how these grow."""
ROUNDS = 3
"""Rehearsed rounds of each: the first, one like all others, the last."""
STEPS = 3
"""Timed steps of a stage, after one to warm up."""


class Forecast(NamedTuple):
    """Estimate for a whole run."""

    up: float
    """Bytes, by all clients."""
    down: float
    seconds: float


class _Rehearsal(Callback):
    """Shortens every stage, and records per task: bytes and seconds by round, and seconds outside of the rounds."""

    def __init__(self, has_cache: bool) -> None:
        self.has_cache = has_cache
        self.tasks: list[dict[str, list[float]]] = []
        self.rest: list[list[float]] = []

    @override
    def on_fit_start(self, run: RunState) -> None:
        self.engine, self.train, self.since = run.engine, run.engine.train, time.perf_counter()
        run.engine.train = self._few_steps

    @override
    def on_task_start(self, run: RunState) -> None:
        self.tasks.append({"up": [], "down": [], "clients": [], "server": []})
        self.rest.append([self._lap()])

    @override
    def on_round_start(self, run: RunState) -> None:
        self.rest[-1].append(self._lap())
        self.extra = self.server = 0.0

    @override
    def on_stage_start(self, run: RunState, client: Client | None, stage: Stage) -> None:
        self.at_server, self.is_first = client is None, run.progress.round == 0

    @override
    def on_round_end(self, run: RunState) -> None:
        done = self.tasks[-1]
        done["clients"].append(self._lap() + self.extra)
        done["server"].append(self.server)
        for name in ("up", "down"):
            done[name].append(int(run.traffic[name][:, *run.progress.position].sum()))

    @override
    def on_task_end(self, run: RunState) -> None:
        self.rest[-1].append(self._lap())

    def _few_steps(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        started = time.perf_counter()
        if self.is_first and self.has_cache and not self.at_server:
            for batch in stage.batches:
                if getattr(batch, "augmented", True):
                    break
                self.engine.prepare(batch, stage.module.net)
        cached = time.perf_counter()
        steps, few = length_hint(stage.batches, 1) * stage.epochs, list(islice(stage.batches, STEPS + 1))
        if not few or not steps:
            return {}
        self.train(stage._replace(batches=few[:1], epochs=1))
        warm = time.perf_counter()
        terms = self.train(stage._replace(batches=few[-STEPS:], epochs=1))
        seconds = steps * (time.perf_counter() - warm) / len(few[-STEPS:])
        # The clients' part of a round is what it took, with the estimate instead of the few steps.
        self.extra -= time.perf_counter() - (started if self.at_server else cached)
        if self.at_server:
            self.server += seconds
        else:
            self.extra += seconds
        return terms

    def _lap(self) -> float:
        now, since = time.perf_counter(), self.since
        self.since = now
        return now - since


def forecast(
    trainer: FederatedTrainer, method: Method, datamodule: SpatialTemporalDataModule, seed: int = 42
) -> Forecast:
    """Rehearse with two typical clients and extrapolate to all clients, tasks and rounds; changes no argument."""
    num_tasks = min(datamodule.num_tasks, trainer.max_tasks or datamodule.num_tasks)
    images = [
        [len(datamodule.stream(client).train_ids(task)) for task in range(num_tasks)]
        for client in range(datamodule.num_clients)
    ]
    # A secure sum needs two clients; a method that pools all data has one that uploads.
    chosen = _typical(images, 1 if method.simulation_only else min(2, len(images)))
    few = copy(datamodule)
    few._splits, few.num_clients = [datamodule.splits[client] for client in chosen], len(chosen)
    rehearsal = _Rehearsal(trainer.cache_gb > 0)
    FederatedTrainer(
        rounds_per_task=min(ROUNDS, trainer.rounds_per_task),
        server_every=cast(Any, trainer.server_every),
        accelerator=trainer.accelerator,
        precision=trainer.precision,
        cache_gb=trainer.cache_gb,
        max_tasks=min(TASKS, num_tasks),
        quorum=0,
        max_norm_ratio=0.0,
        callbacks=[rehearsal],
    ).fit(method, few, seed)
    participation, up, down, seconds = trainer.sampling.participation, 0.0, 0.0, 0.0
    senders = len(images) * participation / len(chosen)
    for task in range(num_tasks):
        known = min(task, len(rehearsal.tasks) - 1)
        by_round, rest = rehearsal.tasks[known], sum(rehearsal.rest[known])
        done = {name: _whole_task(values, trainer.rounds_per_task) for name, values in by_round.items()}
        scale = sum(client[task] for client in images) / max(1, sum(images[client][known] for client in chosen))
        up += done["up"] * (1 if method.simulation_only else senders)
        down += done["down"] * senders
        # Most of the rest is evaluation, on all tasks so far.
        rest *= (task + 1) / (known + 1)
        seconds += scale * (participation * done["clients"] + rest) / trainer.devices + done["server"]
    return Forecast(up, down, seconds)


def _typical(images: list[list[int]], number: int) -> list[int]:
    """Clients without empty tasks if possible, and of these the ones closest to the median number of samples.

    Example:
        >>> _typical([[9, 9], [1, 1], [4, 4], [5, 5]], 2), _typical([[1, 1], [0, 8], [9, 9]], 2)
        ([2, 3], [0, 2])
    """
    middle = median(sum(client) for client in images)
    ranked = sorted(range(len(images)), key=lambda i: (images[i].count(0), abs(sum(images[i]) - middle)))
    return sorted(ranked[:number])


def _whole_task(by_round: Sequence[float], rounds: int) -> float:
    """Sum over a task from its first round, another one if there are three, and its last.

    Example:
        >>> _whole_task([10, 4, 5], 5), _whole_task([10, 5], 2), _whole_task([3], 1)
        (27, 15, 3)
    """
    return sum(by_round) + (by_round[1] * (rounds - len(by_round)) if rounds > len(by_round) else 0)
