"""How much of a run is done: an estimate that becomes exact as clients show their stages."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer


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
        present, later = lengths[:, task : task + 1], lengths[:, task + 1 :]
        turns = present[client:].sum() + (self.rounds - 1 - round_) * present.sum() + self.rounds * later.sum()
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


def workload(trainer: "FederatedTrainer") -> Workload:
    """What is ahead of a trainer whose clients exist."""
    method, tasks = trainer.method, range(trainer.num_tasks)
    samples = np.array([[len(client.data.train_ids(task)) for task in tasks] for client in trainer.clients])
    return Workload(
        np.ceil(samples / method.batch_size) * method.local_epochs, trainer.rounds_per_task, *trainer.progress
    )
