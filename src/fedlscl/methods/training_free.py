"""Honest controls: what the frozen ViT gives without any gradient step.

FedNCM keeps class means, FedRidge solves one ridge regression whose Gram matrices are sums over clients and tasks, so
both are exact and forget nothing (the analytic family: RanPAC, McDonnell et al., NeurIPS 2023, arXiv 2307.02251; in
federated form AFL, He et al., CVPR 2025, arXiv 2405.16240).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import MomentSums, added, moment_sums, ridge_solution, sums_error
from fedlscl.nets.heads import FoundationClassifier
from fedlscl.nets.net import Net
from fedlscl.nets.vit import FoundationConfig


@dataclass(kw_only=True)
class _Statistics(Method):
    """Sums of statistics over clients and tasks; a task's are sent once, in its first round."""

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Nothing is trained."""
        return iter(())

    def upload(self, client: Client) -> Payload:
        """The task's statistics, in the task's first message alone."""
        return {} if client.num_synced_rounds else outgoing(self.statistics(client))

    def statistics(self, client: Client) -> dict[str, Tensor]:
        """What the client adds to the sums for its task."""
        raise NotImplementedError

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Add up what is new and send the answer of all that came so far."""
        add_sums(self.sums, [upload.payload for upload in uploads], ("means", *MomentSums._fields))
        return [self.answer()] * len(uploads)

    def answer(self) -> Payload:
        """The head that follows from the sums."""
        raise NotImplementedError

    def download(self, client: Client, payload: Payload) -> None:
        """The server's head is the client's."""
        client.net.load_state_dict(payload)


@dataclass(kw_only=True)
class FedNCM(_Statistics):
    """Nearest class mean: cosine to the mean of each class's normalised features."""

    card: ClassVar = MethodCard("baseline", trains="nothing: class means on the frozen ViT", uploads="sums of features")

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A frozen ViT and one direction per class."""
        return FoundationClassifier(self.foundation, stream.num_classes, head="cosine")

    def statistics(self, client: Client) -> dict[str, Tensor]:
        """Counts times class means of the task, (num_classes, width)."""
        classes, means = class_means(client, client.train_ids)
        sums = torch.zeros_like(client.net.head.weight, device="cpu")
        sums[classes] = means * client.data.class_counts(client.task)[classes, None]
        return {"means": sums}

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """The sums, or nothing after the task's first answer."""
        return {"means": net.head.weight} if upload.payload else {}

    def check_upload(self, upload: Upload) -> str:
        """Whether a sum is longer than so many unit features can make it."""
        sizes = upload.payload["means"].norm(dim=1) if upload.payload else torch.zeros(())
        is_longer = (sizes > (1 + 1e-4) * upload.class_counts).any()
        return "means are larger than those of unit features" if is_longer else ""

    def answer(self) -> Payload:
        """Unit directions; zero for classes that nobody has met."""
        return {"head.weight": F.normalize(self.sums["means"]).float()}


@dataclass(kw_only=True)
class FedRidge(_Statistics):
    """Ridge regression from features to one-hot labels, in closed form over all data of all clients and tasks."""

    card: ClassVar = MethodCard(
        "baseline", trains="nothing: ridge regression on the frozen ViT", uploads="Gram matrix, products with labels"
    )

    ridge: float = 0.01
    """Regularisation relative to the mean eigenvalue of the Gram matrix (ours)."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A frozen ViT and a linear head."""
        return FoundationClassifier(self.foundation, stream.num_classes, head="unit")

    def statistics(self, client: Client) -> dict[str, Tensor]:
        """Gram matrix (width + 1, width + 1) and products with the labels (width + 1, num_classes) of the task."""
        return moments_of_task(client, "features")

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """The sums, or nothing after the task's first answer."""
        return empty_sums(net)._asdict() if upload.payload else {}

    def check_upload(self, upload: Upload) -> str:
        """Whether the sums are those of as many samples of unit features as announced."""
        return sums_error(MomentSums(**upload.payload), upload.class_counts) if upload.payload else ""

    def answer(self) -> Payload:
        """The ridge solution as a linear head."""
        weight, bias = ridge_solution(MomentSums(self.sums["gram"], self.sums["products"]), self.ridge)
        return {"head.weight": weight, "head.bias": bias}


def moments_of(client: Client, ids: Tensor, pick: str) -> MomentSums | None:
    """Sums over samples; None where there are none."""
    total: MomentSums | None = None
    for batch, output in client.infer(ids):
        part = moment_sums(getattr(output, pick), batch.labels, output.logits.shape[1])
        total = part if total is None else added(total, part)
    return total


def empty_sums(net: Net) -> MomentSums:
    """Sums of the shapes that features and classes of a net give, without content."""
    num_classes, width = net.head.weight.shape
    shapes = (width + 1, width + 1), (width + 1, num_classes)
    return MomentSums(*(torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes))


def moments_of_task(client: Client, pick: str) -> dict[str, Tensor]:
    """Sums over the current task's samples; nothing for a client without any."""
    sums = moments_of(client, client.train_ids, pick)
    return {} if sums is None else sums._asdict()


def add_sums(
    sums: dict[str, Tensor], payloads: Iterable[Mapping[str, Tensor]], names: Sequence[str] = MomentSums._fields
) -> None:
    """Add what came under ``names`` to the server's sums, in the given order."""
    for payload in payloads:
        for name in names:
            if name in payload:
                value = payload[name].double()
                sums[name] = sums[name] + value if name in sums else value
