"""Honest controls: what the frozen ViT gives without any gradient step.

FedNCM keeps class means, FedRidge solves one ridge regression whose Gram matrices are sums over clients and tasks, so
both are exact and forget nothing (the analytic family: RanPAC, McDonnell et al., NeurIPS 2023, arXiv 2307.02251; in
federated form AFL, He et al., CVPR 2025, arXiv 2405.16240).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.nets.classifier import FoundationClassifier
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

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Add up what is new and send the answer of all that came so far."""
        for upload in uploads:
            for name, value in upload.payload.items():
                self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()
        return [self.answer()] * len(uploads)

    def answer(self) -> Payload:
        """The head that follows from the sums."""
        raise NotImplementedError

    def download(self, client: Client, payload: Payload) -> None:
        """The server's head is the client's."""
        client.net.load_state_dict(payload)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums."""
        self.sums = dict(state["sums"])


@dataclass(kw_only=True)
class FedNCM(_Statistics):
    """Nearest class mean: cosine to the mean of each class's normalised features."""

    def build_net(self, client: int, num_classes: int) -> Net:
        """A frozen ViT and one direction per class."""
        return FoundationClassifier(self.foundation, num_classes, head="cosine")

    def upload(self, client: Client) -> Payload:
        """Counts times class means of the task, (num_classes, width)."""
        if client.round:
            return {}
        classes, means = class_means(client, client.train_ids)
        sums = torch.zeros_like(client.net.head.weight, device="cpu")
        sums[classes] = means * client.data.class_counts(client.task)[classes, None]
        return outgoing({"means": sums})

    def answer(self) -> Payload:
        """Unit directions; zero for classes that nobody has met."""
        return {"head.weight": F.normalize(self.sums["means"]).float()}


@dataclass(kw_only=True)
class FedRidge(_Statistics):
    """Ridge regression from features to one-hot labels, in closed form over all data of all clients and tasks."""

    ridge: float = 0.01
    """Regularisation relative to the mean eigenvalue of the Gram matrix (ours)."""

    def build_net(self, client: int, num_classes: int) -> Net:
        """A frozen ViT and a linear head."""
        return FoundationClassifier(self.foundation, num_classes)

    def upload(self, client: Client) -> Payload:
        """Gram matrix (width + 1, width + 1) and products with the labels (width + 1, num_classes) of the task."""
        if client.round:
            return {}
        gram = products = None
        for batch, output in client.infer(client.train_ids):
            x = F.pad(output.features.double(), (0, 1), value=1.0)
            y = F.one_hot(batch.labels, output.logits.shape[1]).double()
            gram = x.mT @ x if gram is None else gram + x.mT @ x
            products = x.mT @ y if products is None else products + x.mT @ y
        return outgoing({} if gram is None else {"gram": gram, "products": products})

    def answer(self) -> Payload:
        """The ridge solution as a linear head."""
        gram = self.sums["gram"]
        scale = self.ridge * gram.diagonal().mean()
        solution = torch.linalg.solve(gram + scale * torch.eye(len(gram), dtype=gram.dtype), self.sums["products"])
        return {"head.weight": solution[:-1].mT.float().contiguous(), "head.bias": solution[-1].float()}
