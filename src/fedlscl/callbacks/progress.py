"""Progress on the terminal, and how long the rest of a run will take."""

import time
from operator import length_hint
from typing import TYPE_CHECKING

import numpy as np

from fedlscl.callbacks.formatting import accuracies, in_all, in_bytes, in_hours, introduction, place, print_table
from fedlscl.federated.metrics import summary
from fedlscl.federated.state import Callback, extrapolated

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from fedlscl.federated.client import Client
    from fedlscl.federated.method import Stage
    from fedlscl.federated.state import RunState


# How much of a run is done: an estimate that becomes exact as clients show their stages.


class Workload:
    """Counts batches, and one more for every turn of a client in a round (methods without training have turns, too).

    A turn whose stages are not known yet is taken to need what samples and epochs say, times what turns of the last
    known task needed in comparison with that.

    Args:
        batches: expected in one round, (num_clients, num_tasks).
        rounds: per task.
        task: where this session begins.
        round_: where it begins in that task.

    Example:
        >>> work = Workload(np.array([[3.0, 3.0]]), rounds=1)
        >>> work.begin_turn(client=0, task=0, round_=0)
        >>> work.add_stage(7)
        >>> work.end_turn()
        >>> work.remaining, work.fraction  # two turns of 1 + 7, and one of them is over
        (8.0, 0.5)
    """

    def __init__(self, batches: np.ndarray, rounds: int, task: int = 0, round_: int = 0) -> None:
        self.expected, self.rounds = batches + 1.0, rounds
        self.known = np.full_like(self.expected, np.nan)
        self.turns_over = len(batches) * (task * rounds + round_)
        self.next = (task, round_, 0)
        """Task, round and client of the first turn that has not begun."""
        self.turn: tuple[int, int] | None = None
        self.turn_length = self.turn_planned = self.turn_done = 0.0
        self.done = 0.0
        """Units of this session."""

    @property
    def remaining(self) -> float:
        """Units to go."""
        (task, round_, client), lengths = self.next, self._lengths()
        participants, later = lengths[:, task : task + 1], lengths[:, task + 1 :]
        turns = (
            participants[client:].sum() + (self.rounds - 1 - round_) * participants.sum() + self.rounds * later.sum()
        )
        return float(turns + self.turn_length - self.turn_done)

    @property
    def fraction(self) -> float:
        """Done part of all turns, those of earlier sessions included; it never goes back by more than a turn."""
        turn = self.turn_done / self.turn_length if self.turn else 0.0
        return float((self.turns_over + turn) / (self.expected.size * self.rounds))

    def begin_turn(self, client: int, task: int, round_: int) -> None:
        """A client's turn starts, and the turn before it is over."""
        self.end_turn()
        self.turn, self.next = (client, task), (task, round_, client + 1)
        self.turn_length, self.turn_planned = self._lengths()[self.turn], 1.0

    def add_stage(self, batches: int) -> None:
        """The turn has a stage of so many batches."""
        self.turn_planned += batches
        self.turn_length = max(self.turn_length, self.turn_planned)

    def add_batch(self) -> None:
        """A batch is done."""
        self.done += 1
        self.turn_done += 1

    def end_turn(self) -> None:
        """The turn is over, and what it needed is known."""
        if self.turn is not None:
            self.known[self.turn] = self.turn_planned
            self.done += self.turn_planned - self.turn_done
            self.turns_over += 1
            self.turn, self.turn_length, self.turn_done = None, 0.0, 0.0

    def _lengths(self) -> np.ndarray:
        is_known = ~np.isnan(self.known)
        if not is_known.any():
            return self.expected
        last = int(np.flatnonzero(is_known.any(axis=0)).max())
        rows = is_known[:, last]
        factor = self.known[rows, last].sum() / self.expected[rows, last].sum()
        return np.where(is_known, self.known, self.expected * factor)


def workload(run: "RunState") -> Workload:
    """What is ahead of a run whose clients exist."""
    method, tasks = run.method, range(run.num_tasks)
    samples = np.array([[len(client.data.train_ids(task)) for task in tasks] for client in run.clients])
    return Workload(
        np.ceil(samples / method.batch_size) * method.local_epochs, run.rounds_per_task, *run.progress.position
    )


# The display of a run: bars with time left on a terminal, plain lines elsewhere.

UPDATES_PER_SECOND = 5
MANY_CLIENTS = 10
"""Beyond so many, plain lines are one per round in place of one per client and stage."""


