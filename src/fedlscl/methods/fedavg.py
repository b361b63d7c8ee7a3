"""FedAvg and its regularised variants: FedProx, EWC and LwF, and Local, which never aggregates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload
from fedlscl.functional.objectives import sample_losses
from fedlscl.modules.learner import (
    ClassificationModule,
    ConsolidationModule,
    DistillationModule,
    ProximalModule,
    trainable,
)
from fedlscl.nets.cnn import SmallClassifier
from fedlscl.nets.heads import FoundationClassifier
from fedlscl.nets.net import Net
from fedlscl.nets.vit import FoundationConfig

# FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629), from scratch or on a frozen ViT; and none at all.


@dataclass(kw_only=True)
class FedAvg(Method):
    """Average everything: a small CNN trained from scratch, or the head of a frozen ViT (the paper's FedAvg+ViT)."""

    card: ClassVar = MethodCard(
        "AISTATS 2017",
        "1602.05629",
        trains="small CNN and head, or the head of a frozen ViT",
        uploads="all that is trained",
    )

    small_model: str = "resnet18"
    """The CNN, any timm name with feature maps."""
    small_image_size: int = 224
    """Its input size in pixels."""
    pretrained: bool = False
    """Start the CNN from timm's weights."""
    foundation: FoundationConfig | None = None
    """A frozen ViT in place of the CNN; only the linear head is then trained and sent."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A CNN with a head, or a frozen ViT with a head."""
        if self.foundation is not None:
            return FoundationClassifier(self.foundation, stream.num_classes)
        return SmallClassifier(self.small_model, stream.num_classes, self.small_image_size, self.pretrained)


@dataclass(kw_only=True)
class Local(FedAvg):
    """Control: every client trains alone and nothing is sent."""

    card: ClassVar = MethodCard("baseline", trains="as FedAvg", uploads="nothing")

    def upload(self, client: Client) -> Payload:
        """Nothing."""
        return {}

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """Nothing."""
        return {}

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Nothing."""
        return [{} for _ in uploads]

    def download(self, client: Client, payload: Payload) -> None:
        """Nothing."""


# FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg with a pull towards the round's global weights.


@dataclass(kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients minimise cross-entropy + mu / 2 ||w - w_g||^2."""

    card: ClassVar = MethodCard(
        "MLSys 2020", "1812.06127", trains="as FedAvg, pulled towards the global weights", uploads="all that is trained"
    )

    mu: float = 0.01
    """Strength of the pull; under Adam it is not comparable with the paper's SGD values."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """One stage, anchored at the weights just received."""
        module = ProximalModule(client.net, self.mu, client.classes, lr=self.lr)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)


# EWC (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796) on FedAvg.
#
# Online form: one anchor and one Fisher, decayed by gamma. The Fisher is the empirical one from per-sample gradients;
# it is taken of the global model on the client's own data and never leaves the client (ours).

FISHER, ANCHOR = "fisher.", "anchor."
"""Prefixes of a client's memory."""


@dataclass(kw_only=True)
class EWC(FedAvg):
    """FedAvg whose clients pay for moving weights that mattered for their earlier tasks."""

    card: ClassVar = MethodCard(
        "PNAS 2017", "1612.00796", trains="as FedAvg, with a Fisher penalty", uploads="all that is trained"
    )

    strength: float = 100.0
    """lambda of the penalty lambda / 2 sum F (w - w*)^2."""
    gamma: float = 1.0
    """Decay of earlier tasks' Fisher."""
    fisher_samples: int = 200
    """Training samples of a task that the Fisher is estimated from (ours)."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """Plain training on the first task, with the penalty from the second on."""
        anchor, fisher = consolidated(client)
        if not fisher:
            module = ClassificationModule(client.net, client.classes, lr=self.lr)
        else:
            module = ConsolidationModule(client.net, anchor, fisher, self.strength, client.classes, lr=self.lr)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)

    def end_task(self, client: Client) -> None:
        """Add the task's Fisher and anchor at the weights that will be evaluated."""
        consolidate(client, self.fisher_samples, self.gamma)


def consolidate(client: Client, samples: int, gamma: float) -> None:
    """Update a client's anchor and Fisher after a task; rows of the head move freely, new classes need them."""
    chosen = client.train_ids[torch.randperm(len(client.train_ids))[:samples]]
    fisher = fisher_diagonal(client, chosen)
    _, earlier = consolidated(client)
    weights = trainable(client.net)
    for name, value in fisher.items():
        client.memory[FISHER + name] = (value + gamma * earlier[name] if name in earlier else value).cpu()
        client.memory[ANCHOR + name] = weights[name].detach().cpu().clone()


def consolidated(client: Client) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Anchor and Fisher of earlier tasks by parameter name; empty before the first task ends."""
    device = client.net.head.weight.device
    picked = [
        {name.removeprefix(start): value.to(device) for name, value in client.memory.items() if name.startswith(start)}
        for start in (ANCHOR, FISHER)
    ]
    return picked[0], picked[1]


def fisher_diagonal(client: Client, ids: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient of each sample's log-likelihood under its label, by parameter name, head left out."""
    weights = {name: p for name, p in trainable(client.net).items() if not name.startswith("head.")}
    totals = {name: torch.zeros_like(p) for name, p in weights.items()}
    if not totals:
        return totals
    client.net.eval()
    for sample in ids:
        batch = client.engine.prepare(client.data.fetch(sample[None]), client.net)
        prefix = None if batch.prefix is None else batch.prefix.float()  # bf16 in the cache, and no autocast here
        logits = client.net(batch.images, prefix).head_logits
        loss = sample_losses(logits, batch.labels, client.classes.to(logits.device)).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square() / len(ids)
    return totals


# LwF (Li & Hoiem, TPAMI 2017, arXiv 1606.09282) on FedAvg.
#
# The teacher is the global model at the end of the client's previous task, and only columns of classes that the client
# itself has met are distilled (ours: the columns of other clients' private classes were never trained here).


@dataclass(kw_only=True)
class LwF(FedAvg):
    """FedAvg whose clients keep the old model's answers about old classes on the new images."""

    card: ClassVar = MethodCard(
        "TPAMI 2017", "1606.09282", trains="as FedAvg, distilling the previous model", uploads="all that is trained"
    )

    alpha: float = 1.0
    """Weight of the distillation, which carries the factor T^2."""
    temperature: float = 2.0
    """T of both softmaxes."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """Plain training on the first task, with distillation from the second on."""
        if client.previous is None:
            module = ClassificationModule(client.net, client.classes, lr=self.lr)
        else:
            module = DistillationModule(
                client.net, client.previous, client.old, self.alpha, self.temperature, client.classes, lr=self.lr
            )
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)

    def end_task(self, client: Client) -> None:
        """The model as the server last sent it becomes the teacher."""
        client.snapshot()
