"""Training-free baselines on frozen ViT features.

FedNCM keeps class means, FedRidge solves one ridge regression whose Gram matrices are sums over clients and tasks, so
both are exact and forget nothing (the analytic family: RanPAC, McDonnell et al., NeurIPS 2023, arXiv 2307.02251; in
federated form AFL, He et al., CVPR 2025, arXiv 2405.16240).
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import MomentSums, added, moment_sums, ridge_solution, sums_error
from fedlscl.nets.heads import FoundationClassifier
from fedlscl.nets.net import Net
from fedlscl.nets.vit import FoundationConfig


@dataclass(kw_only=True)
class _Statistics(Method):
    """Sums of statistics over clients and tasks; each client sends a task's once, in its first round."""

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def statistics(self, client: Client) -> dict[str, Tensor]:
        """The client's summands for its task."""

    @abstractmethod
    def solve(self) -> Payload:
        """The head that follows from the sums."""

    @override
    def stages(self, client: Client) -> Iterator[Stage]:
        return iter(())

    @override
    def upload(self, client: Client) -> Payload:
        return {} if client.num_synced_rounds else outgoing(self.statistics(client))

    @override
    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        add_sums(self.sums, [upload.payload for upload in uploads], ("means", *MomentSums._fields))
        return [self.solve()] * len(uploads)


@dataclass(kw_only=True)
class FedNCM(_Statistics):
    """Nearest class mean: cosine to the mean of each class's normalised features."""

    card: ClassVar = MethodCard("baseline", trains="nothing: class means on the frozen ViT", uploads="sums of features")

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        return FoundationClassifier(self.foundation, stream.num_classes, head="cosine")

    @override
    def statistics(self, client: Client) -> dict[str, Tensor]:
        """Counts times class means of the task, (num_classes, width)."""
        classes, means = class_means(client, client.train_ids)
        sums = torch.zeros_like(client.net.head.weight, device="cpu")
        sums[classes] = means * client.data.class_counts(client.task)[classes, None]
        return {"means": sums}

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        return {"means": net.head.weight} if upload.payload else {}

    @override
    def check_upload(self, upload: Upload) -> str:
        sizes = upload.payload["means"].norm(dim=1) if upload.payload else torch.zeros(())
        is_longer = (sizes > (1 + 1e-4) * upload.class_counts).any()
        return "means are larger than those of unit features" if is_longer else ""

    @override
    def solve(self) -> Payload:
        """Unit directions; zero for classes without samples."""
        return {"head.weight": F.normalize(self.sums["means"]).float()}


@dataclass(kw_only=True)
class FedRidge(_Statistics):
    """Ridge regression from features to one-hot labels, in closed form over all data of all clients and tasks."""

    card: ClassVar = MethodCard(
        "baseline", trains="nothing: ridge regression on the frozen ViT", uploads="Gram matrix, products with labels"
    )

    ridge: float = 0.01
    """Regularisation relative to the mean eigenvalue of the Gram matrix (ours)."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        return FoundationClassifier(self.foundation, stream.num_classes, head="unit")

    @override
    def statistics(self, client: Client) -> dict[str, Tensor]:
        """``MomentSums`` of the task; nothing from a client without samples."""
        sums = moments_of(client, client.train_ids, "features")
        return {} if sums is None else sums._asdict()

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        return empty_sums(net)._asdict() if upload.payload else {}

    @override
    def check_upload(self, upload: Upload) -> str:
        return sums_error(MomentSums(**upload.payload), upload.class_counts) if upload.payload else ""

    @override
    def solve(self) -> Payload:
        weight, bias = ridge_solution(MomentSums(self.sums["gram"], self.sums["products"]), self.ridge)
        return {"head.weight": weight, "head.bias": bias}


def moments_of(client: Client, ids: Tensor, pick: str) -> MomentSums | None:
    """Sums over some samples of the output ``pick`` of the client's net; None without samples."""
    total: MomentSums | None = None
    for batch, output in client.infer(ids):
        total = added(total, moment_sums(getattr(output, pick), batch.labels, output.logits.shape[1]))
    return total


def empty_sums(net: Net) -> MomentSums:
    """Sums of the shapes for a net's features and classes, on the meta device."""
    num_classes, width = net.head.weight.shape
    shapes = (width + 1, width + 1), (width + 1, num_classes)
    return MomentSums(*(torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes))


def add_sums(sums: dict[str, Tensor], payloads: Iterable[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Add the tensors under ``names`` in the payloads to the server's sums, in the given order."""
    for payload in payloads:
        for name in names:
            if name in payload:
                value = payload[name].double()
                sums[name] = sums[name] + value if name in sums else value
