"""RunState: what a run has measured and where it is, for callbacks, results and checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.metrics import AccuracyMatrix
from fedlscl.federated.payload import Payload, num_bytes
from fedlscl.federated.validation import RejectedUpload, UploadValidator
from fedlscl.nets.net import Net

Traffic = dict[str, Tensor]
"""``up`` and ``down`` in bytes, ``up_values`` and ``down_values`` in numbers, (clients, tasks, rounds) each."""


@dataclass(kw_only=True)
class RunState:
    """Everything that a callback may read about a run; tasks, rounds and clients count from 0."""

    method: Method
    seed: int
    num_clients: int
    num_tasks: int
    rounds_per_task: int
    server_every: str
    precision: str
    engine: Engine
    run_dir: Path | None = None
    """Folder of the run's files; None if nothing is written."""
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    participants: list[int] = field(default_factory=list)
    """Clients that take part in the current round."""
    clients: list[Client] = field(default_factory=list)
    """All clients of a simulation; empty on a server whose clients are remote."""
    remote_nets: list[Net] = field(default_factory=list)
    """One net per remote client, structure only (meta device)."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data set and each client's share of it, as results.json states it."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished stage: task, round, client, stage and the means of its loss terms."""
    validator: UploadValidator | None = None
    """Checks uploads; None as long as no client has stated the number of classes."""
    matrix: AccuracyMatrix = field(init=False)
    traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = AccuracyMatrix(self.num_clients, self.num_tasks)
        self.traffic = no_traffic(self.num_clients, self.num_tasks, self.rounds_per_task)

    @property
    def nets(self) -> list[Net]:
        """One net per client."""
        return [client.net for client in self.clients] or self.remote_nets

    @property
    def rejected(self) -> list[RejectedUpload]:
        """Uploads that validation rejected so far."""
        return [] if self.validator is None else self.validator.rejected

    @property
    def step(self) -> int:
        """Rounds before the current one since the start of the run."""
        return self.progress.task * self.rounds_per_task + self.progress.round

    @property
    def device(self) -> torch.device:
        """Where nets are trained."""
        return self.engine.fabric.device


def no_traffic(num_clients: int, num_tasks: int, rounds_per_task: int) -> Traffic:
    """Zero traffic of a run that has not started."""
    shape = (num_clients, num_tasks, rounds_per_task)
    return {name: torch.zeros(shape, dtype=torch.int64) for name in ("up", "down", "up_values", "down_values")}


def count(traffic: Traffic, direction: str, client: int, progress: Progress, payload: Payload) -> None:
    """Record one message, 'up' or 'down'."""
    place = client, progress.task, progress.round
    traffic[direction][place] = num_bytes(payload)
    traffic[f"{direction}_values"][place] = sum(value.numel() for value in payload.values())


def extrapolated(traffic: Traffic, direction: str, rounds_done: int) -> float:
    """Bytes of a whole run, from the first rounds of its first task; later rounds send what the last of them sent.

    Example:
        >>> traffic = no_traffic(num_clients=1, num_tasks=2, rounds_per_task=3)
        >>> traffic["up"][0, 0] = torch.tensor([10, 4, 0])
        >>> extrapolated(traffic, "up", rounds_done=2)
        36.0
    """
    _, tasks, rounds = traffic[direction].shape
    by_round = traffic[direction][:, 0].sum(0)[:rounds_done].tolist()
    return float(tasks * (sum(by_round) + (rounds - rounds_done) * by_round[-1]))
