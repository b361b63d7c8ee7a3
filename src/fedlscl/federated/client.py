"""Client A_i: its net, its stream of tasks and its private state; idle clients are offloaded to disk."""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedlscl.data import Batch, Buffer, ClientStream
from fedlscl.federated.seeding import turn_generator
from fedlscl.nets.net import Net

# A client A_i: its net, its stream of tasks, and what it keeps private.


class Inference(Protocol):
    """Runs nets over images in evaluation mode; the trainer provides it."""

    def infer(
        self, net: Net, stream: ClientStream, ids: Tensor, part: Callable[[Tensor], Any] | None = None
    ) -> Iterator[tuple[Batch, Any]]:
        """Batches on the device with the net's outputs (or those of a part of it), without gradient."""
        ...

    def place(self, batch: Batch, net: Net) -> Batch:
        """A batch on the device, with the cached output of the net's frozen part."""
        ...


@dataclass(kw_only=True)
class Client:
    """One participant; everything here stays with it unless ``Method.upload`` says otherwise."""

    id: int
    net: Any
    """The `Net` that the method built for it."""
    data: ClientStream
    engine: Inference
    previous: Any = None
    """The net after the last task (theta^{n-1}, phi^{n-1}), frozen."""
    buffer: Buffer = field(default_factory=Buffer.empty)
    """B^{n-1}, of the tasks before the current one."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else a method keeps on the client."""
    task: int = 0
    round: int = 0
    num_synced_rounds: int = 0
    """Rounds of the current task whose answer the client has taken over."""
    offloaded_to: Path | None = None
    """The file that holds the client's tensors while they are not in memory."""
    constants: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Buffers of a parked net that are no part of its state."""

    @property
    def classes(self) -> Tensor:
        """Y_i^n: classes of the current task, sorted."""
        return self.data.classes(self.task)

    @property
    def seen(self) -> Tensor:
        """Classes of all tasks so far, sorted."""
        return self.data.seen(self.task)

    @property
    def old(self) -> Tensor:
        """Classes of the tasks before the current one, sorted."""
        return self.data.seen(self.task - 1) if self.task else self.classes[:0]

    @property
    def train_ids(self) -> Tensor:
        """Training samples of the current task."""
        return self.data.train_ids(self.task)

    def loader(self, ids: Tensor, batch_size: int) -> DataLoader:
        """Shuffled batches of some samples, in an order that the turn's seed decides."""
        return self.data.loader(ids, batch_size, shuffle=True, generator=turn_generator())

    def infer(self, ids: Tensor, part: Callable[[Tensor], Any] | None = None) -> Iterator[tuple[Batch, Any]]:
        """Outputs of the client's net (or of ``part``, which sees images alone) on some samples, batch by batch."""
        return self.engine.infer(self.net, self.data, ids, part)

    def snapshot(self) -> None:
        """Keep the net as it is now as the next task's predecessor."""
        self.previous = deepcopy(self.net).requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that describe the client between two rounds."""
        if self.offloaded_to is not None:
            return torch.load(self.offloaded_to, mmap=True, weights_only=True)
        return {
            "net": self.net.state_dict(),
            "previous": None if self.previous is None else self.previous.state_dict(),
            "buffer": self.buffer.state_dict(),
            "memory": dict(self.memory),
            "num_synced_rounds": self.num_synced_rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.net.load_state_dict(state["net"])
        if state["previous"] is None:
            self.previous = None
        else:
            self.snapshot()
            self.previous.load_state_dict(state["previous"])
        self.buffer = Buffer.from_state_dict(state["buffer"])
        self.memory, self.num_synced_rounds = dict(state["memory"]), state["num_synced_rounds"]

    @property
    def num_bytes(self) -> int:
        """What the client holds in memory."""
        buffer = (self.buffer.ids, self.buffer.labels, self.buffer.losses)
        tensors = [*states(self.net), *states(self.previous), *self.memory.values(), *buffer]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def offload(self, path: Path) -> None:
        """Put everything into a file and free the memory; the net's structure stays, without values."""
        state = self.state_dict()
        # A new file, since tensors of the old one may still be mapped by whoever read the state.
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)
        self.constants = {name: value for name, value in self.net.named_buffers() if name not in state["net"]}
        self.net.to("meta")
        self.previous, self.buffer, self.memory, self.offloaded_to = None, Buffer.empty(), {}, path

    def reload(self) -> None:
        """Bring everything back from the file, if it is in one."""
        if self.offloaded_to is not None:
            state = torch.load(self.offloaded_to, weights_only=True)
            self.offloaded_to = None
            self.net.to_empty(device="cpu")
            for name, value in self.constants.items():
                self.net.get_buffer(name).copy_(value)
            self.load_state_dict(state)


def states(net: Net | None) -> list[Tensor]:
    """The tensors of a net that is to be kept; none of one that is not there."""
    return [] if net is None else list(net.state_dict().values())


@torch.no_grad()
def class_means(client: Client, ids: Tensor, pick: str = "features", unit: bool = True) -> tuple[Tensor, Tensor]:
    """Mean of the features, normalised if ``unit``, of each class among samples: classes (C,) and means (C, width)."""
    sums = torch.zeros(client.net.head.weight.shape, dtype=torch.float64)
    counts = torch.zeros(len(sums), dtype=torch.int64)
    for batch, output in client.infer(ids):
        rows, labels = getattr(output, pick).double(), batch.labels.cpu()
        sums.index_add_(0, labels, (torch.nn.functional.normalize(rows) if unit else rows).cpu())
        counts += torch.bincount(labels, minlength=len(counts))
    classes = counts.nonzero().flatten()
    return classes, (sums[classes] / counts[classes, None]).float()


# Idle clients beyond a budget wait in files.


class ClientOffloader:
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
        client.reload()

    def leave(self, client: Client) -> None:
        """A client's turn is over; whoever has been idle longest makes room."""
        self.resident[client.id] = client, client.num_bytes
        while self.resident and self.resident_bytes > self.budget_bytes:
            index, (idle, _) = self.resident.popitem(last=False)
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="fedlscl-clients-")
            idle.offload(Path(self.folder.name, f"{index}.pt"))
