"""Who takes part in a round: sampled clients, less those that fail."""

from dataclasses import dataclass

import numpy as np

from fedlscl.federated.method import Progress
from fedlscl.federated.seeding import Turn


@dataclass(frozen=True, kw_only=True)
class Attendance:
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

    def present(self, num_clients: int, seed: int, progress: Progress) -> list[int]:
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
