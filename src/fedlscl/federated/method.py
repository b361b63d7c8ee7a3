"""Method: the hooks by which a federated continual-learning method differs from FedAvg."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from fedlscl.data import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.aggregation import (
    classwise_average,
    norm_clipped,
    robust_average,
    robust_rows,
    weighted_average,
)
from fedlscl.modules import LR, ClassificationModule, Learner
from fedlscl.nets.net import Net
from fedlscl.options import Count, Interval, Positive, check_options

Aggregation = Literal["mean", "median", "trimmed_mean", "norm_clipped_mean"]
"""How a server averages uploads."""
PublicImages = Callable[[Tensor, int, int], Iterable[Batch]]
"""Batches of held-out images of classes (n,), at most so many of each class, and at most so many in a batch."""


class StreamShape(NamedTuple):
    """Sizes of the clients' streams that nets are built for."""

    num_classes: int
    """Classes of the data set."""
    num_clients: int = 1
    num_tasks: int = 1
    """Tasks of each client's stream, whether or not the run reaches all of them."""


class Stage(NamedTuple):
    """A phase of training: one objective, its batches, and the number of epochs."""

    name: str
    module: Learner
    batches: Iterable[Batch]
    epochs: int


@dataclass(frozen=True)
class Progress:
    """Position of a run; tasks and rounds count from 0."""

    task: int
    round: int
    last: bool = False
    """Whether this is the task's last round."""
    final: bool = False
    """Whether this is the run's last task."""

    @property
    def position(self) -> tuple[int, int]:
        """(task, round)."""
        return self.task, self.round

    @property
    def last_trained_task(self) -> int:
        """Newest task with training before this position; -1 at the start."""
        return self.task if self.round else self.task - 1


class MethodCard(NamedTuple):
    """A method in one row of a table, as ``fedlscl methods`` prints it."""

    venue: str
    """Venue and year of the publication; baseline or all data (centralised) if it has none."""
    arxiv: str = ""
    """arXiv id."""
    trains: str = ""
    """What a client trains."""
    uploads: str = ""
    """What a client sends."""


