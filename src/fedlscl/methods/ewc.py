"""EWC (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796) on FedAvg.

Online form: one anchor and one Fisher, decayed by gamma. The Fisher is the empirical one from per-sample gradients; it
is taken of the global model on the client's own data and never leaves the client (ours).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Stage
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules.classification import ClassificationModule, ConsolidationModule, trainable
from fedlscl.objectives import sample_losses

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
        batch = client.engine.place(client.data.fetch(sample[None]), client.net)
        prefix = None if batch.prefix is None else batch.prefix.float()  # bf16 in the cache, and no autocast here
        logits = client.net(batch.images, prefix).trained
        loss = sample_losses(logits, batch.labels, client.classes.to(logits.device)).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square() / len(ids)
    return totals