class ProgressDisplay(Callback):
    """Shows on stderr where the run is, and at its end prints the result table on stdout.

    Tasks, rounds and batches are counted from 1 on the screen; clients go by their ids, which begin at 0.
    """

    def __init__(self) -> None:
        self.console: Console | None = None
        self.live: Live | None = None
        self.server: dict[str, tuple[dict[str, float], float]] = {}
        """Last terms and seconds of the server's stages in this round, by their name."""

    def on_fit_start(self, run: "RunState") -> None:
        """Say what is about to be done, and put up the bars."""
        from rich.console import Console

        self.console = self.console or Console(stderr=True)
        self.began, self.work = time.perf_counter(), workload(run)
        self.client, self.stage, self.num_batches, self.batch, self.images = 0, "preparing", 0, 0, 0
        self.stage_began = self.began
        for line in introduction(run):
            self._say(line)
        if self.console.is_interactive and run.progress.task < run.num_tasks:
            from rich.live import Live

            self.live = Live(
                console=self.console,
                get_renderable=lambda: self._bars(run),
                refresh_per_second=UPDATES_PER_SECOND,
                transient=True,
            )
            self.live.start()

    def on_client_start(self, run: "RunState", client: "Client") -> None:
        """Another turn."""
        self.work.begin_turn(client.id, *run.progress.position)
        self.client, self.stage, self.num_batches, self.batch = client.id, "preparing", 0, 0

    def on_stage_start(self, run: "RunState", client: "Client | None", stage: "Stage") -> None:
        """Another stage; those of the server count for the turn before them."""
        self.num_batches = length_hint(stage.batches, 0) * stage.epochs
        self.stage = stage.name if client is not None else f"{stage.name} at the server"
        self.batch, self.images, self.stage_began = 0, 0, time.perf_counter()
        self.work.add_stage(self.num_batches)

    def on_batch_end(self, run: "RunState", client: "Client | None", num_images: int) -> None:
        """Count; the bars are drawn by their own clock."""
        self.batch += 1
        self.images += num_images
        self.work.add_batch()

    def on_stage_end(
        self,
        run: "RunState",
        client: "Client | None",
        stage: "Stage",
        terms: dict[str, float],
        seconds: float,
    ) -> None:
        """A plain line, unless there are many clients; the server says one per kind of stage when it is through."""
        if client is None:
            _, earlier = self.server.get(stage.name, ({}, 0.0))
            self.server[stage.name] = terms, earlier + seconds
        elif self.live is None and len(run.clients) <= MANY_CLIENTS:
            self._say_stage(f"{place(run)}, client {client.id}, {stage.name}", terms, seconds)

    def on_server_end(self, run: "RunState", seconds: float) -> None:
        """What the server trained."""
        for name, (terms, training_seconds) in self.server.items():
            if self.live is None:
                self._say_stage(f"{place(run)}, server, {name}", terms, training_seconds)
        self.server = {}

    def on_evaluation_start(self, run: "RunState", client: "Client", phase: str) -> None:
        """Show that a client is tested."""
        self.client, self.stage, self.num_batches = client.id, f"testing {phase} aggregation", 0

    def on_round_end(self, run: "RunState") -> None:
        """A plain line with the traffic."""
        self.work.end_turn()
        if self.live is None:
            up, down = (in_bytes(int(run.traffic[name][:, *run.progress.position].sum())) for name in ("up", "down"))
            self._say(f"{place(run)}: {up} up, {down} down ({self._outlook()})")
        # The first round of a task may send more than the others, and a server may answer in the last one alone.
        rounds = run.rounds_per_task if run.server_every == "task" else min(2, run.rounds_per_task)
        if run.step == rounds - 1 and self.work.remaining:
            up, down = (extrapolated(run.traffic, name, rounds) for name in ("up", "down"))
            self._say(in_all(up, down, time.perf_counter() - self.began + self.seconds_left))

    def on_task_end(self, run: "RunState") -> None:
        """The task's accuracies, above the bars or as a line."""
        task = run.progress.task
        figures = accuracies(summary(run.matrix, task))
        self._say(f"after task {task + 1}/{run.num_tasks}: {figures}", "bold green")

    def on_fit_end(self, run: "RunState") -> None:
        """Take the bars down and print the table."""
        self._stop()
        print_table(run)

    def on_exception(self, run: "RunState") -> None:
        """Give the terminal back as it was."""
        self._stop()
        self._say(f"stopped in {place(run)}", "bold red")

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _say_stage(self, where: str, terms: dict[str, float], seconds: float) -> None:
        loss, *parts = [f"{name} {value:.4g}" for name, value in terms.items()] or ["no samples"]
        made_of = f" = {' + '.join(parts)}" if len(parts) > 1 else ""
        self._say(f"{where}: {loss}{made_of} ({seconds:.1f} s; {self._outlook()})")

    def _say(self, line: str, style: str | None = None) -> None:
        if self.console is not None:
            self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def _outlook(self) -> str:
        share = f"{self.work.fraction:.0%} done"
        return f"{share}, {in_hours(self.seconds_left)} left" if self.work.done >= 3 else share

    @property
    def seconds_left(self) -> float:
        """For the rest of the run, at this session's speed."""
        return (time.perf_counter() - self.began) * self.work.remaining / max(self.work.done, 1.0)

    def _bars(self, run: "RunState") -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        task, round_ = run.progress.position
        clients, gone = len(run.clients), time.perf_counter() - self.began
        rows = [
            ("Run", self.work.fraction, f"{self._outlook()}, {in_hours(gone)} elapsed"),
            ("Task", task / run.num_tasks, f"{task + 1} of {run.num_tasks}"),
            ("Round", round_ / run.rounds_per_task, f"{round_ + 1} of {run.rounds_per_task}"),
            ("Client", self.client / clients, f"{self.client + 1} of {clients}"),
        ]
        rate = self.images / max(time.perf_counter() - self.stage_began, 1e-3)
        batches = f"{self.batch} of {self.num_batches}, {self.stage}, {rate:,.0f} images/s"
        rows.append(("Batch", self.batch / max(self.num_batches, 1), batches if self.num_batches else self.stage))
        grid = Table.grid(padding=(0, 2))
        for name, share, text in rows:
            grid.add_row(name, ProgressBar(total=1.0, completed=min(share, 1.0), width=30), text)
        return grid