@dataclass(kw_only=True)
class Method(ABC):
    """All hooks default to FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629).

    Override a hook completely; do not call ``super()``.
    """

    card: ClassVar[MethodCard]
    """Description for tables; every method of this package has its own."""
    simulation_only: ClassVar[bool] = False
    """Whether the server reads its clients' data, which requires all clients in one process."""
    averages: ClassVar[bool] = False
    """Whether an overridden ``aggregate`` calls ``self.average``, so that ``aggregation`` has an effect."""
    lr: Positive = LR
    """Learning rate of Adam, which restarts in every round (Sec. 5.1.3)."""
    local_epochs: Count = 5
    """Epochs of a stage in one round (ours; not in the paper)."""
    batch_size: Count = 32
    """Images per step (ours; not in the paper)."""
    head_aggregation: Literal["classwise", "average"] = "classwise"
    """Weights of uploaded heads: each row by the samples of its class (ours), or all rows by all samples (FedAvg)."""
    aggregation: Aggregation = "mean"
    """How uploads are averaged; all but mean are robust and weight all clients equally (docs/robustness.md)."""
    trim: Annotated[float, Interval("[0, 0.5)")] = 0.2
    """Fraction of the clients that ``trimmed_mean`` drops at either end, rounded up."""

    def __post_init__(self) -> None:
        """Check the options; ranges and choices are those of their annotations."""
        check_options(self)
        if self.aggregation != "mean" and not (self.averages or type(self).aggregate is Method.aggregate):
            raise ValueError(
                f"aggregation must be mean for {type(self).__name__}, whose server does not average as FedAvg's, got "
                f"{self.aggregation!r}."
            )

    @abstractmethod
    def build_net(self, client: int, stream: StreamShape) -> Net:
        """Build the net of one client; the same seed is set before each client's call."""

    def begin_task(self, client: Client) -> None:
        """Prepare for the task's classes; called before its first round."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """Yield the stages of one round's local training; each is built when the previous one is trained."""
        batches = client.loader(client.train_ids, self.batch_size)
        yield Stage("train", self.objective(client), batches, self.local_epochs)

    def objective(self, client: Client) -> Learner:
        """What a client minimises in a round, where it trains in one stage on its task's samples."""
        return ClassificationModule(client.net, client.classes, lr=self.lr)

    def upload(self, client: Client) -> Payload:
        """Tensors to send to the server after local training."""
        return outgoing(client.net.state_dict())

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """Expected names, shapes and dtypes of a well-formed upload; None to check values only.

        Required where ``upload`` is overridden. Of the upload, all but the payload is validated already. Values of
        tensors taken from ``net``, the newly built net of client 0, are references for norms. Raise an error if numbers
        in the payload decide its shapes and are invalid.
        """
        return dict(net.state_dict()) if type(self).upload is Method.upload else None

    def check_upload(self, upload: Upload) -> str:
        """The reason to reject a well-formed, finite upload in one line, or an empty string."""
        return ""

    @property
    def needs_public_images(self) -> bool:
        """Whether the server trains on labelled images that no client has, which only a simulation can give it."""
        return False

    def use_public_images(self, images: PublicImages) -> None:
        """Keep the loader of such images; called at the start of a simulation, where ``needs_public_images``."""

    def server_stages(self, uploads: list[Upload], progress: Progress) -> Iterator[Stage]:
        """Yield stages that the server trains before ``aggregate``; none by default."""
        return iter(())

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """The server's responses, one for each upload, in the same order."""
        return [self.average(uploads)] * len(uploads)

    def average(self, uploads: list[Upload]) -> Payload:
        """Average of uploads with equal names and shapes, according to the method's options."""
        return federated_average(uploads, self.head_aggregation, self.aggregation, self.trim)

    def download(self, client: Client, payload: Payload) -> None:
        """Apply the server's response."""
        client.net.load_state_dict(payload)

    def end_task(self, client: Client) -> None:
        """Save state needed by later tasks; called after the last download of a task."""

    @property
    def masks_sums(self) -> bool:
        """Whether clients mask sums of which the server only needs the total, as those of readouts."""
        return False

    @property
    def adds_noise(self) -> bool:
        """Whether uploads get noise, which sums of readouts would not have."""
        return False

    @property
    def has_equal_small_models(self) -> bool:
        """Whether all clients' small models start from the same weights, so that sums of their features make sense."""
        return True

    def mask_sums(self, client: Client, sums: Payload) -> Payload:
        """A client's masked summands, where ``masks_sums``: int64, of equal shapes on all clients."""
        raise NotImplementedError(f"{type(self).__name__} masks no sums")

    def unmask_sums(self, summands: dict[int, Payload]) -> Payload:
        """The total of the masked summands of all clients, float64."""
        raise NotImplementedError(f"{type(self).__name__} masks no sums")

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
    """Average uploads weighted by samples; with 'classwise', rows of the head by the samples of their class.

    Other values of ``aggregation`` than 'mean' weight all uploads equally, and rows of the head all clients that have
    samples of their class.
    """
    payloads, counts = [upload.payload for upload in uploads], [upload.class_counts for upload in uploads]
    if aggregation == "mean":
        average, merge = weighted_average(payloads, [upload.num_samples for upload in uploads]), classwise_average
    else:
        payloads = norm_clipped(payloads) if aggregation == "norm_clipped_mean" else payloads
        share = {"median": 0.5, "trimmed_mean": trim, "norm_clipped_mean": 0.0}[aggregation]
        average, merge = robust_average(payloads, share), partial(robust_rows, trim=share)
        average = {name: value.to(uploads[0].payload[name].dtype) for name, value in average.items()}
    if head_aggregation == "classwise":
        for name, value in average.items():
            if name.startswith("head.") and value.dim():
                average[name] = merge([payload[name] for payload in payloads], counts).to(value.dtype)
    return average
