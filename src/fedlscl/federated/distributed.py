"""Clients distributed over processes."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed
from lightning.fabric import Fabric

from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine
from fedlscl.federated.metrics import AccuracyMatrix

# Clients shared out over processes; every process knows all that the server knows and repeats its step.

T = TypeVar("T")


class Ranks:
    """Who works for which client. With one process everything here is the identity.

    Modules are never wrapped for data parallelism: each client trains in one process, as it would alone, so that
    the result does not depend on the number of processes (bit for bit where all have the same number of threads).
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.size, self.rank = fabric, fabric.world_size, fabric.global_rank
        self.owners: list[int] = []

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and calls observers."""
        return self.rank == 0

    def deal(self, work: Sequence[int]) -> None:
        """Share out the clients by their work (samples, say): the largest first, each to who has least so far.

        Example:
            >>> ranks = object.__new__(Ranks)
            >>> ranks.size = 2
            >>> ranks.deal([5, 1, 4, 3])
            >>> ranks.owners
            [0, 0, 1, 1]
        """
        loads, self.owners = [0] * self.size, [0] * len(work)
        for client in sorted(range(len(work)), key=lambda index: -work[index]):
            self.owners[client] = loads.index(min(loads))
            loads[self.owners[client]] += work[client]

    def owns(self, client: int) -> bool:
        """Whether this process works for a client."""
        return self.owners[client] == self.rank

    def gather(self, mine: Sequence[T]) -> list[T]:
        """What all processes give, in the order of ranks."""
        if self.size == 1:
            return list(mine)
        everyones: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyones, list(mine))
        return [item for items in everyones for item in items]

    def from_first(self, value: T) -> T:
        """What the first process holds."""
        return value if self.size == 1 else self.fabric.broadcast(value, src=0)


# What clients of other processes did, brought to all: one process then knows as much as if it had done everything.


def gather_history(ranks: Ranks, history: list[dict[str, Any]], begun: int) -> None:
    """Replace what was noted from position ``begun`` on by what all processes noted, in the order of clients."""
    if ranks.size > 1:
        history[begun:] = sorted(ranks.gather(history[begun:]), key=lambda entry: entry["client"])


def gather_accuracies(ranks: Ranks, matrix: AccuracyMatrix, phase: str, task: int, clients: list[Client]) -> None:
    """Enter what the other processes measured of ``clients`` after a task."""
    mine = [(client.id, matrix.row(phase, client.id, task)) for client in clients if ranks.owns(client.id)]
    for client, row in ranks.gather(mine):
        matrix.record(phase, client, task, row)


def gather_clients(ranks: Ranks, engine: Engine, clients: list[Client]) -> None:
    """Bring the other processes' clients to where they are there."""
    if ranks.size > 1:
        mine = [(client.id, client.state_dict()) for client in clients if ranks.owns(client.id)]
        for index, state in ranks.gather(mine):
            if not ranks.owns(index):
                with engine.on_device(clients[index]):
                    clients[index].load_state_dict(state)
