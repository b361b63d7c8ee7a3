"""Progress on the terminal, as bars or as plain lines, and the estimate of a run before it starts."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from itertools import islice
from operator import length_hint
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import override

from fedlscl.callbacks.formatting import in_all, in_bytes, in_hours, introduction, percent, position, print_table
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Stage
from fedlscl.federated.metrics import summary
from fedlscl.federated.state import Callback, RunState, extrapolated
from fedlscl.federated.trainer import FederatedTrainer

MANY_CLIENTS = 10
"""With more clients, plain lines are one per round instead of one per client and stage."""


class ProgressDisplay(Callback):
    """Shows on stderr where the run is, and at its end prints the result table on stdout.

    Tasks, rounds and batches are counted from 1 on the screen, clients from 0.
    """

    def __init__(self) -> None:
        self.console: Console | None = None
        self.bars: Progress | None = None
        """Only on a terminal; without them, stages and rounds are plain lines."""
        self.bar_ids: dict[str, TaskID] = {}
        self.server: dict[str, tuple[dict[str, float], float]] = {}
        """Last terms and total seconds of the server's stages in this round, by name."""
        self.rounds = self.first_round = 0.0
        """Finished rounds of the run, a part of the current one included; those of earlier sessions."""

    @override
    def on_fit_start(self, run: RunState) -> None:
        self.console = self.console or Console(stderr=True)
        self.started, self.total = time.perf_counter(), run.num_tasks * run.rounds_per_task
        self.rounds = self.first_round = run.step
        for line in introduction(run):
            self._print(line)
        if self.console.is_interactive and run.progress.task < run.num_tasks:
            columns = TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[text]}", markup=False)
            # Without a limit: a client may train for longer than the 30 s over which rich measures the speed.
            given: dict[str, Any] = {"console": self.console, "transient": True, "speed_estimate_period": math.inf}
            self.bars = Progress(*columns, TimeRemainingColumn(), **given)
            names = ("Run", "Task", "Round", "Client", "Batch")
            self.bar_ids = {name: self.bars.add_task(name, total=None, text="") for name in names}
            self._show(run, None, "preparing")
            self.bars.start()

    @override
    def on_client_start(self, run: RunState, client: Client) -> None:
        self.rounds = run.step + run.participants.index(client.id) / len(run.participants)
        self._show(run, client, "preparing")

    @override
    def on_stage_start(self, run: RunState, client: Client | None, stage: Stage) -> None:
        name = stage.name if client is not None else f"{stage.name} at the server"
        self._show(run, client, name, total=length_hint(stage.batches, 0) * stage.epochs or None)

    @override
    def on_batch_end(self, run: RunState, client: Client | None, num_images: int) -> None:
        if self.bars is not None:
            self.bars.advance(self.bar_ids["Batch"])

    @override
    def on_stage_end(
        self, run: RunState, client: Client | None, stage: Stage, terms: dict[str, float], seconds: float
    ) -> None:
        if client is None:
            _, earlier = self.server.get(stage.name, ({}, 0.0))
            self.server[stage.name] = terms, earlier + seconds
        elif len(run.clients) <= MANY_CLIENTS:
            self._print_stage(run, f"client {client.id}, {stage.name}", terms, seconds)

    @override
    def on_server_end(self, run: RunState, seconds: float) -> None:
        for name, (terms, training_seconds) in self.server.items():
            self._print_stage(run, f"server, {name}", terms, training_seconds)
        self.server = {}

    @override
    def on_evaluation_start(self, run: RunState, client: Client, phase: str) -> None:
        self._show(run, client, f"evaluating {phase} aggregation")

    @override
    def on_round_end(self, run: RunState) -> None:
        self.rounds = run.step + 1
        if self.bars is None:
            up, down = (in_bytes(int(run.traffic[name][:, *run.progress.position].sum())) for name in ("up", "down"))
            self._print(f"{position(run)}: {up} up, {down} down ({self._outlook()})")
        # The first round of a task may send more than the others, and a server may answer in the last one alone.
        rounds = run.rounds_per_task if run.server_every == "task" else min(2, run.rounds_per_task)
        if run.step == rounds - 1 and (left := self._seconds_left()):
            up, down = (extrapolated(run.traffic[name], rounds) for name in ("up", "down"))
            self._print(in_all(up, down, time.perf_counter() - self.started + left))

    @override
    def on_task_end(self, run: RunState) -> None:
        task = run.progress.task
        found = {name: percent(value) for name, value in summary(run.matrix, task).items()}
        self._print(
            f"after task {task + 1}/{run.num_tasks}: class-IL average {found['class_il/average']} %, current task "
            f"{found['class_il/current']} %, forgetting {found['class_il/forgetting']} %; task-IL average "
            f"{found['task_il/average']} %",
            "bold green",
        )

    @override
    def on_fit_end(self, run: RunState) -> None:
        self._stop_bars()
        print_table(run)

    @override
    def on_exception(self, run: RunState) -> None:
        self._stop_bars()
        self._print(f"stopped in {position(run)}", "bold red")

    def _stop_bars(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _show(self, run: RunState, client: Client | None, text: str, total: int | None = None) -> None:
        """Set all bars; ``text`` and ``total`` are those of the batches."""
        if self.bars is None:
            return
        self.bars.update(self.bar_ids["Run"], completed=self.rounds, total=self.total, text=self._done())
        task, round_ = run.progress.position
        counted = {"Task": (task, run.num_tasks), "Round": (round_, run.rounds_per_task)}
        if client is not None:
            counted["Client"] = client.id, len(run.clients)
        for name, (index, number) in counted.items():
            self.bars.update(self.bar_ids[name], completed=index, total=number, text=f"{index + 1} of {number}")
        self.bars.reset(self.bar_ids["Batch"], total=total, text=text)

    def _done(self) -> str:
        return f"{self.rounds / self.total:.0%} done"

    def _seconds_left(self) -> float:
        """At this session's speed."""
        elapsed, done = time.perf_counter() - self.started, self.rounds - self.first_round
        return elapsed * (self.total - self.rounds) / max(done, 1e-9)

    def _outlook(self) -> str:
        left = f", {in_hours(self._seconds_left())} left" if self.rounds > self.first_round else ""
        return f"{self._done()}{left}"

    def _print_stage(self, run: RunState, who: str, terms: dict[str, float], seconds: float) -> None:
        if self.bars is None:
            loss, *parts = [f"{name} {value:.4g}" for name, value in terms.items()] or ["no samples"]
            total = f"{loss} = {' + '.join(parts)}" if len(parts) > 1 else loss
            self._print(f"{position(run)}, {who}: {total} ({seconds:.1f} s; {self._outlook()})")

    def _print(self, line: str, style: str | None = None) -> None:
        if self.console is not None:
            self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


# ``fit --dry_run``: bytes and seconds from a rehearsal with two clients, three tasks and rounds, few steps per stage.

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
    short.participation, short.failure_rate, short.quorum, short.max_norm_ratio = 1.0, 0.0, 0, 0
    short.callbacks, short.run_dir, short.devices = [rehearsal], None, 1
    short.fit(method, few, seed)
    participation, up, down, seconds = trainer.participation, 0.0, 0.0, 0.0
    senders = len(images) * participation / len(chosen)
    for task in range(num_tasks):
        known = min(task, len(rehearsal.outside) - 1)
        # All rounds: the first, another one if there are three, as often as needed, and the last.
        missing = trainer.rounds_per_task - short.rounds_per_task
        done = {name: sum(of) + missing * of[len(of) // 2] for name, of in rehearsal.tasks[known].items()}
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


class _Rehearsal(Callback):
    """Shortens every stage, and records bytes and seconds by task and round, and seconds outside of rounds by task."""

    def __init__(self, has_cache: bool) -> None:
        self.has_cache = has_cache
        self.tasks: list[dict[str, list[float]]] = []
        self.outside: list[float] = []

    @override
    def on_fit_start(self, run: RunState) -> None:
        self.engine, self.train, self.since = run.engine, run.engine.train, time.perf_counter()
        run.engine.train = self._few_steps

    @override
    def on_round_start(self, run: RunState) -> None:
        if run.progress.round == 0:
            self.tasks.append(defaultdict(list))
            self.outside.append(0.0)
        self.outside[-1] += self._lap()
        self.clients = self.server = 0.0

    @override
    def on_stage_start(self, run: RunState, client: Client | None, stage: Stage) -> None:
        self.at_server = client is None
        self.fills_cache = not self.at_server and run.progress.round == 0 and self.has_cache

    @override
    def on_round_end(self, run: RunState) -> None:
        sent = {name: int(run.traffic[name][:, *run.progress.position].sum()) for name in ("up", "down")}
        for name, value in {**sent, "clients": self._lap() + self.clients, "server": self.server}.items():
            self.tasks[-1][name].append(value)

    @override
    def on_task_end(self, run: RunState) -> None:
        self.outside[-1] += self._lap()

    def _few_steps(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        if self.fills_cache:
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
        self.clients -= ended - started
        if self.at_server:
            self.server += whole
        else:
            self.clients += whole
        return terms

    def _lap(self) -> float:
        since, self.since = self.since, time.perf_counter()
        return self.since - since
