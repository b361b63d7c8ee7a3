"""What a run will send and how long it will take, from a rehearsal: two clients, a few steps of every stage."""

import time
from copy import copy
from dataclasses import dataclass, field
from itertools import islice, pairwise
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer

if TYPE_CHECKING:
    from fedlscl.data import SpatialTemporalDataModule


TASKS = 3
"""Tasks that are rehearsed: the second brings new stages, the third shows how these grow."""
ROUNDS = 3
"""Rounds of each of them: the first, one like all others, the last."""
STEPS = 3
"""Steps of a stage that are timed; one before them warms up."""


class Forecast(NamedTuple):
    """Of a whole run."""

    up: float
    """Bytes, by all clients."""
    down: float
    seconds: float


@dataclass
class Rehearsed:
    """What one task took."""

    images: int
    """Training samples of all who rehearse."""
    head_logits: int
    """Those of the first, who alone is trained."""
    work: list[float] = field(default_factory=list)
    """By round, steps times seconds of all stages of the first client."""
    server: list[float] = field(default_factory=list)
    """The same of the server."""
    placing: float = 0.0
    """Seconds for frozen tokens, which are computed once."""
    evaluation: float = 0.0
    idle: float = 0.0
    """Seconds of the rehearsal that the real run does not have: those of the steps themselves."""
    rounds: list[float] = field(default_factory=list)
    """By round, seconds without training and evaluation."""
    rest: float = 0.0
    """Seconds of the task without its rounds and evaluation."""
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)


class Rehearsal(FederatedTrainer):
    """The real loop over two clients, a few tasks and a few rounds of each; nothing is kept or written."""

    def __init__(self, trainer: FederatedTrainer, num_tasks: int) -> None:
        super().__init__(
            rounds_per_task=min(ROUNDS, trainer.rounds_per_task),
            server_every=cast(Any, trainer.server_every),
            accelerator=trainer.accelerator,
            precision=cast(Any, trainer.precision),
            cache_gb=trainer.cache_gb,
            max_tasks=min(TASKS, num_tasks),
            quorum=0,
            max_norm_ratio=0.0,
        )
        self.tasks: list[Rehearsed] = []
        self.callbacks = [_EvaluationTime(self.tasks)]

    def _learn_task(self, task: int, first_round: int) -> None:
        images = [len(client.data.train_ids(task)) for client in self.clients]
        done = Rehearsed(sum(images), images[0])
        self.tasks.append(done)
        started = time.perf_counter()
        super()._learn_task(task, first_round)
        done.rest = time.perf_counter() - started - sum(done.rounds) - done.evaluation - done.idle

    def _round(self, progress: Progress) -> None:
        done = self.tasks[-1]
        started, idle, evaluation = time.perf_counter(), done.idle, done.evaluation
        done.work.append(0.0)
        done.server.append(0.0)
        super()._round(progress)
        apart = done.idle - idle + done.evaluation - evaluation
        done.rounds.append(time.perf_counter() - started - apart)
        for name in ("up", "down"):
            getattr(done, name).append(int(self.traffic[name][:, *progress.position].sum()))

    def _train(self, client: Client | None, stage: Stage) -> None:
        done, started = self.tasks[-1], time.perf_counter()
        steps = length_hint(stage.batches, 1) * stage.epochs
        if client is not None and self.run.progress.round == 0:
            done.placing += self._place(stage)
        few = list(islice(stage.batches, STEPS + 1)) if client is None or client.id == 0 else []
        if few and steps:
            self.run.engine.train(stage._replace(batches=few[:1], epochs=1))
            began = time.perf_counter()
            self.run.engine.train(stage._replace(batches=few[-STEPS:], epochs=1))
            seconds = steps * (time.perf_counter() - began) / len(few[-STEPS:])
            (done.server if client is None else done.work)[-1] += seconds
        done.idle += time.perf_counter() - started

    def _place(self, stage: Stage) -> float:
        """Compute frozen tokens that will be kept; what is computed at every step is timed with the steps."""
        started = time.perf_counter()
        for batch in stage.batches:
            if getattr(batch, "augmented", True) or not self.cache_gb:
                return 0.0
            self.run.engine.prepare(batch, stage.module.net)
        return time.perf_counter() - started


