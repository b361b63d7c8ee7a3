"""Client A_i: its net, its stream of tasks and its private state; idle clients are offloaded to disk."""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedlscl.data import Batch, Buffer, ClientStream

if TYPE_CHECKING:
    from fedlscl.federated.engine import Engine


@dataclass(kw_only=True)
class Client:
    """One client; nothing here leaves it except what ``Method.upload`` sends."""

    id: int
    net: Any
    """The `Net` that the method built for it."""
    data: ClientStream
    engine: "Engine"
    previous: Any = None
    """The net after the last task (theta^{n-1}, phi^{n-1}), frozen."""
    buffer: Buffer = field(default_factory=Buffer.empty)
    """B^{n-1}, of the tasks before the current one."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors that a method keeps on the client."""
    task: int = 0
    round: int = 0
    num_synced_rounds: int = 0
    """Rounds of the current task whose server response was applied."""
    offloaded_to: Path | None = None
    """The file that holds the client's tensors while they are not in memory."""
    readouts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Weight and bias of the closed-form classifiers after the last task, by readout."""
    constants: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Non-persistent buffers of an offloaded net."""

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
        """Shuffled batches of some samples; the order depends on the turn's seed alone."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return self.data.loader(ids, batch_size, shuffle=True, generator=generator)

    def infer(self, ids: Tensor, part: Callable[[Tensor], Any] | None = None) -> Iterator[tuple[Batch, Any]]:
        """Batches of some samples with the outputs of the client's net, or of ``part``; see ``Engine.infer``."""
        return self.engine.infer(self.net, self.data, ids, part)

    def snapshot(self) -> None:
        """Keep a frozen copy of the net as ``previous``."""
        self.previous = deepcopy(self.net).requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """State of the client between two rounds: tensors and numbers."""
        if self.offloaded_to is not None:
            return torch.load(self.offloaded_to, mmap=True, weights_only=True)
        return {
            "net": self.net.state_dict(),
            "previous": None if self.previous is None else self.previous.state_dict(),
            "buffer": self.buffer.state_dict(),
            "memory": dict(self.memory),
            "num_synced_rounds": self.num_synced_rounds,
            **({"readouts": self.readouts} if self.readouts else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.net.load_state_dict(state["net"])
        self.previous = None
        if state["previous"] is not None:
            self.snapshot()
            self.previous.load_state_dict(state["previous"])
        self.buffer = Buffer(**state["buffer"])
        self.memory, self.num_synced_rounds = dict(state["memory"]), state["num_synced_rounds"]
        self.readouts = state.get("readouts", {})

    @property
    def num_bytes(self) -> int:
        """Size of the client's tensors in memory."""
        state = self.state_dict()
        parts = [state["net"], state["previous"] or {}, state["buffer"], self.memory, *self.readouts.values()]
        return sum(tensor.nbytes for part in parts for tensor in part.values())

    def offload(self, path: Path) -> None:
        """Write the client's state to a file and free its memory; the net keeps its structure on the meta device."""
        state = self.state_dict()
        # A new file: a state that was read from the old one may still be mapped.
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)
        self.constants = {name: value for name, value in self.net.named_buffers() if name not in state["net"]}
        self.net.to("meta")
        self.previous, self.buffer, self.memory, self.readouts = None, Buffer.empty(), {}, {}
        self.offloaded_to = path

    def reload(self) -> None:
        """Read the state back if the client is offloaded."""
        if self.offloaded_to is not None:
            state = torch.load(self.offloaded_to, weights_only=True)
            self.offloaded_to = None
            self.net.to_empty(device="cpu")
            for name, value in self.constants.items():
                self.net.get_buffer(name).copy_(value)
            self.load_state_dict(state)


@dataclass(eq=False, repr=False)
class ClientOffloader:
    """Offloads the least recently used clients to a temporary folder above a memory budget."""

    budget_bytes: float = float("inf")
    """Memory for idle clients."""
    resident: OrderedDict[int, tuple[Client, int]] = field(default_factory=OrderedDict, init=False)
    """Idle clients in memory and their bytes, least recently used first."""
    folder: tempfile.TemporaryDirectory | None = field(default=None, init=False)

    def acquire(self, client: Client) -> None:
        """Load a client into memory for its turn."""
        self.resident.pop(client.id, None)
        client.reload()

    def release(self, client: Client) -> None:
        """End a client's turn; offload idle clients until the budget holds."""
        self.resident[client.id] = client, client.num_bytes
        while sum(size for _, size in self.resident.values()) > self.budget_bytes:
            index, (idle, _) = self.resident.popitem(last=False)
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="fedlscl-clients-")
            idle.offload(Path(self.folder.name, f"{index}.pt"))


@torch.no_grad()
def class_means(client: Client, ids: Tensor, pick: str = "features", unit: bool = True) -> tuple[Tensor, Tensor]:
    """Classes (C,) among some samples, ascending, and the means (C, width) of their features.

    Args:
        client: its net computes the features.
        ids: samples.
        pick: field of the net's output to average.
        unit: whether features are scaled to unit norm first.
    """
    num_classes, width = client.net.head.weight.shape
    sums, counts = torch.zeros(num_classes, width, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.int64)
    for batch, output in client.infer(ids):
        rows, labels = getattr(output, pick).cpu().double(), batch.labels.cpu()
        sums = sums if counts.any() else sums.new_zeros(num_classes, rows.shape[1])
        sums.index_add_(0, labels, torch.nn.functional.normalize(rows) if unit else rows)
        counts += torch.bincount(labels, minlength=num_classes)
    classes = counts.nonzero().flatten()
    return classes, (sums[classes] / counts[classes, None]).float()
