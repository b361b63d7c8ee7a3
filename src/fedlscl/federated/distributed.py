"""Clients distributed over processes, each of which holds the server's whole state and repeats its step."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed
from lightning.fabric import Fabric

T = TypeVar("T")


class Ranks:
    """The processes of a run; with one process, gathering is the identity.

    Modules are not wrapped for data parallelism: each client trains in one process, so that the result does not depend
    on the number of processes (bit for bit if all have the same number of threads).
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.size, self.rank = fabric, fabric.world_size, fabric.global_rank
        self.is_first = self.rank == 0
        """Whether this process writes files and calls callbacks."""

    def gather(self, items: Sequence[T]) -> list[T]:
        """Items of all processes, in the order of ranks."""
        if self.size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        return value if self.size == 1 else self.fabric.broadcast(value, src=0)


def assign(work: Sequence[int], num_ranks: int) -> list[int]:
    """Rank of each client: the clients with most samples first, each to the rank with least work so far.

    Example:
        >>> assign([5, 1, 4, 3], num_ranks=2)
        [0, 0, 1, 1]
    """
    loads, ranks = [0] * num_ranks, [0] * len(work)
    for client in sorted(range(len(work)), key=lambda index: -work[index]):
        ranks[client] = loads.index(min(loads))
        loads[ranks[client]] += work[client]
    return ranks