class _EvaluationTime(Callback):
    """Adds the seconds of every evaluation to the rehearsed task."""

    def __init__(self, tasks: list[Rehearsed]) -> None:
        self.tasks = tasks

    def on_evaluation_end(self, run: RunState, client: Client, phase: str, seconds: float) -> None:
        self.tasks[-1].evaluation += seconds


def forecast(
    trainer: FederatedTrainer, method: Method, datamodule: "SpatialTemporalDataModule", seed: int = 42
) -> Forecast:
    """Rehearse with two typical clients, and reckon for all clients, tasks and rounds.

    The run's own objects stay as they are: the rehearsal has clients of its own and a copy of the method.
    """
    num_tasks = min(datamodule.num_tasks, trainer.max_tasks or datamodule.num_tasks)
    tasks, rounds = range(num_tasks), trainer.rounds_per_task
    images = [[len(datamodule.stream(i).train_ids(task)) for task in tasks] for i in range(datamodule.num_clients)]
    # Alone, nobody could hide in a secure sum; together, a pool would not be that of one client.
    number = 1 if method.simulation_only else min(2, len(images))
    chosen = _typical(images, number)
    few = copy(datamodule)
    few._splits, few.num_clients = [datamodule.splits[i] for i in chosen], number
    rehearsal = Rehearsal(trainer, num_tasks)
    rehearsal.fit(method, few, seed)
    known = rehearsal.tasks
    done = [known[min(task, len(known) - 1)] for task in tasks]
    asked = len(images) * trainer.sampling.participation / number
    up = (1 if method.simulation_only else asked) * sum(_whole_task(part.up, rounds) for part in done)
    down = asked * sum(_whole_task(part.down, rounds) for part in done)
    work = _extended([_whole_task(part.work, rounds) / max(part.head_logits, 1) for part in known], len(tasks))
    tested = _extended([part.evaluation / number for part in known], len(tasks))
    seconds = server = 0.0
    for task, part in enumerate(done):
        samples = sum(client[task] for client in images)
        scale = samples / max(part.images, 1)
        talk = scale * _whole_task(part.rounds, rounds)
        seconds += (work[task] * samples + talk) * trainer.sampling.participation
        seconds += scale * (part.placing + part.rest) + tested[task] * len(images)
        server += _whole_task(part.server, rounds)
    return Forecast(up, down, seconds / trainer.devices + server)


def _typical(images: list[list[int]], number: int) -> list[int]:
    """Clients in the middle by number of samples, of those who lack them in the fewest tasks.

    Example:
        >>> _typical([[9, 9], [1, 1], [4, 4], [5, 5]], 2), _typical([[1, 1], [0, 8], [9, 9]], 2)
        ([2, 3], [0, 2])
    """
    ranked = sorted(range(len(images)), key=lambda i: sum(images[i]))
    centre = max(0, (len(images) - number) // 2) + (number - 1) / 2
    first = sorted(range(len(images)), key=lambda place: (images[ranked[place]].count(0), abs(place - centre)))
    return [ranked[place] for place in sorted(first[:number])]


def _whole_task(by_round: list[int] | list[float], rounds: int) -> float:
    """A task's sum from its first round, another one where there are three, and its last.

    Example:
        >>> _whole_task([10, 4, 5], 5), _whole_task([10, 5], 2), _whole_task([3], 1)
        (27, 15, 3)
    """
    between = by_round[1] * (rounds - len(by_round)) if rounds > len(by_round) else 0
    return sum(by_round) + between


def _extended(values: list[float], length: int) -> list[float]:
    """Values of later tasks by the last step between two known ones, where that is no fall.

    Example:
        >>> _extended([1.0, 4.0, 6.0], 5), _extended([3.0, 2.0], 3)
        ([1.0, 4.0, 6.0, 8.0, 10.0], [3.0, 2.0, 2.0])
    """
    growth = max([0.0, *(later - earlier for earlier, later in list(pairwise(values))[-1:])])
    last = len(values) - 1
    return [values[min(task, last)] + max(0, task - last) * growth for task in range(length)]
