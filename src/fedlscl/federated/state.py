"""RunState, the position and the measurements of a run, and Callback, which observes it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.metrics import AccuracyMatrix
from fedlscl.federated.payload import Payload, num_bytes
from fedlscl.federated.readout import ReadoutConfig, Readouts
from fedlscl.federated.validation import RejectedUpload, UploadValidator
from fedlscl.nets.net import Net


@dataclass(kw_only=True)
class RunState:
    """What a callback may read about a run; tasks, rounds and clients count from 0."""

    method: Method
    seed: int
    num_clients: int
    num_tasks: int
    rounds_per_task: int
    server_every: str
    precision: str
    engine: Engine
    validator: UploadValidator
    readout_config: ReadoutConfig = field(default_factory=ReadoutConfig)
    run_dir: Path | None = None
    """Folder of the run's files; None to write nothing."""
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    participants: list[int] = field(default_factory=list)
    """Clients sampled for the current round."""
    clients: list[Client] = field(default_factory=list)
    """All clients of a simulation; empty on a server whose clients are remote."""
    remote_nets: list[Net] = field(default_factory=list)
    """One net per remote client, structure only (meta device)."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data set and each client's share of it, as in results.json."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished stage: task, round, client, stage and the means of its loss terms."""
    matrix: AccuracyMatrix = field(init=False)
    readouts: Readouts = field(init=False)
    """Closed-form classifiers on the clients' features, if asked for."""
    traffic: dict[str, Tensor] = field(init=False)
    """``up`` and ``down`` in bytes, ``up_values`` and ``down_values`` in numbers, (clients, tasks, rounds) each."""

    def __post_init__(self) -> None:
        self.matrix = AccuracyMatrix(self.num_clients, self.num_tasks)
        self.readouts = Readouts(self.readout_config, self.method, self.num_clients, self.num_tasks)
        zeros = torch.zeros(self.num_clients, self.num_tasks, self.rounds_per_task, dtype=torch.int64)
        self.traffic = {name: zeros.clone() for name in ("up", "down", "up_values", "down_values")}

    def count(self, direction: str, client: int, payload: Payload) -> None:
        """Record a message of the current round, 'up' or 'down'."""
        index = client, *self.progress.position
        self.traffic[direction][index] = num_bytes(payload)
        self.traffic[f"{direction}_values"][index] = sum(value.numel() for value in payload.values())

    @property
    def nets(self) -> list[Net]:
        """One net per client."""
        return [client.net for client in self.clients] or self.remote_nets

    @property
    def rejected(self) -> list[RejectedUpload]:
        """Uploads that were rejected so far."""
        return self.validator.rejected

    @property
    def step(self) -> int:
        """Number of rounds before the current one."""
        return self.progress.task * self.rounds_per_task + self.progress.round

    @property
    def device(self) -> torch.device:
        """Device of the training."""
        return self.engine.fabric.device


class Callback:
    """Observes a run; no hook does anything by default. For stages of the server, ``client`` is None."""

    def on_fit_start(self, run: RunState) -> None:
        """Clients are built and a checkpoint, if given, is restored."""

    def on_task_start(self, run: RunState) -> None:
        """A task has started on all clients."""

    def on_round_start(self, run: RunState) -> None:
        """The participants are sampled."""

    def on_client_start(self, run: RunState, client: Client) -> None:
        """A client starts its turn in a round."""

    def on_stage_start(self, run: RunState, client: Client | None, stage: Stage) -> None:
        """A client or the server starts a stage."""

    def on_batch_end(self, run: RunState, client: Client | None, num_images: int) -> None:
        """An optimizer step is done."""

    def on_stage_end(
        self, run: RunState, client: Client | None, stage: Stage, terms: dict[str, float], seconds: float
    ) -> None:
        """A stage is trained; ``terms`` are means of the loss terms over the last epoch."""

    def on_evaluation_start(self, run: RunState, client: Client, phase: str) -> None:
        """A client is to be evaluated, 'before' or 'after' the last aggregation of a task."""

    def on_evaluation_end(self, run: RunState, client: Client, phase: str, seconds: float) -> None:
        """The matrix has the client's accuracies."""

    def on_server_end(self, run: RunState, seconds: float) -> None:
        """The server has aggregated."""

    def on_round_end(self, run: RunState) -> None:
        """The server's responses are downloaded and counted."""

    def on_task_end(self, run: RunState) -> None:
        """All clients are evaluated after this task."""

    def on_checkpoint(self, run: RunState) -> None:
        """A checkpoint was written."""

    def on_fit_end(self, run: RunState) -> None:
        """All tasks are trained."""

    def on_exception(self, run: RunState) -> None:
        """The run ends with an exception."""


def extrapolated(sent: Tensor, rounds_done: int) -> float:
    """Estimated bytes of a run from the first rounds of its first task; all later rounds repeat the last of them.

    Example:
        >>> sent = torch.zeros(1, 2, 3)  # (clients, tasks, rounds)
        >>> sent[0, 0] = torch.tensor([10, 4, 0])
        >>> extrapolated(sent, rounds_done=2)
        36.0
    """
    _, tasks, rounds = sent.shape
    by_round = sent[:, 0].sum(0)[:rounds_done].tolist()
    return float(tasks * (sum(by_round) + (rounds - rounds_done) * by_round[-1]))
