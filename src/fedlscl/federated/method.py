"""Method: in what a federated continual-learning method differs from FedAvg."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from fedlscl.data import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.aggregation import (
    classwise_average,
    coordinate_median,
    norm_clipped,
    robust_average,
    robust_rows,
    trimmed_mean,
    weighted_average,
)
from fedlscl.modules.learner import LR, ClassificationModule, Learner
from fedlscl.nets.net import Net

Aggregation = Literal["mean", "median", "trimmed_mean", "norm_clipped_mean"]
"""How an averaging server averages."""


class StreamShape(NamedTuple):
    """Sizes of the clients' streams that nets are built for."""

    num_classes: int
    """Classes of the data set."""
    num_clients: int = 1
    num_tasks: int = 1
    """Tasks of each client's stream, whether or not the run reaches all of them."""


class Stage(NamedTuple):
    """A piece of local work: one objective, its batches, and how often to go through them."""

    name: str
    module: Learner
    batches: Iterable[Batch]
    epochs: int


@dataclass(frozen=True)
class Progress:
    """Position of a run: task and round, both counted from 0."""

    task: int
    round: int
    last: bool = False
    """Whether this is the task's last round."""
    final: bool = False
    """Whether this is the run's last task."""

    @property
    def position(self) -> tuple[int, int]:
        """Task and round."""
        return self.task, self.round

    @property
    def last_trained_task(self) -> int:
        """The newest task that was trained on before this place; -1 at the start."""
        return self.task if self.round else self.task - 1


class MethodCard(NamedTuple):
    """A method in one line; ``fedlscl methods`` and the README show nothing else."""

    venue: str
    """Where and when it was published; control or oracle for what was not."""
    arxiv: str = ""
    """Number on arXiv."""
    trains: str = ""
    """What a client trains."""
    uploads: str = ""
    """What it sends."""


@dataclass(kw_only=True)
class Method(ABC):
    """Every hook is FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629) until a method overrides it whole."""

    card: ClassVar[MethodCard]
    """Stated anew by every method of this package."""
    simulation_only: ClassVar[bool] = False
    """Whether the server looks into its clients, which only one process with all of them allows."""
    averages: ClassVar[bool] = False
    """Whether an ``aggregate`` of the method's own averages as ``self.average`` does."""
    lr: float = LR
    """Learning rate of Adam, fresh in every round (Sec. 5.1.3)."""
    local_epochs: int = 5
    """Epochs of a stage in one round (ours; not in the paper)."""
    batch_size: int = 32
    """Images per step (ours; not in the paper)."""
    head_aggregation: Literal["classwise", "average"] = "classwise"
    """How uploaded heads are averaged: by the samples of each class (ours), or all rows alike (FedAvg's own)."""
    aggregation: Aggregation = "mean"
    """How uploads are averaged. The others hold against a few bad clients and count all alike (docs/robustness.md)."""
    trim: float = 0.2
    """Share of the clients that ``trimmed_mean`` leaves out at either end, rounded up."""

    def __post_init__(self) -> None:
        """Refuse what would train nothing."""
        for name in ("lr", "local_epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} trains nothing: choose more than 0.")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(
                f"aggregation {self.aggregation!r} is unknown: use one of {', '.join(get_args(Aggregation))}."
            )
        if self.aggregation != "mean" and not (self.averages or type(self).aggregate is Method.aggregate):
            raise ValueError(
                f"aggregation {self.aggregation!r} changes nothing in {type(self).__name__}, whose server does not "
                "average as FedAvg's: leave it at mean."
            )
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim {self.trim} leaves nobody: choose 0 or more, below 0.5.")

    @abstractmethod
    def build_net(self, client: int, stream: StreamShape) -> Net:
        """Build the net of one client; the same seed is set before each client's call."""

    def begin_task(self, client: Client) -> None:
        """Prepare for new classes, before the task's first round."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """Local work of one round, stage by stage; a stage is built when the one before it has ended."""
        module = ClassificationModule(client.net, client.classes, lr=self.lr)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """What the client sends after local work."""
        return outgoing(client.net.state_dict())

    def server_stages(self, uploads: list[Upload], progress: Progress) -> Iterator[Stage]:
        """Training at the server before ``aggregate``, stage by stage as in ``stages``; none here."""
        return iter(())

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """What an honest message from this sender of this round looks like: names, shapes and dtypes.

        The door compares every upload with it, and norms with those of tensors that come from ``net`` as it is. A
        method with an ``upload`` of its own should say what that sends (with None, the door checks values alone) and
        raise what is wrong where numbers in a message decide its shapes.

        Args:
            upload: what came; its sender, round and class counts are checked already, its payload is anything.
            net: client 0's as it is built.
        """
        return dict(net.state_dict()) if type(self).upload is Method.upload else None

    def check_upload(self, upload: Upload) -> str:
        """What shows that an upload of the expected form and of finite numbers was not made as ``upload`` makes it.

        One line, and the door refuses it; nothing here. The place for what a method knows of its statistics.
        """
        return ""

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """One answer for each upload, in their order."""
        return [self.average(uploads)] * len(uploads)

    def average(self, uploads: list[Upload]) -> Payload:
        """The average of uploads of equal names and shapes, as the fields say."""
        return federated_average(uploads, self.head_aggregation, self.aggregation, self.trim)

    def download(self, client: Client, payload: Payload) -> None:
        """Take over the server's answer."""
        client.net.load_state_dict(payload)

    def end_task(self, client: Client) -> None:
        """Put by what later tasks will need, after the last download."""

    def state_dict(self) -> dict[str, Any]:
        """Server state that outlives a round: a copy of all dataclass fields with ``init=False``.

        They hold tensors and numbers, or dicts and lists of them; a method with other server state overrides this.
        """
        return {each.name: deepcopy(getattr(self, each.name)) for each in fields(self) if not each.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for name in (each.name for each in fields(self) if not each.init):
            setattr(self, name, deepcopy(state[name]))


def federated_average(
    uploads: list[Upload], head_aggregation: str, aggregation: Aggregation = "mean", trim: float = 0.2
) -> Payload:
    """Average uploads by their numbers of samples; rows of the head by the samples of their class if so asked.

    With another ``aggregation`` than the mean no upload weighs more than another, and rows of the head are combined
    among the clients that have samples of their class.
    """
    payloads, counts = [upload.payload for upload in uploads], [upload.class_counts for upload in uploads]
    if aggregation == "mean":
        average, merge = weighted_average(payloads, [upload.num_samples for upload in uploads]), classwise_average
    else:
        payloads = norm_clipped(payloads) if aggregation == "norm_clipped_mean" else payloads
        share = trim if aggregation == "trimmed_mean" else 0.0
        combine = coordinate_median if aggregation == "median" else partial(trimmed_mean, trim=share)
        average, merge = robust_average(payloads, combine), partial(robust_rows, combine=combine)
        average = {name: value.to(uploads[0].payload[name].dtype) for name, value in average.items()}
    if head_aggregation == "classwise":
        for name, value in average.items():
            if name.startswith("head.") and value.dim():
                average[name] = merge([payload[name] for payload in payloads], counts).to(value.dtype)
    return average
