"""Idle clients beyond a budget wait in files."""

import tempfile
from collections import OrderedDict
from pathlib import Path

from fedlscl.federated.client import Client


class Parking:
    """Keeps the clients that worked last in memory, and the others on disk, in a folder that ends with the process.

    Args:
        budget_bytes: for nets, predecessors, buffers and memories of idle clients.
    """

    def __init__(self, budget_bytes: float) -> None:
        self.budget_bytes = budget_bytes
        self.resident: OrderedDict[int, tuple[Client, int]] = OrderedDict()
        """Idle clients in memory and their bytes, the longest idle first."""
        self.folder: tempfile.TemporaryDirectory | None = None

    @property
    def resident_bytes(self) -> int:
        """What idle clients take of the memory."""
        return sum(size for _, size in self.resident.values())

    def take(self, client: Client) -> None:
        """A client's turn begins: it is in memory, and not counted as idle."""
        self.resident.pop(client.id, None)
        client.unpark()

    def leave(self, client: Client) -> None:
        """A client's turn is over; whoever has been idle longest makes room."""
        self.resident[client.id] = client, client.num_bytes
        while self.resident and self.resident_bytes > self.budget_bytes:
            index, (idle, _) = self.resident.popitem(last=False)
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="fedlscl-clients-")
            idle.park(Path(self.folder.name, f"{index}.pt"))
