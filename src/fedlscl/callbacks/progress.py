"""Progress on the terminal, as bars or as plain lines, and the estimate of a run before it starts."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from itertools import islice
from operator import length_hint
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import override

from fedlscl.callbacks.formatting import accuracies, in_all, in_bytes, in_hours, introduction, position, print_table
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Stage
from fedlscl.federated.metrics import summary
from fedlscl.federated.state import Callback, RunState, extrapolated
from fedlscl.federated.trainer import FederatedTrainer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

MANY_CLIENTS = 10
"""With more clients, plain lines are one per round instead of one per client and stage."""


class ProgressDisplay(Callback):
    """Shows on stderr where the run is, and at its end prints the result table on stdout.

    Tasks, rounds and batches are counted from 1 on the screen, clients from 0.
    """

    def __init__(self) -> None:
        self.console: Console | None = None
        self.bars: Progress | None = None
        self.bar_ids: dict[str, TaskID] = {}
        self.server: dict[str, tuple[dict[str, float], float]] = {}
        """Last terms and total seconds of the server's stages in this round, by name."""
        self.rounds = self.first_round = 0.0
        """Finished rounds of the run, a part of the current one included; those of earlier sessions."""
        self.turn = 0
        """Clients that started in this round."""

    @override
    def on_fit_start(self, run: RunState) -> None:
        from rich.console import Console

        self.console = self.console or Console(stderr=True)
        self.started, self.rounds, self.first_round = time.perf_counter(), run.step, run.step
        for line in introduction(run):
            self._print(line)
        if self.console.is_interactive and run.progress.task < run.num_tasks:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[text]}", markup=False)
            # Without a limit: a client may train for longer than the 30 s over which rich measures the speed.
            given: dict[str, Any] = {"console": self.console, "transient": True, "speed_estimate_period": float("inf")}
            self.bars = Progress(*columns, TimeRemainingColumn(), **given)
            rounds = run.num_tasks * run.rounds_per_task
            totals = {"Run": rounds, "Task": run.num_tasks, "Round": run.rounds_per_task, "Client": len(run.clients)}
            self.bar_ids = {name: self.bars.add_task(name, total=total, text="") for name, total in totals.items()}
            self.bar_ids["Batch"] = self.bars.add_task("Batch", total=None, text="preparing")
            self.bars.update(self.bar_ids["Run"], completed=run.step)
            self.bars.start()

    @override
    def on_round_start(self, run: RunState) -> None:
        self.turn, (task, round_) = 0, run.progress.position
        self._update("Task", task, f"{task + 1} of {run.num_tasks}")
        self._update("Round", round_, f"{round_ + 1} of {run.rounds_per_task}")
        self._advance(run, run.step)

    @override
    def on_client_start(self, run: RunState, client: Client) -> None:
        self._advance(run, run.step + self.turn / len(run.participants))
        self._update("Client", client.id, f"{client.id + 1} of {len(run.clients)}")
        self._update("Batch", 0, "preparing")
        self.turn += 1

    @override
    def on_stage_start(self, run: RunState, client: Client | None, stage: Stage) -> None:
        name = stage.name if client is not None else f"{stage.name} at the server"
        self._update("Batch", 0, name, total=length_hint(stage.batches, 0) * stage.epochs or None)

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
        self._update("Client", client.id, f"{client.id + 1} of {len(run.clients)}")
        self._update("Batch", 0, f"evaluating {phase} aggregation")

    @override
    def on_round_end(self, run: RunState) -> None:
        self._advance(run, run.step + 1)
        if self.bars is None:
            up, down = (in_bytes(int(run.traffic[name][:, *run.progress.position].sum())) for name in ("up", "down"))
            self._print(f"{position(run)}: {up} up, {down} down ({self._outlook(run)})")
        # The first round of a task may send more than the others, and a server may answer in the last one alone.
        rounds = run.rounds_per_task if run.server_every == "task" else min(2, run.rounds_per_task)
        if run.step == rounds - 1 and self._seconds_left(run):
            up, down = (extrapolated(run.traffic, name, rounds) for name in ("up", "down"))
            self._print(in_all(up, down, time.perf_counter() - self.started + self._seconds_left(run)))

    @override
    def on_task_end(self, run: RunState) -> None:
        task = run.progress.task
        self._print(f"after task {task + 1}/{run.num_tasks}: {accuracies(summary(run.matrix, task))}", "bold green")

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

    def _advance(self, run: RunState, rounds: float) -> None:
        self.rounds = rounds
        self._update("Run", rounds, f"{self._fraction(run):.0%} done")

    def _update(self, bar: str, completed: float, text: str, total: float | None = None) -> None:
        if self.bars is not None:
            if bar == "Batch":
                self.bars.reset(self.bar_ids[bar], total=total)
            self.bars.update(self.bar_ids[bar], completed=completed, text=text)

    def _fraction(self, run: RunState) -> float:
        return self.rounds / (run.num_tasks * run.rounds_per_task)

    def _seconds_left(self, run: RunState) -> float:
        """At this session's speed."""
        left = run.num_tasks * run.rounds_per_task - self.rounds
        return (time.perf_counter() - self.started) * left / max(self.rounds - self.first_round, 1e-9)

    def _outlook(self, run: RunState) -> str:
        done = f"{self._fraction(run):.0%} done"
        return f"{done}, {in_hours(self._seconds_left(run))} left" if self.rounds > self.first_round else done

    def _print_stage(self, run: RunState, who: str, terms: dict[str, float], seconds: float) -> None:
        if self.bars is None:
            loss, *parts = [f"{name} {value:.4g}" for name, value in terms.items()] or ["no samples"]
            total = f"{loss} = {' + '.join(parts)}" if len(parts) > 1 else loss
            self._print(f"{position(run)}, {who}: {total} ({seconds:.1f} s; {self._outlook(run)})")

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
