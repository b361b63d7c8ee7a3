"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629), FedProx, EWC and LwF on it, and Local without a server."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl import modules
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, StreamShape
from fedlscl.federated.payload import Payload, Upload, under
from fedlscl.functional.objectives import cross_entropy
from fedlscl.nets.net import Net, SmallClassifier
from fedlscl.nets.vit import FoundationClassifier, FoundationConfig
from fedlscl.options import Count, NonNegative, Positive


@dataclass(kw_only=True)
class FedAvg(Method):
    """Average everything: a small CNN trained from scratch, or the head of a frozen ViT (the paper's FedAvg+ViT)."""

    card: ClassVar = MethodCard(
        "AISTATS 2017", "1602.05629", "small CNN and head, or the head of a frozen ViT", "all that is trained"
    )
    small_model: str = "resnet18"
    """The CNN, any timm name with feature maps."""
    small_image_size: Count = 224
    """Its input size in pixels."""
    pretrained: bool = False
    """Start the CNN from timm's weights."""
    foundation: FoundationConfig | None = None
    """A frozen ViT instead of the CNN; then only the linear head is trained and sent."""
    supports_foundation: ClassVar[bool] = True
    """Whether the method works on a frozen ViT; one that reads a CNN's own statistics or gradients does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.foundation is not None and not self.supports_foundation:
            raise ValueError(f"{type(self).__name__} does not support `foundation`: set `small_model` instead.")

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        if self.foundation is not None:
            return FoundationClassifier(self.foundation, stream.num_classes)
        return SmallClassifier(self.small_model, stream.num_classes, self.small_image_size, self.pretrained)


@dataclass(kw_only=True)
class Local(FedAvg):
    """Baseline without federation: every client trains alone, nothing is sent."""

    card: ClassVar = MethodCard("baseline", trains="as FedAvg", uploads="nothing")

    @override
    def upload(self, client: Client) -> Payload:
        return {}

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        return {}

    @override
    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        return [{} for _ in uploads]

    @override
    def download(self, client: Client, payload: Payload) -> None:
        pass


@dataclass(kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients minimise cross-entropy + mu / 2 ||w - w_g||^2 (Li et al., MLSys 2020, arXiv 1812.06127)."""

    card: ClassVar = MethodCard(
        "MLSys 2020", "1812.06127", trains="as FedAvg, pulled towards the global weights", uploads="all that is trained"
    )
    mu: NonNegative = 0.01
    """Weight of the proximal term; under Adam it is not comparable with the paper's SGD values."""

    @override
    def objective(self, client: Client) -> modules.Learner:
        return modules.ProximalModule(client.net, self.mu, client.classes, lr=self.lr)


FISHER, ANCHOR = "fisher.", "anchor."
"""Prefixes of EWC in a client's memory."""


@dataclass(kw_only=True)
class EWC(FedAvg):
    """FedAvg whose clients penalise changes of weights important for earlier tasks (arXiv 1612.00796).

    Online form: one anchor and one Fisher, decayed by gamma. The Fisher is the empirical one from per-sample gradients;
    it is of the global model on the client's data and never leaves the client (ours).
    """

    card: ClassVar = MethodCard(
        "PNAS 2017", "1612.00796", trains="as FedAvg, with a Fisher penalty", uploads="all that is trained"
    )
    strength: NonNegative = 100.0
    """lambda of the penalty lambda / 2 sum F (w - w*)^2."""
    gamma: NonNegative = 1.0
    """Decay of earlier tasks' Fisher."""
    fisher_samples: Count = 200
    """Training samples of a task from which the Fisher is estimated (ours)."""

    @override
    def objective(self, client: Client) -> modules.Learner:
        anchor, fisher = consolidated(client)
        if not fisher:
            return super().objective(client)
        return modules.ConsolidationModule(client.net, anchor, fisher, self.strength, client.classes, lr=self.lr)

    @override
    def end_task(self, client: Client) -> None:
        consolidate(client, self.fisher_samples, self.gamma)


def consolidate(client: Client, samples: int, gamma: float) -> None:
    """Update a client's anchor and Fisher after a task; the head, which new classes need, is not penalised."""
    chosen = client.train_ids[torch.randperm(len(client.train_ids))[:samples]]
    _, earlier = consolidated(client)
    for name, value in fisher_diagonal(client, chosen).items():
        client.memory[FISHER + name] = (value + gamma * earlier[name] if name in earlier else value).cpu()
        client.memory[ANCHOR + name] = client.net.get_parameter(name).detach().cpu().clone()


def consolidated(client: Client) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Anchor and Fisher of earlier tasks by parameter name; empty before the first task ends."""
    device = client.net.head.weight.device
    anchor, fisher = (under(prefix, client.memory) for prefix in (ANCHOR, FISHER))
    return {n: v.to(device) for n, v in anchor.items()}, {n: v.to(device) for n, v in fisher.items()}


def fisher_diagonal(client: Client, ids: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient of each sample's log-likelihood under its label, by parameter name, without the head."""
    weights = {name: p for name, p in modules.trainable(client.net).items() if not name.startswith("head.")}
    totals = {name: torch.zeros_like(p) for name, p in weights.items()}
    client.net.eval()
    for sample in ids if weights else ():
        batch = client.engine.prepare(client.data.fetch(sample[None]), client.net)
        prefix = None if batch.prefix is None else batch.prefix.float()  # bf16 in the cache, and no autocast here
        logits = client.net(batch.images, prefix).logits
        loss = cross_entropy(logits, batch.labels, client.classes.to(logits.device))
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square() / len(ids)
    return totals


@dataclass(kw_only=True)
class LwF(FedAvg):
    """FedAvg whose clients distil the previous model's logits of old classes on the new images (arXiv 1606.09282).

    The teacher is the global model at the end of the client's previous task. Only columns of the client's classes are
    distilled (ours: those of other clients' private classes were never trained here).
    """

    card: ClassVar = MethodCard(
        "TPAMI 2017", "1606.09282", trains="as FedAvg, distilling the previous model", uploads="all that is trained"
    )
    alpha: NonNegative = 1.0
    """Weight of the distillation, which carries the factor T^2."""
    temperature: Positive = 2.0
    """T of both softmaxes."""

    @override
    def objective(self, client: Client) -> modules.Learner:
        if client.previous is None:
            return super().objective(client)
        teacher = client.previous, client.old, self.alpha, self.temperature
        return modules.DistillationModule(client.net, *teacher, client.classes, lr=self.lr)

    @override
    def end_task(self, client: Client) -> None:
        client.snapshot()
